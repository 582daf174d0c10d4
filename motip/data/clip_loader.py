"""Clip loading from shards: read, decode, augment, label; a pure function of clip reference and configuration."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from motip.data.augment import AugmentSettings, ClipAugmentation, draw_augmentation, render_frame, transform_boxes
from motip.data.clips import ClipPlan, ClipRef, PlanVideo, rank_rows
from motip.data.decode import decode_rgb, image_height_width
from motip.data.id_labels import SLOT_FIELDS, ClipSlots, IdSettings, draw_id_slots
from motip.data.sequence import ClassMap, Frame
from motip.data.shards import open_shard, read_labels, shard_path
from motip.errors import MotipError
from motip.storage.paths import Location, RemotePath, location

if TYPE_CHECKING:
    from motip.config import Config
    from motip.data.batch import ClipBatch
    from motip.data.manifest import VideoEntry

_REMOTE_READERS = 24
"""Videos whose labels are read concurrently from an object store; pyarrow's client keeps 25 connections."""
IMAGE_STREAM, LABEL_STREAM = 0, 1
"""Independent random streams of a clip, so that a change of the image augmentation does not change its ID labels."""


@dataclass(frozen=True)
class ClipSample:
    """One clip, ready to be batched.

    Attributes:
        images: (T, 3, H, W) uint8 RGB.
        boxes_cxcywh: per frame (n, 4) float32, normalised by (W, H).
        classes: per frame (n,) int64.
        ignore_cxcywh: per frame (m, 4) float32.
        slots: ID slots, or None if only the detector is trained.
        name: sequence and frame numbers.
        weight: 1, or 0 for padding.
    """

    images: np.ndarray
    boxes_cxcywh: list[np.ndarray]
    classes: list[np.ndarray]
    ignore_cxcywh: list[np.ndarray]
    slots: ClipSlots | None
    name: str
    weight: int


class ClipLoader:
    """Loads clips; picklable and small, so that every process can have a copy.

    Args:
        config: AUG_*, NUM_ID_VOCABULARY, NUM_TRAINING_IDS, SUBSET_OVERFLOW and ONLY_DETR are read here.
        class_maps: class map of each source.
        storage: folder or URI that contains ``shards/``.
    """

    def __init__(self, config: Config, class_maps: Mapping[str, ClassMap], storage: Location | str) -> None:
        self.augment = AugmentSettings.from_config(config)
        self.ids = None if config.ONLY_DETR else IdSettings.from_config(config)
        self.class_maps = dict(class_maps)
        self.storage = storage

    def load(self, clip: ClipRef) -> ClipSample:
        """Load one clip.

        Raises:
            MotipError: missing shard, or a frame that cannot be decoded (with sequence and frame number).
        """
        frames = open_shard(shard_path(self.storage, clip.shard)).read_frames(clip.positions)
        labels = [self._class_map(clip).split(frame) for frame in frames]
        height, width = _common_height_width(clip, frames)
        augmentation = draw_augmentation(
            self.augment,
            height,
            width,
            [each.boxes_xyxy for each in labels],
            np.random.default_rng([clip.seed, IMAGE_STREAM]),
            single_image=len(set(clip.positions)) == 1,
        )
        transformed = [transform_boxes(augmentation, t, each.boxes_xyxy) for t, each in enumerate(labels)]
        track_ids = [each.track_ids[kept] for each, (_, kept) in zip(labels, transformed, strict=True)]
        slots = None
        if self.ids is not None:
            slots = draw_id_slots(track_ids, self.ids, np.random.default_rng([clip.seed, LABEL_STREAM]))
        return ClipSample(
            images=_render(clip, frames, augmentation),
            boxes_cxcywh=[boxes for boxes, _ in transformed],
            classes=[each.class_ids[kept] for each, (_, kept) in zip(labels, transformed, strict=True)],
            ignore_cxcywh=[transform_boxes(augmentation, t, each.ignore_xyxy)[0] for t, each in enumerate(labels)],
            slots=slots,
            name=clip.name,
            weight=clip.weight,
        )

    def clip_bytes(self, frames: int) -> int:
        """Maximum size in bytes of a clip's pixels."""
        short, long = max(self.augment.scales), self.augment.max_size
        return frames * 3 * min(short, long) * long

    def _class_map(self, clip: ClipRef) -> ClassMap:
        if clip.source not in self.class_maps:
            raise MotipError(
                f"no classes are configured for source {clip.source!r}",
                where=clip.name,
                expected=f"one of {', '.join(sorted(self.class_maps))}",
                fix="add the source with its classes to the curriculum",
            )
        return self.class_maps[clip.source]


def plan_videos(
    entries: Iterable[VideoEntry], class_maps: Mapping[str, ClassMap], storage: Location | str
) -> list[PlanVideo]:
    """Frame numbers and objects per frame of the manifest's videos, the input of `plan_clips`.

    Reads labels but no images; compute it once per stage. Videos in an object store are read concurrently, since
    each read waits for requests.
    """

    def planned(entry: VideoEntry) -> PlanVideo:
        class_map = class_maps[entry.source]
        frames = read_labels(shard_path(storage, entry.shard)).frames
        return PlanVideo(
            source=entry.source,
            video=entry.video,
            shard=entry.shard,
            frame_numbers=tuple(frame.number for frame in frames),
            objects=tuple(len(class_map.split(frame).track_ids) for frame in frames),
            fps=entry.fps,
        )

    if not isinstance(location(storage), RemotePath):
        return [planned(entry) for entry in entries]
    with ThreadPoolExecutor(_REMOTE_READERS) as pool:
        return list(pool.map(planned, entries))


def read_video_frames(entry: VideoEntry, storage: Location | str) -> Iterator[tuple[int, np.ndarray]]:
    """(frame number, (H, W, 3) uint8 RGB at full size) of every frame of a video, in order, one row group in memory.

    Raises:
        MotipError: the shard is missing or a frame cannot be decoded.
    """
    for frame in open_shard(shard_path(storage, entry.shard)):
        where = f"{entry.source}/{entry.video} frame {frame.number}"
        yield frame.number, decode_rgb(_encoded(frame, where), where=where)


def local_batches(
    plan: ClipPlan,
    loader: ClipLoader,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 1,
    start_step: int = 0,
) -> Iterator[ClipBatch]:
    """The batches of one rank, loaded in this process, without Ray; the reference for `motip.data.stream`.

    Args:
        plan: padded to complete steps of ``world_size * batch_size`` clips.
        start_step: completed steps of this epoch.
    """
    rows = rank_rows(plan.from_step(start_step), world_size, rank, batch_size)
    for begin in range(0, len(rows), batch_size):
        yield collate([loader.load(clip) for clip in rows[begin : begin + batch_size]])


def collate(samples: Sequence[ClipSample]) -> ClipBatch:
    """Pad clips of one length to the largest image and the most ID slots.

    The images of a single clip that needs no padding share the sample's memory, which may be read-only.
    """
    import torch  # decoding actors import this module and must not load torch

    from motip.data.batch import ClipBatch, IdSlots

    # Images and their masks.
    frames = samples[0].images.shape[0]
    height, width = (max(sample.images.shape[i] for sample in samples) for i in (2, 3))
    images = _padded_images(samples, height, width)
    masks = np.zeros((len(samples), frames, height, width), dtype=bool)
    for index, sample in enumerate(samples):
        h, w = sample.images.shape[2:]
        masks[index, :, h:], masks[index, :, :, w:] = True, True

    def tensors(name: str) -> list[list[Any]]:
        return [[torch.from_numpy(array.copy()) for array in getattr(sample, name)] for sample in samples]

    # ID slots and counts.
    slots = None
    if samples[0].slots is not None:
        slots = IdSlots(**{name: torch.from_numpy(_padded(samples, name)) for name in SLOT_FIELDS})
    counted = [sample.slots for sample in samples if sample.slots is not None and sample.weight]
    _allow_read_only_images()
    return ClipBatch(
        images=torch.from_numpy(images),
        masks=torch.from_numpy(masks),
        boxes_cxcywh=tensors("boxes_cxcywh"),
        classes=tensors("classes"),
        ignore_cxcywh=tensors("ignore_cxcywh"),
        slots=slots,
        names=[sample.name for sample in samples],
        weights=torch.tensor([sample.weight for sample in samples], dtype=torch.float32),
        distractors=sum(each.distractors for each in counted),
        dropped=sum(each.dropped for each in counted),
    )


@cache
def _allow_read_only_images() -> None:
    """Trigger and suppress PyTorch's once-per-process warning about read-only arrays; batches are never written to."""
    import torch

    example = np.zeros(1, np.uint8)
    example.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.from_numpy(example)


def _padded_images(samples: Sequence[ClipSample], height: int, width: int) -> np.ndarray:
    """(B, T, 3, height, width) uint8, zero at the bottom and right."""
    first = samples[0].images
    if len(samples) == 1 and first.shape[2:] == (height, width):
        return first[None]  # copying the pixels of a long clip takes a fifth of the time of decoding it
    # NumPy allocates large arrays in huge pages, torch does not; the first touch takes a third of the time.
    images = np.empty((len(samples), len(first), 3, height, width), dtype=np.uint8)
    for index, sample in enumerate(samples):
        h, w = sample.images.shape[2:]
        images[index, :, :, :h, :w] = sample.images
        images[index, :, :, h:], images[index, :, :, :, w:] = 0, 0
    return images


def _padded(samples: Sequence[ClipSample], field: str) -> np.ndarray:
    """(B, G, T, N) of one slot field: masks are True and labels and indices -1 on padding."""
    arrays = [getattr(sample.slots, field) for sample in samples]
    groups, frames, _ = arrays[0].shape
    fill: Any = True if arrays[0].dtype == bool else -1
    batch = np.full((len(arrays), groups, frames, max(a.shape[2] for a in arrays)), fill, dtype=arrays[0].dtype)
    for index, array in enumerate(arrays):
        batch[index, :, :, : array.shape[2]] = array
    return batch


def _render(clip: ClipRef, frames: Sequence[Frame], augmentation: ClipAugmentation) -> np.ndarray:
    images = np.empty((len(frames), 3, *augmentation.size_hw), dtype=np.uint8)
    decoded: np.ndarray | None = None
    for t, frame in enumerate(frames):
        if decoded is None or clip.positions[t] != clip.positions[t - 1]:  # a single image is decoded once
            where = _frame_name(clip, frame)
            decoded = decode_rgb(_encoded(frame, where), augmentation.reduction, where)
        render_frame(augmentation, t, decoded, images[t])
    return images


def _common_height_width(clip: ClipRef, frames: Sequence[Frame]) -> tuple[int, int]:
    names = [_frame_name(clip, frame) for frame in frames]
    sizes = [image_height_width(_encoded(frame, name), name) for frame, name in zip(frames, names, strict=True)]
    for frame, size in zip(frames, sizes, strict=True):
        if size != sizes[0]:
            raise MotipError(
                "the frames of a video have different sizes",
                where=_frame_name(clip, frame),
                found=f"{size[1]}x{size[0]} pixels",
                expected=f"{sizes[0][1]}x{sizes[0][0]} as in frame {frames[0].number}",
                fix="split the video where its size changes",
            )
    return sizes[0]


def _encoded(frame: Frame, where: str) -> bytes:
    if not isinstance(frame.image, bytes):
        raise MotipError(
            "the shard has labels but no image",
            where=where,
            fix="convert the sequence again with its images",
        )
    return frame.image


def _frame_name(clip: ClipRef, frame: Frame) -> str:
    return f"{clip.source}/{clip.video} frame {frame.number}"
