"""Segmentation data in plain folders: images/SPLIT/* and label maps labels/SPLIT/*."""

import os
from pathlib import Path

from dcdet.datasets.label_maps import MAX_CLASSES, LabelledImage, SegmentationReader, value_table
from dcdet.datasets.records import ProblemList, path_inside
from dcdet.errors import UserError, require

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
LABEL_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif", ".pgm")


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
        if len(classes) > MAX_CLASSES:
            raise UserError("data.classes", f"{len(classes)} classes, at most {MAX_CLASSES} fit")
        for value in ignore or ():
            require(len(classes) <= value <= 255, "ignore", f"from {len(classes)} to 255", value)
        self.name = f"{root} {split}"
        self.classes = list(classes)
        self.category_ids = list(range(len(classes)))
        self.table = value_table(range(len(classes)), ignore or ())
        self._found = ProblemList(strict)
        images, labels = os.path.join(root, images, split), os.path.join(root, labels, split)
        pictures, maps = self._list(images, IMAGE_SUFFIXES), self._list(labels, LABEL_SUFFIXES)
        self.records = [
            LabelledImage(path, name, maps[name]) for name, path in pictures.items() if name in maps
        ]
        for one, other, what in ((pictures, maps, "label map"), (maps, pictures, "image")):
            for name in one.keys() - other.keys():
                self._found.add(one[name], f"has no {what}", f"without {what}", name)
        if not self.records:
            what = f"no image has a label map of its name in {labels}"
            self._found.add(images, what, "no images", fatal=True)
        self.problems = self._found.finish(self.name, len(self.records))

    def _list(self, folder: str, suffixes: tuple[str, ...]) -> dict[str, str]:
        """The files in a folder, by their names without suffix, in order."""
        try:
            entries = sorted(os.listdir(folder))
        except OSError as error:
            known = sorted(p.name for p in Path(folder).parent.glob("*/"))
            hint = "there are: " + ", ".join(known[:10]) if known else "is data.*.root right?"
            raise UserError(folder, error.strerror or str(error), hint) from error
        files: dict[str, str] = {}
        for entry in entries:
            name, suffix = os.path.splitext(entry)
            if suffix.lower() not in suffixes or entry.startswith("."):
                continue
            path = path_inside(folder, entry)
            if path is None:
                what = f"{entry} leads out of the data set's folder"
                self._found.add(folder, what, "path leaves the folder", name, fatal=True)
            elif name in files:
                self._found.add(path, f"has the same name as {files[name]}", "repeated name", name)
            else:
                files[name] = path
        return files
