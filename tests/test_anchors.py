"""Anchors against the 2017 release's recorded ones."""

from pathlib import Path

import numpy as np
import pytest
import torch

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


def test_grid_order_is_row_column_anchor() -> None:
    cell = cell_anchors(16, [8, 16], [1])
    grid = grid_anchors(cell, (16, 16), (3, 4))
    assert grid.shape == (3, 4, 2, 4)
    torch.testing.assert_close(grid[2, 1, 1], cell[1] + torch.tensor([16.0, 32.0, 16.0, 32.0]))
