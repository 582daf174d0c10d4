"""Invariants of ID labels, for recorded samples of the published generator and for ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motip.data.id_labels import SLOT_FIELDS, ClipSlots, IdSettings, draw_id_slots
from tests.parity.sizes import or_skip, present

SAMPLES = 40


def _random(cfg: np.ndarray) -> bool:
    """Whether slots are random: augmented, or a subset of the objects."""
    _, _, distinct, vocabulary, training_ids, occlusion, switch = cfg.tolist()
    return bool(occlusion or switch or distinct > min(vocabulary, training_ids))


def _cases(include_random: bool = True) -> list[Any]:
    """(file, case name) of every recorded case, or of those without randomness."""
    found = []
    for path in present("id_labels*.npz"):
        with np.load(path) as file:
            cfgs = [key for key in file.files if key.endswith("_cfg")]
            names = [key.removesuffix("_cfg") for key in cfgs if include_random or not _random(file[key])]
        found += [pytest.param(path, name, id=f"{path.stem}-{name}") for name in names]
    return or_skip(found, "id_labels*.npz" if include_random else "id_labels*.npz with a case without randomness", 2)


def _case(path: Path, name: str) -> tuple[list[np.ndarray], np.ndarray, ClipSlots]:
    with np.load(path) as file:
        ids = [row[row >= 0] for row in file[f"{name}_ids"]]
        long = {"labels": "id_labels", "masks": "id_masks", "ann": "ann_idxs"}
        fields = [field.split("_") for field in SLOT_FIELDS]
        published = ClipSlots(*(file[f"{name}_{side}_{long[what]}"] for side, what in fields))
        return ids, file[f"{name}_cfg"], published


def _settings(cfg: np.ndarray) -> IdSettings:
    groups, _, _, vocabulary, training_ids, occlusion, switch = cfg.tolist()
    return IdSettings(int(groups), int(vocabulary), int(training_ids), "drop", occlusion, switch)


def _check(ids: list[np.ndarray], cfg: np.ndarray, slots: ClipSlots) -> None:
    groups, frames, distinct, vocabulary, training_ids = (int(value) for value in cfg[:5])
    occlusion, switch = float(cfg[5]), float(cfg[6])
    count = training_ids if distinct > training_ids else min(distinct, vocabulary)
    for field in SLOT_FIELDS:
        assert getattr(slots, field).shape == (groups, frames, count), field

    labels = slots.trajectory_labels
    assert (labels == labels[:, :1]).all(), "a label is constant over the clip"
    assert ((labels >= 0) & (labels < vocabulary)).all()
    assert all(len(set(group[0].tolist())) == count for group in labels), "labels are distinct within a group"

    absent = slots.unknown_ann < 0
    assert (slots.unknown_masks >= absent).all()
    assert (absent == absent[:1]).all(), "the subset is the same for all groups"
    for group in range(groups):
        for slot in range(count):
            shown = {
                int(ids[t][slots.unknown_ann[group, t, slot]]) for t in range(frames) if not absent[group, t, slot]
            }
            assert len(shown) == 1, "a slot is one object"
    if occlusion == 0:
        assert (slots.unknown_masks == absent).all()
    assert (slots.unknown_masks[:, -1] == absent[:, -1]).all(), "the last frame is never hidden"
    _check_stretches(slots.unknown_masks & ~absent, absent)

    trajectory = slots.trajectory_ann * 2 + slots.trajectory_masks
    unknown = slots.unknown_ann * 2 + slots.unknown_masks
    assert (np.sort(trajectory, axis=2) == np.sort(unknown, axis=2)).all(), "a switch permutes within a frame"
    if switch == 0:
        assert (trajectory == unknown).all()

    for t in range(frames):
        seen = (~slots.trajectory_masks[:, :t]).any(axis=1)
        expected = np.where(seen, labels[:, t], vocabulary)
        assert (slots.unknown_labels[:, t] == expected).all(), "newborn until the trajectory shows something"


def _check_stretches(hidden: np.ndarray, absent: np.ndarray) -> None:
    """Hidden frames of a slot form one stretch, up to frames where the object is absent anyway."""
    groups, _, slots = hidden.shape
    for group in range(groups):
        for slot in range(slots):
            at = np.flatnonzero(hidden[group, :, slot])
            if len(at):
                inside = slice(at[0], at[-1] + 1)
                assert (hidden[group, inside, slot] | absent[group, inside, slot]).all()


@pytest.mark.parametrize(("path", "name"), _cases())
def test_invariants_hold_for_published_samples(path: Path, name: str) -> None:
    ids, cfg, published = _case(path, name)
    _check(ids, cfg, published)


@pytest.mark.parametrize(("path", "name"), _cases())
def test_invariants_hold_for_our_samples(path: Path, name: str) -> None:
    ids, cfg, _ = _case(path, name)
    for seed in range(SAMPLES):
        _check(ids, cfg, draw_id_slots(ids, _settings(cfg), np.random.default_rng(seed)))


@pytest.mark.parametrize(("path", "name"), _cases(include_random=False))
def test_unaugmented_slots_equal_the_published_ones_up_to_order(path: Path, name: str) -> None:
    ids, cfg, published = _case(path, name)
    ours = draw_id_slots(ids, _settings(cfg), np.random.default_rng(0))
    for field in ("unknown_masks", "unknown_ann", "trajectory_masks", "trajectory_ann"):
        mine, theirs = getattr(ours, field)[0], getattr(published, field)[0]
        assert sorted(map(tuple, mine.T)) == sorted(map(tuple, theirs.T)), field
