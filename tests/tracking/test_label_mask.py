"""Mask of unused ID labels: a larger vocabulary gives the same tracks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from motip.model import MOTIP
from motip.tracking.settings import TrackerSettings
from motip.tracking.tracker import FrameTracks, Tracker
from motip.weights import load_pretrained, save_checkpoint
from tests.helpers.scripted_model import detections, features, following_model
from tests.parity import recipe, traces
from tests.parity.sizes import or_skip

Detections = tuple[Tensor, Tensor, Tensor]
SIZE = (480, 640)


def grow(parent: MOTIP, child: MOTIP, folder: Path) -> MOTIP:
    """`child` initialised from the parent's weights through a file, like a stage with a larger vocabulary."""
    names = tuple(f"class {row}" for row in range(parent.spec.num_classes))
    path = save_checkpoint(folder / "parent.pth", model=parent, classes=names, config={}, epoch=0, step=1)
    load_pretrained(child, path, names)
    return child.eval()


def track(
    model: MOTIP, settings: TrackerSettings, frames: list[Detections], size: tuple[int, int] = SIZE
) -> list[FrameTracks]:
    tracker = Tracker(model, settings, size)
    return [tracker.update(*frame) for frame in frames]


def same(one: list[FrameTracks], other: list[FrameTracks]) -> bool:
    """Whether ids, boxes, scores, queries, classes and labels agree row for row."""
    fields = ("ids", "boxes_xyxy", "scores", "queries", "class_ids", "labels", "newborn")
    return all(
        np.array_equal(getattr(a, name), getattr(b, name)) for a, b in zip(one, other, strict=True) for name in fields
    )


def count_ids(tracked: list[FrameTracks]) -> int:
    return len({track_id for frame in tracked for track_id in frame.ids.tolist()})


def random_model(vocabulary: int, salt: int) -> MOTIP:
    model = following_model(vocabulary)
    recipe.fill(model.trajectory_modeling, salt, "trajectory_modeling.")
    recipe.fill(model.id_decoder, salt, "id_decoder.")
    return model


def noisy_frames(count: int, objects: int) -> list[Detections]:
    """Objects that appear and disappear, with features so similar under noise that ID scores are ambiguous."""
    rng, noise = np.random.default_rng(0), torch.Generator().manual_seed(0)
    appearance = features(objects) * 0.3
    return [
        detections(
            rng.permutation(objects)[: rng.integers(2, objects + 1)].tolist(),
            appearance + torch.randn(appearance.shape, generator=noise) * 8,
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("protocol", ["hungarian", "object-max", "id-max"])
@pytest.mark.parametrize("weights", ["copy", "random"])
def test_vocabulary_growth_12_to_40_keeps_tracks(tmp_path: Path, weights: str, protocol: str) -> None:
    parent = following_model(12) if weights == "copy" else random_model(12, salt=3)
    child = grow(parent, following_model(40), tmp_path)
    settings = TrackerSettings(newborn_thresh=0.5, miss_tolerance=10, assignment_protocol=protocol, id_thresh=0.1)
    frames = noisy_frames(60, objects=7)
    known = track(parent, settings, frames)
    # Beyond 12 tracks the parent must reuse labels and the child need not: the promise ends there.
    until = next((end for end in range(1, 61) if count_ids(known[:end]) > 12), 61) - 1
    assert until >= 3 and sum((~frame.newborn).sum() for frame in known[:until]) > 0
    assert same(known[:until], track(child, settings, frames[:until]))


def test_without_the_mask_untrained_labels_change_tracks(tmp_path: Path) -> None:
    """Control of the tests above: without the mask the tracks must differ."""
    parent = random_model(12, salt=3)
    child = grow(parent, following_model(40), tmp_path)
    settings = TrackerSettings(newborn_thresh=0.5, miss_tolerance=10, id_thresh=0.1, mask_unused_labels=False)
    frames = noisy_frames(12, objects=7)
    assert not same(track(parent, settings, frames), track(child, settings, frames))


@pytest.mark.parametrize(
    ("path", "tag"),
    or_skip(
        [
            pytest.param(path, f"{weights}_objectmax_fixed", id=f"{path.stem}-{weights}")
            for path in sorted({path for path, _ in traces.traces() if "calm" in path.stem})
            for weights in ("copy", "random")
        ],
        "tracker_calm*.npz",
        2,
    ),
)
def test_vocabulary_growth_50_to_300_at_full_size_keeps_tracks(tmp_path: Path, path: Path, tag: str) -> None:
    parent = traces.model(path, tag, vocabulary=50)
    child = grow(parent, traces.model(path, "random_", vocabulary=300), tmp_path)
    settings = traces.settings(path, tag, mask_unused_labels=True)
    frames, size = traces.frames(path), traces.image_size(path)
    known = track(parent, settings, frames, size)
    until = next((end for end in range(1, len(frames) + 1) if count_ids(known[:end]) > 50), len(frames) + 1) - 1
    assert until >= 5 and sum((~frame.newborn).sum() for frame in known[:until]) > 0
    assert same(known[:until], track(child, settings, frames[:until], size))


@pytest.mark.parametrize("mask", [True, False])
def test_id_scores_equal_a_full_forward_pass(mask: bool) -> None:
    """Masked: labels without a track have probability 0 and the others share the rest in unchanged proportion."""
    model = following_model(12)
    tracker = Tracker(model, TrackerSettings(newborn_thresh=0.5, mask_unused_labels=mask, miss_tolerance=10), SIZE)
    seen: list[np.ndarray] = []
    assign = tracker._assign
    tracker._assign = lambda scores, tracked, threshold: (seen.append(scores), assign(scores, tracked, threshold))[1]
    appearance = features(4)
    first = tracker.update(*detections([0, 1], appearance))
    tracker.update(*detections([1, 0, 2], appearance))
    in_use = np.append(np.isin(np.arange(12), first.labels), True)
    assert (seen[0][:, ~in_use] == 0.0).all() == mask
    past = model.trajectory_modeling(appearance[:2])[None, None, None]
    labels = torch.from_numpy(first.labels)[None, None, None]
    now = appearance[[1, 0, 2]][None, None, None]
    with torch.no_grad():
        logits = model.id_decoder(past, labels, labels < 0, [0], now, torch.zeros(1, 1, 1, 3, dtype=torch.bool), [1])[
            -1, 0, 0, 0
        ]
    expected = logits.softmax(-1).numpy()
    if mask:
        expected = expected * in_use / (expected * in_use).sum(-1, keepdims=True)
    np.testing.assert_allclose(seen[0], expected, atol=1e-5)
