"""Training step: frames with gradient, padding clips, skipped batches, and precision."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from motip.config import Config
from motip.data.batch import ClipBatch
from motip.errors import MotipError
from motip.model import MOTIP
from motip.train.collectives import SingleProcess
from motip.train.optimizer import build_optimizer
from motip.train.step import StepLosses, TrainStep, autocast_dtype
from tests.helpers.small_training import assert_same_gradients, clip, gradients, small_config, small_model, together

ORDER = torch.tensor([2, 0, 1])


def _step(config: Config) -> TrainStep:
    return TrainStep(small_model(config), config, SingleProcess())


def _run(batch: ClipBatch, **changes: Any) -> tuple[StepLosses, dict[str, torch.Tensor | None], MOTIP]:
    step = _step(small_config(**changes))
    losses = step.accumulate(batch, ORDER)
    return losses, gradients(step.model), step.model


@pytest.mark.parametrize(
    "changes",
    [
        {"DETR_NUM_CHECKPOINT_FRAMES": 1},
        {"DETR_NUM_CHECKPOINT_FRAMES": 3},
        {"DETR_NUM_CHECKPOINT_FRAMES": 9},
        {"MEMORY_EFFICIENT": True},
        {"USE_DECODER_CHECKPOINT": True},
    ],
)
def test_chunks_and_recomputation_give_the_same_gradients(changes: dict[str, Any]) -> None:
    batch = together(clip(0), clip(1, (1, 4, 2)))
    losses, expected, _ = _run(batch)
    other, found, _ = _run(batch, **changes)
    assert_same_gradients(found, expected)
    assert other.values == pytest.approx(losses.values, rel=1e-5)


def test_only_the_first_frames_of_the_order_have_a_gradient() -> None:
    """With one frame with gradient, the pixels of the other frames do not change the gradient of the detection loss."""
    batch = clip(0, (2, 2, 2))
    config = small_config(DETR_NUM_TRAIN_FRAMES=1, ID_LOSS_WEIGHT=0.0)
    seen = []
    for changed_frame in (None, 0, 1, 2):
        altered = dataclasses.replace(batch, images=batch.images.clone())
        if changed_frame is not None:
            altered.images[:, changed_frame] = 255 - altered.images[:, changed_frame]
        step = _step(config)
        step.accumulate(altered, torch.tensor([1, 2, 0]))
        seen.append(step.model.detr.query_embed.weight.grad.clone())
    torch.testing.assert_close(seen[1], seen[0])
    torch.testing.assert_close(seen[3], seen[0])
    assert not torch.allclose(seen[2], seen[0])


def test_zero_training_frames_freeze_the_detector() -> None:
    config = small_config(DETR_NUM_TRAIN_FRAMES=0)
    model = small_model(config)
    optimizer = build_optimizer(model, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = TrainStep(model, config, SingleProcess())
    losses = step.accumulate(clip(0), ORDER)
    norms = step.apply(optimizer)
    assert losses.values["detr_loss"] > 0 and norms["detr_grad_norm"] == 0 and norms["other_grad_norm"] > 0
    moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"trajectory_modeling", "id_decoder"}


def test_generator_determines_the_frame_order() -> None:
    values = []
    for seed in (1, 1, 3):
        step = _step(small_config())
        step.accumulate(clip(0), generator=torch.Generator().manual_seed(seed))
        values.append(step.model.detr.query_embed.weight.grad.clone())
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


def test_clip_of_weight_zero_has_no_effect() -> None:
    padded = together(clip(0), clip(1, (4, 4, 4)))
    padded.weights = torch.tensor([1.0, 0.0])
    losses, found, _ = _run(padded)
    alone, expected, _ = _run(clip(0))
    assert losses == alone and losses.clips == 1 and losses.objects == 9
    assert_same_gradients(found, expected, tolerance=0)


def test_batch_of_weight_zero_keeps_the_weights() -> None:
    config = small_config()
    step = _step(config)
    optimizer = build_optimizer(step.model, config)
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    padding = clip(0)
    padding.weights = torch.zeros(1)
    losses = step.accumulate(padding, ORDER)
    step.apply(optimizer)
    assert losses.values["loss"] == 0 and losses.clips == 0 and not losses.skipped
    assert all(torch.equal(p, before[name]) for name, p in step.model.named_parameters())


def test_clips_without_objects() -> None:
    losses, found, _ = _run(clip(0, (0, 0, 0)))
    assert losses.values["id_loss"] == 0 and losses.values["loss_bbox"] == 0 and losses.values["loss_ce"] > 0
    assert losses.objects == 0 and losses.id_targets == 0
    assert all(gradient is None or torch.isfinite(gradient).all() for gradient in found.values())
    assert found["detr.class_embed.1.weight"].abs().sum() > 0


@pytest.mark.parametrize("focal", [False, True])
def test_all_id_targets_masked(focal: bool) -> None:
    batch = clip(0)
    batch.slots.unknown_masks[:] = True
    losses, found, _ = _run(batch, USE_FOCAL_LOSS=focal)
    assert losses.values["id_loss"] == 0 and losses.id_targets == 0
    assert all(gradient is None or torch.isfinite(gradient).all() for gradient in found.values())


def test_more_objects_than_queries() -> None:
    losses, found, _ = _run(clip(0, (2, 12, 3)), DETR_NUM_QUERIES=3)
    assert losses.values["loss"] > 0 and not losses.skipped
    assert all(gradient is None or torch.isfinite(gradient).all() for gradient in found.values())


def test_one_frame_and_detector_alone() -> None:
    still, _, _ = _run_order(clip(0, (3,)), torch.tensor([0]))
    assert still.values["id_loss"] == 0 and still.values["detr_loss"] > 0
    without = dataclasses.replace(clip(0), slots=None)
    only, found, model = _run_order(without, ORDER, ONLY_DETR=True)
    assert only.values["loss"] == only.values["detr_loss"] and model.id_decoder is None
    assert found["detr.query_embed.weight"] is not None


def _run_order(
    batch: ClipBatch, order: torch.Tensor, **changes: Any
) -> tuple[StepLosses, dict[str, torch.Tensor | None], MOTIP]:
    step = _step(small_config(**changes))
    return step.accumulate(batch, order), gradients(step.model), step.model


def test_gradient_of_the_id_loss_reaches_the_detector_through_the_supervising_layer() -> None:
    """Without the detection loss the detector's gradient comes from the ID loss alone."""
    off = {"DETR_CLS_LOSS_COEF": 0.0, "DETR_BBOX_LOSS_COEF": 0.0, "DETR_GIOU_LOSS_COEF": 0.0}
    _, last, _ = _run(clip(0), **off, INIT_GRID_QUERIES=False)
    _, published, _ = _run(clip(0), **off, ID_SUPERVISION_LAYER="published")
    name = "detr.query_embed.weight"
    assert last[name].abs().sum() > 0 and not torch.allclose(last[name], published[name])


def test_accumulated_batches_are_a_mean() -> None:
    config = small_config(ACCUMULATE_STEPS=2)
    step = _step(config)
    step.accumulate(clip(0), ORDER)
    step.accumulate(clip(1), ORDER)
    found = gradients(step.model)
    halves = [_run(clip(seed))[1] for seed in (0, 1)]
    mean = {name: None if g is None else (g + halves[1][name]) / 2 for name, g in halves[0].items()}
    assert_same_gradients(found, mean)
    tail = _step(config)
    tail.accumulate(clip(0), ORDER, divisor=1)
    assert_same_gradients(gradients(tail.model), halves[0], tolerance=0)


@pytest.mark.parametrize("separate", [True, False])
def test_separate_and_joint_clip_norms(separate: bool) -> None:
    config = small_config(SEPARATE_CLIP_NORM=separate, MAX_CLIP_NORM=0.05)
    step = _step(config)
    optimizer = build_optimizer(step.model, config)
    step.accumulate(clip(0), ORDER)
    raw = gradients(step.model)
    clipped: dict[str, torch.Tensor | None] = {}
    optimizer.register_step_pre_hook(lambda *_: clipped.update(gradients(step.model)))
    norms = step.apply(optimizer)

    def norm(grads: dict[str, torch.Tensor | None], detr: bool | None) -> float:
        chosen = [g for n, g in grads.items() if g is not None and (detr is None or ("detr" in n) == detr)]
        return torch.cat([g.flatten() for g in chosen]).norm().item()

    if separate:
        expected = {"detr_grad_norm": norm(raw, True), "other_grad_norm": norm(raw, False)}
        assert norm(clipped, True) == pytest.approx(0.05, rel=1e-3)
        assert norm(clipped, False) == pytest.approx(0.05, rel=1e-3)
    else:
        expected = dict.fromkeys(("detr_grad_norm", "other_grad_norm"), norm(raw, None))
        assert norm(clipped, None) == pytest.approx(0.05, rel=1e-3)
    assert norms == pytest.approx(expected, rel=1e-4)
    assert all(parameter.grad is None for parameter in step.model.parameters())


def test_batch_with_nonfinite_loss_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    config = small_config(ACCUMULATE_STEPS=2)
    step = _step(config)
    optimizer = build_optimizer(step.model, config)
    step.accumulate(clip(0), ORDER)
    good = gradients(step.model)
    bad = clip(7)
    bad.boxes_cxcywh[0][1][0, 0] = float("nan")
    losses = step.accumulate(bad, ORDER)
    assert losses.skipped and step.counters.nonfinite_losses == 1 and step.counters.names == ["clip 7"]
    assert "clip 7" in caplog.text and "loss_bbox" in caplog.text
    assert_same_gradients(gradients(step.model), good, tolerance=0)
    assert step.apply(optimizer)["detr_grad_norm"] > 0

    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    step.accumulate(bad, ORDER)
    assert step.apply(optimizer) == {}
    assert all(torch.equal(p, before[name]) for name, p in step.model.named_parameters())


def test_step_with_nonfinite_gradient_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    config = small_config()
    step = _step(config)
    optimizer = build_optimizer(step.model, config)
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    step.accumulate(clip(0), ORDER)
    step.model.detr.query_embed.weight.grad[0, 0] = float("inf")
    step.apply(optimizer)
    assert step.counters.nonfinite_gradients == 1
    assert "gradient is not finite" in caplog.text
    assert all(torch.equal(p, before[name]) for name, p in step.model.named_parameters())
    step.accumulate(clip(0), ORDER)
    step.apply(optimizer)
    assert not torch.equal(step.model.detr.query_embed.weight, before["detr.query_embed.weight"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns_and_agrees_with_float32(precision: str) -> None:
    config = small_config(MIXED_PRECISION=precision, MAX_CLIP_NORM=0.1)
    step = _step(config)
    optimizer = build_optimizer(step.model, config)
    before = step.model.detr.query_embed.weight.detach().clone()
    exact, _, _ = _run(clip(0))
    losses = step.accumulate(clip(0), ORDER)
    assert losses.values["loss"] == pytest.approx(exact.values["loss"], rel=2e-2)
    for _ in range(12):  # an fp16 scaler may first lower its scale
        step.apply(optimizer)
        losses = step.accumulate(clip(0), ORDER)
    assert losses.values["loss"] < exact.values["loss"]
    assert not torch.equal(step.model.detr.query_embed.weight, before)
    restored = _step(config)
    restored.load_state_dict(step.state_dict())
    assert restored.scaler.get_scale() == step.scaler.get_scale()
    assert restored.counters == step.counters


def test_loss_scale_exists_before_the_first_real_clip() -> None:
    config = small_config(MIXED_PRECISION="fp16")
    step = _step(config)
    optimizer = build_optimizer(step.model, config)
    padding = clip(0)
    padding.weights = torch.zeros(1)
    step.accumulate(padding, ORDER)
    step.apply(optimizer)
    before = step.model.detr.query_embed.weight.detach().clone()
    for _ in range(12):  # the scaler may first lower its scale
        step.accumulate(clip(0), ORDER)
        step.apply(optimizer)
    assert not torch.equal(step.model.detr.query_embed.weight, before)


def test_unset_precision() -> None:
    assert autocast_dtype(None, torch.device("cpu")) is None
    assert autocast_dtype("no", torch.device("cpu")) is None


def test_training_lowers_the_loss() -> None:
    config = small_config(LR=1e-3)
    step = _step(config)
    optimizer = build_optimizer(step.model, config)
    seen = []
    for _ in range(15):
        seen.append(step.accumulate(clip(0), ORDER).values)
        step.apply(optimizer)
    assert seen[-1]["detr_loss"] < 0.9 * seen[0]["detr_loss"]
    assert seen[-1]["id_loss"] < seen[0]["id_loss"]


def test_inconsistent_batches_are_an_error() -> None:
    step = _step(small_config())
    unknown_class = clip(0)
    unknown_class.classes[0][1][0] = 2
    with pytest.raises(MotipError, match="class"):
        step.accumulate(unknown_class, ORDER)
    beyond = clip(4)
    beyond.slots.trajectory_ann[0, 0, 1, 0] = 2
    with pytest.raises(MotipError, match=r"(?s)annotation that its frame does not have.*clip 4"):
        step.accumulate(beyond, ORDER)
    with pytest.raises(MotipError, match="ONLY_DETR"):
        step.accumulate(dataclasses.replace(clip(0), slots=None), ORDER)
    with pytest.raises(MotipError, match="no ID decoder"):
        TrainStep(small_model(small_config(ONLY_DETR=True)), small_config(), SingleProcess())
