"""Tests of the Triton kernels, run by `test_triton_attention.py` in a separate process per device:

    TRITON_INTERPRET=1 python -m pytest tests/model/fast/triton_cases.py      # on the CPU, in Triton's interpreter
    python -m pytest tests/model/fast/triton_cases.py                         # on a CUDA device

The name does not match ``test_*.py`` on purpose: pytest must not collect this file with the other tests, because
TRITON_INTERPRET selects the interpreter for the complete process when triton is imported.
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from motip.errors import MotipError
from motip.model import deformable_attention
from motip.model.deformable_attention import DeformableAttention
from motip.model.fast.triton_attention import triton_attention
from tests.model.test_deformable_attention import _loops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


class Shape(NamedTuple):
    sizes: list[tuple[int, int]]
    points: int
    heads: int
    channels: int
    queries: int
    batch: int = 2


SHAPES = {
    "one level, one point": Shape([(5, 7)], 1, 1, 8, 3),
    "four levels, four points": Shape([(7, 5), (3, 9), (1, 4), (2, 1)], 4, 2, 32, 5),
    "sixteen channels": Shape([(6, 4), (3, 2)], 3, 3, 16, 4, 1),
    "odd channels": Shape([(4, 3), (1, 1)], 2, 3, 5, 4),
    "one channel, many rows": Shape([(3, 3)], 2, 5, 1, 111, 1),
    "more channels than a tile": Shape([(2, 3)], 1, 1, 600, 2, 1),
}


def make(shape: Shape, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Value, locations and weights; a third of the samples is outside the map or on its border."""
    generator = torch.Generator().manual_seed(seed)
    pixels, levels = sum(h * w for h, w in shape.sizes), len(shape.sizes)
    samples = (shape.batch, shape.queries, shape.heads, levels, shape.points)
    value = torch.randn(shape.batch, pixels, shape.heads, shape.channels, dtype=torch.float64, generator=generator)
    locations = torch.rand(*samples, 2, dtype=torch.float64, generator=generator) * 1.4 - 0.2
    weights = torch.randn(*samples, dtype=torch.float64, generator=generator)
    return [tensor.to(DEVICE, dtype).requires_grad_() for tensor in (value, locations, weights)]


def reference(shape: Shape, inputs: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Output, gradients and incoming gradient in float64, by ``embedding_bag``."""
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out = deformable_attention._implementations["embedding_bag"](exact[0], shape.sizes, exact[1], exact[2])
    seed = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out.device)
    return out, torch.autograd.grad(out, exact, seed), seed


@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_gradients_in_float32(name: str) -> None:
    shape = SHAPES[name]
    inputs = make(shape, torch.float32)
    expected, expected_grads, seed = reference(shape, inputs)
    found = triton_attention(inputs[0], shape.sizes, inputs[1], inputs[2])
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-5
    for ours, theirs in zip(torch.autograd.grad(found, inputs, seed.float()), expected_grads, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < 1e-4


class _OperatorNames(TorchDispatchMode):
    """Records the names of dispatched operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_inference_mode_bypasses_the_operator_with_equal_results() -> None:
    shape = SHAPES["four levels, four points"]
    inputs = make(shape, torch.float32)
    with _OperatorNames() as default:
        expected = triton_attention(inputs[0], shape.sizes, inputs[1], inputs[2])
    with torch.inference_mode(), _OperatorNames() as bypassed:
        triton_attention(inputs[0], shape.sizes, inputs[1], inputs[2])
    assert [any("motip" in name for name in mode.names) for mode in (default, bypassed)] == [True, False]
    with torch.inference_mode():
        assert torch.equal(triton_attention(inputs[0], shape.sizes, inputs[1], inputs[2]), expected)
        with pytest.raises(MotipError, match="contradict"):
            triton_attention(inputs[0], [(2, 4)], inputs[1], inputs[2])


def test_equals_explicit_loops() -> None:
    shape = Shape([(4, 3), (1, 2)], 2, 2, 3, 2, 1)
    inputs = [tensor.cpu() for tensor in make(shape)]
    loops = _loops(inputs[0], shape.sizes, inputs[1], inputs[2])
    found = triton_attention(*_on_device(inputs[0], shape, inputs[1], inputs[2]))
    assert (found.cpu() - loops).abs().max() < 1e-12


def _on_device(value: Tensor, shape: Shape, locations: Tensor, weights: Tensor) -> tuple:
    return value.to(DEVICE), shape.sizes, locations.to(DEVICE), weights.to(DEVICE)


def test_gradcheck() -> None:
    shape = Shape([(3, 2), (1, 2)], 1, 2, 3, 2, 1)
    inputs = make(shape)
    assert torch.autograd.gradcheck(
        lambda value, locations, weights: triton_attention(value, shape.sizes, locations, weights),
        inputs,
        fast_mode=True,
        nondet_tol=1e-12,  # atomic additions
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_with_float32_arithmetic(dtype: torch.dtype) -> None:
    """As under autocast: values in half precision, locations and weights in float32.

    The remaining error against float64 on the same rounded values is the rounding of the result: half a unit in the
    last of 8 (bf16) or 11 (fp16) bits.
    """
    shape = SHAPES["four levels, four points"]
    inputs = make(shape, torch.float32)
    inputs[0] = inputs[0].detach().to(dtype).requires_grad_()
    expected, expected_grads, seed = reference(shape, inputs)
    found = triton_attention(inputs[0], shape.sizes, inputs[1], inputs[2])
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=unit, atol=1e-5)
    assert found.dtype == dtype
    grads = torch.autograd.grad(found, inputs, seed.to(dtype))
    assert [grad.dtype for grad in grads] == [dtype, torch.float32, torch.float32]
    for ours, theirs in zip(grads, expected_grads, strict=True):
        # The incoming gradient is rounded as well; its errors accumulate over samples and channels.
        assert (ours - theirs).abs().max() < 2 * unit * theirs.abs().max()


def test_all_in_half_precision() -> None:
    shape = SHAPES["odd channels"]
    inputs = make(shape, torch.bfloat16)
    expected, expected_grads, seed = reference(shape, inputs)
    found = triton_attention(inputs[0], shape.sizes, inputs[1], inputs[2])
    unit = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(found.double(), expected, rtol=unit, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(found, inputs, seed.bfloat16()), expected_grads, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - theirs).abs().max() < 2 * unit * theirs.abs().max()


@pytest.mark.parametrize("shape", [Shape([(3, 4)], 2, 2, 8, 0), Shape([(3, 4)], 2, 2, 8, 3, 0)], ids=["query", "image"])
def test_empty_inputs(shape: Shape) -> None:
    inputs = make(shape, torch.float32)
    out = triton_attention(inputs[0], shape.sizes, inputs[1], inputs[2])
    assert out.shape == (shape.batch, shape.queries, 16)
    out.sum().backward()
    for tensor in inputs:
        assert tensor.grad is not None and tensor.grad.shape == tensor.shape and not tensor.grad.any()


@pytest.mark.parametrize("coordinate", [-3.0, 4.0, 1e30, math.inf, math.nan])
def test_samples_outside_the_map_are_zero(coordinate: float) -> None:
    shape = Shape([(3, 4), (2, 2)], 1, 1, 8, 2, 1)
    value, locations, weights = make(shape, torch.float32)
    locations = torch.full_like(locations, coordinate).requires_grad_()
    out = triton_attention(value, shape.sizes, locations, weights)
    assert not out.any()
    of_value, of_weights = torch.autograd.grad(out.sum(), (value, weights))
    assert not of_value.any()
    assert not of_weights.any() or not math.isfinite(coordinate)


def test_only_required_gradients_are_computed() -> None:
    shape = SHAPES["sixteen channels"]
    inputs = make(shape, torch.float32)
    _, expected, seed = reference(shape, inputs)
    for required in range(3):
        own = [tensor.detach().requires_grad_(index == required) for index, tensor in enumerate(inputs)]
        triton_attention(own[0], shape.sizes, own[1], own[2]).backward(seed.float())
        for index, tensor in enumerate(own):
            assert (tensor.grad is None) == (index != required)
        found = own[required].grad
        assert found is not None and (found - expected[required]).abs().max() < 1e-4


def test_strided_inputs() -> None:
    shape = SHAPES["odd channels"]
    inputs = make(shape, torch.float32)
    expected, expected_grads, seed = reference(shape, inputs)
    strided = [tensor.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for tensor in inputs]
    out = triton_attention(strided[0], shape.sizes, strided[1], strided[2])
    assert (out - expected).abs().max() < 1e-5
    wide = torch.stack([seed.float(), seed.float()], -1)[..., 0]
    for ours, theirs in zip(torch.autograd.grad(out, strided, wide), expected_grads, strict=True):
        assert (ours - theirs).abs().max() < 1e-4


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> tuple[DeformableAttention, list[Tensor]]:
    """The module on two levels with padding, its random inputs, with Triton selected."""
    torch.manual_seed(0)
    module = DeformableAttention(16, 2, 2, 2).to(DEVICE)
    query, value = torch.randn(1, 3, 16), torch.randn(1, 14, 16)
    reference_points, padding = torch.rand(1, 3, 2, 2), torch.arange(14).unsqueeze(0) % 5 == 4
    monkeypatch.setattr(deformable_attention, "_chosen", "triton")
    return module, [tensor.to(DEVICE) for tensor in (query, reference_points, value, padding)]


def _gradients(module: DeformableAttention, out: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out.float().square().sum(), list(module.parameters())))


def _run(layer: tuple[DeformableAttention, list[Tensor]]) -> tuple[Tensor, list[Tensor]]:
    module, (query, points, value, padding) = layer
    out = module(query, points, value, [(3, 4), (1, 2)], padding)
    return out, _gradients(module, out)


def test_layer_with_padding_equals_grid_sample(layer: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    found, found_grads = _run(layer)
    monkeypatch.setattr(deformable_attention, "_chosen", "grid_sample")
    expected, expected_grads = _run(layer)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found_grads, expected_grads, rtol=1e-4, atol=1e-4)


def test_activation_checkpoint(layer: tuple) -> None:
    module, (query, points, value, padding) = layer
    expected, expected_grads = _run(layer)
    out = checkpoint(module, query, points, value, [(3, 4), (1, 2)], padding, use_reentrant=False)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(_gradients(module, out), expected_grads, rtol=1e-5, atol=1e-5)


def test_autocast(layer: tuple) -> None:
    expected, expected_grads = _run(layer)
    with torch.autocast(DEVICE, torch.bfloat16):
        found, found_grads = _run(layer)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    for ours, theirs in zip(found_grads, expected_grads, strict=True):
        assert ours.dtype == torch.float32 and ours.isfinite().all()
        assert (ours - theirs).norm() < 0.1 * theirs.norm() + 0.1


def test_compiles_without_graph_break(layer: tuple) -> None:
    module, (query, points, value, padding) = layer
    expected, expected_grads = _run(layer)
    compiled = torch.compile(
        lambda q, r, v, m: module(q, r, v, [(3, 4), (1, 2)], m), backend="aot_eager", fullgraph=True
    )
    out = compiled(query, points, value, padding)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(_gradients(module, out), expected_grads, rtol=1e-5, atol=1e-5)


def test_opcheck() -> None:
    shape = Shape([(2, 3)], 1, 1, 4, 2, 1)
    value, locations, weights = make(shape, torch.float32)
    torch.library.opcheck(  # raises on a violation
        torch.ops.motip.deformable_attention.default,
        (value, [2, 3], locations, weights),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_inconsistent_shapes_are_an_error() -> None:
    value, locations, weights = make(Shape([(2, 3)], 1, 1, 4, 2, 1), torch.float32)
    with pytest.raises(MotipError, match="contradict"):
        triton_attention(value, [(2, 4)], locations, weights)
    with pytest.raises(MotipError, match="contradict"):
        triton_attention(value, [(2, 3)], locations[:, :1], weights)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_preferred_implementation_on_cuda() -> None:
    device = torch.device(DEVICE)
    assert deformable_attention.best_implementation(device) == "triton"
    value, locations, weights = make(SHAPES["odd channels"], torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        assert deformable_attention.best_implementation(device) == "embedding_bag"
        out = triton_attention(value, SHAPES["odd channels"].sizes, locations, weights)
        with pytest.raises(MotipError, match="not deterministic"):
            out.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
