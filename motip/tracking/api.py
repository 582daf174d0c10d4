"""Tracking API: frame by frame (`track`), one sequence (`track_sequence`), one sequence under several settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from motip.data.sequence import TrackRows
from motip.errors import MotipError
from motip.model import MOTIP
from motip.model.fast import Detector, prepare_for_inference
from motip.model.preprocess import normalise
from motip.tracking.detections import Detections
from motip.tracking.loading import LoadedModel, load
from motip.tracking.settings import TrackerSettings
from motip.tracking.tracker import FrameTracks, Tracker

if TYPE_CHECKING:
    from motip.config import Config
    from motip.data.video_reader import VideoSource

_OnDetections = Callable[[int, tuple[int, int], Tensor, Tensor], None]
"""Frame number, (height, width) of the frame in pixels, (Q, C) logits, (Q, 4) boxes as cxcywh in 0..1."""

_NumberedFrames = Iterable[tuple[int, np.ndarray]]
"""(0-based frame number, (H, W, 3) uint8 RGB image), numbers ascending."""

_SourceT = TypeVar("_SourceT", bound=_NumberedFrames)

_AUTOCAST = {"FP16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TrackResult:
    """Tracks of one sequence, with counters and run time.

    Attributes:
        rows: one entry per box; ``class_ids`` holds the class voted over all frames of each track.
        frame_class_ids: (R,) class of each box in its own frame.
        num_frames: frames tracked, with and without boxes.
        image_size: (height, width) of the frames in pixels, None without frames.
        counters: see ``Tracker.counters``.
        notes: see ``Tracker.notes``.
        seconds: wall time, decoding included.
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
        """Frames tracked per second of wall time, 0 without frames."""
        return self.num_frames / self.seconds if self.seconds > 0 else 0.0


class TrackIterator(Iterator[Detections], Generic[_SourceT]):
    """Iterator over the frames of a video; each step reads, detects and tracks one frame.

    Args:
        model: a MOTIP, used on its current device and left in eval mode.
        source: numbered frames, see ``track_sequence``.
        settings: thresholds, rules and frame size.
        class_names: names by class id.

    Raises:
        MotipError: while iterating, as ``track_sequence``.
    """

    def __init__(self, model: MOTIP, source: _SourceT, settings: TrackerSettings, class_names: Sequence[str]) -> None:
        self.source = source
        self.settings = settings
        self.class_names = tuple(class_names)
        self._loop = _TrackingLoop(model, [settings])
        self._frames = self._detections()

    def __next__(self) -> Detections:
        return next(self._frames)

    @property
    def result(self) -> TrackResult:
        """Tracks of the frames processed so far."""
        return self._loop.results()[0]

    def _detections(self) -> Iterator[Detections]:
        highest = -1
        for number, image, (tracks,) in self._loop.steps(self.source):
            # A newborn with an id used before was re-identified by the long-term memory.
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


@overload
def track(
    video: str | Path,
    checkpoint: str | Path | LoadedModel,
    config: str | Path | Config | None = None,
    *,
    device: str = "auto",
    start_frame: int | None = None,
    end_frame: int | None = None,
    fps: float | None = None,
    **settings: float | int | str | None,
) -> TrackIterator[VideoSource]: ...


@overload
def track(
    video: Iterable[np.ndarray],
    checkpoint: str | Path | LoadedModel,
    config: str | Path | Config | None = None,
    *,
    device: str = "auto",
    start_frame: None = None,
    end_frame: None = None,
    fps: None = None,
    **settings: float | int | str | None,
) -> TrackIterator[_NumberedFrames]: ...


def track(
    video: str | Path | Iterable[np.ndarray],
    checkpoint: str | Path | LoadedModel,
    config: str | Path | Config | None = None,
    *,
    device: str = "auto",
    start_frame: int | None = None,
    end_frame: int | None = None,
    fps: float | None = None,
    **settings: float | int | str | None,
) -> TrackIterator[Any]:
    """Track a video frame by frame. All arguments are checked before the first frame.

    Args:
        video: a video file, a pattern such as ``img1/%08d.jpg``, a folder of images, or (H, W, 3) uint8 RGB arrays.
        checkpoint: a checkpoint of this project or of the published code, a safetensors file, an export folder, or the
            result of ``load``.
        config: configuration or path of its YAML file; None uses the one stored in the checkpoint.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; a loaded model stays on its device.
        start_frame: first frame, from 1 (for images: the number in the name).
        end_frame: last frame, included.
        fps: frame rate of a file or images that do not state it.
        settings: fields of ``TrackerSettings`` that replace the stored ones, such as ``det_thresh``,
            ``miss_tolerance``, ``longterm_patience`` or ``dtype``; None keeps the stored value.

    Returns:
        Iterator of one ``Detections`` per frame; its ``result`` holds the rows of the frames so far.

    Raises:
        MotipError: the video, checkpoint, device or setting does not exist, the range is empty, the classes differ from
            the configuration's, or a range, frame rate, configuration or device is given where it cannot apply. While
            iterating: a frame cannot be decoded or is invalid.

    Examples:
        >>> from motip.model import ModelSpec, build_model
        >>> spec = ModelSpec(backbone="tiny_gn", num_queries=5, hidden_dim=32, num_heads=2, enc_layers=1, dec_layers=1,
        ...                  feature_dim=32, id_dim=32, num_id_decoder_layers=1, rel_pe_length=32)
        >>> loaded = LoadedModel(build_model(spec).eval(), ("car",), TrackerSettings(short_side=64), {})
        >>> frames = np.zeros((2, 96, 128, 3), np.uint8)
        >>> for found in track(frames, loaded, det_thresh=0.0, newborn_thresh=0.0):
        ...     print(found.frame, found.boxes_xywh.shape, set(found.classes))
        0 (5, 4) {'car'}
        1 (5, 4) {'car'}
    """
    source: _NumberedFrames
    if isinstance(video, (str, Path)):
        from motip.data.video_reader import open_source  # imports the video codecs

        source = open_source(str(video), start=start_frame, end=end_frame, fps=fps)
    else:
        _check_unused("frames are given as arrays", start_frame=start_frame, end_frame=end_frame, fps=fps)
        source = enumerate(video)
    if isinstance(checkpoint, LoadedModel):
        _check_unused("the model is loaded", config=config, device=None if device == "auto" else device)
        loaded = checkpoint.with_settings(**settings)
    else:
        loaded = load(checkpoint, config, device, **settings)
    return TrackIterator(loaded.model, source, loaded.settings, loaded.class_names)


def _check_unused(reason: str, **arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise MotipError(f"{name} does not apply: {reason}", where=name, found=value, expected="not given")


def track_sequence(
    model: MOTIP,
    frames: _NumberedFrames,
    settings: TrackerSettings,
    on_frame: Callable[[int, FrameTracks], None] | None = None,
) -> TrackResult:
    """Track one sequence of decoded frames.

    Args:
        model: a MOTIP, used on its current device and left in eval mode.
        frames: (0-based frame number, (H, W, 3) uint8 RGB array), numbers ascending, all frames of one size.
        settings: thresholds, rules and frame size.
        on_frame: called after each frame, e.g. for progress.

    Raises:
        MotipError: a frame is not an RGB uint8 image, differs in size, or is out of order.

    Examples:
        >>> from motip.model import ModelSpec, build_model
        >>> spec = ModelSpec(backbone="tiny_gn", hidden_dim=32, num_heads=2, enc_layers=1, dec_layers=1,
        ...                  feature_dim=32, id_dim=32, num_id_decoder_layers=1, rel_pe_length=32)
        >>> frames = enumerate(np.zeros((3, 96, 128, 3), np.uint8))
        >>> result = track_sequence(build_model(spec), frames, TrackerSettings(short_side=64))
        >>> result.num_frames, result.image_size
        (3, (96, 128))
    """
    loop = _TrackingLoop(model, [settings])
    for number, _, (tracks,) in loop.steps(frames):
        if on_frame is not None:
            on_frame(number, tracks)
    return loop.results()[0]


def track_variants(
    model: MOTIP,
    frames: _NumberedFrames,
    variants: Sequence[TrackerSettings],
    on_detections: _OnDetections | None = None,
) -> list[TrackResult]:
    """Track one sequence under several settings in one detector pass (the detector takes nearly all the time).

    Each result equals that of ``track_sequence`` with the same settings; frames and errors as there.

    Args:
        variants: settings that share frame size and arithmetic of the detector.
        on_detections: called with each frame's detections before thresholds are applied.

    Raises:
        MotipError: no settings, or settings that differ in ``short_side``, ``max_longer`` or ``dtype``.
    """
    if not variants:
        raise MotipError("no settings to track with", where="variants")
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
    loop = _TrackingLoop(model, variants, on_detections)
    for _ in loop.steps(frames):
        pass
    return loop.results()


class _TrackingLoop:
    """Frame loop: runs the detector and each variant's tracker per frame, and collects the tracks."""

    def __init__(
        self, model: MOTIP, variants: Sequence[TrackerSettings], on_detections: _OnDetections | None = None
    ) -> None:
        self._model = model
        self._variants = variants
        self._on_detections = on_detections
        self._detector: Detector = model.detr
        self._trackers: list[Tracker] = []
        self._image_size: tuple[int, int] | None = None
        self._tracked: list[tuple[int, list[FrameTracks]]] = []
        self._seconds = 0.0

    def steps(self, frames: _NumberedFrames) -> Iterator[tuple[int, np.ndarray, list[FrameTracks]]]:
        """Yield frame number, image, and the tracks of each variant."""
        self._model.eval()
        started = time.perf_counter()
        for number, image in _checked(frames):
            size = self._image_size or self._prepare(image)
            logits, boxes, embeds = _detect(self._model, image, self._variants[0], self._detector)
            if self._on_detections is not None:
                self._on_detections(number, size, logits, boxes)
            tracks = [each.update(logits, boxes, embeds) for each in self._trackers]
            self._tracked.append((number, tracks))
            self._seconds = time.perf_counter() - started
            yield number, image, tracks
        self._seconds = time.perf_counter() - started

    def results(self) -> list[TrackResult]:
        """Tracks of each variant in the frames so far."""
        results = []
        for index in range(len(self._variants)):
            own = [(number, tracks[index]) for number, tracks in self._tracked]
            rows, frame_class_ids = _collect(own, self._model.spec.num_classes)
            results.append(
                TrackResult(
                    rows=rows,
                    frame_class_ids=frame_class_ids,
                    num_frames=len(self._tracked),
                    image_size=self._image_size,
                    counters=dict(self._trackers[index].counters) if self._trackers else {},
                    notes=tuple(self._trackers[index].notes) if self._trackers else (),
                    seconds=self._seconds,
                )
            )
        return results

    def _prepare(self, image: np.ndarray) -> tuple[int, int]:
        """Create trackers and prepare the detector for the size of the first frame, which is returned."""
        size = (int(image.shape[0]), int(image.shape[1]))
        for settings in self._variants:
            shared = self._trackers[0].decoder if self._trackers else None
            self._trackers.append(Tracker(self._model, settings, size, shared))
        arithmetic = _AUTOCAST.get(self._variants[0].dtype, torch.float32)
        self._detector = prepare_for_inference(self._model.detr, arithmetic)
        self._image_size = size
        return size


def inference_size(height: int, width: int, short_side: int, max_longer: int) -> tuple[int, int]:
    """(height, width) of the resized frame in pixels: short side ``short_side``, long side up to ``max_longer``.

    Rounding equals torchvision's ``Resize(size, max_size)``, used for the published results; each side keeps at least
    one pixel.
    """
    short, long = min(height, width), max(height, width)
    new_short, new_long = short_side, int(short_side * long / short)
    if new_long > max_longer:
        new_short, new_long = max(int(max_longer * new_short / new_long), 1), max_longer
    return (new_short, new_long) if height <= width else (new_long, new_short)


def resize_frame(image: Tensor, settings: TrackerSettings) -> Tensor:
    """(3, H, W) uint8 -> resized (3, h, w) uint8, bilinear with antialiasing."""
    size = inference_size(image.shape[-2], image.shape[-1], settings.short_side, settings.max_longer)
    from torchvision.transforms.v2.functional import resize  # slow import

    resized: Tensor = resize(image, list(size), antialias=True)
    return resized


@torch.inference_mode()
def _detect(
    model: MOTIP, image: np.ndarray, settings: TrackerSettings, detector: Detector
) -> tuple[Tensor, Tensor, Tensor]:
    """(Q, C) logits, (Q, 4) cxcywh boxes in 0..1 and (Q, D) embeddings of one frame."""
    device = next(model.parameters()).device
    pixels = torch.from_numpy(np.ascontiguousarray(image)).to(device).permute(2, 0, 1)
    batch = resize_frame(pixels, settings)[None]
    mask = torch.zeros(1, *batch.shape[-2:], dtype=torch.bool, device=device)
    dtype = _AUTOCAST.get(settings.dtype)
    with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        output = detector(normalise(batch, mask), mask)
    return output.pred_logits[0], output.pred_boxes[0], output.outputs[0]


def _checked(frames: _NumberedFrames) -> Iterator[tuple[int, np.ndarray]]:
    """Pass frames on; raise MotipError at the first invalid one."""
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
                fix="track each video as a separate sequence",
            )
        if previous is not None and number <= previous:
            raise MotipError("frames are out of order", where=where, found=number, expected=f"more than {previous}")
        size, previous = image.shape[:2], number
        yield number, image


def _collect(tracked: list[tuple[int, FrameTracks]], num_classes: int) -> tuple[TrackRows, np.ndarray]:
    """All boxes in frame order; each track gets the class with its largest summed score."""
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
