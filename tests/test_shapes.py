"""The embedded data set: the same in both forms, every time, and nothing half-written."""

import hashlib
import json
import multiprocessing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from dcdet.datasets.shapes import CLASSES, SIZE, Shapes, write_shapes
from dcdet.errors import UserError
from dcdet.masks import decode

NUMBERS = {"train": 12, "test": 5}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "set"
    write_shapes(str(folder), NUMBERS)
    return folder


def read(root: Path, split: Any = "train", classes: Any = None, **options: Any) -> Shapes:
    return Shapes(
        str(root), split, classes, "continuous", train_images=12, test_images=5, **options
    )


def digest(root: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        total.update(str(path.relative_to(root)).encode())
        total.update(path.read_bytes() if path.is_file() else b"")
    return total.hexdigest()


def test_both_forms_are_equal(root: Path) -> None:
    for split, number in NUMBERS.items():
        voc, coco = read(root, split), read(root, split, form="coco")
        assert len(voc.records) == number
        assert voc.classes == coco.classes == CLASSES
        assert voc.problems == coco.problems == []
        for one, two in zip(voc.records, coco.records, strict=True):
            assert one.size == two.size == SIZE
            assert Path(one.path) == Path(two.path)
            np.testing.assert_array_equal(one.boxes, two.boxes)
            np.testing.assert_array_equal(one.labels, two.labels)


def test_boxes_are_tight_around_the_outlines(root: Path) -> None:
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    seen = set()
    for item in content["annotations"]:
        seen.add(item["category_id"])
        canvas = np.zeros(SIZE, np.uint8)
        for part in item["segmentation"]:
            cv2.fillPoly(canvas, [np.round(np.reshape(part, (-1, 2))).astype(np.int32)], 1)
        rows, columns = np.nonzero(canvas)
        x, y, width, height = item["bbox"]
        low = np.array([columns.min(), rows.min()])
        high = np.array([columns.max(), rows.max()])
        assert np.abs(low - [x, y]).max() <= 1.5
        assert np.abs(high - [x + width, y + height]).max() <= 1.5
        assert min(x, y) >= 0
        assert x + width <= SIZE[1]
        assert y + height <= SIZE[0]
        assert abs(item["area"] - canvas.sum()) < 0.25 * item["area"] + 20
    assert seen == {1, 2, 3, 4}


def test_images_stand_out_from_their_background(root: Path) -> None:
    # What is annotated is what was drawn: pixels within an outline differ from those around it.
    content = json.loads((root / "annotations" / "instances_test.json").read_text())
    files = {image["id"]: image["file_name"] for image in content["images"]}
    for item in content["annotations"]:
        image = cv2.imread(str(root / "JPEGImages" / files[item["image_id"]]))
        assert image is not None
        inside = np.zeros(SIZE, np.uint8)
        for part in item["segmentation"]:
            cv2.fillPoly(inside, [np.round(np.reshape(part, (-1, 2))).astype(np.int32)], 1)
        around = cv2.dilate(inside, np.ones((9, 9))) - cv2.dilate(inside, np.ones((5, 5)))
        means = [image[area > 0].mean(axis=0) for area in (inside, around)]
        assert np.abs(means[0] - means[1]).sum() > 30


def test_the_same_bytes_every_time(root: Path, tmp_path: Path) -> None:
    write_shapes(str(tmp_path / "again"), NUMBERS)
    assert digest(tmp_path / "again") == digest(root)
    before = digest(root)
    read(root)
    assert digest(root) == before
    train = sorted((root / "JPEGImages").glob("train_*"))[0].read_bytes()
    assert train != sorted((root / "JPEGImages").glob("test_*"))[0].read_bytes()


def test_classes_select(root: Path) -> None:
    for form in ("voc", "coco"):
        reader = read(root, classes=["star", "ring"], form=form)
        assert reader.classes == ["star", "ring"]
        everything = read(root, form=form)
        for one, two in zip(reader.records, everything.records, strict=True):
            expected = [label for label in two.labels if CLASSES[label] in ("star", "ring")]
            assert [reader.classes[label] for label in one.labels] == [CLASSES[i] for i in expected]


def test_masks_are_what_was_drawn(root: Path) -> None:
    for record in read(root, form="coco", masks=True).records:
        masks = record.masks
        assert masks is not None
        bitmaps = decode(masks, SIZE)
        assert len(bitmaps) == len(record.boxes)
        for bitmap, (x1, y1, x2, y2), area in zip(
            bitmaps, record.boxes, record.truth.areas, strict=True
        ):
            rows, columns = np.nonzero(bitmap)
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(np.array(found) - [x1, y1, x2, y2]).max() <= 1.5
            assert abs(bitmap.sum() - area) < 0.2 * area + 20
    assert read(root, form="coco").records[0].masks is None
    with pytest.raises(ValueError, match="masks: are not in the voc form"):
        read(root, masks=True)


def test_other_folders_are_left_alone(root: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a shapes data set"):
        read(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match=r"holds shapes drawn with .*'train': 12.*wanted"):
        Shapes(str(root), "train", None, "continuous", train_images=13, test_images=5)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="is not a shapes data set"):
        read(file)


def test_several_processes_at_once(root: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    folder = str(tmp_path / "shared" / "set")
    processes = [context.Process(target=write_shapes, args=(folder, NUMBERS)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert digest(Path(folder)) == digest(root)
    assert [path.name for path in Path(folder).parent.iterdir()] == ["set"]


def test_nothing_remains_of_a_failed_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("dcdet.datasets.shapes._voc_xml", fail)
    with pytest.raises(KeyboardInterrupt):
        write_shapes(str(tmp_path / "set"), NUMBERS)
    assert list(tmp_path.iterdir()) == []
