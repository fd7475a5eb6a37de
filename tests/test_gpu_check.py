"""tools/gpu_check.py, on a machine without a GPU: its report, its limits, its reading of texts."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT

SOURCE = ROOT / "tools" / "gpu_check.py"
ABOUT = {"torch": "2.12.1", "gpu": "a card", "missing": ""}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SOURCE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def command(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SOURCE), *words],
        **{"capture_output": True, "text": True, "timeout": 120, **options},
    )


# The command.


def test_without_a_gpu(tmp_path: Path) -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = command("--output", str(tmp_path / "x.json"), env=hidden, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == f"error: torch {torch.__version__} sees no GPU here\n"
    assert list(tmp_path.iterdir()) == []


def test_without_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: not\\nfound')\n")
    # The checkout comes first in the children's path, and has no torch.
    done = command(env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith(f"error: torch does not work in {sys.executable}: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--limt 3", "unrecognized arguments: --limt 3"),
        ("--limit 0", "argument --limit"),
        ("--limit nan", "argument --limit"),
        ("--only biuld", "argument --only: invalid choice: 'biuld'"),
        ("--output .", "--output: .: "),
        ("--output nowhere/x.json", "--output: nowhere/x.json: "),
        ("more", "unrecognized arguments: more"),
    ],
)
def test_wrong_arguments(words: str, expected: str, tmp_path: Path) -> None:
    done = command(*words.split(), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {expected}")
    assert done.stderr.count("\n") == 1


# The report, with parts that only pretend.


def test_a_part_that_fails_does_not_stop_the_others(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    seen: list[Any] = []

    def good(limit: float, folder: Path) -> dict[str, Any]:
        seen.append((limit, folder.is_dir(), json.loads(path.read_text())))
        return {"ok": True, "said": "line 1\nline 2\n", "figure": 3}

    def breaks(limit: float, folder: Path) -> dict[str, Any]:
        raise KeyError("a bug")

    def absent(limit: float, folder: Path) -> dict[str, Any]:
        return {"ok": None, "said": "not installed"}

    parts = {"one": good, "two": breaks, "three": absent, "four": good}
    assert tool.check(parts, 7.0, path, ABOUT) == 1
    report = json.loads(path.read_text())
    assert report["ok"] is False
    assert report["machine"] == ABOUT
    assert [part["ok"] for part in report["parts"].values()] == [True, False, None, True]
    assert report["parts"]["one"]["figure"] == 3
    assert report["parts"]["two"]["said"] == "KeyError: 'a bug'"
    assert all(part["seconds"] >= 0 for part in report["parts"].values())
    # Before the last part the file already told of the others, and that it is not the end.
    limit, was_there, before = seen[1]
    assert (limit, was_there, before["ok"]) == (7.0, True, None)
    assert list(before["parts"]) == ["one", "two", "three"]
    out = capsys.readouterr().out
    assert "one: ok, 0 s: line 2\n" in out
    assert "three: not run, 0 s: not installed\n" in out
    assert out.endswith(f"FAILED: two; {path}\n")
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_what_a_machine_cannot_run_is_no_failure(tool: ModuleType, tmp_path: Path) -> None:
    parts = {"a": lambda *_: {"ok": None, "said": ""}, "b": lambda *_: {"ok": True, "said": ""}}
    assert tool.check(parts, 1.0, tmp_path / "x.json", ABOUT) == 0
    assert json.loads((tmp_path / "x.json").read_text())["ok"] is True


def test_the_command_with_a_gpu(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def part(name: str) -> Any:
        return lambda limit, folder: ran.append((name, limit)) or {"ok": True, "said": ""}

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(tool, "machine", lambda: ABOUT)
    monkeypatch.setattr(tool, "PARTS", {name: part(name) for name in tool.PARTS})
    words = ["--output", str(tmp_path / "x.json"), "--limit", "9", "--only", "tests", "build"]
    try:
        assert tool.main(words) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ran == [("build", 9.0), ("tests", 9.0)]


# Programs and their time.


def test_a_program_sees_the_checkout(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    script = (
        "import os, sys; print(os.environ['PYTHONPATH'], os.environ['X']); "
        "sys.stderr.write('also\\n'); sys.exit(3)"
    )
    done = tool.run([sys.executable, "-c", script], 60, X="y")
    assert done.code == 3
    assert f"{ROOT}{os.pathsep}{tmp_path} y\n" in done.said
    assert "also\n" in done.said


def test_a_program_that_takes_too_long_is_stopped_with_its_children(
    tool: ModuleType, tmp_path: Path
) -> None:
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    start = time.monotonic()
    done = tool.run([sys.executable, "-c", script], 3)
    assert time.monotonic() - start < 30
    assert done.code is None
    grandchild = Path(f"/proc/{int(done.said)}/stat")
    if Path("/proc/self").exists():
        deadline = time.monotonic() + 10
        while grandchild.exists() and grandchild.read_text().split()[2] != "Z":
            assert time.monotonic() < deadline, "the child's child lives on"
            time.sleep(0.05)
    entry = tool.entry(done, True, 3)
    assert entry["ok"] is False
    assert entry["said"].endswith("[stopped after 3 s]")


# The parts, with programs that only pretend.


class Programs:
    """Stands in for `run`; `then` says what the next program does."""

    def __init__(self, tool: ModuleType) -> None:
        self.tool = tool
        self.queue: list[Any] = []
        self.environments: list[dict[str, str]] = []

    def then(self, code: int | None, said: str, effect: Any = lambda words: None) -> None:
        self.queue.append((code, said, effect))

    def run(self, words: list[str], limit: float, **environment: str) -> Any:
        code, said, effect = self.queue.pop(0)
        self.environments.append(environment)
        effect(words)
        return self.tool.Done(code, said, 1.5)


@pytest.fixture
def programs(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Programs:
    programs = Programs(tool)
    monkeypatch.setattr(tool, "run", programs.run)
    return programs


@pytest.mark.parametrize(
    ("code", "dtypes", "ok"),
    [(0, ["torch.float32"], True), (0, [], False), (1, ["torch.float32"], False)],
)
def test_build(
    code: int, dtypes: list[str], ok: bool, tool: ModuleType, programs: Programs, tmp_path: Path
) -> None:
    programs.then(code, "building\n")
    programs.then(
        0, "warning: x\n" + json.dumps({"kernels": "for CUDA", "cuda_dtypes": dtypes}) + "\n"
    )
    entry = tool.build(60.0, tmp_path)
    assert entry["ok"] is ok
    assert (entry["kernels"], entry["compile_s"]) == ("for CUDA", 1.5)
    assert programs.environments[0] == {"DCDET_CUDA": "1"}


def test_build_of_kernels_that_do_not_load(
    tool: ModuleType, programs: Programs, tmp_path: Path
) -> None:
    programs.then(0, "building\n")
    programs.then(1, "Traceback\nImportError: undefined symbol\n")
    entry = tool.build(60.0, tmp_path)
    assert entry["ok"] is False
    assert entry["said"].endswith("ImportError: undefined symbol\n")


def test_the_tests_are_counted(tool: ModuleType, tmp_path: Path) -> None:
    """From a real report of a real pytest."""
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 0\n"
        "@pytest.mark.skip(reason='too old')\ndef test_no(): pass\n"
        "@pytest.fixture\ndef broken(): raise ValueError\n"
        "def test_error(broken): pass\n"
    )
    report = tmp_path / "x.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}",
         "--rootdir", str(tmp_path), str(tmp_path / "test_it.py")],
        cwd=tmp_path, capture_output=True, check=False,
    )  # fmt: skip
    counts = tool.counts(report.read_text())
    assert counts == {
        "passed": 1, "failed": ["test_it::test_bad", "test_it::test_error"],
        "skipped": {"too old": 1},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("code", "cases", "ok"),
    [
        (0, '<testcase classname="a" name="b"/>', True),
        (1, '<testcase classname="a" name="b"><failure/></testcase>', False),
        (0, '<testcase classname="a" name="b"><skipped/></testcase>', False),  # nothing was shown
        (5, None, False),
    ],
)
def test_tests(
    code: int, cases: str | None, ok: bool, tool: ModuleType, programs: Programs, tmp_path: Path
) -> None:
    def effect(words: list[str]) -> None:
        if cases is not None:
            (path,) = (word.partition("=")[2] for word in words if word.startswith("--junitxml="))
            Path(path).write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")

    programs.then(code, "said", effect)
    assert tool.tests(60.0, tmp_path)["ok"] is ok


@pytest.mark.parametrize(
    ("code", "said", "errors", "ok"),
    [
        (0, "all ops ran\n========= ERROR SUMMARY: 0 errors\n", 0, True),
        (9, "========= Invalid __global__ read\n========= ERROR SUMMARY: 12 errors\n", 12, False),
        (0, "========= ERROR SUMMARY: 0 errors\n", 0, False),  # the ops did not run
        (255, "========= Error: Device not supported\n", None, False),
        (None, "========= COMPUTE-SANITIZER\n", None, False),
    ],
)
def test_sanitizer(
    code: int | None, said: str, errors: int | None, ok: bool, tool: ModuleType, programs: Programs,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(tool.shutil, "which", lambda *_, **__: "/bin/compute-sanitizer")
    programs.then(code, said)
    entry = tool.sanitizer(60.0, tmp_path)
    assert (entry["ok"], entry["errors"]) == (ok, errors)
    assert programs.environments[0] == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def test_without_a_sanitizer(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool.shutil, "which", lambda *_, **__: None)
    assert tool.sanitizer(60.0, tmp_path)["ok"] is None


@pytest.mark.parametrize(("code", "ok"), [(0, True), (1, False)])
def test_operators(
    code: int, ok: bool, tool: ModuleType, programs: Programs, tmp_path: Path
) -> None:
    def effect(words: list[str]) -> None:
        Path(words[words.index("--json") + 1]).write_text('{"cases": [1]}')

    programs.then(code, "said", effect)
    entry = tool.operators(60.0, tmp_path)
    assert (entry["ok"], entry["report"]) == (ok, {"cases": [1]})


@pytest.mark.parametrize(
    ("losses", "ok"), [(["2.5", "1.5"], True), (["2.5", "null"], False), (["2.5"], False)]
)
def test_training_that_pretends(
    losses: list[str], ok: bool, tool: ModuleType, programs: Programs, tmp_path: Path
) -> None:
    def effect(words: list[str]) -> None:
        output = Path(words[words.index("--output") + 1])
        output.mkdir()
        lines = [f'{{"step": {i}, "loss": {loss}}}\n' for i, loss in enumerate(losses)]
        (output / "metrics.jsonl").write_text("".join(lines))

    programs.then(0, "said", effect)
    entry = tool.training("bf16", 2)(60.0, tmp_path)
    assert entry["ok"] is ok
    assert entry["losses"] == [None if loss == "null" else float(loss) for loss in losses]


# What the parts run, on the CPU.


def test_training(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tool.run
    monkeypatch.setattr(tool, "run", lambda words, limit: real(
        ["cpu" if word == "cuda" else word for word in words], limit))  # fmt: skip
    entry = tool.training("fp32", 2)(120.0, tmp_path)
    assert entry["ok"], entry["said"]
    assert len(entry["losses"]) == 2


def test_the_ops_for_the_sanitizer(tool: ModuleType) -> None:
    script = tool.ALL_OPS.replace('"cuda"', '"cpu"').replace("torch.cuda.synchronize()", "pass")
    done = tool.run([sys.executable, "-c", script], 120)
    assert (done.code, done.said) == (0, "all ops ran\n")


def test_what_a_machine_is_asked(tool: ModuleType) -> None:
    about = tool.last_json(tool.run([sys.executable, "-c", tool.TORCH_AND_GPU], 60).said)
    assert about["torch"] == torch.__version__
    assert bool(about["gpu"]) == torch.cuda.is_available()
    script = tool.KERNELS.replace('"cuda"', '"cpu"')
    found = tool.last_json(tool.run([sys.executable, "-c", script], 60).said)
    assert found["kernels"].startswith("kernels: ")
    assert isinstance(found["cuda_dtypes"], list)


def test_last_json(tool: ModuleType) -> None:
    assert tool.last_json('{"a": 1}\nwarning\n{"a": 2}\n[3]\nbye') == {"a": 2}
    assert tool.last_json("no\n") == {}
