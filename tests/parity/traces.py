"""Recorded tracker traces: files, stored arrays, and the tracker each was recorded with."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from motip.model import ModelSpec, build_model
from motip.model.motip import MOTIP
from motip.tracking.settings import TrackerSettings
from motip.tracking.tracker import Tracker
from tests.parity import recipe
from tests.parity.sizes import present

PROTOCOLS = {"hungarian": "hungarian", "objectmax": "object-max", "idmax": "id-max"}


def traces() -> list[tuple[Path, str]]:
    """(file, tag) of every trace of the repaired published tracker."""
    found = []
    for path in present("tracker_*.npz"):
        with np.load(path) as stored:
            tags = [match[1] for key in stored.files if (match := re.fullmatch(r"(.+_fixed)_frame", key))]
        found += [(path, tag) for tag in tags]
    return found


@cache
def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as stored:
        return dict(stored)


def frames(path: Path) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Logits, boxes and embeds of every frame."""
    stored = [torch.from_numpy(arrays(path)[key]) for key in ("logits", "boxes", "embeds")]
    return list(zip(*stored, strict=True))


def settings(path: Path, tag: str, **changes: Any) -> TrackerSettings:
    """Thresholds of the file, protocol of the tag, published rules."""
    stored = arrays(path)
    values: dict[str, Any] = {
        "det_thresh": float(stored["det_thresh"]),
        "newborn_thresh": float(stored["newborn_thresh"]),
        "area_thresh": float(stored["area_thresh"]),
        "id_thresh": float(stored[f"{tag}_id_thresh"]),
        "miss_tolerance": int(stored["miss_tolerance"]),
        "assignment_protocol": PROTOCOLS[tag.split("_")[1]],
        "memory_rule": "published",
        "newborn_order": "query",
        "mask_unused_labels": False,
        "use_sigmoid": "sigmoid" in tag.split("_"),
    }
    return TrackerSettings(**{**values, **changes})


def model(path: Path, tag: str, vocabulary: int | None = None) -> MOTIP:
    """The model of a trace, or the same with another vocabulary (its own weights, not grown ones)."""
    stored = arrays(path)
    return _model(
        tag.split("_")[0],
        int(stored["num_classes"]),
        int(stored["vocab"]) if vocabulary is None else vocabulary,
        int(stored["rel_pe_length"]),
        stored["embeds"].shape[-1],
        int(stored["salt"]),
    )


@cache
def _model(weights: str, classes: int, vocabulary: int, rel_pe_length: int, feature_dim: int, salt: int) -> MOTIP:
    """ID half at full size, with a minimal detector that the recorded detections replace."""
    spec = ModelSpec(
        num_classes=classes,
        backbone="tiny_gn",
        num_queries=4,
        hidden_dim=feature_dim,
        feature_dim=feature_dim,
        id_dim=256,
        enc_layers=1,
        dec_layers=1,
        dim_feedforward=32,
        num_id_vocabulary=vocabulary,
        rel_pe_length=rel_pe_length,
    )
    built = build_model(spec).eval()
    if weights == "copy":
        built.load_state_dict(recipe.copy_id_decoder_weights(built, salt), strict=False)
    else:
        recipe.fill(built.trajectory_modeling, salt, "trajectory_modeling.")
        recipe.fill(built.id_decoder, salt, "id_decoder.")
    return built


def tracker(path: Path, tag: str) -> Tracker:
    """A tracker that must repeat the trace."""
    return Tracker(model(path, tag), settings(path, tag), image_size(path))


def image_size(path: Path) -> tuple[int, int]:
    height, width = (int(side) for side in arrays(path)["seq_hw"])
    return height, width
