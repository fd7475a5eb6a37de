"""Speed and memory of whole networks beside torchvision's and a plain one, all in one run.

Faster and Mask R-CNN with a ResNet and an FPN, by torchvision's rules and with the same random
weights, as torchvision's own, as dcdet's, and as dcdet's with deformable convolutions; and DeepLab,
which torchvision has not, with and without these. docs/benchmarks.md says what each figure means.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

from dcdet import boxes as box_ops
from dcdet.engine.benchmark import (
    cell,
    cuda_peak,
    forked,
    machine,
    machine_lines,
    memory_child,
    timed,
)
from dcdet.engine.runtime import keep_freed_memory, pick_device, strict_json, write_text
from dcdet.errors import first_line
from dcdet.models.box_head import BoxHead
from dcdet.models.deeplab import DeepLab
from dcdet.models.fpn import FPN
from dcdet.models.mask_head import MaskHead
from dcdet.models.postprocess import PostprocessSpec
from dcdet.models.resnet import BLOCKS, STAGES, DeformConv2d, DeformSpec, ResNet
from dcdet.models.rpn import ProposalSpec, RPNHead
from dcdet.models.targets import SampleSpec
from dcdet.models.two_stage import TwoStageDetector
from dcdet.structures import Batch, Detections, Target
from dcdet.weights import IMAGENET_MEAN, IMAGENET_STD
from dcdet.weights.pickles import File
from dcdet.weights.torchvision import translate

What = Literal["test", "train"]
IMAGES = {"test": 1, "train": 2}
OBJECTS = 8  # an image; COCO has 7
CLASSES = 90
SCENE_CLASSES = 19  # of DeepLab; Cityscapes'
ROUNDS = 3  # at least

# Factors of random weights that keep features, scores, boxes and masks of one size.
GAINS = {"cls_logits": 2.0, "rpn.head.bbox_pred": 0.5, "cls_score": 3.0, "fcn_logits": 4.0,
         "bbox_predictor.bbox_pred": 1.0, "fpn": 0.8}  # fmt: skip
# Detections of the same: this near in pixels and in score. So many of 100 must be: where two
# candidates are all but equal, rounding decides.
NEAR = (0.1, 1e-3)
SAME = 0.95
# Losses are over samples drawn at random, by each from generators of its own.
LOSSES = {"rpn_score": "loss_objectness", "rpn_box": "loss_rpn_box_reg",
          "roi_score": "loss_classifier", "roi_box": "loss_box_reg"}  # fmt: skip
LOSS_TOLERANCE = 0.25


@dataclass(frozen=True)
class Size:
    """Of networks and images, whose sides are multiples of 32.

    An image has `proposals` in testing, twice as many in training, learns from `rois`, and has at
    most so many `detections`. `hidden`: channels of the box head.
    """

    depth: Literal[18, 50, 101]
    height: int
    width: int
    proposals: int
    rois: int
    detections: int
    hidden: int


FULL, QUICK = Size(50, 800, 1088, 1000, 512, 100, 1024), Size(18, 64, 96, 50, 32, 10, 64)
SCENE = replace(FULL, depth=101, height=512, width=1024)  # DeepLab's


@dataclass(frozen=True)
class Network:
    """A network, one way; its time is divided by that of `beside`, of the same kind."""

    kind: Literal["faster_rcnn", "mask_rcnn", "deeplab"]
    way: Literal["torchvision", "dcdet", "deformable"]
    beside: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.way}"

    def size(self, quick: bool) -> Size:
        """How large it is, and its images."""
        return QUICK if quick else SCENE if self.kind == "deeplab" else FULL

    def run(self, what: What, size: Size, device: torch.device) -> Callable[[], Any]:
        """What is measured, from images in memory: testing gives what is found in one, a training
        step its losses."""
        batch = pictures(IMAGES[what], size).to(device)
        model: Any
        if self.kind == "deeplab":
            model = deeplab(self.way == "deformable", size).to(device)
            return self._own_run(model, what, batch)
        masks = self.kind == "mask_rcnn"
        theirs = torchvision_network(masks, size)
        if self.way == "torchvision":
            return _torchvision_run(theirs.to(device), what, batch)
        model = own_network(masks, self.way == "deformable", size)
        copy_weights(theirs, model)
        return self._own_run(model.to(device), what, batch)

    def _own_run(self, model: Any, what: What, batch: Batch) -> Callable[[], Any]:
        move_samples(model, batch)
        if what == "test":
            model.eval()
            return lambda: model.predict(batch)[0]
        return _training_step(model.train(), lambda: model(batch)[0])


NETWORKS = (
    Network("faster_rcnn", "torchvision"),
    Network("faster_rcnn", "dcdet", "torchvision"),
    Network("faster_rcnn", "deformable", "dcdet"),
    Network("mask_rcnn", "torchvision"),
    Network("mask_rcnn", "dcdet", "torchvision"),
    Network("deeplab", "dcdet"),
    Network("deeplab", "deformable", "dcdet"),
)


def benchmark_models(
    what: What,
    write: Callable[[str], None],
    json_file: Path | None = None,
    *,
    device: str | None = None,
    quick: bool = False,
    seconds: float = 15.0,
) -> int:
    """Measure the networks and report through `write`, and to `json_file`; the exit code returns.

    `seconds` is the time for each figure. Exit code 1: one of dcdet's networks failed, or does not
    give what torchvision's gives.
    """
    where = pick_device(device)
    seconds = min(seconds, 0.02) if quick else seconds
    size, scene = (network.size(quick) for network in (NETWORKS[0], NETWORKS[-1]))
    if where.type == "cpu":
        keep_freed_memory()
    report: dict[str, Any] = {
        "benchmark": what, "quick": quick, "seconds": seconds, "machine": machine(where),
        "images": IMAGES[what], "height": size.height, "width": size.width, "depth": size.depth,
        "deeplab": {"height": scene.height, "width": scene.width, "depth": scene.depth},
    }  # fmt: skip
    for line in _head(report):
        write(line)
    # TF32 would be another arithmetic than fp32.
    with (
        torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False),
        _memory_meter(what, where, quick) as peak,
    ):
        runs, failed = _prepared(what, quick, where)
        memory = {network: peak(network, run) for network, run in runs.items()}
        times = _time(runs, seconds, where)
    report["networks"] = list(_figures(times, memory))
    report["failed"] = {str(network): why for network, why in failed.items()}
    for line in _rows(report):
        write(line)
    if json_file is not None:
        write_text(json_file, strict_json(report) + "\n")
    return int(any(network.way != "torchvision" for network in failed))


# The networks.


def torchvision_network(masks: bool, size: Size) -> nn.Module:
    """torchvision's detector with random weights, and with frozen BatchNorm, as for its published
    weights; it does not resize images."""
    classes = 1 + CLASSES
    model = (MaskRCNN if masks else FasterRCNN)(
        resnet_fpn_backbone(backbone_name=f"resnet{size.depth}", weights=None, trainable_layers=3),
        rpn_pre_nms_top_n_train=2 * size.proposals,
        rpn_pre_nms_top_n_test=size.proposals,
        rpn_post_nms_top_n_train=2 * size.proposals,
        rpn_post_nms_top_n_test=size.proposals,
        box_head=TwoMLPHead(256 * 7**2, size.hidden),
        box_predictor=FastRCNNPredictor(size.hidden, classes),
        box_detections_per_img=size.detections,
        box_batch_size_per_image=size.rois,
        **{"mask_predictor": MaskRCNNPredictor(256, 256, classes)} if masks else {},
    )
    model.transform.resize = lambda image, target: (image, target)
    return fill_with_random_weights(model)


@torch.no_grad()
def fill_with_random_weights(model: nn.Module) -> nn.Module:
    """The same model, with weights that make features, scores, boxes and masks vary, as untrained
    ones do not."""
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if value.dim() > 1:
            fan_in = value.shape[0] if "conv5_mask" in name else value[0].numel()
            gain = next((gain for part, gain in GAINS.items() if part in name), 1.4)
            value.normal_(generator=generator).mul_(gain / fan_in**0.5)
        elif value.is_floating_point():
            value.normal_(std=0.1, generator=generator)
            if name.endswith("running_var"):
                value += 1
            elif "bn" in name and name.endswith(".weight"):
                value += 0.25 if "bn3" in name else 0.85
            elif name.endswith("downsample.1.weight"):
                value += 0.85
            elif name.endswith("cls_score.bias"):
                value[0] += 4  # most of what is proposed is background
    return model


def own_network(masks: bool, deformable: bool, size: Size) -> TwoStageDetector:
    """configs/torchvision/*.yaml, which an installed package does not have; deformable as
    configs/dcnv2/faster_rcnn_mdconv_r50_fpn_coco.yaml."""
    pixels: box_ops.Pixels = "continuous"
    limit: box_ops.DeltaLimit = "high"
    deform = None
    if deformable:
        blocks = dict(zip(STAGES[1:], map(list, map(range, BLOCKS[size.depth][1:])), strict=True))
        deform = DeformSpec(blocks, groups=1, modulated=True, border="zero", offset_dilation=None)
    backbone = ResNet(
        size.depth, stride_in="3x3", norm="frozen_bn", stem_pool="pad", dilate_c5=False,
        freeze_to=2, deform=deform, pretrained=None,
    )  # fmt: skip
    neck = FPN(backbone.channels, backbone.strides, list(STAGES), 256, "pool", init_std=None)
    proposals = partial(ProposalSpec, nms_iou=0.7, min_size=1e-3, levels="separate")
    levels = list(neck.strides)
    rpn = RPNHead(
        256, list(neck.strides.values()), pixels, levels, channels=256, init_std=0.01,
        anchor_scales=[8], anchor_ratios=[0.5, 1, 2], positive_iou=0.7, negative_iou=0.3,
        samples=256, positive_fraction=0.5, allowed_border=None, whole_cells=False,
        ignore_coverage=None, train=proposals(2 * size.proposals, 2 * size.proposals),
        test=proposals(size.proposals, size.proposals), delta_limit=limit, scores="sigmoid",
        anchor_rule="torchvision", box_beta=1 / 9, average="batch",
    )  # fmt: skip
    levels = levels[:-1]
    strides = [neck.strides[name] for name in levels]
    roi_head = BoxHead(
        256, strides, CLASSES, levels, reduce_channels=None, pooling="align", pooled_size=7,
        trans_std=0.1, samples_per_part=2, hidden_channels=size.hidden, init_std=0.01,
        foreground_iou=0.5, background_iou=(0.0, 0.5),
        samples=SampleSpec(size.rois, foreground_fraction=0.25, fill=False), hard_examples=None,
        box_std=[0.1, 0.1, 0.2, 0.2], ignore_coverage=None, delta_limit=limit, box_beta=1 / 9,
        average="batch", aligned=False, hidden_init="xavier", delta_init_std=0.001,
    )  # fmt: skip
    mask_head = None
    if masks:
        mask_head = MaskHead(
            256, strides, CLASSES, levels, pooled_size=14, samples_per_part=2, aligned=False,
            convs=4, channels=256, paste="resize",
        )  # fmt: skip
    chosen = PostprocessSpec(0.05, 0.5, max_per_image=size.detections, min_size=0.01, shift=True)
    model: Any = TwoStageDetector(
        backbone, neck, rpn, roi_head, CLASSES, pixels, list(IMAGENET_MEAN), list(IMAGENET_STD),
        chosen, mask_head, limit,
    )  # fmt: skip
    return model.to(memory_format=torch.channels_last)


def deeplab(deformable: bool, size: Size) -> DeepLab:
    """configs/deeplab/deeplab_r101_cityscapes.yaml, or deeplab_dcn_r101_cityscapes.yaml, with
    random weights."""
    deform = None
    if deformable:
        blocks = {"c5": list(range(BLOCKS[size.depth][-1]))}
        deform = DeformSpec(blocks, groups=1, modulated=False, border="original", offset_dilation=1)
    backbone = ResNet(
        size.depth, stride_in="1x1", norm="frozen_bn", stem_pool="ceil", dilate_c5=True,
        freeze_to=2, deform=deform, pretrained=None,
    )  # fmt: skip
    model: Any = DeepLab(
        backbone, SCENE_CLASSES, [123.15, 115.90, 103.06], [1.0, 1.0, 1.0], in_feature="c5",
        channels=1024, init_std=0.01,
    )  # fmt: skip
    fill_with_random_weights(model)
    with torch.no_grad():
        backbone.conv1.weight.div_(60)  # pixels are not divided by their deviation
    return model.to(memory_format=torch.channels_last)


def copy_weights(theirs: nn.Module, model: TwoStageDetector) -> None:
    """The weights of torchvision's network; those of offsets, which it does not have, stay."""
    arrays = {name: value.numpy() for name, value in theirs.state_dict().items()}
    values = translate(File(Path("torchvision"), "", arrays, [], {})).values
    own = {name: value for name, value in model.state_dict().items() if ".offset." in name}
    model.load_state_dict(own | values)


@torch.no_grad()
def move_samples(model: Any, batch: Batch) -> None:
    """Random weights for what a deformable layer computes its samples from: normal offsets with a
    deviation of a pixel, and in v2 masks around 1/2, for which the layer's own weights make up."""
    generator = torch.Generator(batch.images.device).manual_seed(2)

    def prepare(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, DeformConv2d)
        deviation = (9 * inputs[0].square().mean(dim=(0, 2, 3)).sum()).sqrt()
        layer.offset.weight.normal_(generator=generator).div_(deviation)
        layer.weight.mul_(2 if layer.spec.modulated else 1)

    layers = [layer for layer in model.backbone.modules() if isinstance(layer, DeformConv2d)]
    hooks = [layer.register_forward_pre_hook(prepare) for layer in layers]
    if layers:
        model.features(batch)
    for hook in hooks:
        hook.remove()


# What they are given, and do.


def pictures(number: int, size: Size) -> Batch:
    """Images of random colours that run into each other, with objects anywhere, small ones as
    frequent as large ones; label maps are random squares."""
    generator = torch.Generator().manual_seed(0)
    height, width = size.height, size.width
    grid = torch.rand(number, 3, height // 32, width // 32, generator=generator)
    images = F.interpolate(grid, (height, width), mode="bicubic").clamp(0, 1).mul(255).byte()
    whole = torch.tensor([width, height])
    targets = []
    for image in range(number):
        random = torch.rand(2, OBJECTS, 2, generator=generator)
        sides = 16 * (whole / 16) ** random[0]
        corners = random[1] * (whole - sides)
        boxes = torch.cat([corners, corners + sides], 1)
        labels = torch.randint(CLASSES, (OBJECTS,), generator=generator)
        squares = torch.randint(SCENE_CLASSES, (height // 32, width // 32), generator=generator)
        scene = squares.byte().repeat_interleave(32, 0).repeat_interleave(32, 1)
        targets.append(
            Target(image, (height, width), boxes, labels, ignored=boxes[:0], label_map=scene)
        )
    sizes = [(height, width)] * number
    return Batch(images, sizes, targets, [1.0] * number, list(range(number)))


def _torchvision_run(model: nn.Module, what: What, batch: Batch) -> Callable[[], Any]:
    images = list(batch.images.float() / 255)
    if what == "test":
        model.eval()
        return torch.no_grad()(lambda: model(images)[0])
    targets = [{"boxes": one.boxes, "labels": one.labels + 1} for one in batch.targets]
    return _training_step(model.train(), lambda: model(images, targets))


def _training_step(model: nn.Module, forward: Callable[[], dict[str, Tensor]]) -> Callable[[], Any]:
    """Its learning rate is 0: every step has the same to do."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=1e-4)

    def step() -> dict[str, float]:
        losses = forward()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return {name: loss.item() for name, loss in losses.items()}

    return step


# Both find the same.


def _prepared(
    what: What, quick: bool, device: torch.device
) -> tuple[dict[Network, Callable[[], Any]], dict[Network, str]]:
    """What is to be measured, each called once; and why others are not."""
    runs: dict[Network, Callable[[], Any]] = {}
    failed: dict[Network, str] = {}
    wanted: dict[str, Any] = {}
    for network in NETWORKS:
        # Proposals of random weights hardly meet an object: a mask head would have little to do.
        if what == "train" and network.kind == "mask_rcnn":
            continue
        try:
            run = network.run(what, network.size(quick), device)
            found = run()
        except RuntimeError as error:
            failed[network] = first_line(error)
            continue
        if network.way == "torchvision":
            wanted[network.kind] = found
        elif network.way == "dcdet" and network.kind in wanted:
            differ = detections_differ if what == "test" else losses_differ
            why = differ(found, wanted[network.kind])
            if why:
                failed[network] = why
                continue
        runs[network] = run
    return runs, failed


def detections_differ(ours: Detections, theirs: dict[str, Tensor]) -> str | None:
    """In which way an image's detections differ, or None."""
    distance = (ours.boxes[:, None] - theirs["boxes"][None]).abs().amax(-1)
    near = (distance < NEAR[0]) & (ours.labels[:, None] + 1 == theirs["labels"])
    near &= (ours.scores[:, None] - theirs["scores"]).abs() < NEAR[1]
    if ours.masks is not None:
        masks = theirs["masks"][:, 0] >= 0.5
        for one, other in near.nonzero().tolist():
            union = (ours.masks[one] | masks[other]).sum()
            near[one, other] = (ours.masks[one] & masks[other]).sum() >= SAME * union
    same = min(int(near.any(0).sum()), int(near.any(1).sum()))
    most = max(near.shape)
    if most and same >= SAME * most:
        return None
    return f"{same} of {near.shape[0]} detections are among torchvision's {near.shape[1]}"


def losses_differ(ours: dict[str, float], theirs: dict[str, float]) -> str | None:
    """Which of a step's losses differs by more than random samples explain, or None."""
    for name, loss in ours.items():
        wanted = theirs[LOSSES[name]]
        if not abs(loss - wanted) <= LOSS_TOLERANCE * wanted:
            return f"the loss {name} is {loss:.4g}, torchvision's {wanted:.4g}"
    return None


# Time and memory.


def _time(
    runs: dict[Network, Callable[[], Any]], seconds: float, device: torch.device
) -> dict[Network, list[float]]:
    """Seconds of each run's calls, which take turns for `seconds` times their number."""
    times: dict[Network, list[float]] = {network: [] for network in runs}
    rounds, used = 0, 0.0
    while runs and (rounds < ROUNDS or used < seconds * len(runs)):
        for network, run in runs.items():
            times[network].append(timed(run, device))
            used += times[network][-1]
        rounds += 1
    return times


@contextmanager
def _memory_meter(
    what: What, device: torch.device, quick: bool
) -> Iterator[Callable[[Network, Callable[[], Any]], float | None]]:
    """Gives the function that tells a network's peak of extra memory in MB."""
    if device.type == "cuda":
        yield lambda network, run: cuda_peak(run, device)
        return
    with memory_child("benchmark_models", quick) as ask:
        yield lambda network, run: ask(f"{what} {NETWORKS.index(network)}")


def measured_memory(line: str, quick: bool) -> float | None:
    """For "test" or "train" and a network's number, the MB that it takes at its peak."""
    what, number = line.split()
    network = NETWORKS[int(number)]
    run = partial(network.run, cast(What, what), network.size(quick), torch.device("cpu"))
    return forked(run)


def _figures(
    times: dict[Network, list[float]], memory: dict[Network, float | None]
) -> Iterator[dict[str, Any]]:
    """An entry in the report for each network."""
    by_name = {str(network): taken for network, taken in times.items()}
    for network, taken in times.items():
        other = by_name.get(f"{network.kind} {network.beside}")
        ratio = min_ratio = None
        if other:
            ratio = statistics.median(a / b for a, b in zip(taken, other, strict=True))
            min_ratio = min(taken) / min(other)
        yield {
            "network": network.kind, "way": network.way,
            "median_ms": statistics.median(taken) * 1e3, "min_ms": min(taken) * 1e3,
            "runs": len(taken), "extra_mb": memory[network], "beside": network.beside,
            "ratio": ratio, "min_ratio": min_ratio,
        }  # fmt: skip


# The table.


def _head(report: dict[str, Any]) -> Iterator[str]:
    yield from machine_lines(report["machine"])
    yield ""
    for name, part, found in (
        ("{} with FPN", report, "detections"), ("DeepLab, {}", report["deeplab"], "labels"),
    ):  # fmt: skip
        size = f"{part['height']} x {part['width']} pixels"
        doing = {
            "test": f"an image of {size} in memory -> {found}",
            "train": f"a training step of {report['images']} images of {size}",
        }
        network = name.format(f"ResNet-{part['depth']}")
        yield f"{network}, {doing[report['benchmark']]}"


def _rows(report: dict[str, Any]) -> Iterator[str]:
    yield f"{'':24}{'milliseconds':>20}{'times as long as':>33}{'extra':>10}"
    yield f"{'':24}{'median':>10}{'fastest':>10}{'median':>10}{'fastest':>10}{'MB':>23}"
    for entry in report["networks"]:
        name = f"{entry['network']:12}{entry['way']:12}"
        keys = ("median_ms", "min_ms", "ratio", "min_ratio")
        figures = "".join(cell(entry[key], 10) for key in keys)
        yield f"{name}{figures} {entry['beside'] or '':12}{cell(entry['extra_mb'], 10)}"
    for name, why in report["failed"].items():
        yield f"{name} failed: {why}"[:100]
