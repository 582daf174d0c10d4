"""Weights that can be handed on: safetensors with everything tracking needs, and a look into any weights file.

``export_safetensors`` writes ``model.safetensors`` and ``config.json``. The same description stands in the header of
the safetensors file, so that the one file is enough; where both are there, ``config.json`` speaks (it can be edited).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from motip.errors import MotipError
from motip.model.build import build_model
from motip.model.motip import MOTIP
from motip.model.spec import ModelSpec
from motip.storage.atomic import atomic_write, sha256_file, write_json_atomic
from motip.weights.class_names import canonical_name, check_class_list
from motip.weights.files import HEADER_KEY, WeightFile
from motip.weights.inspection import DESCRIPTION_NAME, WEIGHTS_NAME, inspect, read_described, training_position
from motip.weights.transfer import POSITIONS_KEY, WORDS_KEY, TransferPlan, apply_transfer, plan_transfer
from motip.weights.transfer_report import COPIED

if TYPE_CHECKING:
    from motip.config import Config

__all__ = ["export_safetensors", "inspect", "load_exported", "load_for_tracking", "read_described"]

FORMAT = 1

TRACKING_KEYS = (
    "DET_THRESH",
    "NEWBORN_THRESH",
    "ID_THRESH",
    "AREA_THRESH",
    "MISS_TOLERANCE",
    "ASSIGNMENT_PROTOCOL",
    "NEWBORN_ORDER",
    "MEMORY_RULE",
    "MASK_UNUSED_LABELS",
    "LONGTERM_PATIENCE",
    "LONGTERM_SIMILARITY",
    "LONGTERM_CAPACITY",
    "INFERENCE_DTYPE",
    "INFERENCE_SHORT_SIDE",
    "INFERENCE_MAX_LONGER",
    "USE_FOCAL_LOSS",
)
"""Configuration keys that tracking depends on besides the architecture."""


def export_safetensors(
    checkpoint_path: Path | str,
    out_dir: Path | str,
    *,
    config: Config | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write ``model.safetensors`` and ``config.json`` into `out_dir`; no YAML is needed to track with them.

    Where `out_dir` ends in ``.safetensors``, that one file is written: its header holds the description too.

    Args:
        checkpoint_path: any checkpoint ``load_for_tracking`` takes.
        config: needed for files that carry no architecture (the published code's) and are not of the default one.
        dtype: store floating tensors in this type, e.g. ``torch.float16``; by default as they are.

    Returns:
        Path of the safetensors file.

    Raises:
        MotipError: the checkpoint cannot be read, does not fit its architecture, or the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    source = read_described(checkpoint_path)
    spec, classes, differences = _architecture(source, config)
    _exact_plan(source, spec, classes)
    tensors, aliases = _without_aliases(source.tensors, dtype)
    description = {
        "format": FORMAT,
        "weights": WEIGHTS_NAME,
        "spec": spec.to_dict(),
        "classes": list(classes),
        "thresholds": _thresholds(source, config),
        "config": _config_dict(source, config),
        "training": training_position(source),
        "parent": _named(source.meta.get("parent")),
        "source": {"name": source.path.name, "sha256": source.sha256},
    }
    if differences:
        description["config_differences"] = differences
    target = Path(out_dir)
    alone = target.suffix == ".safetensors"
    if not alone:
        target = target / WEIGHTS_NAME
    header = json.dumps({**description, "aliases": aliases}, sort_keys=True)
    with atomic_write(target) as temporary:
        try:
            save_file(tensors, str(temporary), metadata={"format": "pt", HEADER_KEY: header})
        except SafetensorError as error:  # it wraps the operating system's errors in its own
            raise OSError(str(error)) from error
        temporary.chmod(0o644)  # the library's own files are for their writer alone
    if not alone:
        write_json_atomic(target.with_name(DESCRIPTION_NAME), {**description, "weights_sha256": sha256_file(target)})
    return target


def _named(parent: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The parent by name and digest: its folder is this machine's and nobody else's business."""
    return None if parent is None else {**parent, "path": Path(str(parent["path"])).name}


def load_exported(path: Path | str) -> tuple[MOTIP, dict[str, Any]]:
    """The model (eval mode, CPU, float32) and its description, from an export folder or its safetensors file.

    Raises:
        MotipError: files missing or damaged, weights of another export, class list or architecture contradicting them.
    """
    weight_file = read_described(path)
    if "spec" not in weight_file.meta or weight_file.classes is None:
        raise MotipError(
            "the weights carry no architecture",
            where=weight_file.path,
            expected=f"{DESCRIPTION_NAME} beside them, or a file written by motip weights export",
            fix="export the checkpoint again, or give its configuration with --config_path",
        )
    spec = ModelSpec.from_dict(weight_file.meta["spec"])
    meta = {**weight_file.meta, "classes": list(weight_file.classes), "sha256": weight_file.sha256}
    return _exact_model(weight_file, spec, weight_file.classes), meta


def load_for_tracking(
    checkpoint_path: Path | str, config: Config | None = None
) -> tuple[MOTIP, tuple[str, ...], dict[str, Any]]:
    """A model ready to track, its class names, and what is known about it.

    Args:
        checkpoint_path: our checkpoint, a published one, a safetensors file, or an export folder.
        config: needed only for a published checkpoint of another than the default architecture. Its thresholds go
            before stored ones.

    Returns:
        MOTIP in eval mode on the CPU; class names, one per row; ``{"thresholds", "config", "training", "parent",
        "sha256", "config_differences"}``.

    Raises:
        MotipError: as ``read_weights``; a detector-only file; classes that differ from the configuration's.
    """
    weight_file = read_described(checkpoint_path)
    if not weight_file.has_identity:
        raise MotipError(
            "the file holds a detector only, it cannot track",
            where=weight_file.path,
            found="no trajectory_modeling.* and id_decoder.* tensors",
            fix="train it first (DETR_PRETRAIN), or give a full MOTIP checkpoint",
        )
    spec, classes, differences = _architecture(weight_file, config)
    meta = {
        "thresholds": _thresholds(weight_file, config),
        "config": _config_dict(weight_file, config),
        "training": training_position(weight_file),
        "parent": weight_file.meta.get("parent"),
        "sha256": weight_file.sha256,
        "kind": weight_file.kind,
        "config_differences": differences,
    }
    return _exact_model(weight_file, spec, classes), classes, meta


def _architecture(
    weight_file: WeightFile, config: Config | None
) -> tuple[ModelSpec, tuple[str, ...], dict[str, list[Any]]]:
    """Architecture and classes of a file, and where the configuration differs from what the file says itself."""
    classes = weight_file.classes
    if classes is None or (config is not None and weight_file.classes_origin != "file"):
        if config is None:
            raise MotipError(
                f"the file does not name its {weight_file.class_rows} classes",
                where=weight_file.path,
                fix="give the configuration it was trained with (--config_path)",
            )
        classes = check_class_list(config.class_names, weight_file.class_rows, f"classes for {weight_file.path}")
    if "spec" in weight_file.meta:
        spec = ModelSpec.from_dict(weight_file.meta["spec"])
        return spec, classes, _check_against_config(classes, spec, config, weight_file.path)
    if config is not None:
        return ModelSpec.from_config(config), classes, {}
    return _published_spec(weight_file, classes), classes, {}


def _published_spec(weight_file: WeightFile, classes: Sequence[str]) -> ModelSpec:
    """The published architecture with the file's own classes, vocabulary and positions, if the file is of it."""
    words, positions = weight_file.tensors.get(WORDS_KEY), weight_file.tensors.get(POSITIONS_KEY)
    sizes: dict[str, Any] = {"num_classes": weight_file.class_rows, "only_detr": not weight_file.has_identity}
    if words is not None and positions is not None:
        sizes |= {"num_id_vocabulary": words.shape[1] - 1, "rel_pe_length": positions.shape[1]}
    try:
        spec = ModelSpec(**sizes)
        plan_transfer(weight_file, spec, classes)
    except MotipError as error:
        raise MotipError(
            "the file carries no architecture and is not of the published default one",
            where=weight_file.path,
            found=str(error.found),
            fix="give the configuration it was trained with (--config_path)",
        ) from error
    return spec


def _check_against_config(
    classes: Sequence[str], spec: ModelSpec, config: Config | None, path: Path
) -> dict[str, list[Any]]:
    if config is None:
        return {}
    wanted = tuple(config.class_names)
    if [canonical_name(name) for name in wanted] != [canonical_name(name) for name in classes]:
        raise MotipError(
            "the classes of the checkpoint differ from the configuration's",
            where=path,
            found=", ".join(classes),
            expected=", ".join(wanted),
            fix="leave the configuration away (the checkpoint carries its own), or transfer the weights first "
            "(motip weights transfer)",
        )
    asked = ModelSpec.from_config(config)
    names = [field.name for field in fields(ModelSpec)]
    return {
        name: [getattr(spec, name), getattr(asked, name)]
        for name in names
        if getattr(spec, name) != getattr(asked, name)
    }


def _exact_plan(weight_file: WeightFile, spec: ModelSpec, classes: Sequence[str]) -> TransferPlan:
    """A transfer in which nothing changes: every tensor of the model is in the file as it is."""
    plan = plan_transfer(replace(weight_file, classes=tuple(classes)), spec, classes)
    for key, fate in plan.report.model_fates.items():
        if fate.category != COPIED:
            raise MotipError(
                "the weights are not of the architecture they should have",
                where=f"{weight_file.path}, key {key}",
                found=f"{fate.category}: {fate.detail or 'not in the file'}",
                expected="every tensor as in the file",
                fix="use the configuration the weights were trained with, or motip weights transfer",
            )
    return plan


def _exact_model(weight_file: WeightFile, spec: ModelSpec, classes: Sequence[str]) -> MOTIP:
    plan = _exact_plan(weight_file, spec, classes)
    model = build_model(spec)
    apply_transfer(model, plan)
    return model.eval()


def _thresholds(weight_file: WeightFile, config: Config | None) -> dict[str, Any]:
    stored = weight_file.meta.get("thresholds")
    if stored is None:
        known = weight_file.meta.get("config") or {}
        stored = {key: known[key] for key in TRACKING_KEYS if key in known}
    return {**stored, **_read_keys(config)}


def _read_keys(config: Config | None) -> dict[str, Any]:
    return {} if config is None else {key: getattr(config, key) for key in TRACKING_KEYS if hasattr(config, key)}


def _config_dict(weight_file: WeightFile, config: Config | None) -> dict[str, Any] | None:
    return weight_file.meta.get("config") or (config.to_dict() if config is not None else None)


def _without_aliases(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each distinct tensor once, contiguous and on its own storage; second name -> first name of the others."""
    firsts: dict[tuple[int, tuple[int, ...]], str] = {}
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for key, tensor in tensors.items():
        first = firsts.setdefault((tensor.data_ptr(), tuple(tensor.shape)), key)
        if first != key and tensor.numel():
            aliases[key] = first
            continue
        narrow = dtype is not None and tensor.is_floating_point()
        stored[key] = (tensor.to(dtype) if narrow else tensor).contiguous().clone()
    return stored, aliases
