# mypy: disallow-untyped-defs=False
"""The Triton kernels of multi-scale deformable attention, and their launch.

Written from equations 2 and 3 of Deformable DETR (Zhu et al., ICLR 2021) and the bilinear kernel of its appendix. With
``s`` a sample of weight A at (x, y), in pixels, and ``v(q)`` the value of its neighbour q:

    out = sum over s of A * sum over q of g(q_x, x) * g(q_y, y) * v(q),     g(a, b) = max(0, 1 - |a - b|)

so that only the four pixels around a sample contribute. Gradients: of A the bilinear value, of x and y the differences
between the neighbours, of v(q) the share A * g * g. Neighbours outside the map count as zero.

A *row* is one (image, query, head), in the memory order of output and locations. A program processes a tile of rows by
all channels and loops over levels and points, so no tensor of the size of the samples is stored. Loads are in the
storage type, arithmetic is in float32 (float64 if a tensor is float64).

Imported by `triton_attention` only, because it needs triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 512
"""Rows times channels of a program: 8 numbers per thread, one 16-byte load in half precision."""

_WARPS = 2

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels, on any device (TRITON_INTERPRET=1 at import)."""


@triton.jit
def _sample(locations, weights, sample, there, height, width, ACC: tl.constexpr):
    """Per row: upper left neighbour of the sample, shares of its right and lower neighbours, and its weight."""
    x = tl.load(locations + 2 * sample, mask=there, other=0.0).to(ACC) * width.to(ACC) - 0.5
    y = tl.load(locations + 2 * sample + 1, mask=there, other=0.0).to(ACC) * height.to(ACC) - 0.5
    weight = tl.load(weights + sample, mask=there, other=0.0).to(ACC)
    left = tl.floor(x)
    top = tl.floor(y)
    return left, top, x - left, y - top, weight


@triton.jit
def _neighbour(base, channel, tile, column, line, height, width, start, PIXEL: tl.constexpr):
    """Offsets (rows, channels) of a neighbour, mask of valid elements, and rows where it is inside the map."""
    # Compared as floats: huge, infinite and NaN locations are outside before the cast to integers.
    inside = (column >= 0) & (column < width) & (line >= 0) & (line < height)
    pixel = tl.where(inside, line, 0.0).to(tl.int32) * width + tl.where(inside, column, 0.0).to(tl.int32) + start
    offset = base + pixel.to(tl.int64) * PIXEL
    return offset[:, None] + channel[None, :], tile & inside[:, None], inside


@triton.jit(do_not_specialize=["rows", "queries", "pixels"])
def _forward_kernel(
    value,
    levels,
    locations,
    weights,
    out,
    rows,
    queries,
    pixels,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    there = row < rows
    tile = there[:, None] & (channel < CHANNELS)[None, :]
    PIXEL: tl.constexpr = HEADS * CHANNELS
    base = ((row // (queries * HEADS)) * pixels * HEADS + row % HEADS) * CHANNELS
    total = tl.zeros((ROWS, WIDTH), dtype=ACC)
    for level in range(LEVELS):
        height = tl.load(levels + 3 * level)
        width = tl.load(levels + 3 * level + 1)
        start = tl.load(levels + 3 * level + 2)
        for point in range(POINTS):
            sample = (row * LEVELS + level) * POINTS + point
            left, top, right, bottom, weight = _sample(locations, weights, sample, there, height, width, ACC)
            for corner in tl.static_range(4):
                across = right if corner % 2 == 1 else 1.0 - right
                down = bottom if corner // 2 == 1 else 1.0 - bottom
                column = left + corner % 2
                line = top + corner // 2
                offset, mask, inside = _neighbour(base, channel, tile, column, line, height, width, start, PIXEL)
                share = tl.where(inside, weight * across * down, 0.0)
                total += share[:, None] * tl.load(value + offset, mask=mask, other=0.0).to(ACC)
    tl.store(out + row[:, None] * CHANNELS + channel[None, :], total, mask=tile)


@triton.jit(do_not_specialize=["rows", "queries", "pixels"])
def _backward_kernel(
    out_grad,
    value,
    levels,
    locations,
    weights,
    value_grad,
    locations_grad,
    weights_grad,
    rows,
    queries,
    pixels,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    NEEDS_VALUE: tl.constexpr,
    NEEDS_LOCATIONS: tl.constexpr,
    NEEDS_WEIGHTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    there = row < rows
    tile = there[:, None] & (channel < CHANNELS)[None, :]
    PIXEL: tl.constexpr = HEADS * CHANNELS
    base = ((row // (queries * HEADS)) * pixels * HEADS + row % HEADS) * CHANNELS
    grad = tl.load(out_grad + row[:, None] * CHANNELS + channel[None, :], mask=tile, other=0.0).to(ACC)
    for level in range(LEVELS):
        height = tl.load(levels + 3 * level)
        width = tl.load(levels + 3 * level + 1)
        start = tl.load(levels + 3 * level + 2)
        for point in range(POINTS):
            sample = (row * LEVELS + level) * POINTS + point
            left, top, right, bottom, weight = _sample(locations, weights, sample, there, height, width, ACC)
            to_x = tl.zeros((ROWS,), dtype=ACC)
            to_y = tl.zeros((ROWS,), dtype=ACC)
            to_weight = tl.zeros((ROWS,), dtype=ACC)
            for corner in tl.static_range(4):
                across = right if corner % 2 == 1 else 1.0 - right
                down = bottom if corner // 2 == 1 else 1.0 - bottom
                column = left + corner % 2
                line = top + corner // 2
                offset, mask, _ = _neighbour(base, channel, tile, column, line, height, width, start, PIXEL)
                if NEEDS_LOCATIONS or NEEDS_WEIGHTS:
                    product = tl.sum(tl.load(value + offset, mask=mask, other=0.0).to(ACC) * grad, axis=1)
                    to_weight += across * down * product
                    to_x += down * product if corner % 2 == 1 else -down * product
                    to_y += across * product if corner // 2 == 1 else -across * product
                if NEEDS_VALUE:
                    # Many samples share a pixel; the order of the additions is not deterministic.
                    share = (weight * across * down)[:, None] * grad
                    tl.atomic_add(value_grad + offset, share, mask=mask, sem="relaxed")
            if NEEDS_LOCATIONS:
                tl.store(locations_grad + 2 * sample, to_x * weight * width.to(ACC), mask=there)
                tl.store(locations_grad + 2 * sample + 1, to_y * weight * height.to(ACC), mask=there)
            if NEEDS_WEIGHTS:
                tl.store(weights_grad + sample, to_weight, mask=there)


def forward(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """``deformable_attention`` of checked arguments; sizes are (h, w) of the levels, flattened."""
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    out = value.new_empty(batch, queries, heads * channels)
    if out.numel():
        inputs = value.contiguous(), _levels(tuple(sizes), value.device), locations.contiguous(), weights.contiguous()
        rows, grid, sizes_of_tile = _tiles(batch * queries * heads, channels)
        with torch.cuda.device_of(value):
            _forward_kernel[grid](
                *inputs,
                out,
                rows,
                queries,
                value.shape[1],
                heads,
                channels,
                locations.shape[3],
                locations.shape[4],
                _arithmetic(value, locations, weights),
                *sizes_of_tile,
                num_warps=_WARPS,
            )
    return out


def backward(
    out_grad: Tensor, value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor, needed: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights in their types; empty tensors where not `needed`."""
    batch, pixels, heads, channels = value.shape
    queries = locations.shape[1]
    arithmetic = _arithmetic(value, locations, weights)
    sum_type = torch.float64 if arithmetic is tl.float64 else torch.float32
    value_grad = torch.zeros(value.shape if needed[0] else (0,), dtype=sum_type, device=value.device)
    locations_grad = locations.new_empty(locations.shape if needed[1] else (0,))
    weights_grad = weights.new_empty(weights.shape if needed[2] else (0,))
    if out_grad.numel() and any(needed):
        inputs = value.contiguous(), _levels(tuple(sizes), value.device), locations.contiguous(), weights.contiguous()
        rows, grid, sizes_of_tile = _tiles(batch * queries * heads, channels)
        with torch.cuda.device_of(value):
            _backward_kernel[grid](
                out_grad.contiguous(),
                *inputs,
                value_grad,
                locations_grad,
                weights_grad,
                rows,
                queries,
                pixels,
                heads,
                channels,
                locations.shape[3],
                locations.shape[4],
                arithmetic,
                *sizes_of_tile,
                *(bool(each) for each in needed),
                num_warps=_WARPS,
            )
    return value_grad.to(value.dtype), locations_grad, weights_grad


def _tiles(rows: int, channels: int) -> tuple[int, tuple[int], tuple[int, int]]:
    """Number of rows, grid of programs, and (rows, channels) of a tile."""
    width = triton.next_power_of_2(channels)
    height = max(1, _TILE // width)
    return rows, (triton.cdiv(rows, height),), (height, width)


def _arithmetic(*tensors: Tensor):
    return tl.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else tl.float32


@lru_cache(maxsize=256)
def _levels(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(levels, 3) int32: height, width, first pixel. A tensor, so that a new image size needs no compilation."""
    rows, start = [], 0
    for height, width in zip(sizes[::2], sizes[1::2], strict=True):
        rows.append((height, width, start))
        start += height * width
    return torch.tensor(rows, dtype=torch.int32, device=device)
