"""The MOTIP network. Needs torch, torchvision and numpy only."""

from __future__ import annotations

from motip.model.motip import MOTIP, build_model
from motip.model.spec import ModelSpec

__all__ = ["MOTIP", "ModelSpec", "build_model"]
