"""Writers of rendered frames as raw folders, in the original layout of the three formats."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np

from motip.demo.rendering import Label
from motip.errors import MotipError

_VISDRONE_CATEGORIES = {
    "ignored": 0,
    "pedestrian": 1,
    "people": 2,
    "car": 4,
    "van": 5,
    "truck": 6,
    "bus": 9,
    "others": 11,
}
"""Category numbers of the VisDrone toolkit for the categories of the demo dataset."""

_OCCLUDED_BELOW = 0.9
"""An object with less than this share visible counts as occluded (BDD100K) or partially occluded (VisDrone)."""
_TRUNCATED_BELOW = 0.98
"""An object with less than this share inside the frame counts as truncated."""


class SequenceWriter(ABC):
    """Writes a sequence frame by frame; ``close`` writes the annotations."""

    IMAGES: ClassVar[str]
    "Folder of the images below the root, of {split} and {name}."
    ANNOTATIONS: ClassVar[str]
    "File of the annotations, likewise."
    IMAGE_NAME: ClassVar[str]
    "File name of an image, of {name} and {number} (1-based)."

    def __init__(self, root: Path, split: str, name: str, fps: float, quality: int) -> None:
        self.name = name
        self._fps, self._quality = fps, quality
        self._size = (0, 0)
        self._count = 0
        self._images = root / self.IMAGES.format(split=split, name=name)
        self._annotations = root / self.ANNOTATIONS.format(split=split, name=name)
        self._rows: list[tuple[int, ...]] = []

    def add(self, image: np.ndarray, labels: SequenceOf[Label]) -> None:
        """Append a frame: (H, W, 3) uint8 BGR and its labels."""
        if self._count == 0:
            self._images.mkdir(parents=True, exist_ok=True)
            self._annotations.parent.mkdir(parents=True, exist_ok=True)
        self._count += 1
        self._size = (image.shape[1], image.shape[0])
        done, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, self._quality])
        if not done:
            raise MotipError(
                "cannot encode a rendered frame as JPEG",
                where=self._images,
                found=f"{image.shape[1]}x{image.shape[0]} pixels",
                expected="a size that OpenCV's JPEG encoder supports (up to 65535 pixels a side)",
                fix="choose a smaller size for the synthetic dataset",
            )
        (self._images / self._image_name()).write_bytes(encoded.tobytes())
        self._record(labels)

    def close(self) -> None:
        """Write the annotations, rows sorted by track: called once, after the last frame."""
        rows = sorted(self._rows, key=lambda row: (row[1], row[0]))
        self._annotations.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))

    def paths(self) -> tuple[Path, Path]:
        """The folder of the images and the file of the annotations."""
        return self._images, self._annotations

    def _image_name(self) -> str:
        """File name of the current frame."""
        return self.IMAGE_NAME.format(name=self.name, number=self._count)

    @abstractmethod
    def _record(self, labels: SequenceOf[Label]) -> None:
        """Store the labels of the current frame for the annotations."""


class Bdd100kWriter(SequenceWriter):
    """BDD100K MOT 2020: ``images/track/<split>/<video>/`` and one Scalabel JSON per video."""

    IMAGES = "images/track/{split}/{name}"
    ANNOTATIONS = "labels/box_track_20/{split}/{name}.json"
    IMAGE_NAME = "{name}-{number:07d}.jpg"

    def __init__(self, root: Path, split: str, name: str, fps: float, quality: int) -> None:
        super().__init__(root, split, name, fps, quality)
        self._frames: list[dict[str, object]] = []

    def _record(self, labels: SequenceOf[Label]) -> None:
        rows = []
        for number, label in enumerate(labels):
            x1, y1, x2, y2 = (float(value) for value in label.box_xyxy)
            # BDD100K crowds have an id; regions painted without one get it here.
            track = label.track_id or 100000 + number
            rows.append(
                {
                    "id": f"{track:08d}",
                    "category": label.category,
                    "attributes": {
                        "occluded": label.visible < _OCCLUDED_BELOW,
                        "truncated": label.inside < _TRUNCATED_BELOW,
                        "crowd": label.region,
                    },
                    "box2d": {"x1": x1, "y1": y1, "x2": x2, "y2": y2},
                }
            )
        self._frames.append(
            {"name": self._image_name(), "videoName": self.name, "frameIndex": self._count - 1, "labels": rows}
        )

    def close(self) -> None:
        self._annotations.write_text(json.dumps(self._frames))


class VisDroneWriter(SequenceWriter):
    """VisDrone-MOT: ``VisDrone2019-MOT-<split>/{sequences,annotations}``, rows of 10 columns sorted by track.

    Columns: frame, id, left, top, width, height, score (0 = not evaluated), category, truncation, occlusion.
    """

    IMAGES = "VisDrone2019-MOT-{split}/sequences/{name}"
    ANNOTATIONS = "VisDrone2019-MOT-{split}/annotations/{name}.txt"
    IMAGE_NAME = "{number:07d}.jpg"

    def _record(self, labels: SequenceOf[Label]) -> None:
        for label in labels:
            x1, y1, x2, y2 = label.box_xyxy
            ignored = label.region
            occlusion = 0 if label.visible >= _OCCLUDED_BELOW else 1 if label.visible >= 0.5 else 2
            self._rows.append(
                (
                    *(self._count, label.track_id, x1, y1, x2 - x1, y2 - y1),
                    *(0 if ignored else 1, _VISDRONE_CATEGORIES[label.category]),
                    *(0 if ignored or label.inside >= _TRUNCATED_BELOW else 1, 0 if ignored else occlusion),
                )
            )


class DanceTrackWriter(SequenceWriter):
    """DanceTrack: ``<split>/<sequence>/{img1,gt/gt.txt,seqinfo.ini}``, rows of 9 columns, pedestrians only."""

    IMAGES = "{split}/{name}/img1"
    ANNOTATIONS = "{split}/{name}/gt/gt.txt"
    IMAGE_NAME = "{number:08d}.jpg"

    def _record(self, labels: SequenceOf[Label]) -> None:
        for label in labels:
            x1, y1, x2, y2 = label.box_xyxy
            self._rows.append((self._count, label.track_id, x1, y1, x2 - x1, y2 - y1, 1, 1, 1))

    def close(self) -> None:
        super().close()
        info = {
            "name": self.name,
            "imDir": "img1",
            "frameRate": f"{self._fps:g}",
            "seqLength": self._count,
            "imWidth": self._size[0],
            "imHeight": self._size[1],
            "imExt": ".jpg",
        }
        lines = [f"{key}={value}" for key, value in info.items()]
        (self._images.parent / "seqinfo.ini").write_text("\n".join(["[Sequence]", *lines, ""]))
