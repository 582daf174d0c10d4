"""Frames of a sequence in, tracks out: frame by frame (`track`) or the whole at once (`track_sequence`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from motip.data.sequence import TrackRows
from motip.errors import MotipError
from motip.model import MOTIP
from motip.model.fast.frame_detector import Detector, detector_for_frames
from motip.model.preprocess import normalise
from motip.track.detections import Detections
from motip.track.loading import open_checkpoint
from motip.track.settings import TrackerSettings
from motip.track.tracker import FrameTracks, RuntimeTracker

if TYPE_CHECKING:
    from motip.config import Config
    from motip.data.video_reader import VideoSource

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


class Tracking(Iterator[Detections]):
    """A video being tracked: each step of the iteration is one frame; ask for the ``result`` whenever enough is done.

    Args:
        model: a MOTIP; it is used where it lies (CPU or GPU) and left in eval mode.
        source: frames as ``track_sequence`` takes them.
        settings: thresholds, rules and frame size.
        class_names: by class id.

    Raises:
        MotipError: while iterating, as ``track_sequence``.
    """

    def __init__(
        self, model: MOTIP, source: VideoSource, settings: TrackerSettings, class_names: Sequence[str]
    ) -> None:
        self.source = source
        self.settings = settings
        self.class_names = tuple(class_names)
        self._run = _Run(model, [settings])
        self._frames = self._detections()

    def __next__(self) -> Detections:
        return next(self._frames)

    @property
    def result(self) -> TrackResult:
        """The tracks of the frames so far."""
        return self._run.results()[0]

    def _detections(self) -> Iterator[Detections]:
        highest = -1
        for number, image, (tracks,) in self._run.steps(self.source):
            # A newborn under an id that was given before is one that the long-term memory recognised.
            recalled = tracks.newborn & (tracks.ids <= highest)
            highest = max(highest, int(tracks.ids.max(initial=-1)))
            yield Detections(
                frame=number,
                image=image,
                track_ids=tracks.ids,
                boxes_xyxy=tracks.boxes_xyxy,
                class_ids=tracks.class_ids,
                frame_class_ids=tracks.frame_class_ids,
                scores=tracks.scores,
                newborn=tracks.newborn & ~recalled,
                recalled=recalled,
                class_names=self.class_names,
            )


def track(
    video: str | Path,
    checkpoint: str | Path,
    config: str | Path | Config | None = None,
    *,
    device: str = "auto",
    start_frame: int | None = None,
    end_frame: int | None = None,
    fps: float | None = None,
    **settings: float | int | str | None,
) -> Tracking:
    """Track a video, frame by frame::

        for found in track("street.mp4", "checkpoint_best.pth", det_thresh=0.4):
            print(found.frame, found.track_ids, found.classes, found.boxes_xywh)

    Everything that can be wrong with the arguments is said here, before the first frame.

    Args:
        video: a video file, a pattern such as ``img1/%08d.jpg``, or a folder of images.
        checkpoint: our checkpoint, a published one, a safetensors file, or an export folder.
        config: a configuration or its YAML file; None: the one that the checkpoint carries.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        start_frame, end_frame: first and last frame, both included, from 1 (for images: the number in the name).
        fps: frame rate, where the source does not state it.
        settings: fields of ``TrackerSettings`` to use instead of the checkpoint's, such as ``det_thresh``,
            ``miss_tolerance``, ``longterm_patience`` or ``dtype``; None leaves one as it is.

    Raises:
        MotipError: no such video, checkpoint, device or setting; an empty range; classes that differ from the
            configuration's. While iterating: frames that do not decode or do not fit.
    """
    from motip.data.video_reader import open_source  # the codecs are loaded only where a file is tracked

    source = open_source(str(video), start=start_frame, end=end_frame, fps=fps)
    loaded = open_checkpoint(checkpoint, config, device, **settings)
    return Tracking(loaded.model, source, loaded.settings, loaded.classes)


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
        on_frame: called after each frame, e.g. for progress.

    Raises:
        MotipError: a frame is no RGB uint8 image, changes size, or is out of order.
    """
    run = _Run(model, [settings], resize, batch_size)
    for number, _, (tracks,) in run.steps(frames):
        if on_frame is not None:
            on_frame(number, tracks)
    return run.results()[0]


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
    run = _Run(model, variants, resize, batch_size, on_detections)
    for _ in run.steps(frames):
        pass
    return run.results()


class _Run:
    """The loop over the frames: the detector once, then each variant's tracker, and what they found."""

    def __init__(
        self,
        model: MOTIP,
        variants: Sequence[TrackerSettings],
        resize: Resize | None = None,
        batch_size: int = 1,
        on_detections: OnDetections | None = None,
    ) -> None:
        if batch_size < 1:
            raise MotipError(
                "the detector's batch needs frames", where="batch_size", found=batch_size, expected="1 or more"
            )
        self._model = model
        self._variants = variants
        self._resize = resize
        self._batch_size = batch_size
        self._on_detections = on_detections
        self._detector: Detector = model.detr
        self._trackers: list[RuntimeTracker] = []
        self._image_size: tuple[int, int] | None = None
        self._numbers: list[int] = []
        self._tracked: list[list[FrameTracks]] = []
        self._seconds = 0.0

    def steps(self, frames: Iterable[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray, list[FrameTracks]]]:
        """Frame number, the frame, and each variant's tracks in it."""
        self._model.eval()
        started = time.perf_counter()
        for batch in _batches(_checked(frames), self._batch_size):
            size = self._image_size or self._begin(batch[0][1])
            images = [image for _, image in batch]
            logits, boxes, embeds = _detect(self._model, images, self._variants[0], self._resize, self._detector)
            for index, (number, image) in enumerate(batch):
                if self._on_detections is not None:
                    self._on_detections(number, size, logits[index], boxes[index])
                tracks = [each.update(logits[index], boxes[index], embeds[index]) for each in self._trackers]
                self._numbers.append(number)
                self._tracked.append(tracks)
                self._seconds = time.perf_counter() - started
                yield number, image, tracks
        self._seconds = time.perf_counter() - started

    def results(self) -> list[TrackResult]:
        """Each variant's tracks of the frames so far."""
        results = []
        for place in range(len(self._variants)):
            own = [tracks[place] for tracks in self._tracked]
            pairs = list(zip(self._numbers, own, strict=True))
            rows, frame_class_ids = _collect(pairs, self._model.spec.num_classes)
            results.append(
                TrackResult(
                    rows=rows,
                    frame_class_ids=frame_class_ids,
                    num_frames=len(self._tracked),
                    image_size=self._image_size,
                    counters=dict(self._trackers[place].counters) if self._trackers else {},
                    notes=tuple(self._trackers[place].notes) if self._trackers else (),
                    seconds=self._seconds,
                )
            )
        return results

    def _begin(self, image: np.ndarray) -> tuple[int, int]:
        """Make the trackers, now that the size of the frames is known, and the detector ready for many of them."""
        size = (int(image.shape[0]), int(image.shape[1]))
        for settings in self._variants:
            shared = self._trackers[0].decoder if self._trackers else None
            self._trackers.append(RuntimeTracker(self._model, settings, size, shared))
        arithmetic = _AUTOCAST.get(self._variants[0].dtype, torch.float32)
        self._detector = detector_for_frames(self._model.detr, arithmetic)
        self._image_size = size
        return size


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
    from torchvision.transforms.v2.functional import resize  # takes as long to import as torch

    resized: Tensor = resize(image, list(size), antialias=True)
    return resized


@torch.inference_mode()
def _detect(
    model: MOTIP, images: list[np.ndarray], settings: TrackerSettings, resize: Resize | None, detector: Detector
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
        output = detector(normalise(batch, mask), mask)
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
