"""Rooms, microphones and pedals for synthetic mixtures: every function maps float32 (n,) at 16 kHz to float32 (n,).

Labels are made before effects, so no effect may move an onset by more than 2 ms: rooms keep the direct sound at
sample 0, modulated delays keep the dry signal, and the filters are of low order and minimum phase. All randomness
comes from the ``rng`` that is passed in.
"""

import numpy as np
from scipy import fft, signal

from realtime_mpe.analysis import SAMPLERATE

COLOUR_DB, COLOUR_WAVES, COLOUR_FROM = 5.0, 8, 60.0  # RMS of the gain, its half waves over the range, Hz
COLOUR_TAPS = 4096  # of the filter, a quarter of a second
NOISE_SHARES = 0.5, 1.0, 0.5, 0.25  # Dirichlet weights of hiss, pink noise, rumble and mains hum in a background
HALL_SECONDS, HALL_RT60, HALL_REVERBERANT = 2.2, (0.4, 2.2), 0.7  # of a response, of its decay; how often it has one
STRINGS_RING, STRINGS, STRING_MIDI = 0.4, (1, 4), (28, 69)  # how often, how many, and where
STRING_DB, STRING_RT60, STRING_PARTIALS = (-52.0, -26.0), (0.3, 2.0), 6  # re the direct sound
EXPRESSION_STEP = 64  # samples between two values of a curve, 4 ms
FALL_DB, RISE_DB = 20.0, 8.0  # a player's notes end so much softer than they were, and begin softer, at most
SUMMIT = 0.05, 0.6  # where in a note it is loudest
NOTE_LEVEL_DB = 2.0  # by which the notes of one player differ, beside their velocities
PEAK_LIMIT = 0.98  # full scale is 1; the rest is head room for file formats


def limit_peak(audio: np.ndarray) -> np.ndarray:
    """Scale the whole signal down if it would clip; (n,) float32 -> (n,) float32, peak <= 0.98."""
    peak = float(np.max(np.abs(audio), initial=0.0))
    return (audio * (PEAK_LIMIT / peak) if peak > PEAK_LIMIT else audio).astype(np.float32, copy=False)


def _like(audio: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """`audio` at the RMS of `reference`, so that an effect changes the sound and not the balance of a mixture."""
    power, wanted = float(np.dot(audio, audio)), float(np.dot(reference, reference))
    return audio * np.sqrt(wanted / power) if power > 0 else audio


class Room:
    """One random room with one random place for the source.

    rt60 : range of the decay, s.  Attributes: ``impulse_response`` (m,) float32 whose sample 0 is the direct sound,
    exactly 1; ``rt60`` s; ``direct_to_reverberant`` -3..15 dB; ``predelay`` 2..25 ms, first reflection after the
    direct sound.
    """

    def __init__(self, rng: np.random.Generator, rt60: tuple[float, float] = (0.15, 0.9)) -> None:
        self.rt60 = float(rng.uniform(*rt60))
        self.direct_to_reverberant = float(rng.uniform(-3.0, 15.0))
        self.predelay = float(rng.uniform(0.002, 0.025))
        start = max(1, round(self.predelay * SAMPLERATE))
        length = start + round(self.rt60 * SAMPLERATE)
        t = np.arange(length - start) / SAMPLERATE
        tail = rng.standard_normal(len(t)) * 10 ** (-3.0 * t / self.rt60)
        # Walls and air take the treble; a one-pole low-pass on the tail alone leaves the direct sound untouched.
        pole = rng.uniform(0.0, 0.7)
        tail = signal.lfilter([1 - pole], [1, -pole], tail)
        # The diffuse field builds up while the early reflections are heard one by one.
        tail *= 1 - np.exp(-t / rng.uniform(0.005, 0.03))
        early = np.zeros(len(t))
        span = min(len(t), round(0.06 * SAMPLERATE))
        times = rng.integers(0, span, size=int(rng.integers(4, 13)))
        np.add.at(early, times, rng.choice([-1.0, 1.0], len(times)) * rng.uniform(0.3, 1.0, len(times)))
        early *= 10 ** (-3.0 * t / self.rt60)
        share = rng.uniform(0.2, 0.7)
        reverb = np.sqrt(share) * early / np.linalg.norm(early) + np.sqrt(1 - share) * tail / np.linalg.norm(tail)
        reverb *= 10 ** (-self.direct_to_reverberant / 20) / np.linalg.norm(reverb)
        self.impulse_response = np.zeros(length, np.float32)
        self.impulse_response[0] = 1.0
        self.impulse_response[start:] = reverb

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """The source heard in this room, cut to the input's length; level of the direct sound unchanged."""
        if not np.any(audio):
            return np.zeros(len(audio), np.float32)
        return signal.fftconvolve(audio, self.impulse_response)[: len(audio)].astype(np.float32)


def hall(rng: np.random.Generator) -> np.ndarray:
    """Impulse response of a place in which all play: its reverberation, and strings nobody plays that ring along.

    (n,) float32 of HALL_SECONDS; sample 0 is the direct sound, 1.
    """
    response = np.zeros(round(HALL_SECONDS * SAMPLERATE), np.float32)
    response[0] = 1.0
    if rng.random() < HALL_REVERBERANT:
        reverberation = Room(rng, HALL_RT60).impulse_response[: len(response)]
        response[: len(reverberation)] = reverberation
    if rng.random() < STRINGS_RING:
        t = np.arange(len(response)) / SAMPLERATE
        for _ in range(int(rng.integers(STRINGS[0], STRINGS[1] + 1))):
            frequency = 440.0 * 2.0 ** ((rng.integers(*STRING_MIDI) + rng.normal(0.0, 0.1) - 69) / 12)
            rt60 = rng.uniform(*STRING_RT60)
            for partial in range(1, STRING_PARTIALS + 1):
                height = 10 ** (rng.uniform(*STRING_DB) / 20) / np.sqrt(partial)
                decay = 10 ** (-3.0 * t * partial**0.3 / rt60)
                response += (height * decay * np.sin(2 * np.pi * frequency * partial * t)).astype(np.float32)
    return response


def expression(onset: np.ndarray, offset: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """How a bow or breath shapes the notes of a line: gains at samples 0, EXPRESSION_STEP ... as far as ``n``, float32.

    onset, offset : (N,) s, in ascending order.  A note swells to its summit and falls from there to its end, by as much
    as is this player's habit; what rings on after it stays as soft as it ended. Recorded notes and SoundFonts are held
    evenly and then let go, which nobody does who plays a phrase.
    """
    fall, rise = rng.uniform(0.0, FALL_DB), rng.uniform(0.0, RISE_DB)
    gain_db = np.zeros(-(-n // EXPRESSION_STEP) + 1)
    seconds = np.arange(len(gain_db)) * (EXPRESSION_STEP / SAMPLERATE)
    begins = np.searchsorted(seconds, onset)
    for note, begin in enumerate(begins):
        end = begins[note + 1] if note + 1 < len(begins) else len(gain_db)
        summit, bend = rng.uniform(*SUMMIT), rng.uniform(0.5, 2.0)
        falls, rises = fall * rng.uniform(0.5, 1.0), rise * rng.uniform(0.5, 1.0)
        place = np.clip((seconds[begin:end] - onset[note]) / max(offset[note] - onset[note], 1e-3), 0.0, 1.0)
        gain_db[begin:end] = (
            rng.normal(0.0, NOTE_LEVEL_DB)
            - rises * np.maximum(1.0 - place / summit, 0.0)
            - falls * np.maximum((place - summit) / (1.0 - summit), 0.0) ** bend
        )
    return (10 ** (gain_db / 20)).astype(np.float32)


def biquad(kind: str, frequency: float, gain_db: float, q: float) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients (b, a) of a `peak`, `low_shelf` or `high_shelf` filter (R. Bristow-Johnson, Audio EQ Cookbook)."""
    root = 10 ** (gain_db / 40)
    w = 2 * np.pi * frequency / SAMPLERATE
    cos, alpha = np.cos(w), np.sin(w) / (2 * q)
    if kind == "peak":
        b = [1 + alpha * root, -2 * cos, 1 - alpha * root]
        a = [1 + alpha / root, -2 * cos, 1 - alpha / root]
    elif kind in ("low_shelf", "high_shelf"):
        c = cos if kind == "low_shelf" else -cos  # the high shelf is the low shelf mirrored in frequency
        sign = 1 if kind == "low_shelf" else -1
        slope = 2 * np.sqrt(root) * alpha
        b = [
            root * (root + 1 - (root - 1) * c + slope),
            sign * 2 * root * (root - 1 - (root + 1) * c),
            root * (root + 1 - (root - 1) * c - slope),
        ]
        a = [
            root + 1 + (root - 1) * c + slope,
            sign * -2 * (root - 1 + (root + 1) * c),
            root + 1 + (root - 1) * c - slope,
        ]
    else:
        raise ValueError(f"unknown filter {kind!r}: choose peak, low_shelf or high_shelf")
    return np.array(b) / a[0], np.array(a) / a[0]


def equalise(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One to three random shelves and peaks of at most 6 dB."""
    for _ in range(int(rng.integers(1, 4))):
        kind = ("peak", "low_shelf", "high_shelf")[int(rng.integers(3))]
        low, high = {"peak": (150, 5000), "low_shelf": (80, 400), "high_shelf": (1500, 5000)}[kind]
        frequency = float(np.exp(rng.uniform(np.log(low), np.log(high))))
        b, a = biquad(kind, frequency, float(rng.uniform(-6, 6)), float(rng.uniform(0.5, 1.2)))
        audio = signal.lfilter(b, a, audio)
    return audio


def colour(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another body, another microphone: a smooth random gain over frequency, of about COLOUR_DB, level kept."""
    grid = np.linspace(0.0, 1.0, 65)  # from COLOUR_FROM to half the sample rate, in octaves
    waves = np.arange(1, COLOUR_WAVES + 1)
    height = rng.normal(0.0, COLOUR_DB, COLOUR_WAVES) * waves**-0.5 / np.sqrt(0.5 * np.sum(1 / waves))
    gain_db = height @ np.cos(np.pi * waves[:, None] * grid + rng.uniform(0, 2 * np.pi, (COLOUR_WAVES, 1)))
    frequency = np.maximum(fft.rfftfreq(COLOUR_TAPS, 1 / SAMPLERATE), COLOUR_FROM)
    place = np.log2(frequency / COLOUR_FROM) / np.log2(SAMPLERATE / 2 / COLOUR_FROM)
    cepstrum = fft.irfft(np.interp(place, grid, gain_db) * np.log(10) / 20)
    # Minimum phase: what the cepstrum has before time 0 is folded behind it, so that no onset is heard early.
    folded = np.concatenate([cepstrum[:1], 2 * cepstrum[1 : COLOUR_TAPS // 2], cepstrum[COLOUR_TAPS // 2 :][:1]])
    filter_ = fft.irfft(np.exp(fft.rfft(folded, COLOUR_TAPS)))
    return _like(signal.oaconvolve(audio, filter_)[: len(audio)], audio).astype(np.float32)


def distort(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Soft saturation (tanh) driven by 1..4 times the signal's RMS, level kept."""
    rms = float(np.sqrt(np.mean(audio**2)))
    if rms == 0:
        return audio
    drive = rng.uniform(0.3, 1.2) / rms
    return _like(np.tanh(audio * drive), audio)


def chorus(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One or two copies behind a slowly swinging delay of 5..25 ms, added to the dry signal, level kept."""
    n = np.arange(len(audio))
    longest = round(0.03 * SAMPLERATE)  # of any delay below; so much silence stands before the signal
    padded = np.concatenate([np.zeros(longest), audio])
    wet = audio.astype(np.float64)
    for _ in range(int(rng.integers(1, 3))):
        centre = rng.uniform(0.008, 0.02) * SAMPLERATE
        rate = rng.uniform(0.2, 1.2)
        # The swing is bounded by the detuning it makes: 2 pi rate swing = 0.006 is 10 cents.
        swing = min(0.006 / (2 * np.pi * rate), 0.003) * SAMPLERATE
        delay = centre + swing * np.sin(2 * np.pi * (rate * n / SAMPLERATE + rng.uniform()))
        whole = delay.astype(np.int64)
        later = n + longest - whole
        wet += rng.uniform(0.3, 0.7) * (padded[later] + (delay - whole) * (padded[later - 1] - padded[later]))
    return _like(wet, audio)


def tremolo(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Amplitude swinging by at most half at 3..8 Hz."""
    depth, rate, phase = rng.uniform(0.1, 0.5), rng.uniform(3, 8), rng.uniform()
    swing = 0.5 + 0.5 * np.sin(2 * np.pi * (rate * np.arange(len(audio)) / SAMPLERATE + phase))
    return _like(audio * (1 - depth * swing), audio)


def lowpass(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A dull microphone: first or second order from 2.5 to 7 kHz."""
    order, frequency = int(rng.integers(1, 3)), rng.uniform(2500, 7000)
    b, a = signal.butter(order, frequency, fs=SAMPLERATE)
    return signal.lfilter(b, a, audio)


def compress(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Compression by 1.5:1..4:1 above the signal's own RMS (5..50 ms follower), level kept."""
    power = float(np.mean(audio**2))
    if power == 0:
        return audio
    keep = np.exp(-1 / (rng.uniform(0.005, 0.05) * SAMPLERATE))
    level = signal.lfilter([1 - keep], [1, -keep], np.square(audio, dtype=np.float64)) / power
    exponent = 0.5 * (1 - 1 / rng.uniform(1.5, 4.0))
    return _like(audio * np.maximum(level, 1.0) ** -exponent, audio)


EFFECTS = {  # name: (probability in a chain, effect); the order is that of a recording
    "distort": (0.15, distort),
    "chorus": (0.15, chorus),
    "tremolo": (0.1, tremolo),
    "compress": (0.25, compress),
    "equalise": (0.5, equalise),
    "lowpass": (0.25, lowpass),
}


def apply_effects(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random chain of none to all effects; (n,) float32 -> (n,) float32, onsets kept within 2 ms, peak < 1."""
    out = audio
    for probability, effect in EFFECTS.values():
        if rng.uniform() < probability:
            out = effect(out, rng)
    return limit_peak(np.asarray(out, np.float32))


def _coloured(n: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Noise whose power falls with frequency to the power of `exponent` (0 white, 1 pink, 2 rumble)."""
    spectrum = np.fft.rfft(rng.standard_normal(n))
    frequency = np.fft.rfftfreq(n, 1 / SAMPLERATE)
    # Flat below 20 Hz: without the floor most of the energy would lie where nothing is audible.
    return np.fft.irfft(spectrum * np.maximum(frequency, 20.0) ** (-exponent / 2), n)


def background(n: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of a place without music: hiss, pink noise, mains hum and rumble in random shares; (n,) float32, RMS 1."""
    if n == 0:
        return np.zeros(0, np.float32)
    t = np.arange(n) / SAMPLERATE
    mains = float(rng.choice([50.0, 60.0]))
    hum = np.zeros(n)
    for harmonic in range(1, int(rng.integers(2, 9))):
        hum += rng.uniform(0, 1) / harmonic * np.sin(2 * np.pi * (mains * harmonic * t + rng.uniform()))
    parts = [_coloured(n, exponent, rng) for exponent in (0.0, 1.0, 2.0)] + [hum]
    shares = rng.dirichlet(NOISE_SHARES)
    out = np.zeros(n)
    for share, part in zip(shares, parts, strict=True):
        rms = np.sqrt(np.mean(part**2))
        if rms > 0:
            out += np.sqrt(share) * part / rms
    return (out / max(float(np.sqrt(np.mean(out**2))), 1e-12)).astype(np.float32)
