"""Reader of weights files: detects the kind of file and validates its content.

No code of a file is executed: PyTorch files are read with ``torch.load(weights_only=True)``. Container, keys, finite
values and class list are checked; the error names the first invalid key.
"""

from __future__ import annotations

import argparse
import json
import pickle
import pickletools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from motip.errors import MotipError
from motip.storage.atomic import sha256_file
from motip.weights.class_names import COCO_ROWS, check_class_list, coco_row_names

_DETECTOR_PREFIX = "detr."
IDENTITY_PREFIXES = ("trajectory_modeling.", "id_decoder.")
HEADER_KEY = "motip"
"""Key of the JSON description in the header of an exported safetensors file."""

_DETECTOR_KEY = re.compile(
    r"(transformer\.(level_embed$|reference_points\.|(encoder|decoder)\.layers\.\d+\.|decoder\.bbox_embed\.\d+\.)"
    r"|class_embed\.\d+\.|bbox_embed\.\d+\.|query_embed\.weight$|input_proj\.\d+\.\d+\.|backbone\.0\.body\.)"
)
_CLASS_WEIGHT = re.compile(r"detr\.class_embed\.\d+\.weight$")


@dataclass(frozen=True)
class WeightFile:
    """A validated weights file.

    Attributes:
        path: where it was read.
        tensors: full MOTIP key (``detr.``, ``trajectory_modeling.``, ``id_decoder.``) -> tensor on the CPU, as stored.
        kind: ``motip`` (published full checkpoint), ``detector`` (detector only), ``coco`` (91-row head numbered by
            category id), ``ours`` (our checkpoint) or ``safetensors``.
        classes: name of every class-head row; None if unknown.
        classes_origin: source of `classes`: ``file``, ``argument``, ``COCO category ids``,
            ``assumed from one row`` or ``unknown``.
        meta: other entries of the file, such as ``epoch``, ``step``, ``config``, ``spec``, ``parent``; ``holds`` lists
            the top-level keys of the container.
        sha256: hex digest of the file.
        notes: unusual properties of the file, one sentence each.
    """

    path: Path
    tensors: dict[str, Tensor]
    kind: str
    classes: tuple[str, ...] | None
    classes_origin: str
    meta: dict[str, Any]
    sha256: str
    notes: tuple[str, ...] = ()

    @property
    def class_rows(self) -> int:
        """Rows of the class head."""
        return next(tensor.shape[0] for key, tensor in self.tensors.items() if _CLASS_WEIGHT.match(key))

    @property
    def has_identity(self) -> bool:
        """Whether the file has any tensor of trajectory modelling or of the ID decoder."""
        return any(key.startswith(IDENTITY_PREFIXES) for key in self.tensors)


def read_weights(path: Path | str, *, classes: Sequence[str] | None = None) -> WeightFile:
    """Read and validate any weights file MOTIP can start from.

    Args:
        path: ``.pth`` (any name) or ``.safetensors``.
        classes: names of the class-head rows, for files without names (configuration key ``PRETRAIN_CLASSES``).

    Raises:
        MotipError: missing or truncated file, a pickle that would run code, another container, the state dict of
            another model, NaN or infinity in a tensor, a class list that contradicts the head.
    """
    path = Path(path)
    container = read_container(path)
    raw = _state_dict_of(container, path)
    tensors, notes = _full_keys(raw, path)
    _check_values(tensors, path)
    meta: dict[str, Any] = {}
    if container is not raw:
        meta = {key: value for key, value in container.items() if key in _META_KEYS and value is not None}
        meta["holds"] = sorted(str(key) for key, value in container.items() if value is not None)
    # Kind of file and class names.
    kind = _kind(path, container, tensors)
    rows = _class_rows(tensors, path)
    names, origin = _class_names(container, rows, classes, path)
    if kind == "detector" and origin == "COCO category ids":
        kind = "coco"
    return WeightFile(path, tensors, kind, names, origin, meta, sha256_file(path), tuple(notes))


_META_KEYS = ("epoch", "step", "config", "spec", "run_id", "parent", "states", "thresholds", "source", "training")


def read_container(path: Path | str) -> dict[str, Any]:
    """Top level of a weights file: a dict with ``model``, or a bare state dict.

    For a safetensors file: ``{"model": tensors, **description in its header}``.

    Raises:
        MotipError: missing or truncated file, a pickle that would run code, another container.
    """
    path = Path(path)
    if not path.is_file():
        raise MotipError(
            "the weights file does not exist" if not path.is_dir() else "the weights are a folder, not a file",
            where=path,
            expected="a .pth checkpoint or a .safetensors file",
            fix="check the path (DETR_PRETRAIN, or the --checkpoint flag)",
        )
    if path.stat().st_size == 0:
        raise _truncated(path, "the file is empty")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = _torch_load(path)
    if not isinstance(content, Mapping):
        raise _wrong_container(path, f"a {type(content).__name__}")
    return dict(content)


def _torch_load(path: Path) -> Any:
    try:
        # The official COCO checkpoints contain their command line as an argparse.Namespace, which runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error)
        named = re.search(r"Unsupported global: GLOBAL (\S+)", reason) or re.search(r"\bGLOBAL (\w[\w.]+)", reason)
        blocked = named.group(1) if named else _first_foreign_global(path)
        if blocked:
            raise MotipError(
                "the file would run code when it is loaded, so it was not loaded",
                where=path,
                found=f"a call of {blocked}",
                expected="tensors and plain containers only",
                fix="use a file from a trusted source that contains the entry 'model' only",
            ) from None
        # Not PyTorch's message, which advises weights_only=False.
        raise _truncated(path, _start_of(path)) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise _truncated(path, str(error).splitlines()[0] if str(error) else _start_of(path)) from None
    except (ValueError, KeyError, IndexError, AttributeError):  # invalid opcodes
        raise _truncated(path, _start_of(path)) from None


def _start_of(path: Path) -> str:
    with path.open("rb") as stream:
        return f"{path.stat().st_size} bytes that start with {stream.read(16)!r}"


def _first_foreign_global(path: Path) -> str | None:
    """First class or function named in a pickle that is not PyTorch's own; reads opcodes, executes nothing."""
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(path.read_bytes()):
            if isinstance(argument, str):
                strings.append(argument.replace(" ", "."))
            name = ".".join(strings[-2:]) if opcode.name == "STACK_GLOBAL" else strings[-1] if strings else ""
            if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST") and not name.startswith(("torch.", "collections.")):
                return name
    except ValueError:  # not a pickle, or cut off
        return None
    return None


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            header = stream.metadata() or {}
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise _truncated(path, str(error)) from None
    try:
        described = json.loads(header.get(HEADER_KEY, "{}"))
        if not isinstance(described, dict):
            raise TypeError(f"a {type(described).__name__}")
    except (json.JSONDecodeError, TypeError) as error:
        raise MotipError("the header of the file is damaged", where=path, found=str(error)) from None
    aliases = described.pop("aliases", {})
    for alias, key in aliases.items():
        if key not in tensors:
            raise MotipError("the header names a tensor that is not in the file", where=path, found=key)
        tensors[alias] = tensors[key]
    return {**described, "model": tensors}


def _truncated(path: Path, reason: str) -> MotipError:
    return MotipError(
        "the weights file cannot be read: it is truncated, damaged, or not a weights file",
        where=path,
        found=reason,
        expected="a file written by torch.save, or safetensors",
        fix="copy or download it again and compare its size and sha256 with the source",
    )


def _wrong_container(path: Path, found: str) -> MotipError:
    return MotipError(
        "the file contains no model weights",
        where=path,
        found=found,
        expected='{"model": state dict, ...} or a state dict',
        fix="save the weights as torch.save({'model': model.state_dict()}, path)",
    )


def _state_dict_of(container: dict[str, Any], path: Path) -> dict[str, Tensor]:
    state = container.get("model", container)
    if not isinstance(state, Mapping) or not state:
        raise _wrong_container(path, f"'model' is a {type(state).__name__}" if state else "an empty dict")
    for key, value in state.items():
        if not isinstance(key, str):
            raise _wrong_container(path, f"a key that is not a string: {key!r}")
        if not isinstance(value, Tensor):
            bare = f"top-level keys {', '.join(map(str, list(state)[:8]))}"
            raise MotipError(
                "the file contains a value that is not a tensor among the weights",
                where=f"{path}, key {key}",
                found=bare if state is container else type(value).__name__,
                expected='{"model": state dict, ...} or a state dict of tensors',
            )
    return state if state is container else dict(state)


def _full_keys(raw: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under full MOTIP keys, and notes; raises for the state dict of another model."""
    notes: list[str] = []
    tensors = dict(raw)
    for wrapper in ("module.", "_orig_mod."):
        if all(key.startswith(wrapper) for key in tensors):
            tensors = {key.removeprefix(wrapper): tensor for key, tensor in tensors.items()}
            notes.append(f"the prefix {wrapper} of every key was removed")
    if not any(key.startswith((_DETECTOR_PREFIX, *IDENTITY_PREFIXES)) for key in tensors):
        tensors = {_DETECTOR_PREFIX + key: tensor for key, tensor in tensors.items()}
    if not any(_CLASS_WEIGHT.match(key) for key in tensors):
        raise MotipError(
            "the weights are those of another model",
            where=path,
            found=f"first unknown key: {_first_foreign(tensors, raw)}",
            expected="a MOTIP or Deformable-DETR state dict: class_embed.0.weight, transformer.*, backbone.0.body.*",
            fix="use a MOTIP checkpoint, a detector-only file, or the official Deformable-DETR COCO file",
        )
    return tensors, notes


def _first_foreign(tensors: Mapping[str, Tensor], raw: Mapping[str, Tensor]) -> str:
    for key, written in zip(tensors, raw, strict=True):
        known = key.startswith(IDENTITY_PREFIXES) or _DETECTOR_KEY.match(key.removeprefix(_DETECTOR_PREFIX))
        if not known:
            return written
    return "none, but class_embed.0.weight is missing"


def _check_values(tensors: Mapping[str, Tensor], path: Path) -> None:
    for key, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            form = "without values (meta)" if tensor.is_meta else f"{tensor.layout}, {tensor.dtype}"
            raise MotipError(
                "a tensor is stored in an unsupported form",
                where=f"{path}, key {key}",
                found=form.replace("torch.", ""),
                expected="a dense tensor of floating-point numbers",
            )
        finite = torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor)  # float8 has no isfinite
        if not bool(finite.all()):
            bad = int((~finite).sum())
            raise MotipError(
                "a tensor contains NaN or infinity",
                where=f"{path}, key {key}",
                found=f"{bad} of {tensor.numel()} values are not finite",
                expected="finite numbers",
                fix="the training had diverged: use an earlier checkpoint",
            )


def _class_rows(tensors: Mapping[str, Tensor], path: Path) -> int:
    heads = {key: tensor for key, tensor in tensors.items() if key.startswith("detr.class_embed.")}
    weights = ((key, tensor.shape) for key, tensor in heads.items() if _CLASS_WEIGHT.match(key))
    first, rows = next((key, shape[0] if shape else 0) for key, shape in weights)
    for key, tensor in heads.items():
        if tensor.ndim == 0 or tensor.shape[0] != rows:  # a 0-dimensional weight counts as 0 rows
            raise MotipError(
                "the class heads of the decoder layers have different numbers of rows",
                where=f"{path}, key {key}",
                found=tuple(tensor.shape),
                expected=f"{rows} rows as in {first}",
            )
    return rows


def _kind(path: Path, container: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    if path.suffix == ".safetensors":
        return "safetensors"
    if "classes" in container and "config" in container:
        return "ours"
    return "motip" if any(key.startswith(IDENTITY_PREFIXES) for key in tensors) else "detector"


def _class_names(
    container: Mapping[str, Any], rows: int, given: Sequence[str] | None, path: Path
) -> tuple[tuple[str, ...] | None, str]:
    stored = container.get("classes")
    if stored is not None and not isinstance(stored, Tensor):
        names = check_class_list(stored, rows, f"{path}, classes")
        if given and tuple(given) != names:
            raise MotipError(
                "PRETRAIN_CLASSES contradicts the class list in the file",
                where=path,
                found=", ".join(given),
                expected=", ".join(names),
                fix="remove PRETRAIN_CLASSES: the file names its own classes",
            )
        return names, "file"
    if given:
        return check_class_list(given, rows, f"PRETRAIN_CLASSES for {path}"), "argument"
    if rows == COCO_ROWS:
        return coco_row_names(), "COCO category ids"
    if rows == 1:
        return ("pedestrian",), "assumed from one row"
    return None, "unknown"
