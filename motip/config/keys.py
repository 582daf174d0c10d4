"""Configuration of one stage: its keys with the rules across them, and what follows from the keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from pydantic import PrivateAttr, model_validator

from motip.config.fields import Keys
from motip.errors import MotipError
from motip.storage.atomic import digest


@dataclass(frozen=True)
class ClipSchedule:
    """Clip lengths and frame intervals of one epoch; exactly one of the three interval rules is set.

    Attributes:
        lengths: clip length in frames, sampled from this set once per global batch.
        intervals: frame interval, sampled from this set once per clip.
        max_interval: the published rule, interval uniform in 1..max_interval.
        interval_seconds: as `intervals`, in seconds, converted with each video's frame rate.
    """

    lengths: tuple[int, ...]
    intervals: tuple[int, ...] | None
    max_interval: int | None
    interval_seconds: tuple[float, ...] | None = None


class Config(Keys):
    """One stage's configuration: frozen, unknown keys forbidden, every value validated."""

    _name: str = PrivateAttr("config")
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _check_clips(self) -> Self:
        # lists
        for key in ("AUG_RESIZE_SCALES", "AUG_RANDOM_RESIZE", "sampler_lengths", "sample_intervals", "SAMPLE_LENGTHS"):
            values = getattr(self, key)
            if values is not None and min(values, default=int(key == "AUG_RANDOM_RESIZE")) < 1:
                raise MotipError("the value must be a list of positive numbers", where=key, found=list(values))
        seconds = self.sample_interval_seconds
        if seconds is not None and (not seconds or not all(0 < value < float("inf") for value in seconds)):
            raise MotipError(
                "the value must be a list of positive numbers", where="sample_interval_seconds", found=list(seconds)
            )

        # schedule
        steps = list(self.SAMPLE_STEPS)
        if not steps or steps[0] != 0 or steps != sorted(set(steps)):
            raise MotipError("the epochs must start at 0 and increase", where="SAMPLE_STEPS", found=steps)
        for key, other in (("SAMPLE_LENGTHS", "sampler_lengths"), ("SAMPLE_INTERVALS", "sample_intervals")):
            published, replacement = getattr(self, key), getattr(self, other)
            if replacement is not None or (key == "SAMPLE_INTERVALS" and seconds is not None):
                continue
            if published is None:
                raise MotipError(f"neither {key} nor {other} is set", where=key, fix=f"set {other}, e.g. [1, 2]")
            if len(published) != len(steps):
                raise MotipError(
                    f"{key} must have one entry per entry of SAMPLE_STEPS",
                    where=key,
                    found=f"{len(published)} entries",
                    expected=len(steps),
                )
        return self

    @model_validator(mode="after")
    def _check_crop(self) -> Self:
        if self.AUG_RANDOM_CROP_MIN > self.AUG_RANDOM_CROP_MAX:
            raise MotipError(
                "the smallest crop is larger than the largest",
                where="AUG_RANDOM_CROP_MIN",
                found=f"{self.AUG_RANDOM_CROP_MIN} > AUG_RANDOM_CROP_MAX {self.AUG_RANDOM_CROP_MAX}",
                fix="lower AUG_RANDOM_CROP_MIN",
            )
        return self

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        # widths
        if self.FEATURE_DIM != self.DETR_HIDDEN_DIM:
            raise MotipError(
                "the ID decoder takes the detector's outputs without a projection",
                where="FEATURE_DIM",
                found=f"{self.FEATURE_DIM}, DETR_HIDDEN_DIM {self.DETR_HIDDEN_DIM}",
                expected="equal values",
            )
        if (self.FEATURE_DIM + self.ID_DIM) % self.HEAD_DIM:
            raise MotipError(
                "FEATURE_DIM + ID_DIM must be a multiple of HEAD_DIM",
                where="HEAD_DIM",
                found=f"{self.FEATURE_DIM} + {self.ID_DIM} with HEAD_DIM {self.HEAD_DIM}",
            )
        if self.DETR_HIDDEN_DIM % self.DETR_NUM_HEADS:
            raise MotipError(
                "DETR_HIDDEN_DIM must be a multiple of DETR_NUM_HEADS",
                where="DETR_NUM_HEADS",
                found=f"{self.DETR_HIDDEN_DIM} with {self.DETR_NUM_HEADS} heads",
            )

        # ID labels
        if self.NUM_TRAINING_IDS is not None and self.NUM_TRAINING_IDS > self.NUM_ID_VOCABULARY:
            raise MotipError(
                "NUM_TRAINING_IDS cannot exceed NUM_ID_VOCABULARY",
                where="NUM_TRAINING_IDS",
                found=self.NUM_TRAINING_IDS,
                expected=f"at most {self.NUM_ID_VOCABULARY}",
            )
        return self

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        # names
        names, key = self.CLASSES, "CLASSES"
        table = self.val_config.CLASS_NAME_TO_ID
        if names is None and table:
            names, key = tuple(table), "val_config.CLASS_NAME_TO_ID"
            if sorted(table.values()) != list(range(1, len(table) + 1)):
                raise MotipError("class ids in result files must be 1, 2, … without gaps", where=key, found=table)
        if names is None and self.NUM_CLASSES > 2:
            raise MotipError(
                f"NUM_CLASSES is {self.NUM_CLASSES}, but the classes are not named",
                where="NUM_CLASSES",
                fix="set CLASSES: [pedestrian, car, …] or val_config.CLASS_NAME_TO_ID",
            )
        if names is not None and (len(names) != self.NUM_CLASSES or len(set(names)) != len(names)):
            raise MotipError(
                "NUM_CLASSES does not match the class names",
                where=key,
                found=f"{len(names)} names ({', '.join(names)})",
                expected=f"{self.NUM_CLASSES} different names",
                fix="change NUM_CLASSES or the names",
            )

        # classes to evaluate
        unknown = [name for name in self.val_config.CLASSES_TO_EVAL or () if name not in self.class_names]
        if unknown:
            raise MotipError(
                f"classes to evaluate are not trained: {', '.join(unknown)}",
                where="val_config.CLASSES_TO_EVAL",
                expected=f"some of {', '.join(names or self.class_names)}",
            )
        return self

    @model_validator(mode="after")
    def _check_clip_fits_memory(self) -> Self:
        lengths = self.sampler_lengths or self.SAMPLE_LENGTHS or (1,)
        if not self.ONLY_DETR and max(lengths) > self.REL_PE_LENGTH:
            raise MotipError(
                "clips are longer than the ID decoder's table of relative positions",
                where="sampler_lengths" if self.sampler_lengths else "SAMPLE_LENGTHS",
                found=f"{max(lengths)} frames, REL_PE_LENGTH {self.REL_PE_LENGTH}",
                fix="raise REL_PE_LENGTH (the table grows by repeating its last row) or shorten the clips",
            )
        return self

    @property
    def name(self) -> str:
        """File stem of the leaf configuration."""
        return self._name

    def origin(self, key: str) -> str:
        """Source of a key's value: `file:line`, `--set`, or `default`."""
        return self._origins.get(key, "default")

    def named(self, name: str, origins: dict[str, str]) -> Config:
        """Set the name and the sources of the values, in place; returns self."""
        self._name = name
        self._origins = origins
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values of every key."""
        return {**self.model_dump(mode="json"), "_name": self._name}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Config:
        """Inverse of `to_dict`.

        Raises:
            MotipError: a key is unknown or a value is out of range.
        """
        plain = {key: value for key, value in values.items() if key != "_name"}
        return Config.checked(plain, values.get("_name", "configuration")).named(values.get("_name", "config"), {})

    def replaced(self, **changes: Any) -> Config:
        """A validated copy with some keys changed."""
        return Config.from_dict({**self.to_dict(), **changes}).named(self._name, dict(self._origins))

    def digest(self) -> str:
        """Hex sha256 over all keys, without the file's name."""
        return digest(self.model_dump(mode="json"))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The NUM_CLASSES names in the order of their ids."""
        if self.CLASSES is not None:
            return self.CLASSES
        named = self.val_config.CLASS_NAME_TO_ID
        if named:
            return tuple(sorted(named, key=lambda name: named[name]))
        return ("pedestrian", "car")[: self.NUM_CLASSES]

    @property
    def lr_milestones(self) -> list[int]:
        """Epochs after which the learning rate is multiplied by SCHEDULER_GAMMA."""
        if self.LR_DROP is not None:
            return [self.LR_DROP]
        return list(self.SCHEDULER_MILESTONES or ())

    @property
    def backbone_lr_scale(self) -> float:
        """Backbone learning rate as a fraction of LR."""
        if self.LR_BACKBONE is not None:
            return self.LR_BACKBONE / self.LR if self.LR > 0 else 0.0
        return 0.1 if self.LR_BACKBONE_SCALE is None else self.LR_BACKBONE_SCALE

    def clip_schedule(self, epoch: int) -> ClipSchedule:
        """Clip lengths and intervals of ``epoch`` (0-based)."""
        step = max(i for i, start in enumerate(self.SAMPLE_STEPS) if start <= epoch)
        lengths = self.sampler_lengths or ((self.SAMPLE_LENGTHS or (1,))[step],)
        if self.sample_interval_seconds is not None:
            return ClipSchedule(lengths, None, None, self.sample_interval_seconds)
        if self.sample_intervals is not None:
            return ClipSchedule(lengths, self.sample_intervals, None)
        return ClipSchedule(lengths, None, (self.SAMPLE_INTERVALS or (1,))[step])
