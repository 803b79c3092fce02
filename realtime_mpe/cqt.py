"""The front ends: constant- and variable-Q transforms as matrix products, a hop at a time.

A constant-Q kernel at MIDI 23 lasts 1.7 s and, centred, looks 0.8 s ahead: the slot-attention paper's front end, whose
latency is that. In the live one every kernel *ends* at the newest sample and its bandwidth is widened by ``gamma`` Hz,
so that the lowest lasts 152 ms and the front end itself looks nowhere ahead. Training builds its tensors from the
arrays made here: there is one front end, not two.
"""

from typing import NamedTuple

import numpy as np

from .analysis import AnalysisConfig

FLOOR_DB = -85.0  # level 0: below the noise of a quiet room with a quiet microphone
RANGE_DB = 70.0  # level 1 is -15 dB, about a full-scale sine split between neighbouring bins
MAX_LEVEL = 1.3
FAINTEST = 1e-7  # magnitude, -140 dB: so that silence has a level
SILENCE = (20.0 * np.log10(FAINTEST) - FLOOR_DB) / RANGE_DB  # the lowest level
THINNED_BELOW = 500.0  # Hz; kernels of lower octaves are the longest, and need not read every sample
THIN = 4  # samples that become one there, divides a step
# Flat up to there, and 80 dB down where what lies there would be mistaken for it, above 3.45 kHz.
SMOOTHING = (np.kaiser(8 * THIN, 9.0) * np.sinc(np.arange(0.5 - 4 * THIN, 4 * THIN) / THIN) / THIN).astype(np.float32)


def bin_frequencies(config: AnalysisConfig) -> np.ndarray:
    """Centre frequency of every bin, Hz, shape (n_bins,).

    Bin 0 lies below the first pitch so that each pitch is the *middle* of its group of bins; a grid that starts on
    the pitch biases every note by a third of a semitone.
    """
    middle = (config.bins_per_pitch - 1) // 2
    midi = config.first_midi + (np.arange(config.n_bins) - middle) / config.bins_per_pitch
    return 440.0 * 2.0 ** ((midi - 69.0) / 12.0)


class Bank(NamedTuple):
    """Kernels of neighbouring bins. kernels : (behind + ahead, 2 * n) float32: real parts, then imaginary parts.

    They cover the samples from ``behind`` before a frame's centre to ``ahead`` after it; of right-aligned ones all are
    behind. If ``thin`` is not 1 but THIN, samples are those that `SMOOTHING` leaves, one of so many.
    """

    kernels: np.ndarray
    behind: int
    ahead: int
    thin: int


def kernels(config: AnalysisConfig) -> tuple[Bank, ...]:
    """Hann kernels of all bins, lowest first. Each window sums to 1, so that a sine of amplitude a reads a / 2.

    A bank holds an octave: most of a common one would be zeros, and reading it is what costs. That is also why
    right-aligned ones of low octaves are thin; their levels are those of whole ones to 1e-4 on average, and to 6e-3.
    """
    if config.alignment not in ("right", "centre"):
        raise ValueError(f"alignment {config.alignment!r} is unknown; the front end knows 'right' and 'centre'")
    frequencies = bin_frequencies(config)
    q = 1.0 / (2.0 ** (1.0 / (12 * config.bins_per_pitch)) - 1.0)
    lengths = np.ceil(q * config.samplerate / (frequencies + config.gamma * q)).astype(int)
    # Overtones keep the length of the highest pitch: shorter kernels would only blur neighbours.
    lengths = np.maximum(lengths, lengths[config.n_pitches * config.bins_per_pitch - 1])
    centred = config.alignment == "centre"
    banks = []
    size = 12 * config.bins_per_pitch
    for first in range(0, len(frequencies), size):
        own = lengths[first : first + size]
        thin = 1 if centred or frequencies[first : first + size].max() > THINNED_BELOW else THIN
        late = (len(SMOOTHING) - 1) / 2 if thin > 1 else 0.0  # samples, of what is smoothed
        behind, ahead = (own.max() // 2 + 1,) * 2 if centred else (-(-own.max() // thin), 0)
        bank = np.zeros((behind + ahead, 2 * len(own)), np.float32)
        for k, (frequency, length) in enumerate(zip(frequencies[first:], own, strict=False)):
            at = np.arange(length - 1 - late, -1, -thin)[::-1]  # samples after the first, of those that are read
            window = 0.5 - 0.5 * np.cos(2.0 * np.pi * (at + 1) / (length + 1))
            phase = 2.0 * np.pi * frequency / config.samplerate * at
            kernel = window * 2.0 * thin / (length + 1) * np.exp(-1j * phase)
            start = behind - length // 2 if centred else behind - len(at)
            bank[start : start + len(at), k] = kernel.real
            bank[start : start + len(at), len(own) + k] = kernel.imag
        banks.append(Bank(bank, int(behind), int(ahead), thin))
    return tuple(banks)


def level(spectrum: np.ndarray) -> np.ndarray:
    """Products with `kernels`, (..., 2 * n_bins), to levels (..., n_bins), SILENCE at least: absolute dB, scaled.

    Absolute, because a normalisation by the loudest of a window cannot be computed before the window has ended.
    """
    n_bins = spectrum.shape[-1] // 2
    magnitude = np.hypot(spectrum[..., :n_bins], spectrum[..., n_bins:])
    return ((20.0 * np.log10(magnitude + FAINTEST) - FLOOR_DB) / RANGE_DB).astype(np.float32)


def audible(levels):
    """Levels, a numpy array or a tensor, as networks are fed with them: what is fainter than the floor is at it."""
    return levels.clip(0.0, MAX_LEVEL)


class StreamingCqt:
    """Samples at ``config.samplerate`` in, frames out; frame n is complete with sample ``(n + 1) * step - 1``.

    steps : frames a hop; ``step`` is their distance in samples.  ``latency`` : samples, whole hops, by which a frame's
    centre lies before that. 0 for right-aligned kernels, whose newest sample is that of the step.
    """

    def __init__(self, config: AnalysisConfig, steps: int = 1):
        self.config = config
        self.step = config.hop // steps
        self._banks = kernels(config)
        self.latency = -(-max(bank.ahead for bank in self._banks) // config.hop) * config.hop
        self.reset()

    def reset(self) -> None:
        """Forget all samples: the next frame sees silence before its own."""
        reach = max(self.step + len(SMOOTHING), *(bank.behind for bank in self._banks if bank.thin == 1))
        self._history = np.zeros(reach + self.latency - self.step, np.float32)
        self._thinned = np.zeros(max((bank.behind for bank in self._banks if bank.thin > 1), default=0), np.float32)
        self._pending = np.zeros(0, np.float32)

    def process(self, samples: np.ndarray) -> np.ndarray:
        """(n,) float32 samples -> (m, n_bins) float32 levels of the frames that are now complete."""
        step = self.step
        pending = np.concatenate([self._pending, np.asarray(samples, np.float32)])
        n_frames = len(pending) // step
        signal = np.concatenate([self._history, pending])
        frames = np.empty((n_frames, self.config.n_bins), np.float32)
        for n in range(n_frames):  # products of one shape a frame: chopping the input cannot change the rounding
            centre = len(self._history) + (n + 1) * step - self.latency
            if len(self._thinned):
                fresh = np.convolve(signal[centre - step - len(SMOOTHING) + THIN : centre], SMOOTHING, "valid")[::THIN]
                self._thinned = np.concatenate([self._thinned[len(fresh) :], fresh])
            heard = {1: (signal, centre), THIN: (self._thinned, len(self._thinned))}  # samples, and where the frame is
            products = []
            for bank in self._banks:
                samples, at = heard[bank.thin]
                products.append(samples[at - bank.behind : at + bank.ahead] @ bank.kernels)
            halves = [product.reshape(2, -1) for product in products]
            frames[n] = level(np.concatenate(halves, 1).ravel())
        used = n_frames * step
        self._history = signal[used : used + len(self._history)]
        self._pending = pending[used:]
        return frames

    def flush(self) -> np.ndarray:
        """The last, partly filled step completed with silence, and what the latency still holds: (m, n_bins)."""
        missing = -len(self._pending) % self.step
        return self.process(np.zeros(missing + self.latency, np.float32))
