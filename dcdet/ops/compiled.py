"""The compiled kernels of csrc/, where they are installed; without them the ops run on torch.

Both ways give the same numbers, but for rounding. `DCDET_KERNELS=0` switches the kernels off.
"""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("dcdet.ops")

LIBRARY = Path(__file__).resolve().parent.parent / "_C.abi3.so"
VERSION = 1  # the same as in csrc/bindings.cpp
REBUILD = "in the checkout: python -m pip install --no-build-isolation --no-deps --editable ."


def _load(library: Path) -> str:
    """Load the kernels; why that is not so, or ""."""
    if os.environ.get("DCDET_KERNELS") == "0":
        return "switched off by DCDET_KERNELS=0"
    if not library.exists():
        return "not compiled"
    try:
        torch.ops.load_library(str(library))
        version = torch.ops.dcdet_C.version()
    except (OSError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
    else:
        if version == VERSION:
            return ""
        reason = f"version {version} of the kernels, {VERSION} is needed"
    log.warning("the operators run on torch, slower: %s: %s (rebuild %s)", library, reason, REBUILD)
    return reason


missing = _load(LIBRARY)  # why the kernels are not in use, or ""
kernels: Any = torch.ops.dcdet_C


def covers(input: Tensor) -> bool:
    """Whether the kernels take over for `input`'s device and dtype."""
    return (
        not missing and input.device.type == "cpu" and input.dtype in (torch.float32, torch.float64)
    )


def describe() -> str:
    """One line for `dcdet doctor`."""
    if missing:
        return f"kernels: none, the operators run on torch, slower ({missing})"
    names = {64: "AVX512", 32: "AVX2"}
    return f"kernels: compiled for CPU, {names.get(kernels.vector_bytes(), 'baseline')} in use"
