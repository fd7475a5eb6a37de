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
* A NaN in RoI or shift gives NaN; samples that an infinite one moves to no position are dropped.

Sources: Dai et al., Deformable Convolutional Networks, 2017; `deformable_psroi_pooling.cu` of the
2017 release.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dcdet.ops import checks
from dcdet.ops.rois import (
    check_rois,
    groups_of_bins,
    image_indices,
    map_of_groups,
    round_half_away,
    table_of_groups,
)
from dcdet.ops.rows import gather_rows, index_dtype, row_dots, scatter_rows

# Numbers in the largest intermediate tensor of a run of RoIs: small enough to stay in cache.
NUMBERS = 1 << 20


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
    op = "deform_psroi_pool"
    check_rois(op, input, rois, spatial_scale, output_dim, group_size, pooled_size)
    part = checks.integer(op, "part_size", part_size, 0) or pooled_size
    checks.integer(op, "sample_per_part", sample_per_part, 1)
    std = checks.number(op, "trans_std", trans_std)
    if trans is not None:
        checks.alike(op, "trans", trans, 4, input, torch.float32)
        classes = trans.shape[1] // 2
        if classes < 1 or trans.shape[1] % 2 or output_dim % classes:
            wanted = f"of 2 * K channels, K a divisor of output_dim = {output_dim}"
            raise checks.wrong(op, "trans", wanted, f"shape {tuple(trans.shape)}")
        wanted_shape = (rois.shape[0], 2 * classes, part, part)
        checks.shape(op, "trans", trans, wanted_shape, "(R, 2 * K, part, part)")
    dtype = checks.compute_dtype(input)
    output: Tensor = _deform_psroi_pool(
        input.to(dtype),
        rois.to(dtype),
        None if trans is None else trans.to(dtype),
        float(spatial_scale),
        output_dim,
        group_size,
        pooled_size,
        part,
        sample_per_part,
        std,
    )
    return output.to(input.dtype)


class _Axis(NamedTuple):
    """The samples of r RoIs along one axis.

    `first` (r, K, p, p) is the position of each bin's first sample, `step` (r, 1, 1, 1) the
    distance to the next, `unit` (r, 1, 1, 1) the pixels that a shift of 1 moves.
    """

    first: Tensor
    step: Tensor
    unit: Tensor


class _Cells(NamedTuple):
    """What positions read along one axis: lower and upper pixel, their distance, in use or not."""

    low: Tensor
    high: Tensor
    fraction: Tensor
    kept: Tensor


def _cells(position: Tensor, size: int) -> _Cells:
    kept = (position >= -0.5) & (position <= size - 0.5)
    position = torch.where(kept, position, 0).clamp(0, size - 1)
    low, high = position.floor(), position.ceil()
    return _Cells(low.long(), high.long(), position - low, kept)


class _Pooling:
    """One call's geometry: cuts the RoIs into runs and finds each run's samples."""

    def __init__(
        self,
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
    ) -> None:
        self.input, self.rois, self.trans = input, rois, trans
        self.scale, self.depth, self.group_size = spatial_scale, output_dim, group_size
        self.pooled, self.samples, self.std = pooled_size, sample_per_part, trans_std
        self.height, self.width = input.shape[2:]
        self.classes = 1 if trans is None else trans.shape[1] // 2
        self.images = image_indices("deform_psroi_pool", rois, input.shape[0])
        self.group = groups_of_bins(group_size, pooled_size, rois.device)
        # float32 whatever the input is: the release's part of a bin depends on its rounding
        bins = torch.arange(pooled_size, device=rois.device, dtype=torch.float32)
        self.part = (bins / pooled_size * part_size).floor().long().clamp(max=part_size - 1)

    def shifts(self, run: slice | Tensor) -> Tensor | None:
        """trans at the bins: (2, r, K, p, p), x first."""
        if self.trans is None:
            return None
        shifts = self.trans[run].unflatten(1, (self.classes, 2)).permute(2, 0, 1, 3, 4)
        return shifts[..., self.part[:, None], self.part]

    def broken(self) -> Tensor:
        """Which bins have a NaN RoI or shift: (R, K, p, p)."""
        broken = self.rois.isnan().any(1)[:, None, None, None]
        broken = broken.expand(-1, self.classes, self.pooled, self.pooled)
        shifts = self.shifts(slice(None))
        return broken if shifts is None else broken | shifts.isnan().any(0)

    def axes(self, run: slice | Tensor) -> tuple[_Axis, _Axis]:
        """The samples of a run of RoIs along y and x."""
        rois, shifts = self.rois[run, :, None, None, None], self.shifts(run)
        bins = torch.arange(self.pooled, device=rois.device, dtype=rois.dtype)
        shift_y, shift_x = (None, None) if shifts is None else (shifts[1], shifts[0])
        return (
            self._axis(rois[:, 2], rois[:, 4], bins[:, None], shift_y),
            self._axis(rois[:, 1], rois[:, 3], bins, shift_x),
        )

    def _axis(self, low: Tensor, high: Tensor, bins: Tensor, shift: Tensor | None) -> _Axis:
        start = round_half_away(low) * self.scale - 0.5
        end = (round_half_away(high) + 1) * self.scale - 0.5
        size = (end - start).clamp(min=0.1)
        bin_size = size / self.pooled
        first = (bins * bin_size + start).expand(-1, -1, self.pooled, self.pooled)
        if shift is not None:
            first = first + shift * self.std * size
        unit = self.std * torch.where(size.isfinite(), size, 0)
        return _Axis(first, bin_size / self.samples, unit)

    def grad_trans(self, grad_y: Tensor, grad_x: Tensor) -> Tensor:
        """Gradients of the shifts at the bins, each (R, K, p, p) -> (R, 2 * K, part, part)."""
        assert self.trans is not None
        parts = torch.arange(self.trans.shape[2], device=self.part.device)
        member = (self.part[:, None] == parts).to(grad_y.dtype)
        grad = torch.stack([grad_x, grad_y], dim=2).flatten(1, 2)
        return member.t() @ grad @ member

    def is_dense(self) -> bool:
        """Each channel has shifts of its own, so that no two read the same places."""
        return self.depth == self.classes > 1


# Where channels share their positions, a sample is a row of D / K channels: rows.py does the work.


class _Entries(NamedTuple):
    """The table rows that a run's bins read: b bins of 2n x 2n corners.

    `rows` and `weights` are (b, 2n * 2n); `weight_y` and `slope_y`, `_x` are (b, 2n): a corner's
    weight along an axis and the weight's derivative; `count` (b, 1) is the number of samples.
    """

    rows: Tensor
    weights: Tensor
    weight_y: Tensor
    weight_x: Tensor
    slope_y: Tensor
    slope_x: Tensor
    count: Tensor


def _runs(total: int, numbers_each: int) -> Iterator[slice]:
    step = max(1, NUMBERS // numbers_each)
    for begin in range(0, total, step):
        yield slice(begin, min(begin + step, total))


def _entries(pooling: _Pooling, run: slice, zero_row: int) -> _Entries:
    sample = torch.arange(pooling.samples, device=pooling.rois.device)
    axis_y, axis_x = pooling.axes(run)
    corners = []
    for axis, size in ((axis_y, pooling.height), (axis_x, pooling.width)):
        position = axis.first[..., None] + sample * axis.step[..., None]
        cells = _cells(position.reshape(-1, pooling.samples), size)
        kept = cells.kept.to(position.dtype)
        corners.append(
            (
                torch.cat([cells.low, cells.high], 1),
                torch.cat([cells.kept, cells.kept], 1),
                torch.cat([(1 - cells.fraction) * kept, cells.fraction * kept], 1),
                torch.cat([-kept, kept], 1),
                kept.sum(1, keepdim=True),
            )
        )
    (y, kept_y, weight_y, slope_y, count_y), (x, kept_x, weight_x, slope_x, count_x) = corners
    classes = torch.arange(pooling.classes, device=y.device)[:, None, None]
    block = pooling.images[run, None, None, None] * pooling.classes + classes
    block = block * pooling.group_size + pooling.group[:, None]
    block = (block * pooling.group_size + pooling.group).view(-1, 1)
    row_type = index_dtype(zero_row + 1)
    row = ((block * pooling.height + y) * pooling.width).to(row_type)[:, :, None]
    rows = row + x.to(row_type)[:, None, :]
    rows = torch.where(kept_y[:, :, None] & kept_x[:, None, :], rows, zero_row)
    return _Entries(
        rows.flatten(1),
        (weight_y[:, :, None] * weight_x[:, None, :]).flatten(1),
        weight_y,
        weight_x,
        slope_y,
        slope_x,
        (count_y * count_x).clamp(min=1),
    )


def _rows_forward(pooling: _Pooling) -> Tensor:
    table = table_of_groups(pooling.input, pooling.classes, pooling.group_size)
    a_roi = pooling.classes * pooling.pooled**2
    output = table.new_empty(pooling.rois.shape[0], a_roi, table.shape[1])
    for run in _runs(output.shape[0], a_roi * (2 * pooling.samples) ** 2):
        entries = _entries(pooling, run, table.shape[0] - 1)
        sums = gather_rows(table, entries.rows, entries.weights)
        output[run] = (sums / entries.count).view(-1, a_roi, table.shape[1])
    output = output.view(-1, pooling.classes, pooling.pooled, pooling.pooled, table.shape[1])
    return output.permute(0, 1, 4, 2, 3)


def _rows_backward(pooling: _Pooling, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    table = table_of_groups(pooling.input, pooling.classes, pooling.group_size)
    grad_table = torch.zeros_like(table)
    bins = (grad.shape[0], pooling.classes, pooling.pooled, pooling.pooled)
    grad_y, grad_x = grad.new_zeros(bins), grad.new_zeros(bins)
    grad = grad.permute(0, 1, 3, 4, 2)
    a_roi = pooling.classes * pooling.pooled**2
    for run in _runs(grad.shape[0], a_roi * (2 * pooling.samples) ** 2):
        entries = _entries(pooling, run, table.shape[0] - 1)
        share = grad[run].reshape(-1, table.shape[1]) / entries.count
        owners = torch.arange(entries.rows.numel(), device=grad.device) // entries.rows.shape[1]
        scatter_rows(share, entries.rows.view(-1), owners, entries.weights.view(-1), grad_table)
        if pooling.trans is not None:
            dots = row_dots(share, table, entries.rows).view(-1, *[2 * pooling.samples] * 2)
            axis_y, axis_x = pooling.axes(run)
            along_y = (dots * entries.weight_x[:, None, :]).sum(2) * entries.slope_y
            along_x = (dots * entries.weight_y[:, :, None]).sum(1) * entries.slope_x
            grad_y[run] = along_y.sum(1).view(-1, *bins[1:]) * axis_y.unit
            grad_x[run] = along_x.sum(1).view(-1, *bins[1:]) * axis_x.unit
    shape = pooling.input.shape
    return map_of_groups(grad_table, shape, pooling.classes, pooling.group_size), grad_y, grad_x


# Where every channel has its own positions, a sample is one number of one plane (channel, bin). The
# RoIs of an image are read from a few planes at a time, small enough to stay in cache.


class _Planes(NamedTuple):
    """The work on some channels of one image: c channels, r RoIs, q = c * p * p planes.

    `rois` (r,) are RoI numbers, `planes` (q, H * W); `along_y` and `along_x` hold, for each sample
    along an axis, its cells (q, r).
    """

    image: int
    rois: Tensor
    channels: slice
    planes: Tensor
    along_y: list[_Cells]
    along_x: list[_Cells]

    def count(self) -> Tensor:
        """The number of samples of each bin, at least 1: (q, r)."""
        rows = torch.stack([y.kept for y in self.along_y]).sum(0)
        columns = torch.stack([x.kept for x in self.along_x]).sum(0)
        return (rows * columns).clamp(min=1)

    def corners(self, y: _Cells, x: _Cells, width: int) -> tuple[list[Tensor], list[Tensor]]:
        """The places in the planes of a sample's four corners, and their values: (q, r) each."""
        upper, lower = y.low * width, y.high * width
        places = [upper + x.low, upper + x.high, lower + x.low, lower + x.high]
        return places, [self.planes.gather(1, place) for place in places]


def _plane_runs(pooling: _Pooling) -> Iterator[tuple[_Planes, _Axis, _Axis]]:
    grid = (pooling.depth, pooling.group_size, pooling.group_size, -1)
    for image in range(pooling.input.shape[0]):
        rois = (pooling.images == image).nonzero()[:, 0]
        if rois.shape[0] == 0:
            continue
        axis_y, axis_x = pooling.axes(rois)
        cells = pooling.input[image].reshape(grid)
        for channels in _runs(pooling.depth, pooling.pooled**2 * rois.shape[0]):
            planes = cells[channels, pooling.group[:, None], pooling.group].flatten(0, 2)
            along_y, along_x = (
                [
                    _cells(_by_plane(axis.first[:, channels]) + i * axis.step.view(1, -1), size)
                    for i in range(pooling.samples)
                ]
                for axis, size in ((axis_y, pooling.height), (axis_x, pooling.width))
            )
            yield _Planes(image, rois, channels, planes, along_y, along_x), axis_y, axis_x


def _by_plane(bins: Tensor) -> Tensor:
    """(r, c, p, p) -> (c * p * p, r)."""
    return bins.flatten(1).t().contiguous()


def _by_roi(planes: Tensor, pooled: int) -> Tensor:
    """(c * p * p, r) -> (r, c, p, p)."""
    return planes.t().unflatten(1, (-1, pooled, pooled))


def _planes_forward(pooling: _Pooling) -> Tensor:
    bins = (pooling.rois.shape[0], pooling.depth, pooling.pooled, pooling.pooled)
    output = pooling.input.new_empty(bins)
    for run, _, _ in _plane_runs(pooling):
        total = run.planes.new_zeros(run.planes.shape[0], run.rois.shape[0])
        for y in run.along_y:
            for x in run.along_x:
                _, values = run.corners(y, x, pooling.width)
                upper = torch.lerp(values[0], values[1], x.fraction)
                lower = torch.lerp(values[2], values[3], x.fraction)
                value = torch.lerp(upper, lower, y.fraction)
                total += torch.where(y.kept & x.kept, value, 0)
        output[run.rois, run.channels] = _by_roi(total / run.count(), pooling.pooled)
    return output[:, :, None]


def _planes_backward(pooling: _Pooling, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad[:, :, 0]
    grad_y, grad_x = torch.empty_like(grad), torch.empty_like(grad)
    pixels = pooling.height * pooling.width
    size = (grad.shape[1], pooling.group_size, pooling.group_size, pixels)
    grad_input = grad.new_zeros(pooling.input.shape[0], *size)
    for run, axis_y, axis_x in _plane_runs(pooling):
        grad_planes = torch.zeros_like(run.planes)
        share = _by_plane(grad[run.rois, run.channels]) / run.count()
        along_y, along_x = torch.zeros_like(share), torch.zeros_like(share)
        for y in run.along_y:
            for x in run.along_x:
                places, values = run.corners(y, x, pooling.width)
                kept = y.kept & x.kept
                slope_y = torch.lerp(values[2] - values[0], values[3] - values[1], x.fraction)
                slope_x = torch.lerp(values[1] - values[0], values[3] - values[2], y.fraction)
                along_y += torch.where(kept, slope_y, 0)
                along_x += torch.where(kept, slope_x, 0)
                part = torch.where(kept, share, 0)
                lower = part * y.fraction
                upper = part - lower
                upper_right, lower_right = upper * x.fraction, lower * x.fraction
                grad_planes.scatter_add_(1, places[0], upper - upper_right)
                grad_planes.scatter_add_(1, places[1], upper_right)
                grad_planes.scatter_add_(1, places[2], lower - lower_right)
                grad_planes.scatter_add_(1, places[3], lower_right)
        where = (run.rois, run.channels)
        grad_y[where] = _by_roi(along_y * share, pooling.pooled) * axis_y.unit
        grad_x[where] = _by_roi(along_x * share, pooling.pooled) * axis_x.unit
        by_bin = grad_planes.view(-1, pooling.pooled, pooling.pooled, pixels)
        columns = by_bin.new_zeros(*by_bin.shape[:2], *size[2:])
        columns.index_add_(2, pooling.group, by_bin)
        grad_input[run.image, run.channels].index_add_(1, pooling.group, columns)
    return grad_input.view(pooling.input.shape), grad_y, grad_x


@torch.library.custom_op("dcdet::deform_psroi_pool", mutates_args=())
def _deform_psroi_pool(
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
    pooling = _Pooling(
        input,
        rois,
        trans,
        spatial_scale,
        output_dim,
        group_size,
        pooled_size,
        part_size,
        sample_per_part,
        trans_std,
    )
    output = _planes_forward(pooling) if pooling.is_dense() else _rows_forward(pooling)
    output = torch.where(pooling.broken()[:, :, None], torch.nan, output)
    return output.reshape(-1, output_dim, pooled_size, pooled_size).contiguous()


@torch.library.custom_op("dcdet::deform_psroi_pool_backward", mutates_args=())
def _deform_psroi_pool_backward(
    grad: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """Gradients of input and trans (empty without trans)."""
    pooling = _Pooling(
        input,
        rois,
        trans,
        spatial_scale,
        output_dim,
        group_size,
        pooled_size,
        part_size,
        sample_per_part,
        trans_std,
    )
    grad = grad.unflatten(1, (pooling.classes, -1))
    backward = _planes_backward if pooling.is_dense() else _rows_backward
    grad_input, grad_y, grad_x = backward(pooling, grad)
    return grad_input, grad.new_empty(0) if trans is None else pooling.grad_trans(grad_y, grad_x)


@_deform_psroi_pool.register_fake
def _(input, rois, trans, scale, output_dim, group_size, pooled_size, part_size, samples, std):
    return input.new_empty(rois.shape[0], output_dim, pooled_size, pooled_size)


@_deform_psroi_pool_backward.register_fake
def _(grad, input, rois, trans, *geometry):
    return input.new_empty(input.shape), grad.new_empty(0 if trans is None else trans.shape)


def _save(ctx, inputs, output):
    input, rois, trans, *ctx.geometry = inputs
    ctx.save_for_backward(input, rois, trans)


def _backward(ctx, grad):
    input, rois, trans = ctx.saved_tensors
    grad_input, grad_trans = _deform_psroi_pool_backward(grad, input, rois, trans, *ctx.geometry)
    return grad_input, None, None if trans is None else grad_trans, *[None] * 7


_deform_psroi_pool.register_autograd(_backward, setup_context=_save)
for _op in (_deform_psroi_pool, _deform_psroi_pool_backward):
    for _device in ("cpu", "cuda"):
        _op.register_autocast(_device, torch.float32)
