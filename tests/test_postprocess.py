from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import load
from test_nms import pairs_on_the_threshold
from torch import Tensor

from dcdet import boxes as box_ops
from dcdet.models.postprocess import PostprocessSpec, SoftNMSSpec, select
from dcdet.ops import batched_nms

SIGMA = 0.6  # the release's SOFTNMS_THRESH


def inclusive_iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The release's IoU of a box (4,) with others (N, 4), all inclusive."""
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[2:], others[:, 2:])
    shared = np.maximum(high - low + 1, 0).prod(1)
    areas = [np.prod(b[..., 2:] - b[..., :2] + 1, axis=-1) for b in (box, others)]
    return shared / (areas[0] + areas[1] - shared)


@pytest.fixture(scope="module")
def recorded(shared: Path) -> tuple[Any, Tensor, Tensor]:
    """The recorded run of the release's deformable FPN; boxes (300, 80, 4) and scores (300, 80).

    The deltas of every fourth RoI are on record: their boxes are decoded here, for all classes.
    Boxes of the other RoIs are known where they are among the recorded detections: a detection's
    own RoI is the one with its score, once what earlier detections took from it is given back. The
    rest is NaN: it comes later in the order of its class, and cannot change what is recorded.
    """
    arrays, info = load(shared, "fpn_dcn")
    height, width, scale = info["im_info"]
    rois = torch.from_numpy(arrays["rois"])[::4, 1:] + torch.tensor([0, 0, 1, 1])
    deltas = torch.from_numpy(arrays["bbox_pred"]).view(75, 81, 4)[:, 1:]
    decoded = box_ops.clip(box_ops.decode(rois, deltas), (height, width), "inclusive")
    scores = torch.from_numpy(arrays["cls_prob"])[:, 1:]
    boxes = torch.full((300, 80, 4), torch.nan)
    boxes[::4] = box_ops.rescale(decoded, 1 / scale, "inclusive")
    for name in ("detections", "detections_softnms"):
        table = arrays[name].astype(np.float64)
        for place, row in enumerate(table):
            earlier = table[:place][table[:place, 0] == row[0], 1:5]
            taken = np.exp(-(inclusive_iou(row[1:5], earlier) ** 2) / SIGMA).prod()
            original = row[5] / (taken if name == "detections_softnms" else 1)
            label = int(row[0]) - 1
            distance = (scores[:, label] - original).abs()
            assert distance.min() < 1e-6 * original
            box = torch.from_numpy(row[1:5]).float() + torch.tensor([0, 0, 1, 1])
            at = boxes[distance.argmin(), label]
            assert at.isnan().all() or torch.allclose(at, box, rtol=0, atol=1e-3)
            at[:] = box
    return arrays, boxes, scores


@pytest.mark.parametrize("name", ["detections", "detections_softnms"])
def test_recorded_detections(recorded: tuple[Any, Tensor, Tensor], name: str) -> None:
    arrays, boxes, scores = recorded
    soft = SoftNMSSpec("gaussian", sigma=SIGMA) if name == "detections_softnms" else None
    found, lowered, labels = select(boxes, scores, PostprocessSpec(1e-3, 0.3, 100, soft))
    assert (lowered.diff() <= 0).all()
    by_class = labels.argsort(stable=True)  # the order of the recording
    assert (labels[by_class] + 1).tolist() == arrays[name][:, 0].tolist()
    inclusive = found[by_class] - torch.tensor([0, 0, 1, 1])
    np.testing.assert_allclose(inclusive, arrays[name][:, 1:5], rtol=0, atol=1e-3)
    np.testing.assert_allclose(lowered[by_class], arrays[name][:, 5], rtol=0, atol=1e-6)


def test_soft_nms_takes_the_place_of_the_hard_one() -> None:
    """Scores at the threshold stay out, lowered ones below it stay in; the best few remain."""
    boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 8], [20, 0, 28, 8], [50, 0, 60, 9]])
    scores = torch.tensor([[0.9, 0.5], [0.2, 0.0], [0.05, 0.3], [0.1, 0.0]])
    soft = SoftNMSSpec("linear", iou=0.5)
    kept, lowered, labels = select(boxes, scores, PostprocessSpec(0.1, 0.3, 10, soft))
    assert lowered.tolist() == pytest.approx([0.9, 0.5, 0.3, 0.0])
    assert labels.tolist() == [0, 1, 1, 0]
    assert kept.tolist() == boxes[[0, 0, 2, 1]].tolist()
    kept, lowered, labels = select(boxes, scores, PostprocessSpec(0.1, 0.3, 2, soft))
    assert lowered.tolist() == pytest.approx([0.9, 0.5])
    kept, lowered, labels = select(boxes, scores, PostprocessSpec(0.1, 0.3, 10))
    assert lowered.tolist() == pytest.approx([0.9, 0.5, 0.3])


@pytest.mark.parametrize("soft", [None, SoftNMSSpec("gaussian")])
@pytest.mark.parametrize("classes", [1, 2])
def test_small_boxes_are_dropped_before_they_suppress(
    soft: SoftNMSSpec | None, classes: int
) -> None:
    """The best of three alike is 1.9 pixels wide; a box of the least size stays."""
    boxes = torch.tensor([[0.1, 0, 2, 9], [0, 0, 2, 9], [0, 0, 2, 9], [50, 50, 90, 51.9]])
    boxes = boxes if classes == 1 else boxes[:, None].expand(4, 2, 4)
    scores = torch.tensor([[0.9], [0.8], [0.7], [0.6]]).expand(4, classes)
    found, kept, labels = select(boxes, scores, PostprocessSpec(0.1, 0.3, 9, soft, min_size=2.0))
    number = 1 if soft is None else 2
    assert sorted(labels.tolist()) == sorted([*range(classes)] * number)
    assert found.tolist() == [[0, 0, 2, 9]] * number * classes
    assert kept[:classes].tolist() == pytest.approx([0.8] * classes)
    every = select(boxes, scores, PostprocessSpec(0.1, 0.3, 9))[1]
    assert every.tolist() == pytest.approx([0.9] * classes + [0.6] * classes)


@pytest.mark.parametrize("shift", [False, True])
def test_classes_are_shifted_where_asked(shift: bool) -> None:
    boxes = pairs_on_the_threshold(80)
    scores = torch.zeros(160, 80)
    label = torch.arange(80).repeat_interleave(2)
    scores[torch.arange(160), label] = torch.linspace(0.9, 0.1, 160)
    found, _, labels = select(boxes, scores, PostprocessSpec(0.01, 0.5, 999, shift=shift))
    kept = batched_nms(boxes, scores.amax(1), label, 0.5, shift=shift)
    assert torch.equal(found, boxes[kept])
    assert torch.equal(labels, label[kept])
    assert len(kept) != len(batched_nms(boxes, scores.amax(1), label, 0.5, shift=not shift))


@pytest.mark.parametrize("soft", [None, SoftNMSSpec("gaussian")])
def test_nothing_to_choose_from(soft: SoftNMSSpec | None) -> None:
    spec = PostprocessSpec(0.5, 0.3, 10, soft)
    for boxes in (torch.zeros(0, 4), torch.zeros(0, 3, 4), torch.zeros(5, 4)):
        found, scores, labels = select(boxes, torch.full((len(boxes), 3), 0.1), spec)
        assert (found.shape, scores.shape, labels.shape) == ((0, 4), (0,), (0,))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "gaussian", "sigma": 0.0}, "sigma: must be positive"),
        ({"method": "linear", "iou": 1.5}, r"iou: must be in \[0, 1\]"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoftNMSSpec(**values)
    with pytest.raises(ValueError, match=r"^min_size: must be at least 0"):
        PostprocessSpec(0.1, 0.3, 9, min_size=-1.0)
