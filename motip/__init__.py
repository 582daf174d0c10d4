"""MOTIP Curriculum: from public DanceTrack weights to a specialised aerial tracker, every number traceable."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from motip.version import __version__

if TYPE_CHECKING:
    from motip.api import evaluate as evaluate
    from motip.model import MOTIP as MOTIP
    from motip.tracking.api import track as track
    from motip.tracking.loading import load as load
    from motip.tracking.tracker import Tracker as Tracker

__all__ = ["MOTIP", "Tracker", "__version__", "evaluate", "load", "track"]

# Loaded on first use: the tracker runs without the packages that the evaluation imports.
_MODULES = {
    "MOTIP": "motip.model",
    "Tracker": "motip.tracking.tracker",
    "evaluate": "motip.api",
    "load": "motip.tracking.loading",
    "track": "motip.tracking.api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'motip' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
