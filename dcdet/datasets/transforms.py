"""From an image file to the array the network sees. Nothing here is random: callers decide."""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from dcdet import boxes as box_ops
from dcdet.masks import decode

Orientation = Literal["ignore", "apply"]
ResizeMethod = Literal["original", "mmdetection", "torchvision", "detectron2"]

MAX_PIXELS = 64_000_000
MAX_SIDE = 16_384
MIN_SIDE = 2
MAX_FILE_BYTES = 1 << 30
THINNEST = 1 / 64  # network pixels; keeps x1 < x2 in float32
# Pillow asks only these decoders, never one that starts another program (EPS).
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")


class BadImage(Exception):
    """An image file that cannot be used; the message says why, without the path.

    `path` is set where another file than the image itself is meant.
    """

    path: str | None = None


def read_file(path: str, limit: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; OSError for anything else.

    A FIFO, a device or a folder is refused without waiting for it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("is not a regular file")
        if status.st_size > limit:
            raise OSError(f"has {status.st_size} bytes, more than {limit}")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(descriptor)


def read_image(
    path: str, orientation: Orientation = "ignore", max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decode an image file -> (H, W, 3) uint8 RGB; BadImage says why one cannot be used.

    Grey, palette, CMYK and YCbCr images are converted, alpha is dropped, 16-bit grey is scaled to
    8 bits. Animations, other depths and other formats are refused. Size limits are checked in the
    header, before anything is allocated. `orientation` "ignore" leaves EXIF orientation aside, as
    the 2017 release does. Decoding is bit-equal to cv2.imread for 8-bit JPEG and PNG; Pillow is
    used because it refuses truncated files, which OpenCV fills with grey.
    """
    with opened(path, max_pixels) as image:
        turned = ImageOps.exif_transpose(image) if orientation == "apply" else image
        return _to_rgb(turned)


def read_size(path: str) -> tuple[int, int]:
    """The size (h, w) in the header of an image file, EXIF orientation aside; or BadImage."""
    with opened(path, MAX_PIXELS) as image:
        return image.height, image.width


@contextmanager
def opened(path: str, max_pixels: int) -> Iterator[Image.Image]:
    """An image file whose header was looked at; BadImage for any error, also of decoding."""
    try:
        with Image.open(BytesIO(read_file(path)), formats=FORMATS) as image:
            _check_header(image, max_pixels)
            yield image
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly every type on damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if "cannot identify image file" in reason:
            reason = "is not an image in a known format (" + ", ".join(FORMATS) + ")"
        raise BadImage(reason or type(error).__name__) from error


def _check_header(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise BadImage(
            f"{width} x {height} pixels, the limit is {max_pixels} pixels and {MAX_SIDE} a side"
        )
    if min(width, height) < MIN_SIDE:
        raise BadImage(f"{width} x {height} pixels, at least {MIN_SIDE} a side are needed")
    # MPO is how phones write JPEG: its further frames are previews.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise BadImage(f"animation or stack of {image.n_frames} images")  # type: ignore[attr-defined]


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode != "RGB":
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
            levels = np.asarray(image).astype(np.uint32)
            image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise BadImage(f"32-bit pixels (mode {image.mode}) have no defined range")
        elif image.mode in ("RGBA", "RGBX", "LA"):  # alpha dropped, colours as stored
            grey = image.mode == "LA"
            image = image.getchannel(0) if grey else Image.merge("RGB", image.split()[:3])
        image = image.convert("RGB")
    return np.asarray(image)


def network_scale(size: tuple[int, int], short: int, long: int) -> float:
    """Network pixels per original pixel for an image of `size` (h, w).

    The short side becomes `short`, unless the long side would exceed `long`: then that becomes
    `long`. Source: the 2017 release, lib/utils/image.py.
    """
    scale = short / min(size)
    if np.round(scale * max(size)) > long:
        scale = long / max(size)
    return scale


def resize(image: np.ndarray, scale: float) -> np.ndarray:
    """Image (H, W, 3) uint8 enlarged by one factor for both axes, bilinear on uint8."""
    if min(image.shape[:2]) * scale <= 0.5:  # OpenCV rounds half to even
        raise BadImage(f"too narrow: {image.shape[1]} x {image.shape[0]} pixels times {scale:.3g}")
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)


def network_size(
    size: tuple[int, int], short: int, long: int, method: ResizeMethod
) -> tuple[int, int]:
    """The size (h, w) that an image of `size` gets where each axis has a factor of its own.

    Sources: mmcv, image/geometric.py; torchvision, models/detection/transform.py (as Python runs
    it: TorchScript computes in float32); detectron2, data/transforms/augmentation_impl.py.
    """
    if method == "detectron2":
        scale = short / min(size)
        sides = [float(short) if side == min(size) else side * scale for side in size]
        shrink = min(1.0, long / max(sides))
        sides = [side * shrink for side in sides]
    else:
        scale = min(short / min(size), long / max(size))
        sides = [side * scale for side in size]
    half = 0.0 if method == "torchvision" else 0.5
    height, width = (int(side + half) for side in sides)
    return height, width


def shown(
    image: np.ndarray, short: int, long: int, method: ResizeMethod, flip: bool
) -> tuple[Tensor, box_ops.Scale]:
    """Image (H, W, 3) uint8 -> resized and perhaps mirrored (3, H', W') in 0..255, and its scale.

    `method`: see loader.ResizeSpec. The 2017 release mirrors first, mmdetection last: OpenCV's
    8-bit pixels then differ by 1 here and there. BadImage if the image is too narrow.
    """
    size = image.shape[0], image.shape[1]
    if method == "original":
        factor = network_scale(size, short, long)
        resized = resize(image[:, ::-1] if flip else image, factor)
        return torch.from_numpy(resized).permute(2, 0, 1), factor
    height, width = network_size(size, short, long, method)
    if min(height, width) < 1:
        raise BadImage(f"too narrow: {size[1]} x {size[0]} pixels become {width} x {height}")
    if method == "mmdetection":
        resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    elif method == "detectron2":
        bilinear = Image.Resampling.BILINEAR
        resized = np.array(Image.fromarray(image).resize((width, height), bilinear))
    else:
        resized = image.astype(np.float32)
    pixels = torch.from_numpy(resized).permute(2, 0, 1)
    if method == "torchvision":
        pixels = F.interpolate(pixels[None], (height, width), mode="bilinear")[0]
    return pixels.flip(2) if flip else pixels, (height / size[0], width / size[1])


def place_boxes(
    boxes: np.ndarray,
    size: tuple[int, int],
    network_size: tuple[int, int],
    scale: box_ops.Scale,
    flip: bool,
    pixels: box_ops.Pixels,
) -> Tensor:
    """Boxes (N, 4) of an original of `size` (h, w) -> the same boxes in the network's pixels.

    Inclusive pixels round the inclusive corners, half to even, as the 2017 release does.
    """
    placed = torch.from_numpy(boxes).double()  # as the release: float32 rounds other halves
    if flip:
        placed = box_ops.flip(placed, size[1])
    if pixels == "inclusive":
        corner = placed.new_tensor([0.0, 0.0, 1.0, 1.0])
        placed = box_ops.rescale(placed - corner, scale, "continuous").round() + corner
    else:
        placed = box_ops.rescale(placed, scale, pixels)
    placed = box_ops.clip(placed, network_size, pixels)
    # A sliver at the border, cut when the image's size was rounded, keeps a width.
    limit = placed.new_tensor([network_size[1], network_size[0]])
    low = torch.minimum(placed[:, :2], limit - THINNEST)
    high = torch.maximum(placed[:, 2:], low + THINNEST)
    return torch.cat([low, high], dim=1).float()


def place_masks(
    masks: Sequence[bytes],
    size: tuple[int, int],
    network_size: tuple[int, int],
    scale: float | tuple[float, float],
    flip: bool,
) -> Tensor:
    """Run lengths of N masks of an original of `size` (h, w) -> (N, H, W) bool of the network's.

    Nearest pixel, then mirrored, as mmdetection does; where the image is padded nothing is set.
    """
    factors = scale if isinstance(scale, tuple) else (scale, scale)
    height, width = (round(s * factor) for s, factor in zip(size, factors, strict=True))
    placed = np.zeros((len(masks), *network_size), dtype=bool)
    for row, mask in zip(placed, masks, strict=True):
        bitmap = decode([mask], size)[0].view(np.uint8)
        shown = cv2.resize(bitmap, (width, height), interpolation=cv2.INTER_NEAREST)
        row[:height, :width] = shown[:, ::-1] if flip else shown
    return torch.from_numpy(placed)


def place_labels(
    labels: np.ndarray,
    network_size: tuple[int, int],
    scale: box_ops.Scale,
    flip: bool,
    pad: int,
) -> np.ndarray:
    """Label map (H, W) uint8 of an original -> the same of the network's image of `network_size`.

    Mirrored and resized to the nearest pixel; `pad` where the image is padded. Source:
    lib/utils/image.py of the 2017 release.
    """
    factors = scale if isinstance(scale, tuple) else (scale, scale)
    if flip:
        labels = labels[:, ::-1]
    resized = cv2.resize(
        labels, None, fx=factors[1], fy=factors[0], interpolation=cv2.INTER_NEAREST
    )
    placed = np.full(network_size, pad, dtype=np.uint8)
    height, width = resized.shape
    placed[:height, :width] = resized
    return placed
