"""Deformable RoI pooling on RoIAlign's geometry, as in mmdetection's DCN and DCNv2 configs.

Conventions:

* RoIs are rows (batch index, x1, y1, x2, y2) in **continuous** image pixels, as everywhere outside
  the position-sensitive ops: width = x2 - x1. On the map a RoI spans x1 * scale - 0.5 to
  x2 * scale - 0.5. Nothing is rounded, and its size has no lower limit.
* A bin is the mean of n x m samples in the middles of its n x m parts: n = m = `sampling_ratio`,
  or, where that is 0, the bin's height and width rounded up. So a RoI of no area has no samples,
  and is 0; one of negative size, too.
* `offset` is (R, 2, ph, pw): channel 0 moves a bin's samples in **x**, channel 1 in y (the other
  way round than in convolutions), in units of gamma * RoI size.
* A sample outside [-1, H] x [-1, W] is 0, and counts in the mean; the others are moved onto the
  map, to [0, H - 1] x [0, W - 1], and read bilinearly.
* The gradient of a position is mmcv's: the slope of the bilinear form through the sample's four
  corners, at the position that was **not** moved. On the map that is the derivative; beyond its
  borders it is not. With rows v[0], v[1], ... and y in [-1, 0), where the value is v[0] whatever y
  is, the slope in y is v[1] - v[0], and that in x is (1 - y) * slope of v[0] + y * slope of v[1].
  For y >= H - 1 both corners are v[H - 1], and both slopes are 0. The same for x.
* A NaN in RoI or offset gives NaN; infinite and huge ones count as 1e9. RoIs get no gradient.

Letters: N images, C channels, R RoIs, ph x pw bins.
Sources: Dai et al., Deformable Convolutional Networks, 2017; Zhu et al., Deformable ConvNets v2,
2019; `deform_roi_pool_cuda_kernel.cuh` of mmcv 2.2.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcdet.ops import checks, compiled
from dcdet.ops.rois import HUGE, image_indices
from dcdet.ops.rows import gather_rows, index_dtype, row_dots, scatter_rows

OP = "deform_roi_pool"

# Corners that are listed at once; a corner takes about 40 bytes.
CORNERS = 1 << 20


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    mask: Tensor | None = None,
) -> Tensor:
    """Pool each RoI to ph x pw bins, each moved by its `offset` and scaled by its `mask`.

    Shapes: input (N, C, H, W), rois (R, 5), offset (R, 2, ph, pw) or None for none, output_size
    ph = pw or (ph, pw), mask (R, 1, ph, pw) or None for ones -> (R, C, ph, pw) in the input's
    dtype. `spatial_scale` is map pixels per image pixel. RoIs, offset and mask have the input's
    dtype or float32; half types are computed in float32, and rounded once more before a mask where
    a kernel takes them. Raises TypeError and ValueError, naming the argument.
    """
    bins = checks.pair(OP, "output_size", output_size, 1)
    geometry = (bins, spatial_scale, sampling_ratio, gamma)
    _check(input, rois, offset, *geometry, operator=False)
    if mask is not None:
        checks.alike(OP, "mask", mask, 4, input, torch.float32)
        checks.shape(OP, "mask", mask, (rois.shape[0], 1, *bins), "(R, 1, ph, pw)")
    dtype = checks.compute_dtype(input)
    output: Tensor = _deform_roi_pool(
        input if compiled.covers(OP, input) else input.to(dtype),
        rois.to(dtype),
        None if offset is None else offset.to(dtype),
        bins,
        float(spatial_scale),
        sampling_ratio,
        float(gamma),
    )
    if mask is not None:
        output = output * mask.to(dtype)
    return output.to(input.dtype)


def roi_align(
    input: Tensor,
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """RoIAlign: `deform_roi_pool` of bins that stay where they are, in its terms.

    Without `aligned`, as in torchvision's detectors, a RoI spans x1 * scale to x2 * scale on the
    map, half a pixel further down and right, and is at least one pixel high and wide. (By rounding
    a bin of whole pixels may then have a sample more or less than there, where `sampling_ratio` is
    0.) Source: He et al., Mask R-CNN; roi_align of torchvision.
    """
    if not aligned:
        bins = checks.pair(OP, "output_size", output_size, 1)
        _check(input, rois, None, bins, spatial_scale, sampling_ratio, 0.0, operator=False)
        image, low, high = rois.to(checks.compute_dtype(input)).split([1, 2, 2], dim=1)
        high = torch.maximum(high, low + 1 / spatial_scale)
        rois = torch.cat([image, low + 0.5 / spatial_scale, high + 0.5 / spatial_scale], dim=1)
    return deform_roi_pool(input, rois, None, output_size, spatial_scale, sampling_ratio)


def moved_bins(rois: Tensor, offset: Tensor, gamma: float) -> Tensor:
    """Where the bins of rois (R, 5) lie once `offset` (R, 2, ph, pw) has moved them, in the rois'
    pixels: boxes (R, ph, pw, 4)."""
    rows, columns = offset.shape[2:]
    low, size = rois[:, None, None, 1:3], (rois[:, 3:] - rois[:, 1:3])[:, None, None]
    y, x = torch.meshgrid(
        torch.arange(rows).to(rois) / rows, torch.arange(columns).to(rois) / columns, indexing="ij"
    )
    start = low + size * (torch.stack([x, y], dim=-1) + gamma * offset.permute(0, 2, 3, 1))
    return torch.cat([start, start + size / size.new_tensor([columns, rows])], dim=-1)


def _check(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: list[int],
    scale: float,
    ratio: int,
    gamma: float,
    *,
    grad: Tensor | None = None,
    operator: bool = True,
) -> None:
    """What the public function, the operator, its backward and its fake kernel all ask for.

    The operator is given rois and offset in the dtype that the input is computed in.
    """
    checks.floating(OP, "input", input, 4)
    checks.alike(OP, "rois", rois, 2, input, torch.float32)
    checks.shape(OP, "rois", rois, (rois.shape[0], 5), "(R, 5)")
    if min(input.shape[1:]) < 1:
        wanted = "of at least 1 channel and pixel"
        raise checks.wrong(OP, "input", wanted, f"shape {tuple(input.shape)}")
    bins = checks.pair(OP, "output_size", output_size, 1)
    if checks.number(OP, "spatial_scale", scale) <= 0:
        raise checks.wrong(OP, "spatial_scale", "positive", scale)
    checks.integer(OP, "sampling_ratio", ratio, 0)
    checks.number(OP, "gamma", gamma)
    if offset is not None:
        checks.alike(OP, "offset", offset, 4, input, torch.float32)
        checks.shape(OP, "offset", offset, (rois.shape[0], 2, *bins), "(R, 2, ph, pw)")
    dtype = checks.compute_dtype(input)
    for name, tensor in (("rois", rois), ("offset", offset)) if operator else ():
        if tensor is not None and tensor.dtype != dtype:
            raise checks.wrong_type(OP, name, str(dtype), tensor.dtype)
    if grad is not None:
        checks.alike(OP, "grad", grad, 4, input)
        wanted_shape = (rois.shape[0], input.shape[1], *bins)
        checks.shape(OP, "grad", grad, wanted_shape, "(R, C, ph, pw)")


class _Pooling:
    """One call's geometry, y first wherever a 2 stands.

    `images` (R,) are the RoIs' batch indices, `size` (2, R) their sizes, `bin` (2, R) those of
    their bins, `count` (2, R) the samples along a bin, whole numbers of the same dtype. `start`
    (2, R, ph, pw) is where each bin begins: sample i is at start + (i + 0.5) * bin / count.
    `first` and `last` (2, R, ph, pw), int64, cut off samples far outside the map, so that work is
    bounded by the map's size; last is not in it. `divisor` (R, ph, pw) counts all samples, at least
    1; it is NaN, and there is no sample, where a position is NaN.
    """

    def __init__(
        self,
        shape: torch.Size,
        rois: Tensor,
        offset: Tensor | None,
        bins: list[int],
        scale: float,
        ratio: int,
        gamma: float,
    ) -> None:
        self.images = image_indices(OP, rois, shape[0])
        x1, y1, x2, y2 = ((rois[:, 1:] * scale).clamp(-HUGE, HUGE) - 0.5).unbind(1)
        start = torch.stack([y1, x1])
        self.size = torch.stack([y2, x2]) - start
        self.bin = self.size / torch.tensor(bins, device=rois.device)[:, None]
        # mmcv rounds up in float32, whatever the dtype
        adaptive = self.bin.float().ceil().clamp(min=0).to(rois.dtype)
        self.count = torch.full_like(adaptive, ratio) if ratio else adaptive

        size, bin, count = (t[..., None, None] for t in (self.size, self.bin, self.count))
        start = start[..., None, None].expand(-1, -1, *bins)
        self.gamma_size = gamma * size
        if offset is not None:
            start = start + self.gamma_size * offset.clamp(-HUGE, HUGE).flip(1).transpose(0, 1)
        place = torch.meshgrid(*(torch.arange(n, device=rois.device) for n in bins), indexing="ij")
        self.start = start + torch.stack(place)[:, None] * bin

        broken = self.start.isnan().any(0)
        self.divisor = torch.where(broken, torch.nan, count.prod(0).clamp(min=1))
        # Adaptive samples of a bin of several are at least half a pixel apart; 2 are for rounding.
        length = torch.tensor(shape[2:], device=rois.device).view(2, 1, 1, 1)
        first = ((-1 - self.start) * count / bin - 0.5).floor() - 2
        last = ((length - self.start) * count / bin - 0.5).ceil() + 3
        whole = (count <= 1) | bool(ratio)
        first, last = torch.where(whole, 0, first), torch.where(whole, count, last)
        self.first, self.last = (
            torch.where(broken, 0, end.clamp(min=0).minimum(count)).long() for end in (first, last)
        )

    def for_kernel(self) -> tuple[Tensor, ...]:
        """What a compiled kernel takes of it."""
        return (
            self.images, self.start, self.bin, self.count, self.first, self.last, self.divisor,
        )  # fmt: skip

    def grad_offset(self, grad_start: Tensor) -> Tensor:
        """Gradients of `start` -> those of offset."""
        return (grad_start * self.gamma_size).transpose(0, 1).flip(1)


# On torch, rows.py does the work: a bin is a sum of rows of a table, the channels of a pixel each.


class _Corners(NamedTuple):
    """What the samples of b bins read along one axis: (b, 2n), lower corners first.

    `weights` are the corners' weights in the value, `slopes` their derivatives; `unmoved` are their
    weights in the slopes along the other axis, which differ from `weights` beyond the borders.
    """

    cells: Tensor
    weights: Tensor
    slopes: Tensor
    unmoved: Tensor


class _Entries(NamedTuple):
    """The table rows that b bins read: `rows` and `weights` (b, 4nm), corners y outermost."""

    rows: Tensor
    weights: Tensor
    y: _Corners
    x: _Corners


class _Table:
    """The map as a table, with a row and a column of zeros at its end: for samples not in use."""

    def __init__(self, input: Tensor, pooling: _Pooling) -> None:
        self.pooling = pooling
        images, channels, self.height, self.width = input.shape
        map_ = input.new_zeros(images, self.height + 1, self.width + 1, channels)
        map_[:, :-1, :-1] = input.permute(0, 2, 3, 1)
        self.rows = map_.view(-1, channels)

    def runs(self) -> Iterator[tuple[Tensor, int, int]]:
        """Bins of n x m samples in use, as their numbers (b,), n and m: few enough to list."""
        used = (self.pooling.last - self.pooling.first).flatten(1)
        unit = int(used.max()) + 1 if used.numel() else 1
        key, order = (used[0] * unit + used[1]).sort(stable=True)
        keys, sizes = key.unique_consecutive(return_counts=True)
        for both, bins in zip(keys.tolist(), order.split(sizes.tolist()), strict=True):
            n, m = divmod(both, unit)
            if n and m:
                yield from ((run, n, m) for run in bins.split(max(1, CORNERS // (4 * n * m))))

    def entries(self, run: Tensor, n: int, m: int) -> _Entries:
        y = self._corners(0, run, n, self.height)
        x = self._corners(1, run, m, self.width)
        first = self.pooling.images[run // self.pooling.divisor[0].numel(), None] * (
            self.height + 1
        )
        rows = ((first + y.cells) * (self.width + 1))[:, :, None] + x.cells[:, None]
        weights = y.weights[:, :, None] * x.weights[:, None]
        rows = rows.flatten(1).to(index_dtype(self.rows.shape[0]))
        return _Entries(rows, weights.flatten(1), y, x)

    def _corners(self, axis: int, run: Tensor, samples: int, length: int) -> _Corners:
        pooling = self.pooling
        start, first = (t[axis].flatten()[run, None] for t in (pooling.start, pooling.first))
        roi = run // pooling.divisor[0].numel()
        bin, count = pooling.bin[axis, roi, None], pooling.count[axis, roi, None]
        number = first + torch.arange(samples, device=run.device)
        position = start + (number.to(start.dtype) + 0.5) * bin / count
        inside = (position >= -1) & (position <= length)
        moved = position.clamp(0, length - 1)
        low = moved.floor()
        high = (low + 1).clamp(max=length - 1)
        fraction = moved - low
        slope = (inside & (high > low)).to(start.dtype)
        cells = torch.where(inside.repeat(1, 2), torch.cat([low, high], 1), length)
        weights = torch.cat([1 - fraction, fraction], 1) * inside.repeat(1, 2)
        unmoved = torch.cat([high - position, position - low], 1)
        unmoved = torch.where(slope.repeat(1, 2) > 0, unmoved, 0)
        return _Corners(cells.long(), weights, torch.cat([-slope, slope], 1), unmoved)

    def pool(self) -> Tensor:
        pooling = self.pooling
        output = self.rows.new_zeros(pooling.divisor.numel(), self.rows.shape[1])
        for run in self.runs():
            entries = self.entries(*run)
            output[run[0]] = gather_rows(self.rows, entries.rows, entries.weights)
        output /= pooling.divisor.view(-1, 1)
        return (
            output.view(*pooling.divisor.shape, self.rows.shape[1]).permute(0, 3, 1, 2).contiguous()
        )

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the input and of `pooling.start`."""
        pooling = self.pooling
        grad_rows = torch.zeros_like(self.rows)
        grad_start = torch.zeros_like(pooling.start)
        shares = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1]) / pooling.divisor.view(-1, 1)
        for run in self.runs():
            entries = self.entries(*run)
            share = shares[run[0]]
            owners = torch.arange(entries.rows.numel(), device=grad.device) // entries.rows.shape[1]
            weights = entries.weights.view(-1)
            scatter_rows(share, entries.rows.view(-1), owners, weights, grad_rows)
            y, x = entries.y, entries.x
            dots = row_dots(share, self.rows, entries.rows).view(*y.cells.shape, -1)
            slope_y = ((dots * x.unmoved[:, None]).sum(2) * y.slopes).sum(1)
            slope_x = ((dots * y.unmoved[:, :, None]).sum(1) * x.slopes).sum(1)
            grad_start.flatten(1)[:, run[0]] = torch.stack([slope_y, slope_x])
        grad_map = grad_rows.view(-1, self.height + 1, self.width + 1, grad.shape[1])
        return grad_map[:, :-1, :-1].permute(0, 3, 1, 2), grad_start


@torch.library.custom_op("dcdet::deform_roi_pool", mutates_args=())
def _deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: list[int],
    scale: float,
    ratio: int,
    gamma: float,
) -> Tensor:
    _check(input, rois, offset, output_size, scale, ratio, gamma)
    covered = compiled.covers(OP, input)
    if input.dtype != rois.dtype and not covered:
        wide = input.to(rois.dtype)
        pooled = _deform_roi_pool(wide, rois, offset, output_size, scale, ratio, gamma)
        return pooled.to(input.dtype)
    pooling = _Pooling(input.shape, rois, offset, output_size, scale, ratio, gamma)
    if covered:
        return compiled.kernels.deform_roi_pool(input, *pooling.for_kernel())
    return _Table(input, pooling).pool()


@torch.library.custom_op("dcdet::deform_roi_pool_backward", mutates_args=())
def _deform_roi_pool_backward(
    grad: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: list[int],
    scale: float,
    ratio: int,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of input, in channels_last memory, and offset (empty without one)."""
    _check(input, rois, offset, output_size, scale, ratio, gamma, grad=grad)
    covered = compiled.covers(OP, input)
    if input.dtype != rois.dtype and not covered:  # the kernels were there in the forward pass
        wide = (grad.to(rois.dtype), input.to(rois.dtype))
        geometry = (output_size, scale, ratio, gamma)
        grads = _deform_roi_pool_backward(*wide, rois, offset, *geometry)
        return grads[0].to(input.dtype), grads[1]
    pooling = _Pooling(input.shape, rois, offset, output_size, scale, ratio, gamma)
    if covered:
        backward = compiled.kernels.deform_roi_pool_backward
        moved = offset is not None
        grad_input, grad_start = backward(grad, input, *pooling.for_kernel(), moved)
    else:
        grad_input, grad_start = _Table(input, pooling).backward(grad)
        grad_input = grad_input.contiguous(memory_format=torch.channels_last)
    if offset is None:
        return grad_input, rois.new_empty(0)
    return grad_input, pooling.grad_offset(grad_start).contiguous()


@_deform_roi_pool.register_fake
def _(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: list[int],
    scale: float,
    ratio: int,
    gamma: float,
) -> Tensor:
    _check(input, rois, offset, output_size, scale, ratio, gamma)
    return input.new_empty(rois.shape[0], input.shape[1], *output_size)


@_deform_roi_pool_backward.register_fake
def _(
    grad: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: list[int],
    scale: float,
    ratio: int,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    _check(input, rois, offset, output_size, scale, ratio, gamma, grad=grad)
    grad_input = torch.empty_like(input, memory_format=torch.channels_last)
    return grad_input, rois.new_empty(0 if offset is None else offset.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, rois, offset, *ctx.geometry = inputs
    ctx.save_for_backward(input, rois, offset)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, rois, offset = ctx.saved_tensors
    grad_input, grad_offset = _deform_roi_pool_backward(grad, input, rois, offset, *ctx.geometry)
    if offset is None:
        grad_offset = None
    return grad_input, None, grad_offset, None, None, None, None


_deform_roi_pool.register_autograd(_backward, setup_context=_save)
compiled.below_autocast(_deform_roi_pool, "deform_roi_pool")
compiled.below_autocast(_deform_roi_pool_backward, "deform_roi_pool_backward")
