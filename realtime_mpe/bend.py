"""How far a sounding note is off its equal-tempered pitch, from the levels of its own bins.

The kernels are many bins wide, so a partial is a smooth hill over its neighbours whose top can be found far more finely
than the 33 cents between two bins: least squares fit a parabola. Measured on harmonic tones from MIDI 36 to 84: 8 cents
at most within 40 cents of the pitch, where the note stands alone.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from .analysis import BINS_PER_PITCH
from .cqt import RANGE_DB
from .events import Bend, Note

PARTIALS = 2  # higher ones are masked by other players more often than they help
REACH = 3  # bins to either side of a partial, a semitone: as far as the hill is a parabola
SMOOTHING = 0.5  # share of the newest frame: one frame may be another player's attack
MOST_CENTS = 50.0  # beyond it, it is another note
_OFFSETS = np.arange(-REACH, REACH + 1)
_FIT = np.linalg.pinv(np.stack([_OFFSETS**2, _OFFSETS], 1) - np.mean(np.stack([_OFFSETS**2, _OFFSETS], 1), 0))


def cents(frame: np.ndarray, pitch: int) -> float | None:
    """frame : (n_bins,) levels.  pitch : row 0..71. -> -MOST_CENTS..MOST_CENTS; None where no hill is found."""
    weighted = total = 0.0
    for partial in range(1, PARTIALS + 1):
        place = 12 * BINS_PER_PITCH * np.log2(partial)
        centre = BINS_PER_PITCH * pitch + BINS_PER_PITCH // 2 + round(place)
        if centre < REACH or centre + REACH >= len(frame):
            continue
        levels = frame[centre - REACH : centre + REACH + 1]
        curve, slope = _FIT @ levels
        if curve >= 0.0:
            continue
        top = -slope / (2.0 * curve) - (place - round(place))
        if abs(top) <= REACH:
            weight = -curve * 10.0 ** (float(levels.max()) * RANGE_DB / 40.0)  # the root of the amplitude
            weighted += weight * top
            total += weight
    if not total:
        return None
    return float(np.clip(100.0 / BINS_PER_PITCH * weighted / total, -MOST_CENTS, MOST_CENTS))


class PitchFollower:
    """The pitch of sounding notes from frame to frame."""

    def __init__(self) -> None:
        self._cents: dict[int, tuple[Note, float]] = {}  # by pitch row

    def process(self, frame: np.ndarray, sounding: Mapping[int, Note]) -> Iterator[Bend]:
        """frame : (n_bins,) levels.  sounding : pitch row -> note. What can be told of them now."""
        for pitch, note in sounding.items():
            found = cents(frame, pitch)
            if found is None:
                continue
            followed, before = self._cents.get(pitch, (None, 0.0))
            before = before if followed is note else 0.0
            now = before + SMOOTHING * (found - before)
            self._cents[pitch] = note, now
            yield Bend(note, now)
