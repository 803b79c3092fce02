"""``rt-mpe data check``: what a data set is, what is in it, and what of it is broken."""

import argparse
import json
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

from realtime_mpe.errors import UserError

from .datasets import FAMILIES, DataSet, Piece, audio_seconds, open_dataset
from .splits import SIDES, load_split, missing_pieces, split_names

DEFECTS = 1  # exit code of a data set with something broken
TOLERANCE = 0.1  # s that a stem may be longer or shorter than its mixture, and that a note may lie beyond the end


def add_check(commands) -> None:
    parser = commands.add_parser("check", help="name a data set, count what it holds, list what is broken")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", help="instead of looking which one it is")
    parser.add_argument("--json", action="store_true", help="for programs")


def run_check(args: argparse.Namespace) -> int:
    report = check(open_dataset(args.folder, args.layout))
    print(json.dumps(report, indent=1) if args.json else "\n".join(lines(report)))
    return DEFECTS if report["problems"] else 0


def check(dataset: DataSet) -> dict:
    """Counts, and under "problems" a line on everything that is broken; ready for JSON."""
    problems = list(dataset.problems)
    instruments, families = Counter(), Counter()
    notes = isolated = 0
    for number, piece in enumerate(dataset.pieces, 1):
        problems += faults(piece)
        for stem in piece.stems:
            instruments[stem.instrument or stem.name] += 1
            families[stem.family] += 1
            isolated += stem.audio is not None
            with suppress(UserError):  # which is among the faults
                notes += len(stem.notes)
        if sys.stderr.isatty():
            print(f"\rchecked {number} of {len(dataset.pieces)}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    return {
        "dataset": dataset.name,
        "folder": str(dataset.root),
        "pieces": len(dataset.pieces),
        "groups": len({piece.group for piece in dataset.pieces}),
        "stems": sum(instruments.values()),
        "isolated": isolated,
        "minutes": sum(piece.seconds for piece in dataset.pieces) / 60,
        "notes": notes,
        "instruments": dict(instruments.most_common()),
        "families": {family: families[family] for family in FAMILIES},
        "splits": splits(dataset),
        "problems": problems,
    }


def faults(piece: Piece) -> list[str]:
    """A line on everything that is wrong with a piece as it lies on disk; of audio only headers are read."""
    found = []
    for stem in piece.stems:
        try:
            if stem.audio is not None:
                seconds = audio_seconds(stem.audio)
                if abs(seconds - piece.seconds) > TOLERANCE:
                    found.append(f"{stem.audio}: lasts {seconds:.2f} s, its mixture {piece.seconds:.2f} s")
            notes = stem.notes
        except UserError as error:
            found.append(str(error))
            continue
        if not len(notes):
            found.append(f"{piece.name}: stem {stem.name} has no notes")
        elif notes[:, 0].min() < 0 or notes[:, 1].max() > piece.seconds + TOLERANCE:
            beyond = int(((notes[:, 0] < 0) | (notes[:, 1] > piece.seconds + TOLERANCE)).sum())
            found.append(f"{piece.name}: {beyond} notes of stem {stem.name} lie outside the recording")
    for path in piece.distractors:
        try:
            audio_seconds(path)
        except UserError as error:
            found.append(str(error))
    return found


def splits(dataset: DataSet) -> dict[str, dict[str, int]]:
    """Pieces on each side of every known split of the data set, and how many of the split are "missing"."""
    found = {}
    for name in split_names():
        try:
            sides = {side: len(pieces) for side, pieces in load_split(name, dataset).items()}
            found[name] = sides | {"missing": len(missing_pieces(name, dataset))}
        except UserError:
            continue  # of another data set, or its own file is missing
    return found


def lines(report: dict) -> list[str]:
    some = list(report["instruments"].items())
    named = ", ".join(f"{name} {count}" for name, count in some[:12]) + (", ..." if len(some) > 12 else "")
    out = [
        f"{report['dataset']} in {report['folder']}",
        f"  pieces       {report['pieces']} ({report['groups']} groups that share no recording)",
        f"  stems        {report['stems']}, {report['isolated']} of them as isolated files",
        f"  minutes      {report['minutes']:.1f}",
        f"  notes        {report['notes']}",
        f"  instruments  {named}",
        f"  families     {', '.join(f'{name} {count}' for name, count in report['families'].items())}",
    ]
    for name, sides in report["splits"].items():
        counts = ", ".join(f"{side} {sides[side]}" for side in SIDES)
        lacking = f" ({sides['missing']} that it lists are not here)" if sides["missing"] else ""
        out.append(f"  split        {name}: {counts}{lacking}")
    out.append(f"  broken       {len(report['problems']) or 'nothing'}")
    return out + [f"    {problem}" for problem in report["problems"]]
