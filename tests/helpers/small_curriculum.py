"""A curriculum on synthetic frames that runs in seconds in this process, for end-to-end tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from motip.cluster import Cluster
from motip.config import Curriculum, load_curriculum
from motip.curriculum import CurriculumResult, Options, run_curriculum
from motip.events import Event
from motip.lineage import Lineage
from tests.helpers.mlflow_database import lineage_on

ROOT = Path(__file__).resolve().parents[2]

STAGE = f"""SUPER_CONFIG_PATH: {ROOT}/configs/demo/motip_tiny.yaml
NUM_CLASSES: 2
EPOCHS: 1
LR_DROP: 1
CLIPS_PER_EPOCH: 2
AUG_NUM_GROUPS: 2
DETR_ENC_LAYERS: 1
DETR_DEC_LAYERS: 2
NUM_ID_DECODER_LAYERS: 1
sampler_lengths: [2]
sample_intervals: [1]
NUM_WORKERS: 1
"""

CURRICULUM = """name: small
sources:
  ground:
    format: bdd100k
    root: .
    domain: ground
    classes: {pedestrian: [pedestrian], car: [car]}
    synthetic: {domain: ground, seed: 5, sequences: {train: 2, val: 1}, frames: 4}
  aerial:
    format: visdrone
    root: .
    domain: aerial
    classes: {pedestrian: [pedestrian, people], car: [car, van]}
    synthetic: {domain: aerial, seed: 5, sequences: {train: 2, val: 1}, frames: 4}
stages:
  - {name: BDD-Foundation, config: one.yaml, data: [{source: ground, videos: 1}], initialise: base.yaml}
  - {name: BDD-Refinement, config: two.yaml, data: [{source: ground, videos: 2}]}
  - {name: Vis-Adaptation, config: three.yaml, data: [{source: aerial, videos: 1}]}
  - {name: Vis-Specialist, config: four.yaml, data: [{source: aerial, videos: 2}]}
"""


def write_files(folder: Path, *, domains: bool = True) -> Path:
    """The YAML files of the small curriculum; returns the curriculum file.

    Args:
        domains: score the domains after each stage, which takes longer than training it.
    """
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text(STAGE)
    # One stage uses the key of the published code for the schedule.
    published = STAGE.replace("sampler_lengths: [2]\nsample_intervals: [1]\n", "SAMPLE_LENGTHS: [2]\n")
    (folder / "three.yaml").write_text(published.replace("LR_DROP: 1\n", ""))
    (folder / "four.yaml").write_text(STAGE + "NUM_ID_VOCABULARY: 40\n")
    (folder / "base.yaml").write_text(STAGE.replace("NUM_CLASSES: 2", "NUM_CLASSES: 1"))
    path = folder / "curriculum.yaml"
    path.write_text(CURRICULUM + ("" if domains else "domains: {score: none}\n"))
    return path


class QuietUi:
    """Collects the output instead of printing it."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.phases: list[tuple[str, int, int]] = []
        self.begun: list[str] = []
        self.events: list[Event] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def converting(self, phase: str, done: int, total: int) -> None:
        self.phases.append((phase, done, total))

    def converted(self, report: Any) -> None:
        self.notes.append(report.summary_line())

    def stage_begins(self, stage: Any, job: Any, folder: str) -> None:
        self.begun.append(stage.name)

    def event(self, event: Event) -> None:
        self.events.append(event)

    def stage_ends(self, record: Any) -> None:
        return


def run(
    path: Path,
    storage: Path,
    *,
    workers: int = 0,
    cluster: Cluster | None = None,
    lineage: Lineage | None = None,
    overrides: tuple[str, ...] = (),
) -> tuple[CurriculumResult, QuietUi, Curriculum]:
    """Run a curriculum file; by default in this process, with the MLflow database under the storage."""
    curriculum = load_curriculum(path, overrides)
    ui = QuietUi()
    options = Options(data_root=str(path.parent), storage=str(storage), workers=workers, config_path=str(path))
    result = run_curriculum(curriculum, options, cluster, lineage or lineage_on(storage), ui)
    return result, ui, curriculum
