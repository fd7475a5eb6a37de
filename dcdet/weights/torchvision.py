"""torchvision's names: ResNets, Faster and Mask R-CNN with a ResNet and an FPN (not their v2).

Source: torchvision/models/detection/{faster_rcnn,mask_rcnn,rpn}.py,
torchvision/ops/feature_pyramid_network.py.
"""

import re
from collections.abc import Collection

from dcdet.errors import UserError
from dcdet.weights import IMAGENET_MEAN, IMAGENET_STD, RESNET, Translated, by_module, renamed
from dcdet.weights.pickles import File

MODULES = {
    **{f"backbone.fpn.inner_blocks.{i}": f"neck.lateral.c{2 + i}" for i in range(4)},
    **{f"backbone.fpn.layer_blocks.{i}": f"neck.output.p{2 + i}" for i in range(4)},
    "rpn.head.conv": "rpn.conv",
    "rpn.head.cls_logits": "rpn.score",
    "rpn.head.bbox_pred": "rpn.delta",
    "roi_heads.box_head.fc6": "roi_head.fc1",
    "roi_heads.box_head.fc7": "roi_head.fc2",
    "roi_heads.box_predictor.cls_score": "roi_head.score",
    "roi_heads.box_predictor.bbox_pred": "roi_head.delta",
    **{f"roi_heads.mask_head.mask_fcn{1 + i}": f"mask_head.convs.{i}" for i in range(4)},
    "roi_heads.mask_predictor.conv5_mask": "mask_head.upsample",
    "roi_heads.mask_predictor.mask_fcn_logits": "mask_head.logits",
    # As they are called since torchvision 0.14.
    **{f"backbone.fpn.inner_blocks.{i}.0": f"neck.lateral.c{2 + i}" for i in range(4)},
    **{f"backbone.fpn.layer_blocks.{i}.0": f"neck.output.p{2 + i}" for i in range(4)},
    "rpn.head.conv.0.0": "rpn.conv",
    **{f"roi_heads.mask_head.{i}.0": f"mask_head.convs.{i}" for i in range(4)},
}
BACKBONE = re.compile(rf"(?:backbone\.body\.)?({RESNET})\.\w+")
# Published weights of COCO, by the beginning of their SHA-256, as in the files' names. They were
# trained when torchvision's frozen BatchNorm had no epsilon, and are run so to this day.
NO_EPSILON = ("258fb6c6", "bf2d0c1e")
EPSILON = 1e-5
# OpenMMLab's copies of ResNets of Caffe, under the same names, for other images.
CAFFE = ("788b5fa3", "5891d200", "3ad79236", "6cc46731")

BACKBONE_RULES = {
    "model.pixel_mean": IMAGENET_MEAN,
    "model.pixel_std": IMAGENET_STD,
    "model.backbone.stride_in": "3x3",
    "model.backbone.stem_pool": "pad",
}
RULES = {
    **BACKBONE_RULES,
    "model.pixels": "continuous",
    "model.delta_limit": "high",
    "model.roi_head.box_std": (0.1, 0.1, 0.2, 0.2),
}


def knows(names: Collection[str]) -> bool:
    """Whether these are names of a ResNet of torchvision, or of a detector with one."""
    return any(map(BACKBONE.fullmatch, names))


def translate(file: File) -> Translated:
    """The file's entries in dcdet's terms. Raises UserError."""
    if file.sha256.startswith(CAFFE):
        raise UserError(file.path, "known by its SHA-256: a ResNet of Caffe, not of torchvision",
                        "convert detectron2's R-50.pkl or R-101.pkl instead")  # fmt: skip
    found = renamed(file, _own_name, unneeded=r"fc\.\w+")
    for kind in ("weight", "bias"):
        name = f"mask_head.logits.{kind}"
        if name in found.values:  # without background's
            found.values[name] = found.values[name][1:].clone()
    if file.sha256.startswith(NO_EPSILON):
        _add_epsilon(found)
    found.rules = BACKBONE_RULES if found.backbone_only else RULES
    return found


def _own_name(entry: str) -> str | None:
    block = BACKBONE.fullmatch(entry)
    if block:
        return by_module({entry.rpartition(".")[0]: f"backbone.{block[1]}"}, entry)
    return by_module(MODULES, entry)


def _add_epsilon(found: Translated) -> None:
    """Change BatchNorm's weights so that with an epsilon they do what they did without."""
    for name, variance in list(found.values.items()):
        if name.endswith(".running_var"):
            weight = name.replace(".running_var", ".weight")
            scale = ((variance.double() + EPSILON) / variance.double()).sqrt()
            found.values[weight] = (found.values[weight] * scale).float()
    found.notes.append(
        f"known by its SHA-256: torchvision runs it with a BatchNorm epsilon of 0, dcdet with "
        f"{EPSILON}; BatchNorm's weights are changed to do the same"
    )
