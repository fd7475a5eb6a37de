"""torchvision's detectors beside their converted weights in dcdet: the same detections."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from dcdet import build_model, load_config, load_weights
from dcdet.engine.benchmark_models import fill_with_random_weights
from dcdet.engine.convert import convert
from dcdet.engine.demo import read_views
from dcdet.registry import check

CONFIGS = Path(__file__).parents[1] / "configs" / "torchvision"
# Smaller images than the configs', for time; the rules are the same.
SIZES = {"min_size": 256, "max_size": 427}
RESIZE = "data.resize={short: 256, long: 427, method: torchvision}"


def place_in(theirs: dict[str, Tensor], ours: Any) -> Tensor:
    """For each of our detections, which of theirs it is: rows of equal scores may be swapped."""
    distance = (ours.boxes[:, None] - theirs["boxes"][None]).abs().amax(-1)
    distance += 1e3 * (ours.labels[:, None] + 1 != theirs["labels"][None])
    assert distance.amin(1).max() < 0.01
    place = distance.argmin(1)
    assert sorted(place.tolist()) == list(range(len(theirs["boxes"])))
    return place


@pytest.mark.parametrize("kind", ["faster_rcnn", "mask_rcnn"])
def test_the_same_detections(kind: str, shared: Path, tmp_path: Path) -> None:
    make = getattr(torchvision.models.detection, kind.replace("_", "") + "_resnet50_fpn")
    theirs = fill_with_random_weights(make(weights=None, weights_backbone=None, **SIZES)).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    config = load_config(CONFIGS / f"{kind}_r50_fpn_coco.yaml", [RESIZE])
    lines: list[str] = []
    assert convert(config, tmp_path / "theirs.pth", tmp_path / "ours.pth", lines.append) == 0
    assert {"0 missing", "0 unused"} <= set(lines)
    model = build_model(config).eval()
    load_weights(model, tmp_path / "ours.pth")
    experiment = check(config)
    views = experiment.test.views(experiment.data.resize)
    paths = sorted((shared / "data" / "coco").rglob("*.jpg"))[5:8]
    for path in paths[: 3 if kind == "mask_rcnn" else 1]:
        image, batches = read_views(str(path), experiment.data, views)
        ours = model.predict(*batches)[0]
        with torch.no_grad():
            wanted = theirs([torch.from_numpy(image.copy()).permute(2, 0, 1) / 255])[0]
        place = place_in(wanted, ours)
        assert len(place) > 20
        torch.testing.assert_close(ours.scores, wanted["scores"][place], rtol=0, atol=1e-4)
        if kind == "mask_rcnn":
            probability = wanted["masks"][place, 0]
            differ = ours.masks != (probability >= 0.5)
            # At most a few pixels, whose probability is 0.5 but for rounding.
            assert ((probability[differ] - 0.5).abs() < 1e-4).all()
            assert differ.sum() <= 1e-4 * ours.masks.sum()
