"""The runtime's front ends as a torch module: same kernels, whole sequences at once."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realtime_mpe.analysis import AnalysisConfig
from realtime_mpe.cqt import FAINTEST, FLOOR_DB, RANGE_DB, SMOOTHING, THIN, audible, kernels


class FrontEnd(nn.Module):
    """margin : samples, whole hops, that centred kernels reach to either side of their frame; 0 for right-aligned."""

    def __init__(self, config: AnalysisConfig | None = None):
        super().__init__()
        self.config = config or AnalysisConfig()
        self.banks = kernels(self.config)
        self.margin = -(-max(bank.ahead for bank in self.banks) // self.config.hop) * self.config.hop
        for k, bank in enumerate(self.banks):
            self.register_buffer(f"bank{k}", torch.from_numpy(bank.kernels), persistent=False)
        self.register_buffer("smoothing", torch.from_numpy(SMOOTHING), persistent=False)

    def forward(self, audio: Tensor, context: int = 0) -> Tensor:
        """The audible ones of `levels`, as networks are fed with them."""
        return audible(self.levels(audio, context))

    def levels(self, audio: Tensor, context: int = 0) -> Tensor:
        """Levels of all frames, (B, n) samples -> (B, T, n_bins), equal to those of StreamingCqt on each row.

        Right-aligned: T = n // hop, row i is complete with sample (i + 1) * hop. Centred: row i is centred on sample
        context + i * hop, T = (n - 2 * context) // hop + 1; with ``context`` of at least ``margin`` the kernels see
        nothing but the audio, with less they see silence around it.
        """
        hop, n = self.config.hop, audio.shape[-1]
        centred = self.margin > 0
        first = context if centred else hop
        rows = (n - 2 * context) // hop + 1 if centred else n // hop
        heard = {1: audio}
        if any(bank.thin == THIN for bank in self.banks):
            heard[THIN] = F.pad(audio, (len(SMOOTHING) - THIN, 0)).unfold(-1, len(SMOOTHING), THIN) @ self.smoothing
        levels = []
        for k, bank in enumerate(self.banks):
            samples, at, step = heard[bank.thin], first // bank.thin, hop // bank.thin
            begin, end = at - bank.behind, at + (rows - 1) * step + bank.ahead
            piece = F.pad(samples, (max(-begin, 0), max(end - samples.shape[-1], 0)))
            piece = piece[..., max(begin, 0) : end + max(-begin, 0)]
            spectrum = piece.unfold(-1, bank.behind + bank.ahead, step) @ getattr(self, f"bank{k}")
            real, imaginary = spectrum.chunk(2, -1)
            decibels = 20.0 * torch.log10(torch.hypot(real, imaginary) + FAINTEST)
            levels.append((decibels - FLOOR_DB) / RANGE_DB)
        return torch.cat(levels, -1)
