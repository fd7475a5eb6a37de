"""From a config to a model: the only file in models/ that sees a config."""

from typing import Any

import torch
from torch import nn

from dcdet.config import suggest
from dcdet.errors import UserError
from dcdet.registry import build, check, task_of


def build_model(config: Any) -> nn.Module:
    """The model of a loaded config, with random weights (training loads pretrained ones).

    Raises UserError for a config that does not fit the classes it names.
    """
    check(config)
    backbone = build(config.model.backbone, "backbone")
    if task_of(config) == "segmentation":
        model = build(config.model, "model", backbone=backbone)
    else:
        model = _build_two_stage(config.model, backbone)
    return model.to(memory_format=torch.channels_last)


def _build_two_stage(node: Any, backbone: Any) -> nn.Module:
    maps, neck = backbone, None
    if node.get("neck") is not None:
        context = {"in_channels": backbone.channels, "strides": backbone.strides}
        maps = neck = build(node.neck, "neck", **context)
    heads: dict[str, Any] = {}
    for role in ("rpn", "roi_head", "mask_head"):
        part = node.get(role)
        heads[role] = None
        if part is not None:
            heads[role] = build(
                part, role, num_classes=node.num_classes, pixels=node.pixels,
                delta_limit=node.get("delta_limit", "none"), **_of_maps(maps, part),
            )  # fmt: skip
    return build(node, "model", backbone=backbone, neck=neck, **heads)


def _of_maps(maps: Any, node: Any) -> dict[str, Any]:
    """Channels and strides of the maps that `node` reads: one in_feature or several in_features."""
    key = "in_features" if "in_features" in node else "in_feature"
    names = node[key] if key == "in_features" else [node[key]]
    for name in names:
        if name not in maps.channels:
            raise UserError(
                node.where(key), f"there is no map '{name}'", suggest(name, maps.channels)
            )
    channels = {maps.channels[name] for name in names}
    if len(channels) != 1:
        raise UserError(node.where(key), f"'{key}' must be one or more maps of equal channels")
    strides = [maps.strides[name] for name in names]
    return {"in_channels": channels.pop(), "stride": strides[0], "strides": strides}
