"""Two commands on a fresh machine, with nothing but Python 3.10 or newer:

    python3 tools/bootstrap.py demo     sets up .venv, then trains, evaluates and draws
    python3 tools/bootstrap.py test     the same set-up, then the whole test suite

`install` is the set-up alone. Words after `test` go to pytest. A set-up that was interrupted is
mended by the next call; one that is complete is not repeated. Standard library only, and no syntax
that an old Python could not read: it must live to say that it is too old.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "dcdet.json"  # written last: a set-up without it is not complete
LOG = VENV / "pip.log"
DEMO_CONFIG = "configs/quickstart/rfcn_dcn_r18_shapes.yaml"
DEMO_OUTPUT = ROOT / "output" / "demo"
# GB that .venv takes, and GB of downloads. On Linux torch comes with the CUDA libraries.
VENV_GB, DOWNLOAD_GB = (6, 3) if sys.platform == "linux" else (2, 1)
WORKS = (
    "import torch, torchvision, cv2, numpy, PIL.Image, yaml, easydict, pycocotools.mask, pytest, "
    "hypothesis, torch.utils.tensorboard, dcdet\n"
    "torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)"
)


class SetUpError(Exception):
    """What went wrong, and the remedy; ends the command with exit code 4."""


def main(words: "list[str]") -> int:
    """Run a command; the exit code returns."""
    commands = {"demo": demo, "test": test, "install": install}
    if not words or words[0] not in commands or (len(words) > 1 and words[0] != "test"):
        wanted = " ".join(words) or "nothing"
        if words[:1] in (["-h"], ["--help"]):
            print(__doc__)
            return 0
        print(f"error: bootstrap.py takes demo, test or install, got {wanted}", file=sys.stderr)
        return 2
    try:
        # A terminated set-up stops pip too, instead of leaving it behind.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        set_up()
        return commands[words[0]](words[1:])
    except SetUpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    except OSError as error:
        print(f"error: {error.filename or ROOT}: {error.strerror}", file=sys.stderr)
        return 4
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


def install(_: "list[str]") -> int:
    """Nothing beyond the set-up."""
    return 0


def test(words: "list[str]") -> int:
    """The test suite."""
    return run(["-m", "pytest", *words])


def demo(_: "list[str]") -> int:
    """Train, evaluate and draw on the embedded data set; stops at the first step that fails."""
    if DEMO_OUTPUT.exists():
        say(f"removing the last demo's {DEMO_OUTPUT.relative_to(ROOT)}")
        shutil.rmtree(DEMO_OUTPUT)
    output = str(DEMO_OUTPUT)
    precision = "bf16" if multiplies_bf16() else "fp32"
    say(f"1/3 training in {precision}")
    code = run(["tools/train.py", DEMO_CONFIG, f"solver.precision={precision}", "--output", output])
    if code:
        return code
    weights = str(max((DEMO_OUTPUT / "checkpoints").glob("step_*.pth")))
    say("2/3 evaluating")
    code = run(["tools/test.py", DEMO_CONFIG, "--weights", weights, "--output", output])
    if code:
        return code
    say("3/3 drawing")
    shapes = ROOT / "data" / "shapes"
    names = (shapes / "ImageSets" / "Main" / "test.txt").read_text().split()[:8]
    images = [str(shapes / "JPEGImages" / f"{name}.jpg") for name in names]
    pictures = DEMO_OUTPUT / "pictures"
    code = run(["tools/demo.py", DEMO_CONFIG, "--weights", weights, *images,
                "--output", str(pictures)])  # fmt: skip
    if code:
        return code
    metrics = json.loads((DEMO_OUTPUT / "metrics.json").read_text())
    figures = [f"{k} {v:.3f}" for k, v in metrics.items() if isinstance(v, float)]
    say("done: " + ", ".join(figures))
    say(f"pictures in {pictures}, everything else in {DEMO_OUTPUT}")
    return 0


def multiplies_bf16() -> bool:
    """Whether the CPU has instructions for bf16 matrices; without them bf16 is the slower."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def run(arguments: "list[str]") -> int:
    """Run .venv's Python from the root of the checkout; the exit code returns."""
    child = subprocess.Popen([str(PYTHON), *arguments], cwd=str(ROOT), env=environment())
    try:
        code = child.wait()
    except KeyboardInterrupt:
        # The child saw Ctrl-C too, and may be writing a checkpoint.
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=60)
        child.terminate()
        raise
    except BaseException:
        child.terminate()
        child.wait()
        raise
    return code if code >= 0 else 128 - code


def environment() -> "dict[str, str]":
    """This process's environment without what would lead .venv's Python elsewhere."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "PYTHONPATH")}
    return {**kept, "PIP_USER": "0"}


# The set-up.


def set_up() -> None:
    """Make .venv complete, unless it is."""
    wanted = fingerprint()
    if is_complete(wanted):
        return
    check_python()
    with lock() as handle:
        if is_complete(wanted):
            return
        check_disk()
        with contextlib.suppress(FileNotFoundError):
            STAMP.unlink()
        say(f"setting up {VENV} (once; about {DOWNLOAD_GB} GB to download)")
        for attempt in (1, 2):
            if attempt == 2 or problem("import sys, pip; assert sys.version_info >= (3, 10)"):
                create()
            pip(handle)
            reason = problem(WORKS)
            if not reason:
                break
            if attempt == 2:
                raise SetUpError(f"{VENV} does not work: {reason} (see {LOG})")
            say(f"{VENV.name} is damaged ({reason}), making it anew")
        kernels()
        STAMP.write_text(wanted)
        say("set up")


def is_complete(wanted: str) -> bool:
    """Whether .venv was set up for this checkout as it is now."""
    try:
        return STAMP.read_text() == wanted and PYTHON.exists()
    except (OSError, ValueError):
        return False


def fingerprint() -> str:
    """What a set-up depends on. The editable install points to ROOT, so a moved one is another."""
    sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    files = [ROOT / "pyproject.toml", ROOT / "setup.py", *sources]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    cuda = os.environ.get("DCDET_CUDA", "")
    return json.dumps({"root": str(ROOT), "files": digests, "cuda": cuda})


def check_python() -> None:
    """Raise SetUpError where this Python is too old or cannot make environments."""
    if sys.version_info < (3, 10):
        found = ".".join(map(str, sys.version_info[:3]))
        raise SetUpError(
            f"Python 3.10 or newer is needed, {sys.executable} is {found} "
            "(call a newer one: python3.12 tools/bootstrap.py ...)"
        )
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        version = ".".join(map(str, sys.version_info[:2]))
        raise SetUpError(
            f"{sys.executable} cannot make virtual environments "
            f"(on Debian or Ubuntu: apt-get install python{version}-venv)"
        )


def check_disk() -> None:
    """Raise SetUpError where .venv or the downloads would not fit."""
    there = sum(f.lstat().st_size for f in VENV.rglob("*")) / 1e9 if VENV.exists() else 0.0
    needed = {str(ROOT): max(VENV_GB - there, 0.5)}
    downloads = 0.2 if there > VENV_GB / 2 else DOWNLOAD_GB
    temporary = tempfile.gettempdir()
    if os.stat(temporary).st_dev == os.stat(str(ROOT)).st_dev:
        needed[str(ROOT)] += downloads
    else:
        needed[temporary] = downloads
    for folder, size in needed.items():
        free = shutil.disk_usage(folder).free / 1e9
        if free < size:
            remedy = "free some space" if folder == str(ROOT) else "set TMPDIR to a larger disk"
            raise SetUpError(
                f"too little disk: {size:.1f} GB are needed at {folder}, {free:.1f} GB are free "
                f"({remedy})"
            )


@contextlib.contextmanager
def lock() -> "Iterator[int | None]":
    """Hold the only set-up of this checkout. pip inherits the handle: while a pip that outlived
    its bootstrap is at work, the next set-up waits."""
    if sys.platform == "win32":
        yield None
        return
    import fcntl

    handle = os.open(str(ROOT), os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is at work here, waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield handle
    finally:
        os.close(handle)


def create() -> None:
    """An empty .venv."""
    made = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(VENV)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=environment(), check=False,
    )  # fmt: skip
    if made.returncode:
        lines = made.stdout.decode(errors="replace").split("\n")
        reason = " ".join(" ".join(lines).split())[:300]
        raise SetUpError(f"cannot make {VENV}: {reason}")


def pip(handle: "int | None") -> None:
    """Install dcdet, editable, with what it and its tests need."""
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--no-input", "--progress-bar",
               "off", "--disable-pip-version-check", "--editable", f"{ROOT}[test]"]  # fmt: skip
    start, free = time.monotonic(), shutil.disk_usage(str(ROOT)).free
    with open(str(LOG), "wb") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            cwd=str(VENV), env=environment(), pass_fds=() if handle is None else (handle,),
        )  # fmt: skip
        try:
            while True:
                try:
                    code = child.wait(timeout=30)
                    break
                except subprocess.TimeoutExpired:
                    size = max(free - shutil.disk_usage(str(ROOT)).free, 0) / 1e9
                    say(f"  installing: {time.monotonic() - start:.0f} s, {size:.1f} GB")
        except BaseException:
            child.kill()
            child.wait()
            raise
    if code:
        raise SetUpError(why_pip_failed(LOG.read_text(errors="replace")))


def kernels() -> None:
    """Compile csrc/ where there is a compiler, for CUDA where torch sees a GPU (DCDET_CUDA=1 or 0:
    anyway, or not at all); dcdet works without."""
    cpu, cuda = (ROOT / "dcdet" / name for name in ("_C.abi3.so", "_CUDA.abi3.so"))
    for library in (cpu, cuda):
        with contextlib.suppress(FileNotFoundError):
            library.unlink()
    command = [str(PYTHON), "setup.py", "--quiet", "build_ext", "--inplace", "--build-temp",
               str(VENV / "build")]  # fmt: skip
    made = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        cwd=str(ROOT), env=environment(), check=False,
    )  # fmt: skip
    with open(str(LOG), "ab") as log:
        log.write(made.stdout)
    if not cpu.exists():
        say(f"warning: kernels not compiled (no C++ compiler? see {LOG}): the operators run on "
            "torch, slower")  # fmt: skip
        return
    say("kernels compiled, for CUDA too" if cuda.exists() else "kernels compiled")
    if b"CUDA kernels were not compiled" in made.stdout:
        say(f"warning: CUDA kernels not compiled (no nvcc? see {LOG}): on a GPU the operators run "
            "on torch, slower")  # fmt: skip


def why_pip_failed(text: str) -> str:
    """One line about a failed pip from what it wrote."""
    if "No space left on device" in text:
        return f"the disk is full (free some: set-up needs {VENV_GB + DOWNLOAD_GB} GB)"
    if re.search("name resolution|Max retries|NewConnectionError|timed out", text):
        return f"the package registry cannot be reached (check network and proxy; see {LOG})"
    errors = re.findall(r"^ *(?:ERROR|error): *(.+)$", text, re.MULTILINE)
    reason = errors[0] if errors else " ".join(text.split()[-40:])
    return f"pip could not install: {reason[:300]} (see {LOG})"


def problem(code: str) -> str:
    """Why .venv's Python does not run `code`; "" where it does."""
    try:
        tried = subprocess.run(
            [str(PYTHON), "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, cwd=str(VENV), env=environment(), check=False,
        )  # fmt: skip
    except OSError as error:
        return str(error)
    last = tried.stdout.decode(errors="replace").strip().split("\n")[-1]
    return "" if tried.returncode == 0 else last[:300] or f"exit code {tried.returncode}"


def say(line: str) -> None:
    """A line of progress."""
    print(f"[bootstrap] {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
