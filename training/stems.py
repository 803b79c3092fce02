"""The stem cache: excerpts of scores played by many instruments, rendered once, re-mixed for ever.

A *segment* is one excerpt; its *stems* are isolated recordings of one part by one instrument. Every part is rendered by
several instruments (takes), so a mixture picks one take of each part it wants. One uncompressed file a segment,
``<folder>/<index:05d>.npz``:

    audio       (S, n) int16       16 kHz mono, about -23 dBFS RMS while sounding
    notes       (M, 5) float32     stem, onset s, offset s, MIDI 23..94, velocity 1..127; sorted by stem, then onset
    part        (S,) int16         the part a stem plays; -1: percussion, which has no notes
    instrument  (S,) str           name of the instrument: who is who when sources are told apart
    score       () str             name of the score
    family      (S,) str           instrument family; only in segments of real recordings
    mixture     (n,) int16         only where there are no isolated stems, which are then silence in `audio`

What happens in segment i depends on (seed, i) and the instruments and scores given, and on nothing else, so an
interrupted run goes on where it stopped and a repeated one makes the same files.
"""

import contextlib
import copy
import itertools
import multiprocessing
import os
import signal
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from realtime_mpe.analysis import FIRST_MIDI, N_PITCHES, SAMPLERATE
from realtime_mpe.errors import UserError

from .casting import cast_chamber, draw_family, out_of_reach
from .compose import compose
from .effects import Room, apply_effects
from .scores import Part, Score, as_notes, cut, cut_repeats, humanise, is_polyphonic, segment, split_voices

Stem = tuple[int, str, np.ndarray, np.ndarray]
"""(part, instrument name, audio (n,) float32, notes (N, 4)), at least one note."""

LINES = ["top", "bottom"]
LEVEL_DB = -23.0  # dB re full scale, RMS while sounding
PEAK = 0.98
MAX_PARTS = 6
CLUSTER_TIMEOUT = "10s"
IN_FLIGHT = 3  # segments a worker of a cluster
MAX_DRAWS = 30  # excerpts tried for one segment
LAST_MIDI = FIRST_MIDI + N_PITCHES - 1
SHIFT_PROBABILITY = 0.35  # a part moved by an octave: registers must not tell players apart
SAME_INSTRUMENT_PROBABILITY = 0.15  # two parts on one instrument: timbre must not be all there is
ENSEMBLE_PROBABILITY = 0.35  # of a cast as in life, see `casting`: no part is moved, and two are alike more often
SAME_IN_ENSEMBLE_PROBABILITY = 0.4
SAME_SOUND_PROBABILITY = 0.4  # of two players of one kind in chamber music: else their instruments differ
LINE_PROBABILITY = 0.35  # a chordal part reduced to one line, for the instruments that play one
EFFECTS_PROBABILITY = 0.4
ROOM_PROBABILITY = 0.7
ENSEMBLE_WEIGHT = 3.0  # a score is drawn so many times as often for each part it has over two, up to four parts
DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)  # what reading a damaged segment raises
COMPOSED_SHARE = 0.15  # beside given scores: textures that scores are short of


class Instrument(Protocol):
    """What plays a part. low, high : playable MIDI numbers, inclusive. name : unique sound source, "font:program"."""

    name: str
    low: int
    high: int
    polyphonic: bool

    def render(self, notes: np.ndarray, n_samples: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """notes (N, 4) -> audio (n_samples,) float32 at 16 kHz, and `sounded` (M <= N, 4).

        `sounded` are the notes that are in the audio. Their offset is key-up (release and room ring on after it), or
        the moment the sound has died by itself, 35 dB below the note's peak, whichever is earlier. What the instrument
        cannot play is neither in the audio nor in `sounded`.
        """
        ...


class Drums(Protocol):
    """What plays percussion: parts together -> audio (n_samples,) float32, zeros if there is nothing to play."""

    name: str

    def render(self, parts: list[Part], n_samples: int, rng: np.random.Generator) -> np.ndarray: ...


def at_level(audio: np.ndarray, notes: np.ndarray | None, level_db: float = LEVEL_DB) -> np.ndarray:
    """`audio` (n,) scaled to `level_db` RMS while `notes` sound (None: while it is louder than -40 dB of its peak).

    The peak never exceeds 0.98, so very spiky sounds stay softer. Silence stays silence. Returns float32 (n,).
    """
    peak = float(np.max(np.abs(audio), initial=0.0))
    if peak < 1e-6:
        return np.zeros(len(audio), np.float32)
    if notes is None:
        sounding = np.abs(audio) > 0.01 * peak
    else:
        sounding = np.zeros(len(audio), bool)
        for onset, offset in notes[:, :2]:
            sounding[int(onset * SAMPLERATE) : int(offset * SAMPLERATE) + 1] = True
    power = float(np.mean(audio[sounding].astype(np.float64) ** 2)) if sounding.any() else 0.0
    gain = min(10 ** (level_db / 20) / max(power, 1e-12) ** 0.5, PEAK / peak)
    return (audio * gain).astype(np.float32)


@dataclass(frozen=True)
class Segment:
    """One file of the cache; see the module for shapes."""

    audio: np.ndarray
    notes: np.ndarray
    part: np.ndarray
    instrument: list[str]
    score: str
    family: list[str] | None = None
    mixture: np.ndarray | None = None

    @classmethod
    def decode(cls, file: str | Path | BinaryIO) -> "Segment":
        """From a segment's .npz. Raises what numpy raises if it is damaged, see DAMAGE."""
        with np.load(file) as data:
            names = [str(n) for n in data["instrument"]]
            family = [str(n) for n in data["family"]] if "family" in data else None
            mixture = data["mixture"] if "mixture" in data else None
            part = data["part"].astype(np.int64)
            return cls(data["audio"], data["notes"], part, names, str(data["score"]), family, mixture)

    def stem(self, index: int, start: int = 0, n: int | None = None) -> np.ndarray:
        """``n`` samples of one stem from ``start`` on (fewer at its end), float32 in -1..1."""
        stop = None if n is None else start + n
        return self.audio[index, start:stop].astype(np.float32) / 32767


class StemCache:
    """The segments in a folder, which may still be growing: `refresh` looks again, `load(i)` reads the i-th of them."""

    def __init__(self, folder: str | Path):
        """Raises UserError if the folder does not exist."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"no stem cache at {str(folder)!r}: render stems there first")
        self.paths: list[Path] = []
        self.refresh()

    def __len__(self) -> int:
        return len(self.paths)

    def refresh(self) -> int:
        """Look for new segments; returns how many there are now. Known ones keep their index if none was removed."""
        self.paths = sorted(p for p in self.folder.glob("*.npz") if p.stem.isdigit())
        return len(self.paths)

    def load(self, index: int) -> Segment:
        """Raises IndexError beyond the cache, UserError if the file is damaged."""
        path = self.paths[index]
        try:
            return Segment.decode(path)
        except DAMAGE as error:
            raise UserError(f"{path} is damaged ({error}): delete it and render again") from error


@dataclass(frozen=True)
class Job:
    """All that a segment depends on, apart from its index."""

    out_dir: Path
    scores: list[Score]
    instruments: list[Instrument]
    weights: list[float]
    drums: Drums | None
    seconds: float
    takes: int
    seed: int
    register_shift: bool
    twins: float
    chamber: bool


def render(
    out_dir: str | Path,
    scores: Sequence[Score] | None,
    instruments: Sequence[Instrument],
    n_segments: int,
    *,
    seconds: float = 24.0,
    takes: int = 2,
    seed: int = 0,
    workers: int = 1,
    register_shift: bool = True,
    twins: float = 0.0,
    chamber: bool = False,
    weights: Sequence[float] | None = None,
    drums: Drums | None = None,
    cluster: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Fill `out_dir` with segments 0 .. n_segments - 1; those that are there are kept. Returns how many were made.

    scores : None for composed ones only.  takes : instruments that play each part.
    twins : share of the segments, 0..1, whose cast is an ensemble as in life with two players of one instrument.
    chamber : every part is a single line on an instrument of the orchestra, as it sounds in one room.
    weights : how often each instrument is drawn, above 0; None: every sound source (what is before ":" in the names)
    as often as the others, for a bank of a hundred presets must not drown thirteen recorded instruments.
    drums : plays the percussion of scores that have some, as one more stem without notes.
    workers : processes; with more than one, the caller's main module must be importable (guard it with
    ``if __name__ == "__main__"``).
    cluster : address of a Dask scheduler, whose workers then render instead; they need this package and the sound
    files under the same paths, but not `out_dir`.
    progress : called with (segments there are, n_segments) after each one. Ctrl-C ends the workers, leaves only whole
    files and is passed on. Raises UserError if there is no instrument or no score with two parts.
    """
    if not instruments:
        raise UserError("no instruments to render with: give a sample folder, a SoundFont or the synthesiser")
    if len({i.name for i in instruments}) < len(instruments):
        raise ValueError("two instruments have the same name")
    if weights is None:
        sources = [i.name.partition(":")[0] for i in instruments]
        weights = [1.0 / sources.count(s) for s in sources]
    if len(weights) != len(instruments) or min(weights) <= 0:
        raise ValueError("weights must hold a number above 0 for every instrument")
    usable = ensembles(scores)
    if scores is not None and not usable:
        raise UserError("none of the scores has two parts: give other scores, or none to use composed ones")
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(
        folder, usable, list(instruments), list(weights), drums, seconds, takes, seed, register_shift, twins, chamber
    )
    missing = [i for i in range(n_segments) if not segment_path(folder, i).exists()]
    done = n_segments - len(missing)
    with contextlib.ExitStack() as stack:
        if cluster is not None:
            finished = _render_on_cluster(job, missing, stack.enter_context(connect(cluster)))
        elif workers > 1 and len(missing) > 1:
            # Spawned and not forked: the caller may have torch's threads running, and a fork would copy their locks.
            context = multiprocessing.get_context("spawn")
            pool = context.Pool(min(workers, len(missing)), _start_worker, (job,))
            stack.callback(pool.join)
            stack.callback(pool.terminate)
            finished = pool.imap_unordered(_render_in_worker, missing)
        else:
            finished = (_save(job, i) for i in missing)
        for _ in finished:
            done += 1
            if progress is not None:
                progress(done, n_segments)
    return len(missing)


def segment_path(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.npz"


_worker_job: Job | None = None


def _start_worker(job: Job) -> None:
    global _worker_job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    _worker_job = job


def _render_in_worker(index: int) -> None:
    assert _worker_job is not None
    _save(_worker_job, index)


@contextlib.contextmanager
def connect(cluster: str) -> Iterator:
    """A Dask client for as long as it is entered; UserError if Dask is not installed or nobody answers."""
    try:
        from distributed import Client
    except ModuleNotFoundError as error:
        raise UserError('--cluster needs Dask: pip install "realtime-mpe[cluster]"') from error
    try:
        client = Client(cluster, timeout=CLUSTER_TIMEOUT)
    except (OSError, ValueError, TimeoutError) as error:
        raise UserError(f"no Dask scheduler answers at {cluster!r}; start one with dask scheduler") from error
    with client:
        yield client


def _render_on_cluster(job: Job, missing: list[int], client) -> Iterator[None]:
    """Segments come back as arrays and are saved here, so the workers need no common disk."""
    from distributed import as_completed

    shared = client.scatter(job, broadcast=True)
    waiting = iter(missing)
    # A few a worker: finished segments of all of them at once would fill the workers' memory.
    ahead = IN_FLIGHT * max(1, len(client.scheduler_info(n_workers=-1)["workers"]))
    first = [client.submit(make_segment, shared, i, key=_key(job, i)) for i in itertools.islice(waiting, ahead)]
    running = as_completed(first, with_results=True)
    for future, arrays in running:
        _write(job, int(future.key.rpartition("-")[2]), arrays)
        for i in itertools.islice(waiting, 1):
            running.add(client.submit(make_segment, shared, i, key=_key(job, i)))
        yield


def _key(job: Job, index: int) -> str:
    return f"segment-{job.seed}-{id(job)}-{index}"


def _save(job: Job, index: int) -> None:
    _write(job, index, make_segment(job, index))


def _write(job: Job, index: int, arrays: dict[str, np.ndarray]) -> None:
    temporary = job.out_dir / f".{index:05d}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, segment_path(job.out_dir, index))
    finally:
        temporary.unlink(missing_ok=True)


def make_segment(job: Job, index: int) -> dict[str, np.ndarray]:
    """The arrays of one segment file (see the module), from scratch."""
    rng = np.random.default_rng([job.seed, index])
    n_samples = int(round(job.seconds * SAMPLERATE))
    for _ in range(MAX_DRAWS):  # an excerpt may leave too little within the instruments' ranges: then draw another
        score = choose_excerpt(job.scores, job.seconds, rng)
        stems = (_render_chamber if job.chamber else _render_parts)(job, score, n_samples, rng)
        if len({part for part, *_ in stems}) >= 2:
            break
    else:
        raise UserError("the instruments play next to nothing of the scores: give instruments with a wider range")
    if job.drums is not None and score.drums:
        noise = job.drums.render(score.drums, n_samples, rng)
        if np.any(noise):
            stems.append((-1, job.drums.name, noise, np.zeros((0, 4))))
    rows = [np.column_stack([np.full(len(notes), k), notes]) for k, (_, _, _, notes) in enumerate(stems)]
    return {
        "audio": np.round(np.stack([audio for _, _, audio, _ in stems]) * 32767).astype(np.int16),
        "notes": np.concatenate(rows).astype(np.float32),
        "part": np.array([part for part, *_ in stems], np.int16),
        "instrument": np.array([name for _, name, *_ in stems]),
        "score": np.array(score.name),
    }


def ensembles(scores: Sequence[Score] | None) -> list[Score]:
    """Those of two parts at least; nothing of None."""
    return [s for s in scores or () if len(s.parts) >= 2]


def choose_excerpt(scores: Sequence[Score], seconds: float, rng: np.random.Generator) -> Score:
    """2..6 parts of ``seconds``, from one of ``scores``, which are `ensembles`, where there is one that fits; else, and
    now and then anyway, from a composed one."""
    excerpt = None
    if scores and rng.random() >= COMPOSED_SHARE:
        weights = ENSEMBLE_WEIGHT ** np.array([min(len(s.parts), 4) - 2.0 for s in scores])
        for _ in range(20):
            choice = int(rng.choice(len(scores), p=weights / weights.sum()))
            excerpt = segment(scores[choice], seconds, rng)
            if excerpt is not None:
                break
    if excerpt is None:
        composed = compose(int(rng.integers(2**31)))
        start = float(rng.uniform(0, max(composed.duration - seconds, 0.0)))
        excerpt = segment(composed, seconds, rng) or cut(composed, start, seconds)
    parts = excerpt.parts
    if len(parts) > MAX_PARTS:
        chosen = sorted(rng.choice(len(parts), MAX_PARTS, replace=False))
        parts = [parts[i] for i in chosen]
    return Score(excerpt.name, parts, excerpt.drums)


def _render_parts(job: Job, score: Score, n_samples: int, rng: np.random.Generator) -> list[Stem]:
    """Every part by an instrument of any kind, every take."""
    chords = [is_polyphonic(p.notes) for p in score.parts]
    reduced = [c and rng.random() < LINE_PROBABILITY for c in chords]
    lines = [str(rng.choice(LINES)) for _ in score.parts]
    shifts = [0] * len(score.parts)
    alike = SAME_INSTRUMENT_PROBABILITY
    with_twins = job.twins > 0 and rng.random() < job.twins
    if with_twins or rng.random() < ENSEMBLE_PROBABILITY:
        cast = draw_family([i.name for i in job.instruments], rng)
        job = replace(job, instruments=[job.instruments[k] for k in cast], weights=[job.weights[k] for k in cast])
        alike = 1.0 if with_twins else SAME_IN_ENSEMBLE_PROBABILITY
    elif job.register_shift:
        shifts = [int(rng.choice([-12, 12])) if rng.random() < SHIFT_PROBABILITY else 0 for _ in score.parts]
    twins = set()
    if len(score.parts) >= 2 and rng.random() < alike:
        twins = set(rng.choice(len(score.parts), 2, replace=False).tolist())
    room = Room(rng) if rng.random() < ROOM_PROBABILITY else None
    stems: list[Stem] = []
    for _take in range(job.takes):
        used: set[str] = set()
        twin_instrument: Instrument | None = None
        for number, part in enumerate(score.parts):
            polyphonic = chords[number] and not reduced[number]
            taken = used | {name for p, name, *_ in stems if p == number}
            instrument = twin_instrument if number in twins else None
            if instrument is None:
                instrument = _choose_instrument(job, part.notes, shifts[number], polyphonic, taken, rng)
            if number in twins:
                twin_instrument = instrument
            used.add(instrument.name)
            notes = part.notes
            if chords[number] and (reduced[number] or not instrument.polyphonic):
                notes = split_voices(notes, lines[number])
            effects = EFFECTS_PROBABILITY
            stems += _play(number, instrument, notes, shifts[number], room, effects, job.seconds, n_samples, rng)
    return stems


def _render_chamber(job: Job, score: Score, n_samples: int, rng: np.random.Generator) -> list[Stem]:
    """As `_render_parts`; nothing if there are no soloists among the instruments."""
    lines = [
        split_voices(part.notes, str(rng.choice(LINES))) if is_polyphonic(part.notes) else part.notes
        for part in score.parts
    ]
    cast = cast_chamber(job.instruments, lines, rng)
    room = Room(rng) if rng.random() < ROOM_PROBABILITY else None
    stems: list[Stem] = []
    for _take in range(job.takes):
        seated: list[Instrument] = []
        for number, (notes, able) in enumerate(zip(lines, cast, strict=True)):
            if not able:
                continue
            alike = [i for i in seated if i in able]
            others = [i for i in able if i not in alike]
            if alike and (not others or rng.random() < SAME_SOUND_PROBABILITY):
                instrument = alike[-1]
            else:
                instrument = others[int(rng.integers(len(others)))]
            seated.append(instrument)
            stems += _play(number, instrument, notes, 0, room, 0.0, job.seconds, n_samples, rng)
    return stems


def _play(
    number: int,
    instrument: Instrument,
    notes: np.ndarray,
    shift: int,
    room: Room | None,
    effects: float,
    seconds: float,
    n_samples: int,
    rng: np.random.Generator,
) -> list[Stem]:
    """The stem of one part, or nothing if the instrument plays nothing of it. effects : their probability."""
    notes = cut_repeats(_inside(humanise(_into_range(notes, instrument, shift), rng), seconds))
    audio, sounded = instrument.render(notes, n_samples, rng)
    if not len(sounded):
        return []
    if rng.random() < effects:
        audio = apply_effects(audio, rng)
    if room is not None:
        audio = _seat(room, rng)(audio)
    labels = _labels(sounded, seconds)
    return [(number, instrument.name, at_level(audio[:n_samples], sounded), labels)] if len(labels) else []


def _choose_instrument(
    job: Job, notes: np.ndarray, shift: int, polyphonic: bool, taken: set[str], rng: np.random.Generator
) -> Instrument:
    """One that plays chords if `polyphonic`, is not `taken` and reaches most of the part, as far as there is one."""
    pitches = np.clip(notes[:, 2] + shift, FIRST_MIDI, LAST_MIDI)
    pool = [k for k, i in enumerate(job.instruments) if i.name not in taken] or list(range(len(job.instruments)))
    if polyphonic:
        pool = [k for k in pool if job.instruments[k].polyphonic] or pool
    weights = np.array([job.weights[k] for k in pool])
    # Of three draws the one that fits best: keeps basses off the treble without excluding any instrument.
    picks = [job.instruments[int(k)] for k in rng.choice(pool, 3, p=weights / weights.sum())]
    return min(picks, key=lambda i: out_of_reach(i, pitches))


def _into_range(notes: np.ndarray, instrument: Instrument, shift: int) -> np.ndarray:
    """The part moved by `shift` and then by the octaves that bring most of it into the instrument's range.

    What is still outside is left out. The nearest of equally good octaves wins.
    """
    low, high = max(instrument.low, FIRST_MIDI), min(instrument.high, LAST_MIDI)
    octaves = sorted(range(-48, 49, 12), key=abs)
    fits = [np.sum((notes[:, 2] + shift + o >= low) & (notes[:, 2] + shift + o <= high)) for o in octaves]
    moved = notes.copy()
    moved[:, 2] += shift + octaves[int(np.argmax(fits))]
    return moved[(moved[:, 2] >= low) & (moved[:, 2] <= high)]


def _inside(notes: np.ndarray, seconds: float) -> np.ndarray:
    notes = notes.copy()
    notes[:, 1] = np.minimum(notes[:, 1], seconds)
    return as_notes(notes[notes[:, 1] - notes[:, 0] > 0.02])


def _labels(sounded: np.ndarray, seconds: float) -> np.ndarray:
    """Labels inside the segment and the 72 pitches; instruments were asked for nothing else, but may be careless."""
    labels = _inside(sounded, seconds)
    return labels[(labels[:, 2] >= FIRST_MIDI) & (labels[:, 2] <= LAST_MIDI)]


def _seat(room: Room, rng: np.random.Generator) -> Room:
    """The same room heard from another seat: other distance, other places of the reflections, same decay."""
    seat = copy.copy(room)
    response = room.impulse_response
    stretch = rng.uniform(0.93, 1.07)
    moved = np.interp(np.arange(len(response)) * stretch, np.arange(len(response)), response, right=0.0)
    moved[1:] *= 10 ** (rng.uniform(-3, 3) / 20)
    moved[1] = response[1]  # what interpolation smears of the direct sound into its neighbour
    seat.impulse_response = moved.astype(np.float32)
    return seat
