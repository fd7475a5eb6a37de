"""The reader of VOC's segmentation and of SBD, on trees in the form of the downloads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from label_trees import blocks, mat_file, write_labels, write_picture, write_voc_masks
from PIL import Image

from dcdet import load_config
from dcdet.config import Config
from dcdet.datasets.label_maps import BadLabels
from dcdet.datasets.records import count_kinds
from dcdet.datasets.voc_segmentation import VOCSegmentation
from dcdet.engine.train import train
from dcdet.errors import UserError
from dcdet.visualize.segmentation import palette

CONFIG = ROOT / "configs" / "small" / "deeplab_r18_camvid.yaml"
SIZE = (64, 96)
VALUES = [*range(21), 255]


def read(root: Path, image_set: str = "train", **options: Any) -> VOCSegmentation:
    return VOCSegmentation(str(root), image_set, None, **options)


def ids(reader: VOCSegmentation) -> list[str]:
    return [record.image_id for record in reader.records]


def write_mat(path: Path, labels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(mat_file(labels))
    return path


def write_sbd(root: Path, train_names: list[str], val_names: list[str], png: bool = False) -> Path:
    for seed, name in enumerate(train_names + val_names):
        write_picture(root / "img" / f"{name}.jpg", SIZE, seed)
        labels = blocks(SIZE, range(21), 50 + seed)
        if png:
            write_labels(root / "cls" / f"{name}.png", labels)
        else:
            write_mat(root / "cls" / f"{name}.mat", labels)
    (root / "train.txt").write_text("\n".join(train_names))
    (root / "val.txt").write_text("\n".join(val_names) + "\n")
    return root


def test_palette_indices_are_labels(tmp_path: Path) -> None:
    reader = read(write_voc_masks(tmp_path, ["b", "a"]))
    assert ids(reader) == ["b", "a"]
    assert reader.records[0].path == str(tmp_path / "JPEGImages/b.jpg")
    for seed, record in enumerate(reader.records):
        np.testing.assert_array_equal(reader.label_map(record), blocks(SIZE, VALUES, seed))
    assert len(reader.classes) == 21
    assert (reader.classes[0], reader.classes[15]) == ("background", "person")
    assert reader.category_ids == list(range(21))
    assert palette(reader.PALETTE, 21)[15] == (192, 128, 128)
    assert reader.problems == []


def test_years_and_several_sets(tmp_path: Path) -> None:
    write_voc_masks(tmp_path / "VOC2012", ["a", "b"])
    write_voc_masks(tmp_path / "VOC2012", ["b", "c"], "val")
    write_voc_masks(tmp_path / "VOC2007", ["d"], "val")
    reader = read(tmp_path, "2012_train+2007_val+2012_val")
    assert ids(reader) == ["a", "b", "d", "c"]
    assert count_kinds(reader.problems) == "1 x duplicate image"
    assert reader.problems[0].where.endswith("VOC2012/ImageSets/Segmentation/val.txt:1")
    with pytest.raises(UserError, match="image b is listed twice"):
        read(tmp_path, "2012_train+2012_val", strict=True)


def test_a_list_that_is_only_in_main(tmp_path: Path) -> None:
    write_voc_masks(tmp_path, ["a", "b"])
    (tmp_path / "ImageSets/Main").mkdir()
    (tmp_path / "ImageSets/Main/train_seg.txt").write_text("b\n")
    (tmp_path / "ImageSets/Main/train.txt").write_text("b\n")
    assert ids(read(tmp_path, "train_seg")) == ["b"]
    assert ids(read(tmp_path, "train")) == ["a", "b"]
    with pytest.raises(UserError, match=r"Segmentation/trian\.txt: No such file.*there are: train"):
        read(tmp_path, "trian")


def test_another_folder_of_label_maps_and_other_classes(tmp_path: Path) -> None:
    write_voc_masks(tmp_path, ["a"])
    write_labels(tmp_path / "SegmentationClassAug/a.png", np.full(SIZE, 2, np.uint8))
    reader = VOCSegmentation(str(tmp_path), "train", ["x", "y", "z"], "SegmentationClassAug")
    assert reader.classes == ["x", "y", "z"]
    np.testing.assert_array_equal(reader.label_map(reader.records[0]), np.full(SIZE, 2))
    with pytest.raises(UserError, match=r"data\.classes: 300 classes"):
        VOCSegmentation(str(tmp_path), "train", [f"c{i}" for i in range(300)])


def test_missing_label_maps(tmp_path: Path) -> None:
    write_voc_masks(tmp_path, ["a", "b"])
    (tmp_path / "SegmentationClass/a.png").unlink()
    reader = read(tmp_path)
    assert ids(reader) == ["b"]
    assert [str(p) for p in reader.problems] == [f"{tmp_path}/JPEGImages/a.jpg: has no label map"]
    with pytest.raises(UserError, match=r"a\.jpg: has no label map"):
        read(tmp_path, strict=True)
    (tmp_path / "SegmentationClass/b.png").unlink()
    assert [record.label_path for record in read(tmp_path).records] == [None, None]  # a test set
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("\n")
    with pytest.raises(UserError, match="no images"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/../../x", "http://a/b"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    write_voc_masks(tmp_path, ["a"])
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text(f"a\n{name}\n")
    with pytest.raises(UserError, match="leads out of") as caught:
        read(tmp_path)
    assert caught.value.where.endswith("train.txt:2")


def test_links_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    write_voc_masks(tmp_path / "set", ["a"])
    path = tmp_path / "set/SegmentationClass/a.png"
    path.rename(tmp_path / "a.png")
    path.symlink_to(tmp_path / "a.png")
    with pytest.raises(UserError, match="leads out of"):
        read(tmp_path / "set")


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (np.full(SIZE, 200, np.uint8), r"200 \(6144 pixels\); labels are 0-20, ignored 255"),
        (np.full(SIZE, 21, np.uint8), r"21 \(6144 pixels\)"),
        (np.zeros((*SIZE, 3), np.uint8), "colour image .mode RGB"),
    ],
    ids=["200", "21", "RGB"],
)
def test_wrong_label_maps(tmp_path: Path, labels: np.ndarray, reason: str) -> None:
    reader = read(write_voc_masks(tmp_path, ["a"]))
    path = write_labels(tmp_path / "SegmentationClass/a.png", labels)
    with pytest.raises(BadLabels, match=reason) as caught:
        reader.label_map(reader.records[0])
    assert caught.value.path == str(path)


# SBD


@pytest.mark.parametrize("png", [False, True])
def test_sbd_adds_all_but_the_val_list(tmp_path: Path, png: bool) -> None:
    root = tmp_path / "VOC2012"
    write_voc_masks(root, ["a", "b"])
    write_voc_masks(root, ["v", "w"], "val")
    (root / "ImageSets/Main").mkdir()
    (root / "ImageSets/Main/val.txt").write_text("s\n")  # of detection: nothing to do with it
    sbd = write_sbd(tmp_path / "sbd", ["b", "s", "v"], ["t", "a", "w"], png)
    reader = read(tmp_path, "2012_train", sbd=str(sbd))
    assert ids(reader) == ["a", "b", "s", "t"]
    assert reader.problems == []
    sources = [Path(record.label_path or "").parent.name for record in reader.records]
    assert sources == ["SegmentationClass"] * 2 + ["cls"] * 2  # VOC's own, where it has one
    assert reader.records[3].path == str(sbd / "img/t.jpg")
    for record, seed in zip(reader.records[2:], (1, 3), strict=True):
        labels = reader.label_map(record)
        assert labels is not None
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, blocks(SIZE, range(21), 50 + seed))
    assert ids(read(root, "train", sbd=str(sbd))) == ["a", "b", "s", "t"]
    (root / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(UserError, match=r"Segmentation/val\.txt: No such file"):
        read(root, "train", sbd=str(sbd))


def test_the_number_of_augmented_images(tmp_path: Path) -> None:
    """With lists as long as the real ones: 1464 + 1449 of VOC, 8498 + 2857 of SBD, of which 2237
    are VOC's: 9118 come from SBD."""
    train_names, val_names = [f"t{i}" for i in range(1464)], [f"v{i}" for i in range(1449)]
    listing = tmp_path / "ImageSets/Segmentation"
    listing.mkdir(parents=True)
    (listing / "train.txt").write_text("\n".join(train_names))
    (listing / "val.txt").write_text("\n".join(val_names))
    names = [*train_names[:1300], *val_names[:937], *(f"s{i}" for i in range(9118))]
    (tmp_path / "sbd").mkdir()
    (tmp_path / "sbd/train.txt").write_text("\n".join(names[::2] + names[1:5641:2]))
    (tmp_path / "sbd/val.txt").write_text("\n".join(names[5641::2]))
    assert len(names) == 8498 + 2857
    assert len(read(tmp_path, sbd=str(tmp_path / "sbd")).records) == 10_582


def test_damaged_mat_files(tmp_path: Path) -> None:
    write_voc_masks(tmp_path, ["a"])
    write_voc_masks(tmp_path, ["v"], "val")
    sbd = write_sbd(tmp_path / "sbd", ["s"], [])
    path = sbd / "cls/s.mat"
    reader = read(tmp_path, sbd=str(sbd))
    content = path.read_bytes()
    for damaged in (content[:-20], content[:300], content[:130], b""):
        path.write_bytes(damaged)
        with pytest.raises(BadLabels, match=r"is not a mask of SBD, GTcls\.Segm.*: .") as caught:
            reader.label_map(reader.records[1])
        assert caught.value.path == str(path)
    path.write_bytes(bytes(5 << 20))
    with pytest.raises(BadLabels, match="5242880 bytes, more than"):
        reader.label_map(reader.records[1])
    write_mat(path, np.full(SIZE, 21, np.uint8))
    with pytest.raises(BadLabels, match=r"21 \(6144 pixels\)"):
        reader.label_map(reader.records[1])
    path.unlink()
    with pytest.raises(BadLabels, match="No such file"):
        reader.label_map(reader.records[1])


def config(root: Path, sbd: Path) -> Config:
    return load_config(CONFIG, [
        f"data.train={{type: VOCSegmentation, root: {root}, image_set: train, sbd: {sbd}}}",
        f"data.test={{type: VOCSegmentation, root: {root}, image_set: val}}", "data.classes=null",
        "model.num_classes=21", "model.channels=8", "data.batch_size=2", "data.workers=0",
        "data.resize={short: 64, long: 96}", "data.crop=[32, 32]", "solver.epochs=1",
        "solver.milestones=[]",
    ])  # fmt: skip


def test_training(tmp_path: Path) -> None:
    root = write_voc_masks(tmp_path / "data", ["a", "b"])
    write_voc_masks(root, ["v"], "val")
    sbd = write_sbd(tmp_path / "sbd", ["s"], ["t"])
    assert train(config(root, sbd), tmp_path / "out", device="cpu") == 0
    assert (tmp_path / "out/checkpoints/step_00000002.pth").exists()
    path = sbd / "cls/t.mat"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match=r"t\.mat: is not a mask of SBD") as caught:
        train(config(root, sbd), tmp_path / "again", device="cpu")
    assert caught.value.exit_code == 2
    assert Image.open(root / "SegmentationClass/a.png").mode == "P"
