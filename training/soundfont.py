"""General MIDI instruments of a SoundFont, played offline by FluidSynth.

FluidSynth runs at 32 kHz and the sound is then halved: its interpolation does not band-limit, and at 32 kHz whatever
folds back lands above the 8 kHz that are kept. One synthesiser a process serves all instruments of a file, because
loading a large bank takes longer than playing it.
"""

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

from realtime_mpe.analysis import SAMPLERATE
from realtime_mpe.errors import UserError

from .scores import Part
from .stems import at_level

FONT_RATE = 32_000  # Hz
DRUM_BANK = 128
GAIN = 0.3  # far from clipping with ten notes; the level is set afterwards in floating point
BLOCK = 64  # samples that FluidSynth makes at once; events take effect between blocks, 2 ms apart
VOICES = 256  # at once: chords of layered presets with long releases need over a hundred
CHUNK = 25 * BLOCK  # one look at the decay of a note, 50 ms
LONGEST_PROBE = 8.0  # s; a note that still sounds then counts as sustained
DEAD_DB = -35.0  # below the note's peak: the note is over although the key is down
ONSET_DB = -20.0  # below the note's early peak: the note has begun
SLOWEST_ONSET = 0.12  # s by which a note may be played early so that its sound begins on the label
RELEASE_GENERATOR = 38  # SoundFont 2.04, 8.1.2: releaseVolEnv, timecents
SLOWEST_RELEASE = 0.12  # s in which a key that was let go must fall by 20 dB, or its label would end too early
TAIL_SECONDS = 1.5  # rendered past the end and thrown away: lets releases die before the synthesiser is used again

# General MIDI program -> playable range (low, high). Left out: what does not sound at its key alone (bells 9 and 14;
# organs with a strong 16-foot stop, 16-18; the lead in fifths, 86), timpani (47), orchestra hit (55), attacks slower
# than a label can say (89, 92-95), effects (96-103), percussion (112-119) and noises (120-127).
_KEYBOARD, _WIDE = (23, 94), (36, 94)
RANGES: dict[int, tuple[int, int]] = {
    **dict.fromkeys(range(0, 6), _KEYBOARD), 6: (29, 89), 7: (29, 88),
    8: (60, 94), 10: (60, 94), 11: (53, 89), 12: (45, 94), 13: (65, 94), 15: (55, 84),
    **dict.fromkeys((19, 20), (30, 94)), 21: (41, 94), 22: (48, 94), 23: (41, 89),
    24: (40, 84), 25: (40, 84), 26: (40, 86), 27: (40, 86), 28: (40, 79), 29: (40, 86), 30: (40, 86),
    **dict.fromkeys(range(32, 40), (23, 67)),
    40: (55, 94), 41: (48, 88), 42: (36, 81), 43: (24, 64), 44: (36, 91), 45: (36, 88), 46: (24, 94),
    **dict.fromkeys((48, 49, 50, 51), (28, 94)), 52: (43, 86), 53: (43, 86), 54: (43, 86),
    56: (52, 88), 57: (34, 77), 58: (24, 65), 59: (52, 86), 60: (34, 77), 61: (36, 91), 62: (36, 94), 63: (36, 94),
    64: (54, 91), 65: (49, 86), 66: (42, 79), 67: (37, 72), 68: (58, 93), 69: (52, 84), 70: (34, 77), 71: (50, 93),
    72: (74, 94), 73: (59, 94), 74: (60, 94), 75: (60, 94), 76: (53, 89), 77: (53, 89), 78: (60, 94), 79: (55, 91),
    **dict.fromkeys((80, 81, 82, 83, 84, 85, 87), _WIDE), **dict.fromkeys((88, 90, 91), _WIDE),
    104: (45, 84), 105: (43, 86), 106: (45, 84), 107: (43, 86), 108: (53, 89), 109: (48, 81), 110: (55, 94),
    111: (55, 91),
}  # fmt: skip
MONOPHONIC = frozenset([*range(32, 40), *range(40, 44), *range(56, 61), *range(64, 80), 109, 110, 111])


@dataclass(frozen=True)
class Response:
    """How a key answers. lag : s until it is heard.  life : s until it has died with the key down, inf if it holds."""

    lag: float
    life: float


class SoundFontInstrument:
    """One preset of a SoundFont; see `training.stems.Instrument` for what `render` promises.

    Raises UserError if pyfluidsynth or libfluidsynth are missing, or the file is not there, when it is made; and when
    the file is no SoundFont or has no such preset, when it first plays.
    """

    def __init__(self, path: str | Path, program: int, bank: int = 0):
        if not 0 <= program <= 127:
            raise ValueError(f"program {program} is outside 0..127")
        check_available(path)
        self.path, self.program, self.bank = str(path), program, bank
        self.name = f"{Path(path).stem.lower()}:{program if bank == 0 else f'{bank}/{program}'}"
        self.low, self.high = RANGES.get(program, _WIDE)
        self.polyphonic = program not in MONOPHONIC

    def render(self, notes: np.ndarray, n_samples: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """notes (N, 4) -> audio (n_samples,) float32 and the notes that sound (M <= N, 4).

        A key that answers late is played early by as much (up to 0.12 s); a note that dies while its key is down ends
        where it has fallen 35 dB below its peak.
        """
        playable = notes[(notes[:, 2] >= self.low) & (notes[:, 2] <= self.high)]
        playable = playable[playable[:, 0] < n_samples / SAMPLERATE]
        answers = [response(self.path, self.bank, self.program, int(midi) // 3 * 3 + 1) for midi in playable[:, 2]]
        lag = np.array([a.lag for a in answers])
        life = np.array([a.life for a in answers])
        events = []
        for (onset, offset, midi, velocity), early in zip(playable, lag, strict=True):
            start = max(int((onset - early) * FONT_RATE), 0)
            events.append((start, 1, int(midi), int(np.clip(velocity, 1, 127))))
            events.append((max(int(offset * FONT_RATE), start + 1), 0, int(midi), 0))
        events.sort()  # note-offs sort before note-ons of the same sample
        sounded = playable.copy()
        sounded[:, 1] = np.minimum(sounded[:, 1], sounded[:, 0] + life) if len(sounded) else sounded[:, 1]
        sounded = sounded[sounded[:, 1] - sounded[:, 0] > 0.01]
        if not events:
            return np.zeros(n_samples, np.float32), sounded
        player = _player(self.path)
        player.select(self.bank, self.program, hurry=_hurry(self.path, self.bank, self.program, rng.uniform(0.5, 1.5)))
        return at_level(_halve(player.play(events, 2 * n_samples), n_samples), sounded), sounded


class SoundFontDrums:
    """The drum kits of a SoundFont: noise that is in the mixture and in no label."""

    def __init__(self, path: str | Path):
        check_available(path)
        self.path = str(path)
        self.name = f"{Path(path).stem.lower()}:drums"

    def render(self, parts: list[Part], n_samples: int, rng: np.random.Generator) -> np.ndarray:
        """Percussion `parts` together -> audio (n_samples,) float32; silent if nothing is struck."""
        events = []
        for part in parts:
            for onset, offset, midi, velocity in part.notes:
                start = int(onset * FONT_RATE)
                events.append((start, 1, int(midi), int(np.clip(velocity, 1, 127))))
                events.append((max(int(offset * FONT_RATE), start + 1), 0, int(midi), 0))
        if not events:
            return np.zeros(n_samples, np.float32)
        player = _player(self.path)
        kit = parts[0].program if parts[0].program in (8, 16, 24, 25, 32, 40) else 0
        player.select(DRUM_BANK, kit, otherwise=0)
        return at_level(_halve(player.play(sorted(events), 2 * n_samples), n_samples), None)


def soundfont_instruments(path: str | Path, programs: list[int] | None = None) -> list[SoundFontInstrument]:
    """The melodic General MIDI programs of a SoundFont (all in RANGES, or those of `programs` that are in it).

    Raises UserError if the file or FluidSynth is missing, or the font has none of the programs.
    """
    check_available(path)
    wanted = sorted(RANGES) if programs is None else [p for p in programs if p in RANGES]
    player = _player(str(path))
    found = [SoundFontInstrument(path, p) for p in wanted if player.has(0, p)]
    if not found:
        raise UserError(f"{str(path)!r} has none of the General MIDI programs asked for: give a General MIDI .sf2")
    return found


def check_available(path: str | Path) -> None:
    """Raises UserError, with the remedy, if pyfluidsynth, libfluidsynth or the file at `path` are missing."""
    try:
        import fluidsynth  # noqa: F401  (loads libfluidsynth, so it is not needed by those who use no SoundFont)
    except ModuleNotFoundError as error:
        raise UserError("SoundFonts need pyfluidsynth: pip install pyfluidsynth") from error
    except (ImportError, OSError) as error:
        raise UserError(
            "SoundFonts need the FluidSynth library: apt-get install libfluidsynth3, or brew install fluid-synth"
        ) from error
    if not Path(path).is_file():
        raise UserError(
            f"no SoundFont at {str(path)!r}: give a .sf2 file; apt-get install fluid-soundfont-gm brings "
            "/usr/share/sounds/sf2/FluidR3_GM.sf2"
        )


def _halve(audio: np.ndarray, n_samples: int) -> np.ndarray:
    return resample_poly(audio, 1, FONT_RATE // SAMPLERATE)[:n_samples].astype(np.float32)


class _Player:
    """The synthesiser of one process and one file. Nothing of one `play` rings on in the next."""

    def __init__(self, path: str):
        import fluidsynth

        # Effects go off by settings: a reverb that is only turned down still costs half of the time.
        settings = {"synth.reverb.active": 0, "synth.chorus.active": 0, "synth.polyphony": VOICES}
        self._synth = fluidsynth.Synth(GAIN, FONT_RATE, **settings)
        # Floating point, which pyfluidsynth does not offer: its 16-bit output is dithered by a generator that runs on
        # from note to note, so the same excerpt would never come out twice the same.
        library = ctypes.CDLL(fluidsynth.lib)
        self._write_float = library.fluid_synth_write_float
        self._write_float.argtypes = [
            ctypes.c_void_p, ctypes.c_int,
            ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int,
        ]  # fmt: skip
        self._active_voices = library.fluid_synth_get_active_voice_count
        self._active_voices.argtypes = [ctypes.c_void_p]
        self._set_generator = library.fluid_synth_set_gen
        self._set_generator.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_float]
        self._font = self._synth.sfload(path)
        if self._font == -1:
            self._synth.delete()
            raise UserError(f"{path!r} is not a SoundFont that FluidSynth can read: give a .sf2 file")

    def has(self, bank: int, program: int) -> bool:
        return self._synth.program_select(0, self._font, bank, program) == 0

    def select(self, bank: int, program: int, otherwise: int | None = None, hurry: float = 0.0) -> None:
        """hurry : octaves by which releases are made shorter than the font's.

        Raises UserError if the font has neither `program` nor `otherwise` in that bank.
        """
        self._set_generator(self._synth.synth, 0, RELEASE_GENERATOR, -1200.0 * hurry)
        if not self.has(bank, program) and (otherwise is None or not self.has(bank, otherwise)):
            raise UserError(f"the SoundFont has no program {program} in bank {bank}: choose another program or font")

    def play(self, events: list[tuple[int, int, int, int]], n: int) -> np.ndarray:
        """events: sorted (sample, 1 on | 0 off, key, velocity) -> mono (n,) float32 at FONT_RATE."""
        self._forget()
        pieces, now = [], 0
        for sample, on, key, velocity in events:
            if sample >= n:
                break
            sample = (sample + BLOCK // 2) // BLOCK * BLOCK
            if sample > now:
                pieces.append(self.read(sample - now))
                now = sample
            self.strike(key, velocity if on else 0)
        if n > now:
            pieces.append(self.read(-(-(n - now) // BLOCK) * BLOCK))
        self.silence()
        return np.concatenate(pieces)[:n]

    def _forget(self) -> None:
        """Bring all voices into one state.

        A voice glides in its first block from the panning of whatever it played before: 2 ms at -30 dB that would make
        every stem depend on the ones before it. So (nearly) all voices play one block of the same.
        """
        for key in 2 * list(range(128)):
            if self._active_voices(self._synth.synth) > VOICES - 16:
                break
            self.strike(key, 100)
        self.read(BLOCK)
        self.silence()

    def strike(self, key: int, velocity: int) -> None:
        """Press a key (velocity 0: let it go) now; it sounds from the next `read`."""
        if velocity:
            self._synth.noteon(0, key, velocity)
        else:
            self._synth.noteoff(0, key)

    def silence(self) -> None:
        self._synth.all_sounds_off(-1)
        for _ in range(int(TAIL_SECONDS * FONT_RATE / CHUNK)):
            if np.abs(self.read(CHUNK)).max() < 1e-5:
                return

    def read(self, n: int) -> np.ndarray:
        """The next n samples (a multiple of BLOCK), mono, full scale 1."""
        stereo = np.empty((2, n), np.float32)
        left, right = stereo[0].ctypes.data, stereo[1].ctypes.data
        self._write_float(self._synth.synth, n, left, 0, 1, right, 0, 1)
        return stereo.mean(axis=0)


@lru_cache(maxsize=2)
def _player(path: str) -> _Player:
    return _Player(path)


@cache
def response(path: str, bank: int, program: int, midi: int) -> Response:
    """Measure how the key `midi` of a preset answers when it is struck at velocity 90 and held."""
    player = _player(path)
    player.select(bank, program)
    player.strike(midi, 90)
    early = player.read(12 * CHUNK)
    step = BLOCK
    level = np.sqrt(np.mean(early[: len(early) // step * step].reshape(-1, step) ** 2, axis=1))
    peak = float(level.max())
    if peak < 1e-4:
        player.silence()
        return Response(0.0, 0.0)
    lag = float(np.argmax(level >= peak * 10 ** (ONSET_DB / 20))) * step / FONT_RATE
    dead = peak * 10 ** (DEAD_DB / 20)
    life = np.inf
    if np.all(level[-CHUNK // step :] < dead):
        life = float(np.flatnonzero(level >= dead)[-1] + 1) * step / FONT_RATE
    else:
        for chunk in range(12, int(LONGEST_PROBE * FONT_RATE / CHUNK)):
            loud = float(np.sqrt(np.mean(player.read(CHUNK) ** 2)))
            if loud < dead:
                life = chunk * CHUNK / FONT_RATE
                break
    player.silence()
    return Response(min(lag, SLOWEST_ONSET), life - lag)


def _hurry(path: str, bank: int, program: int, taste: float) -> float:
    """Octaves by which to shorten a preset's release so that it lasts at most SLOWEST_RELEASE * taste."""
    return max(float(np.log2(release(path, bank, program) / (SLOWEST_RELEASE * taste))), 0.0)


@cache
def release(path: str, bank: int, program: int) -> float:
    """Seconds (0.05..3) in which a preset falls by 20 dB after key-up; measured in the middle of its range."""
    player = _player(path)
    player.select(bank, program)
    low, high = RANGES.get(program, _WIDE)
    key = (low + high) // 2
    player.strike(key, 90)
    before = float(np.sqrt(np.mean(player.read(6 * CHUNK)[-CHUNK:] ** 2)))
    player.strike(key, 0)
    chunks = 0
    while chunks < 60 and float(np.sqrt(np.mean(player.read(CHUNK) ** 2))) > 0.1 * before:
        chunks += 1
    player.silence()
    return max(chunks, 1) * CHUNK / FONT_RATE
