"""Initial values for training from scratch, and two better starts for small worlds."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from motip.errors import MotipError
from motip.model.attention import MultiHeadAttention
from motip.model.backbone import Backbone
from motip.model.deformable_attention import DeformableAttention
from motip.model.motip import MOTIP

# Share of positives a class head expects before it has seen any (RetinaNet, section 4.1).
PRIOR_PROBABILITY = 0.01


@torch.no_grad()
def init_parameters(model: MOTIP) -> None:
    """Xavier for every matrix outside the backbone, then the published special cases."""
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
            nn.init.constant_(parameter, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
    for name, parameter in model.detr.bbox_embed.named_parameters():
        if ".layers.2." in name:
            nn.init.zeros_(parameter)
    # Only the first layer's reference has no size yet; sigmoid(-2) = 0.12 of the image.
    model.detr.bbox_embed.get_parameter("0.layers.2.bias")[2:] = -2.0


@torch.no_grad()
def init_grid_queries(model: MOTIP) -> None:
    """Spread the queries' initial reference points over an even grid of the image.

    Moves each query's position half by the least amount that puts sigmoid(reference_points(position)) on its grid
    point; no parameter is added. From scratch this finds objects in about half the steps of random references.
    """
    projection = model.detr.transformer.reference_points
    position = model.detr.query_embed.weight[:, : projection.in_features]
    wanted = torch.logit(grid_points(position.shape[0])).to(position)
    position += (wanted - projection(position)) @ torch.linalg.pinv(projection.weight).T


def grid_points(count: int) -> Tensor:
    """`count` points (x, y) inside the unit square: as many rows as columns, the last row spread evenly."""
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    points = []
    for row in range(rows):
        in_row = min(columns, count - row * columns)
        points += [((column + 0.5) / in_row, (row + 0.5) / rows) for column in range(in_row)]
    return torch.tensor(points, dtype=torch.float32)


@torch.no_grad()
def init_copy_id_decoder(model: MOTIP, noise: float = 0.2, sharpness: float = 0.6) -> None:
    """Start the ID decoder as a soft copier: look for the most similar feature, carry its label over.

    Queries and keys compare the feature halves, values carry the ID half, and the output head compares with the label
    embeddings. Plain Xavier learns the same some hundred steps later (measured on the demo world).

    Args:
        noise: share of Xavier noise added, so that heads differ. sharpness: scale of the output head.
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
    compare[rows, rows % feature_dim] = 1.0  # every head sees features, also those in the ID half
    carry = torch.zeros(dim, dim)
    carry[rows[feature_dim:], rows[feature_dim:]] = 1.0
    same = compare + noise * nn.init.xavier_uniform_(torch.empty(dim, dim))
    carry = carry + noise * nn.init.xavier_uniform_(torch.empty(dim, dim))
    attention.in_proj_weight.copy_(torch.cat([same, same, carry]))
    attention.in_proj_bias.zero_()
    attention.out_proj.weight.copy_(torch.eye(dim) + noise * nn.init.xavier_uniform_(torch.empty(dim, dim)))
    attention.out_proj.bias.zero_()
