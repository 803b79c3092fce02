"""Scores: reading MIDI files, cutting excerpts, and playing them like people do.

A note array is ``(N, 4) float64``: onset s, offset s, MIDI number, velocity 1..127, sorted by onset. The sustain pedal
and pitch bends of a file are ignored on purpose: what is rendered and what is labelled come from the same array.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import mido
import numpy as np

from realtime_mpe.errors import UserError

log = logging.getLogger(__name__)

MIN_NOTE_SECONDS = 0.03  # shorter ones are key switches and one-tick notes, not audible pitches
MAX_NOTE_SECONDS = 30.0  # a note that was never switched off
DRUM_CHANNEL = 9  # 0-based: what people call channel 10
MOMENT = 1024  # over any MIDI number plus octaves
UNISON_SECONDS = 0.06  # two onsets this near are one attack to a listener
DOUBLED_SHARE = 0.5  # a part is a doubling when more than this share of its notes is in another part


@dataclass
class Part:
    """One player's notes. program : General MIDI program 0..127. notes : (N, 4) float64, see the module."""

    name: str
    program: int
    notes: np.ndarray


@dataclass
class Score:
    """Parts that sound together; percussion is in ``drums`` because it has no pitch to learn."""

    name: str
    parts: list[Part]
    drums: list[Part] = field(default_factory=list)

    @property
    def duration(self) -> float:
        """Seconds from 0 to the end of the last pitched note."""
        return max((float(p.notes[:, 1].max()) for p in self.parts if len(p.notes)), default=0.0)


def as_notes(rows: list[tuple[float, float, float, float]]) -> np.ndarray:
    """Rows (onset, offset, MIDI, velocity) as a sorted (N, 4) float64 array; also right for no rows at all."""
    notes = np.asarray(rows, dtype=np.float64).reshape(-1, 4)
    return notes[np.lexsort((notes[:, 2], notes[:, 0]))]


def load_scores(folder: str | Path) -> Iterator[Score]:
    """Every readable ``*.mid``/``*.midi`` under `folder`, in the order of their paths.

    Files that cannot be read are skipped, each with a debug line and together with one counted warning at the end.
    Raises UserError if the folder does not exist or holds no MIDI file at all.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"no score folder at {str(folder)!r}: give a folder that holds .mid files")
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in (".mid", ".midi") and p.is_file())
    if not paths:
        raise UserError(f"no .mid file under {str(folder)!r}: give another folder, or none to train on composed scores")
    bad = 0
    for path in paths:
        try:
            score = read_score(path)
        except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
                mido.KeySignatureError) as error:  # fmt: skip
            bad += 1  # mido lets the bare errors of its parser through, so "damaged file" has this many names
            log.debug("skipped %s: %s", path, error)
            continue
        yield score
    if bad:
        log.warning("%d of %d scores under %s could not be read and were skipped", bad, len(paths), folder)


def read_score(path: str | Path) -> Score:
    """One MIDI file, doublings removed. Raises ValueError (or what mido raises) if it is damaged or has no notes."""
    midi = mido.MidiFile(path, clip=True)
    if midi.ticks_per_beat <= 0:
        raise ValueError("time code division is not supported")
    if midi.type == 2:
        raise ValueError("type 2 files hold several songs")
    names = {number: track.name for number, track in enumerate(midi.tracks)}
    program = [0] * 16
    sounding: dict[tuple[int, int, int], list[tuple[float, int, int]]] = defaultdict(list)
    rows: dict[tuple[int, int, int], list[tuple[float, float, float, float]]] = defaultdict(list)

    def close(key: tuple[int, int, int], now: float) -> None:
        onset, velocity, with_program = sounding[key].pop(0)
        now = min(now, onset + MAX_NOTE_SECONDS)
        if now - onset >= MIN_NOTE_SECONDS:
            rows[key[0], key[1], with_program].append((onset, now, key[2], velocity))

    seconds = 0.0
    for _, seconds, number, message in in_time(midi):
        if message.type == "program_change":
            program[message.channel] = message.program
        elif message.type in ("note_on", "note_off"):
            key = (number, message.channel, message.note)
            if _is_note_on(message):
                sounding[key].append((seconds, message.velocity, program[message.channel]))
            elif sounding[key]:
                close(key, seconds)
    for key in list(sounding):
        while sounding[key]:
            close(key, seconds)
    if not rows:
        raise ValueError("no notes")

    parts, drums = [], []
    for (number, channel, with_program), notes in sorted(rows.items()):
        name = (names[number] or f"track {number + 1}").strip()
        part = Part(name, with_program, cut_repeats(as_notes(notes)))
        (drums if channel == DRUM_CHANNEL else parts).append(part)
    return Score(Path(path).stem, drop_doubled(parts), drums)


def in_time(midi: mido.MidiFile) -> Iterator[tuple[int, float, int, mido.Message]]:
    """(tick, second, track number, message) of all tracks as one.

    Program and tempo changes may live in another track than the notes they are for. At the same tick note-offs go
    first, so that a repeated key is not closed the moment it opens.
    """
    events = []
    for number, track in enumerate(midi.tracks):
        tick = 0
        for message in track:
            tick += message.time
            events.append((tick, number, message))
    events.sort(key=lambda e: (e[0], 2 if _is_note_on(e[2]) else 1 if e[2].type == "program_change" else 0))
    seconds, last_tick, seconds_per_tick = 0.0, 0, 0.5 / midi.ticks_per_beat
    for tick, number, message in events:
        seconds += (tick - last_tick) * seconds_per_tick
        last_tick = tick
        if message.type == "set_tempo":
            seconds_per_tick = message.tempo * 1e-6 / midi.ticks_per_beat
        yield tick, seconds, number, message


def _is_note_on(message: mido.Message) -> bool:
    return message.type == "note_on" and message.velocity > 0


def cut_repeats(notes: np.ndarray) -> np.ndarray:
    """End a note where the same pitch is struck again, and keep one of two notes that start together on one pitch."""
    notes = notes[np.lexsort((notes[:, 1], notes[:, 0], notes[:, 2]))].copy()
    same = np.zeros(len(notes), bool)
    same[:-1] = notes[:-1, 2] == notes[1:, 2]
    following = np.append(notes[1:, 0], np.inf)
    notes[:, 1] = np.where(same, np.minimum(notes[:, 1], following), notes[:, 1])
    return as_notes(notes[notes[:, 1] - notes[:, 0] >= MIN_NOTE_SECONDS * 0.5])


def drop_doubled(parts: list[Part]) -> list[Part]:
    """Leave out every part that plays mostly in unison, or mostly so many octaves apart, with a part that is kept.

    Which of two such players owns a note cannot be decided by ear, so it must not be a target. The part with more notes
    stays (the earlier one of two equals). The interval must be one and the same, and against chords only
    the unison of a line counts: a piano holds nearly every note sung to it in some octave, and is no doubling.
    """
    kept: list[tuple[Part, np.ndarray, bool]] = []
    order = sorted(range(len(parts)), key=lambda i: -len(parts[i].notes))
    for i in order:
        notes = parts[i].notes
        if not len(notes):
            continue
        # one number for moment and pitch; the keeper's numbers also cover the moments next to its own (+-MOMENT)
        cell = np.round(notes[:, 0] / UNISON_SECONDS).astype(np.int64) * MOMENT + notes[:, 2].astype(np.int64)
        chords = is_polyphonic(notes)
        doubled = any(
            np.isin(cell + octaves, around).mean() > DOUBLED_SHARE
            for _, around, keeper_chords in kept
            for octaves in ((0, 12, -12, 24, -24) if chords or not keeper_chords else (0,))
        )
        if not doubled:
            kept.append((parts[i], np.concatenate([cell - MOMENT, cell, cell + MOMENT]), chords))
    survivors = {id(part) for part, *_ in kept}
    return [part for part in parts if id(part) in survivors]


def clip_notes(notes: np.ndarray, start: float, seconds: float) -> np.ndarray:
    """The part of `notes` inside the `seconds` from `start` on, with times counted from `start`."""
    inside = notes.copy()
    inside[:, :2] = np.clip(notes[:, :2] - start, 0.0, seconds)
    return inside[inside[:, 1] - inside[:, 0] >= MIN_NOTE_SECONDS]


def sounding_share(notes: np.ndarray, seconds: float) -> float:
    """Share 0..1 of the time in which at least one of `notes` sounds."""
    if not len(notes):
        return 0.0
    ends = np.maximum.accumulate(notes[:, 1])
    gaps = np.maximum(notes[1:, 0] - ends[:-1], 0.0).sum()
    return float(np.clip((ends[-1] - notes[0, 0] - gaps) / seconds, 0.0, 1.0))


def segment(score: Score, seconds: float, rng: np.random.Generator, tries: int = 12) -> Score | None:
    """A random excerpt of `seconds` in which at least two parts sound for a quarter of the time; None if none is found.

    Notes are clipped to the excerpt and counted from its start; parts with fewer than three notes in it are left out.
    """
    duration = score.duration
    for _ in range(tries):
        start = float(rng.uniform(0.0, max(duration - seconds, 0.0)))
        excerpt = cut(score, start, seconds)
        if sum(sounding_share(p.notes, seconds) > 0.25 for p in excerpt.parts) >= 2:
            return excerpt
    return None


def cut(score: Score, start: float, seconds: float) -> Score:
    """The excerpt start .. start + seconds with times counted from `start`; parts of fewer than three notes go."""
    parts = [Part(p.name, p.program, clip_notes(p.notes, start, seconds)) for p in score.parts]
    drums = [Part(p.name, p.program, clip_notes(p.notes, start, seconds)) for p in score.drums]
    return Score(score.name, [p for p in parts if len(p.notes) >= 3], [d for d in drums if len(d.notes)])


def is_polyphonic(notes: np.ndarray) -> bool:
    """True if more than a tenth of the notes begin while another one goes on for at least 60 ms."""
    if len(notes) < 2:
        return False
    ends = np.maximum.accumulate(notes[:, 1])[:-1]
    overlap = np.minimum(ends, notes[1:, 1]) - notes[1:, 0]
    return bool((overlap > 0.06).mean() > 0.1)


def split_voices(notes: np.ndarray, line: str = "top") -> np.ndarray:
    """The `line` ("top" or "bottom") of a part with chords: never two notes at once, so that one wind can play it.

    Of notes struck together the outermost stays; a note inside a longer, more outward one is dropped; otherwise the
    newer note ends the older one.
    """
    if line not in ("top", "bottom"):
        raise ValueError(f"line is {line!r}: expected 'top' or 'bottom'")
    sign = 1.0 if line == "top" else -1.0
    kept: list[np.ndarray] = []
    for note in notes:
        note = note.copy()
        if kept:
            last = kept[-1]
            outward = sign * (note[2] - last[2]) > 0
            if note[0] - last[0] < UNISON_SECONDS / 2:
                if outward:
                    note[0] = last[0]
                    kept[-1] = note
                continue
            if last[1] > note[0] + 0.1 and not outward:
                continue
            last[1] = min(last[1], note[0])
        kept.append(note)
    return as_notes([tuple(n) for n in kept if n[1] - n[0] >= MIN_NOTE_SECONDS])


def humanise(notes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The notes as a person would play them: jitter, a slow drift of the beat, uneven loudness, one articulation.

    Each note moves by a jitter of 10-20 ms standard deviation; the whole part drifts by up to about 25 ms over seconds;
    velocity varies by 4-10; the articulation (legato, as written, staccato) is drawn once for the part. Order and
    number of notes stay, repeated pitches never overlap, nothing starts before 0.
    """
    if not len(notes):
        return notes.copy()
    played = notes.copy()
    n = len(played)
    chord = np.concatenate([[0], np.cumsum(np.diff(notes[:, 0]) > UNISON_SECONDS / 2)])  # hands strike chords together
    jitter = rng.normal(0.0, rng.uniform(0.010, 0.020), chord[-1] + 1)[chord] + rng.normal(0.0, 0.003, n)
    jitter = np.clip(jitter, -0.05, 0.05)
    drift = rng.uniform(0.0, 0.025) * np.sin(2 * np.pi * (notes[:, 0] / rng.uniform(4, 12) + rng.uniform()))
    duration = notes[:, 1] - notes[:, 0]
    # A fast run would lose its order if a note could move by more than a fraction of the gap to its neighbours.
    starts = np.unique(notes[:, 0])
    gap = np.diff(starts, append=np.inf)
    room = np.minimum(gap, np.concatenate([[np.inf], gap[:-1]]))[np.searchsorted(starts, notes[:, 0])]
    move = np.clip(jitter + drift, -0.3 * room, 0.3 * room)
    played[:, 0] = np.maximum(notes[:, 0] + move, 0.0)

    later = np.append(starts, np.inf)[np.searchsorted(starts, notes[:, 0] + UNISON_SECONDS / 2)] - notes[:, 0]
    style = rng.choice(["legato", "written", "staccato"], p=[0.35, 0.45, 0.2])
    if style == "legato":
        near = np.isfinite(later) & (np.abs(later - duration) < 0.12)
        duration = np.where(near, later + rng.uniform(-0.01, 0.02, n), duration)
    elif style == "staccato":
        duration = duration * np.clip(rng.uniform(0.35, 0.75) + rng.normal(0, 0.05, n), 0.3, 0.85)
    else:
        duration = duration * np.clip(rng.uniform(0.85, 1.0) + rng.normal(0, 0.03, n), 0.75, 1.0)
    played[:, 1] = played[:, 0] + np.maximum(duration, min(0.05, MIN_NOTE_SECONDS * 2))
    swell = rng.uniform(0, 8) * np.sin(2 * np.pi * (notes[:, 0] / rng.uniform(3, 10) + rng.uniform()))
    played[:, 3] = np.clip(np.round(played[:, 3] + swell + rng.normal(0, rng.uniform(4, 10), n)), 20, 127)

    for pitch in np.unique(played[:, 2]):
        own = np.flatnonzero(played[:, 2] == pitch)
        own = own[np.argsort(played[own, 0], kind="stable")]
        gap = np.diff(played[own, 0])  # a repeated note needs a moment of release to be heard as a new one
        limit = played[own[:-1], 0] + np.maximum(gap - 0.02, 0.5 * gap)
        played[own[:-1], 1] = np.minimum(played[own[:-1], 1], limit)
    return as_notes(played)
