"""Pascal VOC's average precision, by the rules of the 2017 release's pascal_voc_eval.py.

Boxes here are VOC's own: pixels count from 1 and a box includes its last pixel, so its width is
x2 - x1 + 1. The continuous box (x1, y1, x2, y2) is (x1 + 1, y1 + 1, x2, y2) there.
G objects and D detections of one class in one image.
"""

import re
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dcdet.datasets.records import Truth
from dcdet.evaluators.results import Evaluator, Found, Json, Reader

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]
Verdicts = NDArray[np.int8]
WRONG, HIT, IGNORED = 0, 1, 2
IOU_THRESHOLDS = (0.5, 0.7)


class VOCEvaluator(Evaluator):
    """mAP at IoU above 0.5 and above 0.7.

    Args:
        reader: the data set; COCO's crowd regions count as difficult objects.
        metric: 11point (VOC 2007), area under the monotone curve (from 2010 on), or auto, which
            goes by the year in the image set's name ("2007_test"); area where there is none.
        through_text: first round scores to 3 decimals and corners to 1, as the release does by
            writing its detections to text files.
    """

    def __init__(
        self,
        reader: Reader,
        metric: Literal["11point", "area", "auto"] = "auto",
        through_text: bool = True,
    ) -> None:
        super().__init__(reader)
        years = [int(year) for year in re.findall(r"\b((?:19|20)\d\d)_", reader.name)]
        if metric == "auto":
            metric = "11point" if years and max(years) < 2010 else "area"
        self.eleven_points = metric == "11point"
        self.through_text = through_text

    def result(self) -> Json:
        """Means over the classes that have objects, and each class; None where there are none."""
        images = [(record.truth, self._as_judged(found)) for record, found in self.evaluated()]
        per_class = {
            name: self._judge_class(images, label) for label, name in enumerate(self.reader.classes)
        }
        means: Json = {}
        for threshold in IOU_THRESHOLDS:
            known = [figures[f"AP@{threshold}"] for figures in per_class.values()]
            known = [value for value in known if value is not None]
            means[f"mAP@{threshold}"] = float(np.mean(known)) if known else None
        return {**means, "per_class": per_class}

    def _as_judged(self, found: Found) -> Found:
        """Detections with VOC's corners, rounded if asked for, best first."""
        boxes = found.boxes + np.array([1.0, 1.0, 0.0, 0.0])
        scores = found.scores
        if self.through_text:
            # Python's round is exact decimal rounding, as "%.1f" is; numpy's is not.
            corners = [round(value, 1) for value in boxes.ravel().tolist()]
            boxes = np.array(corners, dtype=np.float64).reshape(-1, 4)
            scores = np.array([round(score, 3) for score in scores.tolist()], dtype=np.float64)
        order = np.argsort(-scores, kind="stable")
        return Found(boxes[order], scores[order], found.labels[order])

    def _judge_class(self, images: list[tuple[Truth, Found]], label: int) -> Json:
        num_objects = 0
        scores: list[Array] = []
        verdicts: dict[float, list[Verdicts]] = {t: [] for t in IOU_THRESHOLDS}
        for truth, found in images:
            chosen, wanted = found.labels == label, truth.labels == label
            difficult = truth.ignore[wanted]
            num_objects += int((~difficult).sum())
            if not chosen.any():
                continue
            scores.append(found.scores[chosen])
            overlaps = iou(found.boxes[chosen], _corners(truth.xywh[wanted]))
            for threshold in IOU_THRESHOLDS:
                verdicts[threshold].append(match(overlaps, difficult, threshold))
        if num_objects == 0:
            return {**{f"AP@{t}": None for t in IOU_THRESHOLDS}, "objects": 0}
        order = np.argsort(-np.concatenate([np.zeros(0), *scores]), kind="stable")
        figures: Json = {}
        for threshold in IOU_THRESHOLDS:
            ranked = np.concatenate([np.zeros(0, np.int8), *verdicts[threshold]])[order]
            recall, precision = curve(ranked[ranked != IGNORED] == HIT, num_objects)
            figures[f"AP@{threshold}"] = average_precision(recall, precision, self.eleven_points)
        return {**figures, "objects": num_objects}


def _corners(xywh: Array) -> Array:
    """Continuous x, y, width, height -> VOC's corners (N, 4)."""
    return np.concatenate([xywh[:, :2] + 1, xywh[:, :2] + xywh[:, 2:]], axis=1)


def iou(boxes: Array, others: Array) -> Array:
    """Intersection over union by VOC's inclusive corners: (D, 4), (G, 4) -> (D, G)."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    inter = (high - low + 1).clip(min=0).prod(axis=2)
    area, other_area = ((b[:, 2:] - b[:, :2] + 1).prod(axis=1) for b in (boxes, others))
    # A detection turned inside out has an area of no meaning, but no intersection either.
    union: Array = np.where(inter > 0, area[:, None] + other_area[None, :] - inter, 1.0)
    overlaps: Array = inter / union
    return overlaps


def match(overlaps: Array, difficult: Flags, threshold: float) -> Verdicts:
    """Give each detection its best object: overlaps (D, G), best detection first -> (D,).

    HIT for the first one of an object, IGNORED for any of a difficult object, WRONG for the rest:
    a second detection of an object is wrong even if another object, overlapped less, is free.
    """
    verdicts = np.full(len(overlaps), WRONG, dtype=np.int8)
    if overlaps.shape[1] == 0:
        return verdicts
    taken: set[int] = set()
    best = overlaps.argmax(axis=1)
    for row in np.flatnonzero(overlaps.max(axis=1) > threshold).tolist():
        thing = int(best[row])
        if difficult[thing]:
            verdicts[row] = IGNORED
        elif thing not in taken:
            verdicts[row] = HIT
            taken.add(thing)
    return verdicts


def curve(hits: Flags, num_objects: int) -> tuple[Array, Array]:
    """Recall and precision (D,) after each detection: hits (D,), best first."""
    found = np.cumsum(hits, dtype=np.float64)
    return found / num_objects, found / np.arange(1, len(hits) + 1)


def average_precision(recall: Array, precision: Array, eleven_points: bool) -> float:
    """The area under the curve made monotone, or the mean precision at 11 recalls."""
    # Best precision at this recall or a higher one.
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if eleven_points:
        # arange as in the release: its 0.3 is 0.30000000000000004, which a recall of 3/10 misses.
        points = np.searchsorted(recall, np.arange(0.0, 1.1, 0.1), side="left")
        return float(np.append(envelope, 0.0)[points].sum() / 11)
    steps = np.diff(recall, prepend=0.0)
    return float((steps * envelope).sum())
