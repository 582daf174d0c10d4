"""Any weights file, ready to track with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from motip.errors import MotipError
from motip.model import MOTIP
from motip.track.settings import TrackerSettings
from motip.weights.export import load_for_tracking

if TYPE_CHECKING:
    from motip.config import Config


@dataclass(frozen=True)
class Loaded:
    """A model on its device, its classes, how it is to be run, and what the file says about itself."""

    model: MOTIP
    classes: tuple[str, ...]
    settings: TrackerSettings
    meta: dict[str, Any]


def open_checkpoint(
    path: str | Path, config: str | Path | Config | None = None, device: str = "cpu", **changes: Any
) -> Loaded:
    """Read a checkpoint with the configuration it carries, or the one given.

    Args:
        path: our checkpoint, a published one, a safetensors file, or an export folder.
        config: a configuration, or its YAML file; None: the checkpoint's own.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        changes: tracker settings to use instead of the checkpoint's; None leaves one as it is.

    Raises:
        MotipError: the device is not there (said before anything is read), the file is missing or is no MOTIP
            checkpoint, a setting is unknown or out of range.
    """
    target = pick_device(device)
    changes = {name: value for name, value in changes.items() if value is not None}
    for name in changes:
        if name not in TrackerSettings.__dataclass_fields__:
            raise MotipError(
                "the tracker has no such setting",
                where="settings",
                found=name,
                expected="some of " + ", ".join(TrackerSettings.__dataclass_fields__),
            )
    if isinstance(config, (str, Path)):
        from motip.config import load_config  # YAML is read only where a file is given

        config = load_config(config)
    model, classes, meta = load_for_tracking(path, config)
    settings = TrackerSettings.from_keys({**(meta["config"] or {}), **meta["thresholds"]})
    return Loaded(model.to(target), classes, replace(settings, **changes), meta)


def pick_device(named: str) -> torch.device:
    """The torch device; ``auto`` is CUDA where there is one.

    Raises:
        MotipError: no such device.
    """
    if named == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(named)
    except RuntimeError:
        device = None
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if device is None or (str(device) not in there and not (named == "cuda" and len(there) > 1)):
        raise MotipError(
            "there is no such device", where="--device", found=named, expected="auto or one of " + ", ".join(there)
        )
    return device
