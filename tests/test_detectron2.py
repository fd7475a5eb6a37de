"""detectron2's names: detectors, ImageNet backbones, Caffe2's names; BGR images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rcnn_names import caffe2_name, detectron2_file, detectron2_name, narrow, own_shapes, own_values

from dcdet.weights.detectron2 import knows, translate
from dcdet.weights.pickles import File

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def as_file(weights: dict[str, np.ndarray], **about: Any) -> File:
    return File(Path("a.pkl"), "", weights, [], about)


def backbone(depth: int = 50) -> dict[str, np.ndarray]:
    values = own_values(narrow(own_shapes(depth)))
    return {name: value for name, value in values.items() if name.startswith("backbone.")}


@pytest.mark.parametrize(
    "options", [{}, {"depth": 101, "masks": True}, {"masks": True, "offsets": 18}]
)
@pytest.mark.parametrize("buffers", [True, False])
def test_detectors(options: dict[str, Any], buffers: bool) -> None:
    own = own_values(narrow(own_shapes(classes=2, **options)))
    model: Any = detectron2_file(own)["model"]
    spare = [name for name in model if "pixel" in name or "cell_anchors" in name]
    assert len(spare) == 7
    if not buffers:
        model = {name: value for name, value in model.items() if name not in spare}
    assert knows(model)
    found = translate(as_file(model))
    assert found.values.keys() == own.keys()
    for name, value in found.values.items():
        assert torch.equal(value, torch.from_numpy(own[name])), name
    assert found.unknown == (spare if buffers else [])
    assert found.rules["model.pixel_mean"] == MEAN
    assert found.rules["model.pixel_std"] == (1, 1, 1)
    assert found.rules["model.backbone.stride_in"] == "1x1"
    assert found.rules["model.delta_limit"] == "high"
    assert len(found.notes) == 1


def test_a_detector_of_rgb_images() -> None:
    """Its pixel means tell."""
    own = own_values(narrow(own_shapes(classes=2)))
    model: Any = detectron2_file(own)["model"]
    model["pixel_mean"] = np.float32(MEAN).reshape(3, 1, 1)
    model["pixel_std"] = np.float32(STD).reshape(3, 1, 1)
    found = translate(as_file(model))
    stem = own["backbone.conv1.weight"][:, ::-1].copy()
    assert torch.equal(found.values["backbone.conv1.weight"], torch.from_numpy(stem))
    assert (found.rules["model.pixel_mean"], found.rules["model.pixel_std"]) == (MEAN, STD)
    assert found.rules["model.backbone.stride_in"] == "3x3"
    assert not found.notes


@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.bottom_up."])
def test_backbones(prefix: str) -> None:
    own = backbone()
    model = {detectron2_name(name, prefix): value for name, value in own.items()}
    fc = {"stem.fc.weight": np.zeros((3, 4), "f4"), "stem.fc.bias": np.zeros(3, "f4")}
    assert knows(model)
    for author, swapped in (("torchvision", False), ("FAIR", True)):
        found = translate(as_file({**model, **fc}, __author__=author))
        assert found.values.keys() == own.keys()
        for name, value in found.values.items():
            wanted = own[name]
            if swapped and name == "backbone.conv1.weight":
                wanted = wanted[:, ::-1].copy()
            assert torch.equal(value, torch.from_numpy(wanted)), name
        assert found.backbone_only
        assert found.unknown == list(fc)
        assert found.rules["model.pixel_std"] == ((1, 1, 1) if swapped else STD)
        assert found.rules["model.backbone.stride_in"] == ("1x1" if swapped else "3x3")
        assert "model.delta_limit" not in found.rules


@pytest.mark.parametrize("depth", [50, 101])
@pytest.mark.parametrize(
    "kinds", [("gamma", "beta", "running_mean", "running_var"), ("s", "b", "rm", "riv")]
)
def test_caffe2_names(depth: int, kinds: tuple[str, str, str, str]) -> None:
    own = backbone(depth)
    model = {caffe2_name(name, kinds): value for name, value in own.items()}
    assert f"res4_5_branch2c_bn_{kinds[0]}" in model
    model["conv1_w"] = model["conv1_w"][:, ::-1]
    for name in ("fc1000_w", "fc1000_b", "conv1_b", "conv1_w_momentum"):
        model[name] = np.zeros(3, "f4")
    assert knows(model)
    found = translate(as_file(model))
    assert found.values.keys() == own.keys()
    for name, value in found.values.items():
        assert torch.equal(value, torch.from_numpy(own[name])), name
    assert len(found.unknown) == 4


def test_batch_norm_that_is_but_a_scale() -> None:
    """An affine layer alone does the same as BatchNorm with the statistics that are added."""
    own = backbone()
    model = {caffe2_name(name, ("s", "b", "rm", "riv")): value for name, value in own.items()
             if "running" not in name}  # fmt: skip
    found = translate(as_file(model))
    assert found.values.keys() == own.keys()
    assert len(found.notes) == 2
    x = torch.randn(2, 4, 3, 3)
    for module in ("backbone.bn1", "backbone.layer4.2.bn3", "backbone.layer1.0.downsample.1"):
        weight, bias, mean, var = (found.values[f"{module}.{kind}"] for kind in
                                   ("weight", "bias", "running_mean", "running_var"))  # fmt: skip
        out = torch.nn.functional.batch_norm(x, mean, var, weight, bias, eps=1e-5)
        plain = x * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
        torch.testing.assert_close(out, plain, rtol=1e-6, atol=1e-6)
    # detectron2's own names have group normalisation without statistics: those stay missing.
    model = {detectron2_name(name): value for name, value in own.items() if "running" not in name}
    assert len(translate(as_file(model)).values) == len(model)


@pytest.mark.parametrize(
    "entry",
    [
        "roi_heads.res5.0.conv1.weight", "head.cls_score.weight", "fpn_inner_res5_2_sum_w",
        "backbone.fpn_lateral2.norm.weight", "backbone.fpn_output6.weight", "res2_0_branch2a_gn_s",
        "proposal_generator.rpn_head.conv.conv0.weight", "roi_heads.box_head.conv1.weight",
        "res_conv1_bn_w", "res2_0_branch1_bn_x", "conv1_gamma", "roi_heads.0.box_head.fc1.weight",
    ],
)  # fmt: skip
def test_strange_entries_fit_nothing(entry: str) -> None:
    """Of C4, RetinaNet, group normalisation, Cascade R-CNN ..."""
    found = translate(as_file({**backbone(), entry: np.zeros(3, "f4")}))
    assert f"?{entry}" in found.values
