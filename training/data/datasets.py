"""What every data set is read into: pieces, each with its players' notes and, where there are, isolated recordings."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

from realtime_mpe.analysis import SAMPLERATE
from realtime_mpe.errors import UserError

AUDIO_SUFFIXES = (".wav", ".flac")

FAMILIES = ("strings", "woodwinds", "brass", "other")  # Table II of the slot-attention paper, and what is in none of it
CODES = {  # of URMP's instruments
    **dict.fromkeys(("vn", "va", "vc", "db"), "strings"),
    **dict.fromkeys(("fl", "ob", "cl", "sax", "bn"), "woodwinds"),
    **dict.fromkeys(("tpt", "hn", "tbn", "tba"), "brass"),
}
PROGRAMS = {  # of General MIDI, counted from 0
    **dict.fromkeys((*range(40, 47), *range(48, 52)), "strings"),
    **dict.fromkeys(range(56, 64), "brass"),
    **dict.fromkeys(range(64, 80), "woodwinds"),
}
WORDS = {
    "strings": ("violin", "viola", "cello", "violoncello", "double bass", "contrabass", "strings"),
    "woodwinds": (
        *("flute", "piccolo", "oboe", "clarinet", "saxophone", "sax", "bassoon", "contrabassoon"),
        *("english horn", "cor anglais", "recorder"),
    ),
    "brass": ("trumpet", "trombone", "tuba", "french horn", "horn", "brass"),
}


def family_of(name: str, program: int | None = None) -> str:
    """One of FAMILIES, by URMP code, General MIDI program (from 0) or the words of an instrument's name."""
    if program is not None:
        return PROGRAMS.get(program, "other")
    plain = " ".join(re.findall("[a-z]+", name.lower()))
    if plain in CODES:
        return CODES[plain]
    found = [
        (len(word), family)
        for family, words in WORDS.items()
        for word in words
        if re.search(rf"\b{word.replace(' ', ' ?')}s?\b", plain) and "synth" not in plain
    ]
    return max(found)[1] if found else "other"  # the longest word: an English horn is no brass


@dataclass(frozen=True, eq=False)
class Stem:
    """One player. name : within the piece.  instrument : "" if unknown.  audio : None without an isolated recording.

    notes : (N, 3) float64: onset s, offset s, MIDI number, by onset.
    """

    name: str
    instrument: str
    family: str
    audio: Path | None
    notes: np.ndarray


class LazyStem(Stem):
    """Its notes are read when they are first asked for: a large data set has thousands of files of them.

    read : must survive pickling. UserError from it reaches who asks for the notes.
    """

    def __init__(self, name: str, instrument: str, family: str, audio: Path | None, read: Callable[[], np.ndarray]):
        self.__dict__.update(name=name, instrument=instrument, family=family, audio=audio, read=read)

    @cached_property
    def notes(self) -> np.ndarray:
        return self.read()


@dataclass(frozen=True)
class Recording:
    """mixture : (n,) float32 at 16 kHz.  stems : (n,) each, None without an isolated recording."""

    mixture: np.ndarray
    stems: list[np.ndarray | None]


@dataclass(frozen=True)
class Piece:
    """group : pieces with the same one share recordings.  mixture : None where it is the sum of the stems.

    distractors : what is in the mixture and has no notes (drums).
    """

    name: str
    group: str
    mixture: Path | None
    stems: tuple[Stem, ...]
    distractors: tuple[Path, ...]
    seconds: float

    def read(self) -> Recording:
        """UserError if a file cannot be read."""
        stems = [None if stem.audio is None else read_audio(stem.audio) for stem in self.stems]
        if self.mixture is not None:
            mixture = read_audio(self.mixture)
        else:
            parts = [*(s for s in stems if s is not None), *map(read_audio, self.distractors)]
            n = max(map(len, parts))
            mixture = np.sum([fit(part, n) for part in parts], axis=0)
        return Recording(mixture, [None if s is None else fit(s, len(mixture)) for s in stems])


@dataclass(frozen=True)
class DataSet:
    """problems : what is broken and was left out, a line each."""

    name: str
    root: Path
    pieces: tuple[Piece, ...]
    problems: tuple[str, ...]


class Broken(UserError):
    """Why a piece cannot be used; in `collect` it becomes one of the data set's problems."""


def read_audio(path: Path) -> np.ndarray:
    """A file as (n,) float32 at SAMPLERATE, the mean of its channels."""
    try:
        audio, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise UserError(f"{path} cannot be read as audio ({error}); download or convert it again") from error
    return at_samplerate(audio.mean(1), rate)


def at_samplerate(audio: np.ndarray, rate: int) -> np.ndarray:
    """(n,) at any rate -> (m,) float32 at SAMPLERATE."""
    divisor = math.gcd(rate, SAMPLERATE)
    if rate != SAMPLERATE:
        audio = resample_poly(audio, SAMPLERATE // divisor, rate // divisor)
    return audio.astype(np.float32)


def audio_seconds(path: Path) -> float:
    """From the header. Broken if there is no sound."""
    try:
        seconds = soundfile.info(str(path)).duration
    except (soundfile.SoundFileError, OSError) as error:
        raise Broken(f"{path} cannot be read as audio") from error
    if not seconds > 0:
        raise Broken(f"{path} holds no sound")
    return seconds


def fit(audio: np.ndarray, n: int) -> np.ndarray:
    """Cut, or silence added, to n samples."""
    return audio[:n] if len(audio) >= n else np.pad(audio, (0, n - len(audio)))


def audio_file(stem: Path) -> Path | None:
    """The .wav or .flac of a path without suffix."""
    return next((p for suffix in AUDIO_SUFFIXES if (p := stem.with_name(stem.name + suffix)).is_file()), None)


def collect(name: str, root: Path, folders: Iterable, read: Callable[..., Piece], problems: list[str]) -> DataSet:
    """A data set of what ``read`` makes of every folder (or other description); what is Broken is left out."""
    pieces = []
    for folder in folders:
        try:
            pieces.append(read(folder, problems))
        except UserError as error:
            problems.append(str(error))
    return DataSet(name, root, tuple(pieces), tuple(problems))


def open_dataset(folder: Path, layout: str | None = None) -> DataSet:
    """Whatever data set lies in ``folder``; UserError if it is none that is known.

    layout : one of LAYOUTS, to skip the looking.
    """
    from .layouts import LAYOUTS  # which reads this module

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {str(folder)!r}; give the folder of a data set")
    if layout is not None and layout not in LAYOUTS:
        raise UserError(f"layout {layout!r} is unknown; known are {', '.join(LAYOUTS)}")
    try:
        for name in LAYOUTS if layout is None else [layout]:
            found = LAYOUTS[name](folder)
            if found is not None:
                return found
        seen = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be read ({error.strerror}); check who may read it"
        ) from error
    listed = ", ".join(seen[:5]) + (", ..." if len(seen) > 5 else "") or "nothing"
    known = ", ".join(LAYOUTS) if layout is None else layout
    raise UserError(f"{str(folder)!r} has none of the known layouts ({known}); it holds {listed}")
