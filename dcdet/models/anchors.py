"""Anchor boxes. A anchors a cell, N = H * W * A anchors a level."""

import torch
from torch import Tensor


def cell_anchors(stride: int, scales: list[float], ratios: list[float]) -> Tensor:
    """Anchors of the cell at the origin: (A, 4) float64, ratio outermost, then scale.

    `ratios` are height / width, `scales` multiply the stride. Width and height at scale 1 are
    rounded to whole pixels, half to even. Source: lib/rpn/generate_anchor.py of the 2017 release.
    """
    ratio = torch.tensor(ratios, dtype=torch.float64)
    width = (stride * stride / ratio).sqrt().round()
    height = (width * ratio).round()
    scale = torch.tensor(scales, dtype=torch.float64)
    half = 0.5 * torch.stack([width, height], dim=1)[:, None, :] * scale[None, :, None]
    return torch.cat([stride / 2 - half, stride / 2 + half], dim=-1).reshape(-1, 4)


def grid_anchors(cell: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """The anchors (A, 4) of one cell at every cell of a map of `size` (h, w) -> (H, W, A, 4)."""
    y = torch.arange(size[0], device=cell.device, dtype=cell.dtype) * stride
    x = torch.arange(size[1], device=cell.device, dtype=cell.dtype) * stride
    shift_y, shift_x = torch.meshgrid(y, x, indexing="ij")
    shift = torch.stack([shift_x, shift_y, shift_x, shift_y], dim=-1)
    return shift[:, :, None, :] + cell
