"""Any weights file, ready to track with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from motip.config import Config, load_config
from motip.errors import MotipError
from motip.model import MOTIP
from motip.model.export import load_for_tracking
from motip.track.settings import TrackerSettings


@dataclass(frozen=True)
class Loaded:
    """A model on its device, its classes, how it is to be run, and what the file says about itself."""

    model: MOTIP
    classes: tuple[str, ...]
    settings: TrackerSettings
    meta: dict[str, Any]


def open_checkpoint(path: str, config_path: str | None = None, device: str = "cpu", **changes: Any) -> Loaded:
    """Read a checkpoint with the configuration it carries, or the one given.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        changes: tracker settings to use instead of the checkpoint's; None leaves one as it is.

    Raises:
        MotipError: the file is missing or is no MOTIP checkpoint, the device is not there, a setting is out of range.
    """
    config = None if config_path is None else load_config(config_path)
    target = pick_device(device)
    model, classes, meta = load_for_tracking(path, config)
    # Keys that an older file does not hold have their default.
    values = {**Config().to_dict(), **(meta["config"] or {}), **meta["thresholds"]}
    settings = TrackerSettings.from_config(SimpleNamespace(**values))
    settings = replace(settings, **{name: value for name, value in changes.items() if value is not None})
    return Loaded(model.to(target), classes, settings, meta)


def pick_device(named: str) -> Any:
    """The torch device; ``auto`` is CUDA where there is one.

    Raises:
        MotipError: no such device.
    """
    import torch

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
