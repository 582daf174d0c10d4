"""MOTIP network: both backbones, gradients, initialisation, compilation, bfloat16."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from motip.errors import MotipError
from motip.model import MOTIP, ModelSpec, build_model
from motip.model.fast.frame_decoder import FrameDecoder
from motip.model.initialisation import grid_points, init_copy_id_decoder, init_grid_queries


def _demo_spec(**changes: Any) -> ModelSpec:
    sizes: dict[str, Any] = {
        "num_classes": 2,
        "backbone": "tiny_gn",
        "num_feature_levels": 3,
        "hidden_dim": 64,
        "feature_dim": 64,
        "id_dim": 64,
        "head_dim": 16,
        "num_heads": 4,
        "enc_layers": 1,
        "dec_layers": 2,
        "dim_feedforward": 128,
        "num_queries": 12,
        "num_id_vocabulary": 8,
        "num_id_decoder_layers": 2,
    }
    return ModelSpec(**{**sizes, **changes})


def _images(batch: int = 2, height: int = 50, width: int = 70) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.zeros(batch, height, width, dtype=torch.bool)
    mask[-1, :, width - 9 :] = True
    return torch.randn(batch, 3, height, width, generator=generator).masked_fill(mask[:, None], 0.0), mask


@pytest.mark.parametrize("levels", [3, 4])
def test_tiny_backbone_has_the_strides_of_resnet50(levels: int) -> None:
    model = build_model(_demo_spec(num_feature_levels=levels))
    maps = model.detr.backbone[0](*_images(height=64, width=96))
    assert [(features.shape[1], *features.shape[2:]) for features, _ in maps] == [(64, 8, 12), (96, 4, 6), (128, 2, 3)]
    assert [tuple(mask.shape) for _, mask in maps] == [(2, 8, 12), (2, 4, 6), (2, 2, 3)]
    assert len(model.detr.input_proj) == levels
    assert all(key.startswith("detr.backbone.0.body.") for key in model.state_dict() if "backbone" in key)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("levels", [3, 4])
def test_detector_output_and_gradients(levels: int) -> None:
    model = build_model(_demo_spec(num_feature_levels=levels))
    out = model.detr(*_images())
    assert out.pred_logits.shape == (2, 12, 2) and out.pred_boxes.shape == (2, 12, 4)
    assert out.outputs.shape == (2, 12, 64) and len(out.aux) == 1
    assert ((out.pred_boxes >= 0) & (out.pred_boxes <= 1)).all()
    loss = out.pred_logits.square().sum() + out.pred_boxes.sum() + out.outputs.sum()
    (loss + sum(logits.square().sum() + boxes.sum() for logits, boxes in out.aux)).backward()
    without_gradient = [name for name, p in model.detr.named_parameters() if p.grad is None]
    assert without_gradient == []


def test_aux_outputs_are_empty_without_aux_loss() -> None:
    assert build_model(_demo_spec(detr_aux_loss=False)).detr(*_images()).aux == []


def test_valid_ratios_are_the_unpadded_share_of_each_side() -> None:
    model = build_model(_demo_spec()).eval()
    mask = torch.ones(1, 64, 128, dtype=torch.bool)
    mask[:, :32, :96] = False
    ratios: list[Tensor] = []
    model.detr.transformer.encoder.register_forward_hook(lambda _, args, __: ratios.append(args[3]))
    with torch.no_grad():
        model.detr(torch.zeros(1, 3, 64, 128), mask)
    torch.testing.assert_close(ratios[0], torch.tensor([0.75, 0.5]).expand(1, 3, 2))


def test_initial_biases_and_embeddings() -> None:
    model = build_model(_demo_spec(dec_layers=3))
    for head in model.detr.class_embed:
        assert torch.allclose(head.bias, torch.full((2,), -math.log(99.0)))
    biases = [head.layers[-1].bias.tolist() for head in model.detr.bbox_embed]
    assert biases == [[0.0, 0.0, -2.0, -2.0], [0.0] * 4, [0.0] * 4]
    assert all((head.layers[-1].weight == 0).all() for head in model.detr.bbox_embed)
    assert (model.id_decoder.rel_pos_embeds == 0).all()
    level_embed = build_model(_demo_spec(hidden_dim=512, feature_dim=512)).detr.transformer.level_embed
    assert 0.8 < level_embed.std() < 1.2


@pytest.mark.parametrize("count", [1, 7, 12, 40, 100])
def test_grid_queries_change_the_reference_points_only(count: int) -> None:
    model = build_model(_demo_spec(num_queries=count))
    content = model.detr.query_embed.weight[:, 64:].clone()
    init_grid_queries(model)
    found = model.detr.transformer.reference_points(model.detr.query_embed.weight[:, :64]).sigmoid()
    torch.testing.assert_close(found, grid_points(count), atol=1e-4, rtol=0.0)
    assert torch.equal(model.detr.query_embed.weight[:, 64:], content)
    assert len({tuple(point) for point in grid_points(count).tolist()}) == count


def test_copy_initialisation_copies_labels_without_training() -> None:
    torch.manual_seed(0)
    model = build_model(_demo_spec())
    init_copy_id_decoder(model)
    objects = F.normalize(torch.randn(6, 64), dim=-1) * 8.0
    labels = torch.tensor([3, 0, 7, 1, 5, 2])
    assert model.trajectory_modeling is not None and model.id_decoder is not None
    decoder = FrameDecoder(model.trajectory_modeling, model.id_decoder)
    history = decoder.encode_history(objects, labels)
    logits = decoder.decode(objects + 0.1 * torch.randn(6, 64), history, torch.ones(6, dtype=torch.long))
    assert torch.equal(logits[:, :8].argmax(-1), labels)
    with pytest.raises(MotipError, match="no ID decoder"):
        init_copy_id_decoder(build_model(_demo_spec(only_detr=True)))


def test_the_detector_compiles_in_one_graph() -> None:
    model = build_model(_demo_spec()).eval()
    images, mask = _images()
    compiled = torch.compile(model.detr, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected, found = model.detr(images, mask), compiled(images, mask)
    torch.testing.assert_close(found.pred_logits, expected.pred_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, atol=1e-5, rtol=1e-5)


def test_bfloat16_autocast_trains_like_float32() -> None:
    losses = {enabled: _train(enabled, steps=200) for enabled in (False, True)}
    assert torch.isfinite(losses[True]).all()
    assert losses[False][-20:].mean() < 0.9 * losses[False][:20].mean(), "the loss must decrease"
    windows = [losses[enabled].view(10, 20).mean(1) for enabled in (True, False)]
    assert ((windows[0] - windows[1]).abs() / windows[1]).max() < 0.02


def _train(bfloat16: bool, steps: int) -> Tensor:
    torch.manual_seed(0)
    model: MOTIP = build_model(_demo_spec(only_detr=True, num_queries=6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(1, 32, 48, dtype=torch.bool)
    losses = []
    for _ in range(steps):
        images = torch.randn(1, 3, 32, 48, generator=generator)
        boxes = torch.rand(1, 6, 4, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            out = model.detr(images, mask)
        predictions = [(out.pred_logits, out.pred_boxes), *out.aux]
        loss = sum(
            F.l1_loss(b.float(), boxes) + F.binary_cross_entropy_with_logits(x.float(), torch.full_like(x.float(), 0.3))
            for x, b in predictions
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)
