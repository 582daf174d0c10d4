"""Deformable-DETR of `transformers` with ResNet-50 and the weights of one of our detectors."""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch
from torch import Tensor

from motip.model.detector import DeformableDetr
from motip.model.spec import ModelSpec

# Name in transformers (4 and 5) -> our name.
_RENAMES: list[tuple[str, Any]] = [
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


def twin_of(detector: DeformableDetr, spec: ModelSpec) -> Any:
    """The model of `transformers` in eval mode with all weights of `detector`, a ResNet-50 of this `spec`.

    Raises:
        ImportError: `transformers` is not installed.
    """
    transformers: Any = importlib.import_module("transformers")

    backbone = transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=spec.hidden_dim,
        encoder_layers=spec.enc_layers,
        decoder_layers=spec.dec_layers,
        encoder_ffn_dim=spec.dim_feedforward,
        decoder_ffn_dim=spec.dim_feedforward,
        encoder_attention_heads=spec.num_heads,
        decoder_attention_heads=spec.num_heads,
        num_queries=spec.num_queries,
        num_labels=spec.num_classes,
        with_box_refine=True,
        two_stage=False,
        disable_custom_kernels=True,
    )
    model = transformers.DeformableDetrForObjectDetection(config).eval()
    ours = detector.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "num_batches_tracked" not in name:
                source = _our_tensor(name, ours)
                assert tensor.shape == source.shape, name
                tensor.copy_(source)
    return model
