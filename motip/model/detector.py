"""Deformable DETR with iterative box refinement (Deformable DETR, sections 4.1 and 4.2)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from motip.model.backbone import Backbone, resize_mask
from motip.model.ops import Linear, PointwiseConv
from motip.model.position import SinePositionEncoding
from motip.model.spec import ModelSpec
from motip.model.transformer import DeformableTransformer, FeatureLevel


class DetectorOutput(NamedTuple):
    """Predictions for B images with Q queries.

    Attributes:
        pred_logits: (B,Q,C) before the sigmoid, no background class.
        pred_boxes: (B,Q,4) cxcywh in 0..1 of the padded image.
        outputs: (B,Q,D) hidden state of the last decoder layer, input of the ID decoder.
        aux: (logits, boxes) of the earlier decoder layers, first layer first; empty with DETR_AUX_LOSS False.
    """

    pred_logits: Tensor
    pred_boxes: Tensor
    outputs: Tensor
    aux: list[tuple[Tensor, Tensor]]


class DeformableDetr(nn.Module):
    """Backbone, input projections, deformable transformer and prediction heads under the published keys."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        dim = spec.hidden_dim
        self.aux_loss = spec.detr_aux_loss
        # The order of these attributes is the order of the published state dict and optimiser.
        self.transformer = DeformableTransformer(spec)
        self.class_embed = nn.ModuleList(Linear(dim, spec.num_classes) for _ in range(spec.dec_layers))
        self.bbox_embed = self.transformer.decoder.bbox_embed
        self.query_embed = nn.Embedding(spec.num_queries, 2 * dim)
        backbone = Backbone(spec)
        self.input_proj = nn.ModuleList(_projections(backbone.channels, dim, spec.num_feature_levels))
        self.backbone = nn.ModuleList([backbone, SinePositionEncoding(dim)])

    def forward(self, images: Tensor, mask: Tensor) -> DetectorOutput:
        """images (B,3,H,W) normalised, mask (B,H,W) bool, True on padding."""
        decoded = self.transformer(self._levels(images, mask), self.query_embed.weight)
        predictions = [
            (head(hidden), boxes)
            for head, hidden, boxes in zip(self.class_embed, decoded.hidden, decoded.references_out, strict=True)
        ]
        logits, boxes = predictions[-1]
        return DetectorOutput(logits, boxes, decoded.hidden[-1], predictions[:-1] if self.aux_loss else [])

    def _levels(self, images: Tensor, mask: Tensor) -> list[FeatureLevel]:
        """Projected feature maps with mask and position encoding, finest first."""
        body, position = self.backbone
        maps = body(images, mask)
        levels = []
        for index, projection in enumerate(self.input_proj):
            features = projection(maps[min(index, len(maps) - 1)][0])
            level_mask = maps[index][1] if index < len(maps) else resize_mask(mask, features)
            levels.append(FeatureLevel(features, level_mask, position(level_mask)))
        return levels


def _projections(channels: tuple[int, ...], dim: int, levels: int) -> list[nn.Module]:
    """1x1 convolution per backbone map; each further level is a 3x3 stride-2 convolution of the coarsest raw map."""
    projections: list[nn.Module] = []
    for level in range(levels):
        if level < len(channels):
            convolution: nn.Conv2d = PointwiseConv(channels[level], dim)
        else:
            convolution = nn.Conv2d(channels[-1], dim, 3, stride=2, padding=1)
        projections.append(nn.Sequential(convolution, nn.GroupNorm(32, dim)))
    return projections
