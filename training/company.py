"""Training of what a note sounds like in its company, see `realtime_mpe.timbre`, on the notes that the engine detects.

As the network's own embedding does, a note should find the other notes of its player, from its first frames. What is
learnt here is what detected notes, their errors and the notes beside them make of that.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realtime_mpe.timbre import ClearedTimbre, timbre_inputs

from .losses import IMPOSSIBLE, TEMPERATURE
from .pointer import Performance, TrueMemory, study

HIDDEN = 128
STEPS = 8000
BATCH = 4  # performances
LEARNING_RATE = 2e-3
AS_DECIDED = 0.6  # of the notes are seen as they were when their voice was chosen, the others somewhat later
FEWEST_NOTES = 4  # of a performance


class CompanyNetwork(nn.Module):
    """The torch twin of `realtime_mpe.timbre.ClearedTimbre`."""

    def __init__(self, embedding_dim: int):
        super().__init__()
        self.embedding_dim = embedding_dim
        self.layers = nn.Sequential(
            nn.Linear(2 * embedding_dim + 3, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, embedding_dim),
        )
        nn.init.zeros_(self.layers[-1].weight)  # at first a note sounds as the network says
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., 2 D + 3) of `timbre_inputs` -> (..., D) of length 1."""
        return F.normalize(inputs[..., : self.embedding_dim] + self.layers(inputs), dim=-1)

    def weights(self) -> dict[str, np.ndarray]:
        return {name: value.detach().cpu().numpy() for name, value in self.layers.state_dict().items()}


class Views(NamedTuple):
    """N notes of a performance, each by one player. player (N,); inputs (N, V, 2 D + 3) float32 of moments of each
    note, its decision first and its last one last."""

    player: np.ndarray
    inputs: np.ndarray


class OverheardMemory(TrueMemory):
    """Keeps what every note sounded like when it was decided on, whenever that was twice as long, and in the end."""

    MOMENTS = 8

    def __init__(self, max_voices: int, steps: int):
        super().__init__(max_voices, steps)
        self.moments: dict[int, list[tuple[np.ndarray, float]]] = {}  # of each note, by turn

    def _give(self, note, choice):
        voice = super()._give(note, choice)
        self.moments[self._turns] = [(note.total / note.steps, note.steps / self._steps)] * 2
        return voice

    def _learn(self, rows, sound):
        super()._learn(rows, sound)
        for row in rows:
            steps = int(self._heard[row])
            moment, kept = (self._total[row] / steps, steps / self._steps), self.moments[int(self._turn[row])]
            kept[-1] = moment
            if steps & (steps - 1) == 0:
                kept.append(moment)


def overhear(performance: Performance, max_voices: int) -> Views:
    memory = study(performance, OverheardMemory(max_voices, performance.steps))
    player, inputs = [], []
    for turn, (players, _) in enumerate(memory.given, 1):
        if len(players) == 1:
            moments = memory.moments[turn]
            moments = moments[:1] * (OverheardMemory.MOMENTS - len(moments)) + moments
            mean, frames = zip(*moments, strict=True)
            player.append(next(iter(players)))
            inputs.append(timbre_inputs(np.array(mean), np.array(frames)))
    return Views(np.array(player), np.array(inputs))


def fit_company(
    train: Sequence[Performance], max_voices: int, seed: int = 0, say: Callable[[str], None] = print
) -> CompanyNetwork:
    network = CompanyNetwork(train[0].values.shape[1])
    views = [overhear(performance, max_voices) for performance in train]
    views = [v for v in views if len(v.player) >= FEWEST_NOTES and len(set(v.player.tolist())) > 1]
    if not views:  # nobody to tell from anybody
        return network.eval()
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    total = 0.0
    for step in range(1, STEPS + 1):
        loss = sum(contrast(network, views[k], rng) for k in rng.integers(len(views), size=BATCH)) / BATCH
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        total += float(loss.detach())
        if step % (STEPS // 4) == 0:
            say(f"timbre in company: step {step} of {STEPS}, loss {total / (STEPS // 4):.3f}")
            total = 0.0
    return network.eval()


def contrast(network: CompanyNetwork, views: Views, rng: np.random.Generator) -> Tensor:
    """InfoNCE: each note as it was at some moment should find the others, as they were in the end, of its player."""
    n, moments = views.inputs.shape[:2]
    moment = np.where(rng.random(n) < AS_DECIDED, 0, rng.integers(1, moments, n))
    early = network(torch.from_numpy(views.inputs[np.arange(n), moment]))
    whole = network(torch.from_numpy(views.inputs[:, -1]))
    others = ~torch.eye(n, dtype=torch.bool)
    player = torch.from_numpy(views.player)
    same = (player[:, None] == player) & others
    usable = same.any(1) & (others & ~same).any(1)
    log_probability = (early @ whole.T / TEMPERATURE).masked_fill(~others, IMPOSSIBLE).log_softmax(1)
    found = (log_probability * same).sum(1) / same.sum(1).clamp(min=1)
    return -(found * usable).sum() / usable.sum().clamp(min=1)


def as_timbre(network: CompanyNetwork) -> ClearedTimbre:
    """What the runtime makes of it."""
    return ClearedTimbre(network.weights())
