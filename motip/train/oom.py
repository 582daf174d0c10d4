"""Out-of-memory fallbacks of a training step: the same clip again with less memory and more time.

Each fallback needs less memory than the one before. All but the last give the same gradients; the last trains the clip
at three quarters of its image size. MEMORY_EFFICIENT: True enables them. `OomRetry` leads a rank through them.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motip.data.batch import ClipBatch
from motip.model import MOTIP
from motip.train.collectives import ProcessGroup
from motip.train.frames import FramePlan

if TYPE_CHECKING:
    from motip.config import Config

_log = logging.getLogger(__name__)

_REDUCED_SCALE = 0.75
"""Side of the image in the last fallback, as a fraction of the configured one."""

_OBJECT_BUCKETS = (10, 25, 50, 100)
"""Bounds of the buckets in which skipped clips are counted, in objects of a clip's most crowded frame."""

_HISTORY_LENGTH = 32

_MESSAGES = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate memory")


@dataclass(frozen=True)
class OomFallback:
    """One way to compute a clip.

    Attributes:
        name: for messages.
        plan: images per detector pass, and whether they are recomputed in the backward pass.
        recompute_decoder: layers of the ID decoder are recomputed in the backward pass.
        scale: side of the image as a fraction of the configured one.
    """

    name: str
    plan: FramePlan
    recompute_decoder: bool
    scale: float = 1.0


def oom_fallbacks(config: Config) -> tuple[OomFallback, ...]:
    """The fallbacks of a configuration, from the fastest (as configured) to the one that needs the least memory.

    Without MEMORY_EFFICIENT only the first. A fallback that would compute the same as the one before it is omitted.
    """
    frames, chunk = config.DETR_NUM_TRAIN_FRAMES, config.DETR_NUM_CHECKPOINT_FRAMES
    configured = OomFallback("as configured", FramePlan(frames, chunk), config.USE_DECODER_CHECKPOINT)
    if not config.MEMORY_EFFICIENT:
        return (configured,)
    # Half of the longest clip's frames: recomputing all frames in one chunk would save no memory.
    trained = min(
        frames, max(length for epoch in range(config.EPOCHS) for length in config.clip_schedule(epoch).lengths)
    )
    half = max(1, min(chunk or trained, trained // 2))
    recomputed = OomFallback(
        "detector recomputed", FramePlan(frames, half, recompute=True), configured.recompute_decoder
    )
    single = replace(recomputed, name="one image at a time", plan=FramePlan(frames, 1, recompute=True))
    decoder = replace(single, name="ID decoder recomputed", recompute_decoder=True)
    fallbacks = [configured]
    for fallback in (recomputed, single, decoder):
        before = fallbacks[-1]
        if (fallback.plan, fallback.recompute_decoder) != (before.plan, before.recompute_decoder):
            fallbacks.append(fallback)
    return (*fallbacks, replace(decoder, name=f"image at {_REDUCED_SCALE:.0%}", scale=_REDUCED_SCALE))


class OomHistory:
    """Sizes of clips that ran out of memory, by fallback, so that similar clips start with a later fallback.

    Kept per rank and not saved: it affects the time of a clip but not its result, since no clip starts with a fallback
    that changes the image.
    """

    def __init__(self, fallbacks: tuple[OomFallback, ...]) -> None:
        self._failed: list[list[tuple[int, int]]] = [[] for _ in fallbacks]
        self._last = max(index for index, fallback in enumerate(fallbacks) if fallback.scale == 1.0)

    def first_fallback(self, size: tuple[int, int]) -> int:
        """Index of the first fallback with which no clip of at most this many pixels and ID slots has failed."""
        for index in range(self._last):
            if not any(pixels <= size[0] and slots <= size[1] for pixels, slots in self._failed[index]):
                return index
        return self._last

    def add(self, fallback: int, size: tuple[int, int]) -> None:
        self._failed[fallback] = [*self._failed[fallback], size][-_HISTORY_LENGTH:]


def _pixels_and_slots(batch: ClipBatch) -> tuple[int, int]:
    """Number of pixels and of ID slots of a batch; its memory grows with both."""
    slots = 0 if batch.slots is None else batch.slots.trajectory_ann.numel()
    return batch.masks.numel(), slots


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, one of its libraries or the host ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _MESSAGES)


def release_memory(device: torch.device) -> None:
    """Free cycles that hold tensors of a failed step, and the allocator's cache. Slow; only after a failure."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class GradientStash:
    """The gradients accumulated so far, protected from a backward pass that may fail half-way.

    The pass writes into new tensors; `merge` adds them to the accumulated ones, `restore` drops them. Costs one more
    set of gradients (4 bytes per parameter) from the second batch of an accumulation on.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._accumulated = [parameter.grad for parameter in self._parameters]
        self.drop()

    def drop(self) -> None:
        """Drop the gradients of the last pass."""
        for parameter in self._parameters:
            parameter.grad = None

    def merge(self) -> None:
        for parameter, accumulated in zip(self._parameters, self._accumulated, strict=True):
            if accumulated is not None:
                parameter.grad = accumulated if parameter.grad is None else accumulated.add_(parameter.grad)

    def restore(self) -> None:
        for parameter, accumulated in zip(self._parameters, self._accumulated, strict=True):
            parameter.grad = accumulated


class RankState(Enum):
    """Progress of one rank with its clips of a batch."""

    PENDING = auto()
    """To be computed with the rank's fallback."""
    COMPUTED = auto()
    """Its gradient is kept while other ranks retry."""
    FAILED = auto()
    """Out of memory with the rank's fallback."""


class Outcome(Enum):
    """What the ranks agree on after computing a batch."""

    RETRY = auto()
    """The ranks that ran out of memory compute their clips with the next fallback."""
    DONE = auto()
    OUT_OF_MEMORY = auto()
    """A rank failed with its last fallback; all ranks skip the batch."""
    NOT_FINITE = auto()
    """A rank's loss is not finite; all ranks skip the batch."""


class OomRetry:
    """One rank's way through the fallbacks with its clips of a batch.

    The state goes from PENDING to COMPUTED or FAILED in `catch`, and from FAILED back to PENDING in `agree` if the
    outcome is RETRY. The gradients accumulated before stay in `stash` until the batch is merged or skipped.

    Args:
        fallbacks: from the fastest to the one that needs the least memory.
        history: sizes that failed before; selects the first fallback.
        batch: this rank's clips.
        model: whose gradients are computed.
        comm: the ranks; every rank calls `agree` equally often.

    Attributes:
        state: progress with the current fallback.
        failures: of all ranks so far.
        stash: the gradients accumulated before this batch.
    """

    def __init__(
        self,
        fallbacks: tuple[OomFallback, ...],
        history: OomHistory,
        batch: ClipBatch,
        model: nn.Module,
        comm: ProcessGroup,
    ) -> None:
        self._fallbacks = fallbacks
        self._history = history
        self._batch = batch
        self._size = _pixels_and_slots(batch)
        self._device = next(model.parameters()).device
        self._comm = comm
        self._index = history.first_fallback(self._size)
        self.state = RankState.PENDING if batch.names else RankState.COMPUTED  # without clips there is nothing to do
        self.failures = 0
        self.stash = GradientStash(model.parameters())

    @property
    def fallback(self) -> OomFallback:
        return self._fallbacks[self._index]

    @property
    def exhausted(self) -> bool:
        """Whether this rank failed with the last fallback."""
        return self.state is RankState.FAILED and self._index == len(self._fallbacks) - 1

    @contextlib.contextmanager
    def catch(self) -> Iterator[None]:
        """Context in which the clips are computed; it ends early, without an error, if memory runs out."""
        self.state = RankState.COMPUTED
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.state = RankState.FAILED
            self.stash.drop()

    def agree(self, metrics: Tensor) -> tuple[Outcome, list[float]]:
        """Sum the state over the ranks, and fall back if this rank has to.

        Args:
            metrics: this rank's part of the logged values, the loss first.

        Returns:
            the outcome, and the logged values of the global batch, empty if those of a failed rank are missing.
        """
        failed = self.state is RankState.FAILED
        if failed:  # not in `catch`: there the traceback of the error refers to the tensors of the failed pass
            release_memory(self._device)
        flags = metrics.new_tensor([failed, self.exhausted, not failed and not math.isfinite(metrics[0])])
        # One collective for all of them: each waits for the slowest rank.
        sums = self._comm.sum_(torch.cat([flags, metrics])).tolist()
        failures, exhausted, nonfinite = map(int, sums[:3])
        values = [] if failures else sums[3:]
        if nonfinite:  # first: no fallback helps a batch that is skipped for its loss
            return Outcome.NOT_FINITE, values
        self.failures += failures
        if exhausted:
            return Outcome.OUT_OF_MEMORY, values
        if failed:
            self._fall_back()
        return Outcome.RETRY if failures else Outcome.DONE, values

    def _fall_back(self) -> None:
        self._history.add(self._index, self._size)
        self._index += 1
        self.state = RankState.PENDING
        _log.warning(
            "out of memory on rank %d, retrying: %s; %s",
            self._comm.rank,
            self.fallback.name,
            describe_clips(self._batch),
        )


@contextlib.contextmanager
def decoder_recompute(model: MOTIP, fallback: OomFallback) -> Iterator[None]:
    """Inside the block the ID decoder keeps or recomputes its layers as the fallback specifies."""
    decoder = model.id_decoder
    if decoder is None or decoder.spec.use_decoder_checkpoint == fallback.recompute_decoder:
        yield
        return
    before = decoder.spec
    decoder.spec = replace(before, use_decoder_checkpoint=fallback.recompute_decoder)
    try:
        yield
    finally:
        decoder.spec = before


def downscaled(batch: ClipBatch, scale: float) -> ClipBatch:
    """The batch with smaller images. Boxes are fractions of the image's sides and stay unchanged.

    Each clip's unpadded part of the image is resized separately, so that boxes stay aligned with its borders.
    """
    if scale == 1.0:
        return batch
    sizes = [_unpadded_size(mask[0]) for mask in batch.masks]
    smaller = [(max(1, round(h * scale)), max(1, round(w * scale))) for h, w in sizes]
    height, width = (max(side) for side in zip(*smaller, strict=True))
    clips, length = batch.images.shape[:2]
    images = batch.images.new_zeros(clips, length, 3, height, width)
    masks = batch.masks.new_ones(clips, length, height, width)
    for index, ((h, w), (new_h, new_w)) in enumerate(zip(sizes, smaller, strict=True)):
        for frame in range(length):  # one at a time: a float image takes four times its uint8 bytes
            own = batch.images[index, frame : frame + 1, :, :h, :w].float()
            resized = F.interpolate(own, size=(new_h, new_w), mode="bilinear", antialias=True)
            images[index, frame, :, :new_h, :new_w] = resized[0].round_().clamp_(0, 255).to(images.dtype)
        masks[index, :, :new_h, :new_w] = False
    return replace(batch, images=images, masks=masks)


def _unpadded_size(mask: Tensor) -> tuple[int, int]:
    """Height and width of the part of an image that is not padding."""
    return int((~mask[:, 0]).sum()), int((~mask[0]).sum())


def max_objects_per_frame(batch: ClipBatch) -> list[int]:
    """Objects in the most crowded frame of each clip."""
    return [max((len(frame) for frame in clip), default=0) for clip in batch.boxes_cxcywh]


def object_bucket(objects: int) -> str:
    """Name of the counter of skipped clips with this many objects in their most crowded frame."""
    index = bisect_right(_OBJECT_BUCKETS, objects)
    low = (0, *_OBJECT_BUCKETS)[index]
    return f"{low}_to_{_OBJECT_BUCKETS[index] - 1}" if index < len(_OBJECT_BUCKETS) else f"{low}_or_more"


def describe_clips(batch: ClipBatch) -> str:
    """Sequence, frames and objects of the clips, for messages."""
    frames = batch.images.shape[1]
    clips = zip(batch.names, batch.boxes_cxcywh, max_objects_per_frame(batch), strict=True)
    return "; ".join(
        f"{name} ({frames} frames, {sum(map(len, clip))} objects, at most {most} in a frame)"
        for name, clip, most in clips
    )
