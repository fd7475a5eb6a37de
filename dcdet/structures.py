"""The values that travel through dcdet; every one frozen.

Conventions, stated here once for the whole project:

* An image is RGB. Sizes are (height, width).
* Boxes are continuous xyxy in absolute pixels: a box covers [x1, x2) x [y1, y2), width = x2 - x1.
  The 2017 systems' inclusive boxes (width = x2 - x1 + 1) are the same boxes with 1 added to x2, y2.
* Labels are 0..K-1. Background exists inside heads only; in segmentation it is a class like any
  other, where a data set has one. Data set category ids exist in the readers and evaluators only.
* In a label map UNLABELLED stands where nothing is to be learnt, measured, or was found.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dcdet.boxes import Scale

UNLABELLED = 255


@dataclass(frozen=True)
class Target:
    """What is known about one image.

    Shapes: boxes (N, 4) float32, labels (N,) int64, ignored (M, 4) float32: regions that are
    neither object nor background (COCO crowd, VOC difficult). masks (N, H, W) bool of an image of
    (H, W) network pixels before the batch is padded; None without them, and in testing.
    label_map (H, W) uint8 of the same: each pixel's label, or UNLABELLED, in segmentation; None in
    testing.
    """

    image_id: int | str
    size: tuple[int, int]  # of the original image, (h, w)
    boxes: Tensor
    labels: Tensor
    ignored: Tensor
    masks: Tensor | None = None
    label_map: Tensor | None = None

    @classmethod
    def without_objects(
        cls, image_id: int | str, size: tuple[int, int], label_map: Tensor | None = None
    ) -> "Target":
        """What is known where there are no boxes."""
        nothing = torch.zeros(0, 4)
        labels = torch.zeros(0, dtype=torch.int64)
        return cls(image_id, size, nothing, labels, nothing, label_map=label_map)


@dataclass(frozen=True)
class Sample:
    """One image ready for the network: image (3, H, W), target in that image's pixels.

    Pixels are in 0..255: uint8, or float32 where they were resized so. `scale` is network pixels
    per original pixel. `seed` is derived from run seed, epoch and place in the data set; every
    random choice about this image is drawn from it, so that results do not depend on the number of
    workers or processes. `flip`: mirrored left to right, boxes too.
    """

    image: Tensor
    target: Target
    scale: Scale
    seed: int
    flip: bool = False


@dataclass(frozen=True)
class Batch:
    """B images padded right and bottom to one size: images (B, 3, Hp, Wp) uint8 or float32.

    `sizes` are the images' own network sizes before padding; lists have length B. `skipped` names
    each file that could not be used for this batch, and why; in training another took its place.
    `flips` tells which images are mirrored; empty: none.
    """

    images: Tensor
    sizes: list[tuple[int, int]]
    targets: list[Target]
    scales: list[Scale]
    seeds: list[int]
    skipped: tuple[tuple[str, str], ...] = ()
    flips: tuple[bool, ...] = ()

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        targets = [
            replace(
                t,
                boxes=t.boxes.to(device, non_blocking=True),
                labels=t.labels.to(device, non_blocking=True),
                ignored=t.ignored.to(device, non_blocking=True),
                masks=None if t.masks is None else t.masks.to(device, non_blocking=True),
                label_map=None
                if t.label_map is None
                else t.label_map.to(device, non_blocking=True),
            )
            for t in self.targets
        ]
        return replace(self, images=self.images.to(device, non_blocking=True), targets=targets)


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best score first, in the original image's pixels.

    Shapes: boxes (N, 4) float32, scores (N,) float32 in [0, 1], labels (N,) int64, masks (N, H, W)
    bool of the original image's size, or None.
    """

    image_id: int | str
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def cpu(self) -> "Detections":
        """The same detections with their tensors on the CPU."""
        masks = None if self.masks is None else self.masks.cpu()
        return Detections(
            self.image_id, self.boxes.cpu(), self.scores.cpu(), self.labels.cpu(), masks
        )


@dataclass(frozen=True)
class Segmentation:
    """The label of every pixel of one image.

    Shapes: labels (H, W) uint8 in the original image's pixels, network_labels (H', W') uint8 in
    those of the network's first view; UNLABELLED where the scores were not finite.
    """

    image_id: int | str
    labels: Tensor
    network_labels: Tensor

    def cpu(self) -> "Segmentation":
        """The same labels on the CPU."""
        return Segmentation(self.image_id, self.labels.cpu(), self.network_labels.cpu())
