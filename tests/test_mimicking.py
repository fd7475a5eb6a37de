"""Feature mimicking: what is drawn and cut out, its losses, and that testing has none of it."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import Tensor, nn
from torchvision.ops import roi_align

from dcdet import build_model, load_config
from dcdet.models import two_stage
from dcdet.models.mimicking import (
    MimickingSpec,
    cut_out,
    draw_foreground,
    mimicking_losses,
    whole_patches,
)
from dcdet.models.roi_head import RoIOutput
from dcdet.models.targets import RoISamples
from dcdet.structures import Batch, Target


def samples_of(images: list[int], labels: list[int]) -> RoISamples:
    number = len(labels)
    rois = torch.rand(number, 5)
    rois[:, 0] = torch.tensor(images)
    nothing = torch.zeros(number, 4)
    return RoISamples(rois, torch.tensor(labels).long(), nothing, torch.zeros(number).long())


def test_a_number_of_each_images_foreground_is_drawn() -> None:
    samples = samples_of([0] * 30 + [1] * 30 + [2] * 5, [1, 0] * 10 + [2] * 40 + [0] * 5)
    drawn = draw_foreground(samples, [5, 6, 7], 12)
    assert len(drawn.unique()) == len(drawn) == 24
    assert (samples.labels[drawn] > 0).all()
    assert samples.rois[drawn, 0].tolist() == [0] * 12 + [1] * 12
    every = draw_foreground(samples, [5, 6, 7], 99)
    assert sorted(every.tolist()) == samples.labels.nonzero().flatten().tolist()
    # Each image follows its own seed.
    assert torch.equal(draw_foreground(samples, [5, 6, 7], 12), drawn)
    other = draw_foreground(samples, [5, 8, 7], 12)
    assert torch.equal(other[:12], drawn[:12])
    assert not torch.equal(other[12:], drawn[12:])
    nothing = draw_foreground(samples_of([0, 1], [0, 0]), [5, 6], 3)
    assert nothing.shape == (0,)
    assert nothing.dtype == torch.int64


def test_cut_outs_are_resized_pixels() -> None:
    images = torch.rand(2, 3, 50, 60, generator=torch.Generator().manual_seed(0))
    rois = torch.tensor([[1, 8.0, 4, 56, 36], [0, 3, 5, 19, 21], [0, 2.2, 3.3, 8.1, 40.7]])
    found = cut_out(images, rois, 16)
    blocks = F.avg_pool2d(images[1:, :, 4:36, 8:56], (2, 3))  # shrunk by whole numbers
    torch.testing.assert_close(found[:1], blocks)
    torch.testing.assert_close(found[1], images[0, :, 5:21, 3:19])  # as large as it was
    torch.testing.assert_close(found, roi_align(images, rois, 16, 1.0, 0, True))
    assert whole_patches(2, 16, rois).tolist() == [[0, 0, 0, 16, 16], [1, 0, 0, 16, 16]]


@pytest.mark.parametrize(
    ("turn", "distance"),
    [(lambda x: 3 * x, 0.0), (lambda x: -x, 2.0), (lambda x: x.flip(1) * x.new_tensor([1, -1]), 1)],
)  # fmt: skip
def test_the_cosine_alone_counts(turn: Callable[[Tensor], Tensor], distance: float) -> None:
    """0 for the same direction, 1 for a right angle, 2 for the opposite."""
    features = torch.tensor([[3.0, 4.0], [-1.0, 2.0], [5.0, 0.5]])
    spec = MimickingSpec(feature_weight=0.25)
    labels = torch.tensor([1, 2, 1])
    found = mimicking_losses(features, turn(features), nn.Linear(2, 3), labels, spec)
    assert found["mimic"].item() == pytest.approx(0.25 * distance, abs=1e-6)


def test_losses_roi_by_roi() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, 6, generator=generator).requires_grad_()
    alone = torch.randn(4, 6, generator=generator).requires_grad_()
    labels, classifier = [2, 1, 3, 3], nn.Linear(6, 4)
    spec = MimickingSpec(feature_weight=0.3, score_weight=0.7)
    found = mimicking_losses(features, alone, classifier, torch.tensor(labels), spec)
    distance, score = 0.0, 0.0
    for one, other, label in zip(features, alone, labels, strict=True):
        a, b = one.tolist(), other.tolist()
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        distance += 1 - dot / math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))
        logits = classifier(other).tolist()
        score += math.log(sum(math.exp(x) for x in logits)) - logits[label]
    assert found["mimic"].item() == pytest.approx(0.3 * distance / 4, rel=1e-5)
    assert found["mimic_score"].item() == pytest.approx(0.7 * score / 4, rel=1e-5)
    # Both branches learn to agree; only the cut-outs' one learns from the classes.
    found["mimic"].backward(retain_graph=True)
    assert features.grad.any(1).all()
    assert alone.grad.any(1).all()
    features.grad = None
    found["mimic_score"].backward()
    assert features.grad is None
    assert classifier.weight.grad.any()


@pytest.mark.parametrize(
    ("key", "value"),
    [("rois", 0), ("size", 31), ("feature_weight", -0.1), ("score_weight", -0.1)],
)
def test_values_out_of_range_are_named(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{key}: must be at least"):
        MimickingSpec(**{key: value})  # type: ignore[arg-type]


# In a network.


def build(*overrides: str) -> Any:
    torch.manual_seed(0)
    path = ROOT / "configs" / "small" / "fpn_mimic_r18_voc.yaml"
    small = ["model.roi_head.hidden_channels=16", "model.neck.channels=16",
             "model.roi_head.mimicking.size=32", "model.roi_head.mimicking.rois=1",
             "model.postprocess.score_threshold=0.0", "model.rpn.channels=16",
             "model.rpn.train.post_nms=40", "model.rpn.test.post_nms=40",
             "model.backbone.freeze_to=2"]  # fmt: skip
    return build_model(load_config(path, [*small, *overrides]))


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """A network that mimics, and the same one that does not."""
    mimicking, plain = build(), build("model.roi_head.mimicking=null")
    missing = plain.load_state_dict(mimicking.state_dict(), strict=False)
    assert missing.unexpected_keys == ["roi_head.mimic_score.weight", "roi_head.mimic_score.bias"]
    assert not missing.missing_keys
    return mimicking, plain


def make_batch(objects: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 64, 96), generator=generator, dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 12.0, 50.0, 60.0], [30.0, 20.0, 90.0, 62.0]])[:objects]
    target = Target(0, (64, 96), boxes, torch.tensor([0, 2])[:objects], torch.zeros(0, 4))
    return Batch(images, [(64, 96), (60, 90)], [target, target], [1.0, 1.0], [1, 2])


def test_a_training_step(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut-outs go through the network by themselves, and leave the statistics as they were."""
    mimicking, plain = (model.train() for model in models)
    seen: list[Any] = []

    def keep(*arguments: Any) -> Any:
        seen.append(arguments)
        return mimicking_losses(*arguments)

    def keep_samples(*arguments: Any) -> RoISamples:
        seen.append(sample(*arguments))
        return seen[0]

    sample = mimicking.roi_head.sample
    monkeypatch.setattr(mimicking.roi_head, "sample", keep_samples)
    monkeypatch.setattr(two_stage, "mimicking_losses", keep)
    batch = make_batch(2)
    outputs: list[RoIOutput] = []
    hook = mimicking.roi_head.register_forward_hook(lambda *call: outputs.append(call[2]))
    losses, _ = mimicking(batch)
    hook.remove()
    without, _ = plain(batch)
    assert losses.keys() - without.keys() == {"mimic", "mimic_score"}
    assert all(torch.equal(losses[name], without[name]) for name in without)
    for name, value in plain.named_buffers():
        assert torch.equal(value, mimicking.get_buffer(name)), name
    frozen = mimicking.backbone.frozen
    assert mimicking.backbone.training
    assert mimicking.backbone.layer4[0].bn1.training
    assert not any(module.training for stage in frozen for module in stage.modules())
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in mimicking.parameters()
               if parameter.requires_grad)  # fmt: skip

    samples, (features, alone, _, labels, _) = seen
    assert features.shape == alone.shape == (2, 16)
    assert labels.min() >= 1
    # Each cut-out is resized, and read whole from the map of its size.
    drawn = draw_foreground(samples, batch.seeds, 1)
    assert torch.equal(samples.labels[drawn], labels)
    assert torch.equal(outputs[0].features[drawn], features)
    mimicking.eval()
    with torch.no_grad():
        patches = roi_align(mimicking.normalised(batch), samples.rois[drawn], 32, 1.0, 0, True)
        head, whole = mimicking.roi_head, torch.tensor([[0.0, 0.0, 0.0, 32.0, 32.0]])
        for patch, found in zip(patches, alone, strict=True):
            output = head(mimicking.maps(patch[None]), whole)
            torch.testing.assert_close(found, output.features[0], rtol=1e-3, atol=1e-4)


def test_without_foreground_there_is_nothing_to_mimic(models: tuple[Any, Any]) -> None:
    model = models[0].train()
    model.zero_grad()
    losses, _ = model(make_batch(0))
    assert losses["mimic"] == losses["mimic_score"] == 0
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_testing_has_none_of_it(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_arguments: Any) -> None:
        raise AssertionError("used in testing")

    for name in ("draw_foreground", "cut_out", "mimicking_losses"):
        monkeypatch.setattr(two_stage, name, never)
    mimicking, plain = (model.eval() for model in models)
    monkeypatch.setattr(mimicking.roi_head.mimic_score, "forward", never)
    plain.load_state_dict(mimicking.state_dict(), strict=False)
    calls: list[int] = []
    mimicking.backbone.register_forward_hook(lambda *_: calls.append(1))
    batch = replace(make_batch(0), scales=[2.0, 2.0])
    for one, other in zip(mimicking.predict(batch), plain.predict(batch), strict=True):
        assert len(one.scores) > 0
        assert torch.equal(one.boxes, other.boxes)
        assert torch.equal(one.scores, other.scores)
    assert len(calls) == 1
