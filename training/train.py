"""``rt-mpe train``: from scores and sounds to a model file, in stages that each resume where they stopped.

    stems -> network -> thresholds -> voice memory -> ONNX file

Without arguments nothing but this package is needed: a procedural composer writes the scores and the numpy
synthesizer plays them. With ``--scores``, ``--soundfont`` and ``--samples`` it is the recipe of the shipped model.
"""

import argparse
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from realtime_mpe.errors import UserError

from .calibrate import Heard, calibrate, hear
from .export import export
from .fit import FitConfig, fit
from .frontend import FrontEnd
from .mixing import Mixture, remix
from .network import LiveNetwork, NetworkConfig
from .pointer import Performance, fit_pointer, perform
from .samples import load_samples
from .scores import load_scores
from .soundfont import SoundFontDrums, soundfont_instruments
from .stems import StemCache, render
from .synth import SynthInstrument

SIZES = {
    "small": NetworkConfig(channels=32, embedding_channels=32),
    "live": NetworkConfig(channels=64, embedding_channels=64),
}
DEFAULT_LOOKAHEAD = 1  # frames: 76 ms from sound to note; two frames more gain 2 points and cost 40 ms
SEGMENT_SECONDS = 24.0
HELD_OUT = 8  # every eighth instrument and piece is for validation alone
SYNTH_INSTRUMENTS = 240
SHARES = {"samples": 0.45, "soundfont": 0.3, "synth": 0.25}  # of the stems: real notes teach most, synths widen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/small"), help="folder of the run (default: %(default)s)")
    parser.add_argument("--scores", type=Path, action="append", default=[], help="folder of MIDI scores, in place of the composer")
    parser.add_argument("--soundfont", type=Path, action="append", default=[], help="SF2 file, may be repeated")
    parser.add_argument("--samples", type=Path, action="append", default=[], help="folder of single notes with index.csv")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--hours", type=float, default=2.0, help="of re-mixed audio to hear (default: %(default)s)")
    parser.add_argument("--segments", type=int, default=60, help="excerpts to render for training (default: %(default)s)")
    parser.add_argument("--performances", type=int, default=200, help="mixtures for the voice memory (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that render (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    if args.hours <= 0 or args.segments < 1 or args.performances < 1 or args.workers < 1:
        raise UserError("--hours, --segments, --performances and --workers must be above 0")
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)

    caches = render_all(args)
    config = FitConfig(hours=args.hours, seed=args.seed)
    network = fit(out, caches["train"], caches["validation"], config, SIZES[args.size], device)
    network.to(memory_format=torch.contiguous_format)

    held_out = hear(network, FrontEnd().to(device), mixtures(caches["validation"], 40, args.seed + 2), device)
    thresholds = calibrate(held_out)
    performances = [
        hear_performances(network, caches[name], thresholds, count, args.seed + 3, device)
        for name, count in (("memory", args.performances), ("validation", max(args.performances // 8, 10)))
    ]
    pointer = fit_pointer(*performances, max_voices=network.config.slots, seed=args.seed)
    path = out / "model.onnx"
    record = json.loads((out / "record.json").read_text())
    export(path, network, pointer, DEFAULT_LOOKAHEAD, thresholds, record)
    print(f"wrote {path}; try: rt-mpe listen --model {path} --source demo")
    return 0


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
        "validation": (held_scores, held_instruments, max(args.segments // 16, 8)),
        "memory": (train_scores, train_instruments, max(args.segments // 8, 8)),
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


def mixtures(cache: StemCache, count: int, seed: int) -> list[Mixture]:
    """Whole-segment re-mixes, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return [remix(cache, k % len(cache), SEGMENT_SECONDS, rng) for k in range(count)]


def hear_performances(
    network: LiveNetwork, cache: StemCache, thresholds: tuple, count: int, seed: int, device: torch.device
) -> list[Performance]:
    """What the engine would detect in ``count`` mixtures; one at a time, for the posteriors are large."""
    front_end = FrontEnd().to(device)
    performances = []
    for mixture in mixtures(cache, count, seed):
        heard: Heard = hear(network, front_end, [mixture], device)[0]
        performances.append(
            perform(heard.mix, heard.onset, heard.embedding, mixture, thresholds[DEFAULT_LOOKAHEAD], DEFAULT_LOOKAHEAD)
        )
    return performances
