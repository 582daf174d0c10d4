"""Launcher: run a curriculum or an experiment from command-line arguments, and print tables and report paths."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from motip.cluster import Cluster, connect, disconnect
from motip.config import Curriculum, load_curriculum
from motip.config.experiment_file import load_experiment
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
from motip.storage.paths import Location, location, write_bytes, write_json
from motip.train.ray_train import device_from_config
from motip.tune import StageTuner, Tuning

logger = logging.getLogger(__name__)


def launch_curriculum(
    config: str,
    *,
    data_root: str,
    storage: str,
    workers: str | int = 1,
    overrides: Sequence[str] = (),
    until: str | None = None,
    strict: bool = False,
    before_page: Callable[[Location], None] | None = None,
    tune: Tuning | None = None,
) -> CurriculumResult:
    """Run a curriculum file and print the stage table; see :func:`launch`."""
    return launch(
        load_curriculum(config, overrides, tune=tune is not None),
        config_path=str(config),
        data_root=data_root,
        storage=storage,
        workers=workers,
        until=until,
        strict=strict,
        before_page=before_page,
        tune=tune,
    )


def launch_experiment(
    config: str,
    *,
    data_root: str,
    storage: str,
    workers: str | int = 1,
    overrides: Sequence[str] = (),
    arms: str | None = None,
    seeds: str | None = None,
    strict: bool = False,
) -> Location:
    """Run the unfinished arms of an experiment file, and write the results of all arms.

    Args:
        overrides: ``KEY=VALUE`` for every arm, applied after the arm's own overrides.
        arms, seeds: comma-separated selection to run now; None: all.

    Returns:
        the folder with ``results.md``, ``results.json`` and ``curves.png``.

    Raises:
        MotipError: invalid arguments, configuration or data.
    """
    experiment = load_experiment(config, overrides)
    selected_arms = _select("--arms", arms, [arm.name for arm in experiment.arms])
    selected_seeds = [int(each) for each in _select("--seeds", seeds, [str(seed) for seed in experiment.seeds])]
    options = _options(data_root, storage, workers, strict, config)
    ui = DriverUi()
    cluster = connect() if options.workers > 0 else None
    try:
        lineage = Lineage(storage=options.storage)
        outcomes = run_arms(
            experiment,
            options,
            lambda curriculum: run_curriculum(curriculum, options, cluster, lineage, ui),
            ui.note,
            selected_arms,
            selected_seeds,
        )
    finally:
        ui.close()
        if cluster is not None:
            disconnect()
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


def _select(flag: str, text: str | None, valid: Sequence[str]) -> Sequence[str]:
    """The comma-separated names in ``text``, all of ``valid`` for None; raises MotipError for an unknown name."""
    if text is None:
        return valid
    names = [part.strip() for part in text.split(",") if part.strip()]
    for each in names:
        if each not in valid:
            raise MotipError(
                "the experiment has no such entry", where=flag, found=each, expected="some of " + ", ".join(valid)
            )
    return names


def launch(
    curriculum: Curriculum,
    *,
    config_path: str,
    data_root: str,
    storage: str,
    workers: str | int = 1,
    until: str | None = None,
    strict: bool = False,
    before_page: Callable[[Location], None] | None = None,
    tune: Tuning | None = None,
) -> CurriculumResult:
    """Run a curriculum and print the stage table.

    Args:
        workers: training workers, a number or `MIN:MAX`; 0 trains in this process.
        until: name of the last stage to run; None: all.
        before_page: called with the curriculum's folder before the report page is written, if the domains were scored
            (which stores tracks of val videos).

    Raises:
        MotipError: invalid arguments, configuration or data.
    """
    options = _options(data_root, storage, workers, strict, config_path, until)
    if until is not None and until not in [stage.name for stage in curriculum.stages]:
        names = ", ".join(stage.name for stage in curriculum.stages)
        raise MotipError("there is no such stage", where="--until", found=until, expected=f"one of {names}")
    check_given_weights(curriculum, options)  # fail here, before Ray starts
    ui = DriverUi()
    cluster = connect() if options.workers > 0 else None
    if cluster is not None and cluster.gpus < 1:
        for stage in curriculum.stages:
            if stage.config.DEVICE == "cuda":
                ui.note(f"warning: {stage.name}: DEVICE is cuda, but the cluster has no GPU: it trains on the CPU")
    try:
        lineage = Lineage(storage=options.storage)
        result = run_curriculum(curriculum, options, cluster, lineage, ui, StageTuner(tune) if tune else None)
        page = _report_page(curriculum, options, cluster, result, ui, before_page)
    finally:
        ui.close()
        if cluster is not None:
            disconnect()
    # Stage table, domain table, and the paths of the results.
    class_names = list(dict.fromkeys(name for stage in curriculum.stages for name in stage.config.class_names))
    ui.console.print(stage_table(result.records, class_names))
    if result.domains is not None:
        domains, limits = result.domains, curriculum.domains
        ui.console.print(domain_table(domains.matrix, domains.transfer, limits.allowed_loss, limits.each_class))
        ui.note(f"domains as CSV and heat map: {domains.folder}/domains.csv, domains.png")
    last = result.records[-1]
    ui.note(f"final checkpoint: {last.checkpoint}")
    command, hint = lineage.compare_url_hint([record.run_id for record in result.records if record.run_id])
    ui.note(f"compare the stages in MLflow:\n  {command}\n  {hint}" if command else f"compare the stages: {hint}")
    if page is not None:
        ui.note(f"report page: {page}")
    return result


def _options(
    data_root: str, storage: str, workers: str | int, strict: bool, config_path: str, until: str | None = None
) -> Options:
    least, most = workers_range(workers)
    return Options(
        data_root=checked_data_root(data_root),
        storage=checked_storage(storage),
        workers=most,
        min_workers=least,
        strict=strict,
        config_path=str(config_path),
        until=until,
    )


def _report_page(
    curriculum: Curriculum,
    options: Options,
    cluster: Cluster | None,
    result: CurriculumResult,
    ui: DriverUi,
    before_page: Callable[[Location], None] | None = None,
) -> Location | None:
    """Write the report page and return its path; None, with a warning, if it could not be written."""
    folder = curriculum_folder(curriculum, options)
    config = curriculum.stages[-1].config
    try:
        on_gpu = cluster is not None and cluster.gpus >= 1 and config.DEVICE != "cpu"
        device = str(device_from_config(config)) if cluster is None else "cuda" if on_gpu else "cpu"
        tracking = TrackingOptions(cluster=cluster, device=device)
        if before_page is not None and curriculum.domains.score != "none":
            before_page(folder)
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


def checked_data_root(named: str) -> str:
    """The absolute data root; raises MotipError if a local one is not a folder."""
    path = location(named)
    if isinstance(path, Path):
        _check_absolute_in_a_job("--data-root", path)
        if not path.is_dir():
            raise MotipError(
                "the data root does not exist",
                where="--data-root",
                found=named,
                expected="a folder with the raw datasets (see sources: in the curriculum file)",
                fix="create it or name another folder",
            )
        return str(path.resolve())
    return named


def _check_absolute_in_a_job(flag: str, path: Path) -> None:
    """Raise MotipError for a relative path in a submitted job: Ray deletes the job's copy of the working directory."""
    if not path.is_absolute() and "working_dir_files" in Path.cwd().parts:
        raise MotipError(
            "a submitted job needs absolute paths: it runs in a temporary copy of the folder",
            where=flag,
            found=path,
            expected="an absolute path, the same on every node, or an s3:// URI",
            fix=f"give {flag} an absolute path",
        )


def checked_storage(named: str) -> str:
    """The absolute storage, created if needed and checked to be writable.

    Raises:
        MotipError: the folder cannot be created or written, or is relative in a submitted job.
    """
    path = location(named)
    if not isinstance(path, Path):
        return named
    _check_absolute_in_a_job("--storage", path)
    path = path.resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MotipError(
            f"the storage cannot be written: {error.strerror}",
            where="--storage",
            found=path,
            expected="a folder this user can write to",
            fix="name another folder",
        ) from error
    return str(path)
