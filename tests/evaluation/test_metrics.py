from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from trackeval.metrics import Identity

from motip.errors import MotipError
from motip.evaluation.metrics import SparseIdentity, _class_data, _clean, combine, score, score_sequence
from motip.evaluation.protocols import ScoredSequence, find_protocol
from motip.evaluation.scores import PERCENTAGES, Scores
from tests.helpers.track_rows import disturbed, random_rows, rows

CLASSES = ("pedestrian", "car")


def _sequences(count: int = 3) -> list[ScoredSequence]:
    truths = [random_rows(seed) for seed in range(count)]
    return [ScoredSequence(f"s{seed}", truth, disturbed(truth, seed)) for seed, truth in enumerate(truths)]


def test_ground_truth_against_itself_is_100_everywhere() -> None:
    sequences = [replace(sequence, pred=sequence.gt) for sequence in _sequences()]
    for protocol in ("plain", "bdd100k", "visdrone"):
        scores = score(sequences, CLASSES, protocol)
        cells = [scores.class_averaged, scores.detection_averaged, scores.class_agnostic, *scores.per_class.values()]
        cells += [cell for sequence in scores.per_sequence.values() for cell in sequence.values()]
        for cell in cells:
            assert all(cell[name] == pytest.approx(100.0, abs=1e-9) for name in PERCENTAGES)
            assert (cell["FP"], cell["FN"], cell["IDSW"]) == (0, 0, 0)


def test_metrics_equal_values_computed_by_hand() -> None:
    """One object in 4 frames: tracked for 2, then 1 with another id, then missed; one false positive."""
    box = (0, 0, 10, 10)
    far = (100, 100, 110, 110)
    truth = rows(*[(frame, 1, *box, 0) for frame in range(4)])
    pred = rows((0, 5, *box, 0), (1, 5, *box, 0), (2, 6, *box, 0), (3, 7, *far, 0))
    cell = score([ScoredSequence("s", truth, pred)], ["car"]).class_averaged
    assert (cell["TP"], cell["FN"], cell["FP"], cell["IDSW"], cell["GT"]) == (3, 1, 1, 1, 4)
    assert cell["MOTA"] == pytest.approx(100 * (1 - (1 + 1 + 1) / 4))
    assert cell["IDF1"] == pytest.approx(100 * 2 * 2 / (4 + 4))
    assert cell["DetRe"] == pytest.approx(75) and cell["DetPr"] == pytest.approx(75)
    assert cell["DetA"] == pytest.approx(60)
    # AssA: two boxes with 2/(4+2-2), one with 1/(4+1-1), averaged over the three.
    assert cell["AssA"] == pytest.approx(100 * (2 * 0.5 + 0.25) / 3)
    assert cell["HOTA"] == pytest.approx(np.sqrt(60 * cell["AssA"]))
    assert cell["LocA"] == pytest.approx(100)


def test_means_over_classes() -> None:
    scores = score(_sequences(), CLASSES)
    for metric in ("HOTA", "MOTA", "IDF1"):
        mean = np.mean([scores.per_class[name][metric] for name in CLASSES])
        assert scores.class_averaged[metric] == pytest.approx(mean)
    for count in ("FP", "FN", "IDSW", "GT"):
        total = sum(scores.per_class[name][count] for name in CLASSES)
        assert scores.class_averaged[count] == scores.detection_averaged[count] == total
    gt, errors = total_of(scores, "GT"), total_of(scores, "FP") + total_of(scores, "FN") + total_of(scores, "IDSW")
    assert scores.detection_averaged["MOTA"] == pytest.approx(100 * (1 - errors / gt))


def total_of(scores: Scores, count: str) -> int:
    return sum(int(cell[count]) for sequence in scores.per_sequence.values() for cell in sequence.values())  # type: ignore[arg-type]


def test_wrong_class_is_penalised_twice_but_not_class_agnostically() -> None:
    truth = random_rows(1, classes=1)
    pred = replace(truth, class_ids=np.ones_like(truth.class_ids))
    scores = score([ScoredSequence("s", truth, pred)], CLASSES)
    assert scores.per_class["pedestrian"]["HOTA"] == 0.0
    assert scores.per_class["car"]["FP"] == len(truth)
    assert scores.class_agnostic["HOTA"] == pytest.approx(100.0)


def test_class_without_ground_truth_is_excluded_from_the_mean() -> None:
    truth = random_rows(1, classes=1)
    pred = disturbed(truth, 1)
    scores = score([ScoredSequence("s", truth, pred)], ["pedestrian", "car", "van"])
    assert scores.classes_without_gt == ("car", "van")
    assert scores.class_averaged["HOTA"] == scores.per_class["pedestrian"]["HOTA"]
    assert scores.per_class["van"]["HOTA"] is None
    assert "HOTA/van" not in scores.to_dict()
    header, table = scores.table()
    assert any("mean of 1 class, without car, van" in row[0] for row in table)
    assert all(len(row) == len(header) for row in table)


def test_no_predictions_score_zero() -> None:
    truth = random_rows(1)
    scores = score([ScoredSequence("s", truth, rows())], CLASSES)
    assert scores.class_averaged["HOTA"] == scores.class_averaged["MOTA"] == scores.class_averaged["IDF1"] == 0.0
    assert scores.class_averaged["FN"] == len(truth)


def test_order_of_rows_does_not_matter() -> None:
    (sequence,) = _sequences(1)
    order = np.random.default_rng(0).permutation(len(sequence.pred))
    pred = sequence.pred
    mixed = rows(
        *zip(
            pred.frames[order],
            pred.track_ids[order],
            *pred.boxes_xyxy[order].T,
            pred.class_ids[order],
            strict=True,
        )
    )
    assert score([replace(sequence, pred=mixed)], CLASSES).to_dict() == pytest.approx(
        score([sequence], CLASSES).to_dict()
    )


def test_combining_sequence_counts_equals_score() -> None:
    sequences = _sequences()
    parts = [score_sequence(sequence, CLASSES) for sequence in reversed(sequences)]
    assert combine(parts, CLASSES).to_dict() == pytest.approx(score(sequences, CLASSES).to_dict(), abs=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_sparse_identity_equals_trackeval(seed: int) -> None:
    truth = random_rows(seed, frames=15, objects=12, size=90.0)
    sequence = ScoredSequence("s", truth, disturbed(truth, seed, shift=15, switch=0.3))
    rules = find_protocol("plain")
    frames = np.arange(int(truth.frames.max()) + 1)
    sequence = _clean(replace(sequence, frames=frames), 2, rules, Counter())
    _, _, data = _class_data(sequence, None, rules, Counter())
    expected = Identity({"PRINT_CONFIG": False}).eval_sequence(data)
    found = SparseIdentity({"PRINT_CONFIG": False}).eval_sequence(data)
    assert expected["IDTP"] > 0
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("side", ["gt", "pred"])
def test_duplicate_ids_in_a_frame_are_an_error(side: str) -> None:
    good = random_rows(1)
    twice = rows((0, 1, 0, 0, 9, 9, 0), (2, 4, 0, 0, 9, 9, 0), (2, 4, 50, 50, 60, 60, 1))
    sequence = replace(ScoredSequence("street", good, good), **{side: twice})
    with pytest.raises(MotipError, match="twice in one frame") as error:
        score([sequence], CLASSES)
    assert "street" in str(error.value) and "id 4 in frame 2" in str(error.value)


def test_invalid_input_is_an_error() -> None:
    good = random_rows(1)
    with pytest.raises(MotipError, match="outside the class list"):
        score([ScoredSequence("s", good, rows((0, 0, 0, 0, 1, 1, 2)))], CLASSES)
    with pytest.raises(MotipError, match="not finite"):
        score([ScoredSequence("s", good, rows((0, 0, 0, np.nan, 1, 1, 0)))], CLASSES)
    with pytest.raises(MotipError, match="not part of the sequence"):
        score([ScoredSequence("s", good, rows((99, 0, 0, 0, 1, 1, 0)), frames=np.arange(20))], CLASSES)
    with pytest.raises(MotipError, match="no ground truth"):
        score([ScoredSequence("s", rows(), good)], CLASSES)
    with pytest.raises(MotipError, match="scored twice"):
        score([ScoredSequence("s", good, good)] * 2, CLASSES)
    with pytest.raises(MotipError, match="no protocol official"):
        score([ScoredSequence("s", good, good)], CLASSES, "official")


def test_importing_and_scoring_print_and_write_nothing(tmp_path: Path) -> None:
    code = (
        "from motip.evaluation.metrics import score; from tests.helpers.track_rows import random_rows;"
        "from motip.evaluation.protocols import ScoredSequence; t = random_rows(0);"
        "assert score([ScoredSequence('s', t, t)], ['a', 'b']).hota == 100.0"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
