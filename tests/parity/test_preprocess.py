"""Sizes and boxes after resizing against recorded numbers; pixels up to the difference of the resampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from motip.data.augment import ClipAugmentation, render_frame, resize_size, transform_boxes
from motip.tracking.api import inference_size, resize_frame
from motip.tracking.settings import TrackerSettings
from tests.parity import recipe
from tests.parity.sizes import reference_files


@pytest.fixture(scope="module", params=reference_files("preprocess*.npz"))
def preprocess(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    with np.load(request.param) as file:
        return dict(file)


def test_inference_sizes_are_exact(preprocess: dict[str, np.ndarray]) -> None:
    cases = preprocess["inference_sizes"].tolist()
    assert cases
    for height, width, short, longest, *expected in cases:
        assert inference_size(height, width, short, longest) == tuple(expected), (height, width, short, longest)


def test_training_sizes_are_exact(preprocess: dict[str, np.ndarray]) -> None:
    cases = preprocess["train_resize_sizes"].tolist()
    assert cases
    for height, width, short, longest, *expected in cases:
        limit = None if longest < 0 else longest
        assert resize_size(height, width, short, limit) == tuple(expected), (height, width, short, longest)


def test_inference_frames_agree(preprocess: dict[str, np.ndarray]) -> None:
    cases = sorted(key.removesuffix("_cfg") for key in preprocess if key.startswith("inf") and key.endswith("_cfg"))
    assert cases
    for case in cases:
        height, width, short, longest, _, seed = preprocess[f"{case}_cfg"].tolist()
        pixels = torch.from_numpy(recipe.image(seed, height, width)).permute(2, 0, 1)
        ours = resize_frame(pixels, TrackerSettings(short_side=short, max_longer=longest)).permute(1, 2, 0).numpy()
        mask = preprocess[f"{case}_mask"][0]
        rows, columns = int((~mask[:, 0]).sum()), int((~mask[0]).sum())
        assert ours.shape[:2] == (rows, columns)
        theirs = preprocess[f"{case}_tensor"][0, :, :rows, :columns]
        std = recipe.IMAGENET_STD.max()
        difference = np.abs(recipe.normalised(ours).numpy() - theirs).mean() * std
        assert difference < 0.015, f"{case}: mean difference {difference:.4f} of full scale"


def test_training_boxes_and_frames_agree(preprocess: dict[str, np.ndarray]) -> None:
    cases = sorted(key.removesuffix("_xywh") for key in preprocess if key.startswith("train") and "_xywh" in key)
    assert cases
    for case in cases:
        height, width, *_, seed = preprocess[f"{case.replace('train', 'inf')}_cfg"].tolist()
        expected = preprocess[f"{case}_uint8"][0]
        augmentation = ClipAugmentation(np.array([[0, 0, width, height]]), expected.shape[1:])
        xywh = preprocess[f"{case}_xywh"]
        boxes, kept = transform_boxes(augmentation, 0, np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]]))
        assert kept.tolist() == list(range(len(xywh)))
        np.testing.assert_allclose(boxes, preprocess[f"{case}_cxcywh"], atol=1e-6)
        ours = render_frame(augmentation, 0, recipe.image(seed, height, width)).astype(float)
        assert np.abs(ours - expected).mean() < 6.5, f"{case}: {np.abs(ours - expected).mean():.2f} of 255"
