"""Which pieces of a data set are for training, validation and test: ``splits/*.json`` beside this module.

    dataset   name of the data set, as `open_dataset` gives it
    source    where the lists come from
    by        what they list: "number" (before the first _ of a piece's name), "id" (its name), "folder" (all pieces in
              it) or "piece_id" (its name, with or without a version like _v1, or what metadata.csv calls it)
    train, validation, test
              lists; train may be "rest": all that the others leave
    from      instead of lists: the data set's own file of that name, *<from>*.json below its folder, with the same keys
              (also "val" or "valid")

A split may list pieces that a folder lacks, for few have all of a data set.
"""

import csv
import difflib
import json
import re
from importlib import resources
from pathlib import Path

from realtime_mpe.errors import UserError

from .datasets import DataSet, Piece
from .multitrack import plain

SIDES = ("train", "validation", "test")
ALIASES = {"validation": ("validation", "valid", "val")}  # in the data sets' own files
BY = ("number", "id", "folder", "piece_id")
KEYS = {"dataset", "source", "by", "from", *SIDES}
URMP_PIECES = 44
LIKE = 0.85  # how much of a name is that of another if one of them is a slip of the pen


def split_names() -> list[str]:
    folder = resources.files("realtime_mpe.training.data").joinpath("splits")
    return sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))


def load_split(name: str | Path, dataset: DataSet) -> dict[str, list[Piece]]:
    """The pieces of each of SIDES that the data set has, by a split that is known by name or lies in a .json file.

    UserError if the split is unknown, damaged, of another data set, has a key or entry with a typo, a piece twice, a
    recording group on two sides, or no piece that is in the folder.
    """
    split = _read(name, dataset)
    by_key = _by_key(dataset, split["by"])
    sides: dict[str, list[Piece]] = {}
    taken: set[str] = set()
    for side in reversed(SIDES):  # "rest" is what the sides after it leave
        wanted = split.get(side, [])
        if wanted == "rest":
            chosen = [piece for piece in dataset.pieces if piece.name not in taken]
        else:
            chosen = [piece for entry in wanted for piece in by_key.get(entry, ())]
        taken |= {piece.name for piece in chosen}
        sides[side] = chosen
    sides = {side: sides[side] for side in SIDES}
    side_of: dict[str, str] = {}
    for side, chosen in sides.items():
        for piece in chosen:
            if side_of.setdefault(piece.group, side) != side:
                raise UserError(
                    f"split {name}: {piece.name} on the {side} side shares recordings ({piece.group}) with a piece on "
                    f"the {side_of[piece.group]} side; put both on one"
                )
    if not any(sides.values()):
        raise UserError(f"split {name}: {dataset.root} has none of its pieces")
    return sides


def missing_pieces(name: str | Path, dataset: DataSet) -> list[str]:
    """What the split lists and the folder lacks."""
    split = _read(name, dataset)
    by_key = _by_key(dataset, split["by"])
    return [entry for entry in _entries(split) if entry not in by_key]


def _read(name: str | Path, dataset: DataSet) -> dict:
    """The split's JSON, its entries as strings, checked as far as that goes without knowing who shares recordings."""
    try:
        split = json.loads(_text(name))
        unknown = sorted(split.keys() - KEYS)
    except (ValueError, AttributeError) as error:
        raise UserError(f"split {name}: not a JSON object ({error})") from error
    if unknown:
        raise UserError(f"split {name}: key {unknown[0]!r} is unknown; known are {', '.join(sorted(KEYS))}")
    if split.get("dataset") != dataset.name:
        raise UserError(f"split {name} is of {split.get('dataset')}, not of {dataset.name}")
    if split.get("by") not in BY:
        raise UserError(f"split {name}: by {split.get('by')!r} must be one of {', '.join(BY)}")
    if "from" in split:
        return split | _own_lists(split["from"], dataset)
    for side in SIDES:
        wanted = split.get(side, [])
        if not isinstance(wanted, list) and (side, wanted) != ("train", "rest"):
            raise UserError(f'split {name}: {side} must be a list, not {wanted!r}; only train may be "rest"')
        if isinstance(wanted, list):
            split[side] = [str(entry) for entry in wanted]
    entries = _entries(split)
    twice = sorted({entry for entry in entries if entries.count(entry) > 1})
    if twice:
        raise UserError(f"split {name}: {twice[0]} is listed twice")
    by_key = _by_key(dataset, split["by"])
    idle = [key for key in by_key if key not in entries]
    for entry in entries:
        if split["by"] == "number" and not (entry.isdigit() and 1 <= int(entry) <= URMP_PIECES):
            raise UserError(f"split {name}: {entry!r} is no piece of {dataset.name}; give 1 to {URMP_PIECES}")
        if split["by"] != "number" and entry not in by_key:
            like = [key for key in difflib.get_close_matches(entry, idle, 3, LIKE) if _numbers(key) == _numbers(entry)]
            if like:
                raise UserError(f"split {name}: {dataset.root} has no {entry!r}; is {like[0]!r} meant?")
    return split


def _text(name: str | Path) -> str:
    path = Path(name)
    if path.suffix != ".json":
        if str(name) not in split_names():
            raise UserError(f"split {str(name)!r} is unknown; give one of {', '.join(split_names())}, or a .json file")
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
        given = {side: [lists[key] for key in ALIASES.get(side, (side,)) if key in lists] for side in SIDES}
        if not given["test"]:
            raise ValueError("there is no list named test")
        return {
            side: [str(entry["piece_id"] if isinstance(entry, dict) else entry) for entry in (of_side or [[]])[0]]
            for side, of_side in given.items()
        }
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{found[0]} is no split ({error}); it needs lists named {', '.join(SIDES)}") from error


def _entries(split: dict) -> list[str]:
    return [entry for side in SIDES if isinstance(split.get(side), list) for entry in split[side]]


def _numbers(name: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", name)]


def _by_key(dataset: DataSet, by: str) -> dict[str, list[Piece]]:
    """Pieces by what they may be listed under."""
    found: dict[str, list[Piece]] = {}
    for piece in dataset.pieces:
        for key in _keys(piece, by):
            found.setdefault(key, []).append(piece)
    if by == "piece_id":
        titled = {plain(key): pieces for key, pieces in found.items()}
        for row in _metadata(dataset.root):
            for value in row.values():
                pieces = titled.get(plain(re.sub(r"\.(flac|wav)$", "", str(value))))
                if pieces and row.get("piece_id"):
                    found.setdefault(row["piece_id"], pieces)
    return found


def _metadata(root: Path) -> list[dict]:
    """Rows of metadata.csv. Its piece_id is what mshoxxDB's lists name; which column holds a folder's is not known."""
    try:
        with (root / "metadata.csv").open(newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{root / 'metadata.csv'} cannot be read ({error}); download it again") from error


def _keys(piece: Piece, by: str) -> set[str]:
    number = piece.name.partition("_")[0]
    if by == "number":
        return {str(int(number))} if number.isdigit() else set()
    if by == "folder":
        return set() if piece.mixture is None else {piece.mixture.parents[1].name}
    if by == "piece_id":
        return {piece.name, re.sub(r"_v\d+$", "", piece.name)}
    return {piece.name}
