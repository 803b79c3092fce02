"""Synthetic instruments without recordings: a seed draws a family, a spectrum, an envelope and a way of playing.

All tones are band-limited (no partial above 7.6 kHz; only breath and attack noise reach higher) and in tune: the
seed's detuning and the note's own together stay within 15 cents of A4 = 440 Hz equal temperament. Three generators
serve all families:

* `_Tables`: single-cycle tables, one dark and one bright per pitch, read by a phase that carries the vibrato;
* `_Operators`: two-operator FM whose index is bounded by the band that is left above the note;
* `_Partials`: sums of exponentially damped sines, each with a frequency and a decay of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, lgamma
from zlib import crc32

import numpy as np
from scipy import signal

from realtime_mpe.analysis import FIRST_MIDI, N_PITCHES, SAMPLERATE

from .effects import chorus, limit_peak

FAMILIES = ("wavetable", "fm", "chip", "pluck", "pad", "bowed", "blown", "organ", "piano")
SUSTAIN_FAMILIES = ("wavetable", "fm", "chip", "pad", "bowed", "blown", "organ")

BAND_LIMIT = 7600.0  # Hz; 400 Hz below Nyquist for vibrato and detuning
LEVEL = 10 ** (-23 / 20)  # RMS of a sustained note at velocity 100
DECAYING_GAIN = 2.0  # plucked and struck notes start 6 dB above LEVEL, because they fall below it afterwards
SILENT_DB = 35.0  # a note this far below its own peak has ended, though the key is still down
MAX_DETUNE = 15.0  # cents, instrument and note together
LAST_MIDI = FIRST_MIDI + N_PITCHES - 1
MAX_HARMONICS = 256  # of the lowest pitch, 31 Hz, below BAND_LIMIT
SHORTEST = 0.03  # s; what a monophonic instrument would have to play shorter than this it leaves out
FRAME = 512  # samples of one level measurement: a whole period of the lowest pitch


def midi_to_hz(midi: float) -> float:
    return 440.0 * 2 ** ((midi - 69) / 12)


# --- Amplitude ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Envelope:
    """Attack, decay time constant and release in s; sustain as a share of the peak (0..1)."""

    attack: float
    decay: float
    sustain: float
    release: float

    def held(self, n: int) -> np.ndarray:
        """(n,) float32 level while the key is down, 0..1."""
        attack = max(1, round(self.attack * SAMPLERATE))
        rise = np.sin(0.5 * np.pi * (np.arange(min(attack, n), dtype=np.float32) + 1) / attack)
        if n <= attack:
            return rise
        t = np.arange(n - attack, dtype=np.float32) / SAMPLERATE
        fall = self.sustain + (1 - self.sustain) * np.exp(-t / np.float32(self.decay))
        return np.concatenate([rise, fall.astype(np.float32)])

    def released(self) -> np.ndarray:
        """(m,) float32 share of the key-up level that rings on."""
        m = max(2, round(self.release * SAMPLERATE))
        return (1 - np.arange(1, m + 1, dtype=np.float32) / m) ** 2


# --- Generators: unit RMS, constant loudness (`_Partials` decays by itself) -------------------------------------------


@dataclass(frozen=True)
class Vibrato:
    depth: float  # cents, peak
    rate: float  # Hz
    delay: float  # s until it begins, then as long again to full depth

    def phase(self, frequency: float, n: int, start: float) -> np.ndarray:
        """(n,) float64 cycles from `start`; the analytic integral of the swinging frequency, centred on the note."""
        t = np.arange(n) / SAMPLERATE
        cycles = start + frequency * t
        if self.depth > 0 and n > self.delay * SAMPLERATE:
            swing = np.clip(t / max(self.delay, 0.05) - 1, 0, 1) * np.sin(2 * np.pi * self.rate * (t - self.delay))
            width = frequency * (2 ** (self.depth / 1200) - 1)
            # The mean of the swing is taken out, for the start of a vibrato upwards must not sharpen a short note.
            begun = t >= self.delay
            cycles += width / SAMPLERATE * np.cumsum(swing - begun * (swing.sum() / max(1, begun.sum())))
        return cycles


@dataclass(frozen=True)
class Formants:
    """Fixed resonances of a body: they stay where they are when the pitch moves."""

    centres: np.ndarray  # Hz, (k,)
    gains: np.ndarray  # dB, (k,)
    widths: np.ndarray  # octaves, (k,)

    @classmethod
    def draw(cls, rng: np.random.Generator, strongest: float) -> "Formants":
        k = int(rng.integers(1, 5))
        return cls(
            np.exp(rng.uniform(np.log(200), np.log(5000), k)), rng.uniform(-4, strongest, k), rng.uniform(0.2, 0.9, k)
        )

    def gain(self, frequencies: np.ndarray) -> np.ndarray:
        octaves = np.log2(frequencies[:, None] / self.centres)
        return 10 ** (np.sum(self.gains * np.exp(-0.5 * (octaves / self.widths) ** 2), axis=1) / 20)


class _Tables:
    """One oscillator or up to three detuned ones reading the same pair of tables."""

    def __init__(
        self,
        rng: np.random.Generator,
        spectrum: np.ndarray,
        formants: Formants | None,
        brightness: tuple[float, float],
        vibrato: Vibrato,
        detunings: tuple[float, ...] = (0.0,),
        wander: float = 0.0,
    ) -> None:
        """`spectrum`: (MAX_HARMONICS,) complex; `brightness`: dB/octave of the dark table and decay s of the bright."""
        self.spectrum, self.formants, self.vibrato = spectrum, formants, vibrato
        self.detunings, self.wander = detunings, wander
        self.tilt, self.decay = brightness
        self.rest = float(rng.uniform(0.1, 0.7))  # share of the bright table that the decay leaves
        self._tables: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def tables(self, midi: int) -> tuple[np.ndarray, np.ndarray]:
        """Dark and bright cycle of a pitch, (size + 1,) float32 each, unit RMS; the last sample repeats the first."""
        if midi not in self._tables:
            frequency = midi_to_hz(midi)
            count = max(1, min(MAX_HARMONICS, int(BAND_LIMIT / frequency)))
            harmonics = np.arange(1, count + 1)
            bright = self.spectrum[:count].copy()
            if self.formants is not None:
                bright *= self.formants.gain(harmonics * frequency)
            # The fundamental is what the label names; it stays within 20 dB of the strongest harmonic.
            floor = 0.1 * np.abs(bright).max()
            bright[0] = bright[0] if abs(bright[0]) > floor else floor
            # Linear interpolation errs by (harmonic / size)^2, so many harmonics need a longer table.
            size = 8192 if count > 48 else 2048
            pair = []
            for amplitude in (bright * harmonics ** (-self.tilt / 6.02), bright):
                bins = np.zeros(size // 2 + 1, complex)
                bins[1 : count + 1] = amplitude / np.sqrt(2 * np.sum(np.abs(amplitude) ** 2))
                cycle = (np.fft.irfft(bins, size) * size).astype(np.float32)
                pair.append(np.append(cycle, cycle[0]))
            self._tables[midi] = (pair[0], pair[1])
        return self._tables[midi]

    def __call__(self, midi: int, frequency: float, velocity: float, n: int, rng: np.random.Generator) -> np.ndarray:
        dark, bright = self.tables(midi)
        size = len(dark) - 1
        t = np.arange(n, dtype=np.float32) / SAMPLERATE
        share = self.rest + (1 - self.rest) * np.exp(-t / np.float32(self.decay))
        if self.wander > 0:
            share *= 1 - np.float32(self.wander) * (
                0.5 + 0.5 * np.sin(2 * np.pi * (float(rng.uniform(0.2, 1.5)) * t + float(rng.uniform())))
            )
        share = (share * min(1.0, (velocity / 110) ** 1.5)).astype(np.float32)
        out = np.zeros(n, np.float32)
        # The others together stay weaker than the first, so that beats never reach silence.
        gains = [1.0] + [0.45] * (len(self.detunings) - 1)
        for cents, gain in zip(self.detunings, gains, strict=True):
            cycles = self.vibrato.phase(frequency * 2 ** (cents / 1200), n, float(rng.uniform()))
            position = ((cycles - np.floor(cycles)) * size).astype(np.float32)
            index = np.minimum(position.astype(np.int32), size - 1)
            fraction = position - index
            for table, weight in ((dark, 1 - share), (bright, share)):
                left = table[index]
                out += np.float32(gain) * weight * (left + fraction * (table[index + 1] - left))
        return out / np.float32(np.linalg.norm(gains))


class _Operators:
    """Two-operator FM: sin(carrier + index(t) sin(ratio * carrier))."""

    def __init__(self, rng: np.random.Generator, vibrato: Vibrato) -> None:
        self.ratio = int(rng.choice([1, 1, 2, 2, 3, 4]))
        self.index = float(rng.uniform(0.5, 5.0))
        self.decay = float(np.exp(rng.uniform(np.log(0.1), np.log(2.0))))
        self.rest = float(rng.uniform(0.05, 0.8))
        self.vibrato = vibrato

    def __call__(self, midi: int, frequency: float, velocity: float, n: int, rng: np.random.Generator) -> np.ndarray:
        # Side band k is about (index / 2)^k / k!; the first one beyond the band limit must stay below -55 dB.
        first_out = int((BAND_LIMIT / frequency - 1) / self.ratio) + 1
        bound = 2 * np.exp((np.log(10 ** (-55 / 20)) + lgamma(first_out + 1)) / first_out)
        t = np.arange(n, dtype=np.float32) / SAMPLERATE
        index = min(self.index * (velocity / 100), bound) * (
            self.rest + (1 - self.rest) * np.exp(-t / np.float32(self.decay))
        )
        cycles = self.vibrato.phase(frequency, n, 0.0)
        turn = (2 * np.pi * (cycles - np.floor(cycles))).astype(np.float32)  # wrapped before float32 loses the phase
        return np.float32(np.sqrt(2)) * np.sin(turn + index * np.sin(self.ratio * turn))


def damped_partials(
    frequencies: np.ndarray, t60: np.ndarray, amplitudes: np.ndarray, phases: np.ndarray, n: int
) -> np.ndarray:
    """Sum of exponentially decaying cosines; Hz, s, linear and rad, (p,) each -> (n,) float32.

    z^(aB + b) = z^(aB) z^b makes the whole bank one matrix product of (n / B, 2p) and (2p, B).
    """
    block = 256
    exponent = (-np.log(1000) / t60 + 2j * np.pi * frequencies) / SAMPLERATE
    coarse = np.exp(np.outer(np.arange(ceil(n / block)) * block, exponent)) * (amplitudes * np.exp(1j * phases))
    fine = np.exp(np.outer(exponent, np.arange(block)))
    left = np.concatenate([coarse.real, -coarse.imag], axis=1).astype(np.float32)
    right = np.concatenate([fine.real, fine.imag]).astype(np.float32)
    return (left @ right).reshape(-1)[:n]


class _Partials:
    """Strings, bars and drawbars: `recipe(frequency, velocity, rng)` -> frequencies, t60, amplitudes."""

    def __init__(
        self,
        recipe: Callable[[float, float, np.random.Generator], tuple[np.ndarray, np.ndarray, np.ndarray]],
        decaying: bool,
    ) -> None:
        self.recipe, self.gain = recipe, DECAYING_GAIN if decaying else 1.0

    def __call__(self, midi: int, frequency: float, velocity: float, n: int, rng: np.random.Generator) -> np.ndarray:
        frequencies, t60, amplitudes = self.recipe(frequency, velocity, rng)
        inside = frequencies < BAND_LIMIT
        frequencies, t60, amplitudes = frequencies[inside], t60[inside], amplitudes[inside]
        amplitudes = amplitudes * (self.gain / np.sqrt(0.5 * np.sum(amplitudes**2)))
        alive = min(n, ceil(1.5 * t60.max() * SAMPLERATE))  # 90 dB down
        out = np.zeros(n, np.float32)
        out[:alive] = damped_partials(frequencies, t60, amplitudes, rng.uniform(0, 2 * np.pi, len(t60)), alive)
        return out


# --- Spectra ----------------------------------------------------------------------------------------------------------


def _sampled_spectrum(shape: np.ndarray) -> np.ndarray:
    """Harmonics 1.. of one drawn cycle (size,), at least 2 * MAX_HARMONICS samples."""
    return np.fft.rfft(shape)[1 : MAX_HARMONICS + 1] * 2 / len(shape)


def saw_spectrum() -> np.ndarray:
    return -1j / np.arange(1, MAX_HARMONICS + 1)


def _draw_spectrum(rng: np.random.Generator) -> np.ndarray:
    """One of the classic or random profiles, (MAX_HARMONICS,) complex."""
    h = np.arange(1, MAX_HARMONICS + 1)
    odd = h % 2
    kind = int(rng.integers(7))
    if kind == 0:
        return saw_spectrum()
    if kind == 1:
        return -1j * odd / h
    if kind == 2:
        return odd / h**2 + 0j
    phases = np.exp(2j * np.pi * rng.uniform(size=len(h)))
    slope = rng.uniform(0.7, 2.0)
    if kind == 3:  # rough: every harmonic drawn for itself
        return phases * h**-slope * 10 ** (rng.uniform(-15, 5, len(h)) / 20)
    if kind == 4:  # odd with a little even
        return phases * h**-slope * np.where(odd, 1.0, rng.uniform(0.02, 0.2))
    if kind == 5:  # hollow: fundamental and a far group
        return phases * (h**-3.0 + rng.uniform(0.1, 0.5) * np.exp(-0.5 * ((h - rng.uniform(4, 9)) / 1.5) ** 2))
    # Brass: strong up to a cut-off harmonic, steep above it; the dark table is what soft playing leaves.
    return phases / (1 + (h / rng.uniform(3, 10)) ** 2)


def _draw_chip(rng: np.random.Generator) -> np.ndarray:
    steps = np.arange(2048)
    kind = int(rng.integers(4))
    if kind == 3:  # triangle in 32 steps of 4 bits
        ramp = steps * 32 // len(steps)
        return _sampled_spectrum(np.where(ramp < 16, ramp, 31 - ramp) / 7.5 - 1)
    return _sampled_spectrum(np.where(steps < len(steps) * (0.125, 0.25, 0.5)[kind], 1.0, -1.0))


# --- Recipes for damped partials --------------------------------------------------------------------------------------


def _string_recipe(rng: np.random.Generator):
    """Plucked string: comb of the plucking point, treble dies first, slight stiffness."""
    place, slope = rng.uniform(0.08, 0.45), rng.uniform(0.6, 1.6)
    ring, damping = np.exp(rng.uniform(np.log(0.6), np.log(5.0))), rng.uniform(0.2, 2.0)
    stiffness = rng.uniform(0, 1e-4)

    def recipe(frequency: float, velocity: float, rng: np.random.Generator):
        h = np.arange(1, min(96, int(BAND_LIMIT / frequency) + 1) + 1)
        frequencies = frequency * h * np.sqrt((1 + stiffness * h**2) / (1 + stiffness))
        amplitudes = np.maximum(np.abs(np.sin(np.pi * h * place)), 0.02) * h**-slope
        amplitudes *= 10 ** (-(1 - min(1.0, velocity / 110)) * 12 * np.log2(h) / 20)
        t60 = ring * (220 / frequency) ** 0.5 / (1 + damping * (frequencies - frequency) / 1000)
        return frequencies, np.maximum(t60, 0.03), amplitudes

    return recipe


def _struck_recipe(rng: np.random.Generator):
    """Piano: stiff strings in pairs up to 1.5 cents apart; the quiet one of each pair rings longer."""
    slope, ring, damping = rng.uniform(0.8, 1.8), rng.uniform(2.0, 9.0), rng.uniform(0.2, 1.5)
    stiffness, strike = np.exp(rng.uniform(np.log(5e-5), np.log(5e-4))), rng.uniform(0.08, 0.2)
    apart = 2 ** (rng.uniform(0, 1.5) / 1200)

    def recipe(frequency: float, velocity: float, rng: np.random.Generator):
        h = np.arange(1, min(64, int(BAND_LIMIT / frequency) + 1) + 1)
        inharmonicity = stiffness * (frequency / 220) ** 0.5
        frequencies = frequency * h * np.sqrt((1 + inharmonicity * h**2) / (1 + inharmonicity))
        amplitudes = np.maximum(np.abs(np.sin(np.pi * h * strike)) / np.sin(np.pi * strike), 0.05) * h**-slope
        amplitudes *= 10 ** (-(1 - min(1.0, velocity / 110)) * 15 * np.log2(h) / 20)
        t60 = np.maximum(ring * (220 / frequency) ** 0.7 / (1 + damping * (frequencies - frequency) / 1000), 0.05)
        return (
            np.concatenate([frequencies, frequencies * apart]),
            np.concatenate([0.4 * t60, 1.3 * t60]),
            np.concatenate([amplitudes, 0.25 * amplitudes]),
        )

    return recipe


def _drawbar_recipe(rng: np.random.Generator):
    """Tonewheel organ or pipe ranks from 8' to 1'; the 8' rank, which names the note, is always drawn."""
    # The 16' and 5 1/3' ranks are left out: they sound an octave below the key, a note that no label would name.
    ranks = np.array([1, 2, 3, 4, 5, 6, 8])
    drawn = rng.uniform(0, 1, len(ranks)) * (rng.uniform(size=len(ranks)) < 0.6)
    drawn[0] = rng.uniform(0.7, 1.0)

    def recipe(frequency: float, velocity: float, rng: np.random.Generator):
        pulled = drawn > 0
        return ranks[pulled] * frequency, np.full(int(pulled.sum()), 1e6), drawn[pulled]

    return recipe


# --- The instrument ---------------------------------------------------------------------------------------------------


class SynthInstrument:
    """An instrument that is wholly given by its seed (and family, if that is forced).

    Attributes: ``name`` "synth:FAMILY-SEED"; ``family`` one of `FAMILIES`; ``low``, ``high`` playable MIDI numbers;
    ``polyphonic``: whether notes may overlap. Raises ValueError for an unknown family.
    """

    def __reduce__(self) -> tuple:
        """Seed and family are all there is to carry to another process; the recipes are closures, which cannot go."""
        return SynthInstrument, (self.seed, self.family)

    def __init__(self, seed: int, family: str | None = None) -> None:
        if family is not None and family not in FAMILIES:
            raise ValueError(f"unknown family {family!r}: choose one of {', '.join(FAMILIES)}")
        drawn = FAMILIES[int(np.random.default_rng([seed, 0]).integers(len(FAMILIES)))]
        self.seed, self.family = seed, family or drawn
        self.name = f"synth:{self.family}-{seed}"
        # The family is part of the seed: two families forced onto one number share nothing.
        rng = np.random.default_rng([seed, crc32(self.family.encode())])
        self.polyphonic = self.family in ("pluck", "pad", "organ", "piano", "fm", "wavetable")
        self.low, self.high = FIRST_MIDI, LAST_MIDI
        self.tuning = float(rng.uniform(-8, 8))  # cents
        self.looseness = float(rng.uniform(0, MAX_DETUNE - abs(self.tuning)))  # cents of a note around the tuning
        self.chorus = False
        self.breath = 0.0
        self.attack_noise = float(rng.uniform(0, 0.3)) if rng.uniform() < 0.6 else 0.0
        self.noise_time = float(rng.uniform(0.003, 0.015))
        release = float(np.exp(rng.uniform(np.log(0.02), np.log(0.3))))
        steady = Vibrato(0.0, 5.0, 0.1)
        singing = Vibrato(float(rng.uniform(3, 35)), float(rng.uniform(4, 7)), float(rng.uniform(0.1, 0.5)))
        sometimes = singing if rng.uniform() < 0.4 else steady
        brightness = (float(rng.uniform(2, 12)), float(np.exp(rng.uniform(np.log(0.08), np.log(2.0)))))
        quick, slow = float(np.exp(rng.uniform(np.log(0.002), np.log(0.04)))), float(rng.uniform(0.1, 0.5))
        body = Envelope(quick, float(rng.uniform(0.05, 0.8)), float(rng.uniform(0.2, 1.0)), release)
        if self.family == "wavetable":
            formants = Formants.draw(rng, 15.0) if rng.uniform() < 0.6 else None
            self.envelope = body
            self.voice = _Tables(rng, _draw_spectrum(rng), formants, brightness, sometimes)
        elif self.family == "fm":
            dies = rng.uniform() < 0.3  # electric pianos and bells
            self.envelope = Envelope(quick, float(rng.uniform(0.2, 1.0)), 0.0, release) if dies else body
            self.voice = _Operators(rng, sometimes)
        elif self.family == "chip":
            dies = rng.uniform() < 0.3
            sustain = 0.0 if dies else body.sustain
            self.envelope = Envelope(0.001, float(rng.uniform(0.1, 0.5)), sustain, min(release, 0.06))
            self.attack_noise = 0.0
            self.voice = _Tables(rng, _draw_chip(rng), None, (0.0, 1.0), sometimes)
        elif self.family == "pad":
            spread = float(rng.uniform(3, 9))
            self.envelope = Envelope(slow, 1.0, float(rng.uniform(0.7, 1.0)), float(rng.uniform(0.15, 0.3)))
            self.attack_noise = 0.0
            self.chorus = bool(rng.uniform() < 0.6)
            detunings = (0.0, spread, -spread) if rng.uniform() < 0.5 else (0.4 * spread, -0.4 * spread)
            self.voice = _Tables(rng, _draw_spectrum(rng), Formants.draw(rng, 8.0), brightness, steady, detunings, 0.5)
        elif self.family in ("bowed", "blown"):
            bowed = self.family == "bowed"
            h = np.arange(1, MAX_HARMONICS + 1)
            phases = np.exp(2j * np.pi * rng.uniform(size=len(h)))
            if bowed:
                profile = h ** -rng.uniform(0.9, 1.4)
            else:  # flute-like to reed-like
                profile = h ** -rng.uniform(1.2, 2.6) * np.where(h % 2, 1.0, rng.uniform(0.1, 1.0))
            self.low = int(rng.choice([28, 36, 48, 55] if bowed else [34, 46, 52, 58, 60]))
            self.high = min(LAST_MIDI, self.low + int(rng.integers(36, 49)))
            self.breath = float(np.exp(rng.uniform(np.log(0.005), np.log(0.05 if bowed else 0.15))))
            attack, sustain, wander = rng.uniform(0.015, 0.08), rng.uniform(0.6, 1.0), float(rng.uniform(0, 0.6))
            self.envelope = Envelope(float(attack), float(rng.uniform(0.1, 0.6)), float(sustain), max(release, 0.04))
            formants = Formants.draw(rng, 12.0 if bowed else 6.0)
            self.voice = _Tables(rng, profile * phases, formants, brightness, singing, wander=wander)
        elif self.family == "organ":
            self.envelope = Envelope(min(quick, 0.02), 1.0, 1.0, min(release, 0.1))
            self.chorus = bool(rng.uniform() < 0.3)
            self.voice = _Partials(_drawbar_recipe(rng), decaying=False)
        else:
            recipe = _string_recipe(rng) if self.family == "pluck" else _struck_recipe(rng)
            self.envelope = Envelope(min(quick, 0.004), 1.0, 1.0, release)
            self.voice = _Partials(recipe, decaying=True)
        # Tied notes follow one another on one bow or breath: the second has no attack noise of its own.
        self.ties = self.family in ("bowed", "blown")

    def render(self, notes: np.ndarray, n_samples: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Play `notes` (N, 4): onset s >= 0, offset s, MIDI number, velocity 1..127, sorted by onset.

        Returns audio (n_samples,) float32 and the notes that sound, (M, 4) float64, with the offset moved forward
        where a note dies, is interrupted by the next one (monophonic families) or meets the end of the audio.
        Raises ValueError for negative or unsorted onsets.
        """
        notes = np.asarray(notes, np.float64).reshape(-1, 4)
        if np.any(notes[:, 0] < 0) or np.any(np.diff(notes[:, 0]) < 0):
            raise ValueError("onsets must be sorted and not negative: cut and sort the notes before they are rendered")
        audio = np.zeros(n_samples, np.float32)
        notes = notes[(notes[:, 2] >= self.low) & (notes[:, 2] <= self.high)]
        notes = notes[(notes[:, 1] > notes[:, 0]) & (np.round(notes[:, 0] * SAMPLERATE) < n_samples)]
        notes[:, 1] = np.minimum(notes[:, 1], n_samples / SAMPLERATE)
        if not self.polyphonic and len(notes):
            notes[:-1, 1] = np.minimum(notes[:-1, 1], notes[1:, 0])
            notes = notes[notes[:, 1] - notes[:, 0] >= SHORTEST]
        previous_end = -1.0
        for note in notes:
            tied = self.ties and note[0] - previous_end < 0.02
            previous_end = note[1]
            start = round(note[0] * SAMPLERATE)
            sound, held = self._note(int(note[2]), note[3], max(1, round(note[1] * SAMPLERATE) - start), tied, rng)
            note[1] = min(note[1], note[0] + held / SAMPLERATE)
            stop = min(n_samples, start + len(sound))
            audio[start:stop] += sound[: stop - start]
        if self.chorus and len(notes):
            audio = np.asarray(chorus(audio, rng), np.float32)
        return limit_peak(audio), notes

    def _note(
        self, midi: int, velocity: float, n_held: int, tied: bool, rng: np.random.Generator
    ) -> tuple[np.ndarray, float]:
        """Sound of one note with its release, and for how many samples of the held part it is to be heard."""
        cents = self.tuning + rng.uniform(-self.looseness, self.looseness)
        released = self.envelope.released()
        n = n_held + len(released)
        level = self.envelope.held(n_held)
        sound = self.voice(midi, midi_to_hz(midi + cents / 100), velocity, n, rng)
        if self.breath > 0:
            noise = rng.standard_normal(n, dtype=np.float32)
            sound = sound + np.float32(self.breath) * signal.lfilter(*_BREATH, noise).astype(np.float32)
        sound[:n_held] *= level
        sound[n_held:] *= level[-1] * released
        if self.attack_noise > 0 and not tied:
            m = min(n_held, round(6 * self.noise_time * SAMPLERATE))
            burst = rng.standard_normal(m, dtype=np.float32) * np.exp(
                -np.arange(m, dtype=np.float32) / np.float32(self.noise_time * SAMPLERATE)
            )
            sound[:m] += np.float32(self.attack_noise * velocity / 127) * burst
        sound *= np.float32(LEVEL * (velocity / 100) ** 1.5)
        return sound, audible_samples(sound[:n_held])


_BREATH = signal.butter(1, (400, 4000), "bandpass", fs=SAMPLERATE)


def audible_samples(held: np.ndarray) -> float:
    """Samples until (n,) audio falls for good more than 35 dB below its loudest frame; inf if it never does."""
    count = len(held) // FRAME
    if count < 2:
        return np.inf
    power = np.mean(np.square(held[: count * FRAME]).reshape(count, FRAME), axis=1)
    last = int(np.flatnonzero(power >= power.max() * 10 ** (-SILENT_DB / 10))[-1])
    return np.inf if last == count - 1 else float((last + 1) * FRAME)
