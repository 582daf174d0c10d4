"""Linear layers and convolutions with packed weights, for inference.

On a GPU: PyTorch's operators, with weights cast once to the compute type.

On a CPU: oneDNN's operators, which PyTorch ships and TorchInductor uses as well. PyTorch sends float32 products to MKL,
which on AMD processors reaches less than half of their speed. oneDNN needs weights in a blocked layout; packing
converts them once instead of in every frame. Activations and sums with a shortcut are fused into the operator.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedLinear:
    """``x @ weight.T + bias`` with an optional fused activation, without gradient.

    float32 weights on an x86 CPU are packed into a copy; others go through ``F.linear``.

    Args:
        weight: (out, in); later changes have no effect if it is copied.
        bias: (out,).
        dtype: compute type; None: that of `weight`. On a CPU another type needs ``can_pack``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> None:
        self.packed = can_pack(weight, dtype)
        self.dtype = dtype or weight.dtype
        weight = weight.detach().to(self.dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.packed else weight
        self._bias = None if bias is None else bias.detach().to(self.dtype)

    @classmethod
    def of(cls, layer: nn.Linear, dtype: torch.dtype | None = None) -> PackedLinear:
        return cls(layer.weight, layer.bias, dtype)

    def __call__(self, x: Tensor, gelu: bool = False, relu: bool = False) -> Tensor:
        """(..., in) -> (..., out) in the compute type, with exact GELU or ReLU if requested."""
        if self.packed:
            after, algorithm = ("gelu", "none") if gelu else ("relu" if relu else "none", "")
            packed: Tensor = torch.ops.mkldnn._linear_pointwise(
                x.to(self.dtype), self._weight, self._bias, after, [], algorithm
            )
            return packed
        product = F.linear(x.to(self.dtype), self._weight, self._bias)
        return F.gelu(product) if gelu else F.relu(product) if relu else product

    def linear_add(self, x: Tensor, other: Tensor) -> Tensor:
        """The linear layer plus `other`: x (..., in), other (..., out) -> (..., out) in the type of `other`."""
        if self.packed and self.dtype == other.dtype:
            packed: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self._weight, self._bias, "add")
            return packed
        return self(x).to(other.dtype).add_(other)


class PackedConv:
    """Convolution with a frozen batch norm folded in, channels last, without gradient.

    On a CPU the weights are packed for the size of the input; another size packs them again from `convolution`. Weights
    that cannot be packed go through ``F.conv2d``, folded once.

    Args:
        convolution: with float32 weights.
        dtype: compute type; slow on a CPU unless `can_pack`.
        norm: scale and shift, each (out,), of the following batch norm.
    """

    def __init__(self, convolution: nn.Conv2d, dtype: torch.dtype, norm: tuple[Tensor, Tensor] | None = None) -> None:
        bias = convolution.bias
        scale, shift = norm or (None, None)
        if scale is not None and shift is not None:
            bias = shift if bias is None else bias * scale + shift
        self.packed = can_pack(convolution.weight, dtype)
        self._convolution = convolution
        self._scale = scale
        self._dtype = dtype
        self._bias = None if bias is None else bias.detach().to(dtype)
        padding, stride, dilation = (
            list(size) for size in (convolution.padding, convolution.stride, convolution.dilation)
        )
        self._geometry: tuple[list[Any], list[Any], list[Any], int] = (padding, stride, dilation, convolution.groups)
        self._packed_for: torch.Size | None = None
        self._weight = convolution.weight.detach() if self.packed else self._folded()

    def __call__(self, x: Tensor, relu: bool = False) -> Tensor:
        """(B, in, H, W) channels last -> (B, out, h, w) channels last in the compute type, with ReLU if requested."""
        if not self.packed:
            convolved = self._plain(x)
            return convolved.relu_() if relu else convolved
        self._pack(x.shape)
        after = "relu" if relu else "none"
        fused: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x.to(self._dtype), self._weight, self._bias, *self._geometry, after, [], ""
        )
        return fused

    def conv_add_relu(self, other: Tensor, x: Tensor) -> Tensor:
        """ReLU of convolution plus `other`, the end of a residual block; `other` (B, out, h, w) may be overwritten."""
        if not self.packed:
            return self._plain(x).add_(other).relu_()
        self._pack(x.shape)
        added: Tensor = torch.ops.mkldnn._convolution_pointwise_.binary(
            other, x, self._weight, self._bias, *self._geometry, "add", 1.0, "relu", [], ""
        )
        return added

    def _plain(self, x: Tensor) -> Tensor:
        padding, stride, dilation, groups = self._geometry
        return F.conv2d(x.to(self._dtype), self._weight, self._bias, stride, padding, dilation, groups)

    def _pack(self, size: torch.Size) -> None:
        if self._packed_for == size:
            return
        # Weights packed without an input size are slower than unpacked ones.
        self._weight = torch.ops.mkldnn._reorder_convolution_weight(self._folded(), *self._geometry, list(size))
        self._packed_for = size

    def _folded(self) -> Tensor:
        weight = self._convolution.weight.detach()
        if self._scale is not None:
            weight = weight * self._scale.view(-1, 1, 1, 1)
        return weight.to(self._dtype).contiguous(memory_format=torch.channels_last)


def can_pack(weight: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether oneDNN's operators support `weight` and `dtype` on this processor.

    False under ``torch.backends.mkldnn.flags(enabled=False)``.

    Args:
        dtype: compute type; None: that of `weight`. float32, or bfloat16 on processors with instructions for it (it is
            slower on others).
    """
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and (dtype in (None, torch.float32) or (dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()))
        and platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise_")
    )
