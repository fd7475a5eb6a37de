"""Box arithmetic against the 2017 release's recorded values and against its own inverses."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.detection._utils import BoxCoder

from dcdet import boxes as box_ops

PLUS_ONE = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)


def recorded(shared: Path) -> dict[str, torch.Tensor]:
    arrays = np.load(shared / "golden" / "ops" / "utils_boxes.npz")
    return {
        name: torch.from_numpy(arrays[name])
        for name in arrays.files
        if arrays[name].dtype.kind == "f"
    }


def test_encode_equals_the_release(shared: Path) -> None:
    arrays = recorded(shared)
    ours = box_ops.encode(arrays["ex"] + PLUS_ONE, arrays["gt"] + PLUS_ONE)
    torch.testing.assert_close(ours, arrays["targets"], atol=1e-10, rtol=0)


def test_decode_and_clip_equal_the_release(shared: Path) -> None:
    arrays = recorded(shared)
    decoded = box_ops.decode(arrays["ex"] + PLUS_ONE, arrays["deltas"].view(30, 3, 4))
    torch.testing.assert_close(decoded - PLUS_ONE, arrays["pred"].view(30, 3, 4), atol=1e-9, rtol=0)
    wanted = arrays["clipped"].view(30, 3, 4)
    height, width = wanted[..., 3].max() + 1, wanted[..., 2].max() + 1
    clipped = box_ops.clip(decoded, (int(height), int(width)), "inclusive") - PLUS_ONE
    torch.testing.assert_close(clipped, wanted, atol=1e-9, rtol=0)


def test_iou_equals_the_release(shared: Path) -> None:
    arrays = recorded(shared)
    ours = box_ops.iou(arrays["ex"] + PLUS_ONE, arrays["gt"] + PLUS_ONE)
    torch.testing.assert_close(ours, arrays["overlaps"], atol=1e-12, rtol=0)


coordinate = st.floats(-500, 500, allow_nan=False)
side = st.floats(0.5, 500, allow_nan=False)
box = st.tuples(coordinate, coordinate, side, side).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)


@given(st.lists(st.tuples(box, box), min_size=1, max_size=8))
def test_decode_is_the_inverse_of_encode(pairs: list[tuple[list[float], list[float]]]) -> None:
    boxes, targets = (torch.tensor(x, dtype=torch.float64) for x in zip(*pairs, strict=True))
    torch.testing.assert_close(
        box_ops.decode(boxes, box_ops.encode(boxes, targets)), targets, atol=1e-8, rtol=1e-8
    )


def boxes_and_deltas(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes with sides of 1 to 400 pixels, and deltas of which many dw, dh are beyond a limit."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(shape[0], 2, generator=generator, dtype=torch.float64) * 500
    sides = 1 + torch.rand(shape[0], 2, generator=generator, dtype=torch.float64) * 399
    deltas = torch.randn(*shape, 4, generator=generator, dtype=torch.float64) * 5
    return torch.cat([corners, corners + sides], 1), deltas


def test_high_limit_equals_torchvision() -> None:
    boxes, deltas = boxes_and_deltas((50, 3))
    assert (deltas[..., 2:] > math.log(1000 / 16)).any()
    assert (deltas[..., 2:] < -math.log(1000 / 16)).any()
    wanted = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(deltas.flatten(1), boxes)
    ours = box_ops.decode(boxes, deltas, "high")
    torch.testing.assert_close(ours, wanted.view(50, 3, 4), rtol=1e-12, atol=1e-9)


def test_limits_of_both_sides_follow_mmdetections_formula() -> None:
    """MMDET.md, 6: dw and dh are clamped to +-4.1352, one box after the other."""
    boxes, deltas = boxes_and_deltas((40,))
    ours = box_ops.decode(boxes, deltas, "both").tolist()
    for (x1, y1, x2, y2), (dx, dy, dw, dh), found in zip(
        boxes.tolist(), deltas.tolist(), ours, strict=True
    ):
        low, high = math.log(16 / 1000), -math.log(16 / 1000)
        width = (x2 - x1) * math.exp(min(max(dw, low), high))
        height = (y2 - y1) * math.exp(min(max(dh, low), high))
        x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
        wanted = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-6)
    assert max(found[2] - found[0] for found in ours) > 400  # some were enlarged
    unlimited = box_ops.decode(boxes, deltas * 1e3)
    assert not unlimited.isfinite().all()
    assert box_ops.decode(boxes, deltas * 1e3, "both").isfinite().all()


@given(box, st.integers(1, 2000))
def test_flip_twice_is_the_identity(one: list[float], width: int) -> None:
    boxes = torch.tensor([one], dtype=torch.float64)
    torch.testing.assert_close(box_ops.flip(box_ops.flip(boxes, width), width), boxes)


@given(box, st.floats(0.1, 10), st.sampled_from(["inclusive", "continuous"]))
def test_rescale_is_undone_by_the_inverse_factor(
    one: list[float], factor: float, pixels: str
) -> None:
    boxes = torch.tensor([one], dtype=torch.float64)
    there = box_ops.rescale(boxes, factor, pixels)
    torch.testing.assert_close(
        box_ops.rescale(there, 1 / factor, pixels), boxes, atol=1e-8, rtol=1e-8
    )


@given(box, st.floats(0.1, 10), st.floats(0.1, 10), st.sampled_from(["inclusive", "continuous"]))
def test_each_axis_has_its_own_scale(one: list[float], y: float, x: float, pixels: str) -> None:
    boxes = torch.tensor([one], dtype=torch.float64)
    there = box_ops.rescale(boxes, (y, x), pixels)
    for axis, factor in ((slice(0, None, 2), x), (slice(1, None, 2), y)):
        assert torch.equal(there[:, axis], box_ops.rescale(boxes, factor, pixels)[:, axis])
    back = box_ops.rescale(there, box_ops.inverse((y, x)), pixels)
    torch.testing.assert_close(back, boxes, atol=1e-8, rtol=1e-8)
    assert box_ops.per_axis(y) == (y, y)
    assert box_ops.inverse(y) == 1 / y


def test_inclusive_rescale_moves_the_last_pixel_not_the_border() -> None:
    boxes = torch.tensor([[10.0, 20.0, 30.0, 40.0]])
    assert box_ops.rescale(boxes, 2.0, "inclusive").tolist() == [[20.0, 40.0, 59.0, 79.0]]
    assert box_ops.rescale(boxes, 2.0, "continuous").tolist() == [[20.0, 40.0, 60.0, 80.0]]


def test_empty_boxes_have_no_overlap() -> None:
    empty = torch.tensor([[5.0, 5.0, 5.0, 5.0]])
    assert box_ops.iou(empty, empty).item() == 0
    assert box_ops.iou(torch.zeros(0, 4), empty).shape == (0, 1)
    assert box_ops.coverage(empty, empty).item() == 0


def test_coverage_is_the_share_of_the_first_box() -> None:
    small, large = torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([[5.0, 0.0, 105.0, 100.0]])
    assert box_ops.coverage(small, large).item() == 0.5
    assert box_ops.coverage(large, small).item() == pytest.approx(50 / 10000)
