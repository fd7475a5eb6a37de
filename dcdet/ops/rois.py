"""What both position-sensitive RoI ops share: arguments, rounding, groups.

RoIs are rows (batch index, x1, y1, x2, y2) in the 2017 release's inclusive image pixels: a RoI
covers the pixels x1 to x2, both included, so its width is x2 - x1 + 1.

Letters: N images, C = D * g * g channels: output channels D (`output_dim`) times a grid of g x g
groups, R RoIs, p x p bins, bin (i, j) reads group (i * g // p, j * g // p).
"""

import torch
from torch import Tensor

from dcdet.ops import checks

# Where coordinates and shifts are clamped to stay finite: farther out than any image reaches.
HUGE = 1e9


def check_rois(
    op: str,
    input: object,
    rois: object,
    spatial_scale: object,
    output_dim: object,
    group_size: object,
    pooled_size: object,
    grad: object = None,
) -> None:
    """Check the arguments that both ops have; raises TypeError, ValueError.

    For a backward pass `grad` is the pooled gradient, and `input` may be the input's shape alone.
    """
    if isinstance(input, list):
        like = checks.floating(op, "grad", grad, 4)
        if len(input) != 4:
            raise checks.wrong(op, "input_shape", "of 4 dimensions", input)
        shape = tuple(input)
    else:
        like = checks.floating(op, "input", input, 4)
        shape = tuple(like.shape)
    rows = checks.alike(op, "rois", rois, 2, like, torch.float32)
    checks.shape(op, "rois", rows, (rows.shape[0], 5), "(R, 5)")
    if checks.number(op, "spatial_scale", spatial_scale) <= 0:
        raise checks.wrong(op, "spatial_scale", "positive", spatial_scale)
    depth = checks.integer(op, "output_dim", output_dim, 1)
    group = checks.integer(op, "group_size", group_size, 1)
    pooled = checks.integer(op, "pooled_size", pooled_size, 1)
    if shape[1] != depth * group * group:
        wanted = f"of output_dim * group_size^2 = {depth * group * group} channels"
        raise checks.wrong(op, "input", wanted, f"shape {shape}")
    if min(shape[2:]) < 1:
        raise checks.wrong(op, "input", "of at least 1 pixel", f"shape {shape}")
    if grad is not None:
        pooled_grad = checks.alike(op, "grad", grad, 4, like)
        wanted_shape = (rows.shape[0], depth, pooled, pooled)
        checks.shape(op, "grad", pooled_grad, wanted_shape, "(R, output_dim, p, p)")


def image_indices(op: str, rois: Tensor, images: int) -> Tensor:
    """The RoIs' batch indices (R,) int64; ValueError if one is no whole number in [0, images)."""
    index = rois[:, 0]
    good = (index >= 0) & (index < images) & (index == index.floor())
    if not bool(good.all()):
        first = int((~good).nonzero()[0])
        wanted = f"whole numbers from 0 to {images - 1}" if images else "absent: there is no image"
        raise checks.wrong(op, "batch indices of rois", wanted, f"{index[first].item()} at {first}")
    return index.long()


def spans(rois: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Starts and ends of the RoIs on the map, (2, R) each, y first.

    The order of the roundings is the release's. Infinite coordinates count as huge: no infinity
    can meet a zero later on.
    """
    x1, y1, x2, y2 = round_half_away(rois[:, 1:].clamp(-HUGE, HUGE)).unbind(1)
    return torch.stack([y1, x1]) * scale, (torch.stack([y2, x2]) + 1) * scale


def round_half_away(x: Tensor) -> Tensor:
    """C's round(): 10.5 -> 11, -20.5 -> -21, where torch.round gives 10 and -20."""
    whole = x.trunc()
    return whole + ((x - whole).abs() >= 0.5) * x.sign()


def groups_of_bins(group_size: int, pooled_size: int, device: torch.device) -> Tensor:
    """The group that each bin along an axis reads: (p,) int64."""
    return torch.arange(pooled_size, device=device) * group_size // pooled_size


def table_of_groups(input: Tensor, blocks: int, group_size: int) -> Tensor:
    """input (N, C, H, W) -> rows (N * blocks * g * g * H * W, D / blocks)."""
    split = _split(input, blocks, group_size).permute(0, 1, 3, 4, 2).contiguous()
    return split.view(-1, split.shape[4])


def map_of_groups(table: Tensor, input: Tensor, blocks: int, group_size: int) -> Tensor:
    """The inverse of `table_of_groups`: rows -> the shape of `input`."""
    split = _split(input, blocks, group_size).permute(0, 1, 3, 4, 2)
    return table.view(split.shape).permute(0, 1, 4, 2, 3).reshape_as(input)


def layout_of(input: Tensor) -> torch.memory_format:
    """The memory format of `input`'s gradient: channels_last where the input lies so."""
    by_pixel = input.is_contiguous(memory_format=torch.channels_last)
    return (
        torch.channels_last if by_pixel and not input.is_contiguous() else torch.contiguous_format
    )


def _split(input: Tensor, blocks: int, group_size: int) -> Tensor:
    images, channels, height, width = input.shape
    depth = channels // (blocks * group_size**2)
    return input.reshape(images, blocks, depth, group_size**2, height * width)
