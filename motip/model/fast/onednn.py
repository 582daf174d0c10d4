"""oneDNN implementations of the network's linear layers and 1x1 convolutions on a CPU, with a gradient.

PyTorch sends float32 matrix products to MKL, which on AMD processors reaches less than half the speed of oneDNN,
forward and backward (see ``packed`` for fixed weights without a gradient). 1x1 convolutions of few images take the same
slow path. On other devices and types, under autocast or a compiler, the reference implementations run.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from motip.model.fast.packed import can_pack
from motip.model.ops import reference_linear, reference_pointwise_conv

_MIN_MULTIPLICATIONS = 1 << 20
"""Below this many multiplications the call overhead exceeds the gain."""


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """A :class:`motip.model.ops.LinearOp`; its gradient is differentiable once."""
    if (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or x.numel() * weight.shape[0] < _MIN_MULTIPLICATIONS
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or type(x) is not Tensor  # tensor subclasses, such as the memory estimate's, have no oneDNN form
        or not torch.backends.mkldnn.enabled
        or not _has_onednn()
    ):
        return reference_linear(x, weight, bias, relu)
    rows: Tensor = _OnednnLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, relu)
    return rows.view(*x.shape[:-1], len(weight))


def onednn_pointwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, relu: bool = False
) -> Tensor:
    """A :class:`motip.model.ops.PointwiseConvOp`.

    On a CPU it is a product over the pixels with a channels-last result; an input in another layout is copied.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return reference_pointwise_conv(x, weight, bias, stride, relu)
    if stride > 1:
        x = x[:, :, ::stride, ::stride]
    return onednn_linear(x.permute(0, 2, 3, 1), weight[:, :, 0, 0], bias, relu).permute(0, 3, 1, 2)


class _OnednnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        x = x.contiguous()
        y = _product(x, weight.contiguous(), bias)
        if relu:
            y.relu_()  # oneDNN's own maps NaN to 0, which would hide a weight that has diverged
        ctx.save_for_backward(x, weight, y if relu else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, after_relu = ctx.saved_tensors
        grad = grad.contiguous()
        if after_relu is not None:
            grad = torch.ops.aten.threshold_backward(grad, after_relu, 0)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad, weight.t().contiguous(), None)
        if ctx.needs_input_grad[1]:
            # oneDNN's operator takes oneDNN tensors; copies included it is the fastest.
            grad_weight, _ = torch.ops.aten.mkldnn_linear_backward_weights(
                grad.to_mkldnn(), x.to_mkldnn(), weight.contiguous(), False
            )
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_x, grad_weight, grad_bias, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


@cache
def _has_onednn() -> bool:
    # Fixed for the life of the process; mkldnn.enabled, read beside it, is not.
    return can_pack(torch.zeros(1)) and hasattr(torch.ops.aten, "mkldnn_linear_backward_weights")
