"""The learning-rate schedule and SGD against recorded and hand-made values."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from dcdet import load_config
from dcdet.engine.solver import (
    SolverSection,
    WarmupSpec,
    build_optimizer,
    learning_rate,
    milestones_in_updates,
    set_learning_rate,
)
from dcdet.errors import UserError
from dcdet.registry import check


def section(**changes: object) -> SolverSection:
    values = {
        "epochs": 7, "lr": 0.0005, "reference_batch": 4, "gradient": "sum", "momentum": 0.9,
        "weight_decay": 0.0005, "lr_multipliers": {}, "weight_decay_multipliers": {},
        "warmup": None, "milestones": [4.83], "lr_factor": 0.1, "precision": "fp32",
        "clip_gradient": None, "max_bad_steps": 3, "log_every": 1, "checkpoint_every": 1,
        "keep_checkpoints": 2,
    }  # fmt: skip
    return SolverSection(**(values | changes))  # type: ignore[arg-type]


def test_schedule_equals_the_release(shared: Path) -> None:
    arrays = np.load(shared / "golden" / "ops" / "utils_lr.npz")
    attrs = json.loads(str(arrays["attrs"]))
    warmup = WarmupSpec(attrs["warmup_step"], attrs["warmup_lr"] / attrs["base_lr"], "constant")
    ours = [
        learning_rate(n, attrs["base_lr"], warmup, attrs["step"], attrs["factor"])
        for n in range(1, 80)
    ]
    assert ours == pytest.approx(arrays["lr"][1:].tolist(), rel=1e-12)


def test_linear_warmup_rises_to_the_base_rate() -> None:
    warmup = WarmupSpec(10, 0.1, "linear")
    rates = [learning_rate(n, 1.0, warmup, [], 0.1) for n in range(1, 12)]
    assert rates == pytest.approx([0.19, 0.28, 0.37, 0.46, 0.55, 0.64, 0.73, 0.82, 0.91, 1, 1])


def test_closed_warmup_is_mmdetections() -> None:
    """MMDET.md, 11: lr(i) = 0.02 * (0.001 + 0.999 * i / 499) for i = 0..499, then 0.02."""
    warmup = WarmupSpec(500, 0.001, "closed")
    rates = [learning_rate(n, 0.02, warmup, [], 0.1) for n in range(1, 510)]
    wanted = [0.02 * (0.001 + 0.999 * min(i, 499) / 499) for i in range(509)]
    assert rates == pytest.approx(wanted, rel=1e-12)
    for steps in (0, 1):
        assert learning_rate(1, 0.02, WarmupSpec(steps, 0.1, "closed"), [], 0.1) == 0.02


@pytest.mark.parametrize("config", ["torchvision", "detectron2"])
def test_closed_warmup_with_one_more_step_is_torchvisions_and_detectron2s(config: str) -> None:
    """factor + (1 - factor) * i / 1000 for the steps i = 0..1000, as torch's LinearLR."""
    path = ROOT / "configs" / config / "faster_rcnn_r50_fpn_coco.yaml"
    solver = check(load_config(path)).solver
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=solver.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-3, total_iters=1000)
    for update in range(1, 1010):
        ours = learning_rate(update, solver.lr, solver.warmup, [], 0.1)
        assert ours == pytest.approx(schedule.get_last_lr()[0], rel=1e-9), update
        optimizer.step()
        schedule.step()


def test_milestones_are_cut_as_in_the_release() -> None:
    assert milestones_in_updates([4.83], 33102, 4) == [int(4.83 * 33102 / 4)]


def test_a_summed_gradient_is_an_averaged_one_with_a_larger_rate() -> None:
    """One step of the release's rule, written out, and ours on the averaged gradient."""
    solver = section()
    weight, gradients = torch.tensor([2.0]), torch.tensor([[0.5], [1.0], [-0.25], [3.0]])
    released = weight - solver.lr * (gradients.sum(0) + solver.weight_decay * weight)
    ours = weight - solver.scaled_lr(4) * (gradients.mean(0) + solver.averaged_decay() * weight)
    torch.testing.assert_close(ours, released)
    assert solver.scaled_lr(8) == 2 * solver.scaled_lr(4)
    assert section(gradient="mean").scaled_lr(2) == 0.0005 / 2


def test_multipliers_reach_their_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    optimizer = build_optimizer(
        model,
        section(
            lr_multipliers={"1.*": 3.0}, weight_decay_multipliers={"*.bias": 0.0}, gradient="mean"
        ),
    )
    set_learning_rate(optimizer, 0.1)
    found = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert id(model[0].weight) not in found
    assert found[id(model[0].bias)] == pytest.approx((0.1, 0.0))
    assert found[id(model[1].weight)] == pytest.approx((0.3, 0.0005))
    assert found[id(model[1].bias)] == pytest.approx((0.3, 0.0))


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(UserError, match="matches no parameter"):
        build_optimizer(nn.Linear(1, 1), section(lr_multipliers={"head.*": 2.0}))


def test_momentum_keeps_the_rate_it_was_gathered_with() -> None:
    """MXNet: m = 0.9 m - lr g; w = w + m. With a rate that changes half-way."""
    rates = [0.1] * 3 + [0.01] * 3
    weight, momentum = 1.0, 0.0
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    optimizer = build_optimizer(model, section(weight_decay=0.0, gradient="mean"))
    for rate in rates:
        momentum = 0.9 * momentum - rate * 2 * weight
        set_learning_rate(optimizer, rate)
        model.weight.grad = 2 * model.weight.detach()
        optimizer.step()
        weight += momentum
        assert model.weight.item() == pytest.approx(weight, rel=1e-5)


def test_momentum_may_take_the_new_rate_as_torchs() -> None:
    """m = 0.9 m + g + decay w; w = w - lr m, with a rate that changes half-way."""
    rates = [0.1] * 3 + [0.01] * 3
    solver = section(gradient="mean", rescale_momentum=False, weight_decay=0.01)
    models = [nn.Linear(1, 1, bias=False) for _ in range(3)]
    for model in models:
        nn.init.constant_(model.weight, 1.0)
    ours, rescaled = (build_optimizer(model, solver) for model in models[:2])
    torchs = torch.optim.SGD(models[2].parameters(), lr=1.0, momentum=0.9, weight_decay=0.01)
    for rate in rates:
        set_learning_rate(ours, rate, solver.rescale_momentum)
        set_learning_rate(rescaled, rate)
        torchs.param_groups[0]["lr"] = rate
        for model, optimizer in zip(models, (ours, rescaled, torchs), strict=True):
            model.weight.grad = 2 * model.weight.detach()
            optimizer.step()
    assert torch.equal(models[0].weight, models[2].weight)
    assert (models[1].weight - models[2].weight).abs() > 0.1


@pytest.mark.parametrize(
    ("key", "value"),
    [("lr", -1.0), ("epochs", 0), ("momentum", 1.0), ("milestones", [8.0]), ("clip_gradient", 0.0),
     ("weight_decay", -0.1), ("lr", float("nan"))],
)  # fmt: skip
def test_values_out_of_range_are_named(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{key}: "):
        section(**{key: value})
