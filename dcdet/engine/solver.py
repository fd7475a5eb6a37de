"""Optimiser and learning-rate schedule."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn

from dcdet.engine.runtime import Precision
from dcdet.errors import UserError, require


@dataclass(frozen=True)
class WarmupSpec:
    """Updates before number `steps` use `factor` times the learning rate, held or rising.

    `shape` "constant" holds it; "linear" rises from there, the first update being one step up;
    "closed" rises from the first update on, as in mmdetection, and, where `steps` is one more than
    they say, in torchvision and detectron2.
    """

    steps: int
    factor: float
    shape: Literal["constant", "linear", "closed"]

    def __post_init__(self) -> None:
        require(self.steps >= 0, "steps", "at least 0", self.steps)
        require(0 <= self.factor <= 1, "factor", "in [0, 1]", self.factor)


@dataclass(frozen=True)
class SolverSection:
    """SGD with momentum.

    Args:
        epochs: passes over the training set; fractions are allowed.
        lr: learning rate for a batch of `reference_batch` images. The real batch scales it
            linearly: Goyal et al., ImageNet in 1 Hour.
        gradient: whether the reference batch's images add up ("sum") or are averaged ("mean").
            The 2017 release's R-FCN and Faster R-CNN sum over GPUs of one image each, its FPN
            averages.
        momentum, weight_decay: of SGD; the decay is stated for the same `gradient`.
        rescale_momentum: past gradients keep the rate they were seen with when the rate changes,
            as in MXNet and Caffe; false: they take the new one, as in PyTorch.
        lr_multipliers, weight_decay_multipliers: factors by parameter name pattern
            ("roi_head.reduce.*": 3); of several that match, the last counts.
        milestones: epochs (fractions allowed) after which lr is multiplied by `lr_factor`.
        precision: of the forward pass; weights stay fp32.
        clip_gradient: largest L2 norm of the whole gradient, or None.
        max_bad_steps: training stops after so many non-finite steps in a row.
        log_every: steps between progress lines.
        checkpoint_every: epochs between checkpoints.
        keep_checkpoints: how many of the newest remain.
    """

    epochs: float
    lr: float
    reference_batch: int
    gradient: Literal["mean", "sum"]
    momentum: float
    weight_decay: float
    lr_multipliers: dict[str, float]
    weight_decay_multipliers: dict[str, float]
    warmup: WarmupSpec | None
    milestones: list[float]
    lr_factor: float
    precision: Precision
    clip_gradient: float | None
    max_bad_steps: int
    log_every: int
    checkpoint_every: float
    keep_checkpoints: int
    rescale_momentum: bool = True

    def __post_init__(self) -> None:
        for name in ("epochs", "lr", "reference_batch", "lr_factor", "checkpoint_every",
                     "max_bad_steps", "log_every", "keep_checkpoints"):  # fmt: skip
            require(getattr(self, name) > 0, name, "positive", getattr(self, name))
        require(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)
        require(self.weight_decay >= 0, "weight_decay", "at least 0", self.weight_decay)
        clip = self.clip_gradient
        require(clip is None or clip > 0, "clip_gradient", "positive or null", clip)
        for milestone in self.milestones:
            wanted = f"within the {self.epochs:g} epochs"
            require(0 < milestone <= self.epochs, "milestones", wanted, milestone)

    def scaled_lr(self, batch_size: int) -> float:
        """The learning rate on the gradient averaged over `batch_size` images."""
        reference = self.lr * (self.reference_batch if self.gradient == "sum" else 1)
        return reference * batch_size / self.reference_batch

    def averaged_decay(self) -> float:
        """The weight decay that goes with the averaged gradient."""
        return self.weight_decay / (self.reference_batch if self.gradient == "sum" else 1)


def learning_rate(
    update: int, base: float, warmup: WarmupSpec | None, milestones: Iterable[int], factor: float
) -> float:
    """The rate of update number `update`, counted from 1; `milestones` in updates.

    Source: lib/utils/lr_scheduler.py of the 2017 release, for a constant warm-up.
    """
    if warmup is not None and update < warmup.steps:
        share = 0.0
        if warmup.shape == "linear":
            share = update / warmup.steps
        elif warmup.shape == "closed":
            share = (update - 1) / (warmup.steps - 1)
        return base * (warmup.factor + (1 - warmup.factor) * share)
    return base * factor ** sum(update > milestone for milestone in milestones)


def build_optimizer(model: nn.Module, section: SolverSection) -> torch.optim.SGD:
    """SGD over the trainable parameters, grouped by multipliers.

    Each group keeps `lr_multiplier`. Raises UserError for a pattern that names no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for key in ("lr_multipliers", "weight_decay_multipliers"):
        for pattern in getattr(section, key):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UserError(f"solver.{key}", f"'{pattern}' matches no parameter",
                                f"parameters are named like '{names[-1]}'")  # fmt: skip
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key_of_group = (
                _multiplier(name, section.lr_multipliers),
                _multiplier(name, section.weight_decay_multipliers),
            )
            groups.setdefault(key_of_group, []).append(parameter)
    decay = section.averaged_decay()
    return torch.optim.SGD(
        [
            {"params": parameters, "lr_multiplier": lr, "lr": 0.0, "weight_decay": decay * wd}
            for (lr, wd), parameters in groups.items()
        ],
        momentum=section.momentum,
    )


def set_learning_rate(
    optimizer: torch.optim.SGD, rate: float, rescale_momentum: bool = True
) -> None:
    """Give every group `rate` times its multiplier.

    When the rate changes the momentum is rescaled, so that past gradients keep the rate they were
    seen with, as in MXNet and Caffe (Goyal et al., ImageNet in 1 Hour, section 3), unless
    `rescale_momentum` is false.
    """
    for group in optimizer.param_groups:
        old, new = group["lr"], rate * group["lr_multiplier"]
        if rescale_momentum and old != new and old > 0 and new > 0:
            for parameter in group["params"]:
                momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
                if momentum is not None:
                    momentum.mul_(old / new)
        group["lr"] = new


def milestones_in_updates(epochs: list[float], images: int, batch_size: int) -> list[int]:
    """Milestones in updates, for a set of `images` (mirrored copies included)."""
    return [math.floor(epoch * images / batch_size) for epoch in epochs]


def _multiplier(name: str, patterns: dict[str, float]) -> float:
    matching = [factor for pattern, factor in patterns.items() if fnmatchcase(name, pattern)]
    return matching[-1] if matching else 1.0
