"""The two-layer head: its pooling against the release's, its levels, losses and boxes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from golden import load_param_module
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import roi_align

from dcdet import boxes as box_ops
from dcdet import build_model, load_config
from dcdet.errors import UserError
from dcdet.models.box_head import BoxHead
from dcdet.models.roi_head import RoIOutput, pyramid_levels
from dcdet.models.targets import RoISamples, SampleSpec
from dcdet.ops import reference

STRIDES = [4, 8, 16, 32]
NAMES = ["p2", "p3", "p4", "p5"]
ALIGN = ["align", "deformable_align", "modulated_align"]
PLUS_ONE = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0])
SPEC = SampleSpec(8, 0.25, True)


def make(
    channels: int, pooling: str = "max", strides: list[int] = STRIDES, **changes: Any
) -> BoxHead:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "in_features": NAMES[: len(strides)], "reduce_channels": None, "pooled_size": 7,
        "trans_std": 0.1, "samples_per_part": 4, "hidden_channels": 6, "init_std": 0.1,
        "foreground_iou": 0.5, "background_iou": (0.0, 0.5), "samples": None,
        "hard_examples": None, "box_std": [0.1, 0.1, 0.2, 0.2], "ignore_coverage": None,
        "offset_channels": 5,
    }  # fmt: skip
    return BoxHead(channels, strides, 3, pooling=pooling, **options | changes)


def pool(head: BoxHead, features: dict[str, Tensor], rois: Tensor) -> Tensor:
    """What reaches the first hidden layer, as bins."""
    seen = []
    handle = head.fc1.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    head(features, rois)
    handle.remove()
    return seen[0].view(len(rois), -1, head.pooled_size, head.pooled_size)


@pytest.mark.parametrize("name", ["s4", "s16"])
def test_max_pooling_equals_the_release(shared: Path, name: str) -> None:
    arrays = np.load(shared / "golden" / "ops" / f"roipool_{name}.npz")
    data = torch.from_numpy(arrays["data"]).requires_grad_()
    head = make(data.shape[1], strides=[int(name[1:])])
    pooled = pool(head, {"p2": data}, torch.from_numpy(arrays["rois"]) + PLUS_ONE)
    assert (pooled.detach().numpy() == arrays["out"]).all()
    pooled.backward(torch.from_numpy(arrays["grad_out"]))
    assert data.grad.numpy() == pytest.approx(arrays["grad_data"], abs=1e-6)


@pytest.mark.parametrize("name", ["plain", "plain_emptylevels", "dcn"])
def test_pyramid_pooling_equals_the_release(shared: Path, name: str) -> None:
    arrays = np.load(shared / "golden" / "ops" / f"fpnpool_{name}.npz")
    attrs, u = json.loads(str(arrays["attrs"])), load_param_module(shared).u
    deformable = attrs["with_deformable"]

    def value(key: str, shape: list[int], scale: float) -> Tensor:
        return torch.from_numpy((scale * u(f"fpnpool_{key}", shape)).astype(np.float32))

    features = {
        level: value(level, shape, 2).requires_grad_()
        for level, shape in zip(NAMES, attrs["data_shapes"], strict=True)
    }
    head = make(attrs["output_dim"], "deformable" if deformable else "max")
    if deformable:
        for level in NAMES:
            layer = head.offset[level]
            layer.weight.data = value(f"w{level[1]}", [98, 12544], 0.02)
            layer.bias.data = value(f"b{level[1]}", [98], 0.5)
    rois = torch.from_numpy(arrays["rois"]) + PLUS_ONE
    assert pyramid_levels(rois, head.strides).tolist() == arrays["level"].tolist()
    pooled = pool(head, features, rois)
    out = arrays["out_sub"] if deformable else arrays["out"]
    every, step = (16, 32) if deformable else (1, 3)
    assert pooled.detach().numpy()[:, ::every] == pytest.approx(out, abs=1e-4)
    pooled.backward(value(f"{name}_gy", list(pooled.shape), 1))
    for level, data in features.items():
        recorded = arrays[f"grad_data_{level}_sub"]
        assert data.grad[:, ::step, ::2, ::2].numpy() == pytest.approx(recorded, abs=1e-4), level
    for level in NAMES if deformable else ():
        layer = head.offset[level]
        for ours, recorded in (
            (layer.weight.grad.flatten()[::401], arrays[f"grad_offset_weight_{level}_sub"]),
            (layer.bias.grad, arrays[f"grad_offset_bias_{level}"]),
        ):
            assert ours.numpy() == pytest.approx(recorded, abs=1e-4 * float(np.abs(recorded).max()))


def test_levels_change_at_112_224_and_448_pixels() -> None:
    head = make(2)
    sides = torch.tensor([1, 111.99, 112, 223.99, 224, 447.99, 448, 5000])
    rois = torch.stack([0 * sides, 0 * sides, 0 * sides, sides, sides], 1)
    assert pyramid_levels(rois, head.strides).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    wide = torch.tensor([[0.0, 10, 20, 10 + 448, 20 + 112], [0, 10, 20, 10 + 447, 20 + 112]])
    assert pyramid_levels(wide, head.strides).tolist() == [2, 1]
    assert pyramid_levels(rois, [16]).tolist() == [0] * 8
    # Without the finest map, RoIs keep theirs.
    assert pyramid_levels(rois, [8, 16, 32]).tolist() == [0, 0, 0, 0, 1, 1, 2, 2]


@given(st.floats(1, 2000), st.floats(1, 2000))
def test_levels_follow_the_papers_formula(width: float, height: float) -> None:
    level = 4 + np.log2(np.sqrt(width * height) / 224)
    rois = torch.tensor([[0, 0, 0, width, height]])
    found = pyramid_levels(rois, [4, 8, 16, 32]).item() + 2
    assert abs(level - round(level)) < 1e-4 or found == np.clip(np.floor(level), 2, 5)


def random_rois(sides: list[float], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor(sides)
    corner = torch.rand(len(sides), 2, generator=generator) * 60
    image = torch.arange(len(sides)).float()[:, None] % 2
    return torch.cat([image, corner, corner + size[:, None]], 1)


def random_features(channels: int, names: list[str] = NAMES) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        name: torch.randn(2, channels, 128 // stride, 128 // stride)
        for name, stride in zip(names, STRIDES, strict=False)
    }


@pytest.mark.parametrize("pooling", ["max", "deformable"])
def test_rois_come_back_in_their_order(pooling: str) -> None:
    """All together or one by one: the same."""
    head, features = make(3, pooling), random_features(3)
    for layer in head.offset.values() if pooling == "deformable" else ():
        torch.nn.init.normal_(layer.weight, std=0.2)
    rois = random_rois([500, 30, 250, 20, 130, 400, 100])
    assert sorted(set(pyramid_levels(rois, head.strides).tolist())) == [0, 1, 2, 3]
    together = head(features, rois)
    alone = [head(features, roi[None]) for roi in rois]
    torch.testing.assert_close(together.logits, torch.cat([one.logits for one in alone]))
    torch.testing.assert_close(together.deltas, torch.cat([one.deltas for one in alone]))


def test_deformable_pooling_begins_without_offsets() -> None:
    head = make(3, "deformable", [4], pooled_size=3)
    features, rois = random_features(3, ["p2"]), random_rois([40, 17, 90])

    def twin(trans: Tensor | None) -> Tensor:
        inclusive = rois - PLUS_ONE
        return reference.deform_psroi_pool(
            features["p2"], inclusive, trans, 0.25, 3, 1, 3, 3, 4, 0.1
        )

    torch.testing.assert_close(pool(head, features, rois), twin(None), atol=1e-5, rtol=1e-5)
    head.offset["p2"].bias.data[:9] = 1.0  # x comes first
    trans = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(3, 2, 3, 3)
    torch.testing.assert_close(pool(head, features, rois), twin(trans), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["max", "deformable", *ALIGN])
@pytest.mark.parametrize("sides", [[], [20.0], [300.0, 500.0]])
def test_every_parameter_gets_a_gradient(pooling: str, sides: list[float]) -> None:
    """Also those of levels without RoIs: processes wait for each other's gradients."""
    head, features = make(3, pooling, reduce_channels=2), random_features(3)
    features = {name: x.requires_grad_() for name, x in features.items()}
    rois = random_rois(sides)
    output = head(features, rois)
    assert output.logits.shape == (len(sides), 4)
    assert output.deltas.shape == (len(sides), 4, 4)
    nothing = torch.zeros(len(sides)).long()
    samples = RoISamples(rois, nothing, torch.zeros(len(sides), 4), nothing)
    losses, stats = head.losses(output, samples, images=2)
    sum(losses.values()).backward()
    assert losses["roi_box"] == 0
    assert torch.stack([*losses.values(), *stats.values()]).isfinite().all()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(x.grad is not None for x in features.values())


@pytest.mark.parametrize("average", ["image", "batch"])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_losses_use_the_deltas_of_the_label(average: str, beta: float) -> None:
    """One RoI after the other; MMDET.md, 9, for a mean over the batch and a beta of 0."""
    head = make(2, samples=SPEC, average=average, box_beta=beta)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator)
    deltas = torch.randn(6, 4, 4, generator=generator) * 2
    labels = torch.tensor([2, 0, 1, 3, 0, 0])
    rois = random_rois([20.0] * 6)
    rois[:, 0] = torch.tensor([0, 0, 0, 1, 0, 1])
    goal = torch.randn(6, 4, generator=generator)
    samples = RoISamples(rois, labels, goal, torch.zeros_like(labels))
    found, stats = head.losses(RoIOutput(logits, deltas), samples, 2)
    score, box = 0.0, 0.0
    for image in (0, 1):
        mine = [roi for roi in range(6) if rois[roi, 0] == image]
        number, wanted = (len(mine), SPEC.number) if average == "image" else (3, 3)  # of 6, / 2
        score += sum(-logits[roi].log_softmax(0)[labels[roi]].item() for roi in mine) / number
        for roi in mine:
            for value in (deltas[roi, labels[roi]] - goal[roi]).tolist() if labels[roi] else ():
                box += (abs(value) - beta / 2 if abs(value) >= beta else value**2 / 2) / wanted
    assert found["roi_score"].item() == pytest.approx(score / 2, rel=1e-5)
    assert found["roi_box"].item() == pytest.approx(box / 2, rel=1e-5)
    assert stats["foreground_rois"] == 1.5


def test_each_class_has_its_own_box() -> None:
    head = make(2)
    rois = random_rois([20.0, 50.0])
    deltas = torch.randn(2, 4, 4)
    scores, boxes = head.scores_and_boxes(RoIOutput(torch.randn(2, 4), deltas), rois)
    assert scores.shape == (2, 3)
    assert boxes.shape == (2, 3, 4)
    std = torch.tensor([0.1, 0.1, 0.2, 0.2])
    for label in range(3):
        wanted = box_ops.decode(rois[:, 1:], deltas[:, 1 + label] * std)
        torch.testing.assert_close(boxes[:, label], wanted)


@pytest.mark.parametrize("limit", ["none", "high", "both"])
def test_boxes_of_large_deltas_are_bounded(limit: Any) -> None:
    """The bound counts after the multiplication by box_std (MMDET.md, 6)."""
    head = make(2, delta_limit=limit)
    deltas = torch.tensor([[0.0, 0.0, 25.0, -25.0]]).expand(1, 4, 4)  # e^5 and e^-5
    rois = torch.tensor([[0, 500.0, 500, 516, 532]])
    [[box, *_]] = head.scores_and_boxes(RoIOutput(torch.zeros(1, 4), deltas), rois)[1].tolist()
    wide = 16 * (np.exp(5) if limit == "none" else 62.5)
    high = 32 * (1 / 62.5 if limit == "both" else np.exp(-5))
    assert [box[2] - box[0], box[3] - box[1]] == pytest.approx([wide, high], abs=1e-3)


# RoIAlign, plain, deformable and modulated, as in mmdetection's DCN configs.


def make_align(pooling: str, **changes: Any) -> BoxHead:
    """A head whose offsets and factors are not those of the beginning."""
    options = {"pooled_size": 3, "samples_per_part": 0}
    head = make(2, pooling, STRIDES[:2], **options | changes)
    for name, layer in head.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.startswith(("offset", "modulation")):
            torch.nn.init.normal_(layer.weight, std=0.5)
            torch.nn.init.normal_(layer.bias)
    return head


def shifts_and_factors(
    head: BoxHead, features: dict[str, Tensor], roi: Tensor, name: str
) -> tuple[Tensor, Tensor | None]:
    """What the layers of a level say about one RoI (5,), by torchvision's RoIAlign."""
    scale = 1 / STRIDES[NAMES.index(name)]
    x = roi_align(features[name], roi[None], 3, scale, 0, aligned=True).flatten(1)
    shifts = head.offset[name](x).view(1, 2, 3, 3)
    if "modulation" not in dict(head.named_children()):
        return shifts, None
    return shifts, head.modulation[name](x).sigmoid().view(1, 1, 3, 3)


@pytest.mark.parametrize(
    ("pooling", "aligned", "samples"),
    [("align", True, 0), ("align", False, 2), *((kind, True, 0) for kind in ALIGN[1:])],
)
def test_pooling_on_roi_aligns_geometry(pooling: str, aligned: bool, samples: int) -> None:
    """RoI by RoI."""
    head = make_align(pooling, aligned=aligned, samples_per_part=samples)
    features, rois = random_features(2, NAMES[:2]), random_rois([30, 20, 130, 7])
    pooled = pool(head, features, rois)
    for roi, level, found in zip(rois, pyramid_levels(rois, head.strides), pooled, strict=True):
        name = NAMES[level]
        geometry = ((3, 3), 1 / STRIDES[level], samples)
        if pooling == "align":
            wanted = roi_align(features[name], roi[None], *geometry, aligned)
        else:
            shifts, factors = shifts_and_factors(head, features, roi, name)
            wanted = reference.deform_roi_pool(
                features[name], roi[None], shifts, *geometry, 0.1, mask=factors
            )
        torch.testing.assert_close(found[None], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", ALIGN[1:])
def test_parts_are_the_moved_bins(pooling: str) -> None:
    head = make_align(pooling)
    features, rois = random_features(2, NAMES[:2]), random_rois([30, 20, 130, 400, 7])
    parts = head.parts(features, rois, torch.zeros(5).long())
    assert parts.shape == (5, 3, 3, 4)
    for roi, level, found in zip(rois, pyramid_levels(rois, head.strides), parts, strict=True):
        shifts, _ = shifts_and_factors(head, features, roi, NAMES[level])
        x1, y1, x2, y2 = roi[1:].tolist()
        wide, high = (x2 - x1) / 3, (y2 - y1) / 3
        for row in range(3):
            for column in range(3):
                x = x1 + column * wide + 0.1 * (x2 - x1) * shifts[0, 0, row, column].item()
                y = y1 + row * high + 0.1 * (y2 - y1) * shifts[0, 1, row, column].item()
                wanted = [x, y, x + wide, y + high]
                assert found[row, column].tolist() == pytest.approx(wanted, abs=1e-3)
    assert head.parts(features, rois[:0], torch.zeros(0).long()).shape == (0, 3, 3, 4)


def test_new_align_heads_begin_without_offsets() -> None:
    features, rois = random_features(2, NAMES[:2]), random_rois([30, 20, 130, 400, 7])
    plain, moved, halved = (
        pool(make(2, pooling, STRIDES[:2], pooled_size=3, samples_per_part=0), features, rois)
        for pooling in ALIGN
    )
    torch.testing.assert_close(moved, plain)
    torch.testing.assert_close(halved, plain / 2)  # sigmoid(0)


@pytest.mark.parametrize("pooling", ["max", "deformable"])
def test_half_precision_is_near(pooling: str) -> None:
    head, features = make(3, pooling, reduce_channels=4), random_features(3)
    rois = random_rois([500, 30, 250, 20])
    exact = head(features, rois)
    with torch.autocast("cpu", torch.bfloat16):
        rough = head({name: x.bfloat16() for name, x in features.items()}, rois)
    assert rough.logits.dtype == rough.deltas.dtype == torch.float32
    torch.testing.assert_close(rough.logits, exact.logits, atol=0.1, rtol=0.1)
    F.cross_entropy(rough.logits, torch.zeros(4).long()).backward()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("in_features=[c5, c4]", "'in_features' must be one or more maps of equal channels"),
        ("in_features=[]", "'in_features' must be one or more maps of equal channels"),
        ("in_features=[p2]", "there is no map 'p2'"),
        ("in_features=c5", "'in_features' must be a list"),
        ("pooling=mean", "'pooling' must be max, deformable, align"),
        ("pooled_size=0", "'pooled_size' must be at least 1"),
        ("samples=128", "'samples' must be a mapping with number, foreground_fraction, fill"),
        ("samples.number=0", "'number' must be at least 1"),
        ("samples.foreground_fraction=2", r"'foreground_fraction' must be in \[0, 1\]"),
        ("background_iou=[0.5, 0.1]", "'background_iou' must be"),
        ("hard_examples=0", "'hard_examples' must be at least 1"),
        ("box_std=[0.1]", "'box_std' must be 4 positive numbers"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    path = ROOT / "configs" / "small" / "faster_rcnn_r18_voc.yaml"
    with pytest.raises(UserError, match=message):
        build_model(load_config(path, [f"model.roi_head.{override}"]))


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("box_beta", -1.0, "at least 0"),
        ("claim_iou", 1.5, r"in \[0, 1\]"),
        ("samples_per_part", -1, "at least 0"),
        ("delta_init_std", 0.0, "positive, or null"),
        ("offset_channels", 0, "at least 1"),
    ],
)
def test_values_out_of_range_are_named(key: str, value: float, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}: must be {wanted}"):
        make(2, "align", **{key: value})
    with pytest.raises(ValueError, match=r"^samples_per_part: must be at least 1"):
        make(2, "deformable", samples_per_part=0)
