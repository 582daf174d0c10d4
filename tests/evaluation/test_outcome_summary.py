from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from motip.data.sequence import ClassMap, Frame, Sequence, TrackRows
from motip.evaluation.metrics import score
from motip.evaluation.outcome_summary import OutcomeSummary, summarise_outcomes
from motip.evaluation.outcomes import GT_OUTCOMES, PRED_OUTCOMES
from motip.evaluation.protocols import scored_sequence
from tests.helpers.track_rows import disturbed, random_rows, rows

CLASSES = ("pedestrian", "car")
MAP = ClassMap(CLASSES, {name: (name,) for name in CLASSES})


def _labels(truth: TrackRows, dataset: str = "visdrone", seed: int = 0, occluded: bool = True) -> Sequence:
    """The rows as a labelled sequence with random attributes and an ignored region in every frame."""
    rng = np.random.default_rng(seed)
    frames = []
    for number in range(int(truth.frames.max()) + 1):
        own = np.flatnonzero(truth.frames == number)
        boxes = np.concatenate([truth.boxes_xyxy[own], [[0, 0, 200, 200]]]).astype(np.float32)
        frames.append(
            Frame(
                number,
                None,
                boxes,
                np.append(truth.track_ids[own], -1),
                (*(CLASSES[index] for index in truth.class_ids[own]), "ignored regions"),
                np.append(np.zeros(len(own), bool), True),
                rng.integers(0, 3, len(boxes)).astype(np.int8) * occluded,
                rng.integers(0, 2, len(boxes)).astype(np.int8),
            )
        )
    return Sequence("s", dataset, "val", 10.0, 400, 300, tuple(frames))


def _summary(seed: int, dataset: str = "visdrone", protocol: str = "plain", occluded: bool = True) -> OutcomeSummary:
    truth = random_rows(seed)
    labels = _labels(truth, dataset, seed, occluded)
    scored = scored_sequence(labels, MAP, disturbed(truth, seed), protocol)
    return summarise_outcomes(labels, scored, MAP, protocol)


@pytest.mark.parametrize("protocol", ["plain", "visdrone"])
def test_groups_sum_to_totals_and_totals_equal_the_scores(protocol: str) -> None:
    truths = [random_rows(seed) for seed in range(3)]
    labels = [_labels(truth, seed=seed) for seed, truth in enumerate(truths)]
    scored = [
        scored_sequence(each, MAP, disturbed(truth, seed), protocol)
        for seed, (each, truth) in enumerate(zip(labels, truths, strict=True))
    ]
    parts = [summarise_outcomes(one, other, MAP, protocol) for one, other in zip(labels, scored, strict=True)]
    total = OutcomeSummary()
    for part in parts:
        total.add(part)
    named = [replace(each, name=f"s{number}") for number, each in enumerate(scored)]
    cells = score(named, CLASSES, protocol).per_class
    for name in CLASSES:
        totals = total.totals[name]
        assert totals["missed"] == cells[name]["FN"] and totals["false positive"] == cells[name]["FP"]
        assert totals["identity switch"] == cells[name]["IDSW"] and totals["fragment"] == cells[name]["Frag"]
        assert totals["boxes"] == cells[name]["GT"] == sum(totals[outcome] for outcome in GT_OUTCOMES)
        assert totals["true positive"] == totals["tracked"] + totals["identity switch"] == cells[name]["TP"]
        assert totals["missed"] == sum(part.totals[name]["missed"] for part in parts)
        assert set(total.groups[name]) == {"size", "occlusion", "truncation", "border", "crowd"}
        for dimension, groups in total.groups[name].items():
            for outcome in ("boxes", "fragment", *GT_OUTCOMES):
                assert sum(counts[outcome] for counts in groups.values()) == totals[outcome], (dimension, outcome)
            for outcome in PRED_OUTCOMES:
                if dimension in ("size", "border", "crowd"):
                    assert sum(counts[outcome] for counts in groups.values()) == totals[outcome], (dimension, outcome)
                else:
                    assert all(outcome not in counts for counts in groups.values())
        assert sum(total.gaps[name].values()) == totals["identity switch"]
    if protocol == "plain":
        assert total.totals["car"]["ignored"] + total.totals["pedestrian"]["ignored"] > 0
    assert len(total.switches) == sum(cells[name]["IDSW"] for name in CLASSES)  # type: ignore[misc]
    wrong = [cells[name][what] for name in CLASSES for what in ("FN", "FP", "IDSW")]
    assert sum(total.frames.values()) == sum(wrong)  # type: ignore[arg-type]
    json.dumps(total.to_json())


def test_attributes_missing_in_the_format_are_counted_as_unknown() -> None:
    both = _summary(1, "bdd100k")
    assert both.groups["car"]["occlusion"]["unknown"]["boxes"] == 0
    assert both.groups["car"]["truncation"]["truncated"]["boxes"] > 0
    mot = _summary(1, "motchallenge")
    assert mot.groups["car"]["occlusion"]["unknown"]["boxes"] == 0
    assert mot.groups["car"]["truncation"]["unknown"] == {
        name: mot.totals["car"][name] for name in ("boxes", *GT_OUTCOMES, "fragment")
    }
    dance = _summary(1, "motchallenge", occluded=False)
    assert dance.groups["car"]["occlusion"]["unknown"]["boxes"] == dance.totals["car"]["boxes"] > 0
    seen = _summary(1, "visdrone", occluded=False)
    assert seen.groups["car"]["occlusion"]["not occluded"]["boxes"] == seen.totals["car"]["boxes"]


def test_each_box_has_the_attributes_of_its_label() -> None:
    """Also with an equal box of another class, and after a class flip that gives the track a new id."""
    box = np.array([100, 100, 150, 160], np.float32)
    frames = tuple(
        Frame(
            number,
            None,
            np.stack([box, box + number, box]),
            np.array([1, 2, 3]),
            ("car", "car" if number else "pedestrian", "pedestrian"),
            np.zeros(3, bool),
            np.array([2, 0, 1], np.int8),
            np.array([1, 0, 0], np.int8),
        )
        for number in range(3)
    )
    labels = Sequence("s", "visdrone", "val", 10.0, 400, 300, frames)
    scored = scored_sequence(labels, MAP, rows((0, 9, 100, 100, 150, 160, 1)), "visdrone")
    summary = summarise_outcomes(labels, scored, MAP, "visdrone")
    cars, persons = summary.groups["car"], summary.groups["pedestrian"]
    assert [cars["occlusion"][name]["boxes"] for name in cars["occlusion"]] == [2, 0, 3, 0]
    assert cars["occlusion"]["heavily occluded"]["tracked"] == 1
    assert [persons["occlusion"][name]["boxes"] for name in persons["occlusion"]] == [1, 3, 0, 0]
    assert cars["truncation"]["truncated"]["boxes"] == 3 and persons["truncation"]["truncated"]["boxes"] == 0
    assert cars["border"]["farther inside"]["boxes"] == 5 and cars["size"]["medium"]["boxes"] == 5


def test_switches_are_listed_with_their_sequence_and_grouped_by_gap() -> None:
    truth = rows(*[(frame, 3, 0, 0, 10, 10, 1) for frame in range(6)])
    labels = _labels(truth)
    pred = rows((0, 5, 0, 0, 10, 10, 1), (1, 6, 0, 0, 10, 10, 1), (4, 7, 0, 0, 10, 10, 1))
    summary = summarise_outcomes(labels, scored_sequence(labels, MAP, pred, "plain"), MAP, "plain")
    assert summary.switches == [
        {"sequence": "s", "class": "car", "frame": 1, "object": 3, "from": 5, "to": 6, "gap": 1},
        {"sequence": "s", "class": "car", "frame": 4, "object": 3, "from": 6, "to": 7, "gap": 3},
    ]
    assert list(summary.gaps["car"].values()) == [1, 1, 0, 0]
    assert summary.worst_frames(2) == [
        {"sequence": "s", "frame": 1, "errors": 1},
        {"sequence": "s", "frame": 2, "errors": 1},
    ]
    header, lines = summary.table("car")
    assert header[:3] == ["", "", "boxes"] and lines[0][:5] == ["all", "", "6", "3", "50.0"]
    assert all(len(line) == len(header) for line in lines)
