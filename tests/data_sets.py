"""Small data sets on disk, written without dcdet's own code."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

# name, xmin, ymin, xmax, ymax (anything that can be written), then optional extra XML
VocObject = Sequence[Any]


def picture(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """A smooth random image (h, w, 3) uint8."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return cv2.resize(small, size[::-1], interpolation=cv2.INTER_LINEAR)


def voc_xml(size: tuple[int, int] | None, objects: Sequence[VocObject]) -> str:
    lines = ["<annotation>"]
    if size is not None:
        lines.append(f"<size><width>{size[1]}</width><height>{size[0]}</height></size>")
    for name, *corners in objects:
        numbers, extra = corners[:4], "".join(corners[4:])
        tags = zip(("xmin", "ymin", "xmax", "ymax"), numbers, strict=True)
        box = "".join(f"<{tag}>{number}</{tag}>" for tag, number in tags)
        lines.append(f"<object><name>{name}</name>{extra}<bndbox>{box}</bndbox></object>")
    return "\n".join([*lines, "</annotation>"])


def write_voc(
    root: Path,
    images: Mapping[str, tuple[tuple[int, int], Sequence[VocObject]]],
    image_set: str = "train",
    suffix: str = ".png",
) -> Path:
    """A VOC tree of {name: (size, objects)}; further calls add to it."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for seed, (name, (size, objects)) in enumerate(images.items()):
        (root / "Annotations" / f"{name}.xml").write_text(voc_xml(size, objects))
        cv2.imwrite(str(root / "JPEGImages" / (name + suffix)), picture(size, seed))
    (root / "ImageSets" / "Main" / f"{image_set}.txt").write_text("\n".join(images) + "\n")
    return root


def coco_content(number: int = 3, size: tuple[int, int] = (40, 60)) -> dict[str, Any]:
    """A sound COCO file: `number` images with one object each, categories 3, 17 and 90."""
    height, width = size
    return {
        "images": [
            {"id": 10 + i, "file_name": f"{i}.png", "height": height, "width": width}
            for i in range(number)
        ],
        "annotations": [
            {
                "id": i,
                "image_id": 10 + i,
                "category_id": (3, 17, 90)[i % 3],
                "bbox": [2.5 + i, 3.25, 20.5, 10.75],
                "area": 100.0,
                "iscrowd": 0,
            }
            for i in range(number)
        ],
        "categories": [
            {"id": 17, "name": "cat"},
            {"id": 3, "name": "car"},
            {"id": 90, "name": "toothbrush"},
        ],
    }


def write_coco(root: Path, content: Any, image_set: str = "train") -> Path:
    """A COCO tree with `content` as its JSON and a picture for each image that it names well."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / image_set).mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{image_set}.json").write_text(json.dumps(content))
    for seed, image in enumerate(content["images"]):
        file = root / image_set / image["file_name"]
        cv2.imwrite(str(file), picture((image["height"], image["width"]), seed))
    return root


def write_scenes(
    root: Path, splits: Mapping[str, int], size: tuple[int, int] = (48, 64), classes: int = 3
) -> Path:
    """So many images of each split, in squares of 8 pixels whose grey is that of their class, with
    their label maps: images/SPLIT/*.png, labels/SPLIT/*.png."""
    for split, number in splits.items():
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for index in range(number):
            random = np.random.default_rng(index)
            squares = random.integers(classes, size=(-(-size[0] // 8), -(-size[1] // 8)))
            labels = squares.repeat(8, 0).repeat(8, 1)[: size[0], : size[1]].astype(np.uint8)
            image = np.repeat((labels * (255 // classes))[..., None], 3, axis=2)
            cv2.imwrite(str(root / "images" / split / f"{index}.png"), image)
            cv2.imwrite(str(root / "labels" / split / f"{index}.png"), labels)
    return root
