"""From a command line's arguments to a running curriculum and its closing lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from motip.cluster import connect, disconnect
from motip.config import Curriculum, load_curriculum
from motip.curriculum import CurriculumResult, Options, run_curriculum
from motip.curriculum.weights import check_given_weights
from motip.data.storage import location
from motip.errors import MotipError
from motip.lineage import Lineage
from motip.report.domain_table import domain_table
from motip.report.progress import DriverUi, stage_table


def launch_curriculum(
    config: str,
    *,
    data_root: str,
    storage: str,
    workers: str | int = 1,
    overrides: Sequence[str] = (),
    until: str | None = None,
    strict: bool = False,
) -> CurriculumResult:
    """Run a curriculum file and print the stage table; see :func:`launch`."""
    return launch(
        load_curriculum(config, overrides),
        config_path=str(config),
        data_root=data_root,
        storage=storage,
        workers=workers,
        until=until,
        strict=strict,
    )


def launch(
    curriculum: Curriculum,
    *,
    config_path: str,
    data_root: str,
    storage: str,
    workers: str | int = 1,
    until: str | None = None,
    strict: bool = False,
) -> CurriculumResult:
    """Run a curriculum and print the stage table.

    Args:
        workers: training workers, a number or `MIN:MAX`; 0 trains in this process.

    Raises:
        MotipError: anything the user can put right.
    """
    least, most = workers_range(workers)
    options = Options(
        data_root=checked_data_root(data_root),
        storage=checked_storage(storage),
        workers=most,
        least_workers=least,
        strict=strict,
        config_path=config_path,
        until=until,
    )
    if until is not None and until not in [stage.name for stage in curriculum.stages]:
        names = ", ".join(stage.name for stage in curriculum.stages)
        raise MotipError("there is no such stage", where="--until", found=until, expected=f"one of {names}")
    check_given_weights(curriculum, options)  # said here it costs no start of Ray
    ui = DriverUi()
    cluster = connect() if most > 0 else None
    if cluster is not None and cluster.gpus < 1:
        for stage in curriculum.stages:
            if stage.config.DEVICE == "cuda":
                ui.note(f"warning: {stage.name}: DEVICE is cuda, but the cluster has no GPU: it trains on the CPU")
    try:
        lineage = Lineage(storage=options.storage)
        result = run_curriculum(curriculum, options, cluster, lineage, ui)
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
    command, page = lineage.compare_url_hint([record.run_id for record in result.records if record.run_id])
    ui.note(f"compare the stages in MLflow:\n  {command}\n  {page}" if command else f"compare the stages: {page}")
    return result


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
