"""Deformable attention of one image for inference on a GPU, with fewer kernel launches than `DeformableAttention`.

The GPU computes faster than the host launches kernels, so the number of operators sets the time. Offsets and weights of
the samples come from one product and constants of the image size are precomputed. Maps are not padded, because the
kernels of ``deformable_attention`` check bounds. The interface is that of `frame_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from motip.model.deformable_attention import DeformableAttention, deformable_attention
from motip.model.fast.packed import PackedLinear


class GpuMaps:
    """Sizes of the value maps of all levels.

    Args:
        shapes: (h, w) of each level.
        device: device of the maps.

    Attributes:
        sizes: (levels, 2) float, width and height of each level.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> None:
        self.shapes = list(shapes)
        self.sizes = torch.tensor([[width, height] for height, width in shapes], dtype=torch.float32, device=device)

    def sampler(self, points: int) -> GpuSampler:
        return GpuSampler(self, points)


class GpuSampler:
    """Sampling locations in 0..1 of each map, with axes of size 1 for heads and points."""

    def __init__(self, maps: GpuMaps, points: int) -> None:
        self.maps = maps
        self._points = points
        self.pixels = 1.0 / maps.sizes[:, None]
        """(levels, 1, 2), one pixel in 0..1 of each map."""

    def locations(self, relative: Tensor) -> Tensor:
        """Reference points (Q, levels, 2), (x, y) in 0..1 -> base locations of all samples (Q, 1, levels, 1, 2)."""
        return relative[:, None, :, None]

    def scales(self, boxes: Tensor) -> Tensor:
        """Box sizes (Q, levels, 2) in 0..1 -> length of one unit of offset (Q, 1, levels, 1, 2)."""
        return (boxes * (0.5 / self._points))[:, None, :, None]


class GpuAttention:
    """`DeformableAttention` with packed weights, for one image on a GPU."""

    def __init__(self, attention: DeformableAttention, dtype: torch.dtype) -> None:
        self.heads, self.points = attention.heads, attention.points
        self._samples = (attention.heads, attention.levels, attention.points)
        both = (attention.sampling_offsets, attention.attention_weights)
        weight, bias = (torch.cat([getattr(linear, name) for linear in both]) for name in ("weight", "bias"))
        self._offsets_and_scores = PackedLinear(weight, bias, dtype)
        self._value = PackedLinear.of(attention.value_proj, dtype)
        self._output = PackedLinear.of(attention.output_proj, dtype)

    def maps(self, shapes: Sequence[tuple[int, int]], memory: Tensor) -> GpuMaps:
        """Map sizes for values of `memory` (S,D) on levels of these (h, w)."""
        return GpuMaps(shapes, memory.device)

    def table(self, maps: GpuMaps, memory: Tensor, padding: Tensor | None) -> Tensor:
        """Project `memory` (S,D) to values (1, S, heads, channels); zero where padding (S,) is True."""
        value = self._value(memory)
        value = value if padding is None else value.masked_fill_(padding[:, None], 0.0)
        return value.view(1, len(value), self.heads, -1)

    def __call__(
        self,
        sampler: GpuSampler,
        table: Tensor,
        query: Tensor,
        locations: Tensor,
        scales: Tensor | None,
        shortcut: Tensor,
    ) -> Tensor:
        """`shortcut` (Q,D) plus the attention output of the queries (Q,D) -> (Q,D).

        Args:
            table: from ``table``.
            locations: from ``sampler.locations``.
            scales: from ``sampler.scales``; None: offsets are in pixels.
        """
        heads, levels, points = self._samples
        both = self._offsets_and_scores(query).float()
        offsets, scores = both.split([2 * heads * levels * points, heads * levels * points], 1)
        scales = sampler.pixels if scales is None else scales
        locations = torch.addcmul(locations, offsets.unflatten(1, (*self._samples, 2)), scales)
        weights = scores.unflatten(1, (heads, levels * points)).softmax(-1).view(1, -1, *self._samples)
        attended = deformable_attention(table, sampler.maps.shapes, locations[None], weights)[0]
        return self._output.linear_add(attended, shortcut)
