"""The two-stage detector: backbone, neck, region proposals, RoI head. B images."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dcdet import boxes as box_ops
from dcdet.errors import require
from dcdet.masks import paste
from dcdet.models.mimicking import cut_out, draw_foreground, mimicking_losses, whole_patches
from dcdet.models.postprocess import PostprocessSpec, select
from dcdet.models.targets import RoISamples
from dcdet.structures import Batch, Detections


class TwoStageDetector(nn.Module):
    """`forward` gives losses, `predict` gives detections.

    Args:
        backbone, neck, rpn, roi_head: built modules; the neck may be None.
        num_classes: without background.
        pixels: how boxes are clipped and rescaled (see boxes.py).
        pixel_mean, pixel_std: RGB, in units of 0..255.
        postprocess: the choice of final detections.
        mask_head: built, or None.
        delta_limit: how the heads bound box deltas (see boxes.decode).
    """

    # What the parts do stands in their own files; any class with the same verbs will do.
    backbone: Any
    neck: Any
    rpn: Any
    roi_head: Any
    mask_head: Any
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module | None,
        rpn: nn.Module,
        roi_head: nn.Module,
        num_classes: int,
        pixels: box_ops.Pixels,
        pixel_mean: list[float],
        pixel_std: list[float],
        postprocess: PostprocessSpec,
        mask_head: nn.Module | None = None,
        delta_limit: box_ops.DeltaLimit = "none",
    ) -> None:
        super().__init__()
        require(num_classes >= 1, "num_classes", "at least 1", num_classes)
        require(len(pixel_mean) == 3, "pixel_mean", "3 numbers", pixel_mean)
        require(
            len(pixel_std) == 3 and min(pixel_std) > 0, "pixel_std", "3 positive numbers", pixel_std
        )
        self.backbone, self.neck = backbone, neck
        self.rpn, self.roi_head, self.mask_head = rpn, roi_head, mask_head
        self.num_classes, self.pixels, self.postprocess = num_classes, pixels, postprocess
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses, whose sum is to be minimised, and statistics to show; all scalars."""
        features = self.features(batch)
        raw = self.rpn(features)
        losses = self.rpn.losses(raw, batch)
        proposals = self.rpn.proposals(raw, batch.sizes, batch.scales)
        samples = self.roi_head.sample(proposals, batch)
        output = self.roi_head(features, samples.rois)
        roi_losses, stats = self.roi_head.losses(output, samples, len(batch.sizes))
        losses |= roi_losses
        if self.roi_head.mimicking is not None:
            losses |= self._mimicking_losses(batch, samples, output.features)
        if self.mask_head is not None:
            positive = samples.foreground()
            logits = self.mask_head(features, positive.rois)
            mask_losses, mask_stats = self.mask_head.losses(logits, positive, batch)
            losses, stats = losses | mask_losses, stats | mask_stats
        return losses, stats

    def _mimicking_losses(
        self, batch: Batch, samples: RoISamples, features: Tensor
    ) -> dict[str, Tensor]:
        head, spec = self.roi_head, self.roi_head.mimicking
        drawn = draw_foreground(samples, batch.seeds, spec.rois)
        features = alone = features[drawn]
        if len(drawn):
            patches = cut_out(self.normalised(batch), samples.rois[drawn], spec.size)
            rois = whole_patches(len(drawn), spec.size, samples.rois)
            # Cut-outs have statistics of their own, which must not enter those of testing.
            training = self.backbone.training
            self.backbone.eval()
            alone = head(self.maps(patches), rois).features
            self.backbone.train(training)
        return mimicking_losses(features, alone, head.mimic_score, samples.labels[drawn], spec)

    @torch.no_grad()
    def predict(self, *views: Batch) -> list[Detections]:
        """Detections of each image, in the original image's pixels.

        Several views hold the same images, at other scales or mirrored: detections are chosen once,
        among the candidates of all of them. Masks are those of the first view.
        """
        features = self.features(views[0])
        candidates = [self.candidates(views[0], features)]
        if self.mask_head is None:
            del features
        candidates += [self.candidates(view) for view in views[1:]]
        result = []
        for target, *parts in zip(views[0].targets, *candidates, strict=True):
            boxes, scores = map(torch.cat, zip(*parts, strict=True))
            result.append(Detections(target.image_id, *select(boxes, scores, self.postprocess)))
        return result if self.mask_head is None else self._with_masks(result, features, views[0])

    def _with_masks(
        self, detections: list[Detections], features: dict[str, Tensor], batch: Batch
    ) -> list[Detections]:
        """The same detections of each image with their masks."""
        rois = []
        for image, found in enumerate(detections):
            flip = batch.flips and batch.flips[image]
            width = batch.targets[image].size[1]
            boxes = box_ops.flip(found.boxes, width) if flip else found.boxes
            boxes = box_ops.rescale(boxes, batch.scales[image], self.pixels)
            rois.append(nn.functional.pad(boxes, (1, 0), value=image))
        logits = self.mask_head(features, torch.cat(rois))
        result = []
        for image, part in enumerate(logits.split([len(found.boxes) for found in detections])):
            found, target = detections[image], batch.targets[image]
            cells = part[torch.arange(len(part), device=part.device), found.labels].sigmoid()
            if batch.flips and batch.flips[image]:
                cells = cells.flip(2)
            masks = paste(cells, found.boxes, target.size, self.mask_head.paste)
            result.append(replace(found, masks=masks))
        return result

    @torch.no_grad()
    def candidates(
        self, batch: Batch, features: dict[str, Tensor] | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Boxes (R, 4) or (R, K, 4) in the original image's pixels, and scores (R, K), of all the
        proposals of each image."""
        features = self.features(batch) if features is None else features
        proposals = self.rpn.proposals(self.rpn(features), batch.sizes, batch.scales)
        counts = [len(boxes) for boxes in proposals]
        rois = torch.cat(
            [nn.functional.pad(boxes, (1, 0), value=image) for image, boxes in enumerate(proposals)]
        )
        scores, boxes = self.roi_head.scores_and_boxes(self.roi_head(features, rois), rois)
        result = []
        per_image = zip(
            boxes.split(counts), scores.split(counts), batch.sizes, batch.scales,
            batch.flips or [False] * len(counts), batch.targets, strict=True,
        )  # fmt: skip
        for image_boxes, image_scores, size, scale, flip, target in per_image:
            image_boxes = box_ops.clip(image_boxes, size, self.pixels)
            image_boxes = box_ops.rescale(image_boxes, box_ops.inverse(scale), self.pixels)
            if flip:
                image_boxes = box_ops.flip(image_boxes, target.size[1])
            result.append((image_boxes, image_scores))
        return result

    def features(self, batch: Batch) -> dict[str, Tensor]:
        """The maps of the normalised images."""
        return self.maps(self.normalised(batch))

    def normalised(self, batch: Batch) -> Tensor:
        """What the backbone sees, (B, 3, H, W) float32; padding is 0."""
        return normalised(batch, self.pixel_mean, self.pixel_std)

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) -> maps by name."""
        maps = self.backbone(x.contiguous(memory_format=torch.channels_last))
        return maps if self.neck is None else self.neck(maps)


def normalised(batch: Batch, mean: Tensor, std: Tensor) -> Tensor:
    """The images (B, 3, H, W) float32, less mean and by std (3, 1, 1); padding is 0."""
    x = (batch.images.float() - mean) / std
    for image, (height, width) in enumerate(batch.sizes):
        x[image, :, height:] = 0
        x[image, :, :, width:] = 0
    return x
