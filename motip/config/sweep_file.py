"""The sweep file: which configuration keys are searched, over which values, how, and how the winner is confirmed."""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from motip.config.keys import WITHOUT_EFFECT, Config, describe
from motip.config.yaml_chain import find_beside, read_yaml, with_values
from motip.errors import MotipError

NOT_SEARCHED: dict[str, str] = {
    "SEED": "the winner is confirmed with other seeds, so the seed cannot be what wins",
    "val_config": "it says what is measured",
    "CLASSES": "it says what is measured",
    "NUM_CLASSES": "it says what is measured",
    "DETR_PRETRAIN": "all trials start from the same weights",
    "EVALUATE_EVERY_EPOCHS": "trials are compared epoch by epoch; give it one value under `set:`",
    "NUM_WORKERS": "it changes the speed, not the result",
    "PREFETCH_FACTOR": "it changes the speed, not the result",
    "DEVICE": "it changes the speed, not the result",
    "LOG_EVERY_STEPS": "it changes what is said, not the result",
    "root_path": "it names a place",
    "OUTPUT_DIR": "it names a place",
    "OUTPUTS_DIR": "it names a place",
    "DATA_ROOT": "it names a place",
    **WITHOUT_EFFECT,
}
"""Keys that a sweep cannot search, and why."""


class Range(BaseModel):
    """Numbers from ``low`` to ``high``, both included; whole ones where the key takes whole numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)
    log: bool = False
    "Search the exponent: right for rates, where 1e-5 to 1e-4 matters as much as 1e-4 to 1e-3."
    step: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"the range is empty: low {self.low:g} is not below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"a range on a log scale starts above 0, not at {self.low:g}")
        if self.log and self.step is not None:
            raise ValueError("a range has either log or step")
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(f"the step {self.step:g} leads beyond high at once")
        return self

    def contains(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not self.low <= value <= self.high:
            return False
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return abs(steps - round(steps)) < 1e-6

    def ends(self) -> tuple[float, float]:
        return self.low, self.high

    def text(self) -> str:
        scale = ", log" if self.log else "" if self.step is None else f", step {self.step:g}"
        return f"{self.low:g} to {self.high:g}{scale}"


class Choices(BaseModel):
    """A list of values, of whatever kind the key takes; lists for `sampler_lengths` and its like."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    choices: tuple[Any, ...]

    @field_validator("choices")
    @classmethod
    def _check(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("the list of choices is empty")
        texts = [json.dumps(each, sort_keys=True, default=str) for each in value]
        if len(set(texts)) < len(texts):
            raise ValueError("a choice stands twice in the list")
        return value

    def contains(self, value: Any) -> bool:
        plain = list(value) if isinstance(value, tuple) else value
        return any(plain == (list(each) if isinstance(each, tuple) else each) for each in self.choices)

    def ends(self) -> tuple[Any, ...]:
        return self.choices

    def text(self) -> str:
        return "one of " + ", ".join(json.dumps(each) for each in self.choices)


class Prune(BaseModel):
    """ASHA: at epochs first, first x reduction, … a trial goes on where it is among the best 1 / reduction so far."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    first: int = Field(1, ge=1)
    "Epochs that every trial is trained for at least."
    reduction: float = Field(2.0, gt=1, le=16)


class Confirm(BaseModel):
    """The winner is trained again before it is called best: the highest of many noisy values is too high."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seeds: int = Field(2, ge=1, le=16)
    "Further seeds."
    hand_set: bool = True
    "Train the hand-set values with these seeds too, so that like is compared with like."


class SweepFile(BaseModel):
    """What to search and how. Names of the keys under `space:` and `set:` are those of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    search: Literal["tpe", "random"] = "tpe"
    trials: int = Field(16, ge=2)
    "Settings that are tried, the hand-set one included."
    seed: int = Field(0, ge=0)
    "Of the search; a trial's own seed is the configuration's SEED."
    startup: int = Field(5, ge=1)
    "Random trials before TPE has something to go by."
    metric: str | None = None
    "What is maximised; null = the stage's own `best`, class-averaged HOTA unless it says otherwise."
    set: dict[str, Any] = {}
    "Values that hold for every trial, the hand-set one included, and do not go into the result."
    space: dict[str, Range | Choices]
    prune: Prune | None = Prune()
    "null trains every trial to its end."
    confirm: Confirm = Confirm()

    def is_whole(self, key: str) -> bool:
        """Whether the key takes whole numbers only."""
        return Config.model_fields[key].annotation in (int, int | None)

    def size(self) -> float:
        """How many different settings there are; infinite where a range has no steps."""
        total = 1.0
        for key, values in self.space.items():
            if isinstance(values, Choices):
                total *= len(values.choices)
            elif values.step is not None or self.is_whole(key):
                total *= math.floor((values.high - values.low) / (values.step or 1.0) + 1e-9) + 1
            else:
                return math.inf
        return total


def load_sweep(path: str | Path) -> SweepFile:
    """Read and check a sweep file by itself; `check_sweep` holds it against the configuration of a stage.

    Raises:
        MotipError: naming file, line or key.
    """
    file = read_yaml(Path(path).expanduser())
    for key in file.values:
        if key not in SweepFile.model_fields:
            raise MotipError(
                f"unknown key {key} in a sweep file",
                where=f"{file.path}:{file.lines[key]}",
                expected="some of " + ", ".join(SweepFile.model_fields),
                fix=_near(key, SweepFile.model_fields) or "configuration keys stand under `space:` or `set:`",
            )
    values = {key: value for key, value in file.values.items() if value is not None or key in ("prune", "metric")}
    space = values.get("space")
    if not isinstance(space, dict) or not space:
        raise MotipError(
            "a sweep file needs a block `space:` with at least one configuration key",
            where=file.path,
            found=space,
            expected="e.g. `LR: {low: 1.0e-5, high: 1.0e-3, log: true}` below it",
        )
    values["space"] = {str(key): _parameter(str(key), value, file.path) for key, value in space.items()}
    fixed = values.get("set", {})
    if not isinstance(fixed, dict):
        raise MotipError("set: holds `KEY: value` lines", where=f"{file.path}, set", found=fixed)
    for key in fixed:
        _known(str(key), f"{file.path}, set")
    both = sorted(set(fixed) & set(space))
    if both:
        raise MotipError(f"{both[0]} stands under `set:` and under `space:`", where=file.path, fix="keep one of them")
    try:
        return SweepFile(**values)
    except ValidationError as error:
        raise MotipError(describe(error), where=file.path) from None


def find_sweep(named: str, file: Path) -> SweepFile:
    """The sweep file that a curriculum file names."""
    return load_sweep(find_beside(named, file))


def check_sweep(sweep: SweepFile, config: Config, where: str = "--sweep") -> None:
    """Every value of the sweep makes a valid configuration of this stage, and pruning finds scores to go by.

    Each value is tried with the others at their first; a clash between two others shows in its trial, which fails
    alone.

    Raises:
        MotipError: naming key and value.
    """
    fixed = with_values(config, sweep.set, f"{where}, set")
    first = {key: whole(sweep, key, values.ends()[0]) for key, values in sweep.space.items()}
    with_values(fixed, first, f"{where}, space")
    for key, values in sweep.space.items():
        if isinstance(values, Range) and sweep.is_whole(key) and values.step and not float(values.step).is_integer():
            raise MotipError(
                f"{key} takes whole numbers", where=f"{where}, space.{key}.step", found=values.step, fix="a whole step"
            )
        for value in values.ends():
            with_values(fixed, {**first, key: whole(sweep, key, value)}, f"{where}, space.{key}")
    if sweep.prune is None:
        return
    longest = max(with_values(fixed, {**first, "EPOCHS": epochs}, where).EPOCHS for epochs in _epochs(sweep, fixed))
    every = fixed.EVALUATE_EVERY_EPOCHS
    scored = -(-sweep.prune.first // every) * every
    if scored >= longest:
        raise MotipError(
            "no trial could be pruned: none has a score before its last epoch",
            where=f"{where}, prune",
            found=f"first: {sweep.prune.first}, scores every {every} epochs, {longest} epochs",
            expected=f"a score at an epoch from {sweep.prune.first} to {longest - 1}",
            fix="set EVALUATE_EVERY_EPOCHS lower under `set:`, lower first, or write `prune: null`",
        )


def whole(sweep: SweepFile, key: str, value: Any) -> Any:
    """A range's number as the key takes it; whole keys get whole numbers where nothing is lost."""
    if isinstance(sweep.space[key], Range) and sweep.is_whole(key) and float(value).is_integer():
        return int(value)
    return value


def hand_set(config: Config, keys: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration has for the keys of a sweep, in the keys' own terms; None where it says it another way."""
    plain = config.to_dict()
    values = {key: plain[key] for key in keys}
    if "LR_BACKBONE_SCALE" in values:
        values["LR_BACKBONE_SCALE"] = config.backbone_lr_scale
    if "LR_BACKBONE" in values:
        values["LR_BACKBONE"] = config.LR * config.backbone_lr_scale
    if "LR_DROP" in values and len(config.lr_milestones) == 1:
        values["LR_DROP"] = config.lr_milestones[0]
    return values


def _epochs(sweep: SweepFile, config: Config) -> list[int]:
    searched = sweep.space.get("EPOCHS")
    return [config.EPOCHS] if searched is None else [int(value) for value in searched.ends()]


def _parameter(key: str, raw: Any, path: Path) -> Range | Choices:
    where = f"{path}, space.{key}"
    _known(key, where)
    if key in NOT_SEARCHED:
        raise MotipError(f"{key} cannot be searched: {NOT_SEARCHED[key]}", where=where)
    kind: type[Range | Choices] = Choices if isinstance(raw, dict) and "choices" in raw else Range
    if not isinstance(raw, dict):
        raise MotipError(
            "a searched key has a range or a list of choices",
            where=where,
            found=raw,
            expected="{low: 1.0e-5, high: 1.0e-3, log: true} or {choices: [[2], [2, 4]]}",
        )
    strangers = sorted(set(map(str, raw)) - set(kind.model_fields))
    if strangers:
        raise MotipError(
            f"unknown key {strangers[0]}",
            where=where,
            expected="some of " + ", ".join(itertools.chain(Range.model_fields, Choices.model_fields)),
            fix=_near(strangers[0], {**Range.model_fields, **Choices.model_fields}),
        )
    try:
        return kind(**raw)
    except ValidationError as error:
        # The input of a rule over the whole block is the block itself, which the place already names.
        first = error.errors()[0]
        text = str(first["msg"]).removeprefix("Value error, ") if first["type"] == "value_error" else describe(error)
        raise MotipError(text, where=where, found=raw, expected="low < high, or a list of choices") from None


def _known(key: str, where: str) -> None:
    if key not in Config.model_fields:
        raise MotipError(
            f"unknown configuration key {key}",
            where=where,
            fix=_near(key, Config.model_fields) or "see docs/configuration.md for the keys",
        )


def _near(key: str, known: Mapping[str, Any]) -> str | None:
    folded = {name.lower(): name for name in known}
    near = difflib.get_close_matches(key.lower(), folded, n=1, cutoff=0.5)
    return f"did you mean {folded[near[0]]}?" if near else None
