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
RPN = {
    "rpn.conv": "rpn_conv_3x3",
    "rpn.score": "rpn_cls_score",
    "rpn.delta": "rpn_bbox_pred",
}
BOX_HEAD = {
    "roi_head.fc1": "fc_new_1",
    "roi_head.fc2": "fc_new_2",
    "roi_head.score": "cls_score",
    "roi_head.delta": "bbox_pred",
}
NAMES = {
    "rfcn": RPN | {
        "roi_head.reduce": "conv_new_1",
        "roi_head.score": "rfcn_cls",
        "roi_head.delta": "rfcn_bbox",
        "roi_head.score_offset": "rfcn_cls_offset_t",
        "roi_head.delta_offset": "rfcn_bbox_offset_t",
    },
    "faster_rcnn": RPN | BOX_HEAD | {
        "roi_head.reduce": "conv_new_1",
        "roi_head.offset.c5": "offset",
    },
    "fpn": RPN | BOX_HEAD | {
        "rpn.conv": "rpn_conv",
        "neck.extra": "fpn_p6",
        **{f"neck.lateral.c{n}": f"fpn_p{n}_1x1" for n in range(2, 6)},
        **{f"neck.output.p{n}": f"fpn_p{n}" for n in range(2, 6)},
        **{f"roi_head.offset.p{n}": f"offset_p{n}" for n in range(2, 6)},
    },
    "deeplab": {"fc6": "fc6", "score": "score"},
}  # fmt: skip


def system_of(model: Any) -> str:
    """A key of NAMES."""
    if hasattr(model, "fc6"):
        return "deeplab"
    if model.neck is not None:
        return "fpn"
    return "faster_rcnn" if hasattr(model.roi_head, "fc1") else "rfcn"


def release_name(name: str, system: str) -> str:
    """`backbone.layer3.1.conv2.offset.bias` -> `res4b1_branch2b_offset_bias`."""
    module, kind = name.rsplit(".", 1)
    if module in NAMES[system]:
        return f"{NAMES[system][module]}_{kind}"
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
    model: nn.Module, shared: Path, name: str, *, test_time: bool
) -> dict[str, Tensor]:
    """The state dict of `model` with the recorded network's values; every one must be used.

    `test_time`: a network recorded at test time has box weights that are already multiplied by the
    standard deviations; ours are not.
    """
    param, system = load_param_module(shared), system_of(model)
    info = json.loads((shared / "golden" / "nets" / f"{name}.json").read_text())
    shapes = info["params"]["arg"] | info["params"]["aux"]
    weights = {}
    for own, value in model.state_dict().items():
        key = release_name(own, system)
        assert tuple(shapes.pop(key)) == tuple(value.shape), own
        weights[own] = torch.from_numpy(param.param(key, value.shape))
    shapes.pop("upsampling_weight", None)  # DeepLab's: bilinear
    assert not shapes, sorted(shapes)
    if test_time and system != "deeplab":
        for own in ("roi_head.delta.weight", "roi_head.delta.bias"):
            weights[own] = weights[own] / box_scale(model, weights[own])
    return weights


def box_scale(model: Any, value: Tensor) -> Tensor:
    """The standard deviation of each row of the box layer, in the shape that `value` needs.

    R-FCN's rows are 49 a number, Faster R-CNN's and FPN's are four for each class.
    """
    std = model.roi_head.box_std
    rows = std.repeat(2).repeat_interleave(49)
    if system_of(model) != "rfcn":
        rows = std.repeat(1 + model.num_classes)
    return rows.view(-1, *[1] * (value.dim() - 1))


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
