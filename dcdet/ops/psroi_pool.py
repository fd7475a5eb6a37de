"""Position-sensitive RoI pooling (R-FCN); letters and RoIs as in rois.py.

Bins have whole-pixel edges; a bin is the mean of its cells, an empty one is 0. A RoI with a NaN
coordinate gives NaN; infinite ones count as huge.
Sources: Dai et al., R-FCN, 2016; `psroi_pooling.cu` of the 2017 release.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdet.ops import checks, compiled
from dcdet.ops.rois import (
    check_rois,
    groups_of_bins,
    image_indices,
    layout_of,
    map_of_groups,
    spans,
    table_of_groups,
)
from dcdet.ops.rows import scatter_rows

OP = "psroi_pool"

# Cells listed at once; a cell takes about 40 bytes.
CELLS = 4 << 20


def psroi_pool(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    output_dim: int,
    group_size: int,
    pooled_size: int,
) -> Tensor:
    """Pool each RoI to p x p bins, each bin from its own group of channels.

    Shapes: input (N, D * g * g, H, W), rois (R, 5) -> (R, D, p, p) in the input's dtype. RoIs get
    no gradient. `spatial_scale` is map pixels per image pixel. Raises TypeError and ValueError,
    naming the argument.
    """
    check_rois(OP, input, rois, spatial_scale, output_dim, group_size, pooled_size)
    positions = checks.compute_dtype(input)
    output: Tensor = _psroi_pool(
        input if compiled.covers(OP, input) else input.to(positions),
        rois.to(positions),
        float(spatial_scale),
        output_dim,
        group_size,
        pooled_size,
    )
    return output.to(input.dtype)


class _Cells(NamedTuple):
    """The cells of a run of bins.

    `rows` (E,) of the table, bin after bin; `starts` tells where each bin begins, `owners` (E,) to
    which bin of the run a cell belongs.
    """

    bins: slice
    rows: Tensor
    starts: Tensor
    owners: Tensor


class _Bins:
    """The bins of all RoIs, R * p * p of them, in the order of the output's rows."""

    def __init__(
        self, shape: torch.Size, rois: Tensor, scale: float, group_size: int, pooled_size: int
    ) -> None:
        self.height, self.width = shape[2:]
        self.pooled, self.group_size = pooled_size, group_size
        self.broken = rois.isnan().any(1)
        self.images = image_indices(OP, rois, shape[0])
        bins = torch.arange(pooled_size, device=rois.device, dtype=rois.dtype)
        start, end = (edge[..., None] for edge in spans(rois, scale))
        bin_size = (end - start).clamp(min=0.1) / pooled_size
        size = torch.tensor([[[self.height]], [[self.width]]], device=rois.device)
        first = (bins * bin_size + start).floor().clamp(min=0).minimum(size)
        last = ((bins + 1) * bin_size + start).ceil().clamp(min=0).minimum(size)
        real = last > first  # false where they are NaN
        top, left = torch.where(real, first, 0).long()
        rows, columns = torch.where(real, last - first, 0).long()
        self.edges = torch.stack([top, top + rows, left, left + columns])
        self.areas = rows[:, :, None] * columns[:, None]

    def runs(self) -> Iterator[_Cells]:
        """The cells of all bins, a few RoIs at a time; work a RoI is bounded by the map's size."""
        top, _, left, right = self.edges
        columns = (right - left)[:, None].expand_as(self.areas)
        group = groups_of_bins(self.group_size, self.pooled, top.device)
        groups = (self.images[:, None, None] * self.group_size + group[:, None]) * self.group_size
        firsts = ((groups + group) * self.height + top[:, :, None]) * self.width + left[:, None]
        most = (self.height + 2 * self.pooled) * (self.width + 2 * self.pooled)
        step = max(1, CELLS // most)
        for begin in range(0, self.areas.shape[0], step):
            areas = self.areas[begin : begin + step].reshape(-1)
            first = firsts[begin : begin + step].reshape(-1)
            starts = areas.cumsum(0) - areas
            owners = torch.repeat_interleave(areas)
            place = torch.arange(owners.shape[0], device=owners.device) - starts[owners]
            wide = columns[begin : begin + step].reshape(-1)[owners]
            rows = first[owners] + place // wide * self.width + place % wide
            bins = slice(begin * self.pooled**2, begin * self.pooled**2 + areas.shape[0])
            yield _Cells(bins, rows, starts, owners)


@torch.library.custom_op("dcdet::psroi_pool", mutates_args=())
def _psroi_pool(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    output_dim: int,
    group_size: int,
    pooled_size: int,
) -> Tensor:
    check_rois(OP, input, rois, spatial_scale, output_dim, group_size, pooled_size)
    bins = _Bins(input.shape, rois, spatial_scale, group_size, pooled_size)
    if compiled.covers(OP, input):
        pooled = compiled.kernels.psroi_pool(input, bins.images, bins.edges, group_size)
        if bins.broken.any():
            pooled[bins.broken] = torch.nan
        return pooled
    if input.dtype != rois.dtype:
        wide = input.to(rois.dtype)
        pooled = _psroi_pool(wide, rois, spatial_scale, output_dim, group_size, pooled_size)
        return pooled.to(input.dtype)
    table = table_of_groups(input, 1, group_size)
    output = input.new_zeros(bins.areas.numel(), output_dim)
    for run in bins.runs():
        if run.rows.numel():
            output[run.bins] = F.embedding_bag(run.rows, table, run.starts, mode="sum")
    output = output.view(-1, pooled_size, pooled_size, output_dim)
    output /= bins.areas.clamp(min=1)[..., None]
    output[bins.broken] = torch.nan
    return output.permute(0, 3, 1, 2).contiguous()


@torch.library.custom_op("dcdet::psroi_pool_backward", mutates_args=())
def _psroi_pool_backward(
    grad: Tensor,
    rois: Tensor,
    input_shape: list[int],
    spatial_scale: float,
    group_size: int,
    pooled_size: int,
    channels_last: bool,
) -> Tensor:
    """The gradient of the input, in channels_last memory if so wanted."""
    depth = grad.shape[1]
    check_rois(OP, input_shape, rois, spatial_scale, depth, group_size, pooled_size, grad)
    shape = torch.Size(input_shape)
    bins = _Bins(shape, rois, spatial_scale, group_size, pooled_size)
    if compiled.covers(OP, grad):
        geometry = (bins.images, bins.edges, input_shape, group_size, channels_last)
        return compiled.kernels.psroi_pool_backward(grad, *geometry)
    if grad.dtype != rois.dtype:  # the kernels were there in the forward pass
        rest = (input_shape, spatial_scale, group_size, pooled_size, channels_last)
        return _psroi_pool_backward(grad.to(rois.dtype), rois, *rest).to(grad.dtype)
    shares = grad.permute(0, 2, 3, 1) / bins.areas.clamp(min=1)[..., None]
    shares = shares.reshape(-1, grad.shape[1])
    grad_input = grad.new_zeros(shape)
    grad_table = table_of_groups(grad_input, 1, group_size)
    for run in bins.runs():
        scatter_rows(shares[run.bins], run.rows, run.owners, None, grad_table)
    grad_input = map_of_groups(grad_table, grad_input, 1, group_size)
    return grad_input.contiguous(memory_format=_format(channels_last))


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


@_psroi_pool.register_fake
def _(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    output_dim: int,
    group_size: int,
    pooled_size: int,
) -> Tensor:
    check_rois(OP, input, rois, spatial_scale, output_dim, group_size, pooled_size)
    return input.new_empty(rois.shape[0], output_dim, pooled_size, pooled_size)


@_psroi_pool_backward.register_fake
def _(
    grad: Tensor,
    rois: Tensor,
    input_shape: list[int],
    spatial_scale: float,
    group_size: int,
    pooled_size: int,
    channels_last: bool,
) -> Tensor:
    depth = grad.shape[1]
    check_rois(OP, input_shape, rois, spatial_scale, depth, group_size, pooled_size, grad)
    return grad.new_empty(input_shape).contiguous(memory_format=_format(channels_last))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, rois, spatial_scale, _, group_size, pooled_size = inputs
    ctx.save_for_backward(rois)
    channels_last = layout_of(input) == torch.channels_last
    ctx.geometry = list(input.shape), spatial_scale, group_size, pooled_size, channels_last


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_input = _psroi_pool_backward(grad, *ctx.saved_tensors, *ctx.geometry)
    return grad_input, None, None, None, None, None


_psroi_pool.register_autograd(_backward, setup_context=_save)
compiled.below_autocast(_psroi_pool, "psroi_pool")
compiled.below_autocast(_psroi_pool_backward, "psroi_pool_backward")
