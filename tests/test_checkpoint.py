"""Checkpoints: whole or absent, never run, never silently wrong."""

import os
import pickle
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from dcdet.engine import checkpoint
from dcdet.errors import DivergedError, MachineError, UserError


class Marker:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {self.path}",))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "step_00000001.pth"
    torch.manual_seed(0)
    state = {
        "model": nn.Linear(8, 8).state_dict(),
        "meta": {"classes": ["a", "b"]},
        "step": 1,
        "rate": 0.1,
    }
    checkpoint.save(path, state)
    return path


def test_what_is_saved_comes_back(saved: Path) -> None:
    state = checkpoint.load(saved)
    assert state["meta"] == {"classes": ["a", "b"]}
    assert state["step"] == 1
    model = nn.Linear(8, 8)
    assert checkpoint.load_weights(model, saved) == {"classes": ["a", "b"]}
    assert torch.equal(model.weight, state["model"]["weight"])
    assert torch.load(saved, weights_only=True)["step"] == 1
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_flipped_byte_never_loads_as_something_else(saved: Path, tmp_path: Path) -> None:
    whole, content = saved.read_bytes(), checkpoint.load(saved)
    refused = 0
    for place in random.Random(0).sample(range(len(whole)), 200):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path = tmp_path / "damaged.pth"
        path.write_bytes(damaged)
        try:
            state = checkpoint.load(path)
        except UserError:
            refused += 1
            continue
        # Padding and names inside the archive carry nothing.
        assert checkpoint._digest(state) == checkpoint._digest(content)
    assert refused > 20


@pytest.mark.parametrize("size", [0, 1, 100, 1000])
def test_a_cut_file_is_refused(saved: Path, size: int) -> None:
    os.truncate(saved, size)
    with pytest.raises(UserError, match=r"is not a checkpoint|cut off or damaged"):
        checkpoint.load(saved)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    weights = {"weight": torch.ones(1)}
    for state in ({}, {"model": {}}, {"model": {"weight": [1]}}, {"model": weights, "meta": 5},
                  {"model": weights, "meta": {"classes": 5}},
                  {"model": weights, "meta": {"classes": ["a", 5]}},
                  {"model": weights, "meta": {"category_ids": ["a"]}}):  # fmt: skip
        checkpoint.save(path, state)
        with pytest.raises(UserError, match="holds no model weights"):
            checkpoint.load(path)
    for other in ([1], {"epoch": 3, "array": b"abc"}):
        torch.save(other, path)
        with pytest.raises(UserError, match=r"not a checkpoint|no model weights"):
            checkpoint.load(path)


@pytest.mark.parametrize("form", ["torch", "torch_old", "pickle"])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, form: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    content = {"model": Marker(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(UserError, match="nothing was run"):
        checkpoint.load(path)
    assert not marker.exists()


def test_non_finite_values_are_neither_written_nor_loaded(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with pytest.raises(DivergedError, match=r"model\.weight"):
        checkpoint.save(path, {"model": {"weight": torch.tensor([float("nan")])}})
    assert not path.exists()
    torch.save({"weight": torch.full((1, 1), float("inf")), "bias": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="weight has non-finite"):
        checkpoint.load_weights(nn.Linear(1, 1), path)


def test_differences_are_named_and_partial_loading_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.pth"
    torch.save({"weight": torch.ones(1, 1), "extra": torch.ones(3)}, path)
    with pytest.raises(UserError, match=r"1 loaded, 1 missing \(bias\), 1 unused \(extra\)"):
        checkpoint.load_weights(nn.Linear(1, 1), path)
    model = nn.Linear(1, 1)
    with caplog.at_level("WARNING"):
        checkpoint.load_weights(model, path, partial=True)
    assert "1 loaded" in caplog.text
    assert model.weight.item() == 1
    torch.save({"other": torch.ones(1)}, path)
    with pytest.raises(UserError, match="0 loaded"):
        checkpoint.load_weights(model, path, partial=True)
    torch.save({"weight": torch.ones(2, 2), "bias": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"weight is \(2, 2\), wanted \(1, 1\)"):
        checkpoint.load_weights(model, path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_wrappers_of_the_model_do_not_matter(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "x.pth"
    torch.save({f"{prefix}weight": torch.ones(1, 1), f"{prefix}bias": torch.ones(1)}, path)
    model = nn.Linear(1, 1)
    checkpoint.load_weights(model, path)
    assert model.weight.item() == 1


def test_the_newest_whole_checkpoint_is_found(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (saved.parent / "step_00000002.pth").write_bytes(saved.read_bytes()[:500])
    found = checkpoint.newest(saved.parent)
    assert found is not None
    assert found[0] == saved
    assert "step_00000002.pth" in caplog.text
    assert checkpoint.newest(saved.parent / "nowhere") is None


def test_prune_keeps_the_newest_and_removes_what_a_killed_writer_left(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        (tmp_path / f"step_{step:08d}.pth").touch()
    (tmp_path / ".step_00000011.pth.tmp").touch()
    (tmp_path / "mine.pth").touch()
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "mine.pth",
        "step_00000002.pth",
        "step_00000010.pth",
    ]


WRITER = """
import sys, torch
from pathlib import Path
from dcdet.engine import checkpoint
print("ready", flush=True)
for step in range(1, 10 ** 6):
    state = {"model": {"w": torch.full((500_000,), float(step))}}
    checkpoint.save(Path(sys.argv[1]) / f"step_{step:08d}.pth", state)
    checkpoint.prune(Path(sys.argv[1]), keep=2)
"""


def test_a_killed_writer_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    for attempt in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.15 + 0.07 * attempt)
        process.kill()
        process.wait()
        process.stdout.close()
        files = checkpoint.sorted_checkpoints(tmp_path)
        assert files
        for path in files:
            step = int(path.stem.split("_")[1])
            assert (checkpoint.load(path)["model"]["w"] == step).all()


def test_a_full_disk_is_said_and_keeps_the_old_file(saved: Path) -> None:
    before = saved.read_bytes()
    code = (
        "import resource, signal, torch; from pathlib import Path\n"
        "from dcdet.engine import checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from dcdet.errors import MachineError\n"
        f"path = Path({str(saved)!r})\n"
        "try: checkpoint.save(path, {'model': {'w': torch.zeros(100_000)}})\n"
        "except MachineError as error: print('refused', error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "refused" in result.stdout
    assert saved.name in result.stdout
    assert saved.read_bytes() == before
    assert MachineError.exit_code == 4


def test_torchvisions_hub_has_two_sets_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most detectors' are the first (MMDET.md, 3: resnet50-0676ba61.pth); nothing is downloaded."""
    from torchvision.models import _api, resnet50

    from dcdet.models.resnet import DeformSpec, ResNet

    with torch.device("meta"):
        names = resnet50().state_dict()
    published, asked = {}, []

    def hub(url: str, **_options: object) -> dict[str, torch.Tensor]:
        asked.append(url.rpartition("/")[2])
        published.update({name: torch.full(x.shape, len(asked)) for name, x in names.items()})
        return published

    monkeypatch.setattr(_api, "load_state_dict_from_url", hub)
    spec = DeformSpec({"c5": [0]}, 1, True, "zero", None)
    backbone = ResNet(50, "3x3", "eval_bn", "pad", False, 2, spec, None)
    for source in ("torchvision", "torchvision_v1"):
        checkpoint.load_pretrained(backbone, source)
        for name, value in backbone.state_dict().items():
            assert (value == (0 if ".offset." in name else len(asked))).all(), name
    assert asked == ["resnet50-11ad3fa6.pth", "resnet50-0676ba61.pth"]


def test_torchvision_weights_fit_our_backbone(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    from dcdet.models.resnet import DeformSpec, ResNet

    theirs = resnet18(weights=None).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.weight)
    deform = DeformSpec({"c5": [-1]}, 1, False, "zero", None)
    ours = ResNet(18, "3x3", "frozen_bn", "pad", False, 2, deform, None).eval()
    with pytest.raises(UserError, match="no such file"):
        checkpoint.load_pretrained(ours, "nowhere.pth")
    path = tmp_path / "resnet18.pth"
    torch.save(theirs.state_dict(), path)
    checkpoint.load_pretrained(ours, str(path))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = theirs.layer4(
            theirs.layer3(
                theirs.layer2(
                    theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x)))))
                )
            )
        )
        torch.testing.assert_close(ours(x)["c5"], wanted, atol=1e-4, rtol=1e-4)


def test_the_backbone_of_a_detector_is_taken(tmp_path: Path) -> None:
    from dcdet.models.resnet import DeformSpec, ResNet

    deform = DeformSpec({"c5": [-1]}, 1, False, "zero", None)
    theirs, ours = (ResNet(18, "3x3", "bn", "pad", False, 0, deform, None) for _ in range(2))
    nn.init.normal_(theirs.layer4[1].conv2.offset.weight)
    detector = {f"backbone.{name}": value for name, value in theirs.state_dict().items()}
    path = tmp_path / "detector.pth"
    checkpoint.save(path, {"model": {**detector, "rpn.conv.weight": torch.zeros(3)}})
    checkpoint.load_pretrained(ours, str(path))
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other), name
    plain = ResNet(18, "3x3", "bn", "pad", False, 0, None, None)
    with pytest.raises(UserError, match="offset"):
        checkpoint.load_pretrained(plain, str(path))
