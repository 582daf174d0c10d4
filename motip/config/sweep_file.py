"""Sweep file: search space, search algorithm, pruning, and confirmation of the best trial."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, Field, ValidationError, field_validator, model_validator

from motip.config.block import Block, describe
from motip.config.fields import WITHOUT_EFFECT
from motip.config.keys import Config
from motip.config.yaml_chain import check_is_key, find_relative, read_yaml, with_values
from motip.errors import MotipError, check_known, did_you_mean

_NOT_SEARCHED: dict[str, str] = {
    "SEED": "the best trial is confirmed with other seeds, so the seed cannot be part of a setting",
    "val_config": "it defines what is measured",
    "CLASSES": "it defines what is measured",
    "NUM_CLASSES": "it defines what is measured",
    "DETR_PRETRAIN": "all trials start from the same weights",
    "EVALUATE_EVERY_EPOCHS": "trials are compared epoch by epoch; give it one value under `set:`",
    "NUM_WORKERS": "it changes the speed, not the result",
    "PREFETCH_FACTOR": "it changes the speed, not the result",
    "DEVICE": "it changes the speed, not the result",
    "LOG_EVERY_STEPS": "it changes what is logged, not the result",
    "root_path": "it is a path",
    "OUTPUT_DIR": "it is a path",
    "OUTPUTS_DIR": "it is a path",
    "DATA_ROOT": "it is a path",
    **WITHOUT_EFFECT,
}
"""Keys that a sweep cannot search, and why."""


class Range(Block):
    """Numbers from ``low`` to ``high``, both included; integers for integer keys."""

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
            raise ValueError(f"the step {self.step:g} is larger than the range")
        return self

    def contains(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not self.low <= value <= self.high:
            return False
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return abs(steps - round(steps)) < 1e-6

    def values_to_check(self) -> tuple[float, float]:
        return self.low, self.high

    def text(self) -> str:
        scale = ", log" if self.log else "" if self.step is None else f", step {self.step:g}"
        return f"{self.low:g} to {self.high:g}{scale}"


class Choices(Block):
    """A list of values of the key's type; lists for `sampler_lengths` and similar keys."""

    choices: tuple[Any, ...]

    @field_validator("choices")
    @classmethod
    def _check(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("the list of choices is empty")
        texts = [json.dumps(each, sort_keys=True, default=str) for each in value]
        if len(set(texts)) < len(texts):
            raise ValueError("a choice is listed twice")
        return value

    def contains(self, value: Any) -> bool:
        plain = list(value) if isinstance(value, tuple) else value
        return any(plain == (list(each) if isinstance(each, tuple) else each) for each in self.choices)

    def values_to_check(self) -> tuple[Any, ...]:
        return self.choices

    def text(self) -> str:
        return "one of " + ", ".join(json.dumps(each) for each in self.choices)


class Prune(Block):
    """ASHA: after first, first x reduction, … epochs a trial continues if it is among the best 1 / reduction so far."""

    first: int = Field(1, ge=1)
    "Minimum number of epochs of every trial."
    reduction: float = Field(2.0, gt=1, le=16)


class Confirm(Block):
    """Repetition of the best trial with further seeds: the maximum of many noisy values is biased upwards."""

    seeds: int = Field(2, ge=1, le=16)
    "Further seeds."
    baseline: bool = Field(True, validation_alias=AliasChoices("baseline", "hand_set"), serialization_alias="hand_set")
    "Repeat the baseline with these seeds too, for a fair comparison. Version 0.1 called the key `hand_set`."

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and {"baseline", "hand_set"} <= values.keys():
            raise ValueError("`baseline` and `hand_set` are two names of one key; give one of them")
        return values


class SweepFile(Block):
    """A sweep over one stage. The keys under `space:` and `set:` are configuration keys."""

    search: Literal["tpe", "random"] = "tpe"
    trials: int = Field(16, ge=2)
    "Settings that are trained, the baseline included."
    seed: int = Field(0, ge=0)
    "Of the search; a trial's own seed is the configuration's SEED."
    startup: int = Field(5, ge=1)
    "Random trials before TPE starts to model the results."
    metric: str | None = None
    "Metric to maximise; null = the stage's `best`, by default class-averaged HOTA."
    set: dict[str, Any] = Field({})
    "Values for every trial, the baseline included; not part of the result."
    space: dict[str, Range | Choices]
    prune: Prune | None = Prune()
    "null trains every trial to its end."
    confirm: Confirm = Confirm()

    def is_integer(self, key: str) -> bool:
        """Whether the configuration key is an integer."""
        return Config.model_fields[key].annotation in (int, int | None)

    def size(self) -> float:
        """Number of different settings; infinite with a continuous range."""
        total = 1.0
        for key, values in self.space.items():
            if isinstance(values, Choices):
                total *= len(values.choices)
            elif values.step is not None or self.is_integer(key):
                total *= math.floor((values.high - values.low) / (values.step or 1.0) + 1e-9) + 1
            else:
                return math.inf
        return total


def load_sweep(path: str | Path) -> SweepFile:
    """Read and check a sweep file by itself; `check_sweep` checks it against the configuration of a stage.

    Raises:
        MotipError: naming file, line or key.
    """
    # top-level keys
    file = read_yaml(Path(path).expanduser())
    for key, line in file.lines.items():
        fix = did_you_mean(key, SweepFile.model_fields) or "configuration keys belong under `space:` or `set:`"
        what = "unknown key {name} in a sweep file"
        check_known([key], SweepFile.model_fields, what, where=f"{file.path}:{line}", fix=fix)

    # search space and fixed values
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
        raise MotipError("set: must be a block of `KEY: value` lines", where=f"{file.path}, set", found=fixed)
    for key in fixed:
        check_is_key(str(key), f"{file.path}, set")
    both = sorted(set(fixed) & set(space))
    if both:
        raise MotipError(f"{both[0]} is under `set:` and under `space:`", where=file.path, fix="keep one of them")
    return SweepFile.checked(values, file.path)


def find_sweep(named: str, file: Path) -> SweepFile:
    """The sweep file that a curriculum file names."""
    return load_sweep(find_relative(named, file))


def check_sweep(sweep: SweepFile, config: Config, where: str = "--sweep") -> None:
    """Check that each value of the sweep is valid for this stage, and that trials have scores to be pruned by.

    Each value is checked with the first value of all other keys; an invalid combination of others fails its trial.

    Raises:
        MotipError: naming key and value.
    """
    # values
    fixed = with_values(config, sweep.set, f"{where}, set")
    first = {key: as_integer(sweep, key, values.values_to_check()[0]) for key, values in sweep.space.items()}
    with_values(fixed, first, f"{where}, space")
    for key, values in sweep.space.items():
        if isinstance(values, Range) and sweep.is_integer(key) and values.step and not values.step.is_integer():
            raise MotipError(
                f"{key} takes integers", where=f"{where}, space.{key}.step", found=values.step, fix="an integer step"
            )
        for value in values.values_to_check():
            with_values(fixed, {**first, key: as_integer(sweep, key, value)}, f"{where}, space.{key}")

    # pruning
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


def as_integer(sweep: SweepFile, key: str, value: Any) -> Any:
    """An integral number of a range as int, if the key is an integer; else the value unchanged."""
    if isinstance(sweep.space[key], Range) and sweep.is_integer(key) and float(value).is_integer():
        return int(value)
    return value


def baseline_values(config: Config, keys: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's values for the keys of a sweep; None if it uses an equivalent key that cannot be converted.

    Example: `LR_DROP` is None if the configuration has several SCHEDULER_MILESTONES.
    """
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
    return [config.EPOCHS] if searched is None else [int(value) for value in searched.values_to_check()]


def _parameter(key: str, raw: Any, path: Path) -> Range | Choices:
    where = f"{path}, space.{key}"
    check_is_key(key, where)
    if key in _NOT_SEARCHED:
        raise MotipError(f"{key} cannot be searched: {_NOT_SEARCHED[key]}", where=where)
    if not isinstance(raw, dict):
        raise MotipError(
            "a searched key takes a range or a list of choices",
            where=where,
            found=raw,
            expected="{low: 1.0e-5, high: 1.0e-3, log: true} or {choices: [[2], [2, 4]]}",
        )
    kind: type[Range | Choices] = Choices if "choices" in raw else Range
    known = [*Range.model_fields, *Choices.model_fields]
    for name in sorted(map(str, raw.keys() - kind.model_fields.keys())):
        raise MotipError(
            f"unknown key {name}",
            where=where,
            expected="some of " + ", ".join(known),
            fix=did_you_mean(name, known),
        )
    try:
        return kind(**raw)
    except ValidationError as error:
        # The input of a model validator is the block itself, which `found` shows already.
        first = error.errors()[0]
        text = str(first["msg"]).removeprefix("Value error, ") if first["type"] == "value_error" else describe(error)
        raise MotipError(text, where=where, found=raw, expected="low < high, or a list of choices") from None
