"""Label maps and their images: what is read, refused, and changed together on the way."""

import logging
import struct
import zlib
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from label_trees import blocks, write_label_folder, write_labels
from PIL import Image
from torch import nn

from dcdet import load_config
from dcdet.config import Config
from dcdet.datasets.label_folder import LabelFolder
from dcdet.datasets.label_maps import (
    BadLabels,
    SegmentationDataset,
    check_size,
    read_label_map,
    value_table,
)
from dcdet.datasets.loader import DataSection, ResizeSpec, test_loader, train_loader
from dcdet.engine.train import train
from dcdet.errors import UserError
from dcdet.models.deeplab import DeepLab
from dcdet.structures import UNLABELLED, Sample

CONFIG = ROOT / "configs" / "small" / "deeplab_r18_camvid.yaml"
NAMES = ["a", "b", "c", "d"]
CLASSES = ["sky", "road", "tree", "car"]
TABLE = value_table(range(4))
LABELS = np.array([[0, 1, 2, 3], [255, 255, 3, 0]], np.uint8)


def encoded(pixels: np.ndarray, mode: str | None = None, form: str = "PNG") -> bytes:
    image = Image.fromarray(pixels)
    buffer = BytesIO()
    (image.convert(mode) if mode else image).save(buffer, form)
    return buffer.getvalue()


def palette_png(labels: np.ndarray) -> bytes:
    """The colours are not the values, and several values share one."""
    image = Image.fromarray(labels)
    image.putpalette([(value * 50) % 7 for value in range(768)])
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def read(path: Path, content: bytes) -> np.ndarray:
    path.write_bytes(content)
    return read_label_map(str(path), TABLE)


@pytest.mark.parametrize(
    "content",
    [
        encoded(LABELS),
        palette_png(LABELS),
        encoded(LABELS.astype(np.uint16)),
        encoded(LABELS.astype(np.int32), form="TIFF"),
        encoded(LABELS, form="BMP"),
    ],
    ids=["grey", "palette", "16 bit", "32 bit", "BMP"],
)
def test_forms_of_label_maps(tmp_path: Path, content: bytes) -> None:
    labels = read(tmp_path / "a.png", content)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, LABELS)


def test_a_bitmap_has_labels_0_and_1(tmp_path: Path) -> None:
    bits = np.array([[True, False, True], [False, False, True]])
    np.testing.assert_array_equal(read(tmp_path / "a.png", encoded(bits)), bits.astype(np.uint8))


def huge_png() -> bytes:
    """A PNG that says it is 9000 x 9000."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 9_000, 9_000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + encoded(LABELS)[33:]


RGB = np.stack([LABELS] * 3, -1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encoded(RGB), "colour image .mode RGB., wanted one channel of labels"),
        (encoded(RGB, "RGBA"), "colour image .mode RGBA."),
        (encoded(LABELS, "LA"), "mode LA"),
        (encoded(LABELS, form="JPEG"), "is a JPEG, wanted a format that keeps labels: PNG"),
        (encoded(LABELS, form="PPM"), "is a PPM, wanted"),  # Pillow scales some
        (encoded(np.random.default_rng(0).integers(0, 4, (99, 99), np.uint8))[:-999], "truncated"),
        (b"", "not an image in a known format"),
        (b"<html></html>", "not an image in a known format"),
        (huge_png(), "9000 x 9000 pixels, the limit is"),
        (encoded(LABELS.astype(np.uint16) + 300), "values from 300 to 555, wanted 0..255"),
        (encoded(LABELS.astype(np.int32) - 1, form="TIFF"), "values from -1 to 254"),
        (encoded(np.full((3, 2), 200, np.uint8)), r"no labels here: 200 \(6 pixels\); labels are "
         r"0-3, ignored 255 "),
        (encoded(np.full((3, 2), 254, np.uint8)), r"no labels here: 254 \(6 pixels\)"),
        (encoded(np.array([[7, 7], [11, 33]], np.uint8)),
         r"7 \(2 pixels\), 11 \(1 pixels\), 33 \(1 pixels\); .*ids of another list of classes"),
        (encoded(np.arange(100, dtype=np.uint8).reshape(10, 10)), r"11 \(1 pixels\) and 88 more;"),
    ],
    ids=[
        "RGB", "RGBA", "LA", "JPEG", "PGM", "truncated", "empty", "HTML", "huge", "16 bit",
        "negative", "200", "254", "labelIds", "photograph",
    ],
)  # fmt: skip
def test_what_is_no_label_map_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(BadLabels, match=reason) as caught:
        read(tmp_path / "a.png", content)
    assert caught.value.path == str(tmp_path / "a.png")


def test_label_maps_are_as_large_as_images_may_be(root: Path) -> None:
    data = dataset(root, max_pixels=100)
    with pytest.raises(BadLabels, match="the limit is 100 pixels"):
        data.reader.label_map(data.records[0])


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(BadLabels, match="No such file"):
        read_label_map(str(tmp_path / "a.png"), TABLE)
    with pytest.raises(BadLabels, match="not a regular file"):
        read_label_map(str(tmp_path), TABLE)


def test_tables() -> None:
    table = value_table([7, 8, 11], [0, 9])
    assert [table[value] for value in (7, 8, 11, 0, 9, 255)] == [0, 1, 2, 255, 255, 255]
    assert np.flatnonzero(table == 254).size == 250
    np.testing.assert_array_equal(value_table(range(254)), np.arange(256))
    with pytest.raises(UserError, match=r"data\.classes: 255 classes, at most 254 fit"):
        value_table(range(255))


# Images and label maps together


def section(**changes: Any) -> DataSection:
    plain = DataSection(
        classes=CLASSES, train={}, test={}, resize=ResizeSpec(64, 96), flip="none",
        aspect_grouping=False, filter_empty=False, batch_size=2, workers=0, pad_multiple=1,
        orientation="ignore", max_bad_images=0.0,
    )  # fmt: skip
    return replace(plain, **changes)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four images of 64 x 96 whose grey is 80 times the label; nothing is unlabelled."""
    for seed, name in enumerate(NAMES):
        labels = blocks((64, 96), range(4), seed)
        write_labels(tmp_path / "labels/train" / f"{name}.png", labels)
        write_labels(tmp_path / "images/train" / f"{name}.png", labels * 80)
    return tmp_path


def dataset(root: Path, training: bool = True, **changes: Any) -> SegmentationDataset:
    reader = LabelFolder(str(root), "train", CLASSES)
    return SegmentationDataset(reader, section(**changes), training=training)


def sample(data: SegmentationDataset, place: int = 0, seed: int = 0, epoch: int = 0) -> Sample:
    record = data.records[place % len(data.records)]
    return data.samples(data.pick(place, seed, epoch), record)[0]


def labels_of(one: Sample) -> np.ndarray:
    assert one.target.label_map is not None
    assert one.target.label_map.dtype == torch.uint8
    return one.target.label_map.numpy()


def agreement(one: Sample) -> float:
    """The share of pixels whose image tells the label that the map has."""
    seen = (one.image[0].float().numpy() / 80).round()
    assert seen.shape == labels_of(one).shape
    return float((seen == labels_of(one)).mean())


def test_unchanged(root: Path) -> None:
    one = sample(dataset(root))
    np.testing.assert_array_equal(labels_of(one), blocks((64, 96), range(4), 0))
    assert agreement(one) == 1
    assert one.target.image_id == "a"
    assert one.target.size == (64, 96)


def test_testing_reads_no_label_map(root: Path) -> None:
    (root / "labels/train/a.png").write_bytes(b"")
    data = dataset(root, training=False, crop=(16, 16), random_scale=(0.5, 0.6))
    batches = [views[0] for views in test_loader(data, data.section, 0, 1)]
    assert [batch.targets[0].label_map for batch in batches] == [None] * 4
    assert batches[0].images.shape[2:] == (64, 96)  # neither scaled nor cut


def test_flips(root: Path) -> None:
    data = dataset(root, flip="append")
    assert len(data) == 8
    for place in range(4):
        plain, mirrored = sample(data, place), sample(data, place + 4)
        np.testing.assert_array_equal(labels_of(mirrored), labels_of(plain)[:, ::-1])
        assert agreement(mirrored) == 1
    data = dataset(root, flip="random")
    drawn = [sample(data, place, epoch=epoch) for place in range(4) for epoch in range(4)]
    assert {one.flip for one in drawn} == {False, True}
    assert min(map(agreement, drawn)) == 1


@pytest.mark.parametrize("method", ["original", "mmdetection", "torchvision", "detectron2"])
@pytest.mark.parametrize("short", [37, 129])
def test_resizing(root: Path, method: Any, short: int) -> None:
    one = sample(dataset(root, resize=ResizeSpec(short, 4 * short, method), flip="append"), 5)
    assert one.image.shape[1] == short
    # OpenCV takes the nearest pixel from the corner, images go by the middle: edges differ.
    assert agreement(one) > 0.8
    assert set(np.unique(labels_of(one))) <= set(range(4))  # no label in between


def test_random_scale_and_crop(root: Path) -> None:
    data = dataset(root, crop=(48, 80), random_scale=(0.5, 2.0), flip="random")
    drawn = [sample(data, place, epoch=epoch) for place in range(4) for epoch in range(12)]
    assert min(map(agreement, drawn)) > 0.75
    shapes = {one.image.shape[1:] for one in drawn}
    assert (48, 80) in shapes
    assert all(height <= 48 and width <= 80 for height, width in shapes)
    assert min(height for height, _ in shapes) < 40  # smaller than the crop: all of it


def test_scales_are_drawn_evenly_on_a_logarithmic_scale(root: Path) -> None:
    data = dataset(root, random_scale=(0.25, 4.0))
    drawn = [sample(data, place, epoch=epoch).scale for place in range(4) for epoch in range(16)]
    scales = np.log2(np.array(drawn))
    assert np.abs(scales).max() < 2.05
    # Of 64 even draws from -2..2 these would be off by 5 standard deviations, and more.
    assert abs(scales.mean()) < 5 * 4 / np.sqrt(12 * 64)
    assert abs((scales > 1).mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 64)


def test_crops_are_drawn_anew_but_reproducibly(root: Path) -> None:
    data = dataset(root, crop=(32, 32))
    one, again, later = sample(data), sample(data), sample(data, epoch=1)
    assert torch.equal(one.image, again.image)
    assert np.array_equal(labels_of(one), labels_of(again))
    assert not torch.equal(one.image, later.image)
    assert not torch.equal(one.image, sample(data, seed=1).image)
    assert agreement(one) == agreement(later) == 1
    data, whole = dataset(root, crop=(63, 94)), sample(dataset(root)).image
    places = [sample(data, epoch=epoch).image for epoch in range(60)]
    for corner in (whole[:, :63, :94], whole[:, 1:, 2:]):
        assert any(torch.equal(corner, place) for place in places)  # edges are reached


def test_a_crop_larger_than_the_image_is_the_image(root: Path) -> None:
    one = sample(dataset(root, crop=(500, 90)))
    assert one.image.shape == (3, 64, 90)
    assert agreement(one) == 1


def test_padding_is_unlabelled(root: Path) -> None:
    one = sample(dataset(root, pad_images=50))
    assert one.image.shape == (3, 100, 100)
    assert (labels_of(one)[64:] == UNLABELLED).all()
    assert (labels_of(one)[:, 96:] == UNLABELLED).all()
    assert (labels_of(one)[:64, :96] < 4).all()


def test_workers_change_nothing(root: Path) -> None:
    epochs = []
    for workers in (0, 1):
        data = dataset(root, crop=(32, 48), random_scale=(0.7, 1.4), flip="append", workers=workers)
        batches = train_loader(data, data.section, seed=3, epoch=2)
        epochs.append([(b.images, [t.label_map for t in b.targets]) for b in batches])
    alone, with_worker = epochs
    assert len(alone) == len(with_worker) == 4
    for (images, maps), (others, other_maps) in zip(alone, with_worker, strict=True):
        assert torch.equal(images, others)
        for one, other in zip(maps, other_maps, strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one, other)


def test_a_scale_beyond_what_an_image_may_be(root: Path) -> None:
    with pytest.raises(ValueError, match=r"random_scale: .*16384"):
        section(resize=ResizeSpec(64, 16_000), random_scale=(0.5, 2.0))


# What is wrong in a data set


def first_epoch(data: SegmentationDataset) -> list[str]:
    """The images of an epoch."""
    batches = train_loader(data, data.section, seed=0, epoch=0)
    return [str(target.image_id) for batch in batches for target in batch.targets]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_label_map_stops_training(root: Path, workers: int) -> None:
    path = write_labels(root / "labels/train/c.png", np.full((64, 96), 200, np.uint8))
    with pytest.raises(UserError, match=r"c\.png: has values .* 200 \(6144 pixels\)") as caught:
        first_epoch(dataset(root, workers=workers))
    assert caught.value.where == str(path)


def test_a_label_map_of_another_size_stops_training(root: Path) -> None:
    path = write_labels(root / "labels/train/b.png", np.zeros((96, 64), np.uint8))
    with pytest.raises(UserError, match=r"is 64 x 96 pixels .*images/train/b\.png 96 x 64") as got:
        first_epoch(dataset(root))
    assert got.value.where == str(path)
    reader = LabelFolder(str(root), "train", CLASSES)
    with pytest.raises(BadLabels, match="64 x 96"):
        check_size(np.zeros((96, 64), np.uint8), (64, 96), reader.records[1])


def test_a_broken_image_is_skipped_and_counted(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = root / "images/train/c.png"
    path.write_bytes(path.read_bytes()[:60])
    data = dataset(root)
    with caplog.at_level(logging.WARNING):
        assert sorted(first_epoch(data)) == ["a", "b", "d", "d"]
    assert list(data.bad) == [str(path)]
    assert f"skipped: {path}" in caplog.text
    (root / "images/train/a.png").write_bytes(b"")
    with pytest.raises(UserError, match="2 of 4 images are bad, 1 may be"):
        first_epoch(dataset(root))


class Backbone(nn.Module):
    """A map of stride 16."""

    channels, strides = {"c5": 4}, {"c5": 16}

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 16, 16)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"c5": self.conv(x)}


def deeplab() -> DeepLab:
    torch.manual_seed(0)
    return DeepLab(Backbone(), 4, [0.0] * 3, [100.0] * 3, "c5", 8, 0.5)


def test_unlabelled_images_give_loss_0(root: Path) -> None:
    for name in "bcd":
        write_labels(root / "labels/train" / f"{name}.png", np.full((64, 96), 255, np.uint8))
    model = deeplab()
    data = dataset(root, batch_size=1)
    losses, gradients = {}, {}
    for batch in train_loader(data, data.section, seed=0, epoch=0):
        found, stats = model(batch)
        model.zero_grad()
        found["segmentation"].backward()
        name = batch.targets[0].image_id
        losses[name] = found["segmentation"].item()
        gradients[name] = [p.grad.abs().sum().item() for p in model.parameters()]  # type: ignore[union-attr]
        assert all(torch.isfinite(value) for value in stats.values())
    assert losses.pop("a") > 0
    assert min(gradients.pop("a")) > 0
    assert losses == {"b": 0, "c": 0, "d": 0}
    assert {value for values in gradients.values() for value in values} == {0}


# Through the training loop


def tiny(root: Path, *overrides: str) -> Config:
    """One epoch of two steps of two images on a small network."""
    node = f"{{type: LabelFolder, root: {root}, split: train}}"
    return load_config(CONFIG, [
        f"data.train={node}", f"data.test={node}", f"data.classes=[{', '.join(CLASSES)}]",
        "model.num_classes=4", "model.channels=8", "data.batch_size=2", "data.workers=0",
        "data.resize={short: 64, long: 96}", "data.crop=[32, 32]", "solver.epochs=1",
        "solver.milestones=[]", *overrides,
    ])  # fmt: skip


def test_training(tmp_path: Path) -> None:
    root = write_label_folder(tmp_path / "data", NAMES)
    broken = root / "images/train/b.png"
    broken.write_bytes(b"")
    assert train(tiny(root), tmp_path / "out", device="cpu") == 1  # an image was skipped
    assert (tmp_path / "out/checkpoints/step_00000002.pth").exists()
    write_labels(root / "labels/train/c.png", np.full((64, 96), 77, np.uint8))
    with pytest.raises(UserError, match=r"c\.png: .* 77 \(6144 pixels\)") as caught:
        train(tiny(root), tmp_path / "again", device="cpu")
    assert caught.value.exit_code == 2
    assert cv2.imread(str(root / "labels/train/c.png"), cv2.IMREAD_UNCHANGED).max() == 77
