"""Online tracker: detections of one frame at a time to tracks (MOTIP, Gao et al., CVPR 2025, section 3.4)."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from motip.errors import MotipError
from motip.model import MOTIP
from motip.model.fast.frame_decoder import FrameDecoder
from motip.tracking.assign import ASSIGNMENTS
from motip.tracking.reid import LongTermMemory
from motip.tracking.settings import TrackerSettings
from motip.tracking.trajectories import TokenHistory


@dataclass(frozen=True, slots=True)
class FrameTracks:
    """The n tracks seen in one frame, in query order.

    Attributes:
        ids: (n,) int64 track ids from 0, unique in the frame.
        scores: (n,) float32 detection scores.
        boxes_xyxy: (n, 4) float32 pixels of the original image, not clipped.
        class_ids: (n,) int64 class of the track by its summed scores so far.
        frame_class_ids: (n,) int64 class in this frame alone.
        queries: (n,) int64 detector query of each box.
        labels: (n,) int64 ID label of each track.
        newborn: (n,) bool, tracks that start (or are re-identified by the long-term memory) in this frame.
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
    boxes_xyxy: np.ndarray
    embeds: Tensor

    def select(self, index: np.ndarray) -> _Detections:
        """The detections at these positions."""
        return _Detections(
            self.queries[index],
            self.scores[index],
            self.classes[index],
            self.boxes_xyxy[index],
            self.embeds[torch.from_numpy(index).to(self.embeds.device)],
        )


class Tracker:
    """Tracker of one sequence, updated frame by frame from the detector's output. Each sequence needs a new instance.

    Args:
        model: a MOTIP with ID decoder, in eval mode.
        settings: thresholds and rules.
        image_size: (height, width) of the original frames in pixels.
        decoder: decoder of another tracker of the same model, to share it; None creates one with a copy of the weights.

    Attributes:
        decoder: trajectory modelling and ID decoder of the model. Stateless, so several trackers may share it.
        counters: ``newborns_refused`` (newborns without a free label in their frame), ``labels_recycled`` (remembered
            but unseen tracks that lost their label to a newborn), ``recalled`` (ids re-assigned by long-term memory).
        notes: differences from the plain algorithm that a report of the results must show.

    Raises:
        MotipError: the model has no ID decoder, or a side of ``image_size`` is below 1.

    Examples:
        >>> from motip.model import ModelSpec, build_model
        >>> spec = ModelSpec(backbone="tiny_gn", hidden_dim=32, num_heads=2, enc_layers=1, dec_layers=1,
        ...                  feature_dim=32, id_dim=32, num_id_decoder_layers=1)
        >>> settings = TrackerSettings(miss_tolerance=20)
        >>> tracker = Tracker(build_model(spec).eval(), settings, image_size=(480, 640))
        >>> logits, boxes = torch.tensor([[3.0]]), torch.tensor([[0.5, 0.5, 0.25, 0.5]])  # one query, cxcywh in 0..1
        >>> tracks = tracker.update(logits, boxes, embeds=torch.randn(1, 32))
        >>> tracks.ids.tolist(), tracks.boxes_xyxy.tolist()
        ([0], [[240.0, 120.0, 400.0, 360.0]])
    """

    def __init__(
        self,
        model: MOTIP,
        settings: TrackerSettings,
        image_size: tuple[int, int],
        decoder: FrameDecoder | None = None,
    ) -> None:
        if model.id_decoder is None or model.trajectory_modeling is None:
            raise MotipError(
                "this model cannot track: it is a detector without ID decoder",
                where="ONLY_DETR",
                fix="use a checkpoint trained with ONLY_DETR: False",
            )
        height, width = image_size
        if height < 1 or width < 1:
            raise MotipError("a frame has no area", where="image size", found=f"{height}x{width}")
        self.settings = settings
        self.counters: Counter[str] = Counter(newborns_refused=0, labels_recycled=0, recalled=0)
        self.notes: list[str] = []
        self.decoder = decoder or FrameDecoder(model.trajectory_modeling, model.id_decoder)
        # Fixed facts of model and frames.
        self._vocabulary = model.spec.num_id_vocabulary
        self._image_scale = torch.tensor([width, height, width, height], dtype=torch.float32)
        self._assign = ASSIGNMENTS[settings.assignment_protocol]
        self._oldest_age = self._check_memory(model.spec.rel_pe_length)
        # State of the sequence.
        self._frame = 0
        self._next_id = 0
        self._history = TokenHistory()
        self._queue = np.arange(self._vocabulary)  # labels, least recently used first
        self._ids = np.full(self._vocabulary, -1)  # label -> track id, -1: label free
        self._last_seen = np.full(self._vocabulary, -1)
        self._votes = np.zeros((self._vocabulary, model.spec.num_classes))
        self._memory: LongTermMemory | None = None
        if settings.longterm_patience:
            self._memory = LongTermMemory(
                settings.longterm_patience, settings.longterm_similarity, settings.longterm_capacity
            )
            self.notes.append(
                f"long-term memory on: patience {settings.longterm_patience} frames, "
                f"similarity {settings.longterm_similarity}, at most {settings.longterm_capacity} tracks"
            )

    @property
    def history_length(self) -> int:
        """Frames in the history, 0..``settings.history_frames``."""
        return min(self._frame, self.settings.history_frames)

    @property
    def active_labels(self) -> np.ndarray:
        """Sorted labels of the remembered tracks, seen in the last frame or not."""
        return np.flatnonzero(self._ids >= 0)

    @property
    def id_queue(self) -> np.ndarray:
        """(V,) all labels, the least recently used first."""
        return self._queue.copy()

    @torch.inference_mode()
    def update(self, logits: Tensor, boxes: Tensor, embeds: Tensor) -> FrameTracks:
        """Track the next frame.

        Args:
            logits: (Q, C) class scores before the sigmoid.
            boxes: (Q, 4) cxcywh in 0..1.
            embeds: (Q, D) outputs of the detector's decoder, D = FEATURE_DIM.

        Returns:
            The n <= Q tracks observed in the frame.

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
        labels = self._label_newborns(found, labels, newborn)
        self._remember(found, labels)
        return FrameTracks(
            ids=self._ids[labels],
            scores=found.scores,
            boxes_xyxy=found.boxes_xyxy,
            class_ids=self._votes[labels].argmax(axis=1),
            frame_class_ids=found.classes,
            queries=found.queries,
            labels=labels,
            newborn=newborn,
        )

    def _detect(self, logits: Tensor, boxes: Tensor, embeds: Tensor) -> _Detections:
        """Queries above DET_THRESH and AREA_THRESH, boxes in pixels, always in float32."""
        scores, classes = logits.float().sigmoid().max(dim=-1)
        centre, size = boxes.float().split(2, dim=-1)
        corner = centre - size / 2
        pixels = torch.cat([corner, size], dim=-1) * self._image_scale.to(boxes.device)
        table = torch.cat([scores[:, None], classes[:, None].float(), pixels], dim=-1).cpu().numpy()  # one transfer
        self._check_finite(table, "detector")
        sizes = table[:, 4:]
        large = sizes[:, 0] * sizes[:, 1] > self.settings.area_thresh
        queries = np.flatnonzero((table[:, 0] > self.settings.det_thresh) & large)
        chosen = table[queries]
        return _Detections(
            queries=queries,
            scores=chosen[:, 0],
            classes=chosen[:, 1].astype(np.int64),
            boxes_xyxy=np.concatenate([chosen[:, 2:4], chosen[:, 2:4] + chosen[:, 4:]], axis=1),
            # In the type of the decoder weights, so that the history keeps its precision over 30 frames.
            embeds=embeds[torch.from_numpy(queries).to(embeds.device)].to(self.decoder.dtype),
        )

    def _identify(self, embeds: Tensor) -> np.ndarray:
        """(n,) label of each detection, V if it belongs to no remembered track."""
        tracked = self._ids >= 0
        if not len(embeds) or not tracked.any():
            return np.full(len(embeds), self._vocabulary)
        ages = np.minimum(self._frame - self._history.frames, self._oldest_age)
        hidden = self._history.labels < 0
        device = embeds.device
        unused = np.append(~tracked, False)  # "newborn" is never masked
        logits = self.decoder.decode(
            embeds,
            self._history.tokens(),
            torch.from_numpy(ages),  # on the CPU: the range check would synchronise the GPU twice
            torch.from_numpy(hidden).to(device) if hidden.any() else None,
            torch.from_numpy(unused).to(device) if self.settings.mask_unused_labels else None,
        ).float()
        scores = (logits.sigmoid() if self.settings.use_sigmoid else logits.softmax(dim=-1)).cpu().numpy()
        self._check_finite(scores, "ID decoder")
        return self._assign(scores, tracked, self.settings.id_thresh)

    def _fits_vocabulary(self, newborn: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Positions of the detections that get a label; newborns beyond the labels free in this frame are refused."""
        candidates = np.flatnonzero(newborn)
        free = self._vocabulary - int((~newborn).sum())
        surplus = len(candidates) - free
        if surplus <= 0:
            return np.arange(len(newborn))
        self.counters["newborns_refused"] += surplus
        if self.settings.newborn_order == "score":
            candidates = candidates[np.argsort(-scores[candidates], kind="stable")]
        return np.setdiff1d(np.arange(len(newborn)), candidates[free:])

    def _label_newborns(self, found: _Detections, labels: np.ndarray, newborn: np.ndarray) -> np.ndarray:
        """Assign newborns the least recently used labels, dropping remembered tracks that have them, and track ids."""
        labels = labels.copy()
        matched = np.isin(self._queue, labels[~newborn])
        fresh = self._queue[~matched][: int(newborn.sum())]
        recycled = fresh[self._ids[fresh] >= 0]
        self.counters["labels_recycled"] += len(recycled)
        self._release(recycled)
        labels[newborn] = fresh
        self._ids[fresh] = self._new_ids(found, newborn)
        return labels

    def _new_ids(self, found: _Detections, newborn: np.ndarray) -> np.ndarray:
        """Track ids of the newborns: re-identified by the long-term memory, else the next unused numbers."""
        count = int(newborn.sum())
        ids = np.full(count, -1)
        if self._memory is not None and count:
            ids = self._memory.recall(self._to_numpy(found.select(np.flatnonzero(newborn)).embeds), self._frame)
            self.counters["recalled"] += int((ids >= 0).sum())
        new = ids < 0
        ids[new] = self._next_id + np.arange(int(new.sum()))
        self._next_id += int(new.sum())
        return ids

    def _remember(self, found: _Detections, labels: np.ndarray) -> None:
        """Append this frame to the history and drop tracks unseen for longer than MISS_TOLERANCE."""
        if len(labels):
            features = self.decoder.model_trajectories(found.embeds)
            tokens = self.decoder.encode_history(features, torch.from_numpy(labels).to(features.device))
            self._history.append(tokens, labels, self._frame)
            self._last_seen[labels] = self._frame
            np.add.at(self._votes, (labels, found.classes), found.scores)
            # The published order within a frame is query order; by score, the weakest of a frame is recycled first.
            by_score = self.settings.newborn_order == "score"
            used = labels[np.argsort(found.scores, kind="stable")] if by_score else labels
            self._queue = np.concatenate([self._queue[~np.isin(self._queue, labels)], used])
        if self._memory is not None:
            self._memory.observe(self._ids[labels], self._to_numpy(found.embeds))
        oldest = self._frame + 1 - self.settings.history_frames
        self._history.forget_before(oldest)
        self._release(np.flatnonzero((self._ids >= 0) & (self._last_seen < oldest)))
        self._frame += 1

    def _release(self, labels: np.ndarray) -> None:
        """Drop the tracks with these labels."""
        if not len(labels):
            return
        if self._memory is not None:
            self._memory.lose(self._ids[labels], self._frame)
        self._history.drop_labels(labels)
        self._ids[labels] = -1
        self._votes[labels] = 0.0

    @staticmethod
    def _to_numpy(embeds: Tensor) -> np.ndarray:
        array: np.ndarray = embeds.float().cpu().numpy()
        return array

    def _check_memory(self, rel_pe_length: int) -> int:
        """Largest age in the relative position embedding; older history uses its last row, with a warning."""
        oldest = rel_pe_length - 1
        if self.settings.history_frames > oldest:
            note = (
                f"MISS_TOLERANCE {self.settings.miss_tolerance} needs REL_PE_LENGTH "
                f"{self.settings.history_frames + 1}, "
                f"the model has {rel_pe_length}: older frames use its last row"
            )
            warnings.warn(note, stacklevel=3)
            self.notes.append(note)
        return oldest

    def _check_finite(self, values: np.ndarray, source: str) -> None:
        if not np.isfinite(values).all():
            raise MotipError(
                f"the {source}'s output is not finite",
                where=f"frame {self._frame} of the sequence",
                fix="the weights have diverged or do not fit this precision: try INFERENCE_DTYPE: FP32",
            )

    def _check_shapes(self, logits: Tensor, boxes: Tensor, embeds: Tensor) -> None:
        classes, width = self._votes.shape[1], self.decoder.spec.feature_dim
        expected = [(len(logits), classes), (len(logits), 4), (len(logits), width)]
        found = [tuple(tensor.shape) for tensor in (logits, boxes, embeds)]
        if found != expected:
            raise MotipError(
                "the detector's output does not fit the model",
                where="logits, boxes, embeds",
                found=found,
                expected=f"(Q, {classes}), (Q, 4), (Q, {width})",
            )
