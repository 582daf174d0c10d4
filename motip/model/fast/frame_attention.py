"""Deformable attention of one image for inference on a CPU, with half the memory passes of `DeformableAttention`.

The maps of all levels lie in one zero-padded table. Samples outside their map are clamped to the padding and read
zeros, without bounds checks. Constants of the sampling locations are computed once per image size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from motip.model.deformable_attention import DeformableAttention
from motip.model.fast.packed import PackedLinear


class PaddedMaps:
    """Table of the zero-padded value maps of all levels.

    Args:
        shapes: (h, w) of each level.
        heads: number of attention heads.
        channels: channels of one head.

    Attributes:
        sizes: (levels, 2) float, width and height of each level.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], heads: int, channels: int) -> None:
        self.shapes = list(shapes)
        self.heads = heads
        self.sizes = torch.tensor([[width, height] for height, width in shapes], dtype=torch.float32)
        # One column of zeros on the left is also the right padding of the row above. The second row below and two
        # more pixels are read only by samples on the padding itself, with weight zero.
        self._strides = [width + 1 for _, width in shapes]
        rows = [(height + 3) * stride + 2 for (height, _), stride in zip(shapes, self._strides, strict=True)]
        self._starts = [sum(rows[:level]) for level in range(len(rows))]
        self._rows = sum(rows)
        self._table = torch.zeros(heads, self._rows, channels)
        self._inside: list[Tensor] = []
        for (height, _), stride, start in zip(shapes, self._strides, self._starts, strict=True):
            padded = self._table[:, start : start + (height + 3) * stride].unflatten(1, (height + 3, stride))
            self._inside.append(padded[:, 1 : height + 1, 1:])

    def fill(self, value: Tensor) -> Tensor:
        """value (S, heads * channels), levels concatenated -> table (heads * rows, channels)."""
        levels = value.view(len(value), self.heads, -1).transpose(0, 1)
        levels = levels.split([height * width for height, width in self.shapes], 1)
        for inside, level, shape in zip(self._inside, levels, self.shapes, strict=True):
            inside.copy_(level.unflatten(1, shape))
        return self._table.flatten(0, 1)

    def corners(self) -> Tensor:
        """(heads, 4, levels) int32: rows of the upper left, upper right, lower left, lower right pixel of (0, 0)."""
        strides, starts = torch.tensor(self._strides), torch.tensor(self._starts)
        pixels = torch.stack([starts, starts + 1, starts + strides, starts + strides + 1])
        return (pixels + self._rows * torch.arange(self.heads)[:, None, None]).to(torch.int32)

    def row_strides(self) -> Tensor:
        """(levels,) float32: table rows between vertically adjacent pixels."""
        return torch.tensor(self._strides, dtype=torch.float32)

    def sampler(self, points: int) -> Sampler:
        return Sampler(self, points)


class Sampler:
    """Weighted sum of `points` bilinear samples per level and head.

    Locations are in pixels of the padded maps, ``x * width + 0.5`` for x in 0..1.
    """

    def __init__(self, maps: PaddedMaps, points: int) -> None:
        self._maps = maps
        self._points = points
        self._samples = len(maps.shapes) * points
        self._corners = maps.corners().repeat_interleave(points, -1)
        self._row_strides = maps.row_strides().repeat_interleave(points, -1)
        # The padding after the last pixel.
        self._furthest = self.per_sample(maps.sizes[None] + 1.0).unflatten(1, (2, maps.heads, -1))
        self._bag_starts: dict[int, Tensor] = {}

    def locations(self, relative: Tensor) -> Tensor:
        """Reference points (Q, levels, 2), (x, y) in 0..1 -> base locations of all samples (Q, 2 * samples)."""
        return self.per_sample(relative * self._maps.sizes + 0.5)

    def scales(self, boxes: Tensor) -> Tensor:
        """Box sizes (Q, levels, 2) in 0..1 -> pixels per unit of offset, half a box / points (Q, 2 * samples)."""
        return self.per_sample(boxes * self._maps.sizes * (0.5 / self._points))

    def per_sample(self, values: Tensor) -> Tensor:
        """(Q, levels, 2) -> (Q, 2 * heads * samples), all x before all y."""
        axes = values.transpose(1, 2)[:, :, None, :, None]
        return axes.expand(-1, -1, self._maps.heads, -1, self._points).flatten(1)

    def __call__(self, table: Tensor, locations: Tensor, scores: Tensor) -> Tensor:
        """Sample `table` for Q queries.

        Args:
            table: from `PaddedMaps.fill`.
            locations: (Q, 2, heads, samples), x and y; overwritten.
            scores: (Q, heads, samples), attention weights before the softmax.

        Returns:
            (Q, heads * channels).
        """
        locations = torch.minimum(locations.clamp_(min=0.0), self._furthest, out=locations)
        pixels = locations.floor()
        shares = locations.sub_(pixels)
        rows = torch.addcmul(pixels[:, 0], pixels[:, 1], self._row_strides).to(torch.int32)
        # NaN casts to INT_MIN (clamped); its weights stay NaN.
        rows = rows.clamp_(min=0)[:, :, None] + self._corners
        weights = self._weights(shares, scores.softmax(-1, dtype=torch.float32)).flatten()
        starts = self._starts(len(locations))
        sums = torch._embedding_bag_forward_only(table, rows.flatten(), starts, False, 0, False, weights)[0]
        return sums.view(len(locations), -1)

    def _weights(self, shares: Tensor, weights: Tensor) -> Tensor:
        """Bilinear shares (Q, 2, heads, samples) of the weights (Q, heads, samples) -> (Q, heads, 4, samples)."""
        right, down = shares.unbind(1)
        split = weights.new_empty(len(weights), self._maps.heads, 4, self._samples)
        above_left, above_right, below_left, below_right = split.unbind(2)
        below = weights * down
        above = weights.sub_(below)
        torch.sub(above, torch.mul(above, right, out=above_right), out=above_left)
        torch.sub(below, torch.mul(below, right, out=below_right), out=below_left)
        return split

    def _starts(self, queries: int) -> Tensor:
        """Index of the first sample of each query and head; cached."""
        if queries not in self._bag_starts:
            bags = torch.arange(queries * self._maps.heads, dtype=torch.int32)
            self._bag_starts[queries] = bags * (4 * self._samples)
        return self._bag_starts[queries]


class FrameAttention:
    """`DeformableAttention` with packed weights, for one image on a CPU."""

    def __init__(self, attention: DeformableAttention, dtype: torch.dtype) -> None:
        self.heads, self.points = attention.heads, attention.points
        self._split = (attention.heads, attention.levels * attention.points)
        # All x, then all y, so that both are contiguous.
        parts = (attention.heads, attention.levels, attention.points, 2)
        offsets = attention.sampling_offsets
        weight = offsets.weight.unflatten(0, parts).permute(3, 0, 1, 2, 4).flatten(0, 3)
        bias = offsets.bias.unflatten(0, parts).permute(3, 0, 1, 2).flatten()
        self._offsets = PackedLinear(weight, bias, dtype)
        self._scores = PackedLinear.of(attention.attention_weights, dtype)
        self._value = PackedLinear.of(attention.value_proj, dtype)
        self._output = PackedLinear.of(attention.output_proj, dtype)

    def maps(self, shapes: Sequence[tuple[int, int]], memory: Tensor) -> PaddedMaps:
        """Buffer for the values of `memory` (S,D) on levels of these (h, w)."""
        return PaddedMaps(shapes, self.heads, memory.shape[1] // self.heads)

    def table(self, maps: PaddedMaps, memory: Tensor, padding: Tensor | None) -> Tensor:
        """Project `memory` (S,D) into the table of `maps`; zero where padding (S,) is True."""
        value = self._value(memory)
        return maps.fill(value if padding is None else value.masked_fill_(padding[:, None], 0.0))

    def __call__(
        self,
        sampler: Sampler,
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
        if scales is None:
            sampled_at = self._offsets.linear_add(query, locations)
        else:
            sampled_at = self._offsets(query).float().mul_(scales).add_(locations)
        scores = self._scores(query).unflatten(1, self._split)
        attended = sampler(table, sampled_at.unflatten(1, (2, *self._split)), scores)
        return self._output.linear_add(attended, shortcut)
