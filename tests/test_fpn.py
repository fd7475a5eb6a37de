"""The feature pyramid against torchvision's, and its promises."""

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from dcdet import build_model, load_config
from dcdet.errors import UserError
from dcdet.models.fpn import FPN

CHANNELS = {"c2": 4, "c3": 6, "c4": 8, "c5": 10}
STRIDES = {"c2": 4, "c3": 8, "c4": 16, "c5": 32}
NAMES = list(CHANNELS)


def make(names: list[str] = NAMES, extra: str = "conv", std: float | None = 0.3) -> FPN:
    torch.manual_seed(0)
    return FPN(CHANNELS, STRIDES, names, 5, extra, std)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(64, 96), (100, 68), (33, 200)])
@pytest.mark.parametrize("extra", ["conv", "pool"])
def test_maps_equal_torchvisions(size: tuple[int, int], extra: str) -> None:
    ours = make(extra=extra)
    pool = LastLevelMaxPool() if extra == "pool" else None
    theirs = FeaturePyramidNetwork(list(CHANNELS.values()), 5, pool)
    for index, name in enumerate(NAMES):
        theirs.inner_blocks[index][0].load_state_dict(ours.lateral[name].state_dict())
        theirs.layer_blocks[index][0].load_state_dict(ours.output[f"p{name[1]}"].state_dict())
    features = {
        name: torch.randn(2, CHANNELS[name], -(-size[0] // stride), -(-size[1] // stride))
        for name, stride in STRIDES.items()
    }
    found = ours(features)
    assert list(found) == ["p2", "p3", "p4", "p5", "p6"]
    for name, wanted in zip(found, theirs(features).values(), strict=extra == "pool"):
        torch.testing.assert_close(found[name], wanted)
    if extra == "pool":
        assert torch.equal(found["p6"], found["p5"][:, :, ::2, ::2])
        assert not list(ours.extra.parameters())
    else:
        wanted = F.conv2d(features["c5"], ours.extra.weight, ours.extra.bias, stride=2, padding=1)
        torch.testing.assert_close(found["p6"], wanted)
    assert (found["p6"] < 0).any()


@pytest.mark.parametrize("std", [None, 0.02])
def test_new_weights_spread_as_asked(std: float | None) -> None:
    """Xavier's are uniform up to sqrt(6 / (inputs + outputs)); biases are 0."""
    torch.manual_seed(0)
    fpn = FPN({"c5": 300}, {"c5": 32}, ["c5"], 100, "conv", std)
    for layer, inputs, outputs in (
        (fpn.lateral["c5"], 300, 100), (fpn.output["p5"], 900, 900), (fpn.extra, 2700, 900)
    ):  # fmt: skip
        weight, bound = layer.weight.detach(), (6 / (inputs + outputs)) ** 0.5
        assert not layer.bias.any()
        if std is None:
            assert 0.99 * bound < weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        else:
            assert weight.std().item() == pytest.approx(std, rel=0.02)
            assert weight.abs().max() > 3 * std


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
