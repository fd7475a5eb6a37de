"""Training runs: same weights after a kill, same losses on two processes, no silent divergence."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from data_sets import write_scenes

from dcdet import load_config
from dcdet.engine import checkpoint
from dcdet.engine.evaluate import evaluate
from dcdet.engine.train import train
from dcdet.errors import DivergedError, UserError

QUICKSTART = ROOT / "configs" / "quickstart" / "rfcn_dcn_r18_shapes.yaml"
# Shrunk to ResNet-18, a network of ResNet-101 is its sibling of ResNet-50.
CONFIGS = sorted(
    path for path in (ROOT / "configs").glob("*/*.yaml")
    if not path.with_name(path.name.replace("_r101_", "_r50_")).exists() or "_r50_" in path.name
)  # fmt: skip
DEEPLAB = [path for path in CONFIGS if path.stem.startswith("deeplab")]
SMALL = [
    "data.resize={short: 64, long: 96}", "data.batch_size=4", "data.workers=0",
    "solver.log_every=1", "solver.warmup=null", "solver.epochs=3", "solver.milestones=[]",
    "model.rpn.channels=32", "model.roi_head.channels=32",
    "model.rpn.train.post_nms=20", "model.rpn.test.post_nms=20",
]  # fmt: skip


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that put a tiny shapes set in place of a config's data."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    node = f"{{type: Shapes, root: {root}, split: %s, train_images: 8, test_images: 3}}"
    return [*SMALL, f"data.train={node % 'train'}", f"data.test={node % 'test'}"]


def weights(output: Path) -> dict[str, Any]:
    found = checkpoint.newest(output / "checkpoints")
    assert found is not None
    return found[1]


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def command(overrides: list[str], output: Path, *more: str, processes: int = 1) -> list[str]:
    door = [
        str(ROOT / "tools" / "train.py"),
        str(QUICKSTART),
        *overrides,
        "--output",
        str(output),
        *more,
    ]
    if processes == 1:
        return [sys.executable, *door]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        *door,
    ]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DCDET_TIMEOUT": "60"}
    return subprocess.run(arguments, capture_output=True, text=True, timeout=240, env=environment)


@pytest.mark.parametrize("path", sorted({*CONFIGS} - {*DEEPLAB}), ids=lambda path: path.stem)
def test_every_shipped_config_trains_and_tests(
    path: Path, shapes: list[str], tmp_path: Path
) -> None:
    overrides = [
        *shapes, "model.num_classes=4", "data.classes=null", "model.backbone.depth=18",
        "model.backbone.pretrained=null", "solver.epochs=1", "solver.checkpoint_every=1",
        "data.max_bad_images=0.5", "test.scales=null",
    ]  # fmt: skip
    if "rfcn" not in path.stem:
        head = "model.roi_head.channels", "model.roi_head.hidden_channels"
        overrides = [override.replace(*head) for override in overrides]
    if load_config(path).model.backbone.deform is not None:
        overrides.append("model.backbone.deform.blocks={c5: [0, 1]}")
    if "pool" in path.stem or "dcnv2_mimic" in path.stem:
        overrides.append("model.roi_head.offset_channels=32")
    if "mask_rcnn" in path.stem:
        overrides = [override.replace("{type: Shapes,", "{type: Shapes, form: coco, masks: true,")
                     for override in overrides]  # fmt: skip
    config = load_config(path, overrides)
    assert train(config, tmp_path) == 0
    assert all(torch.isfinite(torch.tensor(losses(tmp_path))))
    newest = checkpoint.sorted_checkpoints(tmp_path / "checkpoints")[-1]
    assert evaluate(load_config(tmp_path / "config.yaml"), newest, tmp_path / "test") == 0
    metrics = json.loads((tmp_path / "test" / "metrics.json").read_text())
    assert (metrics["images"], metrics["of"]) == (3, 3)
    assert "mAP@0.5" in metrics or "AP50" in metrics
    assert ("segm" in metrics) == ("mask_rcnn" in path.stem)
    json.loads((tmp_path / "test" / "detections.json").read_text())


@pytest.mark.parametrize("path", DEEPLAB, ids=lambda path: path.stem)
def test_every_shipped_deeplab_trains_and_tests(path: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", {"train": 4, "val": 2}, size=(48, 64), classes=3)
    node = f"{{type: LabelFolder, root: {tmp_path / 'scenes'}, split: %s}}"
    config = load_config(path, [
        f"data.train={node % 'train'}", f"data.test={node % 'val'}", "model.num_classes=3",
        "data.classes=[wall, floor, chair]", "model.backbone.depth=18", "model.channels=16",
        "model.backbone.pretrained=null", "solver.epochs=2", "solver.checkpoint_every=1",
        "solver.milestones=[]", "data.workers=0", "data.batch_size=2", "solver.log_every=1",
        "data.resize={short: 48, long: 64}",
        *(["data.crop=[32, 48]"] if load_config(path).data.crop else []),
        *(["model.backbone.deform.blocks={c5: [0, 1]}"] if "_dcn_" in path.stem else []),
    ])  # fmt: skip
    assert train(config, tmp_path / "run") == 0
    assert all(torch.isfinite(torch.tensor(losses(tmp_path / "run"))))
    newest = checkpoint.sorted_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert evaluate(load_config(tmp_path / "run" / "config.yaml"), newest, tmp_path / "test") == 0
    metrics = json.loads((tmp_path / "test" / "metrics.json").read_text())
    assert (metrics["images"], metrics["of"]) == (2, 2)
    assert 0 <= metrics["mIoU"] <= 1
    assert len(list((tmp_path / "test" / "predictions").glob("*.png"))) == 2


def test_the_same_seed_gives_the_same_bits_and_another_does_not(
    shapes: list[str], tmp_path: Path
) -> None:
    digests = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(
            load_config(QUICKSTART, [*shapes, "solver.epochs=1", f"seed={seed}"]), tmp_path / name
        )
        digests.append(checkpoint._digest(weights(tmp_path / name)["model"]))
    assert digests[0] == digests[1] != digests[2]


def test_a_run_starts_from_weights(shapes: list[str], tmp_path: Path) -> None:
    overrides = [*shapes, "solver.epochs=1"]
    train(load_config(QUICKSTART, overrides), tmp_path / "first")
    first = checkpoint.sorted_checkpoints(tmp_path / "first" / "checkpoints")[-1]
    still = [*overrides, "solver.lr=1e-12", "seed=1"]
    train(load_config(QUICKSTART, still), tmp_path / "second", weights=first)
    before, after = checkpoint.load(first), weights(tmp_path / "second")
    for name in ("backbone.conv1.weight", "rpn.score.weight", "roi_head.score_offset.bias"):
        torch.testing.assert_close(after["model"][name], before["model"][name])
    assert after["step"] == 2
    other = load_config(QUICKSTART, [*still, "model.roi_head.channels=16"])
    with pytest.raises(UserError, match="weights do not fit"):
        train(other, tmp_path / "third", weights=first)


def test_a_killed_run_resumes_to_the_same_bits(shapes: list[str], tmp_path: Path) -> None:
    """kill -9 in mid-epoch of a run with worker processes; then --resume."""
    overrides = [*shapes, "data.workers=1", "solver.epochs=12", "solver.checkpoint_every=0.5",
                 "solver.milestones=[6]"]  # fmt: skip
    whole = run(command(overrides, tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(overrides, tmp_path / "killed"),
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    wanted = tmp_path / "killed" / "checkpoints" / "step_00000005.pth"
    deadline = time.monotonic() + 120
    while not wanted.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert weights(tmp_path / "killed")["step"] < 24
    resumed = run(command(overrides, tmp_path / "killed", "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from" in resumed.stderr
    ours, undisturbed = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert ours["step"] == undisturbed["step"] == 24
    for part in ("model", "optimizer", "random"):
        assert checkpoint._digest(ours[part]) == checkpoint._digest(undisturbed[part]), part
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.parametrize("norm", ["bn", "frozen_bn"])
def test_two_processes_give_the_losses_of_one(norm: str, shapes: list[str], tmp_path: Path) -> None:
    overrides = [*shapes, f"model.backbone.norm={norm}", "solver.lr=0.002"]
    if norm == "frozen_bn":
        overrides.append("solver.weight_decay_multipliers={}")
    for name, processes in (("one", 1), ("two", 2)):
        result = run(command(overrides, tmp_path / name, processes=processes))
        assert result.returncode == 0, result.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 6
    assert two == pytest.approx(one, rel=2e-4)


def test_sigterm_writes_a_checkpoint_first(shapes: list[str], tmp_path: Path) -> None:
    overrides = [*shapes, "solver.epochs=1000", "solver.checkpoint_every=1000", "data.workers=1"]
    process = subprocess.Popen(
        command(overrides, tmp_path), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 2/"):
            break
    os.killpg(process.pid, signal.SIGTERM)  # as a terminal or a scheduler does: workers too
    process.stderr.read()
    assert process.wait(timeout=60) == 143
    assert weights(tmp_path)["step"] >= 2


def test_divergence_ends_with_code_3_and_good_checkpoints(
    shapes: list[str], tmp_path: Path
) -> None:
    config = load_config(QUICKSTART, [
        *shapes, "solver.lr=1e6", "solver.epochs=100", "solver.clip_gradient=null",
        "solver.max_bad_steps=3", "solver.checkpoint_every=0.5",
    ])  # fmt: skip
    with pytest.raises(DivergedError, match=r"not finite|non-finite") as caught:
        train(config, tmp_path)
    assert caught.value.exit_code == 3
    for path in checkpoint.sorted_checkpoints(tmp_path / "checkpoints"):
        state = checkpoint.load(path)
        assert not checkpoint.first_non_finite(state)


def test_a_bad_step_changes_nothing(
    shapes: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One step with a NaN loss: it is not applied, not even to the statistics."""
    from dcdet.models.two_stage import TwoStageDetector

    own, calls = TwoStageDetector.forward, []

    def poisoned(self: TwoStageDetector, batch: Any) -> Any:
        calls.append(
            {
                name: value.clone()
                for name, value in self.state_dict().items()
                if "num_batches" not in name
            }
        )
        result, stats = own(self, batch)
        if len(calls) == 2:
            result["rpn_box"] = result["rpn_box"] * float("nan")
        return result, stats

    monkeypatch.setattr(TwoStageDetector, "forward", poisoned)
    assert train(load_config(QUICKSTART, [*shapes, "solver.epochs=2"]), tmp_path) == 0
    assert all(torch.equal(calls[1][name], calls[2][name]) for name in calls[1])
    assert not all(torch.equal(calls[2][name], calls[3][name]) for name in calls[2])
    assert "rpn_box nan" in caplog.text
    assert (tmp_path / "bad_batch_rank0.pth").exists()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1]


def test_images_without_objects_train(
    shapes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from dcdet.engine import train as module

    own = module.build_reader

    def emptied(config: Any, split: str) -> Any:
        reader = own(config, split)
        reader.records = [
            replace(record, boxes=record.boxes[:0], labels=record.labels[:0])
            for record in reader.records
        ]
        return reader

    monkeypatch.setattr(module, "build_reader", emptied)
    config = load_config(QUICKSTART, [*shapes, "solver.epochs=1", "data.filter_empty=false"])
    assert train(config, tmp_path) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["roi_box"] == line["rpn_box"] == 0 for line in lines)


def test_a_second_run_does_not_overwrite_the_first(shapes: list[str], tmp_path: Path) -> None:
    config = load_config(QUICKSTART, [*shapes, "solver.epochs=0.5"])
    assert train(config, tmp_path) == 0
    with pytest.raises(UserError, match="another run"):
        train(config, tmp_path)
    with pytest.raises(UserError, match=r"solver\.lr was"):
        train(
            load_config(QUICKSTART, [*shapes, "solver.epochs=1", "solver.lr=0.5"]),
            tmp_path,
            resume=True,
        )
    assert train(load_config(QUICKSTART, [*shapes, "solver.epochs=1"]), tmp_path, resume=True) == 0


def test_wrong_number_of_classes_is_found_before_training(
    shapes: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="has 4 classes: crescent"):
        train(load_config(QUICKSTART, [*shapes, "model.num_classes=3"]), tmp_path)


def test_masks_that_are_missing_are_missed_before_training(
    shapes: list[str], tmp_path: Path
) -> None:
    sets = [override for override in shapes if override.startswith("data.t")]
    config = load_config(QUICKSTART.with_name("mask_rcnn_r18_shapes.yaml"), sets)
    with pytest.raises(UserError, match="delivers no instance masks"):
        train(config, tmp_path)
    assert not (tmp_path / "config.yaml").exists()


def test_a_killed_process_ends_the_others(shapes: list[str], tmp_path: Path) -> None:
    overrides = [*shapes, "solver.epochs=1000", "solver.checkpoint_every=1000"]
    log = tmp_path / "log"
    with log.open("w") as file:
        launcher = subprocess.Popen(
            command(overrides, tmp_path / "run", processes=2),
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DCDET_TIMEOUT": "30"},
        )
        deadline = time.monotonic() + 120
        while "step 2/" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        listed = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True
        )
        ranks = [int(pid) for pid in listed.stdout.split()]
        assert len(ranks) == 2, log.read_text()
        os.kill(ranks[1], signal.SIGKILL)
        assert launcher.wait(timeout=60) != 0
    for pid in ranks:
        assert not Path(f"/proc/{pid}").exists()
