"""``rt-mpe train RECIPE``: one of the paper's experiments from sharded data to a model file.

shards -> (timbre teacher ->) network -> thresholds -> window model (ONNX)
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch import nn

from realtime_mpe.analysis import MAX_LOOKAHEAD, PAPER
from realtime_mpe.errors import UserError
from realtime_mpe.notes import Thresholds
from realtime_mpe.window_model import DEFAULT_LOOKAHEAD

from . import rendering
from .calibrate import Heard, best_thresholds
from .data.own import kind_of_source
from .export import export_timbre, export_window
from .fit_recipe import Budget, fit_recipe
from .frontend import FrontEnd
from .metrics import notes_to_roll
from .mixing import Mixture, mix
from .plot import map_picture
from .protocol import best_threshold, match_slots
from .recipe import Recipe, SlotRecipe, TimbreRecipe
from .shards import read_segments, shard_paths
from .slots import WINDOW, SlotNetwork, harmonic_input
from .timbre import embed_sources, retrieval, source_table
from .windows import SourceTable

SOURCES_FILE, MODEL_FILE, RESULT_FILE, MAP_FILE = "sources.npz", "model.onnx", "result.json", "map.png"
TABLE_SEGMENTS = 500  # whose stems the stored embeddings are made from, at most
CALIBRATION_MIXTURES = 24
CALIBRATION_SECONDS = 23.552  # 32 windows
NOTE_GRIDS = {"on": tuple(np.arange(0.2, 0.85, 0.05)), "off": tuple(np.arange(0.1, 0.65, 0.05))}


@dataclass(frozen=True)
class Machines:
    """device : cpu or cuda.  devices : processes or GPUs a machine.  precision : in Fabric's words."""

    device: str = "cpu"
    devices: int = 1
    nodes: int = 1
    precision: str = "bf16-mixed"

    def fabric(self) -> Fabric:
        """Launched: from here on every process runs the same program. UserError if there is no such device."""
        many = self.devices * self.nodes > 1
        try:
            fabric = Fabric(
                accelerator=self.device,
                devices=self.devices,
                num_nodes=self.nodes,
                precision=self.precision,
                # exp1a leaves its slots alone, so not every parameter takes part in every loss
                strategy=DDPStrategy(find_unused_parameters=True) if many else "auto",
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(f"--device {self.device} --devices {self.devices}: {error}") from error
        fabric.launch()
        if self.device == "cpu" and self.devices > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // self.devices))
        return fabric


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of recipes alone; what they share with the live model stands in `train`."""
    group = parser.add_argument_group("for a recipe of the paper")
    add = group.add_argument
    add("--data", type=Path, help="folder with shards, as rt-mpe data render makes it (default: made on the spot)")
    add("--windows", type=int, help="to hear in all (stems, for timbre; default: the recipe's 100 epochs)")
    add("--per-epoch", type=int, default=Budget.per_epoch, help="windows between validations (default: %(default)s)")
    add("--teacher", type=Path, help="run of the timbre recipe (default: the folder timbre beside --out)")
    add("--start", type=Path, metavar="RUN", help="begin with the weights of another run")
    add("--loaders", type=int, default=0, help="processes a device that prepare windows (default: the device's own)")
    add_machine_arguments(group)


def add_machine_arguments(parser) -> None:
    add = parser.add_argument
    add("--devices", type=int, default=1, help="processes, or GPUs, on each machine (default: %(default)s)")
    add("--nodes", type=int, default=1, help="machines; each runs the command with MASTER_ADDR and NODE_RANK set")
    add("--precision", default=Machines.precision, help="bf16-mixed, 16-mixed or 32-true (default: %(default)s)")


def machines(args: argparse.Namespace) -> Machines:
    return Machines(args.device, args.devices, args.nodes, args.precision)


def run(args: argparse.Namespace, recipe: Recipe) -> int:
    out = args.out or Path("runs") / recipe.name
    budget = Budget(args.windows, args.per_epoch, args.loaders, args.seed)
    data = rendering.shards_for(args, out.parent / "data")
    fabric = machines(args).fabric()
    try:
        train_recipe(out, recipe, data, budget, fabric, args.teacher or out.parent / "timbre", args.start)
    except KeyboardInterrupt:
        if fabric.is_global_zero:
            print(f"\nstopped; the same command goes on from {out}", file=sys.stderr)
        return 130
    return 0


def train_recipe(
    out: Path,
    recipe: Recipe,
    data: Path,
    budget: Budget,
    fabric: Fabric,
    teacher: Path,
    start: Path | None = None,
) -> None:
    """A run from its beginning, or from where it stopped, to its model file; see `fit_recipe` for the errors."""
    needs = isinstance(recipe, SlotRecipe) and recipe.needs_teacher
    sources = load_sources(teacher) if needs else None
    network = fit_recipe(out, recipe, data, budget, fabric, sources, start, say=_say)
    if fabric.is_global_zero:
        network = network.to(fabric.device)
        if isinstance(recipe, TimbreRecipe):
            finish_timbre(out, network, data, fabric.device)
        else:
            finish_slots(out, recipe, network, data, fabric.device)
        print(f"wrote {out / MODEL_FILE}")


def _say(line: str) -> None:
    print(line, flush=True)  # a log that lags behind is no progress to look at


def finish_timbre(out: Path, encoder: nn.Module, data: Path, device: torch.device) -> None:
    """Stored source embeddings (of training and of held-out sources), retrieval, and the encoder as ONNX."""
    held_out = embed_sources(encoder, shard_paths(data / "validation"), TABLE_SEGMENTS, device)
    found = retrieval(held_out)
    known = embed_sources(encoder, shard_paths(data / "train"), TABLE_SEGMENTS, device)
    table = source_table({**known, **held_out})
    np.savez(out / SOURCES_FILE, names=np.array(table.names), embedding=table.embedding)
    group = [kind_of_source(name) for name in table.names]
    map_picture(out / MAP_FILE, table.embedding, group, f"{len(group)} sources as the timbre encoder hears them")
    (out / RESULT_FILE).write_text(json.dumps({"held_out": found, "train": retrieval(known)}, indent=1))
    export_timbre(out / MODEL_FILE, encoder.cpu())
    print(
        f"timbre: of {found['sources']} held-out sources {100 * found['top1']:.1f} % found at once, "
        f"{100 * found['top5']:.1f} % among five"
    )


def load_sources(teacher: Path) -> SourceTable:
    """Of a finished run of the timbre recipe."""
    try:
        with np.load(teacher / SOURCES_FILE) as data:
            return SourceTable(tuple(str(name) for name in data["names"]), data["embedding"])
    except FileNotFoundError as error:
        raise UserError(
            f"there is no finished timbre teacher in {teacher}; run rt-mpe train timbre, or give --teacher"
        ) from error


@torch.no_grad()
def finish_slots(out: Path, recipe: SlotRecipe, network: SlotNetwork, data: Path, device: torch.device) -> None:
    """Thresholds on held-out mixtures, then fixed; and the model file."""
    mixtures = held_out_mixtures(data)
    predictions = [predict(network, mixture, device) for mixture in mixtures]
    truths = [stem_rolls(mixture, mix.shape[1]) for mixture, (mix, _) in zip(mixtures, predictions, strict=True)]
    mix_threshold = best_threshold([mix for mix, _ in predictions], [rolls.any(0) for rolls in truths])
    pairs = [match_slots(slots, rolls) for (_, slots), rolls in zip(predictions, truths, strict=True)]
    slot_threshold = best_threshold([matched for matched, _ in pairs], truths)
    heard = [
        Heard(look_aheads(mix), np.zeros((mix.shape[1], MAX_LOOKAHEAD + 1, mix.shape[0]), np.float32), None, mixture)
        for mixture, (mix, _) in zip(mixtures, predictions, strict=True)
    ]
    # The window lets every frame see what follows, at whatever look-ahead: one pair of thresholds does for all.
    start = Thresholds(onset=1.0, repeat=1.0)  # never by an onset, of which these networks know nothing
    notes = best_thresholds(heard, DEFAULT_LOOKAHEAD, start, NOTE_GRIDS, say=lambda line: None)
    record = {"recipe": asdict(recipe), "torch": torch.__version__}
    export_window(
        out / MODEL_FILE,
        network.cpu(),
        recipe.name,
        (notes,) * (MAX_LOOKAHEAD + 1),
        record,
        frame_thresholds={"mix": mix_threshold, "slots": slot_threshold},
    )


def held_out_mixtures(data: Path) -> list[Mixture]:
    """The same whole mixtures for every recipe."""
    rng = np.random.default_rng(3)
    segments = []
    for segment in read_segments(shard_paths(data / "validation"), 0, shared=True):
        segments.append(segment)
        if len(segments) == CALIBRATION_MIXTURES:
            break

    isolated = [segment for segment in segments if segment.mixture is None]

    def stranger():
        segment = isolated[int(rng.integers(len(isolated)))]
        return segment, int(rng.choice(np.flatnonzero(segment.part >= 0)))

    return [mix(segment, CALIBRATION_SECONDS, rng, stranger) for segment in segments]


@torch.no_grad()
def predict(network: SlotNetwork, mixture: Mixture, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """A whole mixture in consecutive windows: mix (P, T), slots (K, P, T) probabilities."""
    levels = FrontEnd(PAPER).to(device)(torch.from_numpy(mixture.audio)[None].to(device))
    count = levels.shape[1] // WINDOW
    windows = levels[0, : count * WINDOW].reshape(count, WINDOW, -1)
    parts = [network(harmonic_input(piece)) for piece in windows.split(8)]
    mix = torch.cat([p.mix.sigmoid() for p in parts]).permute(1, 0, 2).flatten(1)
    slots = torch.cat([p.slots for p in parts]).permute(1, 2, 0, 3).flatten(2)
    return mix.cpu().numpy(), slots.cpu().numpy()


def stem_rolls(mixture: Mixture, n_frames: int) -> np.ndarray:
    """(S, P, T) bool, a map a stem that has notes."""
    rolls = [
        notes_to_roll(mixture.notes[mixture.notes[:, 0] == stem, 1:4], n_frames)
        for stem in np.unique(mixture.notes[:, 0])
    ]
    return np.stack(rolls) if rolls else np.zeros((0, *notes_to_roll(np.zeros((0, 3)), n_frames).shape), bool)


def look_aheads(mix: np.ndarray) -> np.ndarray:
    """(P, T) -> (T, L, P) as the live engine gets it: row L of hop n speaks of label frame n + 1 - L."""
    frames = np.arange(mix.shape[1])[:, None] + 1 - np.arange(MAX_LOOKAHEAD + 1)[None]
    inside = (frames >= 0) & (frames < mix.shape[1])
    return np.where(inside[..., None], mix.T[np.clip(frames, 0, mix.shape[1] - 1)], 0.0)
