"""mIoU against sets of pixels, and against the official Cityscapes script's rule."""

import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from label_sets import CLASSES, label_map, write_labels
from PIL import Image

from dcdet.datasets.label_folder import LabelFolder
from dcdet.datasets.label_maps import LabelledImage
from dcdet.errors import UserError
from dcdet.evaluators.miou import MIoUEvaluator
from dcdet.structures import UNLABELLED, Segmentation
from dcdet.visualize.segmentation import BORDER


@dataclass
class FakeReader:
    """Label maps in memory; None where nothing is known of an image."""

    maps: dict[str, np.ndarray | None]
    classes: list[str]
    category_ids: list[int] = field(default_factory=list)
    PALETTE: Any = None
    name: str = "fake"

    def __post_init__(self) -> None:
        self.records = [LabelledImage(f"{i}.jpg", i, f"{i}.png") for i in self.maps]

    def label_map(self, record: LabelledImage) -> np.ndarray | None:
        return self.maps[record.image_id]


def segmentation(image_id: str, labels: Any, network_labels: Any = None) -> Segmentation:
    shown = labels if network_labels is None else network_labels
    maps = (torch.from_numpy(np.array(x, dtype=np.uint8)) for x in (labels, shown))
    return Segmentation(image_id, *maps)


def evaluate(reader: FakeReader, found: dict[str, Any], **options: Any) -> dict[str, Any]:
    evaluator = MIoUEvaluator(reader, **options)
    for image_id, labels in found.items():
        evaluator.update(segmentation(image_id, labels))
    return evaluator.result()


def pixel_sets(maps: dict[str, np.ndarray], number: int) -> list[set[tuple[str, int, int]]]:
    """Each class's pixels, in all images."""
    sets: list[set[tuple[str, int, int]]] = [set() for _ in range(number)]
    for image_id, labels in maps.items():
        for y, x in np.ndindex(labels.shape):
            if labels[y, x] < number:
                sets[labels[y, x]].add((image_id, y, x))
    return sets


def official(pairs: list[tuple[np.ndarray, np.ndarray]], number: int) -> list[float]:
    """cityscapesScripts' class scores: nan for a class that is neither there nor found.

    Facts of evalPixelLevelSemanticLabeling.py: rows are true labels, pixels of ignored true labels
    do not count as false positives, whatever else is predicted on a true label is a false negative.
    """
    counts = np.zeros((number + 1, number + 1))  # the last: ignored
    for truth, labels in pairs:
        for a, b in zip(truth.ravel().tolist(), labels.ravel().tolist(), strict=True):
            counts[min(a, number), min(b, number)] += 1
    scores = []
    for label in range(number):
        tp = counts[label, label]
        fn = counts[label].sum() - tp
        fp = sum(counts[other, label] for other in range(number) if other != label)
        scores.append(tp / (tp + fp + fn) if tp + fp + fn else math.nan)
    return scores


# The number of classes; of each image the true and the predicted label map.
Pairs = tuple[int, dict[str, np.ndarray], dict[str, np.ndarray]]


@st.composite
def label_pairs(draw: st.DrawFn) -> Pairs:
    """Up to 3 images of up to 6 classes, some absent: truths with ignored pixels, predictions with
    pixels that have none."""
    number = draw(st.integers(2, 6))
    random = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    values = draw(st.lists(st.sampled_from([*range(number), UNLABELLED]), min_size=1, max_size=8))
    more = draw(st.lists(st.sampled_from([*range(number), UNLABELLED]), min_size=1, max_size=8))
    truths, found = {}, {}
    for image in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, 7)), draw(st.integers(1, 7))
        truth = random.choice(values, size)
        guess = np.where(random.random(size) < 0.6, truth, random.choice(more, size))
        truths[str(image)], found[str(image)] = truth.astype(np.uint8), guess.astype(np.uint8)
    return number, truths, found


@given(data=label_pairs())
def test_against_sets_of_pixels(data: Pairs) -> None:
    number, truths, found = data
    names = [f"c{label}" for label in range(number)]
    result = evaluate(FakeReader(dict(truths), names), found)
    there, ours = pixel_sets(truths, number), pixel_sets(found, number)
    known = set().union(*there)
    if not known:
        assert all(result[key] is None for key in result if key != "per_class")
        return
    scores, recalls = [], []
    for label, name in enumerate(names):
        guessed = ours[label] & known
        union = there[label] | guessed
        score = len(there[label] & guessed) / len(union) if union else None
        if there[label]:
            recalls.append(len(there[label] & guessed) / len(there[label]))
        assert result["per_class"][name]["IoU"] == (
            None if score is None else pytest.approx(score, abs=1e-6)
        )
        assert result["per_class"][name]["pixels"] == len(there[label])
        scores.append(score)
    present = [score for score in scores if score is not None]
    assert result["mIoU"] == pytest.approx(sum(present) / number, abs=1e-6)
    assert result["mIoU_present"] == pytest.approx(sum(present) / len(present), abs=1e-6)
    right = sum(len(a & b) for a, b in zip(there, ours, strict=True))
    assert result["pixel_accuracy"] == pytest.approx(right / len(known), abs=1e-6)
    assert result["mean_accuracy"] == pytest.approx(sum(recalls) / len(recalls), abs=1e-6)


@given(data=label_pairs())
def test_the_official_cityscapes_figure(data: Pairs) -> None:
    number, truths, found = data
    names = [f"c{label}" for label in range(number)]
    result = evaluate(FakeReader(dict(truths), names), found)
    scores = official([(truths[name], found[name]) for name in truths], number)
    if all(math.isnan(score) for score in scores):
        assert result["mIoU_present"] is None
        return
    assert result["mIoU_present"] == pytest.approx(np.nanmean(scores), abs=1e-6)
    for name, score in zip(names, scores, strict=True):
        ours = result["per_class"][name]["IoU"]
        assert ours is None if math.isnan(score) else ours == pytest.approx(score, abs=1e-6)


def test_a_case_by_hand() -> None:
    truth = np.array([[0, 0, 1, 1], [0, 0, 255, 255]], dtype=np.uint8)
    found = np.array([[0, 1, 1, 255], [0, 0, 2, 0]], dtype=np.uint8)
    result = evaluate(FakeReader({"a": truth}, ["a", "b", "c"]), {"a": found})
    assert [one["IoU"] for one in result["per_class"].values()] == [3 / 4, 1 / 3, None]
    assert [one["pixels"] for one in result["per_class"].values()] == [4, 2, 0]
    assert result["mIoU"] == pytest.approx((3 / 4 + 1 / 3) / 3)  # c counts as 0
    assert result["mIoU_present"] == pytest.approx((3 / 4 + 1 / 3) / 2)
    assert result["pixel_accuracy"] == pytest.approx(4 / 6)
    assert result["mean_accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 2)


def test_as_many_classes_as_there_can_be() -> None:
    truth = np.arange(256, dtype=np.uint8).reshape(16, 16)
    truth[truth == 254] = 0
    reader = FakeReader({"a": truth}, [f"c{label}" for label in range(254)])
    assert evaluate(reader, {"a": truth})["mIoU"] == 1.0


def test_whose_pixels_are_compared() -> None:
    """ "image": the prediction enlarged; "network": the label map made smaller."""
    truth, found = label_map((40, 60), 1), label_map((17, 25), 2)
    enlarged = cv2.resize(found, (60, 40), interpolation=cv2.INTER_NEAREST)
    smaller = cv2.resize(truth, (25, 17), interpolation=cv2.INTER_NEAREST)
    one = segmentation("a", enlarged, found)
    for compare_at, pair in (("image", (truth, enlarged)), ("network", (smaller, found))):
        evaluator = MIoUEvaluator(FakeReader({"a": truth}, CLASSES), compare_at)  # type: ignore[arg-type]
        evaluator.update(one)
        expected = np.nanmean(official([pair], 3))
        assert evaluator.result()["mIoU_present"] == pytest.approx(expected, abs=1e-6)
        assert 0.1 < expected < 0.9


def test_images_without_a_label_map() -> None:
    truth = label_map()
    reader = FakeReader({"a": None, "b": truth, "c": None}, CLASSES)
    wrong = np.zeros_like(truth)
    result = evaluate(reader, {"a": wrong, "b": truth, "c": wrong})
    assert result["mIoU"] == 1.0
    for maps in ({"a": None}, {"a": np.full((4, 4), UNLABELLED, np.uint8)}):
        result = evaluate(FakeReader(maps, CLASSES), {"a": np.zeros((4, 4))})
        nothing = {name: {"IoU": None, "pixels": 0} for name in CLASSES}
        assert result == {
            "mIoU": None, "mIoU_present": None, "pixel_accuracy": None, "mean_accuracy": None,
            "per_class": nothing,
        }  # fmt: skip
    assert evaluate(reader, {})["mIoU"] is None


def test_an_image_twice_and_one_that_is_not_there() -> None:
    truth = label_map()
    evaluator = MIoUEvaluator(FakeReader({"a": truth}, CLASSES))
    evaluator.update(segmentation("a", np.zeros_like(truth)))
    evaluator.update(segmentation("a", truth))
    assert evaluator.result()["mIoU"] == 1.0
    assert evaluator.result()["per_class"]["sky"]["pixels"] == (truth == 0).sum()
    with pytest.raises(ValueError, match="image 'b' is not in fake"):
        evaluator.update(segmentation("b", truth))


def test_pixels_without_a_prediction_count_as_wrong() -> None:
    truth = label_map()
    found = truth.copy()
    found[:10] = UNLABELLED
    evaluator = MIoUEvaluator(FakeReader({"a": truth}, CLASSES))
    evaluator.update(segmentation("a", found))
    assert evaluator.dropped == (found == UNLABELLED).sum()
    known = truth != UNLABELLED
    expected = (known & (found == truth)).sum() / known.sum()
    assert evaluator.result()["pixel_accuracy"] == pytest.approx(expected)


def test_label_maps_that_do_not_fit(tmp_path: Path) -> None:
    write_labels(tmp_path, "val", {"a": label_map((40, 60)), "b": label_map((40, 60))})
    reader = LabelFolder(str(tmp_path), "val", CLASSES)
    file = tmp_path / "labels" / "val" / "b.png"
    cv2.imwrite(str(file), label_map((40, 50)))
    evaluator = MIoUEvaluator(reader)
    evaluator.update(segmentation("a", label_map((40, 60))))
    with pytest.raises(UserError, match=rf"^{file}: is 50 x 40 pixels .*b\.png 60 x 40"):
        evaluator.update(segmentation("b", label_map((40, 60))))
    cv2.imwrite(str(file), np.full((40, 60), 26, np.uint8))
    with pytest.raises(UserError, match=rf"^{file}: has values that are no labels here: 26 \("):
        evaluator.update(segmentation("b", label_map((40, 60))))
    assert evaluator.result()["mIoU"] == 1.0


def written(evaluator: MIoUEvaluator, image_id: str, labels: np.ndarray) -> Image.Image:
    [(name, content)] = evaluator.image_files(segmentation(image_id, labels)).items()
    assert name == f"predictions/{image_id}.png"
    image = Image.open(io.BytesIO(content))
    assert image.format == "PNG"
    return image


def test_what_is_written_of_an_image() -> None:
    labels = label_map()
    own = [(1, 2, 3), (128, 64, 128), (0, 0, 0)]
    reader = FakeReader({"city/a": labels}, CLASSES, [7, 11, 33], own)
    image = written(MIoUEvaluator(reader), "city/a", labels)
    assert image.mode == "P"
    assert np.array_equal(image, labels)
    colours = np.array(image.convert("RGB"))
    for label, colour in [*enumerate(own), (UNLABELLED, BORDER)]:
        assert (colours[labels == label] == colour).all()
    ids = written(MIoUEvaluator(reader, predictions="ids"), "city/a", labels)
    assert ids.mode == "L"
    expected = np.select([labels == 0, labels == 1, labels == 2], [7, 11, 33], 0)
    assert np.array_equal(ids, expected)
    nothing = MIoUEvaluator(reader, predictions=None)
    assert nothing.image_files(segmentation("city/a", labels)) == {}
    assert nothing.result_files() == {}


def test_ids_that_a_grey_image_cannot_hold() -> None:
    reader = FakeReader({"a": label_map()}, CLASSES, [7, 256, 33])
    with pytest.raises(ValueError, match=r"predictions: .*id 256"):
        MIoUEvaluator(reader, predictions="ids")
    assert written(MIoUEvaluator(reader), "a", label_map()).mode == "P"


@pytest.mark.parametrize("number", [2, 21, 22, 254])
def test_palettes_without_own_colours(number: int) -> None:
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    labels[labels >= number] = UNLABELLED
    names = [f"c{label}" for label in range(number)]
    image = written(MIoUEvaluator(FakeReader({"a": labels}, names)), "a", labels)
    assert np.array_equal(image, labels)
    colours = np.array(image.convert("RGB")).reshape(-1, 3)[:number]
    assert len(np.unique(colours, axis=0)) == number
