"""Incremental ID decoder: trajectory modelling and ID decoding of one frame at a time.

The logits equal those of ``IdDecoder.forward``. Keys and values of a past detection are computed once, when it becomes
history.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motip.errors import MotipError
from motip.model.attention import MultiHeadAttention
from motip.model.fast.packed import PackedLinear
from motip.model.id_decoder import FFN, HIDDEN, IdDecoder, TrajectoryModeling


class HistoryTokens(NamedTuple):
    """Keys and values of S trajectory tokens for the cross-attention of every layer.

    Attributes:
        keys, values: (layers, heads, 1 + S, head_dim); token 0 is zero (see ``with_zero_token``). It is stored, because
            prepending it to the history in every layer of every frame took an eighth of the tracker's time.
    """

    keys: Tensor
    values: Tensor

    def __len__(self) -> int:
        return self.keys.shape[2] - 1


class FrameDecoder:
    """Trajectory modelling and ID decoder with packed weights, for inference.

    A snapshot of the weights: create a new one after they change. On a CPU it copies most of them (about 70 MB at full
    size), see ``PackedLinear``. It has no state of a sequence.
    """

    @torch.no_grad()
    def __init__(self, modelling: TrajectoryModeling, decoder: IdDecoder) -> None:
        self.spec = decoder.spec
        self._heads = decoder.heads
        self._adapter = _FeedForward.of(modelling.adapter, modelling.norm)
        self._adapted = _FeedForward.of(modelling.ffn, modelling.ffn_norm)
        self._newborn = decoder.word_to_embed.weight.detach()[:, decoder.newborn_label]
        self._rel_pos_embeds = decoder.rel_pos_embeds.detach()
        self._layers = [_Layer.of(decoder, layer) for layer in range(self.spec.num_id_decoder_layers)]
        self._head = PackedLinear.of(decoder.embed_to_word_layers[-1])  # type: ignore[arg-type]
        history = [decoder.history_weights(layer) for layer in range(len(self._layers))]
        self._history_weight = PackedLinear(torch.cat([weight for weight, _ in history]))
        self._history_table = torch.cat([table for _, table in history], 1)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights and of the features to pass in."""
        return self._rel_pos_embeds.dtype

    @torch.no_grad()
    def model_trajectories(self, features: Tensor) -> Tensor:
        """``TrajectoryModeling``: (S,D) -> (S,D)."""
        return self._adapted(self._adapter(features))

    @torch.no_grad()
    def encode_history(self, features: Tensor, labels: Tensor) -> HistoryTokens:
        """Keys and values of S tokens: features (S,D) after ``model_trajectories``, labels (S,) in 0..V-1."""
        both = self._history_weight(features).add_(F.embedding(labels, self._history_table))
        both = both.unflatten(-1, (len(self._layers), 2, self._heads, self.spec.head_dim)).permute(2, 1, 3, 0, 4)
        keys, values = F.pad(both, (0, 0, 1, 0)).unbind()
        return HistoryTokens(keys, values)

    @torch.no_grad()
    def decode(
        self,
        unknown_features: Tensor,
        history: HistoryTokens,
        ages: Tensor,
        history_masks: Tensor | None = None,
        label_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (M, V+1) of the M objects of one frame; equal to ``IdDecoder.forward`` to rounding.

        Args:
            unknown_features: (M,D) raw detector outputs.
            history: S tokens.
            ages: (S,) int, frames from the token to the current frame, 1..REL_PE_LENGTH-1, on any device.
            history_masks: (S,) bool, True = ignore.
            label_mask: (V+1,) bool, True = unused label, whose logits become -inf.

        Raises:
            MotipError: an age is outside 1..REL_PE_LENGTH-1.
        """
        if len(history) and not 1 <= int(ages.min()) <= int(ages.max()) < self.spec.rel_pe_length:
            raise MotipError(
                "a history token is too old, or not in the past",
                where="REL_PE_LENGTH",
                found=f"ages {int(ages.min())}..{int(ages.max())}",
                expected=f"1..{self.spec.rel_pe_length - 1} frames",
                fix="lower MISS_TOLERANCE or grow REL_PE_LENGTH",
            )
        newborn = self._newborn.expand(*unknown_features.shape[:-1], -1)
        tokens = torch.cat([unknown_features, newborn], -1)
        biases = self._rel_pos_embeds[:, ages.to(tokens.device)].transpose(1, 2)  # (layers, heads, S)
        if history_masks is not None:
            biases = biases.masked_fill(history_masks, HIDDEN)
        biases = F.pad(biases, (1, 0))
        for layer, keys, values, bias in zip(self._layers, history.keys, history.values, biases, strict=True):
            if layer.self_attention is not None:
                tokens = layer.self_attention(tokens, self._heads)
            tokens = layer.cross_attention(tokens, keys, values, bias)
            tokens = layer.feed_forward(tokens)
        logits = self._head(tokens[..., -self.spec.id_dim :])
        return logits if label_mask is None else logits.masked_fill(label_mask, -torch.inf)


@dataclass(frozen=True, slots=True)
class _FeedForward:
    linear1: PackedLinear
    linear2: PackedLinear
    norm: nn.LayerNorm

    @classmethod
    def of(cls, ffn: FFN, norm: nn.Module) -> _FeedForward:
        return cls(PackedLinear.of(ffn.linear1), PackedLinear.of(ffn.linear2), norm)  # type: ignore[arg-type]

    def __call__(self, tokens: Tensor) -> Tensor:
        return _normed(self.norm, tokens + self.linear2(self.linear1(tokens, gelu=True)))


@dataclass(frozen=True, slots=True)
class _SelfAttention:
    """Self-attention among the M objects of the frame."""

    project: PackedLinear
    merge: PackedLinear
    norm: nn.LayerNorm

    def __call__(self, tokens: Tensor, heads: int) -> Tensor:
        # The zero token is for keys and values only (see ``with_zero_token``).
        projected = F.pad(self.project(tokens), (0, 0, 1, 0)).unflatten(-1, (3, heads, -1))
        query, key, value = projected.permute(1, 2, 0, 3)[:, None].unbind()
        attended = F.scaled_dot_product_attention(query[:, :, 1:], key, value)
        return _normed(self.norm, tokens + self.merge(attended[0].transpose(0, 1).flatten(-2)))


@dataclass(frozen=True, slots=True)
class _CrossAttention:
    """Cross-attention of the M objects to the history."""

    project: PackedLinear
    merge: PackedLinear
    norm: nn.LayerNorm

    def __call__(self, tokens: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """keys, values (heads, 1 + S, head_dim), bias (heads, 1 + S)."""
        query = self.project(tokens).unflatten(-1, (len(keys), -1)).transpose(0, 1)
        attended = F.scaled_dot_product_attention(query[None], keys[None], values[None], attn_mask=bias[None, :, None])
        return _normed(self.norm, tokens + self.merge(attended[0].transpose(0, 1).flatten(-2)))


@dataclass(frozen=True, slots=True)
class _Layer:
    self_attention: _SelfAttention | None
    cross_attention: _CrossAttention
    feed_forward: _FeedForward

    @classmethod
    def of(cls, decoder: IdDecoder, layer: int) -> _Layer:
        self_attention = None
        if layer > 0:
            attention: MultiHeadAttention = decoder.self_attn_layers[layer - 1]  # type: ignore[assignment]
            project = PackedLinear(attention.in_proj_weight, attention.in_proj_bias)
            norm = decoder.self_attn_norm_layers[layer - 1]
            self_attention = _SelfAttention(project, PackedLinear.of(attention.out_proj), norm)  # type: ignore[arg-type]
        attention = decoder.cross_attn_layers[layer]  # type: ignore[assignment]
        project = PackedLinear(attention.in_proj_weight[: attention.dim], attention.in_proj_bias[: attention.dim])
        norm = decoder.cross_attn_norm_layers[layer]
        cross_attention = _CrossAttention(project, PackedLinear.of(attention.out_proj), norm)  # type: ignore[arg-type]
        ffn: FFN = decoder.ffn_layers[layer]  # type: ignore[assignment]
        return cls(self_attention, cross_attention, _FeedForward.of(ffn, decoder.ffn_norm_layers[layer]))


def _normed(norm: nn.LayerNorm, tokens: Tensor) -> Tensor:
    normed: Tensor = norm(tokens)
    return normed
