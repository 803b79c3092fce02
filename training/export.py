"""Model files: a network as ONNX, checked against torch, with all that the runtime must know in its metadata.

A live model is the network for one hop, with its states as named inputs and outputs, and what tells players apart; a
window model is a slot network for one window.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from realtime_mpe.analysis import N_BINS, PAPER, PHASES, AnalysisConfig
from realtime_mpe.model import STATE_PREFIX, ModelInfo, OnnxModel
from realtime_mpe.notes import Thresholds
from realtime_mpe.window_model import DEFAULT_LOOKAHEAD, DEFAULT_STRIDE, WindowInfo

from .network import LiveNetwork
from .players import Players
from .predict import TIMBRE_FORMAT
from .quantise import quantised
from .slots import TIMBRE_FRAMES, WINDOW, SlotNetwork, TimbreEncoder, harmonic_input

OPSET = 17
TOLERANCE = 1e-4
HALF_TOLERANCE = 3e-2  # of the same network with its weights in half precision
QUANTISED_TOLERANCE = 1e-2  # on average, with its convolutions in eight bits
HALVED_FROM = 64  # weights in a tensor: what is smaller is not worth it
QUANTISING = "QuantizeLinear", "DequantizeLinear"  # nodes whose scales are too small for half precision
CHECKED_FRAMES = 256
CHECKED_WINDOWS = 4

Smaller = tuple[Callable[[object], object], Callable[[np.ndarray], float], float]
"""Makes a model smaller; how its differences from torch are then measured, and how large they may be."""


class Hop(nn.Module):
    """The network for exactly one frame of each phase, with probabilities instead of logits and no time axis in its
    outputs.

    mix, onset, embedding where there is one, and the new states.
    """

    def __init__(self, network: LiveNetwork):
        super().__init__()
        self.network = network

    def forward(self, frame: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        outputs, new_states = self.network(frame, list(states))
        found = [outputs["mix"][:, 0].sigmoid(), outputs["onset"][:, 0].sigmoid()]
        if "embedding" in outputs:
            found.append(outputs["embedding"][:, 0])
        return *found, *new_states


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of a finished rt-mpe train")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the .onnx file to write")


def run(args: argparse.Namespace) -> int:
    from .train import export_run  # which imports this module

    export_run(args.run, args.out)
    print(f"wrote {args.out}")
    return 0


def parameter_count(network: LiveNetwork, weights: Mapping[str, np.ndarray]) -> int:
    """Of what runs live, with the norms folded into the convolutions before them; the rest only helps training."""
    live = {name: p for name, p in network.named_parameters() if not name.startswith("polyphony")}
    norms = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    folded = sum(live[f"{name}.weight"].numel() for name in norms)  # a norm leaves one bias a channel
    return sum(p.numel() for p in live.values()) - folded + sum(weight.size for weight in weights.values())


def export(
    path: Path,
    network: LiveNetwork,
    players: Players | None,
    lookahead: int,
    thresholds: tuple[Thresholds, ...],
    training: dict,
    levels: np.ndarray | None = None,
) -> None:
    """Write ``path``; without ``players`` it tells none apart.

    levels : (N, n_bins) frames of music, by which the convolutions are quantised; without them they stay as they are.
    All other weights lie in the file in half precision, and are computed with in single. ValueError, and no file, if
    ONNX Runtime fed frame by frame differs from torch by > TOLERANCE before that, or by more than the tolerances of
    what was done after it.
    """
    from onnx import helper, numpy_helper

    weights = players.weights() if players else {}
    network = plain(network)
    frame = torch.zeros(PHASES, 1, AnalysisConfig().n_bins)
    states = network.initial_states(PHASES, frame)
    names = [f"{STATE_PREFIX}{k}" for k in range(len(states))]
    info = ModelInfo(
        name=path.stem,
        analysis=AnalysisConfig(),
        lookahead=lookahead,
        voices=network.config.max_voices if players else 1,
        thresholds=thresholds,
        parameters=parameter_count(network, weights),
        training=training,
    )

    def add_weights(model) -> None:
        for name, weight in weights.items():
            tensor = numpy_helper.from_array(weight, name)
            model.graph.initializer.append(tensor)
            model.graph.output.append(helper.make_tensor_value_info(name, tensor.data_type, weight.shape))

    def compare(partial: Path) -> np.ndarray:
        return differences(network, OnnxModel(str(partial)), ridges() if levels is None else levels[:CHECKED_FRAMES])

    embedding = ["embedding"] if network.config.tells_players else []
    outputs = ["mix", "onset", *embedding, *(f"new_{name}" for name in names)]
    write_onnx(
        path,
        Hop(network),
        (frame, *states),
        ["frame", *names],
        outputs,
        info.to_metadata(),
        compare,
        axis="phases",
        change=add_weights,
        smaller=(halved, np.max, HALF_TOLERANCE)
        if levels is None
        else (lambda model: halved(quantised(model, levels)), np.mean, QUANTISED_TOLERANCE),
    )


class WindowOutputs(nn.Module):
    """A slot network for one window of levels: probabilities instead of logits, and no batch axis."""

    def __init__(self, network: SlotNetwork):
        super().__init__()
        self.network = network

    def forward(self, window: Tensor) -> tuple[Tensor, ...]:
        outputs = self.network(harmonic_input(window))
        found = [outputs.mix[0].sigmoid(), outputs.slots[0]]
        if outputs.timbre is not None:
            found.append(outputs.timbre[0])
        if outputs.polyphony is not None:
            found.append(outputs.polyphony[0].softmax(-1))
        return tuple(found)


def export_window(
    path: Path,
    network: SlotNetwork,
    recipe: str,
    thresholds: tuple[Thresholds, ...],
    training: dict,
    frame_thresholds: dict[str, float],
    lookahead: int = DEFAULT_LOOKAHEAD,
    stride: int = DEFAULT_STRIDE,
) -> None:
    """Write a slot network as a window model, see `realtime_mpe.window_model`; errors as of `export`.

    frame_thresholds : of "mix" and "slots", by which whole recordings are scored.
    """
    network = plain(network)
    info = WindowInfo(
        name=path.stem,
        analysis=PAPER,
        lookahead=lookahead,
        voices=network.config.slots,
        thresholds=thresholds,
        parameters=sum(p.numel() for p in network.parameters()),
        training=training,
        recipe=recipe,
        window=WINDOW,
        stride=stride,
    )
    outputs = ["mix", "slots", *(["timbre"] if network.timbre else []), *(["polyphony"] if network.polyphony else [])]
    metadata = info.to_metadata() | {"frame_thresholds": json.dumps(frame_thresholds)}
    module = WindowOutputs(network)
    write_onnx(path, module, (torch.zeros(1, WINDOW, N_BINS),), ["window"], outputs, metadata, differs_from(module))


class ViewOutputs(nn.Module):
    """The timbre encoder for one view, without its projection and without a batch axis in its output."""

    def __init__(self, encoder: TimbreEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, view: Tensor) -> Tensor:
        return self.encoder(view)[0][0]


def export_timbre(path: Path, encoder: TimbreEncoder) -> None:
    """Write the teacher: levels (1, 46, 216) of an isolated stem -> embedding (128,); errors as of `export`."""
    module = ViewOutputs(plain(encoder))
    count = sum(p.numel() for p in encoder.parameters())
    metadata = {"format": TIMBRE_FORMAT, "analysis": json.dumps(PAPER.to_dict()), "parameters": str(count)}
    view = torch.zeros(1, TIMBRE_FRAMES, N_BINS)
    write_onnx(path, module, (view,), ["view"], ["embedding"], metadata, differs_from(module))


def plain(network: nn.Module) -> nn.Module:
    """On the CPU, in the usual layout, in evaluation mode."""
    return network.to("cpu", memory_format=torch.contiguous_format).eval()


def write_onnx(
    path: Path,
    module: nn.Module,
    example: tuple[Tensor, ...],
    inputs: list[str],
    outputs: list[str],
    metadata: dict[str, str],
    compare: Callable[[Path], np.ndarray],
    axis: str = "",
    change: Callable[[object], None] = lambda model: None,
    smaller: Smaller | None = None,
) -> None:
    """Export, check, and only then put in place.

    axis : name of the first one of all inputs and outputs, if it may be of any length.  change : what else the ONNX
    graph shall hold.
    """
    import onnx

    partial = path.with_suffix(".partial.onnx")
    try:
        torch.onnx.export(
            module.eval(),  # else the exporter leaves the network in training mode
            example,
            str(partial),
            input_names=inputs,
            output_names=outputs,
            dynamic_axes={name: {0: axis} for name in (*inputs, *outputs)} if axis else None,
            opset_version=OPSET,
            dynamo=False,
        )
        model = onnx.load(str(partial))
        change(model)
        onnx.helper.set_model_props(model, metadata)
        for make, measure, tolerance in [(lambda model: model, np.max, TOLERANCE), *([smaller] if smaller else [])]:
            model = make(model)
            onnx.checker.check_model(model)
            onnx.save(model, str(partial))
            found = float(measure(compare(partial)))
            if found > tolerance:
                raise ValueError(
                    f"the export differs from torch by {found:.1e}, more than {tolerance:.0e}; not written"
                )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def halved(model):
    """Weights in half precision, which the runtime makes single again when it loads: half the file."""
    import onnx

    casts = []
    scales = {name for node in model.graph.node if node.op_type in QUANTISING for name in node.input}
    for tensor in model.graph.initializer:
        weights = onnx.numpy_helper.to_array(tensor)
        if weights.dtype == np.float32 and weights.size >= HALVED_FROM and tensor.name not in scales:
            name = tensor.name
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights.astype(np.float16), f"{name}.half"))
            casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT))
    for cast in reversed(casts):  # before the nodes that use them
        model.graph.node.insert(0, cast)
    return model


def differs_from(module: nn.Module) -> Callable[[Path], np.ndarray]:
    """Absolute differences of all outputs of a file from the module's, on a few random inputs."""

    def difference(path: Path) -> np.ndarray:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        source = session.get_inputs()[0]
        rng = np.random.default_rng(0)
        found = []
        for _ in range(CHECKED_WINDOWS):
            example = np.clip(rng.normal(0.3, 0.3, source.shape), 0, 1.3).astype(np.float32)
            with torch.no_grad():
                wanted = module(torch.from_numpy(example))
            wanted = wanted if isinstance(wanted, tuple) else (wanted,)
            for got, want in zip(session.run(None, {source.name: example}), wanted, strict=True):
                found.append(np.abs(got - want.numpy()).ravel())
        return np.concatenate(found)

    return difference


def ridges() -> np.ndarray:
    """Frames that vary slowly, so that the states matter and no output sits at the floor: (CHECKED_FRAMES, n_bins)."""
    rng = np.random.default_rng(0)
    frames = np.clip(rng.normal(0.3, 0.3, (CHECKED_FRAMES // 8, AnalysisConfig().n_bins)), 0, 1.3)
    return frames.repeat(8, 0).astype(np.float32)


def differences(network: LiveNetwork, model: OnnxModel, frames: np.ndarray) -> np.ndarray:
    """Absolute differences of all outputs, frame by frame in ONNX Runtime against one shot in torch.

    An embedding is of no certain size; its differences are shares of the largest.
    """
    with torch.no_grad():
        outputs, _ = network(torch.from_numpy(frames)[None])
    expected = {"mix": outputs["mix"].sigmoid()[0], "onset": outputs["onset"].sigmoid()[0]}
    if "embedding" in outputs:
        expected["embedding"] = outputs["embedding"][0]
    model.reset()
    found = []
    for step, heard in enumerate(model.hear(frames.repeat(model.steps, 0))):
        for name, want in expected.items():
            whole = float(want.abs().max()) if name == "embedding" else 1.0
            found.append(np.abs(getattr(heard, name) - want[step // model.steps].numpy()).ravel() / whole)
    return np.concatenate(found)
