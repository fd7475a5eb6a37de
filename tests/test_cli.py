"""dcdet/cli.py and tools/: words in, one line and an exit code out."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from dcdet import cli
from dcdet.errors import DivergedError, MachineError, UserError

QUICKSTART = str(ROOT / "configs/quickstart/rfcn_dcn_r18_shapes.yaml")


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dcdet", *words],
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 60, **options},
    )


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    return err


def cpu_seconds() -> float:
    """CPU time of all ended children: on a busy machine a fairer clock than the one on the wall."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture
def weights(tmp_path: Path) -> str:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"not read here")
    return str(path)


# What is refused before torch is imported.


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "",
            "no command is given "
            "(known: train, test, demo, convert, check, offsets, benchmark, doctor)",
        ),
        ("trian", "no command 'trian' (did you mean 'train'?)"),
        ("--verison", "no option '--verison' (did you mean '--version'?)"),
        ("train", "CONFIG is missing (dcdet train CONFIG"),
        ("train --ouput x {c}", "train has no option '--ouput' (did you mean '--output'?)"),
        ("train {c} --resum", "train has no option '--resum' (did you mean '--resume'?)"),
        ("train {c} --weights nowhere.pth", "--weights: nowhere.pth: no such file"),
        ("train {c} --seed -1", "--seed: must be a whole number"),
        ("train {c} --seed 1e3", "--seed: must be a whole number"),
        ("train {c} --seed", "--seed: expected one argument"),
        ("train {c} --device tpu", "--device: invalid choice: 'tpu'"),
        ("train {c} --resume=yes", "--resume: ignored explicit argument 'yes'"),
        ("train {c} --output=", "--output: must name a folder"),
        ("train missing.yaml", "missing.yaml: no such file"),
        ("train {w}", "weights.pth: the file is a single value"),
        ("train {c} seed", "command line: 'seed' is not key.path=value"),
        ("train {c} modle.num_classes=3", "no key 'modle'"),
        ("train {c} --output o model.backbone.dept=3", "did you mean 'depth'?"),
        ("train --output o {c} solver.lr=on", "'on' is ambiguous"),
        ("test {c}", "--weights is missing (dcdet test CONFIG --weights FILE"),
        ("test {c} --weigths {w}", "test has no option '--weigths' (did you mean '--weights'?)"),
        ("test {c} --weights nowhere.pth", "--weights: nowhere.pth: no such file"),
        ("test {c} --weights .", "--weights: .: is not a file"),
        ("demo {c} --weights {w}", "no image is named"),
        ("demo {c} --weights {w} nowhere.jpg", "nowhere.jpg: no such image or folder"),
        ("demo {c} --weights {w} -- -x.jpg", "-x.jpg: no such image or folder"),
        ("demo {c} --weights {w} . --score-threshold nan", "--score-threshold: must be a number"),
        ("demo {c} --weights {w} . --score-threshold -1", "from 0 to 1, got '-1'"),
        ("demo {c} --weights {w} . --score-threshold 2", "from 0 to 1, got '2'"),
        ("demo {c} --weights {w} . --score-threshold x", "from 0 to 1, got 'x'"),
        ("demo {c} --weights {w} . modle.x=1", "no key 'modle'"),
        ("offsets {c} --weights {w}", "one image is needed, not 0"),
        ("offsets {c} --weights {w} {w} {c}", "one image is needed, not 2"),
        ("offsets {c} --weights {w} nowhere.jpg", "nowhere.jpg: no such image or folder"),
        ("offsets {c} {w}", "--weights is missing (dcdet offsets CONFIG --weights FILE IMAGE"),
        ("offsets {c} --weights {w} {w} --point 3", "--point: must be two numbers X,Y, got '3'"),
        ("offsets {c} --weights {w} {w} --point 3,4,5", "--point: must be two numbers"),
        ("offsets {c} --weights {w} {w} --point x,4", "--point: must be two numbers"),
        ("offsets {c} --weights {w} {w} --point nan,4", "--point: must be two numbers"),
        ("offsets {c} --weights {w} {w} --point 1,inf", "--point: must be two numbers"),
        ("offsets {c} --weights {w} {w} --point -1,4", "--point: expected one argument"),
        ("offsets {c} --weights {w} {w} --pint 1,4", "did you mean '--point'?"),
        ("offsets {c} --weights {w} {w} --score-threshold 2", "from 0 to 1, got '2'"),
        ("convert", "SOURCE is missing (dcdet convert SOURCE DESTINATION --config CONFIG"),
        ("convert {w}", "DESTINATION is missing"),
        ("convert {w} new.pth", "--config is missing"),
        ("convert {w} new.pth --confgi {c}", "has no option '--confgi' (did you mean '--config'?)"),
        ("convert nowhere.params new.pth --config {c}", "nowhere.params: no such file"),
        ("convert . new.pth --config {c}", ".: is not a file"),
        ("convert {w} . --config {c}", "must name a file, got '.'"),
        ("convert {w} nowhere/x.pth --config {c}", "nowhere/x.pth: no folder '"),
        ("convert {w} new.pth --config missing.yaml", "missing.yaml: no such file"),
        ("convert {w} new.pth --config {c} modle.num_classes=3", "no key 'modle'"),
        ("convert {w} new.pth third --config {c}", "'third' is not key.path=value"),
        ("doctor now", "doctor takes no 'now'"),
        ("benchmark", "what to measure is missing (known: ops, train, test)"),
        ("benchmark opps", "no benchmark 'opps' (did you mean 'ops'?)"),
        ("benchmark data", "no benchmark 'data' (known: ops, train, test)"),
        ("benchmark ops twice", "benchmark ops takes no 'twice'"),
        ("benchmark test {c}", "benchmark test takes no '"),
        ("benchmark ops --json", "--json: expected one argument"),
        ("benchmark ops --json=", "--json: must name a file"),
        ("benchmark ops --json .", "--json: must name a file, got '.'"),
        ("benchmark ops --json nowhere/x.json", "--json: nowhere/x.json: no folder '"),
        ("benchmark ops --json {w}/x.json", "x.json: no folder '"),
        ("benchmark ops --seconds 0", "--seconds: must be a positive number, got '0'"),
        ("benchmark ops --seconds nan", "--seconds: must be a positive number, got 'nan'"),
        ("benchmark ops --seed 3", "benchmark has no option '--seed'"),
        ("check", "CONFIG is missing"),
        ("check {c} --seed 3", "check has no option '--seed'"),
    ],
)
def test_refused_at_once(
    words: str, expected: str, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words.format(c=QUICKSTART, w=weights).split()) == 2
    assert expected in error_line(capsys)


def test_refusals_and_help_do_not_import_torch(weights: str) -> None:
    lines = [
        "--help", "--version", "train --help", "test --help", "demo --help", "check --help",
        "convert --help", "doctor --help", "benchmark --help", "offsets --help",
        "benchmark data", "trian",
        f"test {QUICKSTART} --weights nowhere",
        f"demo {QUICKSTART} --weights {weights} .  seed=on", f"convert {weights} x.pth",
        f"train {QUICKSTART} sede=1",
    ]  # fmt: skip
    script = f"""
import sys, dcdet, dcdet.cli
for line in {lines!r}:
    dcdet.cli.main(line.split())
assert dcdet.load_config({QUICKSTART!r}).seed == 0
heavy = {{"torch", "torchvision", "numpy", "cv2", "tensorboard"}} & set(sys.modules)
assert not heavy, heavy
try:
    dcdet.load_wieghts
except AttributeError:
    pass
else:
    raise SystemExit("no AttributeError")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: dcdet") == 9


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_tools_are_the_same_commands(name: str, tmp_path: Path) -> None:
    script = str(ROOT / "tools" / f"{name}.py")
    done = subprocess.run(
        [sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout == run(name, "--help").stdout
    for option in cli.COMMANDS[name].options:
        assert option in done.stdout


def test_help_is_quick() -> None:
    start = cpu_seconds()
    run("train", "--help")
    assert cpu_seconds() - start < 1


# What needs the classes that the config names, hence torch.


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("depth: 18", "dept: 18", "ResNet has no option 'dept' (did you mean 'depth'?)"),
        ("depth: 18", "depth: '18'", "'depth' must be"),
        ("type: RPNHead", "type: RpnHead", "no rpn is called 'RpnHead' (did you mean 'RPNHead'?)"),
        (r"  lr: \S+", "  lr: -0.03", "'lr' must be positive"),
        (r"  lr: \S+", "  lr: .nan", "'.nan' is ambiguous"),
        (r"  epochs: \S+\n", "", "'solver' lacks 'epochs'"),
        ("flip: random", "flip: yes", "'yes' is ambiguous"),
        ("flip: random", "flip: randon", "did you mean 'random'?"),
        ("seed: 0", "seed: 0\nseed: 1", "key 'seed' is repeated"),
        (r"batch_size: \d+", "batch_size: 8\n  batchsize: 8", "did you mean 'batch_size'?"),
    ],
)
def test_ten_slips_in_a_config(
    old: str, new: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, replaced = re.subn(old, new, Path(QUICKSTART).read_text())
    assert replaced == 1
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert cli.main(["train", str(path), "--output", str(tmp_path / "out")]) == 2
    line = error_line(capsys)
    assert expected in line
    assert re.match(rf"error: {re.escape(str(path))}:\d+: ", line)
    assert not (tmp_path / "out").exists()


def test_a_slip_takes_less_than_5_seconds(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(Path(QUICKSTART).read_text().replace("depth: 18", "dept: 18"))
    start = cpu_seconds()
    done = run("train", str(path))
    assert cpu_seconds() - start < 5
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {path}:12: ResNet has no option 'dept' (did you mean 'depth'?)\n"


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--debug", "trian"], ["trian", "--debug"]):
        assert cli.main(words) == 2
        err = capsys.readouterr().err
        assert err.startswith("Traceback")
        assert err.splitlines()[-1].startswith("error: command line: no command 'trian'")


# What commands are given, and what becomes of what they raise.


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Commands recorded instead of run; the config is not checked against the classes."""
    import dcdet.engine.demo
    import dcdet.engine.evaluate
    import dcdet.engine.offsets
    import dcdet.engine.train
    from dcdet import registry

    seen: list[Any] = []

    def record(*args: object, **options: object) -> int:
        seen.append((*args, options))
        return 0

    monkeypatch.setattr(registry, "check", lambda config: None)
    monkeypatch.setattr(dcdet.engine.train, "train", record)
    monkeypatch.setattr(dcdet.engine.evaluate, "evaluate", record)
    monkeypatch.setattr(dcdet.engine.demo, "demo", record)
    monkeypatch.setattr(dcdet.engine.offsets, "offsets", record)
    return seen


def test_what_train_is_given(calls: list[Any]) -> None:
    words = ["train", "--resume", QUICKSTART, "data.workers=0", "--seed", "7", "solver.lr=1e-3",
             "--weights", QUICKSTART]  # fmt: skip
    assert cli.main(words) == 0
    config, output, options = calls[0]
    assert (config.data.workers, config.seed, config.solver.lr) == (0, 7, 0.001)
    assert output == Path("output/rfcn_dcn_r18_shapes")
    assert options == {"weights": Path(QUICKSTART), "resume": True, "device": None}


def test_a_runs_own_config_belongs_to_its_folder(calls: list[Any], tmp_path: Path) -> None:
    (tmp_path / "run_7").mkdir()
    path = tmp_path / "run_7" / "config.yaml"
    path.write_text(Path(QUICKSTART).read_text())
    assert cli.main(["train", str(path)]) == 0
    assert calls[0][1] == Path("output/run_7")


def test_what_test_and_demo_are_given(
    calls: list[Any], weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "seed=3", "-x.jpg", "sub"):
        (tmp_path / name).touch()
    assert cli.main(["test", QUICKSTART, "seed=2", "--weights", weights, "--output", "o"]) == 0
    words = ["demo", QUICKSTART, "a.jpg", "--weights", weights, "seed=3", "seed=4", "--", "-x.jpg"]
    assert cli.main([*words[:-2], "--score-threshold", "0.25", "--device", "cpu", *words[-2:]]) == 0
    config, path, output, options = calls[0]
    assert (config.seed, path, output, options) == (2, Path(weights), Path("o"), {"device": None})
    config, path, images, output, options = calls[1]
    assert config.seed == 4
    assert images == ["a.jpg", "seed=3", "-x.jpg"]
    assert options == {"score_threshold": 0.25, "device": "cpu"}


def test_what_offsets_is_given(calls: list[Any], weights: str) -> None:
    words = ["offsets", QUICKSTART, weights, "seed=2", "--weights", weights, "--output", "o"]
    for points in ([], [(3.0, 4.5), (0.0, -1.0)]):
        given = [f"--point={x},{y}" for x, y in points]
        assert cli.main([*words, *given]) == 0
        config, path, image, output, options = calls[-1]
        assert (config.seed, path, image, output) == (2, Path(weights), weights, Path("o"))
        assert options == {"points": points, "score_threshold": None, "device": None}


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a.xml:3", "no size", "add it"), 2, "a.xml:3: no size (add it)"),
        (UserError("a\nb\x1b[31m.jpg", "bad\nthing"), 2, r"a b\x1b[31m.jpg: bad thing"),
        (DivergedError("step 3"), 3, "step 3"),
        (MachineError("worker lost"), 4, "worker lost"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 4, "x: No space left on device"),
        (OSError(errno.EFBIG, "File too large"), 4, "File too large"),
        (OSError(errno.EMFILE, "Too many open files"), 4, "Too many open files"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "x: Permission denied"),
        (ImportError("libGL.so.1"), 4, "libGL.so.1 (dcdet doctor tells what is missing)"),
        (MemoryError(), 4, "out of memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), 4, "out of memory: CUDA"),
        (KeyError("depth"), 70, "internal: KeyError: 'depth' (a bug in dcdet; run again with"),
        (RecursionError("deep"), 70, "internal: RecursionError"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_lines(
    error: BaseException,
    code: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr("dcdet.doctor.doctor", fail)
    assert cli.main(["doctor"]) == code
    assert error_line(capsys).startswith(f"error: {line}")


# Pipes, signals, devices: in processes of their own.


def test_a_closed_pipe_is_quiet() -> None:
    for words in (["doctor"], ["train", "--help"]):
        child = subprocess.Popen(
            [sys.executable, "-m", "dcdet", *words],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert child.stdout
        assert child.stderr
        child.stdout.close()
        err = child.stderr.read()
        assert child.wait(60) in (0, 141)
        assert err == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_stdout() -> None:
    with open("/dev/full", "w") as full:
        done = run("--help", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 4
    assert done.stderr == "error: No space left on device\n"


def test_stdout_closed_from_the_start() -> None:
    command = f"{sys.executable} -m dcdet --help >&-"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_interrupt() -> None:
    script = "import dcdet.cli, dcdet.doctor, time, sys\n" + (
        "dcdet.doctor.doctor = lambda write: (print('ready', flush=True), time.sleep(60))\n"
        "sys.exit(dcdet.cli.main(['doctor']))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=30)[1] == "error: interrupted\n"
    assert child.returncode == 130


def test_cuda_without_a_gpu(tmp_path: Path) -> None:
    done = run(
        "train", QUICKSTART, "--device", "cuda", "--output", str(tmp_path / "o"),
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2
    assert re.fullmatch(r"error: --device: cuda [^\n]*--device cpu[^\n]*\n", done.stderr)


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_an_output_that_cannot_be(output: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("train", QUICKSTART, "--device", "cpu", "--output", f"{tmp_path}/{output}")
    assert done.returncode == 2
    assert re.fullmatch(r"error: [^\n]*output[^\n]*\n", done.stderr), done.stderr


def test_doctor() -> None:
    done = run("doctor")
    assert done.returncode == 0, done.stdout
    for word in ("dcdet 0.1", "Python 3", "torch 2", "torchvision", "kernels", "all is well"):
        assert word in done.stdout


def test_doctor_names_what_is_broken(tmp_path: Path) -> None:
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open')\n")
    done = run("doctor", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 4
    assert "opencv-python-headless: BROKEN (ImportError: libGL.so.1: cannot open)" in done.stdout
    assert "pip install --upgrade opencv-python-headless" in done.stdout
