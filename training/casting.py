"""Ensembles as in life: instruments of one family, each part in its own register, often several alike.

A random cast teaches to tell timbres apart; a string quartet teaches that timbre is not all there is.
"""

from collections.abc import Sequence

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
