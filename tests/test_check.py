"""`dcdet check` finds everything that was broken on purpose, in one go."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import label_sets
import numpy as np
import pytest
from data_sets import coco_content, write_coco, write_voc
from label_sets import CLASSES, SMALL, write_labels

from dcdet.config import load_config
from dcdet.engine import check as check_module
from dcdet.engine.check import check
from dcdet.errors import UserError

CONFIG = Path(__file__).parent.parent / "configs" / "small" / "rfcn_dcn_r18_voc.yaml"
SIZE = (40, 60)
CELLS = [("RBC", 3, 4, 20, 30), ("WBC", 10, 4, 50, 30)]


def run(train: Path, test: Path, *overrides: str) -> tuple[int, list[str]]:
    lines: list[str] = []
    places = [f"data.train.root={train}", f"data.test.root={test}", "data.workers=0"]
    code = check(load_config(CONFIG, [*places, *overrides]), lines.append)
    return code, lines


def cells(root: Path, number: int = 8, image_set: str = "trainval") -> Path:
    return write_voc(root, {f"c{i}": (SIZE, CELLS) for i in range(number)}, image_set)


def test_a_clean_set(tmp_path: Path) -> None:
    code, lines = run(cells(tmp_path / "a"), cells(tmp_path / "b", 3, "test"))
    assert code == 0
    assert lines[-1] == "nothing wrong"
    text = "\n".join(lines)
    assert "train: VOC trainval: 8 images, 16 objects (0 difficult or crowd), 3 classes" in text
    assert "RBC               8 objects in 8 images" in text
    assert "Platelets         0 objects in 0 images" in text
    assert "box width (least, 5%, median, 95%, most): 18, 18, 29.5, 41, 41" in text
    assert "images without objects to train on: 0" in text


def test_everything_wrong_is_found_at_once(tmp_path: Path) -> None:
    train = cells(tmp_path / "a")
    annotations, images = train / "Annotations", train / "JPEGImages"
    for name, old, new in (
        ("c1", "<xmax>20</xmax>", "<xmax>3</xmax>"),
        ("c2", "<name>WBC", "<name>WCB"),
        ("c3", "<xmax>50</xmax>", "<xmax>500</xmax>"),
    ):
        file = annotations / f"{name}.xml"
        file.write_text(file.read_text().replace(old, new))
    (images / "c4.png").write_bytes((images / "c4.png").read_bytes()[:60])
    (images / "c5.png").unlink()
    cv2.imwrite(str(images / "c6.png"), np.zeros((30, 60, 3), np.uint8))
    test = cells(tmp_path / "b", 3, "test")
    code, lines = run(train, test, "data.max_bad_images=0.5")
    text = "\n".join(lines)
    assert code == 1
    for expected in (
        "  1 x degenerate box:",
        "c1.xml:3: RBC (3, 4, 3, 30): degenerate box",
        "  1 x unknown class 'WCB':",
        "c2.xml:4: class 'WCB' is not in data.classes; did you mean 'WBC'?",
        "  1 x box partly outside the image:",
        "  3 x bad image:",
        "c4.png: image file is truncated",
        "c5.jpg: No such file or directory",
        "c6.png: is 60 x 30 pixels (width x height), annotated as 60 x 40",
    ):
        assert expected in text
    assert lines[-1] == "usable, but see above"


def test_one_bad_image_is_enough_for_exit_code_1(tmp_path: Path) -> None:
    train, test = cells(tmp_path / "a"), cells(tmp_path / "b", 3, "test")
    (test / "JPEGImages" / "c1.png").write_text("")
    code, lines = run(train, test)
    assert code == 1
    assert sum("c1.png: is not an image" in line for line in lines) == 1


def test_too_many_bad_images(tmp_path: Path) -> None:
    train = cells(tmp_path / "a")
    for name in ("c1", "c2"):
        (train / "JPEGImages" / f"{name}.png").write_text("")
    code, lines = run(train, cells(tmp_path / "b", 3, "test"))
    assert code == 2
    assert "  2 bad images are more than data.max_bad_images allows: 1" in lines


def test_an_unusable_set_does_not_hide_the_other(tmp_path: Path) -> None:
    train = cells(tmp_path / "a")
    for name in ("c1", "c2"):
        (train / "Annotations" / f"{name}.xml").write_text("<")
    code, lines = run(train, cells(tmp_path / "b", 3, "test"))
    text = "\n".join(lines)
    assert code == 2
    assert "train: not usable" in text
    assert "2 x unreadable annotation:" in text
    assert "c1.xml: is not well-formed XML" in text
    assert "c2.xml: is not well-formed XML" in text
    assert "test: VOC test: 3 images" in text
    code, lines = run(tmp_path / "nowhere", train, "data.test.image_set=trainval")
    assert code == 2
    assert any("trainval.txt: No such file" in line for line in lines)


def test_class_count_and_shared_images(tmp_path: Path) -> None:
    train = cells(tmp_path / "a")
    code, lines = run(train, train, "model.num_classes=2", "data.test.image_set=trainval")
    assert code == 2
    assert any("2, but data.train has 3 classes: RBC, WBC, Platelets" in line for line in lines)
    assert any(line.startswith("note: 8 images are in both") for line in lines)


def test_coco(tmp_path: Path) -> None:
    content = coco_content(6)
    content["annotations"][1]["bbox"] = [1, 1, 0, 0]
    write_coco(tmp_path, content)
    code, lines = run_coco(tmp_path)
    assert code == 1
    assert sum("annotations[1] (id 1): bbox [1, 1, 0, 0]: degenerate box" in x for x in lines) == 2


def test_masks(tmp_path: Path) -> None:
    train = f"data.train={{type: COCO, root: {tmp_path}, image_set: train, masks: true}}"
    content = coco_content(6)
    for item in content["annotations"]:
        item["segmentation"] = [[5, 5, 15, 5, 15, 15]]
    write_coco(tmp_path, content)
    code, lines = run_coco(tmp_path, train)
    assert code == 0
    assert any("6 objects (0 difficult or crowd), with masks, 3 classes" in x for x in lines)
    content["annotations"][1]["segmentation"] = [[5, 5, 15, float("nan"), 15, 15]]
    write_coco(tmp_path, content)
    code, lines = run_coco(tmp_path, train)
    assert code == 1
    assert "  1 x polygon with a non-finite or huge outline:" in lines
    assert sum("annotations[1] (id 1): segmentation: polygon with a non-" in x for x in lines) == 1
    mask_rcnn = CONFIG.parent.parent / "quickstart" / "mask_rcnn_r18_shapes.yaml"
    sets = [f"data.{part}={{type: COCO, root: {tmp_path}, image_set: train}}"
            for part in ("train", "test")]  # fmt: skip
    lines = []
    assert check(load_config(mask_rcnn, ["model.num_classes=3", *sets]), lines.append) == 2
    masks = [line for line in lines if "no instance masks, which model.mask_head learns" in line]
    assert len(masks) == 1


def run_coco(root: Path, *more: str) -> tuple[int, list[str]]:
    config: Any = (CONFIG.parent.parent / "rfcn" / "rfcn_r101_coco.yaml").read_text()
    for image_set in ("train2014+val2014", "test-dev2015", "minival2014"):
        config = config.replace(image_set, "train")
    file = root / "config.yaml"
    file.write_text(config.replace("data/coco", str(root)))
    lines: list[str] = []
    overrides = ["model.num_classes=3", "data.workers=0", *more]
    return check(load_config(file, overrides), lines.append), lines


def test_bccd(shared: Path) -> None:
    root = shared / "data" / "bccd"
    code, lines = run(root, root, "data.workers=2")
    text = "\n".join(lines)
    assert code == 1
    assert "train: VOC trainval: 292 images" in text
    assert "BloodImage_00338.xml:158: RBC (504, 337, 504, 337): degenerate box" in text
    assert "BloodImage_00343.xml:50: RBC (181, 329, 181, 329): degenerate box" in text
    assert "bad image" not in text


@pytest.mark.parametrize("override", ["data.batch_size=0", "data.train.image_sets=x"])
def test_mistakes_in_the_config_itself(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError, match=r"batch_size|did you mean 'image_set'|has no"):
        run(tmp_path, tmp_path, override)


def test_images_too_narrow_for_a_scale_of_testing(tmp_path: Path) -> None:
    sets = [write_voc(tmp_path / name, {"thin": ((700, 4), []), "good": (SIZE, CELLS)}, name)
            for name in ("trainval", "test")]  # fmt: skip
    scales = "[{short: 240, long: 320}, {short: 48, long: 64}]"
    code, lines = run(*sets, f"test.scales={scales}")
    bad = [line for line in lines if "thin.png" in line]
    assert code == 1
    assert len(bad) == 1
    assert bad[0].endswith("test/JPEGImages/thin.png: too narrow: 4 x 700 pixels times 0.0914")


def run_labels(root: Path, *overrides: str) -> tuple[int, list[str]]:
    lines: list[str] = []
    nodes = [f"data.{part}={{type: LabelFolder, root: {root}, split: {part}}}"
             for part in ("train", "test")]  # fmt: skip
    code = check(load_config(label_sets.CONFIG, [*SMALL, *nodes, *overrides]), lines.append)
    return code, lines


def rectangle(size: tuple[int, int], *rows: int) -> np.ndarray:
    """A label map whose upper rows have the given labels, a row each; below it is 0."""
    labels = np.zeros(size, np.uint8)
    labels[: len(rows)] = np.array(rows, np.uint8)[:, None]
    return labels


@pytest.mark.parametrize("workers", [0, 2])
def test_clean_label_maps(tmp_path: Path, workers: int) -> None:
    maps = {"a": rectangle((40, 60), 1, 1, 255), "b": rectangle((50, 60), 255)}
    write_labels(tmp_path, "train", maps)
    write_labels(tmp_path, "test", {"c": rectangle((20, 30), *[255] * 20)})
    code, lines = run_labels(tmp_path, f"data.workers={workers}")
    assert code == 0
    # 90 rows of 60 pixels, two of them road, two without a label.
    assert lines == [
        f"train: {tmp_path} train: 2 images, 60 pixels wide and 40 to 50 high, 3 classes",
        f"  sky   {86 / 88:8.3%} of labelled pixels, in 2 images",
        f"  road  {2 / 88:8.3%} of labelled pixels, in 1 images",
        "  car     0.000% of labelled pixels, in 0 images",
        f"  without a label: {2 / 90:.3%} of all pixels",
        "  classes that never occur: car",
        "  images without a labelled pixel: 0",
        f"test: {tmp_path} test: 1 images, 30 pixels wide and 20 high, 3 classes",
        *(f"  {name:<4}    0.000% of labelled pixels, in 0 images" for name in CLASSES),
        "  without a label: 100.000% of all pixels",
        "  classes that never occur: sky, road, car",
        "  images without a labelled pixel: 1",
        "nothing wrong",
    ]


def test_no_name_is_passed_over(tmp_path: Path) -> None:
    names = ["a b", "new\nline", "-x", "a..b", "l" * 251]
    write_labels(tmp_path, "train", dict.fromkeys(names, rectangle((20, 30))))
    write_labels(tmp_path, "test", {"c": rectangle((20, 30))})
    code, lines = run_labels(tmp_path)
    assert code == 0
    assert lines[0].startswith(f"train: {tmp_path} train: {len(names)} images, ")


def test_everything_wrong_with_label_maps_is_found_at_once(tmp_path: Path) -> None:
    write_labels(tmp_path, "test", {"t": rectangle(SIZE)})
    write_labels(tmp_path, "train", {f"m{i}": rectangle(SIZE, 1, 2) for i in range(9)})
    labels, images = tmp_path / "labels" / "train", tmp_path / "images" / "train"
    cv2.imwrite(str(labels / "m0.png"), rectangle(SIZE, 200, 26))
    cv2.imwrite(str(labels / "m1.png"), rectangle((60, 40)))
    cv2.imwrite(str(labels / "m2.png"), np.zeros((*SIZE, 3), np.uint8))
    (labels / "m3.png").write_bytes((labels / "m3.png").read_bytes()[:60])
    cv2.imwrite(str(labels / "m4.png"), rectangle(SIZE, 7))
    (images / "m4.png").write_text("")  # both are wrong, and both are told
    (images / "m5.png").write_text("")
    (labels / "m6.png").unlink()
    code, lines = run_labels(tmp_path)
    text = "\n".join(lines)
    assert code == 2
    for expected in (
        "train: ", "8 images, 60 pixels wide and 40 high",
        "  1 x without label map:", "m6.png: has no label map",
        "  5 x wrong label map:",
        "m0.png: has values that are no labels here: 26 (60 pixels), 200 (60 pixels); labels are "
        "0-2, ignored 255",
        f"m1.png: is 40 x 60 pixels (width x height), its image {images}/m1.png 60 x 40",
        "m2.png: is a colour image (mode RGB), wanted one channel of labels",
        "m4.png: has values that are no labels here: 7 (60 pixels)",
        "  2 x bad image:", f"{images}/m4.png: is not an image",
        f"{images}/m5.png: is not an image",
        "  2 bad images are more than data.max_bad_images allows: 1",
    ):  # fmt: skip
        assert expected in text
    assert sum("m3.png: " in line for line in lines) == 1
    assert any(line.startswith("test: ") for line in lines)
    assert lines[-1] == "not usable"


@pytest.mark.parametrize(
    ("broken", "code"), [("images", 1), ("labels", 2), ("missing", 1), ("resize", 1)]
)
def test_one_thing_wrong_decides_the_exit_code(tmp_path: Path, broken: str, code: int) -> None:
    for part in ("train", "test"):
        write_labels(tmp_path, part, {f"{part}{i}": rectangle(SIZE) for i in range(3)})
    if broken == "missing":
        (tmp_path / "labels" / "test" / "test0.png").unlink()
    elif broken == "resize":  # too narrow for the network's size
        write_labels(tmp_path, "test", {"test0": rectangle((2, 700))})
    else:
        (tmp_path / broken / "test" / "test0.png").write_text("")
    found, lines = run_labels(tmp_path)
    assert found == code
    assert sum("test0.png: " in line for line in lines) == 1


def test_label_maps_and_the_config(tmp_path: Path) -> None:
    write_labels(tmp_path, "train", {"a": rectangle(SIZE), "b": rectangle(SIZE, 1)})
    (tmp_path / "images" / "test").symlink_to(tmp_path / "images" / "train")
    (tmp_path / "labels" / "test").symlink_to(tmp_path / "labels" / "train")
    code, lines = run_labels(tmp_path, "data.batch_size=1", "model.num_classes=4")
    text = "\n".join(lines)
    assert code == 2
    assert "command line: 4, but data.train has 3 classes: sky, road, car" in text
    assert "command line: 4, but data.test has 3 classes" in text
    assert text.count("1 image is too few for model.backbone.norm: bn") == 1
    with pytest.raises(UserError, match=r"'filter_empty' is for detection \(write false\)"):
        run_labels(tmp_path, "data.filter_empty=true")
    code, lines = run_labels(tmp_path, "data.train.root=/nowhere")
    assert code == 2
    assert lines[0] == "train: not usable"
    assert "/nowhere/images/train: No such file or directory" in "\n".join(lines)


def test_images_that_nothing_is_known_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They can be tested on, not learnt from."""
    write_labels(tmp_path, "train", {"a": rectangle(SIZE), "b": rectangle(SIZE, 1)})
    write_labels(tmp_path, "test", {"c": rectangle(SIZE)})

    own = check_module.read_data_set

    def without(part: str) -> tuple[int, list[str]]:
        def read(config: Any, wanted: str) -> Any:
            reader = own(config, wanted)
            if wanted == part:
                reader.records[0] = replace(reader.records[0], label_path=None)
            return reader

        monkeypatch.setattr(check_module, "read_data_set", read)
        return run_labels(tmp_path)

    code, lines = without("test")
    assert code == 0
    path = tmp_path / "images" / "test" / "c.png"
    assert f"  images without a label map: 1, e.g. {path}" in lines
    code, lines = without("train")
    assert code == 2
    assert sum("images without a label map: 1" in line for line in lines) == 1


def test_camvid(shared: Path) -> None:
    """Its label 11 is to be ignored: without it in the config every file is wrong."""
    root = shared / "data" / "camvid"
    lines: list[str] = []
    node = f"{{type: LabelFolder, root: {root}, split: val%s}}"
    sets = [f"data.train={node % ''}", f"data.test={node % ', ignore: [11]'}", "data.workers=2"]
    assert check(load_config(label_sets.CONFIG, sets), lines.append) == 2
    text = "\n".join(lines)
    assert "values that are no labels here: 11 (" in text
    assert "101 images, 480 pixels wide and 360 high, 11 classes" in text
    [road] = [line for line in lines[-15:] if line.startswith("  road ")]
    assert 20 < float(road.split()[1].rstrip("%")) < 40
