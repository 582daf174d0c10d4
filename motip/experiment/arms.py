"""Experiment runner: trains each arm with every seed and stores the scores of its stages."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from motip.config import Curriculum
from motip.config.experiment_file import Arm, Experiment
from motip.curriculum.options import Options
from motip.curriculum.run import CurriculumResult
from motip.curriculum.stage_inputs import NON_IDENTITY_KEYS
from motip.data.manifest import Manifest
from motip.errors import MotipError
from motip.evaluation.evaluator import track_paths
from motip.evaluation.scores import Scores
from motip.stage_folder import evaluation_folder
from motip.storage.atomic import digest
from motip.storage.paths import Location, location, read_json, write_json

FORMAT = 2


@dataclass(frozen=True)
class StageResult:
    """Result of one stage of an arm, or of the base weights (``steps`` 0, no run).

    Attributes:
        steps: optimiser steps since the base weights, this stage included.
        scores: domain -> scores of the domain's val sequences.
        refused: domain -> newborns without a free ID label, summed over its sequences and frames.
    """

    name: str
    steps: int
    run_id: str | None
    sha256: str
    scores: dict[str, Scores]
    refused: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"scores": {domain: scores.to_json() for domain, scores in self.scores.items()}}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> StageResult:
        scores = {domain: Scores.from_json(each) for domain, each in stored["scores"].items()}
        return cls(**{**stored, "scores": scores})


@dataclass(frozen=True)
class ArmResult:
    """Results of one arm with one seed, stage by stage."""

    arm: str
    seed: int
    stages: tuple[StageResult, ...]

    @property
    def final(self) -> StageResult:
        return self.stages[-1]


def run_arms(
    experiment: Experiment,
    options: Options,
    run: Callable[[Curriculum], CurriculumResult],
    log: Callable[[str], None],
    arms: Collection[str] | None = None,
    seeds: Collection[int] | None = None,
) -> list[ArmResult]:
    """Run the arms that are not finished; returns all stored results.

    The outer loop is over seeds, so that an interrupted experiment has all arms of the first seeds. A finished stage is
    not trained again, also if several arms share it.

    Args:
        run: trains a curriculum; skips finished stages.
        log: called with one line per arm.
        arms, seeds: subset to run now; None = all.
    """
    # arms and seeds to run
    folder = experiment_folder(experiment, options)
    selected = [
        (seed, arm)
        for seed in experiment.seeds
        for arm in experiment.arms
        if (arms is None or arm.name in arms) and (seeds is None or seed in seeds)
    ]

    # training
    for number, (seed, arm) in enumerate(selected, start=1):
        curriculum = experiment.curriculum_of(arm, seed)
        log(f"arm {arm.name}, seed {seed} ({number} of {len(selected)}): {len(curriculum.stages)} stages")
        result = run(curriculum)
        stages = [stage.to_json() for stage in _stage_results(curriculum, result, options)]
        stored = {"format": FORMAT, "inputs": _inputs(curriculum), "stages": stages}
        write_json(_result_path(folder, arm, seed), stored)
        log(f"arm {arm.name}, seed {seed}: done")
    return _read_results(experiment, options, log)


def experiment_folder(experiment: Experiment, options: Options) -> Location:
    return location(options.storage) / "experiments" / experiment.name


def _read_results(experiment: Experiment, options: Options, log: Callable[[str], None]) -> list[ArmResult]:
    """The stored results, in the order of the file; results of arms that were changed since are skipped and logged."""
    folder = experiment_folder(experiment, options)
    results = []
    for arm in experiment.arms:
        for seed in experiment.seeds:
            path = _result_path(folder, arm, seed)
            if not path.is_file():
                continue
            stored = read_json(path)
            if (stored.get("format"), stored.get("inputs")) == (FORMAT, _inputs(experiment.curriculum_of(arm, seed))):
                stages = tuple(StageResult.from_json(each) for each in stored["stages"])
                results.append(ArmResult(arm.name, seed, stages))
            else:
                log(f"arm {arm.name}, seed {seed}: skipped, the arm was changed since it was run; run it again")
    return results


def _inputs(curriculum: Curriculum) -> str:
    """Hex digest of the arm's settings, by which a result of an arm that was changed since is detected."""
    stages = [
        {
            **stage.model_dump(mode="json", include={"name", "weights", "initialise", "best", "val", "data"}),
            "config": {key: value for key, value in stage.config.to_dict().items() if key not in NON_IDENTITY_KEYS},
        }
        for stage in curriculum.stages
    ]
    sources = {name: source.model_dump(mode="json") for name, source in curriculum.sources.items()}
    return digest({"stages": stages, "sources": sources, "domains": curriculum.domains.model_dump(mode="json")})


def _result_path(folder: Location, arm: Arm, seed: int) -> Location:
    return folder / f"{arm.name}_seed{seed}.json"


def _stage_results(curriculum: Curriculum, result: CurriculumResult, options: Options) -> list[StageResult]:
    """Results of an arm's stages, the base weights first."""
    if result.domains is None:
        raise MotipError(
            "an experiment compares scores, but no domain was scored",
            where=f"domains of the experiment {curriculum.name}",
            fix="set `domains: {score: all}`, and give the sources a val split",
        )

    # a row per stage
    manifest = Manifest.load(options.storage)
    records = {record.stage: record for record in result.records}
    stages: list[StageResult] = []
    steps = 0
    for name, row in result.domains.rows.items():
        record = records.get(name)
        if record is not None:
            # All epochs count, also those after the best one.
            steps += round(record.step / (record.best_epoch + 1) * record.epochs)
        stages.append(
            StageResult(
                name=name,
                steps=steps,
                run_id=None if record is None else record.run_id,
                sha256=row.sha256,
                scores={domain: next(iter(own.values())) for domain, own in row.scores.items() if own},
                refused=_refused(curriculum, manifest, row.sha256, options),
            )
        )
    return stages


def _refused(curriculum: Curriculum, manifest: Manifest, sha256: str, options: Options) -> dict[str, int]:
    """Domain -> the tracker's ``newborns_refused``, summed over the domain's scored videos."""
    folder = evaluation_folder(options.storage, sha256)
    counts: dict[str, int] = {}
    for name, source in curriculum.sources.items():
        for video in manifest.of(name, "val"):
            _, facts = track_paths(folder, video)
            if facts.is_file():
                refused = int(read_json(facts)["counters"]["newborns_refused"])
                counts[source.domain] = counts.get(source.domain, 0) + refused
    return counts
