"""Linear layers and 1x1 convolutions of the network, whose implementation can be replaced.

The implementations here are PyTorch's own. :func:`use_implementations` installs faster ones that return the same values
to rounding; :mod:`motip.model.fast` does so when :mod:`motip.model` is imported.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn


class LinearOp(Protocol):
    """``F.linear``, then ReLU if `relu`: x (..., in), weight (out, in), bias (out,) -> (..., out)."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor: ...


class PointwiseConvOp(Protocol):
    """A 1x1 convolution, then ReLU if `relu`: x (B, in, H, W), weight (out, in, 1, 1) -> (B, out, h, w)."""

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, relu: bool = False
    ) -> Tensor: ...


def reference_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """`LinearOp` of PyTorch."""
    y = F.linear(x, weight, bias)
    return F.relu(y) if relu else y


def reference_pointwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, relu: bool = False
) -> Tensor:
    """`PointwiseConvOp` of PyTorch."""
    y = F.conv2d(x, weight, bias, stride)
    return F.relu(y) if relu else y


_linear: LinearOp = reference_linear
_pointwise_conv: PointwiseConvOp = reference_pointwise_conv


def use_implementations(linear: LinearOp, pointwise_conv: PointwiseConvOp) -> None:
    """Replace the implementations for all models of this process."""
    global _linear, _pointwise_conv
    _linear, _pointwise_conv = linear, pointwise_conv


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """See `LinearOp`."""
    return _linear(x, weight, bias, relu)


def pointwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, relu: bool = False
) -> Tensor:
    """See `PointwiseConvOp`."""
    return _pointwise_conv(x, weight, bias, stride, relu)


def linear_relu(layer: Linear, x: Tensor) -> Tensor:
    """``relu(layer(x))`` in one operator; hooks of `layer` do not run."""
    return linear(x, layer.weight, layer.bias, relu=True)


class Linear(nn.Linear):
    """``nn.Linear`` through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution through `pointwise_conv`, under the state-dict keys of ``nn.Conv2d``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise_conv(x, self.weight, self.bias)
