"""Training batch: padded uint8 clips, boxes and ID slots as tensors (torch only)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class IdSlots:
    """ID labels of a batch of clips, for trajectories (history) and for unknown detections (targets).

    A slot is one distinct object of a clip under one group's random labelling; N is padded to the batch maximum.
    All tensors are (B, G, T, N). Masks are True where the object is absent, occluded by augmentation, or padding.

    Attributes:
        trajectory_labels: int64 ID labels 0..V-1, -1 on padding.
        trajectory_masks: bool.
        trajectory_ann: int64 index into that frame's boxes, -1 if absent.
        unknown_labels: int64 targets 0..V (V = newborn), -1 on padding.
        unknown_masks: bool.
        unknown_ann: int64.
    """

    trajectory_labels: Tensor
    trajectory_masks: Tensor
    trajectory_ann: Tensor
    unknown_labels: Tensor
    unknown_masks: Tensor
    unknown_ann: Tensor


@dataclass
class ClipBatch:
    """B clips of T frames each.

    Attributes:
        images: (B, T, 3, H, W) uint8 RGB, padded at the bottom and right with zeros.
        masks: (B, T, H, W) bool, True on padding.
        boxes_cxcywh: per clip and frame, (n, 4) float32 normalised by that clip's unpadded size.
        classes: per clip and frame, (n,) int64 class ids.
        ignore_cxcywh: per clip and frame, (m, 4) float32 regions where unmatched predictions cost no loss.
        slots: ID slots, or None if only the detector is trained.
        names: name of each clip (sequence and frame numbers), for logs.
        weights: (B,) float32, 1 for real clips, 0 for padding clips that keep the ranks in step.
        distractors: objects of the real clips beyond the ID vocabulary, kept as newborn detections.
        dropped: objects of the real clips without an ID slot; they remain targets of the detector.
    """

    images: Tensor
    masks: Tensor
    boxes_cxcywh: list[list[Tensor]]
    classes: list[list[Tensor]]
    ignore_cxcywh: list[list[Tensor]]
    slots: IdSlots | None
    names: list[str]
    weights: Tensor
    distractors: int = 0
    dropped: int = 0

    def to(self, device: torch.device | str) -> ClipBatch:
        moved: ClipBatch = _moved(self, device)
        return moved


def _moved(value: Any, device: torch.device | str) -> Any:
    """``value`` with all its tensors on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, list):
        return [_moved(item, device) for item in value]
    if isinstance(value, ClipBatch | IdSlots):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})
    return value
