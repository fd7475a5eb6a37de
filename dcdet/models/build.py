"""From a config to a model: the only file in models/ that sees a config."""

from typing import Any

import torch
from torch import nn

from dcdet.config import suggest
from dcdet.errors import UserError
from dcdet.registry import build, check


def build_model(config: Any) -> nn.Module:
    """The model of a loaded config, with random weights (training loads pretrained ones).

    Raises UserError for a config that does not fit the classes it names.
    """
    check(config)
    return _build_two_stage(config.model)


def _build_two_stage(node: Any) -> nn.Module:
    backbone = build(node.backbone, "backbone")
    maps, neck = backbone, None
    if node.get("neck") is not None:
        maps = neck = build(node.neck, "neck", in_channels=backbone.channels)
    rpn = build(
        node.rpn, "rpn", pixels=node.pixels,
        in_channels=_of_map(maps.channels, node.rpn, "in_features")[0],
        strides=_of_map(maps.strides, node.rpn, "in_features"),
    )  # fmt: skip
    roi_head = build(
        node.roi_head, "roi_head", num_classes=node.num_classes,
        in_channels=_of_map(maps.channels, node.roi_head, "in_feature")[0],
        stride=_of_map(maps.strides, node.roi_head, "in_feature")[0],
    )  # fmt: skip
    model = build(node, "model", backbone=backbone, neck=neck, rpn=rpn, roi_head=roi_head)
    return model.to(memory_format=torch.channels_last)


def _of_map(values: dict[str, int], node: Any, key: str) -> list[int]:
    """What `values` says of the maps that `node` reads."""
    names = [node[key]] if isinstance(node[key], str) else node[key]
    for name in names:
        if name not in values:
            raise UserError(node.where(key), f"there is no map '{name}'", suggest(name, values))
    return [values[name] for name in names]
