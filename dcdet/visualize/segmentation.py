"""Pictures of segmentations: label maps in colours, and blended over a photograph with a legend."""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dcdet.structures import UNLABELLED
from dcdet.visualize.draw import Colour, class_colour

DISTINCT = 21  # colours of class_colour
BORDER: Colour = (224, 224, 192)  # PASCAL VOC's for pixels without a label


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
    """The colours of so many classes: a data set's `own`, if they are as many; else those of all
    pictures, or where these are too few, PASCAL VOC's."""
    if own is not None and len(own) == number:
        return list(own)
    if number <= DISTINCT:
        return [class_colour(label) for label in range(number)]
    return voc_palette(number)


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
