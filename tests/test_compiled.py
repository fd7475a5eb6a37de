"""The compiled kernels against the torch way, with any instruction set and number of threads."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import op_cases
import pytest
import torch
from conftest import ROOT
from torch import Tensor

from dcdet.ops import compiled, deform_psroi_pool, deform_roi_pool, psroi_pool
from dcdet.ops.deform_conv import _deform_conv2d, _deform_conv2d_backward
from dcdet.ops.deform_psroi_pool import _deform_psroi_pool, _deform_psroi_pool_backward
from dcdet.ops.deform_roi_pool import _deform_roi_pool, _deform_roi_pool_backward
from dcdet.ops.psroi_pool import _psroi_pool, _psroi_pool_backward

needs_kernels = pytest.mark.skipif(bool(compiled.missing), reason=f"kernels: {compiled.missing}")

# (batch, C, O, height, width, groups, offset groups, stride, dilation): whole vectors and not, one
# band of pixels and several, slices cut by groups.
SHAPES = [
    (2, 64, 64, 13, 17, 1, 1, 1, 1),
    (1, 130, 70, 9, 8, 1, 1, 1, 2),
    (2, 48, 40, 10, 9, 2, 4, 2, 2),
    (1, 600, 17, 6, 7, 1, 1, 1, 1),
    (3, 3, 5, 7, 7, 1, 3, 1, 1),
    (1, 8, 6, 90, 80, 1, 2, 1, 1),
    (1, 512, 64, 30, 31, 1, 4, 1, 1),
]


def results(shape: tuple[int, ...], dtype: torch.dtype, wide: bool = False) -> list[Tensor]:
    """Output and gradients of random numbers; odd heights have mask, bias and the old border.

    `wide`: of the same numbers, as float32.
    """
    batch, channels, outputs, height, width, groups, offset_groups, stride, dilation = shape
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    odd = height % 2 == 1
    out = ((height - 1) // stride + 1, (width - 1) // stride + 1)
    precise = torch.float32 if dtype.itemsize == 2 else dtype
    x, weight = random(batch, channels, height, width), random(outputs, channels // groups, 3, 3)
    offset = (random(batch, 18 * offset_groups, *out) * 3).to(precise)
    mask = random(batch, 9 * offset_groups, *out).to(precise) if odd else None
    bias = random(outputs) if odd else None
    geometry = ([stride] * 2, [dilation] * 2, [dilation] * 2, odd)
    if wide:
        x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
    y = _deform_conv2d(x, offset, weight, bias, mask, *geometry)
    grad = random(*y.shape).to(y.dtype)
    grads = _deform_conv2d_backward(grad, x, offset, weight, mask, *geometry)
    return [y, *grads]


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_equals_the_torch_way(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    with op_cases.way("torch"):
        expected = results(shape, dtype)
    for one, other in zip(results(shape, dtype), expected, strict=True):
        assert one.shape == other.shape
        scale = other.abs().max() if other.numel() else 1
        op_cases.same(one / scale, other / scale, tolerance)


@needs_kernels
@pytest.mark.skipif(not compiled.bfloat16, reason="needs a CPU with AMX")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_equals_float32(shape: tuple[int, ...]) -> None:
    """Within the rounding of 8 bits, of which the largest numbers give the scale."""
    expected = results(shape, torch.bfloat16, wide=True)
    for one, other in zip(results(shape, torch.bfloat16), expected, strict=True):
        scale = other.abs().max() if other.numel() else 1
        op_cases.same(one.float() / scale, other / scale, 1e-2)


@pytest.mark.parametrize("way", ["compiled", "torch"])
def test_operators_take_half_types_with_and_without_kernels(way: str) -> None:
    """As where deterministic algorithms are asked for between a forward and a backward pass."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, 5, 6, generator=generator)
    offset, weight = torch.randn(1, 18, 5, 6), torch.randn(3, 8, 3, 3, generator=generator)
    rois, trans = torch.tensor([[0, 0, 0, 4, 4]]).float(), torch.zeros(1, 2, 2, 2)
    one, align = [[1, 1]] * 3, ([2, 2], 1.0, 0, 0.1)

    def run(dtype: torch.dtype) -> list[Tensor]:
        maps, matrix = x.half().to(dtype), weight.half().to(dtype)
        y = _deform_conv2d(maps, offset, matrix, None, None, *one, False)
        pooled = _psroi_pool(maps, rois, 1.0, 2, 2, 2)
        moved = _deform_psroi_pool(maps, rois, trans, [2, 2, 2, 2, 2], 1.0, 0.1)
        aligned = _deform_roi_pool(maps, rois, trans, *align)
        grads = [torch.ones_like(t) for t in (y, pooled, moved, aligned)]
        return [
            *(y, pooled, moved, aligned),
            *_deform_conv2d_backward(grads[0], maps, offset, matrix, None, *one, False),
            _psroi_pool_backward(grads[1], rois, [1, 8, 5, 6], 1.0, 2, 2, False),
            *_deform_psroi_pool_backward(grads[2], maps, rois, trans, [2, 2, 2, 2, 2], 1.0, 0.1),
            *_deform_roi_pool_backward(grads[3], maps, rois, trans, *align),
        ]

    with op_cases.way(way):
        halves, full = run(torch.float16), run(torch.float32)
    for half, other in zip(halves, full, strict=True):
        assert torch.equal(half, other.to(half.dtype))
    assert {half.dtype for half in halves} == {torch.float16, torch.float32}


@needs_kernels
@pytest.mark.skipif(not compiled.bfloat16, reason="needs a CPU with AMX")
def test_bfloat16_with_numbers_that_break_things() -> None:
    """What is NaN or finite in float32 is so in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    for name in ("offset", "input", "mask"):
        tensors = {
            "input": torch.randn(1, 40, 9, 8, generator=generator),
            "offset": torch.randn(1, 18, 9, 8, generator=generator),
            "mask": torch.rand(1, 9, 9, 8, generator=generator),
        }
        flat = tensors[name].view(-1)
        for i, number in enumerate(op_cases.HOSTILE):
            flat[7 + 61 * i] = number
        x = tensors["input"].bfloat16()
        weight = torch.randn(33, 40, 3, 3, generator=generator).bfloat16()
        rest = (tensors["mask"], [1, 1], [1, 1], [1, 1], False)
        grad = torch.randn(1, 33, 9, 8, generator=generator).bfloat16()
        found, expected = (
            [
                _deform_conv2d(x.to(dtype), tensors["offset"], weight.to(dtype), None, *rest),
                *_deform_conv2d_backward(
                    grad.to(dtype), x.to(dtype), tensors["offset"], weight.to(dtype), *rest
                ),
            ]
            for dtype in (torch.bfloat16, torch.float32)
        )
        for one, other in zip(found, expected, strict=True):
            if name != "mask":  # infinite ones meet each other sooner
                assert torch.equal(one.isnan(), other.isnan()), name
            calm = other.abs() < 1e4
            assert calm.any()
            assert not one[other.isnan()].isfinite().any()
            op_cases.same(one[calm].float(), other[calm], 0.2)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_number_of_threads_changes_no_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not compiled.bfloat16:
        pytest.skip("needs a CPU with AMX")
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 40):  # more than there are slices of channels
            torch.set_num_threads(threads)
            found.append(results(shape, dtype))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert torch.equal(one, same)


@needs_kernels
@pytest.mark.parametrize("size", [16, 32])
def test_lesser_instruction_sets(size: int) -> None:
    """The same tests where a CPU has no AVX512, or nothing beyond the baseline."""
    if size > compiled.kernels.vector_bytes():
        pytest.skip("this CPU has no such vectors")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k",
         "test_equals_the_torch_way or test_vectors_in_use"],
        env={**os.environ, "DCDET_VECTOR_BYTES": str(size)}, cwd=ROOT, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


@needs_kernels
def test_vectors_in_use() -> None:
    wanted = os.environ.get("DCDET_VECTOR_BYTES")
    assert compiled.kernels.vector_bytes() in ([int(wanted)] if wanted else [16, 32, 64])
    assert "in use" in compiled.describe()


@needs_kernels
@pytest.mark.skipif(not os.environ.get("DCDET_TEST_LARGE"), reason="18 GB: set DCDET_TEST_LARGE=1")
def test_more_numbers_than_32_bits_count() -> None:
    """The last pixels of a map of 2^31 numbers are read, and get their gradient."""
    side, corner = 16400, 3
    whole = torch.empty(1, 8, side, side, memory_format=torch.channels_last).zero_()
    assert whole.numel() > 2**31
    whole[..., -corner:, -corner:] = torch.randn(1, 8, corner, corner)
    part = whole[..., -corner:, -corner:].contiguous()
    weight = torch.randn(4, 8, 3, 3)
    offset = torch.randint(-32, 33, (1, 18, 2, 2)) / 64  # exact at any position
    # Outputs in the four corners; the last one alone, on the last pixels alone.
    far, near = ([[n, n], [0, 0], [1, 1], False] for n in (side - 3, 1))
    offsets = (offset, offset[..., 1:, 1:].clone())
    many = _deform_conv2d(whole, offsets[0], weight, None, None, *far)
    one = _deform_conv2d(part, offsets[1], weight, None, None, *near)
    grad = torch.zeros_like(many)
    grad[..., 1, 1] = 1
    grads = _deform_conv2d_backward(grad, whole, offsets[0], weight, None, *far)
    wanted = _deform_conv2d_backward(torch.ones_like(one), part, offsets[1], weight, None, *near)
    # Samples beyond the inner edge of the last pixels read zeros there, too.
    op_cases.same(many[..., 1:, 1:], one, 1e-5)
    op_cases.same(grads[0][..., -corner:, -corner:], wanted[0], 1e-5)
    assert not grads[0][..., :100, :].any()


def pooled(
    classes: int | None,
    layout: torch.memory_format,
    group: int,
    depth: int | None = None,
    whole: bool = False,
) -> list[Tensor]:
    """Outputs and gradients of the pooling ops; classes None is the plain one.

    `whole`: of whole numbers, which half types have, too.
    """
    depth = depth or 54 // group**2
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, depth * group**2, 20, 30, generator=generator).contiguous(
        memory_format=layout
    )
    x = (x * 50).round() if whole else x
    low = torch.rand(40, 2, generator=generator) * 400 - 40
    high = low + torch.rand(40, 2, generator=generator) * 1200  # samples up to 4 cells apart
    rois = torch.cat([torch.arange(40)[:, None] % 2, low, high], 1)
    leaves = [x.requires_grad_()]
    if classes is None:
        y = psroi_pool(x, rois, 1 / 16, depth, group, 5)
    else:
        if classes:
            shifts = torch.randn(40, 2 * classes, 3, 3, generator=generator)
            leaves.append(shifts.requires_grad_())
        trans = leaves[1] if classes else None
        y = deform_psroi_pool(x, rois, trans, 1 / 16, depth, group, 5, 3, 4, 0.1)
    grad = torch.randn(y.shape, generator=generator)
    grad = (grad * 9).round() if whole else grad
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@needs_kernels
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("classes", [None, 0, 1, 3])
def test_pooling_equals_the_torch_way(
    classes: int | None, group: int, layout: torch.memory_format
) -> None:
    check_pooling(classes, layout, group)


@needs_kernels
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("group", "depth"), [(1, 32), (1, 1), (3, 1), (7, 3), (4, 17)])
@pytest.mark.parametrize("classes", [None, 1])
def test_pooling_of_other_depths_equals_the_torch_way(
    classes: int | None, group: int, depth: int, layout: torch.memory_format
) -> None:
    check_pooling(classes, layout, group, depth)


def check_pooling(
    classes: int | None, layout: torch.memory_format, group: int, depth: int | None = None
) -> None:
    """The kernels' results are torch's, and have the same bits with more threads."""
    with op_cases.way("torch"):
        expected = pooled(classes, layout, group, depth)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found = pooled(classes, layout, group, depth)
            for one, other in zip(found, expected, strict=True):
                op_cases.same(one, other, 1e-4)
                for memory in (torch.contiguous_format, torch.channels_last):
                    assert one.is_contiguous(memory_format=memory) == other.is_contiguous(
                        memory_format=memory
                    )
            if threads == 1:
                first = found
        for one, other in zip(found, first, strict=True):
            assert torch.equal(one, other)
    finally:
        torch.set_num_threads(before)


def aligned(
    channels: int,
    layout: torch.memory_format,
    ratio: int = 0,
    moved: bool = True,
    *,
    dtype: torch.dtype = torch.float32,
    whole: bool = False,
) -> list[Tensor]:
    """Output and gradients of deform_roi_pool, on RoIs inside the map and beyond it.

    `whole`: of whole numbers, which half types have, too.
    """
    generator = torch.Generator().manual_seed(0)

    def random(make: Callable[..., Tensor], *size: int) -> Tensor:
        return make(*size, generator=generator, dtype=torch.float64)

    x = random(torch.randn, 2, channels, 20, 30).contiguous(memory_format=layout)
    low = random(torch.rand, 40, 2) * 400 - 40
    high = low + random(torch.rand, 40, 2) * 1200
    rois = torch.cat([torch.arange(40)[:, None] % 2, low, high], 1).to(dtype)
    offset, grad = random(torch.randn, 40, 2, 7, 5), random(torch.randn, 40, channels, 7, 5)
    x, grad = ((x * 50).round(), (grad * 9).round()) if whole else (x, grad)
    leaves = [leaf.to(dtype).requires_grad_() for leaf in ([x, offset] if moved else [x])]
    y = deform_roi_pool(leaves[0], rois, leaves[1] if moved else None, (7, 5), 1 / 16, ratio)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))]


@needs_kernels
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("channels", [3, 70, 256])
def test_aligned_pooling_equals_the_torch_way(channels: int, layout: torch.memory_format) -> None:
    with op_cases.way("torch"):
        expected = aligned(channels, layout)
    for one, other in zip(aligned(channels, layout), expected, strict=True):
        op_cases.same(one, other, 1e-4 * float(other.abs().max()))


def imported(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"import dcdet.ops.compiled as c; {code}"],
        env={**os.environ, "DCDET_KERNELS": "", **environment}, cwd=ROOT, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None
    or importlib.util.find_spec("setuptools.command.bdist_wheel") is None,
    reason="no setuptools, or an older one than pyproject.toml asks for",
)
def test_without_a_compiler_nothing_stale_is_installed(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "dcdet").mkdir()
    shutil.copy(ROOT / "dcdet" / "__init__.py", tmp_path / "dcdet")

    def build(compiler: str, **cuda: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "CC": compiler, "CXX": compiler, "LDSHARED": compiler,
                       "LDCXXSHARED": compiler, **cuda}  # fmt: skip
        return subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
            env=environment, cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip

    # A stand-in that leaves an empty library, then no compiler at all.
    works = tmp_path / "bin" / "nvcc"
    works.parent.mkdir()
    works.write_text(
        '#!/bin/sh\n[ "$1" = --list-gpu-code ] && echo sm_90\n'
        'while [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n'
    )
    works.chmod(0o755)
    cpu, cuda = (tmp_path / "dcdet" / name for name in ("_C.abi3.so", "_CUDA.abi3.so"))
    build(str(works), DCDET_CUDA="1", CUDA_HOME=str(tmp_path))
    assert cpu.exists()
    assert cuda.exists()
    build(str(works), DCDET_CUDA="0")
    assert cpu.exists()
    assert not cuda.exists()
    build(str(works), DCDET_CUDA="1", CUDA_HOME=str(tmp_path))
    assert cuda.exists()
    (tmp_path / "csrc" / "version.h").write_text("changed")
    said = build(str(tmp_path / "absent"), DCDET_CUDA="1", CUDA_HOME=str(tmp_path / "absent"))
    assert said.stderr.count("dcdet's kernels were not compiled") == 1
    assert said.stderr.count("dcdet's CUDA kernels were not compiled (no nvcc") == 1
    assert not cpu.exists()
    assert not cuda.exists()


def test_switched_off() -> None:
    said = imported("print(c.describe())", DCDET_KERNELS="0")
    assert said == (
        "kernels: none, the operators run on torch, slower (switched off by DCDET_KERNELS=0)\n"
    )


def test_a_library_that_does_not_load_is_one_warning(tmp_path: Path) -> None:
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"\x7fELF of something else")
    said = imported(f"from pathlib import Path; print(bool(c._load(Path({str(broken)!r}))))")
    assert said.startswith("True\n")
    assert said.count("\n") == 2
    assert "rebuild in the checkout: python -m pip install" in said


@needs_kernels
def test_a_library_of_another_version_is_one_warning() -> None:
    said = imported("c.VERSION += 1; print(c._load(c.LIBRARY))")
    version = compiled.VERSION
    assert f"version {version} of the kernels, {version + 1} is needed\n" in said
    assert said.count("rebuild") == 1
