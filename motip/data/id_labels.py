"""ID labels of a clip: random labels per group, occlusion and switch augmentation, newborn targets (spec 4.3, 4.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from motip.config import Config


@dataclass(frozen=True)
class IdSettings:
    """ID label settings of a configuration.

    Attributes:
        groups: number of random labellings per clip (G).
        vocabulary: number of ID labels V; labels are 0..V-1, and V is newborn.
        training_ids: maximum number of labelled objects per clip, <= vocabulary.
        overflow: treatment of objects beyond the vocabulary, "drop" or "distractor" (`draw_id_slots`).
        occlusion_prob, switch_prob: probabilities of the two trajectory augmentations.
    """

    groups: int
    vocabulary: int
    training_ids: int
    overflow: str
    occlusion_prob: float
    switch_prob: float

    @staticmethod
    def from_config(config: Config) -> IdSettings:
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
        distractors: number of slots, the last of the N, for objects beyond the vocabulary.
        dropped: number of objects without a slot.
    """

    trajectory_labels: np.ndarray
    trajectory_masks: np.ndarray
    trajectory_ann: np.ndarray
    unknown_labels: np.ndarray
    unknown_masks: np.ndarray
    unknown_ann: np.ndarray
    distractors: int = 0
    dropped: int = 0


SLOT_FIELDS = tuple(each.name for each in fields(ClipSlots) if each.default is MISSING)


def draw_id_slots(track_ids: Sequence[np.ndarray], settings: IdSettings, rng: np.random.Generator) -> ClipSlots:
    """Assign random ID labels to the objects of a clip (spec 4.3, 4.4).

    Every distinct object gets a slot, and in every group a random label that is constant over the clip. With more
    objects than labels, a random subset, the same for all groups, is labelled. The others are, with

    * ``overflow="drop"``, without a slot, as published; they remain targets of the detector only;
    * ``overflow="distractor"``, unknown detections without a trajectory, so their target is newborn in every frame.
      The ID decoder must distinguish them from known objects, as in a crowd at inference. They take no part in the
      switch augmentation, which needs a trajectory with a label.

    If ``training_ids`` is below the vocabulary, objects beyond it are dropped in both modes.

    Args:
        track_ids: per frame the (n,) track ids in the order of that frame's boxes, unique within a frame.
    """
    # Which objects get a slot, and which of them a label.
    annotations, objects = _annotation_index(track_ids)
    frames, total = annotations.shape
    labelled = min(total, settings.training_ids)
    order = rng.permutation(total) if labelled < total else np.arange(total)
    keeps_rest = settings.overflow == "distractor" and settings.training_ids == settings.vocabulary
    slots = total if keeps_rest else labelled
    chosen = np.concatenate([np.sort(order[:labelled]), np.sort(order[labelled:slots])])

    # Random labels, and the slots that are absent or occluded.
    shape = (settings.groups, frames, slots)
    annotation = np.broadcast_to(annotations[:, chosen], shape).copy()
    labels = np.full(shape, -1, dtype=np.int64)
    labels[:, :, :labelled] = _draw_labels(settings, labelled, rng)[:, None]
    masks = annotation < 0
    masks |= _draw_occlusion(shape, settings.occlusion_prob, rng)

    # Trajectories: none for distractors, switched among the labelled.
    trajectory_masks, trajectory_annotation = masks.copy(), annotation.copy()
    trajectory_masks[:, :, labelled:], trajectory_annotation[:, :, labelled:] = True, -1
    source = _draw_switch((settings.groups, frames, labelled), settings.switch_prob, rng)
    for array in (trajectory_masks, trajectory_annotation):
        array[:, :, :labelled] = np.take_along_axis(array[:, :, :labelled], source, axis=2)

    return ClipSlots(
        trajectory_labels=labels,
        trajectory_masks=trajectory_masks,
        trajectory_ann=trajectory_annotation,
        unknown_labels=np.where(_has_history(trajectory_masks), labels, settings.vocabulary),
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
    """(G, T, N) True in one occluded interval [begin, end) per sampled slot; the last frame is never occluded."""
    groups, frames, slots = shape
    chosen = rng.random((groups, slots)) < prob
    begin = rng.integers(0, frames, (groups, slots))
    end = begin + np.ceil((frames - 1 - begin) * rng.random((groups, slots))).astype(np.int64)
    time = np.arange(frames)[None, :, None]
    return chosen[:, None] & (time >= begin[:, None]) & (time < end[:, None])


def _draw_switch(shape: tuple[int, int, int], prob: float, rng: np.random.Generator) -> np.ndarray:
    """(G, T, N) source slot of each slot: per group and frame a permutation of the slots sampled for the switch."""
    joins = rng.random(shape) < prob
    targets = np.argsort(~joins, axis=2, kind="stable")  # the switched slots in order, then the others
    keys = np.where(joins, rng.random(shape), 2.0 + np.arange(shape[2]))
    content = np.argsort(keys, axis=2, kind="stable")  # the switched slots shuffled, then the others in order
    source = np.empty(shape, dtype=np.int64)
    np.put_along_axis(source, targets, content, axis=2)
    return source


def _has_history(trajectory_masks: np.ndarray) -> np.ndarray:
    """(G, T, N) whether a slot has an unmasked entry at an earlier frame."""
    history = np.zeros_like(trajectory_masks)
    history[:, 1:] = np.logical_or.accumulate(~trajectory_masks, axis=1)[:, :-1]
    return history
