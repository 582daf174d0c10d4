"""Fixture: a finished small curriculum whose tracks are replaced by a chosen fraction of the labelled boxes.

A network trained for seconds detects nothing, and a page of zeros could not fail a test.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from motip.data.formats.result_files import write_mot
from motip.data.manifest import Manifest, VideoEntry, entry_path
from motip.data.sequence import ClassMap, TrackRows
from motip.data.shards import read_labels
from motip.evaluation.domain_matrix import DomainMatrix
from motip.evaluation.scores import Scores
from motip.evaluation.validation import score_videos
from motip.lineage import Lineage
from motip.report.page import Page, write_page
from tests.helpers.small_curriculum import run, write_files

FOUND = {
    "BDD-Foundation": {"ground": 0.35},
    "BDD-Refinement": {"ground": 0.8},
    "Vis-Adaptation": {"ground": 0.4, "aerial": 0.5},
    "Vis-Specialist": {"ground": 0.38, "aerial": 0.9},
}
"""Stage -> domain -> fraction of the labelled boxes in its tracks; the third stage forgets the ground domain."""

MAPS = {
    "ground": ClassMap(("pedestrian", "car"), {"pedestrian": ("pedestrian",), "car": ("car",)}),
    "aerial": ClassMap(("pedestrian", "car"), {"pedestrian": ("pedestrian", "people"), "car": ("car", "van")}),
}
PROTOCOLS = {"ground": "bdd100k", "aerial": "visdrone"}


@dataclass(frozen=True)
class ReportedCurriculum:
    """The curriculum's folder, its lineage and MLflow run, scores by stage and domain, and the written page."""

    folder: Path
    lineage: Lineage
    run_id: str
    scores: dict[str, dict[str, Scores]]
    page: Page

    @property
    def html(self) -> str:
        return Path(str(self.page.path)).read_text()

    def stage_folder(self, stage: str) -> Path:
        return next(path.parent for path in (self.folder / stage).glob("*/stage.json"))


def make_reported_curriculum(folder: Path) -> ReportedCurriculum:
    """Train for seconds, replace tracks and scores, add a failure sheet, write the report page."""
    path = write_files(folder)
    path.write_text(path.read_text().replace("val: 1}, frames: 4", "val: 3}, frames: 8"))
    storage = folder / "storage"
    lineage = Lineage(storage=storage)
    result, _, curriculum = run(path, storage, lineage=lineage)
    home = storage / "curricula" / curriculum.name
    manifest = Manifest.load(storage)
    scores = {}
    for record in result.records:
        own = FOUND[record.stage]
        scores[record.stage] = {
            domain: _scores(manifest.of(domain, "val"), storage, record.sha256, share, number)
            for number, (domain, share) in enumerate(own.items())
        }
        _replace(Path(record.checkpoint).parent, scores[record.stage], record.stage)
    _replace_matrix(home / "domains.json", scores)
    page = write_page(home, lineage=lineage, run_id=result.run_id)
    return ReportedCurriculum(home, lineage, result.run_id, scores, page)


def _scores(videos: list[VideoEntry], storage: Path, sha256: str, share: float, seed: int) -> Scores:
    """Scores of tracks with a fraction of the labelled boxes, stored where the evaluation stores its tracks."""
    tracked = {}
    for video in videos:
        rows = _found(video, storage, share, seed)
        place = storage / "evaluations" / sha256[:12] / f"tracks/{video.source}/val/{video.video}.txt"
        assert place.is_file(), "the curriculum stores tracks of every domain that a stage was trained on"
        write_mot(place, rows)
        tracked[video.source, video.video] = rows
    source = videos[0].source
    return score_videos(videos, tracked, str(storage), MAPS, PROTOCOLS, "val").by_source[source]


def _found(video: VideoEntry, storage: Path, share: float, seed: int) -> TrackRows:
    parts = []
    for frame in read_labels(entry_path(storage, video)).frames:
        boxes, ids, class_ids, _ = MAPS[video.source].split(frame)
        # A larger share keeps a superset of the boxes. Some sequences are harder than others.
        ease = 0.75 + 0.5 * np.random.default_rng([len(video.video), video.objects]).random()
        keep = np.random.default_rng([seed, frame.number]).random(len(ids)) < share * ease
        parts.append((np.full(int(keep.sum()), frame.number), ids[keep], boxes[keep], class_ids[keep]))
    frames, ids, boxes, class_ids = (np.concatenate([part[index] for part in parts]) for index in range(4))
    return TrackRows(frames, ids, boxes.astype(np.float32), np.full(len(ids), 0.9, np.float32), class_ids)


def _replace(folder: Path, scores: dict[str, Scores], stage: str) -> None:
    """Replace the stage's own scores and its row of the matrix; give the last stage a failure sheet."""
    own = "ground" if stage.startswith("BDD") else "aerial"
    (folder / "scores" / "epoch_000.json").write_text(json.dumps({own: scores[own].to_json()}))
    row = json.loads((folder / "domains.json").read_text())
    row["scores"] = {domain: {domain: each.to_json()} for domain, each in scores.items()}
    (folder / "domains.json").write_text(json.dumps(row))
    if stage == "Vis-Specialist":
        noise = np.random.default_rng(3).integers(0, 255, (700, 2400, 3)).astype(np.uint8)
        save_png(folder / "failures_val" / "contact_sheet.png", noise)


def save_png(path: Path, pixels: np.ndarray) -> None:
    import cv2

    path.parent.mkdir(exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


def _replace_matrix(path: Path, scores: dict[str, dict[str, Scores]]) -> None:
    stored = json.loads(path.read_text())
    sources = {stage: {domain: {domain: each} for domain, each in own.items()} for stage, own in scores.items()}
    matrix = DomainMatrix.from_sources(sources, trained_on=stored["known"], ancestors=stored["before"])
    learned = {"ground": "BDD-Refinement", "aerial": "Vis-Specialist"}
    transfer = {stage: matrix.backward_transfer(learned, stage) for stage in matrix.stages[2:]}
    path.write_text(
        json.dumps({**stored, **matrix.to_json(), "backward_transfer": {**stored["backward_transfer"], **transfer}})
    )
