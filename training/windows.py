"""Training examples of the slot networks: random windows of random mixtures, each with a map a stem.

A pool of segments is kept open; every example is mixed from one of them, with strangers from the others, and a segment
is replaced after a few examples. The stream depends on (seed, epoch, shards, rank, worker) alone, so that a training
that was interrupted meets the same windows again.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from webdataset.utils import pytorch_worker_info

from realtime_mpe.analysis import FIRST_MIDI, FRAME_SECONDS, N_PITCHES, PAPER, SAMPLERATE
from realtime_mpe.errors import UserError

from .data.datasets import FAMILIES
from .data.own import family_of_source
from .frontend import FrontEnd
from .metrics import note_frames
from .mixing import Mixture, mix
from .shards import read_segments
from .slots import TIMBRE_DIM, WINDOW
from .stems import Segment

POOL = 16  # segments open at once
EXAMPLES_A_SEGMENT = 12  # before it makes room for the next; it comes again with the next pass over the shards
KEPT_SILENCES = 0.1  # of windows in which nothing sounds: enough to learn silence from
MOST_MISSED = 10_000  # draws in turn of which nothing could be used: there is nothing to use


@dataclass(frozen=True)
class SourceTable:
    """Stored embeddings: what the teacher says of every source it has heard. embedding : (N, E) float32."""

    names: tuple[str, ...]
    embedding: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "_row", {name: k for k, name in enumerate(self.names)})

    def of(self, name: str) -> np.ndarray | None:
        row = self._row.get(name)
        return None if row is None else self.embedding[row]


@dataclass
class Window:
    """One example; see WindowBatch, without B."""

    audio: np.ndarray
    maps: np.ndarray
    family: np.ndarray
    timbre: np.ndarray
    known: np.ndarray


@dataclass
class WindowBatch:
    """B windows of T frames. S is the largest number of stems among them; rows beyond a window's own are not present.

    audio : (B, n) with the context that the front end needs on both sides.  maps : (B, S, P, T) 0 or 1.
    present : (B, S) bool, stems that sound.  family : (B, S) index into FAMILIES.
    timbre : (B, S, E) the teacher's embedding of the source.  known : (B, S) bool, whether it has one.
    """

    audio: Tensor
    maps: Tensor
    present: Tensor
    family: Tensor
    timbre: Tensor
    known: Tensor

    def to(self, device: torch.device) -> "WindowBatch":
        return WindowBatch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


def cut(mixture: Mixture, context: int, sources: SourceTable | None) -> Window:
    """Audio and targets of the window whose first frame is centred ``context`` samples after the mixture's start."""
    maps = np.zeros((len(mixture.stems), N_PITCHES, WINDOW), np.float32)
    for stem, onset, offset, midi in mixture.notes:
        first, end = note_frames(onset - context / SAMPLERATE, offset - context / SAMPLERATE)
        pitch = int(midi) - FIRST_MIDI
        if 0 <= pitch < N_PITCHES and end > 0:
            maps[int(stem), pitch, max(first, 0) : end] = 1.0
    timbre = np.zeros((len(mixture.stems), TIMBRE_DIM), np.float32)
    known = np.zeros(len(mixture.stems), bool)
    family = np.array([family_index(segment, row) for segment, row in mixture.stems], np.int64)
    if sources is not None:
        for k, (segment, row) in enumerate(mixture.stems):
            embedding = sources.of(segment.instrument[row])
            if embedding is not None:
                timbre[k], known[k] = embedding, True
    return Window(mixture.audio, maps, family, timbre, known)


def family_index(segment: Segment, row: int) -> int:
    """Into FAMILIES, of a segment's stem."""
    if segment.family is not None:
        return FAMILIES.index(segment.family[row])
    return FAMILIES.index(family_of_source(segment.instrument[row]))


def collate(windows: list[Window]) -> WindowBatch:
    most = max(1, *(len(w.maps) for w in windows))

    def stack(name: str) -> Tensor:
        arrays = [getattr(w, name) for w in windows]
        padded = [np.pad(a, [(0, most - len(a))] + [(0, 0)] * (a.ndim - 1)) for a in arrays]
        return torch.from_numpy(np.stack(padded))

    maps = stack("maps")
    return WindowBatch(
        audio=torch.from_numpy(np.stack([w.audio for w in windows])),
        maps=maps,
        present=maps.flatten(2).any(2),
        family=stack("family"),
        timbre=stack("timbre"),
        known=stack("known"),
    )


class SegmentPool:
    """A few segments of an endless stream, drawn from at random."""

    def __init__(self, stream: Iterator[Segment], rng: np.random.Generator):
        self.rng = rng
        self._stream = stream
        self._open: list[list] = []  # [segment, examples left]
        self._drawn: Segment | None = None

    def draw(self) -> Segment:
        """Counts as an example of the segment."""
        while len(self._open) < POOL:
            self._open.append([next(self._stream), EXAMPLES_A_SEGMENT])
        k = int(self.rng.integers(POOL))
        segment, left = self._open[k]
        self._drawn = segment
        if left == 1:
            self._open[k] = [next(self._stream), EXAMPLES_A_SEGMENT]
        else:
            self._open[k][1] = left - 1
        return segment

    def stranger(self) -> tuple[Segment, int]:
        """Any pitched stem of any open segment, or of the one just drawn, whose stems can be heard alone."""
        isolated = [segment for segment, _ in self._open if segment.mixture is None] or [self._drawn]
        segment = isolated[int(self.rng.integers(len(isolated)))]
        return segment, int(self.rng.choice(np.flatnonzero(segment.part >= 0)))


class Examples(IterableDataset):
    """A stream of training examples: ``count`` in each epoch, the same for the same epoch.

    shared : every process gets the same examples, instead of its own.  ``batch`` : examples that a loader's workers
    share out whole, so that none of them ends on a fragment; set before each epoch, as ``epoch`` is.
    """

    def __init__(self, paths: list[Path], count: int, seed: int, shared: bool = False):
        self.paths, self.count, self.seed, self.shared = paths, count, seed, shared
        self.epoch, self.batch = 0, 1

    def __iter__(self) -> Iterator:
        rank, _, worker, workers = (0, 1, 0, 1) if self.shared else pytorch_worker_info()
        rng = np.random.default_rng([self.seed, self.epoch, rank, worker])
        pool = SegmentPool(read_segments(self.paths, self.seed * 1000 + self.epoch, self.shared), rng)
        batches, rest = divmod(self.count, self.batch)
        own = self.batch * len(range(worker, batches, workers)) + (rest if worker == batches % workers else 0)
        missed = 0  # draws in turn
        while own:
            example = self.make(pool, rng)
            missed = missed + 1 if example is None else 0
            if missed == MOST_MISSED:
                raise UserError("the data hold no stems that sound by themselves: give some, or render them")
            if example is not None:
                own -= 1
                yield example

    def make(self, pool: SegmentPool, rng: np.random.Generator):
        raise NotImplementedError


class Windows(Examples):
    """Random windows; ``sources`` gives the timbre targets."""

    def __init__(
        self, paths: list[Path], count: int, seed: int, sources: SourceTable | None = None, shared: bool = False
    ):
        super().__init__(paths, count, seed, shared)
        self.sources = sources
        self.context = FrontEnd(PAPER).margin

    def make(self, pool: SegmentPool, rng: np.random.Generator) -> Window | None:
        seconds = (WINDOW - 1) * FRAME_SECONDS + 2 * self.context / SAMPLERATE
        mixture = mix(pool.draw(), seconds, rng, pool.stranger)
        window = cut(mixture, self.context, self.sources)
        if window.maps.any() or rng.random() < KEPT_SILENCES:
            return window
        return None
