"""mmdetection's names: those of the recorded networks, every one, with its value in its place."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rcnn_names import background_last, mmdet_name, narrow, own_shapes, own_values

from dcdet.errors import UserError
from dcdet.weights.mmdet import knows, translate
from dcdet.weights.pickles import File

NETS: dict[str, dict[str, Any]] = {
    "faster_mdconv": {"offsets": 27},
    "faster_dpool": {"pooling": "dpool"},
    "mask_plain": {"masks": True},
}


def as_file(weights: dict[str, np.ndarray], **about: Any) -> File:
    return File(Path("a.pth"), "", weights, [], about)


def test_the_names_of_the_recorded_networks(shared: Path) -> None:
    for net, options in NETS.items():
        listed = json.loads((shared / "golden_mmdet" / f"{net}.json").read_text())["state_dict"]
        shapes = {name: tuple(shape) for name, shape, _ in listed if "num_batches" not in name}
        own = own_shapes(**options)
        assert {mmdet_name(name) for name in own} == set(shapes), net
        arrays = {name: np.zeros(shape, dtype) if "num_b" in name else
                  np.broadcast_to(np.float32(0), [min(side, 400) for side in shape])
                  for name, shape, dtype in listed}  # fmt: skip
        assert knows(arrays)
        found = translate(as_file(arrays))
        assert found.unknown == []
        assert {name: tuple(value.shape) for name, value in found.values.items()} == {
            name: tuple(min(side, 400) for side in shape) for name, shape in own.items()
        }, net
        assert {name: mmdet_name(name) for name in own} == found.entries


@pytest.mark.parametrize("options", [*NETS.values(), {"offsets": 18}, {"pooling": "mdpool"}])
@pytest.mark.parametrize("older", [False, True])
def test_values(options: dict[str, Any], older: bool) -> None:
    own = own_values(narrow(own_shapes(classes=2, **options)))
    theirs = {mmdet_name(name): value for name, value in background_last(own).items()}
    assert len(theirs["roi_head.bbox_head.fc_reg.bias"]) == 8
    if older:
        theirs = {name.replace("conv2.conv_offset", "conv2_offset"): value
                  for name, value in theirs.items()}  # fmt: skip
    found = translate(as_file(theirs))
    assert found.values.keys() == own.keys()
    for name, value in found.values.items():
        assert torch.equal(value, torch.from_numpy(own[name])), name
    assert (found.notes, found.classes, found.backbone_only) == ([], None, False)


def test_a_classifier_of_mmpretrain() -> None:
    own = {n: v for n, v in own_values(narrow(own_shapes(18))).items() if n.startswith("backbone.")}
    heads = {"head.fc.weight": np.zeros((4, 4), "f4"), "head.fc.bias": np.zeros(4, "f4")}
    assert knows({**own, **heads})
    found = translate(as_file({**own, **heads}, meta={"CLASSES": ["cat", "dog"]}))
    assert found.backbone_only
    assert found.values.keys() == own.keys()
    assert found.unknown == list(heads)
    assert "model.pixels" not in found.rules
    assert not knows({**own, "classifier.4.weight": np.zeros(1)})  # torchvision's segmentation


# As mmengine writes a config of today, and mmcv wrote one of 2020.
TODAY = """model = dict(
    backbone=dict(depth=50, style='%s', type='ResNet'),
    data_preprocessor=dict(
        bgr_to_rgb=%s,
        mean=[
            %s,
        ],
        std=[
            %s,
        ]),
    bbox_coder=dict(target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[0.1, 0.1, 0.2, 0.2]))
"""
OLDER = "backbone=dict(style='%s')\nimg_norm_cfg = dict(to_rgb=%s,\n mean=[%s], std=[%s])\n"
PYTORCH = ("pytorch", True, "123.675, 116.28, 103.53", "58.395, 57.12, 57.375")
CAFFE = ("caffe", False, "103.530, 116.280, 123.675", "1.0, 1.0, 1.0")
IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


@pytest.mark.parametrize("text", [TODAY, OLDER])
def test_the_config_in_the_file_tells_the_images(text: str) -> None:
    own = own_values(narrow(own_shapes(classes=2)))
    theirs = {mmdet_name(name): value for name, value in background_last(own).items()}
    stem = torch.from_numpy(own["backbone.conv1.weight"])
    for key in ("cfg", "config"):
        for values, flipped, stride, mean, std in (
            (PYTORCH, False, "3x3", *IMAGENET),
            (CAFFE, True, "1x1", IMAGENET[0], (1.0, 1.0, 1.0)),
        ):
            found = translate(as_file(theirs, meta={key: text % values}))
            wanted = stem.flip(1) if flipped else stem
            assert torch.equal(found.values["backbone.conv1.weight"], wanted)
            assert bool(found.notes) == flipped
            assert found.rules["model.backbone.stride_in"] == stride
            assert found.rules["model.pixel_mean"] == mean
            assert found.rules["model.pixel_std"] == std
            assert found.rules["model.delta_limit"] == "both"
    for meta in (None, 3, {}, {"cfg": 3}, {"cfg": "mean=[1, 2]"}):
        rules = translate(as_file(theirs, meta=meta)).rules
        assert (rules["model.pixel_mean"], rules["model.pixel_std"]) == IMAGENET


@pytest.mark.parametrize(
    ("meta", "wanted"),
    [
        ({"CLASSES": ("a", "b")}, ["a", "b"]),
        ({"dataset_meta": {"classes": ["a", "b"]}, "CLASSES": ["c"]}, ["a", "b"]),
        ({"dataset_meta": {"CLASSES": ("a",)}}, ["a"]),
        ({"dataset_meta": {}}, None),
        ({"CLASSES": None}, None),
        ({"CLASSES": "person"}, None),
        ({"CLASSES": ["a", 3]}, None),
        ([], None),
    ],
)
def test_class_names(meta: Any, wanted: list[str] | None) -> None:
    own = own_values(narrow(own_shapes(classes=2)))
    theirs = {mmdet_name(name): value for name, value in background_last(own).items()}
    assert translate(as_file(theirs, meta=meta)).classes == wanted


def test_strange_entries_fit_nothing() -> None:
    """Named as the file does, but for no model: other necks, heads and blocks are refused."""
    own = own_values(narrow(own_shapes(classes=2)))
    theirs = {mmdet_name(name): value for name, value in background_last(own).items()}
    strange = ["neck.fpn_convs.4.conv.weight", "roi_head.bbox_head.0.fc_cls.weight",
               "backbone.layer2.0.context_block1.conv_mask.weight", "roi_head.score.weight",
               "backbone.layer1.0.conv1.scale", "semantic_head.x.weight"]  # fmt: skip
    found = translate(as_file({**theirs, **{name: np.zeros(3, "i8") for name in strange}}))
    assert found.values.keys() - own.keys() == {f"?{name}" for name in strange}
    assert not found.backbone_only


def test_refusals() -> None:
    one = np.zeros((2, 2), "f4")
    for entry in ("bbox_head.fc_cls.weight", "bbox_head.shared_fcs.0.bias"):
        assert knows([entry])
        with pytest.raises(UserError, match=re.escape(f"{entry}: is of mmdetection 1.x")):
            translate(as_file({entry: one}))
    name = "backbone.layer2.0.conv2{}.weight"
    with pytest.raises(UserError, match="is the same parameter"):
        translate(as_file({name.format(".conv_offset"): one, name.format("_offset"): one}))
    with pytest.raises(UserError, match=r"rpn_cls\.bias: holds int64"):
        translate(as_file({"rpn_head.rpn_cls.bias": np.zeros(3, "i8")}))
