"""Training step of `gpu_checks.py` without configuration, Ray or dataset.

The losses of `motip.train.step.TrainStep` for one clip on one GPU, on synthetic clips; requires torch, torchvision,
numpy and scipy only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from motip.data.batch import ClipBatch, IdSlots
from motip.data.id_labels import SLOT_FIELDS, IdSettings, draw_id_slots
from motip.model import MOTIP, ModelSpec, build_model
from motip.train.frames import FramePlan
from motip.train.losses import BatchCounts, LossSettings, clip_losses
from motip.train.oom import OomFallback

AERIAL = ModelSpec(num_classes=2, num_id_vocabulary=150, use_decoder_checkpoint=True)
"""The network of configs/visdrone_stage2.yaml."""

TINY = ModelSpec(
    num_classes=2,
    backbone="tiny_gn",
    num_queries=12,
    num_feature_levels=3,
    hidden_dim=32,
    num_heads=4,
    enc_layers=1,
    dec_layers=2,
    dim_feedforward=32,
    feature_dim=32,
    id_dim=32,
    head_dim=16,
    num_id_vocabulary=6,
    num_id_decoder_layers=2,
    rel_pe_length=8,
)


FALLBACKS = (
    OomFallback("as configured", FramePlan(4, 5), True),
    OomFallback("detector recomputed", FramePlan(4, 2, recompute=True), True),
    OomFallback("one image at a time", FramePlan(4, 1, recompute=True), True),
    OomFallback("image at 75%", FramePlan(4, 1, recompute=True), True, 0.75),
)
"""Out-of-memory fallbacks of configs/visdrone_stage2.yaml for clips of five frames."""


def noise_clip(spec: ModelSpec, frames: int, objects: int, size_hw: tuple[int, int]) -> ClipBatch:
    """One clip of noise with the same objects in every frame, on the host."""
    rng = np.random.default_rng(0)
    settings = IdSettings(
        groups=6,
        vocabulary=spec.num_id_vocabulary,
        training_ids=spec.num_id_vocabulary,
        overflow="distractor",
        occlusion_prob=0.5,
        switch_prob=0.5,
    )
    slots = draw_id_slots([np.arange(objects)] * frames, settings, rng)
    boxes = np.hstack([rng.uniform(0.1, 0.9, (objects, 2)), rng.uniform(0.01, 0.05, (objects, 2))]).astype(np.float32)
    classes = torch.from_numpy(rng.integers(0, spec.num_classes, objects))
    return ClipBatch(
        images=torch.from_numpy(rng.integers(0, 256, (1, frames, 3, *size_hw), dtype=np.uint8)),
        masks=torch.zeros(1, frames, *size_hw, dtype=torch.bool),
        boxes_cxcywh=[[torch.from_numpy(boxes)] * frames],
        classes=[[classes] * frames],
        ignore_cxcywh=[[torch.empty(0, 4)] * frames],
        slots=IdSlots(**{name: torch.from_numpy(getattr(slots, name))[None] for name in SLOT_FIELDS}),
        names=["noise"],
        weights=torch.ones(1),
        distractors=slots.distractors,
        dropped=slots.dropped,
    )


class Step:
    """A model with its optimiser; each call moves one clip to the device and trains on it.

    Args:
        half: autocast type, None for float32.
        compiled: arguments of ``torch.compile`` for the detector; None: not compiled.
    """

    def __init__(
        self, spec: ModelSpec, device: torch.device, half: torch.dtype | None, compiled: dict[str, Any] | None = None
    ) -> None:
        torch.manual_seed(0)
        self.model: MOTIP = build_model(spec).to(device).train()
        if compiled is not None:
            self.model.detr.compile(**compiled)
        self.loss = LossSettings(autocast_dtype=half)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=5e-4)

    def __call__(self, batch: ClipBatch, fallback: OomFallback) -> float:
        """The loss before the step."""
        order = list(range(batch.images.shape[1]))
        loss = clip_losses(self.model, batch, order, fallback, self.loss, BatchCounts.of(batch)).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
