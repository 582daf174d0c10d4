"""Detector against the Deformable-DETR of `transformers` with the same weights."""

from __future__ import annotations

import pytest
import torch

from motip.model import build_model
from motip.model.spec import ModelSpec
from tests.helpers.transformers_twin import twin_of
from tests.parity.recipe import fill, image, padded_batch

pytest.importorskip("transformers")

_SPEC = ModelSpec(
    num_classes=3,
    enc_layers=2,
    dec_layers=2,
    hidden_dim=64,
    feature_dim=64,
    num_queries=20,
    dim_feedforward=128,
    num_heads=8,
    only_detr=True,
)


def test_detector_agrees_with_transformers() -> None:
    model = fill(build_model(_SPEC), salt=11).eval()
    images, mask = padded_batch([image(1, 96, 121), image(2, 73, 90)])
    theirs = twin_of(model.detr, _SPEC)
    with torch.no_grad():
        ours = model.detr(images, mask)
        expected = theirs(pixel_values=images, pixel_mask=(~mask).long())
    assert (ours.pred_logits - expected.logits).abs().max() < 1e-4
    assert (ours.pred_boxes - expected.pred_boxes).abs().max() < 1e-4
    assert (ours.outputs - expected.last_hidden_state).abs().max() < 1e-4
