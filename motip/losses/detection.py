"""Detection loss of Deformable-DETR over all decoder layers; unmatched queries in ignore regions cost nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from motip.losses.boxes import covered_share, cxcywh_to_xyxy, generalised_iou
from motip.losses.matcher import DetectionTargets, Matcher

if TYPE_CHECKING:
    from motip.config import Config

_FOCAL_GAMMA = 2


class DetectorPredictions(Protocol):
    """Detector output as read by the criterion; implemented by `motip.model.detector.DetectorOutput`."""

    @property
    def pred_logits(self) -> Tensor: ...

    @property
    def pred_boxes(self) -> Tensor: ...

    @property
    def aux(self) -> list[tuple[Tensor, Tensor]]: ...


@dataclass
class DetectionLosses:
    """Losses of all decoder layers.

    Attributes:
        losses: unweighted, by published name: `loss_ce`, `loss_bbox`, `loss_giou`, with `_0`, … for earlier layers.
        total: weighted sum, with graph.
        matching_last: (M,) query of each object by the last layer, -1 for none.
        matching_published: (M,) by the second-to-last layer, used for identities by the published code.
        logs: without gradient: `class_error` and `cardinality_error` per layer, `ignored_queries` of the last layer.
    """

    losses: dict[str, Tensor]
    total: Tensor
    matching_last: Tensor
    matching_published: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class DetectionCriterion:
    """Focal classification, L1 and generalised-IoU loss after Hungarian matching (Zhu et al., ICLR 2021).

    Attributes:
        class_weight, bbox_weight, giou_weight: DETR_{CLS,BBOX,GIOU}_LOSS_COEF, the same for every layer.
        focal_alpha: DETR_FOCAL_ALPHA.
        ignore_overlap: IGNORE_OVERLAP, share of a box in ignore regions from which an unmatched query is ignored.
        log_chunk: DETR_CRITERION_BATCH_LEN, frames per chunk of the two logged values that depend on it.
    """

    matcher: Matcher = field(default_factory=Matcher)
    class_weight: float = 2.0
    bbox_weight: float = 5.0
    giou_weight: float = 2.0
    focal_alpha: float = 0.25
    ignore_overlap: float = 0.5
    log_chunk: int = 10

    @staticmethod
    def from_config(config: Config) -> DetectionCriterion:
        return DetectionCriterion(
            matcher=Matcher(config.DETR_SET_COST_CLASS, config.DETR_SET_COST_BBOX, config.DETR_SET_COST_GIOU),
            class_weight=config.DETR_CLS_LOSS_COEF,
            bbox_weight=config.DETR_BBOX_LOSS_COEF,
            giou_weight=config.DETR_GIOU_LOSS_COEF,
            focal_alpha=config.DETR_FOCAL_ALPHA,
            ignore_overlap=config.IGNORE_OVERLAP,
            log_chunk=config.DETR_CRITERION_BATCH_LEN,
        )

    def __call__(
        self,
        output: DetectorPredictions,
        targets: DetectionTargets,
        num_boxes: float,
        frame_weights: Tensor | None = None,
    ) -> DetectionLosses:
        """Losses of F frames, computed in float32 for any precision of the output.

        Args:
            output: predictions of F frames.
            targets: their objects.
            num_boxes: divisor, the number of objects in the batch over all ranks; values under 1 count as 1.
            frame_weights: (F,) factor of each frame's loss, None for 1.
        """
        layers = [*output.aux, (output.pred_logits, output.pred_boxes)]
        with torch.autocast(output.pred_logits.device.type, enabled=False):
            logits = torch.stack([layer_logits.float() for layer_logits, _ in layers])
            boxes = torch.stack([layer_boxes.float() for _, layer_boxes in layers])

            # matching and divisor
            matching = self.matcher(logits, boxes, targets)
            divisor = max(float(num_boxes), 1.0)
            weights = logits.new_ones(targets.num_frames) if frame_weights is None else frame_weights
            one_hot = _one_hot(logits, targets, matching)
            ignored = self._ignored(boxes, targets, one_hot)

            # losses per layer
            per_layer = {
                "loss_ce": self._class_loss(logits, one_hot, ignored, weights) / divisor,
                **_box_losses(boxes, targets, matching, weights, divisor),
            }
            total = torch.stack(
                [
                    self.class_weight * per_layer["loss_ce"],
                    self.bbox_weight * per_layer["loss_bbox"],
                    self.giou_weight * per_layer["loss_giou"],
                ]
            ).sum()
            logs = self._logs(logits.detach(), targets, matching, divisor)

        # published names
        named_logs = _named(logs)
        named_logs["ignored_queries"] = ignored[-1].sum().float() if ignored is not None else total.new_zeros(())
        return DetectionLosses(
            losses=_named(per_layer),
            total=total,
            matching_last=matching[-1],
            # The published loop over the earlier layers overwrites the last layer's matching; with DETR_AUX_LOSS
            # False there are no earlier layers.
            matching_published=matching[-2] if len(layers) > 1 else matching[-1],
            logs=named_logs,
        )

    @torch.no_grad()
    def _ignored(self, boxes_cxcywh: Tensor, targets: DetectionTargets, one_hot: Tensor) -> Tensor | None:
        """(L, F, Q) True on unmatched queries whose box lies in ignore regions; None if no frame has any."""
        if targets.ignore_cxcywh is None:
            return None
        regions = cxcywh_to_xyxy(targets.ignore_cxcywh)
        # With IGNORE_OVERLAP 1 a region that equals the box must count despite rounding.
        inside = covered_share(cxcywh_to_xyxy(boxes_cxcywh), regions) >= self.ignore_overlap - 1e-5
        return inside & (one_hot.amax(-1) == 0)

    def _class_loss(self, logits: Tensor, one_hot: Tensor, ignored: Tensor | None, weights: Tensor) -> Tensor:
        """(L,) sum of the sigmoid focal loss over frames, queries and classes (Lin et al., ICCV 2017)."""
        loss = sigmoid_focal(logits, one_hot, self.focal_alpha) * weights.view(1, -1, 1, 1)
        if ignored is not None:
            loss = loss.masked_fill(ignored.unsqueeze(-1), 0.0)
        return loss.sum((1, 2, 3))

    @torch.no_grad()
    def _logs(self, logits: Tensor, targets: DetectionTargets, matching: Tensor, divisor: float) -> dict[str, Tensor]:
        """`class_error` and `cardinality_error` of each layer, chunk by chunk as published.

        The published error of a chunk is divided by the objects of the whole batch and then summed over chunks, so it
        is far smaller than a percentage; it is kept for comparison with logs of the published code.
        """
        num_frames = targets.num_frames
        chunk_of_frame = torch.arange(num_frames, device=logits.device) // self.log_chunk
        chunks = -(-num_frames // self.log_chunk)
        counts = torch.tensor(targets.counts, dtype=torch.float32, device=logits.device)
        best = logits.argmax(-1)

        # class error
        layer, valid = _layer_index(matching)
        correct = (best[layer, targets.frames, matching.clamp(min=0)] == targets.classes) & valid
        hits = counts.new_zeros(logits.shape[0], chunks).index_add_(1, chunk_of_frame[targets.frames], correct.float())
        objects = counts.new_zeros(chunks).index_add_(0, chunk_of_frame, counts)
        error = 100.0 - 100.0 * hits / objects.clamp(min=1)

        # cardinality error
        surplus = ((best != logits.shape[-1] - 1).sum(-1).float() - counts).abs()
        summed = counts.new_zeros(logits.shape[0], chunks).index_add_(1, chunk_of_frame, surplus)
        frames = counts.new_zeros(chunks).index_add_(0, chunk_of_frame, torch.ones_like(counts))
        return {"class_error": error.sum(1) / divisor, "cardinality_error": (summed / frames).sum(1)}


def sigmoid_focal(logits: Tensor, targets: Tensor, alpha: float) -> Tensor:
    """Elementwise focal loss, gamma 2: -alpha_t (1 - p_t)^2 log p_t; `targets` are 0 or 1, shaped as `logits`."""
    probability = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    agreement = probability * targets + (1 - probability) * (1 - targets)
    balance = alpha * targets + (1 - alpha) * (1 - targets)
    return balance * (1 - agreement) ** _FOCAL_GAMMA * cross_entropy


def _box_losses(
    boxes_cxcywh: Tensor, targets: DetectionTargets, matching: Tensor, weights: Tensor, divisor: float
) -> dict[str, Tensor]:
    """(L,) L1 and 1 - generalised IoU, summed over matched objects."""
    layer, valid = _layer_index(matching)
    predicted = boxes_cxcywh[layer, targets.frames, matching.clamp(min=0)]
    factor = valid * weights[targets.frames]
    l1 = (predicted - targets.boxes_cxcywh).abs().sum(-1)
    giou = generalised_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(targets.boxes_cxcywh))
    return {
        "loss_bbox": (l1 * factor).sum(1) / divisor,
        "loss_giou": ((1 - giou) * factor).sum(1) / divisor,
    }


def _one_hot(logits: Tensor, targets: DetectionTargets, matching: Tensor) -> Tensor:
    """(L, F, Q, C) ones at the class of the object that a query is matched to; zeros for an unmatched query."""
    one_hot = torch.zeros_like(logits)
    layer, valid = _layer_index(matching)
    # An object without a query (-1) must not mark query 0, and dropping it would need a device sync: amax with 0 keeps
    # a one written by another object.
    flat = ((layer * logits.shape[1] + targets.frames) * logits.shape[2] + matching.clamp(min=0)) * logits.shape[3]
    one_hot.view(-1).scatter_reduce_(0, (flat + targets.classes).view(-1), valid.float().view(-1), reduce="amax")
    return one_hot


def _layer_index(matching: Tensor) -> tuple[Tensor, Tensor]:
    """(L, 1) layer numbers and (L, M) True where an object has a query."""
    return torch.arange(matching.shape[0], device=matching.device).unsqueeze(1), matching >= 0


def _named(per_layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """(L,) values to published names: the last layer without suffix, earlier layers with their number."""
    earlier = next(iter(per_layer.values())).shape[0] - 1
    named: dict[str, Tensor] = {name: values[-1] for name, values in per_layer.items()}
    for index in range(earlier):
        named.update({f"{name}_{index}": values[index] for name, values in per_layer.items()})
    return named
