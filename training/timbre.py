"""The timbre teacher: views of isolated stems, its losses, retrieval, and the stored embeddings of sources.

Section III-B of the slot-attention paper (arXiv 2606.01460): several views of a stem, each from where it plays, should
say the same of it and something else than of any other source. Shapes: N views, E of an embedding, T = TIMBRE_FRAMES.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from realtime_mpe.analysis import FRAME_SECONDS, PAPER, SAMPLERATE

from .frontend import FrontEnd
from .recipe import TimbreWeights, Views
from .shards import read_segments
from .slots import TIMBRE_FRAMES, TimbreEncoder
from .stems import Segment
from .windows import Examples, SegmentPool, SourceTable

ACTIVE_SHARE = 0.5  # of a view's frames in which the stem sounds, at least
STORED_VIEWS = 16  # of a source; their mean is what is stored
EMBED_BATCH = 64


@dataclass
class StemViews:
    """audio : (V, n) with the front end's context.  source : name of who plays."""

    audio: np.ndarray
    source: str


def active_starts(segment: Segment, row: int) -> np.ndarray:
    """Seconds at which a view of the stem may begin: half a view apart, and it sounds for ACTIVE_SHARE of each."""
    notes = segment.notes[segment.notes[:, 0] == row]
    n_frames = int(segment.audio.shape[1] / SAMPLERATE / FRAME_SECONDS)
    sounding = np.zeros(n_frames + 1)
    for _, onset, offset, *_ in notes:
        sounding[int(onset / FRAME_SECONDS) : int(np.ceil(offset / FRAME_SECONDS))] = 1
    total = np.concatenate([[0.0], np.cumsum(sounding)])
    starts = np.arange(0, n_frames - TIMBRE_FRAMES + 1, TIMBRE_FRAMES // 2)
    share = (total[starts + TIMBRE_FRAMES] - total[starts]) / TIMBRE_FRAMES
    return starts[share >= ACTIVE_SHARE] * FRAME_SECONDS


def view(segment: Segment, row: int, start: float, context: int) -> np.ndarray:
    """Samples of one view, first frame centred at ``start`` s, with silence beyond the segment's ends: (n,) float32."""
    begin = int(round(start * SAMPLERATE)) - context
    n = int(round((TIMBRE_FRAMES - 1) * FRAME_SECONDS * SAMPLERATE)) + 2 * context
    out = np.zeros(n, np.float32)
    piece = segment.stem(row, max(begin, 0), n + min(begin, 0))
    offset = max(-begin, 0)
    out[offset : offset + len(piece)] = piece
    return out


class TimbreExamples(Examples):
    """`StemViews` of random stems: ``views`` of each."""

    def __init__(self, paths: list[Path], count: int, seed: int, views: Views):
        super().__init__(paths, count, seed)
        self.views = views
        self.context = FrontEnd(PAPER).margin

    def make(self, pool: SegmentPool, rng: np.random.Generator) -> StemViews | None:
        segment = pool.draw()
        if segment.mixture is not None:
            return None
        row = int(rng.choice(np.flatnonzero(segment.part >= 0)))
        starts = active_starts(segment, row)
        if len(starts) < 2:
            return None
        chosen = rng.choice(starts, self.views.count, replace=len(starts) < self.views.count)
        gains = 10 ** (rng.uniform(-self.views.gain_db, self.views.gain_db, self.views.count) / 20)
        audio = np.stack([g * view(segment, row, s, self.context) for s, g in zip(chosen, gains, strict=True)])
        return StemViews(audio.astype(np.float32), segment.instrument[row])


def collate(examples: list[StemViews]) -> tuple[Tensor, Tensor]:
    """-> audio (N, n) and source (N,), a number each; stems of one source share it."""
    names = sorted({e.source for e in examples})
    source = np.repeat([names.index(e.source) for e in examples], [len(e.audio) for e in examples])
    return torch.from_numpy(np.concatenate([e.audio for e in examples])), torch.from_numpy(source)


def mask(levels: Tensor, views: Views, generator: torch.Generator) -> Tensor:
    """One band of bins and one stretch of frames of every view silenced: (N, T, 216) -> the same."""
    levels = levels.clone()
    for axis, widest in ((1, views.time_mask), (2, views.frequency_mask)):
        size = levels.shape[axis]
        width = torch.randint(0, widest + 1, (len(levels), 1), generator=generator)
        start = (torch.rand(len(levels), 1, generator=generator) * (size - width + 1)).long()
        index = torch.arange(size)[None]
        inside = ((index >= start) & (index < start + width)).to(levels.device)
        levels.masked_fill_(inside[:, :, None] if axis == 1 else inside[:, None, :], 0.0)
    return levels


def timbre_losses(embedding: Tensor, projection: Tensor, source: Tensor, weights: TimbreWeights) -> dict[str, Tensor]:
    """embedding, projection (N, E), source (N,) -> each term of TimbreWeights, not weighted.

    contrast : NT-Xent with every other view of the source as a positive.  consistency : 1 - cosine of the views'
    embeddings.  variance, covariance : of the embedding's dimensions over the batch, as in VICReg.
    """
    embedding, projection = embedding.float(), projection.float()
    other = ~torch.eye(len(source), dtype=torch.bool, device=source.device)
    same = (source[:, None] == source[None]) & other
    unit = F.normalize(projection, dim=-1)
    scores = (unit @ unit.T / weights.temperature).masked_fill(~other, -torch.inf)
    log_share = (scores - scores.logsumexp(1, keepdim=True)).masked_fill(~same, 0.0)
    contrast = -(log_share.sum(1) / same.sum(1).clamp(min=1)).mean()
    unit = F.normalize(embedding, dim=-1)
    consistency = (1 - unit @ unit.T)[same].mean()
    centred = embedding - embedding.mean(0)
    variance = F.relu(1 - (centred.var(0) + 1e-4).sqrt()).mean()
    covariance = centred.T @ centred / (len(centred) - 1)
    off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
    return {
        "contrast": contrast,
        "consistency": consistency,
        "variance": variance,
        "covariance": off_diagonal / len(covariance),
    }


@torch.no_grad()
def embed_sources(
    encoder: TimbreEncoder, paths: list[Path], segments: int, device: torch.device, seed: int = 0
) -> dict[str, np.ndarray]:
    """Embeddings (V, E) of up to STORED_VIEWS views of every source in the first ``segments`` segments, by name."""
    encoder.eval()
    front_end = FrontEnd(PAPER).to(device)
    context = front_end.margin
    rng = np.random.default_rng(seed)
    heard: dict[str, int] = {}
    waiting: list[tuple[str, np.ndarray]] = []
    found: dict[str, list[np.ndarray]] = {}

    def flush() -> None:
        if waiting:
            audio = torch.from_numpy(np.stack([wave for _, wave in waiting])).to(device)
            embedding, _ = encoder(front_end(audio, context))
            for (name, _), row in zip(waiting, embedding.float().cpu().numpy(), strict=True):
                found.setdefault(name, []).append(row)
            waiting.clear()

    for segment, _ in zip(read_segments(paths, seed, shared=True), range(segments), strict=False):
        for row in np.flatnonzero(segment.part >= 0):
            name = segment.instrument[row]
            starts = active_starts(segment, row)
            if segment.mixture is not None or not len(starts):
                continue
            # Two views a stem, so that a source is stored from several stems where there are several.
            for start in rng.choice(starts, min(2, len(starts)), replace=False):
                if heard.get(name, 0) < STORED_VIEWS:
                    heard[name] = heard.get(name, 0) + 1
                    waiting.append((name, view(segment, int(row), float(start), context)))
            if len(waiting) >= EMBED_BATCH:
                flush()
    flush()
    return {name: np.stack(rows) for name, rows in sorted(found.items())}


def source_table(embeddings: dict[str, np.ndarray]) -> SourceTable:
    """The mean of each source's views, every view of length 1."""
    means = [(rows / np.linalg.norm(rows, axis=1, keepdims=True)).mean(0) for rows in embeddings.values()]
    return SourceTable(tuple(embeddings), np.stack(means).astype(np.float32))


def retrieval(embeddings: dict[str, np.ndarray]) -> dict[str, float]:
    """Whether a view finds its source among all: the share of views whose source is the nearest, and among five.

    A source is the mean of its views, of its own without the view that asks; sources with one view ask nothing.
    top1, top5 : 0..1.  sources, queries : how many.  between : mean cosine of two sources, which a cosine to the
    right one has to be read beside.
    """
    names = [name for name, rows in embeddings.items() if len(rows) >= 2]
    unit = [embeddings[n] / np.linalg.norm(embeddings[n], axis=1, keepdims=True) for n in names]
    sums = np.stack([rows.sum(0) for rows in unit]) if names else np.zeros((0, 1))
    ranks = []
    for k, rows in enumerate(unit):
        for row in rows:
            gallery = sums.copy()
            gallery[k] -= row
            cosine = gallery @ row / np.linalg.norm(gallery, axis=1)
            ranks.append(int((cosine > cosine[k]).sum()))
    ranks = np.array(ranks)
    share = [float((ranks < n).mean()) if len(ranks) else 0.0 for n in (1, 5)]
    means = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    between = (means @ means.T)[np.triu_indices(len(means), 1)]
    return {
        "top1": share[0],
        "top5": share[1],
        "sources": len(names),
        "queries": len(ranks),
        "between": float(between.mean()) if len(between) else 0.0,
    }
