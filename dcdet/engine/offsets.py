"""Where a deformable network looks: sampling points of stacked convolutions, parts of RoIs.

Convention: pixel k of a map of stride s stands for pixels k * s to (k + 1) * s of the network's
input. A position p on the map (p = k in the middle of pixel k) is (p + 0.5) * s there, and
(p + 0.5) * s / scale in the original image. So the 2017 release draws, pools RoIs and places
anchors, too.

Letters: P points, G offset groups, L layers, N detections, p x p parts.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from dcdet import boxes as box_ops
from dcdet.datasets.loader import View
from dcdet.datasets.transforms import BadImage
from dcdet.engine.checkpoint import load_weights
from dcdet.engine.demo import (
    at_least,
    class_names,
    free_path,
    label_set,
    picture_name,
    read_views,
    threshold_of,
    warn_of_threshold,
    write_picture,
)
from dcdet.engine.evaluate import detect
from dcdet.engine.runtime import autocast, output_folder, pick_device, strict_json, write_text
from dcdet.errors import UserError
from dcdet.models.build import build_model
from dcdet.models.deeplab import DeepLab
from dcdet.models.resnet import DeformConv2d
from dcdet.models.two_stage import TwoStageDetector
from dcdet.registry import check
from dcdet.structures import UNLABELLED, Batch, Detections
from dcdet.visualize.offsets import draw_parts, draw_points
from dcdet.visualize.segmentation import areas_of

log = logging.getLogger("dcdet.offsets")

Point = tuple[float, float]  # (x, y) in original image pixels

MAX_LAYERS = 3  # of a stack: 9^3 points, as in the 2017 release
MAX_SHOWN = 5  # detections


def offsets(
    config: Any,
    weights: Path,
    image: str,
    output: Path,
    *,
    points: Sequence[Point] = (),
    score_threshold: float | None = None,
    device: str | None = None,
) -> int:
    """Draw what a trained network's offsets do in an image, and write the numbers as JSON.

    Each point gets a picture NAME-points.png, each detection one of its RoI's parts,
    NAME-parts.png; NAME-offsets.json holds the numbers in original image pixels. Shown are the best
    detections of at least `score_threshold` (None: 0.5), and the points in their middles; of a
    segmentation, points in the largest areas of the commonest classes; without either a grid of
    four points. With `points` these are shown, and the detections around them. The image is seen at
    `data.resize` alone. Nothing in `output` is overwritten. The command's exit code returns. Raises
    UserError.
    """
    threshold = threshold_of(score_threshold)
    experiment = check(config)
    try:
        pixels, [batch] = read_views(image, experiment.data, [View(experiment.data.resize)])
    except BadImage as error:
        raise UserError(image, str(error)) from error
    height, width = pixels.shape[:2]
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            what = f"{x:g},{y:g} is not in the image of {width} x {height} pixels"
            raise UserError("--point", what, "X,Y counts from the top left corner")
    torch_device = pick_device(device)
    model: Any = build_model(config)
    has_points, has_parts = _what_deforms(model, config, bool(points))
    meta = load_weights(model, weights)
    model.to(torch_device).eval()
    data_set = label_set(config)
    segmented = data_set is not None
    classes, category_ids = class_names(config, meta, weights, data_set)

    precision = experiment.test.precision
    report: dict[str, Any] = {"image": image, "width": width, "height": height}
    with output_folder(output), autocast(torch_device, precision):
        [found] = detect(model, [[batch]], precision, torch_device)
        if segmented:
            warn_of_threshold(score_threshold)
            default = inner_places(found.labels.numpy())
        else:
            found = at_least(found, threshold)
            if points:
                found = _select(found, _around(found.boxes, points))
            elif not len(found.scores):
                what = f"no detection has a score of {threshold:g} or more"
                if not has_points:
                    raise UserError(image, what, "a lower --score-threshold may show some")
                log.info("%s: a grid of points is shown instead", what)
            found = _select(found, slice(MAX_SHOWN))
            default = _middles(found.boxes, (height, width))
        batch = batch.to(torch_device)
        stem = Path(picture_name(image)).stem
        save = partial(_save, output, stem)
        if has_points:
            places = points or default or _grid((height, width))
            seen = sampling_points(model, batch, places)
            limits = torch.tensor([width, height])
            inside = ((seen.positions >= 0) & (seen.positions < limits)).all(-1)
            log.info(
                "layers %s: %d samples a point, %.0f %% of them in the image",
                ", ".join(seen.layers), inside[0].numel(), 100 * inside.float().mean(),
            )  # fmt: skip
            report["layers"] = seen.layers
            report["points"] = [
                {
                    "point": _rounded(torch.tensor(place)),
                    "centre": _rounded(centre),
                    "positions": _rounded(positions),
                    "weights": _rounded(shares),
                    "picture": save("points", draw_points(pixels, centre, positions, shares)),
                }
                for place, centre, positions, shares in zip(
                    places, seen.centres, seen.positions, seen.weights, strict=True
                )
            ]
            if segmented:
                for row, (x, y) in zip(report["points"], places, strict=True):
                    label = int(found.labels[int(y), int(x)])
                    known = label != UNLABELLED
                    row["category_id"] = category_ids[label] if known else None
                    row["name"] = classes[label] if known else None
        if has_parts:
            parts = roi_parts(model, batch, found)
            ones = [_select(found, slice(index, index + 1)) for index in range(len(parts))]
            report["rois"] = [
                {
                    "category_id": category_ids[int(one.labels)],
                    "name": classes[int(one.labels)],
                    "score": one.scores.item(),
                    "box": _rounded(one.boxes[0]),
                    "parts": _rounded(boxes),
                    "picture": save("parts", draw_parts(pixels, one, boxes, classes)),
                }
                for one, boxes in zip(ones, parts, strict=True)
            ]
        numbers = free_path(output, f"{stem}-offsets.json")
        write_text(numbers, strict_json(report))
    log.info("written: %s", numbers)
    return 0


@dataclass(frozen=True)
class SamplingPoints:
    """Where the last of a stack of deformable convolutions reads, through the layers before it.

    `layers` are L names, the last to run first. `centres` (P, 2) are the middles of the output
    pixels that the points lie in, `positions` (P, G, 9^L, 2) the samples: (x, y) in original image
    pixels, NaN where the path leaves the map between two layers, so that nothing is read. Sample
    (i1 * 9 + i2) * 9 + i3 is tap i1 of the first named layer, i2 of the next, and so on; a path
    stays in its offset group. `weights` (P, G, 9^L) are the products of the masks on the way,
    and 0 where nothing is read.
    """

    layers: tuple[str, ...]
    centres: Tensor
    positions: Tensor
    weights: Tensor


@torch.no_grad()
def sampling_points(
    model: TwoStageDetector | DeepLab,
    batch: Batch,
    points: Sequence[Point],
    stage: str | None = None,
) -> SamplingPoints:
    """The sampling points behind the output pixels at `points`, for a batch of one image.

    The stack is the deformable convolutions of one stage, the last three where there are more;
    None is the last stage that has any. Each position is rounded to the pixel for which the layer
    before is asked; what lies between them (1x1 and plain convolutions) is left out. Raises
    ValueError where the stage has none. Source: Dai et al., Deformable Convolutional Networks,
    figure 6; lib/utils/show_offset.py of the 2017 release. (That one also leaves out taps whose
    undeformed place is off the map, and the others then get each other's offsets: near the border
    its pictures differ.)
    """
    stages = model.backbone.deformable_layers()
    stage = stage or next(reversed(stages), None)
    if stage not in stages:
        raise ValueError(f"stage: '{stage}' has no deformable convolution, only {list(stages)}")
    stack = dict(list(reversed(stages[stage].items()))[:MAX_LAYERS])
    with _inputs(stack.values()) as inputs:
        model.features(batch)
    stride, device = model.backbone.strides[stage], batch.images.device
    scale = torch.tensor(box_ops.per_axis(batch.scales[0]), device=device)
    where = torch.tensor(points, device=device).view(-1, 2).flip(1) * scale
    top = next(iter(stack.values()))
    # The last pixel of a map may lie wholly outside it, where a pooling layer rounded sizes down.
    last = (where.new_tensor(inputs[top].shape[2:]) - 1).div(top.stride, rounding_mode="floor")
    positions = (where / stride).floor().minimum(last)[:, None, None]  # (P, 1, 1, 2), y first
    weights = positions.new_ones(positions.shape[:3])
    centres = (positions[:, 0, 0] + 0.5) * stride / scale
    for layer in stack.values():
        positions, weights = _taps(layer, inputs[layer], positions, weights)
        stride //= layer.stride
    positions = (positions + 0.5) * stride / scale
    return SamplingPoints(
        tuple(stack), centres.flip(-1).cpu(), positions.flip(-1).cpu(), weights.cpu()
    )


def _taps(
    layer: DeformConv2d, x: Tensor, positions: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Where `layer` reads its input x (1, C, H, W) for the output pixels nearest to `positions`.

    positions (P, 1 or G, n, 2), y first, on the output map, weights (P, 1 or G, n) -> those of the
    9n samples, on the input map.
    """
    offset, mask = layer.offset_and_mask(x)
    groups = offset.shape[1] // 18
    shift = offset[0].float().unflatten(0, (groups, 9, 2)).permute(0, 3, 4, 1, 2)
    pixel = positions.round()
    inside = ((pixel >= 0) & (pixel < pixel.new_tensor(offset.shape[2:]))).all(-1, keepdim=True)
    group = torch.arange(groups, device=x.device)[:, None]
    row, column = torch.where(inside, pixel, 0).long().unbind(-1)
    tap = torch.arange(9, device=x.device)
    tap = torch.stack([tap // 3 - 1, tap % 3 - 1], dim=-1) * layer.dilation
    read = (pixel * layer.stride)[..., None, :] + tap + shift[group, row, column]
    read = read.where(inside[..., None], torch.nan)
    weights = (weights[..., None] * inside).expand(read.shape[:-1])
    if mask is not None:
        mask = mask[0].float().unflatten(0, (groups, 9)).permute(0, 2, 3, 1)
        weights = weights * mask[group, row, column]
    return read.flatten(2, 3), weights.flatten(2)


@torch.no_grad()
def roi_parts(model: TwoStageDetector, batch: Batch, found: Detections) -> Tensor:
    """The parts that deformable RoI pooling reads for detections of a batch of one image.

    As in the 2017 release's demo the RoIs are the given boxes: parts (N, p, p, 4) in original image
    pixels. What moves them are the offsets of the detection's class, where classes have their own.
    """
    scale, device = batch.scales[0], batch.images.device
    boxes = box_ops.rescale(found.boxes.to(device), scale, model.pixels)
    rois = nn.functional.pad(boxes, (1, 0))
    parts = model.roi_head.parts(model.features(batch), rois, found.labels.to(device))
    return box_ops.rescale(parts.cpu(), box_ops.inverse(scale), "continuous")


@contextmanager
def _inputs(layers: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """What the layers are given during the `with`."""
    seen: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen[layer] = arguments[0]

    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _what_deforms(
    model: TwoStageDetector | DeepLab, config: Any, points: bool
) -> tuple[bool, bool]:
    """Whether the model has deformable convolutions, and whether it has deformable RoI parts.

    Raises UserError where it lacks what is asked for.
    """
    head = getattr(model, "roi_head", None)
    has_points = bool(getattr(model.backbone, "deformable_layers", dict)())
    has_parts = bool(getattr(head, "deformable", False))
    if not has_points and not has_parts:
        what, hint = "this network has no deformable convolutions", "see model.backbone.deform"
        if head is not None:
            what = "this network has neither deformable convolutions nor deformable RoI pooling"
            hint += ", model.roi_head"
        raise UserError(config.where("model"), what, hint)
    if points and not has_points:
        what = "this network has no deformable convolutions, only deformable RoI pooling"
        raise UserError("--point", what, "without --point the parts of detections are shown")
    return has_points, has_parts


def _save(folder: Path, stem: str, kind: str, picture: np.ndarray) -> str:
    """Write a picture of this kind under a free name, which returns."""
    path = free_path(folder, f"{stem}-{kind}.png")
    write_picture(path, picture)
    log.info("drew %s", path)
    return path.name


def _select(found: Detections, index: Any) -> Detections:
    return replace(found, boxes=found.boxes[index], scores=found.scores[index],
                   labels=found.labels[index])  # fmt: skip


def _around(boxes: Tensor, points: Sequence[Point]) -> Tensor:
    """Which of boxes (N, 4) hold one of the points at least: (N,) bool."""
    place = boxes.new_tensor(points)
    inside = (place >= boxes[:, None, :2]) & (place < boxes[:, None, 2:])
    return inside.all(2).any(1)


def _middles(boxes: Tensor, size: tuple[int, int]) -> list[Point]:
    """The middles of boxes (N, 4) in an image of `size` (h, w)."""
    boxes = box_ops.clip(boxes, size, "continuous")  # the 2017 release's FPN finds some in padding
    return [(x, y) for x, y in ((boxes[:, :2] + boxes[:, 2:]) / 2).tolist()]


def inner_places(labels: np.ndarray) -> list[Point]:
    """Of each of the commonest labels (H, W), the place in its largest area that is furthest from
    the area's edge."""
    places = []
    for label in list(areas_of(labels))[:MAX_SHOWN]:
        mask = (labels == label).astype(np.uint8)
        _, areas, about, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
        largest = areas == 1 + about[1:, cv2.CC_STAT_AREA].argmax()
        largest = np.pad(largest.astype(np.uint8), 1)  # the image's edge is one of the area's, too
        depth = cv2.distanceTransform(largest, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        y, x = np.unravel_index(depth[1:-1, 1:-1].argmax(), labels.shape)
        places.append((x + 0.5, y + 0.5))
    return places


def _grid(size: tuple[int, int]) -> list[Point]:
    """Four points of an image of `size` (h, w)."""
    height, width = size
    return [(width * i / 4, height * j / 4) for j in (1, 3) for i in (1, 3)]


def _rounded(values: Tensor) -> list[Any]:
    """As nested lists, to a thousandth of a pixel."""
    return values.double().numpy().round(3).tolist()
