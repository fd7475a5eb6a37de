import contextlib
import importlib.util
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from data_sets import coco_content, write_coco
from fake_reader import FakeReader, data_sets, detections, record
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO as OfficialCOCO
from pycocotools.cocoeval import COCOeval

from dcdet.datasets.coco import COCO
from dcdet.datasets.shapes import SIZE, Shapes
from dcdet.errors import UserError
from dcdet.evaluators.coco import COCOEvaluator
from dcdet.evaluators.results import read_detections
from dcdet.masks import clean_segmentation, decode, read_runs
from dcdet.structures import Detections

FIGURES = ["AP", "AP50", "AP75", "APs", "APm", "APl"]


def evaluate(reader, found, **options):
    evaluator = COCOEvaluator(reader, **options)
    for one in found:
        evaluator.update(one)
    return evaluator


def official(annotations, results, images, kind="bbox"):
    """pycocotools' own six figures, from a COCO dictionary and results, for some images."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = OfficialCOCO()
        truth.dataset = annotations
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.params.imgIds = images
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [None if value == -1 else value for value in evaluation.stats[:6].tolist()]


@pytest.mark.parametrize("backend", ["pycocotools", "auto"])
def test_placeholders_have_no_part_in_any_figure(tmp_path, backend):
    root = write_coco(tmp_path, coco_content(6))
    plain, wide = (
        evaluate(COCO(str(root), names, "continuous", image_set="train"), [], backend=backend)
        for names in (
            ["car", "toothbrush", "cat"],
            ["N/A 1", "car", "N/A 12", "toothbrush", "cat"],
        )
    )
    boxes = [[2.5, 3, 23, 14], [4, 3, 24, 14], [30, 5, 50, 20], [4, 3, 25, 15]]
    names, scores = ["car", "cat", "car", "toothbrush"], [0.9, 0.8, 0.7, 0.6]
    for image in wide.reader.records:
        labels = [plain.reader.classes.index(name) for name in names]
        plain.update(detections(image.image_id, boxes, scores, labels))
        # Here the best detection of each image is a placeholder's.
        labels = [wide.reader.classes.index(name) for name in ("N/A 12", *names)]
        wide.update(detections(image.image_id, [boxes[0], *boxes], [0.95, *scores], labels))
    result, expected = wide.result(), plain.result()
    assert 0 < expected["AP"] < 1
    assert [result[name] for name in FIGURES] == [expected[name] for name in FIGURES]
    nothing = {"AP": None, "AP50": None, "objects": 0}
    assert result["per_class"] == expected["per_class"] | {"N/A 1": nothing, "N/A 12": nothing}
    rows = wide.detections_json()
    assert sum(row["category_id"] == 12 for row in rows) == 6
    ours = official(as_coco(plain.reader), rows, [r.image_id for r in plain.reader.records])
    assert ours == pytest.approx([expected[name] for name in FIGURES])


def as_coco(reader):
    """A reader's truth as the dictionary of a COCO file; annotation ids count from 1."""
    annotations: list[dict[str, Any]] = []
    for r in reader.records:
        rows = zip(r.truth.xywh, r.truth.labels, r.truth.ignore, r.truth.areas, strict=True)
        for box, label, crowd, area in rows:
            annotations.append({
                "id": len(annotations) + 1, "image_id": r.image_id, "bbox": list(box),
                "category_id": reader.category_ids[label], "iscrowd": int(crowd), "area": area,
            })  # fmt: skip
    return {
        "info": {},
        "images": [{"id": r.image_id} for r in reader.records],
        "categories": [{"id": number} for number in reader.category_ids],
        "annotations": annotations,
    }


@settings(max_examples=60)
@given(data=data_sets(), grow=st.sampled_from([1, 6, 20]))
def test_equals_pycocotools(data, grow):
    reader, found = data
    for r in reader.records:  # into the ranges of medium and large
        r.truth.xywh[:] *= grow
        r.truth.areas[:] *= grow**2 * 0.7
    found = [Detections(d.image_id, d.boxes * grow, d.scores, d.labels) for d in found]
    evaluator = evaluate(reader, found)
    results = evaluator.detections_json()
    if not results:
        return
    result = evaluator.result()
    expected = official(as_coco(reader), results, [r.image_id for r in reader.records])
    assert [result[name] for name in FIGURES] == pytest.approx(expected, abs=1e-12)
    of_classes = [c["AP"] for c in result["per_class"].values() if c["AP"] is not None]
    assert result["AP"] == (pytest.approx(np.mean(of_classes)) if of_classes else None)


def test_equals_pycocotools_on_a_coco_file(shared):
    root = shared / "data" / "coco"
    with contextlib.redirect_stdout(io.StringIO()):
        reader = COCO(str(root), None, "continuous", image_set="val2017")
    random = np.random.default_rng(0)
    found = []
    for r in reader.records[:60]:
        boxes = np.concatenate([r.truth.xywh[:, :2], r.truth.xywh[:, :2] + r.truth.xywh[:, 2:]], 1)
        boxes = boxes + random.normal(0, 6, boxes.shape)
        found.append(detections(r.image_id, boxes, random.random(len(boxes)), r.truth.labels))
    evaluator = evaluate(reader, found)
    result = evaluator.result()
    content = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    expected = official(content, evaluator.detections_json(), [one.image_id for one in found])
    assert [result[name] for name in FIGURES] == pytest.approx(expected, abs=1e-9)
    assert 0.1 < result["AP"] < 0.9
    assert max(row["category_id"] for row in evaluator.detections_json()) > 80  # the file's own


def figures(result):
    return [result[name] for name in FIGURES]


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """A COCO file with polygons and run lengths, crowds and areas of every kind, read; and
    detections that are its objects, moved and mixed up."""
    root = tmp_path_factory.mktemp("masked") / "shapes"
    Shapes(str(root), "test", None, "continuous", "coco", 1, 12)
    file = root / "annotations" / "instances_test.json"
    content = json.loads(file.read_text())
    draw = np.random.default_rng(0)
    for number, item in enumerate(content["annotations"]):
        item["area"] *= (0.3, 1, 4, 12)[number % 4]
        if number % 5 == 0:
            item["iscrowd"] = 1
            mask, _ = clean_segmentation(item["segmentation"], SIZE)
            item["segmentation"] = {"size": list(SIZE), "counts": read_runs(mask, SIZE).tolist()}
    file.write_text(json.dumps(content))
    reader = COCO(str(root), None, "continuous", image_set="test", images="JPEGImages", masks=True)
    found = []
    for r in reader.records:
        truth = decode(r.truth.run_lengths(), SIZE)
        rows = draw.permutation(np.repeat(np.arange(len(truth)), 2))
        shift = draw.integers(-3, 4, (len(rows), 2))
        masks = [
            np.roll(truth[row], tuple(by), (0, 1)) for row, by in zip(rows, shift, strict=True)
        ]
        masks = np.array(masks) & (draw.random((len(rows), *SIZE)) < 0.97)
        boxes = np.concatenate([r.truth.xywh[:, :2], r.truth.xywh[:, :2] + r.truth.xywh[:, 2:]], 1)
        boxes = boxes[rows] + draw.normal(0, 4, (len(rows), 4))
        labels = np.where(draw.random(len(rows)) < 0.2, 0, r.truth.labels[rows])
        scores = draw.integers(1, 20, len(rows)) / 20
        found.append(detections(r.image_id, boxes, scores, labels, masks))
    return reader, found, content


@pytest.mark.parametrize("backend", ["pycocotools", "faster-coco-eval"])
@pytest.mark.parametrize("max_dets", [1, 100])
def test_masks_equal_pycocotools(masked, backend, max_dets):
    if importlib.util.find_spec("faster_coco_eval") is None and backend != "pycocotools":
        pytest.skip("faster-coco-eval not installed")
    reader, found, content = masked
    evaluator = evaluate(reader, found, backend=backend)
    result, rows = evaluator.result(), evaluator.detections_json()
    images = [r.image_id for r in reader.records]
    masks = [{key: row[key] for key in row if key != "bbox"} for row in rows]
    assert figures(result) == pytest.approx(official(content, rows, images), abs=1e-9)
    expected = official(content, masks, images, "segm")
    assert figures(result["segm"]) == pytest.approx(expected, abs=1e-9)
    assert len({round(value, 3) for value in figures(result) + expected}) > 9
    classes = result["segm"]["per_class"]
    assert [c["objects"] for c in classes.values()] == [
        sum(not item["iscrowd"] for item in content["annotations"] if item["category_id"] == label)
        for label in range(1, 5)
    ]
    assert np.mean([c["AP"] for c in classes.values()]) == pytest.approx(result["segm"]["AP"])
    limited = evaluate(reader, found, backend=backend, max_dets=max_dets).result()["segm"]["AP"]
    assert (
        limited == pytest.approx(expected[0], abs=1e-9)
        if max_dets == 100
        else limited < expected[0]
    )


def test_masks_are_read_back(masked, tmp_path):
    """The file's rows give the same figures; masks are made image by image."""
    reader, found, _ = masked
    evaluator = evaluate(reader, found)
    file = tmp_path / "detections.json"
    file.write_text(json.dumps(evaluator.detections_json(), allow_nan=False))
    again = evaluate(reader, read_detections(file, reader))
    assert again.result() == evaluator.result()
    first = next(read_detections(file, reader))
    assert first.masks.shape == (len(first.scores), *SIZE)
    assert first.masks.dtype == torch.bool


def test_detections_without_masks_are_refused_where_there_are_masks(masked):
    reader, found, _ = masked
    bare = Detections(found[0].image_id, found[0].boxes, found[0].scores, found[0].labels)
    with pytest.raises(UserError, match=r"COCO test: has masks, but the model finds boxes only"):
        COCOEvaluator(reader).update(bare)
    with pytest.raises(UserError, match="has masks"):
        COCOEvaluator(reader).update(detections(found[0].image_id, [], [], []))
    plain = FakeReader("x", ["a"], [1], [record(1, [(0, 0, 10, 10)], [0])])
    masks = np.ones((1, 100, 100), bool)
    evaluator = evaluate(plain, [detections(1, [(0, 0, 10, 10)], [0.5], [0], masks)])
    assert "segm" not in evaluator.result()
    assert evaluator.detections_json()[0]["segmentation"]["size"] == [100, 100]


@pytest.mark.parametrize("shape", [(1, 100, 99), (2, 100, 100), (0, 100, 100)])
def test_masks_of_another_shape(shape):
    reader = FakeReader("x", ["a"], [1], [record(1, [(0, 0, 10, 10)], [0])])
    wrong = detections(1, [(0, 0, 10, 10)], [0.5], [0], np.ones(shape, bool))
    with pytest.raises(ValueError, match=r"masks of shape .*, wanted 1 of \(100, 100\) pixels"):
        COCOEvaluator(reader).update(wrong)


def test_masks_without_a_pixel_and_of_rows_that_do_not_count():
    """An empty mask matches nothing; a row that is dropped takes its mask with it."""
    truth, nothing = np.zeros((1, 100, 100), bool), np.zeros((1, 100, 100), bool)
    truth[:, :10, :10] = True
    reader = FakeReader("x", ["a"], [1], [record(1, [(0, 0, 10, 10)], [0], masks=truth)])
    boxes, scores = [(0, 0, 10, 10), (float("nan"), 0, 10, 10), (0, 0, 10, 10)], [0.9, 0.8, 0.7]
    masks = np.concatenate([nothing, nothing, truth])
    evaluator = evaluate(reader, [detections(1, boxes, scores, [0, 0, 0], masks)])
    result = evaluator.result()
    assert result["AP"] == pytest.approx(1.0)
    assert result["segm"]["AP"] == pytest.approx(0.5)  # the second of two is right
    assert evaluator.dropped == 1
    assert [len(row["segmentation"]["counts"]) > 4 for row in evaluator.detections_json()] == [
        False, True,
    ]  # fmt: skip
    none = evaluate(reader, [detections(1, [], [], [], np.zeros((0, 100, 100)))]).result()
    assert (none["AP"], none["segm"]["AP"]) == (0.0, 0.0)
    empty = FakeReader("x", ["a"], [1], [record(1, [(0, 0, 10, 10)], [0], masks=nothing)])
    for mask in (nothing, truth):
        result = evaluate(empty, [detections(1, boxes[:1], [0.9], [0], mask)]).result()
        assert (result["AP"], result["segm"]["AP"]) == (pytest.approx(1.0), 0.0)
    assert COCOEvaluator(reader).result()["segm"]["AP"] is None


@pytest.mark.skipif(
    importlib.util.find_spec("faster_coco_eval") is None, reason="faster-coco-eval not installed"
)
@settings(max_examples=40)
@given(data=data_sets())
def test_faster_coco_eval_gives_the_same(data):
    def flat(result):
        classes = [value for c in result["per_class"].values() for value in c.values()]
        return [result[name] for name in FIGURES] + classes

    for max_dets in (1, 100):
        slow, fast = (
            flat(evaluate(*data, max_dets=max_dets, backend=backend).result())
            for backend in ("pycocotools", "faster-coco-eval")
        )
        assert fast == pytest.approx(slow, abs=1e-12)


def test_backend_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^backend: .*faster-coco-eval is not installed"):
        COCOEvaluator(FakeReader("x", ["a"], [1], []), backend="faster-coco-eval")
    assert not COCOEvaluator(FakeReader("x", ["a"], [1], [])).fast


def test_first_annotation_counts(capsys):
    """pycocotools would lose the match of the annotation with id 0; nothing is printed."""
    reader = FakeReader("x", ["a"], [1], [record(1, [(0, 0, 10, 10)], [0])])
    evaluator = evaluate(reader, [detections(1, [(0, 0, 10, 10)], [0.5], [0])])
    assert evaluator.result()["AP"] == pytest.approx(1.0)
    assert capsys.readouterr().out == ""


def test_best_detections_count_up_to_max_dets():
    reader = FakeReader("x", ["a"], [1], [record(1, [(0, 0, 10, 10), (50, 50, 20, 20)], [0, 0])])
    found = [detections(1, [(0, 0, 10, 10), (50, 50, 70, 70)], [0.9, 0.8], [0, 0])]
    assert evaluate(reader, found).result()["AP"] == pytest.approx(1.0)
    # One of two objects found: precision 1 at the 51 recalls up to 0.5.
    assert evaluate(reader, found, max_dets=1).result()["AP"] == pytest.approx(51 / 101)
    with pytest.raises(ValueError, match="max_dets: must be at least 1"):
        COCOEvaluator(reader, max_dets=0)


def test_annotated_areas_decide_the_size():
    """A large box with a small mask is a small object."""
    reader = FakeReader("x", ["a"], [1], [record(1, [(0, 0, 200, 200)], [0], areas=[500])])
    result = evaluate(reader, [detections(1, [(0, 0, 200, 200)], [0.9], [0])]).result()
    assert result["APs"] == pytest.approx(1.0)
    assert (result["APm"], result["APl"]) == (None, None)


def test_nothing_found_is_zero_and_no_objects_is_undefined():
    records = [record("i", [(0, 0, 10, 10)], [0]), record("j", [(0, 0, 5, 5)], [1], [True])]
    reader = FakeReader("x", ["a", "b"], [1, 2], records)
    empty = [detections("i", [], [], []), detections("j", [], [], [])]
    result = evaluate(reader, empty).result()
    assert [result[name] for name in FIGURES] == [0.0, 0.0, 0.0, 0.0, None, None]
    assert result["per_class"]["a"] == {"AP": 0.0, "AP50": 0.0, "objects": 1}
    assert result["per_class"]["b"] == {"AP": None, "AP50": None, "objects": 0}
    for found in ([], empty[1:], [detections("j", [(0, 0, 5, 5)], [0.9], [1])]):
        result = evaluate(reader, found).result()
        assert [result[name] for name in FIGURES] == [None] * 6
    json.dumps(result, allow_nan=False)


def test_only_evaluated_images_count():
    records = [record(5, [(0, 0, 10, 10)], [0]), record(6, [(0, 0, 10, 10)], [0])]
    reader = FakeReader("x", ["a"], [1], records)
    result = evaluate(reader, [detections(6, [(0, 0, 10, 10)], [0.9], [0])]).result()
    assert result["AP"] == pytest.approx(1.0)
    assert result["per_class"]["a"]["objects"] == 1


@settings(max_examples=25)
@given(data=data_sets(), draw=st.data())
def test_non_finite_rows_change_nothing(data, draw):
    reader, found = data
    clean, dirty = evaluate(reader, found), COCOEvaluator(reader)
    for one in found:
        bad = torch.tensor([[1.0, 1.0, 5.0, 5.0, 0.99]])
        bad[0, draw.draw(st.integers(0, 4))] = draw.draw(
            st.sampled_from([float("nan"), float("inf"), float("-inf")])
        )
        dirty.update(Detections(
            one.image_id, torch.cat([bad[:, :4], one.boxes]), torch.cat([bad[:, 4], one.scores]),
            torch.cat([torch.zeros(1, dtype=torch.int64), one.labels]),
        ))  # fmt: skip
    assert dirty.dropped == len(found)
    assert dirty.result() == clean.result()


@settings(max_examples=25)
@given(data=data_sets())
def test_numbering_changes_nothing(data):
    """Other category ids, image ids with the same order, records in another order."""
    reader, found = data
    renamed = FakeReader("x", reader.classes, [70, 2, 11], [
        record(f"{r.image_id:05d}", r.truth.xywh, r.truth.labels, r.truth.ignore)
        for r in reversed(reader.records)
    ])  # fmt: skip
    moved = [Detections(f"{d.image_id:05d}", d.boxes, d.scores, d.labels) for d in found]
    assert evaluate(renamed, moved).result() == evaluate(reader, found).result()
