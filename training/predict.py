"""What a model says of a whole recording: on the grid of label frames, file by file, without torch.

A window network ("rt-mpe window 1") reads consecutive windows that do not overlap, as its paper evaluates it; a live
one, or a window network on request, hears the recording through the engine.
"""

import json
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np
import soundfile

from realtime_mpe.analysis import FIRST_MIDI, FRAME_SECONDS, HOP, N_BINS, PAPER, SAMPLERATE
from realtime_mpe.cqt import StreamingCqt, audible
from realtime_mpe.errors import UserError
from realtime_mpe.model import load_model, model_path, open_session
from realtime_mpe.plugins import known
from realtime_mpe.settings import Settings
from realtime_mpe.transcribe import transcribe_file
from realtime_mpe.window_model import WindowInfo

from .metrics import notes_to_roll

TIMBRE_FORMAT = "rt-mpe timbre 1"
MOST_VIEWS = 16  # of a stem that the teacher hears, spread over the piece; more change the mean by nothing
ACTIVE_SHARE = 0.5  # of a view's frames in which the stem sounds, at least, as in the teacher's training


@dataclass(frozen=True)
class Prediction:
    """mix : (N_PITCHES, T) float32.  What a model does not say is None:

    slots : (K, N_PITCHES, T) float32.  notes : (N, 5) as sent: onset s, offset s, MIDI number, voice, emitted s.
    polyphony : (T, 8) probabilities.  timbre : (windows, K, E), of `window` frames each.  teacher : (stems, E), the
    timbre teacher's embedding of each isolated stem, NaN where it has none.
    """

    mix: np.ndarray
    slots: np.ndarray | None = None
    notes: np.ndarray | None = None
    polyphony: np.ndarray | None = None
    timbre: np.ndarray | None = None
    teacher: np.ndarray | None = None
    window: int = 0

    def save(self, path: Path) -> None:
        """Write the .npz: what is not None, first_midi, hop. As a whole or, with UserError, not at all."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        partial = None
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".rt-mpe-", suffix=".npz", delete=False) as file:
                partial = Path(file.name)
                said = {name: value for name, value in arrays.items() if value is not None}
                np.savez_compressed(file, **said, first_midi=FIRST_MIDI, hop=FRAME_SECONDS)
            partial.chmod(0o644)  # temporary files are private
            partial.replace(path)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{path} cannot be written ({reason}); choose another --predictions") from error
        finally:
            if partial is not None:
                partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Self:
        try:
            with np.load(path) as file:
                said = {f.name: file[f.name] for f in fields(cls) if f.name in file}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} cannot be read again ({error}); is the disk full?") from error
        return cls(**{**said, "window": int(said.get("window", 0))})


def metadata(model: str) -> dict[str, str]:
    """Of a model file, or a shipped one by its name."""
    return open_session(model_path(model)).get_modelmeta().custom_metadata_map


def levels(samples: np.ndarray) -> np.ndarray:
    """(n,) float32 at SAMPLERATE -> (T, N_BINS) audible, of the label frames 0.. whose centre lies before the end."""
    cqt = StreamingCqt(PAPER)
    frames = np.concatenate([cqt.process(samples), cqt.flush()])
    before = cqt.latency // HOP - 1  # the first frame to come out is centred on one hop less the latency
    return audible(frames[before : before - (-len(samples) // HOP)])


class WindowNetwork:
    """A "rt-mpe window 1" file: levels (1, window, N_BINS) in, probabilities out; see `Prediction`."""

    def __init__(self, path: Path):
        self.path = path
        self._session = open_session(path)
        self.info = WindowInfo.from_metadata(self._session.get_modelmeta().custom_metadata_map, str(path))
        self.outputs = [o.name for o in self._session.get_outputs()]
        if "mix" not in self.outputs:
            raise UserError(f"{path} lacks the output mix; export the model again")

    def predict(self, samples: np.ndarray) -> Prediction:
        """(n,) float32 at SAMPLERATE, at least one sample."""
        frames, length = levels(samples), self.info.window
        n_frames = len(frames)
        padded = np.pad(frames, ((0, -n_frames % length), (0, 0)))
        said: dict[str, list[np.ndarray]] = {name: [] for name in self.outputs}
        for window in padded.reshape(-1, length, N_BINS):
            for name, value in zip(self.outputs, self._run(window), strict=True):
                said[name].append(value)
        along = {name: np.concatenate(said[name], -1)[..., :n_frames] for name in ("mix", "slots") if name in said}
        polyphony = np.concatenate(said["polyphony"])[:n_frames] if "polyphony" in said else None
        timbre = np.stack(said["timbre"]) if "timbre" in said else None
        return Prediction(**along, polyphony=polyphony, timbre=timbre, window=length)

    def _run(self, window: np.ndarray) -> list[np.ndarray]:
        try:
            return self._session.run(self.outputs, {"window": window[None]})
        except Exception as error:  # a graph with other inputs or shapes: as many kinds of error as there are ways
            reason = str(error).splitlines()[0][:120]
            raise UserError(f"{self.path} does not fit its format ({reason}); export the model again") from error


class TimbreTeacher:
    """A "rt-mpe timbre 1" file: levels (1, view, N_BINS) of an isolated stem in, an embedding (E,) out."""

    def __init__(self, path: Path):
        self._session = open_session(path)
        found = self._session.get_modelmeta().custom_metadata_map.get("format", "no format")
        if found != TIMBRE_FORMAT:
            raise UserError(f"{path} is no timbre teacher ({found} in its metadata, {TIMBRE_FORMAT!r} is needed)")
        self.view = int(self._session.get_inputs()[0].shape[1])

    def embed_all(self, samples: Sequence[np.ndarray | None], stems: Sequence[np.ndarray], n_frames: int) -> np.ndarray:
        """Samples and notes (n, 3) of each stem -> (stems, E), NaN without samples and where `embed` finds nothing."""
        found = [
            None if wave is None else self.embed(wave, notes_to_roll(notes, n_frames))
            for wave, notes in zip(samples, stems, strict=True)
        ]
        size = next((len(row) for row in found if row is not None), 1)
        return np.array([np.full(size, np.nan) if row is None else row for row in found], np.float32)

    def embed(self, samples: np.ndarray, roll: np.ndarray) -> np.ndarray | None:
        """(n,) float32 at SAMPLERATE of a stem and (N_PITCHES, T) of what it plays -> (E,), the mean of its active
        views, each of length 1; None if it has no view in which it sounds for ACTIVE_SHARE of the time."""
        frames = levels(samples)
        sounds = roll.any(0)[: len(frames)]
        starts = np.arange(0, len(sounds) - self.view + 1, self.view // 2)
        active = starts[[sounds[start : start + self.view].mean() >= ACTIVE_SHARE for start in starts]]
        if not len(active):
            return None
        chosen = active[np.unique(np.linspace(0, len(active) - 1, MOST_VIEWS).round().astype(int))]
        views = [self._session.run(["embedding"], {"view": frames[None, s : s + self.view]})[0].ravel() for s in chosen]
        return np.mean([view / max(float(np.linalg.norm(view)), 1e-12) for view in views], axis=0)


def hear(audio: Path | np.ndarray, model: str, settings: Settings) -> Prediction:
    """A file, or (n,) float32 at SAMPLERATE, through the live engine, decision by decision as a musician gets it."""
    if isinstance(audio, Path):
        heard = transcribe_file(audio, model, settings)
        return Prediction(mix=heard.mix, slots=heard.slots, notes=heard.notes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mixture.wav"
        soundfile.write(path, audio, SAMPLERATE, subtype="FLOAT")
        return hear(path, model, settings)


def check_model(model: str, live: bool) -> str:
    """What kind of file a model is, shipped or not, "" of a plugin; UserError if it cannot do what is wanted of it."""
    kind = ""
    if Path(model).suffix == ".onnx" or Path(model).is_file() or not (":" in model or model in known("model")):
        kind = metadata(model).get("format", "no format")
    if live or kind != WindowInfo.FORMAT:
        load_model(model)
    else:
        WindowNetwork(model_path(model))
    return kind


def frame_thresholds(model: str) -> dict[str, float] | None:
    """Of "mix" and "slots", as the file has them from its own validation; None if it has none."""
    text = metadata(model).get("frame_thresholds")
    if text is None:
        return None
    try:
        found = json.loads(text)
        return {name: float(found[name]) for name in ("mix", "slots")}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the metadata of {model} is damaged (frame_thresholds: {error}); export it again") from error
