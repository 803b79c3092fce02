"""What a note sounds like, by itself and in its company.

What sounds beside a note says something of the network's embedding of it: the partials of others lie among its own.
What that is, is known: the embeddings of all the other notes. A perceptron corrects each by the others.
"""

from collections.abc import Callable, Mapping

import numpy as np

from .affinity import layers, outputs

LONG = 4.0  # what the logarithm of a note's frames is divided by

Timbre = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(N, 2 D + 1), (N,) -> (N, D) embeddings of length 1, of what was `heard` of N notes on average, and for how many
frames."""


def heard(notes: np.ndarray) -> np.ndarray:
    """(..., N, D) embeddings of the notes that sound together -> (..., N, 2 D + 1): of each its own, the mean of the
    others', and how many they are."""
    others = notes.shape[-2] - 1
    company = (notes.sum(-2, keepdims=True) - notes) / max(others, 1)
    return np.concatenate([notes, company, np.full((*notes.shape[:-1], 1), others)], -1)


def own(sounds: np.ndarray) -> np.ndarray:
    """(N, 2 D + 1) of what was `heard` -> (N, D), of the notes by themselves."""
    return sounds[:, : sounds.shape[1] // 2]


def unit(vectors: np.ndarray) -> np.ndarray:
    """(..., D) -> the same directions with length 1; zeros stay zeros."""
    return vectors / (np.sqrt(np.square(vectors).sum(-1, keepdims=True)) + 1e-9)


def alone(mean: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """The timbre of notes as the network gives it; see `Timbre`."""
    return unit(own(mean))


def timbre_inputs(mean: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """What the perceptron sees of notes, (N, 2 D + 3) float32; see `Timbre`."""
    length = np.sqrt(np.square(own(mean)).sum(1))
    return np.concatenate([mean, length[:, None], np.log1p(frames)[:, None] / LONG], 1, dtype=np.float32)


class ClearedTimbre:
    """The learned `Timbre`: a perceptron's correction is added to the mean embedding.

    weights : arrays by name, "0.weight" .. "4.bias"; ValueError if one is missing.
    """

    def __init__(self, weights: Mapping[str, np.ndarray]):
        self._layers = layers(weights)

    def __call__(self, mean: np.ndarray, frames: np.ndarray) -> np.ndarray:
        return unit(own(mean) + outputs(self._layers, timbre_inputs(mean, frames)))
