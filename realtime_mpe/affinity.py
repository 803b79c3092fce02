"""Whether two remembered notes are one player's.

A small perceptron looks at every pair of notes: how alike they sound, how alike they are to all the others, how they
lie in pitch and time, and what their `lines` say.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

EMBEDDING_FRAMES = 32  # a note's embedding is the mean over at most its first second
CHORD_FRAMES = 4  # notes this close together begin as one chord, or follow each other legato
LEGATO_BEFORE = 10  # frames by which a note may have ended before the one that carries on its line
OVERLAP_FRAMES = 3  # more than legato playing makes
NEAR_PITCHES = 3.0  # semitones over which "near in pitch" falls off: timbre changes with register
NEIGHBOUR_WIDTH = 0.1  # of cosine, within which a note counts as a neighbour
PAIR_FEATURES = 30
TOGETHER = 11  # the feature that two notes sound at one time
LAYERS = (0, 2, 4)  # of a perceptron, among its activations, as training names them
MOST_CERTAIN = 6.0  # log odds: no single pair decides
PORTION = 2048  # pairs


class Notes(NamedTuple):
    """N notes. unit (N, D) timbres and plain (N, D) embeddings, of length 1, see `timbre`; pitch rows; start and end
    frames, end infinite while one sounds; frames (N,) of embedding heard."""

    unit: np.ndarray
    plain: np.ndarray
    pitch: np.ndarray
    start: np.ndarray
    end: np.ndarray
    frames: np.ndarray


def pair_features(notes: Notes, lines: np.ndarray, now: float) -> np.ndarray:
    """(N, N, PAIR_FEATURES) float32, symmetric, N of at least 2. Each feature lies in memory as one matrix.

    lines : (N, N) log odds, see `lines.LineOdds`.  now : the frame up to which notes sound.
    """
    n = len(notes.pitch)
    cosine, others, standard, alike_to_all = likeness(notes.unit)
    plain_cosine, _, plain_standard, plain_alike_to_all = likeness(notes.plain)
    rank = np.empty((n, n))
    rank[np.arange(n)[:, None], np.argsort(cosine, 1)] = np.arange(n) / (n - 1)
    neighbours = np.exp((cosine - 1.0) / NEIGHBOUR_WIDTH)
    neighbours = np.sqrt(neighbours / neighbours.sum(1, keepdims=True))

    pitch, start = notes.pitch.astype(np.float32), notes.start.astype(np.float32)
    end = np.minimum(notes.end, now + 1).astype(np.float32)
    distance = np.abs(pitch[:, None] - pitch)
    apart = np.abs(start[:, None] - start)
    overlap = np.minimum(end[:, None], end) - np.maximum(start[:, None], start)
    together = overlap > OVERLAP_FRAMES
    # Lines: of the notes that end where a note begins, the nearest in pitch; and the same seen from their side.
    since = start[:, None] - end
    follows = (since >= -CHORD_FRAMES) & (since <= LEGATO_BEFORE) & (start[:, None] - start > CHORD_FRAMES / 2)
    step = np.where(follows, distance, np.inf)
    carries_on = follows & (step == step.min(1)[:, None])
    carried_on = follows & (step == step.min(0))
    heard = np.log2(np.maximum(notes.frames, 1)) / np.log2(EMBEDDING_FRAMES)
    # Places: a player of an ensemble seldom leaves the place among the others that the part has.
    above, below = places(notes, now)
    higher, lower = np.abs(above[:, None] - above), np.abs(below[:, None] - below)
    company = above + below
    features = (
        cosine,
        (standard + standard.T) / 2,
        np.minimum(rank, rank.T),
        np.maximum(rank, rank.T),
        alike_to_all,
        3.0 * neighbours @ neighbours.T,
        distance / 12,
        np.exp(-distance / NEAR_PITCHES),
        octaves(pitch),
        distance == 0,
        np.log1p(np.maximum(-overlap, 0.0)) / 4,
        together,
        apart <= CHORD_FRAMES,
        np.minimum(heard[:, None], heard),
        np.maximum(heard[:, None], heard),
        _either(carries_on | carried_on),
        _either(carries_on & carried_on),
        others.mean(),  # as the next three, the same for all pairs
        others.std(),
        np.log2(n) / 7,
        4.0 * together.mean(),
        np.log1p(apart) / 5,
        higher / 2,
        lower / 2,
        np.minimum(higher, lower) / 2,
        np.minimum(company[:, None], company) / 4,
        plain_cosine,
        (plain_standard + plain_standard.T) / 2,
        plain_alike_to_all,
        lines.clip(-MOST_CERTAIN, MOST_CERTAIN) / 4,
    )
    found = np.empty((PAIR_FEATURES, n, n), np.float32)
    for matrix, feature in zip(found, features, strict=True):
        matrix[:] = feature
    return np.moveaxis(found, 0, -1)


def likeness(unit: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cosines of N embeddings, (N, N); of each with the others, (N, N - 1); how far each lies above the mean of its
    row's others, in deviations of these; and how alike two rows are."""
    n = len(unit)
    cosine = unit @ unit.T
    others = cosine[~np.eye(n, dtype=bool)].reshape(n, n - 1)
    centred = cosine - others.mean(1)[:, None]
    length = np.sqrt(np.square(centred).sum(1)) + 1e-6
    return cosine, others, centred / (others.std(1)[:, None] + 0.05), centred @ centred.T / np.outer(length, length)


def places(notes: Notes, now: float) -> tuple[np.ndarray, np.ndarray]:
    """How many notes sound above each note and how many below it, (N,) each, the mean of its frames up to ``now``."""
    end = np.minimum(notes.end, now + 1)
    overlap = np.minimum(end[:, None], end) - np.maximum(notes.start[:, None], notes.start)
    share = np.maximum(overlap, 0.0) / np.maximum(end - notes.start, 1.0)[:, None]
    above = notes.pitch > notes.pitch[:, None]
    return (share * above).sum(1), (share * above.T).sum(1)


def octaves(pitch: np.ndarray) -> np.ndarray:
    """(N, N) bool, whether two pitch rows are whole octaves apart."""
    chroma = pitch % 12
    return chroma[:, None] == chroma


@lru_cache(64)
def pairs_of(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Every two of n, a < b: (M,), (M,), to be read only. Their order is that of numpy's triu_indices."""
    pairs = np.triu_indices(n, 1)
    for side in pairs:
        side.flags.writeable = False
    return pairs


def portions(count: int) -> list[slice]:
    """Of so many pairs, what to compute at a time: what is found on the way stays in the processor's cache then."""
    return [slice(first, first + PORTION) for first in range(0, count, PORTION)]


def _either(relation: np.ndarray) -> np.ndarray:
    return relation | relation.T


def layers(weights: Mapping[str, np.ndarray], prefix: str = "") -> list[tuple[np.ndarray, np.ndarray]]:
    """Weight and bias of a perceptron's layers from arrays by name; ValueError if one is missing."""
    names = [[f"{prefix}{layer}.{kind}" for kind in ("weight", "bias")] for layer in LAYERS]
    missing = [name for pair in names for name in pair if name not in weights]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    return [tuple(np.asarray(weights[name], np.float32) for name in pair) for pair in names]


def stacked(networks: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The `layers` of W perceptrons as those of one, with arrays that have one axis more, the first; ValueError if
    their shapes differ."""
    return [tuple(np.stack(arrays) for arrays in zip(*same, strict=True)) for same in zip(*networks, strict=True)]


def outputs(layers: Sequence[tuple[np.ndarray, np.ndarray]], x: np.ndarray) -> np.ndarray:
    """(weight (out, in), bias (out,)) of each layer, ReLU between them: (N, n_in) -> (N, n_out), or (W, N, n_out) of
    `stacked` ones."""
    for number, (weight, bias) in enumerate(layers):
        x = x @ weight.swapaxes(-1, -2)
        x += bias[..., None, :]  # in place: for thousands of pairs, new memory costs more than the sums
        if number < len(layers) - 1:
            np.maximum(x, 0.0, out=x)
    return x


def perceptron(layers: Sequence[tuple[np.ndarray, np.ndarray]], x: np.ndarray) -> np.ndarray:
    """One that has a single output: (N, n_in) -> (N,), or (W, N) of `stacked` ones."""
    return outputs(layers, x)[..., 0]


class Affinity:
    """The learned log odds that two notes are one player's: the mean of what several perceptrons say.

    networks : weights of each, arrays by name, prefix + "0.weight" .. "4.bias"; ValueError if one is missing.
    """

    def __init__(self, networks: Sequence[Mapping[str, np.ndarray]], prefix: str = ""):
        self._networks = [layers(weights, prefix) for weights in networks]

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(N, N, PAIR_FEATURES) -> (N, N), symmetric, at most MOST_CERTAIN either way; the diagonal means nothing."""
        n = len(features)
        rows, columns = pairs_of(n)
        odds = np.zeros((n, n))
        for some in portions(len(rows)):
            pairs = features[rows[some], columns[some]]
            opinions = [perceptron(network, pairs).clip(-MOST_CERTAIN, MOST_CERTAIN) for network in self._networks]
            odds[rows[some], columns[some]] = odds[columns[some], rows[some]] = np.mean(opinions, 0)
        return odds
