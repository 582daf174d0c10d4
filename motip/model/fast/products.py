"""Linear layers and 1x1 convolutions that learn, through oneDNN on a CPU.

PyTorch sends float32 products to MKL, which on AMD processors multiplies at less than half the speed of oneDNN, forward
and backward (see ``packed``, where the weights stay as they are and there is no gradient). 1x1 convolutions of few
images take the same slow way. Everywhere else (other devices, other types, autocast, a compiler) these are `F.linear`
and `nn.Conv2d`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from motip.model.fast.packed import can_pack

_WORTH_IT = 1 << 20
"""Multiplications below which a product is not worth the calls around it."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """``F.linear``, then ReLU if wanted: x (..., in), weight (out, in), bias (out,) -> (..., out).

    The gradient has no gradient itself.
    """
    if (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or x.numel() * weight.shape[0] < _WORTH_IT
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or type(x) is not Tensor  # such as the memory estimate's, which have no oneDNN form
        or not torch.backends.mkldnn.enabled
        or not _has_onednn()
    ):
        multiplied = F.linear(x, weight, bias)
        return F.relu(multiplied) if relu else multiplied
    rows: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), weight, bias, relu)
    return rows.view(*x.shape[:-1], len(weight))


def pixelwise(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, relu: bool = False) -> Tensor:
    """A 1x1 convolution, then ReLU if wanted: x (B,in,H,W), weight (out,in,1,1) -> (B,out,h,w).

    On a CPU it is a product of the pixels and comes out channels last; x should be so too, or it is copied.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        convolved = F.conv2d(x, weight, bias, stride)
        return F.relu(convolved) if relu else convolved
    if stride > 1:
        x = x[:, :, ::stride, ::stride]
    return product(x.permute(0, 2, 3, 1), weight[:, :, 0, 0], bias, relu).permute(0, 3, 1, 2)


class Linear(nn.Linear):
    """``nn.Linear`` through `product`."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


def relu_of(linear: nn.Module, x: Tensor) -> Tensor:
    """``relu(linear(x))``; with a `Linear` in one go, past any hook on it."""
    if isinstance(linear, Linear):
        return product(x, linear.weight, linear.bias, relu=True)
    return F.relu(linear(x))


class PixelwiseConv(nn.Conv2d):
    """A 1x1 convolution through `pixelwise`, under the keys of ``nn.Conv2d``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return pixelwise(x, self.weight, self.bias)


def use_products(model: nn.Module) -> None:
    """Make every plain ``nn.Linear`` inside a `Linear`; parameters and keys stay what they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        x = x.contiguous()
        multiplied = _multiplied(x, weight.contiguous(), bias)
        if relu:
            multiplied.relu_()  # oneDNN's own makes 0 of what is no number, and would hide a weight that has diverged
        ctx.save_for_backward(x, weight, multiplied if relu else None)
        return multiplied

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, after_relu = ctx.saved_tensors
        grad = grad.contiguous()
        if after_relu is not None:
            grad = torch.ops.aten.threshold_backward(grad, after_relu, 0)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _multiplied(grad, weight.t().contiguous(), None)
        if ctx.needs_input_grad[1]:
            # oneDNN's own operator for it wants its own kind of tensors; with the copies it is still the fastest.
            grad_weight, _ = torch.ops.aten.mkldnn_linear_backward_weights(
                grad.to_mkldnn(), x.to_mkldnn(), weight.contiguous(), False
            )
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_x, grad_weight, grad_bias, None


def _multiplied(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    multiplied: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return multiplied


@cache
def _has_onednn() -> bool:
    # What holds as long as the process does; the switch that is asked beside it may change.
    return can_pack(torch.zeros(1)) and hasattr(torch.ops.aten, "mkldnn_linear_backward_weights")
