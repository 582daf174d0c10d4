"""Deformable attention of one image for inference on a card, in fewer launches than `DeformableAttention`.

A card computes faster than the host launches: what counts is how many operators there are. Offsets and weights of the
samples come out of one product, what depends on the size of the image is there already, and nothing is padded, as the
kernels of ``deformable_attention`` know the bounds. The classes stand for those of `frame_attention`, one for one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from motip.model.deformable_attention import DeformableAttention, deformable_attention
from motip.model.fast.packed import PackedLinear


class CardMaps:
    """Sizes of the value maps of all levels.

    Args:
        shapes: (h, w) of each level. device: where they are.

    Attributes:
        sizes: (levels, 2) float, width and height of each level.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> None:
        self.shapes = list(shapes)
        self.sizes = torch.tensor([[width, height] for height, width in shapes], dtype=torch.float32, device=device)

    def sampler(self, points: int) -> CardSampler:
        return CardSampler(self, points)


class CardSampler:
    """Where samples lie, relative to each map. An axis of size 1 stands for all heads, and another for all points."""

    def __init__(self, maps: CardMaps, points: int) -> None:
        self.maps = maps
        self._points = points
        self.pixels = 1.0 / maps.sizes[:, None]
        """(levels, 1, 2), what an offset of one pixel is."""

    def places(self, relative: Tensor) -> Tensor:
        """Points (Q, levels, 2), x and y in 0..1 of each map -> places of all their samples (Q, 1, levels, 1, 2)."""
        return relative[:, None, :, None]

    def steps(self, boxes: Tensor) -> Tensor:
        """Widths and heights (Q, levels, 2) of boxes -> what an offset of one is (Q, 1, levels, 1, 2)."""
        return (boxes * (0.5 / self._points))[:, None, :, None]


class CardAttention:
    """The products around the samples of a `DeformableAttention`."""

    def __init__(self, attention: DeformableAttention, dtype: torch.dtype) -> None:
        self.heads, self.points = attention.heads, attention.points
        self._samples = (attention.heads, attention.levels, attention.points)
        both = (attention.sampling_offsets, attention.attention_weights)
        weight, bias = (torch.cat([getattr(linear, name) for linear in both]) for name in ("weight", "bias"))
        self._offsets_and_scores = PackedLinear(weight, bias, dtype)
        self._value = PackedLinear.of(attention.value_proj, dtype)
        self._output = PackedLinear.of(attention.output_proj, dtype)

    def maps(self, shapes: Sequence[tuple[int, int]], memory: Tensor) -> CardMaps:
        """For values of `memory` on levels of these (h, w)."""
        return CardMaps(shapes, memory.device)

    def table(self, maps: CardMaps, memory: Tensor, padding: Tensor | None) -> Tensor:
        """The values of `memory` (S,D) as (1, S, heads, channels); zero on padding (S,)."""
        value = self._value(memory)
        value = value if padding is None else value.masked_fill_(padding[:, None], 0.0)
        return value.view(1, len(value), self.heads, -1)

    def __call__(
        self, sampler: CardSampler, table: Tensor, query: Tensor, places: Tensor, steps: Tensor | None, shortcut: Tensor
    ) -> Tensor:
        """`shortcut` (Q,D) and what the queries (Q,D) find around their places, (Q,D).

        Args:
            table: of ``table``. places: of ``sampler.places``. steps: of ``sampler.steps``; None: pixels.
        """
        heads, levels, points = self._samples
        both = self._offsets_and_scores(query).float()
        offsets, scores = both.split([2 * heads * levels * points, heads * levels * points], 1)
        steps = sampler.pixels if steps is None else steps
        locations = torch.addcmul(places, offsets.unflatten(1, (*self._samples, 2)), steps)
        weights = scores.unflatten(1, (heads, levels * points)).softmax(-1).view(1, -1, *self._samples)
        return self._output.plus(
            deformable_attention(table, sampler.maps.shapes, locations[None], weights)[0], shortcut
        )
