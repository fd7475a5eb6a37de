"""What every test file shares."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import op_cases
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(2)
# A shell's background job has it ignored, and so would the children that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Timings vary on shared machines, so there is no deadline; CI repeats the same examples.
hypothesis.settings.register_profile(
    "dcdet", deadline=None, derandomize="CI" in os.environ, print_blob=True
)
hypothesis.settings.load_profile("dcdet")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden values and small data sets; DCDET_SHARED names it."""
    folder = Path(os.environ.get("DCDET_SHARED", ROOT.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"no golden values at {folder} (set DCDET_SHARED)")
    return folder


@pytest.fixture(scope="module", params=["compiled", "torch"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """The tests of an op's file run on the compiled kernels and on torch."""
    with op_cases.way(request.param):
        yield request.param
