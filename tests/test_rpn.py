"""Proposals against the 2017 release's recorded ones, and the RPN's own promises."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from test_nms import pairs_on_the_threshold
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from dcdet import boxes as box_ops
from dcdet.models.rpn import ProposalSpec, RPNHead, RPNOutput
from dcdet.structures import Batch, Target


class Constant(nn.Module):
    """Gives back the same maps, whatever comes in."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value


class OneByOne(nn.Module):
    """Gives back one map after the other."""

    def __init__(self, values: list[Tensor]) -> None:
        super().__init__()
        self.values = iter(values)

    def forward(self, x: Tensor) -> Tensor:
        return next(self.values)


def make_rpn(scales: list[float], spec: ProposalSpec, allowed_border: float | None = 0) -> RPNHead:
    return RPNHead(
        4, [16], "inclusive", ["c4"], 8, 0.01, scales, [0.5, 1, 2], 0.7, 0.3, 16, 0.5,
        allowed_border, True, None, spec, spec,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["a12_min0", "a9_exact", "a9_padded"])
def test_proposals_equal_the_release(shared: Path, name: str) -> None:
    arrays = np.load(shared / "golden" / "ops" / f"proposal_{name}.npz")
    attrs = json.loads(str(arrays["attrs"]))
    spec = ProposalSpec(
        attrs["rpn_pre_nms_top_n"], attrs["rpn_post_nms_top_n"], attrs["threshold"],
        attrs["rpn_min_size"],
    )  # fmt: skip
    rpn = make_rpn(attrs["scales"], spec).eval()
    probability = torch.from_numpy(arrays["cls_prob"])
    rpn.conv = Constant(torch.ones(1, 8, *probability.shape[2:]))
    rpn.score = Constant(probability.log())
    rpn.delta = Constant(torch.from_numpy(arrays["bbox_pred"]))
    height, width, scale = arrays["im_info"][0].tolist()
    size = (int(height), int(width))
    ours = rpn.proposals(rpn({"c4": torch.zeros(1)}), [size], [scale])[0].numpy()
    recorded = np.unique(arrays["rois"][:, 1:], axis=0) + np.array([0, 0, 1, 1])
    assert len(ours) == len(recorded)
    distance = np.abs(ours[None] - recorded[:, None]).max(-1).min(1)
    assert (distance < 2e-3).mean() >= 0.99


@pytest.mark.parametrize("name", ["full", "pre500"])
def test_proposals_of_a_pyramid_equal_the_release(shared: Path, name: str) -> None:
    """All levels go through one selection and one NMS."""
    arrays = np.load(shared / "golden" / "ops" / f"pyramid_proposal_{name}.npz")
    attrs = json.loads(str(arrays["attrs"]))
    spec = ProposalSpec(
        attrs["rpn_pre_nms_top_n"], attrs["rpn_post_nms_top_n"], attrs["threshold"],
        attrs["rpn_min_size"],
    )  # fmt: skip
    strides = attrs["feat_stride"]
    names = [f"p{stride}" for stride in strides]
    rpn = RPNHead(
        4, strides, "inclusive", names, 8, 0.01, attrs["scales"], attrs["ratios"], 0.7, 0.3, 16,
        0.5, None, True, None, spec, spec,
    ).eval()  # fmt: skip
    maps = [torch.from_numpy(arrays[f"cls_prob_stride{stride}"]).log() for stride in strides]
    rpn.conv = nn.Identity()
    rpn.score = OneByOne(maps)
    rpn.delta = OneByOne([torch.from_numpy(arrays[f"bbox_pred_stride{s}"]) for s in strides])
    raw = rpn({key: torch.ones(1, 8, *x.shape[2:]) for key, x in zip(names, maps, strict=True)})
    height, width, scale = arrays["im_info"][0].tolist()
    ours = rpn.proposals(raw, [(int(height), int(width))], [scale])[0].numpy()
    recorded = np.unique(arrays["rois"][:, 1:], axis=0) + np.array([0, 0, 1, 1])
    assert len(ours) == len(recorded)
    distance = np.abs(ours[None] - recorded[:, None]).max(-1).min(1)
    assert (distance < 2e-3).mean() >= 0.99


def make_batch(objects: int) -> Batch:
    boxes = torch.tensor([[16.0, 16.0, 60.0, 70.0]])[:objects]
    target = Target(0, (96, 128), boxes, torch.zeros(objects).long(), torch.zeros(0, 4))
    return Batch(torch.zeros(2, 3, 96, 128), [(96, 128)] * 2, [target] * 2, [1.0] * 2, [1, 2])


@pytest.mark.parametrize("objects", [0, 1])
def test_losses_reach_every_parameter(objects: int) -> None:
    rpn = make_rpn([2, 4], ProposalSpec(50, 10, 0.7, 0.0))
    raw = rpn({"c4": torch.randn(2, 4, 6, 8)})
    assert raw.scores.shape == (2, 6 * 8 * 6, 2)
    assert raw.deltas.shape == (*raw.scores.shape[:2], 4)
    losses = rpn.losses(raw, make_batch(objects))
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rpn.parameters())
    assert (losses["rpn_box"].item() > 0) == (objects > 0)


def test_anchors_over_the_border_learn_only_where_allowed() -> None:
    size = (96, 128)
    anchors = torch.tensor(
        [[0.0, 0, 128, 96], [-1, 0, 50, 50], [0, 0, 129.5, 50], [40, 40, 70, 99]]
    )
    nothing = torch.zeros(1, 4, 4)
    raw = RPNOutput(nothing[..., :2], nothing, anchors, torch.zeros(4, 3).long(), (4,))
    spec = ProposalSpec(50, 10, 0.7, 0.0)
    assert make_rpn([4], spec)._usable(raw, size).tolist() == [True, False, False, False]
    assert make_rpn([4], spec, 5)._usable(raw, size).tolist() == [True, True, True, True]
    assert make_rpn([4], spec, None)._usable(raw, size).all()


def test_proposals_follow_limits_and_carry_no_gradient() -> None:
    rpn = make_rpn([2, 4], ProposalSpec(pre_nms=20, post_nms=5, nms_iou=0.9, min_size=20.0)).eval()
    raw = rpn({"c4": torch.randn(1, 4, 6, 8)})
    boxes = rpn.proposals(raw, [(90, 120)], [1.5])[0]
    assert 0 < len(boxes) <= 5
    assert not boxes.requires_grad
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (sides >= 30).all()
    assert (boxes[:, 2] <= 120).all()
    assert (boxes[:, 3] <= 90).all()


def test_the_least_size_is_in_original_pixels_on_each_axis() -> None:
    rpn = make_rpn([2, 4], ProposalSpec(500, 500, 0.99, min_size=20.0)).eval()
    raw = rpn({"c4": torch.randn(1, 4, 6, 8)})
    [boxes] = rpn.proposals(raw, [(90, 120)], [(3.0, 0.5)])
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    assert height.min() >= 60
    assert 10 <= width.min() < 60


def test_infinite_deltas_do_not_reach_the_proposals() -> None:
    rpn = make_rpn([2], ProposalSpec(50, 50, 0.7, 0.0)).eval()
    raw = rpn({"c4": torch.randn(1, 4, 6, 8)})
    with torch.no_grad():
        raw.deltas[0, :5] = float("nan")
        raw.deltas[0, 5:10] = 1e4
    boxes = rpn.proposals(raw, [(96, 128)], [1.0])[0]
    assert len(boxes) > 0
    assert boxes.isfinite().all()


# mmdetection's, torchvision's and detectron2's rules.


def make_head(strides: list[int], spec: ProposalSpec, **changes: Any) -> RPNHead:
    names = [f"p{stride}" for stride in strides]
    options: dict[str, Any] = {
        "pixels": "continuous", "in_features": names, "channels": 2, "init_std": 0.01,
        "anchor_scales": [8], "anchor_ratios": [0.5, 1, 2], "positive_iou": 0.7,
        "negative_iou": 0.3, "samples": 8, "positive_fraction": 0.5, "allowed_border": None,
        "whole_cells": False, "ignore_coverage": None, "train": spec, "test": spec,
    }  # fmt: skip
    return RPNHead(2, strides, **(options | changes))


ANY = ProposalSpec(1000, 1000, 0.7, 0.0)


class Zeros(nn.Module):
    """Maps of zeros, of so many channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.channels, *x.shape[2:])


@pytest.mark.parametrize("size", [(800, 1088), (192, 320)])
def test_anchors_lie_where_torchvision_puts_them(size: tuple[int, int]) -> None:
    """Its cells of coarse maps are fewer pixels apart than the stride: 61 for 64 of 800 pixels."""
    strides = [4, 8, 16, 32, 64]
    shapes = [[-(-side // stride) for side in size] for stride in strides]
    features = [torch.zeros(1, 1, *shape) for shape in shapes]
    rpn = make_head(strides, ANY, anchor_rule="torchvision", scores="sigmoid")
    rpn.conv, rpn.score, rpn.delta = nn.Identity(), Zeros(3), Zeros(12)
    raw = rpn(dict(zip(rpn.in_features, features, strict=True)))
    generator = AnchorGenerator(tuple((8 * s,) for s in strides), ((0.5, 1.0, 2.0),) * 5)
    [wanted] = generator(ImageList(torch.zeros(1, 1, *size), [size]), features)
    assert torch.equal(raw.anchors, wanted)
    assert raw.counts == tuple(3 * height * width for height, width in shapes)
    if size == (800, 1088):
        middle = raw.anchors[-3 * 13 * 17 :].view(13, 17, 3, 4)[:, :, 1, :2]
        assert (middle[1, 1] - middle[0, 0]).tolist() == [64, 61]


def test_one_score_is_the_softmax_of_it_and_zero() -> None:
    """Of the channels of `score` each is an anchor's; of those of `delta` each four."""
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(2, 3, 2, 5, generator=generator) * 3
    delta = torch.randn(2, 12, 2, 5, generator=generator)
    spec = ProposalSpec(1000, 1000, 1.0, 0.0, "separate")
    rpn = make_head([16], spec, scores="sigmoid", anchor_rule="mmdetection").eval()
    assert rpn.score.weight.shape == (3, 2, 1, 1)
    rpn.conv, rpn.score, rpn.delta = nn.Identity(), Constant(score), Constant(delta)
    raw = rpn({"p16": torch.ones(2, 2, 2, 5)})
    raw = replace(raw, anchors=raw.anchors.round())
    for image, row, column, anchor in ((0, 0, 0, 1), (1, 1, 3, 2), (0, 1, 4, 0)):
        place = (row * 5 + column) * 3 + anchor
        assert raw.scores[image, place].tolist() == [0, score[image, anchor, row, column]]
        channels = slice(4 * anchor, 4 * anchor + 4)
        assert torch.equal(raw.deltas[image, place], delta[image, channels, row, column])
        assert raw.cells[place].tolist() == [16, row, column]
    probability = score.sigmoid().permute(0, 2, 3, 1).flatten(1)
    found = rpn.proposals(replace(raw, deltas=torch.zeros_like(raw.deltas)), [(9999, 9999)] * 2,
                          [1.0, 1.0])  # fmt: skip
    for image, boxes in enumerate(found):
        order = probability[image].argsort(descending=True)
        assert torch.equal(boxes, raw.anchors[order].clamp(min=0))


def random_raw(images: int, anchors: Tensor, counts: tuple[int, ...]) -> RPNOutput:
    generator = torch.Generator().manual_seed(0)
    number = len(anchors)
    scores = F.pad(torch.randn(images, number, 1, generator=generator) * 2, (1, 0))
    deltas = torch.randn(images, number, 4, generator=generator) * 0.5
    cells = torch.zeros(number, 3, dtype=torch.int64)
    return RPNOutput(scores, deltas, anchors, cells, counts)


@pytest.mark.parametrize("average", ["image", "batch"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("seen", [(1, 0), (0, 0), (1, 1)])
def test_losses_follow_their_formula(average: str, beta: float, seen: tuple[int, int]) -> None:
    """One anchor after the other; images with one object or none. MMDET.md, 7, for "batch"."""
    goal = torch.tensor([20.0, 20.0, 60.0, 60.0])
    shifts = torch.tensor([0.0, 1.0, -2.0, 3.0, 12.0, 100.0, 120.0, 140.0, 160.0, 170.0, 180.0])
    anchors = goal + shifts[:, None]  # 4 positive, 1 neither, 6 background
    raw = random_raw(2, anchors, (11,))
    batch = make_batch(0)
    objects = [goal[None].expand(number, 4) for number in seen]
    targets = [replace(batch.targets[0], boxes=boxes, labels=torch.zeros(len(boxes)).long())
               for boxes in objects]  # fmt: skip
    rpn = make_head([16], ANY, average=average, box_beta=beta, samples=11)
    found = rpn.losses(raw, replace(batch, targets=targets))
    score, box, number = [0.0, 0.0], 0.0, 0
    for image in (0, 1):
        learning = range(11) if seen[image] == 0 else [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
        positive = range(4) if seen[image] else range(0)
        for anchor in learning:
            probability = raw.scores[image, anchor, 1].sigmoid().item()
            score[image] -= np.log(probability if anchor in positive else 1 - probability)
        for anchor in positive:
            wanted = box_ops.encode(anchors[anchor, None], goal[None])[0]
            for x in (raw.deltas[image, anchor] - wanted).abs().tolist():
                box += x - beta / 2 if x >= beta else x * x / (2 * beta)
        score[image] /= len(learning) if average == "image" else 1
        number += max(1, len(positive)) + max(1, len(learning) - len(positive))
    scores, boxes = (2, 2 * 11) if average == "image" else (number, number)
    assert found["rpn_score"].item() == pytest.approx(sum(score) / scores, rel=1e-5)
    assert found["rpn_box"].item() == pytest.approx(box / boxes, rel=1e-5)


def test_cells_learn_where_the_padded_image_begins_them() -> None:
    """MMDET.md, 7: cells inside ceil(padded size / stride); the batch is larger than the image."""
    strides = [4, 32, 64]
    cells = torch.tensor([[s, row, column] for s in strides for row in range(40)
                          for column in range(40)])  # fmt: skip
    raw = replace(random_raw(1, torch.zeros(len(cells), 4), (1600,) * 3), cells=cells)
    usable = make_head([4], ANY, learn_multiple=32)._usable(raw, (65, 32)).tolist()
    for (stride, row, column), found in zip(cells.tolist(), usable, strict=True):
        assert found == (row < np.ceil(96 / stride) and column < np.ceil(32 / stride))
    assert make_head([4], ANY)._usable(raw, (65, 32)).all()


@pytest.mark.parametrize("levels", ["separate", "shifted"])
def test_levels_have_their_own_proposals(levels: Any) -> None:
    """`pre_nms` of each, suppressed among their own; boxes without an area are dropped.

    Pairs whose IoU is the threshold but for rounding fall as mmdetection's shift lets them.
    """
    anchors = pairs_on_the_threshold(600)
    anchors[:30] = torch.tensor([1300.0, 0.0, 1400.0, 50.0])  # beside the image
    counts = (200,) * 6
    raw = random_raw(1, anchors, counts)
    raw = replace(raw, deltas=torch.zeros_like(raw.deltas))
    spec = ProposalSpec(180, 900, 0.5, 1e-9, levels)
    rpn = make_head([4], spec).eval()
    [found] = rpn.proposals(raw, [(800, 1300)], [1.0])

    scores = raw.scores[0, :, 1].sigmoid()
    kept = [200 * level + scores[200 * level :][:200].topk(180).indices for level in range(6)]
    place = torch.cat(kept)
    boxes = box_ops.decode(anchors[place], raw.deltas[0, place])
    boxes = torchvision.ops.clip_boxes_to_image(boxes, (800, 1300))
    large = torchvision.ops.remove_small_boxes(boxes, 1e-9)
    assert len(large) < len(boxes)
    boxes, place = boxes[large], place[large]
    results = {
        key: boxes[way(boxes, scores[place], place // 200, 0.5)]
        for key, way in (("separate", torchvision.ops.boxes._batched_nms_vanilla),
                         ("shifted", torchvision.ops.boxes._batched_nms_coordinate_trick))
    }  # fmt: skip
    assert not torch.equal(results["separate"], results["shifted"])
    assert torch.equal(found, results[levels])
    [few] = make_head([4], replace(spec, post_nms=7)).eval().proposals(raw, [(800, 1300)], [1.0])
    assert torch.equal(few, found[:7])


@pytest.mark.parametrize("limit", ["none", "high", "both"])
def test_proposals_bound_their_deltas(limit: Any) -> None:
    """Of a box of 2 pixels the width grows e^5-fold, or 62.5-fold at most."""
    anchors = torch.tensor([[500.0, 500.0, 502.0, 502.0]])
    raw = replace(random_raw(1, anchors, (1,)), deltas=torch.tensor([[[0.0, 0.0, 5.0, -5.0]]]))
    rpn = make_head([4], ANY, delta_limit=limit).eval()
    [[box]] = rpn.proposals(raw, [(1000, 1000)], [1.0])
    grown, shrunk = {"none": (np.exp(5), np.exp(-5)), "high": (62.5, np.exp(-5)),
                     "both": (62.5, 1 / 62.5)}[limit]  # fmt: skip
    found = [(box[2] - box[0]).item() / 2, (box[3] - box[1]).item() / 2]
    assert found == pytest.approx([grown, shrunk], rel=1e-2)


@pytest.mark.parametrize(
    ("key", "value"),
    [("claim_iou", 1.5), ("box_beta", -0.1), ("learn_multiple", 0), ("positive_iou", 0.0),
     ("negative_iou", 0.8)],
)  # fmt: skip
def test_values_out_of_range_are_named(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{key}: must be"):
        make_head([16], ANY, **{key: value})
