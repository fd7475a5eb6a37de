"""Anchor boxes. A anchors a cell, N = H * W * A anchors a level."""

from typing import Literal

import torch
from torch import Tensor

Rule = Literal["release", "mmdetection", "torchvision"]


def cell_anchors(
    stride: int, scales: list[float], ratios: list[float], rule: Rule = "release"
) -> Tensor:
    """Anchors of the cell at the origin: (A, 4) float64, ratio outermost, then scale.

    `ratios` are height / width, `scales` multiply the stride. By `rule`:

    * "release": around the cell's middle; width and height at scale 1 are rounded to whole pixels,
      half to even. Source: lib/rpn/generate_anchor.py of the 2017 release.
    * "mmdetection", and detectron2: around the cell's corner, nothing rounded.
    * "torchvision": around the cell's corner, corners rounded to whole pixels, half to even.
    """
    ratio = torch.tensor(ratios, dtype=torch.float64)
    width = (stride * stride / ratio).sqrt()
    height = width * ratio
    centre = 0.0
    if rule == "release":
        width = width.round()
        height, centre = (width * ratio).round(), stride / 2
    scale = torch.tensor(scales, dtype=torch.float64)
    half = 0.5 * torch.stack([width, height], dim=1)[:, None, :] * scale[None, :, None]
    if rule == "torchvision":
        half = half.round()
    return torch.cat([centre - half, centre + half], dim=-1).reshape(-1, 4)


def grid_anchors(cell: Tensor, stride: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The anchors (A, 4) of one cell at every cell of a map of `size` (h, w) -> (H, W, A, 4).

    `stride` is from cell to cell, (y, x), in pixels.
    """
    y = torch.arange(size[0], device=cell.device, dtype=cell.dtype) * stride[0]
    x = torch.arange(size[1], device=cell.device, dtype=cell.dtype) * stride[1]
    shift_y, shift_x = torch.meshgrid(y, x, indexing="ij")
    shift = torch.stack([shift_x, shift_y, shift_x, shift_y], dim=-1)
    return shift[:, :, None, :] + cell
