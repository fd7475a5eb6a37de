"""Every system, whole: tiny networks with random weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import ROOT

from dcdet import build_model, load_config
from dcdet.structures import Batch, Target

SYSTEMS = [f"{system}{kind}" for system in ("rfcn", "faster_rcnn", "fpn") for kind in ("", "_dcn")]
SMALL = [
    "model.rpn.channels=16", "model.rpn.train.post_nms=40", "model.rpn.test.post_nms=40",
    "model.postprocess.score_threshold=0",
]  # fmt: skip


def make(system: str, *overrides: str) -> Any:
    torch.manual_seed(0)
    path = ROOT / "configs" / "small" / f"{system}_r18_voc.yaml"
    return build_model(load_config(path, [*SMALL, *overrides]))


@pytest.fixture(scope="module", params=SYSTEMS)
def model(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


def make_batch(objects: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 64, 96), generator=generator, dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 12.0, 50.0, 60.0], [30.0, 20.0, 90.0, 62.0]])[:objects]
    target = Target(0, (32, 48), boxes, torch.tensor([0, 2])[:objects], torch.zeros(0, 4))
    return Batch(images, [(64, 96), (60, 90)], [target, target], [2.0, 2.0], [1, 2])


@pytest.mark.parametrize("objects", [2, 0])
def test_a_training_step_reaches_every_parameter(model: Any, objects: int) -> None:
    model.train().zero_grad()
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


def test_draws_follow_the_batchs_seeds() -> None:
    """Of anchors and of RoIs; few, so that something has to be drawn."""
    model = make("faster_rcnn", "model.rpn.samples=8", "model.roi_head.samples.number=8").train()
    batch = make_batch(2)
    with torch.no_grad():
        first, again, other = (
            model(replace(batch, seeds=seeds))[0] for seeds in ([1, 2], [1, 2], [3, 4])
        )
    for name in ("rpn_score", "roi_score"):
        assert first[name] == again[name], name
        assert first[name] != other[name], name


def test_detections_lie_in_the_original_image(model: Any) -> None:
    batch = make_batch(0)
    found = model.eval().predict(batch)
    for one, (height, width) in zip(found, batch.sizes, strict=True):
        assert 20 < len(one.scores) <= 100
        assert one.boxes.min() >= 0
        assert (one.boxes[:, 2] <= width / 2).all()
        assert (one.boxes[:, 3] <= height / 2).all()
        assert (one.scores.diff() <= 0).all()
        assert one.labels.min() >= 0
        assert one.labels.max() <= 2
    # Images do not touch each other: the second alone gives the same.
    alone = Batch(batch.images[1:], batch.sizes[1:], batch.targets[1:], [2.0], [2])
    torch.testing.assert_close(model.predict(alone)[0].scores, found[1].scores)


def test_each_axis_goes_back_by_its_own_scale(model: Any) -> None:
    model.eval()
    batch = make_batch(0)
    [(plain, _), _] = model.candidates(replace(batch, scales=[1.0, 1.0]))
    [(found, _), _] = model.candidates(replace(batch, scales=[(2.0, 0.5), 1.0]))
    torch.testing.assert_close(found, plain / plain.new_tensor([0.5, 2.0, 0.5, 2.0]))
    floats = replace(batch, images=batch.images.float())
    of_floats, of_bytes = model.features(floats), model.features(batch)
    assert all(torch.equal(of_floats[name], of_bytes[name]) for name in of_bytes)


def test_a_network_without_proposals_finds_nothing(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        model.rpn.delta,
        "bias",
        torch.nn.Parameter(torch.full_like(model.rpn.delta.bias, torch.nan)),
    )
    found = model.eval().predict(make_batch(0))
    assert [one.boxes.shape for one in found] == [(0, 4), (0, 4)]
    losses, _ = model.train()(make_batch(0))
    assert losses["roi_score"] == 0
