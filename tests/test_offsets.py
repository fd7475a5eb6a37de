"""dcdet offsets: sampling points and RoI parts against slow twins, known offsets, and the files."""

import hashlib
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from data_sets import picture
from golden import load
from torch import Tensor, nn

from dcdet import build_model, cli, load_config
from dcdet.boxes import Scale
from dcdet.datasets.loader import View
from dcdet.engine.checkpoint import save
from dcdet.engine.demo import read_views
from dcdet.engine.offsets import inner_places, roi_parts, sampling_points
from dcdet.ops import deform_psroi_pool
from dcdet.ops.deform_psroi_pool import shifted_parts
from dcdet.registry import check
from dcdet.structures import UNLABELLED, Batch, Detections, Segmentation, Target
from dcdet.visualize.offsets import GREEN, RED, draw_parts, draw_points

QUICKSTART = str(ROOT / "configs/quickstart/rfcn_dcn_r18_shapes.yaml")
TAPS = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]  # rows of a 3x3 kernel, y first


def build(*overrides: str) -> Any:
    torch.manual_seed(0)
    return build_model(load_config(QUICKSTART, list(overrides))).eval()


def batch_of(height: int, width: int, scale: Scale) -> Batch:
    """One image of the network's size `height` x `width`."""
    pixels = torch.from_numpy(picture((height, width))).permute(2, 0, 1)[None]
    nothing = torch.zeros(0, 4)
    target = Target("image", (1, 1), nothing, torch.zeros(0).long(), nothing)
    return Batch(pixels, [(height, width)], [target], [scale], [0])


@pytest.fixture(scope="module")
def plain_offsets() -> Any:
    """Two deformable layers whose offsets are still zero."""
    return build()


class Recorded(nn.Module):
    """In place of a convolution: gives the same maps for any input."""

    def __init__(self, maps: Tensor) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, _: Tensor) -> Tensor:
        return self.maps


def paths(maps: list[np.ndarray], cell: tuple[float, float], group: int, dilation: int) -> list:
    """The release's way, one point at a time: (y, x) on the first layer's map, None for no path."""
    y, x = round(cell[0]), round(cell[1])  # half to even, as numpy.round
    offset, *rest = maps
    height, width = offset.shape[1:]
    points: list[tuple[float, float] | None] = []
    for tap, (i, j) in enumerate(TAPS):
        point = None
        if 0 <= y < height and 0 <= x < width:
            dy, dx = offset[18 * group + 2 * tap : 18 * group + 2 * tap + 2, y, x]
            point = (y + dilation * i + dy, x + dilation * j + dx)
        if rest:
            below = [None] * 9 ** len(rest)
            points += paths(rest, point, group, dilation) if point else below
        else:
            points.append(point)
    return points


def test_zero_offsets_give_the_regular_grid(plain_offsets: Any) -> None:
    found = sampling_points(plain_offsets, batch_of(256, 320, 2.0), [(70.0, 50.0), (0.0, 127.9)])
    assert found.layers == ("c5.1", "c5.0")
    # Stride 16 at scale 2: a cell is 8 x 8 original pixels; c5 is dilated by 2.
    assert found.centres.tolist() == [[68.0, 52.0], [4.0, 124.0]]
    middle = [[68.0 + 16 * (j1 + j2), 52.0 + 16 * (i1 + i2)] for i1, j1 in TAPS for i2, j2 in TAPS]
    assert found.positions[0].tolist() == [middle]
    assert found.weights[0].tolist() == [[1.0] * 81]
    # In the lower left corner the first taps above and to the right stay on the map of 16 x 20.
    for (i1, j1), samples, weights in zip(
        TAPS, found.positions[1, 0].view(9, 9, 2), found.weights[1, 0].view(9, 9), strict=True
    ):
        if i1 <= 0 <= j1:
            corner = [[4.0 + 16 * (j1 + j2), 124.0 + 16 * (i1 + i2)] for i2, j2 in TAPS]
            assert samples.tolist() == corner
        else:
            assert samples.isnan().all()
            assert not weights.any()


def test_points_and_parts_follow_the_scale_of_each_axis(plain_offsets: Any) -> None:
    points = [(70.0, 50.0), (35.0, 50.0)]
    whole = sampling_points(plain_offsets, batch_of(256, 320, 2.0), points[:1])
    halved = sampling_points(plain_offsets, batch_of(256, 320, (2.0, 4.0)), points[1:])
    for one, other in ((whole.centres, halved.centres), (whole.positions, halved.positions)):
        assert torch.equal(one * torch.tensor([0.5, 1.0]), other)
    box = [10.0, 12.0, 34.0, 54.0]
    parts = roi_parts(plain_offsets, batch_of(128, 128, (2.0, 3.0)), found_in([box], [0]))
    torch.testing.assert_close(parts, tiles(box, 3)[None])


def test_a_known_bias_shifts_each_layer(plain_offsets: Any) -> None:
    model = build()
    with torch.no_grad():
        # The last layer: 1.4 down and 2.6 to the left, rounded to 1 and 3 pixels. The first: exact.
        model.backbone.layer4[1].conv2.offset.bias.view(9, 2).copy_(torch.tensor([1.4, -2.6]))
        model.backbone.layer4[0].conv2.offset.bias.view(9, 2).copy_(torch.tensor([0.25, 0.5]))
    batch = batch_of(256, 320, 1.0)
    moved = sampling_points(model, batch, [(168.0, 104.0)]).positions
    still = sampling_points(plain_offsets, batch, [(168.0, 104.0)]).positions
    assert moved.isfinite().all()
    shift = torch.tensor([16 * (-3 + 0.5), 16 * (1 + 0.25)])
    torch.testing.assert_close(moved, still + shift)


def test_three_layers_follow_the_recorded_offsets(shared: Path) -> None:
    """729 points for each of the four offset groups of the recorded Deformable R-FCN."""
    arrays, _ = load(shared, "rfcn_dcn")
    maps = [arrays[f"res5{block}_branch2b_offset"] for block in "cba"]
    model = build(
        "model.backbone.depth=34", "model.backbone.deform.blocks={c5: [0, 1, 2]}",
        "model.backbone.deform.groups=4", "model.backbone.deform.offset_dilation=2",
        "model.backbone.stem_pool=ceil",
    )  # fmt: skip
    for block, recorded in zip((2, 1, 0), maps, strict=True):
        model.backbone.layer4[block].conv2.offset = Recorded(torch.from_numpy(recorded))
    places = [(8.5, 6.5), (0.0, 0.0), (16.9, 3.2)]  # x, y in cells
    found = sampling_points(
        model, batch_of(199, 271, 1.5), [(x * 16 / 1.5, y * 16 / 1.5) for x, y in places]
    )
    assert found.layers == ("c5.2", "c5.1", "c5.0")
    assert found.positions.shape == (3, 4, 729, 2)
    lost = 0
    for point, (x, y) in enumerate(places):
        for group in range(4):
            wanted = paths([offset[0] for offset in maps], (int(y), int(x)), group, 2)
            for sample, expected in zip(found.positions[point, group], wanted, strict=True):
                if expected is None:
                    assert sample.isnan().all()
                    lost += 1
                else:
                    image_y, image_x = ((position + 0.5) * 16 / 1.5 for position in expected)
                    assert sample.tolist() == pytest.approx([image_x, image_y], abs=1e-3)
    assert 1000 < lost < 7000


def test_masks_weigh_the_samples() -> None:
    model = build("model.backbone.deform.modulated=true")
    scale = model.backbone.layer4[0].conv2.spec.mask_scale
    logits = [torch.randn(9), torch.randn(9)]
    with torch.no_grad():
        for block, values in enumerate(logits):
            model.backbone.layer4[block].conv2.offset.bias[18:] = values
    found = sampling_points(model, batch_of(256, 256, 1.0), [(128.0, 128.0)])
    first, last = (scale / (1 + np.exp(-values.double().numpy())) for values in logits)
    wanted = [last[i] * first[j] for i in range(9) for j in range(9)]
    assert found.weights.flatten().tolist() == pytest.approx(wanted, rel=1e-5)


def test_a_stage_may_be_named(plain_offsets: Any) -> None:
    model = build("model.backbone.deform.blocks={c4: [-1], c5: [0, 1]}")
    batch = batch_of(128, 128, 1.0)
    assert sampling_points(model, batch, [(64.0, 64.0)]).layers == ("c5.1", "c5.0")
    found = sampling_points(model, batch, [(64.0, 64.0)], stage="c4")
    assert found.layers == ("c4.1",)
    assert found.positions[0, 0].tolist() == [[72.0 + 16 * j, 72.0 + 16 * i] for i, j in TAPS]
    with pytest.raises(ValueError, match="stage: 'c2' has no deformable convolution"):
        sampling_points(model, batch, [(64.0, 64.0)], stage="c2")


def test_a_strided_layer_reads_a_finer_map() -> None:
    model = build(
        "model.backbone.depth=50", "model.backbone.deform.blocks={c4: [0]}",
        "model.backbone.stride_in=3x3",
    )  # fmt: skip
    found = sampling_points(model, batch_of(96, 96, 1.0), [(50.0, 34.0)])
    # Cell (2, 3) of stride 16 reads around cell (4, 6) of stride 8.
    assert found.centres.tolist() == [[56.0, 40.0]]
    assert found.positions[0, 0].tolist() == [[8 * (6 + j) + 4, 8 * (4 + i) + 4] for i, j in TAPS]


def test_many_layers_are_cut_to_the_last_three() -> None:
    model = build("model.backbone.depth=34", "model.backbone.deform.blocks={c4: [0, 1, 2, 3, 4]}")
    found = sampling_points(model, batch_of(64, 64, 1.0), [(0.0, 0.0)])
    assert found.layers == ("c4.4", "c4.3", "c4.2")


def test_the_last_pixel_where_pooling_rounded_down() -> None:
    """33 pixels are 2 cells of 16 under the release's pooling: the last pixel is in none."""
    model = build("model.backbone.stem_pool=ceil")
    found = sampling_points(model, batch_of(33, 49, 1.0), [(48.5, 32.5)])
    assert found.centres.tolist() == [[40.0, 24.0]]
    assert found.positions.isfinite().any()


def test_the_model_is_left_as_it_was(plain_offsets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: value.clone() for name, value in plain_offsets.state_dict().items()}
    batch = batch_of(64, 64, 1.0)
    sampling_points(plain_offsets, batch, [])
    monkeypatch.setattr(plain_offsets.backbone.layer4[1], "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sampling_points(plain_offsets, batch, [(1.0, 1.0)])
    assert not any(module._forward_pre_hooks for module in plain_offsets.modules())
    for name, value in plain_offsets.state_dict().items():
        assert torch.equal(value, before[name]), name


def found_in(boxes: list[list[float]], labels: list[int]) -> Detections:
    scores = torch.full((len(boxes),), 0.9)
    return Detections("image", torch.tensor(boxes).view(-1, 4), scores, torch.tensor(labels).long())


def tiles(box: list[float], parts: int) -> Tensor:
    """A box cut into parts x parts equal boxes, rows first."""
    x1, y1, x2, y2 = box
    wide, high = (x2 - x1) / parts, (y2 - y1) / parts
    return torch.tensor([
        [[x1 + j * wide, y1 + i * high, x1 + (j + 1) * wide, y1 + (i + 1) * high]
         for j in range(parts)]
        for i in range(parts)
    ])  # fmt: skip


def test_parts_without_offsets_tile_the_box(plain_offsets: Any) -> None:
    boxes = [[10.0, 12.0, 34.0, 54.0], [0.0, 0.0, 60.0, 15.0]]
    parts = roi_parts(plain_offsets, batch_of(128, 128, 2.0), found_in(boxes, [0, 3]))
    torch.testing.assert_close(parts, torch.stack([tiles(box, 3) for box in boxes]))
    empty = roi_parts(plain_offsets, batch_of(128, 128, 2.0), found_in([], []))
    assert empty.shape == (0, 3, 3, 4)


def test_parts_are_shifted_by_their_class(plain_offsets: Any) -> None:
    model = build("model.roi_head.trans_std=0.2")
    trans = torch.randn(5, 2, 3, 3)  # class (background first), (x, y), part
    with torch.no_grad():
        model.roi_head.score_offset.bias.copy_(trans.flatten())
    box = [40.0, 32.0, 64.0, 80.0]
    parts = roi_parts(model, batch_of(128, 128, 1.0), found_in([box, box], [0, 2]))
    for index, label in enumerate((0, 2)):
        x, y = 0.2 * 24 * trans[label + 1, 0], 0.2 * 48 * trans[label + 1, 1]
        wanted = tiles(box, 3) + torch.stack([x, y, x, y], dim=-1)
        torch.testing.assert_close(parts[index], wanted)


def test_parts_are_what_the_pooling_reads() -> None:
    """On maps that hold their own x and y a bin's mean tells where it was read."""
    size, samples, scale = 40, 4, 1 / 16
    rois = torch.tensor([[0, 120.4, 200.5, 330.2, 400.0], [0, 250.0, 130.0, 260.0, 139.5]])
    trans = torch.rand(2, 2, 3, 3) * 2 - 1
    parts = shifted_parts(rois, trans, scale, 0.1)
    ramp = torch.arange(size, dtype=torch.float32).expand(size, size)
    for axis, ramps in enumerate((ramp, ramp.t())):
        read = deform_psroi_pool(ramps[None, None], rois, trans, scale, 1, 1, 3, 3, samples, 0.1)
        low, high = parts[..., axis], parts[..., axis + 2]
        # The samples stand at the left edges of a bin's n parts, on average (n - 1) / 2n inside.
        mean = low + (high - low) * (samples - 1) / (2 * samples)
        torch.testing.assert_close(read[:, 0], mean * scale - 0.5, rtol=0, atol=1e-4)


# Pictures.


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (255, 255, 255), (0, 0, 0)])
def test_points_are_seen_on_any_image(colour: tuple[int, int, int]) -> None:
    image = np.full((500, 800, 3), colour, np.uint8)
    positions = torch.tensor([[200.5, 100.5], [600.5, 400.5], [-5.0, 3.0], [1e30, 0.0]])
    positions = torch.cat([positions, torch.full((1, 2), torch.nan)])
    drawn = draw_points(image, torch.tensor([400.5, 250.5]), positions, torch.ones(5))
    assert drawn.shape == image.shape
    assert (image == colour).all()
    for x, y, mark in ((200, 100, RED), (600, 400, RED), (400, 250, GREEN)):
        assert tuple(drawn[y, x]) == mark
        around = drawn[y - 12 : y + 13, x - 12 : x + 13].reshape(-1, 3)
        assert 20 < (around != colour).any(axis=1).sum() < 450
        assert (around == 255).all(axis=1).any()  # the white ring
    drawn[88:113, 188:213], drawn[388:413, 588:613], drawn[238:263, 388:413] = [colour] * 3
    assert (drawn == colour).all()


def test_a_dots_area_follows_its_weight() -> None:
    image = np.zeros((600, 800, 3), np.uint8)
    positions = torch.tensor([[100.0, 100.0], [300.0, 100.0], [500.0, 100.0]])
    drawn = draw_points(image, torch.tensor([700.0, 500.0]), positions, torch.tensor([1, 0.5, 0.0]))
    red = (drawn == RED).all(axis=2)
    areas = [int(red[80:120, x - 20 : x + 20].sum()) for x in (100, 300, 500)]
    assert areas[0] > 1.5 * areas[1] > 5 * areas[2]


def test_a_small_image_is_enlarged() -> None:
    image = picture((100, 150))
    drawn = draw_points(image, torch.tensor([75.0, 50.0]), torch.zeros(0, 2), torch.zeros(0))
    assert drawn.shape == (900, 1350, 3)
    assert tuple(drawn[450, 675]) == GREEN
    wanted = cv2.resize(image, (1350, 900), interpolation=cv2.INTER_LINEAR)
    assert (drawn[:400] == wanted[:400]).all()


def test_parts_are_drawn_at_their_edges() -> None:
    image = np.full((500, 800, 3), 90, np.uint8)
    parts = torch.tensor([[[100.0, 100.0, 200.0, 180.0], [-1e30, -50.0, 900.0, 20.0]],
                          [[torch.nan, 0.0, 9.0, 9.0], [700.0, 300.0, 790.0, 400.0]]])  # fmt: skip
    drawn = draw_parts(image, found_in([[300.0, 200.0, 500.0, 400.0]], [1]), parts, ["a", "b"])
    assert drawn.shape == image.shape
    for x, y in ((100, 140), (150, 100), (200, 140), (150, 180), (745, 300), (400, 20)):
        patch = drawn[y - 1 : y + 1, x - 1 : x + 1].reshape(-1, 3)
        assert (patch == RED).all(axis=1).any(), (x, y)
    for x, y in ((150, 140), (250, 140), (300, 300)):
        assert tuple(drawn[y, x]) != RED


# The command.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Weights of a model that has random offsets, and an image of 90 x 120 pixels."""
    folder = tmp_path_factory.mktemp("trained")
    model = build()
    with torch.no_grad():
        for block in (0, 1):
            nn.init.normal_(model.backbone.layer4[block].conv2.offset.bias, std=0.7)
        nn.init.normal_(model.roi_head.score_offset.bias)
    meta = {"classes": ["disc", "star", "ring", "bar"], "category_ids": [3, 5, 7, 9]}
    save(folder / "weights.pth", {"model": model.state_dict(), "meta": meta})
    bare = build("model.backbone.deform=null")
    save(folder / "bare.pth", {"model": bare.state_dict(), "meta": meta})
    cv2.imwrite(str(folder / "photo.jpg"), picture((90, 120)))
    return {name: str(folder / name) for name in ("weights.pth", "bare.pth", "photo.jpg")}


def run(trained: dict[str, str], output: Path, *words: str, weights: str = "weights.pth") -> int:
    return cli.main([
        "offsets", QUICKSTART, "--weights", trained[weights], trained["photo.jpg"],
        "--output", str(output), "--device", "cpu", *words,
    ])  # fmt: skip


def read(path: Path) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def tree(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != ".lock"
    }


def test_pictures_and_numbers_of_a_point(
    trained: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ("--point", "61.5,40", "--score-threshold", "0")
    with caplog.at_level("INFO", "dcdet"):
        assert run(trained, tmp_path, *words) == 0
    report = read(tmp_path / "photo-offsets.json")
    assert (report["image"], report["width"], report["height"]) == (trained["photo.jpg"], 120, 90)
    assert report["layers"] == ["c5.1", "c5.0"]
    [row] = report["points"]
    assert row["point"] == [61.5, 40.0]
    assert row["picture"] == "photo-points.png"
    positions = np.array(row["positions"], dtype=float)  # null is NaN
    assert positions.shape == (1, 81, 2)
    assert np.array(row["weights"]).shape == (1, 81)
    inside = ((positions >= 0) & (positions < (120, 90))).all(axis=2)
    assert f"c5.1, c5.0: 81 samples a point, {100 * inside.mean():.0f} % of them" in caplog.text
    zoom = 1400 // 120
    drawn = cv2.imread(str(tmp_path / row["picture"]))[..., ::-1]
    assert drawn.shape == (90 * zoom, 120 * zoom, 3)
    red = (drawn == RED).all(axis=2)
    inside = ((positions > 1) & (positions < (119, 89))).all(axis=2)
    x, y = (positions[inside] * zoom).astype(int).T
    far = np.hypot(*(positions[inside] - row["centre"]).T) * zoom > 20  # not below the green disc
    assert far.sum() > 20
    assert red[y[far], x[far]].all()
    for roi in report["rois"]:
        x1, y1, x2, y2 = roi["box"]
        assert x1 <= 61.5 < x2
        assert y1 <= 40 < y2
        assert roi["category_id"] == {"disc": 3, "star": 5, "ring": 7, "bar": 9}[roi["name"]]
        assert np.array(roi["parts"]).shape == (3, 3, 4)
    pictures = {row["picture"] for row in [*report["points"], *report["rois"]]}
    assert set(tree(tmp_path)) == {*pictures, "photo-offsets.json"}
    assert 1 <= len(report["rois"]) <= 5


def test_without_a_point_the_best_detections_are_shown(
    trained: dict[str, str], tmp_path: Path
) -> None:
    assert run(trained, tmp_path, "--score-threshold", "0.1") == 0
    report = read(tmp_path / "photo-offsets.json")
    assert len(report["points"]) == len(report["rois"]) == 5
    scores = [roi["score"] for roi in report["rois"]]
    assert scores == sorted(scores, reverse=True)
    assert min(scores) >= 0.1
    for point, roi in zip(report["points"], report["rois"], strict=True):
        x1, y1, x2, y2 = roi["box"]
        assert point["point"] == pytest.approx([(x1 + x2) / 2, (y1 + y2) / 2], abs=2e-3)
    plain = cv2.imread(str(tmp_path / "photo-parts-5.png"))
    assert not (plain == cv2.imread(str(tmp_path / "photo-points-5.png"))).all()


def test_without_detections_there_is_a_grid(
    trained: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "dcdet"):
        assert run(trained, tmp_path, "--score-threshold", "1") == 0
    assert "no detection has a score of 1 or more: a grid of points is shown" in caplog.text
    report = read(tmp_path / "photo-offsets.json")
    places = [row["point"] for row in report["points"]]
    assert places == [[30, 22.5], [90, 22.5], [30, 67.5], [90, 67.5]]
    assert report["rois"] == []


def test_nothing_is_overwritten(trained: dict[str, str], tmp_path: Path) -> None:
    for name in ("photo-points.png", "photo-parts.png", "photo-offsets.json"):
        (tmp_path / name).write_text("precious")
    seen = tree(tmp_path)
    for _ in range(2):
        assert run(trained, tmp_path, "--point=5,5", "--point=100,80") == 0
        now = tree(tmp_path)
        assert {name: now[name] for name in seen} == seen
        seen = now
    assert {"photo-points-2.png", "photo-points-5.png", "photo-offsets-3.json"} <= set(seen)
    names = [row["picture"] for row in read(tmp_path / "photo-offsets-3.json")["points"]]
    assert names == ["photo-points-4.png", "photo-points-5.png"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--point=120,10"], "--point: 120,10 is not in the image of 120 x 90 pixels"),
        (["--point=10,-0.5"], "--point: 10,-0.5 is not in the image"),
        (["--point=10,90"], "--point: 10,90 is not in the image"),
        (["model.backbone.deform=null", "model.roi_head.deformable=false"],
         "neither deformable convolutions nor deformable RoI pooling"),
        (["model.backbone.deform=null", "--point=3,3"], "--point: this network has no deformable"),
        (["model.backbone.depth=34"], "weights.pth: "),
        (["--output", QUICKSTART], "cannot be the output folder"),
    ],
)  # fmt: skip
def test_refused(
    words: list[str], expected: str, trained: dict[str, str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(trained, tmp_path / "out", *words) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert expected in line
    assert line.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_network_with_parts_alone(
    trained: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model.backbone.deform=null", "--score-threshold"]
    assert run(trained, tmp_path, *words, "1", weights="bare.pth") == 2
    assert "no detection has a score of 1 or more (a lower --score" in capsys.readouterr().err
    assert run(trained, tmp_path, *words, "0.1", weights="bare.pth") == 0
    report = read(tmp_path / "photo-offsets.json")
    assert "points" not in report
    assert len(report["rois"]) == 5


def test_a_network_with_points_alone(trained: dict[str, str], tmp_path: Path) -> None:
    config = load_config(QUICKSTART, ["model.roi_head.deformable=false"])
    model = build_model(config)
    save(tmp_path / "plain_head.pth", {"model": model.state_dict()})
    weights = {**trained, "weights.pth": str(tmp_path / "plain_head.pth")}
    assert run(weights, tmp_path / "out", "model.roi_head.deformable=false", "--point=9,9") == 0
    report = read(tmp_path / "out" / "photo-offsets.json")
    assert "rois" not in report
    assert len(report["points"]) == 1


def test_a_bad_image_is_refused(
    trained: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    words = ["offsets", QUICKSTART, "--weights", trained["weights.pth"], str(tmp_path / "bad.jpg")]
    assert cli.main(words) == 2
    assert "bad.jpg: is not an image" in capsys.readouterr().err


# Heads and necks of other systems.

OVERRIDES = [
    "model.num_classes=3", "data.classes=[a, b, c]", "model.backbone.pretrained=null",
    "data.resize={short: 128, long: 160}", "model.roi_head.hidden_channels=16",
]  # fmt: skip


def small(name: str, pooling: str) -> tuple[str, list[str]]:
    """A config and its overrides."""
    path = str(ROOT / "configs" / "small" / f"{name}_dcn_r18_voc.yaml")
    return path, [*OVERRIDES, f"model.roi_head.pooling={pooling}", "model.roi_head.pooled_size=3"]


@pytest.mark.parametrize("pooling", ["deformable", "modulated_align"])
def test_parts_of_a_pyramid_come_from_each_rois_level(pooling: str) -> None:
    """Each level's layer gives its own shifts; boxes of four sizes go to four levels."""
    torch.manual_seed(0)
    model = build_model(load_config(*small("fpn", pooling))).eval()
    head = model.roi_head
    size, std = head.pooled_size, head.trans_std
    trans = torch.randn(4, 2, size, size)
    with torch.no_grad():
        for level, name in enumerate(head.in_features):
            layer = head.offset[name]
            last = layer[-1] if isinstance(layer, nn.Sequential) else layer
            last.bias.copy_(trans[level].flatten())
    boxes = [[8.0, 8.0, 488.0, 468.0], [8.0, 16.0, 48.0, 46.0], [0.0, 0.0, 256.0, 256.0],
             [10.0, 20.0, 150.0, 150.0]]  # fmt: skip
    parts = roi_parts(model, batch_of(512, 512, 1.0), found_in(boxes, [0, 1, 2, 0]))
    for box, level, found in zip(boxes, (3, 0, 2, 1), parts, strict=True):
        x = std * (box[2] - box[0]) * trans[level, 0]
        y = std * (box[3] - box[1]) * trans[level, 1]
        wanted = tiles(box, size) + torch.stack([x, y, x, y], dim=-1)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
    assert roi_parts(model, batch_of(64, 64, 1.0), found_in([], [])).shape == (0, size, size, 4)


@pytest.mark.parametrize(
    ("name", "pooling"),
    [("faster_rcnn", "deformable"), ("fpn", "modulated_align")],
)
def test_other_systems_are_drawn(
    name: str, pooling: str, trained: dict[str, str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    path, overrides = small(name, pooling)
    config = load_config(path, overrides)
    save(tmp_path / "weights.pth", {"model": build_model(config).state_dict()})
    words = [
        "offsets", path, *overrides, "--weights", str(tmp_path / "weights.pth"),
        trained["photo.jpg"], "--output", str(tmp_path / "out"), "--score-threshold", "0.1",
    ]  # fmt: skip
    assert cli.main(words) == 0
    report = read(tmp_path / "out" / "photo-offsets.json")
    assert report["layers"] == [
        f"c5.{block}" for block in reversed(config.model.backbone.deform.blocks.c5)
    ]
    scale = 128 / 90
    for roi in report["rois"]:
        parts = np.array(roi["parts"])
        outer = [*parts[0, 0, :2], *parts[-1, -1, 2:]]
        assert outer == pytest.approx(roi["box"], abs=2 / scale)  # RoIs are rounded to pixels
    assert len(report["rois"]) == len(report["points"]) == 5


# Segmentations.

DEEPLAB = str(ROOT / "configs" / "small" / "deeplab_dcn_r18_camvid.yaml")
SMALL = ["data.resize={short: 96, long: 128}", "model.channels=16"]


@pytest.fixture(scope="module")
def deeplab(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Deformable DeepLab that finds several classes, its weights beside it in `folder`."""
    torch.manual_seed(0)
    model = build_model(load_config(DEEPLAB, SMALL)).eval()
    nn.init.normal_(model.score.weight, std=1.0)
    model.folder = tmp_path_factory.mktemp("deeplab")
    save(model.folder / "weights.pth", {"model": model.state_dict(), "meta": {}})
    return model


def run_deeplab(model: Any, trained: dict[str, str], output: Path, *words: str) -> int:
    return cli.main([
        "offsets", DEEPLAB, "--weights", str(model.folder / "weights.pth"), trained["photo.jpg"],
        "--output", str(output), "--device", "cpu", *SMALL, *words,
    ])  # fmt: skip


def test_zero_offsets_of_a_deeplab_give_the_regular_grid(deeplab: Any) -> None:
    found = sampling_points(deeplab, batch_of(256, 320, 2.0), [(70.0, 50.0)])
    assert found.layers == ("c5.1", "c5.0")
    assert found.centres.tolist() == [[68.0, 52.0]]
    grid = [[68.0 + 16 * (j1 + j2), 52.0 + 16 * (i1 + i2)] for i1, j1 in TAPS for i2, j2 in TAPS]
    assert found.positions[0].tolist() == [grid]


def test_places_are_deep_inside_the_commonest_areas() -> None:
    labels = np.full((60, 100), UNLABELLED, np.uint8)
    labels[:40, :60] = 7
    labels[10:30, 20:60] = 4  # inside of a C, whose middle is in it
    labels[50:, 90:] = 7
    labels[45:56, :31] = 2
    for number in range(4):
        labels[58, 10 * number] = 20 + number
    places = inner_places(labels)
    assert len(places) == 5
    assert [labels[int(y), int(x)] for x, y in places] == [7, 4, 2, 20, 21]
    assert 9 <= places[0][0] <= 11
    assert 9 <= places[0][1] <= 31
    assert places[1][1] in (19.5, 20.5)
    assert 29 <= places[1][0] <= 51
    assert places[2][1] == 50.5
    assert places[3:] == [(0.5, 58.5), (10.5, 58.5)]
    assert inner_places(np.full((3, 4), UNLABELLED, np.uint8)) == []


def test_points_of_a_segmentation_name_their_classes(
    deeplab: Any, trained: dict[str, str], tmp_path: Path
) -> None:
    assert run_deeplab(deeplab, trained, tmp_path) == 0
    report = read(tmp_path / "photo-offsets.json")
    assert report.keys() == {"image", "width", "height", "layers", "points"}
    names = [row["name"] for row in report["points"]]
    assert len(set(names)) == len(names) == min(5, len(names)) > 1
    config = check(load_config(DEEPLAB, SMALL))
    _, batches = read_views(trained["photo.jpg"], config.data, [View(config.data.resize)])
    labels = deeplab.predict(*batches)[0].labels.numpy()
    counts = np.bincount(labels.ravel())
    for row, label in zip(report["points"], np.argsort(-counts, kind="stable"), strict=False):
        x, y = row["point"]
        assert row["category_id"] == label == labels[int(y), int(x)]
    assert {row["picture"] for row in report["points"]} <= set(tree(tmp_path))


@pytest.mark.parametrize(("words", "expected"), [
    ([], {(30, 22.5): None, (90, 22.5): None, (30, 67.5): None, (90, 67.5): None}),
    (["--point=59.9,89.9", "--point=60,0"], {(59.9, 89.9): None, (60, 0): "road"}),
])  # fmt: skip
def test_points_where_no_class_is_known(
    words: list[str], expected: dict[tuple[float, float], str | None], deeplab: Any,
    trained: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Without any label there is the grid."""

    def predict(self: Any, *views: Batch) -> list[Segmentation]:
        labels = torch.full((90, 120), UNLABELLED, dtype=torch.uint8)
        if words:
            labels[:, 60:] = 3
        return [Segmentation("image", labels, labels)]

    monkeypatch.setattr("dcdet.models.deeplab.DeepLab.predict", predict)
    assert run_deeplab(deeplab, trained, tmp_path, "--score-threshold", "0.4", *words) == 0
    assert "--score-threshold changes nothing" in caplog.text
    points = read(tmp_path / "photo-offsets.json")["points"]
    assert {tuple(row["point"]): row["name"] for row in points} == expected
    assert all((row["category_id"] is None) == (row["name"] is None) for row in points)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.backbone.deform=null"], "no deformable convolutions (see model.backbone.deform)"),
        (["model.backbone.deform=null", "--point=3,3"], "no deformable convolutions (see"),
        (["--point=120,10"], "--point: 120,10 is not in the image of 120 x 90 pixels"),
    ],
)
def test_refused_of_a_deeplab(
    words: list[str], expected: str, deeplab: Any, trained: dict[str, str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run_deeplab(deeplab, trained, tmp_path / "out", *words) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
