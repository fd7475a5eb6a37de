"""Every op of dcdet.ops goes through torch.compile and torch.export, without a break."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcdet.ops import deform_conv2d, deform_psroi_pool, deform_roi_pool, psroi_pool

pytestmark = pytest.mark.usefixtures("way")

GENERATOR = torch.Generator().manual_seed(0)


def random(*size: int) -> Tensor:
    return torch.randn(*size, generator=GENERATOR)


ROIS = torch.tensor([[0, 1, 2, 40, 50], [1, 0, 0, 90, 30]]).float()

CASES: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {
    "deform_conv2d": (
        lambda x, offset, mask, weight: deform_conv2d(x, offset, weight, padding=1, mask=mask),
        (random(2, 4, 7, 6), random(2, 18, 7, 6), random(2, 9, 7, 6), random(6, 4, 3, 3)),
    ),
    "deform_conv2d v1": (
        lambda x, offset, weight: deform_conv2d(x, offset, weight, padding=1, border="original"),
        (random(2, 4, 7, 6), random(2, 18, 7, 6), random(6, 2, 3, 3)),
    ),
    "psroi_pool": (lambda x: psroi_pool(x, ROIS, 1 / 8, 2, 3, 3), (random(2, 18, 9, 12),)),
    "deform_psroi_pool": (
        lambda x, trans: deform_psroi_pool(x, ROIS, trans, 1 / 8, 2, 3, 3, 3, 2, 0.1),
        (random(2, 18, 9, 12), random(2, 4, 3, 3)),
    ),
    "deform_roi_pool": (
        lambda x, offset, mask: deform_roi_pool(x, ROIS, offset, (3, 2), 1 / 8, mask=mask),
        (random(2, 6, 9, 12), random(2, 2, 3, 2), random(2, 1, 3, 2)),
    ),
}


class Module(nn.Module):
    """A function with the module's form that torch.export wants."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(*tensors) * 2


@pytest.mark.parametrize("name", CASES)
def test_export(name: str) -> None:
    function, tensors = CASES[name]
    module = Module(function)
    exported = torch.export.export(module, tensors).module()
    assert torch.equal(exported(*tensors), module(*tensors))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_compile(name: str, dynamic: bool) -> None:
    """The same values and gradients; sizes may change where they are dynamic."""
    function, tensors = CASES[name]
    torch.compiler.reset()
    # "aot_eager": the graph is made as ever, and run without a compiler.
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    for own, twin in zip(
        torch.autograd.grad(compiled(*leaves).square().sum(), leaves),
        torch.autograd.grad(function(*leaves).square().sum(), leaves),
        strict=True,
    ):
        assert torch.equal(own, twin)
