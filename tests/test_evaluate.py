"""Testing at several scales and mirrored, as `dcdet test` and `dcdet demo` do; segmentation."""

import json
import logging
import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import label_sets
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from pycocotools.mask import area as mask_area
from torch import Tensor

from dcdet import build_model, load_config
from dcdet.config import Config
from dcdet.datasets import loader
from dcdet.datasets.loader import DetectionDataset, ResizeSpec, View, test_loader
from dcdet.engine import checkpoint, evaluate
from dcdet.engine.demo import demo, read_views
from dcdet.engine.runtime import write_bytes
from dcdet.engine.setup import build_reader
from dcdet.errors import UserError
from dcdet.masks import paste
from dcdet.models.postprocess import select
from dcdet.models.two_stage import TwoStageDetector
from dcdet.registry import check
from dcdet.structures import Detections

CONFIG = ROOT / "configs" / "quickstart" / "rfcn_r18_shapes.yaml"
SCALES = "test.scales=[{short: 48, long: 64}, {short: 64, long: 96}, {short: 100, long: 110}]"
CPU = torch.device("cpu")


class World:
    """A tiny shapes set and a network with random weights."""

    def __init__(self, root: Path) -> None:
        self.node = f"{{type: Shapes, root: {root}, train_images: 1, test_images: 3, split: %s}}"
        self.overrides = [
            f"data.train={self.node % 'train'}", f"data.test={self.node % 'test'}",
            "data.resize={short: 64, long: 96}", "data.workers=0", "model.rpn.channels=32",
            "model.roi_head.channels=32", "model.rpn.test.post_nms=12",
        ]  # fmt: skip
        self.weights = root / "weights.pth"
        torch.manual_seed(0)
        self.model = build_model(self.config()).eval()
        build_reader(self.config(), "test")  # writes the set
        checkpoint.save(self.weights, {"model": self.model.state_dict(), "meta": {}})

    def config(self, *overrides: str) -> Config:
        return load_config(CONFIG, [*self.overrides, *overrides])

    def test(self, output: Path, *overrides: str) -> int:
        return evaluate.evaluate(self.config(*overrides), self.weights, output, device="cpu")

    def images(self) -> list[str]:
        return [record.path for record in build_reader(self.config(), "test").records]

    def detect(self, path: str, views: list[View]) -> Detections:
        """What is found in one image file."""
        batches = read_views(path, check(self.config()).data, views)[1]
        [found] = evaluate.detect(self.model, [batches], "fp32", CPU)
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def rows(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "detections.json").read_text())


def table(found: Detections) -> Tensor:
    return torch.cat([found.labels[:, None], found.boxes, found.scores[:, None]], 1)


def same_rows(one: Tensor, two: Tensor, tolerance: float) -> bool:
    """Whether each row of one has its like in the other, and there are as many."""
    far = (one[:, None] - two[None]).abs().amax(-1)
    return one.shape == two.shape and max(far.amin(0).max(), far.amin(1).max()) <= tolerance


def test_views() -> None:
    def views(**options: Any) -> list[View]:
        return evaluate.TestSection({}, "fp32", **options).views(ResizeSpec(64, 96))

    small, large = ResizeSpec(48, 64), ResizeSpec(128, 200)
    assert views() == [(ResizeSpec(64, 96), False)]
    assert views(flip=True) == [(ResizeSpec(64, 96), False), (ResizeSpec(64, 96), True)]
    assert views(scales=[small, large]) == [(small, False), (large, False)]
    assert len(views(scales=[small, large], flip=True)) == 4
    with pytest.raises(ValueError, match="scales: name at least one"):
        views(scales=[])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("test.scales=[]", "'scales' name at least one"),
        ("test.scales=[[480, 800]]", r"'scales\[0\]' must be a mapping with short, long"),
        ("test.scales=[{short: 480}]", r"'test\.scales\.0' lacks 'long'"),
        ("test.flip=1", "'flip' must be true or false"),
        ("model.postprocess.soft_nms=gaussian", "'soft_nms' must be a mapping with method, sigma"),
        ("model.postprocess.soft_nms={method: hard}", "'method' must be gaussian or linear"),
        ("model.postprocess.soft_nms={method: linear, iou: 2}", r"'iou' must be in \[0, 1\]"),
    ],
)
def test_wrong_keys_are_found_before_anything_runs(
    world: World, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check(world.config(override))


def test_the_one_scale_of_the_data_changes_nothing(world: World, tmp_path: Path) -> None:
    assert world.test(tmp_path / "plain") == 0
    assert len(rows(tmp_path / "plain")) > 20
    assert world.test(tmp_path / "named", "test.scales=[{short: 64, long: 96}]") == 0
    for name in ("detections.json", "metrics.json"):
        files = [(tmp_path / output / name).read_bytes() for output in ("plain", "named")]
        assert files[0] == files[1]


@pytest.mark.parametrize("soft", ["null", "{method: gaussian, sigma: 0.6}"])
def test_one_choice_is_made_among_the_candidates_of_all_views(world: World, soft: str) -> None:
    """Predictions of several views are those of all their candidates, made one by one."""
    config = world.config(SCALES, "test.flip=true", f"model.postprocess.soft_nms={soft}")
    experiment = check(config)
    views = experiment.test.views(experiment.data.resize)
    assert len(views) == 6
    model = build_model(config).eval()
    model.load_state_dict(world.model.state_dict())
    path = world.images()[0]
    _, batches = read_views(path, experiment.data, views)
    sizes = [batch.sizes[0] for batch in batches]
    assert sorted({min(size) for size in sizes}) == [48, 64, 88]  # 110 the long side of the last
    assert [batch.flips for batch in batches] == [(False,), (True,)] * 3
    [found] = evaluate.detect(model, [batches], "fp32", CPU)
    parts = [model.candidates(batch)[0] for batch in batches]
    boxes, scores = (torch.cat(part) for part in zip(*parts, strict=True))
    assert len(boxes) == sum(len(part[0]) for part in parts) > 36
    for ours, expected in zip(
        (found.boxes, found.scores, found.labels),
        select(boxes, scores, model.postprocess),
        strict=True,
    ):
        assert torch.equal(ours, expected)
    alone = model.predict(batches[0])[0]
    assert not torch.equal(alone.scores, found.scores)


@pytest.mark.parametrize("pixels", ["continuous", "inclusive"])
def test_mirrored_images(world: World, tmp_path: Path, pixels: Any) -> None:
    """A mirrored file seen mirrored gives the boxes of the file, mirrored.

    The width is not a multiple of anything, so that resizing rounds it.
    """
    image = np.asarray(cv2.imread(world.images()[0]))[:, :147]
    files = [str(tmp_path / name) for name in ("a.png", "b.png")]
    cv2.imwrite(files[0], image)
    cv2.imwrite(files[1], image[:, ::-1])
    resize = ResizeSpec(64, 96)
    world.model.pixels, before = pixels, world.model.pixels
    try:
        plain = table(world.detect(files[0], [View(resize)]))
        turned = table(world.detect(files[1], [View(resize, True)]))
        both = [table(world.detect(file, [View(resize), View(resize, True)])) for file in files]
    finally:
        world.model.pixels = before
    assert len(plain) > 5
    mirrored = turned.clone()
    mirrored[:, 1], mirrored[:, 3] = 147 - turned[:, 3], 147 - turned[:, 1]
    assert same_rows(plain, mirrored, 1e-4)
    assert not same_rows(plain, turned, 1.0)
    mirrored = both[1].clone()
    mirrored[:, 1], mirrored[:, 3] = 147 - both[1][:, 3], 147 - both[1][:, 1]
    assert same_rows(both[0], mirrored, 1e-4)
    assert not same_rows(both[0], plain, 1.0)


def test_every_file_is_read_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = world.config(SCALES, "test.flip=true")
    experiment, reader = check(config), build_reader(config, "test")
    read: list[str] = []
    own = loader.read_image
    monkeypatch.setattr(
        loader, "read_image", lambda path, *options: (read.append(path), own(path, *options))[1]
    )
    views = experiment.test.views(experiment.data.resize)
    dataset = DetectionDataset(reader, experiment.data, training=False, views=views)
    images = list(test_loader(dataset, experiment.data, 0, 1))
    assert read == world.images()
    forked = list(test_loader(dataset, replace(experiment.data, workers=2), 0, 1))
    for path, batches, others in zip(read, images, forked, strict=True):
        _, expected = read_views(path, experiment.data, views)
        assert all(torch.equal(a.images, b.images) for a, b in zip(batches, others, strict=True))
        assert [batch.flips for batch in batches] == [batch.flips for batch in expected]
        for ours, theirs in zip(batches, expected, strict=True):
            assert torch.equal(ours.images, theirs.images)
            assert ours.scales == theirs.scales


def test_demo_finds_what_test_finds(world: World, tmp_path: Path) -> None:
    options = [SCALES, "test.flip=true", "model.postprocess.soft_nms={method: linear}"]
    assert world.test(tmp_path / "test", *options) == 0
    code = demo(
        world.config(*options), world.weights, world.images(), tmp_path / "demo",
        score_threshold=0.0, device="cpu",
    )  # fmt: skip
    assert code == 0
    ours, theirs = rows(tmp_path / "demo"), rows(tmp_path / "test")
    assert len(ours) == len(theirs) > 100
    for key in ("score", "bbox"):
        assert [row[key] for row in ours] == [row[key] for row in theirs]


def test_an_image_too_narrow_at_one_scale_is_left_out(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is named with the scale; what it could give at the others would be another measure."""
    good, thin = tmp_path / "in" / "good.png", tmp_path / "in" / "thin.png"
    good.parent.mkdir()
    cv2.imwrite(str(good), np.full((60, 80, 3), 90, np.uint8))
    cv2.imwrite(str(thin), np.full((700, 4, 3), 90, np.uint8))

    def run(name: str, scales: str) -> int:
        config = world.config(f"test.scales={scales}")
        return demo(config, world.weights, [str(good.parent)], tmp_path / name, device="cpu")

    assert run("one", "[{short: 64, long: 96}]") == 0
    with caplog.at_level(logging.INFO, "dcdet"):
        assert run("two", "[{short: 64, long: 96}, {short: 48, long: 64}]") == 1
    assert f"skipped: {thin}: too narrow: 4 x 700 pixels times 0.0914" in caplog.text
    assert "drew 1 of 2 images" in caplog.text


def test_other_precision(world: World, tmp_path: Path) -> None:
    options = [SCALES, "test.flip=true", "model.postprocess.soft_nms={method: gaussian}"]
    assert world.test(tmp_path, *options, "test.precision=bf16") == 0
    assert len(rows(tmp_path)) > 20


def test_masks(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Boxes filled from edge to edge are the masks; at most the last image's are still there."""
    node = world.node % "test, form: coco, masks: true"
    masked = [f"data.test={node}", "test.evaluator={type: COCOEvaluator}"]
    kept: list[Any] = []
    own = TwoStageDetector.predict

    def predict(self: Any, *views: Any) -> list[Detections]:
        assert sum(one() is not None for one in kept) <= 1
        [found] = own(self, *views)
        whole = torch.ones(len(found.boxes), 28, 28)
        masks = paste(whole, found.boxes, views[0].targets[0].size, "grid")
        kept.append(weakref.ref(masks))
        return [replace(found, masks=masks)]

    with pytest.raises(UserError, match="shapes test: has masks, but the model finds boxes only"):
        world.test(tmp_path / "none", *masked)
    monkeypatch.setattr(TwoStageDetector, "predict", predict)
    with caplog.at_level(logging.INFO, "dcdet"):
        assert world.test(tmp_path / "with", *masked) == 0
    assert len(kept) == 3
    for row in rows(tmp_path / "with"):
        x, y, width, height = row["bbox"]
        x2, y2 = x + width, y + height
        area = (round(x2) - round(x)) * (round(y2) - round(y))
        assert row["segmentation"]["size"] == [128, 160]
        assert abs(int(mask_area(row["segmentation"])) - area) <= 10
    metrics = json.loads((tmp_path / "with" / "metrics.json").read_text())
    assert metrics["segm"].keys() == metrics.keys() - {"images", "of", "segm"}
    assert set(metrics["segm"]["per_class"]) == {"crescent", "worm", "ring", "star"}
    assert f"segm AP50 {metrics['segm']['AP50']:.4f}" in caplog.text


def test_two_processes_find_what_one_finds(world: World, tmp_path: Path) -> None:
    options = [SCALES, "test.flip=true", "model.postprocess.soft_nms={method: gaussian}"]
    door = [str(ROOT / "tools" / "test.py"), str(CONFIG), *world.overrides, *options,
            "--weights", str(world.weights), "--device", "cpu", "--output"]  # fmt: skip
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, command in (("one", door), ("two", [*launch, *door])):
        result = subprocess.run(
            [sys.executable, *command, str(tmp_path / name)],
            capture_output=True, text=True, timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DCDET_TIMEOUT": "60"},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
    one, two = (sorted(rows(tmp_path / n), key=lambda row: row["image_id"]) for n in ("one", "two"))
    assert one == two
    metrics = [(tmp_path / name / "metrics.json").read_bytes() for name in ("one", "two")]
    assert metrics[0] == metrics[1]


# ---- segmentation


class Labelled:
    """A small folder of label maps and a network with random weights."""

    def __init__(self, root: Path) -> None:
        self.root = root / "data"
        self.overrides = label_sets.folder(self.root)
        self.weights = root / "weights.pth"
        torch.manual_seed(0)
        model = build_model(self.config())
        # With zeros where blocks end, as at the start of training, all pixels look the same.
        for name, parameter in model.named_parameters():
            if ".bn2.weight" in name:
                torch.nn.init.ones_(parameter)
        torch.nn.init.normal_(model.score.weight)
        meta = {"classes": label_sets.CLASSES}
        checkpoint.save(self.weights, {"model": model.state_dict(), "meta": meta})

    def config(self, *overrides: str) -> Config:
        return load_config(label_sets.CONFIG, [*self.overrides, *overrides])

    def test(self, output: Path, *overrides: str) -> int:
        return evaluate.evaluate(self.config(*overrides), self.weights, output, device="cpu")

    def copy(self, root: Path) -> list[str]:
        """Overrides for a copy of the data, to be broken."""
        shutil.copytree(self.root, root)
        return [o.replace(str(self.root), str(root)) for o in self.overrides if "LabelFolder" in o]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Labelled:
    return Labelled(tmp_path_factory.mktemp("labelled"))


def test_names_as_long_as_a_file_may_have(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        write_bytes(tmp_path / ("l" * 251 + ".png"), content)
    [file] = tmp_path.iterdir()
    assert file.read_bytes() == b"two"


def read_metrics(output: Path) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads((output / "metrics.json").read_text(), parse_constant=refuse)


def predictions(output: Path) -> dict[str, np.ndarray]:
    folder = output / "predictions"
    return {
        str(file.relative_to(folder)): np.asarray(Image.open(file))
        for file in folder.rglob("*.png")
    }


def test_segmentation(labelled: Labelled, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The figures are those of the written predictions; a second run writes the same again."""
    with caplog.at_level(logging.INFO, "dcdet"):
        assert labelled.test(tmp_path, "data.batch_size=1") == 0
    metrics, found = read_metrics(tmp_path), predictions(tmp_path)
    assert (metrics["images"], metrics["of"]) == (3, 3)
    assert sorted(found) == ["val0.png", "val1.png", "val2.png"]
    pairs = [(np.asarray(Image.open(labelled.root / "labels" / "val" / name)), labels)
             for name, labels in found.items()]  # fmt: skip
    scores = []
    for label, name in enumerate(label_sets.CLASSES):
        inter = sum(((truth == label) & (labels == label)).sum() for truth, labels in pairs)
        union = sum(((truth == label) | ((labels == label) & (truth < 255))).sum()
                    for truth, labels in pairs)  # fmt: skip
        scores.append(inter / union)
        assert metrics["per_class"][name]["IoU"] == pytest.approx(scores[-1])
        assert f"IoU {name} {scores[-1]:.4f}" in caplog.messages
    assert metrics["mIoU"] == pytest.approx(sum(scores) / 3)
    assert 0.05 < metrics["mIoU"] < 0.6
    assert len(np.unique(np.concatenate([labels for _, labels in pairs]))) > 1
    assert f"mIoU {metrics['mIoU']:.4f}" in caplog.messages
    assert any(message.startswith("evaluated 3 of 3 images") for message in caplog.messages)
    assert not any("trained for other" in message for message in caplog.messages)

    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    (tmp_path / "predictions" / "val1.png").write_text("from a run that was killed")
    assert labelled.test(tmp_path) == 0
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_ways_to_segment(labelled: Labelled, tmp_path: Path) -> None:
    """Each gives another figure, and predictions of the images' own size."""
    found = []
    for overrides in (
        [],
        ["test.flip=true"],
        ["test.scales=[{short: 40, long: 60}, {short: 33, long: 80}]", "test.precision=bf16"],
        ["model.tiles={size: [32, 32], overlap: 6}", "test.evaluator.compare_at=network"],
    ):
        assert labelled.test(tmp_path, "data.resize={short: 40, long: 60}", *overrides) == 0
        found.append(read_metrics(tmp_path)["mIoU"])
        assert {labels.shape for labels in predictions(tmp_path).values()} == {(48, 64)}
    assert len(set(found)) == len(found)
    assert max(found) - min(found) < 0.3


def test_a_broken_image_and_one_without_a_label_map(
    labelled: Labelled, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = labelled.copy(tmp_path / "data")
    image = tmp_path / "data" / "images" / "val" / "val1.png"
    image.write_bytes(image.read_bytes()[:90])
    assert labelled.test(tmp_path / "out", *overrides) == 1
    metrics = read_metrics(tmp_path / "out")
    assert (metrics["images"], metrics["of"]) == (2, 3)
    assert sorted(predictions(tmp_path / "out")) == ["val0.png", "val2.png"]
    assert any(str(image) in message for message in caplog.messages)
    (tmp_path / "data" / "labels" / "val" / "val1.png").unlink()
    assert labelled.test(tmp_path / "out2", *overrides) == 0  # left out by the reader
    assert read_metrics(tmp_path / "out2") == {**metrics, "of": 2}


def test_pixels_without_a_finite_score(
    labelled: Labelled, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = torch.load(labelled.weights, weights_only=True)["model"]
    saved["fc6.bias"] += 100
    saved["score.weight"][1] = 3e38  # so that scores overflow
    checkpoint.save(tmp_path / "huge.pth", {"model": saved, "meta": {}})
    config = labelled.config()
    assert evaluate.evaluate(config, tmp_path / "huge.pth", tmp_path, device="cpu") == 0
    assert f"{3 * 48 * 64} pixels without a finite score count as wrong" in caplog.messages
    assert read_metrics(tmp_path)["mIoU"] == 0
    assert all((labels == 255).all() for labels in predictions(tmp_path).values())


def test_wrong_label_maps_end_a_test(labelled: Labelled, tmp_path: Path) -> None:
    overrides = labelled.copy(tmp_path / "data")
    file = tmp_path / "data" / "labels" / "val" / "val2.png"
    cv2.imwrite(str(file), np.full((48, 64), 200, np.uint8))
    with pytest.raises(UserError, match=rf"^{file}: has values that are no labels here: 200"):
        labelled.test(tmp_path / "out", *overrides)
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_another_models_weights(
    labelled: Labelled, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = ["model.num_classes=4", "data.classes=[sky, road, car, tree]"]
    with pytest.raises(UserError, match=r"weights\.pth: .*score"):
        labelled.test(tmp_path, *more)
    assert labelled.test(tmp_path, "data.classes=[sea, road, car]") == 0
    assert any("was trained for other class names: sky, road" in m for m in caplog.messages)


READER = '''
from dataclasses import replace
from dcdet.datasets.label_folder import LabelFolder

class Cities(LabelFolder):
    """The images of a folder, called by city; of the first nothing is known."""

    def __init__(self, root: str, split: str, classes: list[str] | None):
        super().__init__(root, split, classes)
        self.records = [replace(r, image_id=f"bonn/{r.image_id}") for r in self.records]
        self.records[0] = replace(self.records[0], label_path=None)
'''


def test_images_in_folders(
    labelled: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's reader; the predictions are in the folders that the images' names have."""
    (tmp_path / "own_cities.py").write_text(READER)
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "own.yaml"
    file.write_text("imports: [own_cities]\n" + label_sets.CONFIG.read_text())
    node = f"data.test={{type: Cities, root: {labelled.root}, split: val}}"
    config = load_config(file, [*labelled.overrides, node])
    assert evaluate.evaluate(config, labelled.weights, tmp_path / "out", device="cpu") == 0
    assert sorted(predictions(tmp_path / "out")) == [f"bonn/val{i}.png" for i in range(3)]
    metrics = read_metrics(tmp_path / "out")
    assert (metrics["images"], metrics["of"]) == (3, 3)
    truths = [cv2.imread(str(labelled.root / "labels" / "val" / f"val{i}.png"), -1) for i in (1, 2)]
    pixels = [metrics["per_class"][name]["pixels"] for name in label_sets.CLASSES]
    assert pixels == [sum((truth == label).sum() for truth in truths) for label in range(3)]


def test_two_processes_segment_as_one(labelled: Labelled, tmp_path: Path) -> None:
    door = [str(ROOT / "tools" / "test.py"), str(label_sets.CONFIG), *labelled.overrides,
            "--weights", str(labelled.weights), "--device", "cpu", "--output"]  # fmt: skip
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert labelled.test(tmp_path / "one") == 0
    result = subprocess.run(
        [sys.executable, *launch, *door, str(tmp_path / "two")],
        capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DCDET_TIMEOUT": "60"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    one, two = ({file.relative_to(tmp_path / name): file.read_bytes()
                 for file in (tmp_path / name).rglob("*") if file.is_file()}
                for name in ("one", "two"))  # fmt: skip
    assert one == two
    assert len(one) == 5  # three predictions, metrics.json, .lock
    assert result.stderr.count("IoU road") == 1
