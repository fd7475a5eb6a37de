"""dcdet/engine/benchmark.py: what is timed is what the table says, and the report is sound."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import op_cases
import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

from dcdet import cli
from dcdet.engine import benchmark
from dcdet.engine.benchmark import CASES, PASSES, QUICK, WAYS, Aligned, Conv, Pool
from dcdet.ops import compiled

CPU = torch.device("cpu")
COMMAND = [sys.executable, "-m", "dcdet", "benchmark", "ops", "--quick", "--device", "cpu"]


def strictly(path: Path) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


# The command.


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """What a quick run prints, and its report."""
    path = tmp_path_factory.mktemp("benchmark") / "ops.json"
    done = subprocess.run(
        [*COMMAND, "--json", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout, strictly(path)


def test_the_report_names_the_machine_and_every_case(quick: tuple[str, Any]) -> None:
    _, report = quick
    assert report["machine"]["torch"] == torch.__version__
    assert report["machine"]["kernels"] == compiled.describe()
    assert report["machine"]["device"] == "cpu"
    assert report["machine"]["threads"] >= 1
    assert len(report["machine"]["cpu"]) > 3
    seen = {(case["op"], case["case"]) for case in report["cases"] + report["skipped"]}
    assert seen == {(case.op, case.label) for case in QUICK}
    for case in report["skipped"]:
        assert case["why"] == "no kernel takes bf16 here"


def test_the_figures_fit_together(quick: tuple[str, Any]) -> None:
    _, report = quick
    ceilings = report["ceilings"]
    assert ceilings["gbytes_per_s"] > 0
    for case in report["cases"]:
        assert case["failed"] == {}
        for which in PASSES:
            figures = case[which]
            for way in WAYS:
                assert 0 < figures[way]["min_ms"] <= figures[way]["median_ms"]
                assert figures[way]["runs"] >= 1
            for way in WAYS[1:]:
                ratio = figures["ours"]["min_ms"] / figures[way]["min_ms"]
                assert figures["ratio"][way] == pytest.approx(ratio)
                assert figures["median_ratio"][way] > 0
            gflops = ceilings["gflops"][case["dtype"]]
            assert figures["gflops_share"] == pytest.approx(figures["gflops"] / gflops)
            gbytes = ceilings["gbytes_per_s"]
            assert figures["gbytes_share"] == pytest.approx(figures["gbytes_per_s"] / gbytes)
    for case in report["cases"]:  # what is done, which does not depend on how busy the machine is
        forward, both = (case[which]["gflops"] * case[which]["ours"]["min_ms"] for which in PASSES)
        assert both > 1.5 * forward


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_memory_is_measured(quick: tuple[str, Any]) -> None:
    _, report = quick
    conv = report["cases"][0]
    megabytes = conv["channels"] * conv["height"] * conv["width"] * 4 / 1e6
    for way in WAYS:
        forward, both = (conv[which][way]["extra_mb"] for which in PASSES)
        assert megabytes * 0.9 <= forward <= both
    assert conv["offset_mb"] == pytest.approx(18 * conv["height"] * conv["width"] * 4 / 1e6)


def test_the_table_is_readable(quick: tuple[str, Any]) -> None:
    out, report = quick
    assert max(map(len, out.splitlines())) <= 100
    for case in report["cases"]:
        (line,) = (line for line in out.splitlines() if line.startswith(case["case"] + "  "))
        shown = f"{case['forward']['ours']['min_ms']:.3g}"
        assert shown[:3] in line
    assert out.count(" fwd ") == out.count(" f+b ") == len(report["cases"])


def test_cells() -> None:
    cells = [benchmark.cell(value, 7) for value in (None, 0.01234, 1.234, 12.34, 1234.5)]
    assert [cell.strip() for cell in cells] == ["-", "0.012", "1.23", "12.3", "1234"]
    assert {len(cell) for cell in cells} == {7}


@pytest.mark.parametrize("path", ["/proc/x.json", "/sys/x.json"])
def test_a_folder_that_takes_no_file(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path(path).parent.is_dir():
        pytest.skip(f"no {Path(path).parent}")
    assert cli.main(["benchmark", "ops", "--json", path]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"error: --json: {path}: cannot be written: [^\n]+\n", err)


def test_cuda_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["benchmark", "ops", "--device", "cuda", "--json", str(tmp_path / "x.json")]
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: --device: cuda is not available[^\n]*\n", err)
    assert list(tmp_path.iterdir()) == []


def started(*words: str) -> tuple[subprocess.Popen[str], str]:
    """A quick run in a session of its own, after its first line."""
    child = subprocess.Popen(
        [*COMMAND, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert child.stdout
    return child, child.stdout.readline()


def test_interrupted(tmp_path: Path) -> None:
    child, line = started("--json", str(tmp_path / "x.json"))
    assert line
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: the children, too
    assert child.communicate(timeout=60)[1] == "error: interrupted\n"
    assert child.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_nobody_reads_on() -> None:
    child, _ = started()
    assert child.stdout
    assert child.stderr
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait(60) == 141


# What is measured.


def test_cases_can_be_told_apart_and_fit_the_table() -> None:
    for cases in (CASES, QUICK):
        labels = [(case.op, case.label) for case in cases]
        assert len(set(labels)) == len(labels)
        assert max(len(label) for _, label in labels) < 24
    rfcn = Conv(512, 38, 63, dilation=2, offset_groups=4)
    assert rfcn in CASES
    assert rfcn.label == "1x512x38x63 d2 g4"
    v2 = Conv(64, 20, 24, mask=True, batch=2, dtype="bf16")
    assert v2.label == "2x64x20x24 v2 bf16"
    assert Pool("deform_psroi_pool", 21, 38, 63, shifts=21).label == "21x7x7 38x63 s21"
    assert Aligned(256, 200, 336, dtype="bf16").label == "512 256x200x336 bf16"
    assert {case.op for case in QUICK} == {case.op for case in CASES}


@pytest.mark.parametrize("case", [case for case in QUICK if case.op == "deform_conv2d"], ids=str)
def test_the_three_convolutions(case: Conv) -> None:
    calls = case.calls(CPU)
    op_cases.same(calls["ours"](False).float(), calls["torchvision"](False),
                  1e-4 if case.dtype == "fp32" else 0.1)  # fmt: skip
    assert calls["ours"](False).shape == calls["plain"](False).shape
    assert len(calls["plain"](True)) == 2
    assert len(calls["ours"](True)) == len(calls["torchvision"](True)) == 3 + case.mask
    with FlopCounterMode(display=False) as counter:
        calls["plain"](False)
    assert counter.get_total_flops() == case.flops


@pytest.mark.parametrize("case", [case for case in QUICK if case.op != "deform_conv2d"], ids=str)
def test_the_three_poolings(case: Pool | Aligned, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = case.calls(CPU)
    ours, plain = calls["ours"](True), calls["plain"](True)
    shifted = isinstance(case, Aligned) or case.shifts > 0
    assert len(ours) == len(plain) == 1 + shifted
    for one, other in zip(ours, plain, strict=True):
        op_cases.same(one, other, 1e-3)
    assert calls["torchvision"](False).shape == calls["ours"](False).shape
    # Without kernels there is nothing that could be switched off.
    asked = []
    monkeypatch.setattr(compiled, "covers", lambda op, input: asked.append(1))
    calls["plain"](True)
    assert asked == []
    calls["ours"](True)
    assert asked


def test_the_arithmetic_of_psroi_pool_is_about_right() -> None:
    """Its bins are rounded outwards, so they have some more cells than the RoIs' area."""
    from dcdet.ops.psroi_pool import _Bins

    case = Pool("psroi_pool", 21, 38, 63)
    bins = _Bins(torch.Size((1, 21 * 49, 38, 63)), case._rois(), 1 / 16, 7, 7)
    assert 0.3 < case.flops / float(bins.areas.sum() * 21) < 1


def test_aligned_pooling_beside_roi_align() -> None:
    """The same function where nothing is moved; and as many samples as are counted."""
    from dcdet.ops.deform_roi_pool import _Pooling

    case = next(case for case in QUICK if isinstance(case, Aligned))
    calls = case.calls(CPU)
    _, offset = calls["ours"].leaves
    with torch.no_grad():
        offset.zero_()
    op_cases.same(calls["ours"](False), calls["torchvision"](False), 1e-5)
    for one in (case, Aligned(256, 200, 336)):
        shape = torch.Size((1, 1, one.height, one.width))
        pooling = _Pooling(shape, one._rois(), None, [7, 7], 1 / 4, 0, 0.1)
        assert one.flops == 8 * one.channels * float(pooling.divisor.sum())


# Clock and scales.


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], Callable[[], None]]:
    """Makes runs that take the seconds they say, on a clock that nothing else moves."""
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])

    def make(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            make.log.append(name)  # type: ignore[attr-defined]
            now[0] += seconds

        return run

    make.log = []  # type: ignore[attr-defined]
    return make


def test_runs_take_turns_and_slow_ones_run_once(clock: Any) -> None:
    runs = {"fast": clock("fast", 0.25), "slow": clock("slow", 10.0), "twin": clock("twin", 0.25)}
    times, failed = benchmark._time(runs, 2.0, CPU)
    assert failed == {}
    assert times["slow"] == [10.0]
    assert times["fast"] == times["twin"] == [0.25] * 8
    assert clock.log[:5] == ["fast", "fast", "slow", "twin", "twin"]
    assert clock.log[5:] == ["fast", "twin"] * 8


def test_quick_calls_are_timed_together(clock: Any) -> None:
    times, _ = benchmark._time({"a": clock("a", 0.001)}, 2.0, CPU)
    assert times["a"] == pytest.approx([0.001] * benchmark.ROUNDS[1])
    assert len(clock.log) == 2 + 10 * benchmark.ROUNDS[1]


def test_what_fails_is_told_and_the_others_are_timed(clock: Any) -> None:
    def fails() -> None:
        raise RuntimeError("no kernel image\nis available")

    times, failed = benchmark._time({"a": fails, "b": clock("b", 0.5)}, 1.0, CPU)
    assert failed == {"a": "no kernel image"}
    assert times == {"b": [0.5] * benchmark.ROUNDS[0]}


def test_rates() -> None:
    case = Conv(64, 10, 10)
    ours = case.calls(CPU)["ours"]
    ceilings = {"gflops": {"fp32": 10.0}, "gbytes_per_s": 2.0}
    found = benchmark._rates(case, ours, [0.5, 0.25], True, ceilings)
    assert found["gflops"] == pytest.approx(3 * 2 * 100 * 64 * 64 * 9 / 0.25 / 1e9)
    assert found["gflops_share"] == found["gflops"] / 10
    operands = 64 * 100 + 64 * 64 * 9 + 18 * 100
    assert found["gbytes_per_s"] == pytest.approx((3 * operands + 2 * 6400) * 4 / 0.25 / 1e9)
    assert found["gbytes_share"] == found["gbytes_per_s"] / 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_a_peak_is_measured_to_the_megabyte() -> None:
    """In a process of its own, which may fork.

    Of 32, 64 and 32 MiB at once; and of 64 single ones, whose memory a tensor that stays keeps in
    the process after the first call.
    """
    script = """
import functools, torch
from dcdet.engine import benchmark
def peak(case):
    return benchmark.forked(lambda: functools.partial(case.calls("cpu")["ours"], False))
class Case:
    def calls(self, device):
        x = torch.ones(1)
        def forward():
            held = torch.ones(8 << 20)
            return held + torch.ones(16 << 20)[:1]
        return {"ours": benchmark.Call(forward, (x,), x)}
print(peak(Case()))
class Scattered(Case):
    def calls(self, device):
        torch.ones(1 << 19)  # blocks of such a size are now taken from the heap
        x, stays = torch.ones(1), []
        def forward():
            held = [torch.ones(1 << 18) for _ in range(64)]
            stays.append(torch.ones(1 << 18))
            return held[0][:1]
        return {"ours": benchmark.Call(forward, (x,), x)}
print(peak(Scattered()))
class Killed(Case):
    def calls(self, device):
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
print(peak(Killed()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    peak, scattered, killed = done.stdout.split()
    assert float(peak) == pytest.approx(128 * 1.048576, abs=3)
    assert float(scattered) == pytest.approx(64 * 1.048576, abs=3)
    assert killed == "None"


# Machines with less.


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cases, in this process, without the memory of a child."""

    @contextmanager
    def meter(*_: object) -> Iterator[benchmark.Peak]:
        yield lambda case, calls: {}

    monkeypatch.setattr(benchmark, "_memory_meter", meter)
    monkeypatch.setattr(benchmark, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(benchmark, "QUICK", (Conv(8, 9, 9), Conv(8, 9, 9, dtype="bf16")))


@pytest.mark.usefixtures("small")
def test_without_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "covers", lambda op, input: False)
    lines: list[str] = []
    code = benchmark.benchmark_ops(lines.append, tmp_path / "x.json", device="cpu", quick=True)
    report = strictly(tmp_path / "x.json")
    assert code == 0
    assert [case["kernel"] for case in report["cases"]] == [False]
    assert report["cases"][0]["forward"]["ours"]["extra_mb"] is None
    assert [case["case"] for case in report["skipped"]] == ["1x8x9x9 bf16"]
    assert lines[-1] == "1 cases skipped: no kernel takes bf16 here"


@pytest.mark.usefixtures("small")
def test_half_types_are_measured_where_a_kernel_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "_takes", lambda case, device: True)
    benchmark.benchmark_ops(lambda line: None, tmp_path / "x.json", device="cpu", quick=True)
    report = strictly(tmp_path / "x.json")
    assert [case["dtype"] for case in report["cases"]] == ["fp32", "bf16"]
    assert report["skipped"] == []
    assert set(report["ceilings"]["gflops"]) == {"fp32", "bf16"}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("broken", "code"), [("deform_conv2d", 1), ("torchvision", 0)])
def test_an_op_that_fails(
    broken: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("it is broken")

    name = "torchvision_deform_conv2d" if broken == "torchvision" else broken
    monkeypatch.setattr(benchmark, name, fails)
    lines: list[str] = []
    path = tmp_path / "x.json"
    assert benchmark.benchmark_ops(lines.append, path, device="cpu", quick=True) == code
    way = "torchvision" if broken == "torchvision" else "ours"
    (case,) = (case for case in strictly(path)["cases"] if case["dtype"] == "fp32")
    assert case["failed"] == {way: "it is broken"}
    assert case["forward"][way] is None
    assert ("plain" in case["forward"]["ratio"]) == (way == "torchvision")
    assert f"  {way} failed: it is broken" in lines


@op_cases.needs_cuda
def test_on_cuda(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert benchmark.benchmark_ops(lambda line: None, path, device="cuda", quick=True) == 0
    report = strictly(path)
    assert report["machine"]["gpu"]
    for case in report["cases"]:
        assert case["failed"] == {}
        assert case["forward_backward"]["ours"]["extra_mb"] > 0
