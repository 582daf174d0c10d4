"""Two-dimensional sine position encoding of a padded feature map (Attention Is All You Need, section 3.5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class SinePositionEncoding(nn.Module):
    """Channels of y, then of x, dim/2 each; phases span 0..2 pi over the unpadded part of the image."""

    def __init__(self, dim: int, temperature: float = 10000.0) -> None:
        super().__init__()
        self.features = dim // 2
        self.temperature = temperature

    def forward(self, mask: Tensor) -> Tensor:
        """mask (B,h,w) True on padding -> (B,dim,h,w) float32."""
        visible = (~mask).to(torch.float32)
        rows = visible.cumsum(1)
        columns = visible.cumsum(2)
        rows = (rows - 0.5) / (rows[:, -1:, :] + 1e-6) * (2.0 * math.pi)
        columns = (columns - 0.5) / (columns[:, :, -1:] + 1e-6) * (2.0 * math.pi)
        index = torch.arange(self.features, dtype=torch.float32, device=mask.device)
        wavelengths = self.temperature ** (2.0 * (index // 2) / self.features)
        encoded = [self._waves(axis.unsqueeze(-1) / wavelengths) for axis in (rows, columns)]
        return torch.cat(encoded, -1).permute(0, 3, 1, 2)

    @staticmethod
    def _waves(phases: Tensor) -> Tensor:
        return torch.stack([phases[..., 0::2].sin(), phases[..., 1::2].cos()], -1).flatten(-2)
