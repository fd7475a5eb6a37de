"""Instance masks: bitmaps, their run lengths in files, and a network's small masks in an image.

Run lengths are COCO's: a mask's pixels, column after column, as the numbers of equal ones in turn,
background first; compressed into letters in files and in memory. pycocotools, which draws polygons
and compresses, trusts its input: it gets nothing that was not checked here.
N masks of M x M cells, in an image of `size` (h, w).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional

Size = tuple[int, int]
PasteMethod = Literal["grid", "resize"]

MAX_SIDE = 16_384
LONGEST_OUTLINE = 1_000_000  # pixels, of a polygon; pycocotools holds 40 bytes or more for each
FARTHEST = 1e7  # pixels; no box of an image reaches so far
EMPTY = "mask without a pixel (kept)"
STRIP = 1 << 17  # pixels of an image that are sampled at once


def clean_segmentation(segmentation: Any, size: Size) -> tuple[bytes | None, str]:
    """A COCO segmentation as compressed run lengths, and what was wrong with it.

    It is a list of polygons, whose union is the mask, or an object with `size` and `counts`, as
    letters or numbers. None instead of one that is not usable. A polygon without three corners is
    left out; a mask without a pixel (thinner than one, or outside) is one all the same.
    """
    if not all(1 <= side <= MAX_SIDE for side in size):
        return None, "a mask needs the image's size (dropped)"
    try:
        if isinstance(segmentation, dict):
            if segmentation.get("size") != list(size):
                raise ValueError("run lengths of another size than the image's")
            runs = read_runs(segmentation.get("counts"), size)
            return _compress(runs, size), "" if len(runs) > 1 else EMPTY
        if isinstance(segmentation, list):
            return _from_polygons(segmentation, size)
        raise ValueError("neither polygons nor run lengths")
    except ValueError as error:
        return None, f"{error} (dropped)"


def _from_polygons(polygons: list[Any], size: Size) -> tuple[bytes, str]:
    good = []
    for polygon in polygons:
        try:
            numbers = np.array(polygon)
        except (ValueError, OverflowError) as error:  # lists of several lengths
            raise ValueError("polygon that is not a list of numbers") from error
        if not isinstance(polygon, list) or numbers.ndim != 1 or numbers.dtype.kind not in "if":
            raise ValueError("polygon that is not a list of numbers")
        numbers = numbers.astype(np.float64)
        if len(numbers) < 6 or len(numbers) % 2:
            continue
        outline = np.abs(numbers[2:] - numbers[:-2]).sum() + np.abs(numbers).max()
        if not outline <= LONGEST_OUTLINE:  # true for NaN, too
            raise ValueError("polygon with a non-finite or huge outline")
        good.append(polygon)
    if not good:
        raise ValueError("no polygon of at least three corners")
    mask = coco_mask.merge(coco_mask.frPyObjects(good, *size))
    if len(good) < len(polygons):
        return mask["counts"], "polygon without three corners (left out)"
    return mask["counts"], "" if coco_mask.area(mask) else EMPTY


def read_runs(counts: Any, size: Size) -> NDArray[np.int64]:
    """Run lengths from a file, letters or numbers -> numbers, none but the first of them 0.

    Raises ValueError for what is no mask of `size`.
    """
    if isinstance(counts, str | bytes):
        letters = counts.encode("utf-8", "surrogatepass") if isinstance(counts, str) else counts
        runs = _expand(letters)
    elif isinstance(counts, list) and all(type(n) is int and abs(n) < 1 << 32 for n in counts):
        runs = np.array(counts, dtype=np.int64)
    else:
        raise ValueError("run lengths that are not letters or whole numbers")
    pixels = size[0] * size[1]
    if ((runs < 0) | (runs > pixels)).any() or runs.sum() != pixels:  # no sum overflows
        raise ValueError("run lengths that do not fill the image")
    if (runs[1:] == 0).any():  # two changes at one place are none
        changes, times = np.unique(np.cumsum(runs), return_counts=True)
        return _runs_between(changes[times % 2 == 1], pixels)
    return runs


def _expand(letters: bytes) -> NDArray[np.int64]:
    """Compressed run lengths as numbers.

    A letter holds 5 bits, lowest first, and whether another follows; from the fourth number on they
    are differences to the last but one. Source: rleToString of pycocotools' maskApi.c.
    """
    digits = np.frombuffer(letters, dtype=np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((digits & 32) == 0)
    lengths = np.diff(last, prepend=-1)
    if (
        not len(last)
        or last[-1] != len(digits) - 1
        or lengths.max() > 6
        or not ((digits >= 0) & (digits < 64)).all()
    ):
        raise ValueError("run lengths that cannot be decompressed")
    starts = last - lengths + 1
    places = np.arange(len(digits)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((digits & 31) << (5 * places), starts)
    numbers -= np.where(digits[last] & 16, 1 << (5 * lengths), 0)  # the sign
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def _runs_between(changes: NDArray[np.int64], pixels: int) -> NDArray[np.int64]:
    """Run lengths from the sorted places at which a mask of so many pixels changes."""
    return np.diff(np.concatenate([[0], changes[changes < pixels], [pixels]]))


def _compress(runs: NDArray[np.int64], size: Size) -> bytes:
    uncompressed = {"size": list(size), "counts": runs.tolist()}
    counts: bytes = coco_mask.frPyObjects(uncompressed, *size)["counts"]
    return counts


def decode(masks: Sequence[bytes], size: Size) -> NDArray[np.bool_]:
    """Compressed run lengths -> bitmaps (N, H, W). Raises ValueError."""
    bitmaps = np.empty((len(masks), size[1], size[0]), dtype=bool)
    for bitmap, counts in zip(bitmaps, masks, strict=True):
        runs = read_runs(counts, size)
        bitmap.ravel()[:] = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return bitmaps.transpose(0, 2, 1)


def encode(masks: Tensor) -> list[dict[str, Any]]:
    """Masks (N, H, W) bool -> N objects with `size` and `counts`, as in COCO's files."""
    height, width = size = int(masks.shape[1]), int(masks.shape[2])
    encoded = []
    for mask in masks.cpu().numpy():
        columns = np.flatnonzero(mask.any(axis=0))
        first, end = (columns[0], columns[-1] + 1) if len(columns) else (0, 0)
        framed = np.zeros((end - first) * height + 2, dtype=bool)
        framed[1:-1] = mask[:, first:end].T.ravel()
        changes = np.flatnonzero(framed[1:] != framed[:-1]) + first * height
        counts = _compress(_runs_between(changes, height * width), size)
        encoded.append({"size": list(size), "counts": counts.decode()})
    return encoded


def paste(probabilities: Tensor, boxes: Tensor, size: Size, method: PasteMethod) -> Tensor:
    """Masks (N, M, M) in [0, 1] of boxes (N, 4) -> bitmaps (N, H, W) bool of an image of `size`.

    Boxes are continuous xyxy in that image's pixels. "grid" samples at the centres of the pixels,
    from 0.5 on, as mmdetection and detectron2 do; "resize" enlarges to whole pixels, above 0.5, as
    torchvision does and its references evaluate. A box without an area or with a huge number or
    none, and a probability that is none, give no mask.
    """
    shape = (len(boxes), *size)
    if boxes.device.type == "cpu":  # numpy's zeros take memory only where a mask is written
        masks = torch.from_numpy(np.zeros(shape, dtype=bool))
    else:
        masks = torch.zeros(shape, dtype=torch.bool, device=boxes.device)
    write = _paste_grid if method == "grid" else _paste_resized
    boxes = boxes.detach().cpu().float()
    usable = (boxes.abs() <= FARTHEST).all(dim=1) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    for index in usable.nonzero().flatten().tolist():
        write(masks[index], probabilities[index].float(), boxes[index])
    return masks


def _paste_grid(mask: Tensor, cells: Tensor, box: Tensor) -> None:
    """Source: _do_paste_mask of mmdetection's fcn_mask_head.py; only what may reach 0.5 is seen."""
    (x1, y1, x2, y2), (height, width) = box.tolist(), mask.shape
    left, right = max(0, math.floor(x1) - 1), min(width, math.ceil(x2) + 1)
    top, bottom = max(0, math.floor(y1) - 1), min(height, math.ceil(y2) + 1)
    if left >= right or top >= bottom:
        return
    box = box.to(mask.device)
    x, y = (
        (torch.arange(low, high, device=mask.device) + 0.5 - box[axis])
        / (box[axis + 2] - box[axis]) * 2 - 1
        for axis, (low, high) in enumerate(((left, right), (top, bottom)))
    )  # fmt: skip
    rows = max(1, STRIP // (right - left))
    for start in range(0, bottom - top, rows):
        strip = torch.stack(torch.meshgrid(x, y[start : start + rows], indexing="xy"), dim=-1)
        seen = functional.grid_sample(cells[None, None], strip[None], align_corners=False)
        mask[top + start : top + start + len(seen[0, 0]), left:right] = seen[0, 0] >= 0.5


def _paste_resized(mask: Tensor, cells: Tensor, box: Tensor) -> None:
    """Source: paste_masks_in_image of torchvision's roi_heads.py.

    A box so large that its mask would be many images large gives none.
    """
    factor = (cells.shape[-1] + 2) / cells.shape[-1]
    centre, half = (box[:2] + box[2:]) * 0.5, (box[2:] - box[:2]) * 0.5 * factor
    corners = torch.cat([centre - half, centre + half]).tolist()
    x1, y1, x2, y2 = (int(value) for value in corners)
    high, wide = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
    height, width = mask.shape
    left, right, top, bottom = max(0, x1), min(width, x2 + 1), max(0, y1), min(height, y2 + 1)
    if left >= right or top >= bottom or high * wide > 8 * max(height * width, STRIP):
        return
    framed = functional.pad(cells[None, None], (1, 1, 1, 1))
    large = functional.interpolate(framed, (high, wide), mode="bilinear", align_corners=False)
    mask[top:bottom, left:right] = large[0, 0, top - y1 : bottom - y1, left - x1 : right - x1] > 0.5
