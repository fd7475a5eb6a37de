"""`dcdet convert`: a file of the release in, a checkpoint that the other commands take out."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from data_sets import picture
from golden import release_name
from params_files import params_bytes
from rcnn_names import (
    Shapes,
    background_last,
    caffe2_name,
    detectron2_file,
    detectron2_name,
    mmdet_name,
    narrow,
    own_shapes,
    own_values,
)
from torch import nn

from dcdet import build_model, cli, load_config, load_weights
from dcdet.datasets.coco import CATEGORY_IDS
from dcdet.engine import checkpoint
from dcdet.engine.convert import FAMILIES, _classes, convert
from dcdet.errors import UserError
from dcdet.weights import torchvision

# ResNet-18 with names as the release would have given them: the map is the same for any depth.
CONFIG = ROOT / "configs" / "small" / "rfcn_dcn_r18_voc.yaml"
PLAIN = ROOT / "configs" / "small" / "rfcn_r18_voc.yaml"
SMALLER = ("model.roi_head.channels=8", "model.rpn.channels=8", "model.num_classes=3",
           "data.classes=[a, b, c]")  # fmt: skip
STD = torch.tensor([0.1, 0.1, 0.2, 0.2])
Entries = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """In which no two weights or statistics are the same."""
    torch.manual_seed(3)
    net = build_model(load_config(CONFIG, SMALLER))
    for value in net.state_dict().values():
        if value.is_floating_point():
            value += 0.01 * torch.rand_like(value)
    return net


def entries_of(state: dict[str, torch.Tensor], box_test: bool) -> Entries:
    """As the release saves a network: arg:, aux:, and box weights for its test network."""
    entries = {}
    for name, value in state.items():
        key = ("aux:" if "running" in name else "arg:") + release_name(name, "rfcn")
        entries[key] = value.numpy()
        if box_test and name.startswith("roi_head.delta."):
            rows = STD.repeat(2).repeat_interleave(len(value) // 8)
            entries[f"{key}_test"] = (value * rows.view(-1, *[1] * (value.dim() - 1))).numpy()
    return entries


@pytest.fixture(scope="module")
def entries(model: nn.Module) -> Entries:
    state = {n: v for n, v in model.state_dict().items() if "num_batches" not in n}
    return entries_of(state, box_test=True)


def write(path: Path, entries: Entries) -> Path:
    path.write_bytes(params_bytes(entries))
    return path


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dcdet", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def converted(
    source: Path, destination: Path, config: Path = CONFIG, overrides: tuple[str, ...] = SMALLER
) -> list[str]:
    """The reported lines of a conversion in this process."""
    lines: list[str] = []
    assert convert(load_config(config, overrides), source, destination, lines.append) == 0
    return lines


def test_from_params_to_detections(model: nn.Module, entries: Entries, tmp_path: Path) -> None:
    """The commands one after the other, as a user would give them."""
    source = write(tmp_path / "rfcn-0008.params", {**entries, "arg:fc1_bias": np.zeros(2, "f")})
    destination = tmp_path / "rfcn.pth"
    done = run("convert", source, destination, "--config", CONFIG, *SMALLER)
    assert done.returncode == 0, done.stderr
    number, sha256 = len(entries), hashlib.sha256(source.read_bytes()).hexdigest()
    assert done.stdout.splitlines() == [
        f"{source}: MXNet, {number + 1} arrays, sha256 {sha256}",
        f"{number - 2} loaded into the whole model",
        "0 missing",
        "1 unused (arg:fc1_bias)",
        f"written: {destination} (use it with --weights {destination})",
    ]
    # The small config is of another world than the release, and that is said.
    for key in ("model.pixels", "model.pixel_mean", "model.backbone.deform.border"):
        assert f": {key} is " in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["rfcn-0008.params", "rfcn.pth"]

    net = build_model(load_config(CONFIG, SMALLER))
    meta = load_weights(net, destination)
    for name, value in model.state_dict().items():
        if "num_batches" not in name:
            assert torch.equal(net.state_dict()[name], value), name
    assert meta["classes"] == ["a", "b", "c"]
    assert meta["category_ids"] == [1, 2, 3]
    assert meta["origin"] == {"family": "MXNet", "file": source.name, "sha256": sha256}
    assert torch.load(destination, weights_only=True)["meta"] == meta

    from PIL import Image

    Image.fromarray(picture((60, 80))).save(tmp_path / "a.png")
    words = ["demo", CONFIG, "--weights", destination, tmp_path / "a.png", *SMALLER[:3],
             "--output", tmp_path / "out", "--device", "cpu", "--score-threshold", 0]  # fmt: skip
    assert main(*words, "data.classes=null") == 0
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {(row["category_id"], row["name"]) for row in rows} <= {(1, "a"), (2, "b"), (3, "c")}
    assert rows


def test_a_backbone_alone_fills_the_backbone(
    model: nn.Module, entries: Entries, tmp_path: Path
) -> None:
    kept = {key: value for key, value in entries.items()
            if key[4:].startswith(("conv1", "bn", "res")) and "_offset_" not in key}  # fmt: skip
    source = write(tmp_path / "resnet-0000.params", {
        **kept, "arg:fc1_weight": np.zeros((5, 2), "f"), "arg:fc1_bias": np.zeros(5, "f"),
    })  # fmt: skip
    destination = tmp_path / "resnet.pth"
    destination.write_text("older, to be replaced")
    lines = converted(source, destination)
    assert lines[1:] == [
        f"{len(kept)} loaded into model.backbone, the file has nothing else",
        "0 missing",
        "2 unused (arg:fc1_weight, arg:fc1_bias)",
        f"written: {destination} (use it with model.backbone.pretrained={destination})",
    ]
    for config in (CONFIG, PLAIN):
        backbone = build_model(load_config(config, SMALLER)).get_submodule("backbone")
        checkpoint.load_pretrained(backbone, str(destination))
        for name, value in backbone.state_dict().items():
            if ".offset." in name:
                assert not value.any()
            elif "num_batches" not in name:
                assert torch.equal(value, model.state_dict()[f"backbone.{name}"]), name


def test_the_wrong_architecture_is_refused(entries: Entries, tmp_path: Path) -> None:
    source, destination = write(tmp_path / "a.params", entries), tmp_path / "a.pth"
    done = run("convert", source, destination, "--config", PLAIN, *SMALLER)
    assert (done.returncode, done.stdout) == (2, "")
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"error: {source}: does not fit the model of {PLAIN}: ")
    assert "0 missing, 8 unused (arg:res5a_branch2b_offset_weight, " in error
    cases: list[tuple[Entries, tuple[str, ...], str]] = [
        (
            {key: value for key, value in entries.items() if "rpn_conv" not in key},
            SMALLER, r"2 missing \(rpn\.conv\.weight, rpn\.conv\.bias\), 0 unused",
        ),
        (
            entries, (*SMALLER, "model.num_classes=2", "data.classes=[a, b]"),
            r"4 of another shape \(arg:rfcn_cls_weight is \(36, 8, 1, 1\), wanted \(27, 8, 1, 1\)",
        ),
        ({"arg:a": np.zeros(2, "f")}, SMALLER, r": 0 loaded, 120 missing \(backbone\.conv1"),
    ]  # fmt: skip
    for content, overrides, message in cases:
        with pytest.raises(UserError, match=message):
            converted(write(source, content), destination, overrides=overrides)
    assert not destination.exists()


def main(*words: object) -> int:
    """A command in this process."""
    return cli.main([str(word) for word in words])


def test_debug_names_everything(
    entries: Entries, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.params", entries)
    assert main("--debug", "convert", source, tmp_path / "a", "--config", PLAIN, *SMALLER) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "loaded: rpn.conv.weight from arg:rpn_conv_3x3_weight" in lines
    unused = {line for line in lines if line.startswith("unused: ")}
    assert len(unused) == 8
    assert "unused: arg:rfcn_cls_offset_t_bias" in unused


def test_other_files_are_refused(entries: Entries, tmp_path: Path) -> None:
    source, destination = tmp_path / "source", tmp_path / "a.pth"
    ours, bare = tmp_path / "ours.pth", tmp_path / "bare.pth"
    checkpoint.save(ours, {"model": {"a": torch.zeros(1)}, "meta": {}})
    torch.save({"fc.weight": torch.zeros(1)}, bare)
    whole = params_bytes(entries)
    for content, message in (
        (b"", "is of no kind that convert reads .*MXNet's .params"),
        (b"<html>sign in to download</html>", "is of no kind"),
        (b"\x80\x02cos\nsystem\n", "holds 'os.system'"),
        (bare.read_bytes(), r"has names of no network that is known \(fc\.weight\)"),
        (ours.read_bytes(), "is a dcdet checkpoint already"),
        (whole[:-1000], r"source: \w+ \d+ of \d+: cut off"),
        (whole[: len(whole) // 2], r"source: array \d+ of \d+: cut off"),
        (whole + b"\n", "source: end: damaged"),
        (params_bytes({}), "0 loaded"),
    ):
        source.write_bytes(content)
        with pytest.raises(UserError, match=message):
            converted(source, destination)
    assert not destination.exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_non_finite_weights_are_refused(entries: Entries, tmp_path: Path, bad: float) -> None:
    value = entries["arg:rpn_cls_score_bias"].astype(np.float64)
    value[3] = bad
    source = write(tmp_path / "a.params", {**entries, "arg:rpn_cls_score_bias": value})
    with pytest.raises(UserError, match=r"a\.params: arg:rpn_cls_score_bias: has non-finite"):
        converted(source, tmp_path / "a.pth")
    assert not (tmp_path / "a.pth").exists()


def test_the_source_is_never_overwritten(
    entries: Entries, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.params", entries)
    before = source.read_bytes()
    (tmp_path / "soft").symlink_to(source)
    (tmp_path / "hard").hardlink_to(source)
    for name in ("a.params", "soft", "hard", "../" + tmp_path.name + "/a.params"):
        assert main("convert", source, tmp_path / name, "--config", CONFIG, *SMALLER) == 2
        assert "is the file that is to be converted" in capsys.readouterr().err
    assert source.read_bytes() == before


# Files of other families. The models are skeletons: parameters by name, with few channels.

TWO = ("model.num_classes=2", "data.classes=[x, y]")


def skeleton(shapes: Shapes) -> nn.Module:
    root = nn.Module()
    for name, shape in shapes.items():
        *parents, kind = name.split(".")
        module = root
        for part in parents:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(kind, nn.Parameter(torch.zeros(shape)))
    return root


@pytest.fixture
def rcnn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Shapes]:
    """Makes convert fill a skeleton with these options of `own_shapes`."""

    def made(**options: Any) -> Shapes:
        shapes = narrow(own_shapes(classes=2, **options))
        monkeypatch.setattr("dcdet.engine.convert.build_model", lambda _: skeleton(shapes))
        return shapes

    return made


def pickled(path: Path, content: object) -> Path:
    path.write_bytes(pickle.dumps(content, 2))
    return path


def mmdet_file(own: Entries) -> Any:
    state = {
        mmdet_name(name): torch.from_numpy(value) for name, value in background_last(own).items()
    }
    counts = {name.replace("running_var", "num_batches_tracked"): torch.tensor(0)
              for name in state if name.endswith("running_var")}  # fmt: skip
    state = {f"module.{name}": value for name, value in (state | counts).items()}
    return {"meta": {"CLASSES": ("dog", "cat"), "mmdet_version": "2.0.0"}, "state_dict": state}


def torchvision_file(own: Entries) -> Any:
    """By its own tables: tests/test_torchvision.py has the names from torchvision itself."""
    table = {mine: theirs for theirs, mine in torchvision.MODULES.items()}
    state = {}
    for name, value in own.items():
        module, kind = name.rsplit(".", 1)
        theirs = table.get(module, module.replace("backbone.", "backbone.body."))
        state[f"{theirs}.{kind}"] = torch.from_numpy(value)
    return {"model": state, "epoch": 3}


def filled(source: Path, destination: Path, *overrides: str) -> tuple[dict[str, Any], list[str]]:
    lines = converted(source, destination, PLAIN, overrides or TWO)
    return checkpoint.load(destination), lines


def test_a_file_of_detectron2(rcnn: Callable[..., Shapes], tmp_path: Path) -> None:
    own = own_values(rcnn(depth=101, masks=True))
    source = pickled(tmp_path / "model_final.pkl", detectron2_file(own))
    state, lines = filled(source, tmp_path / "a.pth")
    assert state["model"].keys() == own.keys()
    for name, value in own.items():
        assert torch.equal(state["model"][name], torch.from_numpy(value)), name
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    assert lines == [
        f"{source}: detectron2, {len(own) + 7} arrays, sha256 {sha256}",
        f"{len(own)} loaded into the whole model",
        "0 missing",
        "7 unused (pixel_mean, pixel_std, proposal_generator.anchor_generator.cell_anchors.0, ...)",
        "trained with BGR images: the first convolution's colours are swapped",
        f"written: {tmp_path / 'a.pth'} (use it with --weights {tmp_path / 'a.pth'})",
    ]
    assert state["meta"]["origin"] == {
        "family": "detectron2", "file": "model_final.pkl", "sha256": sha256,
    }  # fmt: skip
    assert (state["meta"]["classes"], state["meta"]["category_ids"]) == (["x", "y"], [1, 2])


@pytest.mark.parametrize("new", [True, False])
def test_a_file_of_mmdetection(
    rcnn: Callable[..., Shapes], tmp_path: Path, new: bool, caplog: pytest.LogCaptureFixture
) -> None:
    own = own_values(rcnn(offsets=27))
    torch.save(mmdet_file(own), tmp_path / "a.pth", _use_new_zipfile_serialization=new)
    state, lines = filled(tmp_path / "a.pth", tmp_path / "b.pth")
    for name, value in own.items():
        assert torch.equal(state["model"][name], torch.from_numpy(value)), name
    assert lines[1:4] == [f"{len(own)} loaded into the whole model", "0 missing", "0 unused"]
    assert state["meta"]["classes"] == ["dog", "cat"]
    assert "data.classes are ['x', 'y'], those of the file ['dog', 'cat']" in caplog.text
    caplog.clear()
    state, _ = filled(tmp_path / "a.pth", tmp_path / "b.pth", TWO[0], "data.classes=[dog, cat]")
    assert "data.classes are" not in caplog.text


def test_a_file_of_torchvision(rcnn: Callable[..., Shapes], tmp_path: Path) -> None:
    own = own_values(rcnn())
    torch.save(torchvision_file(own), tmp_path / "a.pth")
    state, _ = filled(tmp_path / "a.pth", tmp_path / "b.pth")
    for name, value in own.items():
        assert torch.equal(state["model"][name], torch.from_numpy(value)), name


def test_rules_are_told(rcnn: Callable[..., Shapes], tmp_path: Path, caplog: Any) -> None:
    own = own_values(rcnn())
    torch.save(mmdet_file(own), tmp_path / "a.pth")
    filled(tmp_path / "a.pth", tmp_path / "b.pth", *TWO, "model.pixel_std=[1, 1, 1]",
           "model.backbone.stride_in=1x1")  # fmt: skip
    told = [record.getMessage() for record in caplog.records if "trained with" in record.msg]
    assert {message.split(": ")[1].split(" is ")[0] for message in told} == {
        "model.pixel_std", "model.backbone.stride_in",
    }  # fmt: skip


def test_an_imagenet_backbone_of_caffe2(tmp_path: Path) -> None:
    """Into a real ResNet, by the way that training takes."""
    torch.manual_seed(0)
    backbone = build_model(load_config(PLAIN, SMALLER)).get_submodule("backbone")
    state = {f"backbone.{name}": torch.rand_like(value) + 0.5 for name, value
             in backbone.state_dict().items() if "num_batches" not in name}  # fmt: skip
    content = {"fc1000_w": np.zeros((5, 2), "f4")}
    for name, value in state.items():
        array = value.numpy()
        content[caffe2_name(name)] = array[:, ::-1] if name == "backbone.conv1.weight" else array
    source, destination = pickled(tmp_path / "R-18.pkl", content), tmp_path / "r18.pth"
    lines = converted(source, destination, PLAIN)
    assert lines[1:4] == [
        f"{len(state)} loaded into model.backbone, the file has nothing else",
        "0 missing",
        "1 unused (fc1000_w)",
    ]
    checkpoint.load_pretrained(backbone, str(destination))
    for name, value in backbone.state_dict().items():
        if "num_batches" not in name:
            assert torch.equal(value, state[f"backbone.{name}"]), name


def test_other_architectures_are_refused_by_name(
    rcnn: Callable[..., Shapes], tmp_path: Path
) -> None:
    """Each of another depth, head or number of classes than the model: ResNet-50, no masks."""
    source, destination = tmp_path / "source", tmp_path / "a.pth"
    rcnn()

    def refused(content: object, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            filled(pickled(source, content), destination)
        assert str(caught.value).startswith(str(source))

    def of(**options: Any) -> Any:
        return detectron2_file(own_values(narrow(own_shapes(**{"classes": 2, **options}))))

    refused(of(depth=101), r"0 missing, 255 unused \(backbone\.bottom_up\.res4\.6\.conv1")
    refused(of(masks=True), r"12 unused \(roi_heads\.mask_head\.mask_fcn1\.weight")
    refused(of(classes=3), r"4 of another shape \(roi_heads\.box_predictor\.cls_score\.weight is")
    refused(of(offsets=18), r"26 unused \(backbone\.bottom_up\.res3\.0\.conv2_offset\.weight")
    wide = of()
    wide["model"]["backbone.bottom_up.res2.0.conv2.weight"] = np.zeros((4, 1, 3, 3), "f4")
    refused(wide, r"1 of another shape \(backbone\.bottom_up\.res2\.0\.conv2\.weight is \(4, 1, 3")
    c4 = {name: value for name, value in of()["model"].items() if "fpn" not in name}
    c4["roi_heads.res5.0.conv1.weight"] = np.zeros((4, 4, 1, 1), "f4")
    refused({"model": c4}, r"16 missing \(neck\.lateral.*1 unused \(roi_heads\.res5\.0\.conv1")
    retina = {name: value for name, value in of()["model"].items() if "_" not in name[:12]}
    retina["head.cls_score.weight"] = np.zeros((4, 4, 1, 1), "f4")
    refused({"model": retina}, r"missing \(.*rpn\.conv.*1 unused \(head\.cls_score\.weight")
    cascade = of()
    cascade["model"]["roi_heads.box_head.0.fc1.weight"] = np.zeros((4, 4), "f4")
    refused(cascade, r"0 missing, 1 unused \(roi_heads\.box_head\.0\.fc1\.weight\)")
    broken = of()
    broken["model"]["backbone.fpn_output4.bias"] = np.float32([0, np.nan, 0, 0])
    refused(broken, r"source: backbone\.fpn_output4\.bias: has non-finite values")
    assert not destination.exists()


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_files_with_code_are_refused_and_nothing_runs(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker, source = tmp_path / "marker", tmp_path / "model_final.pkl"

    class Code:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {marker}",)

    own = own_values(narrow(own_shapes(classes=2)))
    content = {**detectron2_file(own), "__author__": Code()}
    if form == "pickle":
        pickled(source, content)
    else:
        torch.save(content, source, _use_new_zipfile_serialization=form == "zip")
    for debug in ([], ["--debug"]):
        assert main(*debug, "convert", source, tmp_path / "a.pth", "--config", PLAIN) == 2
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith(f"error: {source}: holds 'posix.system', which is no part of")
        assert debug or len(error) == 1
    assert sorted(os.listdir(tmp_path)) == ["model_final.pkl"]
    if form == "pickle":
        pickle.loads(source.read_bytes())
        assert marker.exists()  # so it would have run


def test_families_are_not_mistaken_for_each_other() -> None:
    own = own_values(narrow(own_shapes(classes=2, masks=True)))
    backbone = {name: value for name, value in own.items() if name.startswith("backbone.")}
    plain = {name.removeprefix("backbone."): value for name, value in backbone.items()}
    detectron2_names = [detectron2_name(name, "") for name in backbone]
    for wanted, names in (
        ("mmdetection", mmdet_file(own)["state_dict"]), ("mmdetection", {"module.bbox_head.a": 1}),
        ("mmdetection", backbone), ("torchvision", torchvision_file(own)["model"]),
        ("torchvision", plain), ("detectron2", detectron2_file(own)["model"]),
        ("detectron2", detectron2_names), ("detectron2", list(map(caffe2_name, backbone))),
        ("", own), ("", ["features.0.weight"]), ("", ["backbone.0.body.conv1.weight"]),
        ("", ["backbone.layer1.0.conv1.weight", "classifier.4.weight"]),
    ):  # fmt: skip
        plain_names = [name.removeprefix("module.") for name in names]
        known = [name for name, family in FAMILIES.items() if family.knows(plain_names)]
        assert known == [wanted] * bool(wanted), (wanted, plain_names[:3])


def test_official_categories(shared: Path) -> None:
    content = json.loads((shared / "data/coco/annotations/instances_val2017.json").read_text())
    assert {c["name"]: c["id"] for c in content["categories"]} == CATEGORY_IDS
    assert list(CATEGORY_IDS.values()) == sorted(CATEGORY_IDS.values())


COCO = ROOT / "configs" / "rfcn" / "rfcn_dcn_r101_coco.yaml"
VOC = ROOT / "configs" / "rfcn" / "rfcn_dcn_r101_voc.yaml"
FILE = "data.test={type: COCO, root: data/mine, annotations: a.json, images: b}"


@pytest.mark.parametrize(
    ("config", "overrides", "classes", "ids"),
    [
        (COCO, [], list(CATEGORY_IDS), list(CATEGORY_IDS.values())),
        (COCO, ["data.classes=[dog, cat]", "model.num_classes=2"], ["dog", "cat"], [18, 17]),
        (COCO, ["model.num_classes=79"], None, None),
        (COCO, [FILE], None, None),
        (COCO, [FILE, "data.classes=[x]", "model.num_classes=1"], ["x"], None),
        (VOC, [], 20, list(range(1, 21))),
    ],
)
def test_labels_get_names_and_ids(
    config: Path, overrides: list[str], classes: Any, ids: list[int] | None
) -> None:
    found = _classes(load_config(config, overrides))
    names = found.get("classes")
    assert names == classes if classes != 20 else (len(names), names[0]) == (20, "aeroplane")
    assert found.get("category_ids") == ids


def test_as_many_names_as_classes() -> None:
    with pytest.raises(UserError, match=r"data\.classes|rfcn_dcn_r101_voc\.yaml:\d+: 20 names"):
        _classes(load_config(VOC, ["model.num_classes=19"]))
