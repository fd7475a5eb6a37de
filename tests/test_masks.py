"""Segmentations, run lengths and pasting, against pycocotools, torchvision and mmdetection."""

import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as official
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection.roi_heads import paste_masks_in_image

from dcdet.masks import EMPTY, PasteMethod, clean_segmentation, decode, encode, paste, read_runs

SIZE = (30, 40)
SQUARE = [5, 6, 15, 6, 15, 16, 5, 16]
METHODS: list[PasteMethod] = ["grid", "resize"]
NAN, INF = float("nan"), float("inf")


def random_masks(seed: int, number: int, size: tuple[int, int]) -> np.ndarray:
    random = np.random.default_rng(seed)
    share = random.choice([0.0, 0.02, 0.5, 1.0], number)
    return random.random((number, *size)) < share[:, None, None]


def bitmap(segmentation: Any, size: tuple[int, int] = SIZE) -> np.ndarray:
    counts, fault = clean_segmentation(segmentation, size)
    assert counts is not None, fault
    return decode([counts], size)[0]


@given(st.integers(0, 1000), st.integers(0, 4), st.integers(1, 13), st.integers(1, 13))
def test_run_lengths_equal_pycocotools(seed: int, number: int, height: int, width: int) -> None:
    masks = random_masks(seed, number, (height, width))
    found = encode(torch.from_numpy(masks))
    expected = official.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
    assert found == [
        {"size": [height, width], "counts": rle["counts"].decode()} for rle in expected
    ]
    counts = [rle["counts"].encode() for rle in found]
    np.testing.assert_array_equal(decode(counts, (height, width)), masks)
    json.dumps(found, allow_nan=False)


def test_long_runs() -> None:
    """Numbers of several letters and differences below zero."""
    masks = np.zeros((3, 700, 900), dtype=bool)
    masks[0, 3:690, 5:890] = True
    masks[1, :, 450:] = True
    masks[2, 699, 899] = True
    found = encode(torch.from_numpy(masks))
    for mask, rle in zip(masks, found, strict=True):
        np.testing.assert_array_equal(official.decode(rle), mask)
    np.testing.assert_array_equal(decode([r["counts"].encode() for r in found], (700, 900)), masks)


corner = st.floats(-20, 60).map(lambda v: round(v, 2))


@given(
    st.lists(st.lists(st.tuples(corner, corner), min_size=3, max_size=9), min_size=1, max_size=3)
)
def test_polygons_equal_pycocotools(polygons: Any) -> None:
    lists = [[number for point in polygon for number in point] for polygon in polygons]
    expected = official.decode(official.merge(official.frPyObjects(lists, *SIZE)))
    np.testing.assert_array_equal(bitmap(lists), expected)
    assert clean_segmentation(lists, SIZE)[1] == ("" if expected.any() else EMPTY)


@given(st.integers(0, 1000))
def test_run_lengths_of_files(seed: int) -> None:
    [mask] = random_masks(seed, 1, SIZE)
    [rle] = encode(torch.from_numpy(mask)[None])
    np.testing.assert_array_equal(bitmap(rle), mask)
    runs = read_runs(rle["counts"], SIZE).tolist()
    np.testing.assert_array_equal(bitmap({"size": [30, 40], "counts": runs}), mask)
    # Runs of no pixel change nothing; all in one form afterwards.
    for place in (1, len(runs)):
        last = runs[place - 1] // 2
        more = [*runs[: place - 1], last, 0, runs[place - 1] - last, 0, 0, *runs[place:]]
        counts, _ = clean_segmentation({"size": [30, 40], "counts": more}, SIZE)
        assert counts == rle["counts"].encode()


def rle(counts: Any, size: Any = (30, 40)) -> dict[str, Any]:
    return {"size": list(size), "counts": counts}


@pytest.mark.parametrize(
    ("segmentation", "fault"),
    [
        (None, "neither polygons nor run lengths"),
        ("5 6 7", "neither polygons nor run lengths"),
        ([], "no polygon of at least three corners"),
        ([[]], "no polygon of at least three corners"),
        ([[1, 2, 3, 4]], "no polygon of at least three corners"),
        ([[1, 2, 3, 4, 5, 6, 7]], "no polygon of at least three corners"),
        ([SQUARE, None], "polygon that is not a list of numbers"),
        ([SQUARE, "12345678"], "polygon that is not a list of numbers"),
        ([SQUARE, {"x": 1}], "polygon that is not a list of numbers"),
        ([[1, 2, 3, 4, 5, "6"]], "polygon that is not a list of numbers"),
        ([[1, 2, 3, 4, 5, None]], "polygon that is not a list of numbers"),
        ([[1, 2, 3, 4, 5, [6]]], "polygon that is not a list of numbers"),
        ([[[1, 2], [3, 4], [5, 6]]], "polygon that is not a list of numbers"),
        ([[1, 2, 3, 4, 5, 10**30]], "polygon that is not a list of numbers"),
        (SQUARE, "polygon that is not a list of numbers"),
        ([[1, 2, 3, 4, 5, -(2**63)]], "polygon with a non-finite or huge outline"),
        ([[1, 2, 3, 4, 5, NAN]], "polygon with a non-finite or huge outline"),
        ([[1, 2, 3, 4, 5, -INF]], "polygon with a non-finite or huge outline"),
        ([[1e9, 1e9] * 3], "polygon with a non-finite or huge outline"),
        ([[0, 0, 9000, 9000] * 60], "polygon with a non-finite or huge outline"),
        ({}, "run lengths of another size than the image's"),
        (rle([1200], (40, 30)), "run lengths of another size than the image's"),
        (rle([1200], (30, 40, 1)), "run lengths of another size than the image's"),
        (rle(None), "run lengths that are not letters or whole numbers"),
        (rle([600.0, 600]), "run lengths that are not letters or whole numbers"),
        (rle([True, 1199]), "run lengths that are not letters or whole numbers"),
        (rle([10**30]), "run lengths that are not letters or whole numbers"),
        (rle([]), "run lengths that do not fill the image"),
        (rle([600, 599]), "run lengths that do not fill the image"),
        (rle([600, 601]), "run lengths that do not fill the image"),
        (rle([1300, -100]), "run lengths that do not fill the image"),
        (rle([2**31] * 4), "run lengths that do not fill the image"),
        (rle("0"), "run lengths that do not fill the image"),
        (rle(""), "run lengths that cannot be decompressed"),
        (rle("P"), "run lengths that cannot be decompressed"),  # a further letter is announced
        (rle("1P"), "run lengths that cannot be decompressed"),
        (rle("0 0"), "run lengths that cannot be decompressed"),
        (rle("0\x00"), "run lengths that cannot be decompressed"),
        (rle("0é"), "run lengths that cannot be decompressed"),
        (rle("0\ud800"), "run lengths that cannot be decompressed"),
        (rle("oooooooooooo0"), "run lengths that cannot be decompressed"),
    ],
)  # fmt: skip
def test_what_is_no_segmentation(segmentation: Any, fault: str) -> None:
    assert clean_segmentation(segmentation, SIZE) == (None, f"{fault} (dropped)")


def test_faults_that_leave_a_mask() -> None:
    counts, fault = clean_segmentation([SQUARE, [1, 2, 3, 4]], SIZE)
    assert fault == "polygon without three corners (left out)"
    assert counts == clean_segmentation([SQUARE], SIZE)[0]
    for nothing in (
        [[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]],
        [[100, 100, 120, 100, 120, 120]],
        rle([1200]),
    ):
        counts, fault = clean_segmentation(nothing, SIZE)
        assert fault == EMPTY
        assert counts is not None
        assert not decode([counts], SIZE).any()


@pytest.mark.parametrize("size", [(0, 0), (30, 0), (-1, 5), (20_000, 5), (1 << 40, 1 << 40)])
def test_image_without_a_usable_size(size: tuple[int, int]) -> None:
    counts, fault = clean_segmentation([SQUARE], size)
    assert (counts, fault) == (None, "a mask needs the image's size (dropped)")


letters = st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12)


@settings(max_examples=300)
@given(st.one_of(letters, st.lists(st.integers(-2, 14), max_size=8)), st.integers(1, 4))
def test_any_run_lengths_are_read_or_refused(counts: Any, height: int) -> None:
    size = (height, 3)
    try:
        runs = read_runs(counts, size)
    except ValueError:
        return
    assert runs.sum() == height * 3
    assert (runs[1:] > 0).all()
    assert runs[0] >= 0


def test_no_masks() -> None:
    assert encode(torch.zeros(0, 30, 40, dtype=torch.bool)) == []
    assert decode([], SIZE).shape == (0, 30, 40)
    for method in METHODS:
        found = paste(torch.zeros(0, 28, 28), torch.zeros(0, 4), SIZE, method)
        assert (found.shape, found.dtype) == ((0, 30, 40), torch.bool)


# Pasting


def random_boxes(seed: int, number: int, size: tuple[int, int], out: float) -> Tensor:
    """Boxes in and, by a share `out` of its sides, around an image."""
    draw = torch.Generator().manual_seed(seed)
    sides = torch.tensor([size[1], size[0]])
    corners = torch.rand(number, 2, 2, generator=draw) * (1 + 2 * out) - out
    corners = (corners * sides).sort(dim=1).values
    return torch.cat([corners[:, 0], corners[:, 1] + 0.01], dim=1)


def whole_image(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """mmdetection's rule without any shortcut: every pixel of the image for every box."""
    x, y = torch.arange(size[1]) + 0.5, torch.arange(size[0]) + 0.5
    x1, y1, x2, y2 = boxes[..., None].unbind(1)
    x, y = (x - x1) / (x2 - x1) * 2 - 1, (y - y1) / (y2 - y1) * 2 - 1
    shape = len(boxes), size[0], size[1]
    grid = torch.stack([x[:, None].expand(shape), y[:, :, None].expand(shape)], dim=3)
    return functional.grid_sample(probabilities[:, None], grid, align_corners=False)[:, 0] >= 0.5


def torchvision(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    return paste_masks_in_image(probabilities[:, None], boxes, size)[:, 0] > 0.5


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    size=st.tuples(st.integers(1, 70), st.integers(1, 90)),
    cells=st.sampled_from([1, 7, 28]),
    certain=st.booleans(),
)
def test_grid_equals_sampling_the_whole_image(
    seed: int, size: tuple[int, int], cells: int, certain: bool
) -> None:
    boxes = random_boxes(seed, 8, size, out=0.5)
    probabilities = torch.rand(8, cells, cells, generator=torch.Generator().manual_seed(seed))
    if certain:  # as where a sigmoid is exactly 0 or 1, which reaches 0.5 on a box's very edge
        probabilities, boxes = probabilities.round(), boxes.round() + torch.tensor([0, 0, 1, 1]) / 2
    found = paste(probabilities, boxes, size, "grid")
    torch.testing.assert_close(found, whole_image(probabilities, boxes, size))


def test_one_half() -> None:
    box, cells = torch.tensor([[5.0, 5, 20, 20]]), torch.full((1, 28, 28), 0.5)
    assert paste(cells, box, SIZE, "grid").sum() > 100
    assert not paste(cells, box, SIZE, "resize").any()
    assert paste(cells + 1e-6, box, SIZE, "resize").sum() > 100


def test_grid_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, probabilities = random_boxes(1, 5, (300, 400), 0.2), torch.rand(5, 28, 28)
    whole = whole_image(probabilities, boxes, (300, 400))
    for strip in (1, 1000, 1 << 30):
        monkeypatch.setattr("dcdet.masks.STRIP", strip)
        assert torch.equal(paste(probabilities, boxes, (300, 400), "grid"), whole)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    size=st.tuples(st.integers(1, 70), st.integers(1, 90)),
    cells=st.sampled_from([1, 7, 28]),
)
def test_resize_equals_torchvision(seed: int, size: tuple[int, int], cells: int) -> None:
    """Boxes reach out of the image, but into it, where torchvision's own function fails."""
    boxes = random_boxes(seed, 8, size, out=0.5)
    sides = torch.tensor([size[1], size[0]])
    boxes = torch.cat([boxes[:, :2].minimum(sides - 1), boxes[:, 2:].clamp(min=0.5)], dim=1)
    probabilities = torch.rand(8, cells, cells, generator=torch.Generator().manual_seed(seed))
    found = paste(probabilities, boxes, size, "resize")
    assert torch.equal(found, torchvision(probabilities, boxes, size))


def test_mmdetections_recorded_masks(shared: Path) -> None:
    recorded = np.load(shared / "golden_mmdet" / "mask_plain.npz")
    height, width = json.loads((shared / "golden_mmdet" / "mask_plain.json").read_text())[
        "img_shape"
    ]
    probabilities = torch.from_numpy(recorded["mask_logits"]).sigmoid()
    boxes = torch.from_numpy(recorded["dets"][:12, :4])
    found = paste(probabilities, boxes, (height, width), "grid").numpy()
    bits = np.unpackbits(recorded["masks_bits"], axis=1)[:, : height * width]
    np.testing.assert_array_equal(found, bits.reshape(-1, height, width))
    assert found.any(axis=(1, 2)).sum() > 8
    assert (found != paste(probabilities, boxes, (height, width), "resize").numpy()).any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("box", [
    (NAN, 0, 10, 10), (0, 0, INF, 10), (-INF, 0, 10, 10), (5, 5, 5, 10), (5, 5, 10, 5),
    (10, 10, 5, 5), (-20, -20, -10, -10), (50, 5, 60, 10), (5, 50, 10, 60), (1e30, 0, 2e30, 9),
    (0, 1e30, 9, 2e30), (-3e38, -3e38, -1e38, -1e38),
])  # fmt: skip
def test_boxes_without_a_mask(method: PasteMethod, box: tuple[float, ...]) -> None:
    """They change nothing about the others."""
    good = torch.tensor([[5.0, 5, 20, 20]])
    both = torch.cat([torch.tensor([box]), good])
    found = paste(torch.ones(2, 28, 28), both, SIZE, method)
    assert not found[0].any()
    assert torch.equal(found[1], paste(torch.ones(1, 28, 28), good, SIZE, method)[0])
    assert found[1].sum() == 15 * 15


@pytest.mark.parametrize("far", [1e4, 1e6, 1e30, 3.4e38])
def test_huge_boxes(far: float) -> None:
    """Whole pixels of such a mask would take too much memory, its sampled middle does not."""
    box, cells = torch.tensor([[-far, -far, far, far]]), torch.ones(1, 28, 28)
    start = time.perf_counter()
    assert paste(cells, box, SIZE, "grid").all() == (far < 1e7)
    assert not paste(cells, box, SIZE, "resize").any()
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("method", METHODS)
def test_probabilities_that_are_none(method: PasteMethod) -> None:
    boxes = torch.tensor([[5.0, 5, 20, 20]]).expand(3, 4)
    probabilities = torch.ones(3, 28, 28)
    probabilities[0] = NAN
    probabilities[1, :, :14] = NAN
    found = paste(probabilities, boxes, SIZE, method)
    assert not found[0].any()
    assert not found[1, :, :12].any()
    assert found[1, :, 14:].sum() > 60
    assert found[2].sum() == 225


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    probabilities, boxes = torch.rand(4, 28, 28).to(dtype), random_boxes(2, 4, SIZE, 0.1)
    for method in METHODS:
        found = paste(probabilities, boxes, SIZE, method)
        assert torch.equal(found, paste(probabilities.float(), boxes, SIZE, method))


def test_memory_goes_with_the_boxes_not_with_the_image() -> None:
    """100 masks in 12 million pixels: 1.2 GB, if every page of them were written."""

    def used() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    boxes = torch.tensor([[1000.0, 900, 1300, 1200]]).expand(100, 4)
    before = used()
    masks = paste(torch.ones(100, 28, 28), boxes, (3000, 4000), "grid")
    assert used() - before < 600e6
    assert 89_000 < masks[99].sum() < 90_000
