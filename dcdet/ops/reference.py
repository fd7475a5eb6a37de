"""Slow twins of the ops, written as the formulas read: loops over taps, bins and samples.

The tests' oracle. Nothing here is shared with the fast ops; gradients come from autograd, so values
and slopes are one formula, but for deform_roi_pool's. Arguments are not checked.
"""

import itertools
import math
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction

import torch
from torch import Tensor


def _pixel(input: Tensor, image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """input (B, C, H, W) at whole positions (n,) of images (n,) -> (n, C), 0 outside the map."""
    height, width = input.shape[2:]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    row, column = torch.where(inside, y, 0).long(), torch.where(inside, x, 0).long()
    return torch.where(inside[:, None], input[image, :, row, column], 0)


def _conv_sample(input: Tensor, image: Tensor, y: Tensor, x: Tensor, border: str) -> Tensor:
    """input (B, C, H, W) at positions (n,) by the border's rule -> (n, C)."""
    height, width = input.shape[2:]
    broken = y.isnan() | x.isnan()
    if border == "zero":
        inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    else:
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    y, x = torch.where(inside, y, 0), torch.where(inside, x, 0)
    if border == "original":
        y = torch.where(y >= height - 1, height - 1, y)
        x = torch.where(x >= width - 1, width - 1, x)
    low_y, low_x = y.detach().floor(), x.detach().floor()
    value = input.new_zeros(y.shape[0], input.shape[1])
    for corner_y, weight_y in ((low_y, 1 - (y - low_y)), (low_y + 1, y - low_y)):
        for corner_x, weight_x in ((low_x, 1 - (x - low_x)), (low_x + 1, x - low_x)):
            weight = weight_y * weight_x
            value = value + weight[:, None] * _pixel(input, image, corner_y, corner_x)
    value = torch.where(inside[:, None], value, 0)
    return torch.where(broken[:, None], torch.nan, value)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    mask: Tensor | None = None,
    border: str = "zero",
) -> Tensor:
    """The twin of ops.deform_conv2d; pairs only."""
    batch, channels = input.shape[:2]
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    out_h, out_w = offset.shape[2:]
    taps = kernel_h * kernel_w
    offset_groups = offset.shape[1] // (2 * taps)
    a_group = channels // offset_groups
    image, out_y, out_x = torch.meshgrid(
        torch.arange(batch), torch.arange(out_h), torch.arange(out_w), indexing="ij"
    )
    image, out_y, out_x = image.flatten(), out_y.flatten(), out_x.flatten()
    output = input.new_zeros(batch * out_h * out_w, out_channels)
    for i in range(kernel_h):
        for j in range(kernel_w):
            sampled = []
            for g in range(offset_groups):
                channel = g * 2 * taps + 2 * (i * kernel_w + j)
                dy, dx = offset[:, channel].flatten(), offset[:, channel + 1].flatten()
                y = out_y * stride[0] - padding[0] + i * dilation[0] + dy
                x = out_x * stride[1] - padding[1] + j * dilation[1] + dx
                part = input[:, g * a_group : (g + 1) * a_group]
                value = _conv_sample(part, image, y, x, border)
                if mask is not None:
                    value = value * mask[:, g * taps + i * kernel_w + j].flatten()[:, None]
                sampled.append(value)
            columns = torch.cat(sampled, 1)
            outputs = []
            for k in range(out_channels):
                first = k // (out_channels * group_channels // channels) * group_channels
                outputs.append(columns[:, first : first + group_channels] @ weight[k, :, i, j])
            output = output + torch.stack(outputs, 1)
    if bias is not None:
        output = output + bias
    return output.view(batch, out_h, out_w, out_channels).permute(0, 3, 1, 2)


def _round(x: Tensor) -> Tensor:
    """Half away from zero."""
    rounded = [float(Decimal(v).to_integral_value(ROUND_HALF_UP)) for v in x.reshape(-1).tolist()]
    return x.new_tensor(rounded).view(x.shape)


def psroi_pool(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    output_dim: int,
    group_size: int,
    pooled_size: int,
) -> Tensor:
    """The twin of ops.psroi_pool."""
    height, width = input.shape[2:]
    pooled = []
    for roi in rois:
        if roi.isnan().any():
            pooled += [input.new_full((output_dim,), torch.nan)] * pooled_size**2
            continue
        x1, y1, x2, y2 = _round(roi[1:].clamp(-1e9, 1e9))
        start_x, start_y = x1 * spatial_scale, y1 * spatial_scale
        end_x, end_y = (x2 + 1) * spatial_scale, (y2 + 1) * spatial_scale
        bin_h = torch.maximum(end_y - start_y, roi.new_tensor(0.1)) / pooled_size
        bin_w = torch.maximum(end_x - start_x, roi.new_tensor(0.1)) / pooled_size
        for ph in range(pooled_size):
            for pw in range(pooled_size):
                edges = (
                    (ph * bin_h + start_y).floor().item(),
                    ((ph + 1) * bin_h + start_y).ceil().item(),
                    (pw * bin_w + start_x).floor().item(),
                    ((pw + 1) * bin_w + start_x).ceil().item(),
                )
                top, bottom = (int(min(max(edge, 0), height)) for edge in edges[:2])
                left, right = (int(min(max(edge, 0), width)) for edge in edges[2:])
                gh, gw = ph * group_size // pooled_size, pw * group_size // pooled_size
                first = gh * group_size + gw
                cells = input[int(roi[0]), first :: group_size**2, top:bottom, left:right]
                area = max(bottom - top, 0) * max(right - left, 0)
                empty = input.new_zeros(output_dim)
                pooled.append(cells.sum((1, 2)) / area if area else empty)
    if not pooled:
        return input.new_zeros(0, output_dim, pooled_size, pooled_size)
    bins = torch.stack(pooled).view(-1, pooled_size, pooled_size, output_dim)
    return bins.permute(0, 3, 1, 2)


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
    """The twin of ops.deform_psroi_pool."""
    height, width = input.shape[2:]
    count = rois.shape[0]
    images = rois[:, 0].long()
    classes = 1 if trans is None else trans.shape[1] // 2
    part_size = part_size or pooled_size
    x1, y1, x2, y2 = _round(rois[:, 1:].clamp(-1e9, 1e9)).unbind(1)
    start_x, start_y = x1 * spatial_scale - 0.5, y1 * spatial_scale - 0.5
    end_x, end_y = (x2 + 1) * spatial_scale - 0.5, (y2 + 1) * spatial_scale - 0.5
    roi_w = torch.maximum(end_x - start_x, rois.new_tensor(0.1))
    roi_h = torch.maximum(end_y - start_y, rois.new_tensor(0.1))
    bin_w, bin_h = roi_w / pooled_size, roi_h / pooled_size
    step_w, step_h = bin_w / sample_per_part, bin_h / sample_per_part
    bins = []
    for channel in range(output_dim):
        of_class = channel // (output_dim // classes)
        for ph in range(pooled_size):
            for pw in range(pooled_size):
                gh, gw = ph * group_size // pooled_size, pw * group_size // pooled_size
                plane = input[:, (channel * group_size + gh) * group_size + gw, None]
                y, x = ph * bin_h + start_y, pw * bin_w + start_x
                broken = rois.isnan().any(1)
                if trans is not None:
                    single = torch.tensor([ph, pw], dtype=torch.float32)
                    part_h, part_w = (single / pooled_size * part_size).floor().long().tolist()
                    shift_x = trans[:, 2 * of_class, part_h, part_w]
                    shift_y = trans[:, 2 * of_class + 1, part_h, part_w]
                    broken = broken | shift_x.isnan() | shift_y.isnan()
                    x = x + shift_x.clamp(-1e9, 1e9) * trans_std * roi_w
                    y = y + shift_y.clamp(-1e9, 1e9) * trans_std * roi_h
                total, kept_samples = input.new_zeros(count), input.new_zeros(count)
                for ih in range(sample_per_part):
                    for iw in range(sample_per_part):
                        value, kept = _roi_sample(
                            plane, images, y + ih * step_h, x + iw * step_w, height, width
                        )
                        total, kept_samples = total + value, kept_samples + kept
                mean = torch.where(kept_samples > 0, total / kept_samples.clamp(min=1), 0)
                bins.append(torch.where(broken, torch.nan, mean))
    return torch.stack(bins, 1).view(count, output_dim, pooled_size, pooled_size)


def _roi_sample(
    plane: Tensor, images: Tensor, y: Tensor, x: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """plane (N, 1, H, W) at positions (n,) -> values (n,), 0 where dropped, and which are kept."""
    kept = (y >= -0.5) & (y <= height - 0.5) & (x >= -0.5) & (x <= width - 0.5)
    y = torch.where(kept, y, 0).clamp(0, height - 1)
    x = torch.where(kept, x, 0).clamp(0, width - 1)
    value = torch.zeros_like(y)
    # where floor and ceil are one pixel, its two weights add up to 1 and their slopes to 0
    for pixel_y, weight_y in ((y.floor(), 1 - (y - y.floor())), (y.ceil(), y - y.floor())):
        for pixel_x, weight_x in ((x.floor(), 1 - (x - x.floor())), (x.ceil(), x - x.floor())):
            pixel = _pixel(plane, images, pixel_y.detach(), pixel_x.detach())[:, 0]
            value = value + weight_y * weight_x * pixel
    return torch.where(kept, value, 0), kept


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    mask: Tensor | None = None,
) -> Tensor:
    """The twin of ops.deform_roi_pool; pairs only."""
    channels = input.shape[1]
    pooled = []
    for number, roi in enumerate(rois):
        x1, y1, x2, y2 = (roi[1:] * spatial_scale).clamp(-1e9, 1e9) - 0.5
        for place in itertools.product(*map(range, output_size)):
            axes = []
            for axis, start, end in ((0, y1, y2), (1, x1, x2)):
                bin_size = (end - start) / output_size[axis]
                first = start
                if offset is not None:  # channel 0 is that of x
                    shift = offset[number, 1 - axis, place[0], place[1]].clamp(-1e9, 1e9)
                    first = first + gamma * (end - start) * shift
                first = first + place[axis] * bin_size
                axes.append(_samples_of_bin(first, bin_size, sampling_ratio, input.shape[2 + axis]))
            (y, count_y), (x, count_x) = axes
            if y is None or x is None:
                pooled.append(input.new_full((channels,), torch.nan))
            else:
                total = _aligned_samples(input[int(roi[0])], y, x).sum((1, 2))
                pooled.append(total / max(count_y * count_x, 1))
    if not pooled:
        return input.new_zeros(0, channels, *output_size)
    bins = torch.stack(pooled).view(-1, *output_size, channels).permute(0, 3, 1, 2)
    return bins if mask is None else bins * mask


def _samples_of_bin(
    first: Tensor, bin_size: Tensor, ratio: int, length: int
) -> tuple[Tensor | None, int]:
    """The samples of a bin that are in [-1, length], None where they are NaN; how many it has."""
    if first.isnan():
        return None, 0
    count = ratio or max(math.ceil(bin_size.float().item()), 0)
    numbers = range(count)
    if count > 1000:  # those near the map, in exact arithmetic
        start, step = Fraction(first.item()), Fraction(bin_size.item()) / count
        low, high = ((edge - start) / step for edge in (-1, length))
        numbers = range(max(math.floor(low) - 3, 0), min(math.ceil(high) + 3, count))
    positions = first + (first.new_tensor(list(numbers)) + 0.5) * bin_size / max(count, 1)
    return positions[(positions >= -1) & (positions <= length)], count


def _aligned_samples(plane: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """plane (C, H, W) at rows y (n,) and columns x (m,) in [-1, H] and [-1, W] -> (C, n, m).

    The value is that of the position moved onto the map. The slope is that of the same bilinear
    form, with the same corners, at the position that was not moved.
    """
    value = plane.new_zeros(plane.shape[0], y.shape[0], x.shape[0])
    form = torch.zeros_like(value)
    for cell_y, weight_y, extended_y in _aligned_corners(y, plane.shape[1]):
        for cell_x, weight_x, extended_x in _aligned_corners(x, plane.shape[2]):
            corner = plane[:, cell_y][:, :, cell_x]
            value = value + corner * weight_y[:, None] * weight_x
            form = form + corner.detach() * extended_y[:, None] * extended_x
    return value + (form - form.detach())


def _aligned_corners(position: Tensor, length: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of both corners: pixel, weight in the value, weight in the slope."""
    moved = position.detach().clamp(0, length - 1)
    low = moved.floor()
    high = (low + 1).clamp(max=length - 1)
    fraction = moved - low
    return [
        (low.long(), 1 - fraction, high - position),
        (high.long(), fraction, position - low),
    ]


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> list[int]:
    """The twin of ops.nms: pairwise, in Python floats."""
    finite = [
        i
        for i, (box, score) in enumerate(zip(boxes.tolist(), scores.tolist(), strict=True))
        if all(map(math.isfinite, [*box, score]))
    ]
    kept: list[int] = []
    for i in sorted(finite, key=lambda i: (-scores[i].item(), i)):
        if all(_iou(boxes[i].tolist(), boxes[j].tolist()) <= iou_threshold for j in kept):
            kept.append(i)
    return kept


def _iou(a: list[float], b: list[float]) -> float:
    """Intersection over union of two boxes; 1 for equal boxes, 0 if either has no area."""
    if a == b:
        return 1.0
    areas = [max(x2 - x1, 0) * max(y2 - y1, 0) for x1, y1, x2, y2 in (a, b)]
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if min(width, height, *areas) <= 0:
        return 0.0
    return width * height / (sum(areas) - width * height)
