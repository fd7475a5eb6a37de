"""COCO data sets: one JSON file of instances and a folder of images."""

import difflib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dcdet.boxes import Pixels
from dcdet.datasets.records import (
    LARGEST,
    Problem,
    ProblemList,
    Record,
    Truth,
    box_array,
    clean_box,
    mask_array,
    path_inside,
)
from dcdet.datasets.transforms import BadImage, read_file, read_size
from dcdet.errors import UserError
from dcdet.masks import clean_segmentation

Box = tuple[float, float, float, float]

MAX_JSON_BYTES = 4 << 30
ANNOTATION_KEYS = {
    "id": "an integer",
    "image_id": "an integer",
    "category_id": "an integer",
    "bbox": "a list",
}

# The 2017 release's sets whose images lie in another set's folder.
IMAGE_FOLDERS = {
    "minival2014": "val2014",
    "valminusminival2014": "val2014",
    "test-dev2015": "test2015",
}

# The official categories' names and ids; ten ids between 1 and 90 were never used.
_CATEGORIES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, "
    "fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, "
    "bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, "
    "sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, "
    "bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, "
    "carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, "
    "tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, "
    "refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
)
_UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
CATEGORY_IDS = dict(
    zip(_CATEGORIES.split(", "), sorted(set(range(1, 91)) - _UNUSED_IDS), strict=True)
)

# A label without a category, with the id that it stands for.
PLACEHOLDER = re.compile(r"N/A ([1-9]\d{0,8})")


class COCO:
    """A COCO-style data set.

    `image_set` is one name or several joined by "+": annotations/instances_NAME.json (image_info_
    for test sets) and images/NAME or NAME, all below `root`. `annotations` and `images` name a file
    and a folder below `root` instead. `classes` selects and orders categories by name; null takes
    all, in the order of their ids. Crowd annotations are ignored regions.

    Among `classes`, "N/A 12" is a label without a category: torchvision's COCO detectors have one
    for each of the ten ids that COCO never used. The file must not have a category 12. Nothing is
    annotated with it, so it has no AP and no part in any mean; what is detected as it stays in the
    results, with category id 12, which COCO's own tools leave aside.

    `boxes` "exact" trains on (x, y, x + w, y + h); "truncated" on the 2017 release's boxes: the
    inclusive corners (x, y, x + max(0, w - 1), y + max(0, h - 1)), clipped, fractions cut off.
    Bad annotations are dropped or clipped and counted in `problems`; `strict` makes them a
    UserError. A file that breaks the format is a UserError always.

    `masks` reads the segmentations, too: polygons or run lengths. An annotation without a usable
    one is dropped, box and all.
    """

    def __init__(
        self,
        root: str,
        classes: list[str] | None,
        pixels: Pixels,
        image_set: str | None = None,
        annotations: str | None = None,
        images: str | None = None,
        boxes: Literal["exact", "truncated"] = "exact",
        strict: bool = False,
        masks: bool = False,
    ) -> None:
        if (image_set is None) == (annotations is None):
            raise ValueError("image_set: give either image_set or annotations")
        self.name = f"COCO {image_set or annotations}"
        self.pixels: Pixels = pixels
        self.truncated = boxes == "truncated"
        self.masks = masks
        self.classes: list[str] = []
        self.category_ids: list[int] = []
        self.records: list[Record] = []
        self._found = ProblemList(strict)
        self._seen: dict[str, dict[int, str]] = {"images": {}, "annotations": {}}
        for part in (image_set or "").split("+"):
            self._read(*_locate(root, part, annotations, images), classes)
        del self._seen  # large, and copied to every worker
        if not self.records:
            self._found.add(root, f"no images in {self.name}", "no images", fatal=True)
        self.problems: list[Problem] = self._found.finish(self.name, len(self.records))

    def _read(self, file: str, folder: str, classes: list[str] | None) -> None:
        sections = _load(file)
        names = self._read_categories(file, sections["categories"])
        ids, selected = _select(file, names, classes)
        if self.classes and (ids, selected) != (self.category_ids, self.classes):
            raise UserError(file, f"has other categories than the sets before it in {self.name}")
        self.category_ids, self.classes = ids, selected
        self._labels = {number: label for label, number in enumerate(ids)}
        if self.masks:
            _require_segmentations(file, sections["annotations"])
        images = self._read_images(file, sections["images"], folder)
        objects = self._read_annotations(file, sections["annotations"], images, names)
        for image_id, (path, size) in images.items():
            self.records.append(self._record(file, path, image_id, size, objects.get(image_id, [])))

    def _read_categories(self, file: str, items: list[Any]) -> dict[int, str]:
        names: dict[int, str] = {}
        for index, item in enumerate(items):
            where = f"{file}: categories[{index}]"
            if not self._has_keys(where, item, {"id": "an integer", "name": "a string"}):
                continue
            number, name = item["id"], item["name"]
            where = f"{where} (id {number})"
            if number in names or name in names.values():
                what = f"category id {number} or name {name!r} is given twice"
                self._found.add(where, what, "duplicate category", fatal=True)
            names[number] = name
        if not names:
            self._found.add(f"{file}: categories", "is empty", "no categories", fatal=True)
        return dict(sorted(names.items()))

    def _read_images(
        self, file: str, items: list[Any], folder: str
    ) -> dict[int, tuple[str, tuple[int, int]]]:
        images = {}
        for index, item in enumerate(items):
            where = f"{file}: images[{index}]"
            if not self._has_keys(where, item, {"id": "an integer", "file_name": "a string"}):
                continue
            image_id, name = item["id"], item["file_name"]
            where = f"{where} (id {image_id})"
            if self._is_repeated("images", image_id, where):
                continue
            path = path_inside(folder, name)
            if path is None:
                what = f"file_name {name!r} is not a path inside {folder}"
                self._found.add(where, what, "path leaves the folder", image_id, fatal=True)
                continue
            images[image_id] = path, self._read_size(where, item, path)
        return images

    def _read_size(self, where: str, item: dict[str, Any], path: str) -> tuple[int, int]:
        size = item.get("height") or 0, item.get("width") or 0
        if not all(_is_integer(side) and side >= 0 for side in size):
            what = f"height and width must be whole numbers, got {size[0]!r} and {size[1]!r}"
            self._found.add(where, what, "bad size", item["id"], fatal=True)
        elif all(size):
            return size
        else:
            what = "no image size; the image file's is used"
            self._found.add(where, what, "missing size", item["id"])
            try:
                return read_size(path)
            except BadImage:
                pass  # the loader will name this image
        return (0, 0)

    def _read_annotations(
        self, file: str, items: list[Any], images: dict[int, Any], names: dict[int, str]
    ) -> dict[int, list[tuple[int, dict[str, Any]]]]:
        """Image id -> its annotations, each with its index in the file."""
        objects: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for index, item in enumerate(items):
            where = f"{file}: annotations[{index}]"
            if not self._has_keys(where, item, ANNOTATION_KEYS):
                continue
            where = f"{where} (id {item['id']})"
            image_id, category = item["image_id"], item["category_id"]
            if self._is_repeated("annotations", item["id"], where):
                continue
            if item.get("iscrowd", 0) not in (0, 1):
                what = f"iscrowd must be 0 or 1, got {item['iscrowd']!r}"
                self._found.add(where, what, "bad iscrowd", image_id, fatal=True)
            elif image_id not in images:
                what = f"image_id {image_id} is not in images"
                self._found.add(where, what, "annotation of an unknown image", image_id)
            elif category not in names:
                what = f"category_id {category} is not in categories"
                self._found.add(where, what, "annotation of an unknown category", image_id)
            else:
                objects.setdefault(image_id, []).append((index, item))
        return objects

    def _record(
        self,
        file: str,
        path: str,
        image_id: int,
        size: tuple[int, int],
        objects: list[tuple[int, dict[str, Any]]],
    ) -> Record:
        boxes, labels, ignored = [], [], []
        xywh, truth_labels, crowds, areas, ids, masks = [], [], [], [], [], []
        for index, item in objects:
            label = self._labels.get(item["category_id"])
            if label is None:
                continue  # a category that data.classes leaves out
            where = f"{file}: annotations[{index}] (id {item['id']})"
            clean, fault = self._clean(item["bbox"], size)
            if fault:
                self._found.add(
                    where, f"bbox {item['bbox']!r:.80}: {fault}", fault.split(" (")[0], image_id
                )
            if clean is None:
                continue
            if self.masks:
                mask, fault = clean_segmentation(item.get("segmentation"), size)
                if fault:
                    kind = fault.split(" (")[0]
                    self._found.add(where, f"segmentation: {fault}", kind, image_id)
                if mask is None:
                    continue
                masks.append(mask)
            crowd = bool(item.get("iscrowd", 0))
            width, height = item["bbox"][2:]
            area = item.get("area", width * height)
            if not _is_number(area) or not 0 < area <= LARGEST**2:
                self._found.add(
                    where, f"area {area!r:.80}; that of the box is used", "bad area", image_id
                )
                area = width * height
            if crowd:
                ignored.append(clean)
            else:
                boxes.append(clean)
                labels.append(label)
            xywh.append(item["bbox"])
            truth_labels.append(label)
            crowds.append(crowd)
            areas.append(area)
            ids.append(item["id"])
        truth = Truth(
            xywh=np.array(xywh, dtype=np.float64).reshape(-1, 4),
            labels=np.array(truth_labels, dtype=np.int64),
            ignore=np.array(crowds, dtype=bool),
            areas=np.array(areas, dtype=np.float64),
            ids=np.array(ids, dtype=np.int64),
            masks=mask_array(masks) if self.masks else None,
        )
        return Record(
            path=path,
            image_id=image_id,
            size=size,
            boxes=box_array(boxes),
            labels=np.array(labels, dtype=np.int64),
            ignored=box_array(ignored),
            truth=truth,
        )

    def _clean(self, bbox: Any, size: tuple[int, int]) -> tuple[Box | None, str]:
        """A COCO bbox as a training box, or None, and what was wrong with it."""
        if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
            return None, "box without four numbers"
        x, y, width, height = bbox
        corners = (x, y, x + width, y + height)
        if not self.truncated:
            return clean_box(corners, size)
        clean, fault = clean_box(corners, size, thinnest=0.0)
        if clean is None:
            return None, fault
        x1, y1 = max(x, 0), max(y, 0)
        x2 = min(x1 + max(width - 1, 0), (size[1] or LARGEST) - 1)
        y2 = min(y1 + max(height - 1, 0), (size[0] or LARGEST) - 1)
        if x2 < x1 or y2 < y1:
            return None, "box outside the image"
        return (int(x1), int(y1), int(x2) + 1, int(y2) + 1), fault

    def _has_keys(self, where: str, item: Any, keys: dict[str, str]) -> bool:
        """Whether a JSON entry is an object with these keys of these types."""
        if not isinstance(item, dict):
            self._found.add(where, "is not an object", "malformed entry", fatal=True)
            return False
        for key, kind in keys.items():
            value = item.get(key)
            if not KINDS[kind](value):
                identity = f" (id {item['id']!r:.40})" if "id" in item else ""
                got = f"got {value!r:.80}" if key in item else "it is missing"
                self._found.add(
                    where + identity, f"{key} must be {kind}, {got}", "malformed entry", fatal=True
                )
                return False
        return True

    def _is_repeated(self, section: str, number: int, where: str) -> bool:
        first = self._seen[section].setdefault(number, where)
        if first is not where:
            what = f"id {number} was used before, in {first}"
            self._found.add(where, what, f"duplicate id in {section}", fatal=True)
        return first is not where


def _load(file: str) -> dict[str, list[Any]]:
    """The sections of a COCO file; UserError when they are not there."""
    try:
        content = json.loads(read_file(file, MAX_JSON_BYTES))
    except OSError as error:
        known = sorted(p.name for p in Path(file).parent.glob("*.json"))
        hint = "there are: " + ", ".join(known[:10]) if known else "is data.*.root right?"
        raise UserError(file, error.strerror or str(error), hint) from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}", f"is not JSON: {error.msg}") from error
    except ValueError as error:
        raise UserError(file, f"is not JSON: {error}") from error
    except RecursionError as error:
        raise UserError(file, "is nested too deeply") from error
    if not isinstance(content, dict):
        raise UserError(file, "must be a JSON object with images, annotations and categories")
    if Path(file).name.startswith("image_info"):
        content.setdefault("annotations", [])
    for section in ("images", "annotations", "categories"):
        if section not in content:
            raise UserError(file, f"has no section {section!r}", "is it a COCO instances file?")
        if not isinstance(content[section], list):
            raise UserError(f"{file}: {section}", "must be a list")
    return content


def _require_segmentations(file: str, items: list[Any]) -> None:
    """UserError for a file of boxes only: dropping its objects one by one would help nobody."""
    if items and not any(isinstance(item, dict) and "segmentation" in item for item in items):
        raise UserError(file, "no annotation has a segmentation", "set masks: false to do without")


def _select(
    file: str, names: dict[int, str], classes: list[str] | None
) -> tuple[list[int], list[str]]:
    """(category ids, class names) in the order of the labels."""
    if classes is None:
        return list(names), list(names.values())
    ids = {name: number for number, name in names.items()}
    chosen = []
    for name in classes:
        placeholder = PLACEHOLDER.fullmatch(name)
        if name in ids:
            chosen.append(ids[name])
        elif placeholder and int(placeholder[1]) not in names:
            chosen.append(int(placeholder[1]))
        else:
            close = difflib.get_close_matches(name, ids, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(ids)}"
            if placeholder:
                hint = f"its category {placeholder[1]} is {names[int(placeholder[1])]!r}"
            raise UserError("data.classes", f"{file} has no category {name!r}", hint)
    return chosen, list(classes)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 1 << 53


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


KINDS: dict[str, Callable[[Any], bool]] = {
    "an integer": _is_integer,
    "a string": lambda value: isinstance(value, str),
    "a list": lambda value: isinstance(value, list),
}


def _locate(
    root: str, image_set: str, annotations: str | None, images: str | None
) -> tuple[str, str]:
    """(annotation file, image folder) of one image set."""
    file = annotations or f"annotations/instances_{image_set}.json"
    if image_set.startswith("test") and not os.path.exists(os.path.join(root, file)):
        file = f"annotations/image_info_{image_set}.json"  # a test set without annotations
    folder = images or IMAGE_FOLDERS.get(image_set, image_set)
    if images is None and os.path.isdir(os.path.join(root, "images", folder)):
        folder = os.path.join("images", folder)
    return os.path.join(root, file), os.path.join(root, folder)
