"""What the tests of the ops share: golden cases, numbers that break things, comparison."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from dcdet.ops import compiled

HOSTILE = [torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 2.0**31, -(2.0**31), 1e9, 3e38, -3e38]

# Whole numbers, halves and the borders are where rules differ; the rest is anywhere.
positions = st.one_of(
    st.integers(-6, 12).map(float),
    st.integers(-12, 24).map(lambda n: n / 2),
    st.floats(-8, 14, width=32),
)

LAYOUTS = ("contiguous", "channels_last", "transposed", "expanded", "sliced")


def golden(shared: Path, prefix: str) -> list[tuple[str, dict[str, Any], dict[str, Tensor]]]:
    """The recorded cases of one op: (name, attributes, arrays)."""
    cases = []
    for path in sorted((shared / "golden" / "ops").glob(f"{prefix}*.npz")):
        arrays = dict(np.load(path))
        attributes = json.loads(str(arrays.pop("attrs")))
        cases.append((path.stem, attributes, {k: torch.from_numpy(v) for k, v in arrays.items()}))
    assert cases, f"no golden cases {prefix}*"
    return cases


def golden_mmdet(shared: Path, prefix: str) -> dict[str, Tensor]:
    """The arrays of mmdetection's recorded ops whose names begin so, without the prefix."""
    path = shared / "golden_mmdet" / "ops.npz"
    if not path.exists():
        pytest.skip(f"no golden values at {path}")
    arrays = {k: torch.from_numpy(v) for k, v in np.load(path).items()}
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def leaf(value: Tensor | None) -> Tensor | None:
    """A copy that collects a gradient, in the same layout."""
    return None if value is None else value.detach().clone().requires_grad_()


def gradients(output: Tensor, grad: Tensor, inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients of the inputs that are there."""
    return list(torch.autograd.grad(output, [i for i in inputs if i is not None], grad))


def whole_numbers(like: Tensor) -> Tensor:
    """A gradient of small whole numbers, the same in every dtype."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-9, 10, like.shape, generator=generator).to(like)


def laid_out(value: Tensor, layout: str) -> Tensor:
    """The same numbers in other strides."""
    if layout == "channels_last" and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and value.dim() > 1:
        return value.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":
        return value[:1].expand_as(value)  # one stride of zero: the numbers of the first row
    if layout == "sliced":
        wide = torch.full((*value.shape[:-1], 2 * value.shape[-1] + 3), torch.nan).to(value)
        wide[..., 3::2] = value
        return wide[..., 3::2]
    return value


def same(one: Tensor, other: Tensor, tolerance: float) -> None:
    """Equal within the tolerance, NaN where the other is NaN."""
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


@contextlib.contextmanager
def way(name: str) -> Iterator[None]:
    """Run the ops on the "compiled" kernels or on "torch"; skips where there are no kernels."""
    if name == "compiled" and compiled.missing:
        pytest.skip(f"kernels: {compiled.missing}")
    with pytest.MonkeyPatch.context() as patch:
        if name == "torch":
            patch.setattr(compiled, "missing", "switched off by a test")
        yield


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
