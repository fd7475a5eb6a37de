"""The compiled kernels of csrc/, where they are installed; without them the ops run on torch.

Both ways give the same numbers, but for rounding. `DCDET_KERNELS=0` switches the kernels off.
"""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcdet.ops.checks import FLOATS

log = logging.getLogger("dcdet.ops")

LIBRARY = Path(__file__).resolve().parent.parent / "_C.abi3.so"
CUDA_LIBRARY = LIBRARY.with_name("_CUDA.abi3.so")
VERSION = 1  # the same as in csrc/version.h
REBUILD = "in the checkout: python -m pip install --no-build-isolation --no-deps --editable ."


def _load(library: Path, name: str = "dcdet_C") -> str:
    """Load the kernels; why that is not so, or ""."""
    if os.environ.get("DCDET_KERNELS") == "0":
        return "switched off by DCDET_KERNELS=0"
    if not library.exists():
        return "not compiled"
    try:
        torch.ops.load_library(str(library))
        version = getattr(torch.ops, name).version()
    except (OSError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
    else:
        if version == VERSION:
            return ""
        reason = f"version {version} of the kernels, {VERSION} is needed"
    log.warning("the operators run on torch, slower: %s: %s (rebuild %s)", library, reason, REBUILD)
    return reason


def _load_for_cuda() -> str:
    """The same for a GPU. Its kernels take the CPU library's schemas."""
    if missing:
        return missing
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    return _load(CUDA_LIBRARY, "dcdet_CUDA")


missing = _load(LIBRARY)  # why the kernels are not in use, or ""
missing_for_cuda = _load_for_cuda()
kernels: Any = torch.ops.dcdet_C


def covers(input: Tensor) -> bool:
    """Whether the kernels take over for `input`'s device and dtype.

    On a GPU they take the half types as they are; offsets, masks and positions must then be float32
    (float64 for a float64 input).
    """
    if input.device.type == "cpu":
        return not missing and input.dtype in (torch.float32, torch.float64)
    there = not missing and not missing_for_cuda
    return there and input.device.type == "cuda" and input.dtype in FLOATS


def covers_backward(input: Tensor) -> bool:
    """Whether the kernels compute gradients, too.

    On a GPU they add in no fixed order, which `torch.use_deterministic_algorithms(True)` forbids.
    """
    ordered = input.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled()
    return covers(input) and ordered


def describe() -> str:
    """One line for `dcdet doctor`."""
    if missing:
        return f"kernels: none, the operators run on torch, slower ({missing})"
    names = {64: "AVX512", 32: "AVX2"}
    cpu = f"compiled for CPU, {names.get(kernels.vector_bytes(), 'baseline')} in use"
    cuda = "compiled" if not missing_for_cuda else f"none ({missing_for_cuda})"
    return f"kernels: {cpu}; for CUDA: {cuda}"
