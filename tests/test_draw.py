import re

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcdet.structures import Detections
from dcdet.visualize import draw
from dcdet.visualize.draw import class_colour, draw_detections

GREY = 90


def found(boxes, scores=None, labels=None, masks=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    number = len(boxes)
    return Detections(
        "image",
        boxes,
        torch.full((number,), 0.5) if scores is None else torch.tensor(scores),
        torch.zeros(number, dtype=torch.int64) if labels is None else torch.tensor(labels),
        None if masks is None else torch.from_numpy(masks),
    )


def canvas(height, width):
    return np.full((height, width, 3), GREY, dtype=np.uint8)


def label_patch(name, score=0.5, label=0, size=(400, 600)):
    """The label alone, cut from a picture where it has room above a box of 300 x 2 pixels."""
    image = canvas(*size)
    names = [name] * (label + 1)
    picture = draw_detections(image, found([(100, 200, 400, 202)], [score], [label]), names)
    changed = (picture != GREY).any(axis=2)
    changed[198:] = False
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    return picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def contains(picture, patch):
    if any(p > w for p, w in zip(patch.shape, picture.shape, strict=True)):
        return False
    difference = cv2.matchTemplate(picture, patch, cv2.TM_SQDIFF)
    row, column = np.unravel_index(difference.argmin(), difference.shape)
    return (picture[row:, column:][: patch.shape[0], : patch.shape[1]] == patch).all()


def test_box_is_drawn_on_its_own_pixels():
    image = canvas(100, 100)
    picture = draw_detections(image, found([(20, 30, 60, 80)]), ["a"])
    assert (image == GREY).all()
    assert picture.shape == image.shape
    assert picture.dtype == np.uint8
    colour = class_colour(0)
    for y, x in [(79, 20), (79, 59), (79, 40), (50, 20), (50, 59), (30, 59)]:
        assert tuple(picture[y, x]) == colour
    for y, x in [(82, 40), (50, 17), (50, 62), (50, 40), (98, 98)]:
        assert tuple(picture[y, x]) == (GREY, GREY, GREY)


@pytest.mark.parametrize("box", [
    (0, 0, 50, 40), (550, 0, 600, 40), (0, 360, 50, 400), (550, 360, 600, 400),
    (0, 0, 600, 400), (-900, -900, 5, 5), (590, 390, 1e30, 1e30), (300, 5, 310, 12),
])  # fmt: skip
def test_label_is_wholly_inside_the_picture(box):
    picture = draw_detections(canvas(400, 600), found([box]), ["bicycle"])
    assert contains(picture, label_patch("bicycle"))
    assert not contains(picture, label_patch("bicyclf"))


def test_labels_keep_clear_of_each_other():
    boxes = [(200, 200, 260, 260), (202, 203, 262, 262), (198, 201, 259, 261)]
    picture = draw_detections(canvas(400, 600), found(boxes, [0.9, 0.8, 0.7]), ["a thing"])
    for score in (0.9, 0.8, 0.7):
        assert contains(picture, label_patch("a thing", score))


def test_best_detection_is_on_top():
    boxes = [(100, 100, 300, 300), (100, 100, 300, 300)]
    picture = draw_detections(canvas(400, 600), found(boxes, [0.3, 0.9], [0, 1]), ["a", "b"])
    assert tuple(picture[299, 200]) == class_colour(1)


def test_colours_are_steady_and_differ():
    colours = [class_colour(label) for label in range(21)]
    assert colours == [class_colour(label) for label in range(21)]
    lab = cv2.cvtColor(np.array([colours], np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=2) + 1000 * np.eye(21)
    assert distance.min() > 10
    assert class_colour(1000) in colours


def test_masks_shine_through_and_have_an_outline():
    """Below the boxes; also around a hole; what is outside of the mask stays."""
    mask = np.zeros((1, 200, 200), dtype=bool)
    mask[0, 60:140, 50:150] = True
    mask[0, 90:110, 90:110] = False
    boxes = [(40, 40, 160, 160)]
    picture = draw_detections(canvas(200, 200), found(boxes, labels=[1], masks=mask), ["a", "b"])
    plain = draw_detections(canvas(200, 200), found(boxes, labels=[1]), ["a", "b"])
    colour = np.array(class_colour(1))
    changed = (picture != plain).any(axis=2)
    assert (changed == (changed & mask[0])).all()
    assert changed[65:85, 55:145].all()
    assert (picture[75, 70] == (GREY + colour) // 2).all()
    for y, x in [(60, 100), (139, 100), (100, 50), (100, 149), (100, 89), (89, 100)]:
        assert (picture[y, x] == colour).all()
    assert (picture[100, 100] == GREY).all()


def test_the_best_mask_is_on_top_and_goes_with_its_box():
    masks = np.zeros((4, 200, 200), dtype=bool)
    for number, left in enumerate((20, 100, 30, 150)):
        masks[number, 100:150, left : left + 40] = True
    boxes = [(20, 100, 60, 150), (float("nan"), 0, 1, 1), (20, 100, 60, 150), (900, 0, 950, 9)]
    args = found(boxes, [0.3, 0.8, 0.9, 0.7], [0, 1, 1, 1], masks)
    picture = draw_detections(canvas(200, 200), args, ["a", "b"])
    once = (GREY + np.array(class_colour(0))) // 2
    assert (picture[130, 40] == (once + np.array(class_colour(1))) // 2).all()
    assert (picture[130, 66] == (GREY + np.array(class_colour(1))) // 2).all()
    assert (picture[130, 120] == GREY).all()  # rows that are left out take their masks with them
    assert (picture[130, 170] == GREY).all()
    nothing = found([], masks=np.zeros((0, 200, 200), dtype=bool))
    assert (draw_detections(canvas(200, 200), nothing, ["a"]) == GREY).all()


@pytest.mark.parametrize("label", range(21))
def test_text_contrasts_with_its_label(label):
    """WCAG asks for 4.5 between text and background."""
    patch = label_patch("MMMM", label=label).reshape(-1, 3) / 255
    linear = np.where(patch <= 0.04045, patch / 12.92, ((patch + 0.055) / 1.055) ** 2.4)
    light = linear @ [0.2126, 0.7152, 0.0722]
    assert (light.max() + 0.05) / (light.min() + 0.05) >= 4.5


@pytest.mark.parametrize(
    ("width", "expected"),
    [(600, r"a very long name 0\.50"), (90, r"a v.*\w… 0\.50"), (38, r"0\.50")],
)
def test_long_name_is_shortened_and_keeps_its_score(width, expected):
    text, font = draw.fit("a very long name", "0.50", 12, width)
    assert re.fullmatch(expected, text)
    assert font.getlength(text) < width
    picture = draw_detections(canvas(200, width), found([(0, 50, width, 80)]), ["a very long name"])
    ink = (picture[:48] != GREY).any(axis=2)
    assert 30 <= ink.any(axis=0).sum() <= width


@pytest.mark.parametrize(
    "name", ["Привет", "naïve café", "猫 🐱", "two\nlines\tand\x00more", "", "\u202eabc"]
)
def test_any_name_is_drawn_on_one_line(name):
    assert label_patch(name).shape[0] <= label_patch("plain").shape[0] + 8


def test_accents_survive_without_a_unicode_font(monkeypatch):
    monkeypatch.setattr(draw, "_UNICODE_FONTS", ())
    draw._font.cache_clear()
    assert (label_patch("café") == label_patch("cafe")).all()
    draw._font.cache_clear()


def test_nothing_found_changes_nothing():
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    assert (draw_detections(image, found([]), ["a"]) == image).all()


numbers = st.one_of(
    st.floats(-50, 300, width=32),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 2.0**31]),
)


@settings(max_examples=150)
@given(
    size=st.tuples(st.sampled_from([1, 2, 7, 64, 200]), st.sampled_from([1, 2, 7, 64, 900])),
    rows=st.lists(st.tuples(numbers, numbers, numbers, numbers, numbers), max_size=5),
)
def test_any_boxes_and_sizes_are_drawn(size, rows):
    picture = draw_detections(
        canvas(*size), found([row[:4] for row in rows], [row[4] for row in rows]), ["person"]
    )
    assert picture.shape == (*size, 3)
    finite = [row for row in rows if np.isfinite(row).all()]
    if not finite:
        assert (picture == GREY).all()
    # Rows that cannot be drawn do not change the others.
    again = draw_detections(
        canvas(*size), found([row[:4] for row in finite], [row[4] for row in finite]), ["person"]
    )
    assert (picture == again).all()


@pytest.mark.parametrize("side", [64, 3000])
def test_text_and_lines_grow_with_the_picture(side):
    box = (side // 4, side // 2, 3 * side // 4, 7 * side // 8)
    picture = draw_detections(canvas(side, side), found([box]), ["cat"])
    column = (picture[:, box[0] + side // 4] == class_colour(0)).all(axis=1)
    line = column[box[3] - side // 16 :].sum()
    assert line in {64: [1], 3000: [12, 13]}[side]
    label = (picture[: box[1] - line // 2] != GREY).any(axis=2)
    height = label.any(axis=1).sum()
    assert {64: 10, 3000: 60}[side] < height < {64: 16, 3000: 110}[side]
    assert label.any(axis=0).sum() < 0.9 * side
