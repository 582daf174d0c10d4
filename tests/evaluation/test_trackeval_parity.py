"""Parity of the scores with TrackEval's dataset classes, which read files and preprocess independently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trackeval.datasets import BDD100K, MotChallenge2DBox
from trackeval.metrics import CLEAR, HOTA, Identity

from motip.data.sequence import ClassMap, Frame, Sequence, TrackRows
from motip.evaluation.metrics import score
from motip.evaluation.protocols import BDD100K_CLASSES, BDD100K_DISTRACTORS, ScoredSequence, scored_sequence
from motip.evaluation.scores import Values
from tests.helpers.track_rows import rows

QUIET = {"PRINT_CONFIG": False}
METRICS = {"HOTA": HOTA(), "CLEAR": CLEAR(QUIET), "Identity": Identity(QUIET)}
FIELDS = {
    "HOTA": ("HOTA", "HOTA"), "DetA": ("HOTA", "DetA"), "AssA": ("HOTA", "AssA"), "DetRe": ("HOTA", "DetRe"),
    "DetPr": ("HOTA", "DetPr"), "LocA": ("HOTA", "LocA"), "MOTA": ("CLEAR", "MOTA"), "MOTP": ("CLEAR", "MOTP"),
    "IDF1": ("Identity", "IDF1"), "IDR": ("Identity", "IDR"), "IDP": ("Identity", "IDP"),
    "IDSW": ("CLEAR", "IDSW"), "FP": ("CLEAR", "CLR_FP"), "FN": ("CLEAR", "CLR_FN"), "Frag": ("CLEAR", "Frag"),
}  # fmt: skip


def _trackeval(dataset: Any, tracker: str, cls: str) -> dict[str, dict[str, Any]]:
    """sequence (and "all") -> metric family -> TrackEval's fields."""
    per_sequence = {}
    for name in dataset.seq_list:
        data = dataset.get_preprocessed_seq_data(dataset.get_raw_seq_data(tracker, name), cls)
        per_sequence[name] = {family: metric.eval_sequence(data) for family, metric in METRICS.items()}
    combined = {
        family: metric.combine_sequences({name: cell[family] for name, cell in per_sequence.items()})
        for family, metric in METRICS.items()
    }
    return per_sequence | {"all": combined}


def _assert_equal(found: Values, expected: dict[str, dict[str, Any]], where: str) -> None:
    for name, (family, field) in FIELDS.items():
        share = name not in ("IDSW", "FP", "FN", "Frag")
        value = float(np.mean(expected[family][field])) * (100 if share else 1)
        assert found[name] == pytest.approx(value, abs=1e-9), f"{where}, {name}"


def _mot_rows(path: Path) -> TrackRows:
    table = np.loadtxt(path, delimiter=",")
    left_top, size = table[:, 2:4], table[:, 4:6]
    return rows(
        *zip(table[:, 0] - 1, table[:, 1], *left_top.T, *(left_top + size).T, np.zeros(len(table)), strict=True)
    )


def test_mot15_files_score_as_in_trackeval(samples_dir: Path, tmp_path: Path) -> None:
    folders = sorted(path for path in (samples_dir / "mot15").iterdir() if (path / "gt.txt").is_file())
    if not folders:
        pytest.skip(f"no sequences in {samples_dir / 'mot15'}")
    lengths = {}
    sequences = []
    for folder in folders:
        gt, pred = _mot_rows(folder / "gt.txt"), _mot_rows(folder / "predictions.txt")
        lengths[folder.name] = int(max(gt.frames.max(), pred.frames.max())) + 1
        sequences.append(ScoredSequence(folder.name, gt, pred))
        for text, target in (
            ("gt.txt", tmp_path / "gt" / folder.name / "gt" / "gt.txt"),
            ("predictions.txt", tmp_path / "trackers" / "ours" / "data" / f"{folder.name}.txt"),
        ):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text((folder / text).read_text())
    dataset = MotChallenge2DBox(
        QUIET
        | {
            "GT_FOLDER": str(tmp_path / "gt"),
            "TRACKERS_FOLDER": str(tmp_path / "trackers"),
            "BENCHMARK": "MOT15",
            "SKIP_SPLIT_FOL": True,
            "SEQ_INFO": lengths,
        }
    )
    expected = _trackeval(dataset, "ours", "pedestrian")
    for protocol in ("plain", "motchallenge"):
        scores = score(sequences, ["pedestrian"], protocol)
        _assert_equal(scores.per_class["pedestrian"], expected["all"], f"{protocol}, all")
        _assert_equal(scores.class_averaged, expected["all"], f"{protocol}, mean")
        _assert_equal(scores.class_agnostic, expected["all"], f"{protocol}, agnostic")
        for name in lengths:
            _assert_equal(scores.per_sequence[name]["pedestrian"], expected[name], f"{protocol}, {name}")
    assert 0 < expected["all"]["CLEAR"]["MOTA"] < 1


def _bdd_scene(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Labels and predictions in BDD100K's format, with crowds, distractors and predictions inside them."""
    rng = np.random.default_rng(seed)
    categories = [*BDD100K_CLASSES, *sorted(BDD100K_DISTRACTORS)]
    objects = [(rng.uniform(0, 400, 2), rng.uniform(-5, 5, 2), rng.uniform(30, 120), number) for number in range(26)]
    labels, predictions = [], []
    for frame in range(15):
        gt, pred = [], []
        for (start, speed, size, number), category in zip(objects, categories * 3, strict=False):
            if rng.random() < 0.2:
                continue
            x, y = start + frame * speed
            gt.append(_bdd_label(number, category, x, y, size, bool(number % 9 == 0)))
            predicted = category if category in BDD100K_CLASSES and rng.random() < 0.9 else "car"
            if rng.random() < 0.9:
                pred.append(
                    _bdd_label(100 + number + int(rng.random() < 0.1) * 50, predicted, x + 4, y - 3, size, None)
                )
        for number in range(3):
            x, y = rng.uniform(0, 400, 2)
            pred.append(_bdd_label(500 + number, BDD100K_CLASSES[number], x, y, 40, None))
        labels.append({"index": frame, "labels": gt})
        predictions.append({"index": frame, "labels": pred})
    return labels, predictions


def _bdd_label(number: int, category: str, x: float, y: float, size: float, crowd: bool | None) -> dict[str, Any]:
    label: dict[str, Any] = {
        "id": str(number),
        "category": category,
        "box2d": {"x1": float(x), "y1": float(y), "x2": float(x + size), "y2": float(y + size)},
    }
    return label if crowd is None else label | {"attributes": {"Crowd": crowd}}


def _bdd_sequence(name: str, labels: list[dict[str, Any]]) -> Sequence:
    frames = []
    for entry in labels:
        boxes = np.array([list(label["box2d"].values()) for label in entry["labels"]], np.float64).reshape(-1, 4)
        count = len(entry["labels"])
        frames.append(
            Frame(
                entry["index"],
                None,
                boxes,
                np.array([int(label["id"]) for label in entry["labels"]], np.int64),
                tuple(label["category"] for label in entry["labels"]),
                np.array([label["attributes"]["Crowd"] for label in entry["labels"]], bool),
                np.zeros(count, np.int8),
                np.zeros(count, np.int8),
            )
        )
    return Sequence(name, "bdd100k", "val", 5.0, 1280, 720, tuple(frames))


def _bdd_real(path: Path) -> list[dict[str, Any]]:
    """A published label file in the format of TrackEval's reader: `index`, and `Crowd` as attribute."""
    document = json.loads(path.read_text())
    frames = document["frames"] if isinstance(document, dict) else document
    numbers: dict[str, int] = {}
    entries = []
    for index, frame in enumerate(frames):
        labels = []
        for label in frame.get("labels") or []:
            attributes = label.get("attributes") or {}
            crowd = bool(attributes.get("crowd", attributes.get("Crowd", False)))
            number = numbers.setdefault(str(label["id"]), len(numbers))
            box = {key: float(label["box2d"][key]) for key in ("x1", "y1", "x2", "y2")}
            labels.append(
                {"id": str(number), "category": label["category"], "box2d": box, "attributes": {"Crowd": crowd}}
            )
        entries.append({"index": index, "labels": labels})
    return entries


def _disturbed_labels(labels: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    predictions = []
    for entry in labels:
        pred = []
        for label in entry["labels"]:
            if label["category"] not in BDD100K_CLASSES or rng.random() < 0.1:
                continue
            box = label["box2d"]
            shift = rng.normal(0, 0.08) * (box["x2"] - box["x1"])
            moved = {"x1": box["x1"] + shift, "y1": box["y1"], "x2": box["x2"] + shift, "y2": box["y2"]}
            number = int(label["id"]) + 10_000 * (entry["index"] // 30)
            pred.append({"id": str(number), "category": label["category"], "box2d": moved})
        predictions.append({"index": entry["index"], "labels": pred})
    return predictions


def _check_bdd(
    tmp_path: Path, videos: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]], classes: tuple[str, ...]
) -> int:
    for name, (labels, predictions) in videos.items():
        for folder, content in (("gt", labels), ("trackers/ours/data", predictions)):
            target = tmp_path / folder / f"{name}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(content))
    dataset = BDD100K(
        QUIET
        | {
            "GT_FOLDER": str(tmp_path / "gt"),
            "TRACKERS_FOLDER": str(tmp_path / "trackers"),
            "CLASSES_TO_EVAL": list(classes),
        }
    )
    class_map = ClassMap(classes, {name: (name,) for name in classes})
    sequences = []
    for name, (labels, predictions) in videos.items():
        pred = rows(
            *(
                (entry["index"], int(label["id"]), *label["box2d"].values(), classes.index(label["category"]))
                for entry in predictions
                for label in entry["labels"]
                if label["category"] in classes
            )
        )
        sequences.append(scored_sequence(_bdd_sequence(name, labels), class_map, pred, "bdd100k"))
    scores = score(sequences, classes, "bdd100k")
    for cls in classes:
        expected = _trackeval(dataset, "ours", cls)
        if scores.per_class[cls]["GT"]:
            _assert_equal(scores.per_class[cls], expected["all"], cls)
        else:
            assert expected["all"]["CLEAR"]["CLR_TP"] + expected["all"]["CLEAR"]["CLR_FN"] == 0
        assert scores.per_class[cls]["FP"] == expected["all"]["CLEAR"]["CLR_FP"]
    return scores.removed.get("predictions in ignored regions", 0)


@pytest.mark.parametrize("classes", [BDD100K_CLASSES, ("pedestrian", "car")])
def test_bdd100k_protocol_on_random_scenes(tmp_path: Path, classes: tuple[str, ...]) -> None:
    removed = _check_bdd(tmp_path, {f"v{seed}": _bdd_scene(seed) for seed in range(4)}, classes)
    assert removed > 0, "without predictions in crowds the rule is not tested"


def test_bdd100k_protocol_on_published_labels(samples_dir: Path, tmp_path: Path) -> None:
    files = sorted((samples_dir / "labels_only" / "bdd100k").glob("*.json"))
    if not files:
        pytest.skip(f"no label files in {samples_dir / 'labels_only' / 'bdd100k'}")
    videos = {}
    for path in files:
        labels = _bdd_real(path)
        videos[path.name.split(".")[0]] = (labels, _disturbed_labels(labels, 0))
    _check_bdd(tmp_path, videos, BDD100K_CLASSES)


MOT17_NAMES = {
    1: "pedestrian",
    2: "person on vehicle",
    3: "car",
    7: "static person",
    8: "distractor",
    11: "occluder full",
}


def test_motchallenge_protocol_removes_what_trackeval_removes(tmp_path: Path) -> None:
    """MOT17 rules: distractors remove a matched prediction, cars and boxes marked 0 do not."""
    rng = np.random.default_rng(5)
    gt_lines, pred_lines, frames, pred_boxes = [], [], [], []
    for frame in range(20):
        boxes, ids, names, ignore = [], [], [], []
        for number, category in enumerate([1, 1, 1, 2, 3, 7, 8, 11, 1, 1]):
            x, y, size = 20.0 + 45 * number + frame, 50.0 + (number % 3) * 8, 50.0
            marked = category == 1 and number != 9
            gt_lines.append(f"{frame + 1},{number + 1},{x},{y},{size},{size},{int(marked)},{category},1")
            boxes.append([x, y, x + size, y + size])
            ids.append(number + 1)
            names.append(MOT17_NAMES[category])
            ignore.append(not marked)
            if rng.random() < 0.9:
                dx, dy = rng.normal(0, 6, 2)
                track_id = number + 1 + (20 if frame > 12 and number == 1 else 0)
                pred_lines.append(f"{frame + 1},{track_id},{x + dx!s},{y + dy!s},{size},{size},0.9,1,-1")
                pred_boxes.append((frame, track_id, x + dx, y + dy, x + dx + size, y + dy + size, 0))
        count = np.zeros(len(ids), np.int8)
        frames.append(Frame(frame, None, np.array(boxes), np.array(ids), tuple(names), np.array(ignore), count, count))
    for path, lines in (("gt/s/gt/gt.txt", gt_lines), ("trackers/ours/data/s.txt", pred_lines)):
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n".join(lines))
    dataset = MotChallenge2DBox(
        QUIET
        | {
            "GT_FOLDER": str(tmp_path / "gt"),
            "TRACKERS_FOLDER": str(tmp_path / "trackers"),
            "SKIP_SPLIT_FOL": True,
            "SEQ_INFO": {"s": 20},
        }
    )
    sequence = Sequence("s", "motchallenge", "val", 30.0, 640, 200, tuple(frames))
    prepared = scored_sequence(
        sequence, ClassMap(("pedestrian",), {"pedestrian": ("pedestrian",)}), rows(*pred_boxes), "motchallenge"
    )
    scores = score([prepared], ["pedestrian"], "motchallenge")
    _assert_equal(scores.class_averaged, _trackeval(dataset, "ours", "pedestrian")["all"], "MOT17")
    assert scores.removed["predictions in ignored regions"] > 0
    assert scores.class_averaged["FP"] > 0
