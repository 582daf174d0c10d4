"""`motip evaluate` and `motip compare` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from motip.errors import MotipError
from motip.evaluation.metrics import score
from motip.evaluation.protocols import ScoredSequence
from motip.evaluation.score_files import load_scores
from motip.evaluation.scores import Scores
from motip.evaluation.validation import StageScores
from motip.lineage import Lineage
from motip.storage.atomic import sha256_file
from motip.storage.paths import location
from tests.helpers.small_dataset import FRAMES, write_checkpoint, write_curriculum, write_dance_dataset
from tests.helpers.track_rows import disturbed, random_rows

CLASSES = ("pedestrian", "car")


def _scores(shift: float, number: int = 10) -> Scores:
    truths = [random_rows(seed) for seed in range(number)]
    pairs = [(truth, disturbed(truth, seed, shift)) for seed, truth in enumerate(truths)]
    return score([ScoredSequence(f"s{place}", *pair) for place, pair in enumerate(pairs)], CLASSES)


@pytest.fixture(scope="module")
def good() -> Scores:
    return _scores(2.0)


@pytest.fixture(scope="module")
def bad() -> Scores:
    return _scores(14.0)


def _write(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def test_scores_are_found_in_every_layout_that_commands_write(tmp_path: Path, good: Scores, bad: Scores) -> None:
    evaluation = _write(tmp_path / "evaluations/abc/scores_val.json", {"sources": {"dance": good.to_json()}})
    stage = tmp_path / "curricula/small/Only/0a1b"
    _write(stage / "stage.json", {"best_epoch": 1})
    _write(stage / "scores/epoch_000.json", {"dance": bad.to_json()})
    best = _write(stage / "scores/epoch_001.json", {"dance": good.to_json()})
    row = _write(tmp_path / "row.json", {"name": "x", "scores": {"dancing": {"dance": good.to_json()}}})
    for place, file in (
        (evaluation, evaluation),
        (evaluation.parent, evaluation),
        (stage, best),
        (stage / "scores", best),
        (stage.parent, best),
        (best, best),
        (row, row),
    ):
        assert load_scores(str(place)) == (str(location(str(file))), {"dance": good})


def test_path_without_scores_is_an_error(tmp_path: Path, good: Scores) -> None:
    stage = tmp_path / "stage"
    _write(stage / "stage.json", {"status": "running"})
    two = tmp_path / "two"
    for name in ("epoch_000.json", "epoch_001.json"):
        _write(two / name, {"dance": good.to_json()})
    (tmp_path / "text.json").write_text("{")
    for place, message in (
        (tmp_path / "nothing", "no scores found"),
        (stage, "not finished"),
        (two, "does not contain exactly one"),
        (tmp_path / "text.json", "not a JSON file"),
        (_write(tmp_path / "list.json", [1]), "does not contain scores"),
        (_write(tmp_path / "other.json", {"a": {"b": 1}}), "does not contain scores"),
        (_write(tmp_path / "empty.json", {"sources": {}}), "contains no source"),
    ):
        with pytest.raises(MotipError, match=message):
            load_scores(str(place))


def test_compare_shows_differences_and_their_verdicts(motip, tmp_path: Path, good: Scores, bad: Scores) -> None:  # type: ignore[no-untyped-def]
    a = _write(tmp_path / "a.json", {"sources": {"dance": bad.to_json(), "aerial": bad.to_json()}})
    b = _write(tmp_path / "b.json", {"sources": {"dance": good.to_json()}})
    status, out, err = motip("compare", a, b, "--draws", 300, "--metrics", "HOTA,IDF1")
    assert status == 0, err
    assert "B is better" in out and "300 resamples, seed 0" in out and "source aerial is in A only" in out
    assert "DetA" not in out and f"{good.hota:.1f}" in out
    status, out, _ = motip("compare", a, a, "--draws", 100)
    assert status == 0 and "within noise" in out and "B is" not in out
    status, out, _ = motip("compare", a, b, "--draws", 100, "--json", "--seed", 3)
    found = json.loads(out)["sources"]["dance"]
    assert found["seed"] == 3 and len(found["differences"]) == 5 * 19


def test_compare_rejects_incompatible_scores(motip, tmp_path: Path, good: Scores) -> None:  # type: ignore[no-untyped-def]
    a = _write(tmp_path / "a.json", {"dance": good.to_json()})
    for other, message in (
        ({"dance": _scores(2.0, 5).to_json()}, "different sequences"),
        ({"dance": good.to_json() | {"split": "test"}}, "different split"),
        ({"aerial": good.to_json()}, "no source in common"),
    ):
        status, _, err = motip("compare", a, _write(tmp_path / "b.json", other))
        assert status == 2 and message in err
    assert "unknown metric" in motip("compare", a, a, "--metrics", "MAP")[2]
    assert "no runs were recorded" in motip("compare", a, "0" * 32, "--storage", tmp_path)[2]


def test_runs_are_compared_by_their_best_epoch(  # type: ignore[no-untyped-def]
    motip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: Scores, bad: Scores
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    lineage = Lineage(None, tmp_path)
    parent = lineage.start_curriculum("small", {"a": 1})
    run = lineage.start_stage(parent, "Only", {"LR": 1e-4}, "d" * 64, None)
    for epoch, scores in enumerate((bad, good)):
        lineage.log_dict(run, StageScores({"dance": scores}).to_json(), f"scores/epoch_{epoch:03d}.json")
    file = _write(tmp_path / "b.json", {"dance": bad.to_json()})
    status, _, err = motip("compare", run, file, "--storage", tmp_path)
    assert status == 2 and "is not finished" in err
    weights = _write(tmp_path / "best.pth", "weights")
    lineage.log_stage_result(run, weights, sha256_file(weights), StageScores({"dance": good}).flat(), step=2)
    for name in (run, parent):
        status, out, err = motip("compare", name, file, "--storage", tmp_path, "--draws", 200)
        assert status == 0, err
        assert f"run {run} (Only, epoch 1)" in out and "B is worse" in out
    empty = lineage.start_stage(parent, "Next", {"LR": 1e-4}, "d" * 64, None)
    assert "has no scores" in motip("compare", empty, file, "--storage", tmp_path)[2]
    assert "no such run" in motip("compare", "0" * 32, file, "--storage", tmp_path)[2]


def test_evaluate_writes_errors_and_searches_thresholds(motip, tmp_path: Path, repo_root: Path) -> None:  # type: ignore[no-untyped-def]
    write_dance_dataset(tmp_path / "raw")
    curriculum = write_curriculum(tmp_path / "curriculum.yaml", repo_root)
    checkpoint = write_checkpoint(tmp_path / "tiny.pth", tmp_path / "stage.yaml")
    common = [checkpoint, "--config", curriculum, "--storage", tmp_path / "storage", "--device", "cpu"]
    status, out, err = motip("evaluate", *common, "--data-root", tmp_path / "raw", "--errors")
    assert status == 0, err
    assert "outcomes of the labelled boxes" in out and "unknown" in out
    (file,) = (tmp_path / "storage/evaluations").rglob("errors_val.json")
    assert json.loads(file.read_text())["dance"]["totals"]["car"]["boxes"] == 2 * FRAMES
    scores = json.loads((file.parent / "scores_val.json").read_text())["sources"]["dance"]
    assert json.loads(file.read_text())["dance"]["totals"]["car"]["missed"] == scores["per_class"]["car"]["FN"]
    status, out, err = motip("compare", file.parent, file.parent, "--draws", 100)
    assert status == 0 and "only 2 sequences" in out, err
    search = ["--sweep-thresholds", "--thresholds", "0.01,0.1", "--json", tmp_path / "sweep.json"]
    status, out, err = motip("evaluate", *common, *search)
    assert status == 0, err
    assert "detections by confidence" in out and "best: DET_THRESH" in out
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert [each["det_thresh"] for each in found["candidates"]] == [0.01, 0.1]
    assert found == json.loads((file.parent / "thresholds_val.json").read_text())
    assert (file.parent / "thresholds_val.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--thresholds", "0.2"], "needs --sweep-thresholds"),
        (["--sweep-thresholds", "--errors"], "exclude each other"),
        (["--sweep-thresholds", "--split", "test"], "cannot be chosen on the test split"),
    ],
)
def test_conflicting_options_are_errors(motip, tmp_path: Path, options: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    status, _, err = motip("evaluate", tmp_path / "none.pth", *options)
    assert status == 2 and message in err
