"""The front door of the weights: read a file, plan what goes where, apply it, report every tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from motip.model.motip import MOTIP
from motip.weights.checkpoint import load_checkpoint, save_checkpoint
from motip.weights.files import WeightFile, read_weights
from motip.weights.transfer import TransferPlan, apply_transfer, plan_transfer
from motip.weights.transfer_report import CATEGORIES, TransferReport

__all__ = [
    "CATEGORIES",
    "TransferPlan",
    "TransferReport",
    "WeightFile",
    "apply_transfer",
    "load_checkpoint",
    "load_pretrained",
    "plan_transfer",
    "read_weights",
    "save_checkpoint",
]


def load_pretrained(
    model: MOTIP,
    path: Path | str,
    class_names: Sequence[str],
    *,
    file_classes: Sequence[str] | None = None,
    new_class_from: Mapping[str, str] | None = None,
    allow: Collection[str] = (),
) -> TransferReport:
    """Fill `model` from a weights file: ``read_weights``, ``plan_transfer``, ``apply_transfer`` in one call.

    Args:
        class_names: the model's classes. file_classes: the file's, where it does not say (PRETRAIN_CLASSES).
        new_class_from: CLASS_INIT. allow: patterns of keys that may be missing, unknown, or of another shape.

    Raises:
        MotipError: from any of the three; the model is then untouched.
    """
    weight_file = read_weights(path, classes=file_classes)
    plan = plan_transfer(weight_file, model.spec, class_names, new_class_from=new_class_from, allow=allow)
    return apply_transfer(model, plan)
