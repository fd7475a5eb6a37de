"""Fast R-CNN's head with two fully connected layers, on one map or a pyramid.

B images, R RoIs, K classes, C channels of the maps, p the grid's side (7).
Source: Girshick, Fast R-CNN; Lin et al., Feature Pyramid Networks; Dai et al., Deformable ConvNets;
faster_rcnn/symbols and fpn/operator_py/fpn_roi_pooling.py of the 2017 release.
"""

from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_pool

from dcdet import boxes as box_ops
from dcdet.errors import require
from dcdet.models.init import init_layers
from dcdet.models.mimicking import MimickingSpec
from dcdet.models.roi_head import RoIHead, RoIOutput, inclusive, pool_by_level, require_pyramid
from dcdet.models.targets import SampleSpec
from dcdet.ops.deform_psroi_pool import deform_psroi_pool, shifted_parts
from dcdet.ops.deform_roi_pool import deform_roi_pool, moved_bins, roi_align


class BoxHead(RoIHead):
    """Each RoI is pooled to p x p bins; two hidden layers, then scores and each class's own box.

    Args:
        in_channels, strides, num_classes, delta_limit: supplied by code.
        in_features: the maps that are read, finest first, each of twice the last one's stride.
            Of several, the RoI's size decides: see roi_head.pyramid_levels.
        reduce_channels: of a 1x1 convolution with ReLU before pooling; None: there is none.
        pooling: how a RoI is pooled:
            "max" and "deformable" as the 2017 release does. Deformable: each RoI is pooled twice,
            and the first result moves the second's bins, by offsets that every map has its own
            layer for.
            "align": RoIAlign. "deformable_align", "modulated_align": the same twice, with three
            layers for the offsets, as in mmdetection's DCN and DCNv2 configs; modulated, two more
            layers scale each bin by 0 to 1.
        pooled_size: p.
        trans_std: offsets of 1 move a bin by this share of the RoI's size.
        samples_per_part: sampling points along a side of a bin, but for "max"; 0, with RoIAlign, as
            many as the bin has pixels, rounded up.
        hidden_channels: of the hidden layers.
        init_std: of new weights; those of offsets start at 0.
        The others: see RoIHead, and
        aligned: RoIAlign's, see ops.roi_align.
        hidden_init: of the hidden layers: "normal", by init_std, or "xavier".
        delta_init_std: of the layer of box deltas; None: init_std.
        offset_channels: of the hidden layers for offsets and modulation.
        mimicking: in training, learn from RoIs' pixels alone, too: see models/mimicking.py.
    """

    def __init__(
        self,
        in_channels: int,
        strides: list[int],
        num_classes: int,
        in_features: list[str],
        reduce_channels: int | None,
        pooling: Literal["max", "deformable", "align", "deformable_align", "modulated_align"],
        pooled_size: int,
        trans_std: float,
        samples_per_part: int,
        hidden_channels: int,
        init_std: float,
        foreground_iou: float,
        background_iou: tuple[float, float],
        samples: SampleSpec | None,
        hard_examples: int | None,
        box_std: list[float],
        ignore_coverage: float | None,
        delta_limit: box_ops.DeltaLimit = "none",
        box_beta: float = 1.0,
        claim_iou: float | None = None,
        average: Literal["image", "batch"] = "image",
        aligned: bool = True,
        hidden_init: Literal["normal", "xavier"] = "normal",
        delta_init_std: float | None = None,
        offset_channels: int = 1024,
        mimicking: MimickingSpec | None = None,
    ) -> None:
        super().__init__(
            foreground_iou, background_iou, samples, hard_examples, box_std, ignore_coverage,
            delta_limit, box_beta, claim_iou, average,
        )  # fmt: skip
        require_pyramid(strides, in_features)
        channels = in_channels if reduce_channels is None else reduce_channels
        require(channels >= 1, "reduce_channels", "at least 1, or null", channels)
        require(pooled_size >= 1, "pooled_size", "at least 1", pooled_size)
        least = 0 if pooling.endswith("align") else 1
        wanted = f"at least {least}"
        require(samples_per_part >= least, "samples_per_part", wanted, samples_per_part)
        require(hidden_channels >= 1, "hidden_channels", "at least 1", hidden_channels)
        require(init_std > 0, "init_std", "positive", init_std)
        delta_std = init_std if delta_init_std is None else delta_init_std
        require(delta_std > 0, "delta_init_std", "positive, or null", delta_init_std)
        require(offset_channels >= 1, "offset_channels", "at least 1", offset_channels)
        if reduce_channels is not None:
            self.reduce = nn.Conv2d(in_channels, channels, 1)
            init_layers(self.reduce, std=init_std)
        inputs = channels * pooled_size**2
        self.fc1 = nn.Linear(inputs, hidden_channels)
        self.fc2 = nn.Linear(hidden_channels, hidden_channels)
        self.score = nn.Linear(hidden_channels, 1 + num_classes)
        # Background's four deltas come first; they are not used (as in the release).
        self.delta = nn.Linear(hidden_channels, 4 * (1 + num_classes))
        init_layers(self.fc1, self.fc2, std=init_std if hidden_init == "normal" else None)
        init_layers(self.score, std=init_std)
        init_layers(self.delta, std=delta_std)
        bins, hidden = pooled_size**2, offset_channels
        self.deformable = pooling not in ("max", "align")
        if pooling == "deformable":
            self.offset = nn.ModuleDict({name: nn.Linear(inputs, 2 * bins) for name in in_features})
            init_layers(*self.offset.values(), std=0.0)
        elif self.deformable:
            self.offset = _for_each(in_features, inputs, hidden, hidden, 2 * bins)
        if pooling == "modulated_align":
            self.modulation = _for_each(in_features, inputs, hidden, bins)
        self.strides, self.in_features = strides, in_features
        self.reduced, self.pooling = reduce_channels is not None, pooling
        self.pooled_size, self.trans_std = pooled_size, trans_std
        self.samples_per_part, self.aligned = samples_per_part, aligned
        self.mimicking = mimicking
        if mimicking is not None:
            self.mimic_score = nn.Linear(hidden_channels, 1 + num_classes)
            init_layers(self.mimic_score, std=init_std)

    def forward(self, features: dict[str, Tensor], rois: Tensor) -> RoIOutput:
        """rois (R, 5): image index and box."""
        maps = [features[name] for name in self.in_features]
        x = pool_by_level(maps, rois, self.strides, self._pool).flatten(1)
        x = F.relu(self.fc2(F.relu(self.fc1(x))))
        logits, deltas = self.score(x).float(), self.delta(x).float()
        return RoIOutput(logits, deltas.unflatten(1, (-1, 4)), x)

    def parts(self, features: dict[str, Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        """Where a deformable head reads RoIs (R, 5): boxes (R, p, p, 4) in the rois' pixels.

        `labels` (R,) make no difference here: all classes share their parts.
        """
        maps = [features[name] for name in self.in_features]
        return pool_by_level(maps, rois, self.strides, self._parts)

    def _reduce(self, x: Tensor) -> Tensor:
        return F.relu(self.reduce(x)) if self.reduced else x

    def _pool(self, x: Tensor, rois: Tensor, level: int) -> Tensor:
        """x (B, C, H, W), rois (r, 5) -> (r, C, p, p)."""
        x, size, scale = self._reduce(x), self.pooled_size, 1 / self.strides[level]
        if self.pooling == "max":
            return roi_pool(x.float(), inclusive(rois), size, scale)
        if self.pooling == "align":
            return roi_align(x, rois, size, scale, self.samples_per_part, self.aligned)
        return self._pool_parts(x, rois, *self._shifts(x, rois, level), level)

    def _parts(self, x: Tensor, rois: Tensor, level: int) -> Tensor:
        """Boxes (r, p, p, 4) of the bins."""
        shifts, _ = self._shifts(self._reduce(x), rois, level)
        if self.pooling == "deformable":
            scale = 1 / self.strides[level]
            return shifted_parts(inclusive(rois), shifts.float(), scale, self.trans_std)
        return moved_bins(rois, shifts.float(), self.trans_std)

    def _shifts(self, x: Tensor, rois: Tensor, level: int) -> tuple[Tensor, Tensor | None]:
        """How far deformable pooling moves the bins, in units of trans_std: (r, 2, p, p); and what
        scales them: (r, 1, p, p)."""
        name, size = self.in_features[level], self.pooled_size
        pooled = self._pool_parts(x, rois, None, None, level).flatten(1)
        shifts: Tensor = self.offset[name](pooled)
        factors = None
        if self.pooling == "modulated_align":
            factors = self.modulation[name](pooled).sigmoid().view(-1, 1, size, size)
        return shifts.view(-1, 2, size, size), factors

    def _pool_parts(
        self, x: Tensor, rois: Tensor, shifts: Tensor | None, factors: Tensor | None, level: int
    ) -> Tensor:
        size, scale, samples = self.pooled_size, 1 / self.strides[level], self.samples_per_part
        if self.pooling == "deformable":
            return deform_psroi_pool(
                x, inclusive(rois), shifts, scale, x.shape[1], 1, size, size, samples,
                self.trans_std,
            )  # fmt: skip
        return deform_roi_pool(x, rois, shifts, size, scale, samples, self.trans_std, factors)


def _for_each(names: list[str], *channels: int) -> nn.ModuleDict:
    """For every name hidden layers with ReLU, and a last layer, which starts at 0."""
    stacks = {}
    for name in names:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(channels):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        stacks[name] = nn.Sequential(*layers[:-1])
        init_layers(stacks[name][-1], std=0.0)
    return nn.ModuleDict(stacks)
