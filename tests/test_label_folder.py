"""Segmentation data in plain folders."""

import logging
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from label_trees import blocks, write_label_folder, write_labels, write_picture

from dcdet.datasets.label_folder import LabelFolder
from dcdet.datasets.records import DataError, count_kinds
from dcdet.errors import UserError

CLASSES = ["sky", "road", "tree", "car"]


def read(root: Path, **options: Any) -> LabelFolder:
    return LabelFolder(str(root), "train", CLASSES, **options)


def test_images_and_label_maps_of_the_same_name(tmp_path: Path) -> None:
    write_label_folder(tmp_path, ["b", "a.1", "c"])
    (tmp_path / "images/train/c.png").rename(tmp_path / "images/train/c.JPG")
    (tmp_path / "images/train/.hidden.png").write_text("")
    (tmp_path / "images/train/notes.txt").write_text("")
    reader = read(tmp_path)
    assert [record.image_id for record in reader.records] == ["a.1", "b", "c"]
    assert reader.records[2].path == str(tmp_path / "images/train/c.JPG")
    assert reader.records[2].label_path == str(tmp_path / "labels/train/c.png")
    assert (reader.classes, reader.category_ids) == (CLASSES, [0, 1, 2, 3])
    assert reader.problems == []
    labels = reader.label_map(reader.records[0])
    np.testing.assert_array_equal(labels, blocks((64, 96), (0, 1, 2, 3, 255), 1))


def test_ignored_values_and_other_folders(tmp_path: Path) -> None:
    write_picture(tmp_path / "rgb/train/a.png", (6, 6))
    values = np.array([[0, 3, 4], [9, 9, 255]], np.uint8)
    write_labels(tmp_path / "masks/train/a.png", values)
    reader = read(tmp_path, ignore=[4, 9], images="rgb", labels="masks")
    expected = [[0, 3, 255], [255, 255, 255]]
    np.testing.assert_array_equal(reader.label_map(reader.records[0]), expected)
    for value in (3, 256, -1):
        with pytest.raises(ValueError, match="ignore: must be from 4 to 255"):
            read(tmp_path, ignore=[value])


def test_what_has_no_partner_is_named_in_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_label_folder(tmp_path, list("abcdefghij"))
    for name in "bdfij":
        (tmp_path / f"labels/train/{name}.png").unlink()
    (tmp_path / "images/train/h.png").unlink()
    with caplog.at_level(logging.WARNING):
        reader = read(tmp_path)
    assert [record.image_id for record in reader.records] == ["a", "c", "e", "g"]
    assert count_kinds(reader.problems) == "5 x without label map, 1 x without image"
    assert [problem.image_id for problem in reader.problems] == [*"bdfij", "h"]
    assert f"{tmp_path}/images/train/b.png: has no label map" in caplog.text
    assert f"{tmp_path}/labels/train/h.png: has no image" in caplog.text
    with pytest.raises(DataError, match=r"b\.png: has no label map .and 5 more"):
        read(tmp_path, strict=True)


def test_repeated_names(tmp_path: Path) -> None:
    write_label_folder(tmp_path, ["a"])
    write_picture(tmp_path / "images/train/a.bmp", (64, 96))
    reader = read(tmp_path)
    assert [record.path for record in reader.records] == [str(tmp_path / "images/train/a.bmp")]
    assert count_kinds(reader.problems) == "1 x repeated name"


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"images/train: No such file .*root right"):
        read(tmp_path)
    write_label_folder(tmp_path, ["a"], "val")
    with pytest.raises(UserError, match=r"images/train: No such file .*there are: val"):
        read(tmp_path)
    write_label_folder(tmp_path, ["a"])
    (tmp_path / "labels/train/a.png").rename(tmp_path / "labels/train/b.png")
    with pytest.raises(UserError, match=r"no image has a label map of its name in .*labels/train"):
        read(tmp_path)
    (tmp_path / "images/train/a.png").unlink()
    with pytest.raises(UserError, match="images/train: no images"):
        read(tmp_path)


def test_links_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    write_label_folder(tmp_path / "set", ["a", "b"])
    path = tmp_path / "set/labels/train/a.png"
    path.unlink()
    path.symlink_to("b.png")
    assert len(read(tmp_path / "set").records) == 2
    path.unlink()
    path.symlink_to(write_labels(tmp_path / "outside.png", blocks((64, 96), range(4))))
    with pytest.raises(UserError, match=r"a\.png leads out of"):
        read(tmp_path / "set")


@pytest.mark.parametrize("classes", [None, [], [f"c{i}" for i in range(255)]])
def test_classes_are_needed(tmp_path: Path, classes: list[str] | None) -> None:
    with pytest.raises(UserError, match=r"data\.classes"):
        LabelFolder(str(tmp_path), "train", classes)


@pytest.mark.parametrize(("split", "number"), [("train", 367), ("val", 101)])
def test_camvid(shared: Path, split: str, number: int) -> None:
    """Its numbers of images, and pixels by class against OpenCV's reading of every sixth file."""
    root = shared / "data" / "camvid"
    reader = LabelFolder(str(root), split, [f"c{i}" for i in range(11)], [11])
    assert len(reader.records) == number
    assert reader.problems == []
    pixels = np.zeros(256, np.int64)
    for record in reader.records[::6]:
        pixels += np.bincount(reader.label_map(record).ravel(), minlength=256)  # type: ignore[union-attr]
    expected = np.zeros(256, np.int64)
    for path in sorted((root / "labels" / split).iterdir())[::6]:
        expected += np.bincount(cv2.imread(str(path), cv2.IMREAD_UNCHANGED).ravel(), minlength=256)
    expected[255], expected[11] = expected[11] + expected[255], 0
    np.testing.assert_array_equal(pixels, expected)
    assert (pixels[:11] > 0).all()
    assert pixels.sum() == 360 * 480 * len(reader.records[::6])
