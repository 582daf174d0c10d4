"""Options of a curriculum run, and the folders of curricula and stages in the storage."""

from __future__ import annotations

from dataclasses import dataclass

from motip.config import Curriculum, Stage
from motip.stage_folder import StageFolder
from motip.storage.paths import Location, absolute


@dataclass(frozen=True)
class Options:
    """How and where a curriculum runs.

    Attributes:
        data_root: folder or URI that source roots and relative weights are found under.
        storage: folder or URI for shards, checkpoints and the MLflow database.
        workers: training workers; 0 trains in this process without Ray.
        min_workers: training starts with this many workers and grows up to `workers`; None: exactly `workers`.
        strict: an undecodable image stops the conversion.
        config_path: path of the curriculum file, for messages and relative paths.
        until: name of the last stage to run, None for all.
    """

    data_root: str
    storage: str
    workers: int = 1
    min_workers: int | None = None
    strict: bool = False
    config_path: str = ""
    until: str | None = None


def curriculum_folder(curriculum: Curriculum, options: Options) -> Location:
    """Folder of the files about all stages: list of stages, domain scores, report page."""
    return absolute(options.storage) / "curricula" / curriculum.name


def stage_folder(curriculum: Curriculum, stage: Stage, inputs: str, options: Options) -> StageFolder:
    """Folder of a stage's checkpoints and records; each digest of inputs has its own.

    OUTPUTS_DIR (or OUTPUT_DIR) of the stage's configuration replaces the parent folder, relative to the storage.
    """
    chosen = stage.config.OUTPUTS_DIR or stage.config.OUTPUT_DIR
    base = curriculum_folder(curriculum, options) / stage.name
    return StageFolder((base if chosen is None else absolute(options.storage) / chosen) / inputs[:12])
