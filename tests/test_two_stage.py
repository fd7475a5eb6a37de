"""Every system, whole: tiny networks with random weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import ROOT

from dcdet import build_model, load_config
from dcdet.structures import Batch, Target

SYSTEMS = [f"{system}{kind}" for system in ("rfcn", "faster_rcnn", "fpn") for kind in ("", "_dcn")]
SMALL = ["model.rpn.channels=16", "model.rpn.train.post_nms=40", "model.rpn.test.post_nms=40"]


def make(system: str, *overrides: str) -> Any:
    torch.manual_seed(0)
    path = ROOT / "configs" / "small" / f"{system}_r18_voc.yaml"
    return build_model(load_config(path, [*SMALL, *overrides]))


def make_batch(objects: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 96, 128), generator=generator, dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 12.0, 60.0, 70.0], [30.0, 20.0, 118.0, 90.0]])[:objects]
    target = Target(0, (48, 64), boxes, torch.tensor([0, 2])[:objects], torch.zeros(0, 4))
    return Batch(images, [(96, 128), (90, 120)], [target, target], [2.0, 2.0], [1, 2])


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("objects", [2, 0])
def test_a_training_step_reaches_every_parameter(system: str, objects: int) -> None:
    model = make(system).train()
    losses, stats = model(make_batch(objects))
    assert sorted(losses) == ["roi_box", "roi_score", "rpn_box", "rpn_score"]
    sum(losses.values()).backward()
    assert torch.stack([*losses.values(), *stats.values()]).isfinite().all()
    if objects == 0:
        assert losses["rpn_box"] == losses["roi_box"] == 0
    else:
        assert losses["rpn_box"] > 0
        assert losses["roi_box"] > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_step_follows_its_seeds(system: str) -> None:
    # Few samples, so that something has to be drawn.
    few = ["model.rpn.samples=8"]
    if system.startswith("faster"):
        few.append("model.roi_head.samples.number=8")
    model, batch = make(system, *few).train(), make_batch(2)
    losses = [
        torch.stack(list(model(replace(batch, seeds=seeds))[0].values())).detach()
        for seeds in ([1, 2], [1, 2], [3, 4])
    ]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("system", SYSTEMS)
def test_detections_lie_in_the_original_image(system: str) -> None:
    model, batch = make(system, "model.postprocess.score_threshold=0").eval(), make_batch(0)
    found = model.predict(batch)
    for one, (height, width) in zip(found, batch.sizes, strict=True):
        assert 50 < len(one.scores) <= 100
        assert one.boxes.min() >= 0
        assert (one.boxes[:, 2] <= width / 2).all()
        assert (one.boxes[:, 3] <= height / 2).all()
        assert (one.scores.diff() <= 0).all()
        assert one.labels.min() >= 0
        assert one.labels.max() <= 2
    # Images do not touch each other: the second alone gives the same.
    alone = Batch(batch.images[1:], batch.sizes[1:], batch.targets[1:], [2.0], [2])
    torch.testing.assert_close(model.predict(alone)[0].scores, found[1].scores)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_network_without_proposals_finds_nothing(system: str) -> None:
    model = make(system).eval()
    model.rpn.delta.bias.data.fill_(float("nan"))
    found = model.predict(make_batch(0))
    assert [one.boxes.shape for one in found] == [(0, 4), (0, 4)]
    losses, _ = model.train()(make_batch(0))
    assert losses["roi_score"] == 0
