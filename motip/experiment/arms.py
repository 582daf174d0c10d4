"""Run the arms of an experiment, each with every seed, and gather what is to be compared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from motip.config import Curriculum
from motip.config.experiment_file import Arm, Experiment
from motip.curriculum.records import Options, StageRecord
from motip.curriculum.run import CurriculumResult
from motip.curriculum.stage_inputs import SPEED_ONLY
from motip.data.manifest import Manifest
from motip.errors import MotipError
from motip.evaluate.evaluation import tracks_place
from motip.evaluate.scores import Scores
from motip.storage.atomic import digest
from motip.storage.paths import Location, location, read_json, write_json

FORMAT = 2


@dataclass(frozen=True)
class StageOutcome:
    """What became of one stage of an arm, or of the base weights (``steps`` 0, no run).

    Attributes:
        steps: optimiser steps since the base weights, this stage included.
        scores: domain -> scores of the domain's sequences, from the source that shows it.
        refused: domain -> objects that waited for an ID label, summed over its sequences and frames.
    """

    name: str
    steps: int
    run_id: str | None
    sha256: str
    scores: dict[str, Scores]
    refused: dict[str, int]


@dataclass(frozen=True)
class Outcome:
    """One arm with one seed, stage after stage."""

    arm: str
    seed: int
    stages: tuple[StageOutcome, ...]

    @property
    def final(self) -> StageOutcome:
        return self.stages[-1]


def run_arms(
    experiment: Experiment,
    options: Options,
    run: Callable[[Curriculum], CurriculumResult],
    say: Callable[[str], None],
    arms: Collection[str] | None = None,
    seeds: Collection[int] | None = None,
) -> list[Outcome]:
    """Run what is not finished yet; returns the outcomes of all arms and seeds that are.

    Seed after seed, so that an experiment that is cut off holds whole comparisons. A finished stage is never trained
    again, also where several arms share it.

    Args:
        run: runs a curriculum to its end; finished stages cost it nothing.
        arms, seeds: the only ones to run now; None = all.
    """
    folder = experiment_folder(experiment, options)
    wanted = [
        (seed, arm)
        for seed in experiment.seeds
        for arm in experiment.arms
        if (arms is None or arm.name in arms) and (seeds is None or seed in seeds)
    ]
    for number, (seed, arm) in enumerate(wanted, start=1):
        curriculum = experiment.curriculum_of(arm, seed)
        say(f"arm {arm.name}, seed {seed} ({number} of {len(wanted)}): {len(curriculum.stages)} stages")
        result = run(curriculum)
        write_json(_place(folder, arm, seed), {"inputs": _inputs(curriculum), **_facts(curriculum, result, options)})
        say(f"arm {arm.name}, seed {seed}: done")
    return read_outcomes(experiment, options, say)


def experiment_folder(experiment: Experiment, options: Options) -> Location:
    return location(options.storage) / "experiments" / experiment.name


def read_outcomes(experiment: Experiment, options: Options, say: Callable[[str], None]) -> list[Outcome]:
    """The outcomes that are there, in the order of the file.

    Those of arms that have been changed since are left out, and said.
    """
    folder = experiment_folder(experiment, options)
    outcomes = []
    for arm in experiment.arms:
        for seed in experiment.seeds:
            path = _place(folder, arm, seed)
            stored = read_json(path) if path.is_file() else None
            if stored is None:
                continue
            if (stored.get("format"), stored.get("inputs")) == (FORMAT, _inputs(experiment.curriculum_of(arm, seed))):
                outcomes.append(_outcome(arm.name, seed, stored))
            else:
                say(f"arm {arm.name}, seed {seed}: left out, the arm was changed since it was run; run it again")
    return outcomes


def _inputs(curriculum: Curriculum) -> str:
    """Digest of what the arm asks for: an outcome belongs to an arm only as it was when it was run."""
    stages = [
        {
            **stage.model_dump(mode="json", include={"name", "weights", "initialise", "best", "val", "data"}),
            "config": {key: value for key, value in stage.config.to_dict().items() if key not in SPEED_ONLY},
        }
        for stage in curriculum.stages
    ]
    sources = {name: source.model_dump(mode="json") for name, source in curriculum.sources.items()}
    return digest({"stages": stages, "sources": sources, "domains": curriculum.domains.model_dump(mode="json")})


def _place(folder: Location, arm: Arm, seed: int) -> Location:
    return folder / f"{arm.name}_seed{seed}.json"


def _facts(curriculum: Curriculum, result: CurriculumResult, options: Options) -> dict[str, Any]:
    """Plain values of an arm's run: the base weights' row first, then each stage's."""
    if result.domains is None:
        raise MotipError(
            "an experiment compares scores, and none were made",
            where=f"domains of the experiment {curriculum.name}",
            fix="set `domains: {score: all}`, and give the sources a val split",
        )
    manifest = Manifest.load(options.storage)
    records: dict[str, StageRecord] = {record.stage: record for record in result.records}
    stages, steps = [], 0
    for name, row in result.domains.rows.items():
        record = records.get(name)
        if record is not None:
            # Of the whole stage: the best epoch may be an earlier one, but its training was paid for.
            steps += _steps(record)
        stages.append(
            {
                "name": name,
                "steps": steps,
                "run_id": None if record is None else record.run_id,
                "sha256": row.sha256,
                "refused": _refused(curriculum, manifest, row.sha256, options),
                "scores": {domain: next(iter(own.values())).to_json() for domain, own in row.scores.items() if own},
            }
        )
    return {"format": FORMAT, "stages": stages}


def _steps(record: StageRecord) -> int:
    return round(record.step / (record.best_epoch + 1) * record.epochs)


def _refused(curriculum: Curriculum, manifest: Manifest, sha256: str, options: Options) -> dict[str, int]:
    """Domain -> ``newborns_refused`` of the tracker, over the domain's scored videos."""
    folder = location(options.storage) / "evaluations" / sha256[:12]
    counts: dict[str, int] = {}
    for name, source in curriculum.sources.items():
        for video in manifest.of(name, "val"):
            _, facts = tracks_place(folder, video)
            if facts.is_file():
                refused = int(read_json(facts)["counters"]["newborns_refused"])
                counts[source.domain] = counts.get(source.domain, 0) + refused
    return counts


def _outcome(arm: str, seed: int, stored: dict[str, Any]) -> Outcome:
    stages = [
        StageOutcome(
            name=each["name"],
            steps=int(each["steps"]),
            run_id=each["run_id"],
            sha256=each["sha256"],
            scores={domain: Scores.from_json(scores) for domain, scores in each["scores"].items()},
            refused=each["refused"],
        )
        for each in stored["stages"]
    ]
    return Outcome(arm, seed, tuple(stages))


def complete_seeds(outcomes: Sequence[Outcome], *arms: str) -> list[int]:
    """Seeds that all of these arms have been run with."""
    return sorted(set.intersection(*({each.seed for each in outcomes if each.arm == arm} for arm in arms)))
