"""dcdet/engine/benchmark_models.py: the networks are what the table says, and do the same."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from op_cases import needs_cuda
from test_benchmark import clock, strictly  # noqa: F401  (a fixture)
from torch import Tensor, nn

from dcdet import build_model, cli, load_config
from dcdet.engine import benchmark_models
from dcdet.engine.benchmark import cell
from dcdet.engine.benchmark_models import FULL, NETWORKS, QUICK, SCENE, Network
from dcdet.models.resnet import DeformConv2d
from dcdet.structures import Detections

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks as small as these only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything happens in this process, in one round; no memory is measured."""

    @contextmanager
    def child(module: str, quick: bool) -> Iterator[Callable[[str], Any]]:
        assert (module, quick) == ("benchmark_models", True)
        yield lambda line: 12.5 if line.split()[1] == "1" else None

    monkeypatch.setattr(benchmark_models, "memory_child", child)
    monkeypatch.setattr(benchmark_models, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(benchmark_models, "ROUNDS", 1)


def command(what: str, path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, Any]:
    """Exit code, table and report of a quick run, in as many rounds as there must be."""
    words = ["benchmark", what, "--quick", "--seconds", "1e-9", "--device", "cpu"]
    code = cli.main([*words, "--json", str(path)])
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) <= 100
    return code, out, strictly(path)


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize("what", ["test", "train"])
def test_the_report(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, report = command(what, tmp_path / "x.json", capsys)
    assert (code, report["failed"]) == (0, {})
    assert (report["benchmark"], report["quick"]) == (what, True)
    assert report["machine"]["threads"] == torch.get_num_threads()
    entries = {f"{entry['network']} {entry['way']}": entry for entry in report["networks"]}
    wanted = [n for n in NETWORKS if what == "test" or n.kind != "mask_rcnn"]
    assert list(entries) == [str(network) for network in wanted]
    for network, entry in zip(wanted, entries.values(), strict=True):
        assert 0 < entry["min_ms"] <= entry["median_ms"]
        assert entry["runs"] == 1
        assert entry["beside"] == network.beside
        if network.beside:
            other = entries[f"{network.kind} {network.beside}"]
            assert entry["ratio"] == pytest.approx(entry["median_ms"] / other["median_ms"])
        assert entry["extra_mb"] == (12.5 if str(network) == "faster_rcnn dcdet" else None)
        name = f"{network.kind:12}{network.way:12}"
        (line,) = (line for line in out.splitlines() if line.startswith(name))
        assert f" {cell(entry['median_ms'], 1)} " in line
    pixels = f"{QUICK.height} x {QUICK.width} pixels"
    assert f"ResNet-18 with FPN, {'an image' if what == 'test' else 'a training step'}" in out
    assert pixels in out


# The networks.


def parts(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What makes a model compute what it does, but for its weights."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        own.pop("pretrained", None)
        own |= {key: round(value, 9) for key, value in own.items() if isinstance(value, float)}
        frozen = own.pop("frozen", [])
        learns = {key: value.requires_grad for key, value in module.named_parameters()}
        buffers = {key: value.tolist() for key, value in module.named_buffers(recurse=False)}
        shapes = {key: (value.shape, value.stride()) for key, value in module.named_parameters()}
        found[name] = (type(module), own, len(frozen), learns, buffers, shapes)
    return found


@pytest.mark.parametrize(("masks", "deformable"), [(False, True), (True, False)])
def test_they_are_those_of_the_configs(
    masks: bool, deformable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fill in ("uniform_", "normal_"):  # weights, which are not compared
        monkeypatch.setattr(torch.Tensor, fill, lambda self, *_, **__: self)
    other = load_config(ROOT / "configs/dcnv2/faster_rcnn_mdconv_r50_fpn_coco.yaml").plain()
    deform = f"model.backbone.deform={json.dumps(other['model']['backbone']['deform'])}"
    name = f"{'mask' if masks else 'faster'}_rcnn_r50_fpn_coco.yaml"
    config = load_config(ROOT / "configs" / "torchvision" / name, [deform] if deformable else [])
    ours = parts(benchmark_models.own_network(masks, deformable, FULL))
    wanted = parts(build_model(config))
    assert ours.keys() == wanted.keys()
    for part in ours:
        assert ours[part] == wanted[part], part
    assert sum(kind is DeformConv2d for kind, *_ in ours.values()) == 13 * deformable


@pytest.mark.parametrize("deformable", [False, True])
def test_deeplabs_are_those_of_the_configs(
    deformable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fill in ("uniform_", "normal_"):
        monkeypatch.setattr(torch.Tensor, fill, lambda self, *_, **__: self)
    monkeypatch.setattr(benchmark_models, "fill_with_random_weights", lambda model: None)
    name = f"deeplab_{'dcn_' if deformable else ''}r101_cityscapes.yaml"
    ours = parts(benchmark_models.deeplab(deformable, SCENE))
    wanted = parts(build_model(load_config(ROOT / "configs" / "deeplab" / name)))
    assert ours.keys() == wanted.keys()
    for part in ours:
        assert ours[part] == wanted[part], part
    assert sum(kind is DeformConv2d for kind, *_ in ours.values()) == 3 * deformable
    assert (SCENE.height, SCENE.width) == (512, 1024)


def test_samples_move_about_a_pixel() -> None:
    model = benchmark_models.own_network(False, True, QUICK)
    benchmark_models.copy_weights(benchmark_models.torchvision_network(False, QUICK), model)
    batch = benchmark_models.pictures(1, QUICK)
    benchmark_models.move_samples(model, batch)
    seen: list[tuple[Tensor, Tensor]] = []

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, DeformConv2d)
        offset, mask = layer.offset_and_mask(inputs[0])
        assert mask is not None
        seen.append((offset, mask))

    for layer in model.modules():
        if isinstance(layer, DeformConv2d):
            layer.register_forward_pre_hook(look)
    with torch.no_grad():
        found = model.eval().predict(batch)[0]
    assert len(seen) == 6
    for offset, mask in seen:
        assert 0.5 < offset.std() < 1.5
        assert 0.4 < mask.mean() < 0.6
    assert len(found.boxes) > 5


# That both find the same.


def some_detections(masks: bool) -> tuple[Detections, dict[str, Tensor]]:
    boxes = torch.arange(100.0).view(-1, 1) * 20 + torch.tensor([0.0, 0.0, 9.0, 9.0])
    scores, labels = torch.linspace(0.9, 0.1, 100), torch.arange(100) % 7
    bitmaps = torch.zeros(100, 20, 20, dtype=torch.bool)
    bitmaps[:, 2:12] = True
    theirs = {"boxes": boxes, "scores": scores, "labels": labels + 1}
    theirs["masks"] = bitmaps[:, None] * 0.9
    ours = Detections(0, boxes.clone(), scores.clone(), labels.clone(), bitmaps if masks else None)
    return ours, theirs


def test_detections_that_differ() -> None:
    ours, theirs = some_detections(masks=True)
    differ = benchmark_models.detections_differ
    order = torch.randperm(100)
    shuffled = {name: value[order] for name, value in theirs.items()}
    assert differ(ours, shuffled) is None
    few = {name: value[:95] for name, value in theirs.items()}
    assert differ(ours, few) is None  # rounding
    less = {name: value[:94] for name, value in theirs.items()}
    assert differ(ours, less) == "94 of 100 detections are among torchvision's 94"
    none = {name: value[:0] for name, value in theirs.items()}
    assert differ(ours, none) == "0 of 100 detections are among torchvision's 0"
    assert ours.masks is not None
    nothing = replace(ours, boxes=ours.boxes[:0], scores=ours.scores[:0], labels=ours.labels[:0],
                      masks=ours.masks[:0])  # fmt: skip
    assert differ(nothing, none) == "0 of 0 detections are among torchvision's 0"
    for change in (
        {"boxes": ours.boxes + 0.2}, {"scores": ours.scores + 2e-3}, {"labels": ours.labels + 1},
        {"masks": ours.masks.roll(1, 1)}, {"boxes": ours.boxes * torch.nan},
    ):  # fmt: skip
        assert differ(replace(ours, **change), theirs) is not None
    assert differ(replace(ours, masks=None), theirs) is None


def test_losses_that_differ() -> None:
    ours = dict.fromkeys(benchmark_models.LOSSES, 1.0)
    theirs = dict.fromkeys(benchmark_models.LOSSES.values(), 1.1)
    assert benchmark_models.losses_differ(ours, theirs) is None
    for value in (1.5, float("nan")):
        why = benchmark_models.losses_differ(ours | {"roi_box": value}, theirs)
        assert why == f"the loss roi_box is {value:.4g}, torchvision's 1.1"


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the networks find, instead of running them; an error is raised."""
    ours, theirs = some_detections(masks=False)
    given: dict[str, Any] = {str(network): ours for network in NETWORKS}
    given |= {f"{kind} torchvision": theirs for kind in ("faster_rcnn", "mask_rcnn")}

    def run(network: Network, *_: object) -> Callable[[], Any]:
        def give() -> Any:
            if isinstance(given[str(network)], Exception):
                raise given[str(network)]
            return given[str(network)]

        return give

    monkeypatch.setattr(Network, "run", run)
    return given


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize(
    ("name", "what", "why", "code"),
    [
        ("faster_rcnn dcdet", None, "0 of 50 detections are among torchvision's 100", 1),
        ("faster_rcnn deformable", RuntimeError("out of memory\nsee"), "out of memory", 1),
        ("mask_rcnn torchvision", RuntimeError("no kernel"), "no kernel", 0),
    ],
)
def test_a_network_that_fails(
    name: str, what: Any, why: str, code: int, found: dict[str, Any], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ours, _ = some_detections(masks=False)
    wrong = Detections(0, ours.boxes[:50] + 1, ours.scores[:50], ours.labels[:50])
    found[name] = what or wrong
    given, out, report = command("test", tmp_path / "x.json", capsys)
    assert given == code
    assert report["failed"] == {name: why}
    assert out.endswith(f"{name} failed: {why}\n")
    measured = {f"{entry['network']} {entry['way']}": entry for entry in report["networks"]}
    assert list(measured) == [str(network) for network in NETWORKS if str(network) != name]
    for entry in measured.values():
        beside = f"{entry['network']} {entry['beside']}"
        assert (entry["ratio"] is None) == (beside not in measured)


# Clock and memory.


def test_networks_take_turns(clock: Any) -> None:  # noqa: F811
    seconds = {network: 1.0 + index for index, network in enumerate(NETWORKS[:3])}
    runs = {network: clock(str(network), taken) for network, taken in seconds.items()}
    times = benchmark_models._time(runs, 0.5, CPU)
    assert times == {network: [taken] * 3 for network, taken in seconds.items()}
    assert clock.log == [str(network) for network in NETWORKS[:3]] * 3
    times = benchmark_models._time(runs, 10.0, CPU)
    assert [len(taken) for taken in times.values()] == [5] * 3
    assert benchmark_models._time({}, 10.0, CPU) == {}


def test_ratios_are_of_the_same_round() -> None:
    theirs, ours, _ = NETWORKS[:3]
    times = {theirs: [1.0, 2.0, 4.0], ours: [2.0, 1.0, 4.0]}
    entry = list(benchmark_models._figures(times, {theirs: None, ours: 3.0}))[1]
    assert (entry["median_ms"], entry["min_ms"]) == (2000.0, 1000.0)
    assert (entry["ratio"], entry["min_ratio"]) == (1.0, 1.0)
    assert (entry["extra_mb"], entry["runs"]) == (3.0, 3)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_memory_of_a_training_step() -> None:
    """In a process that has computed nothing; at least that of the gradients."""
    script = """
from dcdet.engine.benchmark_models import measured_memory
print(measured_memory("train 1", True))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    model = benchmark_models.own_network(False, False, QUICK)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 4 * learning / 1e6 < float(done.stdout) < 1000


@needs_cuda
@pytest.mark.parametrize("what", ["test", "train"])
def test_on_cuda(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    words = ["benchmark", what, "--quick", "--device", "cuda", "--json", str(path)]
    assert cli.main(words) == 0
    report = strictly(path)
    assert report["failed"] == {}
    assert all(entry["extra_mb"] > 0 for entry in report["networks"])
