"""timm's networks as backbones: their maps, their weights, and what is refused."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn

from dcdet import build_model, load_config
from dcdet.engine import checkpoint
from dcdet.errors import UserError
from dcdet.models.timm_backbone import TimmBackbone
from dcdet.structures import Batch, Target

timm = pytest.importorskip("timm")

IMAGES = torch.randn(2, 3, 96, 160, generator=torch.Generator().manual_seed(0))


def make(name: str = "test_resnet", freeze_norm: bool = True) -> TimmBackbone:
    torch.manual_seed(0)
    return TimmBackbone(name, freeze_norm, None)


def config(*overrides: str, **options: Any) -> Any:
    node = {"type": "TimmBackbone", "name": "test_resnet", "freeze_norm": "true",
            "pretrained": "null"} | options  # fmt: skip
    text = ", ".join(f"{key}: {value}" for key, value in node.items())
    return load_config(
        ROOT / "configs" / "small" / "fpn_r18_voc.yaml",
        [f"model.backbone={{{text}}}", "model.rpn.channels=16", "model.neck.channels=16",
         "model.rpn.train.post_nms=40", "model.rpn.test.post_nms=40", *overrides],
    )  # fmt: skip


@pytest.mark.parametrize("freeze_norm", [True, False])
def test_a_detector_learns_and_detects(freeze_norm: bool) -> None:
    torch.manual_seed(0)
    model: Any = build_model(config(freeze_norm=str(freeze_norm).lower())).train()
    images = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8)
    target = Target(0, (48, 64), torch.tensor([[10.0, 12.0, 70.0, 80.0]]), torch.tensor([1]),
                    torch.zeros(0, 4))  # fmt: skip
    batch = Batch(images, [(96, 128)] * 2, [target] * 2, [2.0] * 2, [1, 2])
    before = {name: x.clone() for name, x in model.backbone.named_buffers() if "running" in name}
    losses, _ = model(batch)
    sum(losses.values()).backward()
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) > 10
    frozen = {id(p) for norm in norms for p in norm.parameters()} if freeze_norm else set()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) not in frozen)
        if parameter.requires_grad:  # each has one: DDP waits for all of them
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        else:
            assert parameter.grad is None
    after = dict(model.backbone.named_buffers())
    assert all(torch.equal(x, after[name]) == freeze_norm for name, x in before.items())
    [one, _] = model.eval().predict(batch)
    assert len(one.boxes) > 0
    assert one.boxes.isfinite().all()


# A network of each way in which timm takes maps out, and one whose maps have channels last.
@pytest.mark.parametrize(
    ("name", "stages", "suffix"),
    [
        ("test_resnet", "layer1 layer2 layer3 layer4", ".pth"),
        ("test_convnext", "stages.0 stages.1 stages.2 stages.3", ".safetensors"),
        ("test_mambaout", "stages.0 stages.1 stages.2 stages.3", ".pth"),
        ("test_efficientnet", "blocks.1 blocks.2 blocks.3 blocks.4", ".pth"),
    ],
)
def test_weights_and_maps_are_those_of_the_whole_network(
    tmp_path: Path, name: str, stages: str, suffix: str
) -> None:
    ours = make(name).eval()
    whole = timm.create_model(name).eval()
    path = tmp_path / f"whole{suffix}"
    if suffix == ".pth":
        torch.save(whole.state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(whole.state_dict(), path)
    checkpoint.load_pretrained(ours, str(path))
    expected: list[Tensor] = []
    for stage in stages.split():
        whole.get_submodule(stage).register_forward_hook(lambda *all: expected.append(all[2]))
    with torch.no_grad():
        whole(IMAGES)
        found = ours(IMAGES)
    assert list(found) == ["c2", "c3", "c4", "c5"]
    assert ours.strides == {"c2": 4, "c3": 8, "c4": 16, "c5": 32}
    for stage, wanted in zip(found, expected, strict=True):
        if name == "test_mambaout":
            wanted = wanted.permute(0, 3, 1, 2)
        stride = ours.strides[stage]
        assert found[stage].shape == (2, ours.channels[stage], 96 // stride, 160 // stride)
        torch.testing.assert_close(found[stage], wanted)


def test_other_networks_weights_are_refused(tmp_path: Path) -> None:
    ours, path = make(), tmp_path / "weights.pth"
    whole = timm.create_model("test_resnet").state_dict()

    def load(weights: dict[str, Tensor]) -> None:
        torch.save(weights, path)
        checkpoint.load_pretrained(ours, str(path))

    load(whole)
    for key in list(whole):
        if key.startswith("layer4.0.conv1"):
            with pytest.raises(UserError, match=r"weights do not fit.*layer4\.0\.conv1"):
                load({name: x for name, x in whole.items() if name != key})
            with pytest.raises(UserError, match=r"weights do not fit.*layer4\.0\.conv1"):
                load(whole | {key: torch.zeros(1)})
    with pytest.raises(UserError, match=r"weights do not fit.*layer3\.9\.conv1"):  # a deeper one
        load(whole | {"layer3.9.conv1.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="weights do not fit"):
        load(timm.create_model("test_convnext").state_dict())
    (tmp_path / "bad.safetensors").write_bytes(b"garbage")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.load_pretrained(ours, str(tmp_path / "bad.safetensors"))
    with pytest.raises(UserError, match=r"no such file \(timm's weights of test_resnet"):
        checkpoint.load_pretrained(ours, "torchvision")


def test_the_backbone_of_a_detector_is_taken(tmp_path: Path) -> None:
    theirs, ours = make("test_convnext"), make("test_convnext")
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    detector = {f"backbone.{name}": value for name, value in theirs.state_dict().items()}
    checkpoint.save(tmp_path / "x.pth", {"model": {**detector, "rpn.conv.bias": torch.ones(3)}})
    checkpoint.load_pretrained(ours, str(tmp_path / "x.pth"))
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


def test_published_weights_are_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, create = make(), timm.create_model

    def published(*names: Any, pretrained: bool = False, **options: Any) -> nn.Module:
        net = create(*names, **options)
        if pretrained:
            nn.init.constant_(net.layer4[0].conv1.weight, 0.25)
        return net

    monkeypatch.setattr(timm, "create_model", published)
    checkpoint.load_pretrained(ours, True)
    assert (ours.net.layer4[0].conv1.weight == 0.25).all()

    def unreachable(*names: Any, pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise OSError("no network\nat all")
        return create(*names, **options)

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(
        UserError, match=r"weights of test_resnet: no network \(save them"
    ) as caught:
        checkpoint.load_pretrained(ours, True)
    assert str(caught.value).startswith("model.backbone.pretrained: cannot download")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet5o"}, r"timm has no network 'resnet5o' \(did you mean 'resnet50'\?\)"),
        ({"name": "hf-hub:some/thing"}, "timm has no network 'hf-hub:some/thing'"),
        ({"name": "resnet50.misspelt"}, r"timm gives no maps of 'resnet50\.misspelt': .*misspelt"),
        ({"name": "test_vit"}, "'test_vit' has maps of stride 16; wanted: 4, 8, 16, 32"),
        (
            {"name": "maxvit_pico_rw_256"},
            "'maxvit_pico_rw_256' does not take images of any size: (height|width)",
        ),
        ({"deform": "null"}, "TimmBackbone has no option 'deform'"),
        ({"freeze_norm": 3}, "'freeze_norm' must be true or false"),
        ({"pretrained": 3}, "'pretrained' must be true or false or text"),
    ],
)
def test_what_cannot_be_built_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_model(config(**options))
    assert "command line" in str(caught.value)


def test_without_timm_its_installation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"needs timm, which is not installed \(pip install timm\)"):
        build_model(config())


def test_low_precision_and_channels_last() -> None:
    ours = make().eval().to(memory_format=torch.channels_last)
    images = IMAGES.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = make().eval()(IMAGES)
        torch.testing.assert_close(ours(images), expected, atol=1e-4, rtol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            found = ours(images)
    assert found["c5"].dtype == torch.bfloat16
    error = (found["c5"].float() - expected["c5"]).abs().max() / expected["c5"].abs().max()
    assert error < 0.05


def test_an_empty_batch() -> None:
    assert make().eval()(IMAGES[:0])["c5"].shape == (0, 96, 3, 5)
