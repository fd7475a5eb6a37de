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

Letters: B images, C input and O output channels, G offset groups, K = kh * kw taps, P = B * H' * W'
output pixels.
Sources: Dai et al., Deformable Convolutional Networks, 2017; Zhu et al., Deformable ConvNets v2,
2019; `deformable_im2col.cuh` of the 2017 release for the border rules.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dcdet.ops import checks, compiled
from dcdet.ops.rows import gather_rows, index_dtype, row_dots, scatter_rows

Border = Literal["zero", "original"]

OP = "deform_conv2d"

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
    groups follow from the shapes. Offset and mask have the input's dtype or float32. Half types are
    computed in float32 and rounded once; only bfloat16 on a CPU with AMX has its samples rounded,
    too. Raises TypeError and ValueError, naming the argument.
    """
    strides = checks.pair(OP, "stride", stride, 1)
    paddings = checks.pair(OP, "padding", padding, 0)
    dilations = checks.pair(OP, "dilation", dilation, 1)
    if border not in ("zero", "original"):
        raise checks.wrong(OP, "border", "'zero' or 'original'", repr(border))
    _check(input, offset, weight, bias, mask, strides, paddings, dilations, operator=False)
    positions = checks.compute_dtype(input)
    dtype = input.dtype if compiled.covers(OP, input) else positions
    output: Tensor = _deform_conv2d(
        input.to(dtype),
        offset.to(positions),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        None if mask is None else mask.to(positions),
        strides,
        paddings,
        dilations,
        border == "original",
    )
    return output.to(input.dtype)


def _check(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    *,
    grad: Tensor | None = None,
    operator: bool = True,
) -> None:
    """What the public function, the operator, its backward and its fake kernel all ask for.

    The operator is given offset and mask in the dtype of positions.
    """
    checks.floating(OP, "input", input, 4)
    checks.alike(OP, "weight", weight, 4, input)
    checks.alike(OP, "offset", offset, 4, input, torch.float32)
    for name, pair, minimum in (
        ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)
    ):  # fmt: skip
        checks.pair(OP, name, pair, minimum)
    batch, channels, *size = input.shape
    out_channels, group_channels, *kernel = weight.shape
    if min(channels, *size) < 1:
        raise checks.wrong(OP, "input", "of at least 1 channel and pixel", tuple(input.shape))
    if min(weight.shape) < 1 or channels % group_channels:
        wanted = f"(O, C / groups, kh, kw) where C = {channels}"
        raise checks.wrong(OP, "weight", wanted, f"shape {tuple(weight.shape)}")
    if out_channels % (channels // group_channels):
        wanted = f"of O divisible by the {channels // group_channels} groups"
        raise checks.wrong(OP, "weight", wanted, f"shape {tuple(weight.shape)}")
    reach = [dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i] for i in (0, 1)]
    out_h, out_w = [(size[i] - reach[i]) // stride[i] + 1 for i in (0, 1)]
    if min(out_h, out_w) < 1:
        wanted = f"no larger than the padded input {tuple(size)}"
        raise checks.wrong(OP, "kernel", wanted, f"{tuple(kernel)} with dilation {dilation}")
    taps = kernel[0] * kernel[1]
    offset_groups = offset.shape[1] // (2 * taps)
    if offset_groups < 1 or channels % offset_groups:
        wanted = f"of 2 * G * {taps} channels, G a divisor of {channels}"
        raise checks.wrong(OP, "offset", wanted, f"shape {tuple(offset.shape)}")
    wanted_shape = (batch, 2 * offset_groups * taps, out_h, out_w)
    checks.shape(OP, "offset", offset, wanted_shape, "(B, 2 * G * K, H', W')")
    if bias is not None:
        checks.alike(OP, "bias", bias, 1, input)
        checks.shape(OP, "bias", bias, (out_channels,), "(O,)")
    if mask is not None:
        checks.alike(OP, "mask", mask, 4, input, torch.float32)
        wanted_shape = (batch, offset_groups * taps, out_h, out_w)
        checks.shape(OP, "mask", mask, wanted_shape, "(B, G * K, H', W')")
    if grad is not None:
        checks.alike(OP, "grad", grad, 4, input)
        checks.shape(OP, "grad", grad, (batch, out_channels, out_h, out_w), "(B, O, H', W')")
    if operator:
        for name, tensor in (("offset", offset), ("mask", mask)):
            if tensor is not None and tensor.dtype != checks.compute_dtype(input):
                raise checks.wrong_type(OP, name, f"{checks.compute_dtype(input)}", tensor.dtype)


class _Samples(NamedTuple):
    """Where a run of output pixels reads the table: n = pixels * K * G samples, in that order.

    `corners` (n, 4) are row numbers: (y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1);
    `fraction` (2, n) lies between them, y first; `mask` is (n,) or None; `held` (2, n) marks the
    positions held at the last row or column, where they have no gradient (None: nowhere).
    """

    corners: Tensor
    fraction: Tensor
    mask: Tensor | None
    held: Tensor | None

    def bilinear(self) -> Tensor:
        """The corners' weights without the mask -> (n, 4)."""
        y, x = self.fraction
        return torch.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], dim=1)

    def weights(self) -> Tensor:
        """The corners' weights -> (n, 4)."""
        return self.bilinear() if self.mask is None else self.bilinear() * self.mask[:, None]

    def slopes(self, dots: Tensor) -> Tensor:
        """Gradients of the four corner weights (n, 4) -> those of the positions (2, n)."""
        y, x = self.fraction
        upper_left, upper_right, lower_left, lower_right = dots.unbind(1)
        grad_y = torch.lerp(lower_left - upper_left, lower_right - upper_right, x)
        grad_x = torch.lerp(upper_right - upper_left, lower_right - lower_left, y)
        grad = torch.stack([grad_y, grad_x])
        return grad if self.held is None else grad.masked_fill(self.held, 0)


class _Sampler:
    """One call's geometry: cuts the output pixels into runs and finds each run's samples.

    `table` holds the input as rows of one offset group's channels, pixel by pixel, with PAD zero
    pixels around each image.
    """

    def __init__(
        self, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, original: bool
    ) -> None:
        self.batch, self.channels, self.height, self.width = input.shape
        self.kernel_w, self.taps = weight.shape[3], weight.shape[2] * weight.shape[3]
        self.groups = self.channels // weight.shape[1]
        self.offset_groups = offset.shape[1] // (2 * self.taps)
        self.out_h, self.out_w = offset.shape[2:]
        self.pixels = self.batch * self.out_h * self.out_w
        self.original = original
        self.padded = (self.batch, self.height + 2 * PAD, self.width + 2 * PAD, self.channels)
        padded = input.new_zeros(self.padded)
        self.as_map(padded).copy_(input)
        self.table = padded.view(-1, self.channels // self.offset_groups)
        self.offset = self._by_pixel(offset, 2)
        self.mask = None if mask is None else self._by_pixel(mask, 1)[0]

    def as_map(self, table: Tensor) -> Tensor:
        """The view of a table without its border, as (B, C, H, W)."""
        rows, columns = slice(PAD, PAD + self.height), slice(PAD, PAD + self.width)
        return table.view(self.padded)[:, rows, columns].permute(0, 3, 1, 2)

    def _by_pixel(self, values: Tensor, parts: int) -> Tensor:
        """Offset (2 parts) or mask (1 part) -> (parts, P, K, G)."""
        values = values.unflatten(1, (self.offset_groups, self.taps, parts))
        return values.permute(3, 0, 4, 5, 2, 1).contiguous().flatten(1, 3)

    def by_channel(self, values: Tensor) -> Tensor:
        """The inverse of `_by_pixel`: (parts, P * K * G) -> (B, G * K * parts, H', W')."""
        split = (self.batch, self.out_h, self.out_w, self.taps, self.offset_groups)
        return (
            values.view(values.shape[0], *split)
            .permute(1, 5, 4, 0, 2, 3)
            .contiguous()
            .flatten(1, 3)
        )

    def runs(self) -> Iterator[slice]:
        """Slices of output pixels whose columns, indices and weights fit COLUMN_BYTES."""
        bytes_of_pixel = self.taps * (self.channels * 4 + self.offset_groups * 64)
        limit = COLUMN_BYTES["cpu" if self.table.device.type == "cpu" else "cuda"]
        length = max(1, limit // bytes_of_pixel)
        for first in range(0, self.pixels, length):
            yield slice(first, min(first + length, self.pixels))

    def samples(
        self, run: slice, stride: list[int], padding: list[int], dilation: list[int]
    ) -> _Samples:
        """The samples of a run of output pixels.

        A position outside falls to a cell of zeros, -PAD or the map's size: the cell is always safe
        to cast and to read, whatever came in. The fraction of a NaN is NaN, so then is the sample.
        """
        arange = partial(torch.arange, device=self.table.device)
        pixel, tap = arange(run.start, run.stop)[:, None, None], arange(self.taps)[:, None]
        size = pixel.new_tensor([self.height, self.width]).view(2, 1, 1, 1)
        base_y = pixel // self.out_w % self.out_h * stride[0] + tap // self.kernel_w * dilation[0]
        base_x = pixel % self.out_w * stride[1] + tap % self.kernel_w * dilation[1]
        base = torch.stack([base_y - padding[0], base_x - padding[1]])
        position = base + self.offset[:, run]
        held = None
        if self.original:
            inside, held = position >= 0, position >= size - 1
            position = torch.where(held & (position < size), size - 1, position)
            held = held.view(2, -1)
        else:
            inside = position > -1
        position = position.clamp(min=-PAD).minimum(size)
        cell = torch.where(inside, position.floor(), -PAD)

        row_type = index_dtype(self.table.shape[0])
        y, x = cell.to(row_type) + PAD
        _, padded_h, padded_w, _ = self.padded
        image = (pixel // (self.out_h * self.out_w)).to(row_type)
        group = arange(self.offset_groups, dtype=row_type)
        first = ((image * padded_h + y) * padded_w + x) * self.offset_groups + group
        right, below = self.offset_groups, padded_w * self.offset_groups
        corners = first.view(-1, 1) + first.new_tensor([0, right, below, below + right])
        mask = None if self.mask is None else self.mask[run].flatten()
        return _Samples(corners, (position - cell).view(2, -1), mask, held)

    def columns(self, samples: _Samples) -> Tensor:
        """The sampled input -> (groups, pixels, K * C / groups); a view for one group."""
        columns = gather_rows(self.table, samples.corners, samples.weights())
        columns = columns.view(-1, self.taps, self.groups, self.channels // self.groups)
        return columns.permute(2, 0, 1, 3).flatten(2)

    def rows(self, columns: Tensor) -> Tensor:
        """The inverse layout of `columns`: -> (n, C / G)."""
        columns = columns.unflatten(2, (self.taps, -1)).permute(1, 2, 0, 3)
        return columns.reshape(-1, self.table.shape[1])


def _split_weight(weight: Tensor, groups: int) -> Tensor:
    """weight (O, C / groups, kh, kw) -> (groups, O / groups, K * C / groups), taps outermost."""
    return weight.permute(0, 2, 3, 1).reshape(groups, weight.shape[0] // groups, -1)


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
    _check(input, offset, weight, bias, mask, stride, padding, dilation)
    if compiled.covers(OP, input):
        geometry = (stride, padding, dilation, original)
        return compiled.kernels.deform_conv2d(input, offset, weight, bias, mask, *geometry)
    if input.dtype != offset.dtype:
        wide = [None if t is None else t.to(offset.dtype) for t in (input, weight, bias)]
        rest = (mask, stride, padding, dilation, original)
        output: Tensor = _deform_conv2d(wide[0], offset, wide[1], wide[2], *rest)
        return output.to(input.dtype)
    sampler = _Sampler(input, offset, weight, mask, original)
    matrix = _split_weight(weight, sampler.groups).transpose(1, 2)
    output = input.new_empty(sampler.batch, sampler.out_h, sampler.out_w, weight.shape[0])
    by_pixel = output.view(sampler.pixels, sampler.groups, matrix.shape[2])
    for run in sampler.runs():
        columns = sampler.columns(sampler.samples(run, stride, padding, dilation))
        by_pixel[run] = (columns @ matrix).transpose(0, 1)
    if bias is not None:
        output += bias
    return output.permute(0, 3, 1, 2)


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

    Those of input and weight are in channels_last memory, as a model's are: autograd would copy
    any other layout.
    The columns are sampled anew: that takes a tenth of the time of the products around it, and no
    memory outlives a run.
    """
    _check(input, offset, weight, None, mask, stride, padding, dilation, grad=grad)
    if compiled.covers(OP, input):
        geometry = (stride, padding, dilation, original)
        return compiled.kernels.deform_conv2d_backward(grad, input, offset, weight, mask, *geometry)
    if input.dtype != offset.dtype:  # the kernels were there in the forward pass
        wide = [t.to(offset.dtype) for t in (grad, input, weight)]
        rest = (mask, stride, padding, dilation, original)
        grads = _deform_conv2d_backward(wide[0], wide[1], offset, wide[2], *rest)
        return grads[0].to(input.dtype), grads[1], grads[2].to(input.dtype), grads[3]
    sampler = _Sampler(input, offset, weight, mask, original)
    matrix = _split_weight(weight, sampler.groups)
    grad = grad.permute(0, 2, 3, 1).reshape(sampler.pixels, *matrix.shape[:2]).transpose(0, 1)
    grad_matrix, grad_table = torch.zeros_like(matrix), torch.zeros_like(sampler.table)
    samples_of_pixel = sampler.taps * sampler.offset_groups
    grad_position = input.new_empty(2, sampler.pixels * samples_of_pixel)
    grad_mask = input.new_empty(0 if mask is None else mask.numel())
    for run in sampler.runs():
        samples = sampler.samples(run, stride, padding, dilation)
        grad_run = grad[:, run]
        grad_matrix.baddbmm_(grad_run.transpose(1, 2), sampler.columns(samples))

        grad_rows = sampler.rows(grad_run @ matrix)
        owners = torch.arange(samples.corners.numel(), device=grad.device) // 4
        weights = samples.weights().view(-1)
        scatter_rows(grad_rows, samples.corners.view(-1), owners, weights, grad_table)

        places = slice(run.start * samples_of_pixel, run.stop * samples_of_pixel)
        dots = row_dots(grad_rows, sampler.table, samples.corners)
        if samples.mask is not None:
            grad_mask[places] = (dots * samples.bilinear()).sum(1)
            dots = dots * samples.mask[:, None]
        grad_position[:, places] = samples.slopes(dots)
    grad_weight = grad_matrix.view(weight.shape[0], *weight.shape[2:], weight.shape[1])
    return (
        sampler.as_map(grad_table).contiguous(memory_format=torch.channels_last),
        sampler.by_channel(grad_position),
        grad_weight.permute(0, 3, 1, 2),
        grad_mask if mask is None else sampler.by_channel(grad_mask[None]),
    )


@_deform_conv2d.register_fake
def _(
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
    _check(input, offset, weight, bias, mask, stride, padding, dilation)
    size = (input.shape[0], offset.shape[2], offset.shape[3], weight.shape[0])
    return input.new_empty(size).permute(0, 3, 1, 2)


@_deform_conv2d_backward.register_fake
def _(
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
    _check(input, offset, weight, None, mask, stride, padding, dilation, grad=grad)
    return (
        torch.empty_like(input, memory_format=torch.channels_last),
        torch.empty_like(offset, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.channels_last),
        offset.new_empty(0 if mask is None else mask.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, weight, bias, mask, *ctx.geometry = inputs
    ctx.save_for_backward(input, offset, weight, mask)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, weight, mask = ctx.saved_tensors
    grad_input, grad_offset, grad_weight, grad_mask = _deform_conv2d_backward(
        grad, input, offset, weight, mask, *ctx.geometry
    )
    grad_bias = grad.sum((0, 2, 3)) if ctx.has_bias else None
    if mask is None:
        grad_mask = None
    return grad_input, grad_offset, grad_weight, grad_bias, grad_mask, None, None, None, None


_deform_conv2d.register_autograd(_backward, setup_context=_save)
compiled.below_autocast(_deform_conv2d, "deform_conv2d")
compiled.below_autocast(_deform_conv2d_backward, "deform_conv2d_backward")
