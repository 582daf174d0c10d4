"""Ignore regions, empty frames, weights and precision of the detection criterion."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from motip.losses.detection import DetectionCriterion, DetectionLosses
from motip.losses.matcher import DetectionTargets

FRAMES, QUERIES, CLASSES = 3, 8, 2


def _output(seed: int = 0, layers: int = 2, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    layer_outputs = []
    for _ in range(layers):
        logits = torch.randn(FRAMES, QUERIES, CLASSES, generator=generator).to(dtype).requires_grad_()
        boxes = (torch.rand(FRAMES, QUERIES, 4, generator=generator) * 0.3 + 0.2).to(dtype).requires_grad_()
        layer_outputs.append((logits, boxes))
    return SimpleNamespace(pred_logits=layer_outputs[-1][0], pred_boxes=layer_outputs[-1][1], aux=layer_outputs[:-1])


def _targets(counts: tuple[int, ...] = (2, 0, 3), ignore: list[Tensor] | None = None) -> DetectionTargets:
    generator = torch.Generator().manual_seed(9)
    return DetectionTargets.from_frames(
        [torch.rand(count, 4, generator=generator) * 0.3 + 0.2 for count in counts],
        [torch.randint(CLASSES, (count,), generator=generator) for count in counts],
        ignore,
    )


def _gradient(result: DetectionLosses, *tensors: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(result.total, tensors, allow_unused=True, materialize_grads=True))


def test_ignore_regions_affect_only_unmatched_queries_inside() -> None:
    output = _output()
    with torch.no_grad():
        output.pred_boxes[0, :4] = torch.tensor([0.2, 0.2, 0.1, 0.1])
        output.pred_boxes[0, 4:] = torch.tensor([0.8, 0.8, 0.1, 0.1])
    none = torch.empty(0, 4)
    region = torch.tensor([[0.2, 0.2, 0.3, 0.3]])
    plain = DetectionCriterion()(output, _targets(), 5)
    ignored = DetectionCriterion()(output, _targets(ignore=[region, none, none]), 5)

    assert torch.equal(plain.matching_last, ignored.matching_last)
    matched = plain.matching_last[:2].tolist()
    expected = [query not in matched and query < 4 for query in range(QUERIES)]
    assert any(expected)
    before, after = (_gradient(result, output.pred_logits)[0] for result in (plain, ignored))
    changed = (before != after).any(-1)
    assert changed[0].tolist() == expected
    assert not changed[1:].any()
    assert torch.equal(after[0][torch.tensor(expected)], torch.zeros(sum(expected), CLASSES))
    assert ignored.logs["ignored_queries"].item() == sum(expected)
    for name in ("loss_bbox", "loss_giou", "loss_bbox_0"):
        assert torch.equal(plain.losses[name], ignored.losses[name])


@pytest.mark.parametrize(("overlap", "ignored"), [(0.4, True), (0.6, False)])
def test_ignore_overlap_is_the_smallest_ignored_share(overlap: float, ignored: bool) -> None:
    output = _output(layers=1)
    with torch.no_grad():
        output.pred_boxes[1] = torch.tensor([0.5, 0.5, 0.2, 0.2])
    half = torch.tensor([[0.45, 0.5, 0.1, 0.4]])
    ignore = [torch.empty(0, 4), half, torch.empty(0, 4)]
    result = DetectionCriterion(ignore_overlap=overlap)(output, _targets(ignore=ignore), 5)
    assert result.logs["ignored_queries"].item() == (QUERIES if ignored else 0)


def test_batch_without_objects_has_only_class_loss() -> None:
    output = _output()
    result = DetectionCriterion()(output, _targets((0, 0, 0)), 0)
    logits, boxes = _gradient(result, output.pred_logits, output.pred_boxes)
    assert result.losses["loss_ce"] > 0 and result.losses["loss_bbox"] == 0 and result.losses["loss_giou"] == 0
    assert logits.abs().sum() > 0 and boxes.abs().sum() == 0
    assert result.matching_last.shape == (0,)


def test_more_objects_than_queries_supervise_each_query_once() -> None:
    output = _output(layers=1)
    result = DetectionCriterion()(output, _targets((QUERIES + 3, 0, 0)), QUERIES + 3)
    assert sorted(result.matching_last.tolist()) == [-1] * 3 + list(range(QUERIES))
    assert torch.isfinite(result.total)


def test_frame_of_weight_zero_has_no_loss() -> None:
    output = _output()
    weighted = DetectionCriterion()(output, _targets(), 5, torch.tensor([1.0, 1.0, 0.0]))
    logits, boxes = _gradient(weighted, output.pred_logits, output.pred_boxes)
    assert logits[2].abs().sum() == 0 and boxes[2].abs().sum() == 0
    first_two = SimpleNamespace(
        pred_logits=output.pred_logits[:2],
        pred_boxes=output.pred_boxes[:2],
        aux=[(logits[:2], boxes[:2]) for logits, boxes in output.aux],
    )
    targets = _targets()
    shorter = DetectionTargets(targets.boxes_cxcywh[:2], targets.classes[:2], targets.frames[:2], [2, 0])
    torch.testing.assert_close(weighted.total, DetectionCriterion()(first_two, shorter, 5).total)


def test_half_precision_predictions_give_a_float32_loss() -> None:
    output = _output(dtype=torch.bfloat16)
    exact = SimpleNamespace(
        pred_logits=output.pred_logits.float(),
        pred_boxes=output.pred_boxes.float(),
        aux=[(logits.float(), boxes.float()) for logits, boxes in output.aux],
    )
    with torch.autocast("cpu", torch.bfloat16):
        result = DetectionCriterion()(output, _targets(), 5)
    assert result.total.dtype == torch.float32
    assert torch.equal(result.total, DetectionCriterion()(exact, _targets(), 5).total)


def test_without_earlier_layers_both_matchings_are_of_the_last_layer() -> None:
    result = DetectionCriterion()(_output(layers=1), _targets(), 5)
    assert torch.equal(result.matching_last, result.matching_published)
    assert set(result.losses) == {"loss_ce", "loss_bbox", "loss_giou"}
