"""From the rate of the source to the 16 kHz of the analysis, or another, in one stateful polyphase filter.

Output sample m is the input at second ``m / target``, whatever the rates: the filter is symmetric and its delay is
removed, so the delay shows only as output that comes ``latency`` samples later. All positions are integers (output
sample m stands at input sample ``m * down / up``), so nothing drifts and nothing wraps.
"""

from math import ceil, gcd

import numpy as np

from .analysis import SAMPLERATE
from .errors import UserError

MIN_SAMPLERATE = 4_000  # Hz
MAX_SAMPLERATE = 384_000  # Hz

# Zero crossings of the sinc on each side. At 16 kHz out they are 1.25 ms, and with 80 dB of stop band the transition
# is 7 to 9 kHz: what folds back lands above 7 kHz, beyond the third harmonic of the highest pitch.
HALF_WIDTH = 20
KAISER_BETA = 7.857  # 0.1102 * (80 dB - 8.7), Kaiser's formula
TABLE_STEPS = 512  # a zero crossing in the interpolated table: linear interpolation is then wrong by less than -115 dB
MAX_BANK = 1 << 18  # coefficients; 1 MB holds every rate in common use, others interpolate
TILE = 1 << 15  # coefficients in work at once: larger temporaries fall out of the cache and cost three times as much


class Resampler:
    """Mono samples at `samplerate` (an integer, 4 to 384 kHz) to `target`, Hz.

    latency : output samples by which the output lags the input: after N input samples ``ceil(N * target / samplerate)
    - latency`` have come out. It is 20 (1.25 ms at 16 kHz) for rates above the target, 0 at it, where nothing is
    filtered, and ``ceil(20 * target / samplerate)`` below (the cutoff is then the input's own Nyquist frequency, and
    the filter is as much longer).

    The signal is kept, within 80 dB, below 7/16 of the lower of the two rates. Any chopping of the input gives the
    same output to the last bit.

    Raises UserError for a rate that is no integer or out of range.
    """

    def __init__(self, samplerate: int, target: int = SAMPLERATE) -> None:
        if not MIN_SAMPLERATE <= samplerate <= MAX_SAMPLERATE or samplerate != int(samplerate):
            raise UserError(
                f"a sample rate of {samplerate} Hz cannot be used; "
                f"give a whole number from {MIN_SAMPLERATE} to {MAX_SAMPLERATE}"
            )
        self.samplerate = int(samplerate)
        divisor = gcd(self.samplerate, target)
        self._up = target // divisor
        self._down = self.samplerate // divisor
        self._pass_through = self.samplerate == target
        self.latency = 0 if self._pass_through else -(-HALF_WIDTH * max(self._down, self._up) // self._down)
        # "Raw" output k is aligned output k - latency: it ends at input sample floor(k * down / up), so a causal filter
        # of n_taps samples reaches as far to both sides of the place it stands for.
        self._n_taps = 2 * self.latency * self._down // self._up + 1
        self._bank = self._table = None
        if not self._pass_through:
            self._make_filter()
        self.reset()

    def _make_filter(self) -> None:
        if self._up * self._n_taps <= MAX_BANK:
            self._bank = self._taps(np.arange(self._up) / self._up)
        else:
            steps = ceil(TABLE_STEPS * min(1.0, self._up / self._down))
            rows = self._taps(np.arange(steps + 1) / steps)
            self._table = rows[:-1], np.diff(rows, axis=0)

    def _taps(self, fraction: np.ndarray) -> np.ndarray:
        """Coefficients for outputs `fraction` (n,) of an input sample after the newest one: (n, n_taps) float32."""
        age = np.arange(self._n_taps - 1, -1, -1)  # of each input sample, in samples before the newest
        place = fraction[:, None] + age - self.latency * self._down / self._up
        crossings = place * min(1.0, self._up / self._down)
        window = np.i0(KAISER_BETA * np.sqrt(np.clip(1.0 - (crossings / HALF_WIDTH) ** 2, 0.0, None)))
        taps = np.sinc(crossings) * window * (np.abs(crossings) < HALF_WIDTH)
        # Every phase passes DC exactly; otherwise an offset of the input would be modulated from phase to phase.
        return (taps / taps.sum(axis=1, keepdims=True)).astype(np.float32)

    def reset(self) -> None:
        """Forget the past: the next sample is number 0 of a new input."""
        self._received = 0  # input samples so far
        self._next = self.latency  # raw output to come; those before it stand for times before the input began
        self._first = self._start(self._next)  # input index of the first sample in the buffer
        self._buffer = np.zeros(-self._first, np.float32)

    def _start(self, k: int) -> int:
        """Input index of the first sample that raw output k needs."""
        return k * self._down // self._up - self._n_taps + 1

    def process(self, x: np.ndarray) -> np.ndarray:
        """Take x (n,) float32 and give what can be computed from it: (m,) float32, m = 0 is possible."""
        x = np.asarray(x, np.float32)
        if x.ndim != 1:
            raise ValueError(f"expected mono samples of shape (n,), got {x.shape}")
        if self._pass_through:
            return x.copy()
        self._received += len(x)
        self._buffer = np.concatenate((self._buffer, x))
        return self._filter(self._due())

    def flush(self) -> np.ndarray:
        """End of input: the rest, so that ``ceil(N * target / samplerate)`` samples came for N; then as after reset."""
        if self._pass_through:
            return np.zeros(0, np.float32)
        end = self._due() + self.latency
        missing = (end - 1) * self._down // self._up + 1 - self._received
        self._buffer = np.concatenate((self._buffer, np.zeros(max(missing, 0), np.float32)))
        rest = self._filter(end if self._received else self._next)
        self.reset()
        return rest

    def _due(self) -> int:
        """Number of raw outputs whose samples have all been received."""
        return -(-self._received * self._up // self._down)

    def _filter(self, end: int) -> np.ndarray:
        """Raw outputs from the next one to `end`, exclusive; drops the samples that no later output needs."""
        y = np.empty(max(end - self._next, 0), np.float32)
        rows = max(TILE // self._n_taps, 1)
        for i in range(0, len(y), rows):
            self._filter_tile(self._next + i, y[i : i + rows])
        if len(y):
            self._next = end
            drop = self._start(end) - self._first
            self._buffer = self._buffer[drop:].copy()
            self._first += drop
        return y

    def _between(self, phase: np.ndarray) -> np.ndarray:
        """Coefficients for outputs that lie `phase` (n,) of ``up`` parts after an input sample: (n, n_taps)."""
        if self._bank is not None:
            return self._bank[phase]
        rows, slopes = self._table
        step, rest = np.divmod(phase * len(rows), self._up)
        return rows[step] + slopes[step] * (rest / self._up).astype(np.float32)[:, None]

    def _filter_tile(self, k: int, y: np.ndarray) -> None:
        windows = np.lib.stride_tricks.sliding_window_view(self._buffer, self._n_taps)[self._start(k) - self._first :]
        if self._up == 1:  # a whole number of samples apart, as at 48 kHz: nothing has to be copied
            windows, taps = windows[:: self._down][: len(y)], np.broadcast_to(self._bank, (len(y), self._n_taps))
        else:
            # Python integers carry the absolute position; only what is relative to it goes into int64 arrays.
            place = k * self._down % self._up + np.arange(len(y)) * self._down
            newest, phase = np.divmod(place, self._up)
            windows, taps = windows[newest], self._between(phase)
        # A product with BLAS would sum in an order that depends on how many outputs are asked for; einsum takes each
        # row by itself, so that the chopping of the input cannot be heard in the rounding.
        np.einsum("ij,ij->i", windows, taps, out=y)
