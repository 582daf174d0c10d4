"""ID labels of a clip: random labels per group, occlusion and switch augmentation, newborn targets (spec 4.3, 4.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class IdSettings:
    """The keys of a configuration that ID labels depend on.

    Attributes:
        groups: random labellings per clip (G).
        vocabulary: ID labels 0..V-1; V itself means newborn.
        training_ids: labelled objects per clip at most, <= vocabulary.
        overflow: what happens to objects beyond the vocabulary (`draw_id_slots`).
        occlusion_prob, switch_prob: chances of the two trajectory augmentations.
    """

    groups: int
    vocabulary: int
    training_ids: int
    overflow: str
    occlusion_prob: float
    switch_prob: float

    @staticmethod
    def from_config(config: Any) -> IdSettings:
        return IdSettings(
            groups=config.AUG_NUM_GROUPS,
            vocabulary=config.NUM_ID_VOCABULARY,
            training_ids=min(config.NUM_TRAINING_IDS or config.NUM_ID_VOCABULARY, config.NUM_ID_VOCABULARY),
            overflow=config.SUBSET_OVERFLOW,
            occlusion_prob=config.AUG_TRAJECTORY_OCCLUSION_PROB,
            switch_prob=config.AUG_TRAJECTORY_SWITCH_PROB,
        )


@dataclass(frozen=True)
class ClipSlots:
    """ID slots of one clip, all (G, T, N); the fields of `motip.data.batch.IdSlots` without the batch axis.

    Attributes:
        distractors: of the N slots, how many hold objects beyond the vocabulary (the last ones).
        dropped: objects without any slot.
    """

    trajectory_labels: np.ndarray
    trajectory_masks: np.ndarray
    trajectory_ann: np.ndarray
    unknown_labels: np.ndarray
    unknown_masks: np.ndarray
    unknown_ann: np.ndarray
    distractors: int = 0
    dropped: int = 0


SLOT_FIELDS = (
    "trajectory_labels",
    "trajectory_masks",
    "trajectory_ann",
    "unknown_labels",
    "unknown_masks",
    "unknown_ann",
)


def draw_id_slots(track_ids: Sequence[np.ndarray], settings: IdSettings, rng: np.random.Generator) -> ClipSlots:
    """Label the objects of a clip.

    Every distinct object gets a slot, and in every group a random label that is constant over the clip. With more
    objects than labels, a random subset, the same for all groups, is labelled. The others are

    * ``overflow="drop"``: without a slot, as published; they remain targets of the detector only.
    * ``overflow="distractor"``: unknown detections without a history, whose target is therefore newborn in every
      frame. The ID decoder must tell them from the objects it remembers, as it must in a crowd at run time. They
      take no part in the switch augmentation, since a history without a label would be a contradiction.

    ``training_ids`` below the vocabulary limits the size of the problem, so objects beyond it are dropped either way.

    Args:
        track_ids: per frame the (n,) ids in the order of that frame's boxes, unique within a frame.
    """
    annotations, objects = _annotation_index(track_ids)
    frames, total = annotations.shape
    labelled = min(total, settings.training_ids)
    order = rng.permutation(total) if labelled < total else np.arange(total)
    keeps_rest = settings.overflow == "distractor" and settings.training_ids == settings.vocabulary
    slots = total if keeps_rest else labelled
    chosen = np.concatenate([np.sort(order[:labelled]), np.sort(order[labelled:slots])])

    shape = (settings.groups, frames, slots)
    annotation = np.broadcast_to(annotations[:, chosen], shape).copy()
    labels = np.full(shape, -1, dtype=np.int64)
    labels[:, :, :labelled] = _draw_labels(settings, labelled, rng)[:, None]
    masks = annotation < 0
    masks |= _draw_occlusion(shape, settings.occlusion_prob, rng)

    trajectory_masks, trajectory_annotation = masks.copy(), annotation.copy()
    trajectory_masks[:, :, labelled:], trajectory_annotation[:, :, labelled:] = True, -1
    source = _draw_switch((settings.groups, frames, labelled), settings.switch_prob, rng)
    for array in (trajectory_masks, trajectory_annotation):
        array[:, :, :labelled] = np.take_along_axis(array[:, :, :labelled], source, axis=2)

    return ClipSlots(
        trajectory_labels=labels,
        trajectory_masks=trajectory_masks,
        trajectory_ann=trajectory_annotation,
        unknown_labels=np.where(_seen_before(trajectory_masks), labels, settings.vocabulary),
        unknown_masks=masks,
        unknown_ann=annotation,
        distractors=slots - labelled,
        dropped=objects - slots,
    )


def _annotation_index(track_ids: Sequence[np.ndarray]) -> tuple[np.ndarray, int]:
    """(T, N) position of each distinct object in each frame's annotation, -1 where absent; and N."""
    distinct = np.unique(np.concatenate([np.zeros(0, np.int64), *track_ids]))
    index = np.full((len(track_ids), len(distinct)), -1, dtype=np.int64)
    for frame, ids in enumerate(track_ids):
        index[frame, np.searchsorted(distinct, ids)] = np.arange(len(ids))
    return index, len(distinct)


def _draw_labels(settings: IdSettings, count: int, rng: np.random.Generator) -> np.ndarray:
    """(G, count) labels, distinct within a group."""
    return np.argsort(rng.random((settings.groups, settings.vocabulary)), axis=1)[:, :count]


def _draw_occlusion(shape: tuple[int, int, int], prob: float, rng: np.random.Generator) -> np.ndarray:
    """(G, T, N) True in one hidden stretch [begin, end) per chosen slot; the last frame is never hidden."""
    groups, frames, slots = shape
    chosen = rng.random((groups, slots)) < prob
    begin = rng.integers(0, frames, (groups, slots))
    end = begin + np.ceil((frames - 1 - begin) * rng.random((groups, slots))).astype(np.int64)
    time = np.arange(frames)[None, :, None]
    return chosen[:, None] & (time >= begin[:, None]) & (time < end[:, None])


def _draw_switch(shape: tuple[int, int, int], prob: float, rng: np.random.Generator) -> np.ndarray:
    """(G, T, N) slot whose content each slot shows: per group and frame a permutation among those that join."""
    joins = rng.random(shape) < prob
    places = np.argsort(~joins, axis=2, kind="stable")  # the joining slots in order, then the rest
    keys = np.where(joins, rng.random(shape), 2.0 + np.arange(shape[2]))
    content = np.argsort(keys, axis=2, kind="stable")  # the joining slots shuffled, then the rest in place
    source = np.empty(shape, dtype=np.int64)
    np.put_along_axis(source, places, content, axis=2)
    return source


def _seen_before(trajectory_masks: np.ndarray) -> np.ndarray:
    """(G, T, N) whether a slot shows anything at an earlier frame."""
    seen = np.zeros_like(trajectory_masks)
    seen[:, 1:] = np.logical_or.accumulate(~trajectory_masks, axis=1)[:, :-1]
    return seen
