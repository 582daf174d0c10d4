"""An oracle any user can install: `transformers`' Deformable-DETR with our weights gives our outputs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from motip.model import build_model
from motip.model.spec import ModelSpec
from tests.parity.recipe import fill, image, padded_batch

transformers = pytest.importorskip("transformers")

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

# Their name -> ours; both spellings of the names that changed between transformers 4 and 5.
_RENAMES = [
    (r"^model\.backbone\.(?:conv_encoder\.)?model\.", "backbone.0.body."),
    (r"embedder\.embedder\.convolution", "conv1"),
    (r"embedder\.embedder\.normalization", "bn1"),
    (r"encoder\.stages\.(\d)\.layers", lambda m: f"layer{int(m[1]) + 1}"),
    (r"layer\.(\d)\.convolution", lambda m: f"conv{int(m[1]) + 1}"),
    (r"layer\.(\d)\.normalization", lambda m: f"bn{int(m[1]) + 1}"),
    (r"shortcut\.convolution", "downsample.0"),
    (r"shortcut\.normalization", "downsample.1"),
    (r"^model\.input_proj", "input_proj"),
    (r"^model\.query_position_embeddings", "query_embed"),
    (r"^model\.(level_embed|encoder|decoder|reference_points)", r"transformer.\1"),
    (r"encoder\.layers\.(\d)\.self_attn_layer_norm", r"encoder.layers.\1.norm1"),
    (r"encoder\.layers\.(\d)\.final_layer_norm", r"encoder.layers.\1.norm2"),
    (r"decoder\.layers\.(\d)\.self_attn_layer_norm", r"decoder.layers.\1.norm2"),
    (r"decoder\.layers\.(\d)\.encoder_attn_layer_norm", r"decoder.layers.\1.norm1"),
    (r"decoder\.layers\.(\d)\.final_layer_norm", r"decoder.layers.\1.norm3"),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"(?:mlp\.)?fc([12])\.", r"linear\1."),
    (r"self_attn\.(?:o|out)_proj", "self_attn.out_proj"),
]


def _our_tensor(name: str, ours: dict[str, Tensor]) -> Tensor:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    packed = re.match(r"(.*decoder.*self_attn)\.([qkv])_proj\.(weight|bias)", name)
    if packed:
        return ours[f"{packed[1]}.in_proj_{packed[3]}"].chunk(3)["qkv".index(packed[2])]
    return ours[name]


def _theirs(ours: dict[str, Tensor]) -> Any:
    backbone = transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=_SPEC.hidden_dim,
        encoder_layers=_SPEC.enc_layers,
        decoder_layers=_SPEC.dec_layers,
        encoder_ffn_dim=_SPEC.dim_feedforward,
        decoder_ffn_dim=_SPEC.dim_feedforward,
        encoder_attention_heads=_SPEC.num_heads,
        decoder_attention_heads=_SPEC.num_heads,
        num_queries=_SPEC.num_queries,
        num_labels=_SPEC.num_classes,
        with_box_refine=True,
        two_stage=False,
        disable_custom_kernels=True,
    )
    model = transformers.DeformableDetrForObjectDetection(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "num_batches_tracked" not in name:
                source = _our_tensor(name, ours)
                assert tensor.shape == source.shape, name
                tensor.copy_(source)
    return model


def test_detector_agrees_with_transformers() -> None:
    model = fill(build_model(_SPEC), salt=11).eval()
    images, mask = padded_batch([image(1, 96, 121), image(2, 73, 90)])
    theirs = _theirs(model.detr.state_dict())
    with torch.no_grad():
        ours = model.detr(images, mask)
        expected = theirs(pixel_values=images, pixel_mask=(~mask).long())
    assert (ours.pred_logits - expected.logits).abs().max() < 1e-4
    assert (ours.pred_boxes - expected.pred_boxes).abs().max() < 1e-4
    assert (ours.outputs - expected.last_hidden_state).abs().max() < 1e-4
