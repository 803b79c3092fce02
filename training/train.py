"""``rt-mpe train``: from scores and sounds to a model file.

    stems -> network -> thresholds -> voice memory -> ONNX file

Stems and network resume where they stopped; what follows takes minutes and is done anew.

Without arguments nothing but this package is needed: a procedural composer writes the scores and the numpy
synthesizer plays them. With ``--scores``, ``--soundfont`` and ``--samples`` it is the recipe of the shipped model.
"""

import argparse
import json
import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from realtime_mpe.errors import UserError
from realtime_mpe.notes import Thresholds

from .calibrate import calibrate, hear
from .export import export
from .fit import CHECKPOINT_FILE, FitConfig, fit
from .frontend import FrontEnd
from .mixing import Mixture, remix
from .network import LiveNetwork, NetworkConfig
from .pointer import Performance, PointerNetwork, fit_pointer, perform
from .samples import load_samples
from .scores import load_scores
from .soundfont import SoundFontDrums, soundfont_instruments
from .stems import StemCache, render
from .synth import SynthInstrument

SIZES = {
    "small": NetworkConfig(channels=32, embedding_channels=32),
    "live": NetworkConfig(channels=64, embedding_channels=64),
}
DEFAULT_LOOKAHEAD = 2  # frames: a note's player is told much better from its third frame than from its second
SEGMENT_SECONDS = 24.0
HELD_OUT = 8  # every eighth instrument and piece is for validation alone
SYNTH_INSTRUMENTS = 240
CALIBRATION_MIXTURES = 24
FEWEST_SEGMENTS, FEWEST_PERFORMANCES = 8, 10  # of a validation set that still says something
RUN_FILE, POINTER_FILE = "run.json", "pointer.pt"
SHARES = {"samples": 0.45, "soundfont": 0.3, "synth": 0.25}  # of the stems: real notes teach most, synths widen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-o", "--out", type=Path, default=Path("runs/small"), help="folder of the run (default: %(default)s)")
    add("--scores", type=Path, action="append", default=[], help="folder of MIDI scores (default: a composer)")
    add("--soundfont", type=Path, action="append", default=[], help="SF2 file, may be repeated")
    add("--samples", type=Path, action="append", default=[], help="folder of single notes with index.csv")
    add("--size", choices=SIZES, default="small", help="of the network (default: %(default)s)")
    add("--hours", type=float, default=1.5, help="of mixtures from which to learn notes (default: %(default)s)")
    add("--branch-hours", type=float, default=1.5, help="from which to learn players (default: %(default)s)")
    add("--segments", type=int, default=60, help="excerpts to render for training (default: %(default)s)")
    add("--performances", type=int, default=100, help="mixtures for the voice memory (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count(), help="processes that render (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="for torch (default: %(default)s)")
    add("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    for option in ("hours", "branch_hours", "segments", "performances", "workers"):
        if not getattr(args, option) > 0:
            raise UserError(f"--{option.replace('_', '-')} {getattr(args, option)} is impossible; give more than 0")
    out, started = args.out, time.monotonic()
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise UserError(f"there is no device {args.device!r}; use cpu, cuda or cuda:N") from error
    out.mkdir(parents=True, exist_ok=True)
    try:
        caches = render_all(args)
        config = FitConfig(hours=args.hours, branch_hours=args.branch_hours, seed=args.seed)
        network = fit(out, caches["train"], caches["validation"], config, SIZES[args.size], device)
        pointer, thresholds = fit_voices(network, caches, args.performances, args.seed, device)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from {out}", file=sys.stderr)
        return 130
    torch.save(pointer.state_dict(), out / POINTER_FILE)
    record = {
        "command": command(args),
        "sounds": sorted({i.name.split(":")[0] for side in instruments(args.samples, args.soundfont) for i in side}),
        "scores": "procedural composer" if not args.scores else [folder.name for folder in args.scores],
        "segments": len(caches["train"]),
        "hours_heard": round(json.loads((out / "progress.json").read_text())["hours"], 4),
        "torch": torch.__version__,
        "seed": args.seed,
    }
    (out / RUN_FILE).write_text(
        json.dumps({"size": args.size, "thresholds": [vars(t) for t in thresholds], "record": record}, indent=1)
    )
    path = out / "model.onnx"
    export_run(out, path)
    minutes = (time.monotonic() - started) / 60
    print(f"wrote {path} after {minutes:.0f} minutes; try: rt-mpe listen --source demo --model {path}")
    return 0


def command(args: argparse.Namespace) -> str:
    """What to type to make this model again, with folders by their names alone."""
    words = ["rt-mpe train"]
    for option in ("scores", "soundfont", "samples"):
        words += [f"--{option} {path.name}" for path in getattr(args, option)]
    for option in ("size", "hours", "branch_hours", "segments", "performances", "seed"):
        words.append(f"--{option.replace('_', '-')} {getattr(args, option)}")
    return " ".join(words)


def fit_voices(
    network: LiveNetwork, caches: dict[str, StemCache], performances: int, seed: int, device: torch.device
) -> tuple[PointerNetwork, tuple[Thresholds, ...]]:
    """What follows the network and depends on it: thresholds on held-out mixtures, then the voice memory's pointer."""
    network.to(device)
    front_end = FrontEnd().to(device)
    held_out = mixtures(caches["validation"], CALIBRATION_MIXTURES, seed + 2)
    thresholds = calibrate(hear(network, front_end, held_out, device))
    heard = [
        hear_performances(network, front_end, caches[name], thresholds, count, seed + 3, device)
        for name, count in (("memory", performances), ("validation", max(performances // 8, FEWEST_PERFORMANCES)))
    ]
    return fit_pointer(*heard, max_voices=network.config.slots, seed=seed), thresholds


def export_run(run: Path, path: Path) -> None:
    """The trained parts in a run's folder as one model file; UserError if a part is missing."""
    try:
        settings = json.loads((run / RUN_FILE).read_text())
        weights = torch.load(run / CHECKPOINT_FILE, map_location="cpu", weights_only=True)["average"]
        pointer_weights = torch.load(run / POINTER_FILE, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise UserError(f"{run} holds no finished training (no {missing}); run rt-mpe train -o {run}") from error
    network = LiveNetwork(SIZES[settings["size"]])
    network.load_state_dict({k.removeprefix("module."): v for k, v in weights.items() if k.startswith("module.")})
    pointer = PointerNetwork()
    pointer.load_state_dict(pointer_weights)
    thresholds = tuple(Thresholds(**row) for row in settings["thresholds"])
    export(path, network, pointer, DEFAULT_LOOKAHEAD, thresholds, settings["record"])


def render_all(args: argparse.Namespace) -> dict[str, StemCache]:
    """The three sets of stems: for the network, for the voice memory (heard by no network), and held out."""
    train_instruments, held_instruments = instruments(args.samples, args.soundfont)
    scores = [score for folder in args.scores for score in load_scores(folder)] or None
    train_scores = held_scores = None
    if scores:
        train_scores = [s for s in scores if not is_held_out(s.name)]
        held_scores = [s for s in scores if is_held_out(s.name)]
    drums = SoundFontDrums(args.soundfont[0]) if args.soundfont else None
    plan = {
        "validation": (held_scores, held_instruments, max(args.segments // 16, FEWEST_SEGMENTS)),
        "memory": (train_scores, train_instruments, max(args.segments // 8, FEWEST_SEGMENTS)),
        "train": (train_scores, train_instruments, args.segments),
    }
    caches = {}
    for number, (name, (some_scores, some_instruments, count)) in enumerate(plan.items()):
        render(
            args.out / "stems" / name,
            some_scores,
            list(some_instruments),
            count,
            weights=list(some_instruments.values()),
            drums=drums,
            progress=lambda done, total, name=name: print(f"stems for {name}: {done} of {total}", flush=True),
            seconds=SEGMENT_SECONDS,
            seed=args.seed + 1000 * number,
            workers=args.workers,
        )
        caches[name] = StemCache(args.out / "stems" / name)
    return caches


def instruments(samples: Sequence[Path], soundfonts: Sequence[Path]) -> tuple[dict, dict]:
    """(training, held out) instruments of every kind that was given, each with how often it is drawn."""
    kinds = {
        "samples": [i for folder in samples for i in load_samples(folder)],
        "soundfont": [i for path in soundfonts for i in soundfont_instruments(path)],
        "synth": [SynthInstrument(k) for k in range(SYNTH_INSTRUMENTS)],
    }
    sides: tuple[dict, dict] = {}, {}
    for kind, members in kinds.items():
        for k, instrument in enumerate(members):
            sides[k % HELD_OUT == HELD_OUT - 3][instrument] = SHARES[kind] / len(members)
    return sides


def is_held_out(name: str) -> bool:
    """By the name's checksum, so that a piece stays on its side when the folder grows."""
    return zlib.crc32(name.encode()) % HELD_OUT == 0


def mixtures(cache: StemCache, count: int, seed: int) -> Iterator[Mixture]:
    """Whole-segment re-mixes, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return (remix(cache, k % len(cache), SEGMENT_SECONDS, rng) for k in range(count))


def hear_performances(
    network: LiveNetwork,
    front_end: FrontEnd,
    cache: StemCache,
    thresholds: tuple[Thresholds, ...],
    count: int,
    seed: int,
    device: torch.device,
) -> list[Performance]:
    """What the engine would detect in ``count`` mixtures; one at a time, for the posteriors are large."""
    performances = []
    for number, mixture in enumerate(mixtures(cache, count, seed), 1):
        heard = hear(network, front_end, [mixture], device)[0]
        performances.append(
            perform(heard.mix, heard.onset, heard.embedding, mixture, thresholds[DEFAULT_LOOKAHEAD], DEFAULT_LOOKAHEAD)
        )
        if number % 50 == 0 or number == count:
            print(f"performances heard: {number} of {count}", flush=True)
    return performances
