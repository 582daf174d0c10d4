"""A small MOTIP whose ID decoder matches features exactly, and scripted detections for it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from motip.model import ModelSpec, build_model
from motip.model.motip import MOTIP
from tests.parity import recipe

WIDTH = 64


def following_model(vocabulary: int = 8, rel_pe_length: int = 12, classes: int = 2, queries: int = 16) -> MOTIP:
    """An ID decoder that copies the label of the history token most like the detection (``recipe``, copy weights)."""
    spec = ModelSpec(
        num_classes=classes,
        backbone="tiny_gn",
        num_queries=queries,
        hidden_dim=WIDTH,
        num_heads=4,
        feature_dim=WIDTH,
        id_dim=WIDTH,
        enc_layers=1,
        dec_layers=1,
        dim_feedforward=32,
        num_id_vocabulary=vocabulary,
        rel_pe_length=rel_pe_length,
    )
    torch.manual_seed(0)
    model = build_model(spec).eval()
    weights = recipe.copy_id_decoder_weights(model, 0)
    for key in weights:
        # Narrow tokens give weaker logits than the full-size ones of the recipe.
        if "embed_to_word" in key:
            weights[key] = weights[key] * 20
    model.load_state_dict(weights, strict=False)
    return model


def features(count: int) -> Tensor:
    """(count, WIDTH) dissimilar feature vectors: every two have a negative inner product.

    Each half of the vector separates the objects, because each attention head reads one half.
    """
    assert count <= WIDTH // 2
    simplex = torch.eye(count) - 1.0 / count
    vectors = torch.zeros(count, WIDTH)
    vectors[:, :count] = simplex
    vectors[:, WIDTH // 2 : WIDTH // 2 + count] = simplex
    return vectors * 100


def detections(
    objects: list[int], all_features: Tensor, scores: list[float] | None = None, classes: list[int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (n, 2), boxes (n, 4) and embeds (n, WIDTH) with exactly these objects."""
    scores = scores or [0.9] * len(objects)
    classes = classes or [0] * len(objects)
    logits = torch.full((len(objects), 2), -10.0)
    for row, (value, class_id) in enumerate(zip(scores, classes, strict=True)):
        logits[row, class_id] = float(np.log(value / (1 - value)))
    boxes = torch.tensor([[0.1 + 0.05 * number, 0.5, 0.04, 0.2] for number in objects]).reshape(-1, 4)
    return logits, boxes, all_features[torch.tensor(objects, dtype=torch.long)]
