"""The VOC reader, against ElementTree and by hand."""

import logging
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from data_sets import voc_xml, write_voc
from hypothesis import given
from hypothesis import strategies as st

from dcdet.datasets.records import DataError, count_kinds
from dcdet.datasets.voc import VOC
from dcdet.errors import UserError

CLASSES = ["cat", "dog"]
SIZE = (40, 60)
CAT = ("cat", 11, 6, 30, 25)


def read(root: Path, image_set: str = "train", **options: bool) -> VOC:
    return VOC(str(root), image_set, CLASSES, "continuous", **options)


def one_image(root: Path, xml: str | bytes) -> Path:
    """A data set of a good image "b" and an image "a" with this XML."""
    write_voc(root, {"a": (SIZE, []), "b": (SIZE, [CAT])})
    path = root / "Annotations" / "a.xml"
    path.write_bytes(xml if isinstance(xml, bytes) else xml.encode())
    return path


def test_boxes_are_continuous_and_counted_from_zero(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": (SIZE, [CAT, ("dog", 1, 1, 60, 40)])})
    reader = read(tmp_path)
    record = reader.records[0]
    np.testing.assert_array_equal(record.boxes, [[10, 5, 30, 25], [0, 0, 60, 40]])
    np.testing.assert_array_equal(record.truth.xywh, [[10, 5, 20, 20], [0, 0, 60, 40]])
    np.testing.assert_array_equal(record.truth.areas, [400, 2400])
    assert record.labels.tolist() == [0, 1]
    assert record.size == SIZE
    assert record.image_id == "a"
    assert record.path.endswith("JPEGImages/a.png")
    assert reader.category_ids == [1, 2]
    assert reader.problems == []


def test_bccd_equals_its_xml_and_names_the_two_degenerate_boxes(
    shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = shared / "data" / "bccd"
    names = ["RBC", "WBC", "Platelets"]
    reader = VOC(str(root), "trainval+test", names, "inclusive")
    assert len(reader.records) == 364
    boxes = points = 0
    for record in reader.records:
        tree = ElementTree.parse(root / "Annotations" / f"{record.image_id}.xml")
        expected = []
        for item in tree.findall("object"):
            x1, y1, x2, y2 = (
                int(item.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax")
            )
            if x1 == x2 and y1 == y2:
                points += 1
                continue
            label = names.index(item.findtext("name", ""))
            expected.append([label, max(x1 - 1, 0), max(y1 - 1, 0), min(x2, 640), min(y2, 480)])
        found = np.column_stack([record.labels, record.boxes])
        np.testing.assert_array_equal(found, np.array(expected).reshape(-1, 5))
        boxes += len(expected)
    assert points == 2
    assert boxes == sum(len(record.truth.labels) for record in reader.records)
    assert [(p.image_id, p.kind) for p in reader.problems] == [
        ("BloodImage_00338", "degenerate box"),
        ("BloodImage_00343", "degenerate box"),
    ]
    assert reader.problems[0].where.endswith("BloodImage_00338.xml:158")
    assert "(504, 337, 504, 337)" in str(reader.problems[0])
    assert "2 x degenerate box" in caplog.text


def test_image_sets_are_joined_over_years_and_roots(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOC2007", {"a": (SIZE, [CAT])}, "trainval")
    write_voc(tmp_path / "VOC2012", {"b": (SIZE, [CAT])}, "trainval")
    reader = read(tmp_path, "2007_trainval+2012_trainval")
    assert [Path(r.path).parts[-3:] for r in reader.records] == [
        ("VOC2007", "JPEGImages", "a.png"),
        ("VOC2012", "JPEGImages", "b.png"),
    ]
    roots = [str(tmp_path / "VOC2007"), str(tmp_path / "VOC2012")]
    reader = VOC(roots, "trainval", CLASSES, "continuous")
    assert [r.image_id for r in reader.records] == ["a", "b"]


def test_equal_names_in_two_roots_stay_two_images(tmp_path: Path) -> None:
    roots = [
        str(write_voc(tmp_path / name, {"a": (SIZE, [CAT])}, "train")) for name in ("one", "two")
    ]
    reader = VOC(roots, "train", CLASSES, "continuous")
    assert len({record.image_id for record in reader.records}) == 2
    assert len({record.path for record in reader.records}) == 2


def test_an_image_listed_twice_counts_once(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": (SIZE, [CAT])}, "train")
    (tmp_path / "ImageSets/Main/val.txt").write_text("a\n")
    reader = read(tmp_path, "train+val")
    assert len(reader.records) == 1
    assert reader.problems[0].where.endswith("val.txt:1")


def test_difficult_objects_are_ignored_in_training_and_flagged(tmp_path: Path) -> None:
    hard = (*CAT, "<difficult>1</difficult>")
    easy = ("dog", 1, 1, 10, 10, "<difficult>0</difficult>")
    write_voc(tmp_path, {"a": (SIZE, [hard, easy, ("dog", 3, 3, 9, 9)])})
    record = read(tmp_path).records[0]
    assert record.labels.tolist() == [1, 1]
    np.testing.assert_array_equal(record.ignored, [[10, 5, 30, 25]])
    assert record.truth.ignore.tolist() == [True, False, False]
    record = read(tmp_path, use_difficult=True).records[0]
    assert record.labels.tolist() == [0, 1, 1]
    assert len(record.ignored) == 0
    assert record.truth.ignore.tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("corners", "kind", "box"),
    [
        ((0, 0, 10, 10), None, (0, 0, 10, 10)),  # counted from 0
        ((-20, 3, 30, 25), "box partly outside the image", (0, 2, 30, 25)),
        ((50, 30, 90, 90), "box partly outside the image", (49, 29, 60, 40)),
        ((2.5, 3.5, 9.5, 8.5), None, (1.5, 2.5, 9.5, 8.5)),
        ((5, 5, 5, 5), "degenerate box", None),
        ((20, 5, 10, 9), "degenerate box", None),
        ((100, 100, 120, 120), "box outside the image", None),
        ((60.95, 1, 62, 5), "sub-pixel box", None),
        (("nan", 1, 2, 2), "non-finite or huge box", None),
        ((1, 1, "inf", 2), "non-finite or huge box", None),
        ((1, 1, 1e30, 2), "non-finite or huge box", None),
        (("", 1, 2, 2), "box without four numbers", None),
        (("left", 1, 2, 2), "box without four numbers", None),
    ],
)
def test_boxes_are_clipped_or_dropped_and_named(
    tmp_path: Path,
    corners: tuple[object, ...],
    kind: str | None,
    box: tuple[float, ...] | None,
) -> None:
    path = one_image(tmp_path, voc_xml(SIZE, [("dog", *corners)]))
    reader = read(tmp_path)
    expected = np.array([box] if box else [], np.float32).reshape(-1, 4)
    np.testing.assert_allclose(reader.records[0].boxes, expected, atol=1e-6)
    assert len(reader.records[0].truth.labels) == len(expected)
    assert [problem.kind for problem in reader.problems] == ([kind] if kind else [])
    if kind:
        assert reader.problems[0].where == f"{path}:3"
        assert reader.problems[0].image_id == "a"
        with pytest.raises(UserError, match=r"a\.xml:3: dog .*" + kind):
            read(tmp_path, strict=True)


def test_missing_tags(tmp_path: Path) -> None:
    xml = voc_xml(None, [CAT, ("dog", 1, 2, 30, 40)])
    path = one_image(tmp_path, xml.replace("<xmax>30</xmax>", "", 1).replace("<name>dog", "<x>dog"))
    path.write_text(path.read_text().replace("</name>", "</x>", 2).replace("</x>", "</name>", 1))
    reader = read(tmp_path)
    assert reader.records[0].size == SIZE  # of the image file
    assert count_kinds(reader.problems) == (
        "1 x missing size, 1 x box without four numbers, 1 x unknown class ''"
    )


def test_unknown_class_is_named_with_the_nearest(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": (SIZE, [CAT, ("dgo", 1, 1, 9, 9)])})
    reader = read(tmp_path)
    assert "class 'dgo' is not in data.classes; did you mean 'dog'?" in str(reader.problems[0])
    assert count_kinds(reader.problems) == "1 x unknown class 'dgo'"


def test_no_known_class_at_all_is_an_error(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": (SIZE, [("Cat", 1, 1, 9, 9)])})
    with pytest.raises(UserError, match="no object of the classes cat, dog"):
        read(tmp_path)


def test_images_without_objects_are_kept(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": (SIZE, []), "b": (SIZE, [])})
    reader = read(tmp_path)
    assert [len(record.boxes) for record in reader.records] == [0, 0]
    assert reader.problems == []


BOMB = (
    '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">'
    + "".join(
        f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + "]><annotation>&i;</annotation>"
)


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        (b"", "not well-formed XML: no element found"),
        (b"<annotation><object>", "not well-formed XML"),
        (b"{}", "not well-formed XML"),
        (b"<html></html>", "root is <html>"),
        (BOMB.encode(), "document type declaration"),
        (BOMB.encode("utf-16"), "document type declaration"),
        (b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "document type declaration"),
        (b'<?xml version="1.0" encoding="klingon"?><annotation/>', "not well-formed XML"),
    ],
)
def test_unreadable_annotations_stop_with_their_name(
    tmp_path: Path, xml: bytes, reason: str
) -> None:
    path = one_image(tmp_path, xml)
    start = time.perf_counter()
    with pytest.raises(UserError, match=reason) as caught:
        read(tmp_path)
    assert time.perf_counter() - start < 2
    assert caught.value.where == str(path)


def test_all_fatal_problems_are_collected(tmp_path: Path) -> None:
    write_voc(tmp_path, {name: (SIZE, [CAT]) for name in "abc"})
    (tmp_path / "Annotations" / "a.xml").unlink()
    (tmp_path / "Annotations" / "c.xml").write_text("<")
    with pytest.raises(DataError, match=r"a\.xml: No such file.*and 1 more") as caught:
        read(tmp_path)
    assert [problem.image_id for problem in caught.value.problems] == ["a", "c"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "latin-1"])
def test_encodings_and_names_with_spaces(tmp_path: Path, encoding: str) -> None:
    write_voc(tmp_path, {"my cät 1": (SIZE, [CAT])})
    xml = f'<?xml version="1.0" encoding="{encoding}"?>' + voc_xml(SIZE, [("kätzchen", 1, 1, 9, 9)])
    (tmp_path / "Annotations" / "my cät 1.xml").write_bytes(xml.encode(encoding))
    reader = VOC(str(tmp_path), "train", ["kätzchen"], "continuous")
    assert reader.records[0].image_id == "my cät 1"
    assert reader.records[0].labels.tolist() == [0]


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/../../x", "http://a/b"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    write_voc(tmp_path / "set", {"a": (SIZE, [CAT])})
    (tmp_path / "set/ImageSets/Main/train.txt").write_text(f"a\n{name}\n")
    with pytest.raises(UserError, match="leads out of") as caught:
        read(tmp_path / "set")
    assert caught.value.where.endswith("train.txt:2")


def test_links_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    write_voc(tmp_path / "set", {"a": (SIZE, [CAT]), "b": (SIZE, [CAT])})
    image = tmp_path / "set/JPEGImages/a.png"
    image.rename(tmp_path / "outside.png")
    image.symlink_to(tmp_path / "outside.png")
    with pytest.raises(UserError, match="leads out of"):
        read(tmp_path / "set")
    image.unlink()
    image.symlink_to("b.png")
    assert len(read(tmp_path / "set").records) == 2


def test_a_missing_image_set_lists_those_there(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": (SIZE, [CAT])}, "train")
    with pytest.raises(UserError, match=r"trian\.txt: No such file.*there are: train"):
        read(tmp_path, "trian")
    with pytest.raises(UserError, match="root right"):
        read(tmp_path / "nowhere")


def test_classes_are_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.classes"):
        VOC(str(tmp_path), "train", None, "continuous")


def test_only_the_first_problems_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one_image(tmp_path, voc_xml(SIZE, [("dog", 5, 5, 5, 5)] * 30))
    with caplog.at_level(logging.WARNING):
        reader = read(tmp_path)
    assert len(reader.problems) == 30
    assert len(caplog.records) == 11  # ten and the summary


numbers = st.one_of(
    st.integers(-5, 70),
    st.floats(-5, 70),
    st.sampled_from(["nan", "inf", "-inf", "1e30", "-1e308", "", "x", "1,5", "0x10", " 7 "]),
)
objects = st.tuples(
    st.sampled_from(["cat", "dog", "cow"]),
    *[numbers] * 4,
    st.sampled_from(["", "<difficult>1</difficult>"]),
)


@given(st.lists(objects, max_size=6), st.sampled_from([SIZE, (0, 0), (40, -1), None]))
def test_every_target_lies_in_its_image(
    tmp_path_factory: pytest.TempPathFactory, items: list[tuple[object, ...]], size: tuple[int, int]
) -> None:
    root = tmp_path_factory.getbasetemp() / "voc"
    one_image(root, voc_xml(size, items))
    reader = read(root)
    record = reader.records[0]
    for x1, y1, x2, y2 in [*record.boxes, *record.ignored]:
        assert 0 <= x1 < x2 <= 60
        assert 0 <= y1 < y2 <= 40
    dropped = [
        p for p in reader.problems if p.kind not in ("missing size",) and "partly" not in p.kind
    ]
    assert len(record.boxes) + len(record.ignored) + len(dropped) == len(items)
    assert len(record.labels) == len(record.boxes)
    assert len(record.truth.labels) == len(items) - len(dropped)
