import contextlib
import importlib
import math
import time
from pathlib import Path
from typing import Any

import op_cases
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from test_deform_psroi_pool import boxes
from test_psroi_pool import random, roi_lists
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dcdet.ops import deform_roi_pool, reference, roi_align
from dcdet.ops.deform_roi_pool import moved_bins

module = importlib.import_module("dcdet.ops.deform_roi_pool")
pytestmark = pytest.mark.usefixtures("way")


def run(
    op: Any,
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    *geometry: Any,
    mask: Tensor | None = None,
) -> list[Tensor]:
    """Output and the gradients of input, offset and mask of one call."""
    leaves = [op_cases.leaf(input), op_cases.leaf(offset), op_cases.leaf(mask)]
    output = op(leaves[0], rois, leaves[1], *geometry, mask=leaves[2])
    grad = op_cases.whole_numbers(output)
    if not output.requires_grad:  # the reference without a single bin
        return [output, *(torch.zeros_like(leaf) for leaf in leaves if leaf is not None)]
    return [output.detach(), *gradients(output, grad, leaves)]


def gradients(output: Tensor, grad: Tensor, leaves: list[Tensor | None]) -> list[Tensor]:
    """Zeros for what the output does not depend on, as the reference's where no sample is read."""
    there = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad(output, there, grad, allow_unused=True)
    return [
        torch.zeros_like(leaf) if g is None else g for leaf, g in zip(there, found, strict=True)
    ]


@pytest.mark.parametrize(("name", "ratio"), [("plain", 0), ("offset", 0), ("ratio2", 2)])
def test_golden(shared: Path, name: str, ratio: int) -> None:
    """mmcv's own kernels, in float64: values, and the gradients that are no derivatives."""
    arrays = op_cases.golden_mmdet(shared, "pool_")
    input = arrays["input"].requires_grad_()
    offset = None if name == "plain" else arrays["offset"].requires_grad_()
    output = deform_roi_pool(input, arrays["rois"], offset, (3, 4), 0.25, ratio, 0.1)
    op_cases.same(output, arrays[f"{name}_out"], 1e-13)
    if name == "ratio2":  # recorded without gradients
        return
    output.backward(arrays["grad"])
    assert input.grad is not None
    op_cases.same(input.grad, arrays[f"{name}_grad_input"], 1e-13)
    if offset is not None:
        assert offset.grad is not None
        op_cases.same(offset.grad, arrays[f"{name}_grad_offset"], 1e-13)


@settings(max_examples=150)
@given(st.data())
def test_equals_the_reference(data: st.DataObject) -> None:
    """Values and gradients for any RoI, offset and mask, hostile ones included."""
    draw = data.draw
    images, channels = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 33, 70]))
    size = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    bins = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    rois = draw(roi_lists(images, hostile=True))
    input = random(images, channels, *size)
    input = op_cases.laid_out(input, draw(st.sampled_from(op_cases.LAYOUTS)))
    offset = random(rois.shape[0], 2, *bins, seed=2) if draw(st.booleans()) else None
    mask = random(rois.shape[0], 1, *bins, seed=3) if draw(st.booleans()) else None
    for _ in range(draw(st.integers(0, 4)) if offset is not None and offset.numel() else 0):
        place = draw(st.integers(0, offset.numel() - 1))
        offset.view(-1)[place] = draw(op_cases.positions | st.sampled_from(op_cases.HOSTILE))
    scale, ratio = draw(st.sampled_from([1.0, 0.5, 1 / 3])), draw(st.sampled_from([0, 0, 1, 3]))
    geometry = (bins, scale, ratio, draw(st.sampled_from([0.1, 0.5])))
    own = run(deform_roi_pool, input, rois, offset, *geometry, mask=mask)
    twin = run(reference.deform_roi_pool, input, rois, offset, *geometry, mask=mask)
    op_cases.same(own[0], twin[0], 1e-9)
    op_cases.same(own[1], twin[1], 1e-9)
    assert own[1].isfinite().all()
    if mask is not None:
        op_cases.same(own[-1], twin[-1], 1e-8)
    if offset is not None:
        broken = rois.isnan().any(1)[:, None, None] | offset.isnan().any(1)
        clean = ~broken[:, None].expand_as(offset)
        op_cases.same(own[2][clean], twin[2][clean], 1e-8)
        assert own[2][clean].isfinite().all()


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_offset_it_is_roi_align(ratio: int, dtype: torch.dtype) -> None:
    input, rois = random(2, 40, 20, 26, dtype=dtype), boxes(30, images=2).to(dtype)
    rois[0, 3:] = rois[0, 1:3]  # no size

    def roi_align(input: Tensor, rois: Tensor, _: None, *geometry: Any, mask: None) -> Tensor:
        return torchvision.ops.roi_align(input, rois, *geometry, ratio, aligned=True)

    expected = run(roi_align, input, rois, None, (7, 5), 1 / 16)
    for one, other in zip(
        run(deform_roi_pool, input, rois, None, (7, 5), 1 / 16, ratio), expected, strict=True
    ):
        op_cases.same(one, other, 1e-12 if dtype == torch.float64 else 1e-4)


def test_channel_of_x_comes_first() -> None:
    """An offset of 1 in channel 0 moves right by gamma times the RoI's width; in 1, down."""
    ramp = torch.arange(12.0)
    for channel, plane in ((0, ramp.expand(12, 12)), (1, ramp[:, None].expand(12, 12))):
        offset = torch.zeros(1, 2, 1, 1)
        rois = torch.tensor([[0.0, 2, 2, 6, 6]])
        rest = deform_roi_pool(plane[None, None], rois, offset, 1, gamma=0.5)
        offset[0, channel] = 1
        moved = deform_roi_pool(plane[None, None], rois, offset, 1, gamma=0.5)
        assert rest.item() == 3.5  # the middle of 1.5 to 5.5
        assert moved.item() == 5.5


@pytest.mark.parametrize(
    ("y", "value", "slope_y", "slope_x"),
    [
        # rows 1, 4 and 9 and slopes 1, 2 and 4 along them, read in the middle of columns 0 and 1
        (0.25, 0.75 * 1.5 + 0.25 * 5, 3.5, 0.75 * 1 + 0.25 * 2),  # between pixels: derivatives
        (0.0, 1.5, 3.5, 1.0),
        (-0.5, 1.5, 3.5, 1.5 * 1 - 0.5 * 2),  # moved to row 0, where the derivatives are 0 and 1
        (-1.0, 1.5, 3.5, 2 * 1 - 1 * 2),
        (-1.25, 0.0, 0.0, 0.0),  # outside
        (1.75, 0.25 * 5 + 0.75 * 11, 6.0, 0.25 * 2 + 0.75 * 4),
        (2.0, 11.0, 0.0, 0.0),  # on the last row, where the derivative along x is 4
        (2.5, 11.0, 0.0, 0.0),
        (3.0, 11.0, 0.0, 0.0),
        (3.25, 0.0, 0.0, 0.0),
    ],
)
def test_gradient_at_the_border(y: float, value: float, slope_y: float, slope_x: float) -> None:
    """The slope is taken where the sample was before it was moved onto the map, as by mmcv."""
    plane = torch.tensor([[1.0, 2], [4, 6], [9, 13]]).double()
    for turned in (False, True):  # the same along x
        # One sample, in the middle of a RoI of 1 pixel; offsets are in pixels.
        roi = torch.tensor([[0, 0.5, y, 1.5, y + 1]]).double()
        offset = torch.zeros(1, 2, 1, 1).double().requires_grad_()
        input = plane.t() if turned else plane
        if turned:
            roi = roi[:, [0, 2, 1, 4, 3]]
        pooled = deform_roi_pool(input[None, None], roi, offset, 1, gamma=1.0)
        (grad,) = torch.autograd.grad(pooled.sum(), offset)
        assert pooled.item() == value
        slopes = [slope_y, slope_x] if turned else [slope_x, slope_y]
        assert grad.flatten().tolist() == slopes


@pytest.mark.parametrize("ratio", [0, 2])
def test_gradcheck(ratio: int) -> None:
    """Where no sample is beyond the border; all of them are 0.2 to 0.8 between pixels there."""
    input = random(2, 5, 9, 9).requires_grad_()
    rois = torch.tensor([[0, 1.3, 2.2, 5.3, 6.2], [1, 2.3, 1.3, 6.3, 7.3]]).double()
    offset = random(2, 2, 2, 2, seed=5).clamp(-0.5, 0.5).mul(0.4).requires_grad_()
    mask = random(2, 1, 2, 2, seed=6).requires_grad_()

    def call(input: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return deform_roi_pool(input, rois, offset, 2, 1.0, ratio, 0.1, mask)

    assert torch.autograd.gradcheck(call, (input, offset, mask), fast_mode=True)


def test_mask_scales_bins() -> None:
    input, rois = random(1, 5, 8, 9), boxes(6, extent=30).double()
    offset, mask = random(6, 2, 3, 4, seed=2), random(6, 1, 3, 4, seed=3)
    mask[0, 0, 0, 0] = torch.nan
    geometry = ((3, 4), 0.25)
    plain = run(deform_roi_pool, input, rois, offset, *geometry)
    masked = run(deform_roi_pool, input, rois, offset, *geometry, mask=mask)
    op_cases.same(masked[0], plain[0] * mask, 1e-15)
    weighted = op_cases.whole_numbers(plain[0]) * plain[0]
    op_cases.same(masked[3], weighted.sum(1, keepdim=True), 1e-12)


def test_a_nan_is_not_lost() -> None:
    """In RoI, offset or pixel: in the bins that it concerns, and in no other."""
    input, rois = torch.ones(1, 2, 6, 6), torch.tensor([[0.0, 1, 1, 4, 4]]).repeat(4, 1)
    offset = torch.zeros(4, 2, 2, 2)
    rois[1, 3] = torch.nan
    offset[2, 0, 0, 1] = torch.nan
    pooled = deform_roi_pool(input, rois, offset, 2)
    assert pooled.isnan().sum((1, 2, 3)).tolist() == [0, 8, 2, 0]
    assert pooled[2, :, 0, 1].isnan().all()
    input[0, 0, 2, 0] = torch.nan  # read by the left bins alone: they begin at 0.5
    pooled = deform_roi_pool(input, rois[:1], None, 2)
    assert pooled.isnan().nonzero()[:, 1:].tolist() == [[0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("sign", [0, -1])
def test_rois_without_area(sign: int) -> None:
    """They have no samples but those that are asked for."""
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    rois = torch.tensor([[0.0, 4, 4, 4 + sign, 4 + sign]])
    for shift in (0.0, torch.inf):
        results = run(deform_roi_pool, ramp, rois, torch.full((1, 2, 2, 2), shift), 2)
        assert not any(result.any() for result in results)
    middle = deform_roi_pool(ramp, rois, None, 1, sampling_ratio=2)
    assert middle.item() == 3.5 + sign / 2


def test_rounds_up_in_float32() -> None:
    """As mmcv does: a bin of 1 + 1e-9 pixels has one sample, not two."""
    ramp = torch.tensor([0.0, 1, 4, 9]).double().view(1, 1, 1, 4).expand(1, 1, 4, 4)
    for length, value in ((1 + 1e-9, 1.0), (1 + 1e-6, 1.25)):
        rois = torch.tensor([[0.0, 1, 1, 1 + length, 2]], dtype=torch.float64)
        assert abs(deform_roi_pool(ramp, rois, None, 1).item() - value) < 1e-5


@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("ratio", [0, 2])
def test_no_rois(images: int, ratio: int) -> None:
    results = run(
        deform_roi_pool, random(images, 12, 3, 4), torch.zeros(0, 5).double(),
        random(0, 2, 7, 5), (7, 5), 1.0, ratio, mask=random(0, 1, 7, 5),
    )  # fmt: skip
    assert [tuple(result.shape) for result in results] == [
        (0, 12, 7, 5), (images, 12, 3, 4), (0, 2, 7, 5), (0, 1, 7, 5)
    ]  # fmt: skip
    assert not results[1].any()


def test_rois_get_no_gradient() -> None:
    rois = torch.tensor([[0.0, 0, 0, 5, 5]]).requires_grad_()
    deform_roi_pool(torch.zeros(1, 4, 3, 3, requires_grad=True), rois, None, 2).sum().backward()
    assert rois.grad is None


def test_runs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (random(3, 6, 6, 7), boxes(9, images=3, extent=50).double())
    offset = random(9, 2, 3, 3, seed=4)
    whole = run(deform_roi_pool, *arguments, offset, 3, 0.12)
    for limit in (1, 300):
        monkeypatch.setattr(module, "CORNERS", limit)
        cut = run(deform_roi_pool, *arguments, offset, 3, 0.12)
        for one, other in zip(cut, whole, strict=True):
            op_cases.same(one, other, 1e-12)


@pytest.mark.parametrize("shifted", [False, True])
def test_work_is_bounded(shifted: bool) -> None:
    """A RoI of a million pixels, or more, takes no longer than one of the whole map."""
    rois = torch.tensor(
        [[0, -1e6, -1e6, 1e6, 1e6], [0, 0, 0, 1e6, 1e6], [0, 0, 0, 3e38, torch.inf]]
    ).repeat(3, 1)
    offset = torch.randn(9, 2, 7, 7) * 1e-3 if shifted else None
    start = time.monotonic()
    results = run(deform_roi_pool, torch.rand(1, 64, 100, 120), rois, offset, 7, 1 / 4)
    assert time.monotonic() - start < 10
    assert all(result.isfinite().all() for result in results)


def test_samples_far_outside_count() -> None:
    """A bin's mean is over all its samples, though only those near the map are looked at."""
    rois = torch.tensor([[0, -3e5, -8.0, 7e5, 8.0]]).double()
    pooled = deform_roi_pool(torch.ones(1, 1, 30, 50).double(), rois, None, 1)
    # in x, samples are a pixel apart and begin at -300000; -1 and 50 are on the map
    on_map = sum(-1 <= -8.5 + i + 0.5 <= 30 for i in range(16))
    assert math.isclose(pooled.item(), 52 * on_map / (1e6 * 16), rel_tol=1e-12)


def test_twice_the_same_bits_with_any_number_of_threads() -> None:
    input, rois = random(2, 200, 25, 30, dtype=torch.float32), boxes(60, images=2)
    offset = random(60, 2, 7, 7, seed=2, dtype=torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(deform_roi_pool, input, rois, offset, 7, 1 / 16))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert torch.equal(one, same)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_and_autocast(dtype: torch.dtype) -> None:
    """Computed in float32 and rounded once."""
    rois, geometry = boxes(6), ((3, 4), 1 / 16)
    input, offset = random(1, 18, 20, 26, dtype=dtype), random(6, 2, 3, 4, seed=2, dtype=dtype)
    mask = random(6, 1, 3, 4, seed=3, dtype=dtype)
    wide = [t.float() for t in (input, offset, mask)]
    full = run(deform_roi_pool, wide[0], rois, wide[1], *geometry, mask=wide[2])
    own = run(deform_roi_pool, input, rois, offset, *geometry, mask=mask)
    for one, other in zip(own, full, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other.to(dtype))
    with torch.autocast("cpu", dtype):
        inside = run(deform_roi_pool, wide[0], rois, offset, *geometry, mask=mask)
    assert inside[0].dtype == torch.float32
    assert torch.equal(inside[0], full[0])


@pytest.mark.parametrize("index", [-1.0, 2.0, 0.5, torch.nan, torch.inf, 1e30])
def test_wrong_batch_indices(index: float) -> None:
    rois = torch.tensor([[0, 0, 0, 5, 5], [index, 0, 0, 5, 5]])
    with pytest.raises(ValueError, match="batch indices of rois must be whole numbers from 0 to 1"):
        deform_roi_pool(torch.zeros(2, 4, 3, 3), rois, None, 2)


def good_arguments() -> dict[str, Any]:
    return {
        "input": torch.zeros(1, 4, 3, 3),
        "rois": torch.zeros(2, 5),
        "offset": torch.zeros(2, 2, 3, 2),
        "output_size": (3, 2),
        "spatial_scale": 1.0,
        "sampling_ratio": 0,
        "gamma": 0.1,
        "mask": torch.zeros(2, 1, 3, 2),
    }


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("input type", {"input": None}, TypeError, "input must be a tensor, got NoneType"),
    ("input rank", {"input": torch.zeros(4, 3, 3)}, ValueError, "input must be a tensor of 4"),
    ("input dtype", {"input": torch.zeros(1, 4, 3, 3).int()}, TypeError, "input .*int32"),
    ("input empty", {"input": torch.zeros(1, 4, 0, 3)}, ValueError, "input .*channel and pixel"),
    ("no channel", {"input": torch.zeros(1, 0, 3, 3)}, ValueError, "input .*channel and pixel"),
    ("rois type", {"rois": [torch.zeros(1, 4)]}, TypeError, "rois must be a tensor, got list"),
    ("rois rank", {"rois": torch.zeros(5)}, ValueError, "rois must be a tensor of 2"),
    ("rois width", {"rois": torch.zeros(2, 4)}, ValueError, r"rois .*\(R, 5\)"),
    ("rois dtype", {"rois": torch.zeros(2, 5).half()}, TypeError, "rois .*float16"),
    ("rois device", {"rois": torch.zeros(2, 5, device="meta")}, ValueError, "rois .*meta"),
    ("no image", {"input": torch.zeros(0, 4, 3, 3)}, ValueError, "batch .*there is no image"),
    ("offset type", {"offset": 0}, TypeError, "offset must be a tensor, got int"),
    ("offset rank", {"offset": torch.zeros(2, 2, 6)}, ValueError, "offset must be a tensor of 4"),
    ("offset dtype", {"offset": torch.zeros(2, 2, 3, 2).double()}, TypeError, "offset .*float64"),
    ("offset rois", {"offset": torch.zeros(1, 2, 3, 2)}, ValueError, r"offset .*\(2, 2, 3, 2\)"),
    ("offset pair", {"offset": torch.zeros(2, 1, 3, 2)}, ValueError, r"offset .*\(2, 2, 3, 2\)"),
    ("offset turned", {"offset": torch.zeros(2, 2, 2, 3)}, ValueError, r"offset .*, 2, ph, pw\)"),
    ("mask rois", {"mask": torch.zeros(1, 1, 3, 2)}, ValueError, r"mask .*\(2, 1, 3, 2\), got"),
    ("mask channels", {"mask": torch.zeros(2, 4, 3, 2)}, ValueError, r"mask .*\(R, 1, ph, pw\)"),
    ("mask dtype", {"mask": torch.zeros(2, 1, 3, 2).long()}, TypeError, "mask .*int64"),
    ("size 0", {"output_size": 0}, ValueError, "output_size must be at least 1"),
    ("size float", {"output_size": 7.0}, TypeError, "output_size must be an int"),
    ("size of 3", {"output_size": (7, 7, 7)}, ValueError, "output_size .*pair of ints"),
    ("scale 0", {"spatial_scale": 0.0}, ValueError, "spatial_scale must be positive"),
    ("scale nan", {"spatial_scale": torch.nan}, ValueError, "spatial_scale must be finite"),
    ("ratio -1", {"sampling_ratio": -1}, ValueError, "sampling_ratio must be at least 0"),
    ("ratio float", {"sampling_ratio": 2.0}, TypeError, "sampling_ratio must be an int"),
    ("gamma inf", {"gamma": torch.inf}, ValueError, "gamma must be finite"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    deform_roi_pool(**good_arguments())
    with pytest.raises(error, match=f"deform_roi_pool: {message}"):
        deform_roi_pool(**good_arguments() | change)
    names = good_arguments().keys() - {"offset", "mask", "gamma"}
    for aligned in (False, True) if change.keys() <= names else ():
        with pytest.raises(error, match=f"deform_roi_pool: {message}"):
            roi_align(
                **{name: (good_arguments() | change)[name] for name in names}, aligned=aligned
            )


@pytest.mark.parametrize("fake", [False, True])
def test_operators_refuse_what_the_function_refuses(fake: bool) -> None:
    """Whoever calls an operator, its backward or its fake kernel: never a read outside."""
    with FakeTensorMode() if fake else contextlib.nullcontext():
        input, rois, offset = torch.zeros(1, 4, 3, 3), torch.zeros(2, 5), torch.zeros(2, 2, 3, 2)
        grad, size = torch.zeros(2, 4, 3, 2), [3, 2]
        forward, backward = module._deform_roi_pool, module._deform_roi_pool_backward
        if not fake:
            forward(input, rois, offset, size, 1.0, 0, 0.1)
            backward(grad, input, rois, offset, size, 1.0, 0, 0.1)
            half = forward(input.half(), rois, offset, size, 1.0, 0, 0.1)
            grads = backward(half, input.half(), rois, offset, size, 1.0, 0, 0.1)
            assert [t.dtype for t in (half, *grads)] == [torch.half, torch.half, torch.float]
        for wrong in (
            (input[:, :0], rois, offset, size, 1.0, 0),
            (input, rois[:, :4], offset, size, 1.0, 0),
            (input, rois.double(), offset, size, 1.0, 0),
            (input, rois, offset[:1], size, 1.0, 0),
            (input, rois, offset.half(), size, 1.0, 0),
            (input.half(), rois.half(), offset, size, 1.0, 0),
            (input.half(), rois, offset.half(), size, 1.0, 0),
            (input, rois, offset, [2, 3], 1.0, 0),
            (input, rois, None, [3], 1.0, 0),
            (input, rois, offset, size, 0.0, 0),
            (input, rois, offset, size, 1.0, -1),
        ):
            with pytest.raises((ValueError, TypeError), match=r"deform_roi_pool: .* must be"):
                forward(*wrong, 0.1)
            with pytest.raises((ValueError, TypeError), match=r"deform_roi_pool: .* must be"):
                backward(grad.to(wrong[0].dtype), *wrong, 0.1)
        for wrong in (grad[:1], grad[..., :1], grad.double()):
            with pytest.raises((ValueError, TypeError), match="deform_roi_pool: grad must be"):
                backward(wrong, input, rois, offset, size, 1.0, 0, 0.1)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_roi_align_equals_torchvision(dtype: torch.dtype, ratio: int, aligned: bool) -> None:
    """RoIs from nothing to larger than the map, in it, over its border and outside."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(60, 2, generator=generator, dtype=dtype) * 400 - 60
    side = 10 ** (torch.rand(60, 2, generator=generator, dtype=dtype) * 4.5 - 2)
    corner[0], side[0], side[1, 0] = 50.0, 0, 0
    image = torch.arange(60)[:, None].to(dtype) % 2
    rois = torch.cat([image, corner, corner + side], 1)
    assert ((side * 0.3).amax(1) < 1).sum() > 10
    input = random(2, 5, 60, 78, dtype=dtype)
    results = []
    for op in (roi_align, torchvision.ops.roi_align):
        leaf = op_cases.leaf(input)
        output = op(leaf, rois, (7, 5), 0.3, ratio, aligned)
        results.append(
            (output, *op_cases.gradients(output, op_cases.whole_numbers(output), [leaf]))
        )
    for one, other in zip(*results, strict=True):
        op_cases.same(one, other, 1e-10 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("aligned", [False, True])
def test_roi_aligns_gradient_is_the_derivative(aligned: bool) -> None:
    rois = torch.tensor(
        [[0, 1.2, 0.7, 8.1, 9.9], [0, 3.0, 3.0, 3.1, 3.1], [0, -4.0, 2.0, 2.0, 30.0]]
    )
    input = random(1, 2, 8, 9).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: roi_align(x, rois.double(), 2, 0.7, 2, aligned), input, fast_mode=True
    )  # fmt: skip


@pytest.mark.parametrize("aligned", [False, True])
def test_roi_align_of_half_types_and_of_no_rois(aligned: bool) -> None:
    rois, input = boxes(6), random(1, 3, 20, 26, dtype=torch.bfloat16)
    output = roi_align(input, rois, 3, 1 / 16, 2, aligned)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, roi_align(input.float(), rois, 3, 1 / 16, 2, aligned).bfloat16())
    leaf = input.float().requires_grad_()
    nothing = roi_align(leaf, rois[:0], (3, 2), 1 / 16, 0, aligned)
    assert nothing.shape == (0, 3, 3, 2)
    nothing.sum().backward()
    assert leaf.grad is not None
    assert not leaf.grad.any()


def test_moved_bins_are_what_is_pooled() -> None:
    """On maps that hold their own x and y a bin's mean is its middle."""
    rois = torch.tensor([[0, 120.4, 200.5, 330.2, 400.0], [0, 250.0, 130.0, 260.0, 139.5]])
    offset = random(2, 2, 3, 4, dtype=torch.float32).clamp(-1, 1)
    bins = moved_bins(rois, offset, 0.1)
    assert bins.shape == (2, 3, 4, 4)
    ramp = torch.arange(40.0).expand(40, 40)
    for axis, plane in enumerate((ramp, ramp.t())):
        read = deform_roi_pool(plane[None, None], rois, offset, (3, 4), 1 / 16, 2, 0.1)
        middle = (bins[..., axis] + bins[..., axis + 2]) / 2
        op_cases.same(read[:, 0], middle / 16 - 0.5, 1e-4)
    still = moved_bins(rois, torch.zeros_like(offset), 0.1)
    op_cases.same(still[:, 0, 0, :2], rois[:, 1:3], 1e-4)
    op_cases.same(still[:, -1, -1, 2:], rois[:, 3:], 1e-4)
    op_cases.same(still[:, :, :-1, 2], still[:, :, 1:, 0], 1e-4)
    op_cases.same(still[:, :-1, :, 3], still[:, 1:, :, 1], 1e-4)
    assert moved_bins(rois[:0], offset[:0], 0.1).shape == (0, 3, 4, 4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shifted", [False, True])
def test_operator_contract(shifted: bool, layout: torch.memory_format) -> None:
    input = torch.rand(2, 8, 4, 5).contiguous(memory_format=layout)
    rois = boxes(3, images=2, extent=5)
    offset = torch.rand(3, 2, 2, 3) if shifted else None
    geometry = ([2, 3], 0.5, 0, 0.1)
    leaves = (op_cases.leaf(input), rois, op_cases.leaf(offset))
    torch.library.opcheck(module._deform_roi_pool, (*leaves, *geometry))
    sample = (torch.rand(3, 8, 2, 3), input, rois, offset, *geometry)
    torch.library.opcheck(module._deform_roi_pool_backward, sample)


@op_cases.needs_cuda
@pytest.mark.parametrize("shifted", [False, True])
def test_cuda_equals_cpu(shifted: bool) -> None:
    input, rois = random(2, 64, 25, 30, dtype=torch.float32), boxes(60, images=2)
    offset = random(60, 2, 7, 7, seed=2, dtype=torch.float32) if shifted else None
    moved = None if offset is None else offset.cuda()
    on_gpu = run(deform_roi_pool, input.cuda(), rois.cuda(), moved, 7, 1 / 16)
    on_cpu = run(deform_roi_pool, input, rois, offset, 7, 1 / 16)
    for one, other in zip(on_gpu, on_cpu, strict=True):
        op_cases.same(one.cpu(), other, 1e-4)
