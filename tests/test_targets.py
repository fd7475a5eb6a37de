"""Assignment, sampling and losses against the 2017 release's recorded ones."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

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


# Few whole numbers: many ties, and IoUs that are a threshold exactly.
few_boxes = st.tuples(
    st.integers(0, 4), st.integers(0, 4), st.integers(1, 4), st.integers(1, 4)
).map(lambda box: (box[0], box[1], box[0] + box[2], box[1] + box[3]))
Box = tuple[int, int, int, int]


def exact_iou(a: Box, b: Box) -> Fraction:
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return Fraction(width * height, sum(areas) - width * height)


def assigned(
    boxes: list[Box], objects: list[Box], positive: float, negative: tuple[float, float],
    claim: float | None,
) -> list[int | None]:  # fmt: skip
    """mmdetection's assignment (MMDET.md, 7), box by box: an object, -1 background, None neither.

    Unlike there, an object that nothing overlaps claims nothing.
    """
    result: list[int | None] = []
    for box in boxes:
        overlaps = [exact_iou(box, one) for one in objects]
        best = max(overlaps)
        background = -1 if negative[0] <= best < negative[1] else None
        result.append(overlaps.index(best) if best >= positive else background)
    for number, one in enumerate(objects if claim is not None else []):
        overlaps = [exact_iou(box, one) for box in boxes]
        if max(overlaps, default=0) > 0 and max(overlaps) >= claim:
            result = [
                number if overlap == max(overlaps) else old
                for old, overlap in zip(result, overlaps, strict=True)
            ]
    return result


def target_of(objects: list[Box]) -> Target:
    nothing = torch.zeros(0, 4)
    return Target(0, (9, 9), torch.tensor(objects).float(), torch.arange(len(objects)), nothing)


@settings(max_examples=150)
@given(
    st.lists(st.tuples(few_boxes, st.booleans()), min_size=1, max_size=12),
    st.lists(few_boxes, min_size=1, max_size=4),
    st.sampled_from([0.5, 0.75]),
    st.sampled_from([0.0, 0.25, 0.5]),
)
def test_claimed_anchors_learn_what_mmdetection_says(
    rows: list[tuple[Box, bool]], objects: list[Box], positive: float, claim: float
) -> None:
    anchors = torch.tensor([box for box, _ in rows]).float()
    usable = torch.tensor([fine for _, fine in rows])
    labels, deltas = targets.rpn_targets(
        anchors, target_of(objects), usable, positive, 0.25, None, claim
    )
    wanted = iter(
        assigned([box for box, fine in rows if fine], objects, positive, (0, 0.25), claim)
    )
    for place, (_, fine) in enumerate(rows):
        number = next(wanted) if fine else None
        assert labels[place] == (-1 if number is None else min(number + 1, 1))
        if number is not None and number >= 0:
            goal = torch.tensor([objects[number]]).float()
            assert torch.equal(deltas[place], box_ops.encode(anchors[place, None], goal)[0])


@settings(max_examples=150)
@given(
    st.lists(few_boxes, max_size=10),
    st.lists(few_boxes, min_size=1, max_size=4, unique=True),
    st.sampled_from([None, 0.0, 0.25, 0.5]),
    st.sampled_from([0.0, 0.125]),
    st.booleans(),
)
def test_claimed_rois_learn_what_mmdetection_says(
    proposals: list[Box], objects: list[Box], claim: float | None, low: float, crowd: bool
) -> None:
    """The objects' own boxes join in afterwards: they claim nothing, and are their own."""
    target = target_of(objects)
    if crowd:
        target = replace(target, ignored=torch.tensor([[0.0, 0.0, 3.0, 3.0]]))
    rois, labels, deltas, which = targets.roi_targets(
        torch.tensor(proposals).view(-1, 4).float(), target, 0.5, (low, 0.5), 1.0, claim_iou=claim
    )
    wanted = assigned(proposals, objects, 0.5, (low, 0.5), claim) + list(range(len(objects)))
    everything = [*proposals, *objects]
    order = [i for i, number in enumerate(wanted) if number is not None and number >= 0]
    foreground = len(order)
    order += [
        i for i, number in enumerate(wanted)
        if number == -1 and not (crowd and max(everything[i][2:]) <= 3)
    ]  # fmt: skip
    assert rois.tolist() == [list(everything[i]) for i in order]
    assert labels.tolist() == [wanted[i] + 1 for i in order]
    assert which[:foreground].tolist() == [wanted[i] for i in order[:foreground]]
    goals = torch.tensor([objects[wanted[i]] for i in order[:foreground]]).float()
    assert torch.equal(deltas[:foreground], box_ops.encode(rois[:foreground], goals))
    assert not deltas[foreground:].any()


def test_an_object_claims_its_best_box_from_one_that_fits_better() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [100.0, 0.0, 110.0, 10.0]])
    objects = torch.tensor([[0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 6.0], [200.0, 0, 210, 10]])
    best, index, claimed = targets.best_object(boxes, objects)
    assert best.tolist() == pytest.approx([0.9, 0])
    assert index.tolist() == [0, 0]
    assert claimed.tolist() == [1, -1]  # the last of those it is the best of
    assert targets.best_object(boxes, objects, 0.7)[2].tolist() == [0, -1]
    assert targets.best_object(boxes, objects, 0.95)[2].tolist() == [-1, -1]


@pytest.mark.parametrize("positive", [0.5, 0.7])
@pytest.mark.parametrize("claim", [False, True])
def test_without_claims_labels_equal_torchvisions(positive: float, claim: bool) -> None:
    """Its best anchors are positive, too, but learn the object that fits them best."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(400, 2, generator=generator) * 60
    boxes = torch.cat([corners, corners + 10 + torch.rand(400, 2, generator=generator) * 40], 1)
    anchors, objects = boxes[:390], boxes[390:]
    matched = Matcher(positive, 0.3, allow_low_quality_matches=True)(
        box_iou(objects, anchors)
    )  # fmt: skip
    wanted = torch.where(matched >= 0, 1, torch.where(matched == -1, 0, -1))
    target = Target(0, (99, 99), objects, torch.zeros(10).long(), torch.zeros(0, 4))
    usable = torch.ones(390, dtype=torch.bool)
    labels, deltas = targets.rpn_targets(
        anchors, target, usable, positive, 0.3, None, 0.0 if claim else None
    )
    assert torch.equal(labels, wanted)
    own = labels == 1
    best = box_ops.encode(anchors, objects[matched.clamp(min=0)])
    assert torch.equal(deltas[own], best[own]) != claim


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
