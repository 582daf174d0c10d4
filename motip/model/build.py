"""Constructor of a MOTIP from its specification."""

from __future__ import annotations

from motip.model.deformable_attention import log_implementation
from motip.model.initialisation import init_parameters
from motip.model.motip import MOTIP
from motip.model.spec import ModelSpec


def build_model(spec: ModelSpec) -> MOTIP:
    """A MOTIP initialised for training from scratch. Reads no files and downloads nothing."""
    model = MOTIP(spec)
    init_parameters(model)
    log_implementation()
    return model
