"""The kernels of csrc/cuda: on an emulator everywhere, and on the GPU where there is one.

`emulator/emulator.h` lets g++ compile the same source for a CPU, a fibre for each thread. It shows
wrong numbers, indices (under sanitisers, see CONTRIBUTING.md) and waiting; no races and no speed.
"""

import contextlib
import hashlib
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
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
from test_deform_roi_pool import test_equals_the_reference as check_aligned_pool
from test_deform_roi_pool import test_gradient_at_the_border as check_border
from test_psroi_pool import test_equals_the_reference as check_pool
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dcdet.ops import compiled, deform_conv2d, deform_psroi_pool, deform_roi_pool, psroi_pool

align = importlib.import_module("dcdet.ops.deform_roi_pool")
EMULATOR = ROOT / "tests" / "emulator"
LIBTORCH = Path(torch.__file__).parent
SANITISERS = os.environ.get("DCDET_SANITISERS", "").split()
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
NVCC_FLAGS = ["-shared", "-std=c++17", "-Xcompiler=-fPIC", "-DUSE_CUDA", STABLE_ABI,
              f"-I{LIBTORCH / 'include'}"]  # fmt: skip
CUDA_LIBRARIES = [f"-L{LIBTORCH / 'lib'}", "-ltorch_cuda", "-ltorch_cpu", "-lc10", "-ltorch"]
KERNELS = [ROOT / "csrc" / "bindings.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
PROBE = EMULATOR / "probe.cu"
SHAPES = [*test_compiled.SHAPES[:-1], (1, 512, 64, 6, 7, 1, 4, 1, 1)]

needs_nvcc = pytest.mark.skipif(
    not shutil.which("nvcc") or torch.version.cuda is None or bool(compiled.missing),
    reason="needs nvcc, a torch for CUDA and the CPU kernels",
)
needs_cuda_kernels = pytest.mark.skipif(
    not torch.cuda.is_available() or bool(compiled.missing_for_cuda),
    reason="needs a CUDA device and the kernels for it",
)


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
    """Columns and results are rounded to the half type; a BLAS on a GPU may round some more."""
    with op_cases.way("torch"):
        expected = test_compiled.results(shape, dtype, wide=True)
    with in_use(Elsewhere(kernels, dtype)):
        found = test_compiled.results(shape, dtype, wide=True)
    steps = 2 if kernels.device == "cuda" else 0.6
    compare(found, expected, steps * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_not_in_half(kernels: Kernels, dtype: torch.dtype) -> None:
    """1722 output pixels of 512 channels read x = 0.25 between a 0 and a 1: whole sums, rounded
    once. One after another they would stay at 256 in bfloat16."""
    pad, channels = 20, 512
    x = torch.tensor([0.0, 1.0]).expand(1, channels, 1, 2).to(dtype)
    weight, rest = torch.ones(1, channels, 1, 1, dtype=dtype), ([1, 1], [pad, pad], [1, 1], False)
    rows, columns = torch.meshgrid(torch.arange(41.0), torch.arange(42.0), indexing="ij")
    offset = torch.stack([pad - rows, pad + 0.25 - columns])[None]
    grad = torch.ones(1, 1, 41, 42, dtype=dtype)
    operators = Elsewhere(kernels)
    output = operators.deform_conv2d(x, offset, weight, None, None, *rest)
    assert torch.equal(output, torch.full_like(grad, channels / 4))
    grads = operators.deform_conv2d_backward(grad, x, offset, weight, None, *rest)
    per_pixel = torch.tensor([0.75, 0.25]).expand_as(x) * 1722
    assert torch.equal(grads[0], per_pixel.to(dtype))
    slopes = torch.tensor([-channels / 4, channels])[None, :, None, None].expand_as(offset)
    assert torch.equal(grads[1].float(), slopes)
    assert torch.equal(grads[2], torch.full_like(weight, 0.25 * 1722))


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

    def twisted(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.to(kernels.device)
        if layout != "unaligned":
            return op_cases.laid_out(value, layout)
        if value.dim() == 1:
            return value
        rows = value.permute(0, 2, 3, 1)
        memory = torch.cat([rows.new_zeros(1), rows.flatten()])
        return memory[1:].view(rows.shape).permute(0, 3, 1, 2)

    laid = [twisted(value) for value in arguments(channels=8)]
    plain = [v.contiguous() if isinstance(v, Tensor) else v for v in laid]
    grad = twisted(torch.randn(2, 6, 5, 6, generator=torch.Generator().manual_seed(1)))
    compare(
        both_ways(kernels.ops, laid, grad),
        both_ways(kernels.ops, plain, grad.contiguous()),
        1e-5,
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
    grad_input = operators.psroi_pool_backward(
        torch.ones(0, 2, 2, 2), none, edges, [*x.shape], 2, False
    )
    assert grad_input.shape == x.shape
    assert not grad_input.any()
    first, step = torch.zeros(2, 0, 1, 2, 2), torch.zeros(2, 0)
    assert operators.deform_psroi_pool(x, none, first, step, 2, 2).shape == (0, 2, 2, 2)
    grad_input, grad_first = operators.deform_psroi_pool_backward(
        torch.ones(0, 2, 2, 2), x, none, first, step, 2, 2, True
    )
    assert grad_first.shape == first.shape
    assert not grad_input.any()
    none = [one[..., :0] if one.dim() < 3 else one[:, :0] for one in places((5, 6))[:-1]]
    none.append(torch.zeros(0, 2, 3))
    assert operators.deform_roi_pool(x, *none).shape == (0, 8, 2, 3)
    grad_input, grad_start = operators.deform_roi_pool_backward(
        torch.ones(0, 8, 2, 3), x, *none, True
    )
    assert grad_start.shape == (2, 0, 2, 3)
    assert grad_input.shape == x.shape
    assert not grad_input.any()


def places(size: tuple[int, int], ratio: int = 0) -> tuple[Tensor, ...]:
    """The geometry that deform_roi_pool's kernels take, of bins on all borders of a map."""
    rois = torch.tensor([[0.0, -2, -2, 3, 4], [0, 3, 2, 9, 9], [0, 0.5, 0.5, 5.5, 4.5]])
    offset = torch.randn(3, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    shape = torch.Size((1, 1, *size))
    return align._Pooling(shape, rois, offset, [2, 3], 1.0, ratio, 0.1).for_kernel()


def among_nans(value: Tensor, by_pixel: bool) -> Tensor:
    """The same numbers, with NaNs before and behind them in memory."""
    rows = value.permute(0, 2, 3, 1) if by_pixel else value
    memory = value.new_full((rows.numel() + 2048,), torch.nan)
    inside = memory[1024:-1024].view(rows.shape)
    inside.copy_(rows)
    return inside.permute(0, 3, 1, 2) if by_pixel else inside


@pytest.mark.parametrize("by_pixel", [False, True], ids=["planes", "pixels"])
def test_nothing_beyond_a_map_is_read(kernels: Kernels, by_pixel: bool) -> None:
    """Not even to be multiplied by 0."""
    for channels in (16, 6):
        values = [v.to(kernels.device) if isinstance(v, Tensor) else v
                  for v in arguments(channels=channels)]  # fmt: skip
        guarded = [
            among_nans(v, by_pixel) if isinstance(v, Tensor) and v.dim() == 4 else v for v in values
        ]
        grad = torch.randn(2, 6, 5, 6, device=kernels.device)
        found = both_ways(kernels.ops, guarded, among_nans(grad, by_pixel))
        compare(found, both_ways(kernels.ops, values, grad), 1e-5)

    # Four samples an axis, from 3.5 on, of a map that ends at 4: the last are held there.
    x = torch.randn(1, 3, 5, 5, device=kernels.device)
    image, step = torch.zeros(1, dtype=torch.long), torch.full((2, 1), 0.25)
    edges = torch.tensor([3, 5, 3, 5]).view(4, 1, 1)
    image, step, edges = (one.to(kernels.device) for one in (image, step, edges))
    first = torch.full((2, 1, 1, 1, 1), 3.5, device=kernels.device)
    grad = torch.ones(1, 3, 1, 1, device=kernels.device)

    def pooled(x: Tensor) -> list[Tensor]:
        places = (image, first, step, 1, 4)
        plain, moved = kernels.ops.psroi_pool(x, image, edges, 1), kernels.ops.deform_psroi_pool
        backward = kernels.ops.deform_psroi_pool_backward
        return [plain, moved(x, *places), *backward(grad, x, *places, True)]

    compare(pooled(among_nans(x, by_pixel)), pooled(x), 1e-5)
    by_hand = x[..., 3:, 3:].mean((2, 3), keepdim=True)
    op_cases.same(pooled(x)[0], by_hand, 1e-5)

    # Samples on the last row and column, which have no corners behind them, and outside.
    for channels, ratio in ((8, 0), (6, 0), (8, 2)):
        geometry = [one.to(kernels.device) for one in places((5, 6), ratio)]
        x = torch.randn(1, channels, 5, 6, device=kernels.device)
        grad = torch.randn(3, channels, 2, 3, device=kernels.device)

        def aligned(x: Tensor, grad: Tensor, geometry: list[Tensor] = geometry) -> list[Tensor]:
            backward = kernels.ops.deform_roi_pool_backward
            output = kernels.ops.deform_roi_pool(x, *geometry)
            return [output, *backward(grad, x, *geometry, True)]

        found = aligned(among_nans(x, by_pixel), among_nans(grad, by_pixel))
        assert all(one.isfinite().all() for one in found)
        compare(found, aligned(x, grad), 1e-5)


def test_positions_of_another_dtype_are_refused(kernels: Kernels) -> None:
    values = [v.to(kernels.device) if isinstance(v, Tensor) else v for v in arguments()]
    values[1] = values[1].half()
    with pytest.raises(RuntimeError):
        kernels.ops.deform_conv2d(*values)
    x, grad = (torch.ones(n, 4, *size).to(kernels.device) for n, size in ((1, (5, 6)), (3, (2, 3))))
    geometry = [one.to(kernels.device) for one in places((5, 6))]
    kernels.ops.deform_roi_pool(x, *geometry)
    for name in ("start", "bin", "count", "divisor"):
        index = ("images", "start", "bin", "count", "first", "last", "divisor").index(name)
        wrong = [one.double() if i == index else one for i, one in enumerate(geometry)]
        with pytest.raises(RuntimeError):
            kernels.ops.deform_roi_pool(x, *wrong)
        with pytest.raises(RuntimeError):
            kernels.ops.deform_roi_pool_backward(grad, x, *wrong, True)


def test_too_little_memory_is_told(kernels: Kernels) -> None:
    """8 TB in these words: training knows them, and tries once more."""
    x = torch.zeros(1, device=kernels.device).expand(1, 1, 1 << 20, 1 << 21)
    offset, weight = (torch.zeros(1, n, 1, 1, device=kernels.device) for n in (2, 1))
    with pytest.raises(RuntimeError, match="could not allocate memory"):
        kernels.ops.deform_conv2d(
            x, offset, weight, None, None, [1 << 22] * 2, [0] * 2, [1] * 2, False
        )


def test_conv_in_any_geometry(public: None) -> None:
    """Values and gradients with sampled whole, far, infinite and huge offsets."""
    check_conv()


def test_conv_with_nan_offsets(public: None) -> None:
    check_nan_offsets()


# Pooling


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("classes", [None, 0, 1, 3])
def test_pooling_equals_the_torch_way(
    public: None, classes: int | None, group: int, layout: torch.memory_format
) -> None:
    found = test_compiled.pooled(classes, layout, group)
    with op_cases.way("torch"):
        expected = test_compiled.pooled(classes, layout, group)
    compare(found, expected, 1e-5)
    assert [one.stride() for one in found] == [other.stride() for other in expected]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [None, 0, 1, 3])
def test_pooling_in_half(kernels: Kernels, classes: int | None, dtype: torch.dtype) -> None:
    """Only inputs and results are rounded: half a step, where the inputs are whole numbers."""
    layout = torch.channels_last
    with op_cases.way("torch"):
        expected = test_compiled.pooled(classes, layout, 3, whole=True)
    with in_use(Elsewhere(kernels, dtype)):
        found = test_compiled.pooled(classes, layout, 3, whole=True)
    for one, other in zip(found[:2], expected[:2], strict=True):
        step, scale = torch.finfo(dtype).eps, float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=0.51 * step, atol=1e-5 * scale)
    compare(found[2:], expected[2:], 1e-5)  # positions are not rounded


def test_pooling_of_any_rois(public: None) -> None:
    """RoIs reversed, outside, half pixels, NaN, infinite, huge."""
    check_pool()


def test_deformable_pooling_of_any_rois(public: None) -> None:
    check_deform_pool()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("channels", [3, 70, 256])
@pytest.mark.parametrize(("ratio", "moved"), [(0, True), (2, True), (0, False)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_aligned_pooling_equals_the_torch_way(
    public: None,
    channels: int,
    ratio: int,
    moved: bool,
    layout: torch.memory_format,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """Whole packs of channels and single ones, more than a team's threads take at once."""
    found = test_compiled.aligned(channels, layout, ratio, moved, dtype=dtype)
    with op_cases.way("torch"):
        expected = test_compiled.aligned(channels, layout, ratio, moved, dtype=dtype)
    compare(found, expected, tolerance)
    assert [one.stride() for one in found] == [other.stride() for other in expected]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [12, 264])
@pytest.mark.parametrize("moved", [False, True])
def test_aligned_pooling_in_half(
    kernels: Kernels, moved: bool, channels: int, dtype: torch.dtype
) -> None:
    """Only inputs and results are rounded."""
    case = partial(test_compiled.aligned, channels, torch.channels_last, 0, moved, whole=True)
    with op_cases.way("torch"):
        expected = case()
    with in_use(Elsewhere(kernels, dtype)):
        found = case()
    for one, other in zip(found[:2], expected[:2], strict=True):
        step, scale = torch.finfo(dtype).eps, float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=0.51 * step, atol=1e-5 * scale)
    compare(found[2:], expected[2:], 2e-5)  # positions are not rounded


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_aligned_pooling_takes_half_maps_as_they_are(
    emulator: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> None:
    """Maps are half in the kernels, whatever the positions are, and so are the gradients."""
    monkeypatch.setattr(compiled, "missing", "")
    x = torch.randn(1, 16, 5, 6).to(dtype).contiguous(memory_format=layout)
    rois, offset = torch.tensor([[0.0, -1, 1, 6, 5]] * 2), torch.randn(2, 2, 2, 3)
    mask = torch.rand(2, 1, 2, 3)
    grad = torch.randn(2, 16, 2, 3).to(dtype)
    seen: list[torch.dtype] = []
    made: list[torch.dtype] = []

    class Seen(Elsewhere):
        def __getattr__(self, name: str) -> Any:
            def call(*values: Any) -> Any:
                seen.extend(v.dtype for v in values if isinstance(v, Tensor))
                found = getattr(emulator.ops, name)(*values)
                made.extend(t.dtype for t in ([found] if isinstance(found, Tensor) else found))
                return found

            return call

    def run(positions: torch.dtype) -> list[Tensor]:
        there = [x, offset.to(dtype).to(positions), mask.to(dtype).to(positions)]
        leaves = [leaf.clone().requires_grad_() for leaf in there]
        y = deform_roi_pool(leaves[0], rois, leaves[1], (2, 3), mask=leaves[2])
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    for positions in (dtype, torch.float32):
        expected = run(positions)
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "covers", lambda op, input: True)
            patch.setattr(compiled, "kernels", Seen(emulator))
            seen.clear()
            made.clear()
            found = run(positions)
        assert set(seen) == {dtype, torch.float32, torch.int64}
        assert seen.count(dtype) == 3  # input; gradient and input
        assert made == [dtype, dtype, torch.float32]
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
        compare([t.float() for t in found], [t.float() for t in expected],
                2 * torch.finfo(dtype).eps)  # fmt: skip


def test_aligned_pooling_of_any_rois(public: None) -> None:
    check_aligned_pool()


@pytest.mark.parametrize("y", [0.25, 0.0, -0.5, -1.0, -1.25, 1.75, 2.0, 2.5, 3.0, 3.25])
def test_aligned_pooling_at_the_border(public: None, y: float) -> None:
    """What the kernels of a CPU, and torch, are held to, with the same numbers."""
    (cases,) = (mark.args[1] for mark in check_border.pytestmark)
    (case,) = (case for case in cases if case[0] == y)
    check_border(*case)


@pytest.mark.parametrize("channels", [8, 6])
def test_aligned_pooling_of_unaligned_maps(kernels: Kernels, channels: int) -> None:
    """Channels-last numbers that are not on a border of 16 bytes."""
    geometry = [one.to(kernels.device) for one in places((5, 6))]

    def shifted(rows: Tensor) -> Tensor:
        memory = torch.cat([rows.new_zeros(1), rows.flatten()])
        return memory[1:].view(rows.shape).permute(0, 3, 1, 2)

    def run(x: Tensor, grad: Tensor) -> list[Tensor]:
        backward = kernels.ops.deform_roi_pool_backward
        output = kernels.ops.deform_roi_pool(x, *geometry)
        return [output, *backward(grad, x, *geometry, True)]

    x = torch.randn(1, 5, 6, channels, device=kernels.device)
    grad = torch.randn(3, 2, 3, channels, device=kernels.device)
    plain = run(x.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2))
    compare(run(shifted(x), grad.permute(0, 3, 1, 2)), plain, 1e-5)
    compare(run(x.permute(0, 3, 1, 2), shifted(grad)), plain, 1e-5)


@pytest.mark.parametrize("value", op_cases.HOSTILE, ids=str)
@pytest.mark.parametrize("name", ["input", "rois", "offset", "grad"])
def test_aligned_pooling_of_hostile_numbers(kernels: Kernels, name: str, value: float) -> None:
    """The same NaNs as on a CPU, where they are, and nothing else is touched."""
    for channels in (8, 3):
        generator = torch.Generator().manual_seed(0)
        rois = torch.tensor([[0.0, -2, -2, 3, 4], [1, 3, 2, 9, 9], [0, 0.5, 0.5, 5.5, 4.5]])
        values = {
            "input": torch.randn(2, channels, 5, 6, generator=generator).double(),
            "rois": rois.double(),
            "offset": torch.randn(3, 2, 2, 3, generator=generator).double(),
            "grad": torch.randn(3, channels, 2, 3, generator=generator).double(),
        }
        values[name].view(-1)[8] = value  # not a RoI's image

        def run(values: dict[str, Tensor] = values) -> list[Tensor]:
            leaves = [values["input"].clone().requires_grad_(),
                      values["offset"].clone().requires_grad_()]  # fmt: skip
            y = deform_roi_pool(leaves[0], values["rois"], leaves[1], (2, 3))
            return [y.detach(), *torch.autograd.grad(y, leaves, values["grad"])]

        with op_cases.way("compiled"):
            expected = run()
        with in_use(Elsewhere(kernels)):
            found = run()
        for one, other in zip(found, expected, strict=True):
            op_cases.same(one, other, 1e-9)


# Which way is taken


def test_what_the_kernels_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nothing, where sums must have an order; a GPU's tensor is pretended."""
    monkeypatch.setattr(compiled, "missing", "")
    monkeypatch.setattr(compiled, "missing_for_cuda", "")
    covers = partial(compiled.covers, "psroi_pool")
    with FakeTensorMode():
        on_gpu, whole = torch.empty(1, device="cuda"), torch.empty(1, device="cuda").long()
    on_cpu = torch.empty(1)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert covers(on_gpu.to(dtype))
    assert not covers(whole)
    assert not covers(on_cpu.half())
    torch.use_deterministic_algorithms(True)
    try:
        assert not covers(on_gpu)
        assert covers(on_cpu)
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(compiled, "missing_for_cuda", "not compiled")
    assert not covers(on_gpu)
    assert covers(on_cpu)


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
        [nvcc, *NVCC_FLAGS, "-arch=native", "-DDCDET_PROBE=dcdet_probe_cuda",
         f"-I{ROOT / 'csrc' / 'cuda'}", str(PROBE), "-o", str(library), *CUDA_LIBRARIES],
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


@needs_nvcc
def test_nvcc_takes_the_kernels(tmp_path: Path) -> None:
    """Without a warning, for the oldest architecture and for one that adds four floats at once.

    For all of them, which takes a minute: DCDET_CUDA=1 python setup.py build_ext --inplace.
    """
    library = tmp_path / "_CUDA.abi3.so"
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (75, 90)]
    sources = [ROOT / "csrc" / "cuda" / "bindings.cpp", *KERNELS[1:]]
    done = subprocess.run(
        ["nvcc", *NVCC_FLAGS, "--threads=2", "-Werror=all-warnings", *code, *map(str, sources),
         "-o", str(library), *CUDA_LIBRARIES],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = (
        "import torch\n"
        f"for path in ({str(compiled.LIBRARY)!r}, {str(library)!r}): "
        "torch.ops.load_library(path)\n"
        f"assert torch.ops.dcdet_CUDA.version() == {compiled.VERSION}\n"
        "for name in ('deform_conv2d', 'psroi_pool', 'deform_psroi_pool', 'deform_roi_pool'):\n"
        "    for op in (name, name + '_backward'):\n"
        "        assert torch._C._dispatch_has_kernel_for_dispatch_key('dcdet_C::' + op, 'CUDA')\n"
    )
    subprocess.run([sys.executable, "-c", loaded], check=True)


# The public functions on a GPU

Call = Callable[..., Tensor]


def calls(dtype: torch.dtype) -> list[tuple[Call, list[Tensor], tuple[Any, ...]]]:
    """Public functions, leaves of the CPU, and what else they take."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    positions = torch.float64 if dtype == torch.float64 else torch.float32
    x, weight = random(2, 64, 19, 21), random(32, 32, 3, 3)
    offset, mask = (random(2, 9 * n, 19, 21, dtype=positions) * 2 for n in (8, 4))
    low = torch.rand(60, 2, generator=generator) * 300
    high = low + torch.rand(60, 2, generator=generator) * 200
    rois = torch.cat([torch.arange(60)[:, None] % 2, low, high], 1).to(positions)
    score, trans = random(2, 8 * 9, 19, 21), random(60, 4, 3, 3, dtype=positions)
    shifts = random(60, 2, 7, 7, dtype=positions)

    def conv(x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor, *border: Any) -> Tensor:
        return deform_conv2d(x, offset, weight, None, 1, 1, 1, mask, *border)

    def deform_pool(x: Tensor, trans: Tensor, rois: Tensor, *geometry: Any) -> Tensor:
        return deform_psroi_pool(x, rois, trans, *geometry)

    def aligned_pool(x: Tensor, offset: Tensor, rois: Tensor, *geometry: Any) -> Tensor:
        return deform_roi_pool(x, rois, offset, *geometry)

    return [
        (conv, [x, offset, weight, mask], ("zero",)),
        (conv, [x, offset, weight, mask], ("original",)),
        (psroi_pool, [score], (rois, 1 / 16, 8, 3, 3)),
        (deform_pool, [score, trans], (rois, 1 / 16, 8, 3, 3, 3, 4, 0.1)),
        (aligned_pool, [x, shifts], (rois, 7, 1 / 16)),
        (aligned_pool, [score, shifts], (rois, 7, 1 / 16, 2)),
    ]


def forward_backward(
    call: Call, leaves: list[Tensor], rest: tuple[Any, ...], device: str | int
) -> list[Tensor]:
    """The output and the leaves' gradients, computed on a device."""
    leaves = [leaf.detach().to(device).requires_grad_() for leaf in leaves]
    output = call(*leaves, *[r.to(device) if isinstance(r, Tensor) else r for r in rest])
    grads = torch.autograd.grad(output, leaves, op_cases.whole_numbers(output.cpu()).to(output))
    return [output.detach(), *grads]


@needs_cuda_kernels
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 0.02), (torch.float16, 3e-3)],
)
def test_gpu_equals_cpu(dtype: torch.dtype, tolerance: float) -> None:
    for call, leaves, rest in calls(dtype):
        expected = forward_backward(call, leaves, rest, "cpu")
        found = forward_backward(call, leaves, rest, "cuda")
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
        compare([one.cpu().double() for one in found], [e.double() for e in expected], tolerance)


@needs_cuda_kernels
def test_gpu_kernels_wait_for_their_stream() -> None:
    """On a side stream they read what a slow copy before them on that stream wrote."""
    for call, leaves, rest in calls(torch.float32):
        expected = forward_backward(call, leaves, rest, "cuda")
        late = [torch.zeros_like(leaf, device="cuda") for leaf in leaves]
        ready = [leaf.cuda() for leaf in leaves]
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(100_000_000)
            for place, leaf in zip(late, ready, strict=True):
                place.copy_(leaf)
            found = forward_backward(call, late, rest, "cuda")
        torch.cuda.synchronize()
        compare(found, expected, 1e-5)


@needs_cuda_kernels
def test_gpu_kernels_run_where_their_tensors_are() -> None:
    """Another device is the current one, and stays so."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    for call, leaves, rest in calls(torch.float32):
        expected = forward_backward(call, leaves, rest, "cpu")
        found = forward_backward(call, leaves, rest, "cuda:1")
        assert torch.cuda.current_device() == 0
        assert all(one.device.index == 1 for one in found)
        compare([one.cpu() for one in found], expected, 1e-4)


@needs_cuda_kernels
def test_gpu_is_deterministic_where_asked() -> None:
    """The same bits twice; in a process of its own, because cuBLAS reads its setting once."""
    code = (
        "import torch, test_cuda_kernels as t\n"
        "torch.use_deterministic_algorithms(True)\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    for call, leaves, rest in t.calls(dtype):\n"
        "        one, two = (t.forward_backward(call, leaves, rest, 'cuda') for _ in range(2))\n"
        "        assert all(map(torch.equal, one, two)), (dtype, call)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": str(ROOT)},
        cwd=ROOT / "tests", check=True,
    )  # fmt: skip


@needs_cuda_kernels
def test_gpu_maps_of_more_than_2_to_the_31_numbers() -> None:
    if torch.cuda.mem_get_info()[0] < 48e9:
        pytest.skip("needs 48 GB of free GPU memory")
    x = torch.zeros(1, 8, 16400, 16400, dtype=torch.bfloat16, device="cuda")
    x = x.to(memory_format=torch.channels_last)
    x[..., -1, :] = torch.arange(16400, device="cuda") % 100
    offset = torch.zeros(1, 2, 16400, 16400, device="cuda")
    weight = torch.ones(1, 8, 1, 1, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    output = deform_conv2d(x.requires_grad_(), offset, weight)
    assert torch.equal(output[0, 0, -1], 8 * (torch.arange(16400, device="cuda") % 100).bfloat16())
    assert not output[0, 0, :-1].any()
    grad = torch.zeros_like(output)
    grad[..., -1, -1] = 1
    (grad_input,) = torch.autograd.grad(output, x, grad)
    assert torch.equal(grad_input[0, :, -1, -1], torch.ones_like(weight[0, :, 0, 0]))
    assert int(grad_input.count_nonzero()) == 8
