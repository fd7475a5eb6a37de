"""The embedded data set: bent, stretched and turned shapes on textured backgrounds.

It is drawn on first use and written both as a VOC and as a COCO data set, so that the real readers
read it. Every class wears the same colours and patterns: only the global form, which no rigid grid
of sampling points fits, tells the classes apart.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import escape

import cv2
import numpy as np

from dcdet.boxes import Pixels
from dcdet.datasets.coco import COCO
from dcdet.datasets.voc import VOC
from dcdet.errors import MachineError, UserError

CLASSES = ["crescent", "worm", "ring", "star"]
SIZE = (128, 160)
FINE = 2  # drawn so many times larger, for smooth edges
VERSION = 3  # of the drawing; a folder of another version is refused

Random = np.random.Generator
Polygon = np.ndarray  # (P, 2) float64, x and y


class Shapes:
    """The embedded data set, written to `root` unless it is there already.

    `form` chooses the reader: "voc" or "coco"; both find the same images and boxes, only COCO's
    form has `masks`. Raises UserError when `root` holds something else.
    """

    def __init__(
        self,
        root: str,
        split: Literal["train", "test"],
        classes: list[str] | None,
        pixels: Pixels,
        form: Literal["voc", "coco"] = "voc",
        train_images: int = 400,
        test_images: int = 100,
        masks: bool = False,
    ) -> None:
        if masks and form == "voc":
            raise ValueError("masks: are not in the voc form; set form: coco")
        write_shapes(root, {"train": train_images, "test": test_images})
        reader: VOC | COCO
        if form == "voc":
            reader = VOC(root, split, classes or CLASSES, pixels)
        else:
            reader = COCO(root, classes, pixels, image_set=split, images="JPEGImages", masks=masks)
        self.name = f"shapes {split}"
        self.classes, self.category_ids = reader.classes, reader.category_ids
        self.pixels, self.records, self.problems = reader.pixels, reader.records, reader.problems


def write_shapes(root: str, numbers: dict[str, int]) -> None:
    """Draw so many images of each split into `root`, all or nothing; do nothing if they are there.

    Several processes may do so at once: the first to finish wins. Raises UserError, MachineError.
    """
    wanted = {"version": VERSION, **numbers}
    folder = Path(root)
    if _is_there(folder, wanted):
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            temporary.chmod(0o755)
            for stream, (split, number) in enumerate(numbers.items()):
                _write_split(temporary, split, number, stream)
            (temporary / "shapes.json").write_text(json.dumps(wanted))
            try:
                temporary.rename(folder)
            except OSError:
                if not _is_there(folder, wanted):  # else another process was faster
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise MachineError(f"{folder}: cannot write the shapes data set: {error}") from error


def _is_there(folder: Path, wanted: dict[str, int]) -> bool:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / "shapes.json").read_text())
    except (OSError, ValueError) as error:
        hint = "choose another root for data set Shapes"
        raise UserError(folder, "is there, but is not a shapes data set", hint) from error
    if found != wanted:
        hint = "remove the folder, or choose another root"
        raise UserError(folder, f"holds shapes drawn with {found}, wanted {wanted}", hint)
    return True


def _write_split(folder: Path, split: str, number: int, stream: int) -> None:
    for name in ("JPEGImages", "Annotations", "ImageSets/Main", "annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(number):
        random = np.random.Generator(np.random.PCG64([VERSION, stream, index]))
        image, objects = draw_image(random)
        image_id, name = len(images) + 1, f"{split}_{index + 1:05d}"
        encoded = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
        (folder / "JPEGImages" / f"{name}.jpg").write_bytes(encoded.tobytes())
        (folder / "Annotations" / f"{name}.xml").write_text(_voc_xml(f"{name}.jpg", objects))
        height, width = SIZE
        images.append(
            {"id": image_id, "file_name": f"{name}.jpg", "height": height, "width": width}
        )
        for item in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **item})
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    names = "".join(f"{Path(image['file_name']).stem}\n" for image in images)
    (folder / f"ImageSets/Main/{split}.txt").write_text(names)


def _voc_xml(file: str, objects: list[dict[str, Any]]) -> str:
    lines = [
        f"<annotation>\n  <filename>{escape(file)}</filename>",
        f"  <size><width>{SIZE[1]}</width><height>{SIZE[0]}</height><depth>3</depth></size>",
    ]
    for item in objects:
        x, y, width, height = item["bbox"]
        lines.append(
            f"  <object>\n    <name>{CLASSES[item['category_id'] - 1]}</name>\n"
            "    <difficult>0</difficult>\n"
            f"    <bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
            f"<xmax>{x + width}</xmax><ymax>{y + height}</ymax></bndbox>\n  </object>"
        )
    return "\n".join([*lines, "</annotation>\n"])


def draw_image(random: Random) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """One image (128, 160, 3) uint8 RGB and its objects as COCO annotations without ids."""
    height, width = SIZE
    canvas = _background(random, height * FINE, width * FINE)
    objects: list[dict[str, Any]] = []
    for _ in range(int(random.integers(2, 5))):
        label = int(random.integers(len(CLASSES)))
        for _ in range(40):
            parts = _place(random, _outline(random, label))
            points = np.concatenate(parts)
            low, high = np.floor(points.min(axis=0)), np.ceil(points.max(axis=0))
            inside = low.min() >= 0 and high[0] <= width and high[1] <= height
            if inside and all(_overlap(low, high, other["bbox"]) < 0.15 for other in objects):
                break
        else:
            continue  # no room for another object
        area = _paint(random, canvas, parts)
        objects.append(
            {
                "category_id": label + 1,
                "bbox": [int(v) for v in (*low, *(high - low))],
                "area": area,
                "iscrowd": 0,
                "segmentation": [part.round(2).ravel().tolist() for part in parts],
            }
        )
    image = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    noise = 4 * random.standard_normal(image.shape, dtype=np.float32)
    return (image + noise).clip(0, 255).astype(np.uint8), objects


def _outline(random: Random, label: int) -> list[Polygon]:
    """A class's form, about 2 units wide, as polygons whose union it is."""
    t = np.linspace(-1, 1, 60)
    if label == 0:  # crescent: one bend, pointed ends
        angle = t * np.radians(random.uniform(85, 125))
        centre = np.stack([np.sin(angle), np.cos(angle)], axis=1)
        return [_ribbon(centre, random.uniform(0.24, 0.36) * (1 - t**2) ** 0.7 + 0.02)]
    if label == 1:  # worm: several bends, round ends
        waves, phase = random.uniform(1.7, 2.4), random.uniform(0, 2 * np.pi)
        amplitude = random.uniform(0.3, 0.42)
        centre = np.stack([1.1 * t, amplitude * np.sin(np.pi * waves * t + phase)], axis=1)
        return [_ribbon(centre, random.uniform(0.15, 0.21) * (1 - t**10) ** 0.5)]
    if label == 2:  # ring: closed; two halves, because a polygon has no hole
        half_width = np.full(60, random.uniform(0.15, 0.24))
        angle = (t + 1) * np.pi / 2
        centre = 0.85 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return [_ribbon(centre, half_width), _ribbon(-centre, half_width)]
    angle = np.linspace(0, 2 * np.pi, 120, endpoint=False)  # star: five bent arms
    inner = random.uniform(0.3, 0.42)
    radius = inner + (1 - inner) * np.abs(np.cos(2.5 * angle)) ** random.uniform(1.5, 2.5)
    swirl = angle + random.uniform(-0.8, 0.8) * radius
    return [np.stack([radius * np.cos(swirl), radius * np.sin(swirl)], axis=1)]


def _ribbon(centre: np.ndarray, half_width: np.ndarray) -> Polygon:
    """A band along a line (N, 2), as a polygon."""
    along = np.gradient(centre, axis=0)
    normal = np.stack([-along[:, 1], along[:, 0]], axis=1)
    normal *= (half_width / np.linalg.norm(along, axis=1))[:, None]
    return np.concatenate([centre + normal, (centre - normal)[::-1]])


def _place(random: Random, parts: list[Polygon]) -> list[Polygon]:
    """Bend, stretch, turn, enlarge and move a form into the image."""
    bend, stretch = random.uniform(-0.35, 0.35), random.uniform(0.7, 1.0)
    angle, size = random.uniform(0, 2 * np.pi), random.uniform(24, 40)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centre = random.uniform((0.1, 0.1), (0.9, 0.9)) * np.array([SIZE[1], SIZE[0]])
    placed = []
    for part in parts:
        x, y = part.T
        bent = np.stack([x, (y + bend * x**2) * stretch], axis=1)
        placed.append(bent @ turn * size + centre)
    return placed


def _overlap(low: np.ndarray, high: np.ndarray, bbox: list[int]) -> float:
    """Intersection of two boxes as a share of the smaller one."""
    other = np.array(bbox[:2])
    sides = np.minimum(high, other + bbox[2:]) - np.maximum(low, other)
    smaller = min(np.prod(high - low), bbox[2] * bbox[3])
    return float(np.prod(sides.clip(min=0)) / smaller)


def _paint(random: Random, canvas: np.ndarray, parts: list[Polygon]) -> float:
    """Draw a form with a pattern, shading and a rim onto the canvas; its area in pixels returns."""
    mask = np.zeros(canvas.shape[:2], dtype=np.uint8)
    contours = [np.round(part * FINE).astype(np.int32) for part in parts]
    for contour in contours:
        cv2.fillPoly(mask, [contour], 255)
    rows, columns = np.nonzero(mask)
    behind, colour = canvas[rows, columns].mean(axis=0), _colour(random)
    while np.abs(colour - behind).sum() < 120:
        colour = _colour(random)
    angle, period = random.uniform(0, np.pi), random.uniform(8, 24)
    wave = np.sin((columns * np.cos(angle) + rows * np.sin(angle)) * 2 * np.pi / period)
    light = (columns - columns.mean()) / 200 - (rows - rows.mean()) / 150
    pattern = random.uniform(0, 0.2) * wave + light * random.uniform(0, 0.6)
    canvas[rows, columns] = (colour * (1 + pattern[:, None])).clip(0, 255)
    rim = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    canvas[rim] *= 0.6
    return len(rows) / FINE**2


def _background(random: Random, height: int, width: int) -> np.ndarray:
    """Clouds of two colours, stripes and specks -> (height, width, 3) float32."""
    first, second = _colour(random), _colour(random)
    clouds = np.zeros((height, width), dtype=np.float32)
    for cells, weight in ((3, 1.0), (8, 0.7), (24, 0.4), (60, 0.25)):
        grid = random.random((cells, cells * 3 // 2), dtype=np.float32)
        clouds += weight * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    clouds = (clouds - clouds.min()) / (clouds.max() - clouds.min())
    angle, period = random.uniform(0, np.pi), random.uniform(10, 60)
    rows = np.arange(height, dtype=np.float32)[:, None] * np.float32(np.sin(angle))
    columns = np.arange(width, dtype=np.float32) * np.float32(np.cos(angle))
    stripes = np.sin((rows + columns + 30 * clouds) * np.float32(2 * np.pi / period))
    share = (clouds + np.float32(random.uniform(0, 0.25)) * stripes).clip(0, 1)[..., None]
    return second + (first - second) * share


def _colour(random: Random) -> np.ndarray:
    hue, saturation, value = random.integers((0, 40, 60), (180, 220, 235))
    hsv = np.array([[[hue, saturation, value]]], dtype=np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].astype(np.float32)
