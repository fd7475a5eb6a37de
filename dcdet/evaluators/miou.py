"""Mean intersection over union of segmentations, by the rules of the 2017 release.

K classes. A confusion matrix (K, K + 1) counts pixels, true label by predicted label; its last
column is those without a prediction.
"""

from typing import Any, Literal, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from dcdet.datasets.label_maps import BadLabels, LabelledImage, LabelMap, check_size
from dcdet.errors import UserError, require
from dcdet.structures import UNLABELLED, Segmentation
from dcdet.visualize.segmentation import encode_png, palette

Json = dict[str, Any]
Counts = NDArray[np.int64]


class Reader(Protocol):
    """What the evaluator needs of a data set; any segmentation reader of dcdet/datasets."""

    PALETTE: Any
    name: str
    classes: list[str]
    category_ids: list[int]
    records: list[LabelledImage]

    def label_map(self, record: LabelledImage) -> LabelMap | None:
        """The labels of an image."""


class MIoUEvaluator:
    """IoU of each class over all pixels of all images, and the mean.

    Args:
        reader: the data set.
        compare_at: whose pixels are compared: the original "image"'s, to which predictions are
            resized, as for Cityscapes; or the "network"'s, to which label maps are resized, as the
            release does for VOC. Both by the nearest pixel.
        predictions: what is written of each image: "palette", a PNG of labels in colours; "ids", a
            grey PNG of the data set's own ids, as evaluation servers want them; None, nothing.
    Attributes:
        found: each image's confusion matrix by its id, None where nothing is known of the image.
        dropped: pixels whose scores were not finite.
    """

    task = "segmentation"
    dropped_are = "pixels without a finite score count as wrong"
    class_figure = "IoU"

    def __init__(
        self,
        reader: Reader,
        compare_at: Literal["image", "network"] = "image",
        predictions: Literal["palette", "ids"] | None = "palette",
    ) -> None:
        greatest = max(reader.category_ids) if predictions == "ids" else 0
        wanted = f"palette or null, as {reader.name} has id {greatest}"
        require(greatest <= 255, "predictions", wanted, predictions)
        self.reader, self.compare_at, self.predictions = reader, compare_at, predictions
        self.found: dict[int | str, Counts | None] = {}
        self.dropped = 0
        self._records: dict[int | str, LabelledImage] = {
            record.image_id: record for record in reader.records
        }

    def update(self, segmentation: Segmentation) -> None:
        """Add one image; a second call for an image replaces the first.

        Raises ValueError for an image that the data set does not have, UserError for a label map
        that cannot be used.
        """
        record = self._records.get(segmentation.image_id)
        if record is None:
            raise ValueError(f"image {segmentation.image_id!r} is not in {self.reader.name}")
        labels = segmentation.labels.numpy()
        self.dropped += int((segmentation.network_labels == UNLABELLED).sum())
        try:
            truth = self.reader.label_map(record)
            if truth is not None:
                check_size(truth, labels.shape, record)
        except BadLabels as error:
            raise UserError(error.path, str(error)) from error
        if truth is None:
            self.found[record.image_id] = None
            return
        if self.compare_at == "network":
            labels = segmentation.network_labels.numpy()
            truth = cv2.resize(truth, labels.shape[::-1], interpolation=cv2.INTER_NEAREST)
        self.found[record.image_id] = confusion(truth, labels, len(self.reader.classes))

    def result(self) -> Json:
        """`mIoU` is the mean over all classes, one that occurs nowhere counting as 0, as in the
        release; `mIoU_present` over those that occur, as in Cityscapes' own evaluation."""
        known = [counts for counts in self.found.values() if counts is not None]
        number = len(self.reader.classes)
        total = sum(known, np.zeros((number, number + 1), dtype=np.int64))
        right = np.diag(total)
        union = total.sum(1) + total[:, :number].sum(0) - right
        iou = right / np.maximum(1, union)
        wanted, labelled = total.sum(1), total.sum()
        present = union > 0
        recall = right[wanted > 0] / wanted[wanted > 0]
        return {
            "mIoU": float(iou.mean()) if labelled else None,
            "mIoU_present": float(iou[present].mean()) if labelled else None,
            "pixel_accuracy": float(right.sum() / labelled) if labelled else None,
            "mean_accuracy": float(recall.mean()) if labelled else None,
            "per_class": {
                name: {"IoU": float(iou[label]) if present[label] else None,
                       "pixels": int(wanted[label])}
                for label, name in enumerate(self.reader.classes)
            },
        }  # fmt: skip

    def image_files(self, segmentation: Segmentation) -> dict[str, bytes]:
        """What is to be written for one image, by its path in the output folder."""
        labels = segmentation.labels.numpy()
        if self.predictions is None:
            return {}
        if self.predictions == "palette":
            content = encode_png(labels, palette(self.reader.PALETTE, len(self.reader.classes)))
        else:
            ids = np.zeros(256, dtype=np.uint8)
            ids[: len(self.reader.classes)] = self.reader.category_ids
            content = encode_png(ids[labels])
        return {f"predictions/{segmentation.image_id}.png": content}

    def result_files(self) -> Json:
        """What is to be written for the whole data set: nothing."""
        return {}


def confusion(truth: LabelMap, labels: LabelMap, number: int) -> Counts:
    """Pixels by true and by predicted label (K, K + 1), without the UNLABELLED ones of `truth`."""
    known = truth != UNLABELLED
    truth, labels = truth[known].astype(np.int64), np.minimum(labels[known], number)
    cells = np.bincount(truth * (number + 1) + labels, minlength=number * (number + 1))
    return cells.reshape(number, number + 1)
