"""Losses of a clip batch: detector forward pass, detection loss and ID loss, and their logged values.

Needs no configuration, so that `benchmarks/gpu_step.py` computes the same losses with torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from motip.data.batch import ClipBatch, IdSlots
from motip.errors import MotipError
from motip.losses.detection import DetectionCriterion
from motip.losses.identity import count_supervised, id_loss
from motip.losses.matcher import DetectionTargets
from motip.model import MOTIP
from motip.train.frames import detect_frames, slot_features
from motip.train.oom import OomFallback, decoder_recompute

if TYPE_CHECKING:
    from motip.config import Config


@dataclass(frozen=True)
class LossSettings:
    """The loss of a stage.

    Attributes:
        criterion: detection loss.
        train_ids: not ONLY_DETR.
        id_weight: ID_LOSS_WEIGHT.
        focal_ids: USE_FOCAL_LOSS.
        published_matching: the ID loss uses the matching of the second-to-last decoder layer (ID_SUPERVISION_LAYER).
        autocast_dtype: of the forward pass, None for float32.
    """

    criterion: DetectionCriterion = field(default_factory=DetectionCriterion)
    train_ids: bool = True
    id_weight: float = 1.0
    focal_ids: bool = False
    published_matching: bool = False
    autocast_dtype: torch.dtype | None = None

    @staticmethod
    def from_config(config: Config, autocast_dtype: torch.dtype | None) -> LossSettings:
        return LossSettings(
            criterion=DetectionCriterion.from_config(config),
            train_ids=not config.ONLY_DETR,
            id_weight=config.ID_LOSS_WEIGHT,
            focal_ids=config.USE_FOCAL_LOSS,
            published_matching=config.ID_SUPERVISION_LAYER == "published",
            autocast_dtype=autocast_dtype,
        )


@dataclass(frozen=True)
class BatchCounts:
    """Clips, weighted boxes and weighted ID targets: of one rank's batch, or of the global batch."""

    clips: float
    objects: float
    id_targets: float

    @staticmethod
    def of(batch: ClipBatch, train_ids: bool = True) -> BatchCounts:
        weights = batch.weights.double().cpu()
        boxes = torch.tensor([sum(len(frame) for frame in clip) for clip in batch.boxes_cxcywh], dtype=torch.float64)
        ids = torch.zeros_like(boxes)
        if train_ids and batch.slots is not None:
            ids = count_supervised(batch.slots.unknown_masks).double().cpu()
        return BatchCounts(float(len(batch.names)), float(boxes @ weights), float(ids @ weights))

    def to_tensor(self) -> Tensor:
        """(3,) float64 in the order of the fields, to be summed over ranks."""
        return torch.tensor([self.clips, self.objects, self.id_targets], dtype=torch.float64)


@dataclass
class ClipLosses:
    """Losses of one rank's clips, a part of the sum over the global batch.

    Attributes:
        total: weighted sum, with graph.
        logged: scalars by published name: `loss` (the total), `detr_loss`, `id_loss`, and per decoder layer the
            unweighted losses and logged values.
    """

    total: Tensor
    logged: dict[str, Tensor]


def clip_losses(
    model: MOTIP,
    batch: ClipBatch,
    order: list[int],
    fallback: OomFallback,
    settings: LossSettings,
    counts: BatchCounts,
) -> ClipLosses:
    """Losses of B clips of T frames; changes no gradients and no weights.

    Args:
        model: in training mode; the losses are computed on its device.
        batch: on any device, already downscaled as the fallback specifies.
        order: permutation of the T frames, of which the first DETR_NUM_TRAIN_FRAMES get a gradient.
        fallback: chunks of the forward pass, and what the backward pass recomputes.
        settings: the stage's loss.
        counts: of the global batch, the divisors of the losses.
    """
    device = next(model.parameters()).device
    # Annotations of all frames are flattened on the CPU: a few copies to the device instead of hundreds.
    targets = DetectionTargets.from_frames(
        [frame for clip in batch.boxes_cxcywh for frame in clip],
        [frame for clip in batch.classes for frame in clip],
        [frame for clip in batch.ignore_cxcywh for frame in clip],
        device,
    )
    batch = replace(batch, boxes_cxcywh=[], classes=[], ignore_cxcywh=[]).to(device)
    frame_weights = batch.weights.repeat_interleave(batch.images.shape[1])
    dtype = settings.autocast_dtype
    with torch.autocast(device.type, dtype, enabled=dtype is not None), decoder_recompute(model, fallback):
        output = detect_frames(model, batch, order, fallback.plan)
        detection = settings.criterion(output, targets, counts.objects, frame_weights)
        identity = detection.total.new_zeros(())
        if settings.train_ids and batch.slots is not None:
            matching = detection.matching_published if settings.published_matching else detection.matching_last
            identity = _id_loss(
                model, output.outputs, targets, matching, batch.slots, batch.weights, settings.focal_ids, counts
            )
    loss = detection.total + settings.id_weight * identity
    logged = {"loss": loss, "detr_loss": detection.total, "id_loss": identity}
    return ClipLosses(loss, {**logged, **detection.losses, **detection.logs})


def _id_loss(
    model: MOTIP,
    outputs: Tensor,
    targets: DetectionTargets,
    matching: Tensor,
    slots: IdSlots,
    weights: Tensor,
    focal: bool,
    counts: BatchCounts,
) -> Tensor:
    """ID loss: frames 0..T-2 of each slot are the trajectories, frames 1..T-1 the detections to identify."""
    length = slots.trajectory_ann.shape[2]
    decoder, modeling = model.id_decoder, model.trajectory_modeling
    if decoder is None or modeling is None or length < 2 or slots.trajectory_ann.shape[3] == 0:
        return outputs.new_zeros(())
    past, now = slice(0, length - 1), slice(1, length)
    history, history_masks = slot_features(
        outputs, targets, matching, slots.trajectory_ann, slots.trajectory_masks, past
    )
    unknown, unknown_masks = slot_features(outputs, targets, matching, slots.unknown_ann, slots.unknown_masks, now)
    logits = decoder(
        modeling(history),
        slots.trajectory_labels[:, :, past],
        history_masks,
        range(length - 1),
        unknown,
        unknown_masks,
        range(1, length),
    )
    labels = slots.unknown_labels[:, :, now]
    return id_loss(logits, labels, unknown_masks, counts.id_targets, focal=focal, weights=weights)


def metric_names(layers: int) -> list[str]:
    """Names of the logged values of a model with this many supervised decoder layers; `loss` is the first."""
    per_layer = ("loss_ce", "class_error", "loss_bbox", "loss_giou", "cardinality_error")
    suffixes = ["", *(f"_{layer}" for layer in range(layers - 1))]
    return ["loss", "detr_loss", "id_loss", *(n + s for s in suffixes for n in per_layer), "ignored_queries"]


def logged_values(logged: dict[str, Tensor], names: Sequence[str], own: BatchCounts, counts: BatchCounts) -> Tensor:
    """(N,) float64 in host memory: this rank's part of the N named values, in one copy from the device.

    Losses are already parts of a sum over the global batch. Two logged values are means, over frames and over objects;
    they are weighted with this rank's fraction of the clips and of the objects.
    """
    clips = own.clips / max(counts.clips, 1)
    parts = {"cardinality_error": clips, "class_error": own.objects / counts.objects if counts.objects else clips}
    factors = [next((parts[part] for part in parts if name.startswith(part)), 1.0) for name in names]
    values = torch.stack([logged[name].detach().float() for name in names]).cpu().double()
    return values * torch.tensor(factors, dtype=torch.float64)


def check_batch(batch: ClipBatch, classes: int, train_ids: bool) -> None:
    """Check annotations against the model's classes, and ID slots against the annotations.

    A batch that is already on a GPU is not checked for values, which would cost a synchronisation.

    Raises:
        MotipError: a class id or an ID slot is out of range, or there are no ID slots to train the ID decoder with.
    """
    if train_ids and batch.slots is None:
        raise MotipError(
            "clips without ID slots cannot train the ID decoder",
            where="; ".join(batch.names),
            fix="set ONLY_DETR: True to train the detector alone",
        )
    if not batch.names or batch.images.device.type != "cpu":
        return
    for name, clip in zip(batch.names, batch.classes, strict=True):
        labels = torch.cat(clip) if clip else torch.empty(0)
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise MotipError(
                "an annotation has a class outside the model's classes",
                where=name,
                found=f"class ids {int(labels.min())}..{int(labels.max())}",
                expected=f"0..{classes - 1} (NUM_CLASSES: {classes})",
            )
    if train_ids and batch.slots is not None:
        counts = torch.tensor([[len(frame) for frame in clip] for clip in batch.boxes_cxcywh])
        for side in (batch.slots.trajectory_ann, batch.slots.unknown_ann):
            beyond = (side >= counts[:, None, :, None]).flatten(1).any(1)
            if bool(beyond.any()):
                raise MotipError(
                    "an ID slot points to an annotation that its frame does not have",
                    where=batch.names[int(beyond.int().argmax())],
                    expected="an index below the number of boxes of the frame",
                )


def without_padding_clips(batch: ClipBatch) -> ClipBatch:
    """Drop the clips of weight 0, which equalise the number of batches per rank and need no forward pass."""
    kept = [clip for clip, weight in enumerate(batch.weights.tolist()) if weight > 0]
    if len(kept) == len(batch.names):
        return batch
    slots = batch.slots
    if slots is not None:
        slots = IdSlots(**{f.name: getattr(slots, f.name)[kept] for f in fields(slots)})
    return replace(
        batch,
        images=batch.images[kept],
        masks=batch.masks[kept],
        boxes_cxcywh=[batch.boxes_cxcywh[clip] for clip in kept],
        classes=[batch.classes[clip] for clip in kept],
        ignore_cxcywh=[batch.ignore_cxcywh[clip] for clip in kept],
        slots=slots,
        names=[batch.names[clip] for clip in kept],
        weights=batch.weights[kept],
    )
