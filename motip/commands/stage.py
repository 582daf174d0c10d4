"""Train one stage on its own, the way a curriculum would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from motip.cluster import connect, disconnect
from motip.config import load_config
from motip.config.single_stage import single_stage
from motip.curriculum import CurriculumResult, Options, run_curriculum
from motip.data.formats.motchallenge import CATEGORIES
from motip.errors import MotipError
from motip.launch import checked_data_root, checked_storage
from motip.lineage import Lineage
from motip.report.progress import DriverUi, stage_table


def train_stage(
    config_path: str,
    *,
    data_root: str | None,
    storage: str,
    workers: int = 1,
    overrides: Sequence[str] = (),
    videos: int | None = None,
    strict: bool = False,
) -> CurriculumResult:
    """Train a stage configuration as a curriculum of one stage, and print its row of the stage table.

    Args:
        data_root: default is ``root_path`` of the configuration.

    Raises:
        MotipError: anything the user can put right.
    """
    if workers < 0:
        raise MotipError("the number of workers is negative", where="--workers", found=workers, expected="0 or more")
    config = load_config(Path(config_path), overrides)
    root = checked_data_root(data_root or config.root_path)
    chosen = single_stage(config, root, CATEGORIES, videos=videos)
    options = Options(
        data_root=root, storage=checked_storage(storage), workers=workers, strict=strict, config_path=config_path
    )
    ui = DriverUi()
    for note in chosen.notes:
        ui.note(f"note: {note}")
    cluster = connect() if workers > 0 else None
    try:
        lineage = Lineage(storage=options.storage)
        result = run_curriculum(chosen.curriculum, options, cluster, lineage, ui)
    finally:
        ui.close()
        if cluster is not None:
            disconnect()
    ui.console.print(stage_table(result.records, list(config.class_names)))
    ui.note(f"final checkpoint: {result.records[-1].checkpoint}")
    command, page = lineage.compare_url_hint([record.run_id for record in result.records if record.run_id])
    ui.note(f"look at the run in MLflow:\n  {command}\n  {page}" if command else f"look at the run: {page}")
    return result
