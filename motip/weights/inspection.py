"""Inspection of weights files: kind, classes, architecture, training position, parent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from motip.errors import MotipError
from motip.weights.class_names import check_class_list
from motip.weights.files import WeightFile, read_weights
from motip.weights.transfer import POSITIONS_KEY, WORDS_KEY

WEIGHTS_NAME = "model.safetensors"
DESCRIPTION_NAME = "config.json"


def inspect_weights(path: Path | str) -> dict[str, Any]:
    """Properties of a weights file or export folder as JSON values, for ``motip weights inspect``.

    ``architecture`` is the stored ModelSpec, or sizes derived from shapes (then ``architecture_from`` is ``shapes``).

    Raises:
        MotipError: as ``read_weights``.
    """
    weight_file = read_described(path)
    tensors = weight_file.tensors
    stored = weight_file.meta.get("spec")
    unique = {(tensor.data_ptr(), tuple(tensor.shape)): tensor for tensor in tensors.values()}
    sizes = sizes_from_shapes(tensors)
    return {
        "path": str(weight_file.path),
        "kind": weight_file.kind,
        "bytes": weight_file.path.stat().st_size,
        "sha256": weight_file.sha256,
        "architecture": stored or sizes,
        "architecture_from": "file" if stored else "shapes",
        "classes": list(weight_file.classes) if weight_file.classes else None,
        "classes_from": weight_file.classes_origin,
        "class_rows": weight_file.class_rows,
        "vocabulary": sizes.get("num_id_vocabulary"),
        "rel_pe_length": sizes.get("rel_pe_length"),
        "training": training_position(weight_file),
        "parent": weight_file.meta.get("parent"),
        "tensors": len(tensors),
        "distinct_tensors": len(unique),
        "parameters": sum(tensor.numel() for tensor in unique.values()),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
        "holds": weight_file.meta.get("holds", []),
        "notes": list(weight_file.notes),
    }


def training_position(weight_file: WeightFile) -> dict[str, Any]:
    """``{"epoch", "step", "run_id"}``, as far as stored; the epoch is the last finished one, 0-based."""
    meta = weight_file.meta
    if "training" in meta:
        return dict(meta["training"])
    states = meta.get("states") or {}
    position: dict[str, Any] = {}
    if "start_epoch" in states:
        position["epoch"] = states["start_epoch"] - 1
    if "global_step" in states:
        position["step"] = states["global_step"]
    return position | {key: meta[key] for key in ("epoch", "step", "run_id") if key in meta}


def read_described(path: Path | str) -> WeightFile:
    """``read_weights`` of a file or an export folder; a ``config.json`` of that file overrides its header.

    Raises:
        MotipError: as ``read_weights``; the folder has no export; the description is that of other weights.
    """
    path = Path(path)
    description_path = (path if path.is_dir() else path.parent) / DESCRIPTION_NAME
    if path.is_dir():
        if not description_path.is_file():
            raise MotipError(
                "the folder contains no exported weights", where=path, expected=f"{WEIGHTS_NAME} and {DESCRIPTION_NAME}"
            )
        path = path / str(_read_description(description_path).get("weights", WEIGHTS_NAME))
    weight_file = read_weights(path)
    if path.suffix != ".safetensors" or not description_path.is_file():
        return weight_file
    description = _read_description(description_path)
    if description.get("weights") != path.name:  # config.json of another program or another file
        return weight_file
    if description.get("weights_sha256", weight_file.sha256) != weight_file.sha256:
        raise MotipError(
            f"{DESCRIPTION_NAME} describes other weights than the file next to it",
            where=path,
            found=f"sha256 {weight_file.sha256}",
            expected=f"sha256 {description['weights_sha256']}",
            fix="copy both files of one export",
        )
    classes = check_class_list(description.get("classes", ()), weight_file.class_rows, description_path)
    meta = {**weight_file.meta, **description}
    return replace(weight_file, classes=classes, classes_origin="file", meta=meta)


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MotipError("the description of the export cannot be read", where=path, found=str(error)) from None
    if not isinstance(description, dict):
        raise MotipError(
            "the description of the export is not a JSON object", where=path, found=type(description).__name__
        )
    return description


def sizes_from_shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Architecture sizes derived from tensor shapes, under the names of ModelSpec."""

    def count(pattern: str) -> int:
        return len({key[len(pattern) :].split(".")[0] for key in tensors if key.startswith(pattern)})

    bottleneck = "detr.backbone.0.body.layer1.0.conv3.weight" in tensors
    sizes: dict[str, Any] = {
        "backbone": "resnet50" if bottleneck else "tiny_gn",
        "enc_layers": count("detr.transformer.encoder.layers."),
        "dec_layers": count("detr.transformer.decoder.layers."),
        "num_feature_levels": count("detr.input_proj."),
    }
    for name, key, axis in (
        ("num_classes", "detr.class_embed.0.weight", 0),
        ("hidden_dim", "detr.class_embed.0.weight", 1),
        ("num_queries", "detr.query_embed.weight", 0),
        ("dim_feedforward", "detr.transformer.encoder.layers.0.linear1.weight", 0),
        ("id_dim", WORDS_KEY, 0),
        ("rel_pe_length", POSITIONS_KEY, 1),
        ("num_id_decoder_layers", POSITIONS_KEY, 0),
    ):
        if key in tensors:
            sizes[name] = tensors[key].shape[axis]
    if WORDS_KEY in tensors:
        sizes["num_id_vocabulary"] = tensors[WORDS_KEY].shape[1] - 1
    return sizes
