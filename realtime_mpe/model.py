"""A model file in ONNX Runtime, with everything the engine must know about it in its metadata.

The metadata keys are the interface between training and runtime; `training.export` writes them, this module reads
them, and a file without them, or made for another front end, is refused.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from .affinity import PAIR_FEATURES
from .analysis import FRAME_SECONDS, MAX_LOOKAHEAD, PHASES, AnalysisConfig
from .errors import UserError
from .grouping import JOIN_FEATURES, Grouping
from .leveller import Leveller
from .lines import Lines
from .notes import Thresholds
from .timbre import ClearedTimbre
from .voices import NEW_FEATURES, VOICE_FEATURES, Pointer, SlotVoices, VoiceMemory

DEFAULT_MODEL = "default"
MAX_FILE_BYTES = 200_000_000  # a live model is a few megabytes; anything like this is another kind of file
POINTER_PREFIX = "pointer."
GROUPING_PREFIX = "grouping."
TIMBRE_PREFIX = "timbre."
LINES_PREFIX = "lines."
STATE_PREFIX = "state."
LEAST = 1e-3  # probability that one phase can speak with against the other


class Posteriors(NamedTuple):
    """One step.

    mix, onset : (MAX_LOOKAHEAD + 1, n_pitches) probabilities, row = look-ahead.  embedding : (n_pitches, D), a column
    of zeros from a model that does not tell players apart.
    """

    mix: np.ndarray
    onset: np.ndarray
    embedding: np.ndarray


@dataclass(frozen=True)
class ModelInfo:
    """What the file says of itself. ``thresholds[lookahead]``; ``voices`` is K, the most voices told apart.

    FORMAT and ANALYSIS : what a file of this kind must say of its format and front end.
    """

    FORMAT: ClassVar[str] = "rt-mpe live 3"
    ANALYSIS: ClassVar[AnalysisConfig] = AnalysisConfig()

    name: str
    analysis: AnalysisConfig
    lookahead: int
    voices: int
    thresholds: tuple[Thresholds, ...]
    parameters: int
    training: dict

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], name: str) -> "ModelInfo":
        if metadata.get("format") != cls.FORMAT:
            found = metadata.get("format", "no format")
            raise UserError(
                f"{name} is not a live model ({found} in its metadata, {cls.FORMAT!r} is needed); see rt-mpe export"
            )
        try:
            info = cls(
                name,
                AnalysisConfig(**json.loads(metadata["analysis"])),
                int(metadata["lookahead"]),
                int(metadata["voices"]),
                tuple(Thresholds(**row) for row in json.loads(metadata["thresholds"])),
                int(metadata["parameters"]),
                json.loads(metadata["training"]),
                **cls.own_fields(metadata),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the metadata of {name} is damaged ({error}); export the model again") from error
        wrong = cls.ANALYSIS.differences(info.analysis)
        if wrong:
            raise UserError(f"{name} was made for another front end ({'; '.join(wrong)}); use a model of this version")
        limits = [value for row in info.thresholds for value in vars(row).values()]
        if (
            len(info.thresholds) != MAX_LOOKAHEAD + 1
            or not all(isinstance(value, int | float) and 0.0 <= value <= 1.0 for value in limits)
            or not 1 <= info.voices <= 64
            or not 0 <= info.lookahead <= MAX_LOOKAHEAD
        ):
            raise UserError(f"the metadata of {name} is out of range; export the model again")
        return info

    @classmethod
    def own_fields(cls, metadata: dict[str, str]) -> dict:
        """Those that a kind of model has beside these; KeyError or ValueError if they are damaged."""
        return {}

    @property
    def facts(self) -> dict[str, str | int]:
        """What ``rt-mpe info`` shows beside the rest: text, or a number of frames."""
        return {}

    def to_metadata(self) -> dict[str, str]:
        return {
            "format": self.FORMAT,
            "analysis": json.dumps(self.analysis.to_dict()),
            "lookahead": str(self.lookahead),
            "voices": str(self.voices),
            "thresholds": json.dumps([vars(t) for t in self.thresholds]),
            "parameters": str(self.parameters),
            "training": json.dumps(self.training),
        }


def shipped_models() -> list[str]:
    """Names of the models that come with the program."""
    files = resources.files("realtime_mpe.models").iterdir()
    return sorted(file.name.removesuffix(".onnx") for file in files if file.name.endswith(".onnx"))


def load_model(name: str = DEFAULT_MODEL) -> "OnnxModel":
    """A shipped model by its bare name, a file, or a model plugin (its name, or ``package.module:Class``)."""
    from . import plugins  # it reads this module for the built-in kind

    kind, colon, _ = name.partition(":")
    is_file = Path(name).suffix == ".onnx" and not (colon and kind in plugins.known("model"))
    if is_file or name in shipped_models():
        return open_model(name)
    if colon or name in plugins.known("model"):
        return plugins.resolve("model", name)
    return open_model(name)


def open_model(name: str = DEFAULT_MODEL) -> "OnnxModel":
    """A model file of either kind, by its path or its shipped name."""
    from .window_model import WindowInfo, WindowModel  # which reads this module

    session = open_session(model_path(name))
    found = session.get_modelmeta().custom_metadata_map.get("format")
    return (WindowModel if found == WindowInfo.FORMAT else OnnxModel)(name, session)


def open_session(path: Path):
    """On one thread; UserError if it is no readable ONNX file."""
    import onnxruntime as ort  # 0.1 s: paid by those who run a model

    if path.stat().st_size > MAX_FILE_BYTES:
        raise UserError(f"{path} is larger than {MAX_FILE_BYTES // 1_000_000} MB; that is no live model")
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # a hop is too small to share
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would burn the player's core
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        session.get_modelmeta().custom_metadata_map  # noqa: B018  fails if it is no text
        return session
    except Exception as error:  # onnxruntime raises a dozen kinds for a damaged file
        reason = str(error).splitlines()[0][:120]
        raise UserError(f"{path} is no readable ONNX model ({reason}); download or export it again") from error


def model_path(name: str) -> Path:
    """A path as given, or a shipped model by its bare name (``default``)."""
    shipped = resources.files("realtime_mpe.models").joinpath(f"{name}.onnx")
    if not Path(name).suffix and shipped.is_file():
        return Path(str(shipped))
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"there is no model {name!r}; give a .onnx file or one of: {', '.join(shipped_models()) or 'none shipped'}"
        )
    return path


def numbered(outputs: dict[str, np.ndarray], prefix: str) -> list[dict[str, np.ndarray]]:
    """From the outputs "<prefix><number>.<weight>" of a model file the weights of each network that votes."""
    networks: dict[str, dict[str, np.ndarray]] = {}
    for name, weight in part(outputs, prefix).items():
        number, _, own = name.partition(".")
        networks.setdefault(number, {})[own] = weight
    return list(networks.values())


def part(outputs: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Those outputs of a model file whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): weight for name, weight in outputs.items() if name.startswith(prefix)}


def log_odds(probability: np.ndarray) -> np.ndarray:
    """What one phase speaks with: nothing is impossible to it, and nothing certain."""
    probability = np.clip(probability, LEAST, 1.0 - LEAST)
    return np.log(probability / (1.0 - probability))


def agreed(newest: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Log odds (..., MAX_LOOKAHEAD + 1, n_pitches) of one step and of the step before it, to probabilities of both.

    The mean of the two, for two looks are better than one. A label of the newest lies half way between two of the
    other phase's, half a frame of look-ahead to either side.
    """
    total = newest + before
    total[..., 1:, :] = newest[..., 1:, :] + 0.5 * (before[..., 1:, :] + before[..., :-1, :])
    return 1.0 / (1.0 + np.exp(-0.5 * total))


class OnnxModel:
    """``process`` takes frames, ``steps`` of them a hop, and carries the states of both phases.

    ``latency`` is 0 frames: look-ahead is the tracker's affair.  session : of the file, if it is open already.
    """

    latency = 0
    steps = PHASES

    def __init__(self, name: str = DEFAULT_MODEL, session=None):
        path = model_path(name)
        self._session = session or open_session(path)
        self.info = ModelInfo.from_metadata(self._session.get_modelmeta().custom_metadata_map, str(path))
        outputs = [o.name for o in self._session.get_outputs()]
        self._state_kinds = {  # shape, with a row a phase, and type
            state.name: ((self.steps, *state.shape[1:]), np.uint8 if state.type == "tensor(uint8)" else np.float32)
            for state in self._session.get_inputs()
            if state.name.startswith(STATE_PREFIX)
        }
        self.tells_players = self.info.voices > 1
        heard = Posteriors._fields if self.tells_players else ("mix", "onset")
        self._outputs = [*heard, *(f"new_{name}" for name in self._state_kinds)]
        missing = sorted({*self._outputs} - {*outputs})
        if missing:
            raise UserError(f"{path} lacks the outputs {', '.join(missing)}; export the model again")
        self._leveller = Leveller(FRAME_SECONDS / self.steps)
        prefixes = POINTER_PREFIX, GROUPING_PREFIX, TIMBRE_PREFIX, LINES_PREFIX
        names = [name for name in outputs if name.startswith(prefixes)]
        try:
            self.reset()
            silence = self._feed(np.zeros((self.steps, self.info.analysis.n_bins), np.float32), slice(None))
            self.pointer = self.grouping = self.timbre = None
            if self.tells_players:  # what does not fit fails here, and not with the first notes
                *values, embedding = self._session.run([*names, "embedding"], silence)
                weights = dict(zip(names, values, strict=True))
                self.pointer = Pointer(numbered(weights, POINTER_PREFIX))
                lines = Lines(part(weights, LINES_PREFIX))
                self.grouping = Grouping(numbered(weights, GROUPING_PREFIX), lines)
                self.timbre = ClearedTimbre(part(weights, TIMBRE_PREFIX))
                self.pointer(np.zeros((1, VOICE_FEATURES), np.float32), np.zeros(NEW_FEATURES, np.float32))
                self.grouping.affinity(np.zeros((2, 2, PAIR_FEATURES), np.float32))
                self.grouping.join_odds(np.zeros((1, JOIN_FEATURES), np.float32))
                self.timbre(np.zeros((1, 2 * embedding.shape[2] + 1)), np.ones(1))
        except Exception as error:  # a graph with other inputs or shapes: as many kinds of error as there are ways
            reason = str(error).splitlines()[0][:120]
            raise UserError(f"{path} does not fit its metadata ({reason}); export the model again") from error

    def voices(self, players: int | None = None) -> VoiceMemory | SlotVoices:
        """Who gives the notes to players; without a pointer all notes are one voice's.

        players : how many there are, if that is known; UserError if they are more than can be told apart.
        """
        if players is not None and not 1 <= players <= self.info.voices:
            raise UserError(f"{self.info.name} cannot tell {players} players apart; choose 1 to {self.info.voices}")
        if self.pointer is None:
            return SlotVoices(1)
        return VoiceMemory(self.pointer, players or self.info.voices, self.grouping, self.steps, self.timbre)

    def reset(self) -> None:
        """As if only silence had been heard."""
        self._states = {name: np.zeros(*kind) for name, kind in self._state_kinds.items()}
        self._turn = 0  # the phase that hears next
        self._before: np.ndarray | None = None  # log odds of the other phase: mix, onset
        self._leveller.reset()

    def process(self, frames: np.ndarray) -> Iterator[Posteriors]:
        """(m, n_bins) levels of frames of the front end -> for each Posteriors on which its phase and the one before
        agree. To be read to its end."""
        for heard in self.hear(np.array([self._leveller.process(frame) for frame in frames])):
            newest, before = log_odds(np.stack([heard.mix, heard.onset])), self._before
            self._before = newest
            yield heard if before is None else Posteriors(*agreed(newest, before), heard.embedding)

    def hear(self, frames: np.ndarray) -> Iterator[Posteriors]:
        """What the phase whose turn it is says of each frame, (m, n_bins) audible levels, by itself.

        Phases know nothing of each other: where all of them have a frame to hear, they hear in one run, for less.
        """
        while len(frames):
            together = self.steps if len(frames) >= self.steps else 1
            turns = [(self._turn + k) % self.steps for k in range(together)]  # phase of each frame
            first, self._turn = min(turns), (self._turn + together) % self.steps
            phases = slice(first, first + together)
            now, frames = frames[:together], frames[together:]
            found = self._session.run(self._outputs, self._feed(now[np.argsort(turns)], phases))
            outputs, states = found[: -len(self._states)], found[-len(self._states) :]
            if together == self.steps:
                self._states = dict(zip(self._states, states, strict=True))
            else:
                for state, new in zip(self._states.values(), states, strict=True):
                    state[phases] = new
            for turn in turns:
                mix, onset, *embedding = (output[turn - first] for output in outputs)
                yield Posteriors(mix, onset, *embedding or [np.zeros((mix.shape[1], 1), np.float32)])

    def _feed(self, frames: np.ndarray, phases: slice) -> dict[str, np.ndarray]:
        """frames : (m, n_bins), one for each of the phases."""
        return {"frame": frames[:, None], **{name: state[phases] for name, state in self._states.items()}}
