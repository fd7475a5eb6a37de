"""The command line: `dcdet NAME ...`, and `python tools/NAME.py ...` from a checkout.

Torch is imported inside the commands only, so that --help and slips of the keyboard answer at
once. Every error is one line on stderr; the exit codes are those of errors.py and the README.
"""

import argparse
import errno
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from dcdet import __version__
from dcdet.config import COMMAND_LINE, Config, load_config, suggest
from dcdet.errors import DcdetError, UserError

INTERNAL = 70  # a bug in dcdet: none of the outcomes that the other codes stand for
_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM, errno.EMFILE,
            errno.ENFILE}  # fmt: skip
_USER = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST,
         errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code returns."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    _log_to_stderr(debug)
    try:
        code = _run(words)
        if sys.stdout:  # None where it was closed from the start
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read our output is gone. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except KeyboardInterrupt:
        return _complain("interrupted", 130, debug)
    except DcdetError as error:
        return _complain(str(error), error.exit_code, debug)
    except Exception as error:
        return _complain(*_explain(error), debug)


def _complain(message: str, code: int, debug: bool) -> int:
    """One line on stderr, after the traceback where --debug asks for it."""
    if debug:
        traceback.print_exc()
    line = " ".join(message.split())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    print(f"error: {line}", file=sys.stderr, flush=True)
    return code


def _explain(error: Exception) -> tuple[str, int]:
    """Words and exit code for an error that dcdet did not raise itself."""
    if isinstance(error, OSError) and error.errno in _MACHINE | _USER:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}", 4 if error.errno in _MACHINE else 2
    if isinstance(error, ImportError):
        return f"{error} (dcdet doctor tells what is missing)", 4
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {error}", 4
    what = f"internal: {type(error).__name__}: {error}"
    return f"{what} (a bug in dcdet; run again with --debug to see where)", INTERNAL


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def _log_to_stderr(debug: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine())
    logger = logging.getLogger("dcdet")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logging.raiseExceptions = debug  # a closed stderr is no reason to stop training


# What each command takes.


@dataclass(frozen=True)
class Command:
    """`usage` shows the plain words; `options` names entries of OPTIONS."""

    summary: str
    usage: str
    options: tuple[str, ...]
    run: Callable[[argparse.Namespace], int]


def _existing_file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        what = "is not a file" if path.exists() else "no such file"
        raise argparse.ArgumentTypeError(f"{text}: {what}")
    return path


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must name a folder")
    return Path(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got '{text}'")
    return value


def _seed(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"must be a whole number, not negative, got '{text}'")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got '{text}'")
    return value


def _new_file(text: str) -> Path:
    """A file that can be written, found out before minutes of work are put into it."""
    path = Path(text).resolve()  # a link is followed, not replaced
    if not text or (path.exists() and not path.is_file()):
        raise argparse.ArgumentTypeError(f"must name a file, got '{text}'")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no folder '{path.parent}'")
    trial = path.with_name(f".{path.name}.tmp")
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: cannot be written: {error.strerror}") from error
    return path


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = (float(number) for number in text.split(","))
    except ValueError:
        x = y = math.nan
    if not (math.isfinite(x) and math.isfinite(y)):
        raise argparse.ArgumentTypeError(f"must be two numbers X,Y, got '{text}'")
    return x, y


OPTIONS: dict[str, dict[str, Any]] = {
    "--output": {"type": _folder, "metavar": "DIR", "help": "default: output/<config name>"},
    "--resume": {"action": "store_true", "help": "continue from the newest good checkpoint"},
    "--device": {"choices": ("cpu", "cuda"), "help": "default: cuda where there is a GPU"},
    "--seed": {"type": _seed, "metavar": "N", "help": "instead of the config's seed"},
    "--weights": {
        "type": _existing_file,
        "metavar": "FILE",
        "help": "a checkpoint; where a new run of train starts from",
    },
    "--config": {"type": Path, "metavar": "CONFIG", "help": "of the model to be filled"},
    "--score-threshold": {"type": _share, "metavar": "X", "help": "of detections; default: 0.5"},
    "--json": {"type": _new_file, "metavar": "FILE", "help": "write every figure to FILE, too"},
    "--quick": {"action": "store_true", "help": "small cases, to see that all works"},
    "--seconds": {
        "type": _seconds,
        "metavar": "X",
        "help": "time for each figure; default: 2 for an operator, 15 for a network",
    },
    "--point": {
        "type": _point,
        "metavar": "X,Y",
        "action": "append",
        "default": [],
        "help": "a place in the image, to be repeated for more; default: the middles of the five"
        " best detections or commonest classes, or without any a grid",
    },
    "--debug": {"action": "store_true", "help": "show tracebacks and more messages"},
}


def _train(args: argparse.Namespace) -> int:
    seed = [] if args.seed is None else [f"seed={args.seed}"]
    config, output = _config(args, args.words[1:] + seed)
    from dcdet.engine.train import train

    weights, resume, device = args.weights, args.resume, args.device
    return train(config, output, weights=weights, resume=resume, device=device)


def _test(args: argparse.Namespace) -> int:
    config, output = _config(args, args.words[1:])
    from dcdet.engine.evaluate import evaluate

    return evaluate(config, args.weights, output, device=args.device)


def _inputs(words: list[str]) -> tuple[list[str], list[str]]:
    """Words that name images or folders, and those that override values of the config."""

    def overrides(word: str) -> bool:
        return bool(re.match(r"[A-Za-z_]\w*(\.\w+)*=", word)) and not os.path.lexists(word)

    names = [word for word in words if not overrides(word)]
    for name in names:
        if not os.path.lexists(name):
            raise UserError(name, "no such image or folder")
    return names, [word for word in words if overrides(word)]


def _demo(args: argparse.Namespace) -> int:
    inputs, overrides = _inputs(args.words[1:])
    if not inputs:
        raise UserError(COMMAND_LINE, "no image is named", "dcdet demo CONFIG ... IMAGE_OR_FOLDER")
    config, output = _config(args, overrides)
    from dcdet.engine.demo import demo

    threshold = args.score_threshold
    return demo(config, args.weights, inputs, output, score_threshold=threshold, device=args.device)


def _convert(args: argparse.Namespace) -> int:
    usage = f"dcdet convert {COMMANDS['convert'].usage}"
    if len(args.words) < 2 or args.config is None:
        names = ("SOURCE", "DESTINATION")[len(args.words) :] or ("--config",)
        raise UserError(COMMAND_LINE, f"{names[0]} is missing", usage)
    try:
        source, destination = _existing_file(args.words[0]), _new_file(args.words[1])
    except argparse.ArgumentTypeError as error:
        raise UserError(COMMAND_LINE, str(error)) from error
    config = _checked(args.config, args.words[2:])
    from dcdet.engine.convert import convert

    return convert(config, source, destination, print)


def _check(args: argparse.Namespace) -> int:
    config, _ = _config(args, args.words[1:])
    from dcdet.engine.check import check

    return check(config, print)


def _offsets(args: argparse.Namespace) -> int:
    inputs, overrides = _inputs(args.words[1:])
    if len(inputs) != 1:
        what = f"one image is needed, not {len(inputs)}"
        raise UserError(COMMAND_LINE, what, "dcdet offsets CONFIG --weights FILE IMAGE")
    config, output = _config(args, overrides)
    from dcdet.engine.offsets import offsets

    return offsets(
        config,
        args.weights,
        inputs[0],
        output,
        points=args.point,
        score_threshold=args.score_threshold,
        device=args.device,
    )


def _benchmark(args: argparse.Namespace) -> int:
    if not args.words:
        raise UserError(COMMAND_LINE, "what to measure is missing", suggest("", BENCHMARKS))
    what, *rest = args.words
    if what not in BENCHMARKS:
        raise UserError(COMMAND_LINE, f"no benchmark '{what}'", suggest(what, BENCHMARKS))
    if rest:
        raise UserError(COMMAND_LINE, f"benchmark {what} takes no '{rest[0]}'")
    write = partial(print, flush=True)  # a table that grows for minutes
    options = {"device": args.device, "quick": args.quick}
    if args.seconds is not None:
        options["seconds"] = args.seconds
    if what == "ops":
        from dcdet.engine.benchmark import benchmark_ops

        return benchmark_ops(write, args.json, **options)
    from dcdet.engine.benchmark_models import benchmark_models

    return benchmark_models(what, write, args.json, **options)


def _doctor(args: argparse.Namespace) -> int:
    if args.words:
        raise UserError(COMMAND_LINE, f"doctor takes no '{args.words[0]}'")
    from dcdet.doctor import doctor

    return doctor(print)


BENCHMARKS = ("ops", "train", "test")

COMMANDS = {
    "train": Command(
        "train a model",
        "CONFIG [key.path=value ...]",
        ("--output", "--weights", "--resume", "--device", "--seed"),
        _train,
    ),
    "test": Command(
        "measure a trained model",
        "CONFIG --weights FILE [key.path=value ...]",
        ("--weights", "--output", "--device"),
        _test,
    ),
    "demo": Command(
        "draw what a trained model finds in images",
        "CONFIG --weights FILE IMAGE_OR_FOLDER ... [key.path=value ...]",
        ("--weights", "--output", "--score-threshold", "--device"),
        _demo,
    ),
    "convert": Command(
        "make a dcdet checkpoint of another framework's",
        "SOURCE DESTINATION --config CONFIG [key.path=value ...]",
        ("--config",),
        _convert,
    ),
    "check": Command(
        "read a whole data set and report everything wrong in it",
        "CONFIG [key.path=value ...]",
        (),
        _check,
    ),
    "offsets": Command(
        "draw where the deformable layers of a trained model look in an image",
        "CONFIG --weights FILE IMAGE [key.path=value ...]",
        ("--weights", "--point", "--output", "--score-threshold", "--device"),
        _offsets,
    ),
    "benchmark": Command(
        "measure speed and memory of operators or networks beside torchvision's and plain ones",
        "ops|train|test",
        ("--json", "--device", "--quick", "--seconds"),
        _benchmark,
    ),
    "doctor": Command("show versions, devices, and what is missing", "", (), _doctor),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        argument = re.match(r"argument (--[\w-]+): (.*)", message)
        raise UserError(*(argument.groups() if argument else (COMMAND_LINE, message)))


def _run(words: list[str]) -> int:
    while words[:1] == ["--debug"]:
        words = words[1:]
    if not words:
        raise UserError(COMMAND_LINE, "no command is given", suggest("", COMMANDS))
    if words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(f"dcdet {__version__}")
        return 0
    name = words[0]
    if name not in COMMANDS:
        if name.startswith("-"):
            hint = suggest(name, ("--help", "--version", "--debug"))
            raise UserError(COMMAND_LINE, f"no option '{name}'", hint)
        raise UserError(COMMAND_LINE, f"no command '{name}'", suggest(name, COMMANDS))
    command = COMMANDS[name]
    options = (*command.options, "--debug")
    parser = _Parser(
        prog=f"dcdet {name}",
        usage=f"dcdet {name} {command.usage} [options]".replace("  ", " "),
        description=command.summary,
        epilog="CONFIG is a YAML file; key.path=value changes one of its values for this run."
        if "CONFIG" in command.usage
        else None,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    for option in options:
        parser.add_argument(option, **OPTIONS[option])
    try:
        args, extra = parser.parse_known_intermixed_args(words[1:])
    except SystemExit:  # --help
        return 0
    unknown = [word for word in extra if word.startswith("-")]
    if unknown:
        option = unknown[0].partition("=")[0]
        raise UserError(COMMAND_LINE, f"{name} has no option '{option}'", suggest(option, options))
    args.words += extra
    if command.usage.startswith("CONFIG") and not args.words:
        raise UserError(COMMAND_LINE, "CONFIG is missing", f"dcdet {name} {command.usage}")
    if "--weights" in command.usage and args.weights is None:
        raise UserError(COMMAND_LINE, "--weights is missing", f"dcdet {name} {command.usage}")
    return command.run(args)


def _overview() -> str:
    lines = [f"  {name:11}{command.summary}" for name, command in COMMANDS.items()]
    ends = "dcdet COMMAND --help tells more.\noptions: --help, --version, --debug"
    return "\n".join(["usage: dcdet COMMAND ...", "", *lines, "", ends])


def _config(args: argparse.Namespace, overrides: list[str]) -> tuple[Config, Path]:
    """The checked config, and the output folder."""
    path = Path(args.words[0])
    config = _checked(path, overrides)
    # A run's own config.yaml belongs to that run's folder.
    name = path.resolve().parent.name if path.name == "config.yaml" else path.stem
    return config, getattr(args, "output", None) or Path("output") / name


def _checked(path: Path, overrides: list[str]) -> Config:
    config = load_config(path, overrides)
    from dcdet.registry import check

    check(config)
    return config
