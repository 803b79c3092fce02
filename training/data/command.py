"""``rt-mpe data``: check data sets, render new ones, and pack either into shards."""

import argparse
import sys
from pathlib import Path

from realtime_mpe.errors import UserError

from .. import rendering
from ..shards import SEGMENTS_A_SHARD, cache_segments, piece_segments, write_shards
from ..stems import StemCache
from .check import add_check, run_check
from .datasets import open_dataset
from .splits import load_split


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    add_check(commands)
    render = commands.add_parser("render", help="render mixtures' stems and pack them, for rt-mpe train RECIPE --data")
    render.add_argument("-o", "--out", type=Path, required=True, help="folder; what is there already is kept")
    rendering.add_arguments(render, segments=400)
    pack = commands.add_parser("pack", help="pack a data set into shards")
    add = pack.add_argument
    add("dataset", type=Path, help="any folder that rt-mpe data check knows")
    add("-o", "--out", type=Path, required=True, help="folder for the shards, or with --split for those of each side")
    add("--split", help="a known split, or a .json of one: only its training and validation sides are packed")
    add("--per-shard", type=int, default=SEGMENTS_A_SHARD, help="excerpts in a file (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    return {"check": run_check, "render": run_render, "pack": run_pack}[args.task](args)


def run_render(args: argparse.Namespace) -> int:
    options = dict(seed=args.seed, workers=args.workers, cluster=args.cluster)
    out = rendering.render_shards(args.out, rendering.Sounds.of(args), args.segments, **options)
    print(f"ready: rt-mpe train exp1c --data {out}")
    return 0


def run_pack(args: argparse.Namespace) -> int:
    if args.per_shard < 1:
        raise UserError(f"--per-shard {args.per_shard} is impossible; give 1 or more")
    if args.split is None and any(args.dataset.glob("[0-9]*.npz")):
        # a rendered cache as a whole: as a data set it would lose all takes but the first
        packed = {args.out: cache_segments(StemCache(args.dataset))}
    else:
        dataset = open_dataset(args.dataset)
        for problem in dataset.problems:
            _tell(f"left out: {problem}")
        if args.split is None:
            packed = {args.out: piece_segments(dataset.pieces, say=_tell)}
        else:
            sides = load_split(args.split, dataset)
            packed = {args.out / side: piece_segments(sides[side], say=_tell) for side in ("train", "validation")}
    for out, segments in packed.items():
        print(f"{out}: {write_shards(out, segments, args.per_shard)} excerpts")
    return 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
