"""After every stage: score all domains its model has seen, say what was forgotten, and stop where that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from motip.config import Config, Curriculum, Stage
from motip.config.curriculum_file import BASE
from motip.curriculum.domain_history import (
    base_domains,
    descent,
    learned_from,
    scored_sources,
    seen_after,
    starts_from_given_weights,
)
from motip.curriculum.domain_report import DomainReport
from motip.curriculum.domain_scores import Row, domain_set, scored_row
from motip.curriculum.records import StageRecord
from motip.curriculum.stage import Session
from motip.errors import MotipError
from motip.evaluate.domain_matrix import DomainMatrix
from motip.evaluate.evaluation import Subject
from motip.storage.paths import Location, local_copy, location
from motip.track.settings import TrackerSettings
from motip.train.stage_job import Parent
from motip.weights.export import load_for_tracking


class DomainWatch:
    """The matrix R[stage][domain] of one run of a curriculum, row by row.

    Each row is kept in ``domains.json`` beside its checkpoint and reused as long as nothing it follows from changes.
    The matrix lies in the curriculum's folder as ``domains.json``, ``domains.csv`` and ``domains.png``.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._curriculum = session.curriculum
        self._wanted = session.curriculum.domains
        storage = location(session.options.storage)
        absolute = storage.resolve() if isinstance(storage, Path) else storage
        self._folder = absolute / "curricula" / session.curriculum.name
        self._rows: dict[str, Row] = {}
        self._seen: dict[str, frozenset[str]] = {}
        self._before: dict[str, list[str]] = {}
        self._base_of: dict[str, str] = {}  # first stage of a descent -> row of the weights it starts from
        self._noted: set[str] = set()

    def before(self, stage: Stage, parent: Parent | None) -> None:
        """Score the weights a descent starts from, where they are given and have seen a domain that is listed.

        Raises:
            MotipError: shards are missing or damaged.
        """
        if self._wanted.score == "none" or parent is None or self._curriculum.parent_of(stage) is not None:
            return
        seen = base_domains(self._curriculum, stage)
        if not starts_from_given_weights(stage):
            return
        name = next((name for name in self._base_of.values() if self._rows[name].sha256 == parent.sha256), "")
        if not name:
            name = f"{BASE} of {stage.name}" if BASE in self._rows else BASE
            folder = self._folder / BASE / parent.sha256[:12]
            try:
                self._add(
                    *(name, stage.config, parent.sha256, seen, [], folder, lambda: base_subject(stage, parent)),
                    named=stage.config.PRETRAIN_CLASSES,
                )
            except _NoTracker as error:
                self._session.ui.note(f"{name}: not scored, and nothing is compared with it: {error.what}")
        if name in self._rows:
            self._base_of[stage.name] = name

    def after(self, stage: Stage, record: StageRecord) -> None:
        """Score a finished stage's checkpoint and judge what it lost.

        Raises:
            MotipError: weights or shards are damaged; or it lost more than allowed and `domains.on_loss` is `stop`.
        """
        if self._wanted.score == "none":
            return
        earlier = [each.name for each in descent(self._curriculum, stage)]
        before = [name for name in (self._base_of.get(earlier[0], ""), *earlier[:-1]) if name in self._rows]
        seen = seen_after(self._curriculum, stage)
        folder = location(record.checkpoint).parent
        self._add(
            *(stage.name, stage.config, record.sha256, seen, before, folder),
            lambda: stage_subject(stage, record),
            record.run_id,
        )
        if stage.name in self._rows:
            self._judge(stage)

    def finish(self) -> DomainReport | None:
        """Write the whole matrix if it is not written yet; None where nothing was scored."""
        if not self._rows:
            return None
        self._publish()
        return self.report()

    def report(self) -> DomainReport:
        """The rows so far."""
        scores = {name: row.scores for name, row in self._rows.items()}
        matrix = DomainMatrix.from_sources(scores, self._wanted.metric, known=self._seen, before=self._before)
        transfer = {name: self._backward_transfer(matrix, name) for name in matrix.stages}
        return DomainReport(matrix, self._rows, transfer, self._wanted, self._folder)

    def _backward_transfer(self, matrix: DomainMatrix, name: str) -> float | None:
        stage = next((stage for stage in self._curriculum.stages if stage.name == name), None)
        if stage is None:
            return None
        base = self._base_of.get(descent(self._curriculum, stage)[0].name)
        return matrix.backward_transfer(learned_from(self._curriculum, stage, base), name)

    def _add(
        self,
        name: str,
        config: Config,
        sha256: str,
        seen: Iterable[str],
        before: list[str],
        folder: Location,
        subject: Callable[[], Subject],
        run_id: str | None = None,
        named: Sequence[str] | None = None,
    ) -> None:
        """Score a model, where there is something to score it on, and tell MLflow, the folders and the screen."""
        seen = frozenset(seen)
        listed = [each for each in scored_sources(self._curriculum) if self._wanted.score == "all" or each in seen]
        domains = domain_set(self._curriculum, self._session.manifest, listed)
        self._note_unlabelled(domains.unlabelled)
        if not domains.videos:
            return
        path = folder / "domains.json"
        row = scored_row(self._session, name, config, sha256, domains, path, subject, named)
        self._rows[name], self._seen[name], self._before[name] = row, seen, before
        report = self.report()
        self._session.ui.note(report.line(name))
        told = report.tell(self._session.lineage, name, run_id, self._session.run_id)
        if not row.reused or told != row.told:
            self._publish()
            # Written last: a row counts as scored once all who are to know it have been told.
            replace(row, told=told).save(path)

    def _publish(self) -> None:
        self.report().publish(self._session.lineage, self._session.run_id)

    def _note_unlabelled(self, domains: Sequence[str]) -> None:
        for domain in [name for name in domains if name not in self._noted]:
            self._noted.add(domain)
            self._session.ui.note(f"domain {domain} is not scored: no val video of it has a label of the classes")

    def _judge(self, stage: Stage) -> None:
        report = self.report()
        lost, metric, allowed = report.lost(stage.name), report.matrix.metric, self._wanted.allowed_loss
        for each in lost:
            self._session.ui.note(f"warning: {stage.name} forgot {each.describe(metric)}, allowed {allowed:g}")
        if not lost:
            return
        names = list(dict.fromkeys(each.domain for each in lost))
        remedy = _replay(self._curriculum, names)
        if self._wanted.on_loss == "warn":
            self._session.ui.note(f"{stage.name}: against forgetting, {remedy}")
            return
        self._publish()
        self._session.ui.note(f"domains so far as CSV and heat map: {self._folder}/domains.csv, domains.png")
        raise MotipError(
            f"stage {stage.name} forgot what was learned before: {', '.join(names)}",
            where=f"domains in {self._session.options.config_path or 'the curriculum file'}",
            found=report.lost_text(stage.name),
            expected=f"at most {allowed:g} points lost in a domain seen before (allowed_loss)",
            fix=f"{remedy}; or go on as it is with a higher allowed_loss or `on_loss: warn` (the stage stays finished "
            "and is trained again only if its inputs change)",
        )


class _NoTracker(MotipError):
    """Base weights that are no whole tracker, or do not say what they are."""


def stage_subject(stage: Stage, record: StageRecord) -> Subject:
    """A stage's best checkpoint, tracking with the stage's own settings."""
    model, classes, _ = load_for_tracking(local_copy(location(record.checkpoint)))
    return Subject(model, record.sha256, TrackerSettings.from_config(stage.config), classes)


def base_subject(stage: Stage, parent: Parent) -> Subject:
    """Given weights, tracking with the settings they carry, else with those of the stage they go into.

    Raises:
        MotipError: the weights hold a detector only, or do not say which classes and architecture they are of.
    """
    path = local_copy(location(parent.path))
    named = stage.config.PRETRAIN_CLASSES
    try:
        model, classes, meta = load_for_tracking(path)
    except MotipError as error:
        if named is None:
            raise _NoTracker(error.what, where=error.where, found=error.found) from error
        try:
            own = stage.config.replaced(CLASSES=named, NUM_CLASSES=len(named))
            model, classes, meta = load_for_tracking(path, own)
        except MotipError:
            raise _NoTracker(error.what, where=error.where, found=error.found) from error
    if named is not None and len(named) == len(classes):
        classes = tuple(named)
    values = {**stage.config.to_dict(), **meta["thresholds"]}
    settings = TrackerSettings.from_config(cast(Config, SimpleNamespace(**values)))
    return Subject(model, parent.sha256, settings, classes)


def _replay(curriculum: Curriculum, domains: Sequence[str]) -> str:
    """What to add to a stage's data so that it keeps the domains."""
    sources = [
        name
        for domain in domains
        for name, source in curriculum.sources.items()
        if source.domain == domain and "train" in source.splits
    ]
    what = " and ".join(f"`{{source: {name}, videos: N}}`" for name in sources) or "a source of " + ", ".join(domains)
    return f"add {what} to the stage's data (replay), lower LR or train fewer epochs"
