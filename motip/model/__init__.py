"""The MOTIP network: detector, trajectory modelling, ID decoder. Requires torch, torchvision and numpy only."""

from __future__ import annotations

from motip.model.build import build_model
from motip.model.fast import use_fast_ops
from motip.model.motip import MOTIP
from motip.model.spec import ModelSpec

__all__ = ["MOTIP", "ModelSpec", "build_model"]

# The network runs without this line, with equal results to rounding.
use_fast_ops()
