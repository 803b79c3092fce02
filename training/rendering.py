"""Which scores and instruments the training data are made of, and rendering them: ``rt-mpe data render``.

Every eighth piece and every eighth instrument of every kind are held out: no training hears them.
"""

import argparse
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from realtime_mpe.errors import UserError

from .casting import soloists
from .samples import load_samples
from .scores import Score, load_scores
from .shards import SEGMENTS_A_SHARD, cache_segments, write_shards
from .soundfont import SoundFontDrums, soundfont_instruments
from .stems import StemCache, ensembles, render
from .synth import SynthInstrument

SEGMENT_SECONDS = 24.0
HELD_OUT = 8  # every eighth instrument and piece is for validation alone
SYNTH_INSTRUMENTS = 240
TWINS = 0.4  # of what the voice memory learns from: two of one instrument are told apart by their lines, if at all
FEWEST_SHARDS = 4  # of a set, so that as many processes can share it
FEWEST_SEGMENTS = 8  # of a validation set that still says something
SHARES = {"samples": 0.45, "soundfont": 0.4, "synth": 0.15}  # of the stems: real notes teach most, synths widen
SETS = ("validation", "memory", "train", "chamber")  # in the order of their seeds


@dataclass(frozen=True)
class Sounds:
    """Folders of MIDI scores, SF2 files, folders of single notes. Without scores a composer writes."""

    scores: tuple[Path, ...] = ()
    soundfonts: tuple[Path, ...] = ()
    samples: tuple[Path, ...] = ()

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Sounds":
        return cls(tuple(args.scores), tuple(args.soundfont), tuple(args.samples))

    def record(self) -> dict:
        """For people: names without folders."""
        kinds = {i.name.split(":")[0] for side in instruments(self) for i in side}
        return {
            "sounds": sorted(kinds),
            "scores": [folder.name for folder in self.scores] or "procedural composer",
        }


def add_arguments(parser: argparse.ArgumentParser, segments: int) -> None:
    """What to render, and where; ``segments`` is the default of --segments."""
    add = parser.add_argument
    add("--scores", type=Path, action="append", default=[], help="folder of MIDI scores (default: a composer)")
    add("--soundfont", type=Path, action="append", default=[], help="SF2 file, may be repeated")
    add("--samples", type=Path, action="append", default=[], help="folder of single notes with index.csv")
    add("--segments", type=int, default=segments, help="excerpts to render for training (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count(), help="processes that render (default: %(default)s)")
    add("--cluster", metavar="ADDRESS", help="render on a Dask cluster instead, e.g. tcp://host:8786")
    add("--seed", type=int, default=0)


def render_sets(
    out: Path,
    sounds: Sounds,
    segments: int,
    sets: Sequence[str] = SETS,
    *,
    seed: int = 0,
    workers: int = 1,
    cluster: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, StemCache]:
    """Stems in ``out/<set>``: held out, for the voice memory (heard by no network), for networks, and chamber music for
    the voice memory, which is left out where no instrument of the orchestra is among the sounds."""
    train_instruments, held_instruments = instruments(sounds)
    train_scores, held_scores = scores(sounds)
    drums = SoundFontDrums(sounds.soundfonts[0]) if sounds.soundfonts else None
    plan = {
        "validation": (held_scores, held_instruments, max(segments // 16, FEWEST_SEGMENTS)),
        "memory": (train_scores, train_instruments, max(segments // 8, FEWEST_SEGMENTS)),
        "train": (train_scores, train_instruments, segments),
        "chamber": (train_scores, train_instruments, max(segments // 16, FEWEST_SEGMENTS)),
    }
    caches = {}
    for name in sets:
        some_scores, some_instruments, count = plan[name]
        if name == "chamber" and not soloists(list(some_instruments), "orchestra"):
            continue
        render(
            out / name,
            some_scores,
            list(some_instruments),
            count,
            weights=list(some_instruments.values()),
            drums=drums,
            progress=lambda done, total, name=name: say(f"stems for {name}: {done} of {total}"),
            seconds=SEGMENT_SECONDS,
            twins=TWINS if name == "memory" else 0.0,
            chamber=name == "chamber",
            seed=seed + 1000 * SETS.index(name),
            workers=workers,
            cluster=cluster,
        )
        caches[name] = StemCache(out / name)
    return caches


def render_shards(out: Path, sounds: Sounds, segments: int, **options) -> Path:
    """Stems in ``out/stems``, and the shards that recipes train on in ``out/train`` and ``out/validation``.

    options : of `render_sets`.  What is there already is kept. Returns ``out``.
    """
    sets = ("validation", "train")
    if not all((out / name).is_dir() for name in sets):
        for name, cache in render_sets(out / "stems", sounds, segments, sets, **options).items():
            if not (out / name).is_dir():
                per_shard = max(1, min(SEGMENTS_A_SHARD, len(cache) // FEWEST_SHARDS))
                write_shards(out / name, cache_segments(cache), per_shard)
    return out


def shards_for(args: argparse.Namespace, out: Path) -> Path:
    """The folder that --data names, or else what the other arguments ask for, rendered into ``out``."""
    return args.data or render_shards(
        out, Sounds.of(args), args.segments, seed=args.seed, workers=args.workers, cluster=args.cluster
    )


def instruments(sounds: Sounds) -> tuple[dict, dict]:
    """(training, held out) instruments of every kind that was given, each with how often it is drawn."""
    kinds = {
        "samples": [i for folder in sounds.samples for i in load_samples(folder)],
        "soundfont": [i for path in sounds.soundfonts for i in soundfont_instruments(path)],
        "synth": [SynthInstrument(k) for k in range(SYNTH_INSTRUMENTS)],
    }
    sides: tuple[dict, dict] = {}, {}
    for kind, members in kinds.items():
        for k, instrument in enumerate(members):
            sides[k % HELD_OUT == HELD_OUT - 3][instrument] = SHARES[kind] / len(members)
    return sides


def scores(sounds: Sounds) -> tuple[list[Score] | None, list[Score] | None]:
    """(training, held out) pieces; None where a composer writes, as he does where no ensemble is held out of a few."""
    given = [score for folder in sounds.scores for score in load_scores(folder)]
    if not given:
        return None, None
    held_out = [score for score in given if is_held_out(score.name)]
    if len(held_out) == len(given):
        raise UserError(f"the scores are too few: {given[0].name!r} is held out for validation, and no other is there")
    return [score for score in given if not is_held_out(score.name)], ensembles(held_out) or None


def is_held_out(name: str) -> bool:
    """By the name's checksum, so that a piece stays on its side when the folder grows."""
    return zlib.crc32(name.encode()) % HELD_OUT == 0
