"""Data of the report page, read from the folders of a curriculum and its stages; missing parts are listed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motip.config import Config
from motip.config.curriculum_file import BASE
from motip.errors import MotipError
from motip.evaluation.comparison import Comparison, compare
from motip.evaluation.domain_matrix import DomainMatrix
from motip.evaluation.score_files import load_scores
from motip.evaluation.scores import Scores
from motip.report.stage_list import StageList
from motip.storage.paths import Location, RemotePath, files_under, location, read_json, recorded_file, sha256
from motip.tracking.settings import TrackerSettings

MAX_SHEETS = 12
"""Failure sheets of one stage on the page; the others stay in the stage's folder."""


@dataclass(frozen=True)
class PageImage:
    """An image file: its name and bytes."""

    name: str
    content: bytes


@dataclass(frozen=True)
class StageFacts:
    """A stage as read from its folder.

    Attributes:
        folder: None for a stage that is not trained yet; all else is empty then.
        record: ``stage.json``; empty for an unfinished stage.
        scores: of the best epoch on the stage's own validation videos, by source.
        row: scores in every domain that the stage was scored in, by source.
        domains: source -> domain, of ``row``.
        classes, settings: class names and tracker settings that ``row`` was tracked with.
        state: checkpoint file compared with its recorded digest: same, changed, missing or not read.
        sheets, more_sheets: the first MAX_SHEETS failure sheets, and the number of others.
        missing: parts that could not be read, one line each.
    """

    name: str
    folder: Location | None
    record: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Scores] = field(default_factory=dict)
    row: Mapping[str, Scores] = field(default_factory=dict)
    domains: Mapping[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    settings: TrackerSettings | None = None
    state: str = ""
    dashboard: PageImage | None = None
    sheets: tuple[PageImage, ...] = ()
    more_sheets: int = 0
    missing: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        return bool(self.record)


@dataclass(frozen=True)
class Matrix:
    """The stage-by-domain matrix R[stage][domain].

    Attributes:
        allowed: loss in points above which a cell counts as forgotten.
        each_class: whether single classes count too.
        transfer: stage -> backward transfer in points, None if undefined.
    """

    values: DomainMatrix
    allowed: float
    each_class: bool
    transfer: Mapping[str, float | None]


@dataclass(frozen=True)
class Change:
    """A stage compared with the one its weights come from, on the videos of one source.

    Attributes:
        before: the earlier stage; empty for the first.
        comparison: None if the two cannot be compared.
        why: the reason if there is no comparison.
    """

    before: str
    comparison: Comparison | None
    why: str = ""


@dataclass(frozen=True)
class PageFacts:
    """All data of the page except its videos.

    Attributes:
        missing: parts of the curriculum that could not be read, one line each.
        given: sha256 of weights that no stage of the curriculum trained -> their scores by domain.
    """

    name: str
    run_id: str
    folder: Location
    stages: tuple[StageFacts, ...]
    matrix: Matrix | None
    missing: tuple[str, ...] = ()
    given: Mapping[str, StageFacts] = field(default_factory=dict)

    def domain_of(self, source: str) -> str:
        """The domain of a source; the source's name if no stage was scored by domain."""
        return next((stage.domains[source] for stage in self.stages if source in stage.domains), source)

    def before(self, stage: StageFacts) -> StageFacts | None:
        """The stage whose checkpoint ``stage`` started from, None if it started from other weights."""
        parent = stage.record.get("parent_sha256")
        return next((each for each in self.stages if parent and each.record.get("sha256") == parent), None)

    def compared_with(self, stage: StageFacts) -> StageFacts | None:
        """The stage before; for a first stage the given weights, if they were scored."""
        return self.before(stage) or self.given.get(str(stage.record.get("parent_sha256")))


def read_page_facts(folder: Location, stages: StageList) -> PageFacts:
    """Read the folders of the curriculum and its stages; what cannot be read goes into ``missing``."""
    missing: list[str] = []
    matrix = None
    try:
        matrix = _matrix(folder / "domains.json")
    except MotipError as error:
        missing.append(f"the domains: {_sentence(error)}")
    facts = tuple(_stage(name, own) for name, own in stages.folders.items())
    given = {}
    for stage in facts:
        parent = str(stage.record.get("parent_sha256") or "")
        scored = folder / BASE / parent[:12]
        if parent and (scored / "domains.json").is_file():
            try:
                given[parent] = StageFacts(BASE, scored, row=stored_row(scored)[0])
            except MotipError as error:
                missing.append(f"scores of the given weights: {_sentence(error)}")
    return PageFacts(stages.name, stages.run_id, folder, facts, matrix, tuple(missing), given)


def changes(page: PageFacts, stage: StageFacts) -> dict[str, Change]:
    """Source of the stage's own validation -> its change against the stage before."""
    before = page.compared_with(stage)
    found = {}
    for source, own in stage.scores.items():
        if before is None:
            found[source] = Change("", None, "it is the first")
        else:
            found[source] = _change(before, stage, source, own)
    return found


def _change(before: StageFacts, stage: StageFacts, source: str, own: Scores) -> Change:
    pairs = [(before.scores.get(source), own), (before.row.get(source), stage.row.get(source))]
    scored = [(a, b) for a, b in pairs if a is not None and b is not None]
    why = f"other data: {before.name} has no scores on {source}"
    for a, b in scored:
        try:
            return Change(before.name, compare(a, b))
        except MotipError as error:
            why = f"not comparable with {before.name}: {error.what}"
    return Change(before.name, None, why)


def _matrix(path: Location) -> Matrix:
    if not path.is_file():
        raise MotipError("no stage was scored by domain (score is none under domains, or no stage is finished)")
    stored = read_json(path)
    try:
        return Matrix(
            DomainMatrix(
                stored["metric"],
                tuple(stored["stages"]),
                tuple(stored["domains"]),
                stored["values"],
                stored["by_class"],
                stored["known"],
                stored["before"],
            ),
            float(stored["allowed_loss"]),
            bool(stored["each_class"]),
            stored["backward_transfer"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise MotipError(f"{path.name} cannot be read: {error!r}") from error


def _stage(name: str, folder: Location | None) -> StageFacts:
    if folder is None:
        return StageFacts(name, None, missing=("not trained yet",))
    missing: list[str] = []
    record: Mapping[str, Any] = {}
    try:
        record = _record(folder / "stage.json")
    except MotipError as error:
        return StageFacts(name, folder, missing=(_sentence(error),))
    # Scores on the stage's own val videos.
    scores: dict[str, Scores] = {}
    try:
        scores = load_scores(str(folder))[1]
    except MotipError as error:
        missing.append(f"scores: {_sentence(error)}")
    # Scores by domain.
    row: dict[str, Scores] = {}
    domains: dict[str, str] = {}
    classes: tuple[str, ...] = ()
    settings: TrackerSettings | None = None
    try:
        row, domains, classes, settings = stored_row(folder)
    except MotipError as error:
        missing.append(f"scores by domain: {_sentence(error)}")
    # Images.
    dashboard = folder / "dashboard.png"
    sheets = sheets_in(folder)
    return StageFacts(
        name=name,
        folder=folder,
        record=record,
        scores=scores,
        row=row,
        domains=domains,
        classes=classes,
        settings=settings,
        state=_state(record),
        dashboard=PageImage(dashboard.name, dashboard.read_bytes()) if dashboard.is_file() else None,
        sheets=tuple(PageImage(path.name, path.read_bytes()) for path in sheets[:MAX_SHEETS]),
        more_sheets=len(sheets[MAX_SHEETS:]),
        missing=tuple(missing),
    )


def sheets_in(folder: Location) -> list[Location]:
    """Images in the ``failures*/`` folders (one per split) of a stage's folder."""
    folders = sorted((each for each in folder.iterdir() if each.is_dir() and each.name.startswith("failures")), key=str)
    return [path for each in folders for path in sorted(files_under(each), key=str) if path.suffix in (".png", ".jpg")]


def _record(path: Location) -> Mapping[str, Any]:
    record = read_json(path)
    if not isinstance(record, dict) or record.get("status") != "finished":
        raise MotipError("the stage is not finished")
    absent = [
        key
        for key in ("sha256", "checkpoint", "videos", "frames", "seconds", "best_epoch", "epochs", "metrics")
        if key not in record
    ]
    if absent:
        raise MotipError(f"stage.json has no {', '.join(absent)}")
    return {**record, "checkpoint": str(recorded_file(str(record["checkpoint"]), path.parent))}


def stored_row(folder: Location) -> tuple[dict[str, Scores], dict[str, str], tuple[str, ...], TrackerSettings]:
    """Scores by source, domains by source, class names and tracker settings of a stage's row of the matrix.

    Raises:
        MotipError: ``domains.json`` or, without it, ``config.json`` cannot be read.
    """
    path = folder / "domains.json"
    if not path.is_file():
        config = Config.from_dict(read_json(folder / "config.json"))
        return {}, {}, config.class_names, TrackerSettings.from_config(config)
    stored = read_json(path)
    try:
        scores = {source: Scores.from_json(each) for own in stored["scores"].values() for source, each in own.items()}
        domains = {source: domain for domain, own in stored["scores"].items() for source in own}
        return scores, domains, tuple(stored["classes"]), TrackerSettings(**stored["settings"])
    except (KeyError, TypeError, AttributeError) as error:
        raise MotipError(f"{path.name} cannot be read: {error!r}") from error


def _state(record: Mapping[str, Any]) -> str:
    """Compare the checkpoint with its digest, except in an object store: that would download gigabytes."""
    path = location(str(record["checkpoint"]))
    if isinstance(path, RemotePath):
        return "not read"
    if not Path(path).is_file():
        return "missing"
    return "same" if sha256(path) == record["sha256"] else "changed"


def _sentence(error: MotipError) -> str:
    return error.what if error.where is None else f"{error.what} ({error.where})"


def missing_parts(page: PageFacts) -> Sequence[str]:
    """Parts of the curriculum and its stages that could not be read, one line each."""
    return [*page.missing, *(f"{stage.name}: {text}" for stage in page.stages for text in stage.missing)]
