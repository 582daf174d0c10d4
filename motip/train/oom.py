"""What a training step does when a card runs out of memory: the same clip again with less memory and more time.

A ladder of rungs, each needing less memory than the one before. All rungs but the last give the same gradients; the
last one shows the clip at three quarters of its size. MEMORY_EFFICIENT: True allows the ladder, else there is one rung.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motip.config import Config
from motip.data.batch import ClipBatch
from motip.model import MOTIP
from motip.train.frames import FramePlan

SMALLER = 0.75
"""Side of the image on the last rung, as a share of the configured one."""

OBJECT_BUCKETS = (10, 25, 50, 100)
"""Borders of the counts of skipped clips, in objects of a clip's most crowded frame."""

_REMEMBERED = 32

_MESSAGES = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate memory")


@dataclass(frozen=True)
class Rung:
    """One way to compute a clip.

    Attributes:
        name: for messages.
        plan: images at a time through the detector, and whether they are computed again in the backward pass.
        recompute_decoder: layers of the ID decoder are computed again in the backward pass.
        scale: size of the image as a share of the configured one.
    """

    name: str
    plan: FramePlan
    recompute_decoder: bool
    scale: float = 1.0


def ladder(config: Config) -> tuple[Rung, ...]:
    """The rungs of a configuration, from the fastest to the one that needs least memory; one without MEMORY_EFFICIENT.

    A rung that would compute what the one before it does is left out.
    """
    frames, chunk = config.DETR_NUM_TRAIN_FRAMES, config.DETR_NUM_CHECKPOINT_FRAMES
    configured = Rung("as configured", FramePlan(frames, chunk), config.USE_DECODER_CHECKPOINT)
    if not config.MEMORY_EFFICIENT:
        return (configured,)
    # Of the longest clip: of a shorter one, half of DETR_NUM_TRAIN_FRAMES may be all, and computing all of it again at
    # once needs as much memory as computing it once.
    trained = min(
        frames, max(length for epoch in range(config.EPOCHS) for length in config.clip_schedule(epoch).lengths)
    )
    half = max(1, min(chunk or trained, trained // 2))
    again = Rung("detector recomputed", FramePlan(frames, half, recompute=True), configured.recompute_decoder)
    single = replace(again, name="one image at a time", plan=FramePlan(frames, 1, recompute=True))
    decoder = replace(single, name="ID decoder recomputed", recompute_decoder=True)
    rungs = [configured]
    for rung in (again, single, decoder):
        before = rungs[-1]
        if (rung.plan, rung.recompute_decoder) != (before.plan, before.recompute_decoder):
            rungs.append(rung)
    return (*rungs, replace(decoder, name=f"image at {SMALLER:.0%}", scale=SMALLER))


class MemoryOfFailures:
    """Where clips of which size ran out of memory, so that the next such clip does not try in vain.

    Kept per rank and not saved: it changes the time a clip takes, never what comes out, since no clip starts on a rung
    that changes the image.
    """

    def __init__(self, rungs: tuple[Rung, ...]) -> None:
        self._failed: list[list[tuple[int, int]]] = [[] for _ in rungs]
        self._last = max(index for index, rung in enumerate(rungs) if rung.scale == 1.0)

    def first_rung(self, size: tuple[int, int]) -> int:
        """The first rung on which no clip with at most these pixels and ID slots has failed."""
        for index in range(self._last):
            if not any(pixels <= size[0] and slots <= size[1] for pixels, slots in self._failed[index]):
                return index
        return self._last

    def add(self, rung: int, size: tuple[int, int]) -> None:
        self._failed[rung] = [*self._failed[rung], size][-_REMEMBERED:]


def batch_size(batch: ClipBatch) -> tuple[int, int]:
    """Pixels and ID slots of a batch: what its memory grows with."""
    slots = 0 if batch.slots is None else batch.slots.trajectory_ann.numel()
    return batch.masks.numel(), slots


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device (or a library on it, or the host) has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _MESSAGES)


def give_back_memory(device: torch.device) -> None:
    """Free what a failed attempt leaves: cycles that hold tensors, and the cache's fragments. Only after a failure."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class SetAside:
    """The gradients gathered so far, out of reach of a backward pass that may fail half-way.

    The pass writes into fresh tensors; `merge` adds them to the gathered ones, `restore` drops them. Costs one more
    set of gradients (4 bytes per parameter) for the second and later batches of an accumulation, nothing otherwise.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._gathered = [parameter.grad for parameter in self._parameters]
        self.drop()

    def drop(self) -> None:
        """Forget what the last pass wrote."""
        for parameter in self._parameters:
            parameter.grad = None

    def merge(self) -> None:
        for parameter, gathered in zip(self._parameters, self._gathered, strict=True):
            if gathered is not None:
                parameter.grad = gathered if parameter.grad is None else gathered.add_(parameter.grad)

    def restore(self) -> None:
        for parameter, gathered in zip(self._parameters, self._gathered, strict=True):
            parameter.grad = gathered


@contextlib.contextmanager
def decoder_as(model: MOTIP, rung: Rung) -> Iterator[None]:
    """The ID decoder keeps or recomputes its layers as the rung says."""
    decoder = model.id_decoder
    if decoder is None or decoder.spec.use_decoder_checkpoint == rung.recompute_decoder:
        yield
        return
    before = decoder.spec
    decoder.spec = replace(before, use_decoder_checkpoint=rung.recompute_decoder)
    try:
        yield
    finally:
        decoder.spec = before


def shrunk(batch: ClipBatch, scale: float) -> ClipBatch:
    """The batch with smaller images. Boxes are shares of the image's sides and stay as they are.

    Each clip's own part of the padded image is resized, so that its borders stay where the boxes say.
    """
    if scale == 1.0:
        return batch
    sizes = [_own_size(mask[0]) for mask in batch.masks]
    smaller = [(max(1, round(h * scale)), max(1, round(w * scale))) for h, w in sizes]
    height, width = (max(side) for side in zip(*smaller, strict=True))
    clips, length = batch.images.shape[:2]
    images = batch.images.new_zeros(clips, length, 3, height, width)
    masks = batch.masks.new_ones(clips, length, height, width)
    for index, ((h, w), (new_h, new_w)) in enumerate(zip(sizes, smaller, strict=True)):
        for frame in range(length):  # one at a time: as floats an image takes four times its bytes
            own = batch.images[index, frame : frame + 1, :, :h, :w].float()
            resized = F.interpolate(own, size=(new_h, new_w), mode="bilinear", antialias=True)
            images[index, frame, :, :new_h, :new_w] = resized[0].round_().clamp_(0, 255).to(images.dtype)
        masks[index, :, :new_h, :new_w] = False
    return replace(batch, images=images, masks=masks)


def _own_size(mask: Tensor) -> tuple[int, int]:
    """Height and width of the part of an image that is not padding."""
    return int((~mask[:, 0]).sum()), int((~mask[0]).sum())


def crowd(batch: ClipBatch) -> list[int]:
    """Objects in the most crowded frame of each clip."""
    return [max((len(frame) for frame in clip), default=0) for clip in batch.boxes_cxcywh]


def object_bucket(objects: int) -> str:
    """The name of the counter that a skipped clip with this many objects in a frame goes to."""
    low = 0
    for border in OBJECT_BUCKETS:
        if objects < border:
            return f"{low}_to_{border - 1}"
        low = border
    return f"{low}_or_more"
