"""Detections of one frame after the other in, tracks out (MOTIP, section 3.4)."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from motip.errors import MotipError
from motip.model import MOTIP
from motip.track.assign import ASSIGNMENTS
from motip.track.history import TokenHistory
from motip.track.reid import LongTermMemory
from motip.track.settings import TrackerSettings


@dataclass(frozen=True, slots=True)
class FrameTracks:
    """The n tracks seen in one frame, in query order.

    Attributes:
        ids: (n,) int64 track ids from 0, unique in the frame.
        scores: (n,) float32 detection scores.
        boxes_xyxy: (n, 4) float32 pixels of the original image, not clipped.
        class_ids: (n,) int64 class of the track, by the summed scores of its life so far.
        frame_class_ids: (n,) int64 class in this frame alone.
        queries: (n,) int64 detector query of each box.
        labels: (n,) int64 ID label of each track.
        newborn: (n,) bool, tracks that start (or come back from the long-term memory) in this frame.
    """

    ids: np.ndarray
    scores: np.ndarray
    boxes_xyxy: np.ndarray
    class_ids: np.ndarray
    frame_class_ids: np.ndarray
    queries: np.ndarray
    labels: np.ndarray
    newborn: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class _Detections:
    """Detections above the thresholds; embeds stay on the device, the rest is numpy."""

    queries: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    class_scores: np.ndarray
    boxes_xyxy: np.ndarray
    embeds: Tensor

    def select(self, index: np.ndarray) -> _Detections:
        return _Detections(
            self.queries[index],
            self.scores[index],
            self.classes[index],
            self.class_scores[index],
            self.boxes_xyxy[index],
            self.embeds[torch.from_numpy(index).to(self.embeds.device)],
        )


class RuntimeTracker:
    """The state of one sequence. Make a new one for each sequence.

    Args:
        model: a MOTIP with ID decoder, in eval mode.
        settings: thresholds and rules.
        image_size: (height, width) of the original frames in pixels.

    Attributes:
        counters: ``newborns_refused`` (objects that waited because every label was taken in that frame),
            ``labels_recycled`` (remembered but unseen tracks that lost their label to a newborn),
            ``recalled`` (ids given back by the long-term memory).
        notes: what differs from the plain algorithm, for whoever shows the result.
    """

    def __init__(self, model: MOTIP, settings: TrackerSettings, image_size: tuple[int, int]) -> None:
        if model.id_decoder is None or model.trajectory_modeling is None:
            raise MotipError(
                "this model cannot track: it is a detector without ID decoder",
                where="ONLY_DETR",
                fix="use a checkpoint trained with ONLY_DETR: False",
            )
        height, width = image_size
        if height < 1 or width < 1:
            raise MotipError("a frame has no area", where="image size", found=f"{height}×{width}")
        self.settings = settings
        self.counters: Counter[str] = Counter(newborns_refused=0, labels_recycled=0, recalled=0)
        self.notes: list[str] = []
        self._decoder = model.id_decoder
        self._trajectory_modeling = model.trajectory_modeling
        self._vocabulary = model.spec.num_id_vocabulary
        self._image_scale = torch.tensor([width, height, width, height], dtype=torch.float32)
        self._assign = ASSIGNMENTS[settings.assignment_protocol]
        self._oldest_age = self._check_memory(model.spec.rel_pe_length)
        self._frame = 0
        self._next_id = 0
        self._history = TokenHistory()
        self._queue = np.arange(self._vocabulary)  # labels, the longest unused first
        self._ids = np.full(self._vocabulary, -1)  # label -> track id, -1: label free
        self._last_seen = np.full(self._vocabulary, -1)
        self._votes = np.zeros((self._vocabulary, model.spec.num_classes))
        self._memory: LongTermMemory | None = None
        if settings.longterm_patience:
            self._memory = LongTermMemory(settings.longterm_patience, settings.longterm_similarity)
            self.notes.append(
                f"long-term memory on: patience {settings.longterm_patience} frames, "
                f"similarity {settings.longterm_similarity}"
            )

    @property
    def history_length(self) -> int:
        """Frames remembered, 0..``settings.history_frames``."""
        return min(self._frame, self.settings.history_frames)

    @property
    def active_labels(self) -> np.ndarray:
        """Sorted labels of the remembered tracks, seen or not."""
        return np.flatnonzero(self._ids >= 0)

    @property
    def id_queue(self) -> np.ndarray:
        """(V,) all labels, the one used longest ago first."""
        return self._queue.copy()

    @torch.inference_mode()
    def update(self, logits: Tensor, boxes: Tensor, embeds: Tensor) -> FrameTracks:
        """Advance by one frame.

        Args:
            logits: (Q, C) class scores before the sigmoid.
            boxes: (Q, 4) cxcywh in 0..1.
            embeds: (Q, D) decoder outputs, D = FEATURE_DIM.

        Raises:
            MotipError: shapes do not fit the model, or values are not finite.
        """
        self._check_shapes(logits, boxes, embeds)
        found = self._detect(logits, boxes, embeds)
        labels = self._identify(found.embeds)
        newborn = labels == self._vocabulary
        keep = np.flatnonzero(~newborn | (found.scores > self.settings.newborn_thresh))
        keep = keep[self._fits_vocabulary(newborn[keep], found.scores[keep])]
        found, labels, newborn = found.select(keep), labels[keep], newborn[keep]
        labels = self._name_newborns(found, labels, newborn)
        self._remember(found, labels)
        return FrameTracks(
            ids=self._ids_of(labels),
            scores=found.scores,
            boxes_xyxy=found.boxes_xyxy,
            class_ids=self._voted_classes,
            frame_class_ids=found.classes,
            queries=found.queries,
            labels=labels,
            newborn=newborn,
        )
