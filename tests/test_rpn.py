"""Proposals against the 2017 release's recorded ones, and the RPN's own promises."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

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
