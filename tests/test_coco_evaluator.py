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
from dcdet.evaluators.coco import COCOEvaluator
from dcdet.structures import Detections

FIGURES = ["AP", "AP50", "AP75", "APs", "APm", "APl"]


def evaluate(reader, found, **options):
    evaluator = COCOEvaluator(reader, **options)
    for one in found:
        evaluator.update(one)
    return evaluator


def official(annotations, results, images):
    """pycocotools' own six figures, from a COCO dictionary and results, for some images."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = OfficialCOCO()
        truth.dataset = annotations
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
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
