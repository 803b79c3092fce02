"""What comes in, before anything is heard in it: made safe, measured, and its faults counted."""

import math

import numpy as np

SILENCE_DB = -80.0  # RMS re full scale: below the self-noise of any input that is connected
CLIPPED = 0.999  # of full scale
FAINTEST = 1e-12  # mean square, -120 dB: so that silence has a level
MANY_CLIPPED = 1e-4  # of all samples; a mastered file touches full scale here and there without harm


class InputMeter:
    """level_db : RMS of the last block, re full scale.  received, clipped, invalid : samples so far."""

    def __init__(self) -> None:
        self.level_db = 10.0 * math.log10(FAINTEST)
        self.received = self.clipped = self.invalid = 0

    def process(self, samples: np.ndarray) -> np.ndarray:
        """Mono float32 samples -> the same with silence for what is no number, (n,)."""
        finite = np.isfinite(samples)
        if not finite.all():
            self.invalid += int((~finite).sum())
            samples = np.where(finite, samples, 0.0)
        self.clipped += int((np.abs(samples) >= CLIPPED).sum())
        samples = np.clip(samples, -1e3, 1e3)
        self.received += len(samples)
        if len(samples):
            self.level_db = 10.0 * math.log10(float(np.mean(np.square(samples, dtype=float))) + FAINTEST)
        return samples

    def faults(self) -> list[str]:
        """What was wrong with the samples so far, a line each with the remedy; for the end of a performance."""
        found = []
        if self.invalid:
            found.append(f"{self.invalid} samples were no numbers and taken as silence: check what made them")
        if self.clipped > MANY_CLIPPED * self.received:
            found.append(f"{self.clipped} samples were clipped: turn the input gain down")
        return found
