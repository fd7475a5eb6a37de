"""The house keeps to its budget, and siblings among the configs differ only in what they say."""

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from conftest import ROOT

from dcdet import build_model, load_config
from dcdet.datasets.loader import DetectionDataset, train_loader
from dcdet.engine.setup import build_reader
from dcdet.engine.solver import build_optimizer
from dcdet.registry import check

LINES, FILES = 500, 15
PUBLIC_OPS = (
    "deform_conv2d", "psroi_pool", "deform_psroi_pool", "deform_roi_pool", "nms", "batched_nms",
)  # fmt: skip


def kernel(path: Path, function: str) -> bool:
    """Whether a function is the inside of an op."""
    return path.parent.name == "ops" and path.stem != "checks" and function not in PUBLIC_OPS


@pytest.mark.parametrize("name", ["quickstart/rfcn_dcn_r18_shapes", "small/fpn_dcn_r18_voc"])
def test_from_image_file_to_loss(name: str, tmp_path: Path) -> None:
    """At most 15 own files and 500 distinct lines run for a training pass on two images.

    The bodies of the deformable and pooling ops are kernels, written in torch where other projects
    have C++: of them, as of compiled kernels, only the public functions and their checks count.
    """
    node = (
        f"{{type: Shapes, root: {tmp_path / 's'}, split: train, train_images: 8, test_images: 1}}"
    )
    config = load_config(
        ROOT / "configs" / f"{name}.yaml",
        [
            f"data.train={node}",
            "data.classes=null",
            "model.num_classes=4",
            "data.workers=0",
            "data.batch_size=2",
        ],
    )
    data = check(config).data
    dataset = DetectionDataset(build_reader(config, "train"), data, training=True)
    model = build_model(config).train()
    package = str(ROOT / "dcdet")
    seen: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(package) or kernel(Path(code.co_filename), code.co_name):
            return None
        if event == "line":
            seen.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        batch = next(iter(train_loader(dataset, data, seed=0, epoch=0)))
        losses, _ = model(batch)
        sum(losses.values())
    finally:
        sys.settrace(None)
    files = {name for name, _ in seen}
    assert 100 < len(seen) <= LINES, len(seen)
    assert 8 <= len(files) <= FILES, sorted(files)


def differing(one: Any, other: Any, path: str = "") -> set[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = one.keys() | other.keys()
        return set().union(
            *(differing(one.get(k), other.get(k), f"{path}.{k}".strip(".")) for k in keys)
        )
    return set() if one == other else {path}


def siblings(one: Path, other: Path) -> set[str]:
    return differing(load_config(one).plain(), load_config(other).plain())


def test_plain_and_deformable_siblings_differ_only_in_deformation() -> None:
    box_head = {"model.backbone.deform", "model.roi_head.pooling"}
    offsets = {"solver.lr_multipliers.roi_head.offset.*"}
    pairs = 0
    for path in (ROOT / "configs").glob("*/*_dcn_*.yaml"):
        found = siblings(path, path.with_name(path.name.replace("_dcn", "")))
        if path.name.startswith("mask_rcnn"):
            assert found == {"model.backbone.deform"}, path.name
        elif path.name.startswith("deeplab"):
            kind = "bias" if "r101" in path.name else "*"
            rate = {f"solver.lr_multipliers.backbone.*.offset.{kind}"}
            assert found == {"model.backbone.deform"} | rate, path.name
        elif path.name.startswith("rfcn"):
            assert found == {"model.backbone.deform", "model.roi_head.deformable"}, path.name
        else:
            assert found == box_head | offsets, path.name
        pairs += 1
    assert pairs >= 13


MASKS = {"model.mask_head", "data.train.masks", "data.test.masks"}
BLOCKS = {50: {"c3": 4, "c4": 6, "c5": 3}, 101: {"c3": 4, "c4": 23, "c5": 3}}


def test_mmdetections_siblings_differ_only_in_what_their_names_say() -> None:
    folder, seen = ROOT / "configs" / "dcnv2", set()
    for path in folder.glob("*_fpn_coco.yaml"):
        name = re.fullmatch(
            r"(faster|mask)_rcnn_(m?d(?:conv|pool))?_?(group4)?_?r(50|101)_fpn_coco", path.stem
        )
        assert name, path.name
        kind, way, group, depth = name[1], name[2] or "", name[3], int(name[4])
        wanted = {"model.backbone.depth"} if depth == 101 else set()
        if kind == "mask":  # there the assigner of its RoIs lets objects claim them
            wanted |= MASKS | {"model.roi_head.claim_iou"}
        if way:
            wanted.add("model.backbone.deform" if "conv" in way else "model.roi_head.pooling")
        assert siblings(folder / "faster_rcnn_r50_fpn_coco.yaml", path) == wanted, path.name
        model = load_config(path).plain()["model"]
        pooling = {"dpool": "deformable_align", "mdpool": "modulated_align"}.get(way, "align")
        assert model["roi_head"]["pooling"] == pooling
        if "conv" in way:
            blocks = {stage: list(range(number)) for stage, number in BLOCKS[depth].items()}
            deform = {"blocks": blocks, "groups": 4 if group else 1, "modulated": way[0] == "m",
                      "border": "zero", "offset_dilation": None}  # fmt: skip
            assert model["backbone"]["deform"] == deform, path.name
        seen.add((kind, way, group, depth))
    assert len(seen) == 13
    paper = [folder / f"faster_rcnn_dcnv2_mimic_r{depth}_coco.yaml" for depth in (50, 101)]
    assert siblings(*paper) == {"model.backbone.depth", "model.backbone.deform.blocks.c4"}
    assert len(list(folder.glob("*.yaml"))) == 15


@pytest.mark.parametrize(
    ("folder", "one", "other", "wanted"),
    [
        ("torchvision", "faster_rcnn_r50_fpn_coco", "mask_rcnn_r50_fpn_coco", MASKS),
        ("detectron2", "faster_rcnn_r50_fpn_coco", "mask_rcnn_r50_fpn_coco", MASKS),
        ("detectron2", "faster_rcnn_r101_fpn_coco", "mask_rcnn_r101_fpn_coco", MASKS),
        ("detectron2", "mask_rcnn_r50_fpn_coco", "mask_rcnn_r101_fpn_coco",
         {"model.backbone.depth", "model.backbone.pretrained"}),
        ("small", "fpn_r18_voc", "fpn_mimic_r18_voc", {"model.roi_head.mimicking"}),
    ],
)  # fmt: skip
def test_other_siblings_differ_only_in_what_their_names_say(
    folder: str, one: str, other: str, wanted: set[str]
) -> None:
    place = ROOT / "configs" / folder
    assert siblings(place / f"{one}.yaml", place / f"{other}.yaml") == wanted


def test_every_config_builds_and_says_how_it_is_run() -> None:
    """Without memory for weights."""
    paths = sorted((ROOT / "configs").glob("*/*.yaml"))
    assert len(paths) >= 46
    for path in paths:
        config = load_config(path)
        with torch.device("meta"):
            model = build_model(config)
        build_optimizer(model, check(config).solver)
        run = f"# run: python tools/train.py {path.relative_to(ROOT).as_posix()}\n"
        assert run in path.read_text(), path.name


OTHER_DATA = {
    "model.num_classes", "model.rpn.anchor_scales", "model.postprocess.max_per_image",
    "data.classes", "solver.epochs", "solver.milestones", "test.evaluator.type",
    "test.evaluator.metric", "test.evaluator.through_text",
    *(f"data.{part}.{key}" for part in ("train", "test")
      for key in ("type", "root", "image_set", "boxes")),
}  # fmt: skip
OTHER_GPUS = {"data.batch_size", "solver.reference_batch"}
OTHER_HEAD = {
    f"model.roi_head.{key}"
    for key in (
        "type", "in_feature", "in_features", "channels", "reduce_channels", "hidden_channels",
        "group_size", "pooled_size", "deformable", "pooling", "samples", "hard_examples",
    )
}  # fmt: skip


def test_voc_and_coco_siblings_differ_only_in_their_data() -> None:
    for system, more in (("rfcn", OTHER_GPUS), ("faster_rcnn", set())):
        folder = ROOT / "configs" / system
        for kind in (system, f"{system}_dcn"):
            found = siblings(folder / f"{kind}_r101_voc.yaml", folder / f"{kind}_r101_coco.yaml")
            assert found == OTHER_DATA | more, kind


def test_cityscapes_and_voc_siblings_differ_only_in_their_data() -> None:
    wanted = {
        "model.num_classes", "data.classes", "data.resize.short", "data.resize.long", "data.crop",
        "solver.epochs", "solver.milestones", "solver.warmup", "test.evaluator.compare_at",
        *(f"data.{part}.{key}" for part in ("train", "test")
          for key in ("type", "root", "split", "image_set")), "data.train.sbd",
    }  # fmt: skip
    for kind in ("deeplab", "deeplab_dcn"):
        one, other = (
            ROOT / "configs" / "deeplab" / f"{kind}_r101_{data}.yaml"
            for data in ("cityscapes", "voc12")
        )
        assert siblings(one, other) == wanted, kind


def test_systems_differ_only_in_their_parts() -> None:
    """R-FCN's and Faster R-CNN's siblings: the head, and how it samples and learns."""
    learning = {"model.roi_head.background_iou", "solver.lr_multipliers.roi_head.reduce.*"}
    offsets = {"solver.lr_multipliers.roi_head.offset.*"}
    for kind in ("r101_voc", "dcn_r101_voc"):
        found = siblings(
            ROOT / "configs" / "rfcn" / f"rfcn_{kind}.yaml",
            ROOT / "configs" / "faster_rcnn" / f"faster_rcnn_{kind}.yaml",
        )
        assert found == OTHER_HEAD | learning | (offsets if "dcn" in kind else set()), kind
    for kind in ("r18_voc", "dcn_r18_voc"):
        small = [ROOT / "configs" / "small" / f"{system}_{kind}.yaml" for system in
                 ("rfcn", "faster_rcnn", "fpn")]  # fmt: skip
        mine = offsets if "dcn" in kind else set()
        assert siblings(small[0], small[1]) == OTHER_HEAD | mine, kind
        pyramid = {"model.backbone.dilate_c5", "model.neck", "model.rpn.in_features",
                   "model.rpn.anchor_scales"}  # fmt: skip
        head = {f"model.roi_head.{key}" for key in
                ("in_features", "reduce_channels", "samples", "hard_examples")}  # fmt: skip
        assert siblings(small[1], small[2]) == pyramid | head, kind
