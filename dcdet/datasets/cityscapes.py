"""Cityscapes: leftImg8bit/SPLIT/CITY/*_leftImg8bit.png with the label maps of gtFine or gtCoarse.

Source: mcordts/cityscapesScripts, helpers/labels.py.
"""

import os
from typing import Literal

from dcdet.datasets.label_maps import (
    LabelledImage,
    LabelMap,
    SegmentationReader,
    files_in,
    pair,
    read_label_map,
    value_table,
)
from dcdet.datasets.records import ProblemList
from dcdet.errors import UserError

# Of each class its labelId, which stands in the label maps as they are downloaded, and its colour;
# its place here is its trainId. All other labelIds, 0 to 33, are neither learnt nor measured.
LABELS: dict[str, tuple[int, tuple[int, int, int]]] = {
    "road": (7, (128, 64, 128)),
    "sidewalk": (8, (244, 35, 232)),
    "building": (11, (70, 70, 70)),
    "wall": (12, (102, 102, 156)),
    "fence": (13, (190, 153, 153)),
    "pole": (17, (153, 153, 153)),
    "traffic light": (19, (250, 170, 30)),
    "traffic sign": (20, (220, 220, 0)),
    "vegetation": (21, (107, 142, 35)),
    "terrain": (22, (152, 251, 152)),
    "sky": (23, (70, 130, 180)),
    "person": (24, (220, 20, 60)),
    "rider": (25, (255, 0, 0)),
    "car": (26, (0, 0, 142)),
    "truck": (27, (0, 0, 70)),
    "bus": (28, (0, 60, 100)),
    "train": (31, (0, 80, 100)),
    "motorcycle": (32, (0, 0, 230)),
    "bicycle": (33, (119, 11, 32)),
}
LABEL_IDS = [label_id for label_id, _ in LABELS.values()]
ID_TABLE = value_table(LABEL_IDS, set(range(34)) - set(LABEL_IDS))
ENTRY = r"([^.].*)"
IMAGE = r"([^.].*)_leftImg8bit\.png"  # not *_flip.png, which the 2017 release writes beside it


class Cityscapes(SegmentationReader):
    """The images of `root`/leftImg8bit/`split` with their label maps of `root`/`annotations`.

    Label maps are *_labelTrainIds.png, or where there is none, *_labelIds.png. An image without a
    label map, or a label map without an image, is left out, named and counted; `strict` makes it a
    UserError. A split without any label map is for predictions only. Image ids are
    CITY_SEQUENCE_FRAME, as the evaluation server expects them in file names.
    """

    CLASSES = tuple(LABELS)
    CATEGORY_IDS = tuple(LABEL_IDS)
    PALETTE = tuple(colour for _, colour in LABELS.values())

    def __init__(
        self,
        root: str,
        split: Literal["train", "val", "test", "train_extra"],
        classes: list[str] | None,
        annotations: Literal["gtFine", "gtCoarse"] = "gtFine",
        strict: bool = False,
    ) -> None:
        self.name = f"Cityscapes {split}"
        self.classes, self.category_ids = list(LABELS), LABEL_IDS
        if classes not in (None, self.classes):
            wanted = ", ".join(self.classes)
            raise UserError("data.classes", f"Cityscapes' are {wanted}, in this order", "or null")
        self.table = value_table(range(len(LABELS)))
        found = ProblemList(strict)
        folders = os.path.join(root, "leftImg8bit", split), os.path.join(root, annotations, split)
        images = files_in(cities(folders[0], found), IMAGE, found)
        maps: dict[str, str] = {}
        if os.path.isdir(folders[1]):
            there = cities(folders[1], found)
            for kind in ("labelIds", "labelTrainIds"):
                maps |= files_in(there, rf"([^.].*)_{annotations}_{kind}\.png", found)
        self.records = pair(images, maps, found, folders, unlabelled=True)
        self.problems = found.finish(self.name, len(self.records))

    def label_map(self, record: LabelledImage) -> LabelMap | None:
        """The labels of an image, None where nothing is known; BadLabels for a wrong file."""
        if record.label_path and record.label_path.endswith("_labelIds.png"):
            return read_label_map(record.label_path, ID_TABLE, self.max_pixels)
        return super().label_map(record)


def cities(folder: str, found: ProblemList) -> list[str]:
    """The folders in the folder of a split."""
    return [path for path in files_in([folder], ENTRY, found).values() if os.path.isdir(path)]
