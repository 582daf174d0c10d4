"""Experiment file: arms, each a curriculum with changes, and the seeds that every arm is trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from motip.config.curriculum_file import Curriculum, Domains, load_curriculum
from motip.config.keys import describe
from motip.config.yaml_chain import find_relative, read_yaml
from motip.errors import MotipError


class Arm(BaseModel):
    """One arm: a curriculum file and changes to it.

    Attributes:
        about: what differs, for the tables.
        curriculum: file, relative to the experiment file; null = the experiment's.
        stages: subset of the stages to train, in the curriculum's order; the first starts from the base weights.
            null = all.
        initialise: configuration file whose fresh weights the first stage starts from, instead of the base weights.
        changes: `KEY=VALUE` or `STAGE:KEY=VALUE`, as for --set (in the file: `set`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    about: str = ""
    curriculum: str | None = None
    stages: tuple[str, ...] | None = None
    initialise: str | None = None
    changes: tuple[str, ...] = Field((), alias="set")


class Experiment(BaseModel):
    """Arms and seeds.

    Attributes:
        curriculum: file that the arms change.
        judge: domain whose HOTA the arms are compared by.
        seeds: values of SEED; every arm is trained with each.
        domains: domains that are scored after every stage, in all arms.
        overrides: of the command line, for every arm.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    path: Path
    curriculum: str
    judge: str
    seeds: tuple[int, ...] = Field(min_length=1)
    arms: tuple[Arm, ...] = Field(min_length=2)
    domains: Domains = Domains(score="all")
    overrides: tuple[str, ...] = ()

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def curriculum_of(self, arm: Arm, seed: int) -> Curriculum:
        """The arm as a curriculum. It has the experiment's name, so that stages shared by arms are trained once.

        Raises:
            MotipError: naming file, line or key.
        """
        # stages
        where = f"{self.path}, arm {arm.name}"
        file = find_relative(arm.curriculum or self.curriculum, self.path)
        curriculum = load_curriculum(file, [*arm.changes, *self.overrides, f"SEED={seed}"])
        stages = list(curriculum.stages)
        if arm.stages is not None:
            known = [stage.name for stage in stages]
            unknown = [name for name in arm.stages if name not in known]
            if unknown:
                raise MotipError(f"unknown stage {unknown[0]}", where=where, expected="some of " + ", ".join(known))
            stages = [stage for stage in stages if stage.name in arm.stages]

        # weights of the first stage
        first, start = stages[0], curriculum.stages[0]
        if arm.initialise is not None:
            first = first.model_copy(
                update={"weights": None, "initialise": str(find_relative(arm.initialise, self.path))}
            )
        elif first is not start:
            weights = start.weights or (None if start.initialise else start.config.DETR_PRETRAIN)
            first = first.model_copy(update={"weights": weights, "initialise": start.initialise})
        update = {"name": self.name, "stages": (first, *stages[1:]), "domains": self.domains}
        return curriculum.model_copy(update=update)


def is_experiment(path: str | Path) -> bool:
    """Whether a file is an experiment file: it has `arms:`.

    Raises:
        MotipError: it cannot be read.
    """
    return "arms" in read_yaml(Path(path).expanduser()).values


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file and check every arm's curriculum.

    Args:
        overrides: `KEY=VALUE` or `STAGE:KEY=VALUE` for every arm.

    Raises:
        MotipError: naming file, line or key.
    """
    # file
    file = read_yaml(Path(path).expanduser())
    arms: Any = file.values.get("arms")
    if not isinstance(arms, dict):
        raise MotipError("arms: must be a block that maps the name of each arm to its changes", where=file.path)
    try:
        values = {
            **file.values,
            "path": file.path,
            "overrides": tuple(overrides),
            "arms": [_arm_values(name, raw) for name, raw in arms.items()],
        }
        experiment = Experiment(**values)
    except ValidationError as error:
        raise MotipError(describe(error), where=file.path) from None

    # seeds and domains
    if len(set(experiment.seeds)) < len(experiment.seeds):
        raise MotipError("a seed is listed twice", where=f"{file.path}, seeds", found=list(experiment.seeds))
    for arm in experiment.arms:
        domains = {source.domain for source in experiment.curriculum_of(arm, experiment.seeds[0]).sources.values()}
        if experiment.judge not in domains:
            raise MotipError(
                "no source has the domain that the arms are compared by",
                where=f"{file.path}, judge",
                found=experiment.judge,
                expected="one of " + ", ".join(sorted(domains)),
            )
    return experiment


def _arm_values(name: object, raw: Any) -> dict[str, Any]:
    return {"name": str(name), **(raw if isinstance(raw, dict) else {} if raw is None else {"changes": raw})}
