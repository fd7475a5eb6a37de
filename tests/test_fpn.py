"""The feature pyramid against torchvision's, and its promises."""

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torchvision.ops import FeaturePyramidNetwork

from dcdet import build_model, load_config
from dcdet.errors import UserError
from dcdet.models.fpn import FPN

CHANNELS = {"c2": 4, "c3": 6, "c4": 8, "c5": 10}
STRIDES = {"c2": 4, "c3": 8, "c4": 16, "c5": 32}
NAMES = list(CHANNELS)


def make(names: list[str] = NAMES, extra: str = "conv") -> FPN:
    torch.manual_seed(0)
    return FPN(CHANNELS, STRIDES, names, 5, extra, 0.3)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(64, 96), (100, 68), (33, 200)])
def test_maps_equal_torchvisions(size: tuple[int, int]) -> None:
    ours = make()
    theirs = FeaturePyramidNetwork(list(CHANNELS.values()), 5)
    for index, name in enumerate(NAMES):
        theirs.inner_blocks[index][0].load_state_dict(ours.lateral[name].state_dict())
        theirs.layer_blocks[index][0].load_state_dict(ours.output[f"p{name[1]}"].state_dict())
    features = {
        name: torch.randn(2, CHANNELS[name], -(-size[0] // stride), -(-size[1] // stride))
        for name, stride in STRIDES.items()
    }
    found = ours(features)
    assert list(found) == ["p2", "p3", "p4", "p5", "p6"]
    for name, wanted in theirs(features).items():
        torch.testing.assert_close(found[f"p{name[1]}"], wanted)
    extra = F.conv2d(features["c5"], ours.extra.weight, ours.extra.bias, stride=2, padding=1)
    torch.testing.assert_close(found["p6"], extra)
    assert (found["p6"] < 0).any()


def test_it_says_what_comes_out() -> None:
    assert make().strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
    assert make().channels == dict.fromkeys(("p2", "p3", "p4", "p5", "p6"), 5)
    some = make(["c3", "c4"], "none")
    assert some.strides == {"p3": 8, "p4": 16}
    assert list(some({"c3": torch.zeros(1, 6, 8, 8), "c4": torch.zeros(1, 8, 4, 4)})) == [
        "p3",
        "p4",
    ]
    assert not any(name.startswith("extra") for name, _ in some.named_parameters())


@pytest.mark.parametrize("names", [["c3", "c2"], ["c2", "c2"], ["c2", "c7"], []])
def test_odd_maps_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match=r"in_features: .*c2, c3, c4, c5 in that order"):
        make(names)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.neck.in_features=[c5, c4]", "'in_features' must be some of c2, c3, c4, c5 in"),
        ("model.neck.channels=0", "'channels' must be at least 1"),
        ("model.neck.extra=mean", "'extra' must be conv, pool or none"),
        ("model.rpn.in_features=[p2, p7]", "there is no map 'p7'"),
        ("model.neck=null", "there is no map 'p2'"),
        ("model.roi_head.in_features=[p2, p4]", "'in_features' must be maps whose strides double"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(load_config(ROOT / "configs" / "small" / "fpn_r18_voc.yaml", [override]))
