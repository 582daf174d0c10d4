"""Data of the report page, read from the folders of a curriculum and its stages; missing parts are listed."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from motip.config import Config
from motip.config.curriculum_file import BASE
from motip.errors import MotipError
from motip.evaluation.comparison import Comparison, compare
from motip.evaluation.domain_matrix import Column, DomainMatrix, Forgetting
from motip.evaluation.score_files import load_scores
from motip.evaluation.scores import Scores
from motip.report.stage_list import StageList
from motip.stage_folder import StageFolder, StageRecord
from motip.storage.paths import Location, RemotePath, files_under, location, read_json, sha256
from motip.tracking.settings import TrackerSettings

MAX_SHEETS = 12
"""Failure sheets of one stage on the page; the others stay in the stage's folder."""


@dataclass(frozen=True)
class StageFacts:
    """A stage as read from its folder.

    Attributes:
        folder: None for a stage that is not trained yet; all else is empty then.
        record: None for an unfinished stage.
        scores: of the best epoch on the stage's own validation videos, by source.
        row: scores in every domain that the stage was scored in, by source.
        domains: source -> domain, of ``row``.
        classes, settings: class names and tracker settings that ``row`` was tracked with.
        state: checkpoint file compared with its recorded digest: same, changed, missing or not read.
        dashboard: image file; None if there is none.
        sheets: failure sheets, image files.
        missing: parts that could not be read, one line each.
    """

    name: str
    folder: Location | None
    record: StageRecord | None = None
    scores: Mapping[str, Scores] = field(default_factory=dict)
    row: Mapping[str, Scores] = field(default_factory=dict)
    domains: Mapping[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    settings: TrackerSettings | None = None
    state: str = ""
    dashboard: Location | None = None
    sheets: tuple[Location, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        return self.record is not None

    @property
    def parent_sha256(self) -> str:
        """Digest of the weights it started from; empty if unknown."""
        return (self.record and self.record.parent_sha256) or ""


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

    @cached_property
    def forgotten(self) -> dict[tuple[str, Column], Forgetting]:
        """The forgotten cells by stage and column."""
        return {
            (stage, (each.domain, each.class_name)): each
            for stage in self.values.stages
            for each in self.values.forgotten(stage, self.allowed, self.each_class)
        }


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

    @property
    def storage(self) -> Location:
        """The storage that has the curriculum's folder."""
        return self.folder.parent.parent

    @property
    def missing_parts(self) -> tuple[str, ...]:
        """Parts of the curriculum and its stages that could not be read, one line each."""
        return (*self.missing, *(f"{stage.name}: {text}" for stage in self.stages for text in stage.missing))

    @property
    def verify_command(self) -> str:
        """The command that recomputes the digests; empty without a run."""
        if not self.run_id:
            return ""
        return f"motip lineage verify {self.run_id} --storage {shlex.quote(str(self.storage))}"

    def before(self, stage: StageFacts) -> StageFacts | None:
        """The stage whose checkpoint ``stage`` started from, None if it started from other weights."""
        parent = stage.parent_sha256
        return next((each for each in self.stages if each.record and each.record.sha256 == parent), None)

    def changes(self, stage: StageFacts) -> dict[str, Change]:
        """Source of the stage's own validation -> its change against the stage before, or against the given weights."""
        before = self.before(stage) or self.given.get(stage.parent_sha256)
        scored = [source for source, own in stage.scores.items() if own.per_class]
        if before is None:
            return {source: Change("", None, "it is the first") for source in scored}
        return {source: _change(before, stage, source) for source in scored}


def _change(before: StageFacts, stage: StageFacts, source: str) -> Change:
    why = f"other data: {before.name} has no scores on {source}"
    for a, b in ((before.scores, stage.scores), (before.row, stage.row)):
        if source not in a or source not in b:
            continue
        try:
            return Change(before.name, compare(a[source], b[source]))
        except MotipError as error:
            why = f"not comparable with {before.name}: {error.what}"
    return Change(before.name, None, why)


def read_page_facts(folder: Location, stages: StageList) -> PageFacts:
    """Read the folders of the curriculum and its stages; what cannot be read goes into ``missing``."""
    missing: list[str] = []
    matrix = None
    with _noted(missing, "the domains"):
        matrix = _matrix(StageFolder(folder).domains)
    facts = tuple(_stage(name, own) for name, own in stages.folders.items())
    given = {}
    for stage in facts:
        parent = stage.parent_sha256
        scored = folder / BASE / parent[:12]
        if parent and StageFolder(scored).domains.is_file():
            with _noted(missing, "scores of the given weights"):
                given[parent] = StageFacts(BASE, scored, row=stored_row(scored)[0])
    return PageFacts(stages.name, stages.run_id, folder, facts, matrix, tuple(missing), given)


def _matrix(path: Location) -> Matrix:
    if not path.is_file():
        raise MotipError("no stage was scored by domain (score is none under domains, or no stage is finished)")
    stored = read_json(path)
    try:
        values = DomainMatrix(
            **{name: stored[name] for name in ("metric", "values", "by_class")},
            stages=tuple(stored["stages"]),
            domains=tuple(stored["domains"]),
            trained_on=stored["known"],
            ancestors=stored["before"],
        )
        return Matrix(values, float(stored["allowed_loss"]), bool(stored["each_class"]), stored["backward_transfer"])
    except (KeyError, TypeError, ValueError) as error:
        raise MotipError(f"{path.name} cannot be read: {error!r}") from error


def _stage(name: str, folder: Location | None) -> StageFacts:
    if folder is None:
        return StageFacts(name, None, missing=("not trained yet",))
    stage, facts, missing = StageFolder(folder), StageFacts(name, folder), list[str]()
    record = None
    with _noted(missing):
        record = stage.record()
        if record is None:
            raise MotipError("the stage is not finished")
    if record is not None:
        with _noted(missing, "scores"):
            facts = replace(facts, scores=load_scores(str(folder))[1])
        with _noted(missing, "scores by domain"):
            row, domains, classes, settings = stored_row(folder)
            facts = replace(facts, row=row, domains=domains, classes=classes, settings=settings)
        facts = replace(
            facts,
            record=record,
            state=_state(record),
            dashboard=stage.dashboard if stage.dashboard.is_file() else None,
            sheets=tuple(sheets_in(folder)),
        )
    return replace(facts, missing=tuple(missing))


@contextlib.contextmanager
def _noted(missing: list[str], part: str = "") -> Iterator[None]:
    """Add a MotipError of the block to ``missing``, one line with the part that could not be read."""
    try:
        yield
    except MotipError as error:
        missing.append(f"{part and f'{part}: '}{in_one_line(error)}")


def in_one_line(error: MotipError) -> str:
    """What is wrong, and where if that is known."""
    return error.what if error.where is None else f"{error.what} ({error.where})"


def sheets_in(folder: Location) -> list[Location]:
    """Images in the ``failures*/`` folders (one per split) of a stage's folder."""
    folders = sorted((each for each in folder.iterdir() if each.is_dir() and each.name.startswith("failures")), key=str)
    return [path for each in folders for path in sorted(files_under(each), key=str) if path.suffix in (".png", ".jpg")]


def stored_row(folder: Location) -> tuple[dict[str, Scores], dict[str, str], tuple[str, ...], TrackerSettings]:
    """Scores by source, domains by source, class names and tracker settings of a stage's row of the matrix.

    Raises:
        MotipError: the stored scores or, without them, the stage's configuration cannot be read.
    """
    path = StageFolder(folder).domains
    if not path.is_file():
        config = Config.from_dict(StageFolder(folder).config())
        return {}, {}, config.class_names, TrackerSettings.from_config(config)
    stored = read_json(path)
    try:
        scores = {source: Scores.from_json(each) for own in stored["scores"].values() for source, each in own.items()}
        domains = {source: domain for domain, own in stored["scores"].items() for source in own}
        return scores, domains, tuple(stored["classes"]), TrackerSettings(**stored["settings"])
    except (KeyError, TypeError, AttributeError) as error:
        raise MotipError(f"{path.name} cannot be read: {error!r}") from error


def _state(record: StageRecord) -> str:
    """Compare the checkpoint with its digest, except in an object store: that would download gigabytes."""
    path = location(record.checkpoint)
    if isinstance(path, RemotePath):
        return "not read"
    if not Path(path).is_file():
        return "missing"
    return "same" if sha256(path) == record.sha256 else "changed"
