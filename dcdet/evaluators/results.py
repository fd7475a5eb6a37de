"""What the evaluators share: detections collected image by image, and their JSON form."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray

from dcdet.datasets.records import Record
from dcdet.datasets.transforms import read_file
from dcdet.errors import UserError
from dcdet.masks import clean_segmentation, decode, encode
from dcdet.structures import Detections

Json = dict[str, Any]
Row = tuple[list[float], float, int, bytes]  # box, score, label, run lengths of the mask


class Reader(Protocol):
    """What an evaluator needs of a data set; any reader of dcdet/datasets."""

    name: str
    classes: list[str]
    category_ids: list[int]
    records: list[Record]


@dataclass(frozen=True, eq=False)
class Found:
    """What was found in one image, as arrays: D detections.

    Shapes: boxes (D, 4) float64 continuous xyxy, scores (D,) float64, labels (D,) int64; masks: D
    objects with `size` and `counts` (masks.py), or None.
    """

    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    labels: NDArray[np.int64]
    masks: list[Json] | None = None


class Evaluator:
    """Collects detections; a subclass adds `result`. Only images that were updated are evaluated.

    `found` has what was found in each image, by its id, small enough to be sent between processes;
    `dropped` counts the rows that were left out because a number in them was not finite.
    """

    dropped_are = "detections that were not finite do not count"
    class_figure: str | None = None  # the figure of each class that testing shows

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.dropped = 0
        self.found: dict[int | str, Found] = {}
        self._order = {record.image_id: place for place, record in enumerate(reader.records)}

    def update(self, detections: Detections) -> None:
        """Add one image's detections; a second call for an image replaces the first.

        Raises ValueError for an image or a label that the data set does not have, and for masks of
        another size than the image's.
        """
        if detections.image_id not in self._order:
            raise ValueError(f"image {detections.image_id!r} is not in {self.reader.name}")
        boxes = detections.boxes.detach().cpu().double().numpy().reshape(-1, 4)
        scores = detections.scores.detach().cpu().double().numpy()
        labels = detections.labels.detach().cpu().numpy().astype(np.int64)
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.reader.classes):
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise ValueError(f"label {wrong} with {len(self.reader.classes)} classes")
        finite = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
        self.dropped += int((~finite).sum())
        masks = None
        if detections.masks is not None:
            shape = tuple(detections.masks.shape)
            size = self.reader.records[self._order[detections.image_id]].size
            if shape[0] != len(labels) or size not in (shape[1:], (0, 0)):
                raise ValueError(f"masks of shape {shape}, wanted {len(labels)} of {size} pixels")
            masks = [
                mask for mask, good in zip(encode(detections.masks), finite, strict=True) if good
            ]
        self.found[detections.image_id] = Found(
            boxes[finite], scores[finite], labels[finite], masks
        )

    def evaluated(self) -> list[tuple[Record, Found]]:
        """Every evaluated image with its detections, in the data set's order."""
        places = sorted((self._order[image_id], image_id) for image_id in self.found)
        return [(self.reader.records[place], self.found[image_id]) for place, image_id in places]

    def image_files(self, _detections: Detections) -> dict[str, bytes]:
        """What is to be written for one image, by its path in the output folder: nothing."""
        return {}

    def result_files(self) -> Json:
        """What is to be written for the whole data set, JSON values by file name."""
        return {"detections.json": self.detections_json()}

    def detections_json(self) -> list[Json]:
        """Every detection in the COCO results format, with the data set's own ids."""
        return [
            {
                "image_id": record.image_id,
                "category_id": self.reader.category_ids[label],
                "bbox": box,
                "score": score,
                **mask,
            }
            for record, found in self.evaluated()
            for box, score, label, mask in zip(
                xywh(found.boxes).tolist(), found.scores.tolist(), found.labels.tolist(),
                segmentations(found.masks, len(found.labels)), strict=True,
            )
        ]  # fmt: skip


def xywh(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Boxes (N, 4) xyxy -> (N, 4) x, y, width, height; a width below 0 becomes 0."""
    return np.concatenate([boxes[:, :2], (boxes[:, 2:] - boxes[:, :2]).clip(min=0)], axis=1)


def segmentations(masks: list[Json] | None, number: int) -> list[Json]:
    """What the masks, if any, add to so many rows of a results file."""
    return [{} for _ in range(number)] if masks is None else [{"segmentation": m} for m in masks]


def read_detections(path: str | Path, reader: Reader) -> Iterator[Detections]:
    """A results file in the COCO format -> the detections of each image named in it, in turn.

    Boxes come back continuous xyxy, best score first, rows with equal scores in the file's order;
    masks are made image by image. Raises UserError that names file, index and field before the
    first.
    """
    try:
        rows = json.loads(read_file(str(path)))
    except OSError as error:
        raise UserError(path, error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8
        raise UserError(path, f"is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise UserError(path, f"holds a {type(rows).__name__}, wanted a list of detections")
    sizes = {record.image_id: record.size for record in reader.records}
    labels = {category: label for label, category in enumerate(reader.category_ids)}
    grouped: dict[int | str, list[Row]] = {}
    masked = bool(rows) and isinstance(rows[0], dict) and "segmentation" in rows[0]
    for index, row in enumerate(rows):
        where = f"{path}: [{index}]"
        if not isinstance(row, dict):
            raise UserError(where, f"is a {type(row).__name__}, wanted an object")
        image_id, category = row.get("image_id"), row.get("category_id")
        if not _is_id(image_id) or image_id not in sizes:
            raise UserError(f"{where}.image_id", f"{image_id!r:.60} is not in {reader.name}")
        if not _is_id(category) or category not in labels:
            raise UserError(f"{where}.category_id", f"{category!r:.60} is not in {reader.name}")
        box, score = row.get("bbox"), row.get("score")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise UserError(f"{where}.bbox", f"is {box!r:.60}, wanted four finite numbers")
        if not _is_number(score):
            raise UserError(f"{where}.score", f"is {score!r:.60}, wanted a finite number")
        x, y, width, height = map(float, box)
        if width < 0 or height < 0:
            raise UserError(f"{where}.bbox", f"is {box!r:.60}", "wanted x, y, width, height")
        if ("segmentation" in row) != masked:
            what = f"is {'missing' if masked else 'there'}, unlike in [0]"
            raise UserError(f"{where}.segmentation", what)
        mask = b""
        if masked:
            segmentation = row["segmentation"]
            if not isinstance(segmentation, dict):
                raise UserError(f"{where}.segmentation", "must be run lengths: size and counts")
            counts, fault = clean_segmentation(segmentation, sizes[image_id])
            if counts is None:
                raise UserError(f"{where}.segmentation", fault.removesuffix(" (dropped)"))
            mask = counts
        found = ([x, y, x + width, y + height], float(score), labels[category], mask)
        grouped.setdefault(image_id, []).append(found)
    return (
        _to_detections(image_id, sorted(group, key=lambda row: -row[1]), masked, sizes[image_id])
        for image_id, group in grouped.items()
    )


def _to_detections(
    image_id: int | str, rows: list[Row], masked: bool, size: tuple[int, int]
) -> Detections:
    boxes, scores, labels, masks = zip(*rows, strict=True)
    return Detections(
        image_id,
        torch.tensor(boxes, dtype=torch.float64),
        torch.tensor(scores, dtype=torch.float64),
        torch.tensor(labels),
        torch.from_numpy(decode(masks, size)) if masked else None,
    )


def _is_id(value: object) -> TypeGuard[int | str]:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    # Sums and areas of numbers up to 1e100 stay finite.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100
