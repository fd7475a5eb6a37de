"""Parameters of Faster and Mask R-CNN with an FPN, and what other frameworks call them."""

import re
import zlib

import numpy as np
import torch
import torchvision

Shapes = dict[str, tuple[int, ...]]


def own_shapes(
    depth: int = 50, *, classes: int = 80, masks: bool = False, offsets: int = 0, pooling: str = ""
) -> Shapes:
    """dcdet's names and shapes: `offsets` channels in every block of c3 to c5; `pooling`: "" for
    RoIAlign, or "dpool" or "mdpool"."""
    with torch.device("meta"):
        net = getattr(torchvision.models, f"resnet{depth}")()
    shapes = {f"backbone.{name}": tuple(value.shape) for name, value in net.state_dict().items()
              if not name.startswith("fc.") and "num_batches" not in name}  # fmt: skip
    for name, shape in list(shapes.items()):
        if offsets and re.search(r"layer[234]\.\d+\.conv2", name):
            module = name.replace("weight", "offset")
            shapes |= {f"{module}.weight": (offsets, *shape[1:]), f"{module}.bias": (offsets,)}

    def layer(name: str, *shape: int, out: int | None = None) -> None:
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = (shape[0] if out is None else out,)

    for level in range(2, 6):
        layer(f"neck.lateral.c{level}", 256, 64 << level, 1, 1)
        layer(f"neck.output.p{level}", 256, 256, 3, 3)
        if pooling:
            for index, sides in ((0, (1024, 12544)), (2, (1024, 1024)), (4, (98, 1024))):
                layer(f"roi_head.offset.p{level}.{index}", *sides)
        if pooling == "mdpool":
            layer(f"roi_head.modulation.p{level}.0", 1024, 12544)
            layer(f"roi_head.modulation.p{level}.2", 49, 1024)
    layer("rpn.conv", 256, 256, 3, 3)
    layer("rpn.score", 3, 256, 1, 1)
    layer("rpn.delta", 12, 256, 1, 1)
    layer("roi_head.fc1", 1024, 12544)
    layer("roi_head.fc2", 1024, 1024)
    layer("roi_head.score", 1 + classes, 1024)
    layer("roi_head.delta", 4 * (1 + classes), 1024)
    if masks:
        for index in range(4):
            layer(f"mask_head.convs.{index}", 256, 256, 3, 3)
        layer("mask_head.upsample", 256, 256, 2, 2)
        layer("mask_head.logits", classes, 256, 1, 1)
    return shapes


def narrow(shapes: Shapes) -> Shapes:
    """The same with few channels; classes should be few, too."""
    return {name: tuple(side if side <= 12 else 4 for side in shape)
            for name, shape in shapes.items()}  # fmt: skip


def own_values(shapes: Shapes) -> dict[str, np.ndarray]:
    """Numbers of which no two are the same; variances are positive, background has no boxes."""
    values = {}
    for name, shape in shapes.items():
        draw = np.random.default_rng(zlib.crc32(name.encode())).random(shape, np.float32)
        values[name] = draw + 0.5
        if name.startswith("roi_head.delta"):
            values[name][:4] = 0
    return values


def _heads(own: str, names: dict[str, str]) -> str | None:
    """By patterns of dcdet's modules, with the group's number, that of a level from 2, as {}."""
    module, kind = own.rsplit(".", 1)
    for pattern, name in names.items():
        found = re.fullmatch(pattern, module)
        if found:
            return name.format(*found.groups()) + f".{kind}"
    return None


def mmdet_name(own: str) -> str:
    """As mmdetection 3 calls it: MMDET.md, and the recorded lists of names."""
    if own.startswith("backbone."):
        return own.replace(".offset.", ".conv_offset.")
    own = re.sub(r"(lateral\.c|output\.p|offset\.p|modulation\.p)(\d)",
                 lambda m: f"{m[1]}{int(m[2]) - 2}", own)  # fmt: skip
    layers = "roi_head.bbox_roi_extractor.roi_layers"
    name = _heads(own, {
        r"neck\.lateral\.c(\d)": "neck.lateral_convs.{}.conv",
        r"neck\.output\.p(\d)": "neck.fpn_convs.{}.conv",
        r"rpn\.conv": "rpn_head.rpn_conv",
        r"rpn\.score": "rpn_head.rpn_cls",
        r"rpn\.delta": "rpn_head.rpn_reg",
        r"roi_head\.offset\.p(\d)\.(\d)": layers + ".{}.offset_fc.{}",
        r"roi_head\.modulation\.p(\d)\.(\d)": layers + ".{}.mask_fc.{}",
        r"roi_head\.fc1": "roi_head.bbox_head.shared_fcs.0",
        r"roi_head\.fc2": "roi_head.bbox_head.shared_fcs.1",
        r"roi_head\.score": "roi_head.bbox_head.fc_cls",
        r"roi_head\.delta": "roi_head.bbox_head.fc_reg",
        r"mask_head\.convs\.(\d)": "roi_head.mask_head.convs.{}.conv",
        r"mask_head\.upsample": "roi_head.mask_head.upsample",
        r"mask_head\.logits": "roi_head.mask_head.conv_logits",
    })  # fmt: skip
    assert name, own
    return name


def detectron2_name(own: str, prefix: str = "backbone.bottom_up.") -> str:
    """As detectron2 calls it, as in the files of its model zoo."""
    block = re.fullmatch(r"backbone\.layer(\d)\.(\d+)\.(.*)\.(\w+)", own)
    if block:
        part = {
            "downsample.0": "shortcut", "downsample.1": "shortcut.norm",
            "conv2.offset": "conv2_offset", **{f"conv{n}": f"conv{n}" for n in (1, 2, 3)},
            **{f"bn{n}": f"conv{n}.norm" for n in (1, 2, 3)},
        }[block[3]]  # fmt: skip
        return f"{prefix}res{int(block[1]) + 1}.{block[2]}.{part}.{block[4]}"
    name = _heads(own, {
        r"backbone\.conv1": prefix + "stem.conv1",
        r"backbone\.bn1": prefix + "stem.conv1.norm",
        r"neck\.lateral\.c(\d)": "backbone.fpn_lateral{}",
        r"neck\.output\.p(\d)": "backbone.fpn_output{}",
        r"rpn\.conv": "proposal_generator.rpn_head.conv",
        r"rpn\.score": "proposal_generator.rpn_head.objectness_logits",
        r"rpn\.delta": "proposal_generator.rpn_head.anchor_deltas",
        r"roi_head\.(fc[12])": "roi_heads.box_head.{}",
        r"roi_head\.score": "roi_heads.box_predictor.cls_score",
        r"roi_head\.delta": "roi_heads.box_predictor.bbox_pred",
        r"mask_head\.convs\.0": "roi_heads.mask_head.mask_fcn1",
        r"mask_head\.convs\.1": "roi_heads.mask_head.mask_fcn2",
        r"mask_head\.convs\.2": "roi_heads.mask_head.mask_fcn3",
        r"mask_head\.convs\.3": "roi_heads.mask_head.mask_fcn4",
        r"mask_head\.upsample": "roi_heads.mask_head.deconv",
        r"mask_head\.logits": "roi_heads.mask_head.predictor",
    })  # fmt: skip
    assert name, own
    return name


KINDS = ("weight", "bias", "running_mean", "running_var")
GAMMA = ("gamma", "beta", "running_mean", "running_var")


def caffe2_name(own: str, kinds: tuple[str, ...] = GAMMA) -> str:
    """As in MSRA's R-50.pkl: res4_5_branch2c_bn_gamma, after detectron2's log of loading it."""
    module, kind = own.removeprefix("backbone.").rsplit(".", 1)
    kind = kinds[KINDS.index(kind)]
    if module in ("conv1", "bn1"):
        return "conv1_w" if module == "conv1" else f"res_conv1_bn_{kind}"
    stage, block, part = re.fullmatch(r"layer(\d)\.(\d+)\.(.*)", module).groups()  # type: ignore[union-attr]
    branch = "1" if part.startswith("down") else "2" + "abc"[int(part[-1]) - 1]
    suffix = f"bn_{kind}" if part in ("downsample.1", "bn1", "bn2", "bn3") else "w"
    return f"res{int(stage) + 1}_{block}_branch{branch}_{suffix}"


def background_last(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Class scores with background's row behind the others, boxes without it."""
    values = dict(values)
    for kind in ("weight", "bias"):
        score, delta = f"roi_head.score.{kind}", f"roi_head.delta.{kind}"
        values[score] = np.concatenate([values[score][1:], values[score][:1]])
        values[delta] = values[delta][4:]
    return values


def detectron2_file(values: dict[str, np.ndarray]) -> dict[str, object]:
    """What a file of detectron2's model zoo holds: BGR, background last, older buffers."""
    values = background_last(values)
    values["backbone.conv1.weight"] = values["backbone.conv1.weight"][:, ::-1]
    model: dict[str, np.ndarray] = {detectron2_name(n): v for n, v in values.items()}
    model["pixel_mean"] = np.float32([103.53, 116.28, 123.675]).reshape(3, 1, 1)
    model["pixel_std"] = np.ones((3, 1, 1), np.float32)
    for level in range(5):
        name = f"proposal_generator.anchor_generator.cell_anchors.{level}"
        model[name] = np.zeros((3, 4), np.float32)
    return {"model": model, "__author__": "Detectron2 Model Zoo"}
