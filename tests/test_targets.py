"""Assignment, sampling and losses against the 2017 release's recorded ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dcdet import boxes as box_ops
from dcdet.models import targets
from dcdet.models.anchors import cell_anchors, grid_anchors
from dcdet.structures import Target

PLUS_ONE = torch.tensor([0.0, 0.0, 1.0, 1.0])


def make_target(objects: torch.Tensor, ignored: torch.Tensor | None = None) -> Target:
    """`objects` (N, 5): inclusive box, class from 1."""
    boxes = objects[:, :4].float() + PLUS_ONE
    ignored = torch.zeros(0, 4) if ignored is None else ignored
    return Target(0, (100, 100), boxes, objects[:, 4].long() - 1, ignored)


def test_rpn_targets_equal_the_release(shared: Path) -> None:
    arrays = np.load(shared / "golden" / "ops" / "utils_rpn_targets.npz")
    attrs = json.loads(str(arrays["attrs"]))
    height, width = attrs["feat"]
    anchors = grid_anchors(cell_anchors(16, attrs["scales"], attrs["ratios"]), 16, (height, width))
    anchors = anchors.reshape(-1, 4).float()
    image_h, image_w, _ = attrs["im_info"]
    usable = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] <= image_w) & (anchors[:, 3] <= image_h)
    for key, objects in (
        ("label", torch.from_numpy(arrays["gt_boxes"])),
        ("label_nogt", torch.zeros(0, 5)),
    ):
        labels, deltas = targets.rpn_targets(anchors, make_target(objects), usable, 0.7, 0.3, None)
        by_anchor = labels.view(height, width, 12).permute(2, 0, 1).flatten().numpy()
        assert (by_anchor == arrays[key][0]).all(), key
    labels, deltas = targets.rpn_targets(
        anchors, make_target(torch.from_numpy(arrays["gt_boxes"])), usable, 0.7, 0.3, None
    )
    wanted = torch.from_numpy(arrays["bbox_target"][0]).view(12, 4, height, width)
    wanted = wanted.permute(2, 3, 0, 1).reshape(-1, 4)
    positive = labels == 1
    assert positive.sum() == (arrays["bbox_weight"] != 0).sum() / 4
    torch.testing.assert_close(deltas[positive], wanted[positive], atol=1e-5, rtol=1e-5)


def test_roi_targets_equal_the_release(shared: Path) -> None:
    arrays = np.load(shared / "golden" / "ops" / "utils_sample_rois_agnostic.npz")
    objects = torch.from_numpy(arrays["gt_boxes"])
    proposals = torch.from_numpy(arrays["rois_in"][: -len(objects), 1:]).float() + PLUS_ONE
    rois, labels, deltas = targets.roi_targets(
        proposals, make_target(objects), 0.5, (0.0, 0.5), None
    )
    assert rois.numpy() - [0, 0, 1, 1] == pytest.approx(arrays["rois"][:, 1:], abs=1e-4)
    assert labels.tolist() == arrays["label"].tolist()
    std = torch.tensor([0.1, 0.1, 0.2, 0.2])
    assert (deltas / std).numpy() == pytest.approx(arrays["bbox_target"][:, 4:], abs=1e-4)
    assert ((deltas != 0).any(1).numpy() <= (arrays["bbox_weight"][:, 4:] != 0).any(1)).all()


def test_hard_examples_equal_the_release(shared: Path) -> None:
    arrays = np.load(shared / "golden" / "ops" / "utils_ohem.npz")
    attrs = json.loads(str(arrays["attrs"]))
    values = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "attrs"}
    labels = values["label"].long()
    losses = F.cross_entropy(values["cls_score"], labels, reduction="none")
    difference = values["bbox_pred"] - values["bbox_target"]
    losses += (targets.smooth_l1(difference, 1.0) * values["bbox_weight"]).sum(1)
    kept = targets.hardest(losses, torch.zeros(40, dtype=torch.int64), attrs["roi_per_img"])
    assert (kept.numpy() == (arrays["label_ohem"] >= 0)).all()


def test_losses_equal_the_release(shared: Path) -> None:
    arrays = np.load(shared / "golden" / "ops" / "losses.npz")
    values = {
        name: torch.from_numpy(arrays[name])
        for name in arrays.files
        if arrays[name].dtype.kind == "f"
    }
    x = values["sm_in"].clone().requires_grad_()
    labels = values["sm_label"].long()
    taken = labels >= 0
    F.cross_entropy(x[taken], labels[taken]).backward()
    torch.testing.assert_close(x.grad, values["sm_grad"], atol=1e-6, rtol=1e-5)
    for sigma in (1, 3):
        x = values["sl1_in"].clone().requires_grad_()
        out = targets.smooth_l1(x, sigma)
        torch.testing.assert_close(out, values[f"sl1_out_{sigma}"], atol=1e-6, rtol=1e-5)
        (out.sum() / 128).backward()
        torch.testing.assert_close(
            x.grad, values[f"sl1_grad_{sigma}_scaled_1_128"], atol=1e-7, rtol=1e-5
        )


def test_thousands_of_objects_are_compared_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(700, 2, generator=generator) * 100
    boxes = torch.cat([corners, corners + 1 + torch.rand(700, 2, generator=generator) * 20], 1)
    whole = targets.best_object(boxes[:600], boxes[600:])
    monkeypatch.setattr(targets, "PAIRS_AT_ONCE", 100 * 7)
    for ours, wanted in zip(targets.best_object(boxes[:600], boxes[600:]), whole, strict=True):
        assert torch.equal(ours, wanted)


def test_subsample_keeps_the_wanted_numbers_and_follows_its_seed() -> None:
    labels = torch.cat([torch.ones(100), torch.zeros(500), -torch.ones(50)]).long()
    kept = targets.subsample(labels, 64, 0.25, seed=3)
    assert (kept == 1).sum() == 16
    assert (kept == 0).sum() == 48
    assert ((kept == labels) | (kept == -1)).all()
    assert torch.equal(kept, targets.subsample(labels, 64, 0.25, seed=3))
    assert not torch.equal(kept, targets.subsample(labels, 64, 0.25, seed=4))


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 30), st.floats(0, 1))
def test_subsample_never_exceeds_its_numbers(
    positive: int, background: int, number: int, fraction: float
) -> None:
    labels = torch.cat([torch.ones(positive), torch.zeros(background)]).long()
    kept = targets.subsample(labels, number, fraction, seed=0)
    assert (kept == 1).sum() == min(positive, int(number * fraction))
    assert (kept >= 0).sum() <= number


def test_an_image_without_objects_is_all_background() -> None:
    _, labels, deltas = targets.roi_targets(
        torch.tensor([[0.0, 0.0, 10.0, 10.0]]),
        make_target(torch.zeros(0, 5)),
        0.5,
        (0.0, 0.5),
        None,
    )
    assert labels.tolist() == [0]
    assert deltas.abs().sum() == 0


def test_covered_background_learns_nothing() -> None:
    crowd = torch.tensor([[0.0, 0.0, 50.0, 50.0]])
    boxes = torch.tensor([[10.0, 10.0, 20.0, 20.0], [60.0, 60.0, 90.0, 90.0]])
    target = make_target(torch.tensor([[60, 60, 89, 89, 1]]), ignored=crowd)
    labels, _ = targets.rpn_targets(boxes, target, torch.ones(2, dtype=torch.bool), 0.7, 0.3, 0.5)
    assert labels.tolist() == [-1, 1]
    labels, _ = targets.rpn_targets(boxes, target, torch.ones(2, dtype=torch.bool), 0.7, 0.3, None)
    assert labels.tolist() == [0, 1]
    rois, _, _ = targets.roi_targets(boxes, target, 0.5, (0.0, 0.5), 0.5)
    assert rois[:, 0].tolist() == [60, 60]


def test_an_object_that_nothing_touches_makes_no_positives() -> None:
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]])
    target = make_target(torch.tensor([[80, 80, 90, 90, 1]]))
    labels, _ = targets.rpn_targets(
        anchors, target, torch.ones(2, dtype=torch.bool), 0.7, 0.3, None
    )
    assert labels.tolist() == [0, 0]


def test_the_best_anchor_of_an_object_is_positive_below_the_threshold() -> None:
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 4.0, 4.0]])
    target = make_target(torch.tensor([[4, 4, 13, 13, 1]]))
    assert box_ops.iou(anchors, target.boxes).max() < 0.3
    labels, _ = targets.rpn_targets(
        anchors, target, torch.ones(2, dtype=torch.bool), 0.7, 0.3, None
    )
    assert labels.tolist() == [1, 0]
