"""The backbone: shapes, what is frozen, pooling, deformable blocks, shared normalisation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dcdet.models.resnet import (
    BatchNorm,
    DeformConv2d,
    DeformSpec,
    EvalBatchNorm,
    FrozenBatchNorm,
    ResNet,
)


def make(depth: int = 18, **changes: Any) -> ResNet:
    options: dict[str, Any] = {
        "stride_in": "3x3", "norm": "frozen_bn", "stem_pool": "ceil", "dilate_c5": True,
        "freeze_to": 2, "deform": None, "pretrained": None,
    }  # fmt: skip
    return ResNet(depth, **(options | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
@pytest.mark.parametrize("dilated", [True, False])
def test_maps_have_the_promised_channels_and_strides(depth: int, dilated: bool) -> None:
    net = make(depth, dilate_c5=dilated).eval()
    with torch.no_grad():
        maps = net(torch.randn(1, 3, 64, 96))
    wide = 4 if depth >= 50 else 1
    assert net.channels == {"c2": 64 * wide, "c3": 128 * wide, "c4": 256 * wide, "c5": 512 * wide}
    assert net.strides == {"c2": 4, "c3": 8, "c4": 16, "c5": 16 if dilated else 32}
    for name, value in maps.items():
        stride = net.strides[name]
        assert value.shape == (1, net.channels[name], 64 // stride, 96 // stride)


@pytest.mark.parametrize("name", ["even", "min", "mix", "odd"])
def test_the_stem_pools_as_the_release(shared: Path, name: str) -> None:
    arrays = np.load(shared / "golden" / "ops" / f"pool1_{name}.npz")
    assert json.loads(str(arrays["attrs"]))["pooling_convention"] == "full"
    data = torch.from_numpy(arrays["data"])
    net = make()
    net.conv1, net.bn1 = nn.Identity(), nn.Identity()
    net.layer1, net.layer2, net.layer3, net.layer4 = (nn.Identity() for _ in range(4))
    lowest = data.min()
    data.requires_grad_()
    pooled = net(data - lowest + 1)["c2"]  # the ReLU before the pooling must not cut
    torch.testing.assert_close(pooled + lowest - 1, torch.from_numpy(arrays["out"]))
    pooled.backward(torch.from_numpy(arrays["grad_out"]))
    torch.testing.assert_close(data.grad, torch.from_numpy(arrays["grad_data"]))


def test_frozen_stages_get_no_gradient_and_keep_their_statistics() -> None:
    net = make(norm="bn", freeze_to=3).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net(torch.randn(2, 3, 64, 64))["c5"].sum().backward()
    for name, parameter in net.named_parameters():
        frozen = name.startswith(("conv1", "bn1", "layer1", "layer2"))
        assert (parameter.grad is None) == frozen, name
    for name, value in net.state_dict().items():
        if "running_mean" in name:
            frozen = name.startswith(("bn1", "layer1", "layer2"))
            assert torch.equal(value, before[name]) == frozen, name


def test_frozen_norm_has_no_parameters_and_equals_batch_norm_at_test_time() -> None:
    frozen, plain = FrozenBatchNorm(4), nn.BatchNorm2d(4).eval()
    for value in (plain.weight, plain.bias, plain.running_mean):
        nn.init.normal_(value)
    nn.init.uniform_(plain.running_var, 0.5, 2)
    frozen.load_state_dict(plain.state_dict(), strict=False)
    assert not list(frozen.parameters())
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(frozen(x), plain(x))


def test_eval_norm_learns_its_weights_but_not_its_statistics() -> None:
    """As torch's layer in eval() mode, whose gradients it has; its names are the frozen one's."""
    ours, theirs = EvalBatchNorm(4).train(), nn.BatchNorm2d(4).eval()
    for value in (theirs.weight, theirs.bias, theirs.running_mean):
        nn.init.normal_(value)
    nn.init.uniform_(theirs.running_var, 0.5, 2)
    assert ours.state_dict().keys() == FrozenBatchNorm(4).state_dict().keys()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    before = {name: value.clone() for name, value in ours.named_buffers()}
    assert before.keys() == {"running_mean", "running_var"}
    x = torch.randn(2, 4, 5, 6)
    grads = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        output = layer(leaf)
        output.square().sum().backward()
        grads.append((output, leaf.grad, layer.weight.grad, layer.bias.grad))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    assert all(torch.equal(value, before[name]) for name, value in ours.named_buffers())


def test_a_network_of_eval_norms_trains_all_but_the_frozen_ones() -> None:
    net = make(norm="eval_bn", freeze_to=2).train()
    learning = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert {"layer2.0.bn1.weight", "layer4.1.bn2.bias", "layer3.0.downsample.1.weight"} <= learning
    assert not any(name.startswith(("conv1", "bn1", "layer1")) for name in learning)
    assert net.state_dict().keys() == make().state_dict().keys()


@pytest.mark.parametrize(("modulated", "factor"), [(False, 1.0), (True, 0.5)])
def test_a_new_deformable_layer_is_a_plain_convolution(modulated: bool, factor: float) -> None:
    spec = DeformSpec({"c5": [0]}, 2, modulated, "zero", None)
    layer = DeformConv2d(4, 6, 2, 2, spec)
    nn.init.normal_(layer.weight)
    x = torch.randn(2, 4, 9, 11)
    wanted = nn.functional.conv2d(x, layer.weight, stride=2, padding=2, dilation=2)
    torch.testing.assert_close(layer(x), factor * wanted, atol=1e-5, rtol=1e-5)


def test_deformable_blocks_are_the_named_ones() -> None:
    net = make(50, deform=DeformSpec({"c3": [-1], "c5": [0, 1, 2]}, 4, False, "original", 2))
    found = [name for name, module in net.named_modules() if isinstance(module, DeformConv2d)]
    assert found == ["layer2.3.conv2", "layer4.0.conv2", "layer4.1.conv2", "layer4.2.conv2"]
    assert net.get_submodule("layer4.0.conv2.offset").weight.shape[0] == 72
    with pytest.raises(ValueError, match="there is no block 2 of 2"):
        make(18, deform=DeformSpec({"c5": [2]}, 1, False, "zero", None))
    with pytest.raises(ValueError, match="no stage 'c9'"):
        DeformSpec({"c9": [0]}, 1, False, "zero", None)
    with pytest.raises(ValueError, match=r"^deform\.groups: must be a divisor"):
        make(18, deform=DeformSpec({"c5": [0]}, 3, False, "zero", None))


def test_strides_stand_where_the_config_says() -> None:
    for place, name in (("1x1", "conv1"), ("3x3", "conv2")):
        block = make(50, stride_in=place).get_submodule("layer2.0")
        assert block.get_submodule(name).stride == (2, 2)


def test_one_process_uses_torchs_own_batch_norm() -> None:
    ours, theirs = BatchNorm(3), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
