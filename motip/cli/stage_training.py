"""Training of a single stage, as a curriculum of one stage."""

from __future__ import annotations

from collections.abc import Sequence

from motip.cli.launch import checked_data_root, launch
from motip.config import load_config
from motip.config.single_stage import single_stage
from motip.curriculum import CurriculumResult
from motip.data.formats.motchallenge import CATEGORIES


def train_stage(
    config_path: str,
    *,
    data_root: str | None,
    storage: str,
    workers: str | int = 1,
    overrides: Sequence[str] = (),
    videos: int | None = None,
    strict: bool = False,
) -> CurriculumResult:
    """Train a stage configuration as a curriculum of one stage, and print its row of the stage table.

    Args:
        data_root: None: ``root_path`` of the configuration.
        videos: number of training videos of each dataset; None: all.

    Raises:
        MotipError: invalid arguments, configuration or data.
    """
    config = load_config(config_path, overrides)
    root = checked_data_root(data_root or config.root_path)
    curriculum = single_stage(config, root, CATEGORIES, videos=videos)
    return launch(curriculum, config_path=config_path, data_root=root, storage=storage, workers=workers, strict=strict)
