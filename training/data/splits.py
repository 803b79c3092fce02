"""Which pieces of a data set are for training, validation and test: ``splits/*.json`` beside this module.

dataset   name of the data set, as `open_dataset` gives it
source    where the lists come from
by        what they list: "number" (before the first _ of a piece's name), "id" (its name) or "piece_id" (either)
train, validation, test
          lists; train may be "rest", validation "every Nth" of what test leaves, by name
from      instead of lists: the data set's own file of that name, *<from>*.json below its folder, with the same keys
          (also "val" for validation)
"""

import json
import re
from importlib import resources
from pathlib import Path

from realtime_mpe.errors import UserError

from .datasets import DataSet, Piece

SIDES = ("train", "validation", "test")
KEYS = {"dataset", "source", "by", "from", *SIDES}


def split_names() -> list[str]:
    folder = resources.files("realtime_mpe.training.data").joinpath("splits")
    return sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))


def load_split(name: str, dataset: DataSet) -> dict[str, list[Piece]]:
    """The pieces of each side that the data set has.

    UserError if the split is unknown, damaged, of another data set, has a key with a typo, a piece twice, a recording
    group on two sides, or leaves the training or the test side empty.
    """
    text = _read(name)
    try:
        split = json.loads(text)
        unknown = sorted(split.keys() - KEYS)
    except (ValueError, AttributeError) as error:
        raise UserError(f"split {name}: not a JSON object ({error})") from error
    if unknown:
        raise UserError(f"split {name}: key {unknown[0]!r} is unknown; known are {', '.join(sorted(KEYS))}")
    if split.get("dataset") != dataset.name:
        raise UserError(f"split {name} is of {split.get('dataset')}, not of {dataset.name}")
    if "from" in split:
        split |= _own_lists(split["from"], dataset)
    by = split.get("by")
    if by not in ("number", "id", "piece_id"):
        raise UserError(f"split {name}: by {by!r} must be number, id or piece_id")
    pieces = {key: piece for piece in dataset.pieces for key in _keys(piece, by)}
    order = sorted({piece.name for piece in dataset.pieces})
    sides: dict[str, list[Piece]] = {}
    taken: set[str] = set()
    for side in reversed(SIDES):  # what is listed goes first, "rest" last
        wanted = split.get(side, [])
        if isinstance(wanted, str):
            left = [p for p in dataset.pieces if p.name not in taken]
            every = re.fullmatch(r"every (\d+)(?:st|nd|rd|th)", wanted)
            if wanted != "rest" and every is None:
                raise UserError(f'split {name}: {side} {wanted!r} must be a list, "rest" or "every Nth"')
            chosen = left if every is None else [p for p in left if order.index(p.name) % int(every[1]) == 0]
        else:
            entries = [str(entry) for entry in wanted]
            if len(set(entries)) < len(entries):
                raise UserError(f"split {name}: {side} lists a piece twice")
            chosen = [pieces[entry] for entry in entries if entry in pieces]
        twice = [p.name for p in chosen if p.name in taken]
        if twice:
            raise UserError(f"split {name}: {twice[0]} is on two sides")
        taken |= {p.name for p in chosen}
        sides[side] = chosen
    side_of: dict[str, str] = {}
    for side, chosen in sides.items():
        for piece in chosen:
            if side_of.setdefault(piece.group, side) != side:
                raise UserError(f"split {name}: recordings of {piece.name} ({piece.group}) are on two sides")
    if not sides["train"] and not sides["test"]:
        raise UserError(f"split {name}: {dataset.root} has none of its pieces")
    return sides


def _read(name: str) -> str:
    path = Path(name)
    if path.suffix != ".json":
        if name not in split_names():
            raise UserError(f"split {name!r} is unknown; give one of {', '.join(split_names())}, or a .json file")
        return resources.files("realtime_mpe.training.data").joinpath("splits", f"{name}.json").read_text("utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"the split {name} cannot be read ({error.strerror})") from error


def _own_lists(name: str, dataset: DataSet) -> dict:
    found = sorted(dataset.root.rglob(f"*{name}*.json"))
    if not found:
        raise UserError(f"split {name} is a file of {dataset.name}; there is no *{name}*.json below {dataset.root}")
    try:
        lists = json.loads(found[0].read_text(encoding="utf-8"))
        sides = {side: lists.get(side, lists.get(side[:3], [])) for side in SIDES}
        return {side: [str(entry) for entry in entries] for side, entries in sides.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{found[0]} is no split ({error}); it needs lists named {', '.join(SIDES)}") from error


def _keys(piece: Piece, by: str) -> set[str]:
    """Under what a piece may be listed."""
    number = piece.name.partition("_")[0]
    if by == "number":
        return {str(int(number))} if number.isdigit() else set()
    if by == "piece_id":
        return {piece.name, re.sub(r"_v\d+$", "", piece.name)}
    return {piece.name}
