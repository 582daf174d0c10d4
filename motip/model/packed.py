"""Linear layers and convolutions with fixed weights, for one frame after the other.

PyTorch sends float32 products to MKL. On AMD processors MKL multiplies at less than half the speed of oneDNN, which
PyTorch ships as well and TorchInductor uses through the same operators. oneDNN also wants the weights in blocks of its
own; packed once, they are not put in order again in every frame. What follows a product (an activation, the sum with a
shortcut) is done before the product leaves the cache.
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedLinear:
    """``x @ weight.T + bias``, then what is asked for, without gradient.

    Packed are float32 weights on an x86 CPU, which costs a copy of them. Anything else goes through ``F.linear`` and
    costs none.

    Args:
        weight: (out, in); a packed copy does not see later changes. bias: (out,). dtype: type to multiply in, None:
            that of `weight`. Another one is for weights that ``can_pack`` says can be packed in it.
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
        """(..., in) -> (..., out) in the own type, after exact GELU or ReLU if wanted."""
        if self.packed:
            after, algorithm = ("gelu", "none") if gelu else ("relu" if relu else "none", "")
            packed: Tensor = torch.ops.mkldnn._linear_pointwise(
                x.to(self.dtype), self._weight, self._bias, after, [], algorithm
            )
            return packed
        product = F.linear(x, self._weight, self._bias)
        return F.gelu(product) if gelu else F.relu(product) if relu else product

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """(..., in) -> (..., out) and `other` (..., out) added, in the type of `other`."""
        if self.packed and self.dtype == other.dtype:
            packed: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self._weight, self._bias, "add")
            return packed
        return self(x).to(other.dtype).add_(other)


class PackedConv:
    """A convolution and the frozen batch norm behind it in one, channels last, without gradient.

    The weights are packed for the size of the first frame; for another size they are packed anew from `convolution`.

    Args:
        convolution: `can_pack` must say so of its weights. dtype: type to multiply in. norm: scale and shift, each
            (out,), of the batch norm.
    """

    def __init__(self, convolution: nn.Conv2d, dtype: torch.dtype, norm: tuple[Tensor, Tensor] | None = None) -> None:
        bias = convolution.bias
        scale, shift = norm or (None, None)
        if scale is not None and shift is not None:
            bias = shift if bias is None else bias * scale + shift
        self._convolution = convolution
        self._scale = scale
        self._dtype = dtype
        self._bias = None if bias is None else bias.detach().to(dtype)
        sizes = (convolution.padding, convolution.stride, convolution.dilation)
        self._geometry = (*(list(size) for size in sizes), convolution.groups)
        self._packed_for: torch.Size | None = None
        self._weight = convolution.weight.detach()

    def __call__(self, x: Tensor, relu: bool = False) -> Tensor:
        """(B, in, H, W), channels last -> (B, out, h, w), channels last in the own type; after ReLU if wanted."""
        self._pack(x.shape)
        after = "relu" if relu else "none"
        convolved: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x.to(self._dtype), self._weight, self._bias, *self._geometry, after, [], ""
        )
        return convolved

    def onto(self, other: Tensor, x: Tensor) -> Tensor:
        """Add the result to `other`, of the own type, in place, then ReLU: the end of a residual block."""
        self._pack(x.shape)
        added: Tensor = torch.ops.mkldnn._convolution_pointwise_.binary(
            other, x, self._weight, self._bias, *self._geometry, "add", 1.0, "relu", [], ""
        )
        return added

    def _pack(self, size: torch.Size) -> None:
        if self._packed_for == size:
            return
        weight = self._convolution.weight.detach()
        if self._scale is not None:
            weight = weight * self._scale.view(-1, 1, 1, 1)
        # Packed for no size in particular, the weights would be slower than as they are.
        weight = weight.to(self._dtype).contiguous(memory_format=torch.channels_last)
        self._weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self._geometry, list(size))
        self._packed_for = size


def can_pack(weight: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether this build of PyTorch has oneDNN's operators for such weights, and this processor multiplies `dtype`.

    False under ``torch.backends.mkldnn.flags(enabled=False)``.

    Args:
        dtype: type to multiply in, None: that of `weight`. Besides float32 it can be bfloat16, where the processor has
            instructions for it: without them it would be slower.
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
