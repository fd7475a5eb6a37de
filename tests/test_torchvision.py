"""torchvision's names: those of its own models, every one, with its value in its place."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from rcnn_names import own_shapes
from torch.nn import functional as F

from dcdet.errors import UserError
from dcdet.weights.pickles import File
from dcdet.weights.torchvision import knows, translate

DETECTION = torchvision.models.detection
DETECTORS = {"fasterrcnn_resnet50_fpn": False, "maskrcnn_resnet50_fpn": True}


def state_of(name: str, **options: object) -> dict[str, np.ndarray]:
    """A model's entries, every number another as far as float32 tells them apart; big arrays are
    cut to 3 columns."""
    with torch.device("meta"):
        model = getattr(DETECTION, name)(weights=None, weights_backbone=None, **options)
    state = {}
    for entry, value in model.state_dict().items():
        shape = [side if axis == 0 else min(side, 3) for axis, side in enumerate(value.shape)]
        draw = np.random.default_rng(len(state)).random(shape, np.float32) + 0.5
        state[entry] = np.zeros((), "i8") if "num_batches" in entry else draw
    return state


def as_file(weights: dict[str, np.ndarray], sha256: str = "") -> File:
    return File(Path("a.pth"), sha256, weights, [], {})


def old_names(entry: str) -> str:
    """As the published files, of 2019, have them: torchvision's own upgrade the other way round."""
    entry = re.sub(r"((?:inner|layer)_blocks\.\d)\.0\.", r"\1.", entry)
    entry = entry.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
    return re.sub(r"mask_head\.(\d)\.0\.", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}.", entry)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(("name", "masks"), DETECTORS.items())
def test_detectors(name: str, masks: bool, older: bool) -> None:
    state = state_of(name, num_classes=4)
    if older:
        with torch.device("meta"):
            model = getattr(DETECTION, name)(weights=None, weights_backbone=None, num_classes=4)
        theirs = {old_names(entry): torch.zeros(model.state_dict()[entry].shape, device="meta")
                  for entry in state}  # fmt: skip
        assert theirs.keys() != state.keys()
        model.load_state_dict(theirs)  # so those are names that torchvision has had
        state = {old_names(entry): value for entry, value in state.items()}
    assert knows(state)
    found = translate(as_file(state))
    own = own_shapes(classes=3, masks=masks)
    assert found.values.keys() == own.keys()
    assert len(set(found.entries.values())) == len(own)
    counts = {entry for entry in state if "num_batches" in entry}
    assert {*found.entries.values(), *counts} == state.keys()
    for entry, value in found.values.items():
        wanted = state[found.entries[entry]]
        wanted = wanted[1:] if entry.startswith("mask_head.logits") else wanted
        assert torch.equal(value, torch.from_numpy(wanted)), entry
        assert value.shape == tuple(side if axis == 0 else min(side, 3)
                                    for axis, side in enumerate(own[entry]))  # fmt: skip
    assert (found.unknown, found.notes, found.backbone_only) == ([], [], False)
    # A few, by hand.
    pairs = {"neck.lateral.c5.bias": "fpn.inner_blocks.3", "roi_head.fc2.bias": "box_head.fc7",
             "rpn.delta.bias": "rpn.head.bbox_pred", "roi_head.score.bias": "cls_score",
             "backbone.layer3.5.bn3.running_var": "backbone.body.layer3.5.bn3"}  # fmt: skip
    assert all(theirs in found.entries[mine] for mine, theirs in pairs.items())


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_resnets(depth: int) -> None:
    with torch.device("meta"):
        model = getattr(torchvision.models, f"resnet{depth}")()
    state = {entry: np.ones([min(side, 3) for side in value.shape], "f4")
             for entry, value in model.state_dict().items()}  # fmt: skip
    assert knows(state)
    found = translate(as_file(state))
    own = {name for name in own_shapes(depth) if name.startswith("backbone.")}
    assert found.values.keys() == own
    assert found.unknown == ["fc.weight", "fc.bias"]
    assert found.backbone_only
    assert "model.delta_limit" not in found.rules


@pytest.mark.parametrize(
    "name", ["fasterrcnn_resnet50_fpn_v2", "retinanet_resnet50_fpn", "keypointrcnn_resnet50_fpn"]
)
def test_other_detectors_have_strange_entries(name: str) -> None:
    state = state_of(name)
    assert knows(state)
    strange = [entry for entry in translate(as_file(state)).values if entry.startswith("?")]
    assert len(strange) >= 18


def test_published_coco_weights_have_no_epsilon() -> None:
    """By their SHA-256; small variances, as some of theirs are, come out right as well."""
    state = state_of("fasterrcnn_resnet50_fpn")
    name, own = "backbone.body.layer2.0.bn2", "backbone.layer2.0.bn2"
    state[f"{name}.running_var"] = np.geomspace(1e-9, 10, 128).astype("f4")
    plain = translate(as_file(state))
    found = translate(as_file(state, "258fb6c6" + "0" * 56))
    assert found.notes
    assert not plain.notes
    x = torch.randn(2, 128, 3, 3, generator=torch.Generator().manual_seed(0))

    def run(values: dict[str, torch.Tensor], epsilon: float) -> torch.Tensor:
        weight, bias, mean, var = (values[f"{own}.{kind}"].double() for kind in
                                   ("weight", "bias", "running_mean", "running_var"))  # fmt: skip
        return F.batch_norm(x.double(), mean, var, weight, bias, eps=epsilon)

    wanted = run(plain.values, 0.0)
    torch.testing.assert_close(run(found.values, 1e-5), wanted, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(run(plain.values, 1e-5), wanted, rtol=1e-2)
    changed = [entry for entry in plain.values
               if not torch.equal(plain.values[entry], found.values[entry])]  # fmt: skip
    assert all(re.search(r"(bn\d|downsample\.1)\.weight$", entry) for entry in changed)
    assert len(changed) == 53


def test_resnets_of_caffe_are_refused() -> None:
    weights = {"conv1.weight": np.zeros((2, 3, 7, 7), "f4")}
    with pytest.raises(UserError, match="a ResNet of Caffe"):
        translate(as_file(weights, "5891d200" + "0" * 56))
