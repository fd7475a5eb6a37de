"""DeepLab: a dilated backbone, two 1x1 convolutions, and bilinear upsampling. Deformable DeepLab is
the same on a backbone with deformable layers.

B images of H x W network pixels, K classes, stride S. Source: Chen et al., Semantic Image
Segmentation with Deep Convolutional Nets and Fully Connected CRFs, as in deeplab/symbols of the
2017 release: without its CRF, or spatial pyramids.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcdet.errors import require
from dcdet.models.init import init_layers
from dcdet.models.two_stage import normalised
from dcdet.structures import UNLABELLED, Batch, Segmentation

LEAST_TILE = 16  # pixels; of much less a backbone leaves no map


@dataclass(frozen=True)
class TileSpec:
    """Large images are segmented in tiles of `size` (h, w) that overlap by `overlap` pixels or
    more; where they do, their probabilities are averaged."""

    size: tuple[int, int]
    overlap: int

    def __post_init__(self) -> None:
        require(min(self.size) >= LEAST_TILE, "size", f"at least {LEAST_TILE}", self.size)
        wanted = f"from 0 to {min(self.size) - 1}"
        require(0 <= self.overlap < min(self.size), "overlap", wanted, self.overlap)


class DeepLab(nn.Module):
    """`forward` gives losses, `predict` gives segmentations.

    Args:
        backbone: built.
        num_classes: with background, where the data set has that class.
        pixel_mean, pixel_std: RGB, in units of 0..255.
        in_feature: the backbone's map that is classified.
        channels: of the layer between that and the scores.
        init_std: of the normal distribution that the two layers' weights are drawn from.
        tiles: how large images are cut in testing; None: never.
    """

    task = "segmentation"
    backbone: Any
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        pixel_mean: list[float],
        pixel_std: list[float],
        in_feature: str,
        channels: int,
        init_std: float,
        tiles: TileSpec | None = None,
    ) -> None:
        super().__init__()
        require(2 <= num_classes <= 254, "num_classes", "from 2 to 254", num_classes)
        require(len(pixel_mean) == 3, "pixel_mean", "3 numbers", pixel_mean)
        require(
            len(pixel_std) == 3 and min(pixel_std) > 0, "pixel_std", "3 positive numbers", pixel_std
        )
        self.backbone = backbone
        known = self.backbone.channels
        require(in_feature in known, "in_feature", f"one of {', '.join(known)}", in_feature)
        require(channels >= 1, "channels", "positive", channels)
        self.num_classes, self.in_feature, self.tiles = num_classes, in_feature, tiles
        self.stride = self.backbone.strides[in_feature]
        self.fc6 = nn.Conv2d(known[in_feature], channels, 1)
        self.score = nn.Conv2d(channels, num_classes, 1)
        init_layers(self.fc6, self.score, std=init_std)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss, to be minimised: the cross entropy averaged over the labelled pixels of each
        image, 0 where there are none, and over images; and statistics to show; all scalars."""
        labels = label_maps(batch)
        logits = self.logits(self.normalised(batch))
        loss = F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="none")
        labelled = labels != UNLABELLED
        loss = (loss.sum((1, 2)) / labelled.sum((1, 2)).clamp(min=1)).mean()
        right = ((logits.argmax(1) == labels) & labelled).sum()
        return {"segmentation": loss}, {"accuracy": right / labelled.sum().clamp(min=1)}

    @torch.no_grad()
    def predict(self, *views: Batch) -> list[Segmentation]:
        """The labels of each image.

        Several views hold the same images, at other scales or mirrored: their probabilities are
        averaged, in the pixels of the first view.
        """
        sums = self.probabilities(views[0])
        for view in views[1:]:
            for total, other in zip(sums, self.probabilities(view), strict=True):
                size = total.shape[1:]
                total += F.interpolate(other[None], size, mode="bilinear")[0]
        result = []
        for total, target in zip(sums, views[0].targets, strict=True):
            best, labels = total.max(0)
            labels = torch.where(best.isfinite(), labels, UNLABELLED).byte()
            result.append(Segmentation(target.image_id, nearest(labels, target.size), labels))
        return result

    @torch.no_grad()
    def probabilities(self, batch: Batch) -> list[Tensor]:
        """Of each image, (K, H, W) without the batch's padding; mirrored images are turned back."""
        x = self.normalised(batch)
        result = []
        for image, (height, width) in enumerate(batch.sizes):
            flip = bool(batch.flips) and batch.flips[image]
            total = x.new_zeros(self.num_classes, height, width)
            count = x.new_zeros(height, width)
            for rows, columns in self._tiles(height, width):
                part = self.logits(x[image : image + 1, :, rows, columns])[0].softmax(0)
                total[:, rows, columns] += part
                count[rows, columns] += 1
            total /= count
            result.append(total.flip(2) if flip else total)
        return result

    def _tiles(self, height: int, width: int) -> Iterator[tuple[slice, slice]]:
        if self.tiles is None:
            yield slice(height), slice(width)
            return
        size, overlap = self.tiles.size, self.tiles.overlap
        rows, columns = (
            cuts(side, wide, overlap) for side, wide in zip((height, width), size, strict=True)
        )
        yield from ((row, column) for row in rows for column in columns)

    def features(self, batch: Batch) -> dict[str, Tensor]:
        """The maps of the normalised images."""
        return self.maps(self.normalised(batch))

    def normalised(self, batch: Batch) -> Tensor:
        """What the backbone sees, (B, 3, H, W) float32; padding is 0."""
        return normalised(batch, self.pixel_mean, self.pixel_std)

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) -> maps by name."""
        return self.backbone(x.contiguous(memory_format=torch.channels_last))

    def logits(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> scores (B, K, H, W) float32."""
        scores = self.score(F.relu(self.fc6(self.maps(x)[self.in_feature])))
        return upsample(scores.float(), self.stride, (x.shape[2], x.shape[3]))


def upsample(scores: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """Scores (B, K, H', W') enlarged `stride` times and cut to `size` (h, w): (B, K, h, w).

    Bilinear, with 0 around the map. It equals the release's fixed deconvolution (kernel 2 S, stride
    S, no padding), cut at offset (S / 2, S / 2).
    """
    padded = F.pad(scores, (1, 1, 1, 1))
    enlarged = F.interpolate(padded, scale_factor=float(stride), mode="bilinear")
    return enlarged[:, :, stride : stride + size[0], stride : stride + size[1]]


def label_maps(batch: Batch) -> Tensor:
    """The images' label maps, (B, Hp, Wp) int64; UNLABELLED where the batch is padded."""
    height, width = batch.images.shape[2:]
    maps = []
    for target in batch.targets:
        labels = target.label_map
        if labels is None:
            raise ValueError(f"image {target.image_id!r} has no label map")
        bottom, right = height - labels.shape[0], width - labels.shape[1]
        maps.append(F.pad(labels, (0, right, 0, bottom), value=UNLABELLED))
    return torch.stack(maps).long()


def nearest(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels (H, W) resized to `size` (h, w), each pixel from the nearest, as OpenCV chooses it."""
    places = []
    for old, new in zip(labels.shape, size, strict=True):
        # As OpenCV computes it: old / new would take another pixel here and there.
        index = torch.arange(new, dtype=torch.float64, device=labels.device) * (1 / (new / old))
        places.append(index.floor().long().clamp(max=old - 1))
    return labels[places[0][:, None], places[1]]


def cuts(side: int, tile: int, overlap: int) -> list[slice]:
    """The fewest parts of 0..side, `tile` long, that overlap by `overlap` at least, evenly laid."""
    if side <= tile:
        return [slice(side)]
    number = -(-(side - overlap) // (tile - overlap))
    starts = [(side - tile) * part // (number - 1) for part in range(number)]
    return [slice(start, start + tile) for start in starts]
