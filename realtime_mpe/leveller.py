"""Brings a faint sound up to a level at which the network hears well, whatever microphone and hall have made of it.

Training plays at every level between a distant microphone and a hot line. What is fainter than its middle is heard the
less of the fainter it is; what is louder needs no hand on the gain, and a gain that stands still tells players apart
best, so there it does.
"""

from math import log, log10

import numpy as np

from .cqt import FLOOR_DB, RANGE_DB, audible

FAINT_DB = -30.0  # power of a frame's bins together, about that of its samples: about as loud as playing is to be
MOST_DB = 24.0  # that anything is brought up
MEMORY_SECONDS = 10.0  # over which the power is averaged: longer than a phrase
TRUST_SECONDS = 0.05  # of playing at FAINT_DB that are taken for heard at the start: a note has to begin first
SLACK_DB = 4.0  # by which the gain may be off before it is moved
DECIBEL = log(10.0) / 10.0  # of power, in the natural logarithm
REST_DB = -60.0  # fainter frames say nothing of how loud the playing is


class Leveller:
    """One frame a call.  step_seconds : from one frame to the next."""

    latency = 0

    def __init__(self, step_seconds: float):
        self._step = step_seconds
        self.reset()

    def reset(self) -> None:
        """As if nothing had been heard."""
        self._heard = TRUST_SECONDS  # that the average rests on
        self._power = 10.0 ** (FAINT_DB / 10.0)
        self._gain = 0.0  # dB

    def process(self, frame: np.ndarray) -> np.ndarray:
        """(n_bins,) levels of the front end -> (n_bins,) audible levels, all moved by one gain."""
        power = float(np.exp((frame * RANGE_DB + FLOOR_DB) * DECIBEL).sum())
        if power > 10.0 ** (REST_DB / 10.0):
            self._heard = min(self._heard + self._step, MEMORY_SECONDS)
            self._power += (power - self._power) * self._step / self._heard
        wanted = min(max(FAINT_DB - 10.0 * log10(self._power), 0.0), MOST_DB)
        self._gain = min(max(self._gain, wanted - SLACK_DB, 0.0), wanted + SLACK_DB)
        return audible(frame + np.float32(self._gain / RANGE_DB))
