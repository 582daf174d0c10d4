"""ID loss: which remembered trajectory, or none, a detection belongs to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from motip.losses.detection import sigmoid_focal

_FOCAL_ALPHA = 0.25


def count_supervised(masks: Tensor) -> Tensor:
    """(B,) unmasked entries of each clip after its first frame; summed over clips and ranks, the divisor of `id_loss`.

    Args:
        masks: (B, G, T, N) bool, True where there is nothing to learn from.
    """
    return (~masks[:, :, 1:]).flatten(1).sum(1)


def id_loss(
    logits: Tensor, labels: Tensor, masks: Tensor, count: float, *, focal: bool = False, weights: Tensor | None = None
) -> Tensor:
    """Classification over the V ID labels and "newborn" (MOTIP, Gao et al., CVPR 2025, section 3.4).

    The caller leaves out the clip's first frame, where everything is newborn and nothing can be learnt.

    Args:
        logits: (..., B, G, T, N, V+1); leading dimensions (decoder layers) are averaged.
        labels: (B, G, T, N) int64 in 0..V; -1 (or anything else) where masked.
        masks: (B, G, T, N) bool, True where there is nothing to learn from.
        count: unmasked entries over all ranks; values under 1 count as 1.
        focal: sigmoid focal loss, mean over the V+1 classes, in place of cross-entropy.
        weights: (B,) factor on each clip's loss, None for 1.

    Returns:
        Scalar with graph, 0 where nothing is unmasked.
    """
    words = logits.shape[-1]
    layers = max(1, logits.numel() // max(1, labels.numel() * words))
    with torch.autocast(logits.device.type, enabled=False):
        scores = (logits if logits.dtype == torch.float64 else logits.float()).reshape(layers, *labels.shape, words)
        if focal:
            wanted = F.one_hot(labels.clamp(0, words - 1), words).to(scores.dtype).expand_as(scores)
            per_entry = sigmoid_focal(scores, wanted, _FOCAL_ALPHA).mean(-1)
        else:
            wanted = labels.masked_fill(masks, -100).expand(layers, *labels.shape)
            per_entry = F.cross_entropy(scores.reshape(-1, words), wanted.reshape(-1), reduction="none")
            per_entry = per_entry.view(layers, *labels.shape)
        per_entry = per_entry.masked_fill(masks, 0.0)
        if weights is not None:
            per_entry = per_entry * weights.view(1, -1, 1, 1, 1)
        return per_entry.sum() / (layers * max(float(count), 1.0))
