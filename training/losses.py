"""What the live network is trained on. Each function returns one scalar; `fit.py` weighs and adds them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .mixing import Batch, all_lookaheads, shifted

# Frames a note's embedding is averaged over: a decision after one to three frames, and the voice memory's whole note.
EARLY_FRAMES = (1, 2, 3, 4, 8, 32)
EARLY_PROBABILITIES = (0.25, 0.25, 0.15, 0.1, 0.1, 0.15)
TEMPERATURE = 0.12
IMPOSSIBLE = -1e4  # a logit; finite, so that a note without others gives no NaN
ONSET_WEIGHT = 3.0  # of a positive: onsets fill one cell in a hundred


def mixture_loss(outputs: dict[str, Tensor], batch: Batch) -> Tensor:
    """Binary cross-entropy of the mixture for all look-aheads."""
    return F.binary_cross_entropy_with_logits(outputs["mix"].float(), all_lookaheads(batch.mix))


def onset_loss(outputs: dict[str, Tensor], batch: Batch) -> Tensor:
    weight = torch.full((), ONSET_WEIGHT, device=batch.audio.device)
    target = all_lookaheads(batch.onset)
    return F.binary_cross_entropy_with_logits(outputs["onset"].float(), target, pos_weight=weight)


def polyphony_loss(outputs: dict[str, Tensor], batch: Batch) -> Tensor:
    """Cross-entropy of the number of sounding pitches at look-ahead 1."""
    return F.cross_entropy(outputs["polyphony"].float().flatten(0, 1), shifted(batch.polyphony, 1).flatten())


def note_embeddings(embedding: Tensor, notes: Tensor, frames: Tensor) -> Tensor:
    """Mean embedding of each note over its first ``frames`` frames, of unit length.

    embedding (B, T, P, D), notes (N, 5) as in Batch, frames (N,) -> (N, D).
    """
    total = F.pad(embedding.float().cumsum(1), (0, 0, 0, 0, 1, 0))  # (B, T + 1, P, D), row t = sum of frames < t
    example, _, start, end, pitch = notes.unbind(1)
    end = torch.minimum(end, start + frames)
    return F.normalize(total[example, end, pitch] - total[example, start, pitch], dim=-1)


def embedding_loss(outputs: dict[str, Tensor], batch: Batch, generator: torch.Generator) -> Tensor:
    """InfoNCE over the notes of each mixture: a note should find the other notes of its player, from its first frames.

    One side of each pair is a note as it is when the decision falls, the other the note as the memory keeps it.
    """
    notes = batch.notes
    device = notes.device
    if not len(notes):
        return outputs["embedding"].float().sum() * 0.0
    choice = torch.multinomial(torch.tensor(EARLY_PROBABILITIES), len(notes), replacement=True, generator=generator)
    early = note_embeddings(outputs["embedding"], notes, torch.tensor(EARLY_FRAMES)[choice].to(device))
    whole = note_embeddings(outputs["embedding"], notes, torch.full((len(notes),), EARLY_FRAMES[-1], device=device))
    same_mixture = notes[:, None, 0] == notes[None, :, 0]
    same_mixture &= ~torch.eye(len(notes), dtype=torch.bool, device=device)
    same_player = same_mixture & (notes[:, None, 1] == notes[None, :, 1])
    usable = same_player.any(1) & (same_mixture & ~same_player).any(1)
    with torch.autocast(device.type, enabled=False):  # as the embedding: players differ by less than bfloat16 resolves
        similarity = (early @ whole.T / TEMPERATURE).masked_fill(~same_mixture, IMPOSSIBLE)
    log_probability = (similarity.log_softmax(1) * same_player).sum(1) / same_player.sum(1).clamp(min=1)
    return -(log_probability * usable).sum() / usable.sum().clamp(min=1)
