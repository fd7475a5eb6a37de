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
    cell = cell_anchors(16, attrs["scales"], attrs["ratios"])
    anchors = grid_anchors(cell, (16, 16), (height, width))
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
    rois, labels, deltas, _ = targets.roi_targets(
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
        out = targets.smooth_l1(x, sigma**-2)
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
    _, labels, deltas, _ = targets.roi_targets(
        torch.tensor([[0.0, 0.0, 10.0, 10.0]]),
        make_target(torch.zeros(0, 5)),
        0.5,
        (0.0, 0.5),
        None,
    )
    assert labels.tolist() == [0]
    assert deltas.abs().sum() == 0


def crowd_of_rois() -> tuple[torch.Tensor, Target]:
    """60 RoIs: 20 foreground, 10 of IoU 1/3 (background), 30 far off (IoU 0); and 1 object."""
    near = torch.tensor([20.0, 20.0, 60.0, 60.0]) + torch.arange(1, 21)[:, None] * 0.1
    half = torch.tensor([40.0, 20.0, 80.0, 60.0]) + torch.arange(10)[:, None] * 0.1
    far = torch.tensor([200.0, 200.0, 240.0, 240.0]) + torch.arange(30)[:, None]
    return torch.cat([near, half, far]), make_target(torch.tensor([[20, 20, 59, 59, 3]]))


@pytest.mark.parametrize(
    ("number", "fraction", "fill", "foreground", "background", "filled"),
    [
        (16, 0.25, False, 4, 10, 0),  # 12 background RoIs are wanted, 10 are there
        (16, 0.25, True, 4, 10, 2),
        (8, 0.25, True, 2, 6, 0),
        (128, 0.25, False, 21, 10, 0),  # the object's own box is one of the 21
        (128, 0.25, True, 21, 10, 97),  # more than there are RoIs: each comes again
        (10, 0.0, True, 0, 10, 0),
        (10, 1.0, True, 10, 0, 0),
    ],
)
def test_rois_are_drawn_as_the_release_draws(
    number: int, fraction: float, fill: bool, foreground: int, background: int, filled: int
) -> None:
    proposals, target = crowd_of_rois()
    spec = targets.SampleSpec(number, fraction, fill)
    rois, labels, deltas, _ = targets.roi_targets(
        proposals, target, 0.5, (0.1, 0.5), None, spec, seed=7
    )
    assert len(rois) == len(labels) == len(deltas) == foreground + background + filled
    assert labels.tolist() == [3] * foreground + [0] * (background + filled)
    best = box_ops.iou(rois, target.boxes)[:, 0]
    assert (best[:foreground] >= 0.5).all()
    drawn = best[foreground : foreground + background]
    assert ((drawn >= 0.1) & (drawn < 0.5)).all()
    assert (deltas[foreground:] == 0).all()
    chosen = rois[: foreground + background]
    assert len(chosen.unique(dim=0)) == len(chosen)
    everything = torch.cat([proposals, target.boxes])
    extra = rois[foreground + background :]
    assert all((roi == everything).all(1).any() for roi in extra)
    counts = extra.unique(dim=0, return_counts=True)[1].tolist()
    assert max(counts, default=0) - min(counts, default=0) <= 1
    if filled > 61:
        assert len(counts) == 61  # none twice before all have come
        assert (best[foreground + background :] >= 0.5).any()  # objects' RoIs called background


def test_a_draw_follows_its_seed_and_is_not_the_rpns() -> None:
    proposals, target = crowd_of_rois()
    spec = targets.SampleSpec(16, 0.25, True)
    first, again, other = (
        targets.roi_targets(proposals, target, 0.5, (0.1, 0.5), None, spec, seed=seed)[0]
        for seed in (7, 7, 8)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    labels = torch.zeros(61).long()
    assert not torch.equal(
        targets.subsample(labels, 16, 0.25, 7), targets.subsample(labels, 16, 0.25, 8)
    )


@pytest.mark.parametrize("fill", [False, True])
def test_an_image_without_objects_or_without_rois_can_be_drawn_from(fill: bool) -> None:
    proposals, _ = crowd_of_rois()
    spec = targets.SampleSpec(16, 0.25, fill)
    nothing = make_target(torch.zeros(0, 5))
    rois, labels, deltas, _ = targets.roi_targets(
        proposals, nothing, 0.5, (0.1, 0.5), None, spec, seed=7
    )
    assert labels.tolist() == [0] * (16 if fill else 0)
    assert deltas.abs().sum() == 0
    assert rois.shape == deltas.shape == (len(labels), 4)
    rois, labels, _, _ = targets.roi_targets(
        proposals[:0], nothing, 0.5, (0.1, 0.5), None, spec, seed=7
    )
    assert rois.shape == (0, 4)
    assert labels.shape == (0,)


def test_filling_spares_covered_rois() -> None:
    proposals, target = crowd_of_rois()
    ignored = torch.tensor([[190.0, 190.0, 300.0, 300.0]])
    target = Target(0, (400, 400), target.boxes, target.labels, ignored)
    spec = targets.SampleSpec(128, 0.25, True)
    rois, _, _, _ = targets.roi_targets(proposals, target, 0.5, (0.1, 0.5), 0.5, spec, seed=7)
    assert len(rois) == 128
    assert (rois[:, 0] < 100).all()


def test_covered_background_learns_nothing() -> None:
    crowd = torch.tensor([[0.0, 0.0, 50.0, 50.0]])
    boxes = torch.tensor([[10.0, 10.0, 20.0, 20.0], [60.0, 60.0, 90.0, 90.0]])
    target = make_target(torch.tensor([[60, 60, 89, 89, 1]]), ignored=crowd)
    labels, _ = targets.rpn_targets(boxes, target, torch.ones(2, dtype=torch.bool), 0.7, 0.3, 0.5)
    assert labels.tolist() == [-1, 1]
    labels, _ = targets.rpn_targets(boxes, target, torch.ones(2, dtype=torch.bool), 0.7, 0.3, None)
    assert labels.tolist() == [0, 1]
    rois, _, _, _ = targets.roi_targets(boxes, target, 0.5, (0.0, 0.5), 0.5)
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
