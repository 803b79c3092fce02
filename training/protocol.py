"""The evaluation of the slot-attention paper (arXiv 2606.01460, section V-B), as pure functions on arrays.

This docstring specifies the figures. `metrics` has the live ones, of what was sent and when; its words for notes, rolls
and true notes outside the range hold here too. A *map* is a (N_PITCHES, T) float array of probabilities; a model gives
one of the mixture and K *slots*, in no particular order. The truth of a file is its *sources*: at the level "stem" each
stem is one; at the level "family" all stems of a family are merged into one. Stems without a note are no sources.

Thresholds
    A cell is on where its probability is >= the threshold. One threshold holds for the mixture and one for the slots of
    a level; each is the value of GRID with the best F1 of all validation files pooled, and is then fixed. Without
    validation files it comes from the model file, to the nearest step of GRID, or else from the test files themselves:
    an oracle, to be labelled so.
What sounds
    AP, F1, P, R Of the mixture's cells, all files pooled. AP as `metrics` has it, but that scores are first sorted into
                 bins of 1 / LOGIT_STEPS in their logit, whose cells count as ties: that costs less than 0.02 points.
    polyphony    Share of frames in which as many pitches are on as truly sound. For a polyphony head: in which its
                 likeliest class is that number, where the last class means "or more".
    note F1      As in `metrics`, of the notes that were sent; of a model that sends none, of every run of at least
                 MIN_NOTE_FRAMES frames in the thresholded mixture.
Who plays (at either level)
    matching     Slots and sources of a file are paired one to one by the Hungarian method on the mean binary
                 cross-entropy over the whole file, probabilities clipped to CLIP .. 1 - CLIP. A slot is never matched
                 anew within a file.
    AP, F1, P, R Of the cells of matched slots. Sources left over are missed, slots left over are not looked at.
    strict       The same, and whatever the slots left over play is wrong. Their thresholds are those of the slots.
    polyphony    Share of the frames of all matched slots in which the slot has as many pitches on as its source.
    home, switch Every true note belongs to the slot with the most probability in the note's cells, if any has some.
                 home: share of the notes in the commonest slot of their source. switch: of the consecutive notes of a
                 source, the share that change slot. Both 0..1, without a threshold.
    timbre       Mean cosine of a matched slot's timbre embedding (mean of the windows in which its source sounds) and
                 the teacher's of the isolated source; every embedding is brought to length 1 before a mean is taken.
Splits of the model's own mixture map, to be printed beside its slots; K is the true number of sources of the level
    pitch rank   In every frame the k-th highest pitch that is on goes to slot k, at most K - 1. No timbre.
    pitch bands  K-means of the pitches that are on, over the whole file.
    random       Each run of a pitch that is on goes to one of K slots, evenly.
    one slot     The whole map, not thresholded, in one slot.
    ceiling      An oracle: each cell of the map, not thresholded, goes to all sources that truly play there, else to
                 the first. What is missing to 100 was lost in what sounds.
    "On" is by the mixture's threshold, so maps of the first three are 0 below it. Their slot threshold is chosen as the
    model's is; where that comes from the model file, theirs is the mixture's. Slots that do not beat pitch rank in F1,
    matched and strict, separate nothing.

Units: AP, F1, P, R and polyphony are 0..1 in functions and properties, and 0..100 in the dicts of `*_figures`.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import Self

import numpy as np
from scipy.optimize import linear_sum_assignment

from realtime_mpe.analysis import FIRST_MIDI, FRAME_SECONDS, N_PITCHES

from .metrics import Counts, notes_to_roll, on_grid, share

GRID = np.round(np.arange(0.005, 1.0, 0.005), 3).astype(np.float32)  # thresholds that are tried
LOGIT_STEPS = 512  # bins a unit of logit
LOGIT_RANGE = -30, 17  # float32 has nothing between logit 16.6 and 1, and what is below 1e-13 is as good as 0
CLIP = 1e-6
MIN_NOTE_FRAMES = 2  # a run of one frame is a flicker more often than a note
LEVELS = ("stem", "family")
MODEL, RANK = "model", "rank"


class Pooled:
    """Counts of one file; the sum of two is that of both files together. For dataclasses whose fields can be added."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def pool(scores: Sequence[Pooled]) -> Pooled:
    """Of at least one file."""
    return reduce(add, scores)


# Cells by their score


def score_bins(scores: np.ndarray) -> np.ndarray:
    """Bin of every score in 0..1, rising with it. Steps lie evenly in the logit, fine where models are sure, and one
    more lies at each value of GRID, so that what is >= a threshold can be counted exactly."""
    scores = np.asarray(scores, np.float32)
    with np.errstate(divide="ignore"):
        logit = np.clip(np.log(scores) - np.log1p(-scores), *LOGIT_RANGE)
    return ((logit - LOGIT_RANGE[0]) * LOGIT_STEPS).astype(int) + np.searchsorted(GRID, scores, "right")


N_SCORE_BINS = (LOGIT_RANGE[1] - LOGIT_RANGE[0]) * LOGIT_STEPS + 1 + len(GRID)
GRID_BINS = score_bins(GRID)


@dataclass(frozen=True)
class Curve(Pooled):
    """All that precision and recall need of any number of cells, in 400 kB.

    hits, cells : (N_SCORE_BINS,) how many cells of each bin are true, and are there; cells of score 0 are in none.
    true : true cells, of any score.
    """

    hits: np.ndarray
    cells: np.ndarray
    true: int

    @classmethod
    def of(cls, scores: np.ndarray, truth: np.ndarray) -> Self:
        """Scores 0..1 and a bool array of one shape."""
        found = scores > 0
        bins = score_bins(scores[found])
        count = [np.bincount(b, minlength=N_SCORE_BINS) for b in (bins[truth[found]], bins)]
        return cls(*count, int(np.count_nonzero(truth)))

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Recall and precision 0..1 at every score that occurs, from the highest."""
        used = np.flatnonzero(self.cells)[::-1]
        hits, cells = np.cumsum(self.hits[used]), np.cumsum(self.cells[used])
        return hits / max(self.true, 1), hits / np.maximum(cells, 1)

    @property
    def average_precision(self) -> float:
        recall, precision = self.points()
        return float(np.sum(np.diff(recall, prepend=0.0) * precision))

    def counts(self, threshold: float) -> Counts:
        """At the threshold of GRID that is nearest."""
        first = GRID_BINS[nearest(threshold)]
        return Counts.of(self.hits[first:].sum(), self.true, self.cells[first:].sum())

    def best_threshold(self) -> float:
        """Of the best F1; the lowest of equals."""
        hits, cells = (np.cumsum(n[::-1])[::-1][GRID_BINS] for n in (self.hits, self.cells))
        return round(float(GRID[np.argmax(2 * hits / np.maximum(cells + self.true, 1))]), 3)


def nearest(threshold: float) -> int:
    """Index into GRID."""
    return int(np.argmin(np.abs(GRID - threshold)))


def right_polyphony(probabilities: np.ndarray, polyphony: np.ndarray) -> np.ndarray:
    """Frames in which as many pitches are on as polyphony (T,) says, for each threshold: (len(GRID),)."""
    ranked = np.sort(probabilities, axis=0)[::-1]
    end = np.full((1, ranked.shape[1]), np.inf)
    ranked = np.concatenate([end, ranked, -end])
    frames = np.arange(ranked.shape[1])
    # n pitches are on just for thresholds above the (n + 1)-th probability and up to the n-th.
    above, up_to = (np.searchsorted(GRID, ranked[polyphony + n, frames], "right") for n in (1, 0))
    begun, ended = (np.bincount(edge, minlength=len(GRID) + 1) for edge in (above, up_to))
    return np.cumsum(begun - ended)[: len(GRID)]


# What sounds


@dataclass(frozen=True)
class MixtureScore(Pooled):
    """right : see `right_polyphony`.  head_right, head_frames : frames that the polyphony head counted right, and all
    that it counted."""

    curve: Curve
    right: np.ndarray
    frames: int
    head_right: int
    head_frames: int


def score_mixture(mix: np.ndarray, truth: np.ndarray, head: np.ndarray | None = None) -> MixtureScore:
    """mix : map.  truth : (N_PITCHES, T) bool.  head : (T, classes) probabilities of a polyphony head."""
    polyphony = truth.sum(0)
    right = frames = 0
    if head is not None:
        right = np.count_nonzero(head.argmax(1) == np.minimum(polyphony, head.shape[1] - 1))
        frames = len(head)
    return MixtureScore(Curve.of(mix, truth), right_polyphony(mix, polyphony), mix.shape[1], right, frames)


def runs(row: np.ndarray) -> np.ndarray:
    """(T,) bool -> (n, 2) first and end frame of each run of True."""
    return np.flatnonzero(np.diff(np.pad(row.astype(np.int8), 1))).reshape(-1, 2)


def roll_to_notes(roll: np.ndarray) -> np.ndarray:
    """(N_PITCHES, T) bool -> (N, 3) onset s, offset s, MIDI number, of runs of at least MIN_NOTE_FRAMES."""
    notes = [
        (first * FRAME_SECONDS, end * FRAME_SECONDS, FIRST_MIDI + pitch)
        for pitch, row in enumerate(roll)
        for first, end in runs(row)
        if end - first >= MIN_NOTE_FRAMES
    ]
    return np.array(notes, float).reshape(-1, 3)


def mixture_figures(score: MixtureScore, threshold: float, notes: Counts) -> dict[str, float | None]:
    """mix_AP, mix_F1, mix_P, mix_R, mix_polyphony, head_polyphony (None without a head), note_F1, note_P, note_R."""
    head = 100 * share(score.head_right, score.head_frames) if score.head_frames else None
    return {
        "mix_AP": 100 * score.curve.average_precision,
        **_rates("mix", score.curve.counts(threshold)),
        "mix_polyphony": 100 * share(score.right[nearest(threshold)], score.frames),
        "head_polyphony": head,
        **_rates("note", notes),
    }


def _rates(name: str, counts: Counts) -> dict[str, float]:
    return {
        f"{name}_F1": 100 * counts.f1,
        f"{name}_P": 100 * counts.precision,
        f"{name}_R": 100 * counts.recall,
    }


# Who plays


@dataclass(frozen=True)
class Sources:
    """The truth of a file at one level. notes : S arrays (n, 3).  rolls : (S, N_PITCHES, T) bool.  members : of each
    source, which stems it was made of."""

    notes: tuple[np.ndarray, ...]
    rolls: np.ndarray
    members: tuple[tuple[int, ...], ...]


def sources(stems: Sequence[np.ndarray], families: Sequence[Hashable], level: str, n_frames: int) -> Sources:
    """stems : (n, 3) notes each.  families : of each stem.  level : of LEVELS."""
    groups: dict[Hashable, list[int]] = {}
    for k, (stem, family) in enumerate(zip(stems, families, strict=True)):
        if len(stem):
            groups.setdefault(k if level == "stem" else family, []).append(k)
    notes = tuple(on_grid(np.concatenate([stems[k][:, :3] for k in group]), n_frames) for group in groups.values())
    rolls = np.array([notes_to_roll(n, n_frames) for n in notes], bool).reshape(-1, N_PITCHES, n_frames)
    return Sources(notes, rolls, tuple(map(tuple, groups.values())))


def pair_slots(slots: np.ndarray, rolls: np.ndarray) -> dict[int, int]:
    """Slots (K, N_PITCHES, T) and true rolls (S, N_PITCHES, T) -> source: slot, of all that found a partner."""
    true_cells = [np.flatnonzero(roll) for roll in rolls]
    cost = np.zeros((len(rolls), len(slots)))
    for k, slot in enumerate(slots):
        p = np.clip(slot.ravel(), CLIP, 1 - CLIP)
        on, off = -np.log(p), -np.log1p(-p)
        silence = off.sum(dtype=float)
        for s, cells in enumerate(true_cells):
            cost[s, k] = (silence + (on[cells] - off[cells]).sum(dtype=float)) / p.size
    return {int(s): int(k) for s, k in zip(*linear_sum_assignment(cost), strict=True)}


def match_slots(slots: np.ndarray, rolls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """See `pair_slots` -> the slot of each source, 0 where it found none (S, N_PITCHES, T); the slots left over."""
    return divide(slots, pair_slots(slots, rolls), len(rolls))


def divide(slots: np.ndarray, pairs: Mapping[int, int], n_sources: int) -> tuple[np.ndarray, np.ndarray]:
    """See `match_slots`."""
    matched = np.zeros((n_sources, *slots.shape[1:]), np.float32)
    matched[list(pairs)] = slots[list(pairs.values())]
    return matched, slots[[k for k in range(len(slots)) if k not in pairs.values()]]


def best_threshold(maps: Sequence[np.ndarray], truths: Sequence[np.ndarray]) -> float:
    """For all files together; probabilities and bool arrays of one shape a file."""
    return pool([Curve.of(scores, truth) for scores, truth in zip(maps, truths, strict=True)]).best_threshold()


def stability(slots: np.ndarray, truth: Sources) -> tuple[np.ndarray, np.ndarray]:
    """home and switch, each (part, whole) in notes or pairs of notes."""
    home, switch = np.zeros(2, int), np.zeros(2, int)
    for notes in truth.notes:
        line = []
        for onset, offset, midi in notes[np.lexsort(notes.T[::-1])]:
            first = max(int(np.ceil(onset / FRAME_SECONDS - 1e-9)), 0)
            end = max(int(np.ceil(offset / FRAME_SECONDS)), first + 1)
            energy = slots[:, int(round(midi)) - FIRST_MIDI, first:end].sum(1)
            if energy.any():
                line.append(int(energy.argmax()))
        if line:
            home += np.bincount(line).max(), len(line)
            switch += np.count_nonzero(np.diff(line)), len(line) - 1
    return home, switch


@dataclass(frozen=True)
class SlotScore(Pooled):
    """One file, one level, one way to divide the mixture.

    matched, surplus : cells of matched slots, with sources left over, and of slots left over.  right : see
    `right_polyphony`, of matched slots, in so many frames.  home, switch : (part, whole).  cosine : sum of the cosines
    of so many matched pairs.  sources, files : how many.
    """

    matched: Curve
    surplus: Curve
    right: np.ndarray
    frames: int
    home: np.ndarray
    switch: np.ndarray
    cosine: float = 0.0
    cosines: int = 0
    sources: int = 0
    files: int = 1

    @property
    def strict(self) -> Curve:
        return self.matched + self.surplus


@dataclass(frozen=True)
class Timbre:
    """What a model and its teacher say of timbre. slots : (windows, K, E), of consecutive windows of `window` frames.
    stems : (stems, E) of isolated stems, NaN where there is none."""

    slots: np.ndarray
    window: int
    stems: np.ndarray

    def cosine(self, truth: Sources, source: int, slot: int) -> float | None:
        """None if one of both says nothing."""
        sounds = truth.rolls[source].any(0)
        windows = np.unique(np.flatnonzero(sounds) // self.window)
        have = mean_direction(self.slots[windows, slot])
        want = mean_direction(self.stems[list(truth.members[source])])
        return None if have is None or want is None else float(have @ want)


def mean_direction(embeddings: np.ndarray) -> np.ndarray | None:
    """(n, E) -> (E,) of length 1: the direction of the mean of their directions, without rows of NaN; None of none."""
    known = embeddings[~np.isnan(embeddings).any(1)]
    if not len(known):
        return None
    mean = (known / np.maximum(np.linalg.norm(known, axis=1, keepdims=True), 1e-12)).mean(0)
    return mean / max(float(np.linalg.norm(mean)), 1e-12)


def score_slots(slots: np.ndarray, truth: Sources, timbre: Timbre | None = None) -> SlotScore:
    """slots : (K, N_PITCHES, T)."""
    pairs = pair_slots(slots, truth.rolls)
    matched, left = divide(slots, pairs, len(truth.rolls))
    right, cosines = np.zeros(len(GRID), int), []
    for source, slot in pairs.items():
        right += right_polyphony(slots[slot], truth.rolls[source].sum(0))
        cosine = None if timbre is None else timbre.cosine(truth, source, slot)
        if cosine is not None:
            cosines.append(cosine)
    home, switch = stability(slots, truth)
    return SlotScore(
        matched=Curve.of(matched, truth.rolls),
        surplus=Curve.of(left, np.zeros(left.shape, bool)),
        right=right,
        frames=len(pairs) * slots.shape[2],
        home=home,
        switch=switch,
        cosine=sum(cosines),
        cosines=len(cosines),
        sources=len(truth.rolls),
    )


def slot_figures(score: SlotScore, threshold: float, name: str) -> dict[str, float]:
    """NAME_AP, _F1, _P, _R, NAME_strict_AP, _F1, _P, _R, NAME_polyphony, NAME_home and NAME_switch."""
    return {
        f"{name}_AP": 100 * score.matched.average_precision,
        **_rates(name, score.matched.counts(threshold)),
        f"{name}_strict_AP": 100 * score.strict.average_precision,
        **_rates(f"{name}_strict", score.strict.counts(threshold)),
        f"{name}_polyphony": 100 * share(score.right[nearest(threshold)], score.frames),
        f"{name}_home": share(*score.home),
        f"{name}_switch": share(*score.switch),
    }


# Splits of a mixture map: the map, the mixture's threshold and the true rolls (S, N_PITCHES, T) -> slots (S, ...)


def pitch_rank(mix: np.ndarray, threshold: float, rolls: np.ndarray) -> np.ndarray:
    on = mix >= threshold
    rank = np.minimum(np.cumsum(on[::-1], axis=0)[::-1] - 1, len(rolls) - 1)
    return np.where(on & (rank == np.arange(len(rolls))[:, None, None]), mix, np.float32(0))


def pitch_bands(mix: np.ndarray, threshold: float, rolls: np.ndarray) -> np.ndarray:
    on = mix >= threshold
    pitch, weight, n_bands = np.arange(len(mix)), on.sum(1), len(rolls)
    if not weight.any():
        return np.zeros((n_bands, *mix.shape), np.float32)
    centres = np.quantile(np.repeat(pitch, weight), (np.arange(n_bands) + 0.5) / n_bands)
    for _ in range(50):  # it has long converged
        band = np.abs(pitch[:, None] - centres).argmin(1)
        inside = [(band == k) & (weight > 0) for k in range(n_bands)]
        centres = np.array(
            [np.average(pitch[i], weights=weight[i]) if i.any() else c for i, c in zip(inside, centres, strict=True)]
        )
    return np.where(on & (band[:, None] == np.arange(n_bands)[:, None, None]), mix, np.float32(0))


def random_slots(mix: np.ndarray, threshold: float, rolls: np.ndarray) -> np.ndarray:
    slots = np.zeros((len(rolls), *mix.shape), np.float32)
    rng = np.random.default_rng(0)  # seeded: a figure must not flicker
    for pitch, row in enumerate(mix >= threshold):
        for first, end in runs(row):
            slots[rng.integers(len(rolls)), pitch, first:end] = mix[pitch, first:end]
    return slots


def one_slot(mix: np.ndarray, threshold: float, rolls: np.ndarray) -> np.ndarray:
    return np.concatenate([mix[None], np.zeros((len(rolls) - 1, *mix.shape), mix.dtype)])


def ceiling(mix: np.ndarray, threshold: float, rolls: np.ndarray) -> np.ndarray:
    slots = np.where(rolls, mix, np.float32(0))
    slots[0] += np.where(rolls.any(0), np.float32(0), mix)
    return slots


SPLITS: Mapping[str, Callable[[np.ndarray, float, np.ndarray], np.ndarray]] = {
    RANK: pitch_rank,
    "bands": pitch_bands,
    "random": random_slots,
    "one": one_slot,
    "ceiling": ceiling,
}
