"""COCO's average precision, by pycocotools or, where it is installed, faster-coco-eval."""

import contextlib
import importlib.util
import io
import logging
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dcdet.datasets.records import Record
from dcdet.evaluators.results import Evaluator, Found, Json, Reader, xywh

log = logging.getLogger("dcdet.evaluators")


class COCOEvaluator(Evaluator):
    """AP over IoU 0.50:0.95, AP50, AP75, and AP of small, medium and large objects.

    Args:
        reader: the data set; VOC's difficult objects count as crowd regions.
        max_dets: only the best this many of an image count, of each class, as in COCO.
        backend: auto takes faster-coco-eval where it is installed; the figures are the same.
    """

    def __init__(
        self,
        reader: Reader,
        max_dets: int = 100,
        backend: Literal["auto", "pycocotools", "faster-coco-eval"] = "auto",
    ) -> None:
        super().__init__(reader)
        if max_dets < 1:
            raise ValueError(f"max_dets: must be at least 1, got {max_dets}")
        installed = importlib.util.find_spec("faster_coco_eval") is not None
        if backend == "faster-coco-eval" and not installed:
            raise ValueError("backend: faster-coco-eval is not installed: pip install it, or auto")
        self.max_dets = max_dets
        self.fast = installed and backend != "pycocotools"

    def result(self) -> Json:
        """The six figures and each class; None where there is nothing to find."""
        images = self.evaluated()
        # Equal scores are ranked by image id, as by the official tool, whatever the file's order.
        images.sort(key=lambda image: (isinstance(image[0].image_id, str), image[0].image_id))
        names = self.reader.classes
        precision = self._precision(images)  # thresholds, recalls, classes, areas
        counted = [record.truth.labels[~record.truth.ignore] for record, _ in images]
        objects = np.bincount(np.concatenate([*counted, np.zeros(0, int)]), minlength=len(names))
        return {
            "AP": _mean(precision[..., 0]),
            "AP50": _mean(precision[0, ..., 0]),
            "AP75": _mean(precision[5, ..., 0]),
            "APs": _mean(precision[..., 1]),
            "APm": _mean(precision[..., 2]),
            "APl": _mean(precision[..., 3]),
            "per_class": {
                name: {
                    "AP": _mean(precision[:, :, label, 0]),
                    "AP50": _mean(precision[0, :, label, 0]),
                    "objects": int(objects[label]),
                }
                for label, name in enumerate(names)
            },
        }

    def _precision(self, images: list[tuple[Record, Found]]) -> NDArray[np.float64]:
        """COCOeval's array of precisions (10 IoU thresholds, 101 recalls, K, 4 areas)."""
        if not images:
            return np.full((10, 101, len(self.reader.classes), 4), -1.0)
        if self.fast:
            from faster_coco_eval import COCO
            from faster_coco_eval import COCOeval_faster as COCOeval
        else:
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval
        # Both print their progress to standard output.
        with contextlib.redirect_stdout(io.StringIO()):
            sides = []
            for annotations in (_objects(images), _detections(images)):
                side = COCO()
                side.dataset = self._dataset(len(images), annotations)
                side.createIndex()
                sides.append(side)
            evaluation = COCOeval(*sides, iouType="bbox")
            evaluation.params.maxDets = [self.max_dets]
            evaluation.evaluate()
            evaluation.accumulate()
        return np.asarray(evaluation.eval["precision"])[..., -1]

    def _dataset(self, num_images: int, annotations: list[Json]) -> Json:
        return {
            "info": {},
            "images": [{"id": number} for number in range(1, num_images + 1)],
            "categories": [{"id": label} for label in range(1, len(self.reader.classes) + 1)],
            "annotations": annotations,
        }


# Inside, everything is numbered from 1: pycocotools takes a match with annotation id 0 for none.


def _objects(images: list[tuple[Record, Found]]) -> list[Json]:
    rows: list[Json] = []
    for number, (record, _) in enumerate(images, 1):
        truth = record.truth
        columns = (truth.xywh, truth.labels, truth.areas, truth.ignore)
        for box, label, area, ignore in zip(*(c.tolist() for c in columns), strict=True):
            rows.append(_row(number, label, box, area, len(rows) + 1) | {"iscrowd": int(ignore)})
    return rows


def _detections(images: list[tuple[Record, Found]]) -> list[Json]:
    rows: list[Json] = []
    for number, (_, found) in enumerate(images, 1):
        columns = (xywh(found.boxes), found.labels, found.scores)
        for box, label, score in zip(*(c.tolist() for c in columns), strict=True):
            area = box[2] * box[3]
            row = _row(number, label, box, area, len(rows) + 1)
            rows.append(row | {"iscrowd": 0, "score": score})
    return rows


def _row(image: int, label: int, box: list[float], area: float, number: int) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image,
        "category_id": label + 1,
        "bbox": box,
        "area": area,
    }


def _mean(precision: NDArray[np.float64]) -> float | None:
    """The mean over what is defined; COCOeval marks the rest with -1."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None
