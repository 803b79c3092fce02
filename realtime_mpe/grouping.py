"""The groups of remembered notes that are one player's each, from the affinities of all pairs.

Groups whose notes are surely one player's, on average over their pairs, join at once. Of the few groups that are left
far more is known than of any pair: how large they are, whether they play chords, whom else they are like. A second
perceptron looks at every two of them, and they join as long as it would rather join two than not. Several such pairs of
perceptrons, which have learnt from different ensembles, are of one opinion: the mean of theirs.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from .affinity import PAIR_FEATURES, TOGETHER, Affinity, Notes, layers, pair_features, pairs_of, perceptron, stacked
from .lines import LineOdds, unknown

SURE = 1.0  # mean log odds above which groups join without a second look
JOIN_ABOVE = -1.0  # log odds: groups join a little too readily rather than too seldom
JOIN_FEATURES = PAIR_FEATURES + 11
KEEP = 1.2  # log odds by which groups that were one voice join sooner and others later: order should last
NO_RIVAL = -6.0  # log odds of the next best group where there is none

PAIR_PREFIX, JOIN_PREFIX = "pair.", "join."  # of the weights' names


class Groups:
    """A partition of N notes that grows coarser. features (N, N, PAIR_FEATURES), odds (N, N), group (N,) 0, 1 ...

    What is kept are sums over all pairs of notes of two groups; a note is no pair with itself.
    """

    def __init__(self, features: np.ndarray, odds: np.ndarray, group: np.ndarray):
        self.group = group.copy()
        member = np.eye(group.max() + 1, dtype=np.float32)[group]
        self._size = member.sum(0)
        pairs = np.concatenate([np.moveaxis(features, -1, 0), odds[None]], dtype=np.float32)
        pairs[:, np.arange(len(group)), np.arange(len(group))] = 0.0
        self._sums = np.moveaxis(member.T @ pairs @ member, 0, -1)

    def __len__(self) -> int:
        return len(self._size)

    def candidates(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every two groups, a < b, (M,) each, and what is known of them, (M, JOIN_FEATURES) float32 of order one."""
        count, size = len(self), self._size
        itself = np.arange(count)
        mean = self._sums / np.outer(size, size)[..., None]
        within = self._sums[itself, itself] / np.maximum(size * (size - 1), 1)[:, None]
        odds = mean[..., -1].copy()
        odds[itself, itself] = -np.inf
        ranked = np.sort(odds, 1)
        best, next_best = ranked[:, -1:], ranked[:, -2:-1] if count > 2 else NO_RIVAL
        rival = np.where(odds < best, best, next_best)  # of a row, the best beside a column

        a, b = pairs_of(count)
        few, many = np.where(size[a] <= size[b], (a, b), (b, a))
        whole = np.ones(len(a), np.float32)
        known = (
            within[few, -1],
            within[many, -1],
            within[few, TOGETHER],
            within[many, TOGETHER],
            np.log2(size[few]) / 5,
            np.log2(size[many]) / 5,
            rival[few, many],
            rival[many, few],
            whole * count / 8,
            whole * np.log2(len(self.group)) / 7,
        )
        return a, b, np.concatenate([mean[a, b], np.stack(known, 1)], 1, dtype=np.float32)

    def join(self, a: int, b: int) -> None:
        """Group b becomes part of group a, a < b; the numbers above b move down."""
        self._sums[a] += self._sums[b]
        self._sums[:, a] += self._sums[:, b]
        self._size[a] += self._size[b]
        kept = np.arange(len(self)) != b
        self._sums, self._size = self._sums[kept][:, kept], self._size[kept]
        self.group[self.group == b] = a
        self.group[self.group > b] -= 1


class Grouping:
    """networks : weights of each, arrays by name, "pair.0.weight" .. "join.4.bias"; ValueError if one is missing.
    lines : what is known of notes by what is played alone."""

    def __init__(self, networks: Sequence[Mapping[str, np.ndarray]], lines: LineOdds = unknown):
        if not networks:
            raise ValueError("a grouping needs at least one network")
        self.affinity = Affinity(networks, PAIR_PREFIX)
        self.lines = lines
        self._joins = stacked([layers(weights, JOIN_PREFIX) for weights in networks])

    def __call__(self, notes: Notes, voice: np.ndarray, now: float, at_most: int) -> np.ndarray:
        """(N,) numbers of groups, 0, 1 ..., no more than ``at_most``; N of at least 2.

        voice : (N,) int 0, 1 ..., whose each note was so far.
        """
        features = pair_features(notes, self.lines(notes.pitch, notes.start, notes.end, now), now)
        whose = np.eye(voice.max() + 1)[voice]
        odds = self.affinity(features)
        groups = Groups(features, odds, linked(odds))
        while len(groups) > 1:
            a, b, known = groups.candidates()
            held = np.eye(len(groups))[groups.group].T @ whose
            held /= held.sum(1, keepdims=True)
            joins = self.join_odds(known) + KEEP * (2.0 * (held[a] * held[b]).sum(1) - 1.0)
            likest = int(np.argmax(joins))
            if joins[likest] <= JOIN_ABOVE and len(groups) <= at_most:
                break
            groups.join(a[likest], b[likest])
        return groups.group

    def join_odds(self, known: np.ndarray) -> np.ndarray:
        """(M, JOIN_FEATURES) -> (M,) log odds that two groups are one player's, by themselves."""
        return perceptron(self._joins, known).mean(0)


def linked(odds: np.ndarray, join_above: float = SURE) -> np.ndarray:
    """Agglomerative clustering by average linkage: (N, N) log odds -> (N,) numbers of groups, 0, 1 ... from the first
    note's on. Groups join while the mean of some two is above ``join_above``."""
    n = len(odds)
    mean = odds.astype(np.float64)
    np.fill_diagonal(mean, -np.inf)
    size = np.ones(n)
    group = np.arange(n)
    for _ in range(n - 1):
        a, b = sorted(np.unravel_index(np.argmax(mean), mean.shape))
        if mean[a, b] <= join_above:
            break
        joined = (size[a] * mean[a] + size[b] * mean[b]) / (size[a] + size[b])
        mean[a] = mean[:, a] = joined
        mean[b] = mean[:, b] = mean[a, a] = -np.inf
        size[a] += size[b]
        group[group == b] = a
    return np.unique(group, return_inverse=True)[1]
