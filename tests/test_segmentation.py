"""Pictures of segmentations: palettes, PNGs as other programs read them, what is drawn where."""

from io import BytesIO
from typing import Any

import cv2
import numpy as np
import pytest
from data_sets import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dcdet.structures import UNLABELLED
from dcdet.visualize import segmentation
from dcdet.visualize.segmentation import (
    areas_of,
    draw_segmentation,
    encode_png,
    palette,
    voc_palette,
)

# As PASCAL VOC's label maps of 2012 have them: background, aeroplane, ... tv/monitor.
VOC = [
    (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128),
    (128, 128, 128), (64, 0, 0), (192, 0, 0), (64, 128, 0), (192, 128, 0), (64, 0, 128),
    (192, 0, 128), (64, 128, 128), (192, 128, 128), (0, 64, 0), (128, 64, 0), (0, 192, 0),
    (128, 192, 0), (0, 64, 128),
]  # fmt: skip
COLOURS = [(250, 10, 20), (0, 0, 0), (30, 200, 40), (20, 60, 220)]
NAMES = ["road", "background", "tree", "sky"]
WHITE = (255, 255, 255)


def stripes(height: int, width: int, *shares: tuple[int, int]) -> np.ndarray:
    """A label map of columns: (label, how many)."""
    row = np.concatenate([np.full(number, label, np.uint8) for label, number in shares])
    return np.tile(row[:width], (height, 1))


def squares(drawn: np.ndarray, top: int, left: int) -> list[tuple[int, int]]:
    """(label, side) of the legend's coloured squares, by line and column."""
    strip = drawn[top:, left:]
    found = []
    for label, colour in enumerate(COLOURS):
        rows, columns = (strip == colour).all(axis=2).nonzero()
        if any(colour) and len(rows):
            side = int(np.ptp(rows)) + 1
            assert (strip[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
                    == colour).all()  # fmt: skip
            found.append((int(rows.min()), int(columns.min()), label, side))
    return [(label, side) for *_, label, side in sorted(found)]


def test_the_palette_of_pascal_voc() -> None:
    assert voc_palette(21) == VOC
    assert voc_palette(256)[255] == (224, 224, 192)  # the border of its objects
    assert len(set(voc_palette(256))) == 256


@pytest.mark.parametrize("number", [1, 2, 11, 20, 21, 254])
def test_every_class_has_a_colour_that_is_seen(number: int) -> None:
    colours = palette(None, number)
    assert len(set(colours)) == number
    assert (0, 0, 0) not in colours
    assert palette(None, number) == colours
    assert palette(VOC, number) == (VOC if number == 21 else colours)


def test_a_png_holds_the_very_labels() -> None:
    labels = np.random.default_rng(0).integers(0, 256, (37, 53), dtype=np.uint8)
    image = Image.open(BytesIO(encode_png(labels, VOC)))
    assert image.mode == "P"
    assert (np.asarray(image) == labels).all()
    shown = np.asarray(image.convert("RGB"))
    for label, colour in enumerate(VOC):
        assert (shown[labels == label] == colour).all()
    assert (shown[labels == UNLABELLED] == (224, 224, 192)).all()
    grey = Image.open(BytesIO(encode_png(labels)))
    assert grey.mode == "L"
    assert (np.asarray(grey) == labels).all()


def test_areas_are_counted() -> None:
    labels = np.array([[3, 3, 0], [3, UNLABELLED, 1]], np.uint8)
    assert list(areas_of(labels).items()) == [(3, 3), (0, 1), (1, 1)]
    assert areas_of(np.full((2, 2), UNLABELLED, np.uint8)) == {}


def test_areas_shine_through_and_have_an_outline() -> None:
    """But for black ones and those without a label, which stay as they are."""
    image = picture((60, 120))
    before = image.copy()
    labels = stripes(60, 120, (0, 30), (1, 30), (UNLABELLED, 30), (2, 15), (3, 15))
    drawn = draw_segmentation(image, labels, NAMES, COLOURS)
    assert (image == before).all()
    for label, columns in ((0, slice(0, 28)), (2, slice(92, 104)), (3, slice(107, 120))):
        wanted = (image[:, columns].astype(float) + COLOURS[label]) / 2
        assert np.abs(drawn[:60, columns] - wanted).max() <= 0.5
    for label, column in ((0, 29), (2, 90), (2, 104), (3, 105)):
        assert (drawn[:60, column] == COLOURS[label]).all()
    assert (drawn[:60, 30:90] == image[:, 30:90]).all()


def test_the_legend_tells_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Largest first, with a hollow square for what is not painted."""
    texts: list[str] = []
    fit = segmentation.fit

    def noted(name: str, score: str, size: int, width: int) -> Any:
        texts.append(name + score)
        return fit(name, score, size, width)

    monkeypatch.setattr(segmentation, "fit", noted)
    labels = stripes(300, 400, (1, 100), (3, 240), (UNLABELLED, 20), (2, 40))
    labels[0, 0] = 0
    drawn = draw_segmentation(picture((300, 400)), labels, NAMES, COLOURS)
    assert texts == ["sky", "background", "tree", "road", "60.0%", "25.0%", "10.0%", "<0.1%"]
    assert drawn.shape[1] == 400
    strip = drawn[300:]
    assert (strip[[0, -1]] == WHITE).all()
    assert (strip[:, [0, -1]] == WHITE).all()
    assert [label for label, _ in squares(drawn, 300, 0)] == [3, 2, 0]
    assert not (strip == COLOURS[1]).all(axis=2).any()
    without = draw_segmentation(picture((300, 400)), np.where(labels == 1, 0, labels), NAMES,
                                [*COLOURS[:1], (9, 9, 9), *COLOURS[2:]])  # fmt: skip
    assert [label for label, _ in squares(without, 300, 0)] == [3, 0, 2]


@pytest.mark.parametrize(
    ("size", "below"), [((30, 700), True), ((300, 300), True), ((700, 300), False)]
)
def test_the_legend_hides_nothing(size: tuple[int, int], below: bool) -> None:
    image = picture(size)
    drawn = draw_segmentation(image, np.full(size, 1, np.uint8), NAMES, COLOURS)
    height, width = size
    assert (drawn[:height, :width] == image).all()
    assert drawn.shape[0 if below else 1] > size[0 if below else 1]
    assert drawn.shape[1 if below else 0] == size[1 if below else 0]


@pytest.mark.parametrize(("side", "square"), [(64, 12), (400, 12), (1600, 40)])
def test_text_follows_the_picture(side: int, square: int) -> None:
    labels = np.zeros((side, side), np.uint8)
    drawn = draw_segmentation(picture((side, side)), labels, NAMES, COLOURS)
    assert squares(drawn, side, 0) == [(0, square - 2)]  # within its outline
    ink = (drawn[side:] < 80).all(axis=2)
    assert 0.5 * square < ink.any(axis=1).sum() < 1.5 * square


def test_long_names_are_shortened() -> None:
    labels = np.zeros((80, 900), np.uint8)
    image = np.full((80, 900, 3), 255, np.uint8)
    ends = []
    for name in ("a" * 15, "a" * 40, "a" * 4000):
        drawn = draw_segmentation(image, labels, [name], [(255, 255, 254)])
        ends.append(int((drawn[80:] < 200).all(axis=2).any(axis=0).nonzero()[0][-1]))
    assert ends[0] < ends[1] == ends[2] < 350


@pytest.mark.parametrize("name", ["Привет", "naïve café", "猫 🐱", "two\nlines\x00", "", "\u202ea"])
def test_any_name_is_drawn_on_one_line(name: str) -> None:
    labels = np.zeros((50, 300), np.uint8)
    plain, drawn = (
        draw_segmentation(picture((50, 300)), labels, [text], COLOURS) for text in ("plain", name)
    )
    assert drawn.shape[0] == plain.shape[0]
    assert (drawn[[50, -1]] == WHITE).all()


@settings(max_examples=60)
@given(
    size=st.tuples(st.sampled_from([1, 2, 7, 64, 300, 5000]), st.sampled_from([1, 2, 7, 64, 300])),
    turned=st.booleans(),
    number=st.sampled_from([1, 2, 3, 20, 254]),
    seed=st.integers(0, 99),
)
def test_any_size_and_number_of_classes(
    size: tuple[int, int], turned: bool, number: int, seed: int
) -> None:
    height, width = size[::-1] if turned else size
    labels = np.random.default_rng(seed).integers(0, number, (height, width), dtype=np.uint8)
    labels[-1, -1] = UNLABELLED
    image = np.full((height, width, 3), 90, np.uint8)
    names = [f"class {label}" for label in range(number)]
    drawn = draw_segmentation(image, labels, names, palette(None, number))
    assert (drawn[height - 1, width - 1] == 90).all()
    if not areas_of(labels):
        assert drawn.shape == image.shape
        return
    strip = drawn[height:] if width >= height else drawn[:, width:]
    assert min(strip.shape) > 0
    assert (strip[[0, -1]] == WHITE).all()
    assert (strip[:, [0, -1]] == WHITE).all()  # so no text was cut off
    # Not a ribbon: no longer than the picture's side, unless it is about square.
    for side, own in zip(strip.shape[:2], (height, width), strict=True):
        assert side <= max(own + 250, 3 * min(strip.shape[:2]) + 250)


def test_unlabelled_pictures_and_labels_without_a_name() -> None:
    image = picture((20, 30))
    nothing = np.full((20, 30), UNLABELLED, np.uint8)
    assert (draw_segmentation(image, nothing, NAMES, COLOURS) == image).all()
    with pytest.raises(IndexError):
        draw_segmentation(image, np.full((20, 30), 4, np.uint8), NAMES, COLOURS)


@pytest.mark.parametrize(("number", "distance"), [(11, 25), (20, 15)])
def test_colours_differ_to_the_eye(number: int, distance: float) -> None:
    """Further apart in Lab than those of boxes (19 and 13)."""
    colours = np.array([palette(None, number)], np.float32) / 255
    lab = cv2.cvtColor(colours, cv2.COLOR_RGB2LAB)[0]
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=2) + 999 * np.eye(number)
    assert apart.min() > distance
