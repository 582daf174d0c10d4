"""Checkpoint file: the published container plus entries for tracking, resuming and lineage.

``["model"]``, ``["optimizer"]``, ``["scheduler"]`` and ``["states"]`` are as in the published code. All values are
tensors, numbers, strings and plain containers, so that the file can be read with ``weights_only=True``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from motip.errors import MotipError
from motip.model.spec import ModelSpec
from motip.storage.atomic import atomic_write
from motip.weights.class_names import check_class_list
from motip.weights.files import read_container

FORMAT = 1


def save_checkpoint(
    path: Path | str,
    *,
    model: nn.Module | Mapping[str, Tensor],
    classes: Sequence[str],
    config: Mapping[str, Any],
    epoch: int,
    step: int,
    spec: ModelSpec | None = None,
    optimizer: Any = None,
    scheduler: Any = None,
    scaler: Any = None,
    position: Any = None,
    rng: Any = None,
    counters: Any = None,
    run_id: str | None = None,
    parent: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint atomically.

    Args:
        path: usually ``checkpoint_<epoch>.pth`` with the 0-based epoch, or ``checkpoint_best.pth``.
        model: a MOTIP, also wrapped by DistributedDataParallel or ``torch.compile``, or its state dict.
        classes: one name per class-head row.
        config: ``Config.to_dict()``.
        epoch: 0-based epoch that was finished, or is in progress at `position`.
        step: number of batches trained on.
        spec: architecture; required if `model` is a state dict.
        optimizer, scheduler, scaler: objects with ``state_dict()``, state dicts, or None.
        position, rng, counters: state of the training loop for resuming, in plain containers. NumPy arrays are read
            back as tensors.
        run_id: id of the MLflow run.
        parent: ``{"path", "sha256", "run_id"}`` of the weights this stage started from.

    Raises:
        MotipError: the file cannot be written; a value is not a tensor, number, string or plain container; the
            class list contradicts the head.
    """
    module = _unwrapped(model) if isinstance(model, nn.Module) else None
    spec = spec or getattr(module, "spec", None)
    if spec is None:
        raise MotipError("a checkpoint needs the architecture of its model", where=path, fix="pass spec=model.spec")
    content = {
        "model": module.state_dict() if module is not None else model,
        "optimizer": _state(optimizer),
        "scheduler": _state(scheduler),
        "states": {"start_epoch": epoch + 1, "global_step": step},
        "format": FORMAT,
        "classes": list(check_class_list(classes, spec.num_classes, f"{path}, classes")),
        "config": config,
        "spec": spec.to_dict(),
        "epoch": epoch,
        "step": step,
        "scaler": _state(scaler),
        "position": position,
        "rng": rng,
        "counters": counters,
        "run_id": run_id,
        "parent": parent,
    }
    plain = _Plain().convert(content, "checkpoint")
    # A handle instead of a path: torch would write the temporary name into the archive, and equal checkpoints would
    # have different digests.
    with atomic_write(path) as temporary, temporary.open("wb") as stream:
        torch.save(plain, stream)
        # Before the rename: otherwise a power failure could leave an empty file under the new name.
        stream.flush()
        os.fsync(stream.fileno())
    return Path(path)


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """Content of a checkpoint, ours or of the published code, with tensors on the CPU.

    Raises:
        MotipError: missing, cut off, would run code, not a checkpoint, or from a later version of this program.
    """
    content = read_container(path)
    if not isinstance(content.get("model"), Mapping):
        raise MotipError(
            "the file is not a checkpoint to resume from",
            where=path,
            found=f"top-level keys {', '.join(map(str, list(content)[:8]))}",
            expected='{"model", "optimizer", "scheduler", ...}',
            fix="use it as weights to start from (DETR_PRETRAIN) instead",
        )
    if content.get("format", FORMAT) != FORMAT:
        raise MotipError(
            "the checkpoint was written by another version of this program",
            where=path,
            found=f"format {content['format']}",
            expected=f"format {FORMAT}",
            fix="update motip-curriculum",
        )
    if "classes" in content:
        rows = content.get("spec", {}).get("num_classes", len(content["classes"]))
        check_class_list(content["classes"], rows, f"{path}, classes")
    return content


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _state(thing: Any) -> Any:
    return thing.state_dict() if hasattr(thing, "state_dict") else thing


class _Plain:
    """Converts values to tensors, numbers, strings and plain containers; aliased tensors stay aliased."""

    def __init__(self) -> None:
        # The converted tensors are kept alive, so that no address is reused.
        self._moved: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def convert(self, value: Any, where: str) -> Any:
        if value is None or type(value) in (bool, int, float, str, bytes):
            return value
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            return torch.from_numpy(value.copy())
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, str | Path):
            return str(value)
        if isinstance(value, Counter):  # MultiStepLR stores its milestones in a Counter and requires one on load
            return Counter(self._items(value, where))
        if isinstance(value, Mapping):
            return self._items(value, where)
        if isinstance(value, list | tuple):
            items = (self.convert(item, f"{where}[{index}]") for index, item in enumerate(value))
            return tuple(items) if isinstance(value, tuple) else list(items)
        raise MotipError(
            "a checkpoint value must be a tensor, number, string or plain container",
            where=where,
            found=type(value).__name__,
            fix="convert it before saving",
        )

    def _items(self, value: Mapping[Any, Any], where: str) -> dict[Any, Any]:
        converted = {}
        for key, item in value.items():
            if not isinstance(key, str | int | float | bool):
                raise MotipError("a checkpoint key must be a string or a number", where=where, found=repr(key))
            converted[key] = self.convert(item, f"{where}.{key}")
        return converted

    def _tensor(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and identity in self._moved:
            return self._moved[identity][1]
        plain = tensor.cpu().contiguous()
        if plain.untyped_storage().nbytes() != plain.numel() * plain.element_size():
            plain = plain.clone()  # torch.save would write the complete storage of a view
        self._moved[identity] = tensor, plain
        return plain
