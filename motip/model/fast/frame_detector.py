"""Detector for inference, frame by frame.

Equal to `DeformableDetr` in eval mode to rounding, and faster (docs/performance.md): batch norms are folded into the
convolutions, weights are packed (on a GPU: cast to the compute type), images are channels last, constants of the frame
size are computed once, and prediction heads run only where the last layer's predictions need them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motip.model.backbone import TinyGroupNormBody, resize_mask
from motip.model.deformable_attention import DeformableAttention, best_implementation, log_implementation
from motip.model.detector import DeformableDetr, DetectorOutput
from motip.model.fast.frame_attention import FrameAttention
from motip.model.fast.gpu_attention import GpuAttention
from motip.model.fast.packed import PackedConv, PackedLinear, can_pack
from motip.model.transformer import MLP, DecoderLayer, EncoderLayer, encoder_reference_points, refine, valid_ratio

ROWS = 5000
"""Pixels per chunk of an encoder layer on a CPU. Larger intermediate tensors need new memory pages from the system;
many small chunks cost more than they gain by staying in the cache."""

Detector = Callable[[Tensor, Tensor], DetectorOutput]
Attention = Callable[[DeformableAttention, torch.dtype], Any]
"""Constructor of a `FrameAttention` or a `GpuAttention`."""


def prepare_for_inference(detector: DeformableDetr, dtype: torch.dtype = torch.float32) -> Detector:
    """A `FrameDetector` where supported, else `detector` itself.

    Not supported: on a CPU weights or a `dtype` that cannot be packed (``can_pack``); on a GPU weights other than
    float32, or no Triton kernels; an implementation of deformable attention other than ``auto``; weights that are not
    finite, because oneDNN's ReLU maps NaN to 0 and would hide from the tracker that a model has diverged.
    """
    ready = log_implementation() == "auto" and all(_can_prepare(each, dtype) for each in detector.parameters())
    if ready and all(bool(each.isfinite().all()) for each in detector.state_dict().values()):
        return FrameDetector(detector, dtype)
    return detector


def _can_prepare(weight: Tensor, dtype: torch.dtype) -> bool:
    if weight.device.type == "cuda":
        return weight.dtype == torch.float32 and best_implementation(weight.device) == "triton"
    return can_pack(weight, dtype)


class FrameDetector:
    """Detector with packed weights for inference on frames of one size.

    A snapshot of the weights: create a new one after they change. It copies most of them (160 MB for a ResNet-50 in
    float32, half of it in bfloat16) and keeps the constants of the frame size (70 MB at 800x1333). It has no state of a
    sequence.

    Args:
        detector: see `prepare_for_inference`.
        dtype: type of products and convolutions, float32 or half precision; norms, sampling locations and sums over
            samples are in float32.
        for_gpu: use the GPU form; None: decided by the device of the weights.
    """

    @torch.no_grad()
    def __init__(
        self, detector: DeformableDetr, dtype: torch.dtype = torch.float32, for_gpu: bool | None = None
    ) -> None:
        on_gpu = detector.query_embed.weight.device.type == "cuda"
        self._for_gpu = on_gpu if for_gpu is None else for_gpu
        modules: Any = detector  # attributes of a module have no static types
        transformer = modules.transformer
        backbone, self._position = modules.backbone
        body = backbone.body
        self._body = body if isinstance(body, TinyGroupNormBody) else _packed(body, dtype)
        self._projections = [(PackedConv(convolution, dtype), norm) for convolution, norm in modules.input_proj]
        self._level_embed = transformer.level_embed.detach()
        attention = GpuAttention if self._for_gpu else FrameAttention
        self._encoder = [_EncoderLayer.of(layer, attention, dtype) for layer in transformer.encoder.layers]
        heads = transformer.decoder.bbox_embed
        layers = zip(transformer.decoder.layers, heads, strict=True)
        self._decoder = [_DecoderLayer.of(layer, head, attention, dtype) for layer, head in layers]
        self._class_head = PackedLinear.of(modules.class_embed[-1], dtype)
        # Position half, then content half.
        self._query_position, self._query = modules.query_embed.weight.detach().chunk(2, -1)
        self._first_points = transformer.reference_points(self._query_position).sigmoid()
        self._frame: _Frame | None = None

    @torch.inference_mode()
    def __call__(self, images: Tensor, mask: Tensor) -> DetectorOutput:
        """images (B,3,H,W) normalised, mask (B,H,W) bool, True on padding; ``aux`` of the result is empty."""
        padded = mask.flatten(1).any(1).tolist()  # first, while a GPU has no queued work to wait for
        maps = [each.contiguous(memory_format=torch.channels_last) for each in self._body(images)]
        levels = [
            norm(project(maps[min(index, len(maps) - 1)]).float())
            for index, (project, norm) in enumerate(self._projections)
        ]
        pixels = torch.cat([level.permute(0, 2, 3, 1).flatten(1, 2) for level in levels], 1)
        outputs = []
        for own, own_mask, own_padded in zip(pixels, mask, padded, strict=True):
            outputs.append(self._detect(own, self._constants(levels, own_mask[None], own_padded)))
        logits, boxes, hidden = (torch.stack(parts) for parts in zip(*outputs, strict=True))
        return DetectorOutput(logits, boxes, hidden, aux=[])

    def _detect(self, pixels: Tensor, frame: _Frame) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (Q,C), boxes (Q,4) and hidden states (Q,D) of one image; pixels (S,D) are overwritten."""
        for layer in self._encoder:
            layer(pixels, frame)
        hidden, reference = self._query, self._first_points
        for decoder_layer in self._decoder:
            hidden, reference = decoder_layer(hidden, self._query_position, reference, pixels, frame)
        return self._class_head(hidden), reference, hidden

    def _constants(self, levels: list[Tensor], mask: Tensor, padded: bool) -> _Frame:
        """Constants of the size and padding of an image, mask (1,H,W); cached for images without padding."""
        shapes = [(level.shape[2], level.shape[3]) for level in levels]
        if not padded and self._frame is not None and self._frame.maps.shapes == shapes:
            return self._frame
        masks = [resize_mask(mask, level) for level in levels]
        positions = [self._position(each)[0].flatten(1).T for each in masks]
        position = torch.cat([each + embed for each, embed in zip(positions, self._level_embed, strict=True)])
        attention = [layers[0].attention for layers in (self._encoder, self._decoder)]
        maps = attention[0].maps(shapes, position)
        encoder, decoder = (maps.sampler(each.points) for each in attention)
        ratios = torch.stack([valid_ratio(each)[0] for each in masks])
        frame = _Frame(
            maps=maps,
            position=position,
            locations=encoder.locations(encoder_reference_points(shapes, ratios[None])[0]),
            padding=torch.cat([each.flatten() for each in masks]) if padded else None,
            ratios=ratios,
            encoder=encoder,
            decoder=decoder,
            rows=len(position) if self._for_gpu else ROWS,
        )
        if not padded:
            self._frame = frame
        return frame


@dataclass(frozen=True, slots=True)
class _Frame:
    """Constants of the size and padding of an image with S pixels on all levels.

    Attributes:
        maps: value maps of the attention.
        position: (S,D) position encoding plus level embedding.
        locations: base sampling locations of the S pixels, see ``locations`` of the sampler.
        padding: (S,) True on padding; None without padding.
        ratios: (levels, 2), see ``valid_ratio``.
        encoder, decoder: their samplers.
        rows: pixels per chunk of an encoder layer.
    """

    maps: Any
    position: Tensor
    locations: Tensor
    padding: Tensor | None
    ratios: Tensor
    encoder: Any
    decoder: Any
    rows: int


@dataclass(frozen=True, slots=True)
class _EncoderLayer:
    attention: Any
    norm1: nn.Module
    linear1: PackedLinear
    linear2: PackedLinear
    norm2: nn.Module

    @classmethod
    def of(cls, layer: EncoderLayer, attention: Attention, dtype: torch.dtype) -> _EncoderLayer:
        linear1, linear2 = (PackedLinear.of(linear, dtype) for linear in (layer.linear1, layer.linear2))
        return cls(attention(layer.self_attn, dtype), layer.norm1, linear1, linear2, layer.norm2)

    def __call__(self, pixels: Tensor, frame: _Frame) -> None:
        """Overwrite pixels (S,D), which are not read by other pixels once their values are in the table."""
        table = self.attention.table(frame.maps, pixels, frame.padding)
        parts = -(-len(pixels) // frame.rows)
        in_parts = (each.chunk(parts) for each in (pixels, frame.position, frame.locations))
        for own, position, locations in zip(*in_parts, strict=True):
            attended = self.norm1(self.attention(frame.encoder, table, own + position, locations, None, own))
            own.copy_(self.norm2(self.linear2.linear_add(self.linear1(attended, relu=True), attended)))


@dataclass(frozen=True, slots=True)
class _DecoderLayer:
    query_key: PackedLinear
    value: PackedLinear
    merge: PackedLinear
    heads: int
    norm2: nn.Module
    attention: Any
    norm1: nn.Module
    linear1: PackedLinear
    linear2: PackedLinear
    norm3: nn.Module
    box_head: list[PackedLinear]

    @classmethod
    def of(cls, layer: DecoderLayer, box_head: MLP, attention: Attention, dtype: torch.dtype) -> _DecoderLayer:
        own = layer.self_attn
        both = 2 * own.dim
        return cls(
            query_key=PackedLinear(own.in_proj_weight[:both], own.in_proj_bias[:both], dtype),
            value=PackedLinear(own.in_proj_weight[both:], own.in_proj_bias[both:], dtype),
            merge=PackedLinear.of(own.out_proj, dtype),
            heads=own.heads,
            norm2=layer.norm2,
            attention=attention(layer.cross_attn, dtype),
            norm1=layer.norm1,
            linear1=PackedLinear.of(layer.linear1, dtype),
            linear2=PackedLinear.of(layer.linear2, dtype),
            norm3=layer.norm3,
            box_head=[PackedLinear.of(linear, dtype) for linear in box_head.layers],  # type: ignore[arg-type]
        )

    def __call__(
        self, hidden: Tensor, position: Tensor, reference: Tensor, memory: Tensor, frame: _Frame
    ) -> tuple[Tensor, Tensor]:
        """hidden, position (Q,D), reference (Q,2) or (Q,4), memory (S,D) -> hidden states (Q,D) and boxes (Q,4)."""
        hidden = self.norm2(self.merge.linear_add(self._self_attention(hidden, position), hidden))
        table = self.attention.table(frame.maps, memory, frame.padding)
        locations = frame.decoder.locations(reference[:, None, :2] * frame.ratios)
        scales = frame.decoder.scales(reference[:, None, 2:] * frame.ratios) if reference.shape[1] == 4 else None
        hidden = self.norm1(self.attention(frame.decoder, table, hidden + position, locations, scales, hidden))
        hidden = self.norm3(self.linear2.linear_add(self.linear1(hidden, relu=True), hidden))
        offsets = hidden
        for linear in self.box_head[:-1]:
            offsets = linear(offsets, relu=True)
        return hidden, refine(self.box_head[-1](offsets).float(), reference)

    def _self_attention(self, hidden: Tensor, position: Tensor) -> Tensor:
        query, key = self.query_key(hidden + position).unflatten(-1, (2, self.heads, -1)).transpose(0, 2).unbind(1)
        value = self.value(hidden).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        attended = F.scaled_dot_product_attention(query[None], key[None], value[None])
        return attended[0].transpose(0, 1).flatten(1)


def _packed(body: Any, dtype: torch.dtype) -> Callable[[Tensor], list[Tensor]]:
    from motip.model.fast.frame_backbone import PackedResNet  # imports torchvision, see `resnet`

    return PackedResNet(body, dtype)
