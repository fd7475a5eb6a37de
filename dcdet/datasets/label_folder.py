"""Segmentation data in plain folders: images/SPLIT/* and label maps labels/SPLIT/*."""

import os

from dcdet.datasets.label_maps import SegmentationReader, files_in, pair, value_table
from dcdet.datasets.records import ProblemList
from dcdet.errors import UserError, require

IMAGE = r"(?i)([^.].*)\.(?:jpe?g|png|bmp|webp|tiff?|ppm)"
LABELS = r"(?i)([^.].*)\.(?:png|bmp|tiff?|gif)"


class LabelFolder(SegmentationReader):
    """The images of `root`/`images`/`split` with those label maps of `root`/`labels`/`split` that
    have the same name but for the suffix.

    A label map's values are the labels, in the order of `classes`; 255 and the values in `ignore`
    are neither learnt nor measured. An image without a label map, or a label map without an image,
    is left out, named and counted; `strict` makes it a UserError.
    """

    def __init__(
        self,
        root: str,
        split: str,
        classes: list[str] | None,
        ignore: list[int] | None = None,
        images: str = "images",
        labels: str = "labels",
        strict: bool = False,
    ) -> None:
        if not classes:
            raise UserError("data.classes", "a folder of label maps needs the names of its classes")
        for value in ignore or ():
            require(len(classes) <= value <= 255, "ignore", f"from {len(classes)} to 255", value)
        self.name = f"{root} {split}"
        self.classes = list(classes)
        self.category_ids = list(range(len(classes)))
        self.table = value_table(range(len(classes)), ignore or ())
        found = ProblemList(strict)
        folders = os.path.join(root, images, split), os.path.join(root, labels, split)
        pictures = files_in(folders[:1], IMAGE, found)
        self.records = pair(pictures, files_in(folders[1:], LABELS, found), found, folders)
        self.problems = found.finish(self.name, len(self.records))
