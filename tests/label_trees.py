"""Segmentation data sets on disk, as they are downloaded, written without dcdet's own code."""

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from data_sets import picture
from PIL import Image


def blocks(size: tuple[int, int], values: Sequence[int], seed: int = 0) -> np.ndarray:
    """A label map (h, w) uint8 of 6 x 6 constant areas; each of these values occurs."""
    areas = np.random.default_rng(seed).permutation(np.resize(values, 36)).astype(np.uint8)
    return cv2.resize(areas.reshape(6, 6), size[::-1], interpolation=cv2.INTER_NEAREST)


def write_labels(path: Path, labels: np.ndarray, palette: bool = False) -> Path:
    """A label map as a grey or palette PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels)
    if palette:
        image.putpalette([(37 * value) % 256 for value in range(768)])
    image.save(path)
    return path


def write_picture(path: Path, size: tuple[int, int], seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), picture(size, seed))
    return path


def write_label_folder(
    root: Path, names: Sequence[str], split: str = "train", size: tuple[int, int] = (64, 96)
) -> Path:
    """images/SPLIT/NAME.png, labels/SPLIT/NAME.png with the values 0..3 and 255."""
    for seed, name in enumerate(names):
        write_picture(root / "images" / split / f"{name}.png", size, seed)
        labels = blocks(size, (0, 1, 2, 3, 255), seed)
        write_labels(root / "labels" / split / f"{name}.png", labels)
    return root


def write_cityscapes(
    root: Path,
    names: Sequence[str],
    split: str = "train",
    kind: str | None = "gtFine_labelIds",
    size: tuple[int, int] = (64, 128),
) -> Path:
    """A Cityscapes tree; label maps hold every labelId, or every trainId and 255."""
    values = range(34) if kind and kind.endswith("labelIds") else [*range(19), 255]
    for seed, name in enumerate(names):
        place = Path(split, name.split("_")[0])
        write_picture(root / "leftImg8bit" / place / f"{name}_leftImg8bit.png", size, seed)
        if kind:
            folder = root / kind.split("_")[0] / place
            write_labels(folder / f"{name}_{kind}.png", blocks(size, values, seed))
    return root


def write_voc_masks(
    root: Path, names: Sequence[str], image_set: str = "train", size: tuple[int, int] = (64, 96)
) -> Path:
    """A VOC tree with label maps as palette PNGs, which hold every label and 255."""
    for seed, name in enumerate(names):
        write_picture(root / "JPEGImages" / f"{name}.jpg", size, seed)
        labels = blocks(size, [*range(21), 255], seed)
        write_labels(root / "SegmentationClass" / f"{name}.png", labels, palette=True)
    listing = root / "ImageSets" / "Segmentation" / f"{image_set}.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text("".join(f"{name}\n" for name in names))
    return root


def mat_file(labels: np.ndarray, order: str = "<", compress: bool = True) -> bytes:
    """A .mat file as SBD has it, GTcls with Boundaries, Segmentation and CategoriesPresent."""

    def element(kind: int, content: bytes) -> bytes:
        tag = struct.pack(order + "II", kind, len(content))
        return tag + content + bytes(-len(content) % 8)

    def matrix(kind: int, shape: tuple[int, int], name: bytes, *parts: bytes) -> bytes:
        flags = element(6, struct.pack(order + "II", kind, 0))
        sides = element(5, struct.pack(order + "ii", *shape))
        return element(14, b"".join([flags, sides, element(1, name), *parts]))

    names = (b"Boundaries", b"Segmentation", b"CategoriesPresent")
    double, uint8 = 6, 9
    content = matrix(
        2, (1, 1), b"GTcls",
        struct.pack(order + "Ii", 5 | 4 << 16, 32),  # a small element: the length of a name
        element(1, b"".join(name.ljust(32, b"\0") for name in names)),
        matrix(double, (20, 1), b"", element(9, bytes(160))),
        matrix(uint8, labels.shape, b"", element(2, labels.tobytes(order="F"))),
        matrix(double, (1, 2), b"", struct.pack(order + "I4B", 2 | 2 << 16, 1, 15, 0, 0)),
    )  # fmt: skip
    if compress:
        packed = zlib.compress(content)
        content = struct.pack(order + "II", 15, len(packed)) + packed
    version = struct.pack(order + "HH", 0x0100, int.from_bytes(b"MI", "big"))
    return b"MATLAB 5.0 MAT-file".ljust(124) + version + content
