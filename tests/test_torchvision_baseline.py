"""tools/torchvision_baseline.py: torchvision's detector on a config's data and schedule."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from data_sets import write_voc

from dcdet import load_config
from dcdet.structures import Batch, Target

SOURCE = ROOT / "tools" / "torchvision_baseline.py"
CONFIG = ROOT / "configs" / "small" / "fpn_r18_voc.yaml"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("voc")
    images = {name: ((60, 80), [("RBC", 10, 10, 40, 50)]) for name in "abcd"}
    write_voc(root, images)
    return [
        f"data.train={{type: VOC, root: {root}, image_set: train}}",
        f"data.test={{type: VOC, root: {root}, image_set: train}}",
        "data.resize={short: 64, long: 96}", "data.workers=0", "solver.epochs=2",
        "solver.milestones=[]", "solver.log_every=1",
    ]  # fmt: skip


def test_trains_and_writes_metrics(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SOURCE), str(CONFIG), *words, "--output", str(tmp_path)],
        capture_output=True, text=True, check=True, timeout=240,
    )  # fmt: skip
    assert "step 2/2" in done.stderr
    assert 0 <= json.loads((tmp_path / "metrics.json").read_text())["mAP@0.5"] <= 1


def test_sizes_and_units_are_the_configs(words: list[str]) -> None:
    spec = importlib.util.spec_from_file_location("torchvision_baseline", SOURCE)
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    model = tool.build_torchvision(load_config(CONFIG, words))
    assert len(model.backbone.body.layer3) == 2  # ResNet-18
    assert model.roi_heads.box_predictor.cls_score.out_features == 1 + 3
    assert model.rpn.anchor_generator.sizes == ((16,), (32,), (64,), (128,), (256,))
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 128
    assert (model.transform.min_size, model.transform.max_size) == ((64,), 96)

    boxes = torch.tensor([[1.0, 2.0, 3.0, 5.0]])
    target = Target("a", (4, 6), boxes, torch.tensor([2]), torch.zeros(0, 4))
    whole = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    images, targets = tool.images_and_targets(Batch(whole, [(4, 6)], [target], [1.0], [0]))
    assert images[0].shape == (3, 4, 6)  # without the batch's padding
    assert images[0].unique().tolist() == [1.0]
    assert targets[0]["labels"].tolist() == [3]  # 0 is background
    assert torch.equal(targets[0]["boxes"], boxes)
