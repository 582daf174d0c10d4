"""Naive training step, the baseline of `bench_step`: a direct implementation of the papers with PyTorch's own modules.

Frozen parameters (conv1 and layer1 of the backbone) have no gradient and frames without gradient run under `no_grad`;
otherwise it is not optimised for speed or memory:

* frames pass the detector one by one, with torchvision's ResNet-50 and frozen batch norm;
* deformable attention is one `grid_sample` per level; the samples of all levels are concatenated and then weighted;
* `nn.MultiheadAttention` for the queries, heads on every decoder layer of every frame;
* costs, Hungarian matching and losses frame by frame and layer by layer, with torchvision's loss functions;
* ID slots are looked up group by group and frame by frame; the ID decoder is the one of `bench_id_decoder`, with
  attention maps and masks materialised;
* PyTorch's AdamW with default options.

Shared with `motip` are modules without alternatives: MLP heads, sine position encoding, inverse sigmoid, and the
feed-forward layers of trajectory modelling. Parameters have the published names.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.models.resnet import resnet50
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss
from torchvision.ops.misc import FrozenBatchNorm2d

from benchmarks.bench_id_decoder import NaiveIdDecoder
from motip.data.batch import ClipBatch
from motip.model.id_decoder import IdDecoder, TrajectoryModeling
from motip.model.position import SinePositionEncoding
from motip.model.spec import ModelSpec
from motip.model.transformer import MLP, inverse_sigmoid
from tests.parity.recipe import fill

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
DEVIATION = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
Shapes = list[tuple[int, int]]


class NaiveDeformableAttention(nn.Module):
    """Equation 3 of Deformable DETR."""

    def __init__(self, spec: ModelSpec, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = spec.num_heads, spec.num_feature_levels, points
        samples = self.heads * self.levels * points
        self.sampling_offsets = nn.Linear(spec.hidden_dim, 2 * samples)
        self.attention_weights = nn.Linear(spec.hidden_dim, samples)
        self.value_proj = nn.Linear(spec.hidden_dim, spec.hidden_dim)
        self.output_proj = nn.Linear(spec.hidden_dim, spec.hidden_dim)

    def forward(self, query: Tensor, reference: Tensor, pixels: Tensor, shapes: Shapes, padding: Tensor) -> Tensor:
        """query (B,Q,D), reference (B,Q,levels,2 or 4), pixels (B,S,D), padding (B,S)."""
        batch, queries, dim = query.shape
        value = self.value_proj(pixels).masked_fill(padding[..., None], 0.0)
        value = value.view(batch, -1, self.heads, dim // self.heads)
        offsets = self.sampling_offsets(query).view(batch, queries, self.heads, self.levels, self.points, 2)
        weights = self.attention_weights(query).view(batch, queries, self.heads, -1).softmax(-1)
        reference = reference[:, :, None, :, None]
        if reference.shape[-1] == 2:
            sizes = torch.tensor([[width, height] for height, width in shapes])
            locations = reference + offsets / sizes[:, None]
        else:
            locations = reference[..., :2] + offsets / self.points * reference[..., 2:] * 0.5
        grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B*heads, Q, levels, points, 2)
        sampled = []
        levels = value.split([height * width for height, width in shapes], 1)
        for number, (level, shape) in enumerate(zip(levels, shapes, strict=True)):
            image = level.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, shape)
            sampled.append(F.grid_sample(image, grids[:, :, number], align_corners=False))
        weights = weights.transpose(1, 2).flatten(0, 1).unsqueeze(1)  # (B*heads, 1, Q, levels*points)
        summed = (torch.cat(sampled, -1) * weights).sum(-1)
        return self.output_proj(summed.view(batch, dim, queries).transpose(1, 2))


class NaiveEncoderLayer(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        dim = spec.hidden_dim
        self.self_attn = NaiveDeformableAttention(spec, spec.enc_points)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.linear1, self.linear2 = nn.Linear(dim, spec.dim_feedforward), nn.Linear(spec.dim_feedforward, dim)

    def forward(self, pixels: Tensor, position: Tensor, reference: Tensor, shapes: Shapes, padding: Tensor) -> Tensor:
        pixels = self.norm1(pixels + self.self_attn(pixels + position, reference, pixels, shapes, padding))
        return self.norm2(pixels + self.linear2(self.linear1(pixels).relu()))


class NaiveDecoderLayer(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        dim = spec.hidden_dim
        self.self_attn = nn.MultiheadAttention(dim, spec.num_heads, batch_first=True)
        self.cross_attn = NaiveDeformableAttention(spec, spec.dec_points)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.linear1, self.linear2 = nn.Linear(dim, spec.dim_feedforward), nn.Linear(spec.dim_feedforward, dim)

    def forward(
        self, target: Tensor, position: Tensor, reference: Tensor, memory: Tensor, shapes: Shapes, padding: Tensor
    ) -> Tensor:
        with_position = target + position
        target = self.norm2(target + self.self_attn(with_position, with_position, target)[0])
        target = self.norm1(target + self.cross_attn(target + position, reference, memory, shapes, padding))
        return self.norm3(target + self.linear2(self.linear1(target).relu()))


class _Encoder(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.layers = nn.ModuleList(NaiveEncoderLayer(spec) for _ in range(spec.enc_layers))


class _Decoder(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        dim = spec.hidden_dim
        self.layers = nn.ModuleList(NaiveDecoderLayer(spec) for _ in range(spec.dec_layers))
        self.bbox_embed = nn.ModuleList(MLP(dim, dim, 4, 3) for _ in range(spec.dec_layers))


class _Transformer(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.empty(spec.num_feature_levels, spec.hidden_dim))
        self.encoder, self.decoder = _Encoder(spec), _Decoder(spec)
        self.reference_points = nn.Linear(spec.hidden_dim, 2)


class _Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
        del self.body.avgpool, self.body.fc
        for name, parameter in self.body.named_parameters():
            parameter.requires_grad_(name.startswith(("layer2", "layer3", "layer4")))

    def forward(self, image: Tensor) -> list[Tensor]:
        body = self.body
        x = body.layer1(body.maxpool(body.relu(body.bn1(body.conv1(image)))))
        maps = [body.layer2(x)]
        maps.append(body.layer3(maps[-1]))
        return [*maps, body.layer4(maps[-1])]


class FrameOutput(NamedTuple):
    """Outputs of one frame: logits (L,Q,C) and boxes (L,Q,4) of the L decoder layers, last hidden states (Q,D)."""

    logits: Tensor
    boxes: Tensor
    hidden: Tensor


class NaiveDetector(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        dim = spec.hidden_dim
        self.transformer = _Transformer(spec)
        self.class_embed = nn.ModuleList(nn.Linear(dim, spec.num_classes) for _ in range(spec.dec_layers))
        self.query_embed = nn.Embedding(spec.num_queries, 2 * dim)
        channels = [512, 1024, 2048]
        projections: list[nn.Module] = [nn.Conv2d(channel, dim, 1) for channel in channels]
        projections.append(nn.Conv2d(channels[-1], dim, 3, stride=2, padding=1))
        self.input_proj = nn.ModuleList(nn.Sequential(each, nn.GroupNorm(32, dim)) for each in projections)
        self.backbone = nn.ModuleList([_Backbone(), SinePositionEncoding(dim)])

    def forward(self, image: Tensor, mask: Tensor) -> FrameOutput:
        """image (3,H,W) normalised, mask (H,W) True on padding."""
        backbone, position_of = self.backbone
        maps = backbone(image[None])
        maps = [project(each) for project, each in zip(self.input_proj, [*maps, maps[-1]], strict=True)]
        masks = [F.interpolate(mask[None, None].float(), size=each.shape[-2:])[0].bool() for each in maps]
        shapes = [(each.shape[-2], each.shape[-1]) for each in maps]
        ratios = torch.stack([_ratio(each) for each in masks], 1)
        pixels = torch.cat([each.flatten(2).transpose(1, 2) for each in maps], 1)
        padding = torch.cat([each.flatten(1) for each in masks], 1)
        embeds = self.transformer.level_embed
        position = torch.cat(
            [position_of(each).flatten(2).transpose(1, 2) + embed for each, embed in zip(masks, embeds, strict=True)], 1
        )
        centres = _centres(shapes, ratios)
        for layer in self.transformer.encoder.layers:
            pixels = layer(pixels, position, centres, shapes, padding)
        return self._decode(pixels, shapes, padding, ratios)

    def _decode(self, pixels: Tensor, shapes: Shapes, padding: Tensor, ratios: Tensor) -> FrameOutput:
        query, target = self.query_embed.weight[None].chunk(2, -1)
        reference = self.transformer.reference_points(query).sigmoid()
        logits, boxes = [], []
        decoder = self.transformer.decoder
        for layer, box_head, class_head in zip(decoder.layers, decoder.bbox_embed, self.class_embed, strict=True):
            scale = ratios if reference.shape[-1] == 2 else torch.cat([ratios, ratios], -1)
            target = layer(target, query, reference[:, :, None] * scale[:, None], pixels, shapes, padding)
            change = box_head(target)
            before = inverse_sigmoid(reference)
            if reference.shape[-1] == 2:
                change = torch.cat([change[..., :2] + before, change[..., 2:]], -1)
            else:
                change = change + before
            boxes.append(change.sigmoid()[0])
            logits.append(class_head(target)[0])
            reference = boxes[-1][None].detach()
        return FrameOutput(torch.stack(logits), torch.stack(boxes), target[0])


def _ratio(mask: Tensor) -> Tensor:
    """mask (1,h,w) -> (1,2), unpadded share of width and height."""
    return torch.stack([(~mask[:, 0]).float().mean(1), (~mask[:, :, 0]).float().mean(1)], -1)


def _centres(shapes: Shapes, ratios: Tensor) -> Tensor:
    """Pixel centres in the coordinates of each level: (1, S, levels, 2)."""
    found = []
    for level, (height, width) in enumerate(shapes):
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        own = torch.stack([x.flatten() / width, y.flatten() / height], -1)
        found.append(own[None] / ratios[:, level, None])
    return torch.cat(found, 1)[:, :, None] * ratios[:, None]


class NaiveStep:
    """Model, losses and optimiser; a call is one training step on a batch of one clip."""

    def __init__(self, spec: ModelSpec, salt: int, train_frames: int, max_norm: float, weight_decay: float) -> None:
        self.detr = NaiveDetector(spec)
        self.modeling = TrajectoryModeling(spec)
        fill(self.detr, salt, "detr.")
        fill(self.modeling, salt, "trajectory_modeling.")
        filled = IdDecoder(spec)
        fill(filled, salt, "id_decoder.")
        self.decoder = NaiveIdDecoder(spec)
        self.decoder.copy_from(filled)
        self.newborn = spec.num_id_vocabulary
        self.train_frames = train_frames
        self.max_norm = max_norm
        self.detr_parameters = [parameter for parameter in self.detr.parameters() if parameter.requires_grad]
        self.other_parameters = [*self.modeling.parameters(), *self.decoder.parameters()]
        # Learning rate 0: complete arithmetic, equal weights in every repeat.
        self.optimizer = torch.optim.AdamW(
            [*self.detr_parameters, *self.other_parameters], lr=0.0, weight_decay=weight_decay
        )

    def __call__(self, batch: ClipBatch, order: list[int]) -> dict[str, float]:
        """Losses by published name, and both gradient norms before clipping."""
        found: list[FrameOutput | None] = [None] * len(order)
        for position, frame in enumerate(order):
            with torch.set_grad_enabled(position < self.train_frames):
                image = (batch.images[0, frame].float() / 255 - MEAN) / DEVIATION
                mask = batch.masks[0, frame]
                found[frame] = self.detr(image.masked_fill(mask, 0.0), mask)
        frames = [each for each in found if each is not None]
        losses, matched = detection_losses(frames, batch.boxes_cxcywh[0], batch.classes[0])
        detection = torch.stack([_weight(name) * value for name, value in losses.items()]).sum()
        identity = self._id_loss(batch, [each.hidden for each in frames], matched)
        loss = detection + identity
        loss.backward()
        norms = {
            "detr_grad_norm": nn.utils.clip_grad_norm_(self.detr_parameters, self.max_norm),
            "other_grad_norm": nn.utils.clip_grad_norm_(self.other_parameters, self.max_norm),
        }
        self.optimizer.step()
        self.optimizer.zero_grad()
        metrics = {"loss": loss, "detr_loss": detection, "id_loss": identity, **losses, **norms}
        return {name: float(value.detach()) for name, value in metrics.items()}

    def _id_loss(self, batch: ClipBatch, hidden: list[Tensor], matched: list[Tensor]) -> Tensor:
        """ID loss of the objects of all frames but the first."""
        slots = batch.slots
        assert slots is not None
        history = _features(hidden, matched, slots.trajectory_ann[0], slots.trajectory_masks[0])
        objects = _features(hidden, matched, slots.unknown_ann[0], slots.unknown_masks[0])
        labels = slots.trajectory_labels[0]
        labels = torch.where(labels < 0, self.newborn, labels)
        logits = self.decoder(
            self.modeling(history), labels, slots.trajectory_masks[0], objects, slots.unknown_masks[0]
        )
        labels_now = slots.unknown_labels[0].masked_fill(slots.unknown_masks[0], -100)[:, 1:]
        count = int((labels_now >= 0).sum())
        summed = F.cross_entropy(logits[:, 1:].flatten(0, 2), labels_now.flatten(), reduction="sum", ignore_index=-100)
        return summed / max(count, 1)


def _features(hidden: list[Tensor], matched: list[Tensor], annotation: Tensor, masks: Tensor) -> Tensor:
    """(G,T,N,D): the hidden state matched to each slot's annotation, zero where the slot is absent."""
    groups = []
    for group in range(annotation.shape[0]):
        frames = []
        for frame, (states, queries) in enumerate(zip(hidden, matched, strict=True)):
            absent = masks[group, frame] | (annotation[group, frame] < 0)
            own = states[queries[annotation[group, frame].clamp(min=0)]]
            frames.append(own.masked_fill(absent[:, None], 0.0))
        groups.append(torch.stack(frames))
    return torch.stack(groups)


def detection_losses(
    frames: list[FrameOutput], boxes_cxcywh: list[Tensor], classes: list[Tensor]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Losses of every layer by published name, and per frame the matched queries of the objects in the last layer."""
    objects = max(1, sum(len(each) for each in boxes_cxcywh))
    losses: dict[str, Tensor] = {}
    matched: list[Tensor] = []
    layers = len(frames[0].logits)
    for layer in range(layers):
        suffix = "" if layer + 1 == layers else f"_{layer}"
        of_frames = [
            _frame_losses(found.logits[layer], found.boxes[layer], boxes, own)
            for found, boxes, own in zip(frames, boxes_cxcywh, classes, strict=True)
        ]
        matched = [queries for _, queries in of_frames]
        for name in ("loss_ce", "loss_bbox", "loss_giou"):
            losses[name + suffix] = torch.stack([each[name] for each, _ in of_frames]).sum() / objects
    return losses, matched


def _frame_losses(
    logits: Tensor, boxes: Tensor, target_boxes: Tensor, target_classes: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    corners = box_convert(boxes, "cxcywh", "xyxy")
    target_corners = box_convert(target_boxes, "cxcywh", "xyxy")
    with torch.no_grad():
        probability = logits.sigmoid()[:, target_classes]
        positive = 0.25 * (1 - probability) ** 2 * -(probability + 1e-8).log()
        negative = 0.75 * probability**2 * -(1 - probability + 1e-8).log()
        distance = torch.cdist(boxes, target_boxes, p=1)
        cost = 5 * distance + 2 * (positive - negative) - 2 * generalized_box_iou(corners, target_corners)
    found, of_objects = (torch.from_numpy(each) for each in linear_sum_assignment(cost.numpy()))
    one_hot = torch.zeros_like(logits)
    one_hot[found, target_classes[of_objects]] = 1.0
    overlap = torch.diag(generalized_box_iou(corners[found], target_corners[of_objects]))
    queries = torch.empty(len(target_boxes), dtype=torch.long)
    queries[of_objects] = found
    losses = {
        "loss_ce": sigmoid_focal_loss(logits, one_hot, alpha=0.25, gamma=2, reduction="sum"),
        "loss_bbox": (boxes[found] - target_boxes[of_objects]).abs().sum(),
        "loss_giou": (1 - overlap).sum(),
    }
    return losses, queries


def _weight(name: str) -> float:
    return 5.0 if name.startswith("loss_bbox") else 2.0
