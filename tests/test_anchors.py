"""Anchors against the 2017 release's recorded ones, mmdetection's and torchvision's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator

from dcdet.models.anchors import cell_anchors, grid_anchors


def test_cell_anchors_equal_the_release(shared: Path) -> None:
    arrays = np.load(shared / "golden" / "ops" / "utils_anchors.npz")
    names = [name for name in arrays.files if name.startswith("b")]
    assert len(names) == 7
    for name in names:
        base, scales = name[1:].split("_s")
        ours = cell_anchors(int(base), [float(s) for s in scales.split("_")], [0.5, 1, 2])
        wanted = arrays[name] + [0, 0, 1, 1]
        assert ours.numpy() == pytest.approx(wanted, abs=1e-12), name


def test_the_example_in_the_paper_trail() -> None:
    """Base 16, ratio 0.5, scale 8: (-84, -40, 99, 55) in inclusive pixels."""
    assert cell_anchors(16, [8], [0.5]).tolist() == [[-84, -40, 100, 56]]


def test_width_is_rounded_half_to_even() -> None:
    wide = cell_anchors(32, [1], [0.5])[0]
    assert (wide[2:] - wide[:2]).tolist() == [45, 22]


def test_mmdetections_rule_rounds_nothing() -> None:
    """MMDET.md, 6: w = 8s / sqrt(r), h = 8s sqrt(r), around the cell's corner."""
    p2 = [[-22.6274, -11.3137, 22.6274, 11.3137], [-16, -16, 16, 16],
          [-11.3137, -22.6274, 11.3137, 22.6274]]  # fmt: skip
    ours = cell_anchors(4, [8], [0.5, 1, 2], "mmdetection")
    assert ours.numpy() == pytest.approx(np.array(p2), abs=1e-4)
    several = cell_anchors(32, [2, 5], [0.3, 1.7], "mmdetection").tolist()
    wanted = [
        [-w / 2, -h / 2, w / 2, h / 2]
        for ratio in (0.3, 1.7)
        for w, h in ((32 * scale / ratio**0.5, 32 * scale * ratio**0.5) for scale in (2, 5))
    ]
    assert several == [pytest.approx(anchor, rel=1e-12) for anchor in wanted]


@pytest.mark.parametrize("scales", [[8.0], [2.0, 3.7]])
def test_torchvisions_rule_equals_torchvision(scales: list[float]) -> None:
    ratios = [0.5, 1.0, 2.0, 0.37]
    for stride in (4, 16, 64):
        generator = AnchorGenerator(((1,),), ((1.0,),))
        sizes = [stride * scale for scale in scales]
        wanted = generator.generate_anchors(sizes, ratios, dtype=torch.float64)
        ours = cell_anchors(stride, scales, ratios, "torchvision")
        assert torch.equal(ours, wanted), stride


def test_grid_order_is_row_column_anchor() -> None:
    cell = cell_anchors(16, [8, 16], [1])
    grid = grid_anchors(cell, (16, 16), (3, 4))
    assert grid.shape == (3, 4, 2, 4)
    torch.testing.assert_close(grid[2, 1, 1], cell[1] + torch.tensor([16.0, 32.0, 16.0, 32.0]))
