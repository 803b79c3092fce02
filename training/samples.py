"""Instruments made of recordings of single notes: a folder with an ``index.csv`` and the sound files it names.

Columns of ``index.csv``: path (relative to the folder), instrument, midi (the note meant), dynamic (pianissimo ..
fortissimo), deviation_semitones (pitch measured minus `midi`), seconds, source_peak; the last two are not used.
Recordings are mono or stereo at any rate and are decoded once, on first use, to 16 kHz.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

from realtime_mpe.analysis import FIRST_MIDI, N_PITCHES, SAMPLERATE
from realtime_mpe.errors import UserError

from .stems import at_level
from .synth import midi_to_hz

DYNAMICS = ("molto-pianissimo", "pianissimo", "piano", "mezzo-piano", "mezzo-forte", "forte", "fortissimo")
COLUMNS = ("path", "instrument", "midi", "dynamic", "deviation_semitones")
MAX_SHIFT = 2.0  # semitones a recording may be moved: beyond that formants and noise give the trick away
MAX_CENTS = 12.0  # what may be left of a mistuning; with the error of measuring it notes stay within 15 cents
ENVELOPE_HOP = 32  # samples, 2 ms
ONSET_DB = -20.0  # below the recording's peak: where its sound counts as begun
DEAD_DB = -35.0  # below the recording's peak: where it counts as ended
DYING = 0.35  # level at the end of the steady part, of that at its start, below which a string is left to die by itself
CLEAR = 0.6  # autocorrelation at the period, of that at 0, below which a recording has no pitch to learn from
LEGATO_GAP = 0.03  # s; a note this near to the end of the one before may be slurred
DB_PER_VELOCITY = 0.18  # 60 steps of velocity are 11 dB


@dataclass(frozen=True)
class Take:
    """One recording as the index describes it. loudness : rank in DYNAMICS."""

    path: Path
    midi: int
    loudness: int
    deviation: float


@dataclass(frozen=True)
class Sound:
    """One decoded recording. wave : int16, begins at its onset. pitch : MIDI, fractional.

    attack : samples from the onset to the steady part.  steady_end : samples to the end of the steady part.
    end : samples until it has died.  overlap : samples of one loop cross-fade.
    loops : where in the wave the last `overlap` samples of the steady part have a likeness; none: it cannot be held.
    """

    wave: np.ndarray
    pitch: float
    rms: float
    attack: int
    steady_end: int
    end: int
    overlap: int
    loops: tuple[int, ...]


class SampleInstrument:
    """A monophonic instrument that plays recorded notes; see `training.stems.Instrument` for what `render` promises."""

    polyphonic = False

    def __init__(self, name: str, takes: list[Take]):
        """takes : every recording of one instrument, at least one. Raises ValueError if there is none."""
        if not takes:
            raise ValueError(f"instrument {name!r} has no recordings")
        self.name = name
        self.takes = takes
        self._midi = np.array([t.midi for t in takes], float)
        self._loudness = np.array([t.loudness for t in takes], float)
        self.low = max(int(self._midi.min()) - 1, FIRST_MIDI)
        self.high = min(int(self._midi.max()) + 1, FIRST_MIDI + N_PITCHES - 1)
        self._sounds: dict[int, Sound | None] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_sounds": {}}  # a worker decodes what it needs; sending it would cost more

    def render(self, notes: np.ndarray, n_samples: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """notes (N, 4) -> audio (n_samples,) float32 and the notes that sound (M <= N, 4)."""
        audio = np.zeros(n_samples, np.float32)
        sounded = []
        taste = rng.uniform(0.0, 1.5, len(self.takes))  # this player's favourite takes, the same through the stem
        tuning = rng.normal(0.0, 3.0)
        slur = rng.uniform(0.3, 0.9)
        previous_end = -1.0
        for onset, offset, midi, velocity in notes:
            draws = rng.uniform(0.0, 1.0, 4)  # always four, so that one silent note does not change all later ones
            seed = int(rng.integers(2**32))
            start = int(round(onset * SAMPLERATE))
            sound = self._choose(midi, velocity, offset - onset, taste, np.random.default_rng(seed))
            if sound is None or start >= n_samples:
                continue
            cents = np.clip(tuning + (draws[0] - 0.5) * 12.0, -MAX_CENTS, MAX_CENTS)
            legato = 0.0 <= previous_end - onset + LEGATO_GAP < 0.5 and draws[1] < slur
            wave, held = _play(sound, offset - onset, midi + cents / 100.0, legato, 0.03 + 0.05 * draws[2], seed)
            gain = 10 ** ((velocity - 80) * DB_PER_VELOCITY / 20) * 0.1 / sound.rms
            stop = min(start + len(wave), n_samples)
            audio[start:stop] += gain * wave[: stop - start]
            sounded.append((onset, onset + held, midi, velocity))
            previous_end = onset + held
        kept = np.asarray(sounded, np.float64).reshape(-1, 4)
        return at_level(audio, kept), kept

    def _choose(
        self, midi: float, velocity: float, seconds: float, taste: np.ndarray, rng: np.random.Generator
    ) -> Sound | None:
        """The take near in pitch, loudness and taste that can be held for `seconds`, or at least is in tune."""
        distance = np.abs(self._midi - midi)
        wanted = np.interp(velocity, [25, 120], [0, len(DYNAMICS) - 1])
        cost = distance * 0.8 + np.abs(self._loudness - wanted) * 0.5 + taste + rng.uniform(0.0, 0.3, len(taste))
        short = None
        order = np.argsort(np.where(distance <= MAX_SHIFT, cost, np.inf), kind="stable")
        for index in order[: min(6, int(np.sum(distance <= MAX_SHIFT)))]:
            if index not in self._sounds:
                self._sounds[index] = read_take(self.takes[index])
            sound = self._sounds[index]
            if sound is not None and (sound.loops or sound.steady_end > seconds * SAMPLERATE):
                return sound
            short = short or sound
        return short


def load_samples(folder: str | Path) -> list[SampleInstrument]:
    """One SampleInstrument, named "<folder name>:<instrument>", for every instrument in the folder's ``index.csv``.

    Recordings that swell or fade by design (dynamics not in DYNAMICS) are left out: they have no steady loudness.
    Raises UserError if there is no index, a column is missing or no line can be used.
    """
    root = Path(folder)
    index = root / "index.csv"
    if not index.is_file():
        raise UserError(f"no index.csv in {str(folder)!r}: it needs one with the columns {', '.join(COLUMNS)}")
    takes: dict[str, list[Take]] = {}
    with index.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [c for c in COLUMNS if c not in (reader.fieldnames or [])]
        if missing:
            raise UserError(f"{index} has no column {missing[0]!r}: it needs {', '.join(COLUMNS)}")
        for row in reader:
            try:
                midi, deviation = int(float(row["midi"])), float(row["deviation_semitones"])
            except (TypeError, ValueError) as error:
                raise UserError(f"{index}, line {reader.line_num}: midi and deviation must be numbers") from error
            if row["dynamic"] in DYNAMICS:
                take = Take(root / row["path"], midi, DYNAMICS.index(row["dynamic"]), deviation)
                takes.setdefault(row["instrument"], []).append(take)
    if not takes:
        raise UserError(f"{index} lists no usable recording: dynamics must be among {', '.join(DYNAMICS)}")
    return [SampleInstrument(f"{root.resolve().name}:{name}", takes[name]) for name in sorted(takes)]


def read_take(take: Take) -> Sound | None:
    """Decode one recording and find its onset, pitch and loops; None if it is silent, too short or has no clear pitch.

    Raises UserError if the file cannot be read.
    """
    try:
        wave, rate = soundfile.read(take.path, dtype="float32", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise UserError(f"cannot read the recording {str(take.path)!r} that index.csv names: {error}") from error
    wave = wave.mean(axis=1)
    if rate != SAMPLERATE:
        divisor = np.gcd(rate, SAMPLERATE)
        wave = resample_poly(wave, SAMPLERATE // divisor, rate // divisor).astype(np.float32)
    level = envelope(wave)
    peak = level.max(initial=0.0)
    if peak < 1e-4:
        return None
    loud = int(np.argmax(level >= peak * 10 ** ((ONSET_DB + 8) / 20)))
    soft = np.flatnonzero(level[:loud] < peak * 10 ** (ONSET_DB / 20))  # back from there: a click or breath is no onset
    begin = (int(soft[-1]) + 1 if len(soft) else 0) * ENVELOPE_HOP
    begin = max(begin - SAMPLERATE // 200, 0)  # 5 ms of what comes before, so that the attack is not clipped
    wave = wave[begin:] * (0.9 / max(np.abs(wave).max(), 1e-4))
    level = envelope(wave)
    peak = level.max()
    end = min((int(np.flatnonzero(level >= peak * 10 ** (DEAD_DB / 20))[-1]) + 1) * ENVELOPE_HOP, len(wave))
    loud = np.flatnonzero(level >= 0.5 * np.median(level[level >= 0.1 * peak]))
    steady_end = min((int(loud[-1]) + 1) * ENVELOPE_HOP, end)
    attack = min(int(0.09 * SAMPLERATE), steady_end // 3)
    if steady_end < 0.08 * SAMPLERATE:
        return None
    middle = wave[attack:steady_end]
    pitch = measure_pitch(middle, take.midi + take.deviation)
    if pitch is None:
        return None
    overlap, loops = _find_loops(wave, attack, steady_end, SAMPLERATE / midi_to_hz(pitch))
    rms = float(np.sqrt(np.mean(middle**2)))
    pcm = np.round(wave[:end] * 32767).astype(np.int16)
    return Sound(pcm, pitch, rms, attack, steady_end, end, overlap, loops)


def envelope(wave: np.ndarray) -> np.ndarray:
    """RMS over 8 ms every 2 ms: (n,) -> (n // 32 + 1,)."""
    power = np.concatenate([[0.0], np.cumsum(wave.astype(np.float64) ** 2)])
    centres = np.arange(0, len(wave) + 1, ENVELOPE_HOP)
    left = np.maximum(centres - 2 * ENVELOPE_HOP, 0)
    right = np.minimum(centres + 2 * ENVELOPE_HOP, len(wave))
    return np.sqrt(np.maximum(power[right] - power[left], 0.0) / np.maximum(right - left, 1))


def measure_pitch(wave: np.ndarray, guess: float) -> float | None:
    """MIDI number of a steady sound, searched within 0.8 semitones of `guess`; None if no clear period is there.

    Autocorrelation over up to eight periods, so that a period of 20 samples is still measured to 1 cent. The indices of
    sample libraries round and clip their deviations, so theirs is the guess and not the answer.
    """
    wave = wave[: SAMPLERATE // 2].astype(np.float64)
    wave = wave - wave.mean()
    n = len(wave)
    period = SAMPLERATE / midi_to_hz(guess)
    size = 1 << int(np.ceil(np.log2(2 * n)))
    ratio = np.fft.irfft(np.abs(np.fft.rfft(wave, size)) ** 2)[:n] / np.arange(n, 0, -1)
    reach = 2 ** (0.8 / 12)
    low, high = int(period / reach), int(period * reach) + 2
    if low < 2 or high >= n - 1 or ratio[0] <= 0:
        return None
    peak = low + int(np.argmax(ratio[low:high]))
    if ratio[peak] < CLEAR * ratio[0] or ratio[peak] < max(ratio[peak - 1], ratio[peak + 1]):
        return None
    found = _refine(ratio, peak)
    for multiple in range(2, 9):
        centre = int(round(found * multiple))
        if centre + 4 >= n // 2:
            break
        found = _refine(ratio, centre - 3 + int(np.argmax(ratio[centre - 3 : centre + 4]))) / multiple
    return float(guess + 12 * np.log2(period / found))


def _refine(values: np.ndarray, peak: int) -> float:
    """Where the parabola through a peak and its neighbours has its top."""
    left, top, right = values[peak - 1 : peak + 2]
    bend = left - 2 * top + right
    return peak + (float(np.clip((left - right) / (2 * bend), -0.5, 0.5)) if bend < 0 else 0.0)


def _find_loops(wave: np.ndarray, attack: int, steady_end: int, period: float) -> tuple[int, tuple[int, ...]]:
    """(length of the cross-fade, up to three places whose sound fits the end of the steady part)."""
    overlap = int(np.clip(4 * period, 320, 1600))
    body = wave[attack:steady_end]
    last = len(body) - 2 * overlap  # the newest place from which a loop still brings something
    first_level, last_level = np.sqrt(np.mean(body[: len(body) // 3] ** 2)), np.sqrt(np.mean(body[-overlap:] ** 2))
    if last < overlap // 2 or last_level < DYING * first_level:
        return overlap, ()
    target = body[-overlap:]
    size = 1 << int(np.ceil(np.log2(last + 2 * overlap)))
    spectrum = np.fft.rfft(body[: last + overlap], size) * np.conj(np.fft.rfft(target, size))
    match = np.fft.irfft(spectrum, size)[:last]
    power = np.concatenate([[0.0], np.cumsum(body.astype(np.float64) ** 2)])
    match = match / np.sqrt(np.maximum(power[overlap : last + overlap] - power[:last], 1e-9))
    match /= np.sqrt(np.sum(target.astype(np.float64) ** 2)) + 1e-9
    loops: list[int] = []
    for _ in range(3):
        best = int(np.argmax(match))
        if match[best] < 0.3 or (loops and match[best] < 0.8 * match.max(initial=0.0)):
            break
        loops.append(attack + best)
        match[max(best - overlap, 0) : best + overlap] = -1.0
    return overlap, tuple(loops)


def _play(
    sound: Sound, seconds: float, midi: float, legato: bool, release: float, seed: int
) -> tuple[np.ndarray, float]:
    """One note: (samples float32 that begin at the onset, seconds until its label ends)."""
    rng = np.random.default_rng(seed)
    ratio = 2.0 ** ((midi - sound.pitch) / 12.0)
    skip = sound.attack if legato else 0
    needed = int(np.ceil((seconds + release) * SAMPLERATE * ratio)) + skip + 4
    source = sound.wave
    held = seconds
    if needed > sound.steady_end and sound.loops:
        source = _sustain(sound, needed, rng)
    elif needed > sound.end:
        held = min(seconds, (sound.end - skip) / ratio / SAMPLERATE)
        release = min(release, 0.02)
    source = source[skip:needed].astype(np.float32) / 32767
    count = min(int((held + release) * SAMPLERATE), int((len(source) - 3) / ratio))
    wave = _interpolate(source, ratio, max(count, 1))
    fade_in = min(int((0.02 if legato else 0.003) * SAMPLERATE), len(wave))
    wave[:fade_in] *= np.sin(np.linspace(0, np.pi / 2, fade_in, dtype=np.float32)) ** 2
    up = min(int(held * SAMPLERATE), len(wave) - 1)
    wave[up:] *= np.cos(np.linspace(0, np.pi / 2, len(wave) - up, dtype=np.float32)) ** 2
    if seconds > 0.4:  # nobody holds a note perfectly still, and a loop would
        time = np.arange(len(wave), dtype=np.float32) / SAMPLERATE
        wave *= 1.0 + rng.uniform(0.02, 0.12) * np.sin(2 * np.pi * (time * rng.uniform(0.3, 1.5) + rng.uniform()))
    return wave, held


def _sustain(sound: Sound, needed: int, rng: np.random.Generator) -> np.ndarray:
    """The recording held for `needed` samples by cross-faded loops through its steady part; float32, int16 scale."""
    overlap, wave = sound.overlap, sound.wave[: sound.steady_end].astype(np.float32)
    pieces = [wave[:-overlap]]
    tail = wave[-overlap:]
    target = np.sqrt(np.mean(tail**2)) + 1e-9
    rise = np.linspace(0, 1, overlap, dtype=np.float32)
    length = len(pieces[0])
    prepared: dict[int, np.ndarray] = {}
    while length < needed:
        place = int(rng.choice(sound.loops))
        if place not in prepared:
            piece = wave[place:].copy()
            gain = np.clip(target / (np.sqrt(np.mean(piece[:overlap] ** 2)) + 1e-9), 0.25, 2.0)
            # from the level of the joint back to its own, so that looping neither grows nor dies
            piece *= np.linspace(gain, 1.0, len(piece), dtype=np.float32)
            prepared[place] = piece
        piece = prepared[place].copy()
        piece[:overlap] = tail * (1 - rise) + piece[:overlap] * rise
        pieces.append(piece[:-overlap])
        length += len(piece) - overlap
        tail = prepared[place][-overlap:]
    return np.concatenate([*pieces, tail])


def _interpolate(source: np.ndarray, ratio: float, count: int) -> np.ndarray:
    """`count` samples of `source` read at `ratio` times its speed, cubic (Catmull-Rom)."""
    padded = np.concatenate([source[:1], source, np.zeros(3, np.float32)])
    position = np.arange(count) * ratio
    index = position.astype(np.int64)
    x = (position - index).astype(np.float32)
    index = np.minimum(index, len(source) - 1)
    a, b, c, d = padded[index], padded[index + 1], padded[index + 2], padded[index + 3]
    return b + 0.5 * x * (c - a + x * (2 * a - 5 * b + 4 * c - d + x * (3 * (b - c) + d - a)))
