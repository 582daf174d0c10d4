"""The runtime tracker against the recorded traces (`fixed`), every protocol, copied and random ID-decoder weights."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from motip.model import ModelSpec, build_model
from motip.model.motip import MOTIP
from motip.track.settings import TrackerSettings
from motip.track.tracker import RuntimeTracker
from tests.parity import recipe

ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = Path(os.environ.get("MOTIP_REFERENCE_DIR", ROOT / "../shared/reference")).resolve()
PROTOCOLS = {"hungarian": "hungarian", "objectmax": "object-max", "idmax": "id-max"}


def _traces() -> list[tuple[str, str]]:
    found = []
    for path in sorted(DIRECTORY.glob("tracker_*.npz")):
        with np.load(path) as fixture:
            tags = [match[1] for key in fixture.files if (match := re.fullmatch(r"(.+_fixed)_frame", key))]
        found += [(path.name, tag) for tag in tags]
    return found


@cache
def _fixture(name: str) -> dict[str, np.ndarray]:
    with np.load(DIRECTORY / name) as stored:
        return dict(stored)


@cache
def _model(weights: str, classes: int, vocabulary: int, rel_pe_length: int, feature_dim: int, salt: int) -> MOTIP:
    """The ID half at full size; the detector, which a script replaces, as small as it gets."""
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
    model = build_model(spec).eval()
    if weights == "copy":
        model.load_state_dict(recipe.copy_id_decoder_weights(model, salt), strict=False)
    else:
        recipe.fill(model.trajectory_modeling, salt, "trajectory_modeling.")
        recipe.fill(model.id_decoder, salt, "id_decoder.")
    return model


def _tracker(fixture: dict[str, np.ndarray], tag: str) -> RuntimeTracker:
    weights, protocol, *rest = tag.split("_")
    settings = TrackerSettings(
        det_thresh=float(fixture["det_thresh"]),
        newborn_thresh=float(fixture["newborn_thresh"]),
        area_thresh=float(fixture["area_thresh"]),
        id_thresh=float(fixture[f"{tag}_id_thresh"]),
        miss_tolerance=int(fixture["miss_tolerance"]),
        assignment_protocol=PROTOCOLS[protocol],
        memory_rule="published",
        newborn_order="query",
        use_sigmoid="sigmoid" in rest,
    )
    model = _model(
        weights,
        int(fixture["num_classes"]),
        int(fixture["vocab"]),
        int(fixture["rel_pe_length"]),
        fixture["embeds"].shape[-1],
        int(fixture["salt"]),
    )
    height, width = (int(side) for side in fixture["seq_hw"])
    return RuntimeTracker(model, settings, (height, width))


@pytest.mark.parametrize(("name", "tag"), _traces() or [pytest.param("", "", marks=pytest.mark.skip("no traces"))])
def test_tracker_repeats_the_recorded_trace(name: str, tag: str) -> None:
    fixture = _fixture(name)
    tracker = _tracker(fixture, tag)
    assert str(fixture[f"{tag}_error"]) == ""
    logits, boxes, embeds = (torch.from_numpy(fixture[key]) for key in ("logits", "boxes", "embeds"))
    recorded_frames = fixture[f"{tag}_frame"]
    for frame in range(len(logits)):
        tracks = tracker.update(logits[frame], boxes[frame], embeds[frame])
        rows = recorded_frames == frame
        where = f"{tag}, frame {frame}"
        assert tracks.ids.tolist() == fixture[f"{tag}_id"][rows].tolist(), where
        assert tracks.frame_class_ids.tolist() == fixture[f"{tag}_category"][rows].tolist(), where
        np.testing.assert_allclose(tracks.scores, fixture[f"{tag}_score"][rows], atol=1e-6, err_msg=where)
        xywh = np.concatenate([tracks.boxes_xyxy[:, :2], tracks.boxes_xyxy[:, 2:] - tracks.boxes_xyxy[:, :2]], 1)
        np.testing.assert_allclose(xywh, fixture[f"{tag}_bbox_xywh"][rows], atol=1e-3, err_msg=where)
        active = fixture[f"{tag}_active_labels"][frame]
        assert tracker.active_labels.tolist() == active[active >= 0].tolist(), where
        assert len(tracker.active_labels) == fixture[f"{tag}_num_tracks"][frame], where
        assert tracker.history_length == fixture[f"{tag}_history_len"][frame], where
        assert tracker.id_queue.tolist() == fixture[f"{tag}_id_queue"][frame].tolist(), where


def test_the_written_mot_text_is_the_recorded_one(reference_dir: Path) -> None:
    """`<file>_<tag>.txt` beside the traces: 1-based frames, 0-based ids, float32 pixels."""
    texts = sorted(reference_dir.glob("tracker_*_fixed.txt"))
    if not texts:
        pytest.skip(f"no recorded texts in {reference_dir}")
    for path in texts:
        name, tag = next((name, tag) for name, tag in _traces() if path.stem == f"{name.removesuffix('.npz')}_{tag}")
        fixture = _fixture(name)
        tracker = _tracker(fixture, tag)
        lines = []
        for frame in range(len(fixture["logits"])):
            tracks = tracker.update(*(torch.from_numpy(fixture[key][frame]) for key in ("logits", "boxes", "embeds")))
            for track_id, (x1, y1, x2, y2) in zip(tracks.ids.tolist(), tracks.boxes_xyxy.tolist(), strict=True):
                lines.append((frame + 1, track_id, x1, y1, x2 - x1, y2 - y1))
        recorded = np.loadtxt(path, delimiter=",")
        np.testing.assert_allclose(np.array(lines), recorded[:, :6], atol=1e-3)
