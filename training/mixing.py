"""Random re-mixing: every example is a mixture nobody has heard, made from cached stems, with exact labels.

Hours heard are the cheapest improvement of all, so an example costs milliseconds: one segment's stems are cut at a
random place, one take a part is drawn, some parts are left out or replaced by strangers, levels are drawn, and the
mixture is retuned, given noise and a level.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import signal
from torch import Tensor

from realtime_mpe.analysis import FIRST_MIDI, FRAME_SECONDS, HOP, MAX_LOOKAHEAD, N_PITCHES, SAMPLERATE

from .effects import EXPRESSION_STEP, background, colour, expression, hall
from .metrics import note_frames
from .network import POLYPHONY_CLASSES
from .scores import is_polyphonic
from .stems import Segment, StemCache

MAX_STEMS = 6
FEW = 3  # players of a small ensemble, at most
STRANGER_PROBABILITY = 0.12  # a part replaced by a stem of another piece: harmony must not tell players apart
GUEST_PROBABILITY = 0.25  # of one more stem of another piece, and of yet another after it
DISTRACTOR_PROBABILITY = 0.15  # drums, where a segment has them
COLOUR_PROBABILITY = 0.5  # of a stem that gets a timbre of its own: a few hundred instruments are few
EXPRESSION_PROBABILITY = 0.5  # of a line that is shaped as a player would
HALL_PROBABILITY = 0.5  # that all play in one place, besides the rooms of their own that stems have
RETUNE_CENTS = 30.0
GAIN_DB = -9.0, 3.0  # of a part
PLAYING_DB = -38.0, -14.0  # RMS of a mixture re full scale: a distant microphone to a hot line
NOISE_PROBABILITY, SIGNAL_TO_NOISE_DB = 0.5, (15.0, 60.0)


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
    notes : (N, 5) int64 rows (example, stem, first frame, end frame, pitch row) for the embedding.
    """

    audio: Tensor
    mix: Tensor
    onset: Tensor
    polyphony: Tensor
    notes: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__))


def remix(
    cache: StemCache,
    index: int,
    seconds: float,
    rng: np.random.Generator,
    augment: bool = True,
    few: bool = False,
    chamber: bool = False,
) -> Mixture:
    """A mixture from segment ``index``; see `mix`."""
    return mix(cache.load(index), seconds, rng, lambda: stranger(cache, rng), augment, few, chamber)


def mix(
    segment: Segment,
    seconds: float,
    rng: np.random.Generator,
    stranger: Callable[[], tuple[Segment, int]],
    augment: bool = True,
    few: bool = False,
    chamber: bool = False,
) -> Mixture:
    """A mixture of ``seconds`` from anywhere in a segment; ``stranger`` draws a stem of another piece.

    With ``augment`` false one take a part is drawn and summed, and that is all. few : a solo, duo or trio, each as
    likely, without guests. chamber : nobody from other pieces, no drums, and every player's own timbre, so that two of
    one instrument may be as alike as in life. A segment without isolated stems is heard as it was recorded.
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
            if not chamber and rng.random() < STRANGER_PROBABILITY:
                chosen[k] = stranger()
        while not (few or chamber) and len(chosen) < MAX_STEMS and rng.random() < GUEST_PROBABILITY:
            chosen.append(stranger())
        if not chamber and rng.random() < DISTRACTOR_PROBABILITY and (segment.part < 0).any():
            chosen.append((segment, int(rng.choice(np.flatnonzero(segment.part < 0)))))
    notes = []
    for k, (source, stem) in enumerate(chosen):
        piece = source.stem(stem, start, n)
        own = source.notes[source.notes[:, 0] == stem]
        if augment:
            gain = gains(own[:, 1] - start / SAMPLERATE, own[:, 2] - start / SAMPLERATE, len(piece), rng)
            piece = piece * np.interp(np.arange(len(piece)), np.arange(len(gain)) * EXPRESSION_STEP, gain)
            if not chamber and rng.random() < COLOUR_PROBABILITY:
                piece = colour(piece, rng)
        audio[: len(piece)] += piece
        notes.append(np.stack([np.full(len(own), k), own[:, 1], own[:, 2], own[:, 3]], 1))
    notes = np.concatenate(notes).astype(np.float64) if notes else np.zeros((0, 4))
    notes[:, 1:3] -= start / SAMPLERATE
    if augment:
        if rng.random() < HALL_PROBABILITY:
            audio = signal.oaconvolve(audio, hall(rng))[:n].astype(np.float32)
        audio, notes = retune(audio, notes, rng)
        audio = set_level(audio, rng)
    notes = notes[(notes[:, 2] > 0) & (notes[:, 1] < seconds)]
    return Mixture(audio, notes, tuple(chosen))


def stranger(cache: StemCache, rng: np.random.Generator) -> tuple[Segment, int]:
    """Any stem of any piece."""
    segment = cache.load(int(rng.integers(len(cache))))
    return segment, int(rng.choice(np.flatnonzero(segment.part >= 0)))


def gains(onset: np.ndarray, offset: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """How loud a stem is that plays notes from ``onset`` to ``offset``, (N,) s: points as of `effects.expression`."""
    level = 10 ** (rng.uniform(*GAIN_DB) / 20)
    shaped = not is_polyphonic(np.stack([onset, offset], 1)) and rng.random() < EXPRESSION_PROBABILITY
    notes = (onset, offset) if shaped else (onset[:0], offset[:0])
    return level * expression(*notes, n, rng)


def draw_count(available: int, rng: np.random.Generator) -> int:
    """How many parts play: mostly all, sometimes a smaller ensemble, so that solos and duos are heard too."""
    return available if rng.random() < 0.6 else int(rng.integers(1, available + 1))


def retune(audio: np.ndarray, notes: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The whole mixture up to RETUNE_CENTS off 440 Hz, by playing it faster or slower; labels follow, and end with it
    where it is over before its time."""
    ratio = 2.0 ** (rng.uniform(-RETUNE_CENTS, RETUNE_CENTS) / 1200.0)
    position = np.arange(len(audio)) * ratio
    end = len(audio) / SAMPLERATE
    notes = notes[notes[:, 1] < end]
    notes[:, 1:3] = notes[:, 1:3].clip(max=end) / ratio
    return np.interp(position, np.arange(len(audio)), audio, right=0.0).astype(np.float32), notes


def set_level(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A playing level between a distant microphone and a hot line, and in half of the examples some noise."""
    rms = np.sqrt(np.mean(audio**2)) + 1e-9
    audio = audio * (10 ** (rng.uniform(*PLAYING_DB) / 20) / rms)
    if rng.random() < NOISE_PROBABILITY:
        signal_to_noise = rng.uniform(*SIGNAL_TO_NOISE_DB)
        rms = np.sqrt(np.mean(audio**2))
        audio = audio + background(len(audio), rng) * rms * 10 ** (-signal_to_noise / 20)
    return np.clip(audio, -1.0, 1.0).astype(np.float32)


def collate(mixtures: list[Mixture], n_frames: int) -> Batch:
    """Mixtures of at least ``n_frames`` frames, cut to them."""
    audio = torch.from_numpy(np.stack([m.audio[: n_frames * HOP] for m in mixtures]))
    notes = [np.insert(m.notes, 0, example, axis=1) for example, m in enumerate(mixtures)]
    return labelled(audio, np.concatenate(notes), n_frames)


def labelled(audio: Tensor, notes: np.ndarray, n_frames: int) -> Batch:
    """A batch of audio (B, T * HOP), on its device, from notes (N, 5): example, stem, onset s, offset s, MIDI."""
    device = audio.device
    pitch = np.round(notes[:, 4]).astype(np.int64) - FIRST_MIDI
    first, end = note_frames(notes[:, 2], notes[:, 3])
    first, end = np.maximum(first, 0), np.minimum(end, n_frames + 1)
    sounding = (end > first) & (pitch >= 0) & (pitch < N_PITCHES)
    # What the embedding learns from: notes whose beginning is heard.
    start = np.round(notes[:, 2] / FRAME_SECONDS).astype(np.int64)
    stop = np.maximum(start + 1, np.minimum((notes[:, 3] / FRAME_SECONDS).astype(np.int64), n_frames))
    begun = notes[:, 2] >= 0
    columns = notes[:, 0], notes[:, 1], first, end, pitch, begun, start, stop
    table = np.stack(columns, 1).astype(np.int64)[sounding]
    example, stem, first, end, pitch, begun, start, stop = torch.from_numpy(table).to(device).unbind(1)
    shape = len(audio), n_frames + 2, N_PITCHES
    count = torch.zeros(shape, dtype=torch.int32, device=device)
    one = torch.ones_like(first, dtype=torch.int32)
    count.index_put_((example, first, pitch), one, accumulate=True)
    count.index_put_((example, end, pitch), -one, accumulate=True)
    mix = count.cumsum(1)[:, :-1] > 0
    onset = torch.zeros(shape, device=device)
    for later in (0, 1):  # two frames: a note seldom shows itself within the first
        onset.index_put_((example, first + later, pitch), begun.float(), accumulate=True)
    heard = torch.from_numpy(np.flatnonzero((table[:, 5] == 1) & (table[:, 6] < n_frames))).to(device)
    return Batch(
        audio=audio,
        mix=mix.float(),
        onset=onset[:, :-1].clamp(max=1.0),
        polyphony=mix.sum(2).clamp(max=POLYPHONY_CLASSES - 1),
        notes=torch.stack([example, stem, start, stop, pitch], 1)[heard],
    )


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
