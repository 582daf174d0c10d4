"""The detector for one frame after the other, as a tracker needs it.

It gives what `DeformableDetr` gives in eval mode, to rounding, in less time (docs/performance.md): batch norms are
folded into the convolutions, weights are packed (on a card: in the type of the products), images lie channels last,
what depends on the size of the frames alone is computed once, and of the heads only those that the last layer's answer
needs are run.
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
from motip.model.fast.gpu_attention import CardAttention
from motip.model.fast.packed import PackedConv, PackedLinear, can_pack
from motip.model.transformer import MLP, DecoderLayer, EncoderLayer, encoder_reference_points, refine, valid_ratio

ROWS = 5000
"""Most pixels that go through an encoder layer at a time. With all at once, what lies between two products would need
new pages from the system; many small parts cost more than they gain by staying in the cache."""

Detector = Callable[[Tensor, Tensor], DetectorOutput]
Attention = Callable[[DeformableAttention, torch.dtype], Any]
"""Makes a `FrameAttention` or a `CardAttention`."""


def prepare_for_inference(detector: DeformableDetr, dtype: torch.dtype = torch.float32) -> Detector:
    """A `FrameDetector` where there can be one, else `detector` itself.

    There is none on a CPU for weights or a type that cannot be packed (``can_pack``), on a card without the Triton
    kernels or for weights that are not float32, nor where a certain implementation of deformable attention was asked
    for, nor for weights that are not finite: oneDNN's ReLU makes 0 of what is no number, which would hide from the
    tracker that a model has diverged.
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
    """A detector with its weights made ready for inference on frames of one size.

    Make it once per sequence, and anew when the weights have changed. It holds a copy of most of them (160 MB for a
    ResNet-50 in float32, half of it in bfloat16) and, from the first frame on, the constants of the size of its frames
    (70 MB at 800x1333). It remembers nothing of a sequence.

    Args:
        detector: see `prepare_for_inference`.
        dtype: float32, or half precision for products and convolutions; norms, sampling locations and sums over samples
            stay in float32.
        for_gpu: prepare as for a GPU, whatever the device; None: as for the device that the weights are on.
    """

    @torch.no_grad()
    def __init__(
        self, detector: DeformableDetr, dtype: torch.dtype = torch.float32, for_gpu: bool | None = None
    ) -> None:
        on_card = detector.query_embed.weight.device.type == "cuda"
        self._for_gpu = on_card if for_gpu is None else for_gpu
        modules: Any = detector  # a module's attributes have no types of their own
        transformer = modules.transformer
        backbone, self._position = modules.backbone
        body = backbone.body
        self._body = body if isinstance(body, TinyGroupNormBody) else _packed(body, dtype)
        self._projections = [(PackedConv(convolution, dtype), norm) for convolution, norm in modules.input_proj]
        self._level_embed = transformer.level_embed.detach()
        attention = CardAttention if self._for_gpu else FrameAttention
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
        """images (B,3,H,W) normalised, mask (B,H,W) bool True on padding; ``aux`` is empty."""
        padded = mask.flatten(1).any(1).tolist()  # asked while a card has nothing else to finish first
        maps = [each.contiguous(memory_format=torch.channels_last) for each in self._body(images)]
        levels = [
            norm(project(maps[min(index, len(maps) - 1)]).float())
            for index, (project, norm) in enumerate(self._projections)
        ]
        pixels = torch.cat([level.permute(0, 2, 3, 1).flatten(1, 2) for level in levels], 1)
        found = []
        for own, own_mask, own_padded in zip(pixels, mask, padded, strict=True):
            found.append(self._detect(own, self._constants(levels, own_mask[None], own_padded)))
        logits, boxes, hidden = (torch.stack(parts) for parts in zip(*found, strict=True))
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
        """What depends on the size and the padding of an image (1,H,W); kept for the next image if there is none."""
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
            places=encoder.places(encoder_reference_points(shapes, ratios[None])[0]),
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
    """What depends on the size of an image and its padding alone, S pixels on all levels together.

    position (S,D), the level's embedding added; places of S pixels, see ``places`` of the sampler; padding (S,) True on
    padding, None without; ratios (levels, 2), see ``valid_ratio``; rows, most pixels to encode at a time.
    """

    maps: Any
    position: Tensor
    places: Tensor
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
        """Overwrite pixels (S,D): once the values are in the table, a pixel is read for itself alone."""
        table = self.attention.table(frame.maps, pixels, frame.padding)
        parts = -(-len(pixels) // frame.rows)
        in_parts = (each.chunk(parts) for each in (pixels, frame.position, frame.places))
        for own, position, places in zip(*in_parts, strict=True):
            attended = self.norm1(self.attention(frame.encoder, table, own + position, places, None, own))
            own.copy_(self.norm2(self.linear2.plus(self.linear1(attended, relu=True), attended)))


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
        """hidden, position (Q,D), reference (Q,2) or (Q,4), memory (S,D) -> hidden states and boxes (Q,4)."""
        hidden = self.norm2(self.merge.plus(self._among_queries(hidden, position), hidden))
        table = self.attention.table(frame.maps, memory, frame.padding)
        places = frame.decoder.places(reference[:, None, :2] * frame.ratios)
        steps = frame.decoder.steps(reference[:, None, 2:] * frame.ratios) if reference.shape[1] == 4 else None
        hidden = self.norm1(self.attention(frame.decoder, table, hidden + position, places, steps, hidden))
        hidden = self.norm3(self.linear2.plus(self.linear1(hidden, relu=True), hidden))
        offsets = hidden
        for linear in self.box_head[:-1]:
            offsets = linear(offsets, relu=True)
        return hidden, refine(self.box_head[-1](offsets).float(), reference)

    def _among_queries(self, hidden: Tensor, position: Tensor) -> Tensor:
        query, key = self.query_key(hidden + position).unflatten(-1, (2, self.heads, -1)).transpose(0, 2).unbind(1)
        value = self.value(hidden).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        attended = F.scaled_dot_product_attention(query[None], key[None], value[None])
        return attended[0].transpose(0, 1).flatten(1)


def _packed(body: Any, dtype: torch.dtype) -> Callable[[Tensor], list[Tensor]]:
    from motip.model.fast.frame_backbone import PackedResNet  # with torchvision, see `resnet`

    return PackedResNet(body, dtype)
