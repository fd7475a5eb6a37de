"""Segmentation data: images with a label map each, a file in which every pixel is a class's number.

K classes. In memory a label map is (H, W) uint8: labels 0..K-1, or UNLABELLED.
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dcdet.boxes import Pixels, Scale
from dcdet.datasets.loader import DataSection, DetectionDataset, Pick, View
from dcdet.datasets.records import Problem, ProblemList, path_inside
from dcdet.datasets.transforms import MAX_PIXELS, BadImage, opened, place_labels, read_image
from dcdet.errors import UserError
from dcdet.structures import UNLABELLED, Batch, Sample, Target

log = logging.getLogger("dcdet.datasets")

FORMATS = ("PNG", "BMP", "TIFF", "GIF")
MAX_CLASSES = 254
WRONG = 254  # in a table: no label
SHOWN_VALUES = 8

LabelMap = NDArray[np.uint8]


class BadLabels(BadImage):
    """A label map that cannot be used or is not one of this data set; `path` is its file."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path


@dataclass(frozen=True)
class LabelledImage:
    """One image of a segmentation data set; `label_path` is None where nothing is known of it."""

    path: str
    image_id: str
    label_path: str | None


class SegmentationReader:
    """What the readers of segmentation data share; a subclass fills in the attributes.

    Attributes:
        name, classes, category_ids: of the data set; `category_ids` stand in its own files.
        records: the images.
        problems: what was found wrong.
        table: (256,) uint8: the label of each value in a file, UNLABELLED, or WRONG.
    """

    task = "segmentation"
    pixels: Pixels = "continuous"  # there are no boxes
    max_pixels = MAX_PIXELS  # larger label maps are refused
    # Of a data set that has its classes once and for all: names, ids, and colours in RGB.
    CLASSES: Sequence[str] | None = None
    CATEGORY_IDS: Sequence[int] | None = None
    PALETTE: Sequence[tuple[int, int, int]] | None = None

    name: str
    classes: list[str]
    category_ids: list[int]
    records: list[LabelledImage]
    problems: list[Problem]
    table: NDArray[np.uint8]

    def label_map(self, record: LabelledImage) -> LabelMap | None:
        """The labels of an image, None where nothing is known; BadLabels for a wrong file."""
        if record.label_path is None:
            return None
        return read_label_map(record.label_path, self.table, self.max_pixels)


def files_in(folders: Iterable[str], pattern: str, found: ProblemList) -> dict[str, str]:
    """The paths of the files whose whole names match, in order, by the first group of `pattern`.

    A link that leads out of its folder and a name that repeats are problems. Raises UserError for a
    folder that cannot be read.
    """
    files: dict[str, str] = {}
    for folder in folders:
        try:
            entries = sorted(os.listdir(folder))
        except OSError as error:
            known = sorted(p.name for p in Path(folder).parent.glob("*") if p.is_dir())
            hint = "there are: " + ", ".join(known[:10]) if known else "is data.*.root right?"
            raise UserError(folder, error.strerror or str(error), hint) from error
        matches = (re.fullmatch(pattern, entry, re.DOTALL) for entry in entries)
        for match in filter(None, matches):
            name, path = match[1], path_inside(folder, match[0])
            if path is None:
                what = f"{match[0]} leads out of the data set's folder"
                found.add(folder, what, "path leaves the folder", name, fatal=True)
            elif name in files:
                found.add(path, f"has the same name as {files[name]}", "repeated name", name)
            else:
                files[name] = path
    return files


def pair(
    images: Mapping[str, str],
    maps: Mapping[str, str],
    found: ProblemList,
    folders: tuple[str, str],
    *,
    unlabelled: bool = False,
) -> list[LabelledImage]:
    """The images with the label maps of the same names; one without the other is a problem.

    `unlabelled`: where there is no label map at all, images come without. `folders`, of the images
    and of the label maps, are for messages.
    """
    if unlabelled and images and not maps:
        log.warning("%s: no label map, so that nothing can be learnt or measured", folders[1])
        return [LabelledImage(path, name, None) for name, path in images.items()]
    for one, other, what in ((images, maps, "label map"), (maps, images, "image")):
        for name in one:
            if name not in other:
                found.add(one[name], f"has no {what}", f"without {what}", name)
    records = [LabelledImage(images[name], name, maps[name]) for name in images if name in maps]
    if not records:
        what = f"no image has a label map of its name in {folders[1]}" if images else "no images"
        found.add(folders[0], what, "no images", fatal=True)
    return records


def value_table(labels: Sequence[int], ignore: Iterable[int] = ()) -> NDArray[np.uint8]:
    """The table of a data set whose files have these values for the labels 0, 1, ...

    `ignore` are values without a label; 255 always is. UserError for too many labels.
    """
    if len(labels) > MAX_CLASSES:
        raise UserError("data.classes", f"{len(labels)} classes, at most {MAX_CLASSES} fit")
    table = np.full(256, WRONG, dtype=np.uint8)
    table[list(labels)] = np.arange(len(labels))
    table[[*ignore, 255]] = UNLABELLED
    return table


def read_label_map(path: str, table: NDArray[np.uint8], max_pixels: int = MAX_PIXELS) -> LabelMap:
    """Decode a label map: a grey or palette image whose values (palette indices) are in `table`.

    BadLabels names what is wrong, with the values.
    """
    try:
        with opened(path, max_pixels) as image:
            if image.format not in FORMATS:
                wanted = ", ".join(FORMATS)
                raise BadImage(f"is a {image.format}, wanted a format that keeps labels: {wanted}")
            if image.mode not in ("1", "L", "P") and image.mode[0] != "I":
                raise BadImage(
                    f"is a colour image (mode {image.mode}), wanted one channel of labels"
                )
            values = np.asarray(image)
    except BadImage as error:
        raise BadLabels(path, str(error)) from error
    return labels_of(values, table, path)


def labels_of(values: NDArray[Any], table: NDArray[np.uint8], path: str) -> LabelMap:
    """A file's values (H, W), whole numbers or truth values, as labels; BadLabels if `table` does
    not have them."""
    if values.dtype != np.uint8:  # a bitmap, or 16 and 32 bits
        if values.min() < 0 or values.max() > 255:
            raise BadLabels(
                path, f"has values from {values.min()} to {values.max()}, wanted 0..255"
            )
        values = values.astype(np.uint8)
    labels = table[values]
    wrong = labels == WRONG
    if wrong.any():
        raise BadLabels(path, _wrong_values(values[wrong], table))
    return labels


def _wrong_values(wrong: NDArray[np.uint8], table: NDArray[np.uint8]) -> str:
    values, counts = np.unique(wrong, return_counts=True)
    named = [f"{value} ({count} pixels)" for value, count in zip(values, counts, strict=True)]
    more = f" and {len(named) - SHOWN_VALUES} more" if len(named) > SHOWN_VALUES else ""
    known = np.flatnonzero(table < WRONG)
    ignored = np.flatnonzero(table == UNLABELLED)
    return (
        f"has values that are no labels here: {', '.join(named[:SHOWN_VALUES])}{more}; labels are "
        f"{_ranges(known)}, ignored {_ranges(ignored)} (are these ids of another list of classes?)"
    )


def _ranges(values: NDArray[np.int64]) -> str:
    """[0, 1, 2, 255] -> "0-2, 255"."""
    parts = np.split(values, np.flatnonzero(np.diff(values) != 1) + 1)
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts if len(p))


class SegmentationDataset(DetectionDataset):
    """A segmentation reader's images as samples for the network; see DetectionDataset.

    Training adds the label map, drawn scales and cuts. A label map that cannot be used is a mistake
    in the data set, not a bad image: it raises UserError.
    """

    def __init__(
        self,
        reader: Any,
        section: DataSection,
        *,
        training: bool,
        views: Sequence[View] | None = None,
    ) -> None:
        super().__init__(reader, section, training=training, views=views)
        self.reader = reader
        reader.max_pixels = section.max_pixels
        images: list[LabelledImage] = reader.records
        self.label_paths = {record.label_path for record in images}
        missing = [record.path for record in images if record.label_path is None]
        if training and missing:
            raise UserError(missing[0], "has no label map to learn from")

    def samples(self, pick: Pick, record: Any) -> list[Sample]:
        """Read one image, once, and show it in every view; BadImage when that is not possible."""
        section = self.section
        image = read_image(record.path, section.orientation, section.max_pixels)
        size = image.shape[0], image.shape[1]
        labels = None
        if self.training:
            labels = self.reader.label_map(record)
            check_size(labels, size, record)
        random = np.random.default_rng(pick.seed)
        samples = []
        for view in self.views:
            view = view._replace(flip=view.flip != pick.flip)
            if labels is None:
                pixels, scale = view.of(image, section.pad_images)
                label_map = None
            else:
                pixels, label_map, scale = self._drawn(image, labels, view, random)
            target = Target.without_objects(record.image_id, size, label_map)
            samples.append(Sample(pixels, target, scale, pick.seed, view.flip))
        return samples

    def _drawn(
        self, image: NDArray[np.uint8], labels: LabelMap, view: View, random: np.random.Generator
    ) -> tuple[Tensor, Tensor, Scale]:
        """Image and label map, resized and cut alike, as `random` draws it; the scale."""
        section = self.section
        if section.random_scale:
            low, high = np.log(section.random_scale)
            factor = float(np.exp(random.uniform(low, high)))
            short, long = (max(1, round(s * factor)) for s in (view.resize.short, view.resize.long))
            view = view._replace(resize=replace(view.resize, short=short, long=long))
        pixels, scale = view.of(image, section.pad_images)
        height, width = pixels.shape[1:]
        placed = place_labels(labels, (height, width), scale, view.flip, UNLABELLED)
        if section.crop:
            tall, wide = (min(c, s) for c, s in zip(section.crop, (height, width), strict=True))
            top, left = (int(random.integers(n)) for n in (height - tall + 1, width - wide + 1))
            pixels = pixels[:, top : top + tall, left : left + wide]
            placed = placed[top : top + tall, left : left + wide]
        return pixels, torch.from_numpy(placed), scale

    def count_bad(self, batch: Batch) -> None:
        """As DetectionDataset; also UserError for a label map that cannot be used."""
        for path, reason in batch.skipped:
            if path in self.label_paths:
                raise UserError(path, reason, "`dcdet check CONFIG` lists all that is wrong")
        super().count_bad(batch)


def check_size(labels: LabelMap, size: tuple[int, int], record: LabelledImage) -> None:
    """BadLabels unless a label map is of the image's `size` (h, w)."""
    if labels.shape != size:
        turned = "; is data.orientation right?" if labels.shape == size[::-1] else ""
        raise BadLabels(
            record.label_path or "",
            f"is {labels.shape[1]} x {labels.shape[0]} pixels (width x height), its image "
            f"{record.path} {size[1]} x {size[0]}{turned}",
        )
