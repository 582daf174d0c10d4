"""Deformable attention by Triton kernels: operator, gradient, availability check.

Triton is part of PyTorch's CUDA wheels for Linux. It is imported when a kernel is launched, so the model does not
depend on it. It builds its launcher with the C compiler of the machine, which `triton_ready` tests by a launch.

The operator ``torch.ops.motip.deformable_attention`` is opaque to ``torch.compile`` and has a fake implementation, so
that compiled models and fake tensors do not enter the kernels.

The gradient of the values is summed with atomic additions in float32 and not deterministic; with
``torch.use_deterministic_algorithms`` the default is ``embedding_bag`` instead.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from motip.errors import MotipError

_INSTALLED = importlib.util.find_spec("triton") is not None
_OTHER = "set MOTIP_DEFORMABLE_ATTENTION=grid_sample or embedding_bag"

_logger = logging.getLogger(__name__)
_ready: bool | None = None


def preferred_implementation(device: torch.device) -> str:
    """The fastest implementation on `device`; deterministic under ``torch.use_deterministic_algorithms``."""
    if device.type == "cpu":
        return "embedding_bag"
    if device.type != "cuda":
        return "grid_sample"
    if torch.are_deterministic_algorithms_enabled():
        return "embedding_bag"
    return "triton" if triton_ready(device) else "grid_sample"


def triton_ready(device: torch.device) -> bool:
    """Whether the kernels run on this CUDA device; tested once per process and logged."""
    global _ready
    if _ready is None:
        if torch.compiler.is_compiling():  # the compiler for CUDA is Triton too
            return _INSTALLED
        _ready = _probe(device)
    return _ready


def _probe(device: torch.device) -> bool:
    """Launch the forward kernel on one sample."""
    value = torch.ones(1, 1, 1, 1, device=device)
    locations = torch.full((1, 1, 1, 1, 1, 2), 0.5, device=device)
    try:
        found = _kernels().forward(value, [1, 1], locations, value[..., None]).item()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no triton, no C compiler, unsupported GPU: various types of errors
        reason = " ".join(str(error).split())[:200]
        _logger.warning("deformable attention: using grid_sample, because the Triton kernels cannot run (%s)", reason)
        return False
    _logger.info("deformable attention on CUDA: Triton kernels")
    return found == 1.0


def triton_attention(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """See `motip.model.deformable_attention.deformable_attention`; CUDA tensors of any mixture of floating types.

    Accumulates in float32, or in float64 if a tensor is float64.

    Raises:
        MotipError: tensors that are not on a CUDA device; shapes that contradict each other; triton is not installed;
            gradient of the values under ``torch.use_deterministic_algorithms``.
    """
    sizes = [side for shape in spatial_shapes for side in shape]
    out: Tensor
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled() and type(value) is Tensor:
        # Dispatch through PyTorch's operator costs the host more than the launch.
        out = _run(value, sizes, sampling_locations, attention_weights)
    else:
        out = torch.ops.motip.deformable_attention(value, sizes, sampling_locations, attention_weights)
    return out


@torch.library.custom_op(
    "motip::deformable_attention",
    mutates_args=(),
    schema="(Tensor value, SymInt[] sizes, Tensor locations, Tensor weights) -> Tensor",
)
def _forward(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    return _run(value, sizes, locations, weights)


def _run(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    kernels = _kernels()
    _check(kernels, value, sizes, locations, weights)
    out: Tensor = kernels.forward(value, sizes, locations, weights)
    return out


@_forward.register_fake
def _(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@torch.library.custom_op(
    "motip::deformable_attention_backward",
    mutates_args=(),
    schema="(Tensor out_grad, Tensor value, SymInt[] sizes, Tensor locations, Tensor weights, bool[] needed)"
    " -> (Tensor, Tensor, Tensor)",
)
def _backward(
    out_grad: Tensor, value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor, needed: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    if needed[0] and torch.are_deterministic_algorithms_enabled() and value.is_cuda:
        raise MotipError(
            "the gradient of the values is not deterministic with the Triton kernels",
            where="torch.use_deterministic_algorithms",
            found=True,
            fix="set MOTIP_DEFORMABLE_ATTENTION=embedding_bag, or leave it out",
        )
    grads: tuple[Tensor, Tensor, Tensor] = _kernels().backward(out_grad, value, sizes, locations, weights, needed)
    return grads


@_backward.register_fake
def _(
    out_grad: Tensor, value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor, needed: Sequence[bool]
) -> tuple[Tensor, ...]:
    inputs = (value, locations, weights)
    return tuple(x.new_empty(x.shape if need else (0,)) for x, need in zip(inputs, needed, strict=True))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.sizes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _gradients(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    needed = [ctx.needs_input_grad[index] for index in (0, 2, 3)]
    grads = torch.ops.motip.deformable_attention_backward(out_grad, value, ctx.sizes, locations, weights, needed)
    of_value, of_locations, of_weights = (grad if need else None for grad, need in zip(grads, needed, strict=True))
    return of_value, None, of_locations, of_weights


_forward.register_autograd(_gradients, setup_context=_save_for_backward)


def _kernels() -> ModuleType:
    if not _INSTALLED:
        raise MotipError("the Triton kernels of deformable attention need triton", where="import triton", fix=_OTHER)
    from motip.model.fast import triton_kernels

    return triton_kernels


def _check(kernels: ModuleType, value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> None:
    """Check devices and shapes: the kernels themselves do not check bounds of their arguments."""
    if not (kernels.INTERPRETED or value.is_cuda) or len({value.device, locations.device, weights.device}) > 1:
        devices = ", ".join(str(tensor.device) for tensor in (value, locations, weights))
        raise MotipError(
            "the Triton kernels of deformable attention run on a CUDA device",
            found=devices,
            expected="value, locations and weights on one",
            fix=_OTHER,
        )
    batch, pixels, heads, _ = value.shape
    counted = sum(height * width for height, width in zip(sizes[::2], sizes[1::2], strict=True))
    expected = (batch, locations.shape[1], heads, len(sizes) // 2, weights.shape[-1])
    if counted != pixels or tuple(weights.shape) != expected or tuple(locations.shape) != (*expected, 2):
        raise MotipError(
            "the arguments of deformable attention contradict each other",
            found=f"value {tuple(value.shape)}, levels of {counted} pixels, locations {tuple(locations.shape)}, "
            f"weights {tuple(weights.shape)}",
            expected=f"{pixels} pixels, locations {(*expected, 2)}, weights {expected}",
        )
