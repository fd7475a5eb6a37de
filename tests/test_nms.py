import logging
from pathlib import Path
from typing import Any

import numpy as np
import op_cases
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcdet.ops import batched_nms, nms, reference

# Few whole numbers: many duplicates, ties, boxes without area and boxes upside down.
coordinates = st.integers(0, 6).map(float)
rows = st.tuples(coordinates, coordinates, coordinates, coordinates, st.integers(0, 4).map(float))
bad_numbers = st.sampled_from([torch.nan, torch.inf, -torch.inf])


def split(values: list[tuple[float, ...]]) -> tuple[Tensor, Tensor]:
    table = torch.tensor(values, dtype=torch.float32).view(-1, 5)
    return table[:, :4], table[:, 4]


def test_golden(shared: Path) -> None:
    """The release's NMS on inclusive boxes: the same boxes with 1 added to x2 and y2."""
    arrays = np.load(shared / "golden" / "ops" / "utils_boxes.npz")
    dets = torch.from_numpy(arrays["dets"]).float()
    boxes = dets[:, :4] + torch.tensor([0.0, 0, 1, 1])
    for name, threshold in (("03", 0.3), ("05", 0.5), ("07", 0.7)):
        kept = nms(boxes, dets[:, 4], threshold)
        assert kept.tolist() == arrays[f"nms_keep_{name}"].tolist()


# No IoU of these boxes is 0.11, 0.29, 0.61 or 0.89: float32 and float64 would round it apart.
@settings(max_examples=200)
@given(st.lists(rows, max_size=12), st.sampled_from([0.0, 0.11, 0.29, 0.61, 0.89, 1.0]))
def test_equals_the_reference(values: list[tuple[float, ...]], threshold: float) -> None:
    boxes, scores = split(values)
    assert nms(boxes, scores, threshold).tolist() == reference.nms(boxes, scores, threshold)


@settings(max_examples=100)
@given(st.lists(rows, max_size=10), st.lists(rows, min_size=1, max_size=4), st.data())
def test_bad_rows_change_nothing(
    good: list[tuple[float, ...]], bad: list[tuple[float, ...]], data: st.DataObject
) -> None:
    """The result on good and non-finite rows is the result on the good ones."""
    spoilt = []
    for row in bad:
        place = data.draw(st.integers(0, 4))
        spoilt.append((*row[:place], data.draw(bad_numbers), *row[place + 1 :]))
    mixed = data.draw(st.permutations([*enumerate(good), *((None, row) for row in spoilt)]))
    # equal scores count in the order given: keep the good rows' own order
    place = iter(range(len(good)))
    mixed = [(None, row) if i is None else (n := next(place), good[n]) for i, row in mixed]
    boxes, scores = split([row for _, row in mixed])
    labels = torch.tensor([int(row[0]) if row[0] in (0, 1) else 2 for _, row in mixed])
    is_good = torch.tensor([i is not None for i, _ in mixed])
    numbers = is_good.nonzero()[:, 0]
    for kept, alone in (
        (nms(boxes, scores, 0.4), nms(*split(good), 0.4)),
        (
            batched_nms(boxes, scores, labels, 0.4),
            batched_nms(*split(good), labels[is_good], 0.4),
        ),
    ):
        assert kept.tolist() == numbers[alone].tolist()


@settings(max_examples=100)
@given(st.lists(rows, max_size=12), st.data())
def test_batched_is_nms_label_by_label(
    values: list[tuple[float, ...]], data: st.DataObject
) -> None:
    """Whatever lies in the other labels, huge boxes included, a label's result is its own."""
    values = [(row[0], row[1], row[2], row[3], row[4]) for row in values]
    huge = data.draw(st.sampled_from([1.0, 1e6, 1e30]))
    boxes, scores = split(values)
    labels = torch.tensor([data.draw(st.integers(-1, 2)) for _ in values], dtype=torch.int64)
    boxes = torch.where((labels == 0)[:, None], boxes * huge, boxes)
    kept = batched_nms(boxes, scores, labels, 0.4)
    expected = []
    for label in (-1, 0, 1, 2):
        members = (labels == label).nonzero()[:, 0]
        expected += members[nms(boxes[members], scores[members], 0.4)].tolist()
    assert kept.tolist() == sorted(expected, key=lambda i: (-scores[i].item(), i))


def test_threshold_is_exclusive() -> None:
    """An IoU of exactly the threshold does not suppress."""
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 2]])  # IoU 0.5
    scores = torch.tensor([0.9, 0.8])
    assert nms(boxes, scores, 0.5).tolist() == [0, 1]
    assert nms(boxes, scores, 0.499).tolist() == [0]


@pytest.mark.parametrize(
    "box", [[3, 3, 3, 3], [3, 3, 3, 9], [5, 5, 2, 2], [0, 0, 1e-30, 1e-30], [0, 0, 1e30, 1e30]]
)
def test_duplicates_without_a_measurable_area(box: list[float]) -> None:
    """They suppress each other, although their IoU is 0 / 0, and nothing else."""
    boxes = torch.tensor([box, [0.0, 0, 10, 10], box, [-0.0, 0, 10, 11], box]).float()
    scores = torch.tensor([0.5, 0.9, 0.7, 0.1, 0.7])
    assert nms(boxes, scores, 0.95).tolist() == [1, 2, 3]


def test_ties_keep_their_order() -> None:
    boxes = torch.arange(200.0)[:, None] * 10 + torch.tensor([0.0, 0, 5, 5])
    assert nms(boxes, torch.full((200,), 0.5), 0.5).tolist() == list(range(200))
    assert nms(boxes[:1].repeat(50, 1), torch.ones(50), 0.5).tolist() == [0]


def pairs_on_the_threshold(number: int) -> Tensor:
    """Boxes in pairs one after the other, whose IoU is 0.5 but for rounding, in 1333 x 800 pixels.

    A box is its neighbour moved by a third of the width.
    """
    generator = torch.Generator().manual_seed(0)
    corner, size = torch.rand(2, number, 2, generator=generator) * torch.tensor([1200.0, 700.0])
    one = torch.cat([corner, corner + 8 + size / 8], 1)
    step = (one[:, 2] - one[:, 0]) / 3
    other = one + torch.stack([step, 0 * step, step, 0 * step], 1)
    return torch.stack([one, other], 1).view(-1, 4)


def test_shifted_labels_round_as_torchvision_and_mmdetection_round_them() -> None:
    """MMDET.md, 9: label * (largest coordinate + 1) is added in float32."""
    boxes = pairs_on_the_threshold(400)
    scores = torch.rand(800, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(400).repeat_interleave(2) % 80
    results = {
        shift: way(boxes, scores, labels, 0.5)
        for shift, way in (
            (False, torchvision.ops.boxes._batched_nms_vanilla),
            (True, torchvision.ops.boxes._batched_nms_coordinate_trick),
        )
    }
    assert results[False].tolist() != results[True].tolist()
    for shift, wanted in results.items():
        kept = batched_nms(boxes, scores, labels, 0.5, shift=shift)
        assert kept.tolist() == wanted.tolist()
    # Bad rows change nothing for the others; they do not count as the largest coordinate either.
    bad = torch.tensor([[0.0, 0, torch.inf, 5], [torch.nan, 0, 1, 1]])
    kept = batched_nms(torch.cat([boxes, bad]), torch.cat([scores, torch.ones(2)]),
                       torch.cat([labels, labels[:2]]), 0.5, shift=True)  # fmt: skip
    assert kept.tolist() == results[True].tolist()
    assert batched_nms(boxes[:0], scores[:0], labels[:0], 0.5, shift=True).shape == (0,)


def test_no_boxes() -> None:
    none = (torch.zeros(0, 4), torch.zeros(0))
    assert nms(*none, 0.5).shape == (0,)
    assert batched_nms(*none, torch.zeros(0, dtype=torch.int64), 0.5).dtype == torch.int64
    spoilt = (torch.full((3, 4), torch.nan), torch.ones(3))
    assert nms(*spoilt, 0.5).shape == (0,)


def test_dropped_rows_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, torch.inf, 1]])
    with caplog.at_level(logging.DEBUG, "dcdet.ops"):
        nms(boxes, torch.ones(2), 0.5)
    assert "1 non-finite" in caplog.text


def test_many_boxes() -> None:
    """100,000 boxes in 80 classes, of which a tenth are copies, some bad."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(100_000, 2, generator=generator) * 1000
    boxes = torch.cat([corners, corners + torch.rand(100_000, 2, generator=generator) * 90], 1)
    boxes[90_000:] = boxes[:10_000]
    boxes[::1000] = torch.nan
    scores = torch.rand(100_000, generator=generator)
    labels = torch.arange(100_000) % 80
    labels[90_000:] = labels[:10_000]
    kept = batched_nms(boxes, scores, labels, 0.5)
    assert boxes[kept].isfinite().all()
    assert (scores[kept].diff() <= 0).all()
    pairs = torch.cat([boxes[kept], labels[kept, None]], 1)
    assert pairs.unique(dim=0).shape[0] == kept.shape[0] > 10_000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 3], [9, 9, 12, 12]]).to(dtype).requires_grad_()
    assert nms(boxes, torch.tensor([0.5, 0.75, 0.25]).to(dtype), 0.5).tolist() == [1, 2]


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("boxes type", {"boxes": [[0, 0, 1, 1]]}, TypeError, "boxes must be a tensor, got list"),
    ("boxes rank", {"boxes": torch.zeros(4)}, ValueError, "boxes must be a tensor of 2"),
    ("boxes width", {"boxes": torch.zeros(3, 5)}, ValueError, r"boxes .*\(3, 4\)"),
    ("boxes dtype", {"boxes": torch.zeros(3, 4).int()}, TypeError, "boxes .*int32"),
    ("scores rank", {"scores": torch.zeros(3, 1)}, ValueError, "scores must be a tensor of 1"),
    ("scores length", {"scores": torch.zeros(2)}, ValueError, r"scores .*\(3,\)"),
    ("scores dtype", {"scores": torch.zeros(3).long()}, TypeError, "scores .*int64"),
    ("scores device", {"scores": torch.zeros(3, device="meta")}, ValueError, "scores .*meta"),
    ("labels type", {"labels": None}, TypeError, "labels must be a tensor"),
    ("labels length", {"labels": torch.zeros(2).long()}, ValueError, r"labels .*\(3,\)"),
    ("labels dtype", {"labels": torch.zeros(3)}, TypeError, "labels .*float32"),
    ("labels bool", {"labels": torch.zeros(3).bool()}, TypeError, "labels .*bool"),
    (
        "labels device",
        {"labels": torch.zeros(3, device="meta").long()},
        ValueError,
        "labels .*meta",
    ),
    ("threshold high", {"iou_threshold": 1.5}, ValueError, r"iou_threshold must be in \[0, 1\]"),
    ("threshold low", {"iou_threshold": -0.1}, ValueError, r"iou_threshold must be in \[0, 1\]"),
    ("threshold nan", {"iou_threshold": torch.nan}, ValueError, "iou_threshold must be finite"),
    ("threshold type", {"iou_threshold": "0.5"}, TypeError, "iou_threshold must be a number"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {
        "boxes": torch.zeros(3, 4),
        "scores": torch.zeros(3),
        "labels": torch.zeros(3).long(),
        "iou_threshold": 0.5,
    }
    with pytest.raises(error, match=f"batched_nms: {message}"):
        batched_nms(**good | change)
    if "labels" not in change:
        good.pop("labels")
        with pytest.raises(error, match=f"^nms: {message}"):
            nms(**good | change)


@op_cases.needs_cuda
def test_cuda_equals_cpu() -> None:
    boxes = (torch.rand(2000, 4) * 60).round()
    scores, labels = (torch.rand(2000) * 20).round(), torch.arange(2000) % 5
    on_gpu = batched_nms(boxes.cuda(), scores.cuda(), labels.cuda(), 0.4)
    assert on_gpu.tolist() == batched_nms(boxes, scores, labels, 0.4).tolist()
