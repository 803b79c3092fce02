"""One ONNX file: the network for one hop with its states as named inputs and outputs, the pointer, and the metadata."""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from realtime_mpe.analysis import N_PITCHES, AnalysisConfig
from realtime_mpe.model import POINTER_PREFIX, STATE_PREFIX, ModelInfo, OnnxModel
from realtime_mpe.notes import Thresholds

from .network import LiveNetwork
from .pointer import PointerNetwork

OPSET = 17
TOLERANCE = 1e-4
CHECKED_FRAMES = 64


class Hop(nn.Module):
    """The network for exactly one frame, with probabilities instead of logits and no batch axis in its outputs."""

    def __init__(self, network: LiveNetwork):
        super().__init__()
        self.network = network

    def forward(self, frame: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        outputs, new_states = self.network(frame, list(states))
        return outputs["mix"][0, 0].sigmoid(), outputs["onset"][0, 0].sigmoid(), outputs["embedding"][0, 0], *new_states


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of a finished rt-mpe train")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the .onnx file to write")


def run(args: argparse.Namespace) -> int:
    from .train import export_run  # which imports this module

    export_run(args.run, args.out)
    print(f"wrote {args.out}")
    return 0


def parameter_count(network: LiveNetwork, pointer: PointerNetwork) -> int:
    """Of what runs live: the slot head and the polyphony head only help training."""
    unused = sum(p.numel() for part in (network.slot_head, network.polyphony) for p in part.parameters())
    return sum(p.numel() for m in (network, pointer) for p in m.parameters()) - unused


def export(
    path: Path,
    network: LiveNetwork,
    pointer: PointerNetwork,
    lookahead: int,
    thresholds: tuple[Thresholds, ...],
    training: dict,
) -> None:
    """Write ``path``. ValueError, and no file, if ONNX Runtime fed frame by frame differs from torch by > TOLERANCE."""
    import onnx
    from onnx import numpy_helper

    network = network.to("cpu", memory_format=torch.contiguous_format).eval()
    n_bins = AnalysisConfig().n_pitches * AnalysisConfig().bins_per_pitch
    frame = torch.zeros(1, 1, n_bins)
    states = network.initial_states(1, frame)
    names = [f"{STATE_PREFIX}{k}" for k in range(len(states))]
    partial = path.with_suffix(".partial.onnx")
    torch.onnx.export(
        Hop(network).eval(),  # else the exporter leaves the network in training mode
        (frame, *states),
        str(partial),
        input_names=["frame", *names],
        output_names=["mix", "onset", "embedding", *(f"new_{name}" for name in names)],
        opset_version=OPSET,
        dynamo=False,
    )
    model = onnx.load(str(partial))
    for name, weight in pointer.weights().items():
        tensor = numpy_helper.from_array(weight, POINTER_PREFIX + name)
        model.graph.initializer.append(tensor)
        model.graph.output.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, weight.shape))
    info = ModelInfo(
        name=path.stem,
        analysis=AnalysisConfig(),
        lookahead=lookahead,
        voices=network.config.slots,
        thresholds=thresholds,
        parameters=parameter_count(network, pointer),
        training=training,
    )
    onnx.helper.set_model_props(model, info.to_metadata())
    onnx.checker.check_model(model)
    onnx.save(model, str(partial))
    difference = largest_difference(network, OnnxModel(str(partial)))
    if difference > TOLERANCE:
        partial.unlink()
        raise ValueError(f"the export differs from torch by {difference:.1e}, more than {TOLERANCE:.0e}; not written")
    partial.replace(path)


def largest_difference(network: LiveNetwork, model: OnnxModel) -> float:
    """Largest absolute difference of any output, frame by frame in ONNX Runtime against one shot in torch."""
    rng = np.random.default_rng(0)
    # Slowly varying ridges, so that the states matter and no output sits at the floor.
    frames = np.clip(rng.normal(0.3, 0.3, (CHECKED_FRAMES // 8, 3 * N_PITCHES)), 0, 1.3).repeat(8, 0).astype(np.float32)
    with torch.no_grad():
        outputs, _ = network(torch.from_numpy(frames)[None])
    expected = [outputs["mix"].sigmoid()[0], outputs["onset"].sigmoid()[0], outputs["embedding"][0]]
    model.reset()
    worst = 0.0
    for n, frame in enumerate(frames):
        for got, want in zip(model.process(frame), expected, strict=True):
            worst = max(worst, float(np.abs(got - want[n].numpy()).max()))
    return worst
