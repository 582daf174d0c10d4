"""The runtime tracker against the recorded traces (`fixed`), every protocol, copied and random ID-decoder weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.parity import traces
from tests.parity.sizes import or_skip


@pytest.mark.parametrize(
    ("path", "tag"),
    or_skip([pytest.param(path, tag, id=f"{path.stem}-{tag}") for path, tag in traces.traces()], "tracker_*.npz", 2),
)
def test_tracker_repeats_the_recorded_trace(path: Path, tag: str) -> None:
    recorded = traces.arrays(path)
    tracker = traces.tracker(path, tag)
    assert str(recorded[f"{tag}_error"]) == ""
    for frame, detections in enumerate(traces.frames(path)):
        tracks = tracker.update(*detections)
        rows = recorded[f"{tag}_frame"] == frame
        where = f"{tag}, frame {frame}"
        assert tracks.ids.tolist() == recorded[f"{tag}_id"][rows].tolist(), where
        assert tracks.frame_class_ids.tolist() == recorded[f"{tag}_category"][rows].tolist(), where
        np.testing.assert_allclose(tracks.scores, recorded[f"{tag}_score"][rows], atol=1e-6, err_msg=where)
        xywh = np.concatenate([tracks.boxes_xyxy[:, :2], tracks.boxes_xyxy[:, 2:] - tracks.boxes_xyxy[:, :2]], 1)
        np.testing.assert_allclose(xywh, recorded[f"{tag}_bbox_xywh"][rows], atol=1e-3, err_msg=where)
        active = recorded[f"{tag}_active_labels"][frame]
        assert tracker.active_labels.tolist() == active[active >= 0].tolist(), where
        assert len(tracker.active_labels) == recorded[f"{tag}_num_tracks"][frame], where
        assert tracker.history_length == recorded[f"{tag}_history_len"][frame], where
        assert tracker.id_queue.tolist() == recorded[f"{tag}_id_queue"][frame].tolist(), where


def test_mot_text_equals_the_recorded_one(reference_dir: Path) -> None:
    """`<file>_<tag>.txt` in the folder of the traces: 1-based frames, 0-based ids, float32 pixels."""
    texts = sorted(reference_dir.glob("tracker_*_fixed.txt"))
    if not texts:
        pytest.skip(f"no recorded texts in {reference_dir}")
    for text in texts:
        path, tag = next((path, tag) for path, tag in traces.traces() if text.stem == f"{path.stem}_{tag}")
        tracker = traces.tracker(path, tag)
        lines = []
        for frame, detections in enumerate(traces.frames(path)):
            tracks = tracker.update(*detections)
            for track_id, (x1, y1, x2, y2) in zip(tracks.ids.tolist(), tracks.boxes_xyxy.tolist(), strict=True):
                lines.append((frame + 1, track_id, x1, y1, x2 - x1, y2 - y1))
        recorded = np.loadtxt(text, delimiter=",")
        np.testing.assert_allclose(np.array(lines), recorded[:, :6], atol=1e-3)
