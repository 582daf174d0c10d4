"""Deformable attention in float64 against explicit loops, edge cases, and selection of the implementation."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from motip.errors import MotipError
from motip.model import deformable_attention as module
from motip.model.deformable_attention import DeformableAttention, deformable_attention
from motip.model.fast import bag_attention


@pytest.fixture(params=["grid_sample", "embedding_bag"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(module, "_chosen", request.param)
    return request.param


_ODD_SHAPES = [(7, 5), (3, 9), (1, 4), (2, 1)]


def _pixel(grid: Tensor, x: int, y: int) -> Tensor:
    height, width = grid.shape[:2]
    inside = 0 <= x < width and 0 <= y < height
    return grid[y, x] if inside else torch.zeros_like(grid[0, 0])


def _loops(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """The definition with explicit loops over samples; differentiable, for reference gradients."""
    batch, queries, heads, levels, points = weights.shape
    starts = [0, *itertools.accumulate(h * w for h, w in shapes)]
    rows = []
    for b, q, head in itertools.product(range(batch), range(queries), range(heads)):
        total = torch.zeros_like(value[0, 0, 0])
        for level, point in itertools.product(range(levels), range(points)):
            height, width = shapes[level]
            grid = value[b, starts[level] : starts[level + 1], head].view(height, width, -1)
            x = locations[b, q, head, level, point, 0] * width - 0.5
            y = locations[b, q, head, level, point, 1] * height - 0.5
            left, top = math.floor(x.item()), math.floor(y.item())
            right_share, bottom_share = x - left, y - top
            sample = (
                _pixel(grid, left, top) * (1 - right_share) * (1 - bottom_share)
                + _pixel(grid, left + 1, top) * right_share * (1 - bottom_share)
                + _pixel(grid, left, top + 1) * (1 - right_share) * bottom_share
                + _pixel(grid, left + 1, top + 1) * right_share * bottom_share
            )
            total = total + weights[b, q, head, level, point] * sample
        rows.append(total)
    return torch.stack(rows).view(batch, queries, -1)


def _case(levels: int, queries: int = 6, points: int = 2, seed: int = 0) -> tuple[list[tuple[int, int]], list[Tensor]]:
    shapes = _ODD_SHAPES[:levels]
    generator = torch.Generator().manual_seed(seed)
    pixels = sum(h * w for h, w in shapes)
    value = torch.randn(2, pixels, 3, 4, dtype=torch.float64, generator=generator)
    # Also well outside the image, where samples count as zero.
    locations = torch.rand(2, queries, 3, levels, points, 2, dtype=torch.float64, generator=generator) * 1.6 - 0.3
    weights = torch.rand(2, queries, 3, levels, points, dtype=torch.float64, generator=generator)
    return shapes, [x.requires_grad_() for x in (value, locations, weights)]


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_forward_and_gradients_against_loops(levels: int, implementation: str) -> None:
    shapes, inputs = _case(levels)
    found = deformable_attention(inputs[0], shapes, inputs[1], inputs[2])
    expected = _loops(inputs[0], shapes, inputs[1], inputs[2])
    assert (found - expected).abs().max() < 1e-5
    seed = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True
    ):
        assert (ours - theirs).abs().max() < 1e-4


def test_gradcheck(implementation: str) -> None:
    shapes, inputs = _case(2, queries=2)
    assert torch.autograd.gradcheck(lambda v, x, w: deformable_attention(v, shapes, x, w), inputs)


def test_no_queries(implementation: str) -> None:
    shapes, inputs = _case(3, queries=0)
    out = deformable_attention(inputs[0], shapes, inputs[1], inputs[2])
    assert out.shape == (2, 0, 12)
    out.sum().backward()


@pytest.mark.parametrize("far", [-1.0e3, 1.0e3, -3.0e12, 3.0e12])
def test_samples_far_outside_count_as_zero(implementation: str, far: float) -> None:
    shapes, (value, locations, weights) = _case(3)
    outside = locations.detach().clone()
    outside[..., 0] += far
    value.grad = None
    outside.requires_grad_()
    attended = deformable_attention(value, shapes, outside, weights)
    attended.sum().backward()
    assert not attended.any() and not outside.grad.any() and not value.grad.any() and not weights.grad.any()


def test_nan_location_gives_nan_on_a_cpu() -> None:
    shapes, (value, locations, weights) = _case(2)
    broken = locations.detach().clone()
    broken[0, 1, 2, 0, 0, 0] = torch.nan
    attended = bag_attention.bag_attention(value, shapes, broken, weights)
    assert attended[0, 1, 8:].isnan().all() and attended.isnan().sum() == 4


def test_batches_and_levels_do_not_mix() -> None:
    """Zero padding separates the maps of the table: values of one image or level must not leak into another."""
    shapes, (value, locations, weights) = _case(4)
    attended = bag_attention.bag_attention(value, shapes, locations, weights)
    for image, level in itertools.product(range(2), range(4)):
        starts = [0, *itertools.accumulate(h * w for h, w in shapes)]
        changed = value.detach().clone()
        changed[image, starts[level] : starts[level + 1]] += 1.0e3
        silent = weights.detach().clone()
        silent[image, :, :, level] = 0.0
        reference = bag_attention.bag_attention(value, shapes, locations, silent)
        torch.testing.assert_close(bag_attention.bag_attention(changed, shapes, locations, silent), reference)
    assert attended.any()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4), st.integers(1, 4))
def test_constant_map_is_reproduced_inside_the_image(shapes: list[tuple[int, int]], points: int) -> None:
    """Bilinear weights inside the image sum to one for all sizes."""
    pixels = sum(h * w for h, w in shapes)
    value = torch.full((1, pixels, 2, 3), 2.5, dtype=torch.float64)
    margin = max(0.5 / min(min(shape) for shape in shapes), 0.0)
    locations = torch.full((1, 4, 2, len(shapes), points, 2), 0.5, dtype=torch.float64)
    locations += (torch.rand_like(locations) - 0.5) * (1.0 - 2.0 * margin)
    weights = torch.rand(1, 4, 2, len(shapes), points, dtype=torch.float64).flatten(3).softmax(-1)
    weights = weights.unflatten(3, (len(shapes), points))
    for implementation in ("grid_sample", "embedding_bag"):
        out = module._implementations[implementation](value, shapes, locations, weights)
        torch.testing.assert_close(out, torch.full_like(out, 2.5))


def test_half_precision_values_keep_full_precision_locations(implementation: str) -> None:
    shapes, (value, locations, weights) = _case(2)
    exact = deformable_attention(value.float(), shapes, locations.float(), weights.float())
    half = deformable_attention(value.bfloat16(), shapes, locations.float(), weights.float())
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() < 0.05


def test_padded_values_count_as_zero(implementation: str) -> None:
    torch.manual_seed(0)
    module = DeformableAttention(32, 1, 4, 2)
    query, reference = torch.randn(1, 5, 32), torch.rand(1, 5, 1, 2)
    value = torch.randn(1, 12, 32)
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[:, 6:] = True
    changed = value.clone()
    changed[:, 6:] += 100.0
    assert torch.equal(
        module(query, reference, value, [(4, 3)], mask), module(query, reference, changed, [(4, 3)], mask)
    )


def test_compiles_without_graph_break(implementation: str) -> None:
    module = DeformableAttention(32, 2, 4, 2)
    shapes = [(5, 6), (3, 3)]
    query, reference, value = torch.randn(1, 7, 32), torch.rand(1, 7, 2, 2), torch.randn(1, 39, 32)
    compiled = torch.compile(lambda q, r, v: module(q, r, v, shapes), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, reference, value), module(query, reference, value, shapes))


def test_implementation_is_selected_at_run_time_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_implementations", dict(module._implementations))
    monkeypatch.setattr(module, "_chosen", "auto")
    monkeypatch.setattr(module, "_logged", set())
    shapes, inputs = _case(1)
    module.register_implementation("zero", lambda v, s, x, w: v.new_zeros(x.shape[0], x.shape[1], 12))
    with caplog.at_level(logging.INFO, logger=module.__name__):
        module.use_implementation("zero")
        module.use_implementation("zero")
    assert [record.getMessage() for record in caplog.records] == ["deformable attention: zero implementation"]
    assert deformable_attention(inputs[0], shapes, inputs[1], inputs[2]).abs().max() == 0.0
    with pytest.raises(MotipError, match="unknown implementation"):
        module.use_implementation("cuda-magic")


@pytest.mark.parametrize("heads", [4, 8])
def test_initial_offsets_point_in_even_directions(heads: int) -> None:
    module = DeformableAttention(32, 2, heads, 3)
    offsets = module.sampling_offsets.bias.detach().view(heads, 2, 3, 2)
    assert torch.allclose(offsets[:, :, 2], 3 * offsets[:, :, 0], atol=1e-5)
    assert torch.allclose(offsets.abs().amax(-1)[:, :, 0], torch.ones(heads, 2))
    assert torch.allclose(offsets.sum(0), torch.zeros(2, 3, 2), atol=1e-5)


def test_sparse_and_dense_gradients_of_the_weights_agree() -> None:
    """The second form is used on CUDA, and on a CPU for tensors that cannot be sparse."""
    generator = torch.Generator().manual_seed(3)
    grad, table = (torch.randn(size, 8, generator=generator) for size in (20, 50))
    rows = torch.randint(50, (20, 12), generator=generator, dtype=torch.int32)
    other = bag_attention._products_with_rows(torch.nn.Parameter(grad, requires_grad=False), table, rows)
    torch.testing.assert_close(bag_attention._products_with_rows(grad, table, rows), other)
    torch.testing.assert_close(other, (grad[:, None] * table[rows.long()]).sum(-1))
