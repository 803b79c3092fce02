"""Training of the grouping: which remembered notes are one player's, from memories as the engine has them.

The runtime's own `VoiceMemory` is run over performances, and is looked into at random moments: some notes are a second
old by then and others have only begun, as it will be live. The affinity of pairs is learnt first. Then groups are
joined in the same memories, the likeliest first, and joining is learnt from what is met on the way: first in the right
order, then by what has been learnt, its mistakes included (dataset aggregation, Ross et al. 2011).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realtime_mpe.affinity import PAIR_FEATURES, Affinity, Notes, pair_features, pairs_of
from realtime_mpe.errors import UserError
from realtime_mpe.grouping import JOIN_FEATURES, JOIN_PREFIX, PAIR_PREFIX, Grouping, Groups, linked
from realtime_mpe.lines import LineOdds, unknown
from realtime_mpe.timbre import Timbre, alone

from .pointer import Performance, TrueMemory, perceptron, study

HIDDEN_PAIR, HIDDEN_JOIN = 48, 64
LOOKS = 0.06  # share of the hops in which notes begin, after which a memory is looked into
PAIRS = 600  # of a look
NEWEST = 6.0  # how often a pair with a note that has just begun is drawn, for every one of the others
PAIR_EPOCHS, PAIR_BATCH = 4, 2048
JOIN_EPOCHS, JOIN_BATCH = 6, 1024
JOIN_LOOKS = 3  # of a performance, in each round
FOLLOW_TRUTH = (0.9, 0.3, 0.3)  # share of right joins in each round
FEWEST_STEPS = 1000  # of a small set more epochs are needed
CONTENDERS = 8  # the likeliest joins of every step are learnt from: what is out of the question teaches little
LEARNING_RATE = 3e-3


class Look(NamedTuple):
    """A memory at one moment. lines : (N, N) log odds, see `LineOdds`.  begun : how many of the notes, the last
    ones, have only just begun.  players : of each note, an empty set for a ghost."""

    notes: Notes
    lines: np.ndarray
    now: float
    begun: int
    players: list[frozenset[int]]


class StandardPerceptron(nn.Module):
    """(..., n_in) -> (...,) log odds, of features that it brings to mean 0 and deviation 1 itself."""

    def __init__(self, n_in: int, hidden: int):
        super().__init__()
        self.layers = perceptron(n_in, hidden)
        self.register_buffer("mean", torch.zeros(n_in))
        self.register_buffer("deviation", torch.ones(n_in))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers((features - self.mean) / self.deviation)[..., 0]

    def weights(self) -> dict[str, np.ndarray]:
        """With the standardisation of the features folded into the first layer."""
        weights = {name: value.detach().cpu() for name, value in self.layers.state_dict().items()}
        first = weights["0.weight"] / self.deviation.cpu()
        folded = {"0.weight": first, "0.bias": weights["0.bias"] - first @ self.mean.cpu()}
        return {name: value.numpy() for name, value in (weights | folded).items()}

    def fit(self, features: np.ndarray, same: np.ndarray, epochs: int, batch: int) -> float:
        """From anew, for so many epochs at least; features (N, n_in), same (N,) 0..1. Returns the cross entropy."""
        features, same = torch.from_numpy(features), torch.from_numpy(same).float()
        self.mean, self.deviation = features.mean(0), features.std(0, correction=0) + 1e-3
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        epochs = max(epochs, -(-FEWEST_STEPS // -(-len(same) // batch)))
        optimizer = torch.optim.AdamW(self.parameters(), LEARNING_RATE, weight_decay=1e-2)
        steps = epochs * -(-len(same) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        for _epoch in range(epochs):
            total = 0.0
            for index in torch.randperm(len(same)).split(batch):
                loss = F.binary_cross_entropy_with_logits(self(features[index]), same[index])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += float(loss.detach()) * len(index) / len(same)
        return total


class GroupingNetwork(nn.Module):
    """The torch twin of one network of `realtime_mpe.grouping.Grouping`: pairs of notes, and pairs of groups."""

    def __init__(self):
        super().__init__()
        self.pair = StandardPerceptron(PAIR_FEATURES, HIDDEN_PAIR)
        self.join = StandardPerceptron(JOIN_FEATURES, HIDDEN_JOIN)

    def weights(self) -> dict[str, np.ndarray]:
        parts = (PAIR_PREFIX, self.pair), (JOIN_PREFIX, self.join)
        return {f"{prefix}{name}": weight for prefix, part in parts for name, weight in part.weights().items()}


class WatchedMemory(TrueMemory):
    """Is looked into at random moments."""

    def __init__(self, max_voices: int, seed: int, steps: int, timbre: Timbre = alone, lines: LineOdds = unknown):
        super().__init__(max_voices, steps, timbre)
        self._lines = lines
        self._moments = np.random.default_rng(seed)
        self._looked = 0  # turn
        self.looks: list[Look] = []

    def hear(self, embedding: np.ndarray) -> None:
        begun = self._turns - self._looked
        self._looked = self._turns
        super().hear(embedding)
        if begun and self._moments.random() < LOOKS:
            self.look(begun)

    def look(self, begun: int = 0) -> None:
        if self._n >= 2:
            notes = self.notes()
            kept = Notes(*(column.astype(np.float32) for column in notes[:2]), *(column.copy() for column in notes[2:]))
            lines = self._lines(kept.pitch, kept.start, kept.end, self._now)
            self.looks.append(Look(kept, lines, self._now, begun, self.owners()))


def fit_grouping(
    train: Sequence[Performance],
    max_voices: int,
    timbre: Timbre = alone,
    lines: LineOdds = unknown,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> GroupingNetwork:
    """UserError if no two notes are heard whose players are known."""
    watched = []
    for number, performance in enumerate(train):
        watched.append(study(performance, WatchedMemory(max_voices, seed + number, performance.steps, timbre, lines)))
        watched[-1].look()  # at least once
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    network = GroupingNetwork()
    pairs = [drawn for memory in watched for look in memory.looks if (drawn := draw_pairs(look, rng)) is not None]
    if not pairs:
        raise UserError("the network detects too few notes to learn players from; train it for more --hours")
    features, same = map(np.concatenate, zip(*pairs, strict=True))
    say(f"affinity: {len(same)} pairs, loss {network.pair.fit(features, same, PAIR_EPOCHS, PAIR_BATCH):.3f}")

    affinity = Affinity([network.pair.weights()])
    met: list[tuple[np.ndarray, np.ndarray]] = []
    for round_number, follow in enumerate(FOLLOW_TRUTH, 1):
        grouping = as_grouping([network], lines) if met else None
        for memory in watched:
            for number in rng.permutation(len(memory.looks))[:JOIN_LOOKS]:
                met += joins(memory.looks[number], affinity, grouping, follow, rng)
        if not met:  # a single group everywhere: one player, or notes that all sound alike
            return network.eval()
        features, same = map(np.concatenate, zip(*met, strict=True))
        loss = network.join.fit(features, same, JOIN_EPOCHS, JOIN_BATCH)
        say(f"joining, round {round_number} of {len(FOLLOW_TRUTH)}: {len(same)} pairs of groups, loss {loss:.3f}")
    return network.eval()


def draw_pairs(look: Look, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray] | None:
    """(PAIRS, PAIR_FEATURES) and (PAIRS,) bool: whether they are one player's; None if no pair's players are known."""
    # Of ghosts nobody knows whose they are; of unisons it is both.
    player = np.array([next(iter(players)) if len(players) == 1 else -1 for players in look.players])
    rows, columns = pairs_of(len(player))
    known = (player[rows] >= 0) & (player[columns] >= 0)
    rows, columns = rows[known], columns[known]
    if not len(rows):
        return None
    weight = np.where(columns >= len(player) - look.begun, NEWEST, 1.0)
    drawn = rng.choice(len(rows), PAIRS, p=weight / weight.sum())
    rows, columns = rows[drawn], columns[drawn]
    return pair_features(look.notes, look.lines, look.now)[rows, columns], player[rows] == player[columns]


def joins(
    look: Look, affinity: Affinity, grouping: Grouping | None, follow_truth: float, rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What is met when the groups of a memory are joined one by one, (M, JOIN_FEATURES) and (M,) each step.

    A pair of groups is right to the degree that two notes, one of each, are likely to be one player's. Without a
    grouping, the likeliest join is that with the highest mean of log odds.
    """
    features = pair_features(look.notes, look.lines, look.now)
    odds = affinity(features)
    groups = Groups(features, odds, linked(odds))
    share = shares(look.players)
    met = []
    while len(groups) > 1:
        a, b, known = groups.candidates()
        right, judged = agreement(groups.group, share)
        right, judged = right[a, b], judged[a] & judged[b]
        likely = grouping.join_odds(known) if grouping else known[:, PAIR_FEATURES].copy()
        contend = np.flatnonzero(judged)
        contend = contend[np.argsort(-likely[contend])[:CONTENDERS]]
        if len(contend):
            met.append((known[contend], right[contend]))
        followed = rng.random() < follow_truth
        if followed:
            likely = np.where(right > 0.5, likely, -np.inf)
        best = int(np.argmax(likely))
        if likely[best] == -np.inf or (grouping and likely[best] < 0):
            break
        groups.join(a[best], b[best])
    return met


def shares(players: Sequence[frozenset[int]]) -> np.ndarray:
    """(N, P): how much of each note is whose; 0 everywhere for a ghost."""
    names = sorted(set().union(*players))
    share = np.zeros((len(players), len(names)), np.float32)
    for row, own in enumerate(players):
        for player in own:
            share[row, names.index(player)] = 1 / len(own)
    return share


def agreement(group: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(K, K) chance that a note of either group is one player's with a note of the other; (K,) whether any is known."""
    held = np.zeros((group.max() + 1, share.shape[1]), np.float32)
    np.add.at(held, group, share)
    known = held.sum(1, keepdims=True)
    part = held / np.maximum(known, 1e-6)
    return part @ part.T, known[:, 0] > 0


def as_grouping(networks: Sequence[GroupingNetwork], lines: LineOdds = unknown) -> Grouping:
    """What the runtime makes of them: their mean opinion."""
    return Grouping([network.weights() for network in networks], lines)
