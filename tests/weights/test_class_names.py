"""Transfer of class rows by name: shared classes keep their logits, new ones start from the configured row."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from motip.errors import MotipError
from motip.model import MOTIP
from motip.weights import TransferReport, load_pretrained, save_checkpoint
from motip.weights.class_names import canonical_name, match_classes
from tests.helpers.weight_cases import detector_logits, detector_state, save_published, tiny_model

EIGHT = ("truck", "pedestrian", "bus", "car", "rider", "bicycle", "motorcycle", "train")
FIVE = ("bus", "van", "car", "pedestrian", "tricycle")


def transfer_classes(
    tmp_path: Path, parent: MOTIP, old: tuple[str, ...], new: tuple[str, ...], **options: object
) -> tuple[MOTIP, TransferReport]:
    save_checkpoint(tmp_path / "parent.pth", model=parent, classes=old, config={}, epoch=0, step=1)
    child = tiny_model(99, num_classes=len(new))
    report = load_pretrained(child, tmp_path / "parent.pth", new, **options)  # type: ignore[arg-type]
    return child, report


def test_1_2_8_5_and_reordering_keep_the_logits_of_shared_classes(tmp_path: Path) -> None:
    stages = [("pedestrian",), ("pedestrian", "car"), EIGHT, FIVE, tuple(reversed(FIVE))]
    model = tiny_model(7)
    for old, new in pairwise(stages):
        child, report = transfer_classes(tmp_path, model, old, new)
        before, after = detector_logits(model), detector_logits(child)
        shared = [name for name in new if name in old]
        assert shared
        for name in shared:
            difference = (before[..., old.index(name)] - after[..., new.index(name)]).abs().max()
            assert difference < 1e-6, (old, new, name)
        assert set(report.dropped_classes) == set(old) - set(new)
        for name in set(new) - set(old):
            assert any(f"class '{name}' is new" in note for note in report.notes)
        model = child


def test_class_from_the_prior_scores_below_known_classes(tmp_path: Path) -> None:
    for salt in range(5):
        parent = tiny_model(salt, num_classes=2)
        child, _ = transfer_classes(tmp_path, parent, ("pedestrian", "car"), ("van", "pedestrian", "bus", "car"))
        logits = detector_logits(child)
        known, new = logits[..., [1, 3]].max(-1).values, logits[..., [0, 2]].max(-1).values
        assert (new <= known - 1.0 + 1e-5).all()
        assert child.detr.class_embed[0].bias[0] <= -math.log(99.0)
        assert torch.equal(logits.max(-1).values, known)


def test_new_class_starts_from_the_row_of_its_relative(tmp_path: Path) -> None:
    parent = tiny_model(7, num_classes=2)
    new = ("van", "pedestrian", "truck", "car")
    child, report = transfer_classes(
        tmp_path, parent, ("pedestrian", "car"), new, new_class_from={"van": "car", "truck": "van", "car": "pedestrian"}
    )
    before, after = detector_logits(parent), detector_logits(child)
    for index, source in enumerate((1, 0, 1, 1)):  # truck from van from car; car is known, so its entry is unused
        assert (before[..., source] - after[..., index]).abs().max() < 1e-6
    assert report.class_moves[0] == "van <- row 1 (car, relative)"


def test_coco_head_to_four_classes(tmp_path: Path) -> None:
    parent = tiny_model(7, num_classes=91)
    path = save_published(tmp_path / "coco.pth", detector_state(parent))
    child = tiny_model(8, num_classes=4)
    report = load_pretrained(child, path, ("van", "pedestrian", "tricycle", "car"), new_class_from={"van": "coco:car"})
    before, after = detector_logits(parent), detector_logits(child)
    for index, row in ((0, 3), (1, 1), (3, 3)):
        assert (before[..., row] - after[..., index]).abs().max() < 1e-6
    assert (report.kind, report.classes_origin) == ("coco", "COCO category ids")
    assert len(report.dropped_classes) == 78
    named = [row for row, name in enumerate(report.file_classes) if name]
    mean = parent.detr.class_embed[0].weight[named].mean(0)
    assert torch.allclose(child.detr.class_embed[0].weight[2], mean, atol=1e-6)


def test_coco_relative_without_a_coco_file_is_the_prior_with_a_note(tmp_path: Path) -> None:
    child, report = transfer_classes(
        tmp_path, tiny_model(7), ("pedestrian",), ("pedestrian", "car"), new_class_from={"car": "coco:car"}
    )
    assert any("class 'car' is new" in note and "COCO files only" in note for note in report.notes)
    assert child.detr.class_embed[1].bias[1] <= -math.log(99.0)


def test_person_and_pedestrian_are_one_class(tmp_path: Path) -> None:
    for name in ("person", "People", "pedestrian"):
        assert canonical_name(name) == "pedestrian"
    parent = tiny_model(7, num_classes=3)
    new = ("bicycle", "pedestrian", "motorcycle")
    child, report = transfer_classes(tmp_path, parent, ("person", "Motor", "bike"), new)
    before, after = detector_logits(parent), detector_logits(child)
    assert (before[..., [2, 0, 1]] - after).abs().max() < 1e-6
    assert all("alias" in move for move in report.class_moves)


def test_unchanged_classes_are_copied_not_moved(tmp_path: Path) -> None:
    _, report = transfer_classes(tmp_path, tiny_model(7, num_classes=2), ("person", "car"), ("pedestrian", "car"))
    assert report.counts()["model"]["rows moved by class name"] == 0


def test_same_name_takes_precedence_over_an_alias() -> None:
    moves = match_classes(("people", "pedestrian"), ("pedestrian", "people"), coco=False)
    assert [(move.how, move.row) for move in moves] == [("name", 1), ("name", 0)]


def test_row_number_takes_precedence_over_the_name() -> None:
    """DETR_DEFAULT_CLASS_IDX 15 of the published code is the bench; by name, bird is row 16."""
    from motip.weights.class_names import coco_row_names

    by_name = match_classes(coco_row_names(), ("bird",), coco=True)[0]
    by_row = match_classes(coco_row_names(), ("bird",), {"bird": "row:15"}, coco=True)[0]
    assert (by_name.row, by_row.row, by_row.source) == (16, 15, "bench")


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ({"van": "minibus"}, "neither a class of the file"),
        ({"van": "truck", "truck": "van"}, "cyclic"),
        ({"van": "coco:spaceship"}, "not a COCO class"),
        ({"van": "row:2"}, "row"),
        ({"van": "row:x"}, "row"),
    ],
)
def test_invalid_class_init_is_an_error(init: dict[str, str], reason: str) -> None:
    with pytest.raises(MotipError, match=reason):
        match_classes(("pedestrian", "car"), ("pedestrian", "van", "truck"), init, coco=True)


def test_alias_that_matches_two_rows_is_an_error() -> None:
    with pytest.raises(MotipError, match="two candidates") as caught:
        match_classes(("person", "people"), ("pedestrian",), coco=False)
    assert "row:0" in str(caught.value.fix)


def test_file_without_class_names_is_an_error_unless_given(tmp_path: Path) -> None:
    path = save_published(tmp_path / "two.pth", tiny_model(1, num_classes=2))
    child = tiny_model(2, num_classes=2)
    with pytest.raises(MotipError, match="does not name its classes") as caught:
        load_pretrained(child, path, ("pedestrian", "car"))
    assert "PRETRAIN_CLASSES" in str(caught.value.fix)
    report = load_pretrained(child, path, ("car", "pedestrian"), file_classes=("pedestrian", "car"))
    assert report.class_moves == ("car <- row 1 (car)", "pedestrian <- row 0 (pedestrian)")
