"""Launcher: run a curriculum, an experiment or a sweep, and print tables and report paths."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from motip.cli.console import line
from motip.cli.options import check_known, names_in
from motip.cluster import Cluster, joined_cluster
from motip.config import Curriculum, Stage
from motip.config.experiment_file import Experiment
from motip.curriculum import CurriculumResult, Options, run_curriculum
from motip.curriculum.base_weights import check_given_weights
from motip.curriculum.options import curriculum_folder
from motip.errors import MotipError
from motip.experiment.arms import experiment_folder, run_arms
from motip.experiment.summary import Findings, experiment_markdown, findings_json, learning_curves
from motip.lineage import Lineage
from motip.report.domain_table import domain_table
from motip.report.heatmap import png_of
from motip.report.page import write_page
from motip.report.progress import DriverUi, stage_table
from motip.report.stage_tracks import TrackingOptions
from motip.report.tracked_run import RunOptions, draw_missing_sheets
from motip.storage.named_folders import checked_data_root, checked_storage
from motip.storage.paths import Location, write_bytes, write_json
from motip.train.ray_train import device_from_config
from motip.tune import StageTuner, SweepResult, Tuning, run_sweep

logger = logging.getLogger(__name__)


def checked_options(
    config: str,
    *,
    data_root: str,
    storage: str,
    workers: str | int = 1,
    strict: bool = False,
    until: str | None = None,
) -> Options:
    """How and where a curriculum runs; folders are checked, the storage is created.

    Args:
        config: path of the curriculum file, for messages and relative paths.
        workers: training workers, a number or `MIN:MAX`; 0 trains in this process.

    Raises:
        MotipError: an invalid folder or number of workers.
    """
    least, most = workers_range(workers)
    return Options(
        data_root=checked_data_root(data_root),
        storage=checked_storage(storage),
        workers=most,
        min_workers=least,
        strict=strict,
        config_path=config,
        until=until,
    )


@contextmanager
def _session(options: Options) -> Iterator[tuple[DriverUi, Cluster | None, Lineage]]:
    """Progress display, cluster (None for training in this process) and lineage of a driver, until the block ends."""
    with joined_cluster(options.workers > 0) as cluster:
        ui = DriverUi()
        try:
            yield ui, cluster, Lineage(storage=options.storage)
        finally:
            ui.close()


def launch(curriculum: Curriculum, options: Options, tune: Tuning | None = None) -> CurriculumResult:
    """Run a curriculum and print the stage table.

    Args:
        tune: tune each stage that names a sweep before it is trained; None: train only.

    Raises:
        MotipError: invalid arguments, configuration or data.
    """
    if options.until is not None:
        names = [stage.name for stage in curriculum.stages]
        check_known("there is no such stage", "--until", options.until, names)
    check_given_weights(curriculum, options)  # fail here, before Ray starts
    with _session(options) as (ui, cluster, lineage):
        if cluster is not None and cluster.gpus < 1:
            for stage in curriculum.stages:
                if stage.config.DEVICE == "cuda":
                    ui.note(f"warning: {stage.name}: DEVICE is cuda, but the cluster has no GPU: it trains on the CPU")
        result = run_curriculum(curriculum, options, cluster, lineage, ui, StageTuner(tune) if tune else None)
        page = _report_page(curriculum, options, cluster, result, ui)
    # Stage table, domain table, and the paths of the results.
    class_names = list(dict.fromkeys(name for stage in curriculum.stages for name in stage.config.class_names))
    ui.console.print(stage_table(result.records, class_names))
    if result.domains is not None:
        domains, limits = result.domains, curriculum.domains
        ui.console.print(domain_table(domains.matrix, domains.transfer, limits.allowed_loss, limits.each_class))
        ui.note(f"domains as CSV and heat map: {domains.folder}/domains.csv, domains.png")
    ui.note(f"final checkpoint: {result.records[-1].checkpoint}")
    command, hint = lineage.compare_url_hint([record.run_id for record in result.records if record.run_id])
    ui.note(f"compare the stages in MLflow:\n  {command}\n  {hint}" if command else f"compare the stages: {hint}")
    if page is not None:
        ui.note(f"report page: {page}")
    return result


def launch_experiment(
    experiment: Experiment, options: Options, arms: str | None = None, seeds: str | None = None
) -> Location:
    """Run the unfinished arms of an experiment, and write the results of all arms.

    Args:
        arms, seeds: comma-separated selection to run now; None: all.

    Returns:
        the folder with ``results.md``, ``results.json`` and ``curves.png``.

    Raises:
        MotipError: invalid arguments, configuration or data.
    """
    selected_arms = _selected("--arms", arms, [arm.name for arm in experiment.arms])
    selected_seeds = _selected("--seeds", seeds, [str(seed) for seed in experiment.seeds])
    with _session(options) as (ui, cluster, lineage):
        outcomes = run_arms(
            experiment,
            options,
            lambda curriculum: run_curriculum(curriculum, options, cluster, lineage, ui),
            ui.note,
            selected_arms,
            [int(seed) for seed in selected_seeds],
        )
    # Write the results of all finished runs.
    folder = experiment_folder(experiment, options)
    findings = Findings(experiment, outcomes)
    text = experiment_markdown(findings)
    write_bytes(folder / "results.md", text.encode())
    write_json(folder / "results.json", findings_json(findings))
    write_bytes(folder / "curves.png", png_of(learning_curves(findings)))
    ui.console.print(text, markup=False)
    ui.note(f"results of {len(outcomes)} runs: {folder}/results.md, results.json, curves.png")
    return folder


def _selected(flag: str, text: str | None, valid: Sequence[str]) -> Sequence[str]:
    """The comma-separated names in ``text``, all of ``valid`` for None; raises MotipError for an unknown name."""
    names = valid if text is None else names_in(text)
    check_known("the experiment has no such entry", flag, names, valid)
    return names


def launch_sweep(curriculum: Curriculum, stage: Stage, options: Options, tuning: Tuning) -> SweepResult:
    """Run or resume a sweep of a stage, and print its result; the unfinished stages before it are trained first.

    Raises:
        MotipError: invalid arguments, configuration or data.
    """
    check_given_weights(curriculum, options)
    with _session(options) as (ui, cluster, lineage):
        assert cluster is not None  # a sweep has at least one worker per trial
        result = run_sweep(curriculum, stage, options, cluster, lineage, ui, tuning)
    command, hint = lineage.compare_url_hint([result.run_id])
    ui.note(f"trials in MLflow, below the run `{stage.name} sweep`:\n  {command}" if command else f"trials: {hint}")
    ui.note(result.summary())
    return result


def _report_page(
    curriculum: Curriculum, options: Options, cluster: Cluster | None, result: CurriculumResult, ui: DriverUi
) -> Location | None:
    """Write the report page and return its path; None, with a warning, if it could not be written.

    The failure sheets on it are drawn from the tracks that scoring the domains stored.
    """
    folder = curriculum_folder(curriculum, options)
    config = curriculum.stages[-1].config
    try:
        on_gpu = cluster is not None and cluster.gpus >= 1 and config.DEVICE != "cpu"
        device = str(device_from_config(config)) if cluster is None else "cuda" if on_gpu else "cpu"
        tracking = TrackingOptions(cluster=cluster, device=device)
        if curriculum.domains.score != "none":
            draw_missing_sheets(folder, RunOptions(log=line))
        page = write_page(folder, tracking=tracking, lineage=result.lineage, run_id=result.run_id, log=ui.note)
    except Exception as error:
        logger.exception("the report page of %s was not written", curriculum.name)
        ui.note(f"warning: the report page was not written: {error}\n  try again: motip report page {folder}")
        return None
    for text in page.missing:
        ui.note(f"not on the report page: {text}")
    return page.path


def workers_range(text: str | int) -> tuple[int | None, int]:
    """Parse `4` to (None, 4), always four workers, and `2:4` to (2, 4), as many as the cluster has resources for.

    Raises:
        MotipError: neither a number nor a range.
    """
    least, colon, most = str(text).rpartition(":")
    numbers = [least, most] if colon else [most]
    if not all(number.isdecimal() for number in numbers) or (colon and not 1 <= int(least) <= int(most)):
        raise MotipError(
            "invalid number of workers",
            where="--workers",
            found=text,
            expected="a number such as 4, or MIN:MAX such as 2:4 with MIN at least 1",
            fix="0 trains in this process, without Ray",
        )
    return (int(least) if colon else None), int(most)
