"""What a run needs around the loop: device, processes, signals, the output folder."""

import ctypes
import fcntl
import json
import logging
import math
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from dcdet.errors import MachineError, UserError, first_line

log = logging.getLogger("dcdet")
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Runtime:
    """The device of this process, its number `rank` among `world` processes."""

    device: torch.device
    rank: int
    world: int

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """`values` averaged over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
            values = values / self.world
        return values

    def largest(self, values: list[int]) -> list[int]:
        """The elementwise maximum over all processes."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in order of rank."""
        if self.world == 1:
            return [value]
        result: list[Any] = [None] * self.world
        dist.all_gather_object(result, value)
        return result


def pick_device(name: str | None) -> torch.device:
    """The named device, or a GPU where there is one. Raises UserError for one that is not."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device", "cuda is not available here", "use --device cpu")
    if name == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(name)


@contextmanager
def processes(device_name: str | None) -> Iterator[Runtime]:
    """Join the processes that torchrun started (one alone otherwise) for the time of a `with`.

    A process that does not answer for DCDET_TIMEOUT seconds (default 600) ends the others.
    """
    device = pick_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world > 1:
        timeout = timedelta(seconds=float(os.environ.get("DCDET_TIMEOUT", 600)))
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout)
    try:
        yield Runtime(device, rank, world)
    except dist.DistBackendError as error:
        raise MachineError(f"rank {rank}: lost another process: {first_line(error)}") from error
    except RuntimeError as error:
        if world > 1 and any(
            word in str(error) for word in ("gloo", "Gloo", "Connection", "Timed out")
        ):
            raise MachineError(f"rank {rank}: lost another process: {first_line(error)}") from error
        raise
    finally:
        if world > 1:
            dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones, instead of giving it back.

    The kernel clears every page it hands out: asking it anew in each step took up to two fifths of
    a training step on a CPU. Without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD; it takes no larger value
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which a forward pass runs in `precision`."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch. Data and sampling do not use these generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The generators' states as plain values and tensors."""
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)
    version, words, gauss_next = random.getstate()
    return {
        "python": [version, list(words), gauss_next],
        "numpy": {**state, "state": {**state["state"], "key": state["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` gave."""
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words), gauss_next))
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})
    torch.set_rng_state(state["torch"])


class Signals:
    """Remembers the first SIGINT, SIGTERM or SIGHUP, so that the loop can stop between steps.

    A second one stops the process at once.
    """

    NAMES = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        for number in self.NAMES:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number
        log.warning("%s: stopping after this step; once more stops at once",
                    signal.Signals(number).name)  # fmt: skip


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Make `path`, check that it can be written, and lock it against a second run."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "a")  # noqa: SIM115
    except OSError as error:
        raise UserError(path, f"cannot be the output folder: {error.strerror}",
                        "choose another with --output") from error  # fmt: skip
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(path, "another run is writing here",
                            "choose another folder with --output") from error  # fmt: skip
        except OSError:
            log.debug("%s: this file system has no locks", path)
        yield path


def strict_json(value: Any) -> str:
    """JSON text; numbers that are not finite become null."""

    def clean(item: Any) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            return None
        if isinstance(item, dict):
            return {key: clean(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [clean(inner) for inner in item]
        return item

    return json.dumps(clean(value), allow_nan=False)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or nothing."""
    name = path.name if len(os.fsencode(path.name)) <= 250 else str(os.getpid())
    temporary = path.with_name(f".{name}.tmp")  # file systems take 255 bytes
    temporary.write_bytes(content)
    os.replace(temporary, path)
