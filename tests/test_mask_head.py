"""Mask R-CNN's head against torchvision's, its losses and targets cell by cell, masks of views."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from dcdet.errors import UserError
from dcdet.models.mask_head import MaskHead
from dcdet.models.postprocess import PostprocessSpec
from dcdet.models.roi_head import RoIOutput
from dcdet.models.targets import RoISamples
from dcdet.models.two_stage import TwoStageDetector
from dcdet.ops import roi_align
from dcdet.structures import Batch, Target

NAMES, STRIDES = ["p2", "p3", "p4", "p5"], [4, 8, 16, 32]


def make(**changes: Any) -> MaskHead:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "in_features": NAMES, "pooled_size": 3, "samples_per_part": 2, "aligned": False,
        "convs": 2, "channels": 4, "paste": "grid",
    }  # fmt: skip
    return MaskHead(2, STRIDES, 3, **(options | changes))


def features() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        name: torch.randn(2, 2, 256 // stride, 512 // stride)
        for name, stride in zip(NAMES, STRIDES, strict=True)
    }


ROIS = torch.tensor(
    [[0, 10.0, 20, 500, 250], [1, 30, 20, 60, 90], [0, 100, 3, 230, 200], [1, 0, 0, 250, 256]]
)


def test_logits_equal_torchvisions() -> None:
    head, maps = make(), features()
    pool = MultiScaleRoIAlign(NAMES, 3, 2)
    convs, predictor = MaskRCNNHeads(2, [4, 4], 1), MaskRCNNPredictor(4, 4, 3)
    for own, theirs in zip(head.convs, convs, strict=True):
        theirs[0].load_state_dict(own.state_dict())
    predictor.conv5_mask.load_state_dict(head.upsample.state_dict())
    predictor.mask_fcn_logits.load_state_dict(head.logits.state_dict())
    order = [1, 3, 0, 2]  # theirs go image by image
    boxes = [ROIS[[0, 2], 1:], ROIS[[1, 3], 1:]]
    wanted = predictor(convs(pool(maps, boxes, [(256, 512)] * 2)))
    found = head(maps, ROIS)
    assert found.shape == (4, 3, 6, 6)
    torch.testing.assert_close(found[[0, 2, 1, 3]], wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(head(maps, ROIS[order]), found[order])


def test_new_weights_are_kaimings_and_biases_0() -> None:
    head = make(channels=64)
    for layer in (*head.convs, head.upsample, head.logits):
        assert not layer.bias.any()
    # "Fan out" of a transposed convolution is its input channels times its cells, as in torch.
    for layer, fan in ((head.convs[1], 64 * 9), (head.upsample, 64 * 4)):
        assert layer.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.05)


@pytest.mark.parametrize("convs", [0, 2])
def test_without_foreground_every_parameter_has_a_gradient(convs: int) -> None:
    """Processes wait for each other's gradients; images without objects have no masks."""
    head = make(convs=convs)
    maps = {name: x.requires_grad_() for name, x in features().items()}
    samples = samples_of(ROIS, [0, 0, 0, 0], [0, 0, 0, 0]).foreground()
    logits = head(maps, samples.rois)
    assert logits.shape == (0, 3, 6, 6)
    targets = [target_of(torch.zeros(0, 256, 512, dtype=torch.bool)), target_of(None)]
    losses, stats = head.losses(logits, samples, batch_of(targets))
    assert losses == {"mask": 0}
    assert stats == {"mask_accuracy": 1}
    losses["mask"].backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    assert all(x.grad is not None for x in maps.values())


def samples_of(rois: Tensor, labels: list[int], objects: list[int]) -> RoISamples:
    deltas = torch.zeros(len(rois), 4)
    return RoISamples(rois, torch.tensor(labels), deltas, torch.tensor(objects))


def target_of(masks: Tensor | None) -> Target:
    nothing = torch.zeros(0, 4)
    return Target(0, (256, 512), nothing, torch.zeros(0).long(), nothing, masks)


def batch_of(targets: list[Target]) -> Batch:
    number = len(targets)
    return Batch(torch.zeros(number, 3, 1, 1), [(256, 512)] * number, targets, [1.0] * number,
                 list(range(number)))  # fmt: skip


def blobs(number: int, height: int, width: int) -> Tensor:
    """Bitmaps with edges of every direction."""
    coarse = torch.randn(number, 1, 5, 6, generator=torch.Generator().manual_seed(number))
    return nn.functional.interpolate(coarse, (height, width), mode="bilinear")[:, 0] > 0


def cell_of(mask: Tensor, roi: list[float], row: int, column: int, size: int) -> float:
    """How much of a cell is object, read sample by sample as in MMDET.md, 8 and 10."""
    height, width = mask.shape
    x1, y1, x2, y2 = roi
    high, wide = (y2 - y1) / size, (x2 - x1) / size
    rows, columns = math.ceil(high), math.ceil(wide)
    total = 0.0
    for i in range(rows):
        for j in range(columns):
            y = y1 - 0.5 + (row + (i + 0.5) / rows) * high
            x = x1 - 0.5 + (column + (j + 0.5) / columns) * wide
            if not (-1 <= y <= height and -1 <= x <= width):
                continue
            y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
            for corner_y in {int(y), min(int(y) + 1, height - 1)}:
                for corner_x in {int(x), min(int(x) + 1, width - 1)}:
                    share = (1 - abs(y - corner_y)) * (1 - abs(x - corner_x))
                    total += share * float(mask[corner_y, corner_x])
    return total / (rows * columns)


def test_targets_and_losses_cell_by_cell() -> None:
    """Two images of four and one objects; RoIs in any order, over the border, of under a pixel."""
    masks = [blobs(4, 24, 30), blobs(1, 20, 26)]
    rois = torch.tensor([
        [1, 2.3, 1.1, 24.9, 18.7], [0, 0.0, 0.0, 30.0, 24.0], [0, 3.3, 2.2, 17.8, 21.4],
        [1, 0.0, 5.6, 9.4, 19.3], [0, 12.1, 12.9, 12.6, 13.2], [0, 20.2, 11.3, 30.0, 24.0],
    ])  # fmt: skip
    labels, objects = [3, 1, 2, 1, 2, 3], [0, 3, 0, 0, 0, 2]
    samples = samples_of(rois, labels, objects)
    batch = batch_of([target_of(one) for one in masks])
    head = make()
    found = head.targets(samples, batch)
    assert found.shape == (6, 6, 6)
    wanted = torch.zeros(6, 6, 6)
    for number, (image, *roi) in enumerate(rois.tolist()):
        mask = masks[int(image)][objects[number]]
        for row in range(6):
            for column in range(6):
                wanted[number, row, column] = cell_of(mask, roi, row, column, 6) >= 0.5
    assert torch.equal(found, wanted)
    assert 0.2 < wanted.mean() < 0.8

    logits = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses, stats = head.losses(logits, samples, batch)
    total, right = 0.0, 0
    for number, label in enumerate(labels):
        for score, inside in zip(
            logits[number, label - 1].flatten().tolist(), wanted[number].flatten().tolist(),
            strict=True,
        ):  # fmt: skip
            total += math.log(1 + math.exp(-score if inside else score))
            right += (score > 0) == bool(inside)
    assert losses["mask"].item() == pytest.approx(total / 216, rel=1e-5)
    assert stats["mask_accuracy"].item() == pytest.approx(right / 216)
    losses["mask"].backward()
    touched = logits.grad.flatten(2).any(2)
    assert touched.sum() == 6  # one class of each RoI
    assert touched[range(6), [label - 1 for label in labels]].all()


def test_a_data_set_without_masks_is_named() -> None:
    head = make()
    samples = samples_of(ROIS[:1], [1], [0])
    with pytest.raises(UserError, match=r"^data\.train: delivers no instance masks.*masks: true"):
        head.losses(torch.zeros(1, 3, 6, 6), samples, batch_of([target_of(None)]))


@pytest.mark.parametrize(
    ("key", "value"),
    [("pooled_size", 0), ("samples_per_part", -1), ("convs", -1), ("channels", 0)],
)
def test_values_out_of_range_are_named(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"^{key}: must be at least"):
        make(**{key: value})
    with pytest.raises(ValueError, match=r"^in_features: must be maps whose strides double"):
        MaskHead(2, [4, 16], 3, ["p2", "p4"], 3, 2, True, 0, 1, "grid")


# Masks of whole images.


class Pixels(nn.Module):
    """Backbone: the first channel is the only map."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"p0": x[:, :1]}


class Given(nn.Module):
    """RPN and RoI head: these boxes (n, 4) of each image, times the scale, and all their labels."""

    def __init__(self, boxes: list[Tensor], labels: list[int]) -> None:
        super().__init__()
        self.boxes, self.labels = boxes, labels

    def forward(self, _features: Any, rois: Tensor | None = None) -> RoIOutput | None:
        return None

    def proposals(self, _raw: Any, sizes: list[Any], scales: list[Any]) -> list[Tensor]:
        factors = [torch.tensor([x, y, x, y]) for y, x in scales]
        return [boxes * factor for boxes, factor in zip(self.boxes, factors, strict=True)]

    def scores_and_boxes(self, _raw: Any, rois: Tensor) -> tuple[Tensor, Tensor]:
        classes = nn.functional.one_hot(torch.tensor(self.labels), 3)
        return classes * torch.linspace(0.9, 0.5, len(rois))[:, None], rois[:, 1:]


class Bright(nn.Module):
    """Mask head: in its RoI class 1 is what is bright, the other classes what is dark."""

    paste = "grid"

    def forward(self, features: dict[str, Tensor], rois: Tensor) -> Tensor:
        bright = 40 * roi_align(features["p0"], rois, 16) - 20
        return torch.cat([-bright, bright, -bright], 1)


def test_masks_of_mirrored_and_scaled_views_lie_on_the_objects() -> None:
    """Cells are 2 x 2 pixels, network pixels parts of one: what is pasted is what was there."""
    blocks = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.4
    shapes = blocks.repeat_interleave(2, 1).repeat_interleave(2, 2)
    size = (44, 70)
    box = torch.tensor([6.0, 5.0, 38.0, 37.0])
    original = torch.zeros(2, *size)
    original[:, 5:37, 6:38] = shapes.float()

    def view(scales: list[tuple[int, int]], flips: tuple[bool, bool], light: float) -> Batch:
        images = torch.zeros(3, 3, 132, 210)
        for image, (y, x) in enumerate(scales):
            pixels = original[image].repeat_interleave(y, 0).repeat_interleave(x, 1)
            pixels = pixels.flip(1) if flips[image] else pixels
            images[image, :, : pixels.shape[0], : pixels.shape[1]] = light * pixels
        sizes = [(size[0] * y, size[1] * x) for y, x in scales]
        nothing = torch.zeros(0, 4)
        target = Target(0, size, nothing, torch.zeros(0).long(), nothing)
        return Batch(images, [*sizes, size], [target] * 3, [*scales, (1, 1)], [0] * 3,
                     flips=(*flips, False))  # fmt: skip

    mirrored = torch.tensor([70.0 - 38, 5.0, 70 - 6, 37.0])
    boxes = {False: box[None].expand(2, 4), True: mirrored[None].expand(2, 4)}
    spec = PostprocessSpec(0.1, 0.5, 10)
    for flips in ((False, False), (True, False), (True, True)):
        first = view([(3, 2), (1, 3)], flips, 1.0)
        # A second view finds the same, but all is dark there.
        second = view([(2, 2), (2, 2)], flips, 0.0)
        heads = Given([boxes[flips[0]], boxes[flips[1]], torch.zeros(0, 4)], [1, 0, 2, 1])
        model = TwoStageDetector(
            Pixels(), None, heads, heads, 3, "continuous", [0.0] * 3, [1.0] * 3, spec, Bright()
        )  # fmt: skip
        found = model.predict(first, second)
        assert found[2].masks.shape == (0, *size)
        for image, labels in ((0, [1, 0]), (1, [2, 1])):
            assert found[image].labels.tolist() == labels
            torch.testing.assert_close(found[image].boxes, box.expand(2, 4))
            inside = torch.zeros(size, dtype=torch.bool)
            inside[5:37, 6:38] = True
            there = original[image] > 0
            for label, mask in zip(labels, found[image].masks, strict=True):
                assert torch.equal(mask, there if label == 1 else ~there & inside)
