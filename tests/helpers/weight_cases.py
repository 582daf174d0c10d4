"""Small models and weights files for the tests of motip.weights."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from motip.model import MOTIP, ModelSpec, build_model
from tests.parity.recipe import fill

TINY = ModelSpec(
    backbone="tiny_gn",
    num_classes=1,
    num_queries=10,
    hidden_dim=64,
    num_heads=4,
    enc_layers=1,
    dec_layers=2,
    dim_feedforward=64,
    feature_dim=64,
    id_dim=64,
    head_dim=32,
    num_id_vocabulary=8,
    num_id_decoder_layers=2,
    rel_pe_length=6,
)


def tiny_model(salt: int = 0, **changes: Any) -> MOTIP:
    """A TINY model with deterministic weights that depend on `salt` only."""
    return fill(build_model(replace(TINY, **changes)), salt).eval()  # type: ignore[return-value]


def detector_state(model: MOTIP, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + key: tensor.clone() for key, tensor in model.detr.state_dict().items()}


def save_published(path: Path, state: dict[str, Tensor] | MOTIP) -> Path:
    """A file in the container of the published code."""
    content = state.state_dict() if isinstance(state, MOTIP) else state
    torch.save(
        {"model": content, "optimizer": None, "scheduler": None, "states": {"start_epoch": 3, "global_step": 9}}, path
    )
    return path


def detector_logits(model: MOTIP) -> Tensor:
    """(B,Q,C) of two fixed random images, the second padded.

    In float64, because matrix products of 91 and of 4 columns round differently.
    """
    model = deepcopy(model).double()
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mask = torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[1, :, 100:] = True
    with torch.no_grad():
        return model.detr(images.masked_fill(mask[:, None], 0.0), mask).pred_logits


def identity_inputs(model: MOTIP, labels: int, frames: int = 5, objects: int = 6) -> tuple[Any, ...]:
    """Arguments of the ID decoder: objects with distinct labels below `labels`, some absent."""
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(1, 1, frames, objects, model.spec.feature_dim, generator=generator)
    names = torch.randperm(labels, generator=generator)[:objects].expand(1, 1, frames, objects)
    masks = torch.rand(1, 1, frames, objects, generator=generator) < 0.2
    times = list(range(frames))
    with torch.no_grad():
        return model.trajectory_modeling(features), names, masks, times, features, masks, times
