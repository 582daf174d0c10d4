"""Parameter groups, frozen parameters and learning rates, compared with the recorded groups and torch's scheduler."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from motip.config import Config
from motip.errors import MotipError
from motip.model import ModelSpec, build_model
from motip.train.optimizer import LearningRates, build_optimizer, freeze_parameters, load_optimizer, parameter_groups
from tests.helpers.small_training import small_config, small_model


def _optimizer(config: Config) -> torch.optim.AdamW:
    return build_optimizer(small_model(config), config)


def test_groups_of_the_published_model(reference_dir: Path) -> None:
    config = Config(NUM_CLASSES=1, CLASSES=("person",))
    model = build_model(ModelSpec.from_config(config))
    groups = parameter_groups(model, config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with open(reference_dir / "param_groups.tsv", newline="") as file:
        expected = list(csv.DictReader(file, delimiter="\t"))
    found = [
        (str(number), names[id(parameter)], group["lr"], group.get("lr_scale", "-"))
        for number, group in enumerate(groups)
        for parameter in group["params"]
    ]
    assert len(found) == len(expected)
    for index, (row, (number, name, rate, scale)) in enumerate(zip(expected, found, strict=True)):
        assert (row["group"], row["key"], int(row["index_in_optimizer"])) == (number, name, index)
        assert rate == pytest.approx(float(row["lr"]))
        assert scale == "-" if row["lr_scale"] == "-" else scale == pytest.approx(float(row["lr_scale"]))


def test_optimizer_and_scheduler_state_have_the_published_layout(reference_dir: Path) -> None:
    layout = json.loads((reference_dir / "checkpoint_layout.json").read_text())
    config = small_config(SCHEDULER_MILESTONES=[6, 9])
    optimizer = _optimizer(config)
    rates = LearningRates(optimizer, config, steps_per_epoch=5)
    assert [sorted(group) for group in optimizer.state_dict()["param_groups"]] == layout["group_keys"]
    state = rates.state_dict()
    assert set(state) == set(layout["scheduler"])
    assert {str(epoch): times for epoch, times in state["milestones"].items()} == layout["scheduler"]["milestones"]
    assert state["base_lrs"] == pytest.approx(layout["scheduler"]["base_lrs"])


def test_every_parameter_decays_and_is_in_one_group() -> None:
    config = small_config(WEIGHT_DECAY=0.03)
    model = small_model(config)
    optimizer = build_optimizer(model, config)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.03}


def test_backbone_without_learning_rate_is_frozen() -> None:
    config = small_config(LR_BACKBONE=0.0)
    model = small_model(config)
    freeze_parameters(model, config)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "backbone.0" in name)
    assert parameter_groups(model, config)[0]["params"] == []
    trained = small_model(small_config())
    assert freeze_parameters(trained, small_config()) == []
    assert any(p.requires_grad for name, p in trained.named_parameters() if "backbone.0" in name)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(MotipError, match="trains nothing"):
        _optimizer(small_config(ONLY_DETR=True, DETR_NUM_TRAIN_FRAMES=0))


def test_rates_after_warm_up_are_those_of_multi_step_lr() -> None:
    config = small_config(LR=1e-3, SCHEDULER_MILESTONES=[2, 4], SCHEDULER_GAMMA=0.5)
    rates = LearningRates(_optimizer(config), config, steps_per_epoch=3)
    other = _optimizer(config)
    theirs = torch.optim.lr_scheduler.MultiStepLR(other, [2, 4], 0.5)
    for epoch in range(7):
        for step in range(3):
            assert rates.at(epoch, step) == pytest.approx([group["lr"] for group in other.param_groups])
        other.step()
        theirs.step()
    assert rates.at(6, 2)[3] == pytest.approx(1e-3 * 0.5**2), "after both milestones"


def test_warm_up_rises_linearly_to_the_full_rates() -> None:
    config = small_config(LR=1e-3, LR_WARMUP_EPOCHS=2, LR_BACKBONE=2e-5)
    optimizer = _optimizer(config)
    rates = LearningRates(optimizer, config, steps_per_epoch=4)
    full = [2e-5, 5e-5, 1e-3, 1e-3]
    for position in range(8):
        used = rates.set(position // 4, position % 4)
        assert used == pytest.approx([rate * (position + 1) / 8 for rate in full])
        assert [group["lr"] for group in optimizer.param_groups] == used
    assert rates.set(2, 0) == pytest.approx(full)


def test_short_keys_reach_the_rates() -> None:
    """LR_DROP: n drops after epoch n, LR_BACKBONE is absolute."""
    config = small_config(LR=1e-3, LR_DROP=3, LR_BACKBONE=1e-6, SCHEDULER_GAMMA=0.1)
    rates = LearningRates(_optimizer(config), config, steps_per_epoch=2)
    assert rates.at(2, 1)[0] == pytest.approx(1e-6) and rates.at(3, 0)[0] == pytest.approx(1e-7)
    assert rates.at(2, 1)[3] == pytest.approx(1e-3) and rates.at(3, 0)[3] == pytest.approx(1e-4)


def test_scheduler_state_is_exchangeable_with_torch() -> None:
    config = small_config(LR=1e-3, SCHEDULER_MILESTONES=[2, 4], SCHEDULER_GAMMA=0.5)
    rates = LearningRates(_optimizer(config), config, steps_per_epoch=3)
    rates.set(3, 2)
    other = _optimizer(config)
    theirs = torch.optim.lr_scheduler.MultiStepLR(other, [9], 0.1)
    theirs.load_state_dict(rates.state_dict())
    for group, rate in zip(other.param_groups, theirs.get_last_lr(), strict=True):
        group["lr"] = rate
    other.step()
    theirs.step()
    assert [group["lr"] for group in other.param_groups] == pytest.approx(rates.at(4, 0))

    changed = config.replaced(SCHEDULER_MILESTONES=[9], LR=1e-5)
    restored = LearningRates(_optimizer(changed), changed, steps_per_epoch=3)
    restored.load_state_dict(theirs.state_dict())
    assert restored.epoch == 4
    assert restored.at(5, 0) == pytest.approx(rates.at(5, 0))


def test_state_of_another_optimiser_is_an_error() -> None:
    config = small_config()
    rates = LearningRates(_optimizer(config), config, steps_per_epoch=3)
    single = torch.optim.AdamW([nn.Parameter(torch.ones(1))])
    with pytest.raises(MotipError, match="RESUME_SCHEDULER"):
        rates.load_state_dict(torch.optim.lr_scheduler.MultiStepLR(single, [1]).state_dict())
    with pytest.raises(MotipError, match="no steps"):
        LearningRates(_optimizer(config), config, steps_per_epoch=0)


@pytest.mark.parametrize("before", [True, False])
def test_moments_of_another_kernel_are_loaded(before: bool) -> None:
    """A checkpoint of an unfused optimiser resumes with the fused kernel, and gives the same steps."""
    config = small_config()
    gradients = [torch.Generator().manual_seed(seed) for seed in (1, 1)]
    models = [small_model(config), small_model(config)]
    optimizers = [build_optimizer(model, config) for model in models]
    for group in optimizers[0].param_groups:
        group["fused"] = before
    for step in range(2):
        for model, optimizer, generator in zip(models, optimizers, gradients, strict=True):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        if step == 0:
            load_optimizer(optimizers[1], copy.deepcopy(optimizers[0].state_dict()))
            models[1].load_state_dict(models[0].state_dict())
    assert all(group["fused"] for group in optimizers[1].param_groups)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)
