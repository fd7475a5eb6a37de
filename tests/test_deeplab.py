"""DeepLab: upsampling as the release's deconvolution, a loss that is a plain mean, tiles."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from label_sets import CONFIG, SMALL, batch, folder
from torch import Tensor, nn

from dcdet import build_model, load_config
from dcdet.engine import train as train_module
from dcdet.engine.train import train
from dcdet.errors import UserError
from dcdet.models.deeplab import DeepLab, TileSpec, cuts, label_maps, nearest, upsample
from dcdet.registry import check
from dcdet.structures import UNLABELLED, Batch

CPU = torch.device("cpu")


class Patches(nn.Module):
    """A backbone of one convolution: each cell of its map sees its own pixels only."""

    def __init__(self, stride: int = 8, channels: int = 6) -> None:
        super().__init__()
        self.channels, self.strides = {"c5": channels}, {"c5": stride}
        self.conv = nn.Conv2d(3, channels, stride, stride)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        bottom, right = (-side % self.strides["c5"] for side in x.shape[2:])
        return {"c5": self.conv(F.pad(x, (0, right, 0, bottom)))}


def make(tiles: TileSpec | None = None, stride: int = 8, num_classes: int = 4) -> DeepLab:
    torch.manual_seed(0)
    backbone = Patches(stride)
    return DeepLab(backbone, num_classes, [120.0] * 3, [60.0] * 3, "c5", 16, 1.0, tiles)


def photos(number: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 3, height, width), generator=generator).byte()


def random_maps(number: int, size: tuple[int, int], classes: int = 4, seed: int = 0) -> Any:
    values = np.append(np.arange(classes), UNLABELLED).astype(np.uint8)
    return np.random.default_rng(seed).choice(values, (number, *size))


# ---- upsampling


def deconvolution(scores: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """The release's layer, with MXNet's bilinear weights (init.Bilinear), cut as its Crop does."""
    channels, kernel = scores.shape[1], 2 * stride
    factor = math.ceil(kernel / 2)
    center = (2 * factor - 1 - factor % 2) / (2.0 * factor)
    line = torch.tensor([1 - abs(i / factor - center) for i in range(kernel)], dtype=scores.dtype)
    weight = (line[:, None] * line).expand(channels, 1, kernel, kernel)
    whole = F.conv_transpose2d(scores, weight, stride=stride, groups=channels)
    start = stride // 2
    return whole[:, :, start : start + size[0], start : start + size[1]]


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
@pytest.mark.parametrize(
    ("cells", "less"), [((1, 1), (0, 0)), ((3, 5), (0, 0)), ((4, 2), (3, 1)), ((7, 6), (1, 2))]
)
def test_upsampling_is_the_releases_deconvolution(
    stride: int, cells: tuple[int, int], less: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    size = cells[0] * stride - less[0], cells[1] * stride - less[1]
    results = []
    for function in (upsample, deconvolution):
        generator.manual_seed(0)
        scores = torch.randn(2, 3, *cells, dtype=torch.float64, generator=generator)
        result = function(scores.requires_grad_(), stride, size)
        result.backward(torch.randn(2, 3, *size, dtype=torch.float64, generator=generator))
        results.append((result.detach(), scores.grad))
    assert results[0][0].shape == (2, 3, *size)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


# ---- resizing labels


@given(sides=st.tuples(*[st.integers(1, 90)] * 4), seed=st.integers(0, 99))
@example(sides=(226, 772, 50, 1846), seed=0)  # where 1 / (new / old) is not old / new
def test_nearest_is_opencvs(sides: tuple[int, int, int, int], seed: int) -> None:
    old, new = sides[:2], sides[2:]
    labels = np.random.default_rng(seed).integers(0, 256, old, dtype=np.uint8)
    expected = cv2.resize(labels, new[::-1], interpolation=cv2.INTER_NEAREST)
    assert np.array_equal(nearest(torch.from_numpy(labels), new).numpy(), expected)


# ---- tiles


@given(side=st.integers(1, 400), tile=st.integers(1, 120), data=st.data())
def test_cuts(side: int, tile: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, tile - 1))
    parts = [(part.start or 0, part.stop) for part in cuts(side, tile, overlap)]
    assert parts[0][0] == 0
    assert parts[-1][1] == side
    if side <= tile:
        assert parts == [(0, side)]
        return
    assert all(stop - start == tile for start, stop in parts)
    steps = [two[0] - one[0] for one, two in itertools.pairwise(parts)]
    assert max(steps) - min(steps) <= 1
    assert tile - max(steps) >= overlap
    fewer = len(parts) - 1  # laid as far apart as the overlap allows
    assert tile + (fewer - 1) * (tile - overlap) < side


def slow_tiles(model: DeepLab, x: Tensor, size: tuple[int, int], overlap: int) -> Tensor:
    """Probabilities (K, H, W) of the image x (1, 3, H, W): tile by tile, pixel by pixel."""
    starts = []
    for side, tile in zip(x.shape[2:], size, strict=True):
        number = 1
        while tile + (number - 1) * (tile - overlap) < side:
            number += 1
        gaps = max(1, number - 1)
        starts.append([math.floor((side - tile) * i / gaps) if number > 1 else 0
                       for i in range(number)])  # fmt: skip
    height, width = x.shape[2:]
    sums, counts = np.zeros((model.num_classes, height, width)), np.zeros((height, width))
    for top in starts[0]:
        for left in starts[1]:
            part = x[:, :, top : top + size[0], left : left + size[1]]
            scores = model.logits(part)[0].detach().double().numpy()
            for row, column in np.ndindex(scores.shape[1:]):
                odds = np.exp(scores[:, row, column])
                sums[:, top + row, left + column] += odds / odds.sum()
                counts[top + row, left + column] += 1
    assert counts.min() >= 1
    return torch.from_numpy(sums / counts)


@pytest.mark.parametrize(
    ("size", "overlap"),
    [((24, 24), 0), ((24, 32), 8), ((17, 30), 5), ((16, 64), 3), ((200, 24), 1)],
)
def test_tiles(size: tuple[int, int], overlap: int) -> None:
    model = make(TileSpec(size, overlap)).eval()
    view = batch(photos(2, 37, 42))
    [one, two] = model.probabilities(view)
    x = model.normalised(view)
    for found, image in ((one, x[:1]), (two, x[1:])):
        expected = slow_tiles(model, image, size, overlap)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(model.predict(view)[0].labels, one.argmax(0).byte())
    whole = make().eval().probabilities(view)[0]
    assert not torch.allclose(one, whole, atol=1e-3)


@pytest.mark.parametrize("size", [(45, 50), (46, 51), (1000, 1000)])
def test_a_tile_as_large_as_the_image(size: tuple[int, int]) -> None:
    view = batch(photos(1, 45, 50))
    [one] = make(TileSpec(size, 3)).eval().probabilities(view)
    [whole] = make().eval().probabilities(view)
    assert torch.equal(one, whole)


# ---- prediction


def test_predictions() -> None:
    """Of the padding nothing is seen; the labels are enlarged to the original's size."""
    model = make().eval()
    images = photos(2, 40, 56)
    view = batch(images, [(40, 56), (33, 47)])
    view.targets[1] = view.targets[1].without_objects("other", (66, 95))
    one, two = model.predict(view)
    assert (one.image_id, two.image_id) == ("i0", "other")
    assert one.labels.dtype == two.network_labels.dtype == torch.uint8
    assert torch.equal(one.labels, one.network_labels)
    assert len(one.labels.unique()) > 1
    [alone] = model.predict(batch(images[1:, :, :33, :47]))
    assert torch.equal(two.network_labels, alone.labels)
    expected = cv2.resize(alone.labels.numpy(), (95, 66), interpolation=cv2.INTER_NEAREST)
    assert np.array_equal(two.labels.numpy(), expected)


def test_mirrored_images() -> None:
    """A mirrored image gives the mirrored result, in a mirrored view and where both are joined."""
    for tiles in (None, TileSpec((24, 24), 4)):
        model = make(tiles).eval()
        image = photos(1, 41, 53)
        turned = image.flip(3)
        [seen] = model.predict(batch(turned, flip=True))  # what is shown of `image`, mirrored
        [of_turned] = model.predict(batch(turned))
        assert torch.equal(seen.labels, of_turned.labels.flip(1))
        [both] = model.predict(batch(image), batch(turned, flip=True))
        [of_both] = model.predict(batch(turned), batch(image, flip=True))
        assert torch.equal(both.labels, of_both.labels.flip(1))
        [plain] = model.predict(batch(image))
        assert not torch.equal(plain.labels, both.labels)


def test_several_scales() -> None:
    """Probabilities are averaged in the first view's pixels; a view twice changes nothing."""
    model = make().eval()
    image = photos(1, 40, 56)
    first = batch(image)
    larger = F.interpolate(image.float(), (60, 84), mode="bilinear").byte()
    second = batch(larger)
    second.targets[0] = first.targets[0]
    [joined] = model.predict(first, second)
    [one], [two] = model.probabilities(first), model.probabilities(second)
    smaller = cv2.resize(
        two.permute(1, 2, 0).numpy(), (56, 40), interpolation=cv2.INTER_LINEAR
    ).transpose(2, 0, 1)
    mean = (one.numpy() + smaller) / 2
    clear = np.diff(np.sort(mean, axis=0)[-2:], axis=0)[0] > 1e-4
    assert clear.mean() > 0.99
    assert np.array_equal(joined.labels.numpy()[clear], mean.argmax(0)[clear])
    assert joined.network_labels.shape == (40, 56)
    assert torch.equal(model.predict(first, first)[0].labels, model.predict(first)[0].labels)
    assert not torch.equal(joined.labels, model.predict(first)[0].labels)


def test_scores_that_are_not_finite() -> None:
    model = make().eval()
    for bad in (float("nan"), float("inf")):

        def spoil(_: Any, __: Any, maps: dict[str, Tensor], bad: float = bad) -> None:
            maps["c5"][0, :, 0, 0] = bad

        hook = model.backbone.register_forward_hook(spoil)
        [found] = model.predict(batch(photos(1, 48, 64)))
        hook.remove()
        lost = found.labels == UNLABELLED
        # A cell reaches one stride and a half from its corner.
        assert lost[:8, :8].all()
        assert not lost[12:].any()
        assert not lost[:, 12:].any()
        assert (found.labels[~lost] < 4).all()


# ---- loss


def slow_loss(logits: np.ndarray, maps: list[np.ndarray]) -> float:
    """Mean over images of the mean over labelled pixels of -log softmax."""
    total = 0.0
    for scores, labels in zip(logits.astype(np.float64), maps, strict=True):
        terms = [
            math.log(np.exp(scores[:, y, x]).sum()) - scores[labels[y, x], y, x]
            for y, x in np.ndindex(labels.shape)
            if labels[y, x] != UNLABELLED
        ]
        total += sum(terms) / len(terms) if terms else 0.0
    return total / len(maps)


def seen_logits(model: DeepLab, view: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, accuracy and the scores they come from, with gradients."""
    kept: list[Tensor] = []
    own = DeepLab.logits

    def logits(self: DeepLab, x: Tensor) -> Tensor:
        kept.append(own(self, x))
        kept[0].retain_grad()
        return kept[0]

    model.logits = logits.__get__(model)
    losses, stats = model(view)
    del model.logits
    assert list(losses) == ["segmentation"]
    losses["segmentation"].backward()
    return losses["segmentation"].detach(), stats["accuracy"], kept[0]


def test_loss() -> None:
    """Images of several sizes, ignored pixels, padding; against plain loops."""
    model = make()
    sizes = [(24, 40), (31, 25), (16, 16)]
    maps = [random_maps(1, size, seed=i)[0] for i, size in enumerate(sizes)]
    maps[1][:20] = UNLABELLED  # images with few labelled pixels weigh as much as others
    view = batch(photos(3, 32, 40), sizes, maps)
    loss, accuracy, logits = seen_logits(model, view)
    scores = logits.detach().numpy()
    assert loss.item() == pytest.approx(slow_loss(scores, maps), rel=1e-5)
    labelled = right = 0
    for image, labels in zip(scores, maps, strict=True):
        known = labels != UNLABELLED
        own = image.argmax(0)[: labels.shape[0], : labels.shape[1]]
        labelled, right = labelled + known.sum(), right + (own == labels)[known].sum()
    assert accuracy.item() == pytest.approx(right / labelled)
    # Nothing is learnt where there is no label, and something everywhere else.
    learnt = logits.grad.abs().sum(1) > 0
    for image, labels in zip(learnt, maps, strict=True):
        known = np.zeros((32, 40), dtype=bool)
        known[: labels.shape[0], : labels.shape[1]] = labels != UNLABELLED
        assert np.array_equal(image.numpy(), known)
    view.images[1, :, 31:] = 77
    view.images[1, :, :, 25:] = 200
    again, _, _ = seen_logits(make(), view)
    assert torch.equal(again, loss)


def test_an_image_without_labels() -> None:
    model = make()
    images = photos(2, 16, 24)
    nothing = np.full((16, 24), UNLABELLED, dtype=np.uint8)
    loss, accuracy, _ = seen_logits(model, batch(images, maps=[nothing, nothing]))
    assert (loss, accuracy) == (0, 0)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())
    some = random_maps(1, (16, 24))[0]
    one, _, _ = seen_logits(make(), batch(images[1:], maps=[some]))
    both, _, _ = seen_logits(make(), batch(images, maps=[nothing, some]))
    assert both.item() == pytest.approx(one.item() / 2)


def test_losses_do_not_depend_on_how_a_batch_is_split() -> None:
    images, maps = photos(4, 16, 24), random_maps(4, (16, 24))
    maps[0, 1:] = UNLABELLED
    model = make()
    whole, _, _ = seen_logits(model, batch(images, maps=maps))
    halves = make()
    losses = [
        seen_logits(halves, batch(images[h], maps=maps[h]))[0] for h in (slice(2), slice(2, 4))
    ]
    assert whole.item() == pytest.approx(sum(losses).item() / 2, rel=1e-6)
    assert abs(losses[0] - losses[1]) > 1e-3
    for one, two in zip(model.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad / 2)


def test_label_maps_of_a_batch() -> None:
    maps = [random_maps(1, (3, 5))[0], random_maps(1, (4, 2))[0]]
    view = batch(photos(2, 4, 6), [(3, 5), (4, 2)], maps)
    joined = label_maps(view)
    assert joined.dtype == torch.int64
    for one, labels in zip(joined, maps, strict=True):
        expected = np.full((4, 6), UNLABELLED)
        expected[: labels.shape[0], : labels.shape[1]] = labels
        assert np.array_equal(one, expected)
    with pytest.raises(ValueError, match="image 'i0' has no label map"):
        label_maps(batch(photos(1, 4, 6)))


# ---- the whole network


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_resnet_learns_and_segments(precision: torch.dtype) -> None:
    """Sides that are no multiple of anything; in bfloat16, too."""
    model = build_model(load_config(CONFIG, [*SMALL, "model.backbone.norm=bn"]))
    view = batch(photos(2, 33, 51), maps=random_maps(2, (33, 51), classes=3))
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        losses, stats = model.train()(view)
        [found, _] = model.eval().predict(view)
    assert losses["segmentation"].dtype == torch.float32
    assert 0.5 < losses["segmentation"].item() < 3
    assert 0 <= stats["accuracy"] <= 1
    losses["segmentation"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert gradients["backbone.conv1.weight"].abs().max() > 0
    assert found.labels.shape == found.network_labels.shape == (33, 51)
    assert found.labels.max() < 3


def test_a_network_of_timm() -> None:
    pytest.importorskip("timm")
    node = "{type: TimmBackbone, name: test_resnet, freeze_norm: true, pretrained: null}"
    config = load_config(CONFIG, [*SMALL, f"model.backbone={node}"])
    model = build_model(config)
    assert model.stride == 32
    view = batch(photos(2, 33, 51), maps=random_maps(2, (33, 51), classes=3))
    losses, _ = model(view)
    losses["segmentation"].backward()
    assert model.fc6.weight.grad.abs().max() > 0
    assert model.eval().predict(view)[0].labels.shape == (33, 51)


# ---- what is refused


def line_of(path: Path, start: str) -> int:
    lines = path.read_text().splitlines()
    [number] = [i for i, line in enumerate(lines, 1) if line.strip().startswith(start)]
    return number


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("in_feature", "c6", "'in_feature' must be one of c2, c3, c4, c5, got 'c6'"),
        ("channels", "0", "'channels' must be positive, got 0"),
        ("num_classes", "1", "'num_classes' must be from 2 to 254, got 1"),
        ("num_classes", "255", "'num_classes' must be from 2 to 254, got 255"),
        ("pixel_mean", "[1]", "'pixel_mean' must be 3 numbers, got [1.0]"),
        ("pixel_std", "[1, 1, 0]", "'pixel_std' must be 3 positive numbers, got [1.0, 1.0, 0.0]"),
        ("tiles", "{size: [15, 80], overlap: 0}", "'size' must be at least 16, got (15, 80)"),
        ("tiles", "{size: [19, 18], overlap: 18}", "'overlap' must be from 0 to 17, got 18"),
        ("tiles", "{size: [19, 18], overlap: -1}", "'overlap' must be from 0 to 17, got -1"),
        ("tiles", "{size: 512, overlap: 0}", "'size' must be a list of 2, got 512"),
        ("tiles", "[512, 512]", "'tiles' must be a mapping with size, overlap"),
        ("dropout", "0.5", "DeepLab has no option 'dropout'"),
    ],
)  # fmt: skip
def test_wrong_values_are_found_with_their_line(
    tmp_path: Path, key: str, value: str, message: str
) -> None:
    path = tmp_path / "c.yaml"
    old = rf"(?m)^  {key}: .*$" if key != "dropout" else r"(?m)^  tiles: .*$"
    path.write_text(re.sub(old, f"  {key}: {value}", CONFIG.read_text(), count=1))
    with pytest.raises(UserError) as caught:
        build_model(load_config(path))
    assert str(caught.value).startswith(f"{path}:{line_of(path, key + ':')}: {message}")


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("small/rfcn_dcn_r18_voc", "test.evaluator={type: MIoUEvaluator}",
         "MIoUEvaluator is for segmentation (TwoStageDetector is for detection)"),
        ("small/rfcn_dcn_r18_voc", "data.test={type: LabelFolder, root: a, split: b}",
         "LabelFolder is for segmentation (TwoStageDetector is for detection)"),
        ("small/rfcn_dcn_r18_voc", "data.crop=[100, 100]", "'crop' is for segmentation"),
        ("small/rfcn_dcn_r18_voc", "data.random_scale=[1, 2]",
         "'random_scale' is for segmentation"),
        ("small/deeplab_r18_camvid", "test.evaluator={type: VOCEvaluator}",
         "VOCEvaluator is for detection (DeepLab is for segmentation)"),
        ("small/deeplab_r18_camvid", "data.train={type: Shapes, root: a, split: train}",
         "Shapes is for detection (DeepLab is for segmentation)"),
        ("small/deeplab_r18_camvid", "data.pad_images=32", "'pad_images' is for detection"),
    ],
)  # fmt: skip
def test_parts_of_different_tasks(tmp_path: Path, name: str, override: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    key, _, value = override.partition("=")
    section, _, key = key.partition(".")
    text = (CONFIG.parent.parent / f"{name}.yaml").read_text()
    text = re.sub(rf"(?m)^  {key}: .*\n", "", text)
    path.write_text(text.replace(f"\n{section}:\n", f"\n{section}:\n  {key}: {value}\n"))
    with pytest.raises(UserError) as caught:
        check(load_config(path))
    assert str(caught.value).startswith(f"{path}:{line_of(path, key + ': ' + value)}: {message}")


def test_one_image_is_no_batch_to_normalise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before the model is built, and only in training."""
    overrides = folder(tmp_path / "data", "data.batch_size=1")

    def no_model(_: Any) -> None:
        raise AssertionError("a model was built")

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "build_model", no_model)
        with pytest.raises(
            UserError, match=r"^command line: 1 image is too few .*norm: bn.*eval_bn or"
        ):
            train(load_config(CONFIG, overrides), tmp_path / "out", device="cpu")
    constant = load_config(CONFIG, [*overrides, "model.backbone.norm=eval_bn"])
    assert train(constant, tmp_path / "constant", device="cpu") == 0
