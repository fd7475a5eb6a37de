import importlib
import time
from pathlib import Path
from typing import Any

import op_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcdet.ops import psroi_pool, reference

module = importlib.import_module("dcdet.ops.psroi_pool")
pytestmark = pytest.mark.usefixtures("way")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def run(op: Any, input: Tensor, rois: Tensor, *geometry: Any) -> tuple[Tensor, Tensor]:
    """Output and the input's gradient of one call."""
    input = input.detach().clone().requires_grad_()
    output = op(input, rois, *geometry)
    if not output.requires_grad:  # the reference without a single cell
        return output, torch.zeros_like(input)
    (grad,) = torch.autograd.grad(output, input, op_cases.whole_numbers(output))
    return output.detach(), grad


def test_golden(shared: Path) -> None:
    """The recorded runs, bit for bit as far as the order of a sum goes."""
    for name, attributes, arrays in op_cases.golden(shared, "psroi"):
        data = arrays["data"].requires_grad_()
        keys = ("spatial_scale", "output_dim", "group_size", "pooled_size")
        output = psroi_pool(data, arrays["rois"], *(attributes[key] for key in keys))
        output.backward(arrays["grad_out"])
        assert data.grad is not None, name
        op_cases.same(output, arrays["out"], 1e-6)
        op_cases.same(data.grad, arrays["grad_data"], 1e-6)


@st.composite
def roi_lists(draw: st.DrawFn, images: int, hostile: bool) -> Tensor:
    """RoIs (R, 5) in and around a map of some ten pixels at scale 1, 0.5 or less."""
    coordinate = op_cases.positions.map(lambda x: 2 * x)
    if hostile:
        coordinate = coordinate | st.sampled_from(op_cases.HOSTILE)
    roi = st.tuples(st.integers(0, images - 1).map(float), *[coordinate] * 4)
    rois = draw(st.lists(roi, max_size=6))
    return torch.tensor(rois, dtype=torch.float64).view(-1, 5)


@settings(max_examples=100)
@given(st.data())
def test_equals_the_reference(data: st.DataObject) -> None:
    """Values and gradients for any RoI: reversed, outside, half pixels, NaN, infinite, huge."""
    draw = data.draw
    images, depth, group = (draw(st.integers(1, 3)) for _ in range(3))
    size = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    rois = draw(roi_lists(images, hostile=True))
    geometry = (draw(st.sampled_from([1.0, 0.5, 1 / 3])), depth, group, draw(st.integers(1, 4)))
    input = random(images, depth * group**2, *size)
    input = op_cases.laid_out(input, draw(st.sampled_from(op_cases.LAYOUTS)))
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        own, twin = (
            run(op, input.to(dtype), rois.to(dtype), *geometry)
            for op in (psroi_pool, reference.psroi_pool)
        )
        for one, other in zip(own, twin, strict=True):
            op_cases.same(one, other, tolerance)
        assert own[1].isfinite().all()


def test_rounds_half_away_from_zero() -> None:
    """x from 10.5 to 20.5 covers the pixels 11 to 21; from -20.5 on it starts at -21."""
    row = torch.arange(30.0).view(1, 1, 1, 30)
    rois = torch.tensor([[0, 10.5, 0, 20.5, 0], [0, -20.5, 0, 2.5, 0], [0, 0.49999997, 0, 0, 0]])
    pooled = psroi_pool(row, rois, 1.0, 1, 1, 1)
    assert pooled.flatten().tolist() == [16.0, 1.5, 0.0]


def test_gradcheck() -> None:
    rois = torch.tensor([[0, 0, 0, 9, 7], [1, 3, 2, 5, 30], [0, 50, 50, 60, 60]]).double()
    input = random(2, 8, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: psroi_pool(x, rois, 0.5, 2, 2, 3), input, fast_mode=True
    )


@pytest.mark.parametrize("images", [0, 2])
def test_no_rois(images: int) -> None:
    output, grad = run(
        psroi_pool, random(images, 4, 3, 3), torch.zeros(0, 5).double(), 1.0, 1, 2, 7
    )
    assert output.shape == (0, 1, 7, 7)
    assert grad.shape == (images, 4, 3, 3)
    assert not grad.any()


def test_rois_get_no_gradient() -> None:
    rois = torch.tensor([[0.0, 0, 0, 5, 5]]).requires_grad_()
    psroi_pool(torch.zeros(1, 4, 3, 3, requires_grad=True), rois, 1.0, 1, 2, 2).sum().backward()
    assert rois.grad is None


def test_runs_of_rois_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rois = torch.cat([torch.zeros(7, 1), torch.rand(7, 4) * 8], 1).double()
    arguments = (random(1, 18, 6, 7), rois, 0.9, 2, 3, 3)
    whole = run(psroi_pool, *arguments)
    for limit in (1, 400):
        monkeypatch.setattr(module, "CELLS", limit)
        for one, other in zip(run(psroi_pool, *arguments), whole, strict=True):
            op_cases.same(one, other, 1e-12)


def test_work_is_bounded_by_the_map() -> None:
    """A RoI of a million pixels takes no longer than one of the whole map."""
    rois = torch.tensor([[0, -1e6, -1e6, 1e6, 1e6], [0, 0, 0, 3e38, 3e38]]).repeat(100, 1)
    start = time.monotonic()
    run(psroi_pool, torch.rand(1, 49, 40, 60), rois, 1 / 16, 1, 7, 7)
    assert time.monotonic() - start < 10


def test_twice_the_same_bits() -> None:
    rois = torch.cat([torch.zeros(100, 1), torch.rand(100, 4) * 400], 1)
    arguments = (random(1, 49 * 8, 25, 30, dtype=torch.float32), rois, 1 / 16, 8, 7, 7)
    for one, other in zip(run(psroi_pool, *arguments), run(psroi_pool, *arguments), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_and_autocast(dtype: torch.dtype) -> None:
    """Computed in float32 and rounded once; RoIs may stay float32, which holds their pixels."""
    rois = torch.tensor([[0, 3, 4, 301, 205], [0, 257, 31, 400, 333]], dtype=torch.float32)
    input = random(1, 18, 20, 26, dtype=dtype)
    full = run(psroi_pool, input.float(), rois, 1 / 16, 2, 3, 3)
    for one, other in zip(run(psroi_pool, input, rois, 1 / 16, 2, 3, 3), full, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other.to(dtype))
    with torch.autocast("cpu", dtype):
        inside = run(psroi_pool, input.float(), rois, 1 / 16, 2, 3, 3)
    for one, other in zip(inside, full, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("index", [-1.0, 2.0, 0.5, torch.nan, torch.inf, 1e30])
def test_wrong_batch_indices(index: float) -> None:
    rois = torch.tensor([[0, 0, 0, 5, 5], [index, 0, 0, 5, 5]])
    with pytest.raises(ValueError, match="batch indices of rois must be whole numbers from 0 to 1"):
        psroi_pool(torch.zeros(2, 4, 3, 3), rois, 1.0, 1, 2, 2)


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("input type", {"input": None}, TypeError, "input must be a tensor, got NoneType"),
    ("input rank", {"input": torch.zeros(4, 3, 3)}, ValueError, "input must be a tensor of 4"),
    ("input dtype", {"input": torch.zeros(1, 4, 3, 3).int()}, TypeError, "input .*int32"),
    ("input channels", {"input": torch.zeros(1, 5, 3, 3)}, ValueError, "input .*= 4 channels"),
    ("input empty", {"input": torch.zeros(1, 4, 0, 3)}, ValueError, "input .*at least 1 pixel"),
    ("rois type", {"rois": [torch.zeros(1, 4)]}, TypeError, "rois must be a tensor, got list"),
    ("rois rank", {"rois": torch.zeros(5)}, ValueError, "rois must be a tensor of 2"),
    ("rois width", {"rois": torch.zeros(1, 4)}, ValueError, r"rois .*\(R, 5\)"),
    ("rois dtype", {"rois": torch.zeros(1, 5).double()}, TypeError, "rois .*float64"),
    ("rois device", {"rois": torch.zeros(1, 5, device="meta")}, ValueError, "rois .*meta"),
    ("scale 0", {"spatial_scale": 0.0}, ValueError, "spatial_scale must be positive"),
    ("scale nan", {"spatial_scale": torch.nan}, ValueError, "spatial_scale must be finite"),
    ("scale type", {"spatial_scale": "1"}, TypeError, "spatial_scale must be a number"),
    ("output_dim 0", {"output_dim": 0}, ValueError, "output_dim must be at least 1"),
    ("group_size 0", {"group_size": 0}, ValueError, "group_size must be at least 1"),
    ("pooled_size 0", {"pooled_size": 0}, ValueError, "pooled_size must be at least 1"),
    ("pooled_size pair", {"pooled_size": (2, 2)}, TypeError, "pooled_size must be an int"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {
        "input": torch.zeros(1, 4, 3, 3),
        "rois": torch.zeros(1, 5),
        "spatial_scale": 1.0,
        "output_dim": 1,
        "group_size": 2,
        "pooled_size": 2,
    }
    psroi_pool(**good)
    with pytest.raises(error, match=f"psroi_pool: {message}"):
        psroi_pool(**good | change)


def test_operator_contract() -> None:
    rois = torch.tensor([[0, 0, 0, 9, 7], [1, 3, 2, 5, 30]]).float()
    sample = (torch.rand(2, 8, 4, 5, requires_grad=True), rois, 0.5, 2, 2, 3)
    torch.library.opcheck(module._psroi_pool, sample)
    for channels_last in (False, True):
        sample = (torch.rand(2, 2, 3, 3), rois, [2, 8, 4, 5], 0.5, 2, 3, channels_last)
        torch.library.opcheck(module._psroi_pool_backward, sample)


@op_cases.needs_cuda
def test_cuda_equals_cpu() -> None:
    rois = torch.cat([torch.zeros(50, 1), torch.rand(50, 4) * 400], 1)
    arguments = (random(1, 49 * 8, 25, 30, dtype=torch.float32), rois, 1 / 16, 8, 7, 7)
    on_gpu = run(psroi_pool, arguments[0].cuda(), rois.cuda(), *arguments[2:])
    for one, other in zip(on_gpu, run(psroi_pool, *arguments), strict=True):
        op_cases.same(one.cpu(), other, 1e-4)
