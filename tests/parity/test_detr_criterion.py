"""Matching, losses, logged values and gradients of the detection criterion against recorded numbers."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from motip.losses.detection import DetectionCriterion
from motip.losses.matcher import DetectionTargets
from tests.parity.sizes import or_skip, present


def _files(with_layers: bool) -> list[Any]:
    found = []
    for path in present("detr_criterion_*.npz"):
        with np.load(path) as stored:
            if ("layer0_logits" in stored.files) == with_layers:
                found.append(pytest.param(path, id=path.stem))
    return or_skip(found, f"detr_criterion_*.npz {'with' if with_layers else 'without'} decoder layers")


def _targets(boxes: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> DetectionTargets:
    sizes = [int(count) for count in counts]
    return DetectionTargets.from_frames(
        torch.from_numpy(boxes).reshape(-1, 4).split(sizes), torch.from_numpy(labels).split(sizes)
    )


def _output(layers: list[tuple[Tensor, Tensor]]) -> SimpleNamespace:
    return SimpleNamespace(pred_logits=layers[-1][0], pred_boxes=layers[-1][1], aux=layers[:-1])


@pytest.mark.parametrize("path", _files(with_layers=True))
def test_layers(path: Path) -> None:
    with np.load(path) as stored:
        saved = dict(stored)
    depth = len([key for key in saved if re.fullmatch(r"layer\d+_logits", key)])
    layers = [
        (
            torch.from_numpy(saved[f"layer{n}_logits"]).requires_grad_(),
            torch.from_numpy(saved[f"layer{n}_boxes"]).requires_grad_(),
        )
        for n in range(depth)
    ]
    targets = _targets(saved["tgt_boxes"], saved["tgt_labels"], saved["counts"])
    weights = dict(zip(saved["loss_keys"].tolist(), saved["loss_weights"].tolist(), strict=True))
    criterion = DetectionCriterion(
        class_weight=weights["loss_ce"],
        bbox_weight=weights["loss_bbox"],
        giou_weight=weights["loss_giou"],
        log_chunk=int(saved["batch_len"]),
    )
    result = criterion(_output(layers), targets, num_boxes=targets.num_objects)

    values = {**result.losses, **result.logs}
    for key, expected in zip(saved["loss_keys"].tolist(), saved["loss_values"], strict=True):
        np.testing.assert_allclose(values[key].item(), expected, rtol=1e-5, atol=1e-6, err_msg=key)
    np.testing.assert_allclose(result.total.item(), saved["total"], rtol=1e-5)
    assert {key for key, weight in weights.items() if weight} == set(result.losses)

    matching = criterion.matcher(
        torch.stack([logits for logits, _ in layers]), torch.stack([boxes for _, boxes in layers]), targets
    )
    for n in range(depth):
        assert _pairs(matching[n], targets) == _saved_pairs(saved, f"match_layer{n}"), f"layer {n}"
    returned = {(query, target) for _, query, target in _pairs(result.matching_published, targets)}
    assert returned == set(zip(saved["returned_query"].tolist(), saved["returned_tgt"].tolist(), strict=True))
    assert torch.equal(result.matching_last, matching[-1])

    result.total.backward()
    for n, (logits, boxes) in enumerate(layers):
        np.testing.assert_allclose(logits.grad, saved[f"grad_layer{n}_logits"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(boxes.grad, saved[f"grad_layer{n}_boxes"], rtol=1e-4, atol=1e-5)


def _pairs(matching: Tensor, targets: DetectionTargets) -> set[tuple[int, int, int]]:
    """(frame, query, index of the object within its frame)."""
    within = [index for count in targets.counts for index in range(count)]
    return set(zip(targets.frames.tolist(), matching.tolist(), within, strict=True))


def _saved_pairs(saved: dict[str, np.ndarray], prefix: str) -> set[tuple[int, int, int]]:
    columns = (saved[f"{prefix}_{part}"].tolist() for part in ("frame", "query", "tgt"))
    return set(zip(*columns, strict=True))


@pytest.mark.parametrize("path", _files(with_layers=False))
def test_frames_and_chunks_without_objects(path: Path) -> None:
    with np.load(path) as stored:
        saved = dict(stored)
    cases = [match[1] for key in saved if (match := re.fullmatch(r"(\w+)_counts", key))]
    assert cases
    for case in cases:
        counts = saved[f"{case}_counts"]
        objects = int(counts.sum())
        targets = _targets(np.full((objects, 4), 0.3, np.float32), np.zeros(objects, np.int64), counts)
        logits = torch.from_numpy(saved[f"{case}_logits"]).requires_grad_()
        output = _output([(logits, torch.from_numpy(saved[f"{case}_boxes"]))])
        result = DetectionCriterion(log_chunk=int(saved[f"{case}_batch_len"]))(output, targets, objects)
        values = {**result.losses, **result.logs}
        for key, expected in zip(saved[f"{case}_keys"].tolist(), saved[f"{case}_values"], strict=True):
            np.testing.assert_allclose(values[key].item(), expected, rtol=1e-5, atol=1e-6, err_msg=f"{case} {key}")
        result.total.backward()
        assert torch.isfinite(logits.grad).all()
