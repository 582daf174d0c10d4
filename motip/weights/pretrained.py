"""Load pretrained weights into a model: read, plan and apply in one call."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from motip.model.motip import MOTIP
from motip.weights.files import read_weights
from motip.weights.transfer import apply_transfer, plan_transfer
from motip.weights.transfer_report import TransferReport


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
        model: any device; filled in place.
        path: see ``read_weights``.
        class_names: classes of the model, one per row of its class head.
        file_classes: classes of the file, if it does not name them (PRETRAIN_CLASSES).
        new_class_from: initial rows of new classes (CLASS_INIT), see ``match_classes``.
        allow: ``fnmatch`` patterns of keys that may be missing, unknown, or of another shape (PRETRAIN_ALLOW).

    Raises:
        MotipError: from any of the three functions; the model is then unchanged.
    """
    weight_file = read_weights(path, classes=file_classes)
    plan = plan_transfer(weight_file, model.spec, class_names, new_class_from=new_class_from, allow=allow)
    return apply_transfer(model, plan)
