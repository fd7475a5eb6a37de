"""Deformable position-sensitive RoI pooling; letters and RoIs as in rois.py.

Conventions:

* A RoI spans round(x1) * scale - 0.5 to (round(x2) + 1) * scale - 0.5 on the map, at least 0.1. A
  bin is sampled at n x n points, the left and top edges of its n x n parts.
* `trans` is (R, 2 * K, part, part) for K classes: channel 2k is the **x** shift of class k, 2k + 1
  its y shift (the other way round than in convolutions), in units of trans_std * RoI size. Output
  channel d belongs to class d // (D / K).
* A sample outside [-0.5, W - 0.5] is dropped; the others are clamped to [0, W - 1] and read
  bilinearly. A bin is the mean of its samples, 0 without any.
* A shift's gradient is the bilinear slope, 0 along an axis where the clamped position is a whole
  number. RoIs get no gradient.
* A NaN in RoI or shift gives NaN; infinite ones count as huge.

Sources: Dai et al., Deformable Convolutional Networks, 2017; `deformable_psroi_pooling.cu` of the
2017 release.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdet.ops import checks, compiled
from dcdet.ops.rois import (
    HUGE,
    check_rois,
    groups_of_bins,
    image_indices,
    layout_of,
    map_of_groups,
    spans,
    table_of_groups,
)
from dcdet.ops.rows import gather_rows, index_dtype, row_dots, scatter_rows

OP = "deform_psroi_pool"

# Corners that are listed at once; a corner takes about 40 bytes.
CORNERS = 1 << 20

# Bins that are read at once where each has its own shift. A CPU wants their tensors to stay in
# cache; a GPU wants few, large steps.
BINS = {"cpu": 1 << 16, "cuda": 1 << 22}


def deform_psroi_pool(
    input: Tensor,
    rois: Tensor,
    trans: Tensor | None,
    spatial_scale: float,
    output_dim: int,
    group_size: int,
    pooled_size: int,
    part_size: int,
    sample_per_part: int,
    trans_std: float,
) -> Tensor:
    """Pool each RoI to p x p bins, each moved by its own shift.

    Shapes: input (N, D * g * g, H, W), rois (R, 5), trans (R, 2 * K, part, part) or None for no
    shifts -> (R, D, p, p) in the input's dtype. `part_size` 0 means pooled_size; `sample_per_part`
    is n. Raises TypeError and ValueError, naming the argument.
    """
    checks.integer(OP, "part_size", part_size, 0)
    grid = [output_dim, group_size, pooled_size, part_size or pooled_size, sample_per_part]
    _check(input, rois, trans, grid, spatial_scale, trans_std)
    positions = checks.compute_dtype(input)
    output: Tensor = _deform_psroi_pool(
        input if compiled.covers(OP, input) else input.to(positions),
        rois.to(positions),
        None if trans is None else trans.to(positions),
        grid,
        float(spatial_scale),
        float(trans_std),
    )
    return output.to(input.dtype)


def shifted_parts(rois: Tensor, shifts: Tensor, spatial_scale: float, trans_std: float) -> Tensor:
    """The boxes that the bins of RoIs (R, 5) are read from, in the RoIs' image pixels.

    `shifts` (R, 2, p, p) are those of one class, x first -> boxes (R, p, p, 4), continuous xyxy.
    """
    start, end = (edge.t() / spatial_scale for edge in spans(rois, spatial_scale))
    size = (end - start).clamp(min=0.1 / spatial_scale).flip(1)[:, None, None]  # x first
    bins = torch.arange(shifts.shape[2], device=rois.device)
    column_and_row = torch.stack(torch.meshgrid(bins, bins, indexing="xy"), dim=-1)
    bin_size = size / len(bins)
    corner = start.flip(1)[:, None, None] + column_and_row * bin_size
    corner = corner + shifts.permute(0, 2, 3, 1) * trans_std * size
    return torch.cat([corner, corner + bin_size], dim=-1)


def _check(
    input: Tensor,
    rois: Tensor,
    trans: Tensor | None,
    grid: list[int],
    scale: float,
    std: float,
    grad: Tensor | None = None,
) -> None:
    """What the public function, the operator, its backward and its fake kernel all ask for."""
    if len(grid) != 5:
        raise checks.wrong(OP, "grid", "of 5 ints", grid)
    output_dim, group_size, pooled_size, part, samples = grid
    check_rois(OP, input, rois, scale, output_dim, group_size, pooled_size, grad)
    checks.integer(OP, "part_size", part, 1)
    checks.integer(OP, "sample_per_part", samples, 1)
    checks.number(OP, "trans_std", std)
    if trans is not None:
        checks.alike(OP, "trans", trans, 4, input, torch.float32)
        classes = trans.shape[1] // 2
        if classes < 1 or output_dim % classes:
            wanted = f"of 2 * K channels, K a divisor of output_dim = {output_dim}"
            raise checks.wrong(OP, "trans", wanted, f"shape {tuple(trans.shape)}")
        wanted_shape = (rois.shape[0], 2 * classes, part, part)
        checks.shape(OP, "trans", trans, wanted_shape, "(R, 2 * K, part, part)")


class _Corners(NamedTuple):
    """What bins read along both axes, y first: n samples of two corners, the lower ones first.

    `cells` and `weights` are (2, 2n, ...); `kept` (...) is the number of samples in use, at least
    1, and NaN where a position is.
    """

    cells: Tensor
    weights: Tensor
    kept: Tensor


class _Pooling:
    """One call's geometry.

    `first` (2, R, K, p, p) is the position of each bin's first sample, y first; `step` and `size`
    (2, R, 1, 1, 1) are the distance to the next sample and the RoI's size. `images` (R,) are the
    RoIs' batch indices.

    The map gets one pixel of zeros to the right and below, where dropped samples go. `table` holds
    it as rows of D channels where all channels share their positions (`blocks` = 1), else as D
    planes a group, of rows of a single number (`blocks` = D). Both are made when torch needs them:
    a compiled kernel does not.
    """

    def __init__(
        self,
        input: Tensor,
        rois: Tensor,
        trans: Tensor | None,
        grid: list[int],
        scale: float,
        std: float,
    ) -> None:
        self.input = input
        self.depth, self.group_size, self.pooled, part_size, self.samples = grid
        self.images = image_indices(OP, rois, input.shape[0])
        self.classes = 1 if trans is None else trans.shape[1] // 2
        self.blocks = 1 if self.classes == 1 else self.depth
        self.groups = groups_of_bins(self.group_size, self.pooled, rois.device)

        start, end = (edge[..., None, None, None] - 0.5 for edge in spans(rois, scale))
        self.size = (end - start).clamp(min=0.1)
        bins = torch.arange(self.pooled, device=rois.device)
        places = torch.stack(torch.meshgrid(bins, bins, indexing="ij"))[:, None, None]
        bin_size = self.size / self.pooled
        self.step = bin_size / self.samples
        self.first = places * bin_size + start
        # float32 whatever the input is: the release's part of a bin depends on its rounding
        self.part = (bins.float() / self.pooled * part_size).long()
        if trans is not None:
            shifts = trans[..., self.part[:, None], self.part].clamp(-HUGE, HUGE)
            shifts = shifts.unflatten(1, (self.classes, 2)).permute(2, 0, 1, 3, 4).flip(0)
            self.first = self.first + shifts * std * self.size

    @cached_property
    def padded(self) -> Tensor:
        return F.pad(self.input, (0, 1, 0, 1))

    @cached_property
    def table(self) -> Tensor:
        return table_of_groups(self.padded, self.blocks, self.group_size)

    @property
    def index_type(self) -> torch.dtype:
        return index_dtype(self.table.shape[0]) if self.blocks == 1 else torch.int64

    def for_kernel(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """What a compiled kernel takes of it."""
        return self.images, self.first, self.step.flatten(1), self.group_size, self.samples

    def corners(self, first: Tensor, step: Tensor) -> _Corners:
        """The corners of bins whose first samples and steps are (2, ...) and broadcast."""
        height, width = self.padded.shape[2:]
        ones = [1] * (first.dim() - 1)
        size = torch.tensor([height - 1, width - 1], device=first.device).view(2, 1, *ones)
        sample = torch.arange(self.samples, device=first.device).view(-1, *ones)
        position = first[:, None] + sample * step[:, None]
        kept = (position >= -0.5) & (position <= size - 0.5)
        count = torch.where(position.isnan(), torch.nan, kept.to(position.dtype)).sum(1).prod(0)
        position = torch.where(kept, position.clamp(min=0).minimum(size - 1), size)
        low, fraction = position.floor(), position - position.floor()
        cells = torch.cat([low, position.ceil()], 1).to(self.index_type)
        weights = torch.cat([1 - fraction, fraction], 1)
        return _Corners(cells, weights, count.clamp(min=1))

    def grad_input(self, grad_table: Tensor) -> Tensor:
        """The table's gradient -> the input's."""
        padded = map_of_groups(grad_table, self.padded, self.blocks, self.group_size)
        return padded[..., :-1, :-1].contiguous(memory_format=layout_of(self.input))

    def grad_trans(self, grad_first: Tensor, trans: Tensor, std: float) -> Tensor:
        """Gradients of the first positions (2, R, blocks, p, p) -> (R, 2 * K, part, part)."""
        grad = grad_first * std * self.size
        grad = grad.unflatten(2, (self.classes, -1)).sum(3).flip(0).permute(1, 2, 0, 3, 4)
        parts = torch.arange(trans.shape[2], device=trans.device)
        member = (self.part[:, None] == parts).to(grad.dtype)
        return member.t() @ grad.flatten(1, 2) @ member


def _runs(total: int, each: int, limit: int) -> Iterator[slice]:
    """Slices of `total` things such that the things' `each` numbers stay below `limit`."""
    step = max(1, limit // each)
    for begin in range(0, total, step):
        yield slice(begin, min(begin + step, total))


# Where all channels share their positions, rows.py does the work: a bin is a sum of rows.


class _Entries(NamedTuple):
    """The table rows that b bins read: `rows` and `weights` (b, 4n^2), corners y outermost.

    `weight_y` and `weight_x` (b, 2n) are the weights' factors, `kept` (b, 1) as in _Corners.
    """

    rows: Tensor
    weights: Tensor
    weight_y: Tensor
    weight_x: Tensor
    kept: Tensor


def _roi_runs(pooling: _Pooling) -> Iterator[slice]:
    corners = pooling.pooled**2 * (2 * pooling.samples) ** 2
    return _runs(pooling.images.shape[0], corners, CORNERS)


def _entries(pooling: _Pooling, run: slice) -> _Entries:
    first = pooling.first[:, run]
    step = pooling.step[:, run].expand_as(first)
    corners = pooling.corners(first.flatten(1), step.flatten(1))
    y, x = corners.cells.transpose(1, 2).contiguous()
    weight_y, weight_x = corners.weights.transpose(1, 2).contiguous()
    block = pooling.images[run, None, None] * pooling.group_size + pooling.groups[:, None]
    block = (block * pooling.group_size + pooling.groups).view(-1, 1).to(y.dtype)
    height, width = pooling.padded.shape[2:]
    rows = ((block * height + y) * width)[:, :, None] + x[:, None]
    weights = weight_y[:, :, None] * weight_x[:, None]
    return _Entries(rows.flatten(1), weights.flatten(1), weight_y, weight_x, corners.kept[:, None])


def _rows_forward(pooling: _Pooling) -> Tensor:
    bins = (pooling.images.shape[0], pooling.pooled, pooling.pooled, pooling.depth)
    output = pooling.table.new_empty(bins)
    for run in _roi_runs(pooling):
        entries = _entries(pooling, run)
        sums = gather_rows(pooling.table, entries.rows, entries.weights)
        output[run] = (sums / entries.kept).view(-1, *bins[1:])
    return output.permute(0, 3, 1, 2).contiguous()


def _rows_backward(pooling: _Pooling, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the table and of `pooling.first`."""
    grad_table, grad_first = torch.zeros_like(pooling.table), torch.empty_like(pooling.first)
    for run in _roi_runs(pooling):
        entries = _entries(pooling, run)
        share = grad[run].permute(0, 2, 3, 1).reshape(-1, pooling.depth) / entries.kept
        owners = torch.arange(entries.rows.numel(), device=grad.device) // entries.rows.shape[1]
        scatter_rows(share, entries.rows.view(-1), owners, entries.weights.view(-1), grad_table)
        dots = row_dots(share, pooling.table, entries.rows)
        dots = dots.view(-1, *[2 * pooling.samples] * 2)
        lower_y, upper_y = (dots * entries.weight_x[:, None]).sum(2).chunk(2, 1)
        lower_x, upper_x = (dots * entries.weight_y[:, :, None]).sum(1).chunk(2, 1)
        slopes = torch.stack([(upper_y - lower_y).sum(1), (upper_x - lower_x).sum(1)])
        grad_first[:, run] = slopes.view_as(grad_first[:, run])
    return grad_table, grad_first


# Where classes have positions of their own, a sample is a single number of a plane (channel, bin).
# The RoIs of an image are read from a few planes at a time, small enough to stay in cache.


class _Part(NamedTuple):
    """The work on some channels of one image, for q = channels * p * p planes and r RoIs.

    `where` are the RoIs' and channels' numbers, as (r, 1) and (channels,) indices; `planes` are
    places (image, channel, group) in the table; `corners` are of bins (q, r).
    """

    where: tuple[Tensor, Tensor]
    planes: tuple[Tensor, Tensor, Tensor]
    corners: _Corners


def _parts(pooling: _Pooling) -> Iterator[_Part]:
    limit = BINS["cpu" if pooling.table.device.type == "cpu" else "cuda"]
    groups = pooling.groups[:, None] * pooling.group_size + pooling.groups
    for image in pooling.images.unique():
        rois = (pooling.images == image).nonzero()
        step = pooling.step[:, rois[:, 0]].view(2, 1, -1)
        for run in _runs(pooling.depth, rois.shape[0] * pooling.pooled**2, limit):
            channels = torch.arange(run.start, run.stop, device=rois.device)
            classes = channels // (pooling.depth // pooling.classes)
            first = pooling.first[:, rois, classes].permute(0, 2, 3, 4, 1).flatten(1, 3)
            planes = (image, channels[:, None, None], groups)
            yield _Part((rois, channels), planes, pooling.corners(first, step))


def _planes(table: Tensor, pooling: _Pooling) -> Tensor:
    """The view of a table as planes (N, D, g * g, pixels)."""
    return table.view(-1, pooling.depth, pooling.group_size**2, pooling.padded[0, 0].numel())


def _planes_forward(pooling: _Pooling) -> Tensor:
    bins = (pooling.images.shape[0], pooling.depth, pooling.pooled, pooling.pooled)
    output = pooling.table.new_empty(bins)
    width = pooling.padded.shape[3]
    for part in _parts(pooling):
        planes = _planes(pooling.table, pooling)[part.planes].flatten(0, 2)
        total = torch.zeros_like(part.corners.kept)
        (y, x), (weights_y, weights_x) = part.corners.cells, part.corners.weights
        for row, weight_y in zip(y * width, weights_y, strict=True):
            along_row = torch.zeros_like(total)
            for column, weight_x in zip(x, weights_x, strict=True):
                along_row.addcmul_(planes.gather(1, row + column), weight_x)
            total.addcmul_(along_row, weight_y)
        output[part.where] = (total / part.corners.kept).t().unflatten(1, (-1, *bins[2:]))
    return output


def _planes_backward(pooling: _Pooling, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the table and of the first positions (2, R, D, p, p)."""
    grad_table = torch.zeros_like(pooling.table)
    grad_first = grad.new_empty(2, *grad.shape)
    width = pooling.padded.shape[3]
    for part in _parts(pooling):
        planes = _planes(pooling.table, pooling)[part.planes].flatten(0, 2)
        grad_planes = torch.zeros_like(planes)
        share = grad[part.where].flatten(1).t() / part.corners.kept
        slopes = share.new_zeros(2, *share.shape)
        (y, x), (weights_y, weights_x) = part.corners.cells, part.corners.weights
        signs = [-1] * pooling.samples + [1] * pooling.samples
        for row, weight_y, sign_y in zip(y * width, weights_y, signs, strict=True):
            along_row, slope_x = torch.zeros_like(share), torch.zeros_like(share)
            share_y = share * weight_y
            for column, weight_x, sign_x in zip(x, weights_x, signs, strict=True):
                place = row + column
                value = planes.gather(1, place)
                along_row.addcmul_(value, weight_x)
                slope_x.add_(value, alpha=sign_x)
                grad_planes.scatter_add_(1, place, share_y * weight_x)
            slopes[0].add_(along_row, alpha=sign_y)
            slopes[1].addcmul_(slope_x, weight_y)
        slopes = (slopes * share).transpose(1, 2).unflatten(2, (-1, *grad.shape[2:]))
        grad_first[:, part.where[0], part.where[1]] = slopes
        planes_grad = grad_planes.unflatten(0, (-1, *grad.shape[2:]))
        _planes(grad_table, pooling).index_put_(part.planes, planes_grad, accumulate=True)
    return grad_table, grad_first


@torch.library.custom_op("dcdet::deform_psroi_pool", mutates_args=())
def _deform_psroi_pool(
    input: Tensor, rois: Tensor, trans: Tensor | None, grid: list[int], scale: float, std: float
) -> Tensor:
    """`grid` is (output_dim, group_size, pooled_size, part_size, sample_per_part)."""
    _check(input, rois, trans, grid, scale, std)
    pooling = _Pooling(input, rois, trans, grid, scale, std)
    if compiled.covers(OP, input):
        return compiled.kernels.deform_psroi_pool(input, *pooling.for_kernel())
    if input.dtype != rois.dtype:
        pooled = _deform_psroi_pool(input.to(rois.dtype), rois, trans, grid, scale, std)
        return pooled.to(input.dtype)
    return _rows_forward(pooling) if pooling.blocks == 1 else _planes_forward(pooling)


@torch.library.custom_op("dcdet::deform_psroi_pool_backward", mutates_args=())
def _deform_psroi_pool_backward(
    grad: Tensor,
    input: Tensor,
    rois: Tensor,
    trans: Tensor | None,
    grid: list[int],
    scale: float,
    std: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of input and trans (empty without trans).

    RoIs without a gradient are passed over: hard-example mining leaves most of them so.
    """
    _check(input, rois, trans, grid, scale, std, grad)
    no_trans = rois.new_empty(0)
    if compiled.covers(OP, input):
        pooling = _Pooling(input, rois, trans, grid, scale, std)
        backward = compiled.kernels.deform_psroi_pool_backward
        moved = trans is not None
        grad_input, grad_first = backward(grad, input, *pooling.for_kernel(), moved)
        return grad_input, no_trans if trans is None else pooling.grad_trans(grad_first, trans, std)
    if input.dtype != rois.dtype:  # the kernels were there in the forward pass
        wide = (grad.to(rois.dtype), input.to(rois.dtype))
        grads = _deform_psroi_pool_backward(*wide, rois, trans, grid, scale, std)
        return grads[0].to(input.dtype), grads[1]
    live = grad.flatten(1).ne(0).any(1).nonzero()[:, 0]
    live_trans = None if trans is None else trans[live]
    pooling = _Pooling(input, rois[live], live_trans, grid, scale, std)
    of_table = _rows_backward if pooling.blocks == 1 else _planes_backward
    grad_table, grad_first = of_table(pooling, grad[live])
    if trans is None or live_trans is None:
        return pooling.grad_input(grad_table), no_trans
    grad_trans = grad.new_zeros(trans.shape)
    grad_trans[live] = pooling.grad_trans(grad_first, live_trans, std)
    return pooling.grad_input(grad_table), grad_trans


@_deform_psroi_pool.register_fake
def _(
    input: Tensor, rois: Tensor, trans: Tensor | None, grid: list[int], scale: float, std: float
) -> Tensor:
    _check(input, rois, trans, grid, scale, std)
    return input.new_empty(rois.shape[0], grid[0], grid[2], grid[2])


@_deform_psroi_pool_backward.register_fake
def _(
    grad: Tensor,
    input: Tensor,
    rois: Tensor,
    trans: Tensor | None,
    grid: list[int],
    scale: float,
    std: float,
) -> tuple[Tensor, Tensor]:
    _check(input, rois, trans, grid, scale, std, grad)
    grad_input = input.new_empty(input.shape).contiguous(memory_format=layout_of(input))
    return grad_input, rois.new_empty(0 if trans is None else trans.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, rois, trans, *ctx.geometry = inputs
    ctx.save_for_backward(input, rois, trans)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, rois, trans = ctx.saved_tensors
    grad_input, grad_trans = _deform_psroi_pool_backward(grad, input, rois, trans, *ctx.geometry)
    return grad_input, None, None if trans is None else grad_trans, None, None, None


_deform_psroi_pool.register_autograd(_backward, setup_context=_save)
compiled.below_autocast(_deform_psroi_pool, "deform_psroi_pool")
compiled.below_autocast(_deform_psroi_pool_backward, "deform_psroi_pool_backward")
