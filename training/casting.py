"""Ensembles as in life: instruments of one family, each part in its own register, often several alike.

A random cast teaches to tell timbres apart; a string quartet teaches that timbre is not all there is. Chamber music
goes further: every part is one line on an instrument of the orchestra, and two violins may be of different makers.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

# Names of recorded instruments, and General MIDI programs of SoundFonts.
FAMILIES = {
    "strings": (("violin", "viola", "cello", "double-bass"), (40, 41, 42, 43, 44, 45, 48, 49)),
    "winds": (
        ("flute", "oboe", "clarinet", "bassoon", "saxophone", "french-horn"),
        (60, 64, 65, 66, 67, 68, 69, 70, 71, 73, 74),
    ),
    "brass": (("trumpet", "trombone", "tuba", "french-horn"), (56, 57, 58, 60, 61)),
    "band": ((), (0, 1, 2, 4, 5, 24, 25, 26, 27, 28, 32, 33, 34, 35, 36, 38, 39, 48, 50, 80, 81, 88, 90)),
}
FAMILIES["orchestra"] = tuple(
    tuple(sorted({*FAMILIES["strings"][side], *FAMILIES["winds"][side], *FAMILIES["brass"][side]})) for side in (0, 1)
)
SHARES = {"strings": 0.3, "winds": 0.15, "brass": 0.1, "band": 0.2, "orchestra": 0.25}

# Who plays one note at a time: recorded instruments with their programs, each family from high to low.
SOLOISTS = {
    "violin": (40,),
    "viola": (41,),
    "cello": (42,),
    "double-bass": (43,),
    "flute": (73,),
    "oboe": (68,),
    "clarinet": (71,),
    "bassoon": (70,),
    "saxophone": (64, 65, 66, 67),
    "french-horn": (60,),
    "trumpet": (56,),
    "trombone": (57,),
    "tuba": (58,),
}
CHAMBER_SHARES = {"strings": 0.5, "winds": 0.15, "brass": 0.1, "orchestra": 0.25}
NATURAL_PROBABILITY = 0.6  # of a string part played by the highest instrument that reaches it, instead of any that does
SLACK = 2  # semitones out of reach that are none
NEIGHBOURS_PROBABILITY = 0.5  # two parts next to each other on one kind of instrument


class Ranged(Protocol):
    """An instrument as far as casting goes; see `training.stems.Instrument`."""

    name: str
    low: int
    high: int


def members(names: Sequence[str], family: str) -> list[int]:
    """Which of the instruments, named "source:instrument" or "source:program", belong to a family."""
    recorded, programs = FAMILIES[family]
    return [
        k
        for k, name in enumerate(names)
        if (own := name.rpartition(":")[2]) in recorded or (own.isdigit() and int(own) in programs)
    ]


def draw_family(names: Sequence[str], rng: np.random.Generator) -> list[int]:
    """The members of a random family; all instruments, if they have none of it."""
    return members(names, str(rng.choice(list(SHARES), p=list(SHARES.values())))) or list(range(len(names)))


def out_of_reach(instrument: Ranged, pitches: np.ndarray) -> float:
    """Semitones by which the middle four fifths of a part's pitches, (N,) MIDI, exceed the instrument's range."""
    low, high = np.percentile(pitches, [10, 90])
    return max(instrument.low - low, 0) + max(high - instrument.high, 0)


def soloists(instruments: Sequence[Ranged], family: str) -> list[list[Ranged]]:
    """Those of a family who play one note at a time, by their kind: all violins, all violas ..."""
    able = [instruments[k] for k in members([i.name for i in instruments], family)]
    kinds: dict[str, list[Ranged]] = {kind: [] for kind in SOLOISTS}
    for instrument in able:
        own = instrument.name.rpartition(":")[2]
        for kind, programs in SOLOISTS.items():
            if own == kind or (own.isdigit() and int(own) in programs):
                kinds[kind].append(instrument)
    return [alike for alike in kinds.values() if alike]


def cast_chamber(
    instruments: Sequence[Ranged], parts: Sequence[np.ndarray], rng: np.random.Generator
) -> list[list[Ranged]]:
    """Who may play each part, all of one kind; two parts of one kind have the same list.

    parts : notes (N, 4) of each.  Without soloists of the family that is drawn, every list is empty.
    """
    family = str(rng.choice(list(CHAMBER_SHARES), p=list(CHAMBER_SHARES.values())))
    kinds = soloists(instruments, family)
    if not kinds:
        return [[] for _ in parts]
    cast = []
    for notes in parts:
        reach = np.array([out_of_reach(alike[0], notes[:, 2]) for alike in kinds])
        if family == "strings":
            able = np.flatnonzero(reach <= reach.min() + SLACK)
            chosen = able[0] if rng.random() < NATURAL_PROBABILITY else rng.choice(able)
        else:
            chosen = min(rng.integers(len(kinds), size=3), key=reach.__getitem__)
        cast.append(kinds[chosen])
    if len(parts) >= 2 and rng.random() < NEIGHBOURS_PROBABILITY:
        by_register = np.argsort([np.median(notes[:, 2]) for notes in parts])
        upper = int(rng.integers(1, len(parts)))
        cast[by_register[upper - 1]] = cast[by_register[upper]]
    return cast
