"""Training step: accumulates the gradients of clip batches, then clips them and updates the weights."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from motip.config import Config
from motip.data.batch import ClipBatch
from motip.errors import MotipError
from motip.model import MOTIP
from motip.train.anomalies import GradNormMonitor, SkipLimit
from motip.train.collectives import ProcessGroup, all_reduce_gradients
from motip.train.losses import (
    BatchCounts,
    ClipLosses,
    LossSettings,
    check_batch,
    clip_losses,
    logged_values,
    metric_names,
    without_padding_clips,
)
from motip.train.oom import OomHistory, OomRetry, Outcome, RankState, downscaled, oom_fallbacks
from motip.train.skips import StepCounters, report_skip, skip_reason
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


class TrainStep:
    """Forward, losses and backward of clip batches; clipping and the optimiser step.

    Every rank calls `accumulate` and `apply` equally often. Losses are divided by the objects of the global batch and
    gradients are summed over ranks, so two ranks with one clip each are equivalent to one rank with both.

    Args:
        model: in training mode, on the device to train on.
        config: the stage's settings.
        comm: the ranks.

    Attributes:
        loss: what `clip_losses` computes.
        accumulated: batches in the gradients since the last `apply`.
        fallbacks: the out-of-memory fallbacks.
    """

    def __init__(self, model: MOTIP, config: Config, comm: ProcessGroup) -> None:
        self.model = model
        self.comm = comm
        self.device = next(model.parameters()).device
        # Losses and precision.
        self.loss = LossSettings.from_config(config, autocast_dtype(config.MIXED_PRECISION, self.device))
        if self.loss.train_ids and model.id_decoder is None:
            raise MotipError(
                "the model has no ID decoder to train",
                where="ONLY_DETR",
                found=False,
                fix="set ONLY_DETR: True, or build the model from this configuration",
            )
        self._metric_names = metric_names(model.spec.dec_layers if model.spec.detr_aux_loss else 1)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.loss.autocast_dtype == torch.float16)
        # Creates the scaler's state, which a rank whose first batch has no clip would lack.
        self.scaler.scale(torch.zeros((), device=self.device))
        # Memory.
        self.fallbacks = oom_fallbacks(config)
        self._oom_history = OomHistory(self.fallbacks)
        # Optimiser step.
        self.accumulate_steps = config.ACCUMULATE_STEPS
        self.max_norm = config.MAX_CLIP_NORM
        self.separate_norms = config.SEPARATE_CLIP_NORM
        # Monitoring.
        self.counters = StepCounters()
        self.skip_limit = SkipLimit(config.NONFINITE_LIMIT)
        self.grad_norm_monitor = GradNormMonitor()
        self.clock = StepClock(self.device)
        self.accumulated = 0
        self._accumulated_clips: list[str] = []

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
        order = torch.randperm(batch.images.shape[1], generator=generator) if permutation is None else permutation
        batch = without_padding_clips(batch)
        check_batch(batch, self.model.spec.num_classes, self.loss.train_ids)
        own = BatchCounts.of(batch, self.loss.train_ids)
        counts = BatchCounts(*self.comm.sum_(own.to_tensor()).tolist())
        # Forward and backward, with fallbacks, until all ranks agree on an outcome.
        retry = OomRetry(self.fallbacks, self._oom_history, batch, self.model, self.comm)
        metrics = torch.zeros(len(self._metric_names), dtype=torch.float64)
        losses: ClipLosses | None = None
        while True:
            if retry.state is RankState.PENDING:
                with retry.catch():
                    if seed is not None:
                        torch.manual_seed(seed)
                    with self.clock.part("forward"):
                        fallback = retry.fallback
                        losses = clip_losses(
                            self.model, downscaled(batch, fallback.scale), order.tolist(), fallback, self.loss, counts
                        )
                        metrics = logged_values(losses.logged, self._metric_names, own, counts)
                    if losses.total.requires_grad and math.isfinite(metrics[0]):
                        with self.clock.part("backward"):
                            self.scaler.scale(losses.total / (divisor or self.accumulate_steps)).backward()
                losses = None  # frees the graph of a failed pass
            outcome, values = retry.agree(metrics)
            if outcome is not Outcome.RETRY:
                break
        # Keep or discard the gradient.
        self.counters.lowered += retry.failures
        result = StepLosses(
            values=dict(zip(self._metric_names, values, strict=False)),
            skipped=outcome is not Outcome.DONE,
            clips=int(counts.clips),
            objects=counts.objects,
            id_targets=counts.id_targets,
            retries=retry.failures,
        )
        if outcome is Outcome.DONE:
            retry.stash.merge()
            self.accumulated += 1
            self._accumulated_clips += batch.names
        else:
            retry.stash.restore()
            reason = skip_reason(outcome, retry, dict(zip(self._metric_names, metrics.tolist(), strict=True)))
            result.skip_reports = report_skip(batch, outcome, reason, self.comm, self.counters)
            self.skip_limit.add("batch skipped: " + " | ".join(result.skip_reports))
        return result

    def apply(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Optimiser step: sum the accumulated gradients over ranks, clip them, update the weights, reset the gradients.

        Returns:
            `detr_grad_norm` and `other_grad_norm` before clipping: of the parameters with "detr" in their name and of
            the rest, or both the joint norm with SEPARATE_CLIP_NORM False. Empty if no batch, or none with a clip, was
            accumulated. The weights stay unchanged then, and if a norm is not finite.
        """
        norms: dict[str, float] = {}
        if self.accumulated > 0:
            with self.clock.part("optimiser"):
                norms = self._update(optimizer)
        optimizer.zero_grad(set_to_none=True)
        self.accumulated, self._accumulated_clips = 0, []
        return norms

    def _update(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        all_reduce_gradients(self.model.parameters(), self.comm)
        if all(parameter.grad is None for parameter in self.model.parameters()):
            return {}  # no rank had a clip; the scaler requires a gradient
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


def autocast_dtype(setting: str | None, device: torch.device) -> torch.dtype | None:
    """MIXED_PRECISION as a dtype; None for float32. Unset: bf16 on CUDA devices that support it, else float32."""
    if setting is None:
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[setting]


def _first_nonfinite(model: nn.Module) -> str:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return name
    return "only the norm, which overflowed"
