"""The figures by which transcriptions are judged, as pure functions on arrays. This docstring specifies them.

Words. *Notes* are rows of (onset s, offset s, MIDI number); emitted notes have two more columns, *voice* (integer) and
*emitted* (second of input at which the note-on left the engine). The truth is a list of stems, each the notes of one
player. A *roll* is a (N_PITCHES, n_frames) bool array on the grid of `realtime_mpe.analysis`: row 0 is FIRST_MIDI,
frame i is centred on i * FRAME_SECONDS. A frame is on when its centre lies in [onset, offset); a note too short to hold
a centre switches on the frame nearest its onset. True notes outside the pitch range, or that begin after the last
frame, are left out. Rates are micro-averaged: counts are pooled over all files before anything is divided.

What sounds
    mix_AP       Average precision of the mixture's probabilities over all (pitch, frame) cells: the sum over the
                 distinct scores of (R_n - R_(n-1)) * P_n, without interpolation. A score of 0 is "not predicted".
    mix_F1, mix_P, mix_R
                 Cells of the roll of all emitted notes against cells of the roll of all true notes.
    note_F1      Emitted against true notes: the same MIDI number and onsets at most 50 ms apart, offsets ignored, one
                 to one and as many pairs as possible (`mir_eval.transcription.match_notes`).
When it is known (the live figures)
    event_F1     The same count with *emitted* in place of the emitted note's onset, within -50 ms .. +200 ms of the
                 true onset. Per pitch and in the order of emission, each note takes the nearest true onset still free.
    lat_med, lat_p90, lat_bass
                 ms from true onset to emission over those pairs: median, 90th percentile, and median below MIDI 48.
                 None where there is no pair.
Who plays (for any split of the emitted notes into voices)
    stem_F1_strict
                 Over the whole file, voices are assigned to stems one to one so that the sum of the pairs' F1,
                 2 * both / (stem + voice) in cells, is largest (Hungarian method). Cells of a stem that its voice does
                 not play are missed; cells of a voice that its stem does not play are surplus, and so is *all* that the
                 leftover voices play; leftover stems are missed. Nothing is matched anew within a file: that would
                 forgive every change of identity.
    home         Of the true notes whose pitch any voice plays while they sound, the share whose voice (the one that
                 plays longest in their frames) is the commonest of their stem. 0..1
    switch       Of the consecutive pairs among those true notes of a stem that note_F1 matched, the share whose voice
                 changes. 0..1
    count_exact, count_near
                 Share of files in which the voices with at least 5 % of the emitted notes are as many as the stems, or
                 at most one more or less. 0..1
Splits of the same emitted notes, to be printed beside the model's own voices; K is the true number of stems
    pitch rank   A note's voice is how many higher notes sound two frames after its onset, at most K - 1. No timbre, and
                 live: the two frames are what a note needs to be found, and let the rest of a chord arrive.
    pitch bands  K-means on the MIDI numbers of the file's notes.
    random       One of K voices, evenly.
    one voice    All notes in one voice.
    ceiling      An oracle: each note goes to the stem that sounds at its pitch in most of its frames. What is missing
                 to 100 was lost in what sounds, not in who plays.
    A model at or below "pitch rank" and "pitch bands" separates nothing; "random" shows what chance is worth.

Units: F1, P, R and AP are 0..1 in functions and properties, and 0..100 in the dicts of `figures`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from mir_eval.transcription import match_notes
from mir_eval.util import midi_to_hz
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment

from realtime_mpe.analysis import FIRST_MIDI, FRAME_SECONDS, N_PITCHES
from realtime_mpe.latency import event_latencies

ONSET_TOLERANCE = 0.05  # s, either side: the field's usual 50 ms
BASS_BELOW = 48  # MIDI number: below it the front end's kernels are at their longest
COUNTED_SHARE = 0.05  # of the notes; a voice with less is a slip, not a player
RANK_DELAY = 2 * FRAME_SECONDS  # at the onset itself a chord is half there, and the baseline would be made of straw
MODEL = "model"  # name of the model's own voices among the splits


@dataclass(frozen=True)
class Counts:
    """How many items are in truth and estimate (`right`), only in the estimate (`surplus`), only true (`missed`)."""

    right: int = 0
    surplus: int = 0
    missed: int = 0

    @classmethod
    def of(cls, right: int, n_ref: int, n_est: int) -> "Counts":
        return cls(int(right), int(n_est - right), int(n_ref - right))

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.right + other.right, self.surplus + other.surplus, self.missed + other.missed)

    @property
    def f1(self) -> float:
        return share(2 * self.right, 2 * self.right + self.surplus + self.missed)

    @property
    def precision(self) -> float:
        return share(self.right, self.right + self.surplus)

    @property
    def recall(self) -> float:
        return share(self.right, self.right + self.missed)


def share(part: float, whole: float) -> float:
    """part / whole, and 0 of nothing."""
    return float(part / whole) if whole else 0.0


# What sounds


def note_frames(onset: ArrayLike, offset: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """First and end frame of notes, int64, from seconds; at least one frame, and not yet cut to any file's length."""
    onset, offset = np.asarray(onset) / FRAME_SECONDS, np.asarray(offset) / FRAME_SECONDS
    first, end = (np.ceil(place - 1e-9).astype(np.int64) for place in (onset, offset))
    nearest = np.round(onset).astype(np.int64)
    empty = end <= first
    return np.where(empty, nearest, first)[()], np.where(empty, nearest + 1, end)[()]


def notes_to_roll(notes: np.ndarray, n_frames: int) -> np.ndarray:
    """Rows (onset s, offset s, MIDI, ...) -> (N_PITCHES, n_frames) bool; notes outside the pitch range are left out."""
    roll = np.zeros((N_PITCHES, n_frames), bool)
    for onset, offset, midi in _columns(notes, 3)[:, :3]:
        pitch = int(round(midi)) - FIRST_MIDI
        first, end = note_frames(onset, offset)
        if 0 <= pitch < N_PITCHES:
            roll[pitch, max(first, 0) : max(end, 0)] = True
    return roll


def frame_counts(ref_roll: np.ndarray, est_roll: np.ndarray) -> Counts:
    """Cells of two bool rolls of one shape."""
    return Counts.of(np.count_nonzero(ref_roll & est_roll), np.count_nonzero(ref_roll), np.count_nonzero(est_roll))


def frame_f1(ref_rolls: Sequence[np.ndarray], est_rolls: Sequence[np.ndarray]) -> float:
    """F1 0..1 of the cells of all files pooled; one bool roll a file."""
    return sum((frame_counts(*pair) for pair in zip(ref_rolls, est_rolls, strict=True)), Counts()).f1


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """AP 0..1 of scores >= 0 against a bool array of the same shape; 0 where nothing is true."""
    order = np.argsort(-scores, axis=None, kind="stable")
    sorted_scores, hits = scores.ravel()[order], np.cumsum(truth.ravel()[order])
    if not len(hits) or not hits[-1]:
        return 0.0
    # Cells of one score cannot be told apart, so precision is read where each distinct score ends.
    ends = np.flatnonzero(np.append(sorted_scores[1:] != sorted_scores[:-1], True) & (sorted_scores > 0))
    recall_steps = np.diff(hits[ends], prepend=0) / hits[-1]
    return float(np.sum(recall_steps * hits[ends] / (ends + 1)))


def matched_notes(ref_notes: np.ndarray, est_notes: np.ndarray) -> dict[int, int]:
    """Index of a true note -> index of the emitted note that it is matched with (50 ms, offsets ignored)."""
    if not len(ref_notes) or not len(est_notes):
        return {}
    pairs = match_notes(
        ref_notes[:, :2],
        midi_to_hz(ref_notes[:, 2]),
        est_notes[:, :2],
        midi_to_hz(est_notes[:, 2]),
        onset_tolerance=ONSET_TOLERANCE,
        offset_ratio=None,
    )
    return {int(ref): int(est) for ref, est in pairs}


def note_counts(ref_notes: np.ndarray, est_notes: np.ndarray) -> Counts:
    return Counts.of(len(matched_notes(ref_notes, est_notes)), len(ref_notes), len(est_notes))


def note_f1(ref_notes: Sequence[np.ndarray], est_notes: Sequence[np.ndarray]) -> float:
    """F1 0..1 of the notes of all files pooled; one (N, >= 3) array a file."""
    return sum((note_counts(*pair) for pair in zip(ref_notes, est_notes, strict=True)), Counts()).f1


# Who plays


def match_voices(stem_rolls: Sequence[np.ndarray], voice_rolls: Sequence[np.ndarray]) -> dict[int, int]:
    """Stem -> voice, one to one over the whole file, so that the sum of the pairs' F1 is largest."""
    f1 = np.array([[frame_counts(stem, voice).f1 for voice in voice_rolls] for stem in stem_rolls])
    if not f1.size:
        return {}
    return {int(stem): int(voice) for stem, voice in zip(*linear_sum_assignment(-f1), strict=True)}


def strict_counts(stem_rolls: Sequence[np.ndarray], voice_rolls: Sequence[np.ndarray]) -> Counts:
    """Cells over matched stems and voices; all that leftover voices play is surplus, all leftover stems are missed."""
    matches = match_voices(stem_rolls, voice_rolls)
    right = sum(np.count_nonzero(stem_rolls[stem] & voice_rolls[voice]) for stem, voice in matches.items())
    return Counts.of(right, *(sum(map(np.count_nonzero, rolls)) for rolls in (stem_rolls, voice_rolls)))


def home_counts(stems: Sequence[np.ndarray], voice_rolls: Sequence[np.ndarray]) -> tuple[int, int]:
    """(true notes in the commonest voice of their stem, true notes that any voice plays)."""
    rolls = np.stack(voice_rolls) if len(voice_rolls) else np.zeros((1, N_PITCHES, 0), bool)
    at_home = played = 0
    for notes in stems:
        voices = []
        for onset, offset, midi in notes[:, :3]:
            first, end = note_frames(onset, offset)
            frames = rolls[:, int(midi) - FIRST_MIDI, max(first, 0) : max(end, 0)].sum(1)
            if frames.any():
                voices.append(int(np.argmax(frames)))
        if voices:
            at_home += int(np.bincount(voices).max())
            played += len(voices)
    return at_home, played


def switch_counts(stem: np.ndarray, onset: np.ndarray, voice: np.ndarray) -> tuple[int, int]:
    """(changes of voice, consecutive pairs) among matched true notes: stem, onset and emitted voice of each, (M,)."""
    changes = pairs = 0
    for player in np.unique(stem):
        own = np.flatnonzero(stem == player)
        line = voice[own[np.argsort(onset[own], kind="stable")]]
        changes += int(np.count_nonzero(line[1:] != line[:-1]))
        pairs += len(line) - 1
    return changes, pairs


def voices_counted(voice: np.ndarray) -> int:
    """How many voices hold at least COUNTED_SHARE of the notes; (N,) voice of each note."""
    notes_of_voice = np.unique(voice, return_counts=True)[1]
    return int(np.count_nonzero(notes_of_voice >= COUNTED_SHARE * len(voice)))


# Splits: (N, 5) emitted notes and the stems' rolls -> (N,) voices


def pitch_rank(notes: np.ndarray, stem_rolls: Sequence[np.ndarray]) -> np.ndarray:
    onset, offset, midi = notes[:, 0], notes[:, 1], notes[:, 2]
    above = [
        np.count_nonzero((onset <= moment) & (offset > moment) & (midi > own))
        for moment, own in zip(onset + RANK_DELAY, midi, strict=True)
    ]
    return np.minimum(np.array(above, int), len(stem_rolls) - 1)


def pitch_bands(notes: np.ndarray, stem_rolls: Sequence[np.ndarray]) -> np.ndarray:
    midi = notes[:, 2]
    if not len(midi):
        return np.zeros(0, int)
    n_bands = len(stem_rolls)
    centres = np.quantile(midi, (np.arange(n_bands) + 0.5) / n_bands)
    while True:  # each turn lowers the squared distance, so it ends
        band = np.argmin(np.abs(midi[:, None] - centres), axis=1)
        moved = np.array([midi[band == k].mean() if (band == k).any() else centres[k] for k in range(n_bands)])
        if np.array_equal(moved, centres):
            return band
        centres = moved


def random_voices(notes: np.ndarray, stem_rolls: Sequence[np.ndarray]) -> np.ndarray:
    return np.random.default_rng(0).integers(len(stem_rolls), size=len(notes))  # seeded: a figure must not flicker


def one_voice(notes: np.ndarray, stem_rolls: Sequence[np.ndarray]) -> np.ndarray:
    return np.zeros(len(notes), int)


def ceiling(notes: np.ndarray, stem_rolls: Sequence[np.ndarray]) -> np.ndarray:
    rolls = np.stack(stem_rolls)
    best = np.zeros(len(notes), int)  # a note that nobody plays is wrong in any voice
    for n, (onset, offset, midi) in enumerate(notes[:, :3]):
        first, end = note_frames(onset, offset)
        best[n] = np.argmax(rolls[:, int(midi) - FIRST_MIDI, max(first, 0) : max(end, 0)].sum(1))
    return best


SPLITS: Mapping[str, Callable[[np.ndarray, Sequence[np.ndarray]], np.ndarray]] = {
    "pitch rank": pitch_rank,
    "pitch bands": pitch_bands,
    "random": random_voices,
    "one voice": one_voice,
    "ceiling": ceiling,
}


# All of it


@dataclass(frozen=True)
class SplitScore:
    """One file's counts for one way of giving the emitted notes to voices; home and switch are (part, whole)."""

    frames: Counts
    home: tuple[int, int]
    switch: tuple[int, int]
    voices: int


@dataclass(frozen=True)
class FileScore:
    """Everything one file gives to the pooled figures.

    players : stems.  probabilities, truth : (N_PITCHES, T) float and bool.  latencies : (M, 2), see `event_latencies`.
    splits : by name, MODEL first.
    """

    players: int
    probabilities: np.ndarray
    truth: np.ndarray
    frames: Counts
    notes: Counts
    events: Counts
    latencies: np.ndarray
    splits: dict[str, SplitScore]


def score_file(stems: Sequence[np.ndarray], mix: np.ndarray, notes: np.ndarray) -> FileScore:
    """One transcription against its truth.

    stems : at least one, (n, 3) each, n > 0.  mix : (N_PITCHES, T) probabilities.  notes : (N, 5) as emitted.
    ValueError if a shape is another.
    """
    if mix.ndim != 2 or len(mix) != N_PITCHES:
        raise ValueError(f"mix has the shape {mix.shape}, not ({N_PITCHES}, T)")
    if not stems:
        raise ValueError("there is no stem to score against")
    n_frames = mix.shape[1]
    notes = _columns(notes, 5)
    if len(on_grid(notes, np.inf)) < len(notes):
        raise ValueError(f"a note lies outside MIDI {FIRST_MIDI}..{FIRST_MIDI + N_PITCHES - 1}")
    stem_rolls = [notes_to_roll(stem, n_frames) for stem in stems]
    truth = np.any(stem_rolls, axis=0)
    stems = [on_grid(_columns(stem, 3)[:, :3], n_frames) for stem in stems]
    ref = np.concatenate(stems)
    player = np.repeat(np.arange(len(stems)), [len(stem) for stem in stems])
    matches = matched_notes(ref, notes)
    matched_ref, matched_est = np.array(list(matches.items()), int).reshape(-1, 2).T
    latencies = event_latencies(ref[:, [0, 2]], notes[:, [4, 2]])

    def score_split(voice: np.ndarray) -> SplitScore:
        voice_rolls = [notes_to_roll(notes[voice == v], n_frames) for v in np.unique(voice)]
        return SplitScore(
            frames=strict_counts(stem_rolls, voice_rolls),
            home=home_counts(stems, voice_rolls),
            switch=switch_counts(player[matched_ref], ref[matched_ref, 0], voice[matched_est]),
            voices=voices_counted(voice),
        )

    return FileScore(
        players=len(stems),
        probabilities=np.nan_to_num(mix),
        truth=truth,
        frames=frame_counts(truth, notes_to_roll(notes, n_frames)),
        notes=Counts.of(len(matches), len(ref), len(notes)),
        events=Counts.of(len(latencies), len(ref), len(notes)),
        latencies=latencies,
        splits={
            MODEL: score_split(notes[:, 3].astype(int)),
            **{name: score_split(split(notes, stem_rolls)) for name, split in SPLITS.items()},
        },
    )


def figures(scores: Sequence[FileScore]) -> dict:
    """All files pooled: the specification's figures by name, and under "splits" a dict of them a split."""
    if not scores:
        raise ValueError("there is no file to pool")
    frames, notes, events = (
        sum((getattr(s, kind) for s in scores), Counts()) for kind in ("frames", "notes", "events")
    )
    splits = {name: _split_figures([s.splits[name] for s in scores]) for name in scores[0].splits}
    beside = np.array([s.splits[MODEL].voices - s.players for s in scores])
    midi, latency = np.concatenate([s.latencies for s in scores]).T
    return {
        "mix_AP": 100 * average_precision(*(_pool(scores, kind) for kind in ("probabilities", "truth"))),
        "mix_F1": 100 * frames.f1,
        "mix_P": 100 * frames.precision,
        "mix_R": 100 * frames.recall,
        "note_F1": 100 * notes.f1,
        "event_F1": 100 * events.f1,
        "lat_med": _milliseconds(latency, 50),
        "lat_p90": _milliseconds(latency, 90),
        "lat_bass": _milliseconds(latency[midi < BASS_BELOW], 50),
        **splits.pop(MODEL),
        "count_exact": float(np.mean(beside == 0)),
        "count_near": float(np.mean(np.abs(beside) <= 1)),
        "splits": splits,
    }


def _split_figures(scores: Sequence[SplitScore]) -> dict[str, float]:
    home, switch = (np.sum([getattr(s, kind) for s in scores], axis=0) for kind in ("home", "switch"))
    return {
        "stem_F1_strict": 100 * sum((s.frames for s in scores), Counts()).f1,
        "home": share(*home),
        "switch": share(*switch),
    }


def _milliseconds(latencies: np.ndarray, percentile: float) -> float | None:
    return 1000 * float(np.percentile(latencies, percentile)) if len(latencies) else None


def _pool(scores: Sequence[FileScore], kind: str) -> np.ndarray:
    return np.concatenate([getattr(s, kind).ravel() for s in scores])


def _columns(notes: np.ndarray, least: int) -> np.ndarray:
    """Notes as a float array of at least so many columns, also when there are none; ValueError if it has fewer."""
    notes = np.asarray(notes, float)
    if not notes.size:
        return np.zeros((0, least))
    if notes.ndim != 2 or notes.shape[1] < least:
        raise ValueError(f"notes have the shape {notes.shape}, not (N, {least})")
    return notes


def on_grid(notes: np.ndarray, n_frames: float) -> np.ndarray:
    """The notes a transcription of so many frames could have found."""
    pitch = np.round(notes[:, 2]) - FIRST_MIDI
    return notes[(pitch >= 0) & (pitch < N_PITCHES) & (notes[:, 0] < n_frames * FRAME_SECONDS)]
