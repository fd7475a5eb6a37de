"""Detection in, or segmentation of, a user's own images: pictures of what was found, and a JSON
file."""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from dcdet.datasets.loader import DataSection, View, collate
from dcdet.datasets.transforms import BadImage, read_image
from dcdet.engine.checkpoint import load_weights
from dcdet.engine.evaluate import detect
from dcdet.engine.runtime import output_folder, pick_device, strict_json, write_text
from dcdet.errors import UserError
from dcdet.evaluators.results import segmentations, xywh
from dcdet.masks import encode
from dcdet.models.build import build_model
from dcdet.registry import check, lookup, task_of
from dcdet.structures import UNLABELLED, Batch, Detections, Sample, Segmentation, Target
from dcdet.visualize.draw import Colour, draw_detections
from dcdet.visualize.segmentation import areas_of, draw_segmentation, encode_png, palette

log = logging.getLogger("dcdet.demo")

# What a folder is searched for; a file that is named itself may have any suffix.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
MAX_NAME_BYTES = 200  # file systems take 255


def demo(
    config: Any,
    weights: Path,
    inputs: Sequence[str],
    output: Path,
    *,
    score_threshold: float | None = None,
    device: str | None = None,
) -> int:
    """Detect in, or segment, images and the images of folders; write pictures, and detections.json
    or segmentations.json.

    A picture is called as its source; NAME-labels.png beside that of a segmentation are its labels.
    Nothing in `output` is overwritten: where a name is taken, -2, -3 and so on is added.
    `score_threshold` is of detections; None: 0.5. The command's exit code returns: 1 if inputs had
    to be skipped. Raises UserError when no input could be used.
    """
    threshold = threshold_of(score_threshold)
    paths, skipped = find_images(inputs)
    torch_device = pick_device(device)
    with output_folder(output):
        model = build_model(config)
        meta = load_weights(model, weights)
        model.to(torch_device).eval()
        show: Callable[[str, np.ndarray, Any], list[dict[str, Any]]]
        data_set = label_set(config)
        classes, category_ids = class_names(config, meta, weights, data_set)
        if data_set is None:
            results = "detections.json"
            show = partial(_show_detections, output, classes, category_ids, threshold)
        else:
            results = "segmentations.json"
            warn_of_threshold(score_threshold)
            colours = palette(getattr(data_set, "PALETTE", None), len(classes))
            show = partial(_show_segmentation, output, classes, category_ids, colours)
        experiment = check(config)
        views = experiment.test.views(experiment.data.resize)
        rows: list[dict[str, Any]] = []
        done = 0
        for path in paths:
            try:
                image, batches = read_views(path, experiment.data, views)
            except BadImage as error:
                skipped[path] = str(error)
                log.warning("skipped: %s: %s", _printable(path), error)
                continue
            [found] = detect(model, [batches], experiment.test.precision, torch_device)
            rows += show(path, image, found)
            done += 1
        if not done:
            name, reason = next(iter(skipped.items()))
            raise UserError(_printable(name), reason, f"none of {len(skipped)} inputs can be used")
        numbers = free_path(output, results)
        write_text(numbers, strict_json(rows))
    log.info("drew %d of %d images, see %s", done, done + len(skipped), numbers)
    return 1 if skipped else 0


def label_set(config: Any) -> type | None:
    """The class of the data set that a segmentation's labels are of, None for a detector."""
    return lookup(config.data.test, "dataset") if task_of(config) == "segmentation" else None


def threshold_of(given: float | None) -> float:
    """The score that detections must have, 0.5 if none is given; UserError if out of range."""
    if given is not None and not 0 <= given <= 1:
        raise UserError("--score-threshold", f"must be from 0 to 1, got {given}")
    return 0.5 if given is None else given


def warn_of_threshold(given: float | None) -> None:
    """Say that a segmentation has no use for a threshold that was given."""
    if given is not None:
        log.warning("--score-threshold changes nothing: each pixel gets its likeliest class")


def find_images(inputs: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The files that are meant, each once, and the inputs that name none, with the reason.

    A folder means the images in it by name, without those of folders inside it.
    """
    paths: dict[str, str] = {}  # absolute -> as given
    empty: dict[str, str] = {}
    for name in inputs:
        names = [name]
        if os.path.isdir(name):
            try:
                entries = sorted(os.listdir(name))
            except OSError as error:
                empty[name] = error.strerror or str(error)
                continue
            images = [e for e in entries if e.lower().endswith(SUFFIXES) and e[0] != "."]
            names = [os.path.join(name, entry) for entry in images]
            if not names:
                empty[name] = f"no image in this folder ({', '.join(SUFFIXES)})"
        for path in names:
            paths.setdefault(os.path.abspath(path), path)
    for name, reason in empty.items():
        log.warning("skipped: %s: %s", _printable(name), reason)
    if not paths:
        name, reason = next(iter(empty.items()), ("the command", "names no image"))
        raise UserError(_printable(name), reason)
    return list(paths.values()), empty


def class_names(
    config: Any, meta: dict[str, Any], weights: Path, data_set: type | None = None
) -> tuple[list[str], list[int]]:
    """Names and category ids of the labels, by the config, or else by the data set's class, if it
    has them once and for all (`CLASSES`, `CATEGORY_IDS`), or else by the checkpoint.

    Without any the names are class 0, class 1, ... and the ids count from 1, or with `data_set`, of
    segmentations, from 0.
    """
    number = config.model.num_classes
    trained = meta.get("classes")
    fixed = getattr(data_set, "CLASSES", None)
    given = config.data.classes if config.data.classes is not None else fixed
    if given is not None and len(given) != number:
        raise UserError(
            config.where("data.classes"), f"{len(given)} names, but model.num_classes is {number}"
        )
    if given is not None and trained is not None and list(given) != list(trained):
        log.warning("%s was trained for other class names: %s", weights, ", ".join(trained))
    names = list(given or trained or [f"class {label}" for label in range(number)])
    ids = meta.get("category_ids") if names == trained else None
    if ids is None and fixed is not None and names == list(fixed):
        ids = getattr(data_set, "CATEGORY_IDS", None)
    first = 1 if data_set is None else 0
    return names, list(ids or range(first, first + number))


def read_views(
    path: str, data: DataSection, views: Sequence[View]
) -> tuple[np.ndarray, list[Batch]]:
    """An image file (H, W, 3) uint8 RGB, and the same in each view, a batch of one; BadImage."""
    image = read_image(path, data.orientation, data.max_pixels)
    nothing = torch.zeros(0, 4)
    target = Target(path, image.shape[:2], nothing, torch.zeros(0, dtype=torch.int64), nothing)
    batches = []
    for view in views:
        pixels, scale = view.of(image, data.pad_images)
        sample = Sample(pixels, target, scale, 0, view.flip)
        batches.append(collate([sample], data.pad_multiple))
    return image, batches


def at_least(found: Detections, score: float) -> Detections:
    """The detections with this score or a better one, less those with non-finite numbers."""
    good = (found.scores >= score) & found.scores.isfinite() & found.boxes.isfinite().all(dim=1)
    masks = None if found.masks is None else found.masks[good]
    return Detections(
        found.image_id, found.boxes[good], found.scores[good], found.labels[good], masks
    )


def picture_name(path: str) -> str:
    """A harmless file name like that of `path`: JPEG for JPEG, PNG for everything else."""
    stem, suffix = os.path.splitext(os.path.basename(path))
    stem = "".join(c if c.isprintable() and c not in '<>:"/\\|?*' else "_" for c in stem)
    stem = stem.encode()[:MAX_NAME_BYTES].decode(errors="ignore")
    if not stem or stem[0] in "-.":  # an option to many commands; a hidden file
        stem = "_" + stem
    return stem + (".jpg" if suffix.lower() in (".jpg", ".jpeg") else ".png")


def free_path(folder: Path, name: str) -> Path:
    """A path in `folder` at which nothing stands: `name`, or with -2, -3, ... before its suffix."""
    path, number = folder / name, 1
    while os.path.lexists(path):
        number += 1
        path = folder / f"{Path(name).stem}-{number}{Path(name).suffix}"
    return path


def write_picture(path: Path, image: np.ndarray) -> None:
    """Write an RGB image as a new file; FileExistsError if there is one."""
    options = [cv2.IMWRITE_JPEG_QUALITY, 95] if path.suffix == ".jpg" else []
    _, encoded = cv2.imencode(path.suffix, image[..., ::-1], options)
    write_new(path, encoded.tobytes())


def write_new(path: Path, content: bytes) -> None:
    """Write a new file; FileExistsError if there is one."""
    with open(path, "xb") as file:
        try:
            file.write(content)
            file.flush()
        except OSError:
            path.unlink()
            raise


def _show_detections(
    output: Path,
    classes: Sequence[str],
    category_ids: Sequence[int],
    threshold: float,
    path: str,
    image: np.ndarray,
    found: Detections,
) -> list[dict[str, Any]]:
    """Draw what was found in an image; its rows for the JSON file."""
    found = at_least(found, threshold)
    picture = free_path(output, picture_name(path))
    write_picture(picture, draw_detections(image, found, classes))
    log.info("%s: %d found, see %s", _printable(path), len(found.scores), picture)
    return list(_rows(found, path, picture.name, classes, category_ids))


def _show_segmentation(
    output: Path,
    classes: Sequence[str],
    category_ids: Sequence[int],
    colours: Sequence[Colour],
    path: str,
    image: np.ndarray,
    found: Segmentation,
) -> list[dict[str, Any]]:
    """Draw an image's labels, and write them; its row for the JSON file."""
    labels = found.labels.numpy()
    picture = free_path(output, picture_name(path))
    write_picture(picture, draw_segmentation(image, labels, classes, colours))
    label_map = free_path(output, f"{picture.stem}-labels.png")
    write_new(label_map, encode_png(labels, colours))
    areas = areas_of(labels)
    log.info("%s: %d classes, see %s", _printable(path), len(areas), picture)
    unknown = int((labels == UNLABELLED).sum())
    if unknown:
        log.warning("%s: %d pixels were not finite", _printable(path), unknown)
    return [
        {
            "image": path,
            "picture": picture.name,
            "labels": label_map.name,
            "classes": [
                {
                    "category_id": category_ids[label],
                    "name": classes[label],
                    "pixels": pixels,
                    "share": pixels / labels.size,
                }
                for label, pixels in areas.items()
            ],
        }
    ]


def _rows(
    found: Detections,
    path: str,
    picture: str,
    classes: Sequence[str],
    category_ids: Sequence[int],
) -> Iterable[dict[str, Any]]:
    """Detections in the COCO results format, and with names for people."""
    boxes = xywh(found.boxes.double().numpy()).tolist()
    masks = segmentations(None if found.masks is None else encode(found.masks), len(boxes))
    for box, score, label, mask in zip(
        boxes, found.scores.tolist(), found.labels.tolist(), masks, strict=True
    ):
        yield {
            "image_id": path,
            "category_id": category_ids[label],
            "bbox": box,
            "score": score,
            "name": classes[label],
            "picture": picture,
            **mask,
        }


def _printable(path: str) -> str:
    """A path for a message: on one line, whatever is in the name."""
    return path if path.isprintable() else ascii(path)
