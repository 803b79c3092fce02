"""Recipes: the slot-attention paper's experiments as files, ``training/recipes/<name>.toml``, every number with its
section or its reason. A recipe says what is learned and how; data and budget are given on the command line.
"""

import difflib
import json
import tomllib
from dataclasses import MISSING, asdict, dataclass, fields
from importlib import resources
from pathlib import Path

from torch import nn

from realtime_mpe.errors import UserError

from .slots import SlotConfig, SlotNetwork, TimbreEncoder, parameter_count

LEVELS = ("family", "stem")
MATCHINGS = ("none", "fixed", "hungarian")
TIMBRE = "timbre"  # name of the encoder's recipe; every other recipe trains a SlotNetwork


@dataclass(frozen=True)
class Schedule:
    """learning_rate of AdamW.  halve_after : epochs without a lower validation loss, 0 = a cosine over the epochs."""

    learning_rate: float
    weight_decay: float
    halve_after: int
    patience: int
    epochs: int
    batch_size: int


@dataclass(frozen=True)
class Targets:
    """level : what a slot is held against.  matching : "fixed" pairs slot k with family k."""

    level: str
    matching: str

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"level {self.level!r} is none of {', '.join(LEVELS)}")
        if self.matching not in MATCHINGS:
            raise ValueError(f"matching {self.matching!r} is none of {', '.join(MATCHINGS)}")
        if self.matching == "fixed" and self.level != "family":
            raise ValueError("matching 'fixed' needs level 'family': stems have no order")


@dataclass(frozen=True)
class SlotWeights:
    """Of the losses in `slot_losses`; what a recipe does not name weighs 0."""

    mixture: float
    slot: float = 0.0
    activity: float = 0.0
    inactive: float = 0.0
    union: float = 0.0
    timbre: float = 0.0
    polyphony: float = 0.0
    slot_polyphony: float = 0.0
    matching_cosine: float = 0.0


@dataclass(frozen=True)
class SlotRecipe:
    name: str
    targets: Targets
    network: SlotConfig
    weights: SlotWeights
    schedule: Schedule

    def __post_init__(self) -> None:
        if (self.weights.timbre or self.weights.matching_cosine) and not self.network.timbre:
            raise ValueError("a timbre loss needs the timbre head: timbre = true under [network]")
        if self.weights.polyphony and not self.network.polyphony:
            raise ValueError("a polyphony loss needs the polyphony head: polyphony = true under [network]")

    @property
    def needs_teacher(self) -> bool:
        return bool(self.weights.timbre or self.weights.matching_cosine)


@dataclass(frozen=True)
class Views:
    count: int
    gain_db: float
    frequency_mask: int
    time_mask: int


@dataclass(frozen=True)
class TimbreWeights:
    contrast: float
    temperature: float
    consistency: float
    variance: float
    covariance: float


@dataclass(frozen=True)
class TimbreRecipe:
    name: str
    views: Views
    weights: TimbreWeights
    schedule: Schedule


Recipe = SlotRecipe | TimbreRecipe


def recipe_names() -> list[str]:
    """Those that come with the program."""
    files = resources.files("realtime_mpe.training").joinpath("recipes").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load_recipe(name: str) -> Recipe:
    """By name, or from a .toml file. UserError names what is unknown, missing or of the wrong kind."""
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"there is no recipe file {name!r}")
        text = path.read_text(encoding="utf-8")
        short = path.stem
    elif name in recipe_names():
        text = resources.files("realtime_mpe.training").joinpath("recipes", f"{name}.toml").read_text("utf-8")
        short = name
    else:
        names = recipe_names()
        raise UserError(f"recipe {name!r} is unknown{_near(name, names)}; there are {', '.join(names)}")
    try:
        tables = tomllib.loads(text)
        kind = TimbreRecipe if "views" in tables else SlotRecipe
        return _build(kind, {"name": short, **tables}, name)
    except (tomllib.TOMLDecodeError, ValueError) as error:
        raise UserError(f"recipe {name}: {error}") from error


def print_recipe(name: str, as_json: bool) -> int:
    """What ``rt-mpe info RECIPE`` says."""
    recipe = load_recipe(name)
    facts = {**asdict(recipe), "parameters": parameter_count(untrained(recipe))}
    if as_json:
        print(json.dumps(facts, indent=1))
        return 0
    print(f"recipe      {facts.pop('name')}")
    print(f"parameters  {facts.pop('parameters'):,}")
    for table, values in facts.items():
        print(f"{table:<12}{'  '.join(f'{key} {value}' for key, value in values.items())}")
    return 0


def untrained(recipe: Recipe) -> nn.Module:
    """The recipe's network with fresh weights."""
    return TimbreEncoder() if isinstance(recipe, TimbreRecipe) else SlotNetwork(recipe.network)


def _build(kind: type, values: dict, where: str):
    known = {f.name: f for f in fields(kind)}
    for key in values:
        if key not in known:
            raise UserError(f"{where}: {key!r} is unknown{_near(key, known)}; known are {', '.join(known)}")
    built = {}
    for key, field in known.items():
        if key not in values:
            if field.default is MISSING:
                raise UserError(f"{where}: {key!r} is missing")
            continue
        value, wanted = values[key], field.type
        if isinstance(wanted, type) and wanted not in (int, float, str, bool):
            if not isinstance(value, dict):
                raise UserError(f"{where}: [{key}] must be a table")
            built[key] = _build(wanted, value, f"{where}, [{key}]")
            continue
        if type(value) is int and wanted is float:
            value = float(value)
        if type(value) is not wanted:
            raise UserError(f"{where}: {key} = {value!r} must be {wanted.__name__}")
        if wanted in (int, float) and value < 0:
            raise UserError(f"{where}: {key} = {value!r} must not be negative")
        built[key] = value
    return kind(**built)


def _near(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
