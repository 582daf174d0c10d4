"""ID loss: classification of each detection as one of V ID labels or newborn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from motip.losses.detection import sigmoid_focal

_FOCAL_ALPHA = 0.25


def count_supervised(masks: Tensor) -> Tensor:
    """(B,) unmasked entries of each clip after its first frame; summed over clips and ranks, the divisor of `id_loss`.

    Args:
        masks: (B, G, T, N) bool, True on entries without supervision.
    """
    return (~masks[:, :, 1:]).flatten(1).sum(1)


def id_loss(
    logits: Tensor, labels: Tensor, masks: Tensor, count: float, *, focal: bool = False, weights: Tensor | None = None
) -> Tensor:
    """Classification over the V ID labels and "newborn" (MOTIP, Gao et al., CVPR 2025, section 3.4).

    The caller excludes the first frame of a clip, where every object is newborn.

    Args:
        logits: (..., B, G, T, N, V+1); leading dimensions (decoder layers) are averaged.
        labels: (B, G, T, N) int64 in 0..V; any value where masked.
        masks: (B, G, T, N) bool, True on entries without supervision.
        count: unmasked entries over all ranks; values under 1 count as 1.
        focal: sigmoid focal loss, mean over the V+1 classes, in place of cross-entropy.
        weights: (B,) factor of each clip's loss, None for 1.

    Returns:
        Scalar with graph, 0 if every entry is masked.
    """
    num_labels = logits.shape[-1]
    layers = max(1, logits.numel() // max(1, labels.numel() * num_labels))
    with torch.autocast(logits.device.type, enabled=False):
        scores = (logits if logits.dtype == torch.float64 else logits.float()).reshape(
            layers, *labels.shape, num_labels
        )
        if focal:
            one_hot = F.one_hot(labels.clamp(0, num_labels - 1), num_labels).to(scores.dtype).expand_as(scores)
            per_entry = sigmoid_focal(scores, one_hot, _FOCAL_ALPHA).mean(-1)
        else:
            targets = labels.masked_fill(masks, -100).expand(layers, *labels.shape)
            per_entry = F.cross_entropy(scores.reshape(-1, num_labels), targets.reshape(-1), reduction="none")
            per_entry = per_entry.view(layers, *labels.shape)
        per_entry = per_entry.masked_fill(masks, 0.0)
        if weights is not None:
            per_entry = per_entry * weights.view(1, -1, 1, 1, 1)
        return per_entry.sum() / (layers * max(float(count), 1.0))
