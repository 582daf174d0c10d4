"""The published schedule reproduces the published sampler's clips, frame by frame and in order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from motip.data.clips import PlanVideo, published_order
from tests.parity.sizes import reference_files


def _runs(path: Path) -> tuple[dict, list[PlanVideo]]:
    data = json.loads(path.read_text())
    videos = []
    for name, frames in data["lengths"].items():
        illegal = set(data["illegal"].get(name, []))
        objects = tuple(0 if row in illegal else 1 for row in range(frames))
        videos.append(PlanVideo("D", name, f"{name}.parquet", tuple(range(frames)), objects))
    return data["runs"], videos


@pytest.mark.parametrize("path", reference_files("sampler*.json"))
def test_published_order_equals_the_published_sampler(path: Path) -> None:
    runs, videos = _runs(path)
    compared = 0
    for key, expected in runs.items():
        tag, _, epoch = key.partition("_epoch")
        if not epoch:
            continue
        config = runs[f"{tag}_cfg"]
        weights = config.get("data_weights", {"D": {"train": 1}})
        order = published_order(
            videos,
            epoch=int(epoch),
            sample_steps=config["sample_steps"],
            sample_lengths=config["sample_lengths"],
            sample_intervals=config["sample_intervals"],
            length_per_iteration=config["length_per_iteration"],
            repeats=weights["D"]["train"],
        )
        assert [[video, list(rows)] for video, rows in order] == expected, key
        compared += 1
    assert compared >= 1, f"no run named <tag>_epoch<n> among {sorted(runs)}"
