"""Deformable attention of one image for inference on a CPU: the numbers of `DeformableAttention` in half of its passes.

The maps of all levels lie in one table, each inside a border of zeros. A sample outside its map is moved to the border
and reads zeros, so that none needs a look at the bounds. What a sample's place depends on besides the network's output
is made once per size of image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from motip.model.deformable_attention import DeformableAttention
from motip.model.fast.packed import PackedLinear


class PaddedMaps:
    """The value maps of all levels in one table, and where a sample's four pixels are in it.

    Args:
        shapes: (h, w) of each level. heads, channels: of the attention; channels of one head.

    Attributes:
        sizes: (levels, 2) float, width and height of each level.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], heads: int, channels: int) -> None:
        self.shapes = list(shapes)
        self.heads = heads
        self.sizes = torch.tensor([[width, height] for height, width in shapes], dtype=torch.float32)
        # One column of zeros on the left serves the row above as its right border. Of the rows below, the second
        # and two pixels more are only read by samples on the border itself, with weight zero.
        self._steps = [width + 1 for _, width in shapes]
        rows = [(height + 3) * step + 2 for (height, _), step in zip(shapes, self._steps, strict=True)]
        self._starts = [sum(rows[:level]) for level in range(len(rows))]
        self._rows = sum(rows)
        self._table = torch.zeros(heads, self._rows, channels)
        self._inside = [
            self._table[:, start : start + (height + 3) * step].unflatten(1, (height + 3, step))[:, 1 : height + 1, 1:]
            for (height, _), step, start in zip(shapes, self._steps, self._starts, strict=True)
        ]

    def fill(self, value: Tensor) -> Tensor:
        """value (S, heads * channels), level after level -> the table, a row of `channels` per head and pixel."""
        levels = value.view(len(value), self.heads, -1).transpose(0, 1)
        levels = levels.split([height * width for height, width in self.shapes], 1)
        for inside, level, shape in zip(self._inside, levels, self.shapes, strict=True):
            inside.copy_(level.unflatten(1, shape))
        return self._table.flatten(0, 1)

    def corners(self) -> Tensor:
        """(heads, 4, levels) int32: row of the pixels left and right above, left and right below the place (0, 0)."""
        steps, starts = torch.tensor(self._steps), torch.tensor(self._starts)
        pixels = torch.stack([starts, starts + 1, starts + steps, starts + steps + 1])
        return (pixels + self._rows * torch.arange(self.heads)[:, None, None]).to(torch.int32)

    def row_steps(self) -> Tensor:
        """(levels,) float32: rows of the table from a pixel to the one below it."""
        return torch.tensor(self._steps, dtype=torch.float32)

    def sampler(self, points: int) -> Sampler:
        return Sampler(self, points)


class Sampler:
    """Sums of `points` weighted samples per level and head.

    Places are in pixels of the padded maps, ``x * width + 0.5`` for a relative x in 0..1.
    """

    def __init__(self, maps: PaddedMaps, points: int) -> None:
        self._maps = maps
        self._points = points
        self._samples = len(maps.shapes) * points
        self._corners = maps.corners().repeat_interleave(points, -1)
        self._row_steps = maps.row_steps().repeat_interleave(points, -1)
        # The border behind the last pixel.
        self._furthest = self.per_sample(maps.sizes[None] + 1.0).unflatten(1, (2, maps.heads, -1))
        self._bag_starts: dict[int, Tensor] = {}

    def places(self, relative: Tensor) -> Tensor:
        """Points (Q, levels, 2), x and y in 0..1 of each map -> the places of all their samples (Q, 2 * samples)."""
        return self.per_sample(relative * self._maps.sizes + 0.5)

    def steps(self, boxes: Tensor) -> Tensor:
        """Widths and heights (Q, levels, 2) of boxes -> pixels per offset, a share of half a box (Q, 2 * samples)."""
        return self.per_sample(boxes * self._maps.sizes * (0.5 / self._points))

    def per_sample(self, values: Tensor) -> Tensor:
        """(Q, levels, 2) -> (Q, 2 * heads * samples), all x before all y."""
        axes = values.transpose(1, 2)[:, :, None, :, None]
        return axes.expand(-1, -1, self._maps.heads, -1, self._points).flatten(1)

    def __call__(self, table: Tensor, places: Tensor, scores: Tensor) -> Tensor:
        """Sample `table` for Q queries.

        Args:
            table: of `PaddedMaps.fill`. places: (Q, 2, heads, samples), x and y; overwritten. scores: (Q, heads,
                samples), attention weights before the softmax.

        Returns:
            (Q, heads * channels).
        """
        places = torch.minimum(places.clamp_(min=0.0), self._furthest, out=places)
        pixels = places.floor()
        shares = places.sub_(pixels)
        rows = torch.addcmul(pixels[:, 0], pixels[:, 1], self._row_steps).to(torch.int32)
        # What is no number becomes the lowest integer; its weights stay no numbers.
        rows = rows.clamp_(min=0)[:, :, None] + self._corners
        weights = self._weights(shares, scores.softmax(-1, dtype=torch.float32)).flatten()
        starts = self._starts(len(places))
        sums = torch._embedding_bag_forward_only(table, rows.flatten(), starts, False, 0, False, weights)[0]
        return sums.view(len(places), -1)

    def _weights(self, shares: Tensor, weights: Tensor) -> Tensor:
        """(Q, heads, 4, samples): bilinear shares (Q, 2, heads, samples) of the weights (Q, heads, samples)."""
        right, down = shares.unbind(1)
        split = weights.new_empty(len(weights), self._maps.heads, 4, self._samples)
        above_left, above_right, below_left, below_right = split.unbind(2)
        below = weights * down
        above = weights.sub_(below)
        torch.sub(above, torch.mul(above, right, out=above_right), out=above_left)
        torch.sub(below, torch.mul(below, right, out=below_right), out=below_left)
        return split

    def _starts(self, queries: int) -> Tensor:
        """First sample of each query and head."""
        if queries not in self._bag_starts:
            bags = torch.arange(queries * self._maps.heads, dtype=torch.int32)
            self._bag_starts[queries] = bags * (4 * self._samples)
        return self._bag_starts[queries]


class FrameAttention:
    """The products around the samples of a `DeformableAttention`."""

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
        """Room for the values of `memory` (S,D) on levels of these (h, w)."""
        return PaddedMaps(shapes, self.heads, memory.shape[1] // self.heads)

    def table(self, maps: PaddedMaps, memory: Tensor, padding: Tensor | None) -> Tensor:
        """The values of `memory` (S,D) in the table of `maps`; zero on padding (S,)."""
        value = self._value(memory)
        return maps.fill(value if padding is None else value.masked_fill_(padding[:, None], 0.0))

    def __call__(
        self, sampler: Sampler, table: Tensor, query: Tensor, places: Tensor, steps: Tensor | None, shortcut: Tensor
    ) -> Tensor:
        """`shortcut` (Q,D) and what the queries (Q,D) find around their places, (Q,D).

        Args:
            table: of ``table``. places: of ``sampler.places``. steps: of ``sampler.steps``; None: pixels.
        """
        if steps is None:
            looked_at = self._offsets.plus(query, places)
        else:
            looked_at = self._offsets(query).float().mul_(steps).add_(places)
        scores = self._scores(query).unflatten(1, self._split)
        found = sampler(table, looked_at.unflatten(1, (2, *self._split)), scores)
        return self._output.plus(found, shortcut)
