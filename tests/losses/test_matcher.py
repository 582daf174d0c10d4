"""Matching has minimum cost for every mixture of full and empty frames."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from motip.errors import MotipError
from motip.losses.matcher import DetectionTargets, Matcher


def _targets(counts: list[int], classes: int, seed: int) -> DetectionTargets:
    generator = torch.Generator().manual_seed(seed)
    return DetectionTargets.from_frames(
        [torch.rand(count, 4, generator=generator) * 0.5 + 0.2 for count in counts],
        [torch.randint(classes, (count,), generator=generator) for count in counts],
    )


def test_cheapest_assignment_of_every_layer_and_frame() -> None:
    counts, queries, classes = [2, 0, 3, 1], 5, 3
    targets = _targets(counts, classes, seed=0)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, len(counts), queries, classes, generator=generator)
    boxes = torch.rand(2, len(counts), queries, 4, generator=generator)
    matching = Matcher()(logits, boxes, targets)
    assert matching.shape == (2, 6)
    for layer in range(2):
        cost = Matcher().cost(logits[layer], boxes[layer], targets)
        for frame, count in enumerate(counts):
            rows = (targets.frames == frame).nonzero().flatten()
            found = cost[rows, matching[layer, rows]].sum()
            cheapest = min(cost[rows, list(p)].sum() for p in permutations(range(queries), count))
            torch.testing.assert_close(found, torch.as_tensor(cheapest))
            assert len(set(matching[layer, rows].tolist())) == count


def test_cost_ignores_other_frames() -> None:
    targets = _targets([2, 2], 1, seed=2)
    logits, boxes = torch.randn(2, 4, 1), torch.rand(2, 4, 4)
    before = Matcher().cost(logits, boxes, targets)
    boxes[1] += 1.0
    after = Matcher().cost(logits, boxes, targets)
    assert torch.equal(before[:2], after[:2]) and not torch.allclose(before[2:], after[2:])


def test_no_objects_and_more_objects_than_queries() -> None:
    assert Matcher()(torch.randn(3, 2, 4, 1), torch.rand(3, 2, 4, 4), _targets([0, 0], 1, 0)).shape == (3, 0)
    matching = Matcher()(torch.randn(1, 1, 4, 1), torch.rand(1, 1, 4, 4), _targets([6], 1, 0))
    assert sorted(matching[0].tolist()) == [-1, -1, 0, 1, 2, 3]


def test_nan_predictions_are_matched_last() -> None:
    boxes = torch.rand(1, 1, 4, 4)
    boxes[0, 0, :2] = float("nan")
    matching = Matcher()(torch.randn(1, 1, 4, 1), boxes, _targets([2], 1, 0))
    assert sorted(matching[0].tolist()) == [2, 3]


def test_targets_need_one_class_per_box() -> None:
    with pytest.raises(MotipError, match="one class per box"):
        DetectionTargets.from_frames([torch.rand(2, 4)], [torch.zeros(3, dtype=torch.long)])
