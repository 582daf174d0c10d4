"""Threshold search with a scripted detector that finds the squares of the small dataset with fixed confidences."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from motip.config import load_curriculum
from motip.data.convert import convert
from motip.data.manifest import Manifest
from motip.data.sequence import ClassMap
from motip.errors import MotipError
from motip.evaluation.calibration import confidence_histograms
from motip.evaluation.evaluator import EvalJob, ModelUnderTest, evaluate_videos
from motip.evaluation.protocols import ScoredSequence
from motip.evaluation.threshold_search import (
    GRID,
    ThresholdSearchInput,
    ThresholdSearchResult,
    candidate_settings,
    search_thresholds,
)
from motip.report.threshold_plot import threshold_figure
from motip.tracking import api as track_run
from motip.tracking.settings import TrackerSettings
from tests.helpers.scripted_model import features, following_model
from tests.helpers.small_dataset import FRAMES, HEIGHT, WIDTH, write_curriculum, write_dance_dataset
from tests.helpers.track_rows import rows

PERSON, CAR, FALSE = 0.62, 0.43, 0.37
"""Confidences of pedestrians, cars and false detections: 0.4 is the only threshold of the grid between the last two."""

SETTINGS = TrackerSettings(
    det_thresh=0.2, newborn_thresh=0.2, id_thresh=0.1, short_side=HEIGHT, max_longer=WIDTH, miss_tolerance=8
)
MAPS = {"dance": ClassMap(("pedestrian", "car"), {"pedestrian": ("pedestrian",), "car": ("car",)})}


def _seen(image: np.ndarray, channel: int) -> list[float]:
    """cxcywh in 0..1 of the square of one colour."""
    strong = (image[..., channel] > 170) & (image[..., 2 - channel] < 110)
    ys, xs = np.nonzero(strong)
    left, right, top, bottom = xs.min(), xs.max() + 1, ys.min(), ys.max() + 1
    return [(left + right) / 2 / WIDTH, (top + bottom) / 2 / HEIGHT, (right - left) / WIDTH, (bottom - top) / HEIGHT]


def _scripted(_model: object, image: np.ndarray, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.full((4, 2), -10.0)
    for query, (score, class_id) in enumerate(((PERSON, 0), (CAR, 1), (FALSE, 0), (FALSE, 1))):
        logits[query, class_id] = float(np.log(score / (1 - score)))
    false_boxes = [[0.8, 0.15, 0.1, 0.2], [0.15, 0.85, 0.1, 0.2]]
    return logits, torch.tensor([_seen(image, 0), _seen(image, 2), *false_boxes]), features(4)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    root = tmp_path_factory.mktemp("thresholds")
    write_dance_dataset(root / "raw")
    curriculum = load_curriculum(write_curriculum(root / "curriculum.yaml", repo_root))
    convert(curriculum, root / "raw", root / "storage")
    return root / "storage"


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track_run, "_detect", _scripted)


def _search(
    storage: Path, folder: Path, thresholds: tuple[float, ...] | None = None, **options: Any
) -> ThresholdSearchResult:
    variants = tuple(candidate_settings(SETTINGS, thresholds))
    search = ThresholdSearchInput(following_model(), "0" * 64, variants, MAPS, {"dance": "plain"})
    videos = Manifest.load(storage).of("dance", "val")
    return search_thresholds(
        search, SETTINGS, EvalJob(videos, str(storage), folder, options.pop("split", "val"), **options)
    )


def test_search_finds_the_planted_optimum(storage: Path, tmp_path: Path, scripted: None) -> None:
    done = _search(storage, tmp_path)
    assert [each.settings.det_thresh for each in done.candidates] == list(GRID)
    best, configured = done.candidates[done.best], done.candidates[done.configured]
    assert best.settings.det_thresh == best.settings.newborn_thresh == 0.4
    assert best.hota > 90 and not done.best_at_edge
    assert configured.settings is SETTINGS and 0 < configured.hota < best.hota
    assert done.candidates[-1].hota == 0, "above every confidence nothing is tracked"
    header, lines = done.table()
    assert [line[-1] for line in lines if line[-1]] == ["configured", "best"] and header[0] == "DET_THRESH"


def test_each_candidate_scores_as_in_a_separate_evaluation(storage: Path, tmp_path: Path, scripted: None) -> None:
    done = _search(storage, tmp_path / "search", (0.2, 0.4, 0.5))
    videos = Manifest.load(storage).of("dance", "val")
    for each in done.candidates:
        model = ModelUnderTest(following_model(), str(each.settings.det_thresh), each.settings)
        folder = tmp_path / f"{each.settings.det_thresh}"
        job = EvalJob(videos, str(storage), folder, "val")
        alone = evaluate_videos(model, job, MAPS, {"dance": "plain"}).scores["dance"]
        for name, value in alone.to_dict().items():
            # Tracks of an evaluation are scored as written, with rounded coordinates.
            assert each.scores["dance"].to_dict()[name] == pytest.approx(value, abs=0.05), name


def test_histogram_counts_true_and_false_detections(storage: Path, tmp_path: Path, scripted: None) -> None:
    done = _search(storage, tmp_path)
    frames = 2 * FRAMES
    cars, persons = done.confidences["dance"]["car"], done.confidences["dance"]["pedestrian"]
    assert cars["true"][8] == cars["true"].sum() == frames
    assert persons["true"][12] == persons["true"].sum() == frames
    assert cars["false"][7] == cars["false"].sum() == persons["false"].sum() == frames
    assert done.pooled()["false"][7] == 2 * frames
    line = next(line for line in done.bars() if line.startswith("0.35"))
    assert line.split() == ["0.35-0.40", "-" * 50, "0", str(2 * frames)]
    assert "best" in next(line for line in done.bars() if line.startswith("0.40"))
    threshold_figure(done).savefig(tmp_path / "thresholds.png")
    assert (tmp_path / "thresholds.png").stat().st_size > 10_000
    assert json.loads(json.dumps(done.to_json()))["best"]["det_thresh"] == 0.4


def test_finished_videos_are_reused_unless_thresholds_change(storage: Path, tmp_path: Path, scripted: None) -> None:
    first = _search(storage, tmp_path, (0.3, 0.4))
    assert first.reused == 0
    (tmp_path / "thresholds/dance/val/v0.json").unlink()
    again = _search(storage, tmp_path, (0.3, 0.4))
    assert again.reused == 1 and again.to_json() == first.to_json()
    assert _search(storage, tmp_path, (0.3, 0.45)).reused == 0


def test_search_needs_the_val_split_and_labels(storage: Path, tmp_path: Path) -> None:
    with pytest.raises(MotipError, match="cannot be chosen on the test split"):
        _search(storage, tmp_path, split="test")
    with pytest.raises(MotipError, match="no source has labels"):
        _search(storage, tmp_path, averaged=("bus",))


def test_newborn_thresh_keeps_its_distance_to_det_thresh() -> None:
    settings = replace(SETTINGS, det_thresh=0.3, newborn_thresh=0.6)
    tried = candidate_settings(settings)
    assert all(each.newborn_thresh == pytest.approx(each.det_thresh + 0.3) for each in tried)
    assert tried[-1].det_thresh == 0.65 and settings in tried
    assert [each.det_thresh for each in candidate_settings(settings, [0.1])] == [0.1, 0.3]
    for value in (0.7, -0.1, 1.5):
        with pytest.raises(MotipError, match="no track can start"):
            candidate_settings(settings, [value])


def test_detections_are_matched_in_order_of_confidence() -> None:
    box = (0, 0, 10, 10)
    truth = rows((0, 1, *box, 0), (0, 2, 50, 50, 60, 60, 0))
    found = rows((0, 5, 0, 0, 10, 9, 0), (0, 6, *box, 0), (0, 7, 20, 20, 30, 30, 0), (0, 8, 50, 50, 60, 60, 1))
    found = replace(found, scores=np.array([0.92, 0.22, 0.62, 1.0], np.float32))
    histograms = confidence_histograms(ScoredSequence("s", truth, found), ("car", "bus"))
    assert np.flatnonzero(histograms["car"]["true"]).tolist() == [18]
    assert np.flatnonzero(histograms["car"]["false"]).tolist() == [4, 12]
    assert np.flatnonzero(histograms["bus"]["false"]).tolist() == [19], "a confidence of 1 is in the last bin"
