"""Speed and memory of the operators beside torchvision's and plain ones, all in one run.

A case is computed in three ways: `ours`; `plain`, the convolution of the same shape or, for a
pooling op, the op itself on torch without a kernel; and `torchvision`, its op or the nearest that
it has. docs/benchmarks.md says what each figure means.
"""

import ctypes
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torchvision.ops import deform_conv2d as torchvision_deform_conv2d
from torchvision.ops import ps_roi_align, ps_roi_pool, roi_align

from dcdet.engine.runtime import keep_freed_memory, pick_device, strict_json, write_text
from dcdet.errors import first_line
from dcdet.ops import (
    compiled,
    deform_conv2d,
    deform_psroi_pool,
    deform_roi_pool,
    psroi_pool,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WAYS = ("ours", "plain", "torchvision")
PASSES = ("forward", "forward_backward")

# R-FCN: RoIs an image, grid, map pixels per image pixel, samples along a part, share of a RoI.
ROIS, GRID, SCALE, SAMPLES, TRANS_STD = 300, 7, 1 / 16, 4, 0.1

SAMPLE = 0.01  # seconds: what is quicker is called several times between two looks at the clock
ROUNDS = (3, 30)  # at least and at most


@dataclass(frozen=True)
class Call:
    """A way to compute a case, with its differentiable operands and the result's gradient."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    grad: Tensor
    on_torch: bool = False

    def __call__(self, backward: bool) -> object:
        with _without_kernels() if self.on_torch else nullcontext():
            if backward:
                return torch.autograd.grad(self.forward(), self.leaves, self.grad)
            with torch.no_grad():
                return self.forward()


@dataclass(frozen=True)
class Conv:
    """A 3x3 deformable convolution of as many channels as it is given, on a map of one size."""

    channels: int
    height: int
    width: int
    dilation: int = 1
    offset_groups: int = 1
    mask: bool = False
    batch: int = 1
    dtype: str = "fp32"
    op: ClassVar[str] = "deform_conv2d"
    plain: ClassVar[str] = "conv2d"
    nearest: ClassVar[str] = "deform_conv2d"
    plain_operands: ClassVar[int] = 2  # input and weight; the others only a deformable op has

    @property
    def label(self) -> str:
        words = [f"{self.batch}x{self.channels}x{self.height}x{self.width}"]
        words += [f"d{self.dilation}"] * (self.dilation > 1)
        words += [f"g{self.offset_groups}"] * (self.offset_groups > 1)
        words += ["v2"] * self.mask + [self.dtype] * (self.dtype != "fp32")
        return " ".join(words)

    @property
    def flops(self) -> float:
        """Of a forward pass: the product with the weights."""
        return 2.0 * self.batch * self.height * self.width * self.channels**2 * 9

    def calls(self, device: torch.device) -> dict[str, Call]:
        """The maps are channels last, as in dcdet's models; torchvision works channels first."""
        random = _Random(device, DTYPES[self.dtype])
        size = (self.batch, self.channels, self.height, self.width)
        taps = 9 * self.offset_groups
        x, grad = random.channels_last(*size), random.channels_last(*size)
        weight = random.channels_last(self.channels, self.channels, 3, 3)
        weight /= (9 * self.channels) ** 0.5
        operands = [x, weight, random(self.batch, 2 * taps, *size[2:]) * 2]
        if self.mask:
            operands.append(random(self.batch, taps, *size[2:]))
        # torchvision has no bf16; under autocast, too, it computes in fp32.
        theirs = [operand.float().contiguous() for operand in operands]
        stride, padding = 1, self.dilation

        def deformed(op: Callable[..., Tensor], operands: list[Tensor], grad: Tensor) -> Call:
            leaves = _leaves(*operands)
            x, weight, offset, *mask = leaves
            geometry = (None, stride, padding, self.dilation)
            return Call(lambda: op(x, offset, weight, *geometry, *mask), leaves, grad)

        def plain() -> Tensor:
            return F.conv2d(x, weight, None, stride, padding, self.dilation)

        return {
            "ours": deformed(deform_conv2d, operands, grad),
            "plain": Call(plain, _leaves(x, weight), grad),
            "torchvision": deformed(torchvision_deform_conv2d, theirs, grad.float().contiguous()),
        }


@dataclass(frozen=True)
class Pool:
    """Position-sensitive pooling of R-FCN's RoIs to `depth` channels of GRID x GRID bins.

    `shifts` is the number of classes that have shifts of their own, 0 for none at all.
    """

    op: str
    depth: int
    height: int
    width: int
    shifts: int = 0
    dtype: str = "fp32"
    plain: ClassVar[str] = "torch"
    plain_operands: ClassVar[int] = 1

    @property
    def label(self) -> str:
        words = [f"{self.depth}x{GRID}x{GRID} {self.height}x{self.width}"]
        words += [f"s{self.shifts}"] * (self.shifts > 0) + [self.dtype] * (self.dtype != "fp32")
        return " ".join(words)

    @property
    def nearest(self) -> str:
        """Not the same op: RoIs are rounded in another way, and ps_roi_align has no shifts."""
        return "ps_roi_pool" if self.op == "psroi_pool" else "ps_roi_align"

    @property
    def flops(self) -> float:
        """Of a forward pass: an addition a cell of a RoI, or four products and sums a sample."""
        if self.op == "psroi_pool":
            _, x1, y1, x2, y2 = self._rois().unbind(1)
            return float(((x2 - x1) * (y2 - y1)).sum()) * SCALE**2 * self.depth
        return 8.0 * ROIS * self.depth * GRID**2 * SAMPLES**2

    def calls(self, device: torch.device) -> dict[str, Call]:
        random = _Random(device, DTYPES[self.dtype])
        x = random.channels_last(1, self.depth * GRID**2, self.height, self.width)
        grad = random(ROIS, self.depth, GRID, GRID)
        rois = self._rois().to(device)
        shifts = [random(ROIS, 2 * self.shifts, GRID, GRID)] if self.shifts else []
        (first,) = theirs = _leaves(x.float().contiguous())
        ours = _leaves(x, *shifts)

        def pool() -> Tensor:
            if self.op == "psroi_pool":
                return psroi_pool(x, rois, SCALE, self.depth, GRID, GRID)
            trans = ours[1] if shifts else None
            sampling = (GRID, SAMPLES, TRANS_STD)
            return deform_psroi_pool(x, rois, trans, SCALE, self.depth, GRID, GRID, *sampling)

        def nearest() -> Tensor:
            if self.op == "psroi_pool":
                return ps_roi_pool(first, rois, GRID, SCALE)
            return ps_roi_align(first, rois, GRID, SCALE, SAMPLES)

        return {
            "ours": Call(pool, ours, grad),
            "plain": Call(pool, ours, grad, on_torch=True),
            "torchvision": Call(nearest, theirs, grad.float()),
        }

    def _rois(self) -> Tensor:
        """With sides from 32 pixels to the image's."""
        image = torch.tensor([self.width, self.height]) / SCALE - 1
        return _rois(ROIS, image, 32, image)


@dataclass(frozen=True)
class Aligned:
    """mmdetection's deformable pooling of RoIs on an FPN's finest map, to GRID x GRID bins."""

    channels: int
    height: int
    width: int
    rois: int = 512
    dtype: str = "fp32"
    scale: ClassVar[float] = 1 / 4
    op: ClassVar[str] = "deform_roi_pool"
    plain: ClassVar[str] = "torch"
    nearest: ClassVar[str] = "roi_align"  # the same function of offsets that are 0
    plain_operands: ClassVar[int] = 1

    @property
    def label(self) -> str:
        words = [f"{self.rois} {self.channels}x{self.height}x{self.width}"]
        return " ".join(words + [self.dtype] * (self.dtype != "fp32"))

    @property
    def flops(self) -> float:
        """Of a forward pass: four products and sums a sample."""
        _, x1, y1, x2, y2 = (self._rois() * self.scale).unbind(1)
        samples = ((x2 - x1) / GRID).ceil() * ((y2 - y1) / GRID).ceil()
        return 8.0 * float(samples.sum()) * GRID**2 * self.channels

    def calls(self, device: torch.device) -> dict[str, Call]:
        random = _Random(device, DTYPES[self.dtype])
        x = random.channels_last(1, self.channels, self.height, self.width)
        grad = random(self.rois, self.channels, GRID, GRID)
        rois = self._rois().to(device)
        (first,) = theirs = _leaves(x.float().contiguous())
        x, offset = ours = _leaves(x, random(self.rois, 2, GRID, GRID))

        def pool() -> Tensor:
            return deform_roi_pool(x, rois, offset, GRID, self.scale)

        def nearest() -> Tensor:
            return roi_align(first, rois, GRID, self.scale, 0, aligned=True)

        return {
            "ours": Call(pool, ours, grad),
            "plain": Call(pool, ours, grad, on_torch=True),
            "torchvision": Call(nearest, theirs, grad.float()),
        }

    def _rois(self) -> Tensor:
        """With sides from 16 to 112 pixels: larger ones go to the coarser maps."""
        image = torch.tensor([self.width, self.height]) / self.scale - 1
        return _rois(self.rois, image, 16, image.clamp(max=112))


def _rois(count: int, image: Tensor, smallest: float, largest: Tensor) -> Tensor:
    """RoIs anywhere on an image, small ones as frequent as large ones."""
    random = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(0))
    side = smallest * (largest / smallest) ** random[0]
    corner = random[1] * (image - side)
    return torch.cat([torch.zeros(count, 1), corner, corner + side], 1)


class _Random:
    """Normal numbers, the same in every run; made in place, without a copy on the way."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.generator = torch.Generator(device).manual_seed(0)
        self.options: dict[str, Any] = {"device": device, "dtype": dtype}

    def __call__(self, *size: int) -> Tensor:
        return torch.empty(size, **self.options).normal_(generator=self.generator)

    def channels_last(self, *size: int) -> Tensor:
        empty = torch.empty(size, memory_format=torch.channels_last, **self.options)
        return empty.normal_(generator=self.generator)


def _leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, marked as those that get a gradient."""
    return tuple(tensor.requires_grad_() for tensor in tensors)


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Our ops run on torch for the time of a `with`."""
    covers = compiled.covers
    compiled.covers = lambda op, input: False
    try:
        yield
    finally:
        compiled.covers = covers


Case = Conv | Pool | Aligned

# res3 to res5 of a ResNet-101 on images of 600 x 1000 and 800 x 1333 pixels; the dilated ones are
# R-FCN's res5.
MAPS = (
    Conv(64, 64, 64),
    Conv(128, 75, 125),
    Conv(128, 100, 167),
    Conv(256, 38, 63),
    Conv(256, 50, 84),
    Conv(512, 19, 32),
    Conv(512, 25, 42),
    Conv(512, 38, 63, dilation=2, offset_groups=4),
    Conv(512, 50, 84, dilation=2, offset_groups=4),
)

CASES: tuple[Case, ...] = (
    *(replace(case, batch=batch) for case in MAPS for batch in (1, 2)),
    Conv(256, 50, 84, mask=True),
    *(replace(case, batch=2, dtype="bf16") for case in MAPS),
    # VOC's 21 and COCO's 81 classes, background with them, and the box deltas.
    Pool("psroi_pool", 21, 38, 63),
    Pool("psroi_pool", 81, 50, 84),
    Pool("psroi_pool", 8, 38, 63),
    Pool("psroi_pool", 21, 38, 63, dtype="bf16"),
    Pool("deform_psroi_pool", 21, 38, 63, shifts=21),
    Pool("deform_psroi_pool", 81, 38, 63, shifts=81),
    Pool("deform_psroi_pool", 81, 50, 84, shifts=81),
    Pool("deform_psroi_pool", 8, 38, 63, shifts=1),
    Pool("deform_psroi_pool", 8, 50, 84, shifts=1),
    Pool("deform_psroi_pool", 42, 38, 63),  # the shifts of 21 classes are pooled like this
    Pool("deform_psroi_pool", 21, 38, 63, shifts=21, dtype="bf16"),
    Aligned(256, 200, 336),
    Aligned(256, 200, 336, dtype="bf16"),
)

QUICK: tuple[Case, ...] = (
    Conv(64, 20, 24),
    Conv(64, 20, 24, dilation=2, offset_groups=4, mask=True),
    Conv(64, 20, 24, batch=2, dtype="bf16"),
    Pool("psroi_pool", 8, 20, 24),
    Pool("deform_psroi_pool", 8, 20, 24, shifts=1),
    Aligned(32, 20, 24, rois=64),
)


def benchmark_ops(
    write: Callable[[str], None],
    json_file: Path | None = None,
    *,
    device: str | None = None,
    quick: bool = False,
    seconds: float = 2.0,
) -> int:
    """Measure the cases and report through `write`, and to `json_file`; the exit code returns.

    `seconds` is the time for each figure. Exit code 1: one of our ops failed on a case.
    """
    where = pick_device(device)
    seconds = min(seconds, 0.02) if quick else seconds
    cases = QUICK if quick else CASES
    if where.type == "cpu":
        keep_freed_memory()
    # TF32 would be another arithmetic than fp32, and only the plain convolution's.
    with (
        torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False),
        _memory_meter(where, quick) as peak,
    ):
        report: dict[str, Any] = {
            "benchmark": "ops", "quick": quick, "seconds": seconds, "machine": machine(where),
            "ceilings": _ceilings(where, cases, quick, seconds), "cases": [], "skipped": [],
        }  # fmt: skip
        for line in _head(report):
            write(line)
        titled = ""
        for case in cases:
            if not _takes(case, where):
                why = f"no kernel takes {case.dtype} here"
                report["skipped"].append({"op": case.op, "case": case.label, "why": why})
                continue
            found = _measure(case, where, seconds, peak, report["ceilings"])
            report["cases"].append(found)
            for line in (*(_titles(case) if case.op != titled else ()), *_rows(found)):
                write(line)
            titled = case.op
    if report["skipped"]:
        write("")
        write(f"{len(report['skipped'])} cases skipped: {report['skipped'][0]['why']}")
    if json_file is not None:
        write_text(json_file, strict_json(report) + "\n")
    return int(any("ours" in case["failed"] for case in report["cases"]))


def _takes(case: Case, device: torch.device) -> bool:
    """fp32 is measured in any case; without a kernel, half types would be fp32 and two copies."""
    tensor = torch.empty(0, device=device, dtype=DTYPES[case.dtype])
    return case.dtype == "fp32" or compiled.covers(case.op, tensor)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "kernels": compiled.describe(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _ceilings(
    device: torch.device, cases: tuple[Case, ...], quick: bool, seconds: float
) -> dict[str, Any]:
    """The machine's own limits: a large matrix product a dtype, and a large copy."""
    side = 512 if quick else 2048 if device.type == "cpu" else 8192
    floats = (4 if quick else 64 if device.type == "cpu" else 256) << 20
    dtypes = dict.fromkeys(case.dtype for case in cases if _takes(case, device))
    squares = {name: _Random(device, DTYPES[name])(side, side) for name in dtypes}
    source = torch.ones(floats, device=device)
    target = source.clone()  # written once: new memory costs more than a copy
    runs: dict[str, Callable[[], object]] = {
        name: partial(torch.mm, square, square, out=square.clone())
        for name, square in squares.items()
    }
    times, _ = _time({**runs, "copy": lambda: target.copy_(source)}, seconds, device)
    fastest = {name: min(taken) for name, taken in times.items()}
    return {
        "gflops": {name: 2 * side**3 / fastest[name] / 1e9 for name in dtypes},
        "gbytes_per_s": 2 * source.nbytes / fastest["copy"] / 1e9,
    }


def _measure(
    case: Case, device: torch.device, seconds: float, peak: "Peak", ceilings: dict[str, Any]
) -> dict[str, Any]:
    """One case's entry in the report."""
    calls = case.calls(device)
    ours = calls["ours"]
    entry: dict[str, Any] = {
        "op": case.op, "case": case.label, **asdict(case), "plain": case.plain,
        "torchvision": case.nearest, "failed": {},
        "kernel": compiled.covers(case.op, ours.leaves[0]),
        "offset_mb": sum(leaf.nbytes for leaf in ours.leaves[case.plain_operands :]) / 1e6,
    }  # fmt: skip
    memory = peak(case, calls)
    for which in PASSES:
        backward = which == "forward_backward"
        times, failed = _time(
            {way: partial(call, backward) for way, call in calls.items()}, seconds, device
        )
        entry["failed"].update(failed)
        figures = {
            way: {
                "min_ms": min(taken) * 1e3,
                "median_ms": statistics.median(taken) * 1e3,
                "runs": len(taken),
                "extra_mb": memory.get(f"{way} {which}"),
            }
            for way, taken in times.items()
        }
        entry[which] = {
            **{way: figures.get(way) for way in WAYS},
            **_compared(times),
            **_rates(case, ours, times.get("ours"), backward, ceilings),
        }
    return entry


def _compared(times: dict[str, list[float]]) -> dict[str, Any]:
    """How many times as long ours takes: of the fastest runs, and of runs of the same round."""
    ours = times.get("ours", [])
    others = {way: times[way] for way in WAYS[1:] if ours and way in times}
    return {
        "ratio": {way: min(ours) / min(taken) for way, taken in others.items()},
        "median_ratio": {
            way: statistics.median(a / b for a, b in zip(ours, taken, strict=False))
            for way, taken in others.items()
        },
    }


def _rates(
    case: Case, ours: Call, times: list[float] | None, backward: bool, ceilings: dict[str, Any]
) -> dict[str, Any]:
    """Arithmetic and least traffic of our fastest run, a second and as a share of the ceiling.

    Forward reads the operands and writes the result. Backward reads the operands and the result's
    gradient and writes the operands' gradients, with as much arithmetic for each of input and
    weight, or of input and shifts, as forward has.
    """
    if not times:
        return {}
    operands = sum(leaf.nbytes for leaf in ours.leaves)
    passes = 1 + min(len(ours.leaves), 2) if backward else 1
    gflops = case.flops * passes / min(times) / 1e9
    traffic = (3 * operands + 2 * ours.grad.nbytes) if backward else operands + ours.grad.nbytes
    gbytes = traffic / min(times) / 1e9
    return {
        "gflops": gflops,
        "gflops_share": gflops / ceilings["gflops"][case.dtype],
        "gbytes_per_s": gbytes,
        "gbytes_share": gbytes / ceilings["gbytes_per_s"],
    }


# Time.


def timed(run: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds of a call, the mean of `calls`, until the device has done all of it."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


def _time(
    runs: dict[str, Callable[[], object]], seconds: float, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each run's calls, which take turns; and what the runs said that failed.

    A run takes part until it has used `seconds`, in at least ROUNDS[0] rounds. One whose first call
    takes longer than `seconds` is not called again: that call counts, the others' warms up.
    """

    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    calls: dict[str, int] = {}
    for name, run in runs.items():
        try:
            first = timed(run, device)
            if first > max(seconds, 1.0):
                times[name] = [first]
            else:
                times[name] = []
                calls[name] = math.ceil(min(SAMPLE, seconds) / timed(run, device))
        except RuntimeError as error:
            failed[name] = first_line(error)
    for done in range(ROUNDS[1]):
        for name in calls:
            if done < ROUNDS[0] or sum(times[name]) * calls[name] < seconds:
                times[name].append(timed(runs[name], device, calls[name]))
    return times, failed


# Memory.

Peak = Callable[[Case, dict[str, Call]], dict[str, float | None]]


@contextmanager
def _memory_meter(device: torch.device, quick: bool) -> Iterator[Peak]:
    """Gives the function that tells a case's peak of extra memory in MB, by "WAY PASS"."""
    if device.type == "cuda":
        yield lambda case, calls: _cuda_memory(calls, device)
        return
    cases = QUICK if quick else CASES
    with memory_child("benchmark", quick) as ask:
        yield lambda case, calls: ask(str(cases.index(case))) or {}


@contextmanager
def memory_child(module: str, quick: bool) -> Iterator[Callable[[str], Any]]:
    """Gives the function that has a line answered by `measured_memory(line, quick)` of a module of
    dcdet.engine, in a process that has computed nothing: in this one freed memory would be used
    again, and not be seen. None where that process is gone, or the system has no /proc.
    """
    if not Path("/proc/self/status").exists():
        yield lambda line: None
        return
    root = str(Path(__file__).resolve().parents[2])
    code = (
        f"import sys; sys.path.insert(0, {root!r}); from dcdet.engine import benchmark, {module}; "
        f"benchmark.answer({module}.measured_memory, {quick}, {torch.get_num_threads()})"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip

    def ask(line: str) -> Any:
        assert child.stdin
        assert child.stdout
        try:
            child.stdin.write(f"{line}\n")
            child.stdin.flush()
        except BrokenPipeError:
            return None
        reply = child.stdout.readline()
        return json.loads(reply) if reply else None

    try:
        yield ask
    finally:
        os.killpg(child.pid, signal.SIGKILL)  # its own session: Ctrl-C does not reach it
        child.wait()


def answer(measured_memory: Callable[[str, bool], object], quick: bool, threads: int) -> None:
    """The child: for each line on stdin a line of JSON on stdout."""
    torch.set_num_threads(threads)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(measured_memory(line.strip(), quick)) + "\n")
        sys.stdout.flush()


def measured_memory(line: str, quick: bool) -> dict[str, float | None]:
    """For a case's number, the MB that it takes at its peak, by "WAY PASS"."""
    case = (QUICK if quick else CASES)[int(line)]

    def prepared(way: str, which: str) -> Callable[[], object]:
        return partial(case.calls(torch.device("cpu"))[way], which == "forward_backward")

    return {
        f"{way} {which}": forked(partial(prepared, way, which)) for way in WAYS for which in PASSES
    }


def _cuda_memory(calls: dict[str, Call], device: torch.device) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for way, call in calls.items():
        for which in PASSES:
            run = partial(call, which == "forward_backward")
            try:
                run()  # the libraries' own workspaces
                found[f"{way} {which}"] = cuda_peak(run, device)
            except RuntimeError:
                continue  # the timing says why
    return found


def cuda_peak(run: Callable[[], object], device: torch.device) -> float:
    """The MB that a call takes at its peak, of what torch allocates."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def forked(prepared: Callable[[], Callable[[], object]]) -> float | None:
    """The MB that a prepared call takes at its peak, in a fork; None where it failed, or was
    killed.

    Safe as long as this process itself computes nothing: the threads that it would start do not
    survive a fork.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, str(_cpu_peak(prepared())).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return float(text) if text else None


def _cpu_peak(run: Callable[[], object]) -> float:
    """MB between what lies in memory before and the peak of a second call.

    The first one starts threads and compiles; what it freed goes back to the system.
    """
    run()
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if give_back is not None:
        give_back(0)
    before = _resident("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        before = _resident("VmHWM")  # not allowed everywhere
    run()
    return max(_resident("VmHWM") - before, 0) / 1e6


def _resident(name: str) -> int:
    """Bytes, as the kernel counts them in /proc/self/status."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return int(line.split()[1]) * 1024


# The table, at most 100 columns wide.


def machine_lines(machine: dict[str, Any]) -> Iterator[str]:
    """The head of a table."""
    yield f"{machine['gpu'] or machine['cpu']}, threads: {machine['threads']}"
    yield f"torch {machine['torch']}, torchvision (tv) {machine['torchvision']}"
    yield machine["kernels"]


def _head(report: dict[str, Any]) -> Iterator[str]:
    ceilings = report["ceilings"]
    yield from machine_lines(report["machine"])
    for dtype, rate in ceilings["gflops"].items():
        yield f"ceiling of a matrix product in {dtype}: {rate:,.0f} GFLOP/s"
    yield f"ceiling of a copy: {ceilings['gbytes_per_s']:,.1f} GB/s"


def _titles(case: Case) -> Iterator[str]:
    ways = f"{'ours':>7}{case.plain:>8}{'tv':>7}"
    yield ""
    yield f"{case.op} beside {case.plain} and torchvision's {case.nearest}"
    yield f"{'':27}{'milliseconds':>22}{'ours /':>16}{'extra MB':>22}{'% of':>12}"
    yield f"{'':27}{ways}  {case.plain:>7}{'tv':>7}{ways}  {'flop':>5}{'copy':>5}".rstrip()


def _rows(entry: dict[str, Any]) -> Iterator[str]:
    for which, name in zip(PASSES, (f"{entry['case']:23}fwd ", f"{'':23}f+b "), strict=True):
        figures = entry[which]
        found = [figures[way] or {} for way in WAYS]
        times = "".join(cell(f.get("min_ms"), w) for f, w in zip(found, (7, 8, 7), strict=True))
        ratios = "".join(cell(figures["ratio"].get(way), 7) for way in WAYS[1:])
        memory = "".join(cell(f.get("extra_mb"), w) for f, w in zip(found, (7, 8, 7), strict=True))
        shares = [figures.get(f"{of}_share") for of in ("gflops", "gbytes")]
        percent = "".join(f"{'-' if s is None else format(s, '.0%'):>5}" for s in shares)
        yield f"{name}{times}  {ratios}{memory}  {percent}"
    for way, why in entry["failed"].items():
        yield f"  {way} failed: {why}"[:100]


def cell(value: float | None, width: int) -> str:
    """Three digits that say something, or a dash."""
    if value is None:
        return f"{'-':>{width}}"
    decimals = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:{width}.{decimals}f}"
