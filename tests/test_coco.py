"""The COCO reader, against pycocotools, the release's rule and hand-made damage."""

import contextlib
import copy
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sets import coco_content, write_coco
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.coco import COCO as Official

from dcdet.datasets.coco import COCO
from dcdet.datasets.records import DataError, Record, count_kinds
from dcdet.errors import UserError
from dcdet.masks import decode, encode, read_runs


def read(root: Path, image_set: str = "train", **options: Any) -> COCO:
    options = {"classes": None, "pixels": "continuous", **options}
    return COCO(str(root), image_set=image_set, **options)


def test_records_of_a_small_set(tmp_path: Path) -> None:
    reader = read(write_coco(tmp_path, coco_content()))
    assert reader.classes == ["car", "cat", "toothbrush"]  # in the order of their ids
    assert reader.category_ids == [3, 17, 90]
    assert [r.image_id for r in reader.records] == [10, 11, 12]
    assert [r.labels.tolist() for r in reader.records] == [[0], [1], [2]]
    np.testing.assert_array_equal(reader.records[1].boxes, [[3.5, 3.25, 24, 14]])
    np.testing.assert_array_equal(reader.records[1].truth.xywh, [[3.5, 3.25, 20.5, 10.75]])
    assert reader.records[0].truth.ids.tolist() == [0]  # id 0 is an annotation like any other
    assert reader.records[0].truth.areas.tolist() == [100]
    assert reader.records[0].size == (40, 60)
    assert reader.records[0].path == str(tmp_path / "train" / "0.png")
    assert reader.problems == []


def test_equals_pycocotools(shared: Path) -> None:
    root = shared / "data" / "coco"
    reader = read(root, "val2017")
    with contextlib.redirect_stdout(io.StringIO()):
        official = Official(str(root / "annotations" / "instances_val2017.json"))
    assert reader.category_ids == sorted(official.getCatIds())
    assert [r.image_id for r in reader.records] == official.getImgIds()
    for record in reader.records:
        expected = official.loadAnns(official.getAnnIds(record.image_id))
        assert record.truth.xywh.tolist() == [a["bbox"] for a in expected]
        ids = [reader.category_ids[label] for label in record.truth.labels]
        assert ids == [a["category_id"] for a in expected]
        assert record.truth.areas.tolist() == [a["area"] for a in expected]
        assert os.path.exists(record.path)
    assert reader.problems == []


def test_renumbered_and_shuffled_categories_change_nothing_but_the_ids(tmp_path: Path) -> None:
    content = coco_content()
    names = {3: 1, 17: 200, 90: 1000}  # the same order
    renumbered = copy.deepcopy(content)
    for item in renumbered["categories"]:
        item["id"] = names[item["id"]]
    for item in renumbered["annotations"]:
        item["category_id"] = names[item["category_id"]]
    renumbered["categories"].reverse()
    first = read(write_coco(tmp_path / "a", content))
    second = read(write_coco(tmp_path / "b", renumbered))
    assert first.classes == second.classes
    assert second.category_ids == [names[i] for i in first.category_ids]
    for one, two in zip(first.records, second.records, strict=True):
        np.testing.assert_array_equal(one.labels, two.labels)
        np.testing.assert_array_equal(one.boxes, two.boxes)


def test_classes_select_and_order(tmp_path: Path) -> None:
    write_coco(tmp_path, coco_content())
    reader = read(tmp_path, classes=["toothbrush", "car"])
    assert reader.category_ids == [90, 3]
    assert [r.labels.tolist() for r in reader.records] == [[1], [], [0]]
    assert reader.problems == []
    with pytest.raises(UserError, match=r"no category 'toothbrsh'.*did you mean 'toothbrush'"):
        read(tmp_path, classes=["toothbrsh"])


def test_placeholders_are_labels_without_a_category(tmp_path: Path) -> None:
    content = coco_content()
    content["categories"].append({"id": 5, "name": "N/A 6"})  # an odd name, but a category's
    root = write_coco(tmp_path, content)
    reader = read(root, classes=["N/A 1", "car", "N/A 12", "N/A 6", "toothbrush", "cat"])
    assert reader.category_ids == [1, 3, 12, 5, 90, 17]
    assert [record.labels.tolist() for record in reader.records] == [[1], [5], [4]]
    assert not reader.problems
    with pytest.raises(UserError, match=r"no category 'N/A 17' \(its category 17 is 'cat'\)"):
        read(root, classes=["car", "N/A 17"])
    for name in ("N/A", "N/A x", "N/A 0", "N/A 012", "N/A -1", "N/A 1.5", "n/a 12", "N/A 12 "):
        with pytest.raises(UserError, match="has no category"):
            read(root, classes=["car", name])


def test_crowds_are_ignored_regions(tmp_path: Path) -> None:
    content = coco_content(1)
    content["annotations"][0]["iscrowd"] = 1
    record = read(write_coco(tmp_path, content)).records[0]
    assert len(record.boxes) == 0
    np.testing.assert_array_equal(record.ignored, [[2.5, 3.25, 23, 14]])
    assert record.truth.ignore.tolist() == [True]


def test_folders_of_the_release(tmp_path: Path) -> None:
    for image_set, folder, kind in (
        ("minival2014", "val2014", "instances"),
        ("valminusminival2014", "val2014", "instances"),
        ("test-dev2015", "test2015", "image_info"),
        ("train2014", "train2014", "instances"),
    ):
        content = coco_content(1)
        if kind == "image_info":
            del content["annotations"]
        file = tmp_path / "annotations" / f"{kind}_{image_set}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
        assert read(tmp_path, image_set).records[0].path == str(tmp_path / folder / "0.png")
        (tmp_path / "images" / folder).mkdir(parents=True, exist_ok=True)
        assert read(tmp_path, image_set).records[0].path.startswith(str(tmp_path / "images"))
        (tmp_path / "images" / folder).rmdir()


def test_own_file_and_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(coco_content(1)))
    options: dict[str, Any] = {"classes": None, "pixels": "continuous"}
    reader = COCO(str(tmp_path), annotations="mine.json", images="pictures", **options)
    assert reader.records[0].path == str(tmp_path / "pictures" / "0.png")
    wrong: list[dict[str, Any]] = [{}, {"image_set": "a", "annotations": "mine.json"}]
    for both in wrong:
        with pytest.raises(ValueError, match="image_set: give either"):
            COCO(str(tmp_path), **options, **both)


def test_joined_sets(tmp_path: Path) -> None:
    second = coco_content()
    for shift, key in ((100, "images"), (100, "annotations")):
        for item in second[key]:
            item["id"] += shift
    for item in second["annotations"]:
        item["image_id"] += 100
    write_coco(tmp_path, coco_content(), "train")
    write_coco(tmp_path, second, "val")
    reader = read(tmp_path, "train+val")
    assert [r.image_id for r in reader.records] == [10, 11, 12, 110, 111, 112]
    second["categories"][0]["name"] = "dog"
    write_coco(tmp_path, second, "val")
    with pytest.raises(UserError, match="other categories"):
        read(tmp_path, "train+val")
    write_coco(tmp_path, coco_content(), "val")
    with pytest.raises(UserError, match=r"val\.json: images\[0\] \(id 10\): id 10 was used before"):
        read(tmp_path, "train+val")


def masks_of(record: Record) -> np.ndarray:
    masks = record.masks
    assert masks is not None
    return decode(masks, record.size)


def test_masks_equal_pycocotools(tmp_path: Path) -> None:
    """Polygons and run lengths of both kinds, an object's and a crowd's."""
    content = coco_content(2)
    random = np.random.default_rng(0)
    for number in range(5):
        corners = random.uniform((-5, -5), (65, 45), (6 + number, 2)).round(2)
        content["annotations"].append({
            **content["annotations"][0], "id": 10 + number, "iscrowd": int(number in (1, 3)),
            "segmentation": [corners.ravel().tolist()],
        })  # fmt: skip
    crowd, thing = content["annotations"][3], content["annotations"][4]
    bitmap = random.random((40, 60)) < 0.2
    [rle] = encode(torch.from_numpy(bitmap)[None])
    crowd["segmentation"] = {
        "size": [40, 60],
        "counts": read_runs(rle["counts"], (40, 60)).tolist(),
    }
    thing["segmentation"] = rle
    del content["annotations"][:2]
    content["annotations"][0]["segmentation"].append([1, 1, 20, 1, 20, 30.5, 1, 30])
    root = write_coco(tmp_path, content)
    [record, empty] = read(root, masks=True).records
    with contextlib.redirect_stdout(io.StringIO()):
        official = Official(str(root / "annotations" / "instances_train.json"))
    expected = [official.annToMask(item) for item in official.loadAnns([10, 11, 12, 13, 14])]
    lengths = record.truth.run_lengths()
    assert lengths is not None
    np.testing.assert_array_equal(decode(lengths, (40, 60)), expected)
    np.testing.assert_array_equal(masks_of(record), np.array(expected)[[0, 2, 4]])
    assert record.truth.ignore.tolist() == [False, True, False, True, False]
    assert (len(record.boxes), len(record.ignored)) == (3, 2)
    assert masks_of(empty).shape == (0, 40, 60)
    plain = read(root)
    assert plain.records[0].masks is plain.records[0].truth.masks is None
    np.testing.assert_array_equal(plain.records[0].boxes, record.boxes)


def test_masks_stay_with_their_boxes(tmp_path: Path) -> None:
    """Whatever is dropped: a bad box, a bad mask, another class."""
    content = coco_content(1)
    first = content["annotations"][0]
    content["annotations"] = [
        {
            **first, "id": number, "category_id": 17 if number == 3 else 3,
            "bbox": [5, 5, 0 if number == 1 else 10 + number, 10],
            "segmentation": [[5, 5, 15 + number, 5, 15 + number, 15, 5, 15]],
        }
        for number in range(6)
    ]  # fmt: skip
    content["annotations"][4]["segmentation"] = None
    reader = read(write_coco(tmp_path, content), masks=True, classes=["car"])
    [record] = reader.records
    assert record.boxes[:, 2].tolist() == [15, 17, 20]
    assert masks_of(record).any(axis=1).sum(axis=1).tolist() == [10, 12, 15]
    assert (
        count_kinds(reader.problems) == "1 x degenerate box, 1 x neither polygons nor run lengths"
    )


def test_bad_masks_are_named(tmp_path: Path) -> None:
    content = coco_content(6)
    good = [[5, 5, 15, 5, 15, 15, 5, 15]]
    wrong: list[Any] = [
        [*good, [1, 2, 3]], {"size": [60, 40], "counts": [2400]}, [["a"] * 6],
        {"size": [40, 60], "counts": "04P"}, [[90, 90, 99, 90, 99, 99]],
    ]  # fmt: skip
    for item, segmentation in zip(content["annotations"], [*wrong, good], strict=True):
        item["segmentation"] = segmentation
    root = write_coco(tmp_path, content)
    reader = read(root, masks=True)
    file = root / "annotations" / "instances_train.json"
    assert [str(problem) for problem in reader.problems] == [
        f"{file}: annotations[{number}] (id {number}): segmentation: {what}"
        for number, what in enumerate([
            "polygon without three corners (left out)",
            "run lengths of another size than the image's (dropped)",
            "polygon that is not a list of numbers (dropped)",
            "run lengths that cannot be decompressed (dropped)",
            "mask without a pixel (kept)",
        ])
    ]  # fmt: skip
    assert [len(record.boxes) for record in reader.records] == [1, 0, 0, 0, 1, 1]
    assert [len(record.truth.ids) for record in reader.records] == [1, 0, 0, 0, 1, 1]
    assert read(root).problems == []
    with pytest.raises(
        UserError, match=r"annotations\[0\] \(id 0\): segmentation: polygon without"
    ):
        read(root, masks=True, strict=True)


def test_masks_of_a_set_without_any(tmp_path: Path) -> None:
    root = write_coco(tmp_path, coco_content())
    with pytest.raises(UserError, match=r"train\.json: no annotation has a segmentation"):
        read(root, masks=True)
    content = coco_content()
    content["annotations"] = []  # a test set
    assert len(read(write_coco(tmp_path, content), masks=True).records) == 3


coordinate = st.floats(-30, 90).map(lambda v: round(v, 2))
length = st.floats(0.01, 90).map(lambda v: round(v, 2))


@given(coordinate, coordinate, length, length)
def test_truncated_boxes_follow_the_release(
    tmp_path_factory: pytest.TempPathFactory, x: float, y: float, w: float, h: float
) -> None:
    content = coco_content(1)
    content["annotations"][0]["bbox"] = [x, y, w, h]
    root = write_coco(tmp_path_factory.getbasetemp() / "truncated", content)
    found = read(root, boxes="truncated").records[0].boxes
    # The rule, in inclusive pixels of a 60 x 40 image.
    x1, y1 = np.maximum(0, [x, y])
    x2 = min(60 - 1, x1 + max(0, w - 1))
    y2 = min(40 - 1, y1 + max(0, h - 1))
    if x2 < x1 or y2 < y1 or x + w <= 0 or y + h <= 0:  # the last two: wholly left or above
        assert len(found) == 0
    else:
        inclusive = np.array([x1, y1, x2, y2]).astype(np.uint16).astype(int)
        np.testing.assert_array_equal(found, [inclusive + np.array([0, 0, 1, 1])])


@pytest.mark.parametrize(
    ("bbox", "kind"),
    [
        ([1, 2, 0, 5], "degenerate box"),
        ([1, 2, 5, -1], "degenerate box"),
        ([1, 2, float("nan"), 5], "non-finite or huge box"),
        ([1, float("inf"), 5, 5], "non-finite or huge box"),
        ([1, 2, 1e30, 5], "non-finite or huge box"),
        ([1, 2, 5], "box without four numbers"),
        ([1, 2, 5, 5, 5], "box without four numbers"),
        (["1", 2, 5, 5], "box without four numbers"),
        ([True, 2, 5, 5], "box without four numbers"),
        ([70, 2, 5, 5], "box outside the image"),
        ([2, 2, 0.01, 5], "sub-pixel box"),
        ([50, 2, 20, 5], "box partly outside the image"),
    ],
)
def test_bad_boxes_are_named_and_kept_out(tmp_path: Path, bbox: list[Any], kind: str) -> None:
    content = coco_content()
    content["annotations"][1]["bbox"] = bbox
    root = write_coco(tmp_path, content)
    reader = read(root)
    assert [problem.kind for problem in reader.problems] == [kind]
    file = root / "annotations" / "instances_train.json"
    assert reader.problems[0].where == f"{file}: annotations[1] (id 1)"
    clipped = "partly" in kind
    assert len(reader.records[1].boxes) == len(reader.records[1].truth.xywh) == clipped
    if clipped:
        np.testing.assert_array_equal(reader.records[1].boxes, [[50, 2, 60, 7]])
    with pytest.raises(UserError, match=r"annotations\[1\] \(id 1\): bbox .*" + kind):
        read(root, strict=True)


def test_areas_are_optional_and_mended(tmp_path: Path) -> None:
    content = coco_content()
    del content["annotations"][0]["area"]
    content["annotations"][1]["area"] = float("nan")
    content["annotations"][2]["area"] = -4
    reader = read(write_coco(tmp_path, content))
    assert [r.truth.areas.tolist() for r in reader.records] == [[20.5 * 10.75]] * 3
    assert count_kinds(reader.problems) == "2 x bad area"


def test_dangling_references_are_counted(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][0]["image_id"] = 99
    content["annotations"][1]["category_id"] = 99
    reader = read(write_coco(tmp_path, content))
    assert [len(r.boxes) for r in reader.records] == [0, 0, 1]
    assert count_kinds(reader.problems) == (
        "1 x annotation of an unknown image, 1 x annotation of an unknown category"
    )


def test_missing_sizes_are_read_from_the_image(tmp_path: Path) -> None:
    content = coco_content()
    write_coco(tmp_path, content)
    del content["images"][0]["width"]
    content["images"][1]["height"] = 0
    (tmp_path / "train" / "1.png").unlink()
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(content))
    reader = read(tmp_path)
    assert [r.size for r in reader.records] == [(40, 60), (0, 0), (40, 60)]
    assert count_kinds(reader.problems) == "2 x missing size"
    assert [len(r.boxes) for r in reader.records] == [1, 1, 1]


def _set(path: str, value: Any) -> Any:
    """A change of the sound content: _set("images.0.id", 5)."""

    def change(content: Any) -> Any:
        *parents, last = [int(k) if k.isdigit() else k for k in path.split(".")]
        node = content
        for key in parents:
            node = node[key]
        if value is ...:
            del node[last]
        else:
            node[last] = value
        return content

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("images", ...), "train.json: has no section 'images'"),
        (_set("annotations", ...), "train.json: has no section 'annotations'"),
        (_set("categories", ...), "train.json: has no section 'categories'"),
        (_set("images", {}), "train.json: images: must be a list"),
        (_set("images", []), "no images"),
        (_set("categories", []), "categories: is empty"),
        (_set("images.1", None), "images[1]: is not an object"),
        (_set("images.1.id", ...), "images[1]: id must be an integer, it is missing"),
        (_set("images.1.id", "11"), "images[1] (id '11'): id must be an integer, got '11'"),
        (_set("images.1.id", float("nan")), "images[1] (id nan): id must be an integer"),
        (_set("images.1.id", True), "images[1] (id True): id must be an integer"),
        (_set("images.1.id", 10**30), "images[1] (id 1000"),
        (_set("images.1.id", 10), "images[1] (id 10): id 10 was used before"),
        (_set("images.1.file_name", ...), "images[1] (id 11): file_name must be a string"),
        (_set("images.1.file_name", 5), "images[1] (id 11): file_name must be a string, got 5"),
        (_set("images.1.width", "60"), "images[1] (id 11): height and width must be"),
        (_set("images.1.width", -60), "images[1] (id 11): height and width must be"),
        (_set("images.1.file_name", "../x.png"), "images[1] (id 11): file_name '../x.png' is not"),
        (_set("images.1.file_name", "/x.png"), "images[1] (id 11): file_name '/x.png' is not"),
        (_set("images.1.file_name", "http://a/b.png"), "images[1] (id 11): file_name 'http:"),
        (_set("images.1.file_name", ""), "images[1] (id 11): file_name '' is not"),
        (_set("images.1.file_name", "a\0b"), "images[1] (id 11): file_name"),
        (_set("images.1.file_name", "\ud800"), "images[1] (id 11): file_name"),
        (_set("categories.1.id", "3"), "categories[1] (id '3'): id must be an integer"),
        (_set("categories.1.name", None), "categories[1] (id 3): name must be a string, got None"),
        (_set("categories.1.id", 17), "categories[1] (id 17): category id 17 or name 'car' is"),
        (_set("categories.1.name", "cat"), "categories[1] (id 3): category id 3 or name 'cat' is"),
        (_set("annotations.1", []), "annotations[1]: is not an object"),
        (_set("annotations.1.id", ...), "annotations[1]: id must be an integer, it is missing"),
        (_set("annotations.1.id", 2.5), "annotations[1] (id 2.5): id must be an integer"),
        (_set("annotations.1.id", 0), "annotations[1] (id 0): id 0 was used before"),
        (_set("annotations.1.image_id", "x"), "annotations[1] (id 1): image_id must be an integer"),
        (_set("annotations.1.category_id", []), "annotations[1] (id 1): category_id must be an"),
        (_set("annotations.1.bbox", ...), "annotations[1] (id 1): bbox must be a list, it is"),
        (_set("annotations.1.bbox", "1 2 3 4"), "annotations[1] (id 1): bbox must be a list, got"),
        (_set("annotations.1.iscrowd", "no"), "annotations[1] (id 1): iscrowd must be 0 or 1"),
        (_set("annotations.1.iscrowd", []), "annotations[1] (id 1): iscrowd must be 0 or 1"),
    ],
)
def test_broken_files_stop_with_section_index_and_id(
    tmp_path: Path, change: Any, message: str
) -> None:
    write_coco(tmp_path, coco_content())
    content = change(coco_content())
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "train.json:1: is not JSON"),
        (b'{"images": [],\n"annotations": [,]}', "train.json:2: is not JSON"),
        (b"[]", "must be a JSON object"),
        (b"3", "must be a JSON object"),
        (b'{"images": "\xff"}', "is not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"images": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"<html></html>", "train.json:1: is not JSON"),
    ],
)
def test_files_that_are_no_coco_json(tmp_path: Path, text: bytes, message: str) -> None:
    write_coco(tmp_path, coco_content())
    (tmp_path / "annotations" / "instances_train.json").write_bytes(text)
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    assert message in str(caught.value)


def test_missing_file_lists_those_there(tmp_path: Path) -> None:
    write_coco(tmp_path, coco_content())
    with pytest.raises(UserError, match=r"No such file.*there are: instances_train\.json"):
        read(tmp_path, "val")
    (tmp_path / "annotations" / "instances_fifo.json").parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / "annotations" / "instances_fifo.json")
    with pytest.raises(UserError, match="not a regular file"):
        read(tmp_path, "fifo")


def test_all_fatal_problems_are_collected(tmp_path: Path) -> None:
    write_coco(tmp_path, coco_content())
    content = coco_content()
    content["images"][2]["id"] = "a"
    content["annotations"][1]["id"] = None
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"and \d more") as caught:
        read(tmp_path)
    assert {p.where.split(": ")[1] for p in caught.value.problems if p.fatal} == {
        "images[2] (id 'a')",
        "annotations[1] (id None)",
    }


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-100, 100),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from([0, 3, 10, 11, "0.png", 1e30, float("nan")]),
    ),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def _all_paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(found for key, inner in items for found in _all_paths(inner, (*path, key)))]


@given(st.data())
def test_any_change_of_a_file_loads_or_names_a_place(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.getbasetemp() / "changed"
    content: Any = coco_content()
    content["annotations"][0]["segmentation"] = [[5, 5, 15, 5, 15, 15]]
    content["annotations"][1]["segmentation"] = {"size": [40, 60], "counts": [500, 100, 1800]}
    if not root.exists():
        write_coco(root, content)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(_all_paths(content)))
        value = data.draw(json_values)
        if not path:
            content = value
            continue
        node = content
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))
    boxes = data.draw(st.sampled_from(["exact", "truncated"]))
    reader = message = None
    try:
        reader = read(root, boxes=boxes, masks=True)
    except UserError as error:
        message = str(error)
    if reader is None:
        assert str(root) in str(message)
        return
    for record in reader.records:
        height, width = record.size if record.size != (0, 0) else (1e9, 1e9)
        for x1, y1, x2, y2 in [*record.boxes, *record.ignored]:
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
        assert len(record.labels) == len(record.boxes) == len(record.masks or [])
        assert len(record.truth.run_lengths() or []) == len(record.truth.xywh)
        assert np.isfinite(record.truth.xywh).all()
        assert np.isfinite(record.truth.areas).all()
