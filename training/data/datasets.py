"""What every data set is read into: pieces, each with its players' notes and, where there are, isolated recordings."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
        if re.search(rf"\b{word}s?\b", plain) and "synth" not in plain
    ]
    return max(found)[1] if found else "other"  # the longest word: an English horn is no brass


@dataclass(frozen=True)
class Stem:
    """One player. name : within the piece.  audio : None without an isolated recording.

    notes : (N, 3) onset s, offset s, MIDI number, by onset.
    """

    name: str
    instrument: str
    family: str
    audio: Path | None
    notes: np.ndarray


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
