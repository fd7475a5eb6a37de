"""detectron2's names: Faster and Mask R-CNN with a ResNet and an FPN, and its ImageNet ResNets, the
latter also under Caffe2's names.

Source: detectron2/modeling, detectron2/layers/batch_norm.py, detectron2/checkpoint/*.py.
"""

import re
from collections.abc import Collection
from typing import Any

import torch

from dcdet.weights import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Translated,
    by_module,
    move_background,
    renamed,
    swap_colours,
)
from dcdet.weights.pickles import File

MODULES = {
    **{f"backbone.fpn_lateral{n}": f"neck.lateral.c{n}" for n in range(2, 6)},
    **{f"backbone.fpn_output{n}": f"neck.output.p{n}" for n in range(2, 6)},
    "proposal_generator.rpn_head.conv": "rpn.conv",
    "proposal_generator.rpn_head.objectness_logits": "rpn.score",
    "proposal_generator.rpn_head.anchor_deltas": "rpn.delta",
    "roi_heads.box_head.fc1": "roi_head.fc1",
    "roi_heads.box_head.fc2": "roi_head.fc2",
    "roi_heads.box_predictor.cls_score": "roi_head.score",
    "roi_heads.box_predictor.bbox_pred": "roi_head.delta",
    **{f"roi_heads.mask_head.mask_fcn{1 + i}": f"mask_head.convs.{i}" for i in range(4)},
    "roi_heads.mask_head.deconv": "mask_head.upsample",
    "roi_heads.mask_head.predictor": "mask_head.logits",
}
_PREFIX = r"(?:backbone\.(?:bottom_up\.)?)?"
STEM = re.compile(rf"{_PREFIX}stem\.conv1(\.norm)?")
BLOCK = re.compile(
    rf"{_PREFIX}res([2-5])\.(\d{{1,3}})\.(?:(?:conv([123])|shortcut)(\.norm)?|(conv2_offset))"
)
CAFFE2 = re.compile(r"(?:res_)?(conv1|res([2-5])_(\d{1,3})_branch(1|2[abc]))(_bn)?_([a-z_]+)")
CAFFE2_KINDS = {
    "s": "weight", "gamma": "weight", "b": "bias", "beta": "bias", "rm": "running_mean",
    "running_mean": "running_mean", "riv": "running_var", "running_var": "running_var",
}  # fmt: skip
FAMILY = re.compile(
    rf"{_PREFIX}(stem\.conv1|res[2-5]\.\d+)\.|proposal_generator\.|res[2-5]_\d+_branch"
)
UNNEEDED = (
    r"(stem\.)?(fc|linear|fc1000)\.\w+|(fc1000|pred)_[wb]|conv1_b|\w+_momentum"
    r"|pixel_(mean|std)|proposal_generator\.anchor_generator\.cell_anchors\.\d"
)
EPSILON = 1e-5

BACKBONE_RULES = {"model.backbone.stem_pool": "pad"}
RULES = {
    **BACKBONE_RULES,
    "model.pixels": "continuous",
    "model.delta_limit": "high",
    "model.backbone.deform.border": "zero",
    "model.backbone.deform.mask_scale": 1.0,
    "model.roi_head.box_std": (0.1, 0.1, 0.2, 0.2),
}


def knows(names: Collection[str]) -> bool:
    """Whether these are names of a detector or a backbone of detectron2, or of Caffe2's ResNet."""
    return any(map(FAMILY.match, names))


def translate(file: File) -> Translated:
    """The file's entries in dcdet's terms. Raises UserError."""
    found = renamed(file, _own_name, UNNEEDED)
    move_background(found)
    if _add_statistics(found):
        found.notes.append("has no BatchNorm statistics: they are part of its weights and biases")
    rgb, rules = _images(file)
    if not rgb:
        swap_colours(found)
        found.notes.append("trained with BGR images: the first convolution's colours are swapped")
    found.rules = {**(BACKBONE_RULES if found.backbone_only else RULES), **rules}
    return found


def _own_name(entry: str) -> str | None:
    caffe2 = CAFFE2.fullmatch(entry)
    if caffe2:
        _, stage, block, branch, norm, kind = caffe2.groups()
        part = f"conv{'abc'.index(branch[1]) + 1}" if branch and branch != "1" else "shortcut"
        module = f"res{stage}.{block}.{part}" if stage else "stem.conv1"
        if norm:
            entry = f"{module}.norm.{CAFFE2_KINDS.get(kind, '')}"
        else:
            entry = f"{module}.{'weight' if kind == 'w' else ''}"
    module, _, kind = entry.rpartition(".")
    stem, within = STEM.fullmatch(module), BLOCK.fullmatch(module)
    if stem:
        own = "backbone.bn1" if stem[1] else "backbone.conv1"
    elif within:
        stage, block, number, norm, offset = within.groups()
        if offset:
            part = "conv2.offset"
        elif number:
            part = f"{'bn' if norm else 'conv'}{number}"
        else:
            part = f"downsample.{1 if norm else 0}"
        own = f"backbone.layer{int(stage) - 1}.{block}.{part}"
    else:
        return by_module(MODULES, entry)
    return by_module({module: own}, entry)


def _add_statistics(found: Translated) -> bool:
    """Statistics that change nothing, where Caffe2's BatchNorm is a scale and a shift."""
    if any(name.endswith(".running_var") for name in found.values):
        return False
    scales = [own for own, entry in found.entries.items()
              if own.endswith(".weight") and entry.endswith(("_bn_s", "_bn_gamma"))]  # fmt: skip
    for own in scales:
        weight, module = found.values[own], own.removesuffix("weight")
        for kind, value in (("mean", torch.zeros_like(weight)),
                            ("var", torch.full_like(weight, 1 - EPSILON))):  # fmt: skip
            found.values[f"{module}running_{kind}"] = value
            found.entries[f"{module}running_{kind}"] = found.entries[own]
    return bool(scales)


def _images(file: File) -> tuple[bool, dict[str, Any]]:
    """Whether images were RGB, and what the config must say of them. Older files tell their pixel
    means; of the others, detectron2's copy of torchvision's ResNet-50 alone is RGB."""
    means = {key: file.weights.get(f"pixel_{key}") for key in ("mean", "std")}
    if all(value is not None and value.size == 3 for value in means.values()):
        mean, std = (tuple(round(float(n), 3) for n in value.flat)
                     for value in means.values() if value is not None)  # fmt: skip
        rgb = mean[0] > mean[2]
    else:
        rgb = file.about.get("__author__") == "torchvision"
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        if not rgb:
            mean, std = mean[::-1], (1.0, 1.0, 1.0)
    return rgb, {
        "model.pixel_mean": mean if rgb else mean[::-1],
        "model.pixel_std": std if rgb else std[::-1],
        "model.backbone.stride_in": "3x3" if rgb else "1x1",
    }
