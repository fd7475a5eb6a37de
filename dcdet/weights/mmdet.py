"""mmdetection's names, of its versions 2 and 3: Faster and Mask R-CNN with an FPN, plain and
deformable; and mmpretrain's of a ResNet.

Source: mmdet/models/{backbones,necks,dense_heads,roi_heads}, mmcv/ops; upgrade_model_version.py.
"""

import re
from collections.abc import Collection
from typing import Any

from dcdet.errors import UserError
from dcdet.weights import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    RESNET,
    Translated,
    by_module,
    move_background,
    renamed,
    swap_colours,
)
from dcdet.weights.pickles import File

_ROI_LAYER = "roi_head.bbox_roi_extractor.roi_layers"
MODULES = {
    **{f"neck.lateral_convs.{i}.conv": f"neck.lateral.c{2 + i}" for i in range(4)},
    **{f"neck.fpn_convs.{i}.conv": f"neck.output.p{2 + i}" for i in range(4)},
    "rpn_head.rpn_conv": "rpn.conv",
    "rpn_head.rpn_cls": "rpn.score",
    "rpn_head.rpn_reg": "rpn.delta",
    **{f"{_ROI_LAYER}.{i}.offset_fc.{layer}": f"roi_head.offset.p{2 + i}.{layer}"
       for i in range(4) for layer in (0, 2, 4)},
    **{f"{_ROI_LAYER}.{i}.mask_fc.{layer}": f"roi_head.modulation.p{2 + i}.{layer}"
       for i in range(4) for layer in (0, 2)},
    "roi_head.bbox_head.shared_fcs.0": "roi_head.fc1",
    "roi_head.bbox_head.shared_fcs.1": "roi_head.fc2",
    "roi_head.bbox_head.fc_cls": "roi_head.score",
    "roi_head.bbox_head.fc_reg": "roi_head.delta",
    **{f"roi_head.mask_head.convs.{i}.conv": f"mask_head.convs.{i}" for i in range(4)},
    "roi_head.mask_head.upsample": "mask_head.upsample",
    "roi_head.mask_head.conv_logits": "mask_head.logits",
}  # fmt: skip
BACKBONE = re.compile(rf"backbone\.{RESNET}")
OFFSET = re.compile(r"(backbone\.layer[1-4]\.\d{1,3}\.conv2)(?:\.conv)?_offset")
DETECTOR = re.compile(
    r"neck\.(lateral|fpn)_convs\.|rpn_head\.|(roi_head\.)?bbox_(head|roi_extractor)\."
    r"|roi_head\.mask_head\."
)
# Before version 2 the heads stood at the top, and boxes and RoIs followed other rules.
VERSION_1 = re.compile(r"bbox_head\.(fc_cls|fc_reg|shared_fcs)|bbox_roi_extractor\.")

BACKBONE_RULES = {"model.backbone.stem_pool": "pad"}
RULES = {
    **BACKBONE_RULES,
    "model.pixels": "continuous",
    "model.delta_limit": "both",
    "model.backbone.deform.border": "zero",
    "model.backbone.deform.mask_scale": 1.0,
    "model.roi_head.box_std": (0.1, 0.1, 0.2, 0.2),
}


def knows(names: Collection[str]) -> bool:
    """Whether these are names of a detector of mmdetection, or of a backbone alone."""
    return any(map(DETECTOR.match, names)) or (
        all(name.startswith(("backbone.", "head.")) for name in names)
        and any(map(BACKBONE.match, names))
    )


def translate(file: File) -> Translated:
    """The file's entries in dcdet's terms. Raises UserError."""
    for entry in file.weights:
        if VERSION_1.match(entry):
            raise UserError(
                f"{file.path}: {entry}", "is of mmdetection 1.x, whose boxes and RoIs differ",
                "upgrade_model_version.py of mmdetection 2 makes it one of 2.x",
            )  # fmt: skip
    found = renamed(file, _own_name, unneeded=r"head\.fc\.\w+")
    move_background(found)
    meta = file.about.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    rgb, pixels = _images(meta)
    if not rgb:
        swap_colours(found)
        found.notes.append("trained with BGR images: the first convolution's colours are swapped")
    found.rules = {**(BACKBONE_RULES if found.backbone_only else RULES), **pixels}
    found.classes = _classes(meta)
    return found


def _own_name(entry: str) -> str | None:
    module, _, kind = entry.rpartition(".")
    offset = OFFSET.fullmatch(module)
    module = f"{offset[1]}.offset" if offset else module
    known = {module: module} if offset or BACKBONE.fullmatch(module) else MODULES
    return by_module(known, f"{module}.{kind}")


def _images(meta: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Whether images were RGB, and what the config must say of them: the file's own config tells,
    if it is there; otherwise they were what most of mmdetection's configs have."""
    text = meta.get("cfg", meta.get("config"))
    text = text if isinstance(text, str) else ""
    rules = {"model.backbone.stride_in": "1x1" if re.search(r"style='caffe'", text) else "3x3"}
    found: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    for key in found:
        numbers = re.search(rf"{key}=\[([\d.,\s]+)\]", text)
        parts = re.findall(r"\d+\.?\d*", numbers[1]) if numbers else []
        if len(parts) == 3:
            found[key] = tuple(map(float, parts))
    rgb = re.search(r"to_rgb=False", text) is None
    return rgb, rules | {f"model.pixel_{key}": value if rgb else value[::-1]
                         for key, value in found.items()}  # fmt: skip


def _classes(meta: dict[str, Any]) -> list[str] | None:
    data = meta.get("dataset_meta")
    data = data if isinstance(data, dict) else {}
    names = data.get("classes", data.get("CLASSES", meta.get("CLASSES")))
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return None
    return list(names)
