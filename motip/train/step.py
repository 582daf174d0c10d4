"""Training step: accumulates the gradients of clip batches, then clips them and updates the weights."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from motip.config import Config
from motip.data.batch import ClipBatch, IdSlots
from motip.errors import MotipError
from motip.losses.detection import DetectionCriterion
from motip.losses.identity import count_supervised, id_loss
from motip.losses.matcher import DetectionTargets
from motip.model import MOTIP
from motip.train.anomalies import GradNormMonitor, SkipLimit
from motip.train.collectives import ProcessGroup, all_reduce_gradients
from motip.train.frames import detect_frames, slot_features
from motip.train.oom import (
    GradientStash,
    OomFallback,
    OomHistory,
    decoder_recompute,
    downscaled,
    is_out_of_memory,
    max_objects_per_frame,
    object_bucket,
    oom_fallbacks,
    pixels_and_slots,
    release_memory,
)
from motip.train.timing import StepClock

_log = logging.getLogger(__name__)


@dataclass
class StepLosses:
    """Losses of one batch of clips, over all ranks.

    Attributes:
        values: `loss`, `detr_loss`, `id_loss` and the unweighted losses and logged values of each layer by their
            published names, before the division by the accumulation. Empty if a rank of a skipped batch ran out of
            memory.
        skipped: True if a loss was not finite on some rank, or a rank ran out of memory with every fallback; then no
            rank has added a gradient.
        clips: real clips (weight above 0) over all ranks.
        objects: boxes of those clips.
        id_targets: supervised ID slots of those clips.
        retries: out-of-memory failures of ranks in this batch, each retried with the next fallback if there is one.
        skip_reports: one line of text per rank with skipped clips.
    """

    values: dict[str, float]
    skipped: bool
    clips: int
    objects: float
    id_targets: float
    retries: int = 0
    skip_reports: list[str] = field(default_factory=list)


@dataclass
class StepCounters:
    """Counts of a run so far; the same on every rank. The field names are keys of a checkpoint."""

    nonfinite_losses: int = 0
    nonfinite_gradients: int = 0
    gradient_jumps: int = 0
    """Gradient norms far above their running median."""
    out_of_memory: int = 0
    """Batches skipped because a rank ran out of memory with the last fallback."""
    lowered: int = 0
    """Out-of-memory failures of ranks (`StepLosses.retries`)."""
    skipped_objects: dict[str, int] = field(default_factory=dict)
    """Clips skipped for lack of memory, by objects in their most crowded frame."""
    clips_left_out: int = 0
    """Clips skipped for lack of memory or because a loss was not finite."""
    names: list[str] = field(default_factory=list)
    """Clips of the skipped batches, the last hundred."""


@dataclass
class _BatchState:
    """Progress of one rank with its clips of a batch.

    Attributes:
        fallback: index of the out-of-memory fallback in use.
        metrics: this rank's part of the logged values, from the last forward pass.
        loss: with its graph, between forward and backward; None before, after, and without clips.
        state: `start`, `forward` (the loss is computed), `done` (its gradient too) or `failed` (out of memory).
    """

    fallback: int
    metrics: Tensor
    loss: Tensor | None = None
    state: str = "start"


class TrainStep:
    """Forward, losses and backward of clip batches; clipping and the optimiser step.

    Every rank calls `accumulate` and `apply` equally often. Losses are divided by the objects of the global batch and
    gradients are summed over ranks, so two ranks with one clip each are equivalent to one rank with both.

    Args:
        model: in training mode, on the device to train on.
        config: the stage's settings.
        comm: the ranks.

    Attributes:
        accumulated: batches in the gradients since the last `apply`.
        fallbacks: the out-of-memory fallbacks.
    """

    def __init__(self, model: MOTIP, config: Config, comm: ProcessGroup) -> None:
        self.model = model
        self.comm = comm
        self.device = next(model.parameters()).device
        # Losses.
        self.criterion = DetectionCriterion.from_config(config)
        self.published_matching = config.ID_SUPERVISION_LAYER == "published"
        self.train_ids = not config.ONLY_DETR
        if self.train_ids and model.id_decoder is None:
            raise MotipError(
                "the model has no ID decoder to train",
                where="ONLY_DETR",
                found=False,
                fix="set ONLY_DETR: True, or build the model from this configuration",
            )
        self.id_weight = config.ID_LOSS_WEIGHT
        self.focal_ids = config.USE_FOCAL_LOSS
        # Optimiser step.
        self.accumulate_steps = config.ACCUMULATE_STEPS
        self.max_norm = config.MAX_CLIP_NORM
        self.separate_norms = config.SEPARATE_CLIP_NORM
        # Memory and precision.
        self.fallbacks = oom_fallbacks(config)
        self._oom_history = OomHistory(self.fallbacks)
        self.autocast_dtype = autocast_dtype(config.MIXED_PRECISION, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast_dtype == torch.float16)
        # Creates the scaler's state, which a rank whose first batch has no clip would lack.
        self.scaler.scale(torch.zeros((), device=self.device))
        # Monitoring.
        self.counters = StepCounters()
        self.skip_limit = SkipLimit(config.NONFINITE_LIMIT)
        self.grad_norm_monitor = GradNormMonitor()
        self.clock = StepClock(self.device)
        self.accumulated = 0
        self._accumulated_clips: list[str] = []
        self._metric_names = _metric_names(model.spec.dec_layers if model.spec.detr_aux_loss else 1)

    def accumulate(
        self,
        batch: ClipBatch,
        permutation: Tensor | None = None,
        generator: torch.Generator | None = None,
        divisor: int | None = None,
        seed: int | None = None,
    ) -> StepLosses:
        """Micro-step: add the gradient of a batch of clips.

        A rank that runs out of memory retries its clips with the next fallback, while the others keep their gradients;
        if a rank fails with the last fallback, all ranks skip the batch. Every rank calls the same collectives
        whatever the outcome for its own clips.

        Args:
            batch: clips of one length; on the CPU, where it is checked, or already on the device.
            permutation: (T,) order of the frames, of which the first DETR_NUM_TRAIN_FRAMES get a gradient.
            generator: samples the permutation if none is given. Ranks that form one batch seed it identically.
            divisor: batches of this optimiser step; None: ACCUMULATE_STEPS (an epoch's last step may have fewer).
            seed: of dropout, the same for a retry and after a resume.

        Raises:
            MotipError: the annotations and ID slots of the batch are inconsistent with each other or the model; or the
                limit of consecutive skipped batches is reached.
        """
        # Validate the batch and drop padding clips.
        length = batch.images.shape[1]
        order = torch.randperm(length, generator=generator) if permutation is None else permutation
        batch = _without_padding_clips(batch)
        if self.train_ids and batch.slots is None:
            raise MotipError(
                "clips without ID slots cannot train the ID decoder",
                where="; ".join(batch.names),
                fix="set ONLY_DETR: True to train the detector alone",
            )
        if batch.names and batch.images.device.type == "cpu":
            self._check(batch)
        # Counts of the global batch, and this rank's fractions of them.
        own_clips, own_objects, _ = (own := self._counts(batch)).tolist()
        clips, objects, id_targets = self.comm.sum_(own).tolist()
        shares = own_clips / max(clips, 1), own_objects / objects if objects else own_clips / max(clips, 1)
        # Forward and backward, with fallbacks, until all ranks agree on an outcome.
        size = pixels_and_slots(batch)
        state = _BatchState(self._oom_history.first_fallback(size), self._metrics_on_cpu({}, *shares))
        stash = GradientStash(self.model.parameters())
        retries = 0
        while True:
            if state.state == "start":
                self._forward(state, batch, order.tolist(), objects, id_targets, shares, seed)
                self._backward(state, stash, divisor or self.accumulate_steps)
            failed, exhausted, nonfinite, values = self._agree_on_outcome(state)
            if nonfinite:  # first: no fallback helps a batch that is skipped for its loss
                outcome = "not finite"
                break
            retries += failed
            if failed and not exhausted:
                self._fall_back(state, batch, size)
                continue
            outcome = "memory" if exhausted else "done"
            break
        self.counters.lowered += retries
        if failed:  # the values of a failed rank are missing, so those of the global batch are incomplete
            values = []
        # Keep or discard the gradient.
        losses = StepLosses(
            values=dict(zip(self._metric_names, values, strict=False)),
            skipped=outcome != "done",
            clips=int(clips),
            objects=objects,
            id_targets=id_targets,
            retries=retries,
        )
        if outcome == "done":
            stash.merge()
            self.accumulated += 1
            self._accumulated_clips += batch.names
        else:
            stash.restore()
            losses.skip_reports = self._skip_batch(batch, state, outcome)
        return losses

    def apply(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Optimiser step: sum the accumulated gradients over ranks, clip them, update the weights, reset the gradients.

        Returns:
            `detr_grad_norm` and `other_grad_norm` before clipping: of the parameters with "detr" in their name and of
            the rest, or both the joint norm with SEPARATE_CLIP_NORM False. Empty if no batch, or none with a clip, was
            accumulated. The weights stay unchanged then, and if a norm is not finite.
        """
        if self.accumulated == 0:
            optimizer.zero_grad(set_to_none=True)
            return {}
        with self.clock.part("optimiser"):
            return self._optimizer_step(optimizer)

    def _optimizer_step(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        all_reduce_gradients(self.model.parameters(), self.comm)
        if all(parameter.grad is None for parameter in self.model.parameters()):
            self.accumulated = 0  # no rank had a clip; the scaler requires a gradient
            self._accumulated_clips = []
            return {}
        self.scaler.unscale_(optimizer)
        norms = self._clip()
        # Gradients are summed over ranks, so every rank computes the same norms and takes the same branch.
        finite = all(math.isfinite(norm) for norm in norms.values())
        if not finite:
            self.counters.nonfinite_gradients += 1
            what = f"step skipped: a gradient is not finite ({_first_nonfinite(self.model)})"
            _log.warning(what)
            # While the loss scale decreases from its initial value, some overflows are normal.
            if not self.scaler.is_enabled() or self.scaler.get_scale() <= 1:
                self.skip_limit.add(f"{what}; clips {'; '.join(self._accumulated_clips) or 'none'}")
        else:
            self.skip_limit.reset()
            for spike in self.grad_norm_monitor.update(norms):
                self.counters.gradient_jumps += 1
                _log.warning("%s; clips %s", spike, "; ".join(self._accumulated_clips))
        if finite or self.scaler.is_enabled():
            # An enabled scaler skips the step itself, and needs the overflow to lower its scale.
            self.scaler.step(optimizer)
            self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        self.accumulated = 0
        self._accumulated_clips = []
        return norms

    def state_dict(self) -> dict[str, Any]:
        """Loss scale and counters as plain values; to be called between `apply` and the next `accumulate`."""
        return {
            "scaler": self.scaler.state_dict(),
            "counters": asdict(self.counters),
            "left_out_in_a_row": self.skip_limit.in_a_row,
            "gradient_norms": self.grad_norm_monitor.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.counters = StepCounters(**state["counters"])
        self.skip_limit.in_a_row = int(state.get("left_out_in_a_row", 0))
        self.grad_norm_monitor.load_state_dict(state.get("gradient_norms", {}))

    def _forward(
        self,
        state: _BatchState,
        batch: ClipBatch,
        order: list[int],
        objects: float,
        id_targets: float,
        shares: tuple[float, float],
        seed: int | None,
    ) -> None:
        """Compute this rank's loss with its fallback, or mark the state as failed if out of memory."""
        if seed is not None:
            torch.manual_seed(seed)
        state.state = "forward"
        if not batch.names:
            return
        fallback = self.fallbacks[state.fallback]
        try:
            with self.clock.part("forward"):
                state.loss, local = self._losses(
                    downscaled(batch, fallback.scale), order, objects, id_targets, fallback
                )
                state.metrics = self._metrics_on_cpu(local, *shares)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            state.state = "failed"
        # Outside the handler: the traceback of the error refers to the tensors of the failed pass.
        if state.state == "failed":
            state.loss = None
            release_memory(self.device)

    def _backward(self, state: _BatchState, stash: GradientStash, divisor: int) -> None:
        """Compute the gradient of this rank's loss; none if the loss is not finite or memory runs out."""
        loss, state.loss = state.loss, None
        if state.state == "failed":
            return
        state.state = "done"
        if loss is None or not loss.requires_grad or not math.isfinite(state.metrics[0]):
            return
        try:
            with self.clock.part("backward"):
                self.scaler.scale(loss / divisor).backward()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            state.state = "failed"
        if state.state == "failed":
            del loss
            stash.drop()
            release_memory(self.device)

    def _agree_on_outcome(self, state: _BatchState) -> tuple[int, int, int, list[float]]:
        """Sum the outcome of a batch over the ranks.

        Returns:
            numbers of ranks that ran out of memory, that did so with the last fallback, and whose loss is not finite;
            and the logged values of the global batch. One collective for all of them: each waits for the slowest rank.
        """
        failed = state.state == "failed"
        exhausted = failed and state.fallback == len(self.fallbacks) - 1
        nonfinite = not failed and not math.isfinite(state.metrics[0])
        flags = state.metrics.new_tensor([failed, exhausted, nonfinite])
        sums = self.comm.sum_(torch.cat([flags, state.metrics])).tolist()
        return int(sums[0]), int(sums[1]), int(sums[2]), sums[3:]

    def _fall_back(self, state: _BatchState, batch: ClipBatch, size: tuple[int, int]) -> None:
        """Restart a rank that ran out of memory with the next fallback; the other ranks keep their gradients."""
        if state.state != "failed":
            return
        self._oom_history.add(state.fallback, size)
        state.fallback += 1
        state.state = "start"
        _log.warning(
            "out of memory on rank %d, retrying: %s; %s",
            self.comm.rank,
            self.fallbacks[state.fallback].name,
            _describe_clips(batch),
        )

    def _skip_batch(self, batch: ClipBatch, state: _BatchState, outcome: str) -> list[str]:
        """Count and report a batch of which no rank adds a gradient; returns the same lines on every rank."""
        # Reason on this rank.
        rank = self.comm.rank
        if outcome == "memory":
            where = " with the last fallback" if state.fallback == len(self.fallbacks) - 1 else ""
            reason = f"out of memory{where}" if state.state == "failed" else "skipped because another rank's was"
        else:
            local = zip(self._metric_names, state.metrics.tolist(), strict=True)
            bad = ", ".join(name for name, value in local if not math.isfinite(value))
            reason = f"not finite: {bad}" if bad else "skipped because another rank's loss is not finite"
        own_line = f"rank {rank}: {reason}; {_describe_clips(batch)}" if batch.names else ""
        # Reports and counts of all ranks.
        lines: list[str] = []
        for line, names, crowds in self.comm.all_gather((own_line, batch.names, max_objects_per_frame(batch))):
            if line:
                lines.append(line)
            self.counters.clips_left_out += len(names)
            self.counters.names = [*self.counters.names, *names][-100:]
            if outcome == "memory":
                for objects in crowds:
                    bucket = object_bucket(objects)
                    self.counters.skipped_objects[bucket] = self.counters.skipped_objects.get(bucket, 0) + 1
        if outcome == "memory":
            self.counters.out_of_memory += 1
        else:
            self.counters.nonfinite_losses += 1
        what = "batch skipped: " + " | ".join(lines)
        _log.warning(what)
        self.skip_limit.add(what)
        return lines

    def _losses(
        self, batch: ClipBatch, order: list[int], objects: float, id_targets: float, fallback: OomFallback
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's part of the loss of the global batch, and the logged values by name."""
        # Annotations of all frames are flattened on the CPU: a few copies to the device instead of hundreds.
        targets = _targets(batch, self.device)
        batch = replace(batch, boxes_cxcywh=[], classes=[], ignore_cxcywh=[]).to(self.device)
        frame_weights = batch.weights.repeat_interleave(batch.images.shape[1])
        autocast = torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)
        with autocast, decoder_recompute(self.model, fallback):
            output = detect_frames(self.model, batch, order, fallback.plan)
            detection = self.criterion(output, targets, objects, frame_weights)
            matching = detection.matching_published if self.published_matching else detection.matching_last
            identity = detection.total.new_zeros(())
            if self.train_ids and batch.slots is not None:
                identity = self._id_loss(output.outputs, targets, matching, batch.slots, id_targets, batch.weights)
        loss = detection.total + self.id_weight * identity
        logged = {"loss": loss, "detr_loss": detection.total, "id_loss": identity}
        return loss, {**logged, **detection.losses, **detection.logs}

    def _id_loss(
        self,
        outputs: Tensor,
        targets: DetectionTargets,
        matching: Tensor,
        slots: IdSlots,
        count: float,
        weights: Tensor,
    ) -> Tensor:
        """ID loss: frames 0..T-2 of each slot are the trajectories, frames 1..T-1 the detections to identify."""
        length = slots.trajectory_ann.shape[2]
        decoder, modeling = self.model.id_decoder, self.model.trajectory_modeling
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
        return id_loss(logits, labels, unknown_masks, count, focal=self.focal_ids, weights=weights)

    def _counts(self, batch: ClipBatch) -> Tensor:
        """(3,) float64: clips, weighted boxes, weighted ID targets of this rank."""
        weights = batch.weights.double().cpu()
        boxes = torch.tensor([sum(len(frame) for frame in clip) for clip in batch.boxes_cxcywh], dtype=torch.float64)
        ids = torch.zeros_like(boxes)
        if self.train_ids and batch.slots is not None:
            ids = count_supervised(batch.slots.unknown_masks).double().cpu()
        return torch.stack([torch.tensor(len(batch.names), dtype=torch.float64), boxes @ weights, ids @ weights])

    def _metrics_on_cpu(self, local: dict[str, Tensor], clip_share: float, object_share: float) -> Tensor:
        """This rank's part of the logged values in the order of `_metric_names` (zeros without clips), in one copy.

        Losses are already parts of a sum over the global batch. Two logged values are means, over frames and over
        objects; they are weighted with this rank's fraction of the clips and of the objects.
        """
        if not local:
            return torch.zeros(len(self._metric_names), dtype=torch.float64)
        values = torch.stack([local[name].detach().float() for name in self._metric_names]).cpu().double()
        parts = {"cardinality_error": clip_share, "class_error": object_share}
        factors = [next((parts[p] for p in parts if name.startswith(p)), 1.0) for name in self._metric_names]
        return values * torch.tensor(factors, dtype=torch.float64)

    def _clip(self) -> dict[str, float]:
        """Clip the gradients to MAX_CLIP_NORM; with SEPARATE_CLIP_NORM the detector's and the rest separately."""
        detr: list[nn.Parameter] = []
        other: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                (detr if "detr" in name else other).append(parameter)
        parts = [detr, other] if self.separate_norms else [detr + other]
        norms = []
        for part in parts:
            norm = get_total_norm([p.grad for p in part if p.grad is not None])
            clip_grads_with_norm_(part, self.max_norm, norm)
            norms.append(norm.to(self.device))
        values = torch.stack(norms).tolist()
        return {"detr_grad_norm": values[0], "other_grad_norm": values[-1]}

    def _check(self, batch: ClipBatch) -> None:
        """Check annotations against the model and ID slots against the annotations; both are on the CPU."""
        classes = self.model.spec.num_classes
        for name, clip in zip(batch.names, batch.classes, strict=True):
            labels = torch.cat(clip) if clip else torch.empty(0)
            if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
                raise MotipError(
                    "an annotation has a class outside the model's classes",
                    where=name,
                    found=f"class ids {int(labels.min())}..{int(labels.max())}",
                    expected=f"0..{classes - 1} (NUM_CLASSES: {classes})",
                )
        if self.train_ids and batch.slots is not None:
            counts = torch.tensor([[len(frame) for frame in clip] for clip in batch.boxes_cxcywh])
            for side in (batch.slots.trajectory_ann, batch.slots.unknown_ann):
                beyond = (side >= counts[:, None, :, None]).flatten(1).any(1)
                if bool(beyond.any()):
                    raise MotipError(
                        "an ID slot points to an annotation that its frame does not have",
                        where=batch.names[int(beyond.int().argmax())],
                        expected="an index below the number of boxes of the frame",
                    )


def autocast_dtype(setting: str | None, device: torch.device) -> torch.dtype | None:
    """MIXED_PRECISION as a dtype; None for float32. Unset: bf16 on CUDA devices that support it, else float32."""
    if setting is None:
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[setting]


def _targets(batch: ClipBatch, device: torch.device) -> DetectionTargets:
    return DetectionTargets.from_frames(
        [frame for clip in batch.boxes_cxcywh for frame in clip],
        [frame for clip in batch.classes for frame in clip],
        [frame for clip in batch.ignore_cxcywh for frame in clip],
        device,
    )


def _without_padding_clips(batch: ClipBatch) -> ClipBatch:
    """Drop the clips of weight 0, which equalise the number of batches per rank and need no forward pass."""
    kept = [clip for clip, weight in enumerate(batch.weights.tolist()) if weight > 0]
    if len(kept) == len(batch.names):
        return batch
    slots = batch.slots
    if slots is not None:
        slots = IdSlots(**{f.name: getattr(slots, f.name)[kept] for f in fields(slots)})
    return ClipBatch(
        images=batch.images[kept],
        masks=batch.masks[kept],
        boxes_cxcywh=[batch.boxes_cxcywh[clip] for clip in kept],
        classes=[batch.classes[clip] for clip in kept],
        ignore_cxcywh=[batch.ignore_cxcywh[clip] for clip in kept],
        slots=slots,
        names=[batch.names[clip] for clip in kept],
        weights=batch.weights[kept],
    )


def _describe_clips(batch: ClipBatch) -> str:
    """Sequence, frames and objects of the clips, for messages."""
    frames = batch.images.shape[1]
    clips = zip(batch.names, batch.boxes_cxcywh, max_objects_per_frame(batch), strict=True)
    return "; ".join(
        f"{name} ({frames} frames, {sum(map(len, clip))} objects, at most {most} in a frame)"
        for name, clip, most in clips
    )


def _metric_names(layers: int) -> list[str]:
    """Names of the logged values of a model with this many supervised decoder layers; `loss` is the first."""
    per_layer = ("loss_ce", "class_error", "loss_bbox", "loss_giou", "cardinality_error")
    suffixes = ["", *(f"_{layer}" for layer in range(layers - 1))]
    return ["loss", "detr_loss", "id_loss", *(n + s for s in suffixes for n in per_layer), "ignored_queries"]


def _first_nonfinite(model: nn.Module) -> str:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return name
    return "only the norm, which overflowed"
