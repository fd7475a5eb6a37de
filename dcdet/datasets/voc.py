"""Pascal VOC data sets: Annotations/*.xml, JPEGImages/, ImageSets/Main/*.txt."""

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np

from dcdet.boxes import Pixels
from dcdet.datasets.records import (
    Problem,
    ProblemList,
    Record,
    Truth,
    box_array,
    clean_box,
    path_inside,
)
from dcdet.datasets.transforms import BadImage, read_file, read_size
from dcdet.errors import UserError

MAX_XML_BYTES = 16 << 20
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".JPG", ".JPEG", ".PNG")


class VOC:
    """A VOC-style data set.

    `image_set` names files of ImageSets/Main, joined by "+": "2007_trainval+2012_trainval" means
    VOC2007's and VOC2012's trainval below `root`; any other name is a file in `root` itself. With
    several roots every image set is read from each. XML boxes count pixels from 1 and include their
    last pixel. Difficult objects are ignored regions in training unless `use_difficult`, and
    flagged for evaluation. Bad annotations are dropped or clipped and counted in `problems`;
    `strict` makes them a UserError.
    """

    def __init__(
        self,
        root: str | list[str],
        image_set: str,
        classes: list[str] | None,
        pixels: Pixels,
        use_difficult: bool = False,
        strict: bool = False,
    ) -> None:
        if not classes:
            raise UserError("data.classes", "a VOC data set needs the names of its classes")
        self.name = f"VOC {image_set}"
        self.classes = list(classes)
        self.category_ids = list(range(1, len(classes) + 1))
        self.pixels: Pixels = pixels
        self.use_difficult = use_difficult
        self.records: list[Record] = []
        self._found = ProblemList(strict)
        self._labels = {name: label for label, name in enumerate(self.classes)}
        roots = [root] if isinstance(root, str) else root
        self._read_sets([split_set(part, r) for part in image_set.split("+") for r in roots])
        self.problems: list[Problem] = self._found.finish(self.name, len(self.records))

    def _read_sets(self, sets: list[tuple[str, str]]) -> None:
        folders: dict[str, str] = {}  # image id -> the folder it came from
        for folder, image_set in sets:
            listing = os.path.join(folder, "ImageSets", "Main", image_set + ".txt")
            for line, name in read_list(listing):
                where = f"{listing}:{line}"
                if folders.get(name) == folder:
                    self._found.add(where, f"image {name} is listed twice", "duplicate image", name)
                    continue
                image_id = f"{folder}/{name}" if name in folders else name
                folders[image_id] = folder
                record = self._read_image(folder, name, image_id, where)
                if record is not None:
                    self.records.append(record)
        if not self.records:
            self._found.add(sets[0][0], f"no images in {self.name}", "no images", fatal=True)
        elif not any(len(r.truth.labels) for r in self.records) and any(
            problem.kind.startswith("unknown class") for problem in self._found.items
        ):
            what = f"no object of the classes {', '.join(self.classes)}"
            self._found.add(sets[0][0], what, "no objects", fatal=True)

    def _read_image(self, folder: str, name: str, image_id: str, where: str) -> Record | None:
        annotation = path_inside(os.path.join(folder, "Annotations"), name + ".xml")
        path = find_file(os.path.join(folder, "JPEGImages"), name, SUFFIXES)
        if annotation is None or path is None:
            what = f"image name {name!r} leads out of the data set's folder"
            self._found.add(where, what, "path leaves the folder", image_id, fatal=True)
            return None
        try:
            tree = parse_xml(read_file(annotation, MAX_XML_BYTES))
        except (OSError, ValueError) as error:
            what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self._found.add(annotation, what, "unreadable annotation", image_id, fatal=True)
            return None
        size = self._read_size(tree, annotation, image_id, path)
        return self._read_objects(tree, annotation, image_id, path, size)

    def _read_size(
        self, tree: ElementTree.Element, file: str, image_id: str, path: str
    ) -> tuple[int, int]:
        texts = [tree.findtext(f"size/{side}", "") for side in ("height", "width")]
        if all(re.fullmatch(r"\s*0*[1-9]\d{0,5}\s*", text) for text in texts):
            return int(texts[0]), int(texts[1])
        self._found.add(file, "no image size; the image file's is used", "missing size", image_id)
        try:
            return read_size(path)
        except BadImage:
            return (0, 0)  # the loader will name this image

    def _read_objects(
        self, tree: ElementTree.Element, file: str, image_id: str, path: str, size: tuple[int, int]
    ) -> Record:
        boxes, labels, ignored = [], [], []
        xywh, truth_labels, difficult = [], [], []
        for item in tree.iterfind("object"):
            where = f"{file}:{item.get('line')}"
            name = (item.findtext("name") or "").strip()
            label = self._labels.get(name)
            if label is None:
                close = difflib.get_close_matches(name, self.classes, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                self._found.add(
                    where,
                    f"class {name!r} is not in data.classes{hint}",
                    f"unknown class {name!r}",
                    image_id,
                )
                continue
            box, fault = _read_box(item)
            clean = None
            if box is not None:
                clean, fault = clean_box(box, size)
            if fault:
                self._found.add(
                    where, f"{name} {_box_text(item)}: {fault}", fault.split(" (")[0], image_id
                )
            if box is None or clean is None:
                continue
            hard = (item.findtext("difficult") or "0").strip() not in ("0", "")
            if hard and not self.use_difficult:
                ignored.append(clean)
            else:
                boxes.append(clean)
                labels.append(label)
            x1, y1, x2, y2 = box
            xywh.append((x1, y1, x2 - x1, y2 - y1))
            truth_labels.append(label)
            difficult.append(hard)
        corners = np.array(xywh, dtype=np.float64).reshape(-1, 4)
        truth = Truth(
            xywh=corners,
            labels=np.array(truth_labels, dtype=np.int64),
            ignore=np.array(difficult, dtype=bool),
            areas=corners[:, 2] * corners[:, 3],
            ids=np.arange(len(corners), dtype=np.int64),
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


def split_set(part: str, root: str) -> tuple[str, str]:
    """("2007_trainval", root) -> (root/VOC2007, "trainval"); any other name stays whole."""
    match = re.fullmatch(r"(\d{4})_(.+)", part)
    if match:
        return os.path.join(root, "VOC" + match[1]), match[2]
    return root, part


def read_list(path: str) -> Iterator[tuple[int, str]]:
    """(line number, image name) of every line; a name may contain spaces."""
    try:
        lines = read_file(path).decode("utf-8-sig").splitlines()
    except OSError as error:
        known = sorted(p.stem for p in Path(path).parent.glob("*.txt"))
        hint = "there are: " + ", ".join(known[:10]) if known else "is data.*.root right?"
        raise UserError(path, error.strerror or str(error), hint) from error
    except UnicodeDecodeError as error:
        raise UserError(path, "is not UTF-8 text") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, line.strip()


def find_file(folder: str, name: str, suffixes: Sequence[str]) -> str | None:
    """The file `name` with the first suffix that is there, or where none is, with the first.

    None where the name leads out of the folder.
    """
    paths = [path_inside(folder, name + suffix) for suffix in suffixes]
    if None in paths:
        return None
    return next((path for path in paths if path and os.path.exists(path)), paths[0])


def parse_xml(data: bytes) -> ElementTree.Element:
    """Parse XML; every <object> gets an attribute `line`. ValueError says what is wrong.

    A document type declaration is refused: VOC has none, and entities can be bombs.
    """
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()

    def start(tag: str, attributes: dict[str, str]) -> None:
        if tag == "object":
            attributes["line"] = str(parser.CurrentLineNumber)
        builder.start(tag, attributes)

    def refuse(*_: object) -> None:
        raise ValueError("has a document type declaration, which is not allowed")

    parser.StartElementHandler = start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(data, True)
        tree = builder.close()
    except (expat.ExpatError, LookupError) as error:
        raise ValueError(f"is not well-formed XML: {error}") from error
    if tree.tag != "annotation":
        raise ValueError(f"is not a VOC annotation: its root is <{tree.tag}>")
    return tree


def _read_box(item: ElementTree.Element) -> tuple[tuple[float, float, float, float] | None, str]:
    """The continuous box of an <object>, or None and what is wrong."""
    try:
        x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{k}", "")) for k in CORNERS)
    except ValueError:
        return None, "box without four numbers"
    if x2 <= x1 or y2 <= y1:  # a single point or line, although one pixel by the letter
        return None, "degenerate box"
    return (x1 - 1, y1 - 1, x2, y2), ""


def _box_text(item: ElementTree.Element) -> str:
    return "(" + ", ".join(item.findtext(f"bndbox/{k}", "?").strip() for k in CORNERS) + ")"


CORNERS = ("xmin", "ymin", "xmax", "ymax")
