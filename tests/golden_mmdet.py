"""The recorded networks of mmdetection: our parameter names in its terms, and their values."""

import json
import re
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

BACKGROUND = -1  # its row among the scores, in mmdetection; ours is the first


def mmdet_name(name: str) -> str:
    """`backbone.layer2.0.conv2.offset.bias` -> `backbone.layer2.0.conv2.conv_offset.bias`."""
    box, mask = "roi_head.bbox_head", "roi_head.mask_head"
    layers = "roi_head.bbox_roi_extractor.roi_layers"
    for pattern, theirs in (
        (r"(backbone\..*)\.offset\.(.*)", r"\1.conv_offset.\2"),
        (r"neck\.lateral\.c(\d)\.(.*)", r"neck.lateral_convs.{}.conv.\2"),
        (r"neck\.output\.p(\d)\.(.*)", r"neck.fpn_convs.{}.conv.\2"),
        (r"rpn\.conv\.(.*)", r"rpn_head.rpn_conv.\1"),
        (r"rpn\.score\.(.*)", r"rpn_head.rpn_cls.\1"),
        (r"rpn\.delta\.(.*)", r"rpn_head.rpn_reg.\1"),
        (r"roi_head\.fc1\.(.*)", rf"{box}.shared_fcs.0.\1"),
        (r"roi_head\.fc2\.(.*)", rf"{box}.shared_fcs.1.\1"),
        (r"roi_head\.score\.(.*)", rf"{box}.fc_cls.\1"),
        (r"roi_head\.delta\.(.*)", rf"{box}.fc_reg.\1"),
        (r"roi_head\.offset\.p(\d)\.(.*)", rf"{layers}.{{}}.offset_fc.\2"),
        (r"roi_head\.modulation\.p(\d)\.(.*)", rf"{layers}.{{}}.mask_fc.\2"),
        (r"mask_head\.convs\.(\d)\.(.*)", rf"{mask}.convs.\1.conv.\2"),
        (r"mask_head\.upsample\.(.*)", rf"{mask}.upsample.\1"),
        (r"mask_head\.logits\.(.*)", rf"{mask}.conv_logits.\1"),
    ):
        found = re.fullmatch(pattern, name)
        if found:
            level = int(found[1]) - 2 if found[1].isdigit() else 0
            return found.expand(theirs).format(level)
    return name


def theirs_from_ours(name: str, value: Tensor) -> Tensor:
    """A parameter, or its gradient, as mmdetection lays it out."""
    if name.startswith("roi_head.score."):
        return value.roll(BACKGROUND, 0)
    return value[4:] if name.startswith("roi_head.delta.") else value


def load_param_module(shared: Path) -> ModuleType:
    """The generator of the recorded parameters and images."""
    sys.path.insert(0, str(shared / "golden_mmdet"))
    try:
        import param_mmdet  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    return param_mmdet


def mmdet_weights(shared: Path, info: dict[str, Any]) -> dict[str, np.ndarray]:
    """The recorded network's state dict under mmdetection's names."""
    module, check = load_param_module(shared), 0
    weights = {}
    for name, shape, _ in info["state_dict"]:
        weights[name] = module.param(name, shape)
        check = zlib.crc32(np.ascontiguousarray(weights[name]).tobytes(), check)
    assert check == info["params_crc32"]
    return weights


def our_weights(model: nn.Module, theirs: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The state dict of `model` with the recorded values; every one must be used."""
    left = {name for name in theirs if not name.endswith("num_batches_tracked")}
    weights = {}
    for name, own in model.state_dict().items():
        value = torch.from_numpy(theirs[mmdet_name(name)])
        left.remove(mmdet_name(name))
        if name.startswith("roi_head.score."):
            value = value.roll(-BACKGROUND, 0)
        elif name.startswith("roi_head.delta."):
            value = torch.cat([torch.zeros_like(own[:4]), value])
        assert value.shape == own.shape, name
        weights[name] = value
    assert not left, sorted(left)
    return weights


def load(shared: Path, name: str) -> tuple[Any, Any, dict[str, Any]] | None:
    """The arrays of a recorded network, those of its training steps, and its description."""
    folder = shared / "golden_mmdet"
    if not (folder / f"{name}.npz").exists():
        return None
    info = json.loads((folder / f"{name}.json").read_text())
    return np.load(folder / f"{name}.npz"), np.load(folder / f"{name}_train.npz"), info
