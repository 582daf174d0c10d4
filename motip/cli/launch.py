"""From a command line's arguments to a running curriculum and its closing lines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from motip.cluster import Cluster, connect, disconnect
from motip.config import Curriculum, load_curriculum
from motip.config.experiment_file import load_experiment
from motip.curriculum import CurriculumResult, Options, run_curriculum
from motip.curriculum.base_weights import check_given_weights
from motip.curriculum.records import curriculum_folder
from motip.errors import MotipError
from motip.experiment.arms import experiment_folder, run_arms
from motip.experiment.summary import Findings, experiment_markdown, findings_json, learning_curves
from motip.lineage import Lineage
from motip.report.domain_table import domain_table
from motip.report.heatmap import png_of
from motip.report.page import write_page
from motip.report.progress import DriverUi, stage_table
from motip.report.stage_tracks import Means
from motip.storage.paths import Location, location, write_bytes, write_json
from motip.train.ray_train import pick_device
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
    """Run the arms of an experiment file that are not finished, and write what all of them found.

    Args:
        overrides: for every arm, on top of its own changes to all stages.
        arms, seeds: the only ones to run now, with commas between them; None = all.

    Returns:
        the folder with ``results.md``, ``results.json`` and ``curves.png``.

    Raises:
        MotipError: anything the user can put right.
    """
    experiment = load_experiment(config, overrides)
    wanted_arms = _chosen("--arms", arms, [arm.name for arm in experiment.arms])
    wanted_seeds = [int(each) for each in _chosen("--seeds", seeds, [str(seed) for seed in experiment.seeds])]
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
            wanted_arms,
            wanted_seeds,
        )
    finally:
        ui.close()
        if cluster is not None:
            disconnect()
    folder = experiment_folder(experiment, options)
    findings = Findings(experiment, outcomes)
    text = experiment_markdown(findings)
    write_bytes(folder / "results.md", text.encode())
    write_json(folder / "results.json", findings_json(findings))
    write_bytes(folder / "curves.png", png_of(learning_curves(findings)))
    ui.console.print(text, markup=False)
    ui.note(f"results of {len(outcomes)} runs: {folder}/results.md, results.json, curves.png")
    return folder


def _chosen(flag: str, text: str | None, known: Sequence[str]) -> Sequence[str]:
    if text is None:
        return known
    named = [part.strip() for part in text.split(",") if part.strip()]
    for each in named:
        if each not in known:
            raise MotipError(
                "the experiment has no such entry", where=flag, found=each, expected="some of " + ", ".join(known)
            )
    return named


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
        before_page: given the curriculum's folder before its report page is made, to add to it; called only where the
            domains were scored, which leaves tracks of val videos.

    Raises:
        MotipError: anything the user can put right.
    """
    options = _options(data_root, storage, workers, strict, config_path, until)
    if until is not None and until not in [stage.name for stage in curriculum.stages]:
        names = ", ".join(stage.name for stage in curriculum.stages)
        raise MotipError("there is no such stage", where="--until", found=until, expected=f"one of {names}")
    check_given_weights(curriculum, options)  # said here it costs no start of Ray
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
    class_names = list(dict.fromkeys(name for stage in curriculum.stages for name in stage.config.class_names))
    ui.console.print(stage_table(result.records, class_names))
    if result.domains is not None:
        domains, wanted = result.domains, curriculum.domains
        ui.console.print(domain_table(domains.matrix, domains.transfer, wanted.allowed_loss, wanted.each_class))
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
        least_workers=least,
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
    """The page's place; None where it could not be made, which is said and ends nothing: the stages are trained."""
    folder = curriculum_folder(curriculum, options)
    config = curriculum.stages[-1].config
    try:
        on_gpu = cluster is not None and cluster.gpus >= 1 and config.DEVICE != "cpu"
        device = str(pick_device(config)) if cluster is None else "cuda" if on_gpu else "cpu"
        means = Means(cluster=cluster, device=device)
        if before_page is not None and curriculum.domains.score != "none":
            before_page(folder)
        page = write_page(folder, means=means, lineage=result.lineage, run_id=result.run_id, say=ui.note)
    except Exception as error:
        logger.exception("the report page of %s was not made", curriculum.name)
        ui.note(f"warning: the report page was not made: {error}\n  try again: motip report page {folder}")
        return None
    for text in page.missing:
        ui.note(f"report page, not on it: {text}")
    return page.path


def workers_range(text: str | int) -> tuple[int | None, int]:
    """`4` is (None, 4): always four workers. `2:4` is (2, 4): as many as the cluster has room for.

    Raises:
        MotipError: it is neither.
    """
    least, colon, most = str(text).rpartition(":")
    numbers = [least, most] if colon else [most]
    if not all(number.isdecimal() for number in numbers) or (colon and not 1 <= int(least) <= int(most)):
        raise MotipError(
            "this is no number of workers",
            where="--workers",
            found=text,
            expected="a number such as 4, or MIN:MAX such as 2:4 with MIN at least 1",
            fix="0 trains in this process, without Ray",
        )
    return (int(least) if colon else None), int(most)


def checked_data_root(named: str) -> str:
    """Raises MotipError where a local data root is no folder."""
    place = location(named)
    if isinstance(place, Path):
        _refuse_relative_in_a_job("--data-root", place)
        if not place.is_dir():
            raise MotipError(
                "the data root is not there",
                where="--data-root",
                found=named,
                expected="a folder with the raw datasets (see sources: in the curriculum file)",
                fix="create it or name another folder",
            )
        return str(place.resolve())
    return named


def _refuse_relative_in_a_job(flag: str, place: Path) -> None:
    """A submitted job runs in a copy of the working directory that Ray throws away."""
    if not place.is_absolute() and "working_dir_files" in Path.cwd().parts:
        raise MotipError(
            "a submitted job needs absolute paths: it runs in a copy of the folder that is thrown away",
            where=flag,
            found=place,
            expected="an absolute path, the same on every node, or an s3:// URI",
            fix=f"give {flag} an absolute path",
        )


def checked_storage(named: str) -> str:
    """Absolute storage that can be written: a submitted job's working directory is thrown away.

    Raises:
        MotipError: the folder cannot be made or written.
    """
    place = location(named)
    if not isinstance(place, Path):
        return named
    _refuse_relative_in_a_job("--storage", place)
    place = place.resolve()
    try:
        place.mkdir(parents=True, exist_ok=True)
        probe = place / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MotipError(
            f"the storage cannot be written: {error.strerror}",
            where="--storage",
            found=place,
            expected="a folder this user can write to",
            fix="name another folder",
        ) from error
    return str(place)
