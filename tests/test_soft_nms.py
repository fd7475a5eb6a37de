import logging
from typing import Any

import numpy as np
import op_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcdet.ops import batched_soft_nms, soft_nms

# Few whole numbers: many duplicates, ties, boxes without area and boxes upside down.
coordinates = st.integers(0, 6).map(float)
rows = st.tuples(coordinates, coordinates, coordinates, coordinates, st.integers(0, 4).map(float))
options = st.sampled_from(
    [
        {"method": "gaussian", "sigma": 0.5},
        {"method": "gaussian", "sigma": 0.6},
        {"method": "gaussian", "sigma": 1e-3},  # some weights are exactly 0
        {"method": "linear", "iou_threshold": 0.3},
        {"method": "linear", "iou_threshold": 0.0},
        {"method": "linear", "iou_threshold": 1.0},
    ]
)


def split(values: list[tuple[float, ...]]) -> tuple[Tensor, Tensor]:
    table = torch.tensor(values, dtype=torch.float64).view(-1, 5)
    return table[:, :4], table[:, 4]


def overlap(a: list[float], b: list[float]) -> float:
    """IoU of two boxes; copies of a box without area overlap wholly."""
    if a == b:
        return 1.0
    areas = [max(x2 - x1, 0.0) * max(y2 - y1, 0.0) for x1, y1, x2, y2 in (a, b)]
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / (areas[0] + areas[1] - shared) if shared > 0 else 0.0


def twin(
    boxes: Tensor,
    scores: Tensor,
    method: str = "gaussian",
    sigma: float = 0.5,
    iou_threshold: float = 0.3,
) -> tuple[list[int], list[float]]:
    """The pseudo code of Bodla et al., figure 3, one box and one number at a time."""
    remaining = dict(enumerate(scores.tolist()))
    table = boxes.tolist()
    found: list[int] = []
    final: list[float] = []
    while remaining:
        best = max(remaining, key=lambda i: (remaining[i], -i))
        found.append(best)
        final.append(remaining.pop(best))
        for i in remaining:
            iou = overlap(table[best], table[i])
            if method == "gaussian":
                remaining[i] *= float(np.exp(-(iou * iou) / sigma))
            elif iou >= iou_threshold:
                remaining[i] *= 1 - iou
    return found, final


def check_same(ours: tuple[Tensor, Tensor], places: list[int], scores: list[float]) -> None:
    assert ours[0].tolist() == places
    assert ours[1].tolist() == pytest.approx(scores, rel=1e-12, abs=0)


@settings(max_examples=200)
@given(st.lists(rows, max_size=12), options)
def test_equals_the_twin(values: list[tuple[float, ...]], how: dict[str, Any]) -> None:
    boxes, scores = split(values)
    check_same(soft_nms(boxes, scores, **how), *twin(boxes, scores, **how))


@pytest.mark.parametrize("method", ["gaussian", "linear"])
def test_many_boxes_in_any_number_of_outputs(method: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(400, 2, generator=generator) * 64
    boxes = torch.cat([corners, corners + 40], 1)
    scores = torch.rand(400, generator=generator, dtype=torch.float64)
    places, lowered = twin(boxes, scores, method)
    for number in (None, 1, 2, 100, 399, 400, 1000):
        ours = soft_nms(boxes, scores, method, max_outputs=number)
        check_same(ours, places[:number], lowered[:number])


def test_weights_by_hand() -> None:
    """IoUs with the first box: 0.5, 0.25, 0; with the second, 0.5 for the third."""
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 2], [0, 0, 2, 2], [9, 9, 10, 10]])
    scores = torch.tensor([1.0, 0.5, 0.25, 0.375])
    found, lowered = soft_nms(boxes, scores, "linear", iou_threshold=0.5)
    assert found.tolist() == [0, 3, 1, 2]  # an IoU of the threshold counts
    assert lowered.tolist() == [1.0, 0.375, 0.25, 0.125]
    found, lowered = soft_nms(boxes, scores, "linear", iou_threshold=0.501)
    assert found.tolist() == [0, 1, 3, 2]
    assert lowered.tolist() == [1.0, 0.5, 0.375, 0.25]
    found, lowered = soft_nms(boxes, scores, sigma=0.6)
    half, quarter = np.exp(-0.25 / 0.6), np.exp(-0.0625 / 0.6)
    assert found.tolist() == [0, 3, 1, 2]
    expected = [1.0, 0.375, 0.5 * half, 0.25 * quarter * half]
    assert lowered.tolist() == pytest.approx(expected, rel=1e-6)


def test_the_order_is_decided_anew_after_every_output() -> None:
    """Boxes overlapping the best one fall behind boxes of lesser scores that do not."""
    boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 7], [20, 0, 28, 8], [20, 0, 28, 7]])
    scores = torch.tensor([0.9, 0.8, 0.3, 0.28])
    found, lowered = soft_nms(boxes, scores, "linear")
    assert found.tolist() == [0, 2, 1, 3]
    expected = [0.9, 0.3, 0.1, 0.035]
    assert lowered.tolist() == pytest.approx(expected, rel=1e-6)


@settings(max_examples=100)
@given(st.lists(rows, max_size=12), options, st.data())
def test_batched_is_label_by_label(
    values: list[tuple[float, ...]], how: dict[str, Any], data: st.DataObject
) -> None:
    """The best of all labels' results, equal scores in the order given, whatever the number."""
    boxes, scores = split(values)
    labels = torch.tensor([data.draw(st.integers(-1, 2)) for _ in values], dtype=torch.int64)
    expected = []
    for label in (-1, 0, 1, 2):
        members = (labels == label).nonzero()[:, 0]
        places, lowered = soft_nms(boxes[members], scores[members], **how)
        expected += zip((-lowered).tolist(), members[places].tolist(), strict=True)
    expected.sort()
    number = data.draw(st.integers(1, 13))
    ours = batched_soft_nms(boxes, scores, labels, **how, max_outputs=number)
    check_same(ours, [i for _, i in expected][:number], [-s for s, _ in expected][:number])


@settings(max_examples=100)
@given(st.lists(rows, max_size=10), st.lists(rows, min_size=1, max_size=4), options, st.data())
def test_bad_rows_change_nothing(
    good: list[tuple[float, ...]],
    bad: list[tuple[float, ...]],
    how: dict[str, Any],
    data: st.DataObject,
) -> None:
    """The result on good and non-finite rows is the result on the good ones."""
    table = list(good)
    is_good = [True] * len(good)
    for row in bad:
        column, place = data.draw(st.integers(0, 4)), data.draw(st.integers(0, len(table)))
        number = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
        table.insert(place, (*row[:column], number, *row[column + 1 :]))
        is_good.insert(place, False)
    numbers = torch.tensor(is_good).nonzero()[:, 0]
    places, lowered = soft_nms(*split(good), **how)
    check_same(soft_nms(*split(table), **how), numbers[places].tolist(), lowered.tolist())


@pytest.mark.parametrize(
    "box", [[3, 3, 3, 3], [3, 3, 3, 9], [5, 5, 2, 2], [0, 0, 1e-30, 1e-30], [-3e38, 0, 3e38, 3e38]]
)
def test_copies_of_odd_boxes(box: list[float]) -> None:
    """Their IoU is 1, although it may be 0 / 0, and other boxes are not touched."""
    boxes = torch.tensor([box, [0.0, 0, 10, 10], box, [-0.0, 0, 10, 11], box])
    scores = torch.tensor([0.5, 0.9, 0.7, 0.1, 0.7])
    found, lowered = soft_nms(boxes, scores, "linear", iou_threshold=0.95)
    assert found.tolist() == [1, 2, 3, 0, 4]
    assert lowered.tolist() == pytest.approx([0.9, 0.7, 0.1, 0, 0])


def test_ties_keep_their_order() -> None:
    boxes = torch.arange(200.0)[:, None] * 10 + torch.tensor([0.0, 0, 5, 5])
    scores, labels = torch.full((200,), 0.5), torch.arange(200) % 3
    assert soft_nms(boxes, scores)[0].tolist() == list(range(200))
    assert batched_soft_nms(boxes, scores, labels, max_outputs=7)[0].tolist() == list(range(7))
    copies = boxes[:1].repeat(40, 1)
    found, lowered = soft_nms(copies, torch.ones(40))
    assert found.tolist() == list(range(40))
    assert lowered.log().tolist() == pytest.approx([-2.0 * i for i in range(40)])


def test_no_boxes() -> None:
    none = (torch.zeros(0, 4), torch.zeros(0))
    for found, lowered in (
        soft_nms(*none),
        batched_soft_nms(*none, torch.zeros(0, dtype=torch.int32)),
        soft_nms(torch.full((3, 4), torch.nan), torch.ones(3), max_outputs=5),
    ):
        assert found.shape == lowered.shape == (0,)
        assert (found.dtype, lowered.dtype) == (torch.int64, torch.float32)


def test_nothing_given_is_changed() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 3]], requires_grad=True)
    scores = torch.tensor([0.5, 0.75], requires_grad=True)
    found, lowered = soft_nms(boxes, scores)
    assert found.tolist() == [1, 0]
    assert not lowered.requires_grad
    assert scores.tolist() == [0.5, 0.75]


def test_dropped_rows_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, torch.inf, 1]])
    with caplog.at_level(logging.DEBUG, "dcdet.ops"):
        soft_nms(boxes, torch.ones(2))
    assert "soft_nms dropped 1 non-finite" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_layouts(dtype: torch.dtype) -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 3], [9, 9, 12, 12]]).T.contiguous().T
    scores = torch.tensor([0.5, 0, 0.75, 0, 0.25, 0])[::2]
    expected = soft_nms(boxes, scores, "linear")
    found, lowered = soft_nms(boxes.to(dtype), scores.to(dtype), "linear")
    assert found.tolist() == expected[0].tolist() == [1, 2, 0]
    assert lowered.dtype == dtype
    assert lowered.tolist() == expected[1].tolist() == [0.75, 0.25, 0.125]


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("boxes type", {"boxes": [[0.0] * 4] * 3}, TypeError, "boxes must be a tensor"),
    ("boxes shape", {"boxes": torch.zeros(3, 5)}, ValueError, r"boxes .*\(3, 4\)"),
    ("scores length", {"scores": torch.zeros(2)}, ValueError, r"scores .*\(3,\)"),
    ("scores dtype", {"scores": torch.zeros(3).long()}, TypeError, "scores .*int64"),
    ("scores sign", {"scores": -torch.ones(3)}, ValueError, "scores must be at least 0, got -1"),
    ("labels dtype", {"labels": torch.zeros(3)}, TypeError, "labels .*float32"),
    ("labels length", {"labels": torch.zeros(2).long()}, ValueError, r"labels .*\(3,\)"),
    ("method", {"method": "hard"}, ValueError, "method must be 'gaussian' or 'linear', got 'hard'"),
    ("method type", {"method": None}, ValueError, "method must be 'gaussian' or 'linear'"),
    ("sigma", {"sigma": 0.0}, ValueError, "sigma must be positive, got 0"),
    ("sigma nan", {"sigma": torch.nan}, ValueError, "sigma must be finite"),
    ("sigma type", {"sigma": "1"}, TypeError, "sigma must be a number"),
    ("threshold", {"iou_threshold": 1.5}, ValueError, r"iou_threshold must be in \[0, 1\]"),
    ("number", {"max_outputs": 0}, ValueError, "max_outputs must be at least 1, got 0"),
    ("number type", {"max_outputs": 1.0}, TypeError, "max_outputs must be an int"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {
        "boxes": torch.zeros(3, 4),
        "scores": torch.zeros(3),
        "labels": torch.zeros(3).long(),
    }
    with pytest.raises(error, match=f"batched_soft_nms: {message}"):
        batched_soft_nms(**good | change)
    if "labels" not in change:
        good.pop("labels")
        with pytest.raises(error, match=f"^soft_nms: {message}"):
            soft_nms(**good | change)


@op_cases.needs_cuda
def test_cuda_equals_cpu() -> None:
    boxes = (torch.rand(2000, 4) * 60).round()
    scores, labels = (torch.rand(2000) * 20).round(), torch.arange(2000) % 5
    on_gpu = batched_soft_nms(boxes.cuda(), scores.cuda(), labels.cuda(), max_outputs=300)
    on_cpu = batched_soft_nms(boxes, scores, labels, max_outputs=300)
    assert on_gpu[0].is_cuda
    assert on_gpu[1].is_cuda
    assert on_gpu[0].tolist() == on_cpu[0].tolist()
    assert on_gpu[1].tolist() == on_cpu[1].tolist()
