"""The networks of the slot-attention paper (arXiv 2606.01460): a window of a mixture to an unordered set of sources.

`SlotNetwork` maps 12 x 216 x 23 (harmonics and validity masks, bins, frames) to what sounds in the mixture and to K
slots, each a source-like map of pitches. `TimbreEncoder` is the teacher of its timbre head.

The numbers of parameters are those of the paper's Table I and of its section III-B; they fix every layer up to small
permutations, but not the resolution: here the tall convolution has a stride of BINS_PER_PITCH, so that what follows it
has one row a pitch. A window then costs 1.6 instead of 5.2 billion multiplications and sees the same octave.

Shapes: B windows, C = 64 channels, P = 72 pitches, T frames (23), K slots, d = 192, E = 128 of a timbre embedding.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realtime_mpe.analysis import BINS_PER_PITCH

from .network import HARMONIC_BINS, POLYPHONY_CLASSES, harmonics

WINDOW = 23  # frames, 736 ms (section IV of the paper)
CHANNELS = 64
SLOT_DIM = 192
TIMBRE_DIM = 128
ITERATIONS = 3  # of slot attention; they share their weights
HARMONICS = HARMONIC_BINS[:6]  # half, 1 .. 5 times the frequency (section III-A); the live network hears more
INPUT_CHANNELS = 2 * len(HARMONICS)
TIMBRE_FRAMES = 46  # of one view of a stem, twice the window


@dataclass(frozen=True)
class SlotConfig:
    """What of the paper's modules a recipe has; `film` needs `timbre`."""

    slots: int = 4
    timbre: bool = False
    film: bool = False
    polyphony: bool = False

    def __post_init__(self) -> None:
        if self.film and not self.timbre:
            raise ValueError("FiLM is conditioned on the timbre head: set timbre too")


class SlotOutputs(NamedTuple):
    """Logits and probabilities of a window. What the recipe has no module for is None.

    mix : (B, P, T) logits.  slots : (B, K, P, T) probabilities.  activity : (B, K) logits.
    timbre : (B, K, E), not normalised.  polyphony : (B, T, POLYPHONY_CLASSES) logits.
    """

    mix: Tensor
    slots: Tensor
    activity: Tensor
    timbre: Tensor | None
    polyphony: Tensor | None


def harmonic_input(levels: Tensor) -> Tensor:
    """Levels (B, T, 216) -> (B, 12, 216, T): harmonics 1/2, 1 .. 5, then a mask each of where the front end reaches."""
    channels = [harmonics(x, HARMONICS) for x in (levels, torch.ones_like(levels))]
    return torch.cat(channels, 1).transpose(2, 3)


def conv(n_in: int, n_out: int, size: tuple[int, int], stride: tuple[int, int] = (1, 1)) -> nn.Sequential:
    """Same-size convolution over (pitch or bin, time), normalised; symmetric in time, so it looks ahead."""
    padding = size[0] // 2, size[1] // 2
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, size, stride, padding, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)
    )


class SlotAttention(nn.Module):
    """Slots compete for tokens: attention is normalised over the slots (section III-A)."""

    def __init__(self, slots: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(slots, SLOT_DIM) * SLOT_DIM**-0.5)
        self.token = nn.Linear(CHANNELS, SLOT_DIM)
        self.token_norm = nn.LayerNorm(SLOT_DIM)
        self.slot_norm = nn.LayerNorm(SLOT_DIM)
        self.query = nn.Linear(SLOT_DIM, SLOT_DIM, bias=False)
        self.key = nn.Linear(SLOT_DIM, SLOT_DIM, bias=False)
        self.value = nn.Linear(SLOT_DIM, SLOT_DIM, bias=False)
        self.update = nn.GRUCell(SLOT_DIM, SLOT_DIM)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, K, d)."""
        tokens = self.token_norm(self.token(tokens))
        key, value = self.key(tokens), self.value(tokens)
        slots = self.queries.expand(len(tokens), -1, -1)
        for _ in range(ITERATIONS):
            scores = self.query(self.slot_norm(slots)) @ key.transpose(1, 2) * SLOT_DIM**-0.5  # (B, K, N)
            attention = scores.softmax(1)
            attention = attention / (attention.sum(-1, keepdim=True) + 1e-6)
            slots = self.update((attention @ value).flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        return slots


class PolyphonyHead(nn.Module):
    """How many pitches sound in each frame of the mixture, 0 .. 7 and more (section III-C)."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = nn.Sequential(conv(CHANNELS, CHANNELS, (5, 5)), conv(CHANNELS, CHANNELS, (5, 5)))
        self.gather = nn.Conv2d(CHANNELS, CHANNELS // 2, 7, padding=3)
        self.gather_norm = nn.BatchNorm2d(CHANNELS // 2)
        self.count = nn.Linear(CHANNELS, POLYPHONY_CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, P, T) -> (B, T, POLYPHONY_CLASSES) logits."""
        x = F.relu(self.gather_norm(self.gather(self.spread(features))))
        return self.count(torch.cat([x.mean(2), x.amax(2)], 1).transpose(1, 2))


class SlotNetwork(nn.Module):
    def __init__(self, config: SlotConfig):
        super().__init__()
        self.config = config
        self.trunk = nn.Sequential(
            conv(INPUT_CHANNELS, CHANNELS, (5, 5)),
            conv(CHANNELS, CHANNELS, (39, 3), stride=(BINS_PER_PITCH, 1)),  # an octave and the pitch's own bins
            conv(CHANNELS, CHANNELS, (5, 5)),
        )
        self.mix = nn.Sequential(conv(CHANNELS, CHANNELS // 2, (7, 7)), nn.Conv2d(CHANNELS // 2, 1, 1))
        self.branch = nn.Sequential(conv(CHANNELS, CHANNELS, (5, 5)), conv(CHANNELS, CHANNELS, (5, 5)))
        self.attention = SlotAttention(config.slots)
        self.mask = nn.Linear(SLOT_DIM, CHANNELS)
        self.sharpness = nn.Parameter(torch.ones(1))  # of the masks: an inverse temperature
        self.activity = nn.Linear(SLOT_DIM, 1)
        self.timbre = self.film = self.polyphony = None
        if config.timbre:
            self.timbre = nn.Sequential(
                nn.LayerNorm(SLOT_DIM), nn.Linear(SLOT_DIM, SLOT_DIM), nn.GELU(), nn.Linear(SLOT_DIM, TIMBRE_DIM)
            )
        if config.film:
            self.film = nn.Sequential(
                nn.LayerNorm(TIMBRE_DIM), nn.Linear(TIMBRE_DIM, SLOT_DIM), nn.GELU(), nn.Linear(SLOT_DIM, 2 * CHANNELS)
            )
            nn.init.zeros_(self.film[-1].weight)  # begin as the network without it
            nn.init.zeros_(self.film[-1].bias)
        if config.polyphony:
            self.polyphony = PolyphonyHead()
        nn.init.constant_(self.mix[-1].bias, -3.0)  # about one pitch in twenty sounds

    def forward(self, x: Tensor) -> SlotOutputs:
        """(B, 12, 216, T), see `harmonic_input`. The masks of all slots sum to 1 in every cell; a slot's map is the
        mixture's probability times its mask times its activity gate."""
        features = self.trunk(x)  # (B, C, P, T)
        mix = self.mix(features)[:, 0]  # (B, P, T)
        slot_map = self.branch(features)  # (B, C, P, T)
        slots = self.attention(slot_map.flatten(2).transpose(1, 2))  # (B, K, d)
        timbre = self.timbre(slots) if self.timbre is not None else None  # (B, K, E)
        directions = self.mask(slots)  # (B, K, C)
        if self.film is not None:
            # <q, (1 + g) m + b> = <(1 + g) q, m> + <q, b>: the slot map is not copied for each slot.
            gain, offset = self.film(timbre).chunk(2, -1)  # (B, K, C) each
            shift = (directions * offset).sum(-1)[..., None, None]  # (B, K, 1, 1)
            directions = directions * (1 + gain)
        else:
            shift = 0.0
        scores = self.sharpness * (torch.einsum("bkc,bcpt->bkpt", directions, slot_map) + shift)
        activity = self.activity(slots)[..., 0]  # (B, K)
        gate = activity.sigmoid()[..., None, None]
        maps = mix.sigmoid()[:, None] * scores.float().softmax(1) * gate
        polyphony = self.polyphony(features) if self.polyphony is not None else None
        return SlotOutputs(mix, maps, activity, timbre, polyphony)


class TimbreEncoder(nn.Module):
    """Which source plays, whatever it plays: one view of an isolated stem to an embedding (section III-B)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv(1, CHANNELS, (5, 5), stride=(BINS_PER_PITCH, 2)),
            conv(CHANNELS, 2 * CHANNELS, (5, 5), stride=(2, 2)),
            conv(2 * CHANNELS, 2 * CHANNELS, (5, 5)),
        )
        self.embed = nn.Sequential(
            nn.LayerNorm(4 * CHANNELS),
            nn.Linear(4 * CHANNELS, TIMBRE_DIM),
            nn.GELU(),
            nn.Linear(TIMBRE_DIM, TIMBRE_DIM),
        )
        self.project = nn.Sequential(nn.Linear(TIMBRE_DIM, TIMBRE_DIM), nn.GELU(), nn.Linear(TIMBRE_DIM, TIMBRE_DIM))

    def forward(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Levels (B, T, 216) -> embedding (B, E) and its projection (B, E), which only the loss of training sees."""
        x = self.features(levels.transpose(1, 2)[:, None]).flatten(2).float()
        embedding = self.embed(torch.cat([x.mean(-1), (x.var(-1) + 1e-5).sqrt()], 1))
        return embedding, self.project(embedding)


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
