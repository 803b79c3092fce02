"""The live network: what sounds (mixture, onsets, polyphony) and an embedding of whose it is, for each pitch and frame.

Every convolution is causal in time, so the network fed frame by frame with its states equals the one-shot run.
Output at frame n, which has heard samples up to ``(n + 1) * HOP``, speaks of label frame ``n + 1 - lookahead`` for
every look-ahead from 0 to MAX_LOOKAHEAD at once: the user's quality knob costs one output row each.

Shapes: B sequences, T frames, P = 72 pitches, C channels, D embedding dimensions, L = MAX_LOOKAHEAD + 1.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realtime_mpe.analysis import BINS_PER_PITCH, MAX_LOOKAHEAD, N_BINS, N_PITCHES

HARMONIC_BINS = (-36, 0, 36, 57, 72, 84, 93, 101, 108)  # half, 1 .. 8 times the frequency at 36 bins an octave
OCTAVE = 12  # pitches
CENTRE_MOMENTUM = 0.05
POLYPHONY_CLASSES = 8  # 0..7 and more (section III of the slot-attention paper clips at 7)


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes. ``trunk`` and ``branch`` list the (time dilation, pitch dilation) of their blocks.

    With 0 ``embedding_channels`` there is no branch: such a network hears what sounds, and not who plays.
    """

    channels: int = 48
    embedding_channels: int = 48
    embedding_dim: int = 32
    trunk: tuple[tuple[int, int], ...] = ((1, 1), (1, OCTAVE), (2, 1), (2, OCTAVE), (4, 1), (4, OCTAVE))
    branch: tuple[tuple[int, int], ...] = ((1, 1), (1, OCTAVE), (2, 1), (2, OCTAVE), (4, 1))
    max_voices: int = 8  # told apart at most

    @property
    def tells_players(self) -> bool:
        return self.embedding_channels > 0

    def to_dict(self) -> dict:
        return asdict(self)


class CausalConv(nn.Module):
    """3 x 3 convolution over (time, pitch), dilated, looking only back in time: (B, C, T, P) -> (B, C', T, P)."""

    def __init__(self, n_in: int, n_out: int, time_dilation: int, pitch_dilation: int):
        super().__init__()
        self.context = 2 * time_dilation
        self.conv = nn.Conv2d(
            n_in, n_out, 3, dilation=(time_dilation, pitch_dilation), padding=(0, pitch_dilation), bias=False
        )

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([state.to(x.dtype), x], 2)
        return self.conv(x), x[:, :, -self.context :]


class Block(nn.Module):
    """Residual block: causal 3 x 3, then 1 x 1."""

    def __init__(self, channels: int, time_dilation: int, pitch_dilation: int):
        super().__init__()
        self.spread = CausalConv(channels, channels, time_dilation, pitch_dilation)
        self.norm1 = nn.BatchNorm2d(channels)
        self.mix = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.spread(x, state)
        y = self.norm2(self.mix(F.relu(self.norm1(y))))
        return F.relu(x + y), state


class LiveNetwork(nn.Module):
    def __init__(self, config: NetworkConfig | None = None):
        super().__init__()
        self.config = config = config or NetworkConfig()
        channels, branch = config.channels, config.embedding_channels
        lookaheads = MAX_LOOKAHEAD + 1
        # Five bins from one below the pitch's own three to one above: vibrato and detuning stay inside.
        self.stem = nn.Conv2d(len(HARMONIC_BINS), channels, (1, 5), stride=(1, BINS_PER_PITCH), padding=(0, 1))
        self.trunk = nn.ModuleList(Block(channels, *dilation) for dilation in config.trunk)
        self.detect = CausalConv(channels, channels, 1, 1)
        self.detect_norm = nn.BatchNorm2d(channels)
        self.mix = nn.Conv2d(channels, lookaheads, 1)
        self.onset = nn.Conv2d(channels, lookaheads, 1)
        self.polyphony = nn.Linear(2 * channels, POLYPHONY_CLASSES)
        # The branch reads the stem beside the trunk: detection is free to forget timbre.
        if config.tells_players:
            self.to_branch = nn.Conv2d(2 * channels, branch, 1, bias=False)
            self.branch_norm = nn.BatchNorm2d(branch)
            self.branch = nn.ModuleList(Block(branch, *dilation) for dilation in config.branch)
            self.register_buffer("centre", torch.zeros(branch))  # mean of the branch's features where something sounds
            self.embedding = nn.Linear(branch, config.embedding_dim, bias=False)
        nn.init.constant_(self.mix.bias, -3.0)  # about one pitch in twenty sounds
        nn.init.constant_(self.onset.bias, -5.0)

    def initial_states(self, batch: int, like: Tensor) -> list[Tensor]:
        """Silence: one (B, C, context, P) tensor a causal convolution, in the order they run."""
        convs = [b.spread for b in self.trunk] + [self.detect]
        if self.config.tells_players:
            convs += [b.spread for b in self.branch]
        return [
            torch.zeros(batch, c.conv.in_channels, c.context, N_PITCHES, device=like.device).to(
                memory_format=torch.channels_last
            )
            for c in convs
        ]

    @torch.no_grad()
    def follow_centre(self, features: Tensor, sounding: Tensor) -> None:
        """Move ``centre`` towards the branch's mean, features (B, C', T, P), where sounding (B, T, P) bool.

        All notes share a large component, "a note"; left in, every cosine is near 1 and players hardly differ.
        """
        weight = sounding.float()
        heard = weight.sum()  # nothing here asks the device for a number: it would wait for all that was sent to it
        mean = (features.float() * weight[:, None]).sum((0, 2, 3)) / heard.clamp(min=1)
        self.centre.lerp_(mean, CENTRE_MOMENTUM * (heard > 0))

    def forward(self, frames: Tensor, states: list[Tensor] | None = None) -> tuple[dict[str, Tensor], list[Tensor]]:
        """frames (B, T, n_bins) levels -> outputs and the states after the last frame.

        mix, onset : (B, T, L, P) logits.  polyphony : (B, T, 8) logits for look-ahead 1.
        If there is a branch, also embedding : (B, T, P, D), not normalised, and branch : (B, C', T, P), its features.
        """
        states = self.initial_states(len(frames), frames) if states is None else list(states)
        new_states = []
        x = harmonics(frames, HARMONIC_BINS)  # (B, H, T, 216)
        stem = x = F.relu(self.stem(x))  # (B, C, T, 72)
        for block in self.trunk:
            x, state = block(x, states[len(new_states)])
            new_states.append(state)
        y, state = self.detect(x, states[len(new_states)])
        new_states.append(state)
        y = F.relu(self.detect_norm(y))
        pooled = torch.cat([x.mean(3), x.amax(3)], 1).transpose(1, 2)  # (B, T, 2C)
        outputs = {
            "mix": self.mix(y).transpose(1, 2),
            "onset": self.onset(y).transpose(1, 2),
            "polyphony": self.polyphony(pooled),
        }
        if not self.config.tells_players:
            return outputs, new_states
        z = F.relu(self.branch_norm(self.to_branch(torch.cat([stem, x], 1))))
        for block in self.branch:
            z, state = block(z, states[len(new_states)])
            new_states.append(state)
        outputs["branch"] = z
        with torch.autocast(frames.device.type, enabled=False):  # differences of timbre are finer than bfloat16
            outputs["embedding"] = self.embedding(z.permute(0, 2, 3, 1).float() - self.centre)
        return outputs, new_states


def harmonics(frames: Tensor, shifts: Sequence[int]) -> Tensor:
    """The bins of the pitches from frames (B, T, n_bins), in each of H channels bin k + its shift for bin k: (B, H, T,
    N_BINS); silence beyond the reach."""
    below = max(-min(shifts), 0)
    frames = F.pad(frames, (below, max(max(shifts), 0)))
    own = torch.arange(N_BINS, device=frames.device)
    bins = torch.stack([own + below + shift for shift in shifts])
    return frames[..., bins].transpose(1, 2)
