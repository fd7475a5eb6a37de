"""One command for a machine with a GPU, torch and nvcc, and no network: does all of dcdet work?

    python tools/gpu_check.py [--output FILE] [--limit SECONDS] [--only PART ...]

It builds the kernels in this checkout, runs the CUDA tests, looks for wrong memory accesses with
compute-sanitizer where that is installed, measures the operators, and trains some steps in fp32 and
bf16. FILE (default: output/gpu_check.json) gets what came of each part, written anew after each;
a part that fails or takes longer than the limit does not stop the others. dcdet need not be
installed; what it needs beside torch (README) must be there, or on PYTHONPATH.

Exit code: 0 all is well, 1 a part failed, 2 wrong arguments, 4 no torch or no GPU.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/quickstart/rfcn_dcn_r18_shapes.yaml"
SAID = 6000  # characters of a part's output that are kept, its end
TORCH_AND_GPU = """
import json, torch
gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
print(json.dumps({
    "torch": torch.__version__, "cuda": torch.version.cuda, "gpu": gpu and gpu.name,
    "memory_gb": gpu and gpu.total_memory / 1e9,
    "capability": gpu and f"{gpu.major}.{gpu.minor}",
}))
"""
KERNELS = """
import json, torch
from dcdet.ops import compiled
covers = [str(dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
          if compiled.covers("deform_conv2d", torch.empty(0, device="cuda", dtype=dtype))]
print(json.dumps({"kernels": compiled.describe(), "cuda_dtypes": covers}))
"""
# Every op on odd sizes, several groups, both borders, and positions that are far out or no numbers.
ALL_OPS = """
import torch
from dcdet.ops import deform_conv2d, deform_psroi_pool, deform_roi_pool, psroi_pool
torch.manual_seed(0)
bad = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 2.0**31, -2.0**31]

def random(*size, dtype=torch.float32, hostile=False):
    numbers = torch.randn(size, device="cuda") * (3 if hostile else 1)
    if hostile:
        flat = numbers.view(-1)
        flat[:: max(1, flat.numel() // len(bad) // 3)][: len(bad)] = flat.new_tensor(bad)
    return numbers.to(dtype).requires_grad_()

def run(output, *leaves):
    torch.autograd.grad(output, leaves, torch.ones_like(output))
    torch.cuda.synchronize()

for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for border, masked, groups, offset_groups in (
        ("zero", False, 1, 1), ("zero", True, 2, 4), ("original", False, 1, 3)):
        channels = 24 if offset_groups != 1 else 13
        x = random(2, channels, 11, 9, dtype=dtype)
        weight = random(6, channels // groups, 3, 3, dtype=dtype)
        offset = random(2, 18 * offset_groups, 11, 9, dtype=dtype, hostile=True)
        mask = random(2, 9 * offset_groups, 11, 9, dtype=dtype) if masked else None
        y = deform_conv2d(x, offset, weight, padding=1, mask=mask, border=border)
        run(y, *(t for t in (x, offset, weight, mask) if t is not None))
    rois = random(17, 5, hostile=True).detach() * 60
    rois[:, 0] = torch.arange(17, device="cuda") % 2
    x = random(2, 6 * 9, 11, 9, dtype=dtype)
    run(psroi_pool(x, rois, 1 / 16, 6, 3, 5), x)
    run(deform_psroi_pool(x, rois, None, 1 / 16, 6, 3, 5, 0, 4, 0.1), x)
    for classes in (1, 3):
        trans = random(17, 2 * classes, 5, 5, dtype=dtype, hostile=True)
        run(deform_psroi_pool(x, rois, trans, 1 / 16, 6, 3, 5, 5, 4, 0.1), x, trans)
    for channels, ratio in ((24, 0), (13, 0), (24, 2)):
        x, mask = random(2, channels, 11, 9, dtype=dtype), random(17, 1, 5, 3, dtype=dtype)
        run(deform_roi_pool(x, rois, None, (5, 3), 1 / 16, ratio), x)
        offset = random(17, 2, 5, 3, dtype=dtype, hostile=True)
        y = deform_roi_pool(x, rois, offset, (5, 3), 1 / 16, ratio, mask=mask)
        run(y, x, offset, mask)
print("all ops ran")
"""


@dataclass(frozen=True)
class Done:
    """How a program ended; code None: it was stopped after the limit."""

    code: int | None
    said: str
    seconds: float


def run(command: list[str], limit: float, **environment: str) -> Done:
    """Run a program in the checkout with its children, at most `limit` seconds."""
    variables = {**os.environ, **environment}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables["PYTHONPATH"] = os.pathsep.join(paths)
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        code: int | None = None
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        output.seek(0)
        said = output.read().decode(errors="replace")
    return Done(code, said, time.monotonic() - start)


# The parts. Each gets a limit in seconds and a folder for its files, and gives its entry in the
# report: `ok`, what was `said`, and figures. `ok` is None for a part that this machine cannot run.

Entry = dict[str, Any]
Part = Callable[[float, Path], Entry]


def entry(done: Done, ok: bool, limit: float, **figures: Any) -> Entry:
    """A part's entry; a part that was stopped is not ok."""
    said = done.said[-SAID:]
    if done.code is None:
        said += f"\n[stopped after {limit:.0f} s]"
    return {"ok": ok and done.code == 0, "exit_code": done.code, "said": said, **figures}


def build(limit: float, _: Path) -> Entry:
    """The kernels, in place; whether torch then uses them on the GPU."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    start = time.monotonic()
    done = run(command, limit, DCDET_CUDA="1")
    left = max(limit - (time.monotonic() - start), 30)
    loaded = run([sys.executable, "-c", KERNELS], left)
    figures = last_json(loaded.said)
    if not figures:
        done = Done(done.code, done.said + loaded.said, done.seconds)
    return entry(done, bool(figures.get("cuda_dtypes")), limit, compile_s=done.seconds, **figures)


def tests(limit: float, folder: Path) -> Entry:
    """The tests whose names say cuda."""
    report = folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-v", "-k", "cuda", "--tb=short", "-p",
               "no:cacheprovider", "--color=no", f"--junitxml={report}", "tests"]  # fmt: skip
    done = run(command, limit)
    figures = counts(report.read_text()) if report.exists() else {}
    return entry(done, figures.get("passed", 0) > 0, limit, **figures)


def counts(xml: str) -> dict[str, Any]:
    """How many tests passed, which failed, and how many were skipped why, from JUnit XML."""
    passed, failed, skipped = 0, [], Counter[str]()
    for case in ElementTree.fromstring(xml).iter("testcase"):
        outcomes = {child.tag: child for child in case}
        if "failure" in outcomes or "error" in outcomes:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in outcomes:
            skipped[outcomes["skipped"].get("message", "")] += 1
        else:
            passed += 1
    return {"passed": passed, "failed": failed, "skipped": dict(skipped)}


def sanitizer(limit: float, folder: Path) -> Entry:
    """Every op under compute-sanitizer's memcheck."""
    tool = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH')}:/usr/local/cuda/bin")
    if tool is None:
        return {"ok": None, "said": "compute-sanitizer is not installed"}
    script = folder / "all_ops.py"
    script.write_text(ALL_OPS)
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(script)]
    # Without torch's cache each tensor is an allocation of its own, with bounds to be seen.
    done = run(command, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    errors = sanitizer_errors(done.said)
    clean = errors == 0 and "all ops ran" in done.said
    return entry(done, clean, limit, errors=errors)


def sanitizer_errors(said: str) -> int | None:
    """The number that compute-sanitizer ends with."""
    found = re.findall(r"ERROR SUMMARY: (\d+) error", said)
    return int(found[-1]) if found else None


def operators(limit: float, folder: Path) -> Entry:
    """The op benchmark."""
    report = folder / "ops.json"
    command = [sys.executable, "-m", "dcdet", "benchmark", "ops", "--device", "cuda", "--seconds",
               "0.2", "--json", str(report)]  # fmt: skip
    done = run(command, limit)
    figures = json.loads(report.read_text()) if report.exists() else None
    return entry(done, figures is not None, limit, report=figures)


def training(precision: str, steps: int) -> Part:
    """Some steps of two images of the embedded data set."""

    def part(limit: float, folder: Path) -> Entry:
        output = folder / f"train_{precision}"
        images = f"train_images: {2 * steps}, test_images: 2"
        shapes = f"type: Shapes, root: {folder / f'shapes_{precision}'}, {images}"
        command = [
            sys.executable, "-m", "dcdet", "train", CONFIG, "--device", "cuda", "--output",
            str(output), f"data.train={{{shapes}, split: train}}",
            f"data.test={{{shapes}, split: test}}", f"solver.precision={precision}",
            "solver.epochs=1", "solver.milestones=[]", "solver.log_every=1",
        ]  # fmt: skip
        done = run(command, limit)
        log = output / "metrics.jsonl"
        losses = total_losses(log.read_text()) if log.exists() else []
        finite = len([loss for loss in losses if loss is not None])
        return entry(done, finite == steps, limit, losses=losses)

    return part


def total_losses(metrics: str) -> list[float | None]:
    """The loss of each logged step; None for one that was not finite."""
    return [json.loads(line)["loss"] for line in metrics.splitlines()]


# What a time limit of the whole command would cut off first stands last.
PARTS: dict[str, Part] = {
    "build": build,
    "tests": tests,
    "benchmark": operators,
    "train_fp32": training("fp32", 8),
    "train_bf16": training("bf16", 2),
    "sanitizer": sanitizer,
}


def last_json(said: str) -> dict[str, Any]:
    """The object on the last line that is one; {} where none is."""
    for line in reversed(said.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return {}


def machine() -> dict[str, Any]:
    """Torch, GPU, driver and compiler; `missing` says in a line what stands in the way."""
    asked = run([sys.executable, "-c", TORCH_AND_GPU], 120)
    found = last_json(asked.said)
    if not found:
        reason = (asked.said.strip().splitlines() or ["no answer"])[-1]
        return {"missing": f"torch does not work in {sys.executable}: {reason}"}
    if not found["gpu"]:
        return {"missing": f"torch {found['torch']} sees no GPU here"}
    driver = first_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    nvcc = re.search(r"release [0-9.]+, V([0-9.]+)", first_output("nvcc", "--version"))
    return {
        **found, "driver": driver.strip() or None, "nvcc": nvcc[1] if nvcc else None,
        "python": sys.version.split()[0], "cores": os.cpu_count(), "missing": "",
    }  # fmt: skip


def first_output(*command: str) -> str:
    """What a program says, or ""."""
    try:
        return run(list(command), 30).said
    except OSError:
        return ""


def check(parts: dict[str, Part], limit: float, output: Path, about: dict[str, Any]) -> int:
    """Run the parts one after the other and keep the report up to date; the exit code returns."""
    report: dict[str, Any] = {"ok": None, "machine": about, "limit_s": limit, "parts": {}}
    write(output, report)
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        for name, part in parts.items():
            say(f"{name} ...")
            start = time.monotonic()
            try:
                result = part(limit, Path(folder))
            except Exception as error:  # whatever is wrong with one part, the others are run
                result = {"ok": False, "said": f"{type(error).__name__}: {error}"}
            seconds = time.monotonic() - start
            report["parts"][name] = {"ok": result["ok"], "seconds": round(seconds, 1), **result}
            write(output, report)
            last = (result["said"].strip().splitlines() or [""])[-1]
            say(f"{name}: {word(result['ok'])}, {seconds:.0f} s: {last[:200]}")
    failed = [name for name, part in report["parts"].items() if part["ok"] is False]
    report["ok"] = not failed
    write(output, report)
    say(f"{'FAILED: ' + ', '.join(failed) if failed else 'all is well'}; {output}")
    return int(bool(failed))


def word(ok: bool | None) -> str:
    """A result in a word."""
    return "not run" if ok is None else "ok" if ok else "FAILED"


def write(path: Path, report: dict[str, Any]) -> None:
    """The whole report, or nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(report, allow_nan=False, indent=1) + "\n")
    os.replace(temporary, path)


def say(line: str) -> None:
    """A line of progress."""
    print(f"[gpu_check] {line}", flush=True)


def complain(message: str, code: int) -> int:
    """One line on stderr; the exit code returns."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


class Parser(argparse.ArgumentParser):
    """A slip is one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        sys.exit(complain(message, 2))


def seconds(text: str) -> float:
    """A positive number."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def main(words: list[str]) -> int:
    """Run the command; the exit code returns."""
    parser = Parser(
        prog="gpu_check.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--limit", type=seconds, default=180.0, metavar="SECONDS",
                        help="for each part; default: 180")  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", default=list(PARTS),
                        help=f"of {', '.join(PARTS)}")  # fmt: skip
    args = parser.parse_args(words)
    output = args.output or ROOT / "output" / "gpu_check.json"
    if args.output and (output.is_dir() or not output.resolve().parent.is_dir()):
        return complain(f"--output: {output}: is a folder, or in none", 2)
    # A terminated check stops its children, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        about = machine()
        if about["missing"]:
            return complain(about["missing"], 4)
        if args.output is None:
            output.parent.mkdir(exist_ok=True)
        chosen = {name: part for name, part in PARTS.items() if name in args.only}
        return check(chosen, args.limit, output.resolve(), about)
    except KeyboardInterrupt:
        return complain("interrupted", 130)
    except OSError as error:
        return complain(f"{error.filename or output}: {error.strerror}", 2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
