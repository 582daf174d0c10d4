"""Trajectory modelling and ID decoder: identity prediction as classification over ID labels (MOTIP, 3.2 and 3.3).

A trajectory token is [object feature | embedding of its ID label]; the token of an unknown object is
[object feature | embedding of "newborn"]. Self-attention runs among the objects of a frame, cross-attention from them
to earlier trajectory tokens; the ID half of the result is classified.

Memory: the relative position bias depends on (query time, key time) only, and an additive mask with a gradient would
disable fused attention. Queries are therefore processed in blocks of a few frames. The bias and mask of a block's i-th
frame are channel i of the keys, selected by a one in channel i of that frame's queries. Attention stays fused, frames
later than the block are not read, and no tensor has size (T*N)^2. Self-attention and feed-forward are recomputed in the
backward pass: their activations would add a third to the peak of a step. Cross-attention is not recomputed, which would
save 4 % of the peak and cost 13 % of the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from motip.errors import MotipError
from motip.model.attention import MultiHeadAttention, with_zero_token
from motip.model.ops import Linear
from motip.model.spec import ModelSpec

# Score of a masked token. Its exp() is exactly 0 in every type, and it is finite in half precision: an infinity would
# give NaN gradients through the product it is folded into.
HIDDEN = -3.0e4
# Frames per block. Measured on 2 CPU cores (benchmarks/bench_id_decoder.py); 8 extra channels also keep the
# head width a multiple of 8, which the CUDA kernels require.
_BLOCK_FRAMES = 8


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``function(*inputs)``, recomputed in the backward pass from its inputs.

    For operations with large intermediate tensors and a small share of a layer's arithmetic.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class _Times(NamedTuple):
    """Frame numbers of the T history frames and the U unknown frames, and the age (T,U) of the former at the latter."""

    past: list[int]
    now: list[int]
    ages: Tensor


class FFN(nn.Module):
    """linear1 -> exact GELU -> linear2."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.linear1 = Linear(dim, inner)
        self.linear2 = Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.gelu(self.linear1(x)))


class TrajectoryModeling(nn.Module):
    """Adapter and feed-forward on the features of trajectory tokens, each by itself (MOTIP, section 3.2)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        dim, inner = spec.feature_dim, spec.feature_dim * spec.ffn_dim_ratio
        self.adapter = FFN(dim, inner)
        self.norm = nn.LayerNorm(dim)
        self.ffn = FFN(dim, inner)
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        features = self.norm(features + self.adapter(features))
        return self.ffn_norm(features + self.ffn(features))


class IdDecoder(nn.Module):
    """Transformer decoder that predicts ID labels (MOTIP, section 3.3), under the published keys."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        dim, heads, depth = spec.embed_dim, spec.embed_dim // spec.head_dim, spec.num_id_decoder_layers
        self.spec = spec
        self.heads = heads
        self.rel_pos_embeds = nn.Parameter(torch.zeros(depth, spec.rel_pe_length, heads))
        self.word_to_embed = Linear(spec.num_id_vocabulary + 1, spec.id_dim, bias=False)
        self.embed_to_word_layers = nn.ModuleList(self._label_heads(depth))
        self.self_attn_layers = nn.ModuleList(MultiHeadAttention(dim, heads) for _ in range(depth - 1))
        self.self_attn_norm_layers = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth - 1))
        self.cross_attn_layers = nn.ModuleList(MultiHeadAttention(dim, heads) for _ in range(depth))
        self.cross_attn_norm_layers = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.ffn_layers = nn.ModuleList(FFN(dim, dim * spec.ffn_dim_ratio) for _ in range(depth))
        self.ffn_norm_layers = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))

    def _label_heads(self, depth: int) -> list[Linear]:
        distinct = self.spec.use_aux_loss and not self.spec.use_shared_aux_head
        words, width = self.spec.num_id_vocabulary + 1, self.spec.id_dim
        heads = [Linear(width, words, bias=False) for _ in range(depth if distinct else 1)]
        return heads if distinct else heads * depth

    @property
    def newborn_label(self) -> int:
        return self.spec.num_id_vocabulary

    def forward(
        self,
        trajectory_features: Tensor,
        trajectory_labels: Tensor,
        trajectory_masks: Tensor,
        trajectory_times: Tensor | Sequence[int],
        unknown_features: Tensor,
        unknown_masks: Tensor,
        unknown_times: Tensor | Sequence[int],
        label_mask: Tensor | None = None,
        all_layers: bool | None = None,
    ) -> Tensor:
        """Logits of every unknown object over the V ID labels and newborn (label V).

        Args:
            trajectory_features: (B,G,T,N,D) after ``TrajectoryModeling``; G augmentation groups.
            trajectory_labels: (B,G,T,N) in 0..V, -1 on padding.
            trajectory_masks: (B,G,T,N) bool, True = absent.
            trajectory_times: (T,) frame numbers within the clip, 0..REL_PE_LENGTH-1; a CUDA tensor costs a
                synchronisation.
            unknown_features: (B,G,U,M,D) raw detector outputs.
            unknown_masks: (B,G,U,M) bool, True = absent.
            unknown_times: (U,) as trajectory_times.
            label_mask: (V+1,) bool, True = unused label, whose logits become -inf.
            all_layers: return every layer's logits; default: in training with USE_AUX_LOSS.

        Returns:
            (L', B, G, U, M, V+1); L' = number of layers if all_layers, else 1 (the last layer).

        Raises:
            MotipError: a time is outside 0..REL_PE_LENGTH-1.
        """
        times = self._times(trajectory_times, unknown_times, unknown_features.device)
        lead = unknown_features.shape[:2]
        features = trajectory_features.flatten(0, 1)
        labels = self._clean_labels(trajectory_labels).flatten(0, 1)
        hidden_past = trajectory_masks.flatten(0, 1)
        hidden_now = unknown_masks.flatten(0, 1)
        tokens = self._unknown_tokens(unknown_features.flatten(0, 1))
        if all_layers is None:
            all_layers = self.training and self.spec.use_aux_loss

        # Decoder layers, optionally checkpointed.
        logits = []
        for layer in range(len(self.cross_attn_layers)):
            inputs = (layer, tokens, hidden_now, features, labels, hidden_past, times)
            if self.spec.use_decoder_checkpoint and torch.is_grad_enabled():
                tokens = checkpoint(self._layer, *inputs, use_reentrant=False)
            else:
                tokens = self._layer(*inputs)
            if all_layers or layer + 1 == len(self.cross_attn_layers):
                logits.append(self._classify(layer, tokens, label_mask))
        return torch.stack(logits).unflatten(1, lead)

    def history_weights(self, layer: int) -> tuple[Tensor, Tensor]:
        """Projection of features to keys and values (2E,D), and the term that each label adds to them (V+1,2E).

        The ID half of a token takes V+1 values only, so its projection is a lookup table.
        """
        attention: MultiHeadAttention = self.cross_attn_layers[layer]  # type: ignore[assignment]
        width, dim = self.spec.feature_dim, self.spec.embed_dim
        weight, bias = attention.in_proj_weight[dim:], attention.in_proj_bias[dim:]
        return weight[:, :width], F.linear(self.word_to_embed.weight.t(), weight[:, width:], bias)

    def _layer(
        self,
        layer: int,
        tokens: Tensor,
        hidden_now: Tensor,
        features: Tensor,
        labels: Tensor,
        hidden_past: Tensor,
        times: _Times,
    ) -> Tensor:
        """One decoder layer on tokens (BG,U,M,E) with history (BG,T,N,.)."""
        if layer > 0:
            tokens = self._self_attention(layer, tokens.flatten(0, 1), hidden_now.flatten(0, 1)).view_as(tokens)
        attended = self._cross_attention(layer, tokens, features, labels, hidden_past, times)
        return self._feed_forward(layer, self.cross_attn_norm_layers[layer](tokens + attended))

    def _self_attention(self, layer: int, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Self-attention among the unknown objects of one frame: tokens (frames,M,E), hidden (frames,M)."""
        attention: MultiHeadAttention = self.self_attn_layers[layer - 1]  # type: ignore[assignment]

        def attend(tokens: Tensor) -> Tensor:
            query, key, value = attention.project_all(tokens)
            attended = F.scaled_dot_product_attention(
                query.transpose(1, 2),
                with_zero_token(key).transpose(1, 2),
                with_zero_token(value).transpose(1, 2),
                attn_mask=~F.pad(hidden, (1, 0))[:, None, None, :],
            )
            return attention.merge_heads(attended.transpose(1, 2))

        return self.self_attn_norm_layers[layer - 1](tokens + recomputed(attend, tokens))

    def _cross_attention(
        self,
        layer: int,
        tokens: Tensor,
        features: Tensor,
        labels: Tensor,
        hidden: Tensor,
        times: _Times,
    ) -> Tensor:
        """Cross-attention of tokens (BG,U,M,E) to strictly earlier history tokens."""
        attention: MultiHeadAttention = self.cross_attn_layers[layer]  # type: ignore[assignment]
        keys, values = self._project_history(layer, features.flatten(1, 2), labels.flatten(1))
        queries = attention.project_query(tokens)
        attended = self._attend_in_blocks(layer, queries, keys, values, hidden, times)
        return attention.merge_heads(attended)

    def _attend_in_blocks(
        self,
        layer: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        hidden: Tensor,
        times: _Times,
    ) -> Tensor:
        """queries (BG,U,M,heads,d), keys and values (BG,T*N,heads,d), hidden (BG,T,N) -> (BG,U,M,heads,d)."""
        head_dim, objects, history_objects = self.spec.head_dim, queries.shape[2], hidden.shape[2]
        keys = with_zero_token(keys)
        # Fused attention needs values as wide as keys; the added channels are dropped again.
        values = F.pad(with_zero_token(values), (0, min(_BLOCK_FRAMES, len(times.now))))
        blocks = []
        for start in range(0, len(times.now), _BLOCK_FRAMES):
            block = times.now[start : start + _BLOCK_FRAMES]
            frames = 1 + max((t for t, time in enumerate(times.past) if time < max(block)), default=-1)
            ages = times.ages[:frames, start : start + len(block)]
            channels = self._bias_channels(layer, ages, hidden[:, :frames]).to(keys.dtype)
            visible = 1 + frames * history_objects
            key = torch.cat([keys[:, :visible], with_zero_token(channels.flatten(1, 2))], -1)
            query = _with_frame_channels(queries[:, start : start + len(block)], head_dim)
            attended = F.scaled_dot_product_attention(
                query.flatten(1, 2).transpose(1, 2),
                key.transpose(1, 2),
                values[:, :visible, :, : head_dim + len(block)].transpose(1, 2),
                scale=1.0 / math.sqrt(head_dim),
            )
            blocks.append(attended[..., :head_dim].transpose(1, 2).unflatten(1, (len(block), objects)))
        return torch.cat(blocks, 1)

    def _bias_channels(self, layer: int, ages: Tensor, hidden: Tensor) -> Tensor:
        """ages (T,u), hidden (BG,T,N) -> (BG,T,N,heads,u): additive score of a token for each of u query frames."""
        bias = self.rel_pos_embeds[layer][ages.clamp(min=0)].transpose(1, 2)  # (T,heads,block)
        bias = bias.masked_fill((ages <= 0)[:, None], HIDDEN)
        return torch.where(hidden[..., None, None], HIDDEN, bias[None, :, None])

    def _project_history(self, layer: int, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (...,heads,head_dim) of tokens [feature (...,D) | embedding of label (...)]."""
        weight, table = self.history_weights(layer)
        both = F.linear(features, weight).add_(F.embedding(labels, table))
        keys, values = both.unflatten(-1, (2, self.heads, self.spec.head_dim)).unbind(-3)
        return keys, values

    def _feed_forward(self, layer: int, tokens: Tensor) -> Tensor:
        return self.ffn_norm_layers[layer](tokens + recomputed(self.ffn_layers[layer], tokens))

    def _unknown_tokens(self, features: Tensor) -> Tensor:
        newborn = self.word_to_embed.weight[:, self.newborn_label].to(features.dtype)
        return torch.cat([features, newborn.expand(*features.shape[:-1], -1)], -1)

    def _classify(self, layer: int, tokens: Tensor, label_mask: Tensor | None) -> Tensor:
        logits = self.embed_to_word_layers[layer](tokens[..., -self.spec.id_dim :])
        return logits if label_mask is None else logits.masked_fill(label_mask, -math.inf)

    def _clean_labels(self, labels: Tensor) -> Tensor:
        return torch.where(labels < 0, self.newborn_label, labels)

    def _times(self, past: Tensor | Sequence[int], now: Tensor | Sequence[int], device: torch.device) -> _Times:
        past, now = _as_list(past), _as_list(now)
        latest, earliest = max(past + now, default=0), min(past + now, default=0)
        if latest >= self.spec.rel_pe_length or earliest < 0:
            raise MotipError(
                "a clip or history is longer than the relative position embedding",
                where="REL_PE_LENGTH",
                found=f"times {earliest}..{latest}",
                expected=f"0..{self.spec.rel_pe_length - 1}",
                fix=f"use clips of at most {self.spec.rel_pe_length} frames, or grow REL_PE_LENGTH",
            )
        ages = torch.tensor(now, dtype=torch.long)[None, :] - torch.tensor(past, dtype=torch.long)[:, None]
        return _Times(past, now, ages.to(device))


def _with_frame_channels(queries: Tensor, head_dim: int) -> Tensor:
    """(BG,u,M,heads,d) -> (BG,u,M,heads,d+u): one in extra channel i of frame i, before scaling."""
    frames = queries.shape[1]
    switch = torch.eye(frames, dtype=queries.dtype, device=queries.device) * math.sqrt(head_dim)
    return torch.cat([queries, switch[None, :, None, None].expand(*queries.shape[:-1], frames)], -1)


def _as_list(times: Tensor | Sequence[int]) -> list[int]:
    return [int(time) for time in (times.tolist() if isinstance(times, Tensor) else times)]
