"""AdamW parameter groups and learning-rate schedule."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import torch
from torch import nn

from motip.config import Config
from motip.errors import MotipError

GROUP_NAMES = ("backbone", "linear_proj", "dictionary", "rest")
"""Names of the groups of `parameter_groups`, in order; `linear_proj`: sampling points, `dictionary`: ID words."""


def freeze_parameters(model: nn.Module, config: Config) -> list[str]:
    """Disable the gradient of parameters that the configuration does not train; returns their names.

    The backbone is frozen if its learning rate is 0, the entire detector if DETR_NUM_TRAIN_FRAMES is 0 (then no frame
    has a gradient).
    """
    frozen = []
    backbone_frozen = config.LR * config.backbone_lr_scale == 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_backbone = any(part in name for part in config.LR_BACKBONE_NAMES)
        if (backbone_frozen and in_backbone) or (config.DETR_NUM_TRAIN_FRAMES == 0 and "detr" in name):
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """The four groups of the published optimiser, in its order: backbone, sampling points, ID words, the rest.

    A parameter belongs to the first group one of whose names is a substring of its own. The optimiser state of a
    published checkpoint is indexed by this order. The last group has no `lr_scale`, as published.
    """
    named_groups: list[tuple[tuple[str, ...], float]] = [
        (config.LR_BACKBONE_NAMES, config.backbone_lr_scale),
        (config.LR_LINEAR_PROJ_NAMES, config.LR_LINEAR_PROJ_SCALE),
        (config.LR_DICTIONARY_NAMES, config.LR_DICTIONARY_SCALE),
    ]
    members: list[list[nn.Parameter]] = [[], [], [], []]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matches = (i for i, (parts, _) in enumerate(named_groups) if any(part in name for part in parts))
            members[next(matches, 3)].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": params, "lr": config.LR * scale, "lr_scale": scale}
        for params, (_, scale) in zip(members[:3], named_groups, strict=True)
    ]
    return [*groups, {"params": members[3], "lr": config.LR}]


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Freeze untrained parameters and build AdamW over the rest; weight decay applies to every parameter, as published.

    Raises:
        MotipError: no parameter is left to train.
    """
    freeze_parameters(model, config)
    groups = parameter_groups(model, config)
    if not any(group["params"] for group in groups):
        raise MotipError(
            "the configuration trains nothing",
            where="DETR_NUM_TRAIN_FRAMES and ONLY_DETR",
            found=f"{config.DETR_NUM_TRAIN_FRAMES} and {config.ONLY_DETR}",
            fix="set DETR_NUM_TRAIN_FRAMES to at least 1",
        )
    # Fused: one kernel for all parameters instead of a dozen small operations per parameter.
    return torch.optim.AdamW(groups, lr=config.LR, weight_decay=config.WEIGHT_DECAY, fused=True)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load moments and learning rates. `fused` and `foreach` keep the values of ``optimizer``, not of the state."""
    kernels: list[dict[str, Any]] = [
        {key: group[key] for key in ("fused", "foreach") if key in group} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, kernel in zip(optimizer.param_groups, kernels, strict=True):
        group.update(kernel)
        if kernel.get("fused"):
            for parameter in group["params"]:
                own = optimizer.state.get(parameter, {})
                if "step" in own:  # on the device of the weights for the fused kernel, on the CPU for the others
                    own["step"] = torch.as_tensor(own["step"], dtype=torch.float32, device=parameter.device)


class LearningRates:
    """The learning rate as a function of (epoch, step): linear warm-up, then a drop at each milestone.

    A pure function of the position, so a resumed run needs no replay. Milestones inside the warm-up do not apply, as
    published. `state_dict` has the layout of torch's MultiStepLR, so that published tools can read the checkpoints.

    Args:
        optimizer: its groups' `initial_lr` (or `lr`, the first time) are the full rates.
        config: LR_WARMUP_EPOCHS, SCHEDULER_GAMMA and the resolved milestones.
        steps_per_epoch: batches (not optimiser steps) per epoch.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: Config, steps_per_epoch: int) -> None:
        if steps_per_epoch < 1:
            raise MotipError(
                "an epoch has no steps", where="steps_per_epoch", found=steps_per_epoch, expected="1 or more"
            )
        self.optimizer = optimizer
        self.steps_per_epoch = steps_per_epoch
        self.warmup_epochs = config.LR_WARMUP_EPOCHS
        self.gamma = config.SCHEDULER_GAMMA
        self.milestones = sorted(config.lr_milestones)
        self.epoch = 0
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.base_rates = [float(group["initial_lr"]) for group in optimizer.param_groups]

    def at(self, epoch: int, step: int) -> list[float]:
        """Rates of the groups at a step of an epoch, both 0-based."""
        if epoch < self.warmup_epochs:
            ratio = (epoch * self.steps_per_epoch + step + 1) / (self.warmup_epochs * self.steps_per_epoch)
        else:
            ratio = self.gamma ** bisect_right(self.milestones, epoch)
        return [rate * ratio for rate in self.base_rates]

    def set(self, epoch: int, step: int) -> list[float]:
        """Write the rates of this position into the optimiser; returns them."""
        self.epoch = epoch
        rates = self.at(epoch, step)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return rates

    def state_dict(self) -> dict[str, Any]:
        """Position and schedule in the layout of torch's MultiStepLR; plain values."""
        rates = [rate * self.gamma ** bisect_right(self.milestones, self.epoch) for rate in self.base_rates]
        return {
            "milestones": {milestone: self.milestones.count(milestone) for milestone in self.milestones},
            "gamma": self.gamma,
            "base_lrs": list(self.base_rates),
            "last_epoch": self.epoch,
            "_step_count": self.epoch + 1,
            "_is_initial": False,
            "_get_lr_called_within_step": False,
            "_last_lr": rates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load schedule, full rates and position from a checkpoint of this package or a published one.

        Raises:
            MotipError: the number of parameter groups differs.
        """
        if len(state["base_lrs"]) != len(self.base_rates):
            raise MotipError(
                "the saved learning rates do not fit this optimiser",
                where="scheduler state",
                found=f"{len(state['base_lrs'])} groups",
                expected=f"{len(self.base_rates)}",
                fix="set RESUME_SCHEDULER: False",
            )
        self.base_rates = [float(rate) for rate in state["base_lrs"]]
        self.gamma = float(state["gamma"])
        self.milestones = sorted(epoch for epoch, times in state["milestones"].items() for _ in range(times))
        self.epoch = int(state["last_epoch"])
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["initial_lr"] = rate
