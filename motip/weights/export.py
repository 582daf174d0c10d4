"""Export of weights for tracking: safetensors with architecture, classes and thresholds.

``export_safetensors`` writes ``model.safetensors`` and ``config.json``. The header of the safetensors file contains the
same description, so that it can be used alone; ``config.json``, which can be edited, takes precedence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from motip.weights.inspection import (
    DESCRIPTION_NAME,
    WEIGHTS_NAME,
    read_described,
    sizes_from_shapes,
    training_position,
)
from motip.weights.transfer import TransferPlan, apply_transfer, plan_transfer
from motip.weights.transfer_report import COPIED

if TYPE_CHECKING:
    from motip.config import Config

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
"""Configuration keys of tracking, besides the architecture."""


def export_safetensors(
    checkpoint_path: Path | str,
    out_dir: Path | str,
    *,
    config: Config | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write ``model.safetensors`` and ``config.json`` into `out_dir`; tracking with them needs no configuration file.

    If `out_dir` ends in ``.safetensors``, only that file is written.

    Args:
        checkpoint_path: see ``load_for_tracking``.
        config: required for files without architecture (published checkpoints) other than the default one.
        dtype: type of the stored floating-point tensors, e.g. ``torch.float16``; default: unchanged.

    Returns:
        The path of the safetensors file.

    Raises:
        MotipError: the checkpoint cannot be read, does not fit its architecture, or the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Check that the file fits its architecture.
    source = read_described(checkpoint_path)
    spec, classes, differences = _architecture(source, config)
    _exact_plan(source, spec, classes)
    tensors, aliases = _without_aliases(source.tensors, dtype)
    # Description for header and config.json; of the parent its file name, so that no local path is published.
    parent: Mapping[str, Any] | None = source.meta.get("parent")
    description = {
        "format": FORMAT,
        "weights": WEIGHTS_NAME,
        "spec": spec.to_dict(),
        "classes": list(classes),
        **_run_facts(source, config),
        "parent": parent and {**parent, "path": Path(str(parent["path"])).name},
        "source": {"name": source.path.name, "sha256": source.sha256},
    }
    if differences:
        description["config_differences"] = differences
    # Write.
    target = Path(out_dir)
    single_file = target.suffix == ".safetensors"
    if not single_file:
        target = target / WEIGHTS_NAME
    header = json.dumps({**description, "aliases": aliases}, sort_keys=True)
    with atomic_write(target) as temporary:
        try:
            save_file(tensors, str(temporary), metadata={"format": "pt", HEADER_KEY: header})
        except SafetensorError as error:  # wraps errors of the operating system
            raise OSError(str(error)) from error
        temporary.chmod(0o644)  # the library writes files with mode 600
    if not single_file:
        write_json_atomic(target.with_name(DESCRIPTION_NAME), {**description, "weights_sha256": sha256_file(target)})
    return target


def load_for_tracking(
    checkpoint_path: Path | str, config: Config | None = None
) -> tuple[MOTIP, tuple[str, ...], dict[str, Any]]:
    """Load a model for tracking, with its class names and metadata.

    Args:
        checkpoint_path: our checkpoint, a published one, a safetensors file, or an export folder.
        config: required for a published checkpoint of another than the default architecture. Its thresholds take
            precedence over stored ones.

    Returns:
        MOTIP in eval mode on the CPU; class names, one per row; ``{"thresholds", "config", "training", "parent",
        "sha256", "kind", "config_differences"}``.

    Raises:
        MotipError: as ``read_weights``; a detector-only file; classes that differ from the configuration's.
    """
    weight_file = read_described(checkpoint_path)
    if not weight_file.has_identity:
        raise MotipError(
            "the file contains a detector only, which cannot track",
            where=weight_file.path,
            found="no trajectory_modeling.* and id_decoder.* tensors",
            fix="train a model from it (DETR_PRETRAIN), or use a full MOTIP checkpoint",
        )
    spec, classes, differences = _architecture(weight_file, config)
    meta = {
        **_run_facts(weight_file, config),
        "parent": weight_file.meta.get("parent"),
        "sha256": weight_file.sha256,
        "kind": weight_file.kind,
        "config_differences": differences,
    }
    plan = _exact_plan(weight_file, spec, classes)
    model = build_model(spec)
    apply_transfer(model, plan)
    return model.eval(), classes, meta


def _architecture(
    weight_file: WeightFile, config: Config | None
) -> tuple[ModelSpec, tuple[str, ...], dict[str, list[Any]]]:
    """Architecture and classes of a file, and its differences to the configuration (field -> [file, config])."""
    classes = weight_file.classes
    if classes is None or (config is not None and weight_file.classes_origin != "file"):
        if config is None:
            raise MotipError(
                f"the file does not name its {weight_file.class_rows} classes",
                where=weight_file.path,
                fix="pass the configuration it was trained with (--config_path)",
            )
        classes = check_class_list(config.class_names, weight_file.class_rows, f"classes for {weight_file.path}")
    if "spec" in weight_file.meta:
        spec = ModelSpec.from_dict(weight_file.meta["spec"])
        return spec, classes, _check_against_config(classes, spec, config, weight_file.path)
    if config is not None:
        return ModelSpec.from_config(config), classes, {}
    return _published_spec(weight_file, classes), classes, {}


def _published_spec(weight_file: WeightFile, classes: Sequence[str]) -> ModelSpec:
    """The published architecture with classes, vocabulary and positions of the file; raises if it does not fit."""
    shapes = sizes_from_shapes(weight_file.tensors)
    sizes = {name: shapes[name] for name in ("num_id_vocabulary", "rel_pe_length") if name in shapes}
    try:
        spec = ModelSpec(weight_file.class_rows, only_detr=not weight_file.has_identity, **sizes)
        plan_transfer(weight_file, spec, classes)
    except MotipError as error:
        raise MotipError(
            "the file contains no architecture and does not fit the published default",
            where=weight_file.path,
            found=str(error.found),
            fix="pass the configuration it was trained with (--config_path)",
        ) from error
    return spec


def _check_against_config(
    classes: Sequence[str], spec: ModelSpec, config: Config | None, path: Path
) -> dict[str, list[Any]]:
    if config is None:
        return {}
    expected = tuple(config.class_names)
    if [canonical_name(name) for name in expected] != [canonical_name(name) for name in classes]:
        raise MotipError(
            "the classes of the checkpoint differ from the configuration's",
            where=path,
            found=", ".join(classes),
            expected=", ".join(expected),
            fix="omit the configuration (the checkpoint contains its own), or transfer the weights first "
            "(motip weights transfer)",
        )
    configured = ModelSpec.from_config(config).to_dict()
    return {name: [own, configured[name]] for name, own in spec.to_dict().items() if own != configured[name]}


def _exact_plan(weight_file: WeightFile, spec: ModelSpec, classes: Sequence[str]) -> TransferPlan:
    """A transfer that copies every tensor of the model unchanged from the file; raises otherwise."""
    plan = plan_transfer(replace(weight_file, classes=tuple(classes)), spec, classes)
    for key, status in plan.report.model_status.items():
        if status.category != COPIED:
            raise MotipError(
                "the weights do not fit the expected architecture",
                where=f"{weight_file.path}, key {key}",
                found=f"{status.category}: {status.detail or 'not in the file'}",
                expected="every tensor unchanged from the file",
                fix="use the configuration the weights were trained with, or motip weights transfer",
            )
    return plan


def _run_facts(weight_file: WeightFile, config: Config | None) -> dict[str, Any]:
    """Tracking thresholds, configuration and training position of the run that wrote the file."""
    meta = weight_file.meta
    stored = meta.get("config") or {}
    thresholds = meta.get("thresholds")
    if thresholds is None:
        thresholds = {key: stored[key] for key in TRACKING_KEYS if key in stored}
    return {
        "thresholds": thresholds | {key: getattr(config, key) for key in TRACKING_KEYS if hasattr(config, key)},
        "config": stored or (config.to_dict() if config is not None else None),
        "training": training_position(weight_file),
    }


def _without_aliases(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Distinct tensors, contiguous with own storage, and alias -> key of the others."""
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
