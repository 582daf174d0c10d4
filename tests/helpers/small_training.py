"""Small network and clips for tests of training."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from motip.config import Config
from motip.data.batch import ClipBatch, IdSlots
from motip.model import MOTIP, ModelSpec, build_model

GROUPS, SLOTS, VOCABULARY = 2, 4, 6


def small_config(**changes: Any) -> Config:
    return Config.from_dict(
        {
            "BACKBONE": "tiny_gn",
            "NUM_CLASSES": 2,
            "DETR_HIDDEN_DIM": 32,
            "FEATURE_DIM": 32,
            "ID_DIM": 32,
            "HEAD_DIM": 16,
            "DETR_NUM_HEADS": 4,
            "DETR_NUM_QUERIES": 10,
            "DETR_NUM_FEATURE_LEVELS": 3,
            "DETR_ENC_LAYERS": 1,
            "DETR_DEC_LAYERS": 2,
            "DETR_DIM_FEEDFORWARD": 32,
            "NUM_ID_DECODER_LAYERS": 2,
            "NUM_ID_VOCABULARY": VOCABULARY,
            "REL_PE_LENGTH": 8,
            "SAMPLE_LENGTHS": [3],
            "DETR_NUM_TRAIN_FRAMES": 2,
            "DETR_NUM_CHECKPOINT_FRAMES": 0,
            "LR_WARMUP_EPOCHS": 0,
            "MIXED_PRECISION": "no",
            **changes,
        }
    )


def small_model(config: Config, seed: int = 0) -> MOTIP:
    torch.manual_seed(seed)
    return build_model(ModelSpec.from_config(config)).train()


def clip(seed: int, counts: tuple[int, ...] = (3, 2, 4), height: int = 48, width: int = 64) -> ClipBatch:
    """One clip; object n of a frame is ID slot n, every group has different labels."""
    generator = torch.Generator().manual_seed(seed)
    length = len(counts)
    masks = torch.zeros(1, length, height, width, dtype=torch.bool)
    masks[..., width - 8 :] = True
    annotation = torch.full((1, GROUPS, length, SLOTS), -1)
    for t, count in enumerate(counts):
        annotation[:, :, t, :count] = torch.arange(count)[:SLOTS]
    absent = annotation < 0
    labels = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:SLOTS] for _ in range(GROUPS)])
    labels = labels[None, :, None].expand(1, GROUPS, length, SLOTS).clone()
    seen_before = (~absent).cumsum(2) - (~absent).long() > 0
    return ClipBatch(
        images=torch.randint(0, 256, (1, length, 3, height, width), generator=generator, dtype=torch.uint8),
        masks=masks,
        boxes_cxcywh=[[torch.rand(n, 4, generator=generator) * 0.3 + 0.3 for n in counts]],
        classes=[[torch.randint(2, (n,), generator=generator) for n in counts]],
        ignore_cxcywh=[[torch.empty(0, 4) for _ in counts]],
        slots=IdSlots(
            trajectory_labels=labels,
            trajectory_masks=absent,
            trajectory_ann=annotation,
            unknown_labels=torch.where(seen_before, labels, VOCABULARY),
            unknown_masks=absent.clone(),
            unknown_ann=annotation.clone(),
        ),
        names=[f"clip {seed}"],
        weights=torch.ones(1),
    )


def together(*clips: ClipBatch) -> ClipBatch:
    """The clips as one batch."""
    slots = [clip.slots for clip in clips if clip.slots is not None]
    return ClipBatch(
        images=torch.cat([clip.images for clip in clips]),
        masks=torch.cat([clip.masks for clip in clips]),
        boxes_cxcywh=[boxes for clip in clips for boxes in clip.boxes_cxcywh],
        classes=[classes for clip in clips for classes in clip.classes],
        ignore_cxcywh=[regions for clip in clips for regions in clip.ignore_cxcywh],
        slots=IdSlots(**{f.name: torch.cat([getattr(s, f.name) for s in slots]) for f in fields(IdSlots)}),
        names=[name for clip in clips for name in clip.names],
        weights=torch.cat([clip.weights for clip in clips]),
    )


def gradients(model: MOTIP) -> dict[str, torch.Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(
    found: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor | None], tolerance: float = 1e-5
) -> None:
    """Equal to `tolerance` of each tensor's largest entry (or of a hundredth of the largest gradient)."""
    largest = max(g.abs().max().item() for g in expected.values() if g is not None)
    for name, gradient in expected.items():
        other = found[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            scale = max(gradient.abs().max().item(), 1e-2 * largest)
            assert (gradient - other).abs().max().item() <= tolerance * scale, name
