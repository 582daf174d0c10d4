"""Experiment file: arms, each a curriculum with changes, and the seeds that every arm is trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from motip.config.block import Block, Name
from motip.config.curriculum_file import Curriculum, Domains, load_curriculum
from motip.config.yaml_chain import find_relative, read_yaml
from motip.errors import MotipError, check_known


class Arm(Block):
    """One arm: a curriculum file and changes to it."""

    model_config = ConfigDict(populate_by_name=True)

    name: Name
    about: str = ""
    "What differs, for the tables."
    curriculum: str | None = None
    "File, relative to the experiment file; null = the experiment's."
    stages: tuple[str, ...] | None = None
    "Subset of the stages, in the curriculum's order; the first starts from the base weights. null = all."
    initialise: str | None = None
    "Configuration file whose fresh weights the first stage starts from, instead of the base weights."
    changes: tuple[str, ...] = Field((), alias="set")
    "`KEY=VALUE` or `STAGE:KEY=VALUE`, as for --set."


class Experiment(Block):
    """Arms and seeds."""

    name: Name
    path: Path
    curriculum: str
    "File that the arms change."
    judge: str
    "Domain whose HOTA the arms are compared by."
    seeds: tuple[int, ...] = Field(min_length=1)
    "Values of SEED; every arm is trained with each."
    arms: tuple[Arm, ...] = Field(min_length=2)
    domains: Domains = Domains(score="all")
    "Domains that are scored after every stage, in all arms."
    overrides: tuple[str, ...] = ()
    "Of the command line, for every arm."

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
            check_known(arm.stages, [stage.name for stage in stages], "unknown stage {name}", where=where)
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
    values = {
        **file.values,
        "path": file.path,
        "overrides": tuple(overrides),
        "arms": [_arm_values(name, raw) for name, raw in arms.items()],
    }
    experiment = Experiment.checked(values, file.path)

    # seeds and domains
    if len(set(experiment.seeds)) < len(experiment.seeds):
        raise MotipError("a seed is listed twice", where=f"{file.path}, seeds", found=list(experiment.seeds))
    for arm in experiment.arms:
        domains = {source.domain for source in experiment.curriculum_of(arm, experiment.seeds[0]).sources.values()}
        what = "no source has the domain that the arms are compared by"
        check_known(experiment.judge, sorted(domains), what, where=f"{file.path}, judge")
    return experiment


def _arm_values(name: object, raw: Any) -> dict[str, Any]:
    return {"name": str(name), **(raw if isinstance(raw, dict) else {} if raw is None else {"changes": raw})}
