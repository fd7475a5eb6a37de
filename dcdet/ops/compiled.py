"""The compiled kernels of csrc/, where they are installed; without them the ops run on torch.

Both ways give the same numbers, but for rounding. `DCDET_KERNELS=0` switches the kernels off.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcdet.ops.checks import FLOATS

log = logging.getLogger("dcdet.ops")

LIBRARY = Path(__file__).resolve().parent.parent / "_C.abi3.so"
CUDA_LIBRARY = LIBRARY.with_name("_CUDA.abi3.so")
VERSION = 2  # the same as in csrc/version.h
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
bfloat16: bool = not missing and kernels.has_bfloat16()  # deform_conv2d on this CPU

_library = torch.library.Library("dcdet", "FRAGMENT")


def covers(op: str, input: Tensor) -> bool:
    """Whether a kernel computes `op` on `input`'s device in its dtype.

    Others are computed in float32, by the kernels or on torch. On a GPU the kernels' gradients are
    summed in no fixed order: under `torch.use_deterministic_algorithms(True)` torch computes.
    """
    if missing or input.dtype not in FLOATS:
        return False
    if input.device.type == "cuda":
        return not missing_for_cuda and not torch.are_deterministic_algorithms_enabled()
    if input.device.type != "cpu":
        return False
    if input.dtype == torch.bfloat16:
        return op == "deform_conv2d" and bfloat16
    return input.dtype in (torch.float32, torch.float64)


def below_autocast(op: Callable[..., Any], name: str) -> None:
    """Under autocast, run `op` on its arguments as they are.

    Its public function has chosen their dtypes: autocast would choose one for all of them, or have
    the products inside the operator in another.
    """
    for device in ("cpu", "cuda"):

        def run(*arguments: Any, device: str = device) -> Any:
            with torch.autocast(device, enabled=False):
                return op(*arguments)

        _library.impl(name, run, f"Autocast{device.upper()}")


def describe() -> str:
    """One line for `dcdet doctor`."""
    if missing:
        return f"kernels: none, the operators run on torch, slower ({missing})"
    names = {64: "AVX512", 32: "AVX2"}
    units = names.get(kernels.vector_bytes(), "baseline") + (" and AMX" if bfloat16 else "")
    cuda = f"none ({missing_for_cuda})" if missing_for_cuda else "compiled"
    return f"kernels: compiled for CPU, {units} in use; for CUDA: {cuda}"
