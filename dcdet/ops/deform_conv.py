"""Deformable convolution, v1 and v2.

Conventions of every offset in dcdet's convolutions:

* Offset channels are (offset group, tap, (dy, dx)): `offset[:, 2 * (g * taps + i * kw + j)]` is the
  dy of tap (i, j) in offset group g, the next channel its dx. Units are input pixels; offset and
  mask have the output's height and width.
* Tap (i, j) of output (oy, ox) reads the input at y = oy * stride - padding + i * dilation + dy,
  x likewise, bilinearly. Group g serves the input channels g * C / G to (g + 1) * C / G.
* `border="zero"`: the map is surrounded by zeros; samples with y <= -1 or y >= H are 0.
  `border="original"` (v1 as released in 2017): samples with y < 0 or y >= H are 0; between H - 1
  and H a sample has the value of the last row. The same for x.
* The gradient of a position is the slope towards the next higher pixel: v[k + 1] - v[k] at an
  integer. It is 0 outside, at exactly -1, and under "original" from H - 1 on.
* A NaN position gives NaN, an infinite or huge one 0. Mask and input follow IEEE arithmetic.

Letters: B images, C input and O output channels, G offset groups, K = kh * kw taps, P output pixels.
Sources: Dai et al., Deformable Convolutional Networks, 2017; Zhu et al., Deformable ConvNets v2,
2019; `deformable_im2col.cuh` of the 2017 release for the border rules.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dcdet.ops import checks
from dcdet.ops.rows import gather_rows, index_dtype, row_dots, scatter_rows

Border = Literal["zero", "original"]

# Zero rows around the map, so that all four corners of any sample can be read without a test.
PAD = 2

# Bytes of sampled columns held at once. A CPU wants them to stay in cache; a GPU wants few, large
# products.
COLUMN_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Tensor | None = None,
    border: Border = "zero",
) -> Tensor:
    """Convolve `input` where `offset` says: v1, or v2 with a `mask` that scales each sample.

    Shapes: input (B, C, H, W), offset (B, 2 * G * K, H', W'), weight (O, C / groups, kh, kw),
    bias (O,), mask (B, G * K, H', W') -> (B, O, H', W') in channels_last memory. Groups and offset
    groups follow from the shapes. Offset and mask have the input's dtype or float32; half types are
    computed in float32. Raises TypeError and ValueError, naming the argument.
    """
    op = "deform_conv2d"
    checks.floating(op, "input", input, 4)
    checks.alike(op, "weight", weight, 4, input)
    checks.alike(op, "offset", offset, 4, input, torch.float32)
    strides = checks.pair(op, "stride", stride, 1)
    paddings = checks.pair(op, "padding", padding, 0)
    dilations = checks.pair(op, "dilation", dilation, 1)
    if border not in ("zero", "original"):
        raise checks.wrong(op, "border", "'zero' or 'original'", repr(border))

    batch, channels, height, width = input.shape
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    if min(channels, height, width) < 1:
        raise checks.wrong(op, "input", "of at least 1 channel and pixel", tuple(input.shape))
    if min(out_channels, group_channels, kernel_h, kernel_w) < 1:
        raise checks.wrong(op, "weight", "without empty dimensions", tuple(weight.shape))
    if channels % group_channels:
        wanted = f"(O, C / groups, kh, kw) where C = {channels}"
        raise checks.wrong(op, "weight", wanted, f"shape {tuple(weight.shape)}")
    groups = channels // group_channels
    if out_channels % groups:
        wanted = f"of O divisible by the {groups} groups"
        raise checks.wrong(op, "weight", wanted, f"shape {tuple(weight.shape)}")

    out_h, out_w = _output_size(input, weight, strides, paddings, dilations)
    if min(out_h, out_w) < 1:
        wanted = "no larger than the padded input"
        raise checks.wrong(op, "kernel", wanted, f"an output of {out_h} x {out_w} pixels")
    taps = kernel_h * kernel_w
    offset_groups = offset.shape[1] // (2 * taps)
    if offset_groups < 1 or offset.shape[1] != 2 * taps * offset_groups:
        wanted = f"of 2 * G * {taps} channels"
        raise checks.wrong(op, "offset", wanted, f"shape {tuple(offset.shape)}")
    if channels % offset_groups:
        wanted = f"of offset groups that divide the {channels} input channels"
        raise checks.wrong(op, "offset", wanted, f"{offset_groups} offset groups")
    legend = "(B, 2 * G * K, H', W')"
    checks.shape(op, "offset", offset, (batch, 2 * offset_groups * taps, out_h, out_w), legend)
    if bias is not None:
        checks.alike(op, "bias", bias, 1, input)
        checks.shape(op, "bias", bias, (out_channels,), "(O,)")
    if mask is not None:
        checks.alike(op, "mask", mask, 4, input, torch.float32)
        legend = "(B, G * K, H', W')"
        checks.shape(op, "mask", mask, (batch, offset_groups * taps, out_h, out_w), legend)

    dtype = checks.compute_dtype(input)
    output: Tensor = _deform_conv2d(
        input.to(dtype),
        offset.to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        None if mask is None else mask.to(dtype),
        strides,
        paddings,
        dilations,
        border == "original",
    )
    return output.to(input.dtype)


def _output_size(
    input: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[int, int]:
    height, width = (
        (input.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1)
        // stride[i]
        + 1
        for i in (0, 1)
    )
    return height, width


class _Samples(NamedTuple):
    """Where a run of output pixels reads the table: n = pixels * K * G samples, in that order.

    `corners` (n, 4) are row numbers: (y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1);
    `fraction_y` and `fraction_x` (n,) lie between them; `mask` is (n,) or None; `stays_y` and
    `stays_x` (n,) mark the positions held at the last row or column, without a gradient.
    """

    corners: Tensor
    fraction_y: Tensor
    fraction_x: Tensor
    mask: Tensor | None
    stays_y: Tensor | None
    stays_x: Tensor | None

    def bilinear(self) -> Tensor:
        """The corners' weights without the mask -> (n, 4)."""
        y, x = self.fraction_y, self.fraction_x
        return torch.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], dim=1)

    def weights(self) -> Tensor:
        """The corners' weights -> (n, 4)."""
        return self.bilinear() if self.mask is None else self.bilinear() * self.mask[:, None]

    def slopes(self, dots: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the four corner weights (n, 4) -> those of y and x, (n,) each."""
        upper_left, upper_right, lower_left, lower_right = dots.unbind(1)
        grad_y = torch.lerp(lower_left - upper_left, lower_right - upper_right, self.fraction_x)
        grad_x = torch.lerp(upper_right - upper_left, lower_right - lower_left, self.fraction_y)
        if self.stays_y is not None and self.stays_x is not None:
            grad_y.masked_fill_(self.stays_y, 0)
            grad_x.masked_fill_(self.stays_x, 0)
        return grad_y, grad_x


class _Sampler:
    """One call's geometry: cuts the output pixels into runs and finds each run's samples."""

    def __init__(
        self,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        mask: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        original: bool,
    ) -> None:
        self.batch, self.channels, self.height, self.width = input.shape
        self.kernel_w, self.taps = weight.shape[3], weight.shape[2] * weight.shape[3]
        self.out_h, self.out_w = offset.shape[2:]
        self.offset_groups = offset.shape[1] // (2 * self.taps)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.original = original
        self.pixels = self.batch * self.out_h * self.out_w
        self.table_shape = (self.batch, self.height + 2 * PAD, self.width + 2 * PAD, self.channels)
        self.table = self._rows(self._padded(input))
        split = (self.batch, self.offset_groups, self.taps, 2, self.out_h, self.out_w)
        by_pixel = offset.reshape(split).permute(3, 0, 4, 5, 2, 1).contiguous()
        self.dy, self.dx = by_pixel.view(2, self.pixels, self.taps, self.offset_groups)
        self.mask = None if mask is None else self._by_pixel(mask)

    def _padded(self, input: Tensor) -> Tensor:
        table = input.new_zeros(self.table_shape)
        self._inside(table).copy_(input)
        return table

    def _inside(self, table: Tensor) -> Tensor:
        """The map within a padded table, as (B, C, H, W)."""
        inner = table.view(self.table_shape)[:, PAD : PAD + self.height, PAD : PAD + self.width]
        return inner.permute(0, 3, 1, 2)

    def _rows(self, table: Tensor) -> Tensor:
        return table.view(-1, self.channels // self.offset_groups)

    def _by_pixel(self, mask: Tensor) -> Tensor:
        split = (self.batch, self.offset_groups, self.taps, self.out_h, self.out_w)
        return mask.reshape(split).permute(0, 3, 4, 2, 1).contiguous().view(self.pixels, -1)

    def runs(self) -> list[slice]:
        """Slices of output pixels whose columns, indices and weights fit COLUMN_BYTES."""
        item = self.table.element_size()
        a_pixel = self.taps * (self.channels * item + self.offset_groups * 64)
        limit = COLUMN_BYTES["cpu" if self.table.device.type == "cpu" else "cuda"]
        length = max(1, limit // a_pixel)
        return [
            slice(first, min(first + length, self.pixels))
            for first in range(0, self.pixels, length)
        ]

    def samples(self, run: slice) -> _Samples:
        """The samples of a run of output pixels."""
        device = self.table.device
        pixel = torch.arange(run.start, run.stop, device=device)[:, None, None]
        tap = torch.arange(self.taps, device=device)[:, None]
        image = pixel // (self.out_h * self.out_w)
        out_y, out_x = pixel // self.out_w % self.out_h, pixel % self.out_w
        tap_y, tap_x = tap // self.kernel_w, tap % self.kernel_w
        base_y = out_y * self.stride[0] - self.padding[0] + tap_y * self.dilation[0]
        base_x = out_x * self.stride[1] - self.padding[1] + tap_x * self.dilation[1]
        cell_y, fraction_y, stays_y = self._split(base_y + self.dy[run], self.height)
        cell_x, fraction_x, stays_x = self._split(base_x + self.dx[run], self.width)

        row_type = index_dtype(self.table.shape[0])
        _, table_h, table_w, _ = self.table_shape
        group = torch.arange(self.offset_groups, device=device, dtype=row_type)
        cell = (image.to(row_type) * table_h + cell_y.to(row_type) + PAD) * table_w
        cell = (cell + cell_x.to(row_type) + PAD) * self.offset_groups + group
        right, below = self.offset_groups, table_w * self.offset_groups
        step = torch.tensor([0, right, below, below + right], device=device, dtype=row_type)
        return _Samples(
            cell.view(-1, 1) + step,
            fraction_y.view(-1),
            fraction_x.view(-1),
            None if self.mask is None else self.mask[run].view(-1),
            stays_y,
            stays_x,
        )

    def _split(self, position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Positions along an axis of `size` pixels -> lower cell, fraction, held at the end.

        A position outside falls to a cell of zeros, -2 or `size`: the cell is always safe to cast
        and to read, whatever came in. The fraction of a NaN is NaN, and so is then the sample.
        """
        stays = None
        if self.original:
            inside = position >= 0
            last = position >= size - 1
            position = torch.where(last & (position < size), size - 1, position)
            stays = last.view(-1)
        else:
            inside = position > -1
        position = position.clamp(-PAD, size)
        cell = torch.where(inside, position.floor(), -PAD)
        return cell, position - cell, stays

    def grad_input(self, table_grad: Tensor) -> Tensor:
        """The table's gradient -> the input's (B, C, H, W), channels_last."""
        return self._inside(table_grad).contiguous(memory_format=torch.channels_last)

    def grad_offset(self, grad_y: Tensor, grad_x: Tensor) -> Tensor:
        """Gradients of the positions, each (P * K * G) -> the offset's."""
        split = (2, self.batch, self.out_h, self.out_w, self.taps, self.offset_groups)
        grad = torch.stack([grad_y, grad_x]).view(split).permute(1, 5, 4, 0, 2, 3)
        return grad.reshape(self.batch, -1, self.out_h, self.out_w)

    def grad_mask(self, grad: Tensor) -> Tensor:
        """The mask's gradient (P * K * G) -> (B, G * K, H', W')."""
        split = (self.batch, self.out_h, self.out_w, self.taps, self.offset_groups)
        grad = grad.view(split).permute(0, 4, 3, 1, 2)
        return grad.reshape(self.batch, -1, self.out_h, self.out_w)


def _split_weight(weight: Tensor, groups: int) -> Tensor:
    """weight (O, C / groups, kh, kw) -> (groups, O / groups, K * C / groups), taps outermost."""
    return weight.permute(0, 2, 3, 1).reshape(groups, weight.shape[0] // groups, -1)


def _split_columns(columns: Tensor, pixels: int, taps: int, groups: int) -> Tensor:
    """Samples (pixels * K * G, C / G) -> (groups, pixels, K * C / groups); a view for one group."""
    return columns.view(pixels, taps, groups, -1).permute(2, 0, 1, 3).reshape(groups, pixels, -1)


def _join_columns(columns: Tensor, row: int, taps: int) -> Tensor:
    """The inverse of `_split_columns`: -> (pixels * K * G, C / G), C / G = `row`."""
    groups, pixels, _ = columns.shape
    return columns.view(groups, pixels, taps, -1).permute(1, 2, 0, 3).reshape(-1, row)


@torch.library.custom_op("dcdet::deform_conv2d", mutates_args=())
def _deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    original: bool,
) -> Tensor:
    sampler = _Sampler(input, offset, weight, mask, stride, padding, dilation, original)
    groups = input.shape[1] // weight.shape[1]
    matrix = _split_weight(weight, groups).transpose(1, 2)
    output = input.new_empty(sampler.pixels, weight.shape[0])
    for run in sampler.runs():
        samples = sampler.samples(run)
        columns = gather_rows(sampler.table, samples.corners, samples.weights())
        columns = _split_columns(columns, run.stop - run.start, sampler.taps, groups)
        output[run].view(-1, groups, matrix.shape[2]).copy_((columns @ matrix).transpose(0, 1))
    if bias is not None:
        output += bias
    return output.view(sampler.batch, sampler.out_h, sampler.out_w, -1).permute(0, 3, 1, 2)


@torch.library.custom_op("dcdet::deform_conv2d_backward", mutates_args=())
def _deform_conv2d_backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    original: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, offset, weight and mask (empty without a mask).

    The columns are sampled anew: that takes a tenth of the time of the products around it, and no
    memory outlives a run.
    """
    sampler = _Sampler(input, offset, weight, mask, stride, padding, dilation, original)
    groups = input.shape[1] // weight.shape[1]
    matrix = _split_weight(weight, groups)
    grad = grad.permute(0, 2, 3, 1).reshape(sampler.pixels, groups, -1).transpose(0, 1)
    grad_matrix = torch.zeros_like(matrix)
    grad_table = torch.zeros_like(sampler.table)
    count = sampler.pixels * sampler.taps * sampler.offset_groups
    grad_y, grad_x = input.new_empty(count), input.new_empty(count)
    grad_mask = input.new_empty(0 if mask is None else count)
    for run in sampler.runs():
        pixels = run.stop - run.start
        samples = sampler.samples(run)
        weights = samples.weights()
        columns = gather_rows(sampler.table, samples.corners, weights)
        columns = _split_columns(columns, pixels, sampler.taps, groups)
        grad_matrix.baddbmm_(grad[:, run].transpose(1, 2), columns)

        grad_columns = grad[:, run] @ matrix
        grad_columns = _join_columns(grad_columns, sampler.table.shape[1], sampler.taps)
        owners = torch.arange(4 * grad_columns.shape[0], device=grad.device) // 4
        scatter_rows(grad_columns, samples.corners.view(-1), owners, weights.view(-1), grad_table)

        dots = row_dots(grad_columns, sampler.table, samples.corners)
        places = slice(run.start * count // sampler.pixels, run.stop * count // sampler.pixels)
        if samples.mask is not None:
            grad_mask[places] = (dots * samples.bilinear()).sum(1)
            dots = dots * samples.mask[:, None]
        grad_y[places], grad_x[places] = samples.slopes(dots)
    return (
        sampler.grad_input(grad_table),
        sampler.grad_offset(grad_y, grad_x),
        grad_matrix.view(weight.shape[0], *weight.shape[2:], -1).permute(0, 3, 1, 2).contiguous(),
        grad_mask if mask is None else sampler.grad_mask(grad_mask),
    )


@_deform_conv2d.register_fake
def _(input, offset, weight, bias, mask, stride, padding, dilation, original):
    size = (input.shape[0], offset.shape[2], offset.shape[3], weight.shape[0])
    return input.new_empty(size).permute(0, 3, 1, 2)


@_deform_conv2d_backward.register_fake
def _(grad, input, offset, weight, mask, stride, padding, dilation, original):
    return (
        torch.empty_like(input, memory_format=torch.channels_last),
        torch.empty_like(offset, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        input.new_empty(0 if mask is None else mask.shape),
    )


def _save(ctx, inputs, output):
    input, offset, weight, bias, mask, *ctx.geometry = inputs
    ctx.save_for_backward(input, offset, weight, mask)
    ctx.has_bias = bias is not None


def _backward(ctx, grad):
    input, offset, weight, mask = ctx.saved_tensors
    grad_input, grad_offset, grad_weight, grad_mask = _deform_conv2d_backward(
        grad, input, offset, weight, mask, *ctx.geometry
    )
    grad_bias = grad.sum((0, 2, 3)) if ctx.has_bias else None
    if mask is None:
        grad_mask = None
    return grad_input, grad_offset, grad_weight, grad_bias, grad_mask, None, None, None, None


_deform_conv2d.register_autograd(_backward, setup_context=_save)
for _op in (_deform_conv2d, _deform_conv2d_backward):
    for _device in ("cpu", "cuda"):
        _op.register_autocast(_device, torch.float32)
