"""Hungarian matching of queries to objects, for all frames and decoder layers in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from motip.errors import MotipError
from motip.losses.boxes import cxcywh_to_xyxy, generalised_iou

# As in the published matcher, independent of the DETR_FOCAL_ALPHA of the loss.
_COST_ALPHA = 0.25
_COST_EPS = 1e-8
# Replaces a NaN or infinite cost, so that a diverged prediction reaches the non-finite check of the training step.
_WORST_COST = 1e6


@dataclass
class DetectionTargets:
    """The M objects of F frames, flattened in frame order.

    Attributes:
        boxes_cxcywh: (M, 4) normalised.
        classes: (M,) int64 class ids.
        frames: (M,) int64 frame of each object.
        counts: objects per frame, in host memory.
        ignore_cxcywh: (F, R, 4) normalised ignore regions, padded with empty ones, or None if no frame has any.
    """

    boxes_cxcywh: Tensor
    classes: Tensor
    frames: Tensor
    counts: list[int]
    ignore_cxcywh: Tensor | None = None

    @staticmethod
    def from_frames(
        boxes_cxcywh: Sequence[Tensor],
        classes: Sequence[Tensor],
        ignore_cxcywh: Sequence[Tensor] | None = None,
        device: torch.device | str | None = None,
    ) -> DetectionTargets:
        """Flatten per-frame lists: (n, 4) boxes, (n,) classes and (m, 4) ignore regions each.

        Raises:
            MotipError: a frame's number of classes differs from its number of boxes.
        """
        counts = [int(boxes.shape[0]) for boxes in boxes_cxcywh]
        for frame, (count, frame_classes) in enumerate(zip(counts, classes, strict=True)):
            if frame_classes.shape != (count,):
                raise MotipError(
                    "an annotation needs one class per box",
                    where=f"frame {frame} of the batch",
                    found=f"{count} boxes, classes of shape {tuple(frame_classes.shape)}",
                )
        device = device or (boxes_cxcywh[0].device if boxes_cxcywh else "cpu")
        return DetectionTargets(
            boxes_cxcywh=torch.cat([b.reshape(-1, 4) for b in boxes_cxcywh] or [torch.empty(0, 4)]).float().to(device),
            classes=torch.cat(list(classes) or [torch.empty(0)]).long().to(device),
            frames=torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.long)).to(
                device
            ),
            counts=counts,
            ignore_cxcywh=_padded_regions(ignore_cxcywh, device),
        )

    @property
    def num_frames(self) -> int:
        """F."""
        return len(self.counts)

    @property
    def num_objects(self) -> int:
        """M."""
        return sum(self.counts)


def _padded_regions(regions: Sequence[Tensor] | None, device: torch.device | str) -> Tensor | None:
    most = max((int(r.shape[0]) for r in regions or ()), default=0)
    if regions is None or most == 0:
        return None
    padded = [F.pad(frame.reshape(-1, 4).float(), (0, 0, 0, most - frame.shape[0])) for frame in regions]
    return torch.stack(padded).to(device)


@dataclass(frozen=True)
class Matcher:
    """Hungarian matcher with the weights of its cost (DETR_SET_COST_*)."""

    class_cost: float = 2.0
    bbox_cost: float = 5.0
    giou_cost: float = 2.0

    @torch.no_grad()
    def __call__(self, logits: Tensor, boxes_cxcywh: Tensor, targets: DetectionTargets) -> Tensor:
        """Assign one query to each object, per frame and layer, at minimum total cost (Carion et al., ECCV 2020).

        Args:
            logits: (L, F, Q, C) before the sigmoid.
            boxes_cxcywh: (L, F, Q, 4) normalised predictions.
            targets: the M objects of the F frames.

        Returns:
            (L, M) int64 query of each object, on the device of the logits; -1 where a frame has more objects than
            queries. One device-to-host transfer for all layers and frames.
        """
        layers = logits.shape[0]
        if targets.num_objects == 0:
            return torch.empty(layers, 0, dtype=torch.long, device=logits.device)
        cost = torch.stack([self.cost(logits[n], boxes_cxcywh[n], targets) for n in range(layers)])
        host = cost.nan_to_num(nan=_WORST_COST, posinf=_WORST_COST, neginf=-_WORST_COST).cpu().numpy()
        matched = torch.full((layers, targets.num_objects), -1, dtype=torch.long)
        result = matched.numpy()
        for layer in range(layers):
            start = 0
            for count in targets.counts:
                objects, queries = linear_sum_assignment(host[layer, start : start + count])
                result[layer, start + objects] = queries
                start += count
        return matched.to(logits.device)

    def cost(self, logits: Tensor, boxes_cxcywh: Tensor, targets: DetectionTargets) -> Tensor:
        """Weighted cost of matching an object to a query of its frame: focal class cost + L1 - generalised IoU.

        Only pairs within a frame are computed, so a crowded frame does not raise the cost of others.

        Args:
            logits: (F, Q, C) of one layer.
            boxes_cxcywh: (F, Q, 4).
            targets: M objects.

        Returns:
            (M, Q) float32.
        """
        own_boxes = boxes_cxcywh.float()[targets.frames]
        target_boxes = targets.boxes_cxcywh.unsqueeze(1)
        probability = logits.float()[targets.frames, :, targets.classes].sigmoid()

        positive = _COST_ALPHA * (1 - probability) ** 2 * -(probability + _COST_EPS).log()
        negative = (1 - _COST_ALPHA) * probability**2 * -(1 - probability + _COST_EPS).log()
        l1 = (own_boxes - target_boxes).abs().sum(-1)
        giou = generalised_iou(cxcywh_to_xyxy(own_boxes), cxcywh_to_xyxy(target_boxes))
        return self.bbox_cost * l1 + self.class_cost * (positive - negative) - self.giou_cost * giou
