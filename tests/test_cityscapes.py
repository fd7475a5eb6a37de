"""The Cityscapes reader on trees in the form of the download."""

import json
import logging
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import ROOT
from label_trees import blocks, write_cityscapes, write_labels

from dcdet import load_config
from dcdet.config import Config
from dcdet.datasets.cityscapes import Cityscapes
from dcdet.datasets.label_maps import BadLabels, SegmentationReader
from dcdet.datasets.records import count_kinds
from dcdet.engine.checkpoint import sorted_checkpoints
from dcdet.engine.evaluate import evaluate
from dcdet.engine.train import train
from dcdet.errors import UserError
from dcdet.visualize.segmentation import palette

CONFIG = ROOT / "configs" / "small" / "deeplab_r18_camvid.yaml"
A, B, C = "aachen_000000_000019", "aachen_000001_000019", "ulm_000003_000019"
SIZE = (64, 128)
# The trainId of each labelId 0..33, from the list on the data set's pages.
TRAIN_IDS = [
    255, 255, 255, 255, 255, 255, 255, 0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7, 8, 9,
    10, 11, 12, 13, 14, 15, 255, 255, 16, 17, 18,
]  # fmt: skip


def read(root: Path, split: Any = "train", **options: Any) -> Cityscapes:
    return Cityscapes(str(root), split, None, **options)


def labels_of(reader: SegmentationReader) -> list[np.ndarray]:
    maps = [reader.label_map(record) for record in reader.records]
    return [labels for labels in maps if labels is not None]


def test_label_ids_become_train_ids(tmp_path: Path) -> None:
    reader = read(write_cityscapes(tmp_path, [C, A, B]))
    assert [record.image_id for record in reader.records] == [A, B, C]
    assert reader.records[2].path.endswith(f"leftImg8bit/train/ulm/{C}_leftImg8bit.png")
    assert reader.problems == []
    table = np.array(TRAIN_IDS)
    for labels, seed in zip(labels_of(reader), (1, 2, 0), strict=True):
        np.testing.assert_array_equal(labels, table[blocks(SIZE, range(34), seed)])


def test_train_ids_are_preferred(tmp_path: Path) -> None:
    write_cityscapes(tmp_path, [A, C])
    write_cityscapes(tmp_path, [A], kind="gtFine_labelTrainIds")
    reader = read(tmp_path)
    labels = labels_of(reader)
    np.testing.assert_array_equal(labels[0], blocks(SIZE, [*range(19), 255], 0))
    np.testing.assert_array_equal(labels[1], np.array(TRAIN_IDS)[blocks(SIZE, range(34), 1)])
    assert reader.problems == []


def test_coarse_label_maps(tmp_path: Path) -> None:
    write_cityscapes(tmp_path, [A], "train_extra", "gtCoarse_labelIds")
    write_labels(
        tmp_path / f"gtCoarse/train_extra/aachen/{A}_gtCoarse_color.png", blocks(SIZE, [1])
    )
    reader = read(tmp_path, "train_extra", annotations="gtCoarse")
    assert len(labels_of(reader)) == 1
    assert reader.problems == []
    assert labels_of(read(tmp_path, "train_extra")) == []


def test_classes_ids_and_colours(tmp_path: Path) -> None:
    reader = read(write_cityscapes(tmp_path, [A]))
    assert len(reader.classes) == 19
    assert [TRAIN_IDS[label_id] for label_id in reader.category_ids] == list(range(19))
    colours = dict(zip(reader.classes, palette(reader.PALETTE, 19), strict=True))
    assert colours["road"] == (128, 64, 128)
    assert colours["sky"] == (70, 130, 180)
    assert colours["bicycle"] == (119, 11, 32)
    assert len(set(colours.values())) == 19
    assert Cityscapes(str(tmp_path), "train", reader.classes).classes == reader.classes
    for wrong in (reader.classes[::-1], reader.classes[:5]):
        with pytest.raises(UserError, match=r"data\.classes: Cityscapes' are road, sidewalk, "):
            Cityscapes(str(tmp_path), "train", wrong)


def test_mirrored_images_of_the_release_are_left_out(tmp_path: Path) -> None:
    write_cityscapes(tmp_path, [A])
    folder = tmp_path / "leftImg8bit/train/aachen"
    content = (folder / f"{A}_leftImg8bit.png").read_bytes()
    (folder / f"{A}_leftImg8bit_flip.png").write_bytes(content)
    (folder / "license.txt").write_text("")
    (tmp_path / "leftImg8bit/train/README").write_text("")
    reader = read(tmp_path)
    assert [record.image_id for record in reader.records] == [A]
    assert reader.problems == []


def test_a_split_without_label_maps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_cityscapes(tmp_path, [A, C], "test", kind=None)
    with caplog.at_level(logging.WARNING):
        reader = read(tmp_path, "test")
    assert [record.label_path for record in reader.records] == [None, None]
    assert [reader.label_map(record) for record in reader.records] == [None, None]
    assert f"{tmp_path}/gtFine/test: no label map" in caplog.text


def test_what_has_no_partner_is_named(tmp_path: Path) -> None:
    write_cityscapes(tmp_path, [A, B, C])
    missing = tmp_path / f"gtFine/train/aachen/{B}_gtFine_labelIds.png"
    missing.unlink()
    (tmp_path / f"leftImg8bit/train/ulm/{C}_leftImg8bit.png").unlink()
    reader = read(tmp_path)
    assert [record.image_id for record in reader.records] == [A]
    assert count_kinds(reader.problems) == "1 x without label map, 1 x without image"
    with pytest.raises(UserError, match=rf"{B}_leftImg8bit\.png: has no label map"):
        read(tmp_path, strict=True)
    (tmp_path / f"leftImg8bit/train/aachen/{A}_leftImg8bit.png").unlink()
    with pytest.raises(UserError, match=r"no image has a label map of its name in .*gtFine/train"):
        read(tmp_path)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"leftImg8bit/train: No such file .*root right"):
        read(tmp_path)
    write_cityscapes(tmp_path, [A], "val")
    with pytest.raises(UserError, match=r"leftImg8bit/train: No such file .*there are: val"):
        read(tmp_path)
    (tmp_path / "leftImg8bit/train/aachen").mkdir(parents=True)
    with pytest.raises(UserError, match="leftImg8bit/train: no images"):
        read(tmp_path)


def test_links_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    write_cityscapes(tmp_path / "a", [A, B])
    write_cityscapes(tmp_path / "b", [C])
    (tmp_path / "a/gtFine/train/aachen/link").symlink_to("/etc/passwd")  # not looked at
    assert len(read(tmp_path / "a").records) == 2
    (tmp_path / "a/leftImg8bit/train/ulm").symlink_to(tmp_path / "b/leftImg8bit/train/ulm")
    with pytest.raises(UserError, match="ulm leads out of"):
        read(tmp_path / "a")
    (tmp_path / "a/leftImg8bit/train/ulm").unlink()
    path = tmp_path / f"a/gtFine/train/aachen/{A}_gtFine_labelTrainIds.png"
    path.symlink_to(tmp_path / f"b/gtFine/train/ulm/{C}_gtFine_labelIds.png")
    with pytest.raises(UserError, match=r"labelTrainIds\.png leads out of"):
        read(tmp_path / "a")


@pytest.mark.parametrize(
    ("kind", "labels", "reason"),
    [
        ("labelTrainIds", np.full(SIZE, 26, np.uint8), r"26 \(8192 pixels\); labels are 0-18, ig"),
        ("labelIds", np.full(SIZE, 200, np.uint8), r"200 \(8192 pixels\); labels are 7-8, 11-13, "
         r"17, 19-28, 31-33, ignored 0-6, 9-10, 14-16, 18, 29-30, 255 "),
        ("labelIds", np.full(SIZE, 34, np.uint8), r"34 \(8192 pixels\)"),
        ("labelIds", np.zeros((*SIZE, 3), np.uint8), "colour image"),
    ],
    ids=["labelIds for trainIds", "200", "34", "RGB"],
)  # fmt: skip
def test_wrong_label_maps(tmp_path: Path, kind: str, labels: np.ndarray, reason: str) -> None:
    write_cityscapes(tmp_path, [A])
    path = write_labels(tmp_path / f"gtFine/train/aachen/{A}_gtFine_{kind}.png", labels)
    reader = read(tmp_path)
    with pytest.raises(BadLabels, match=reason) as caught:
        reader.label_map(reader.records[0])
    assert caught.value.path == str(path)


def config(root: Path, *overrides: str) -> Config:
    return load_config(CONFIG, [
        f"data.train={{type: Cityscapes, root: {root}, split: train}}",
        f"data.test={{type: Cityscapes, root: {root}, split: val}}", "data.classes=null",
        "model.num_classes=19", "model.channels=8", "data.batch_size=2", "data.workers=0",
        "data.resize={short: 64, long: 128}", "data.crop=[32, 32]", "solver.epochs=1",
        "solver.milestones=[]", "test.evaluator.predictions=ids", *overrides,
    ])  # fmt: skip


def test_training_and_submission(tmp_path: Path) -> None:
    root = write_cityscapes(tmp_path / "data", [A, B, C, "ulm_000009_000019"])
    write_cityscapes(root, [A, C], "val", size=(70, 150))
    write_cityscapes(root, [B], "test", kind=None)
    unlabelled = root / f"gtFine/train/aachen/{A}_gtFine_labelIds.png"
    write_labels(unlabelled, np.zeros(SIZE, np.uint8))
    out = tmp_path / "out"
    assert train(config(root), out, device="cpu") == 0
    [weights] = sorted_checkpoints(out / "checkpoints")
    assert weights.name == "step_00000002.pth"

    assert evaluate(config(root), weights, tmp_path / "val", device="cpu") == 0
    metrics = json.loads((tmp_path / "val/metrics.json").read_text())
    assert (metrics["images"], metrics["of"]) == (2, 2)
    assert 0 <= metrics["mIoU"] <= 1
    files = sorted((tmp_path / "val/predictions").iterdir())
    assert [path.name for path in files] == [f"{A}.png", f"{C}.png"]
    values = cv2.imread(str(files[0]), cv2.IMREAD_UNCHANGED)
    assert values.shape == (70, 150)
    assert all(TRAIN_IDS[value] != 255 for value in np.unique(values))

    assert evaluate(
        config(root, "data.test.split=test"), weights, tmp_path / "test", device="cpu"
    ) == 0  # fmt: skip
    assert json.loads((tmp_path / "test/metrics.json").read_text())["mIoU"] is None
    assert (tmp_path / "test/predictions" / f"{B}.png").exists()

    write_labels(unlabelled, np.zeros((64, 127), np.uint8))
    with pytest.raises(UserError, match=rf"{A}_gtFine_labelIds.png: is 127 x 64 pixels") as caught:
        train(config(root), tmp_path / "again", device="cpu")
    assert caught.value.exit_code == 2
    with pytest.raises(UserError, match="has no label map to learn from"):
        train(config(root, "data.train.split=test"), tmp_path / "third", device="cpu")
