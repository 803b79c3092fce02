"""Training of the affinity: which remembered notes are one player's, from memories as the engine has them.

The runtime's own `VoiceMemory` is run over re-mixed performances, and is looked into at random moments: some notes are
a second old by then and others have only begun, as it will be live.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realtime_mpe.affinity import PAIR_FEATURES, Affinity, pair_features
from realtime_mpe.errors import UserError

from .pointer import Performance, StudiedMemory, perceptron, study

HIDDEN = 48
LOOKS = 0.06  # share of the hops in which notes begin, after which a memory is looked into
PAIRS = 600  # of a look
NEWEST = 6.0  # how often a pair with a note that has just begun is drawn, for every one of the others
EPOCHS = 4
BATCH = 2048
LEARNING_RATE = 3e-3


class AffinityNetwork(nn.Module):
    """The torch twin of `realtime_mpe.affinity.Affinity`: (..., PAIR_FEATURES) -> (...,) log odds."""

    def __init__(self):
        super().__init__()
        self.pair = perceptron(PAIR_FEATURES, HIDDEN)
        self.register_buffer("mean", torch.zeros(PAIR_FEATURES))
        self.register_buffer("deviation", torch.ones(PAIR_FEATURES))

    def forward(self, features: Tensor) -> Tensor:
        return self.pair((features - self.mean) / self.deviation)[..., 0]

    def weights(self) -> dict[str, np.ndarray]:
        """With the standardisation of the features folded into the first layer."""
        weights = {name: value.detach().cpu() for name, value in self.pair.state_dict().items()}
        first = weights["0.weight"] / self.deviation.cpu()
        folded = {"0.weight": first, "0.bias": weights["0.bias"] - first @ self.mean.cpu()}
        return {name: value.numpy() for name, value in (weights | folded).items()}


class WatchedMemory(StudiedMemory):
    """Keeps (features, one player's or not) of random pairs of notes that are remembered at random moments."""

    def __init__(self, max_voices: int, seed: int):
        super().__init__(lambda features, new: np.zeros(len(features) + 1), max_voices, follow_truth=1.0)
        self._looks = np.random.default_rng(seed)
        self._looked = 0  # turn
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []

    def hear(self, embedding: np.ndarray) -> None:
        begun = self._turns - self._looked
        self._looked = self._turns
        super().hear(embedding)
        if begun and self._looks.random() < LOOKS:
            self.look(begun)

    def look(self, begun: int = 0) -> None:
        """Draw PAIRS of the remembered notes, ``begun`` of which have only just begun."""
        # Of ghosts nobody knows whose they are; of unisons it is both.
        player = np.array([next(iter(o)) if len(o) == 1 else -1 for o in self.owners()])
        rows, columns = np.triu_indices(self._n, 1)
        known = (player[rows] >= 0) & (player[columns] >= 0)
        rows, columns = rows[known], columns[known]
        if len(rows):
            weight = np.where(columns >= self._n - begun, NEWEST, 1.0)
            drawn = self._looks.choice(len(rows), PAIRS, p=weight / weight.sum())
            rows, columns = rows[drawn], columns[drawn]
            features = pair_features(self.notes(), self._hop - 1)
            self.pairs.append((features[rows, columns], player[rows] == player[columns]))


def fit_affinity(
    train: Sequence[Performance], max_voices: int, seed: int = 0, say: Callable[[str], None] = print
) -> AffinityNetwork:
    """UserError if no two notes are heard whose players are known."""
    watched = [study(performance, WatchedMemory(max_voices, seed + k)) for k, performance in enumerate(train)]
    for memory in watched:
        memory.look()  # at least once
    pairs = [pair for memory in watched for pair in memory.pairs]
    if not pairs:
        raise UserError("the network detects too few notes to learn players from; train it for more --hours")
    features, same = (torch.from_numpy(np.concatenate(side)) for side in zip(*pairs, strict=True))
    torch.manual_seed(seed)
    network = AffinityNetwork()
    network.mean, network.deviation = features.mean(0), features.std(0) + 1e-3
    steps = EPOCHS * -(-len(same) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    total = 0.0
    for _ in range(EPOCHS):
        total = 0.0
        for index in torch.randperm(len(same)).split(BATCH):
            loss = F.binary_cross_entropy_with_logits(network(features[index]), same[index].float())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(index) / len(same)
    say(f"affinity: {len(same)} pairs, loss {total:.3f}")
    return network.eval()


def as_affinity(network: AffinityNetwork) -> Affinity:
    return Affinity(network.weights())
