from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from motip.config import load_curriculum
from motip.config.curriculum_file import BEST_METRICS
from motip.errors import MotipError
from motip.evaluation.domain_matrix import DomainMatrix
from motip.evaluation.metrics import score
from motip.evaluation.protocols import ScoredSequence
from motip.evaluation.scores import PERCENTAGES, Scores, check_comparable, metric_name
from tests.helpers.small_dataset import write_curriculum
from tests.helpers.track_rows import disturbed, random_rows

MLFLOW_NAME = re.compile(r"[\w\-. :/]+", re.ASCII)


def _scores(
    seed: int = 0, names: tuple[str, ...] = ("a", "b"), classes: tuple[str, ...] = ("pedestrian", "car")
) -> Scores:
    truths = [random_rows(seed + index) for index in range(len(names))]
    return score([ScoredSequence(n, t, disturbed(t, seed)) for n, t in zip(names, truths, strict=True)], classes)


def test_flat_names_are_valid_mlflow_names() -> None:
    flat = _scores(classes=("on-road person", "车")).to_dict()
    assert flat["HOTA"] > 0
    assert "HOTA/on-road person" in flat and "agnostic/HOTA" in flat and "det_avg/IDSW" in flat
    assert all(MLFLOW_NAME.fullmatch(name) for name in flat)
    assert metric_name("a&b/ü") == "a_b__"


def test_best_metric_may_be_every_percentage_except_motp(tmp_path: Path, repo_root: Path) -> None:
    assert set(BEST_METRICS) == set(PERCENTAGES) - {"MOTP"}
    flat = _scores(classes=("pedestrian", "car")).to_dict()
    wanted = {name for name in flat if set(name.split("/")) & set(BEST_METRICS)}
    assert len(wanted) == len(BEST_METRICS) * 5
    path = write_curriculum(tmp_path / "curriculum.yaml", repo_root)
    text = path.read_text()
    for name in sorted(wanted):
        path.write_text(text.replace("config: stage.yaml", f"config: stage.yaml, best: {name}"))
        assert load_curriculum(path).stages[0].best == name
    for name in sorted(set(flat) - wanted):
        path.write_text(text.replace("config: stage.yaml", f"config: stage.yaml, best: {name}"))
        with pytest.raises(MotipError, match="unknown metric for the best checkpoint"):
            load_curriculum(path)


def test_scores_round_trip_through_json() -> None:
    scores = _scores()
    assert Scores.from_json(json.loads(json.dumps(scores.to_json()))) == scores
    with pytest.raises(MotipError, match="do not belong"):
        Scores.from_json(scores.to_json() | {"sequences": ("a", "c")})


def test_check_comparable_rejects_different_conditions() -> None:
    scores = _scores()
    check_comparable([scores, replace(scores, notes=("x",))])
    for change in ({"protocol": "bdd100k"}, {"split": "test"}, {"classes": ("car",)}, {"sequences": ("a",)}):
        with pytest.raises(MotipError, match=next(iter(change))):
            check_comparable([scores, replace(scores, **change)])


def test_caption_contains_the_conditions() -> None:
    caption = replace(_scores(), notes=("long-term memory on",)).caption()
    for part in ("plain", "val", "pedestrian, car", "2 sequences", "long-term memory on"):
        assert part in caption


def test_table_has_a_row_per_class_and_three_means() -> None:
    header, rows = _scores().table()
    assert [row[0] for row in rows] == ["pedestrian", "car", "mean of 2 classes", "all boxes", "class-agnostic"]
    assert header[1] == "HOTA"
    assert len(_scores().table(per_sequence=True)[1]) == len(rows) + 4


def _with_hota(value: float, names: tuple[str, ...] = ("a", "b")) -> Scores:
    scores = _scores(names=names)
    return replace(scores, class_averaged=scores.class_averaged | {"HOTA": value})


def _matrix(scores: dict[str, dict[str, Scores]]) -> DomainMatrix:
    """Stage -> domain -> scores, each domain with one source."""
    return DomainMatrix.from_sources(
        {stage: {domain: {domain: cell} for domain, cell in cells.items()} for stage, cells in scores.items()}
    )


def test_forgetting_is_measured_against_the_best_earlier_stage() -> None:
    matrix = _matrix(
        {
            "one": {"dance": _with_hota(60.0)},
            "two": {"dance": _with_hota(50.0), "ground": _with_hota(40.0)},
            "three": {"dance": _with_hota(56.0), "ground": _with_hota(44.0), "aerial": _with_hota(30.0)},
        }
    )
    assert matrix.domains == ("dance", "ground", "aerial")
    assert [lost.domain for lost in matrix.forgotten("two")] == ["dance"]
    assert matrix.forgotten("two")[0].loss == pytest.approx(10.0)
    assert matrix.forgotten("three") == []
    assert [lost.domain for lost in matrix.forgotten("three", allowed=3.0)] == ["dance"]
    assert matrix.backward_transfer({"dance": "one", "ground": "two", "aerial": "three"}) == pytest.approx(0.0)
    assert matrix.backward_transfer({"aerial": "three"}) is None
    assert [matrix.value("one", (domain, "")) for domain in matrix.domains] == [60.0, None, None]
    assert matrix.cells("three")["R/three/aerial"] == 30.0
    with pytest.raises(MotipError, match="no scores of this stage"):
        matrix.forgotten("four")


def test_different_sequences_of_a_domain_are_an_error() -> None:
    with pytest.raises(MotipError, match="sequences"):
        _matrix({"one": {"dance": _with_hota(60.0)}, "two": {"dance": _with_hota(50.0, ("a", "c"))}})
