"""Argument checks of the public ops: one form of message, `OP: NAME must be WANTED, got GOT`.

A wrong type or dtype is a TypeError, a wrong value, shape or device a ValueError.
"""

import math
from typing import cast

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def wrong(op: str, name: str, wanted: str, got: object) -> ValueError:
    """The error for a wrong value."""
    return ValueError(f"{op}: {name} must be {wanted}, got {got}")


def wrong_type(op: str, name: str, wanted: str, got: object) -> TypeError:
    """The error for a wrong type or dtype."""
    return TypeError(f"{op}: {name} must be {wanted}, got {got}")


def tensor(op: str, name: str, value: object, rank: int) -> Tensor:
    """A dense tensor of `rank` dimensions; raises TypeError, ValueError."""
    if not isinstance(value, Tensor):
        raise wrong_type(op, name, "a tensor", type(value).__name__)
    if value.layout != torch.strided:
        raise wrong_type(op, name, "a dense tensor", value.layout)
    if value.dim() != rank:
        raise wrong(op, name, f"a tensor of {rank} dimensions", f"shape {tuple(value.shape)}")
    return value


def floating(op: str, name: str, value: object, rank: int) -> Tensor:
    """A dense floating-point tensor of `rank` dimensions; raises TypeError, ValueError."""
    checked = tensor(op, name, value, rank)
    if checked.dtype not in FLOATS:
        raise wrong_type(op, name, "of a floating-point dtype", checked.dtype)
    return checked


def alike(
    op: str, name: str, value: object, rank: int, input: Tensor, *dtypes: torch.dtype
) -> Tensor:
    """A floating tensor on the input's device, of the input's dtype or of one of `dtypes`.

    Under autocast any floating dtype passes, because the layers before may have cast it.
    """
    checked = floating(op, name, value, rank)
    if checked.device != input.device:
        raise wrong(op, name, f"on the input's device {input.device}", checked.device)
    allowed = (input.dtype, *(dtype for dtype in dtypes if dtype != input.dtype))
    if checked.dtype not in allowed and not torch.is_autocast_enabled(input.device.type):
        raise wrong_type(op, name, " or ".join(str(dtype) for dtype in allowed), checked.dtype)
    return checked


def shape(op: str, name: str, value: Tensor, wanted: tuple[int, ...], legend: str) -> None:
    """`value` has the shape `wanted`, explained by `legend`; raises ValueError."""
    if tuple(value.shape) != wanted:
        raise wrong(op, name, f"of shape {legend} = {wanted}", f"shape {tuple(value.shape)}")


def integer(op: str, name: str, value: object, minimum: int) -> int:
    """An int, or torch.compile's symbol of one, of at least `minimum`; TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise wrong_type(op, name, "an int", repr(value))
    if value < minimum:
        raise wrong(op, name, f"at least {minimum}", value)
    return cast(int, value)


def pair(op: str, name: str, value: object, minimum: int) -> list[int]:
    """An int or a (vertical, horizontal) pair of ints -> the pair; raises TypeError, ValueError."""
    if isinstance(value, tuple | list):
        if len(value) != 2:
            raise wrong(op, name, "an int or a pair of ints", repr(value))
        return [integer(op, name, part, minimum) for part in value]
    return [integer(op, name, value, minimum)] * 2


def number(op: str, name: str, value: object) -> float:
    """A finite number, or torch.compile's symbol of one; raises TypeError, ValueError."""
    if isinstance(value, torch.SymFloat):
        return cast(float, value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(op, name, "a number", repr(value))
    if not -math.inf < value < math.inf:  # math.isfinite would break torch.compile's graph
        raise wrong(op, name, "finite", value)
    return float(value)


def share(op: str, name: str, value: object) -> float:
    """A number from 0 to 1; raises TypeError, ValueError."""
    checked = number(op, name, value)
    if not 0 <= checked <= 1:
        raise wrong(op, name, "in [0, 1]", checked)
    return checked


def scored_boxes(op: str, boxes: object, scores: object) -> None:
    """Floating boxes (N, 4) and scores (N,) on one device; raises TypeError, ValueError."""
    checked = floating(op, "boxes", boxes, 2)
    shape(op, "boxes", checked, (checked.shape[0], 4), "(N, 4)")
    checked_scores = floating(op, "scores", scores, 1)
    shape(op, "scores", checked_scores, (checked.shape[0],), "(N,)")
    if checked_scores.device != checked.device:
        raise wrong(op, "scores", f"on the boxes' device {checked.device}", checked_scores.device)


def labels(op: str, value: object, boxes: Tensor) -> Tensor:
    """Integer labels (N,) on the device of boxes (N, 4); raises TypeError, ValueError."""
    checked = tensor(op, "labels", value, 1)
    if checked.is_floating_point() or checked.is_complex() or checked.dtype == torch.bool:
        raise wrong_type(op, "labels", "of an integer dtype", checked.dtype)
    shape(op, "labels", checked, (boxes.shape[0],), "(N,)")
    if checked.device != boxes.device:
        raise wrong(op, "labels", f"on the boxes' device {boxes.device}", checked.device)
    return checked


def compute_dtype(input: Tensor) -> torch.dtype:
    """The dtype the ops compute in: float64 for float64, else float32."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32
