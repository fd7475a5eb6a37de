"""Pascal VOC's segmentation, and the Semantic Boundaries Dataset (SBD), which adds masks to it."""

import os
import struct
import zlib
from collections.abc import Collection
from typing import Any

from numpy.typing import NDArray

from dcdet.datasets.label_maps import (
    BadLabels,
    LabelledImage,
    LabelMap,
    SegmentationReader,
    labels_of,
    pair,
    value_table,
)
from dcdet.datasets.mat import read_field
from dcdet.datasets.records import ProblemList
from dcdet.datasets.transforms import read_file
from dcdet.datasets.voc import SUFFIXES, find_file, read_list, split_set
from dcdet.errors import first_line
from dcdet.visualize.segmentation import voc_palette

MAX_MAT_BYTES = 4 << 20  # SBD's have some kilobytes


class VOCSegmentation(SegmentationReader):
    """The images of VOC's image sets with their label maps, palette PNGs in the folder `labels`.

    `image_set` names files of ImageSets/Segmentation, as in the VOC reader ("2012_train", names
    joined by "+"); a file that is only in ImageSets/Main is taken from there. An image without a
    label map is left out, named and counted; `strict` makes it a UserError. Image sets without any
    label map are for predictions only.

    `sbd` is the folder `dataset` of SBD's benchmark_RELEASE. Its train and val images are added,
    but for those that are there already or in VOC 2012's val list. `classes` None: background and
    VOC's 20.
    """

    CLASSES = (
        "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat",
        "chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant",
        "sheep", "sofa", "train", "tvmonitor",
    )  # fmt: skip
    PALETTE = tuple(voc_palette(21))

    def __init__(
        self,
        root: str,
        image_set: str,
        classes: list[str] | None,
        labels: str = "SegmentationClass",
        sbd: str | None = None,
        strict: bool = False,
    ) -> None:
        self.name = f"VOC {image_set} segmentation"
        self.classes = list(classes or self.CLASSES)
        self.category_ids = list(range(len(self.classes)))
        self.table = value_table(self.category_ids)
        self._found = ProblemList(strict)
        self._images: dict[str, str] = {}
        self._maps: dict[str, str] = {}
        sets = [split_set(part, root) for part in image_set.split("+")]
        for folder, part in sets:
            listing = list_file(folder, part)
            main = list_file(folder, part, "Main")
            if os.path.exists(main) and not os.path.exists(listing):
                listing = main
            folders = os.path.join(folder, "JPEGImages"), os.path.join(folder, labels)
            self._read(listing, folders, (".png",))
        if sbd is not None:
            dated = any(folder != root for folder, _ in sets)
            val = list_file(*split_set("2012_val" if dated else "val", root))
            self._read_sbd(sbd, {*self._images, *(name for _, name in read_list(val))})
        folders = sets[0][0], os.path.join(sets[0][0], labels)
        self.records = pair(self._images, self._maps, self._found, folders, unlabelled=True)
        self.problems = self._found.finish(self.name, len(self.records))

    def _read(
        self,
        listing: str,
        folders: tuple[str, str],
        suffixes: tuple[str, ...],
        without: Collection[str] = (),
    ) -> None:
        """Add a list's images and their label maps, which are in these folders."""
        for line, name in read_list(listing):
            if name in without:
                continue
            where = f"{listing}:{line}"
            image = find_file(folders[0], name, SUFFIXES)
            label_map = find_file(folders[1], name, suffixes)
            if name in self._images:
                self._found.add(where, f"image {name} is listed twice", "duplicate image", name)
            elif image is None or label_map is None:
                what = f"image name {name!r} leads out of the data set's folder"
                self._found.add(where, what, "path leaves the folder", name, fatal=True)
            else:
                self._images[name] = image
                if os.path.exists(label_map):
                    self._maps[name] = label_map

    def _read_sbd(self, root: str, without: Collection[str]) -> None:
        folders = os.path.join(root, "img"), os.path.join(root, "cls")
        for part in ("train", "val"):
            self._read(os.path.join(root, part + ".txt"), folders, (".mat", ".png"), without)

    def label_map(self, record: LabelledImage) -> LabelMap | None:
        """The labels of an image, None where nothing is known; BadLabels for a wrong file."""
        if record.label_path and record.label_path.endswith(".mat"):
            return labels_of(read_mat(record.label_path), self.table, record.label_path)
        return super().label_map(record)


def list_file(folder: str, image_set: str, kind: str = "Segmentation") -> str:
    """The file that lists the images of a set."""
    return os.path.join(folder, "ImageSets", kind, image_set + ".txt")


def read_mat(path: str) -> NDArray[Any]:
    """The values (H, W) of a mask of SBD, GTcls.Segmentation in a .mat file; BadLabels for another
    file."""
    try:
        return read_field(read_file(path, MAX_MAT_BYTES), "GTcls", "Segmentation")
    except (OSError, ValueError, struct.error, zlib.error) as error:
        what = f"is not a mask of SBD, GTcls.Segmentation: {first_line(error)}"
        raise BadLabels(path, what) from error
