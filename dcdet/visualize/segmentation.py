"""Pictures of segmentations: label maps in colours, and blended over a photograph with a legend."""

from collections.abc import Sequence
from io import BytesIO
from math import ceil, sqrt

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dcdet.structures import UNLABELLED
from dcdet.visualize.draw import Colour, fit

# Trubetskoy, "List of 20 Simple, Distinct Colors" (2017), without black and white. Areas meet,
# so they need colours further apart than those of boxes, and shades would be lost in a photograph.
DISTINCT: list[Colour] = [
    (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180),
    (70, 240, 240), (240, 50, 230), (210, 245, 60), (250, 190, 212), (0, 128, 128),
    (220, 190, 255), (170, 110, 40), (255, 250, 200), (128, 0, 0), (170, 255, 195),
    (128, 128, 0), (255, 215, 180), (0, 0, 128), (128, 128, 128),
]  # fmt: skip
BORDER: Colour = (224, 224, 192)  # PASCAL VOC's for pixels without a label

_PAPER, _INK, _GREY = (255, 255, 255), (30, 30, 30), (110, 110, 110)
_LONGEST_NAME = 14  # in units of the text's size


def voc_palette(number: int) -> list[Colour]:
    """PASCAL VOC's colours of the labels 0 (black), 1, ...: at most 256, all different.

    A label's bits go in turn to red, green and blue, the lowest to the highest bit of a channel.
    """
    colours = []
    for label in range(number):
        channels = [
            sum((label >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3))
            for channel in range(3)
        ]
        colours.append((channels[0], channels[1], channels[2]))
    return colours


def palette(own: Sequence[Colour] | None, number: int) -> list[Colour]:
    """The colours of so many classes: a data set's `own`, if they are as many; else those of
    DISTINCT, or where these are too few, PASCAL VOC's without its black."""
    if own is not None and len(own) == number:
        return list(own)
    return DISTINCT[:number] if number <= len(DISTINCT) else voc_palette(number + 1)[1:]


def encode_png(labels: NDArray[np.uint8], colours: Sequence[Colour] | None = None) -> bytes:
    """Labels (H, W) as the bytes of a PNG: with a palette of `colours`, or grey."""
    image = Image.fromarray(labels)
    if colours is not None:
        table = np.zeros((256, 3), dtype=np.uint8)
        table[: len(colours)] = colours
        table[UNLABELLED] = BORDER
        image.putpalette(table.tobytes())
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def draw_segmentation(
    image: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    classes: Sequence[str],
    colours: Sequence[Colour],
) -> NDArray[np.uint8]:
    """An image (H, W, 3) uint8 RGB under its labels (H, W) in half transparent colours, and a
    legend.

    Areas are outlined in their colour. What is UNLABELLED, or of a class whose colour is black
    (VOC's background), is left as it is. The legend stands on a strip below a wide image or beside
    a tall one, whose own pixels stay in the upper left: each class that is there, largest first,
    with its share of the pixels. Line width and text follow the image's size. Raises IndexError for
    a label without a name or colour.
    """
    height, width = labels.shape
    canvas = np.ascontiguousarray(image).copy()
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(colours)] = colours
    paint, painted = table[labels], table.max(axis=1)[labels]
    cv2.copyTo(cv2.addWeighted(canvas, 0.5, paint, 0.5, 0), painted, canvas)
    reach = 2 * max(1, round(0.0015 * sqrt(height * width))) + 1
    edges = cv2.morphologyEx(labels, cv2.MORPH_GRADIENT, np.ones((reach, reach), np.uint8))
    cv2.copyTo(paint, cv2.min(edges, painted), canvas)

    areas = areas_of(labels)
    shares = [pixels / labels.size for pixels in areas.values()]
    return _with_legend(canvas, [(classes[label], colours[label]) for label in areas], shares)


def areas_of(labels: NDArray[np.uint8]) -> dict[int, int]:
    """The number of pixels of each label that is there, but for UNLABELLED, largest first."""
    counts = np.bincount(labels.ravel(), minlength=256)[:UNLABELLED]
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    return dict(zip(order.tolist(), counts[order].tolist(), strict=True))


def _with_legend(
    image: NDArray[np.uint8], entries: Sequence[tuple[str, Colour]], shares: Sequence[float]
) -> NDArray[np.uint8]:
    """The image, with a table of names, colours and shares below or beside it."""
    if not entries:
        return image
    height, width = image.shape[:2]
    size = max(12, round(0.025 * sqrt(height * width)))
    names = [fit(name, "", size, _LONGEST_NAME * size) for name, _ in entries]
    numbers = [fit("", _percent(share), size, _LONGEST_NAME * size) for share in shares]
    name_width, number_width = (
        ceil(max(font.getlength(text) for text, font in texts)) for texts in (names, numbers)
    )
    gap = size // 2
    cell = size + name_width + number_width + 5 * gap  # the colour's square is `size` wide
    line = size + gap
    below, number = width >= height, len(entries)
    if below:
        columns = max((width - 2 * gap) // cell, round(sqrt(number * line / cell)), 1)
        lines = ceil(number / columns)
    else:
        lines = max((height - 2 * gap) // line, round(sqrt(number * cell / line)), 1)
        lines = ceil(number / ceil(number / lines))
    columns = ceil(number / lines)  # no fewer in the last line than need be

    left, top = (0, height) if below else (width, 0)
    strip = (left + columns * cell + 2 * gap, top + lines * line + 2 * gap)
    picture = Image.new("RGB", (max(width, strip[0]), max(height, strip[1])), _PAPER)
    picture.paste(Image.fromarray(image))
    pen = ImageDraw.Draw(picture)
    for index, ((_, colour), (name, font), (share, share_font)) in enumerate(
        zip(entries, names, numbers, strict=True)
    ):
        x = left + 2 * gap + index % columns * cell
        y = top + gap + gap // 2 + index // columns * line
        fill = colour if any(colour) else _PAPER  # black is not painted
        pen.rectangle((x, y, x + size - 1, y + size - 1), fill=fill, outline=_GREY)
        baseline = y + round(0.85 * size)
        x += size + gap
        pen.text((x, baseline), name, fill=_INK, font=font, anchor="ls")
        x += name_width + gap + number_width
        pen.text((x, baseline), share, fill=_GREY, font=share_font, anchor="rs")
    return np.array(picture)


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.0005 else "<0.1%"
