import hashlib
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from data_sets import picture
from easydict import EasyDict
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as official
from torch import nn

from dcdet import build_model, cli, load_config, registry
from dcdet.boxes import rescale
from dcdet.datasets.label_folder import LabelFolder
from dcdet.datasets.loader import ResizeSpec, View
from dcdet.engine import demo as demo_module
from dcdet.engine import evaluate
from dcdet.engine.checkpoint import save
from dcdet.engine.demo import class_names, demo, find_images, free_path, picture_name, write_picture
from dcdet.errors import UserError
from dcdet.structures import UNLABELLED, Detections, Segmentation
from dcdet.visualize.draw import class_colour
from dcdet.visualize.segmentation import draw_segmentation, palette, voc_palette

SQUARE = (20, 30, 60, 80)


class FindsWhite(nn.Module):
    """A model that finds the white area of each image, twice, once with a low score, and a NaN."""

    def predict(self, batch):
        result = []
        for image, scale, target in zip(batch.images, batch.scales, batch.targets, strict=True):
            rows, columns = (image.float().mean(0) > 200).nonzero().T
            box = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            boxes = rescale(box[None].float(), 1 / scale, "continuous").repeat(3, 1)
            boxes[2, 0] = float("nan")
            scores, labels = torch.tensor([0.9, 0.2, 0.99]), torch.tensor([1, 0, 1])
            result.append(Detections(target.image_id, boxes, scores, labels))
        return result


@pytest.fixture
def config(monkeypatch):
    """Everything that demo is given, with a model in place of a built one."""
    data = SimpleNamespace(
        classes=["cat", "dog"],
        orientation="ignore",
        max_pixels=10**6,
        resize=ResizeSpec(200, 400),
        pad_multiple=32,
        pad_images=1,
    )
    root = SimpleNamespace(
        data=data,
        model=EasyDict(type="TwoStageDetector", num_classes=2),
        test=evaluate.TestSection({}, "fp32"),
        where=lambda key: f"config.yaml: {key}",
    )
    monkeypatch.setattr(demo_module, "check", lambda config: config)
    monkeypatch.setattr(demo_module, "build_model", lambda config: FindsWhite())
    monkeypatch.setattr(demo_module, "load_weights", lambda model, path: {})
    return root


def write_image(path):
    image = np.full((100, 150, 3), 60, dtype=np.uint8)
    x1, y1, x2, y2 = SQUARE
    image[y1:y2, x1:x2] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix.lower() or ".png"
    path.write_bytes(cv2.imencode(suffix, image)[1].tobytes())
    return path


def run(config, inputs, output, **options):
    inputs = [str(path) for path in inputs]
    return demo(config, Path("weights.pth"), inputs, output, device="cpu", **options)


def tree(folder):
    """Every file below `folder` with the hash of its content, but for the run's lock."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def rows_of(output, name="detections.json"):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads((output / name).read_text(), parse_constant=refuse)


def test_the_network_sees_what_it_was_trained_on(config, tmp_path):
    """Black pixels that count as image, as in training."""
    config.data.pad_images = 64
    views = [View(config.data.resize)]
    path = str(write_image(tmp_path / "a.png"))
    _, [batch] = demo_module.read_views(path, config.data, views)
    assert batch.sizes == [(256, 320)]
    assert batch.images.shape == (1, 3, 256, 320)
    assert batch.images[0, :, :200, :300].min() > 0
    assert batch.images[0, :, 200:].max() == 0
    assert batch.images[0, :, :, 300:].max() == 0


def test_picture_and_json_show_what_is_there(config, tmp_path):
    source = write_image(tmp_path / "in" / "a.png")
    assert run(config, [source], tmp_path / "out") == 0
    [row] = rows_of(tmp_path / "out")
    box = row.pop("bbox")
    score = row.pop("score")
    assert row == {"image_id": str(source), "category_id": 2, "name": "dog", "picture": "a.png"}
    x1, y1, x2, y2 = SQUARE
    assert box == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=1)
    assert score == pytest.approx(0.9)
    before, after = (
        np.asarray(cv2.imread(str(path))) for path in (source, tmp_path / "out" / "a.png")
    )
    assert after.shape == before.shape
    drawn = (after[..., ::-1] == class_colour(1)).all(axis=2)
    assert drawn[y1 + 5 : y2 - 5, x1 - 2 : x1 + 3].any(axis=1).all()
    assert (before[85:] == after[85:]).all()


def test_masks_are_drawn_and_written(config, tmp_path, monkeypatch):
    """Those of the detections that are shown, at the size of the file."""

    def predict(self, batch):
        [found] = FindsWhite.predict(self, batch)
        masks = torch.zeros(3, 100, 150, dtype=torch.bool)
        masks[0, 40:60, 25:55] = True
        masks[1:] = True
        return [replace(found, masks=masks)]

    model = type("FindsMasks", (FindsWhite,), {"predict": predict})
    monkeypatch.setattr(demo_module, "build_model", lambda config: model())
    path = write_image(tmp_path / "in" / "a.png")
    assert run(config, [path], tmp_path / "out") == 0
    [row] = rows_of(tmp_path / "out")
    mask = official.decode(row["segmentation"])
    assert mask.shape == (100, 150)
    assert mask[40:60, 25:55].all()
    assert mask.sum() == 600
    picture = cv2.imread(str(tmp_path / "out" / "a.png"))[:, :, ::-1]
    assert (picture[50, 40] == (255 + np.array(class_colour(1))) // 2).all()
    assert (picture[65, 40] == 255).all()
    assert (picture[90, 100] == 60).all()


def test_threshold_decides_what_is_shown(config, tmp_path):
    source = write_image(tmp_path / "a.png")
    for threshold, expected in ((0.0, 2), (0.5, 1), (0.95, 0)):
        output = tmp_path / f"out {threshold}"
        assert run(config, [source], output, score_threshold=threshold) == 0
        assert len(rows_of(output)) == expected
    plain, picture = (np.asarray(cv2.imread(str(path))) for path in (source, output / "a.png"))
    assert (plain == picture).all()


@pytest.mark.parametrize("threshold", [float("nan"), -1, 2, float("inf")])
def test_threshold_out_of_range_is_refused(config, tmp_path, threshold):
    with pytest.raises(UserError, match="--score-threshold: must be from 0 to 1"):
        run(config, [write_image(tmp_path / "a.png")], tmp_path / "out", score_threshold=threshold)
    assert not (tmp_path / "out").exists()


def test_good_ones_are_done_and_bad_ones_listed(config, tmp_path, caplog):
    folder = tmp_path / "in"
    write_image(folder / "b.png")
    write_image(folder / "d.jpeg")
    (folder / "a.jpg").write_bytes(b"<html>not found</html>")
    whole = write_image(folder / "c.png").read_bytes()
    (folder / "c.png").write_bytes(whole[: len(whole) // 2])
    (folder / "e.png").mkdir()
    (folder / "notes.txt").write_text("not meant")
    (folder / ".hidden.png").write_bytes(b"")
    write_image(folder / "inside" / "f.png")
    os.mkfifo(folder / "g.png")
    missing = tmp_path / "missing.png"
    with caplog.at_level(logging.INFO, "dcdet"):
        assert run(config, [folder, missing], tmp_path / "out") == 1
    assert set(tree(tmp_path / "out")) == {"b.png", "d.jpg", "detections.json"}
    skipped = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    names = [folder / "a.jpg", folder / "c.png", folder / "e.png", folder / "g.png", missing]
    assert len(skipped) == 5
    for line, name in zip(skipped, names, strict=True):
        assert line.startswith(f"skipped: {name}: ")
    assert "drew 2 of 7 images" in caplog.text


def test_nothing_usable_is_an_error(config, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"a\.png: .*none of 2 inputs"):
        run(config, [tmp_path / "a.png", tmp_path / "missing.png"], tmp_path / "out")
    with pytest.raises(UserError, match="empty: no image in this folder"):
        run(config, [tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(UserError, match="names no image"):
        run(config, [], tmp_path / "out")
    assert tree(tmp_path / "out") == {}


def test_an_image_named_twice_is_done_once(tmp_path, monkeypatch):
    write_image(tmp_path / "in" / "b.png")
    write_image(tmp_path / "in" / "a.png")
    monkeypatch.chdir(tmp_path)
    paths, empty = find_images(["in/b.png", "in", "./in/../in/a.png"])
    assert paths == ["in/b.png", "in/a.png"]
    assert empty == {}


def test_nothing_is_overwritten(config, tmp_path):
    sources = [write_image(tmp_path / folder / "a.png") for folder in ("one", "two")]
    output = tmp_path / "out"
    output.mkdir()
    (output / "a.png").write_text("precious")
    (output / "a-3.png").symlink_to(tmp_path / "victim")
    (output / "detections.json").write_text("precious too")
    before = tree(tmp_path)
    assert run(config, sources, output) == 0
    after = tree(tmp_path)
    assert {name: after[name] for name in before} == before
    new = {"out/a-2.png", "out/a-4.png", "out/detections-2.json"}
    assert set(after) - set(before) == new
    assert not (tmp_path / "victim").exists()
    pictures = [(row["image_id"], row["picture"]) for row in rows_of(output, "detections-2.json")]
    assert pictures == [(str(sources[0]), "a-2.png"), (str(sources[1]), "a-4.png")]
    assert run(config, sources, output) == 0
    again = tree(tmp_path)
    assert {name: again[name] for name in after} == after


@pytest.mark.parametrize("name", [
    "-rf.png", "new\nline.png", "Привет 猫.png", "..png", "a b'c\"$(touch x).png",
    "x" * 250 + ".png", "é" * 120 + ".png",
    os.fsdecode(b"caf\xe9.png"), "%s%d.png", "\u202egnp.png",
])  # fmt: skip
def test_strange_names_stay_in_the_output_folder(config, tmp_path, name, caplog):
    write_image(tmp_path / "in" / name)
    before = tree(tmp_path)
    with caplog.at_level(logging.INFO, "dcdet"):
        assert run(config, [tmp_path / "in" / name], tmp_path / "out") == 0
    after = tree(tmp_path)
    assert {key: after[key] for key in before} == before
    created = set(after) - set(before)
    assert len(created) == 2
    assert all(path.startswith("out/") for path in created)
    [row] = rows_of(tmp_path / "out")
    assert row["image_id"] == str(tmp_path / "in" / name)
    assert f"out/{row['picture']}" in created
    assert all("\n" not in r.getMessage() for r in caplog.records)


@given(name=st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=300))
def test_any_name_becomes_a_harmless_one(name):
    result = picture_name(name)
    assert result.endswith((".png", ".jpg"))
    assert os.path.basename(result) == result
    assert len(result.encode()) <= 255
    assert result[0] not in "-."
    assert result.isprintable()
    assert not set(result) & set('/\\:*?"<>|')


def test_free_path_counts_on(tmp_path):
    for expected in ("a.b.png", "a.b-2.png", "a.b-3.png"):
        path = free_path(tmp_path, "a.b.png")
        assert path == tmp_path / expected
        path.touch()


def test_a_picture_is_always_a_new_file(tmp_path):
    (tmp_path / "a.png").write_text("precious")
    (tmp_path / "b.png").symlink_to(tmp_path / "victim")
    for name in ("a.png", "b.png"):
        with pytest.raises(FileExistsError):
            write_picture(tmp_path / name, np.zeros((4, 4, 3), np.uint8))
    assert tree(tmp_path) == {"a.png": hashlib.sha256(b"precious").hexdigest()}


def test_output_that_is_a_file_is_refused(config, tmp_path):
    source = write_image(tmp_path / "a.png")
    with pytest.raises(UserError, match="output folder"):
        run(config, [source], source)


def test_picture_is_not_left_half_written(config, tmp_path, monkeypatch):
    """Disk full: the error goes up, and no piece of a file stays."""
    source = write_image(tmp_path / "a.png")
    real = open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo_module, "open", lambda p, m: Full(real(p, m)), raising=False)
    with pytest.raises(OSError, match="No space left"):
        run(config, [source], tmp_path / "out")
    assert tree(tmp_path / "out") == {}


def test_class_names(config, caplog):
    weights = Path("w.pth")
    trained = {"classes": ["Katze", "Hund"], "category_ids": [17, 18]}
    assert class_names(config, {}, weights) == (["cat", "dog"], [1, 2])
    assert class_names(config, trained, weights) == (["cat", "dog"], [1, 2])
    assert "trained for other class names: Katze, Hund" in caplog.text
    config.data.classes = None
    assert class_names(config, trained, weights) == (["Katze", "Hund"], [17, 18])
    assert class_names(config, {}, weights) == (["class 0", "class 1"], [1, 2])
    config.data.classes = ["cat"]
    with pytest.raises(UserError, match=r"config.yaml: data.classes: 1 names, .* is 2"):
        class_names(config, {}, weights)


# Segmentations.

CAMVID = ROOT / "configs" / "small" / "deeplab_r18_camvid.yaml"
SMALL = ["data.resize={short: 48, long: 64}", "model.channels=16", "data.workers=0"]
NAMES = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car",
         "pedestrian", "bicyclist"]  # fmt: skip


@pytest.fixture(scope="module")
def deeplab(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Random weights that find several classes, and a data set of two images for them."""
    root = tmp_path_factory.mktemp("deeplab")
    torch.manual_seed(0)
    model = build_model(load_config(CAMVID, SMALL))
    torch.nn.init.normal_(model.score.weight, std=1.0)
    save(root / "weights.pth", {"model": model.state_dict(), "meta": {}})
    for part in ("images", "labels"):
        (root / part / "val").mkdir(parents=True)
    for name, size in (("wide", (60, 80)), ("tall", (90, 70))):
        cv2.imwrite(str(root / "images" / "val" / f"{name}.png"), picture(size))
        cv2.imwrite(str(root / "labels" / "val" / f"{name}.png"), np.zeros(size, np.uint8))
    return SimpleNamespace(root=root, weights=root / "weights.pth", images=root / "images" / "val")


def segment(deeplab: SimpleNamespace, output: Path, *words: Any) -> int:
    words = ("--weights", deeplab.weights, "--output", output, "--device", "cpu", *SMALL, *words)
    return cli.main(["demo", str(CAMVID), *map(str, words)])


def test_a_segmentation_is_drawn_and_written(
    deeplab: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The data set of the config, data/camvid, need not be there."""
    source = deeplab.images / "wide.png"
    assert segment(deeplab, tmp_path, source) == 0
    assert not any(record.levelno >= logging.WARNING for record in caplog.records)
    assert set(tree(tmp_path)) == {"wide.png", "wide-labels.png", "segmentations.json"}
    [row] = rows_of(tmp_path, "segmentations.json")
    assert row.keys() == {"image", "picture", "labels", "classes"}
    assert (row["image"], row["picture"]) == (str(source), "wide.png")
    stored = Image.open(tmp_path / row["labels"])
    labels = np.asarray(stored)
    assert (stored.mode, labels.shape) == ("P", (60, 80))
    known, counts = np.unique(labels, return_counts=True)
    assert len(known) > 2
    assert [area["pixels"] for area in row["classes"]] == sorted(counts, reverse=True)
    for area in row["classes"]:
        label = area["category_id"]
        assert area["name"] == NAMES[label]
        assert area["pixels"] == (labels == label).sum() == area["share"] * 60 * 80
    drawn = cv2.imread(str(tmp_path / "wide.png"))[..., ::-1]
    image = cv2.imread(str(source))[..., ::-1]
    assert (drawn == draw_segmentation(image, labels, NAMES, palette(None, 11))).all()


@pytest.mark.parametrize("options", [
    ["test.scales=[{short: 48, long: 64}, {short: 64, long: 96}]", "test.flip=true"],
    ["model.tiles={size: [33, 40], overlap: 8}"],
])  # fmt: skip
def test_demo_segments_as_test_does(
    deeplab: SimpleNamespace, tmp_path: Path, options: list[str]
) -> None:
    words = [*SMALL, f"data.test.root={deeplab.root}", *options]
    config = load_config(CAMVID, words)
    assert evaluate.evaluate(config, deeplab.weights, tmp_path / "test", device="cpu") == 0
    assert segment(deeplab, tmp_path / "demo", *options, deeplab.images) == 0
    for name in ("wide", "tall"):
        ours = tmp_path / "demo" / f"{name}-labels.png"
        theirs = tmp_path / "test" / "predictions" / f"{name}.png"
        assert ours.read_bytes() == theirs.read_bytes()


def test_bad_images_are_skipped_and_nothing_is_overwritten(
    deeplab: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"<html>")
    output = tmp_path / "out"
    output.mkdir()
    (output / "wide-2-labels.png").write_text("precious")
    before = tree(output)
    for stem in ("wide", "wide-2"):
        with caplog.at_level(logging.INFO, "dcdet"):
            assert segment(deeplab, output, bad, deeplab.images / "wide.png") == 1
        after = tree(output)
        assert {name: after[name] for name in before} == before
        assert f"{stem}.png" in after.keys() - before.keys()
        before = after
    assert "drew 1 of 2 images" in caplog.text
    [row] = rows_of(output, "segmentations-2.json")
    assert (row["picture"], row["labels"]) == ("wide-2.png", "wide-2-labels-2.png")


def test_a_threshold_is_not_taken_silently(
    deeplab: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = deeplab.images / "wide.png"
    assert segment(deeplab, tmp_path, image, "--score-threshold", 0.5) == 0
    assert "--score-threshold changes nothing: each pixel gets its likeliest class" in caplog.text


def test_pixels_without_a_finite_score_are_told(
    deeplab: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def predict(self: Any, *views: Any) -> list[Segmentation]:
        labels = torch.full((60, 80), 3, dtype=torch.uint8)
        labels[:10] = UNLABELLED
        return [Segmentation(views[0].targets[0].image_id, labels, labels)]

    monkeypatch.setattr("dcdet.models.deeplab.DeepLab.predict", predict)
    assert segment(deeplab, tmp_path, deeplab.images / "wide.png") == 0
    [row] = rows_of(tmp_path, "segmentations.json")
    road = {"category_id": 3, "name": "road", "pixels": 4000, "share": 4000 / 4800}
    assert row["classes"] == [road]
    assert "wide.png: 800 pixels were not finite" in caplog.text


class Towns(LabelFolder):
    """A data set whose classes, ids and colours are known without its files."""

    CLASSES = ("sky", "house", "road")
    CATEGORY_IDS = (23, 11, 7)
    PALETTE = voc_palette(3)


def test_names_ids_and_colours_of_a_known_data_set(
    deeplab: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.roles()["dataset"], "LabelFolder", Towns)
    words = ["data.classes=null", "model.num_classes=3"]
    torch.manual_seed(0)
    model = build_model(load_config(CAMVID, [*SMALL, *words]))
    torch.nn.init.normal_(model.score.weight, std=1.0)
    towns = SimpleNamespace(weights=tmp_path / "weights.pth")
    save(towns.weights, {"model": model.state_dict(), "meta": {}})
    assert segment(towns, tmp_path, deeplab.images / "wide.png", *words) == 0
    [row] = rows_of(tmp_path, "segmentations.json")
    labels = np.asarray(Image.open(tmp_path / "wide-labels.png"))
    for area in row["classes"]:
        label = Towns.CATEGORY_IDS.index(area["category_id"])
        assert area["name"] == Towns.CLASSES[label]
        assert area["pixels"] == (labels == label).sum()
    assert len(row["classes"]) > 1
    shown = np.asarray(Image.open(tmp_path / "wide-labels.png").convert("RGB"))
    assert (shown == np.array(voc_palette(3))[labels]).all()


def test_class_names_of_segmentations(config, caplog):
    weights = Path("w.pth")
    config.model.num_classes = 3
    config.data.classes = None
    trained = {"classes": ["a", "b", "c"], "category_ids": [4, 5, 6]}
    assert class_names(config, {}, weights, Towns) == (["sky", "house", "road"], [23, 11, 7])
    assert class_names(config, {}, weights, LabelFolder)[1] == [0, 1, 2]
    assert class_names(config, trained, weights, LabelFolder) == (["a", "b", "c"], [4, 5, 6])
    assert not caplog.text
    assert class_names(config, trained, weights, Towns)[0] == ["sky", "house", "road"]
    assert "trained for other class names: a, b, c" in caplog.text
    config.data.classes = ["x", "y", "z"]
    assert class_names(config, {}, weights, Towns) == (["x", "y", "z"], [0, 1, 2])
