"""The runtime's front end as a torch module: same kernels, whole sequences at once."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realtime_mpe.analysis import AnalysisConfig
from realtime_mpe.cqt import FLOOR_DB, MAX_LEVEL, RANGE_DB, kernels


class FrontEnd(nn.Module):
    def __init__(self, config: AnalysisConfig | None = None):
        super().__init__()
        self.config = config or AnalysisConfig()
        self.register_buffer("kernels", torch.from_numpy(kernels(self.config)), persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """(B, n) samples -> (B, n // hop, 216) levels, equal to StreamingCqt on each row."""
        length, hop = len(self.kernels), self.config.hop
        windows = F.pad(audio, (length - hop, 0)).unfold(-1, length, hop)
        spectrum = windows @ self.kernels
        real, imaginary = spectrum.chunk(2, -1)
        decibels = 20.0 * torch.log10(torch.hypot(real, imaginary) + 1e-5)
        return ((decibels - FLOOR_DB) / RANGE_DB).clamp(0.0, MAX_LEVEL)
