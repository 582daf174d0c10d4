"""Tracker settings: thresholds, memory, assignment protocol and frame size, validated on construction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from motip.errors import MotipError

if TYPE_CHECKING:
    from motip.config import Config


@dataclass(frozen=True)
class TrackerSettings:
    """Settings of the runtime tracker; defaults are the published DanceTrack values, except ``memory_rule`` and
    ``newborn_order``, where the published behaviour is faulty.

    Raises MotipError, naming the configuration key, if a value is out of range.
    """

    det_thresh: float = 0.3
    """A query is a detection if its best class score exceeds this (DET_THRESH; ``--score_thresh`` of `motip track`)."""
    newborn_thresh: float = 0.6
    """A detection without identity starts a track if its score exceeds this (``--newborn_thresh``)."""
    id_thresh: float = 0.2
    """Smallest score at which an ID label is accepted."""
    area_thresh: float = 0.0
    """A detection must cover more square pixels of the original image than this."""
    miss_tolerance: int = 30
    """Frames an object may be missing and keep its track id."""
    assignment_protocol: Literal["hungarian", "object-max", "id-max"] = "object-max"
    memory_rule: Literal["ours", "published"] = "ours"
    """``published`` keeps miss_tolerance - 1 frames, so an object may be missing two frames fewer."""
    newborn_order: Literal["score", "query"] = "score"
    """Order in which newborns get labels when there are more objects than labels."""
    mask_unused_labels: bool = True
    """Exclude labels without a remembered track from the ID scores."""
    use_sigmoid: bool = False
    """ID scores by sigmoid (models trained with focal ID loss) instead of softmax."""
    short_side: int = 800
    """Short side of the resized frame in pixels ..."""
    max_longer: int = 1440
    """... reduced where the long side would exceed this."""
    dtype: Literal["FP32", "FP16", "BF16"] = "FP32"
    """Arithmetic of the detector. Boxes are always converted to pixels in float32."""
    longterm_patience: int = 0
    """Frames a lost track stays in the long-term memory; 0 turns the memory off."""
    longterm_similarity: float = 0.85
    """Smallest cosine similarity at which a newborn is matched to a track of the long-term memory."""
    longterm_capacity: int = 1000
    """Tracks in the long-term memory; beyond it the one lost longest ago is removed."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            self._check(name, getattr(self, name) in choices, " | ".join(choices))
        for name in ("det_thresh", "newborn_thresh", "id_thresh"):
            self._check(name, 0.0 <= getattr(self, name) <= 1.0, "0..1")
        self._check("area_thresh", self.area_thresh >= 0.0, "0 or more square pixels")
        self._check("longterm_patience", self.longterm_patience >= 0, "0 (off) or a number of frames")
        self._check("longterm_similarity", -1.0 <= self.longterm_similarity <= 1.0, "-1..1")
        self._check("longterm_capacity", self.longterm_capacity >= 1, "1 or more tracks")
        self._check("short_side", self.short_side >= 1, "1 or more pixels")
        self._check("max_longer", self.max_longer >= self.short_side, f"at least short_side = {self.short_side}")
        # With the published arithmetic 1 and 2 crash or never forget; see history_frames.
        minimum = 3 if self.memory_rule == "published" else 0
        self._check("miss_tolerance", self.miss_tolerance >= minimum, f"{minimum} or more frames")

    @property
    def history_frames(self) -> int:
        """Frames kept: the newest is 1 frame old when it is used, the oldest ``history_frames``."""
        return self.miss_tolerance - 1 if self.memory_rule == "published" else self.miss_tolerance + 1

    @classmethod
    def from_config(cls, config: Config) -> TrackerSettings:
        """Settings from a configuration (any object with the upper-case keys as attributes)."""
        return cls(**{name: _read(config, key) for name, key in _CONFIG_KEYS.items()})

    @classmethod
    def from_keys(cls, values: Mapping[str, Any]) -> TrackerSettings:
        """Settings from stored configuration keys; a key missing in an older file gets its default."""
        return cls(**{name: values[key] for name, key in _CONFIG_KEYS.items() if key in values})

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise MotipError(
                f"the tracker does not work with {_CONFIG_KEYS[name]} {getattr(self, name)}",
                where=_CONFIG_KEYS[name],
                found=getattr(self, name),
                expected=expected,
                fix=f"set {_CONFIG_KEYS[name]} to one of the expected values",
            )


_CONFIG_KEYS = {name: name.upper() for name in TrackerSettings.__dataclass_fields__} | {
    "use_sigmoid": "USE_FOCAL_LOSS",
    "short_side": "INFERENCE_SHORT_SIDE",
    "max_longer": "INFERENCE_MAX_LONGER",
    "dtype": "INFERENCE_DTYPE",
}
_CHOICES = {name: get_args(hint) for name, hint in get_type_hints(TrackerSettings).items() if get_args(hint)}


def check_setting_names(names: Iterable[str]) -> None:
    """Raise MotipError if one of the names is not a field of ``TrackerSettings``."""
    for name in names:
        if name not in TrackerSettings.__dataclass_fields__:
            raise MotipError(
                "the tracker has no such setting",
                where="settings",
                found=name,
                expected="some of " + ", ".join(TrackerSettings.__dataclass_fields__),
            )


def _read(config: Any, key: str) -> Any:
    try:
        return getattr(config, key)
    except AttributeError:
        raise MotipError(
            f"the configuration has no {key}, which the tracker needs",
            where=key,
            fix="chain the base configuration with SUPER_CONFIG_PATH",
        ) from None
