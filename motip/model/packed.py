"""A linear layer with fixed weights, for the few rows that a tracker has in a frame.

PyTorch sends float32 products to MKL. On AMD processors MKL multiplies a few dozen rows at less than half the speed of
oneDNN, which PyTorch ships as well and TorchInductor uses through the same two operators. oneDNN also wants the weights
in blocks of its own; packed once, they are not put in order again in every frame.
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedLinear:
    """``x @ weight.T + bias``, then exact GELU if wanted, without gradient.

    Packed are float32 weights on an x86 CPU, which costs a copy of them. Anything else goes through ``F.linear`` and
    costs none.

    Args:
        weight: (out, in); a packed copy does not see later changes. bias: (out,).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.packed = can_pack(weight)
        weight = weight.detach()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.packed else weight
        self._bias = None if bias is None else bias.detach()

    @classmethod
    def of(cls, layer: nn.Linear) -> PackedLinear:
        return cls(layer.weight, layer.bias)

    def __call__(self, x: Tensor, gelu: bool = False) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.packed:
            after, algorithm = ("gelu", "none") if gelu else ("none", "")
            packed: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, after, [], algorithm)
            return packed
        product = F.linear(x, self._weight, self._bias)
        return F.gelu(product) if gelu else product


def can_pack(weight: Tensor) -> bool:
    """Whether this build of PyTorch has oneDNN's operators for such weights."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )
