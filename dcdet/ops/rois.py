"""What both position-sensitive RoI ops share: arguments, rounding, groups.

RoIs are rows (batch index, x1, y1, x2, y2) in the 2017 release's inclusive image pixels: a RoI
covers the pixels x1 to x2, both included, so its width is x2 - x1 + 1.

Letters: N images, C = D * g * g channels: output channels D (`output_dim`) times a grid of g x g
groups, R RoIs, p x p bins, bin (i, j) reads group (i * g // p, j * g // p).
"""

import torch
from torch import Tensor

from dcdet.ops import checks


def check_rois(
    op: str,
    input: object,
    rois: object,
    spatial_scale: object,
    output_dim: object,
    group_size: object,
    pooled_size: object,
) -> None:
    """Check the arguments that both ops have; raises TypeError, ValueError."""
    map_ = checks.floating(op, "input", input, 4)
    rows = checks.alike(op, "rois", rois, 2, map_, torch.float32)
    checks.shape(op, "rois", rows, (rows.shape[0], 5), "(R, 5)")
    if checks.number(op, "spatial_scale", spatial_scale) <= 0:
        raise checks.wrong(op, "spatial_scale", "positive", spatial_scale)
    depth = checks.integer(op, "output_dim", output_dim, 1)
    group = checks.integer(op, "group_size", group_size, 1)
    checks.integer(op, "pooled_size", pooled_size, 1)
    if map_.shape[1] != depth * group * group:
        wanted = f"of output_dim * group_size^2 = {depth * group * group} channels"
        raise checks.wrong(op, "input", wanted, f"shape {tuple(map_.shape)}")
    if min(map_.shape[2:]) < 1:
        raise checks.wrong(op, "input", "of at least 1 pixel", f"shape {tuple(map_.shape)}")


def image_indices(op: str, rois: Tensor, images: int) -> Tensor:
    """The RoIs' batch indices (R,) int64; ValueError if one is no whole number in [0, images)."""
    index = rois[:, 0]
    good = (index >= 0) & (index < images) & (index == index.floor())
    if not bool(good.all()):
        first = int((~good).nonzero()[0])
        wanted = f"whole numbers from 0 to {images - 1}" if images else "absent: there is no image"
        raise checks.wrong(op, "batch indices of rois", wanted, f"{index[first].item()} at {first}")
    return index.long()


def round_half_away(x: Tensor) -> Tensor:
    """C's round(): 10.5 -> 11, -20.5 -> -21, where torch.round gives 10 and -20."""
    whole = x.trunc()
    return whole + ((x - whole).abs() >= 0.5) * x.sign()


def groups_of_bins(group_size: int, pooled_size: int, device: torch.device) -> Tensor:
    """The group that each bin along an axis reads: (p,) int64."""
    return torch.arange(pooled_size, device=device) * group_size // pooled_size


def table_of_groups(input: Tensor, classes: int, group_size: int) -> Tensor:
    """input (N, C, H, W) -> rows (N * classes * g * g * H * W, D / classes) and one row of zeros."""
    pixels = input.shape[0] * group_size**2 * input.shape[2] * input.shape[3]
    table = input.new_zeros(pixels * classes + 1, input.shape[1] // (classes * group_size**2))
    _as_map(table, input.shape, classes, group_size).copy_(_split(input, classes, group_size))
    return table


def map_of_groups(table: Tensor, shape: torch.Size, classes: int, group_size: int) -> Tensor:
    """The inverse of `table_of_groups`: rows -> (N, C, H, W) of the given shape."""
    output = table.new_empty(shape)
    _split(output, classes, group_size).copy_(_as_map(table, shape, classes, group_size))
    return output


def _split(input: Tensor, classes: int, group_size: int) -> Tensor:
    images, _, height, width = input.shape
    return input.reshape(images, classes, -1, group_size**2, height * width)


def _as_map(table: Tensor, shape: torch.Size, classes: int, group_size: int) -> Tensor:
    images, _, height, width = shape
    split = (images, classes, group_size**2, height * width, table.shape[1])
    return table[:-1].view(split).permute(0, 1, 4, 2, 3)
