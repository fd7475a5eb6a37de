"""The kernels of csrc/cuda: on an emulator everywhere, and on the GPU where there is one.

`emulator/emulator.h` lets g++ compile the same source for a CPU, a fibre for each thread. It shows
wrong numbers, indices (under sanitisers, see CONTRIBUTING.md) and waiting; no races and no speed.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import op_cases
import pytest
import test_compiled
import torch
from conftest import ROOT
from test_deform_conv import test_a_nan_offset_stays_where_it_is as check_nan_offsets
from test_deform_conv import test_equals_the_reference as check_conv
from test_deform_psroi_pool import test_equals_the_reference as check_deform_pool
from test_psroi_pool import test_equals_the_reference as check_pool
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dcdet.ops import compiled

EMULATOR = ROOT / "tests" / "emulator"
LIBTORCH = Path(torch.__file__).parent
SANITISERS = os.environ.get("DCDET_SANITISERS", "").split()
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
KERNELS = [ROOT / "csrc" / "bindings.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
PROBE = EMULATOR / "probe.cu"
SHAPES = [*test_compiled.SHAPES[:-1], (1, 512, 64, 6, 7, 1, 4, 1, 1)]

needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")


class Kernels(NamedTuple):
    """Operators with the schemas of dcdet_C, and the device whose tensors they take."""

    ops: Any
    device: str


def compile_for_cpu(factory: pytest.TempPathFactory, sources: list[Path], *flags: str) -> Path:
    """Compile CUDA sources with the emulator, once for each content; skips without a compiler."""
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("the emulator needs g++")
    command = [
        compiler, "-std=c++17", *(SANITISERS or ["-O1"]), "-g", "-fPIC", "-shared", "-Wall",
        "-ffp-contract=off", "-Wno-unknown-pragmas", "-DDCDET_EMULATOR", STABLE_ABI, *flags,
        f"-I{LIBTORCH / 'include'}", f"-I{EMULATOR}", f"-I{ROOT / 'csrc' / 'cuda'}", "-xc++",
    ]  # fmt: skip
    linked = [f"-L{LIBTORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-ltorch"]
    files = [*sources, *sorted((ROOT / "csrc").rglob("*.h")), EMULATOR / "emulator.h"]
    content = hashlib.sha256(repr((command, torch.__version__)).encode())
    for file in files:
        content.update(file.read_bytes())
    library = factory.getbasetemp().parent / f"dcdet-{content.hexdigest()[:16]}.so"
    if not library.exists():
        made = factory.mktemp("emulator") / library.name
        done = subprocess.run(
            [*command, *map(str, sources), "-o", str(made), *linked], capture_output=True, text=True
        )
        if done.returncode:
            empty = made.with_name("empty.cpp")
            empty.write_text("#include <torch/csrc/stable/library.h>\n")
            if subprocess.run([*command, str(empty), "-o", str(made), *linked]).returncode:
                pytest.skip("g++ does not take torch's headers")
            pytest.fail(done.stderr[-3000:])
        made.replace(library)
    return library


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    # The schemas of bindings.cpp under another name, and the kernels as the CPU's.
    library = compile_for_cpu(tmp_path_factory, KERNELS, "-Ddcdet_C=dcdet_emulated")
    torch.ops.load_library(str(library))
    return Kernels(torch.ops.dcdet_emulated, "cpu")


@pytest.fixture(params=["emulated", "cuda"], scope="module")
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """The same tests for the emulated kernels and for a GPU's."""
    if request.param == "emulated":
        found: Kernels = request.getfixturevalue("emulator")
        return found
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if compiled.missing_for_cuda:
        pytest.skip(f"kernels for CUDA: {compiled.missing_for_cuda}")
    return Kernels(torch.ops.dcdet_C, "cuda")


class Elsewhere:
    """Operators for CPU tensors that other kernels compute, on their device and in `dtype`.

    Memory that a kernel should write and does not is NaN where the kernels are emulated.
    """

    STORED = ("input", "weight", "bias", "grad")

    def __init__(self, kernels: Kernels, dtype: torch.dtype | None = None) -> None:
        self.kernels, self.dtype = kernels, dtype

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.kernels.ops, name)
        names = [argument.name for argument in function.default._schema.arguments]

        def there(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if self.dtype is not None and value.is_floating_point():
                value = value.to(self.dtype if name in self.STORED else torch.float32)
            return value.to(self.kernels.device)

        def call(*values: Any) -> Any:
            moved = [there(*pair) for pair in zip(names, values, strict=False)]
            before = torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(before or self.kernels.device == "cpu")
            try:
                found = function(*moved)
            finally:
                torch.use_deterministic_algorithms(before)
            if isinstance(found, Tensor):
                return found.to("cpu", values[0].dtype)
            return tuple(one.to("cpu", values[0].dtype) for one in found)

        return call


@contextlib.contextmanager
def in_use(operators: Any) -> Iterator[None]:
    """dcdet's own operators run on these kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "missing", "")
        patch.setattr(compiled, "kernels", operators)
        yield


@pytest.fixture(scope="module")
def public(kernels: Kernels) -> Iterator[None]:
    """The public functions, called with CPU tensors, run on the kernels under test."""
    with in_use(Elsewhere(kernels)):
        yield


def compare(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Equal within the tolerance, relative to the largest number of each tensor."""
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        scale = other.abs().max() if other.numel() else 1
        op_cases.same(one / scale, other / scale, tolerance)


# Convolution


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_conv_equals_the_torch_way(
    public: None, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    """Whole packs of channels and single ones; odd heights have mask, bias and the old border."""
    found = test_compiled.results(shape, dtype)
    with op_cases.way("torch"):
        expected = test_compiled.results(shape, dtype)
    compare(found, expected, tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conv_in_half(kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Columns and results are rounded to the half type, so a few of its steps; sums are not."""
    with op_cases.way("torch"):
        expected = test_compiled.results(shape, torch.float32, through=dtype)
    with in_use(Elsewhere(kernels, dtype)):
        found = test_compiled.results(shape, torch.float32, through=dtype)
    compare(found, expected, 2 * torch.finfo(dtype).eps)


def arguments(dtype: torch.dtype = torch.float32, channels: int = 16) -> list[Any]:
    """Those of deform_conv2d, for the kernels: 2 offset groups, 3x3 taps, a map of 5x6."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    positions = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        random(2, channels, 5, 6), random(2, 36, 5, 6).to(positions) * 2,
        random(6, channels, 3, 3), random(6), random(2, 18, 5, 6).to(positions),
        [1, 1], [1, 1], [1, 1], False,
    ]  # fmt: skip


def both_ways(operators: Any, values: list[Any], grad: Tensor) -> list[Tensor]:
    """The output and the gradients of input, offset, weight and mask."""
    output = operators.deform_conv2d(*values)
    input, offset, weight, _, mask, *geometry = values
    backward = operators.deform_conv2d_backward
    return [output, *backward(grad, input, offset, weight, mask, *geometry)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [16, 6], ids=["packed", "single"])
def test_chunks_change_nothing(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, channels: int
) -> None:
    """Columns of a few output pixels at a time, of one, and of all at once."""
    values = [
        v.to(kernels.device) if isinstance(v, Tensor) else v for v in arguments(dtype, channels)
    ]
    grad = torch.ones(2, 6, 9, 10, dtype=dtype, device=kernels.device)
    whole = both_ways(kernels.ops, values, grad)
    for budget in (1, 7 * 9 * channels * 4):
        monkeypatch.setenv("DCDET_COLUMN_BYTES", str(budget))
        compare(both_ways(kernels.ops, values, grad), whole, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("layout", [*op_cases.LAYOUTS, "unaligned"])
def test_conv_in_any_layout(kernels: Kernels, layout: str) -> None:
    """Strided offsets and masks, and channels-last numbers that are not on a border of 16 bytes."""
    operators = Elsewhere(kernels)
    values = arguments(channels=8)

    def twisted(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if layout != "unaligned":
            return op_cases.laid_out(value, layout)
        if value.dim() == 1:
            return value
        rows = value.permute(0, 2, 3, 1)
        memory = torch.cat([torch.zeros(1), rows.flatten()])
        return memory[1:].view(rows.shape).permute(0, 3, 1, 2)

    laid = [twisted(value) for value in values]
    plain = [v.contiguous() if isinstance(v, Tensor) else v for v in laid]
    grad = torch.randn(2, 6, 9, 10, generator=torch.Generator().manual_seed(1))
    compare(
        both_ways(operators, laid, twisted(grad)),
        both_ways(operators, plain, twisted(grad).contiguous()),
        1e-6,
    )


@pytest.mark.parametrize("value", op_cases.HOSTILE, ids=str)
@pytest.mark.parametrize("name", ["input", "offset", "mask"])
def test_hostile_numbers(kernels: Kernels, name: str, value: float) -> None:
    """The same NaNs and infinities as on a CPU, and nothing else is touched."""
    for channels in (8, 6):
        for original in (False, True):
            values = arguments(torch.float64, channels)
            values[-1] = original
            planted = values[("input", "offset", "weight", "bias", "mask").index(name)].view(-1)
            planted[:: planted.numel() // 3] = value
            grad = torch.ones(2, 6, 9, 10, dtype=torch.float64)
            with op_cases.way("compiled"):
                expected = both_ways(compiled.kernels, values, grad)
            for one, other in zip(
                both_ways(Elsewhere(kernels), values, grad), expected, strict=True
            ):
                op_cases.same(one, other, 1e-9)


def test_no_images_and_no_rois(kernels: Kernels) -> None:
    """Nothing is launched, and gradients of what is there are zero."""
    operators = Elsewhere(kernels)
    values = arguments()
    for index in (0, 1, 4):
        values[index] = values[index][:0]
    output, *grads = both_ways(operators, values, torch.ones(0, 6, 5, 6))
    assert output.shape == (0, 6, 5, 6)
    assert [tuple(grad.shape) for grad in grads] == [
        (0, 16, 5, 6), (0, 36, 5, 6), (6, 16, 3, 3), (0, 18, 5, 6),
    ]  # fmt: skip
    assert not grads[2].any()

    x, none = torch.randn(2, 8, 4, 5), torch.zeros(0, dtype=torch.long)
    edges = torch.zeros(4, 0, 2, dtype=torch.long)
    assert operators.psroi_pool(x, none, edges, 2).shape == (0, 2, 2, 2)
    grad_input = operators.psroi_pool_backward(torch.ones(0, 2, 2, 2), none, edges, [*x.shape], 2)
    assert grad_input.shape == x.shape
    assert not grad_input.any()
    first, step = torch.zeros(2, 0, 1, 2, 2), torch.zeros(2, 0)
    assert operators.deform_psroi_pool(x, none, first, step, 2, 2).shape == (0, 2, 2, 2)
    grad_input, grad_first = operators.deform_psroi_pool_backward(
        torch.ones(0, 2, 2, 2), x, none, first, step, 2, 2
    )
    assert grad_first.shape == first.shape
    assert not grad_input.any()


def test_positions_of_another_dtype_are_refused(kernels: Kernels) -> None:
    values = [v.to(kernels.device) if isinstance(v, Tensor) else v for v in arguments()]
    values[1] = values[1].half()
    with pytest.raises(RuntimeError):
        kernels.ops.deform_conv2d(*values)


def test_conv_in_any_geometry(public: None) -> None:
    """Values and gradients with sampled whole, far, infinite and huge offsets."""
    check_conv()


def test_conv_with_nan_offsets(public: None) -> None:
    check_nan_offsets()


# Pooling


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("classes", [None, 0, 1, 3])
def test_pooling_equals_the_torch_way(
    public: None, classes: int | None, layout: torch.memory_format
) -> None:
    found = test_compiled.pooled(classes, layout)
    with op_cases.way("torch"):
        expected = test_compiled.pooled(classes, layout)
    compare(found, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [None, 0, 1, 3])
def test_pooling_in_half(kernels: Kernels, classes: int | None, dtype: torch.dtype) -> None:
    """Only inputs and results are rounded: half a step, where the inputs are whole numbers."""
    layout = torch.channels_last
    with op_cases.way("torch"):
        expected = test_compiled.pooled(classes, layout, whole=True)
    with in_use(Elsewhere(kernels, dtype)):
        found = test_compiled.pooled(classes, layout, whole=True)
    compare(found[:2], expected[:2], 0.51 * torch.finfo(dtype).eps)
    compare(found[2:], expected[2:], 1e-5)  # positions are not rounded


def test_pooling_of_any_rois(public: None) -> None:
    """RoIs reversed, outside, half pixels, NaN, infinite, huge."""
    check_pool()


def test_deformable_pooling_of_any_rois(public: None) -> None:
    check_deform_pool()


# Which way is taken


def test_deterministic_gradients_are_not_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU only; a GPU's tensor is pretended."""
    monkeypatch.setattr(compiled, "missing", "")
    monkeypatch.setattr(compiled, "missing_for_cuda", "")
    with FakeTensorMode():
        on_gpu, whole = torch.empty(1, device="cuda"), torch.empty(1, device="cuda").long()
    on_cpu = torch.empty(1)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert compiled.covers(on_gpu.to(dtype))
        assert compiled.covers_backward(on_gpu.to(dtype))
    assert not compiled.covers(whole)
    assert not compiled.covers(on_cpu.half())
    torch.use_deterministic_algorithms(True)
    try:
        assert compiled.covers(on_gpu)
        assert not compiled.covers_backward(on_gpu)
        assert compiled.covers_backward(on_cpu)
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(compiled, "missing_for_cuda", "not compiled")
    assert not compiled.covers(on_gpu)
    assert compiled.covers(on_cpu)


# The emulator itself, and what a GPU does with the same kernels


@pytest.fixture(params=["emulated", "cuda"], scope="module")
def probe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    if request.param == "emulated":
        library = compile_for_cpu(tmp_path_factory, [PROBE], "-DDCDET_PROBE=dcdet_probe_cpu")
        torch.ops.load_library(str(library))
        return Kernels(torch.ops.dcdet_probe_cpu, "cpu")
    nvcc = shutil.which("nvcc")
    if not torch.cuda.is_available() or not nvcc:
        pytest.skip("needs a CUDA device and nvcc")
    library = tmp_path_factory.mktemp("probe") / "probe.so"
    subprocess.run(
        [nvcc, "-shared", "-std=c++17", "-arch=native", "-Xcompiler=-fPIC", "-DUSE_CUDA",
         STABLE_ABI, "-DDCDET_PROBE=dcdet_probe_cuda", f"-I{LIBTORCH / 'include'}",
         f"-I{ROOT / 'csrc' / 'cuda'}", str(PROBE), "-o", str(library), f"-L{LIBTORCH / 'lib'}",
         "-ltorch_cuda", "-ltorch_cpu", "-lc10", "-ltorch"],
        check=True,
    )  # fmt: skip
    torch.ops.load_library(str(library))
    return Kernels(torch.ops.dcdet_probe_cuda, "cuda")


def numbers(probe: Kernels, blocks: int = 1) -> Tensor:
    """As many as the blocks have threads, a row a block."""
    threads = 256 if probe.device == "cuda" else 64
    return torch.arange(1.0 * blocks * threads, device=probe.device).view(blocks, threads)


def test_threads_of_a_block_wait_for_each_other(probe: Kernels) -> None:
    rows = numbers(probe, 4)
    assert torch.equal(probe.ops.reverse(rows), rows.flip(1))


@pytest.mark.parametrize("team", [1, 2, 8, 32])
def test_teams_sum(probe: Kernels, team: int) -> None:
    teams = numbers(probe).view(-1, team)
    expected = teams.sum(1, keepdim=True).expand(-1, team)
    assert torch.equal(probe.ops.totals(teams, team), expected)


def test_a_launch_that_fails_raises(probe: Kernels) -> None:
    """And names the kernel; what follows works."""
    row = numbers(probe)
    with pytest.raises(RuntimeError, match="kernel leave_early: invalid configuration"):
        probe.ops.launch_badly(row)
    assert torch.equal(probe.ops.totals(row, 1), row)


def test_threads_that_never_come_are_an_error(probe: Kernels) -> None:
    if probe.device == "cuda":
        pytest.skip("a GPU does not tell")
    row = numbers(probe)
    with pytest.raises(RuntimeError, match="threads wait for others that never come"):
        probe.ops.hang(row)
    assert torch.equal(probe.ops.totals(row, 1), row)
