"""tools/bootstrap.py, without installing anything: pip and .venv's Python are stand-ins."""

import ast
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT

SOURCE = ROOT / "tools" / "bootstrap.py"
# A Python that only pretends: it notes pip's calls, and sleeps or fails where a file says so.
STAND_IN = """#!/bin/sh
here=$(dirname "$0")
case "$*" in
  *"pip install"*)
    echo called >> "$here/../../calls"
    if [ -e "$here/../../sleep" ]; then echo $$ > "$here/../../pid"; exec sleep 3; fi
    if [ -e "$here/../../fail" ]; then cat "$here/../../fail"; exit 1; fi ;;
  *build_ext*)
    if [ -e "$here/../../compiler" ]; then echo new > "$here/../../dcdet/_C.abi3.so"; fi
    if [ "$DCDET_CUDA" = 1 ]; then
      if [ -e "$here/../../nvcc" ]; then echo new > "$here/../../dcdet/_CUDA.abi3.so"
      else echo "warning: dcdet's CUDA kernels were not compiled (no nvcc)"; fi
    fi ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for folder in ("tools", "csrc", "dcdet"):
        (root / folder).mkdir(parents=True)
    small = SOURCE.read_text().replace("DOWNLOAD_GB = (6, 3)", "DOWNLOAD_GB = (0, 0)")
    assert small != SOURCE.read_text()
    (root / "tools" / "bootstrap.py").write_text(small)
    for name in ("pyproject.toml", "setup.py", "csrc/bindings.cpp"):
        (root / name).write_text("original")
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STAND_IN)
    python.chmod(0o755)
    return root


def command(root: Path, *words: str) -> list[str]:
    return [sys.executable, str(root / "tools" / "bootstrap.py"), *words]


def install(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(root, "install"), capture_output=True, text=True, timeout=60, stdin=None
    )


def calls(root: Path) -> int:
    return len((root / "calls").read_text().split()) if (root / "calls").exists() else 0


def test_set_up_happens_once(checkout: Path) -> None:
    assert install(checkout).returncode == 0
    start = time.monotonic()
    assert install(checkout).stdout == ""
    assert time.monotonic() - start < 2
    assert calls(checkout) == 1


@pytest.mark.parametrize(
    "change", ["pyproject.toml", "setup.py", "csrc/bindings.cpp", "moved", "python", "stamp"]
)
def test_what_makes_it_happen_again(checkout: Path, change: str) -> None:
    assert install(checkout).returncode == 0
    if change == "moved":
        checkout = checkout.rename(checkout.parent / "elsewhere")
    elif change == "python":
        (checkout / ".venv/bin/python").unlink()
        # Its Python is gone, so .venv is made anew, and a real pip fails: there is no project.
        done = install(checkout)
        assert (done.returncode, calls(checkout)) == (4, 1)
        assert done.stderr.startswith("error: pip could not install: ")
        return
    elif change == "stamp":
        (checkout / ".venv/dcdet.json").write_text('{"cut off')
    else:
        (checkout / change).write_text("changed")
    assert install(checkout).returncode == 0
    assert calls(checkout) == 2


def test_kernels_are_compiled_where_a_compiler_is(checkout: Path) -> None:
    library = checkout / "dcdet" / "_C.abi3.so"
    library.write_text("of other sources")
    done = install(checkout)
    assert done.returncode == 0
    assert done.stdout.count("warning: kernels not compiled") == 1
    assert not library.exists()
    (checkout / "compiler").touch()
    (checkout / "csrc" / "bindings.cpp").write_text("changed")
    done = install(checkout)
    assert "kernels compiled" in done.stdout
    assert "warning" not in done.stdout
    assert library.read_text() == "new\n"


def test_cuda_kernels_are_compiled_where_they_are_asked_for(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "compiler").touch()
    library = checkout / "dcdet" / "_CUDA.abi3.so"
    library.write_text("of other sources")
    monkeypatch.delenv("DCDET_CUDA", raising=False)
    done = install(checkout)
    assert "kernels compiled\n" in done.stdout
    assert not library.exists()
    monkeypatch.setenv("DCDET_CUDA", "1")
    done = install(checkout)
    assert done.stdout.count("warning: CUDA kernels not compiled") == 1
    (checkout / "nvcc").touch()
    (checkout / "setup.py").write_text("changed")
    done = install(checkout)
    assert "kernels compiled, for CUDA too" in done.stdout
    assert "warning" not in done.stdout
    assert library.read_text() == "new\n"


def test_a_killed_set_up_is_mended(checkout: Path) -> None:
    (checkout / "sleep").touch()
    child = subprocess.Popen(command(checkout, "install"), stdout=subprocess.PIPE, text=True)
    wait_for(checkout / "pid")
    child.kill()
    child.wait()
    assert not (checkout / ".venv/dcdet.json").exists()
    (checkout / "sleep").unlink()
    # The pip it left behind is still at work: the next set-up waits for it.
    start = time.monotonic()
    done = install(checkout)
    assert time.monotonic() - start > 1
    assert done.returncode == 0
    assert "another set-up is at work" in done.stdout
    assert calls(checkout) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_set_up_stops_pip(checkout: Path, number: int, code: int) -> None:
    (checkout / "sleep").touch()
    child = subprocess.Popen(
        command(checkout, "install"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for(checkout / "pid")
    child.send_signal(number)
    _, err = child.communicate(timeout=10)
    assert child.returncode == code
    assert "Traceback" not in err
    pid = int((checkout / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists() or sys.platform != "linux"
    assert not (checkout / ".venv/dcdet.json").exists()


def wait_for(path: Path) -> None:
    for _ in range(500):
        if path.exists() and path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
         "the disk is full (free some: set-up needs "),
        ("WARNING: Retrying ... Temporary failure in name resolution\nERROR: No matching",
         "the package registry cannot be reached"),
        ("  ERROR: No matching distribution found for torch>=2.10\nERROR: more",
         "pip could not install: No matching distribution found for torch>=2.10"),
        ("some\nwords", "pip could not install: some words"),
    ],
)  # fmt: skip
def test_a_failed_pip_is_one_line(checkout: Path, written: str, said: str) -> None:
    (checkout / "fail").write_text(written)
    done = install(checkout)
    assert done.returncode == 4
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1
    (checkout / "fail").unlink()
    assert install(checkout).returncode == 0


@pytest.mark.parametrize("words", [[], ["tset"], ["demo", "more"]])
def test_wrong_words(checkout: Path, words: list[str]) -> None:
    done = subprocess.run(command(checkout, *words), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: bootstrap.py takes demo, test or install, got ")
    assert done.stderr.count("\n") == 1


def test_it_reads_on_old_pythons_and_needs_the_standard_library_only() -> None:
    tree = ast.parse(SOURCE.read_text(), feature_version=(3, 6))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        assert all(name.partition(".")[0] in sys.stdlib_module_names for name in names)


# From here on the module itself, with a piece of it replaced.


@pytest.fixture
def bootstrap(checkout: Path) -> Any:
    spec = importlib.util.spec_from_file_location("bootstrap", checkout / "tools/bootstrap.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fails(bootstrap: Any, capsys: pytest.CaptureFixture[str]) -> str:
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert bootstrap.main(["install"]) == 4
    finally:
        signal.signal(signal.SIGTERM, before)
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_an_old_python(
    bootstrap: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 9, 2, "final", 0))
    err = fails(bootstrap, capsys)
    assert "Python 3.10 or newer is needed" in err
    assert "is 3.9.2" in err


def test_no_ensurepip(
    bootstrap: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: name != "ensurepip" or None))
    monkeypatch.setattr(bootstrap, "importlib", spec)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert f"apt-get install python{version}-venv" in fails(bootstrap, capsys)


def test_too_little_disk(
    bootstrap: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e8))
    err = fails(bootstrap, capsys)
    assert "too little disk" in err
    assert "0.1 GB are free" in err
    monkeypatch.setattr(bootstrap.shutil, "disk_usage", lambda _: SimpleNamespace(free=2e10))
    bootstrap.check_disk()


def test_a_damaged_environment_is_made_anew(
    bootstrap: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    reasons = iter(["ImportError: torch", ""])
    monkeypatch.setattr(bootstrap, "create", lambda: done.append("create"))
    monkeypatch.setattr(bootstrap, "pip", lambda handle: done.append("pip"))
    monkeypatch.setattr(bootstrap, "kernels", lambda: done.append("kernels"))
    monkeypatch.setattr(bootstrap, "problem", lambda code: next(reasons) if "torch" in code else "")
    bootstrap.set_up()
    assert done == ["pip", "create", "pip", "kernels"]
    assert "damaged (ImportError: torch)" in capsys.readouterr().out
    bootstrap.STAMP.unlink()
    monkeypatch.setattr(bootstrap, "problem", lambda code: "ImportError: torch")
    assert "does not work: ImportError: torch" in fails(bootstrap, capsys)
    assert not bootstrap.STAMP.exists()


def test_one_set_up_at_a_time(bootstrap: Any) -> None:
    entered = threading.Event()

    def second() -> None:
        with bootstrap.lock():
            entered.set()

    with bootstrap.lock():
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.3)
    assert entered.wait(5)
    thread.join()


@pytest.mark.parametrize(("codes", "steps"), [([3], 1), ([0, 1], 2), ([0, 0, 2], 3), ([0] * 3, 3)])
def test_demo_stops_at_the_first_failure(
    bootstrap: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    codes: list[int],
    steps: int,
) -> None:
    root, output = bootstrap.ROOT, bootstrap.DEMO_OUTPUT
    output.mkdir(parents=True)
    (output / "old").touch()
    ran: list[list[str]] = []

    def run(words: list[str]) -> int:
        assert not (output / "old").exists()
        (output / "checkpoints").mkdir(parents=True, exist_ok=True)
        for step in (5, 25, 100):
            (output / f"checkpoints/step_{step:08d}.pth").touch()
        (root / "data/shapes/ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (root / "data/shapes/ImageSets/Main/test.txt").write_text("a\nb\n")
        (output / "metrics.json").write_text(json.dumps({"images": 2, "mAP@0.5": 0.9121}))
        ran.append(words)
        return codes[len(ran) - 1]

    monkeypatch.setattr(bootstrap, "run", run)
    assert bootstrap.demo([]) == codes[-1]
    assert [words[0] for words in ran] == ["tools/train.py", "tools/test.py", "tools/demo.py"][
        :steps
    ]
    weights = str(output / "checkpoints/step_00000100.pth")
    assert all(weights in words for words in ran[1:])
    assert ("mAP@0.5 0.912" in capsys.readouterr().out) == (codes == [0, 0, 0])


def test_ctrl_c_leaves_the_child_time_to_end(bootstrap: Any, tmp_path: Path) -> None:
    bootstrap.PYTHON = Path(sys.executable)
    # The child, like training, writes something before it ends.
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    script = (
        f"import time, pathlib\npathlib.Path({str(ready)!r}).write_text('1')\n"
        f"try: time.sleep(20)\nexcept KeyboardInterrupt:\n"
        f" time.sleep(0.5); pathlib.Path({str(saved)!r}).write_text('1')"
    )
    parent = (
        f"import importlib.util as u, pathlib, sys\n"
        f"s = u.spec_from_file_location('b', {str(SOURCE)!r}); b = u.module_from_spec(s)\n"
        f"s.loader.exec_module(b); b.PYTHON = pathlib.Path(sys.executable)\n"
        f"b.run(['-c', {script!r}])"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", parent], start_new_session=True, stderr=subprocess.DEVNULL
    )
    wait_for(ready)
    os.killpg(child.pid, signal.SIGINT)
    child.wait(10)
    assert saved.exists()


def test_demo_config_is_there(bootstrap: Any) -> None:
    assert (ROOT / bootstrap.DEMO_CONFIG).is_file()


def test_children_do_not_inherit_a_foreign_python_path(
    bootstrap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("KEPT", "yes")
    environment = bootstrap.environment()
    assert "PYTHONPATH" not in environment
    assert environment["KEPT"] == "yes"


def test_exit_codes_of_children(bootstrap: Any) -> None:
    bootstrap.PYTHON = Path(sys.executable)
    assert bootstrap.run(["-c", "raise SystemExit(3)"]) == 3
    assert bootstrap.run(["-c", "import os; os.kill(os.getpid(), 15)"]) == 143
