"""The recorded networks: our parameter names in the 2017 release's terms, and their values."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

STAGE_BLOCKS = {2: 3, 3: 4, 4: 23, 5: 3}
HEADS = {
    "rpn.conv": "rpn_conv_3x3",
    "rpn.score": "rpn_cls_score",
    "rpn.delta": "rpn_bbox_pred",
    "roi_head.reduce": "conv_new_1",
    "roi_head.score": "rfcn_cls",
    "roi_head.delta": "rfcn_bbox",
    "roi_head.score_offset": "rfcn_cls_offset_t",
    "roi_head.delta_offset": "rfcn_bbox_offset_t",
}


def release_name(name: str) -> str:
    """`backbone.layer3.1.conv2.offset.bias` -> `res4b1_branch2b_offset_bias`."""
    module, kind = name.rsplit(".", 1)
    if module in HEADS:
        return f"{HEADS[module]}_{kind}"
    kind = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean",
            "running_var": "moving_var"}.get(kind, kind)  # fmt: skip
    module = module.removeprefix("backbone.")
    if module == "conv1":
        return "conv1_weight"
    if module == "bn1":
        return f"bn_conv1_{kind}"
    layer, block, rest = re.fullmatch(r"layer(\d)\.(\d+)\.(.*)", module).groups()
    stage = int(layer) + 1
    numbered = stage in (3, 4)
    letter = "abc"[int(block)] if not numbered else f"b{block}" if block != "0" else "a"
    if rest.startswith("downsample"):
        prefix, branch = ("res", "bn")[int(rest[-1])], "branch1"
        suffix = "weight" if prefix == "res" else kind
    else:
        kind_of, index = re.match(r"(conv|bn)(\d)", rest).groups()
        prefix, branch = ("res" if kind_of == "conv" else "bn"), "branch2" + "abc"[int(index) - 1]
        suffix = kind if prefix == "bn" else "weight"
        if rest.endswith(".offset"):
            suffix = f"offset_{'weight' if name.endswith('weight') else 'bias'}"
    return f"{prefix}{stage}{letter}_{branch}_{suffix}"


def load_param_module(shared: Path) -> ModuleType:
    """The generator of the recorded parameters and images."""
    sys.path.insert(0, str(shared / "golden" / "nets"))
    try:
        import param  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    return param


def release_weights(
    model: nn.Module, shared: Path, name: str, box_std: Tensor | None
) -> dict[str, Tensor]:
    """The state dict of `model` with the recorded network's values; every one must be used.

    `box_std`: a network recorded at test time has box weights that are already multiplied by the
    standard deviations; ours are not.
    """
    param = load_param_module(shared)
    info = json.loads((shared / "golden" / "nets" / f"{name}.json").read_text())
    shapes = info["params"]["arg"] | info["params"]["aux"]
    weights = {}
    for own, value in model.state_dict().items():
        key = release_name(own)
        assert tuple(shapes.pop(key)) == tuple(value.shape), own
        weights[own] = torch.from_numpy(param.param(key, value.shape))
    assert not shapes, sorted(shapes)
    if box_std is not None:
        for kind in ("weight", "bias"):
            value = weights[f"roi_head.delta.{kind}"]
            scale = box_std.repeat(2).repeat_interleave(49)
            weights[f"roi_head.delta.{kind}"] = value / scale.view(-1, *[1] * (value.dim() - 1))
    return weights


def subsample(value: Tensor, steps: list[int] | None) -> np.ndarray:
    """Every steps[i]-th entry of dimension i, as the recordings keep them."""
    array = value.detach().numpy()
    return array[tuple(slice(None, None, s) for s in steps)] if steps else array


def load(shared: Path, name: str) -> tuple[Any, dict[str, Any]]:
    """The arrays and the description of a recorded network."""
    folder = shared / "golden" / "nets"
    description = folder / f"{name}.json"
    info = json.loads(description.read_text()) if description.exists() else {}
    return np.load(folder / f"{name}.npz"), info
