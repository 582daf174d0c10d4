"""One training step: gather the gradients of some clips, then move the weights."""

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
from motip.train.anomalies import GradientWatch, LeftOut
from motip.train.collectives import Communicator, all_reduce_gradients
from motip.train.frames import detect_frames, slot_features
from motip.train.oom import (
    MemoryOfFailures,
    Rung,
    SetAside,
    batch_size,
    crowd,
    decoder_as,
    give_back_memory,
    is_out_of_memory,
    ladder,
    object_bucket,
    shrunk,
)
from motip.train.timing import StepClock

_log = logging.getLogger(__name__)


@dataclass
class StepLosses:
    """What one batch of clips cost, over all ranks.

    Attributes:
        values: `loss`, `detr_loss`, `id_loss` and the unweighted losses and logged values of each layer by their
            published names, before the division by the accumulation. Empty where a rank of a batch that was
            left out had no memory for it.
        skipped: True where a loss was not finite on some rank, or a rank had no memory left on any rung; no rank has
            added a gradient then.
        clips: real clips (weight above 0) over all ranks.
        objects: boxes of those clips.
        id_targets: supervised ID slots of those clips.
        lowered: how often a rank went down a rung of the memory ladder for this batch.
        left_out: one readable line per rank whose clips were left out.
    """

    values: dict[str, float]
    skipped: bool
    clips: int
    objects: float
    id_targets: float
    lowered: int = 0
    left_out: list[str] = field(default_factory=list)


@dataclass
class StepCounters:
    """What a run has left out so far; the same on every rank."""

    nonfinite_losses: int = 0
    nonfinite_gradients: int = 0
    gradient_jumps: int = 0
    out_of_memory: int = 0
    """Batches left out because a rank ran out of memory on the last rung."""
    lowered: int = 0
    """How often a rank went down a rung of the memory ladder."""
    skipped_objects: dict[str, int] = field(default_factory=dict)
    """Clips left out for want of memory, by objects in their most crowded frame."""
    clips_left_out: int = 0
    """Clips that no gradient was taken of, for want of memory or because a loss was not finite."""
    names: list[str] = field(default_factory=list)
    """Clips of the batches that were left out, the last hundred."""


@dataclass
class _Attempt:
    """How far one rank has come with its share of a batch.

    Attributes:
        rung: index of the rung of the memory ladder in use.
        loss: with its graph, between forward and backward; None before, after, and without clips.
        host: this rank's part of the logged values, from the last forward pass.
        state: `start`, `forward` (a loss is there), `done` (its gradient is there too) or `failed` (out of memory).
    """

    rung: int
    host: Tensor
    loss: Tensor | None = None
    state: str = "start"


class TrainStep:
    """Forward, losses and backward of clip batches; clipping and the optimiser step.

    Every rank calls `accumulate` and `apply` equally often. Losses are divided by the objects of the global batch and
    gradients are summed over ranks, so two ranks with one clip each do what one rank does with both.

    Args:
        model: in training mode, on the device to train on.
        config: the stage's settings.
        comm: the ranks.
    """

    def __init__(self, model: MOTIP, config: Config, comm: Communicator) -> None:
        self.model = model
        self.comm = comm
        self.device = next(model.parameters()).device
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
        self.accumulate_steps = config.ACCUMULATE_STEPS
        self.max_norm = config.MAX_CLIP_NORM
        self.separate_norms = config.SEPARATE_CLIP_NORM
        self.rungs = ladder(config)
        self._failures = MemoryOfFailures(self.rungs)
        self.autocast_dtype = autocast_dtype(config.MIXED_PRECISION, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast_dtype == torch.float16)
        self.scaler.scale(torch.zeros((), device=self.device))  # makes its state: a rank's first batch may have no clip
        self.counters = StepCounters()
        self.left_out = LeftOut(config.NONFINITE_LIMIT)
        self.gradient_watch = GradientWatch()
        self.clock = StepClock(self.device)
        self.gathered = 0
        self._recent: list[str] = []
        self._metric_names = _metric_names(model.spec.dec_layers if model.spec.detr_aux_loss else 1)

    def accumulate(
        self,
        batch: ClipBatch,
        permutation: Tensor | None = None,
        generator: torch.Generator | None = None,
        divisor: int | None = None,
        seed: int | None = None,
    ) -> StepLosses:
        """Add the gradient of a batch of clips.

        A rank that runs out of memory tries its clips again one rung lower, while the others keep what they have;
        where a rank fails on the last rung, the batch is left out on all. Each rank takes part in the same collectives
        whatever happens to its own clips.

        Args:
            batch: clips of one length; on the host, where it is checked, or already on the device.
            permutation: (T,) order of the frames, of which the first DETR_NUM_TRAIN_FRAMES get a gradient.
            generator: draws the permutation where none is given. Ranks that shall act as one batch seed it alike.
            divisor: batches of this optimiser step; ACCUMULATE_STEPS where not given (an epoch's last may have fewer).
            seed: of everything random in the network (dropout), the same for a second try and after a resume.

        Raises:
            MotipError: the annotations and ID slots of the batch contradict each other or the model; or too many
                batches in a row were left out.
        """
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
        own_clips, own_objects, _ = (own := self._counts(batch)).tolist()
        clips, objects, id_targets = self.comm.sum_(own).tolist()
        shares = own_clips / max(clips, 1), own_objects / objects if objects else own_clips / max(clips, 1)
        size = batch_size(batch)
        attempt = _Attempt(self._failures.first_rung(size), self._on_host({}, *shares))
        gathered = SetAside(self.model.parameters())
        lowered = 0
        while True:
            if attempt.state == "start":
                self._forward(attempt, batch, order.tolist(), objects, id_targets, shares, seed)
                self._backward(attempt, gathered, divisor or self.accumulate_steps)
            failed, hopeless, bad, values = self._tell(attempt)
            if bad:  # then no rank need find room for a batch that is left out anyway
                outcome = "not finite"
                break
            lowered += failed
            if failed and not hopeless:
                self._lower(attempt, batch, size)
                continue
            outcome = "memory" if hopeless else "done"
            break
        self.counters.lowered += lowered
        if failed:  # a rank has no values: then there are none of the whole batch
            values = []
        losses = StepLosses(
            dict(zip(self._metric_names, values, strict=False)),
            outcome != "done",
            int(clips),
            objects,
            id_targets,
            lowered,
        )
        if outcome == "done":
            gathered.merge()
            self.gathered += 1
            self._recent += batch.names
        else:
            gathered.restore()
            losses.left_out = self._leave_out(batch, attempt, outcome)
        return losses

    def apply(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Sum the gathered gradients over ranks, clip them, step, and forget them.

        Returns:
            `detr_grad_norm` and `other_grad_norm` before clipping: of the parameters with "detr" in their name and of
            the rest, or both the joint norm with SEPARATE_CLIP_NORM False. Empty where no batch was gathered, or none
            with a clip; then, and where a norm is not finite, the weights stay as they are.
        """
        if self.gathered == 0:
            optimizer.zero_grad(set_to_none=True)
            return {}
        with self.clock.part("optimiser"):
            return self._move(optimizer)

    def _move(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        all_reduce_gradients(self.model.parameters(), self.comm)
        if all(parameter.grad is None for parameter in self.model.parameters()):
            self.gathered = 0  # no rank had a clip; a scaler would insist on a gradient
            self._recent = []
            return {}
        self.scaler.unscale_(optimizer)
        norms = self._clip()
        # Gradients were summed over ranks, so every rank sees the same norms and decides alike.
        finite = all(math.isfinite(norm) for norm in norms.values())
        if not finite:
            self.counters.nonfinite_gradients += 1
            what = f"step left out: a gradient is not finite ({_first_nonfinite(self.model)})"
            _log.warning(what)
            # A loss scale that is still coming down overflows a few times in a healthy run.
            if not self.scaler.is_enabled() or self.scaler.get_scale() <= 1:
                self.left_out.add(f"{what}; clips {'; '.join(self._recent) or 'none'}")
        else:
            self.left_out.reset()
            for jump in self.gradient_watch.see(norms):
                self.counters.gradient_jumps += 1
                _log.warning("%s; clips %s", jump, "; ".join(self._recent))
        if finite or self.scaler.is_enabled():
            # A scaler leaves the step out by itself, and must see the overflow to lower its scale.
            self.scaler.step(optimizer)
            self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        self.gathered = 0
        self._recent = []
        return norms

    def state_dict(self) -> dict[str, Any]:
        """Loss scale and counters, plain values; call it between `apply` and the next `accumulate`."""
        return {
            "scaler": self.scaler.state_dict(),
            "counters": asdict(self.counters),
            "left_out_in_a_row": self.left_out.in_a_row,
            "gradient_norms": self.gradient_watch.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.counters = StepCounters(**state["counters"])
        self.left_out.in_a_row = int(state.get("left_out_in_a_row", 0))
        self.gradient_watch.load_state_dict(state.get("gradient_norms", {}))

    def _forward(
        self,
        attempt: _Attempt,
        batch: ClipBatch,
        order: list[int],
        objects: float,
        id_targets: float,
        shares: tuple[float, float],
        seed: int | None,
    ) -> None:
        """This rank's loss on its rung, or a note that there was no memory for it."""
        if seed is not None:
            torch.manual_seed(seed)
        attempt.state = "forward"
        if not batch.names:
            return
        rung = self.rungs[attempt.rung]
        try:
            with self.clock.part("forward"):
                attempt.loss, local = self._losses(shrunk(batch, rung.scale), order, objects, id_targets, rung)
                attempt.host = self._on_host(local, *shares)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            attempt.state = "failed"
        if attempt.state == "failed":
            attempt.loss = None
            give_back_memory(self.device)

    def _backward(self, attempt: _Attempt, gathered: SetAside, divisor: int) -> None:
        """The gradient of this rank's loss, or none of it where there was no memory for it or it is not finite."""
        loss, attempt.loss = attempt.loss, None
        if attempt.state == "failed":
            return
        attempt.state = "done"
        if loss is None or not loss.requires_grad or not math.isfinite(attempt.host[0]):
            return
        try:
            with self.clock.part("backward"):
                self.scaler.scale(loss / divisor).backward()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            attempt.state = "failed"
        if attempt.state == "failed":
            del loss
            gathered.drop()
            give_back_memory(self.device)

    def _tell(self, attempt: _Attempt) -> tuple[int, int, int, list[float]]:
        """How many ranks ran out of memory, how many of them on the last rung, how many have a loss that is not finite,
        and the logged values of all.

        The only question of a batch that all wait for, as each wait is as long as the slowest rank's way to it.
        """
        failed = attempt.state == "failed"
        hopeless = failed and attempt.rung == len(self.rungs) - 1
        bad = not failed and not math.isfinite(attempt.host[0])
        flags = attempt.host.new_tensor([failed, hopeless, bad])
        told = self.comm.sum_(torch.cat([flags, attempt.host])).tolist()
        return int(told[0]), int(told[1]), int(told[2]), told[3:]

    def _lower(self, attempt: _Attempt, batch: ClipBatch, size: tuple[int, int]) -> None:
        """Let a rank that ran out of memory begin again on the next rung; the others keep what they have."""
        if attempt.state != "failed":
            return
        self._failures.add(attempt.rung, size)
        attempt.rung += 1
        attempt.state = "start"
        _log.warning(
            "out of memory on rank %d, trying again: %s; %s",
            self.comm.rank,
            self.rungs[attempt.rung].name,
            _described(batch),
        )

    def _leave_out(self, batch: ClipBatch, attempt: _Attempt, outcome: str) -> list[str]:
        """Count and name a batch that no rank adds a gradient of; the same lines on every rank."""
        rank = self.comm.rank
        if outcome == "memory":
            where = " on the last rung" if attempt.rung == len(self.rungs) - 1 else ""
            reason = f"out of memory{where}" if attempt.state == "failed" else "left out with another rank's"
        else:
            local = zip(self._metric_names, attempt.host.tolist(), strict=True)
            bad = ", ".join(name for name, value in local if not math.isfinite(value))
            reason = f"not finite: {bad}" if bad else "left out with another rank's, whose loss is not finite"
        own = (f"rank {rank}: {reason}; {_described(batch)}" if batch.names else "", batch.names, crowd(batch))
        lines: list[str] = []
        for line, names, crowds in self.comm.gather(own):
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
        what = "batch left out: " + " | ".join(lines)
        _log.warning(what)
        self.left_out.add(what)
        return lines

    def _losses(
        self, batch: ClipBatch, order: list[int], objects: float, id_targets: float, rung: Rung
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's share of the loss of the global batch, and everything that is logged of it."""
        # Flattened before they move, the annotations of all frames travel in a few transfers instead of hundreds.
        targets = _targets(batch, self.device)
        batch = replace(batch, boxes_cxcywh=[], classes=[], ignore_cxcywh=[]).to(self.device)
        frame_weights = batch.weights.repeat_interleave(batch.images.shape[1])
        autocast = torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)
        with autocast, decoder_as(self.model, rung):
            output = detect_frames(self.model, batch, order, rung.plan)
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
        """The past frames of each slot as history, every frame but the first as question."""
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

    def _on_host(self, local: dict[str, Tensor], clip_share: float, object_share: float) -> Tensor:
        """This rank's part of the logged values in a fixed order (zeros without clips), in one transfer.

        Losses are parts of a sum over the global batch as they are. The two logged values that are means, over frames
        and over objects, become such parts by this rank's share of the clips and of the objects.
        """
        if not local:
            return torch.zeros(len(self._metric_names), dtype=torch.float64)
        values = torch.stack([local[name].detach().float() for name in self._metric_names]).cpu().double()
        parts = {"cardinality_error": clip_share, "class_error": object_share}
        factors = [next((parts[p] for p in parts if name.startswith(p)), 1.0) for name in self._metric_names]
        return values * torch.tensor(factors, dtype=torch.float64)

    def _clip(self) -> dict[str, float]:
        """Scale the gradients down to MAX_CLIP_NORM, the detector's and the rest apart if so configured."""
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
        """Annotations against the model and the slots against the annotations, while both are on the host."""
        classes = self.model.spec.num_classes
        for name, clip in zip(batch.names, batch.classes, strict=True):
            labels = torch.cat(clip) if clip else torch.empty(0)
            if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
                raise MotipError(
                    "an annotation has a class that the model does not know",
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
    """MIXED_PRECISION as a type; None for float32. Not set means bf16 on CUDA devices that have it, else float32."""
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
    """Leave out the clips of weight 0: they keep ranks in step, and need no forward pass for that."""
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


def _described(batch: ClipBatch) -> str:
    """Sequence, frames and objects of the clips, for messages."""
    frames = batch.images.shape[1]
    clips = zip(batch.names, batch.boxes_cxcywh, crowd(batch), strict=True)
    return "; ".join(
        f"{name} ({frames} frames, {sum(map(len, clip))} objects, at most {most} in a frame)"
        for name, clip, most in clips
    )


def _metric_names(layers: int) -> list[str]:
    """Every logged value of a model with this many supervised decoder layers; `loss` is the first."""
    per_layer = ("loss_ce", "class_error", "loss_bbox", "loss_giou", "cardinality_error")
    suffixes = ["", *(f"_{layer}" for layer in range(layers - 1))]
    return ["loss", "detr_loss", "id_loss", *(n + s for s in suffixes for n in per_layer), "ignored_queries"]


def _first_nonfinite(model: nn.Module) -> str:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return name
    return "only their norm, which overflowed"
