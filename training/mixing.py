"""Random re-mixing: every example is a mixture nobody has heard, made from cached stems, with exact labels.

Hours heard are the cheapest improvement of all, so an example costs milliseconds: one segment's stems are cut at a
random place, one take a part is drawn, some parts are left out or replaced by strangers, levels are drawn, and the
mixture is retuned, given noise and a level.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from realtime_mpe.analysis import FIRST_MIDI, FRAME_SECONDS, HOP, MAX_LOOKAHEAD, N_PITCHES, SAMPLERATE

from .effects import background, colour
from .metrics import note_frames
from .network import POLYPHONY_CLASSES
from .stems import Segment, StemCache

MAX_STEMS = 6
FEW = 3  # players of a small ensemble, at most
STRANGER_PROBABILITY = 0.12  # a part replaced by a stem of another piece: harmony must not tell players apart
GUEST_PROBABILITY = 0.25  # of one more stem of another piece, and of yet another after it
DISTRACTOR_PROBABILITY = 0.15  # drums, where a segment has them
COLOUR_PROBABILITY = 0.5  # of a stem that gets a timbre of its own: a few hundred instruments are few
RETUNE_CENTS = 30.0


@dataclass(frozen=True)
class Mixture:
    """One training example: audio (n,) float32; notes (N, 4) = stem, onset s, offset s, MIDI.

    stems : where each of them was taken from, as (segment, row).
    """

    audio: np.ndarray
    notes: np.ndarray
    stems: tuple[tuple[Segment, int], ...] = ()


@dataclass
class Batch:
    """Stacked examples. T frames of output, label frames 0..T.

    audio : (B, T * HOP).  mix, onset : (B, T + 1, P) targets in 0..1.  polyphony : (B, T + 1) class.
    owner : (B, T + 1, P) index of the stem that alone plays there, -1 elsewhere.
    notes : (N, 5) int64 rows (example, stem, first frame, end frame, pitch row) for the embedding.
    """

    audio: Tensor
    mix: Tensor
    onset: Tensor
    polyphony: Tensor
    owner: Tensor
    notes: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__))


def remix(
    cache: StemCache, index: int, seconds: float, rng: np.random.Generator, augment: bool = True, few: bool = False
) -> Mixture:
    """A mixture from segment ``index``; see `mix`."""
    return mix(cache.load(index), seconds, rng, lambda: stranger(cache, rng), augment, few)


def mix(
    segment: Segment,
    seconds: float,
    rng: np.random.Generator,
    stranger: Callable[[], tuple[Segment, int]],
    augment: bool = True,
    few: bool = False,
) -> Mixture:
    """A mixture of ``seconds`` from anywhere in a segment; ``stranger`` draws a stem of another piece.

    With ``augment`` false one take a part is drawn and summed, and that is all. few : a solo, duo or trio, each as
    likely, without guests. A segment without isolated stems is heard as it was recorded.
    """
    n = int(round(seconds * SAMPLERATE))
    start = int(rng.integers(0, max(1, segment.audio.shape[1] - n)))
    parts = sorted(set(segment.part[segment.part >= 0].tolist()))
    chosen = [(segment, int(rng.choice(np.flatnonzero(segment.part == part)))) for part in parts]
    rng.shuffle(chosen)
    audio = np.zeros(n, np.float32)
    if segment.mixture is not None:
        piece = segment.mixture[start : start + n]
        audio[: len(piece)] = piece.astype(np.float32) / 32767
    elif augment:
        chosen = chosen[: int(rng.integers(1, min(FEW, len(chosen)) + 1)) if few else draw_count(len(chosen), rng)]
        for k in range(len(chosen)):
            if rng.random() < STRANGER_PROBABILITY:
                chosen[k] = stranger()
        while not few and len(chosen) < MAX_STEMS and rng.random() < GUEST_PROBABILITY:
            chosen.append(stranger())
        if rng.random() < DISTRACTOR_PROBABILITY and (segment.part < 0).any():
            chosen.append((segment, int(rng.choice(np.flatnonzero(segment.part < 0)))))
    notes = []
    for k, (source, stem) in enumerate(chosen):
        gain = 10 ** (rng.uniform(-9, 3) / 20) if augment else 1.0
        piece = source.stem(stem, start, n)
        if augment and rng.random() < COLOUR_PROBABILITY:
            piece = colour(piece, rng)
        audio[: len(piece)] += gain * piece
        own = source.notes[source.notes[:, 0] == stem]
        notes.append(np.stack([np.full(len(own), k), own[:, 1], own[:, 2], own[:, 3]], 1))
    notes = np.concatenate(notes).astype(np.float64) if notes else np.zeros((0, 4))
    notes[:, 1:3] -= start / SAMPLERATE
    if augment:
        audio, notes = retune(audio, notes, rng)
        audio = set_level(audio, rng)
    notes = notes[(notes[:, 2] > 0) & (notes[:, 1] < seconds)]
    return Mixture(audio, notes, tuple(chosen))


def stranger(cache: StemCache, rng: np.random.Generator) -> tuple[Segment, int]:
    """Any stem of any piece."""
    segment = cache.load(int(rng.integers(len(cache))))
    return segment, int(rng.choice(np.flatnonzero(segment.part >= 0)))


def draw_count(available: int, rng: np.random.Generator) -> int:
    """How many parts play: mostly all, sometimes a smaller ensemble, so that solos and duos are heard too."""
    return available if rng.random() < 0.6 else int(rng.integers(1, available + 1))


def retune(audio: np.ndarray, notes: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The whole mixture up to RETUNE_CENTS off 440 Hz, by playing it faster or slower; labels follow."""
    ratio = 2.0 ** (rng.uniform(-RETUNE_CENTS, RETUNE_CENTS) / 1200.0)
    position = np.arange(len(audio)) * ratio
    notes = notes.copy()
    notes[:, 1:3] /= ratio
    return np.interp(position, np.arange(len(audio)), audio, right=0.0).astype(np.float32), notes


def set_level(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A playing level between a distant microphone and a hot line, and in half of the examples some noise."""
    rms = np.sqrt(np.mean(audio**2)) + 1e-9
    audio = audio * (10 ** (rng.uniform(-38, -14) / 20) / rms)
    if rng.random() < 0.5:
        signal_to_noise = rng.uniform(15, 60)
        rms = np.sqrt(np.mean(audio**2))
        audio = audio + background(len(audio), rng) * rms * 10 ** (-signal_to_noise / 20)
    return np.clip(audio, -1.0, 1.0).astype(np.float32)


def label(mixture: Mixture, n_frames: int) -> dict[str, np.ndarray]:
    """Targets of one mixture for label frames 0..n_frames; see Batch."""
    count = np.zeros((n_frames + 1, N_PITCHES), np.int16)
    onset = np.zeros((n_frames + 1, N_PITCHES), np.float32)
    owner = np.full((n_frames + 1, N_PITCHES), -1, np.int16)
    rows = []
    for stem, on, off, midi in mixture.notes:
        pitch = int(midi) - FIRST_MIDI
        if not 0 <= pitch < N_PITCHES:
            continue
        first, end = note_frames(on, off)
        first, end = max(first, 0), min(end, n_frames + 1)
        if end <= first:
            continue
        count[first:end, pitch] += 1
        owner[first:end, pitch] = stem
        if on >= 0:
            onset[first : first + 2, pitch] = 1.0  # two frames: a note seldom shows itself within the first
            start = int(round(on / FRAME_SECONDS))
            rows.append((int(stem), start, max(start + 1, min(int(off / FRAME_SECONDS), n_frames)), pitch))
    owner[count != 1] = -1
    polyphony = np.minimum((count > 0).sum(1), POLYPHONY_CLASSES - 1)
    notes = np.array([r for r in rows if r[1] < n_frames], np.int64).reshape(-1, 4)
    return dict(mix=(count > 0).astype(np.float32), onset=onset, polyphony=polyphony, owner=owner, notes=notes)


def collate(mixtures: list[Mixture], n_frames: int) -> Batch:
    labels = [label(m, n_frames) for m in mixtures]
    notes = [np.insert(lab["notes"], 0, b, axis=1) for b, lab in enumerate(labels)]
    stack = {k: torch.from_numpy(np.stack([lab[k] for lab in labels])) for k in ("mix", "onset", "polyphony", "owner")}
    return Batch(
        audio=torch.from_numpy(np.stack([m.audio[: n_frames * HOP] for m in mixtures])),
        notes=torch.from_numpy(np.concatenate(notes)),
        **stack,
    )


def batches(cache: StemCache, batch_size: int, n_frames: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Random batches without end; the cache may grow meanwhile."""
    seconds = n_frames * HOP / SAMPLERATE
    while True:
        indices = rng.integers(len(cache), size=batch_size)
        yield collate([remix(cache, int(i), seconds, rng) for i in indices], n_frames)


def shifted(target: Tensor, lookahead: int) -> Tensor:
    """Label frames 0..T along axis 1 -> what output frames 0..T-1 owe at this look-ahead: label n + 1 - lookahead."""
    n_frames = target.shape[1] - 1
    if lookahead <= 1:
        return target[:, 1 - lookahead : 1 - lookahead + n_frames]
    padding = torch.zeros_like(target[:, : lookahead - 1])
    return torch.cat([padding, target[:, : n_frames - lookahead + 1]], 1)


def all_lookaheads(target: Tensor) -> Tensor:
    """(B, T + 1, P) -> (B, T, L, P): `shifted` for every look-ahead."""
    return torch.stack([shifted(target, lookahead) for lookahead in range(MAX_LOOKAHEAD + 1)], 2)
