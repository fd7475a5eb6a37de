"""Pictures of offsets: sampling points and RoI parts drawn into an image.

Positions are continuous (x, y) in the pixels of the image (structures.py): the middle of its first
pixel is (0.5, 0.5). A small image is enlarged by a whole number, so that the marks fit into it.
"""

from dataclasses import replace

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dcdet.structures import Detections
from dcdet.visualize.draw import Colour, draw_detections

LONG_SIDE = 1400  # of a picture at most, where a small image is enlarged

RED, GREEN, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (255, 255, 255), (0, 0, 0)

_SHIFT = 4  # binary digits after the point in cv2's coordinates
_ONE = 1 << _SHIFT


def draw_points(
    image: NDArray[np.uint8], centre: Tensor, positions: Tensor, weights: Tensor
) -> NDArray[np.uint8]:
    """The sampling points of one place in red, the place itself in green.

    image (H, W, 3) uint8 RGB, centre (2,), positions (..., 2), weights (...) -> a new image. A
    dot's area follows its weight; the largest have the full size. Points outside are left out.
    """
    canvas, zoom = _enlarged(image)
    height, width = canvas.shape[:2]
    places = positions.double().reshape(-1, 2).numpy() * zoom
    large = 0.005 * (height * width) ** 0.5
    radius = max(1.5, large * (81 / max(81, len(places))) ** (1 / 6))  # half of it for 4 * 729
    inside = ((places >= 0) & (places < (width, height))).all(axis=1)
    shares = weights.double().flatten().numpy()
    radii = radius * np.sqrt(shares / max(shares.max(initial=0), 1e-12))
    dots = list(zip(places[inside], radii[inside], strict=True))
    for place, size in dots:
        _disc(canvas, place, size + 1.5, WHITE)
    for place, size in dots:
        _disc(canvas, place, size, RED)
    place = centre.double().numpy() * zoom
    for extra, colour in ((3, BLACK), (2, WHITE), (0, GREEN)):
        _disc(canvas, place, 1.5 * large + extra, colour)
    return canvas


def draw_parts(
    image: NDArray[np.uint8], found: Detections, parts: Tensor, classes: list[str]
) -> NDArray[np.uint8]:
    """One detection with its name, and the parts (p, p, 4) of its RoI.

    image (H, W, 3) uint8 RGB -> a new image. Parts with non-finite numbers are left out.
    """
    canvas, zoom = _enlarged(image)
    height, width = canvas.shape[:2]
    # Lines are thin where parts are small, and the smallest have no white around them.
    side = (found.boxes[0, 2] - found.boxes[0, 0]).item() * zoom / len(parts)
    line = max(1, round(min(0.003 * (height * width) ** 0.5, 0.1 * side)))
    boxes = parts.double().reshape(-1, 4).numpy() * zoom
    boxes = boxes[np.isfinite(boxes).all(axis=1)].clip(-width - height, 2 * (width + height))
    corners = ((boxes - 0.5) * _ONE).round().astype(int).tolist()
    for extra, colour in ((2 if line > 1 else 0, WHITE), (0, RED)):
        for x1, y1, x2, y2 in corners:
            cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, line + extra, cv2.LINE_AA, _SHIFT)
    return draw_detections(canvas, replace(found, boxes=found.boxes * zoom), classes)


def _enlarged(image: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], int]:
    zoom = max(1, LONG_SIDE // max(image.shape[:2]))
    copy = np.ascontiguousarray(image).copy()
    if zoom == 1:
        return copy, zoom
    return cv2.resize(copy, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_LINEAR), zoom


def _disc(
    canvas: NDArray[np.uint8], place: NDArray[np.float64], radius: float, colour: Colour
) -> None:
    x, y = ((place - 0.5) * _ONE).round().astype(int).tolist()
    cv2.circle(canvas, (x, y), round(radius * _ONE), colour, cv2.FILLED, cv2.LINE_AA, _SHIFT)
