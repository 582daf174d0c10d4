"""Multi-head attention projections under the published keys, for PyTorch's fused attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motip.model.ops import Linear, linear


class MultiHeadAttention(nn.Module):
    """Parameters ``in_proj_weight`` (3E,E), ``in_proj_bias``, ``out_proj.*``, keyed as ``torch.nn.MultiheadAttention``.

    The projections are separate methods because the ID decoder projects history and detections at different times.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.dim = dim
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    def project_query(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., heads, head_dim)."""
        query = linear(x, self.in_proj_weight[: self.dim], self.in_proj_bias[: self.dim])
        return query.unflatten(-1, (self.heads, self.head_dim))

    def project_value(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., heads, head_dim)."""
        value = linear(x, self.in_proj_weight[2 * self.dim :], self.in_proj_bias[2 * self.dim :])
        return value.unflatten(-1, (self.heads, self.head_dim))

    def project_query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., E) -> queries and keys, each (..., heads, head_dim), in one product."""
        both = linear(x, self.in_proj_weight[: 2 * self.dim], self.in_proj_bias[: 2 * self.dim])
        query, key = both.unflatten(-1, (2, self.heads, self.head_dim)).unbind(-3)
        return query, key

    def project_all(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., E) -> queries, keys and values, each (..., heads, head_dim), in one product."""
        projected = linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = projected.unflatten(-1, (3, self.heads, self.head_dim)).unbind(-3)
        return query, key, value

    def merge_heads(self, attended: Tensor) -> Tensor:
        """(..., heads, head_dim) -> (..., E) through the output projection."""
        return self.out_proj(attended.flatten(-2))


def with_zero_token(tokens: Tensor) -> Tensor:
    """Prepend the all-zero token of ``add_zero_attn`` along dim -3 of (..., S, heads, head_dim).

    As a key its score is 0 for every query and as a value it adds nothing, so a row whose other keys are all masked
    gives exactly 0 instead of NaN.
    """
    return F.pad(tokens, (0, 0, 0, 0, 1, 0))
