"""Deformable attention by ``embedding_bag``: the fastest form on a CPU with PyTorch's own operators.

Each map is zero-padded, so that the four pixels around a sample are rows of one table at fixed offsets.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SpatialShapes = Sequence[tuple[int, int]]

_PADDING = 2
"""Rows and columns of zero padding around each map: a sample outside reads four of them."""
_SUM = 0
"""PyTorch's constant for ``mode="sum"``."""


def bag_attention(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """See `motip.model.deformable_attention.deformable_attention`.

    Every pixel of a head is a row of d channels, every sample a sum of four weighted rows.
    """
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    dtype, device = sampling_locations.dtype, value.device
    layout = _Layout.of(spatial_shapes, heads)
    # Row 0 of each (image, head). int32 halves the memory kept for the backward pass.
    images = torch.arange(batch, dtype=torch.int32, device=device).view(-1, 1, 1, 1) * (layout.pixels * heads)
    first_rows = images + torch.arange(heads, dtype=torch.int32, device=device).view(1, 1, -1, 1)
    # unbind instead of indexing: the gradient of each index would be a zero tensor of the full size.
    across, down = (axis.unbind(3) for axis in sampling_locations.unbind(-1))
    weights = attention_weights.to(dtype).unbind(3)
    # Rows and bilinear weights of all samples.
    cells, shares = [], []
    for level, (height, width) in enumerate(spatial_shapes):
        column, right = _cell(across[level], width)
        row, lower = _cell(down[level], height)
        weight = weights[level]
        lower = lower * weight
        upper, left = weight - lower, 1.0 - right
        cells.append((row * layout.widths[level] + column + layout.starts[level]) * heads + first_rows)
        shares += [upper * left, upper * right, lower * left, lower * right]
    # Weighted sums.
    cell = torch.stack(cells, -1).flatten(3).flatten(0, 2)
    share = torch.stack(shares, -1).flatten(3).flatten(0, 2)
    table = layout.padded(value.to(dtype)).reshape(-1, channels)
    if torch.compiler.is_compiling():  # the compiler cannot trace the autograd function
        bags = F.embedding_bag(layout.corners(cell), table, mode="sum", per_sample_weights=share)
    else:
        bags = _WeightedCorners.apply(table, cell, share, layout)
    return bags.view(batch, queries, heads * channels).to(value.dtype)


def _cell(location: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Bilinear neighbours along an axis of `size` pixels for locations in 0..1.

    Returns:
        Index of the first neighbour in the padded map (int32), and the weight of the second in 0..1.
    """
    pixel = location * size - 0.5
    first = pixel.detach().floor()
    return first.to(torch.int32).clamp_(-_PADDING, size).add_(_PADDING), pixel - first


class _Layout(NamedTuple):
    """Layout of the padded levels in the table: start and width of each in pixels; pixels and heads of an image."""

    shapes: SpatialShapes
    starts: list[int]
    widths: list[int]
    pixels: int
    heads: int

    @classmethod
    def of(cls, shapes: SpatialShapes, heads: int) -> _Layout:
        widths = [width + 2 * _PADDING for _, width in shapes]
        sizes = [(height + 2 * _PADDING) * width for (height, _), width in zip(shapes, widths, strict=True)]
        return cls(shapes, [sum(sizes[:level]) for level in range(len(sizes))], widths, sum(sizes), heads)

    def padded(self, value: Tensor) -> Tensor:
        """(B, S, heads, d) -> (B, pixels, heads * d)."""
        maps = value.flatten(2).split([height * width for height, width in self.shapes], 1)
        frame = (0, 0, _PADDING, _PADDING, _PADDING, _PADDING)
        padded = [
            F.pad(each.unflatten(1, shape), frame).flatten(1, 2) for each, shape in zip(maps, self.shapes, strict=True)
        ]
        return torch.cat(padded, 1)

    def corners(self, cell: Tensor) -> Tensor:
        """Rows of upper left pixels (N, points * levels) -> rows of all four neighbours (N, points * levels * 4)."""
        below = torch.tensor(self.widths, dtype=cell.dtype, device=cell.device) * self.heads
        below = below.repeat(cell.shape[1] // len(self.widths))
        lower = cell + below
        return torch.stack([cell, cell + self.heads, lower, lower + self.heads], -1).flatten(1)

    def summed(self, parts: Iterator[Tensor]) -> Tensor:
        """Gradients by upper left row, one (R, d) per corner -> gradient of each row (R, d)."""
        total = by_pixel = None
        for corner, part in enumerate(parts):
            if total is None or by_pixel is None:
                total = part
                by_pixel = total.view(-1, self.pixels, self.heads, part.shape[-1])
                continue
            shifted = part.view_as(by_pixel)
            ends = [*self.starts[1:], self.pixels]
            for start, end, width in zip(self.starts, ends, self.widths, strict=True):
                shift = (corner & 1) + (corner >> 1) * width
                by_pixel[:, start + shift : end] += shifted[:, start : end - shift]
        assert total is not None
        return total


class _WeightedCorners(torch.autograd.Function):
    """``F.embedding_bag`` over the four neighbours of each sample, with ``embedding_bag`` in the backward pass as well.

    PyTorch's backward pass adds samples to rows one by one. Here samples are sorted by upper left pixel, and those of
    one pixel form a bag of output gradients per corner: faster, and deterministic.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, cell: Tensor, share: Tensor, layout: _Layout) -> Tensor:
        """table (R, d), cell (N, K) integers, share (N, 4 K) -> (N, d)."""
        ctx.layout = layout
        ctx.save_for_backward(table, cell, share)
        return F.embedding_bag(layout.corners(cell), table, mode="sum", per_sample_weights=share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        table, cell, share = ctx.saved_tensors
        grad = grad.contiguous()
        grad_table = grad_share = None
        if ctx.needs_input_grad[0]:
            by_cell, sample = cell.flatten().sort(stable=True)
            begins = torch.searchsorted(by_cell, torch.arange(len(table), dtype=cell.dtype, device=cell.device))
            bags = _bag_numbers(cell).index_select(0, sample)
            shares = share.view(-1, 4).index_select(0, sample).t().contiguous()
            grad_table = ctx.layout.summed(
                F.embedding_bag(bags, grad, begins, mode="sum", per_sample_weights=each) for each in shares
            )
        if ctx.needs_input_grad[2]:
            grad_share = _products_with_rows(grad, table, ctx.layout.corners(cell))
        return grad_table, None, grad_share, None


def _products_with_rows(grad: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """grad (N, d), table (R, d), rows (N, K) -> (N, K) dot products of each gradient with its rows."""
    count, samples = rows.shape
    begins = torch.arange(0, (count + 1) * samples, samples, dtype=rows.dtype, device=rows.device)
    # The fake tensors of the memory estimate cannot be sparse.
    plain = type(grad) is Tensor and grad.dtype in (torch.float32, torch.float64)
    if rows.device.type == "cpu" and plain:
        pattern = _sparse(begins, rows.flatten(), grad.new_zeros(count * samples), (count, len(table)))
        return torch.sparse.sampled_addmm(pattern, grad, table.t(), beta=0.0).values().view(count, samples)
    products: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad, table, rows.flatten(), begins[:-1], _bag_numbers(rows), _SUM
    )
    return products.view(count, samples)


def _bag_numbers(rows: Tensor) -> Tensor:
    """(N, K) -> (N * K,) row index of each element."""
    return torch.arange(len(rows), dtype=rows.dtype, device=rows.device).repeat_interleave(rows.shape[1])


def _sparse(begins: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    _silence_beta_warning()
    return torch.sparse_csr_tensor(begins, columns, values, size, check_invariants=False)


@cache
def _silence_beta_warning() -> None:
    """Trigger and ignore PyTorch's once-per-process warning that sparse CSR is in beta; our use of it is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = torch.zeros(1, dtype=torch.int32)
        torch.sparse_csr_tensor(start, start[:0], torch.zeros(0), (0, 1), check_invariants=False)
