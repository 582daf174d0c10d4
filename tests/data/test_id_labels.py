"""ID labels: objects beyond the vocabulary, empty frames, random sampling."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from motip.config import Config
from motip.data.id_labels import SLOT_FIELDS, IdSettings, draw_id_slots

SETTINGS = IdSettings(
    groups=4, vocabulary=6, training_ids=6, overflow="distractor", occlusion_prob=0.5, switch_prob=0.5
)


def _crowd(frames: int = 5, objects: int = 10) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.permutation(objects)[: objects - t] + 100 for t in range(frames)]


def test_distractors_are_unknown_newborns_without_history() -> None:
    for seed in range(20):
        slots = draw_id_slots(_crowd(), SETTINGS, np.random.default_rng(seed))
        assert slots.unknown_labels.shape == (4, 5, 10)
        assert (slots.distractors, slots.dropped) == (4, 0)
        rest = np.s_[:, :, 6:]
        assert slots.trajectory_masks[rest].all() and (slots.trajectory_ann[rest] == -1).all()
        assert (slots.trajectory_labels[rest] == -1).all()
        assert (slots.unknown_labels[rest] == SETTINGS.vocabulary).all()
        assert not slots.unknown_masks[rest].all(), "distractors must take part in the loss"
        assert (slots.trajectory_labels[:, :, :6] >= 0).all()
        shown = slots.trajectory_ann[:, :, :6][~slots.trajectory_masks[:, :, :6]]
        assert (shown >= 0).all()


def test_every_object_has_exactly_one_slot_when_distractors_are_kept() -> None:
    ids = _crowd()
    slots = draw_id_slots(ids, SETTINGS, np.random.default_rng(0))
    for group in range(4):
        for t, own in enumerate(ids):
            present = slots.unknown_ann[group, t]
            assert sorted(present[present >= 0].tolist()) == list(range(len(own)))


def test_settings_are_read_from_the_configuration() -> None:
    config = Config(SUBSET_OVERFLOW="drop", NUM_ID_VOCABULARY=40, NUM_TRAINING_IDS=30, AUG_NUM_GROUPS=3)
    found = IdSettings.from_config(config)
    assert (found.overflow, found.vocabulary, found.training_ids, found.groups) == ("drop", 40, 30, 3)
    assert IdSettings.from_config(Config()).overflow == "distractor"


def test_dropped_objects_are_counted() -> None:
    slots = draw_id_slots(_crowd(), replace(SETTINGS, overflow="drop"), np.random.default_rng(0))
    assert slots.unknown_labels.shape[2] == 6 and (slots.distractors, slots.dropped) == (0, 4)


def test_fewer_training_ids_limit_the_slots_in_both_modes() -> None:
    for overflow in ("drop", "distractor"):
        few = replace(SETTINGS, overflow=overflow, training_ids=3)
        slots = draw_id_slots(_crowd(), few, np.random.default_rng(0))
        assert slots.unknown_labels.shape[2] == 3 and (slots.distractors, slots.dropped) == (0, 7)


def test_the_kept_subset_is_random() -> None:
    ids = [np.arange(10)]
    subsets = {
        tuple(draw_id_slots(ids, replace(SETTINGS, overflow="drop"), np.random.default_rng(seed)).unknown_ann[0, 0])
        for seed in range(20)
    }
    assert len(subsets) > 5


def test_a_clip_without_objects_has_no_slots() -> None:
    empty = [np.zeros(0, np.int64)] * 3
    slots = draw_id_slots(empty, SETTINGS, np.random.default_rng(0))
    assert all(getattr(slots, field).shape == (4, 3, 0) for field in SLOT_FIELDS)


def test_a_frame_without_objects_is_masked() -> None:
    slots = draw_id_slots([np.array([1, 2]), np.zeros(0, np.int64), np.array([2])], SETTINGS, np.random.default_rng(0))
    assert slots.unknown_masks[:, 1].all() and (slots.unknown_ann[:, 1] == -1).all()


def test_equal_seeds_give_equal_slots_and_groups_differ() -> None:
    first, second = (draw_id_slots(_crowd(), SETTINGS, np.random.default_rng(8)) for _ in range(2))
    assert all((getattr(first, field) == getattr(second, field)).all() for field in SLOT_FIELDS)
    assert not (first.trajectory_labels[0] == first.trajectory_labels[1]).all()


def test_switch_probability_zero_keeps_all_slots_and_one_moves_most() -> None:
    ids = [np.arange(5)] * 6
    calm = replace(SETTINGS, occlusion_prob=0.0, switch_prob=0.0)
    slots = draw_id_slots(ids, calm, np.random.default_rng(0))
    assert (slots.trajectory_ann == slots.unknown_ann).all()
    slots = draw_id_slots(ids, replace(calm, switch_prob=1.0), np.random.default_rng(0))
    assert (slots.trajectory_ann != slots.unknown_ann).mean() > 0.5
