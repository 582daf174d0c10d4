"""Tracked boxes of one frame, with conversions to JSON and `supervision`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from motip.errors import MotipError


@dataclass(frozen=True)
class Detections:
    """The n tracked boxes of one frame.

    Attributes:
        frame: 0-based frame number in the source; numbered images keep the number in their name.
        image: (H, W, 3) uint8 RGB frame.
        track_ids: (n,) int64 from 0, unique in the frame. MOT rows, JSON lines and drawn labels count from 1.
        boxes_xyxy: (n, 4) float32 pixels of the image, not clipped.
        class_ids: (n,) int64 class of each track by its summed scores so far; indexes ``class_names``.
        frame_class_ids: (n,) int64 class in this frame alone.
        scores: (n,) float32 detection scores in 0..1.
        newborn: (n,) bool, first frame of the track id.
        recalled: (n,) bool, re-identified by the long-term memory in this frame.
        class_names: names by class id.
    """

    frame: int
    image: np.ndarray
    track_ids: np.ndarray
    boxes_xyxy: np.ndarray
    class_ids: np.ndarray
    frame_class_ids: np.ndarray
    scores: np.ndarray
    newborn: np.ndarray
    recalled: np.ndarray
    class_names: Sequence[str]

    def __len__(self) -> int:
        return len(self.track_ids)

    @property
    def boxes_xywh(self) -> np.ndarray:
        """(n, 4) left, top, width, height in pixels."""
        corner = self.boxes_xyxy[:, :2]
        boxes: np.ndarray = np.concatenate([corner, self.boxes_xyxy[:, 2:] - corner], axis=1)
        return boxes

    @property
    def classes(self) -> list[str]:
        """Class name of each box."""
        return [self.class_names[each] for each in self.class_ids.tolist()]

    def to_json(self, fps: float) -> dict[str, Any]:
        """The frame as JSON-serialisable values; frames and ids count from 1, as in MOT rows.

        Args:
            fps: frames per second of the source, from which ``time_s`` is computed.
        """
        height, width = self.image.shape[:2]
        columns = (self.track_ids, self.classes, self.scores, self.boxes_xywh, self.newborn, self.recalled)
        return {
            "frame": self.frame + 1,
            "time_s": round(self.frame / fps, 4),
            "width": width,
            "height": height,
            "tracks": [
                {
                    "id": int(track_id) + 1,
                    "class": name,
                    "score": round(float(score), 4),
                    "box_xywh": [round(float(value), 2) for value in box],
                    "new": bool(newborn),
                    "reidentified": bool(recalled),
                }
                for track_id, name, score, box, newborn, recalled in zip(*columns, strict=True)
            ],
        }

    def to_supervision(self) -> Any:
        """Convert to ``supervision.Detections``; ``tracker_id`` holds track ids, ``data["class_name"]`` class names.

        Raises:
            MotipError: the package `supervision` is not installed.
        """
        try:
            # By name: the package is optional, and the import rules of `motip.tracking` allow only torch.
            supervision = importlib.import_module("supervision")
        except ImportError as error:
            raise MotipError(
                "the package `supervision` cannot be imported",
                where="to_supervision()",
                found=error,
                fix="install it: pip install supervision",
            ) from error
        return supervision.Detections(
            xyxy=self.boxes_xyxy.astype(np.float32),
            confidence=self.scores.astype(np.float32),
            class_id=self.class_ids.astype(int),
            tracker_id=self.track_ids.astype(int),
            data={"class_name": np.array(self.classes, dtype=np.str_)},
        )
