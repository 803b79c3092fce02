"""The live front end: a right-aligned variable-Q transform (VQT) as one matrix product a hop.

A constant-Q kernel at MIDI 23 lasts 1.7 s and, centred, looks 0.8 s ahead. Here every kernel *ends* at the newest
sample and its bandwidth is widened by ``gamma`` Hz, so that the lowest lasts 152 ms and the front end itself looks
nowhere ahead. Training builds its tensors from the arrays made here: there is one front end, not two.
"""

import numpy as np

from .analysis import AnalysisConfig

FLOOR_DB = -85.0  # level 0: below the noise of a quiet room with a quiet microphone
RANGE_DB = 70.0  # level 1 is -15 dB, about a full-scale sine split between neighbouring bins
MAX_LEVEL = 1.3


def bin_frequencies(config: AnalysisConfig) -> np.ndarray:
    """Centre frequency of every bin, Hz, shape (n_bins,).

    Bin 0 lies below the first pitch so that each pitch is the *middle* of its group of bins; a grid that starts on
    the pitch biases every note by a third of a semitone.
    """
    n_bins = config.n_pitches * config.bins_per_pitch
    middle = (config.bins_per_pitch - 1) // 2
    midi = config.first_midi + (np.arange(n_bins) - middle) / config.bins_per_pitch
    return 440.0 * 2.0 ** ((midi - 69.0) / 12.0)


def kernels(config: AnalysisConfig) -> np.ndarray:
    """Right-aligned Hann kernels, shape (n_samples, 2 * n_bins) float32: real parts, then imaginary parts.

    Row -1 is the newest sample. Each kernel's window sums to 1, so that a sine of amplitude a reads a / 2.
    """
    if config.alignment != "right":
        raise ValueError(f"alignment {config.alignment!r} cannot stream; the live front end knows 'right'")
    frequencies = bin_frequencies(config)
    q = 1.0 / (2.0 ** (1.0 / (12 * config.bins_per_pitch)) - 1.0)
    lengths = np.ceil(q * config.samplerate / (frequencies + config.gamma * q)).astype(int)
    out = np.zeros((lengths.max(), 2 * len(frequencies)), np.float32)
    for k, (frequency, length) in enumerate(zip(frequencies, lengths, strict=True)):
        window = np.hanning(length + 2)[1:-1]
        phase = 2.0 * np.pi * frequency / config.samplerate * np.arange(length)
        kernel = window / window.sum() * np.exp(-1j * phase)
        out[-length:, k] = kernel.real
        out[-length:, len(frequencies) + k] = kernel.imag
    return out


def level(spectrum: np.ndarray) -> np.ndarray:
    """Products with `kernels`, (..., 2 * n_bins), to levels (..., n_bins) in 0..MAX_LEVEL: absolute dB, scaled.

    Absolute, because a normalisation by the loudest of a window cannot be computed before the window has ended.
    """
    n_bins = spectrum.shape[-1] // 2
    magnitude = np.hypot(spectrum[..., :n_bins], spectrum[..., n_bins:])
    decibels = 20.0 * np.log10(magnitude + 1e-5)
    return np.clip((decibels - FLOOR_DB) / RANGE_DB, 0.0, MAX_LEVEL).astype(np.float32)


class StreamingCqt:
    """Samples at ``config.samplerate`` in, frames out; frame n is complete with sample ``(n + 1) * hop - 1``.

    ``latency`` is 0 samples: the newest sample of a frame is the newest sample of its hop.
    """

    latency = 0

    def __init__(self, config: AnalysisConfig):
        self.config = config
        self._kernels = kernels(config)
        self.reset()

    def reset(self) -> None:
        """Forget all samples: the next frame sees silence before its own."""
        self._history = np.zeros(len(self._kernels) - self.config.hop, np.float32)
        self._pending = np.zeros(0, np.float32)

    def process(self, samples: np.ndarray) -> np.ndarray:
        """(n,) float32 samples -> (m, n_bins) float32 levels of the hops that are now complete."""
        hop = self.config.hop
        pending = np.concatenate([self._pending, np.asarray(samples, np.float32)])
        n_frames = len(pending) // hop
        signal = np.concatenate([self._history, pending])
        frames = np.empty((n_frames, self._kernels.shape[1] // 2), np.float32)
        for n in range(n_frames):  # one product of one shape a hop: chopping the input cannot change the rounding
            frames[n] = level(signal[n * hop : n * hop + len(self._kernels)] @ self._kernels)
        used = n_frames * hop
        self._history = signal[used : used + len(self._history)]
        self._pending = pending[used:]
        return frames

    def flush(self) -> np.ndarray:
        """The last, partly filled hop, completed with silence: (0 or 1, n_bins)."""
        if not len(self._pending):
            return np.empty((0, self._kernels.shape[1] // 2), np.float32)
        return self.process(np.zeros(self.config.hop - len(self._pending), np.float32))
