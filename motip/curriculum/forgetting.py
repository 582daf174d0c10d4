"""Forgetting tracker: scores all seen domains after every stage, reports losses, and optionally stops the run."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from motip.config import Curriculum, Stage
from motip.config.curriculum_file import BASE
from motip.curriculum.domain_report import DomainReport
from motip.curriculum.domain_scores import DomainScores, ScoredModel, domain_set, score_domains, scored_sources
from motip.curriculum.options import curriculum_folder
from motip.curriculum.stage import Session
from motip.errors import MotipError
from motip.evaluation.domain_matrix import DomainMatrix
from motip.evaluation.evaluator import ModelUnderTest
from motip.stage_folder import StageFolder, StageRecord
from motip.storage.paths import Location, local_copy, location
from motip.tracking.settings import TrackerSettings
from motip.train.stage_job import Parent
from motip.weights.export import load_for_tracking


class ForgettingTracker:
    """The matrix R[stage][domain] of one curriculum run, built row by row.

    Each row is stored in ``domains.json`` beside its checkpoint and reused while its inputs are unchanged. The matrix
    is written to the curriculum's folder as ``domains.json``, ``domains.csv`` and ``domains.png``.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._curriculum = session.curriculum
        self._settings = session.curriculum.domains
        self._folder = curriculum_folder(session.curriculum, session.options)
        self._rows: dict[str, DomainScores] = {}
        self._seen: dict[str, frozenset[str]] = {}
        self._before: dict[str, list[str]] = {}
        self._base_of: dict[str, str] = {}  # first stage of an ancestry -> row of the weights it starts from
        self._noted_unlabelled: set[str] = set()

    def before(self, stage: Stage, parent: Parent | None) -> None:
        """Score the given base weights that a first stage starts from, if they have seen a listed domain.

        Raises:
            MotipError: shards are missing or damaged.
        """
        if self._settings.score == "none" or parent is None or self._curriculum.parent_of(stage) is not None:
            return
        seen = base_domains(self._curriculum, stage)
        if not _starts_from_given_weights(stage):
            return
        name = next((name for name in self._base_of.values() if self._rows[name].sha256 == parent.sha256), "")
        if not name:
            name = f"{BASE} of {stage.name}" if BASE in self._rows else BASE
            load = functools.partial(_load_base_model, stage, parent)
            base = ScoredModel(name, stage.config, parent.sha256, load, stage.config.PRETRAIN_CLASSES)
            try:
                self._add(base, seen, [], self._folder / BASE / parent.sha256[:12])
            except _NoTracker as error:
                self._session.ui.note(f"{name}: not scored, no stage is compared with it: {error.what}")
        if name in self._rows:
            self._base_of[stage.name] = name

    def after(self, stage: Stage, record: StageRecord) -> None:
        """Score a finished stage's checkpoint and check its losses.

        Raises:
            MotipError: weights or shards are damaged; or a loss exceeds `allowed_loss` and `domains.on_loss` is `stop`.
        """
        if self._settings.score == "none":
            return
        earlier = [each.name for each in _ancestry(self._curriculum, stage)]
        before = [name for name in (self._base_of.get(earlier[0], ""), *earlier[:-1]) if name in self._rows]
        seen = seen_after(self._curriculum, stage)
        load = functools.partial(_load_stage_model, stage, record)
        scored = ScoredModel(stage.name, stage.config, record.sha256, load)
        self._add(scored, seen, before, location(record.checkpoint).parent, record.run_id)
        if stage.name in self._rows:
            self._check_losses(stage)

    def finish(self) -> DomainReport | None:
        """Write the complete matrix if it is not written yet; returns the report, None if nothing was scored."""
        if not self._rows:
            return None
        report = self.report()
        self._publish(report)
        return report

    def report(self) -> DomainReport:
        """Report of the rows so far."""
        scores = {name: row.scores for name, row in self._rows.items()}
        matrix = DomainMatrix.from_sources(scores, self._settings.metric, trained_on=self._seen, ancestors=self._before)
        transfer = {name: self._backward_transfer(matrix, name) for name in matrix.stages}
        return DomainReport(matrix, self._rows, transfer, self._settings, self._folder)

    def _backward_transfer(self, matrix: DomainMatrix, name: str) -> float | None:
        stage = next((stage for stage in self._curriculum.stages if stage.name == name), None)
        if stage is None:
            return None
        base = self._base_of.get(_ancestry(self._curriculum, stage)[0].name)
        return matrix.backward_transfer(learned_in(self._curriculum, stage, base), name)

    def _add(
        self, scored: ScoredModel, seen: frozenset[str], before: list[str], folder: Location, run_id: str | None = None
    ) -> None:
        """Score a model on its domains, if any has labelled videos, and record the row on disk and in MLflow.

        Args:
            seen: domains that the model has seen; the others are scored only with `score: all`, as zero-shot.
            before: rows of the model's ancestors, which it is compared with.
        """
        listed = [each for each in scored_sources(self._curriculum) if self._settings.score == "all" or each in seen]
        domains = domain_set(self._curriculum, self._session.manifest, listed)
        self._note_unlabelled(domains.unlabelled)
        if not domains.videos:
            return
        path, name = StageFolder(folder).domains, scored.name
        row = score_domains(self._session, scored, domains, path)
        self._rows[name], self._seen[name], self._before[name] = row, seen, before
        report = self.report()
        self._session.ui.note(report.line(name))
        report.record(self._session.lineage, name, run_id, self._session.run_id)
        if not row.reused:
            self._publish(report)
            row.save(path)

    def _publish(self, report: DomainReport) -> None:
        report.publish(self._session.lineage, self._session.run_id)

    def _note_unlabelled(self, domains: Sequence[str]) -> None:
        for domain in [name for name in domains if name not in self._noted_unlabelled]:
            self._noted_unlabelled.add(domain)
            self._session.ui.note(f"domain {domain} is not scored: no val video has a label of its classes")

    def _check_losses(self, stage: Stage) -> None:
        # warnings
        report = self.report()
        lost, metric, allowed = report.lost(stage.name), report.matrix.metric, self._settings.allowed_loss
        for each in lost:
            self._session.ui.note(f"warning: {stage.name} forgot {each.describe(metric)}, allowed {allowed:g}")
        if not lost:
            return
        names = list(dict.fromkeys(each.domain for each in lost))
        remedy = _replay_advice(self._curriculum, names)
        if self._settings.on_loss == "warn":
            self._session.ui.note(f"{stage.name}: against forgetting, {remedy}")
            return
        # stop
        self._publish(report)
        self._session.ui.note(f"domains so far as CSV and heat map: {self._folder}/domains.csv, domains.png")
        raise MotipError(
            f"stage {stage.name} forgot what was learned before: {', '.join(names)}",
            where=f"domains in {self._session.options.config_path or 'the curriculum file'}",
            found=report.lost_text(stage.name),
            expected=f"at most {allowed:g} points lost in a domain seen before (allowed_loss)",
            fix=f"{remedy}; or continue with a higher allowed_loss or `on_loss: warn` (the stage stays finished "
            "and is trained again only if its inputs change)",
        )


def _ancestry(curriculum: Curriculum, stage: Stage) -> list[Stage]:
    """The stages behind a stage's weights, oldest first, ending with the stage itself."""
    chain = [stage]
    while (earlier := curriculum.parent_of(chain[0])) is not None:
        chain.insert(0, earlier)
    return chain


def _starts_from_given_weights(stage: Stage) -> bool:
    """Whether a stage without a parent stage starts from a trained weights file, not from fresh weights."""
    return stage.initialise is None and bool(stage.weights or stage.config.DETR_PRETRAIN)


def base_domains(curriculum: Curriculum, root: Stage) -> frozenset[str]:
    """Domains that the base weights of a curriculum were trained on.

    `domains.base` of the file if given. Else the listed domains that no stage trains on as the first entry of its data;
    further entries may be replay of domains of the base weights. For fresh weights: the domains that no stage trains
    on at all, which are then scored zero-shot.
    """
    if curriculum.domains.base is not None:
        return frozenset(curriculum.domains.base)
    entries = 1 if _starts_from_given_weights(root) else None
    trained = {_domain(curriculum, mix.source) for stage in curriculum.stages for mix in stage.data[:entries]}
    return frozenset(scored_sources(curriculum)) - trained


def seen_after(curriculum: Curriculum, stage: Stage) -> frozenset[str]:
    """Domains that the stage's model has seen: the base weights' and those of every stage up to this one."""
    chain = _ancestry(curriculum, stage)
    trained = {_domain(curriculum, mix.source) for each in chain for mix in each.data}
    return base_domains(curriculum, chain[0]) | trained


def learned_in(curriculum: Curriculum, stage: Stage, base: str | None) -> dict[str, str]:
    """Domain -> the last stage, up to this one, that learned it.

    A stage learns the domain of the first entry of its data, and that of a further entry if its model has not seen it
    before. Replayed domains keep the stage that learned them.

    Args:
        base: row name of the base weights, None if they have no scores.
    """
    chain = _ancestry(curriculum, stage)
    seen = set(base_domains(curriculum, chain[0]))
    learned = dict.fromkeys(sorted(seen), base) if base is not None else {}
    for each in chain:
        trained = list(dict.fromkeys(_domain(curriculum, mix.source) for mix in each.data))
        learned |= {domain: each.name for number, domain in enumerate(trained) if number == 0 or domain not in seen}
        seen.update(trained)
    return {domain: name for domain, name in learned.items() if name is not None}


def _domain(curriculum: Curriculum, source: str) -> str:
    return curriculum.sources[source].domain


class _NoTracker(MotipError):
    """Base weights without a complete tracker, or without classes or architecture in the file."""


def _load_stage_model(stage: Stage, record: StageRecord) -> ModelUnderTest:
    """The best checkpoint of a stage, with the stage's tracker settings."""
    model, classes, _ = load_for_tracking(local_copy(location(record.checkpoint)))
    return ModelUnderTest(model, record.sha256, TrackerSettings.from_config(stage.config), classes)


def _load_base_model(stage: Stage, parent: Parent) -> ModelUnderTest:
    """Given weights, with the tracker settings stored in the file, else with those of the stage that starts from them.

    Raises:
        MotipError: the file holds only a detector, or neither names its classes and architecture.
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
    settings = TrackerSettings.from_keys({**stage.config.to_dict(), **meta["thresholds"]})
    return ModelUnderTest(model, parent.sha256, settings, classes)


def _replay_advice(curriculum: Curriculum, domains: Sequence[str]) -> str:
    """Advice against forgetting the domains: the replay entries to add to the stage's data."""
    sources = [
        name
        for domain in domains
        for name, source in curriculum.sources.items()
        if source.domain == domain and "train" in source.splits
    ]
    what = " and ".join(f"`{{source: {name}, videos: N}}`" for name in sources) or "a source of " + ", ".join(domains)
    return f"add {what} to the stage's data (replay), lower LR or train fewer epochs"
