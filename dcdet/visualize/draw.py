"""Pictures of detections: masks, boxes, names and scores drawn into an image.

Boxes are continuous xyxy in the pixels of the image they are drawn into (structures.py).
"""

import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dcdet.structures import Detections

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]  # left, top, right, bottom; the last two exclusive
Shown = tuple[Rectangle, int, float, int]  # box, label, score, row of the detections

# Okabe and Ito, "Color Universal Design" (2008), without black: told apart by colour-blind eyes.
_PALETTE: list[Colour] = [
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (213, 94, 0),
    (0, 114, 178),
    (204, 121, 167),
]
_ELLIPSIS = "…"
# Tried in this order for names that are not ASCII: Pillow's own font has no other letters.
_UNICODE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "Arial Unicode.ttf",
    "arial.ttf",
)


def class_colour(label: int) -> Colour:
    """The RGB colour of a class: the same in every picture; repeats after 21 classes."""
    colour = _PALETTE[label % len(_PALETTE)]
    shade = label // len(_PALETTE) % 3
    if shade == 1:
        return tuple(round(0.62 * channel) for channel in colour)  # type: ignore[return-value]
    if shade == 2:
        return tuple(round(127 + 0.5 * channel) for channel in colour)  # type: ignore[return-value]
    return colour


def draw_detections(
    image: NDArray[np.uint8], detections: Detections, classes: Sequence[str]
) -> NDArray[np.uint8]:
    """A copy of image (H, W, 3) uint8 RGB with every detection drawn into it.

    Masks, where there are any, are half transparent with an outline, below all boxes and labels.
    Line width and text follow the image's size. A label stays inside the picture, keeps clear of
    the labels of better detections where there is room, and is shortened where it is too wide.
    Rows with non-finite numbers and boxes wholly outside are left out. Raises IndexError for a
    label without a name.
    """
    canvas = np.ascontiguousarray(image).copy()
    height, width = canvas.shape[:2]
    side = (height * width) ** 0.5
    line = max(1, round(0.004 * side))
    text_size = max(10, round(0.025 * side))

    shown = _visible(detections, (height, width))
    if detections.masks is not None:
        for _, label, _, index in reversed(shown):  # the best are drawn last
            mask = detections.masks[index].cpu().numpy()
            _draw_mask(canvas, mask, class_colour(label), max(1, line // 2))
    for (left, top, right, bottom), label, *_ in reversed(shown):
        cv2.rectangle(
            canvas, (left, top), (right - 1, bottom - 1), class_colour(label), line, cv2.LINE_8
        )

    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    placed: list[tuple[Rectangle, str, ImageFont.FreeTypeFont, Colour]] = []
    for box, label, score, _ in shown:
        text, font = fit(classes[label], f"{score:.2f}", text_size, width)
        wide, high = _label_size(text, font)
        if text and high <= height:
            taken = [rectangle for rectangle, *_ in placed]
            spot = _place(box, (wide, high), (height, width), line, taken)
            placed.append((spot, text, font, class_colour(label)))
    for (left, top, right, bottom), text, font, colour in reversed(placed):
        pen.rectangle((left, top, right - 1, bottom - 1), fill=colour)
        ink = (0, 0, 0) if _luminance(colour) > 0.18 else (255, 255, 255)
        pen.text((left + _margin(font), top), text, fill=ink, font=font, anchor="la")
    return np.array(picture)


def _draw_mask(
    canvas: NDArray[np.uint8], mask: NDArray[np.bool_], colour: Colour, line: int
) -> None:
    """Blend a mask (H, W) into the canvas, with its outline, also that of its holes."""
    lines, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not len(lines):
        return
    # Only the part around the mask: one of many in a large image is slow to look through.
    part = tuple(slice(max(0, found[0] - line), found[-1] + 1 + line) for found in (lines, columns))
    canvas, mask = canvas[part], mask[part]
    canvas[mask] = (canvas[mask].astype(np.uint16) + np.array(colour, np.uint16)) // 2
    contours = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]
    cv2.drawContours(canvas, contours, -1, colour, line)


def _visible(detections: Detections, size: tuple[int, int]) -> list[Shown]:
    """Boxes as whole pixels inside an image of `size` (h, w), best score first."""
    height, width = size
    boxes = detections.boxes.detach().cpu().double().numpy()
    scores = detections.scores.detach().cpu().double().numpy()
    labels = detections.labels.tolist()
    shown: list[Shown] = []
    for index in np.argsort(-scores, kind="stable").tolist():
        x1, y1, x2, y2 = boxes[index].tolist()
        if not np.isfinite([x1, y1, x2, y2, scores[index]]).all():
            continue
        if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
            continue
        left, top = min(max(round(x1), 0), width - 1), min(max(round(y1), 0), height - 1)
        right, bottom = min(max(round(x2), left + 1), width), min(max(round(y2), top + 1), height)
        box = (left, top, right, bottom)
        shown.append((box, labels[index], float(scores[index]), index))
    return shown


def _luminance(colour: Colour) -> float:
    """Relative luminance in [0, 1]; above 0.18 black text has the higher contrast (WCAG 2)."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (channel / 255 for channel in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@lru_cache(maxsize=64)
def _font(size: int, unicode: bool) -> ImageFont.FreeTypeFont | None:
    """Pillow's built-in font, or for `unicode` the first known font of this machine, if any."""
    if not unicode:
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow >= 10.1 with FreeType
        return font
    for name in _UNICODE_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return None


def _printable(name: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """The name on one line with a font that has its letters; without one, spelt in ASCII."""
    name = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    plain = _font(size, False)
    assert plain is not None
    if name.isascii():
        return name, plain
    font = _font(size, True)
    if font is not None:
        return name, font
    letters = (c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    return "".join(letters).encode("ascii", "replace").decode(), plain


def _label_size(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    """Width and height of a label around `text`, in pixels."""
    ascent, descent = font.getmetrics()
    return int(font.getlength(text)) + 1 + 2 * _margin(font), ascent + descent


def _margin(font: ImageFont.FreeTypeFont) -> int:
    return max(2, round(0.25 * font.size))


def fit(name: str, score: str, size: int, width: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """Name and score, the name shortened until its label is at most `width`; "" if none is."""
    name, font = _printable(name, size)

    def candidates() -> Iterable[str]:
        yield f"{name} {score}".strip()
        for length in range(min(len(name) - 1, width), 0, -1):  # a letter has a pixel at least
            yield f"{name[:length].rstrip()}{_ELLIPSIS} {score}".strip()
        yield score

    for text in candidates():
        if _label_size(text, font)[0] <= width:
            return text, font
    return "", font


def _place(
    box: Rectangle,
    label: tuple[int, int],
    size: tuple[int, int],
    line: int,
    taken: Sequence[Rectangle],
) -> Rectangle:
    """Where a label (w, h) goes: above its box, else inside or below, else where it hides least."""
    left, top, right, bottom = box
    wide, high = label
    height, width = size
    edge = line // 2  # a line is centred on the box's outermost pixels
    spots = [
        (left - edge, top - edge - high),
        (left - edge, max(top - edge, 0)),
        (left - edge, bottom + edge),
        (right + edge - wide, top - edge - high),
        (right + edge - wide, min(bottom + edge, height) - high),
        (left - edge, min(bottom + edge, height) - high),
    ]
    best: Rectangle | None = None
    least = 0
    for x, y in spots:
        inside = 0 <= y <= height - high
        x, y = min(max(x, 0), width - wide), min(max(y, 0), height - high)
        spot = (x, y, x + wide, y + high)
        hidden = sum(_overlap(spot, other) for other in taken)
        if inside and hidden == 0:
            return spot
        if best is None or hidden < least:
            best, least = spot, hidden
    assert best is not None
    return best


def _overlap(a: Rectangle, b: Rectangle) -> int:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
