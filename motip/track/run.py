"""Frames of a sequence in, tracks out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from motip.data.sequence import TrackRows
from motip.errors import MotipError
from motip.model import MOTIP
from motip.model.preprocess import normalise
from motip.track.settings import TrackerSettings
from motip.track.tracker import FrameTracks, RuntimeTracker

Resize = Callable[[Tensor], Tensor]
"""(3, H, W) uint8 -> (3, h, w) uint8."""

OnDetections = Callable[[int, tuple[int, int], Tensor, Tensor], None]
"""Frame number, (height, width) of the frame in pixels, (Q, C) logits, (Q, 4) boxes as cxcywh in 0..1."""

_AUTOCAST = {"FP16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TrackResult:
    """Tracks of one sequence and how they came about.

    Attributes:
        rows: one entry per box; ``class_ids`` is the class voted over the whole life of each track.
        frame_class_ids: (R,) class of each box in its own frame.
        num_frames: frames tracked, with and without boxes.
        image_size: (height, width) of the frames, None without frames.
        counters: see ``RuntimeTracker.counters``.
        notes: what must be said beside scores of these tracks.
        seconds: wall time, reading the frames included.
    """

    rows: TrackRows
    frame_class_ids: np.ndarray
    num_frames: int
    image_size: tuple[int, int] | None
    counters: dict[str, int]
    notes: tuple[str, ...]
    seconds: float

    @property
    def fps(self) -> float:
        return self.num_frames / self.seconds if self.seconds > 0 else 0.0


def track_sequence(
    model: MOTIP,
    frames: Iterable[tuple[int, np.ndarray]],
    settings: TrackerSettings,
    resize: Resize | None = None,
    batch_size: int = 1,
    on_frame: Callable[[int, FrameTracks], None] | None = None,
) -> TrackResult:
    """Track one sequence.

    Args:
        model: a MOTIP; it is used where it lies (CPU or GPU) and left in eval mode.
        frames: (0-based frame number, RGB uint8 (H, W, 3) array) in ascending order, all of one size.
        settings: thresholds, rules and frame size.
        resize: replaces the built-in resizing to ``settings.short_side`` / ``max_longer``.
        batch_size: frames the detector sees at once; the tracks do not depend on it beyond rounding.
        on_frame: called after each frame, e.g. for progress or drawing.

    Raises:
        MotipError: a frame is no RGB uint8 image, changes size, or is out of order.
    """
    (result,) = _track(
        model,
        frames,
        [settings],
        resize,
        batch_size,
        on_tracks=None if on_frame is None else lambda number, tracks: on_frame(number, tracks[0]),
    )
    return result


def track_variants(
    model: MOTIP,
    frames: Iterable[tuple[int, np.ndarray]],
    variants: Sequence[TrackerSettings],
    resize: Resize | None = None,
    batch_size: int = 1,
    on_detections: OnDetections | None = None,
) -> list[TrackResult]:
    """Track one sequence under several settings; the detector, which takes nearly all the time, sees each frame once.

    Each result is what ``track_sequence`` would find with these settings (arguments and errors as there).

    Args:
        variants: settings that differ in the tracker only, not in frame size or the detector's arithmetic.
        on_detections: called with each frame's detections before any threshold.

    Raises:
        MotipError: no settings, or some that need another detector pass.
    """
    if not variants:
        raise MotipError("there are no settings to track with", where="variants")
    for name in ("short_side", "max_longer", "dtype"):
        values = {getattr(each, name) for each in variants}
        if len(values) > 1:
            raise MotipError(
                "settings that change the detector cannot share its output",
                where=name,
                found=", ".join(sorted(map(str, values))),
                expected="one value",
                fix="track once for each value",
            )
    return _track(model, frames, variants, resize, batch_size, on_detections=on_detections)


def _track(
    model: MOTIP,
    frames: Iterable[tuple[int, np.ndarray]],
    variants: Sequence[TrackerSettings],
    resize: Resize | None,
    batch_size: int,
    on_tracks: Callable[[int, list[FrameTracks]], None] | None = None,
    on_detections: OnDetections | None = None,
) -> list[TrackResult]:
    if batch_size < 1:
        raise MotipError(
            "the detector's batch needs frames", where="batch_size", found=batch_size, expected="1 or more"
        )
    model.eval()
    started = time.perf_counter()
    trackers: list[RuntimeTracker] = []
    image_size: tuple[int, int] | None = None
    numbers: list[int] = []
    tracked: list[list[FrameTracks]] = []
    for batch in _batches(_checked(frames), batch_size):
        if image_size is None:
            image_size = batch[0][1].shape[:2]
            for settings in variants:
                shared = trackers[0].decoder if trackers else None
                trackers.append(RuntimeTracker(model, settings, image_size, shared))
        logits, boxes, embeds = _detect(model, [image for _, image in batch], variants[0], resize)
        for index, (number, _) in enumerate(batch):
            if on_detections is not None:
                on_detections(number, image_size, logits[index], boxes[index])
            tracks = [tracker.update(logits[index], boxes[index], embeds[index]) for tracker in trackers]
            numbers.append(number)
            tracked.append(tracks)
            if on_tracks is not None:
                on_tracks(number, tracks)
    seconds = time.perf_counter() - started
    results = []
    for place in range(len(variants)):
        own = [tracks[place] for tracks in tracked]
        rows, frame_class_ids = _collect(list(zip(numbers, own, strict=True)), model.spec.num_classes)
        results.append(
            TrackResult(
                rows=rows,
                frame_class_ids=frame_class_ids,
                num_frames=len(tracked),
                image_size=image_size,
                counters=dict(trackers[place].counters) if trackers else {},
                notes=tuple(trackers[place].notes) if trackers else (),
                seconds=seconds,
            )
        )
    return results


def inference_size(height: int, width: int, short_side: int, max_longer: int) -> tuple[int, int]:
    """(height, width) a frame is resized to: short side first, unless the long side would become too long.

    The roundings are those of torchvision's ``Resize(size, max_size)``, which the published results were made with. A
    frame so narrow that its short side would round to nothing keeps one pixel.
    """
    short, long = min(height, width), max(height, width)
    new_short, new_long = short_side, int(short_side * long / short)
    if new_long > max_longer:
        new_short, new_long = max(int(max_longer * new_short / new_long), 1), max_longer
    return (new_short, new_long) if height <= width else (new_long, new_short)


def resize_frame(image: Tensor, settings: TrackerSettings) -> Tensor:
    """(3, H, W) uint8 -> resized (3, h, w) uint8, bilinear with antialiasing."""
    size = inference_size(image.shape[-2], image.shape[-1], settings.short_side, settings.max_longer)
    resized: Tensor = transforms.resize(image, list(size), antialias=True)
    return resized


@torch.inference_mode()
def _detect(
    model: MOTIP, images: list[np.ndarray], settings: TrackerSettings, resize: Resize | None
) -> tuple[Tensor, Tensor, Tensor]:
    device = next(model.parameters()).device
    resized = []
    for image in images:
        pixels = torch.from_numpy(np.ascontiguousarray(image)).to(device).permute(2, 0, 1)
        resized.append(resize(pixels) if resize is not None else resize_frame(pixels, settings))
    batch = torch.stack(resized)
    mask = torch.zeros(len(batch), *batch.shape[-2:], dtype=torch.bool, device=device)
    dtype = _AUTOCAST.get(settings.dtype)
    with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        output = model.detr(normalise(batch, mask), mask)
    return output.pred_logits, output.pred_boxes, output.outputs


def _checked(frames: Iterable[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
    """The frames as they come; an error at the first that does not fit."""
    size: tuple[int, ...] | None = None
    previous: int | None = None
    for number, image in frames:
        where = f"frame {number}"
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise MotipError(
                "a frame is not an RGB image",
                where=where,
                found=f"{image.dtype} array of shape {image.shape}",
                expected="uint8 array of shape (height, width, 3)",
                fix="convert grey, RGBA or 16-bit images when they are decoded",
            )
        if size is not None and image.shape[:2] != size:
            raise MotipError(
                "frames of one sequence differ in size",
                where=where,
                found=f"{image.shape[0]}x{image.shape[1]}",
                expected=f"{size[0]}x{size[1]}",
                fix="give each video as a sequence of its own",
            )
        if previous is not None and number <= previous:
            raise MotipError("frames are out of order", where=where, found=number, expected=f"more than {previous}")
        size, previous = image.shape[:2], number
        yield number, image


def _batches(frames: Iterator[tuple[int, np.ndarray]], size: int) -> Iterator[list[tuple[int, np.ndarray]]]:
    while batch := list(islice(frames, size)):
        yield batch


def _collect(tracked: list[tuple[int, FrameTracks]], num_classes: int) -> tuple[TrackRows, np.ndarray]:
    """All boxes in frame order, every track under the class with the largest summed score over its life."""
    filled = [(number, tracks) for number, tracks in tracked if len(tracks)]
    if not filled:
        return TrackRows.empty(), np.zeros(0, np.int64)
    ids = np.concatenate([tracks.ids for _, tracks in filled])
    scores = np.concatenate([tracks.scores for _, tracks in filled])
    frame_classes = np.concatenate([tracks.frame_class_ids for _, tracks in filled])
    votes = np.zeros((int(ids.max()) + 1, num_classes))
    np.add.at(votes, (ids, frame_classes), scores)
    rows = TrackRows(
        frames=np.concatenate([np.full(len(tracks), number, np.int64) for number, tracks in filled]),
        track_ids=ids,
        boxes_xyxy=np.concatenate([tracks.boxes_xyxy for _, tracks in filled]),
        scores=scores,
        class_ids=votes.argmax(axis=1)[ids],
    )
    return rows, frame_classes
