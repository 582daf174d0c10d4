"""Multi-scale deformable attention (Deformable DETR, section 4.1), with the implementation selected at run time.

* ``grid_sample``: every device PyTorch supports; can be exported;
* ``embedding_bag``: each sample's channels are one contiguous row, faster on a CPU, see `bag_attention` and
  benchmarks/bench_deformable_attention.py;
* ``triton``: Triton kernels on CUDA, forward and backward; needs triton and a C compiler;
* ``auto``, the default: ``embedding_bag`` on a CPU; on CUDA ``triton`` where it runs, or ``embedding_bag`` under
  ``torch.use_deterministic_algorithms``, the only one with deterministic gradients there; else ``grid_sample``.

The environment variable ``MOTIP_DEFORMABLE_ATTENTION`` selects another one than ``auto`` for a process.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motip.errors import MotipError
from motip.model.ops import Linear

SpatialShapes = Sequence[tuple[int, int]]
_Implementation = Callable[[Tensor, SpatialShapes, Tensor, Tensor], Tensor]

_VARIABLE = "MOTIP_DEFORMABLE_ATTENTION"

_logger = logging.getLogger(__name__)
_implementations: dict[str, _Implementation] = {}
_chosen: str = os.environ.get(_VARIABLE) or "auto"
_logged: set[str] = set()
_preferred: Callable[[torch.device], str] = lambda device: "grid_sample"  # noqa: E731 - replaced at run time


def register_implementation(name: str, implementation: _Implementation) -> None:
    """Make `implementation` selectable under `name`; it must follow ``deformable_attention``'s contract."""
    _implementations[name] = implementation


def prefer_implementations(preferred: Callable[[torch.device], str]) -> None:
    """Let `preferred` (device -> name) decide what ``auto`` uses; without this call it is ``grid_sample``."""
    global _preferred
    _preferred = preferred


def use_implementation(name: str) -> None:
    """Select the implementation for all models of this process; ``grid_sample`` for exporting a model.

    Raises:
        MotipError: unknown name.
    """
    global _chosen
    _named(name)
    _chosen = name
    log_implementation()


def log_implementation() -> str:
    """Log the chosen implementation once per process and return its name.

    Raises:
        MotipError: MOTIP_DEFORMABLE_ATTENTION is not a known name.
    """
    _named(_chosen, _VARIABLE)
    if _chosen not in _logged:
        _logged.add(_chosen)
        _logger.info("deformable attention: %s implementation", _chosen)
    return _chosen


def _named(name: str, where: str | None = None) -> _Implementation:
    if name not in _implementations:
        raise MotipError(
            "unknown implementation of deformable attention",
            where=where,
            found=name,
            expected=", ".join(sorted(_implementations)),
        )
    return _implementations[name]


def deformable_attention(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Weighted sum of bilinear samples of `value`.

    Args:
        value: (B, S, heads, d), rows of the levels concatenated, S = sum of h*w.
        spatial_shapes: (h, w) of each level, Python integers.
        sampling_locations: (B, Q, heads, levels, points, 2), (x, y) in 0..1 of each level's padded map; pixel i covers
            [i/w, (i+1)/w]. Samples outside contribute zero.
        attention_weights: (B, Q, heads, levels, points).

    Returns:
        (B, Q, heads * d), in the type of `value`. Q may be 0.
    """
    return _named(_chosen, _VARIABLE)(value, spatial_shapes, sampling_locations, attention_weights)


def _grid_sample_attention(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    # bfloat16 resolves 1/256 of the image near 1: locations keep their type, values are cast to it.
    grids = (2.0 * sampling_locations - 1.0).transpose(1, 2).flatten(0, 1)  # (B*heads, Q, levels, points, 2)
    weights = attention_weights.transpose(1, 2).flatten(0, 1).to(grids.dtype)
    maps = value.to(grids.dtype).permute(0, 2, 3, 1).flatten(0, 1)  # (B*heads, d, S)

    total = grids.new_zeros(batch * heads, channels, queries)
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        level_map = maps[:, :, start : start + height * width].unflatten(2, (height, width))
        sampled = F.grid_sample(level_map, grids[:, :, level], "bilinear", "zeros", align_corners=False)
        # Reduced level by level: the samples of all levels together would set the memory peak of the detector.
        total = total + torch.einsum("bdqp,bqp->bdq", sampled, weights[:, :, level])
        start += height * width
    return total.view(batch, heads * channels, queries).transpose(1, 2).to(value.dtype)


def _auto_attention(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    name = best_implementation(value.device)
    return _implementations[name](value, spatial_shapes, sampling_locations, attention_weights)


def best_implementation(device: torch.device) -> str:
    """Name of the implementation that ``auto`` uses for tensors on `device`."""
    return _preferred(device)


register_implementation("grid_sample", _grid_sample_attention)
register_implementation("auto", _auto_attention)


class DeformableAttention(nn.Module):
    """Projections around ``deformable_attention``, under the published keys.

    Args:
        dim: width D.
        levels, heads, points: as in the paper; D is split head-major.
    """

    def __init__(self, dim: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.levels = levels
        self.heads = heads
        self.points = points
        self.sampling_offsets = Linear(dim, heads * levels * points * 2)
        self.attention_weights = Linear(dim, heads * levels * points)
        self.value_proj = Linear(dim, dim)
        self.output_proj = Linear(dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial offsets in one direction per head, one pixel further per point; equal attention weights."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.heads, dtype=torch.float32) * (2.0 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = directions[:, None, None, :] * steps[None, None, :, None]
        self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value_in: Tensor,
        spatial_shapes: SpatialShapes,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from `query` (B,Q,D) to `value_in` (B,S,D); returns (B,Q,D).

        Args:
            reference_points: (B, Q, levels, 2) points or (B, Q, levels, 4) boxes cxcywh, relative to each padded map.
            padding_mask: (B, S) bool, True on padding; padded values count as zero.
        """
        value = self.value_proj(value_in)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask.unsqueeze(-1), 0.0)
        value = value.unflatten(-1, (self.heads, -1))
        offsets = self.sampling_offsets(query).unflatten(-1, (self.heads, self.levels, self.points, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.heads, self.levels * self.points)).softmax(-1)
        weights = weights.unflatten(-1, (self.levels, self.points))
        locations = sampling_locations(reference_points, offsets, spatial_shapes)
        return self.output_proj(deformable_attention(value, spatial_shapes, locations, weights))


def sampling_locations(reference_points: Tensor, offsets: Tensor, spatial_shapes: SpatialShapes) -> Tensor:
    """Sampling locations (B,Q,heads,levels,points,2) in 0..1 from offsets of the same shape.

    Offsets are in pixels for reference points and in half box sizes / points for reference boxes.
    """
    if reference_points.shape[-1] == 2:
        sizes = offsets.new_tensor([[width, height] for height, width in spatial_shapes], dtype=reference_points.dtype)
        return reference_points[:, :, None, :, None, :] + offsets / sizes[:, None, :]
    centres = reference_points[:, :, None, :, None, :2]
    half_sizes = reference_points[:, :, None, :, None, 2:] * 0.5
    return centres + offsets / offsets.shape[4] * half_sizes
