"""Parameter initialisation: the published one, and two variants for training small networks from scratch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from motip.errors import MotipError
from motip.model.attention import MultiHeadAttention
from motip.model.backbone import Backbone
from motip.model.deformable_attention import DeformableAttention
from motip.model.motip import MOTIP

# Initial probability of a positive in the class heads (RetinaNet, section 4.1).
_PRIOR_PROBABILITY = 0.01


@torch.no_grad()
def init_parameters(model: MOTIP) -> None:
    """Xavier initialisation of all matrices outside the backbone, then the published special cases."""
    in_backbone = {id(p) for m in model.modules() if isinstance(m, Backbone) for p in m.parameters()}
    special = {"rel_pos_embeds", "level_embed", "query_embed.weight"}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in in_backbone and not name.endswith(tuple(special)):
            nn.init.xavier_uniform_(parameter)
    for module in model.modules():
        if isinstance(module, DeformableAttention):
            module.reset_parameters()
    transformer = model.detr.transformer
    nn.init.normal_(transformer.level_embed)
    nn.init.zeros_(transformer.reference_points.bias)
    for convolution in model.detr.input_proj.modules():
        if isinstance(convolution, nn.Conv2d) and convolution.bias is not None:
            nn.init.zeros_(convolution.bias)
    for name, parameter in model.detr.class_embed.named_parameters():
        if name.endswith("bias"):
            nn.init.constant_(parameter, -math.log((1 - _PRIOR_PROBABILITY) / _PRIOR_PROBABILITY))
    for name, parameter in model.detr.bbox_embed.named_parameters():
        if ".layers.2." in name:
            nn.init.zeros_(parameter)
    # The first layer refines points without a size: start from boxes of sigmoid(-2) = 0.12 of the image.
    model.detr.bbox_embed.get_parameter("0.layers.2.bias")[2:] = -2.0


@torch.no_grad()
def init_grid_queries(model: MOTIP) -> None:
    """Place the initial reference points of the queries on a regular grid over the image.

    Least-norm change of each query's position half such that sigmoid(reference_points(position)) is its grid point; no
    parameter is added. From scratch, detection converges in about half the steps of random references.
    """
    projection = model.detr.transformer.reference_points
    position = model.detr.query_embed.weight[:, : projection.in_features]
    target = torch.logit(grid_points(position.shape[0])).to(position)
    position += (target - projection(position)) @ torch.linalg.pinv(projection.weight).T


def grid_points(count: int) -> Tensor:
    """(count, 2) points (x, y) in the unit square on a square grid, the last row spread evenly."""
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    points = []
    for row in range(rows):
        in_row = min(columns, count - row * columns)
        points += [((column + 0.5) / in_row, (row + 0.5) / rows) for column in range(in_row)]
    return torch.tensor(points, dtype=torch.float32)


@torch.no_grad()
def init_copy_id_decoder(model: MOTIP, noise: float = 0.2, sharpness: float = 0.6) -> None:
    """Initialise the ID decoder to copy the label of the most similar trajectory feature.

    Queries and keys compare the feature halves, values carry the ID half, and the output head compares with the label
    embeddings. Xavier initialisation learns the same some hundred steps later (measured on the demo dataset).

    Args:
        noise: share of Xavier noise added, so that heads differ.
        sharpness: scale of the output head.

    Raises:
        MotipError: the model has no ID decoder (ONLY_DETR).
    """
    decoder = model.id_decoder
    if decoder is None:
        raise MotipError("the model has no ID decoder to initialise", where="ONLY_DETR", found=True, expected=False)
    spec = model.spec
    words = torch.randn_like(decoder.word_to_embed.weight)
    words /= words.square().mean(0, keepdim=True).sqrt()
    decoder.word_to_embed.weight.copy_(words)
    for head in decoder.embed_to_word_layers.parameters():
        head.copy_(words.T * (sharpness / math.sqrt(spec.id_dim)))
    for attention in decoder.cross_attn_layers.modules():
        if isinstance(attention, MultiHeadAttention):
            _copy_attention(attention, spec.feature_dim, noise)


def _copy_attention(attention: MultiHeadAttention, feature_dim: int, noise: float) -> None:
    dim = attention.dim
    rows = torch.arange(dim)
    compare = torch.zeros(dim, dim)
    compare[rows, rows % feature_dim] = 1.0  # all heads compare features, also those of the ID half
    carry = torch.zeros(dim, dim)
    carry[rows[feature_dim:], rows[feature_dim:]] = 1.0
    same = compare + noise * nn.init.xavier_uniform_(torch.empty(dim, dim))
    carry = carry + noise * nn.init.xavier_uniform_(torch.empty(dim, dim))
    attention.in_proj_weight.copy_(torch.cat([same, same, carry]))
    attention.in_proj_bias.zero_()
    attention.out_proj.weight.copy_(torch.eye(dim) + noise * nn.init.xavier_uniform_(torch.empty(dim, dim)))
    attention.out_proj.bias.zero_()
