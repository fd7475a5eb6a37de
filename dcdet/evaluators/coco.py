"""COCO's average precision, by pycocotools or, where it is installed, faster-coco-eval."""

import contextlib
import importlib.util
import io
import logging
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools.mask import area as mask_area

from dcdet.datasets.records import Record, have_masks
from dcdet.errors import UserError
from dcdet.evaluators.results import Evaluator, Found, Json, Reader, segmentations, xywh
from dcdet.structures import Detections

Kind = Literal["bbox", "segm"]

log = logging.getLogger("dcdet.evaluators")


class COCOEvaluator(Evaluator):
    """AP over IoU 0.50:0.95, AP50, AP75, and AP of small, medium and large objects.

    Where the reader has masks, the same of masks, under "segm"; how large a detection is then goes
    by its mask. (pycocotools goes by the box where a results file has both: not the same three.)

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
        self.masks = have_masks(reader.records)

    def update(self, detections: Detections) -> None:
        """As any evaluator's; UserError where the data set has masks and the detections none."""
        if self.masks and detections.masks is None:
            what = "has masks, but the model finds boxes only"
            raise UserError(self.reader.name, what, "set masks: false, or a model.mask_head")
        super().update(detections)

    def result(self) -> Json:
        """The six figures and each class; None where there is nothing to find."""
        figures = self._figures("bbox")
        return {**figures, "segm": self._figures("segm")} if self.masks else figures

    def _figures(self, kind: Kind) -> Json:
        images = self.evaluated()
        # Equal scores are ranked by image id, as by the official tool, whatever the file's order.
        images.sort(key=lambda image: (isinstance(image[0].image_id, str), image[0].image_id))
        names = self.reader.classes
        precision = self._precision(images, kind)  # thresholds, recalls, classes, areas
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

    def _precision(self, images: list[tuple[Record, Found]], kind: Kind) -> NDArray[np.float64]:
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
            for annotations in (_objects(images), _detections(images, kind)):
                side = COCO()
                side.dataset = self._dataset(images, annotations)
                side.createIndex()
                sides.append(side)
            evaluation = COCOeval(*sides, iouType=kind)
            evaluation.params.maxDets = [self.max_dets]
            evaluation.evaluate()
            evaluation.accumulate()
        return np.asarray(evaluation.eval["precision"])[..., -1]

    def _dataset(self, images: list[tuple[Record, Found]], annotations: list[Json]) -> Json:
        sizes = [record.size for record, _ in images]
        return {
            "info": {},
            "images": [
                {"id": number, "height": height, "width": width}
                for number, (height, width) in enumerate(sizes, 1)
            ],
            "categories": [{"id": label} for label in range(1, len(self.reader.classes) + 1)],
            "annotations": annotations,
        }


# Inside, everything is numbered from 1: pycocotools takes a match with annotation id 0 for none.


def _objects(images: list[tuple[Record, Found]]) -> list[Json]:
    rows: list[Json] = []
    for number, (record, _) in enumerate(images, 1):
        truth, size = record.truth, list(record.size)
        counts = truth.run_lengths()
        masks = None if counts is None else [{"size": size, "counts": one} for one in counts]
        columns = (truth.xywh, truth.labels, truth.areas, truth.ignore)
        for box, label, area, ignore, mask in zip(
            *(c.tolist() for c in columns), segmentations(masks, len(truth.ids)), strict=True
        ):
            row = _row(number, label, box, area, len(rows) + 1)
            rows.append(row | {"iscrowd": int(ignore)} | mask)
    return rows


def _detections(images: list[tuple[Record, Found]], kind: Kind) -> list[Json]:
    rows: list[Json] = []
    for number, (_, found) in enumerate(images, 1):
        boxes, masks = xywh(found.boxes), found.masks
        areas = mask_area(masks) if kind == "segm" else boxes[:, 2] * boxes[:, 3]
        columns = (boxes, found.labels, found.scores, areas)
        for box, label, score, area, mask in zip(
            *(c.tolist() for c in columns), segmentations(masks, len(boxes)), strict=True
        ):
            row = _row(number, label, box, area, len(rows) + 1)
            rows.append(row | {"iscrowd": 0, "score": score} | mask)
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
