import contextlib
import importlib
import time
from pathlib import Path
from typing import Any

import op_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_psroi_pool import random, roi_lists
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dcdet.ops import deform_psroi_pool, psroi_pool, reference

module = importlib.import_module("dcdet.ops.deform_psroi_pool")
plain = importlib.import_module("dcdet.ops.psroi_pool")
pytestmark = pytest.mark.usefixtures("way")


def run(op: Any, input: Tensor, rois: Tensor, trans: Tensor | None, *geometry: Any) -> list[Tensor]:
    """Output and the gradients of input and trans of one call."""
    inputs = [op_cases.leaf(input), op_cases.leaf(trans)]
    output = op(inputs[0], rois, inputs[1], *geometry)
    grad = op_cases.whole_numbers(output)
    return [output.detach(), *op_cases.gradients(output, grad, inputs)]


def boxes(count: int, images: int = 1, extent: float = 300.0, seed: int = 0) -> Tensor:
    """Random RoIs (count, 5), some of them outside."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * extent - 20
    sizes = torch.rand(count, 2, generator=generator) * extent
    index = torch.arange(count)[:, None] % images
    return torch.cat([index, corners, corners + sizes], 1)


KEYS = (
    "spatial_scale",
    "output_dim",
    "group_size",
    "pooled_size",
    "part_size",
    "sample_per_part",
    "trans_std",
)


def test_golden(shared: Path) -> None:
    """The recorded runs: without shifts, with shared ones, with a class's own."""
    for name, attributes, arrays in op_cases.golden(shared, "dpsroi"):
        trans = arrays.get("trans")
        data = arrays["data"].requires_grad_()
        geometry = [attributes[key] for key in KEYS]
        if trans is not None:
            trans.requires_grad_()
        output = deform_psroi_pool(data, arrays["rois"], trans, *geometry)
        output.backward(arrays["grad_out"])
        assert data.grad is not None, name
        op_cases.same(output, arrays["out"], 1e-4)
        op_cases.same(data.grad, arrays["grad_data"], 1e-4)
        if trans is not None:
            assert trans.grad is not None, name
            op_cases.same(trans.grad, arrays["grad_trans"], 1e-4)


@settings(max_examples=150)
@given(st.data())
def test_equals_the_reference(data: st.DataObject) -> None:
    """Values and gradients for any RoI and shift, hostile ones included, on both paths."""
    draw = data.draw
    images, group, pooled, samples = (draw(st.integers(1, 3)) for _ in range(4))
    classes, depth = draw(st.sampled_from([(0, 2), (1, 1), (1, 3), (2, 2), (2, 4), (3, 3)]))
    part = draw(st.sampled_from([0, 1, 2, pooled]))
    rois = draw(roi_lists(images, hostile=True))
    size = (draw(st.integers(1, 8)), draw(st.integers(1, 8)))
    input = random(images, depth * group**2, *size)
    input = op_cases.laid_out(input, draw(st.sampled_from(op_cases.LAYOUTS)))
    trans = None
    if classes:
        cells = part or pooled
        trans = random(rois.shape[0], 2 * classes, cells, cells, seed=2)
        for _ in range(draw(st.integers(0, 4)) if trans.numel() else 0):
            place = draw(st.integers(0, trans.numel() - 1))
            trans.view(-1)[place] = draw(op_cases.positions | st.sampled_from(op_cases.HOSTILE))
    scale, std = draw(st.sampled_from([1.0, 0.5, 1 / 3])), draw(st.sampled_from([0.1, 0.5]))
    geometry = (scale, depth, group, pooled, part, samples, std)
    own = run(deform_psroi_pool, input, rois, trans, *geometry)
    twin = run(reference.deform_psroi_pool, input, rois, trans, *geometry)
    op_cases.same(own[0], twin[0], 1e-9)
    op_cases.same(own[1], twin[1], 1e-9)
    assert own[1].isfinite().all()
    if trans is not None:
        clean = ~rois.isnan().any(1)[:, None, None, None] & trans.isfinite()
        clean = clean & ~(trans.isnan().flatten(1).any(1))[:, None, None, None]
        op_cases.same(own[2][clean], twin[2][clean], 1e-8)
        assert own[2][clean].isfinite().all()


def test_channel_of_x_comes_first() -> None:
    """A shift of 1 RoI width in trans channel 0 moves right; in channel 1, down."""
    ramp = torch.arange(12.0)
    for channel, plane in ((0, ramp.expand(12, 12)), (1, ramp[:, None].expand(12, 12))):
        trans = torch.zeros(1, 2, 1, 1)
        rois = torch.tensor([[0.0, 2, 2, 3, 3]])
        rest = deform_psroi_pool(plane[None, None], rois, trans, 1.0, 1, 1, 1, 1, 2, 1.0)
        trans[0, channel] = 1
        moved = deform_psroi_pool(plane[None, None], rois, trans, 1.0, 1, 1, 1, 1, 2, 1.0)
        assert rest.item() == 2.0  # left edges of the two halves of [1.5, 3.5]: 1.5 and 2.5
        assert moved.item() == 4.0


def test_no_shift_at_whole_positions() -> None:
    """The gradient of a shift is 0 along an axis where the sample is a whole number."""
    plane = torch.arange(6.0).expand(6, 6)[None, None].double()
    rois = torch.tensor([[0.0, 2, 2, 2, 2]]).double()
    for shift, slope in ((0.5, 0.0), (0.25, 1.0)):  # samples at x = 1.5 + shift
        trans = torch.tensor([shift, 0.0]).double().view(1, 2, 1, 1).requires_grad_()
        pooled = deform_psroi_pool(plane, rois, trans, 1.0, 1, 1, 1, 1, 1, 1.0)
        (grad,) = torch.autograd.grad(pooled.sum(), trans)
        assert grad.flatten().tolist() == [slope, 0.0]


@pytest.mark.parametrize("classes", [0, 1, 2, 4])
def test_gradcheck(classes: int) -> None:
    input = random(2, 16, 5, 6).requires_grad_()
    rois = boxes(4, images=2, extent=8).double()
    trans = random(4, 2 * classes, 2, 2, seed=5).requires_grad_() if classes else None
    inputs = (input,) if trans is None else (input, trans)

    def call(input: Tensor, trans: Tensor | None = None) -> Tensor:
        return deform_psroi_pool(input, rois, trans, 0.71, 4, 2, 2, 2, 2, 0.13)

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


def test_shared_shifts_are_class_shifts_that_agree() -> None:
    """The two ways through the code give the same result where they must."""
    input, rois = random(2, 4 * 9, 8, 9), boxes(10, images=2, extent=90).double()
    trans = random(10, 2, 3, 3, seed=3)
    geometry = (0.1, 4, 3, 3, 3, 4, 0.1)
    shared = run(deform_psroi_pool, input, rois, trans, *geometry)
    for classes in (2, 4):
        own = run(deform_psroi_pool, input, rois, trans.repeat(1, classes, 1, 1), *geometry)
        own[2] = own[2].unflatten(1, (classes, 2)).sum(1)
        for one, other in zip(own, shared, strict=True):
            op_cases.same(one, other, 1e-10)
    none = run(deform_psroi_pool, input, rois, None, *geometry)
    zero = run(deform_psroi_pool, input, rois, torch.zeros_like(trans), *geometry)
    for one, other in zip(none, zero[:2], strict=True):
        op_cases.same(one, other, 1e-12)


def test_constant_map_pools_to_itself() -> None:
    """Inside the map every bin of a constant map is the constant, as in psroi_pool."""
    rois = torch.tensor([[0.0, 30, 40, 200, 150]])
    input = torch.full((1, 9, 20, 20), 3.0)
    pooled = deform_psroi_pool(input, rois, None, 1 / 16, 1, 3, 3, 0, 4, 0.0)
    op_cases.same(pooled, psroi_pool(input, rois, 1 / 16, 1, 3, 3), 1e-6)


@pytest.mark.parametrize("classes", [0, 1, 3])
@pytest.mark.parametrize("images", [0, 2])
def test_no_rois(classes: int, images: int) -> None:
    trans = random(0, 2 * classes, 7, 7) if classes else None
    results = run(
        deform_psroi_pool, random(images, 12, 3, 3), torch.zeros(0, 5).double(), trans,
        1.0, 3, 2, 7, 7, 4, 0.1,
    )  # fmt: skip
    assert results[0].shape == (0, 3, 7, 7)
    assert results[1].shape == (images, 12, 3, 3)
    assert not results[1].any()


@pytest.mark.parametrize("classes", [1, 3])
def test_runs_change_nothing(monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    arguments = (random(3, 3 * 4, 6, 7), boxes(9, images=3, extent=50).double())
    trans = random(9, 2 * classes, 3, 3, seed=4)
    geometry = (0.12, 3, 2, 3, 3, 2, 0.1)
    whole = run(deform_psroi_pool, *arguments, trans, *geometry)
    for limit in (1, 300):
        monkeypatch.setattr(module, "CORNERS", limit)
        monkeypatch.setitem(module.BINS, "cpu", limit)
        cut = run(deform_psroi_pool, *arguments, trans, *geometry)
        for one, other in zip(cut, whole, strict=True):
            op_cases.same(one, other, 1e-11)


@pytest.mark.parametrize("classes", [0, 1, 3])
def test_rois_without_a_gradient(classes: int) -> None:
    """They add nothing and get nothing, as if the others had come alone; a NaN is a gradient."""
    input, rois = random(3, 3 * 4, 6, 7), boxes(9, images=3, extent=50).double()
    trans = random(9, 2 * classes, 3, 3, seed=4) if classes else None
    grad = random(9, 3, 3, 3, seed=5)
    grad[[0, 3, 4, 8]] = 0
    live = [1, 2, 5, 6, 7]

    def gradients(chosen: list[int], grad: Tensor) -> list[Tensor]:
        leaves = [op_cases.leaf(input), op_cases.leaf(None if trans is None else trans[chosen])]
        output = deform_psroi_pool(leaves[0], rois[chosen], leaves[1], 0.12, 3, 2, 3, 3, 2, 0.1)
        return op_cases.gradients(output, grad, leaves)

    everything, alone = gradients(list(range(9)), grad), gradients(live, grad[live])
    op_cases.same(everything[0], alone[0], 1e-12)
    if classes:
        op_cases.same(everything[1][live], alone[1], 1e-12)
        assert not everything[1][[0, 3, 4, 8]].any()
    grad[0, 0, 0, 0] = torch.nan
    assert gradients(list(range(9)), grad)[0].isnan().any()


@pytest.mark.parametrize("classes", [0, 1, 5])
def test_work_is_bounded(classes: int) -> None:
    """A RoI of a million pixels takes no longer than any other."""
    rois = torch.tensor([[0, -1e6, -1e6, 1e6, 1e6], [0, 0, 0, 3e38, torch.inf]]).repeat(20, 1)
    trans = torch.randn(40, 2 * classes, 7, 7) if classes else None
    start = time.monotonic()
    results = run(
        deform_psroi_pool, torch.rand(1, 5 * 49, 40, 60), rois, trans, 1 / 16, 5, 7, 7, 7, 4, 0.1
    )
    assert time.monotonic() - start < 10
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("classes", [1, 8])
def test_twice_the_same_bits(classes: int) -> None:
    arguments = (random(1, 8 * 49, 25, 30, dtype=torch.float32), boxes(60))
    trans = random(60, 2 * classes, 7, 7, seed=2, dtype=torch.float32)
    geometry = (1 / 16, 8, 7, 7, 7, 4, 0.1)
    once = run(deform_psroi_pool, *arguments, trans, *geometry)
    for one, other in zip(once, run(deform_psroi_pool, *arguments, trans, *geometry), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_and_autocast(dtype: torch.dtype, classes: int) -> None:
    """Computed in float32 and rounded once."""
    rois, geometry = boxes(6), (1 / 16, 2, 3, 3, 3, 4, 0.1)
    input = random(1, 18, 20, 26, dtype=dtype)
    trans = random(6, 2 * classes, 3, 3, seed=2, dtype=dtype)
    full = run(deform_psroi_pool, input.float(), rois, trans.float(), *geometry)
    own = run(deform_psroi_pool, input, rois, trans, *geometry)
    for one, other in zip(own, full, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other.to(dtype))
    with torch.autocast("cpu", dtype):
        inside = run(deform_psroi_pool, input.float(), rois, trans, *geometry)
    assert inside[0].dtype == torch.float32
    assert torch.equal(inside[0], full[0])


def good_arguments() -> dict[str, Any]:
    return {
        "input": torch.zeros(1, 16, 3, 3),
        "rois": torch.zeros(2, 5),
        "trans": torch.zeros(2, 4, 3, 3),
        "spatial_scale": 1.0,
        "output_dim": 4,
        "group_size": 2,
        "pooled_size": 2,
        "part_size": 3,
        "sample_per_part": 2,
        "trans_std": 0.1,
    }


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("input rank", {"input": torch.zeros(16, 3, 3)}, ValueError, "input must be a tensor of 4"),
    ("input channels", {"input": torch.zeros(1, 12, 3, 3)}, ValueError, "input .*= 16 channels"),
    ("rois width", {"rois": torch.zeros(2, 6)}, ValueError, r"rois .*\(R, 5\)"),
    ("rois dtype", {"rois": torch.zeros(2, 5).half()}, TypeError, "rois .*float16"),
    ("batch index", {"rois": torch.ones(2, 5)}, ValueError, "batch indices of rois .*from 0 to 0"),
    ("trans type", {"trans": 0}, TypeError, "trans must be a tensor, got int"),
    ("trans rank", {"trans": torch.zeros(2, 4)}, ValueError, "trans must be a tensor of 4"),
    ("trans dtype", {"trans": torch.zeros(2, 4, 3, 3).double()}, TypeError, "trans .*float64"),
    ("trans rois", {"trans": torch.zeros(3, 4, 3, 3)}, ValueError, r"trans .*\(2, 4, 3, 3\), got"),
    ("trans parts", {"trans": torch.zeros(2, 4, 2, 2)}, ValueError, r"trans .*\(2, 4, 3, 3\), got"),
    ("trans odd", {"trans": torch.zeros(2, 5, 3, 3)}, ValueError, "trans .*got shape"),
    ("trans empty", {"trans": torch.zeros(2, 0, 3, 3)}, ValueError, "trans .*divisor of .* = 4"),
    ("trans classes", {"trans": torch.zeros(2, 6, 3, 3)}, ValueError, "trans .*divisor"),
    (
        "trans device",
        {"trans": torch.zeros(2, 4, 3, 3, device="meta")},
        ValueError,
        "trans .*meta",
    ),
    ("scale -1", {"spatial_scale": -1}, ValueError, "spatial_scale must be positive"),
    ("output_dim 0", {"output_dim": 0}, ValueError, "output_dim must be at least 1"),
    ("group_size 0", {"group_size": 0}, ValueError, "group_size must be at least 1"),
    ("pooled_size 0", {"pooled_size": 0}, ValueError, "pooled_size must be at least 1"),
    ("part_size -1", {"part_size": -1}, ValueError, "part_size must be at least 0"),
    ("samples 0", {"sample_per_part": 0}, ValueError, "sample_per_part must be at least 1"),
    ("std inf", {"trans_std": torch.inf}, ValueError, "trans_std must be finite"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    deform_psroi_pool(**good_arguments())
    with pytest.raises(error, match=f"deform_psroi_pool: {message}"):
        deform_psroi_pool(**good_arguments() | change)


@pytest.mark.parametrize("fake", [False, True])
def test_operators_refuse_what_the_functions_refuse(fake: bool) -> None:
    """Whoever calls an operator, its backward or its fake kernel: never a read outside."""
    with FakeTensorMode() if fake else contextlib.nullcontext():
        input, rois, trans = torch.zeros(1, 16, 3, 3), torch.zeros(2, 5), torch.zeros(2, 4, 3, 3)
        grad, narrow = torch.zeros(2, 4, 2, 2), torch.zeros(1, 15, 3, 3)
        short, odd, tall = torch.zeros(2, 4), torch.zeros(2, 6, 3, 3), torch.zeros(2, 4, 3, 2)
        grid = [4, 2, 2, 3, 2]
        forward, backward = module._deform_psroi_pool, module._deform_psroi_pool_backward
        if not fake:
            forward(input, rois, trans, grid, 1.0, 0.1)
            backward(grad, input, rois, trans, grid, 1.0, 0.1)
        for wrong in (
            (narrow, rois, trans, grid, 1.0),
            (input, short, trans, grid, 1.0),
            (input, rois, odd, grid, 1.0),
            (input, rois, tall, grid, 1.0),
            (input, rois, trans, [4, 0, 2, 3, 2], 1.0),
            (input, rois, trans, [4, 2, 2, 0, 2], 1.0),
            (input, rois, trans, [4, 2, 2, 3], 1.0),
            (input, rois, trans, grid, 0.0),
        ):
            with pytest.raises(ValueError, match=r"deform_psroi_pool: .* must be"):
                forward(*wrong, 0.1)
            with pytest.raises(ValueError, match=r"deform_psroi_pool: .* must be"):
                backward(grad, *wrong, 0.1)
        with pytest.raises(ValueError, match="deform_psroi_pool: grad must be"):
            backward(torch.zeros(2, 4, 2, 3), input, rois, trans, grid, 1.0, 0.1)

        with pytest.raises(ValueError, match="psroi_pool: input must be"):
            plain._psroi_pool(narrow, rois, 1.0, 4, 2, 2)
        for sizes in ([1, 16, 3], [1, 15, 3, 3], [1, 16, 0, 3]):
            with pytest.raises(ValueError, match=r"psroi_pool: input.* must be"):
                plain._psroi_pool_backward(grad, rois, sizes, 1.0, 2, 2, False)
        with pytest.raises(ValueError, match="psroi_pool: grad must be"):
            plain._psroi_pool_backward(grad, rois, [1, 16, 3, 3], 1.0, 2, 3, False)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("classes", [0, 1, 2])
def test_operator_contract(classes: int, layout: torch.memory_format) -> None:
    input = torch.rand(2, 8, 4, 5).contiguous(memory_format=layout)
    rois = boxes(3, images=2, extent=5)
    trans = torch.rand(3, 2 * classes, 2, 2) if classes else None
    grid = [2, 2, 3, 2, 2]
    tensors = (op_cases.leaf(input), rois, op_cases.leaf(trans))
    torch.library.opcheck(module._deform_psroi_pool, (*tensors, grid, 0.5, 0.1))
    sample = (torch.rand(3, 2, 3, 3), input, rois, trans, grid, 0.5, 0.1)
    torch.library.opcheck(module._deform_psroi_pool_backward, sample)


@op_cases.needs_cuda
@pytest.mark.parametrize("classes", [0, 1, 8])
def test_cuda_equals_cpu(classes: int) -> None:
    input, rois = random(1, 8 * 49, 25, 30, dtype=torch.float32), boxes(60)
    trans = random(60, 2 * classes, 7, 7, seed=2, dtype=torch.float32) if classes else None
    geometry = (1 / 16, 8, 7, 7, 7, 4, 0.1)
    moved = None if trans is None else trans.cuda()
    on_gpu = run(deform_psroi_pool, input.cuda(), rois.cuda(), moved, *geometry)
    on_cpu = run(deform_psroi_pool, input, rois, trans, *geometry)
    for one, other in zip(on_gpu, on_cpu, strict=True):
        op_cases.same(one.cpu(), other, 1e-4)
