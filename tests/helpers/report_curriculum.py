"""A finished small curriculum whose trackers are replaced by ones that lose a chosen share of the labels.

A network trained for seconds finds nothing, and a page of zeros would look right whatever it shows.
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
from motip.evaluate.domain_matrix import DomainMatrix
from motip.evaluate.scores import Scores
from motip.evaluate.validation import score_videos
from motip.lineage import Lineage
from motip.report.page import Page, write_page
from tests.helpers.small_curriculum import run, write_files

FOUND = {
    "BDD-Foundation": {"ground": 0.35},
    "BDD-Refinement": {"ground": 0.8},
    "Vis-Adaptation": {"ground": 0.4, "aerial": 0.5},
    "Vis-Specialist": {"ground": 0.38, "aerial": 0.9},
}
"""Stage -> domain -> share of the labelled boxes that its tracker finds; the road is forgotten by the third stage."""

MAPS = {
    "ground": ClassMap(("pedestrian", "car"), {"pedestrian": ("pedestrian",), "car": ("car",)}),
    "aerial": ClassMap(("pedestrian", "car"), {"pedestrian": ("pedestrian", "people"), "car": ("car", "van")}),
}
PROTOCOLS = {"ground": "bdd100k", "aerial": "visdrone"}


@dataclass(frozen=True)
class World:
    """The curriculum's folder, its lineage and run, what its stages score, and the page made of it."""

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


def make_world(folder: Path) -> World:
    """Train for seconds, replace what was found, draw pictures that others would draw, write the page."""
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
    return World(home, lineage, result.run_id, scores, page)


def _scores(videos: list[VideoEntry], storage: Path, sha256: str, share: float, seed: int) -> Scores:
    """Scores of tracks with a share of the labelled boxes, which are also stored as the evaluation stores them."""
    tracked = {}
    for video in videos:
        rows = _found(video, storage, share, seed)
        place = storage / "evaluations" / sha256[:12] / f"tracks/{video.source}/val/{video.video}.txt"
        assert place.is_file(), "the curriculum stores tracks of every domain a stage has seen"
        write_mot(place, rows)
        tracked[video.source, video.video] = rows
    source = videos[0].source
    return score_videos(videos, tracked, str(storage), MAPS, PROTOCOLS, "val").by_source[source]


def _found(video: VideoEntry, storage: Path, share: float, seed: int) -> TrackRows:
    parts = []
    for frame in read_labels(entry_path(storage, video)).frames:
        boxes, ids, class_ids, _ = MAPS[video.source].split(frame)
        # The same boxes at every share, and more of them at a larger one. Some sequences are harder than others.
        ease = 0.75 + 0.5 * np.random.default_rng([len(video.video), video.objects]).random()
        keep = np.random.default_rng([seed, frame.number]).random(len(ids)) < share * ease
        parts.append((np.full(int(keep.sum()), frame.number), ids[keep], boxes[keep], class_ids[keep]))
    frames, ids, boxes, class_ids = (np.concatenate([part[index] for part in parts]) for index in range(4))
    return TrackRows(frames, ids, boxes.astype(np.float32), np.full(len(ids), 0.9, np.float32), class_ids)


def _replace(folder: Path, scores: dict[str, Scores], stage: str) -> None:
    """The stage's own scores, its row of the matrix, and a failure sheet."""
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
    matrix = DomainMatrix.from_sources(sources, known=stored["known"], before=stored["before"])
    learned = {"ground": "BDD-Refinement", "aerial": "Vis-Specialist"}
    transfer = {stage: matrix.backward_transfer(learned, stage) for stage in matrix.stages[2:]}
    path.write_text(
        json.dumps({**stored, **matrix.to_json(), "backward_transfer": {**stored["backward_transfer"], **transfer}})
    )
