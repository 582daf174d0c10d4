"""Deformable transformer with iterative box refinement (Deformable DETR, sections 4.1 and 4.2)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from motip.model.attention import MultiHeadAttention
from motip.model.deformable_attention import DeformableAttention, SpatialShapes
from motip.model.ops import Linear, linear_relu
from motip.model.spec import ModelSpec

_CHECKPOINT_MIN_ELEMENTS = 1 << 22
"""Elements (B*S*D) from which the encoder recomputes its layers: two frames of 480x854 have more, a frame of the
synthetic demo dataset a hundredth."""


class FeatureLevel(NamedTuple):
    """One scale of the encoder input: features (B,D,h,w), mask (B,h,w) True on padding, position encoding (B,D,h,w)."""

    features: Tensor
    mask: Tensor
    position: Tensor


class DecoderOutput(NamedTuple):
    """Per decoder layer: hidden state (B,Q,D), reference before it (B,Q,2 or 4), box after it (B,Q,4), in 0..1."""

    hidden: list[Tensor]
    references_in: list[Tensor]
    references_out: list[Tensor]


class MLP(nn.Module):
    """`depth` linear layers with ReLU between them: (..., inputs) -> (..., outputs)."""

    def __init__(self, inputs: int, inner: int, outputs: int, depth: int) -> None:
        super().__init__()
        sizes = [inputs] + [inner] * (depth - 1) + [outputs]
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            assert isinstance(layer, Linear)
            x = linear_relu(layer, x)
        return self.layers[-1](x)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of x in 0..1, finite at both ends."""
    x = x.clamp(0.0, 1.0)
    return torch.log(x.clamp(min=eps) / (1.0 - x).clamp(min=eps))


class EncoderLayer(nn.Module):
    """Deformable self-attention over the pixels of all levels, then feed-forward; post-norm."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        dim = spec.hidden_dim
        self.self_attn = DeformableAttention(dim, spec.num_feature_levels, spec.num_heads, spec.enc_points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = Linear(dim, spec.dim_feedforward)
        self.linear2 = Linear(spec.dim_feedforward, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(
        self, src: Tensor, position: Tensor, reference_points: Tensor, shapes: SpatialShapes, padding: Tensor
    ) -> Tensor:
        attended = self.self_attn(src + position, reference_points, src, shapes, padding)
        src = self.norm1(src + self.dropout(attended))
        inner = self.linear2(self.dropout(linear_relu(self.linear1, src)))
        return self.norm2(src + self.dropout(inner))


class DecoderLayer(nn.Module):
    """Self-attention of the queries, deformable cross-attention to the pixels, feed-forward; published norm names."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        dim = spec.hidden_dim
        self.cross_attn = DeformableAttention(dim, spec.num_feature_levels, spec.num_heads, spec.dec_points)
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = MultiHeadAttention(dim, spec.num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = Linear(dim, spec.dim_feedforward)
        self.linear2 = Linear(spec.dim_feedforward, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(
        self,
        target: Tensor,
        position: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        shapes: SpatialShapes,
        padding: Tensor,
    ) -> Tensor:
        target = self.norm2(target + self.dropout(self._self_attention(target, position)))
        attended = self.cross_attn(target + position, reference_points, memory, shapes, padding)
        target = self.norm1(target + self.dropout(attended))
        inner = self.linear2(self.dropout(linear_relu(self.linear1, target)))
        return self.norm3(target + self.dropout(inner))

    def _self_attention(self, target: Tensor, position: Tensor) -> Tensor:
        query, key = self.self_attn.project_query_key(target + position)
        value = self.self_attn.project_value(target)
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return self.self_attn.merge_heads(attended.transpose(1, 2))


class Encoder(nn.Module):
    """Stack of encoder layers; recomputes them in the backward pass for large inputs on a CPU."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(spec) for _ in range(spec.enc_layers))

    def forward(
        self, src: Tensor, position: Tensor, shapes: SpatialShapes, valid_ratios: Tensor, padding: Tensor
    ) -> Tensor:
        """src, position (B,S,D), valid_ratios (B,levels,2), padding (B,S) -> memory (B,S,D)."""
        reference_points = encoder_reference_points(shapes, valid_ratios)
        if _checkpoints_layers(src):
            # One image at a time, which divides the peak memory of a layer by the batch size.
            images = zip(src.split(1), position.split(1), reference_points.split(1), padding.split(1), strict=True)
            return torch.cat([self._checkpointed(*image, shapes) for image in images])
        for layer in self.layers:
            src = layer(src, position, reference_points, shapes, padding)
        return src

    def _checkpointed(
        self, src: Tensor, position: Tensor, reference_points: Tensor, padding: Tensor, shapes: SpatialShapes
    ) -> Tensor:
        for layer in self.layers:
            dropout: nn.Dropout = layer.dropout  # type: ignore[assignment]
            inputs = (src, position, reference_points, shapes, padding)
            src = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=dropout.p > 0)
        return src


class _OuterCheckpoint(threading.local):
    """Whether this thread runs the detector inside a checkpoint.

    Thread-local, because autograd may recompute the forward pass in a backward thread, which enters the context itself,
    and because other threads may run other models.
    """

    active = False


_outer_checkpoint = _OuterCheckpoint()


@contextmanager
def no_nested_checkpointing() -> Iterator[None]:
    """Context in which encoder layers are not checkpointed, for callers that checkpoint the detector as one unit."""
    before, _outer_checkpoint.active = _outer_checkpoint.active, True
    try:
        yield
    finally:
        _outer_checkpoint.active = before


def _checkpoints_layers(src: Tensor) -> bool:
    """Whether encoder layers keep only their input for the backward pass.

    On a CPU: without it their activations exceed all other memory of a training step; recomputing them takes an eighth
    of its time. On a GPU the out-of-memory fallbacks of training recompute complete images instead.
    """
    return (
        src.device.type == "cpu"
        and type(src) is Tensor  # the memory estimate models a GPU with fake tensors on the CPU
        and not _outer_checkpoint.active
        and src.requires_grad
        and torch.is_grad_enabled()
        and src.numel() >= _CHECKPOINT_MIN_ELEMENTS
        and not torch.compiler.is_compiling()
    )


def encoder_reference_points(shapes: SpatialShapes, valid_ratios: Tensor) -> Tensor:
    """Pixel centres of all levels in the padded coordinates of every level: (B, S, levels, 2), (x, y) in 0..1."""
    centres = []
    for level, (height, width) in enumerate(shapes):
        y = torch.arange(height, dtype=torch.float32, device=valid_ratios.device) + 0.5
        x = torch.arange(width, dtype=torch.float32, device=valid_ratios.device) + 0.5
        rows = y[None, :, None] / (valid_ratios[:, None, None, level, 1] * height)
        columns = x[None, None, :] / (valid_ratios[:, None, None, level, 0] * width)
        grid = torch.stack(torch.broadcast_tensors(columns, rows), -1)  # (B,h,w,2), 1 at the end of the unpadded part
        centres.append(grid.flatten(1, 2))
    return torch.cat(centres, 1)[:, :, None] * valid_ratios[:, None]


class Decoder(nn.Module):
    """Decoder layers that refine one reference per query. Holds the box heads, because refinement needs them."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        dim = spec.hidden_dim
        self.layers = nn.ModuleList(DecoderLayer(spec) for _ in range(spec.dec_layers))
        self.bbox_embed = nn.ModuleList(MLP(dim, dim, 4, 3) for _ in range(spec.dec_layers))

    def forward(
        self,
        target: Tensor,
        position: Tensor,
        reference: Tensor,
        memory: Tensor,
        shapes: SpatialShapes,
        valid_ratios: Tensor,
        padding: Tensor,
    ) -> DecoderOutput:
        output = DecoderOutput([], [], [])
        for layer, head in zip(self.layers, self.bbox_embed, strict=True):
            scale = valid_ratios if reference.shape[-1] == 2 else valid_ratios.repeat(1, 1, 2)
            target = layer(target, position, reference[:, :, None] * scale[:, None], memory, shapes, padding)
            refined = refine(head(target), reference)
            output.hidden.append(target)
            output.references_in.append(reference)
            output.references_out.append(refined)
            # Detached: each layer learns to correct its input box, without a gradient to earlier layers.
            reference = refined.detach()
        return output


def refine(offsets: Tensor, reference: Tensor) -> Tensor:
    """Add head outputs (B,Q,4) to a reference point (B,Q,2) or box (B,Q,4) in logit space -> cxcywh (B,Q,4) in 0..1."""
    base = inverse_sigmoid(reference)
    if reference.shape[-1] == 2:
        base = F.pad(base, (0, 2))
    return (offsets + base).sigmoid()


class DeformableTransformer(nn.Module):
    """Encoder, decoder and initial reference points."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.randn(spec.num_feature_levels, spec.hidden_dim))
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)
        self.reference_points = Linear(spec.hidden_dim, 2)

    def forward(self, levels: list[FeatureLevel], query_embed: Tensor) -> DecoderOutput:
        """levels: finest first; query_embed (Q, 2D): position half, then content half."""
        shapes = [(level.features.shape[2], level.features.shape[3]) for level in levels]
        src = torch.cat([level.features.flatten(2).transpose(1, 2) for level in levels], 1)
        padding = torch.cat([level.mask.flatten(1) for level in levels], 1)
        position = torch.cat(
            [level.position.flatten(2).transpose(1, 2) + self.level_embed[i] for i, level in enumerate(levels)], 1
        )
        valid_ratios = torch.stack([valid_ratio(level.mask) for level in levels], 1)
        memory = self.encoder(src, position, shapes, valid_ratios, padding)

        query_position, target = query_embed.expand(src.shape[0], -1, -1).chunk(2, -1)
        reference = self.reference_points(query_position).sigmoid()
        return self.decoder(target, query_position, reference, memory, shapes, valid_ratios, padding)


def valid_ratio(mask: Tensor) -> Tensor:
    """(B,h,w) padding mask -> (B,2): unpadded share of width and height, in 0..1."""
    width = (~mask[:, 0, :]).sum(1) / mask.shape[2]
    height = (~mask[:, :, 0]).sum(1) / mask.shape[1]
    return torch.stack([width, height], -1)
