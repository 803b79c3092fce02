"""Which notes begin and end: posteriors of every step to note-on and note-off decisions.

The model answers for every look-ahead at once, so one step tells of the newest label frame at the chosen look-ahead
L and, better informed, of the frames before it at L + 1, L + 2 ... A note-on is decided at L, because it is what
a player waits for; its onset is then looked up among the frames just before; note-offs and repeated notes are
decided at L + 1. So are notes a semitone beside one that sounds or has just ended, unless they are sure: a sound that
stops all of a sudden is wide for a moment.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .analysis import BINS_PER_PITCH, MAX_LOOKAHEAD
from .cqt import FLOOR_DB, RANGE_DB

MIN_REPEAT_FRAMES = 3  # 96 ms: faster repetitions of one pitch by one player are trills of the model, not of people
SPLASH_FRAMES = 2  # 64 ms: for so long a sound that has stopped may splash over the pitches beside it
SURE = 0.9  # probability that is no splash
VELOCITY_FLOOR_DB, VELOCITY_RANGE_DB = -62.0, 50.0  # level of a pitch's bins that maps to velocity 1, and up to 127


@dataclass(frozen=True)
class Thresholds:
    """Probabilities in 0..1, chosen on validation data for one look-ahead and stored in the model file.

    on : mixture probability that begins a note.  off : below it the note ends (off <= on).
    onset : onset probability that begins a note whose mixture probability has only reached ``off``.
    repeat : onset probability that splits a sounding note in two.
    """

    on: float = 0.5
    off: float = 0.35
    onset: float = 0.5
    repeat: float = 0.5

    def shifted(self, sensitivity: float) -> "Thresholds":
        """All thresholds moved by the user's knob: sensitivity 0..1, 0.5 changes nothing, 1 finds most notes."""
        return Thresholds(
            *(_shift(value, 4.0 * (0.5 - sensitivity)) for value in (self.on, self.off, self.onset, self.repeat))
        )


def _shift(probability: float, logits: float) -> float:
    if not 0.0 < probability < 1.0:  # always and never stay what they are
        return probability
    odds = probability / (1.0 - probability) * np.exp(logits)
    return float(odds / (1.0 + odds))


class NoteEvent(NamedTuple):
    """pitch : row 0..71.  step : of the labels, of the onset or of the first one after the end.  on : begins."""

    on: bool
    pitch: int
    step: int


class NoteTracker:
    """One call a step; ``latency`` is the look-ahead in frames.  steps : a frame."""

    def __init__(self, n_pitches: int, thresholds: Thresholds, lookahead: int, steps: int = 1):
        if not 0 <= lookahead <= MAX_LOOKAHEAD:
            raise ValueError(f"lookahead {lookahead} is outside 0..{MAX_LOOKAHEAD}")
        self.thresholds = thresholds
        self.latency = lookahead
        self._n_pitches = n_pitches
        self._steps = steps
        self.reset()

    def reset(self) -> None:
        self.sounding = np.zeros(self._n_pitches, bool)
        self._onset = np.zeros(self._n_pitches, int)
        self._end = np.zeros(self._n_pitches, int)  # of the last note
        self._above_repeat = np.zeros(self._n_pitches, bool)
        self._last_sounded = np.full(self._n_pitches, -self._steps * SPLASH_FRAMES - 1)  # in which step
        self._newest = 0  # step of the labels that look-ahead 0 has reached

    def process(self, mix: np.ndarray, onset: np.ndarray) -> list[NoteEvent]:
        """mix, onset : (MAX_LOOKAHEAD + 1, n_pitches) probabilities of one step -> ends first, then beginnings."""
        limits, lookahead = self.thresholds, self.latency
        later = min(lookahead + 1, MAX_LOOKAHEAD)
        self._newest += 1
        step = self._newest - self._steps * lookahead
        later_step = self._newest - self._steps * later
        if step < 0:
            return []
        ended = self.sounding & (mix[later] < limits.off) & (self._onset < later_step)
        strong = onset[later] >= limits.repeat
        old = later_step - self._onset >= self._steps * MIN_REPEAT_FRAMES
        repeated = self.sounding & strong & ~self._above_repeat & ~ended & old
        self._above_repeat = strong
        begun = ~self.sounding & (
            (mix[lookahead] >= limits.on) | ((onset[lookahead] >= limits.onset) & (mix[lookahead] >= limits.off))
        )
        self._last_sounded[self.sounding] = self._newest
        if begun.any():
            confirmed = np.minimum(mix[lookahead], mix[later]) >= limits.on
            begun &= ~self._beside() | confirmed | (mix[lookahead] >= SURE)
        events = [NoteEvent(False, int(p), later_step) for p in np.flatnonzero(ended | repeated)]
        self._end[ended | repeated] = later_step
        for p in np.flatnonzero(repeated):
            events.append(NoteEvent(True, int(p), later_step))
            self._onset[p] = later_step
        for p in np.flatnonzero(begun):
            back = int(np.argmax(onset[lookahead:, p]))
            if onset[lookahead + back, p] < limits.onset / 2:
                back = 0
            start = max(step - self._steps * back, int(self._end[p]))  # no note begins within the one before
            events.append(NoteEvent(True, int(p), start))
            self._onset[p] = start
        self.sounding = (self.sounding & ~ended) | begun
        return events

    def _beside(self) -> np.ndarray:
        """(n_pitches,) bool, whether a pitch a semitone away sounds or has just ended."""
        splashing = self._newest - self._last_sounded <= self._steps * SPLASH_FRAMES
        beside = np.append(splashing[1:], False)
        beside[1:] |= splashing[:-1]
        return beside

    def flush(self) -> list[NoteEvent]:
        """End of input: whatever sounds ends after the last label."""
        step = self._newest + 1 - self._steps * self.latency
        events = [NoteEvent(False, int(p), step) for p in np.flatnonzero(self.sounding)]
        self.sounding[:] = False
        return events


def velocity(frame: np.ndarray, pitch: int) -> int:
    """MIDI velocity 1..127 from the level of a pitch's own bins, (n_bins,) levels."""
    decibels = float(frame[BINS_PER_PITCH * pitch : BINS_PER_PITCH * (pitch + 1)].max()) * RANGE_DB + FLOOR_DB
    share = (decibels - VELOCITY_FLOOR_DB) / VELOCITY_RANGE_DB
    return int(np.clip(round(1 + 126 * share), 1, 127))
