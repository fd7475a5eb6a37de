import json

import numpy as np
import pytest
import torch
from fake_reader import FakeReader, data_sets, detections, record
from hypothesis import given, settings
from hypothesis import strategies as st

from dcdet.errors import UserError
from dcdet.evaluators.results import read_detections
from dcdet.evaluators.voc import VOCEvaluator, average_precision, curve
from dcdet.structures import Detections


def evaluate(reader, found, **options):
    evaluator = VOCEvaluator(reader, **options)
    for one in found:
        evaluator.update(one)
    return evaluator.result()


def written(found, category):
    """The lines of the release's detection file of one class, parsed again."""
    lines = []
    for one in found:
        rows = zip(one.boxes.tolist(), one.scores.tolist(), one.labels.tolist(), strict=True)
        for (x1, y1, x2, y2), score, label in rows:
            if label == category:  # 0-based inclusive corners there, plus 1
                lines.append(
                    f"{one.image_id} {score:.3f} {x1 + 1:.1f} {y1 + 1:.1f} "
                    f"{x2 - 1 + 1:.1f} {y2 - 1 + 1:.1f}"
                )
    return [(line.split()[0], *map(float, line.split()[1:])) for line in lines]


def slow_average_precision(reader, found, category, threshold, eleven_points):
    """The 2017 release's rules in plain loops, one detection after the other over all images."""
    places = {str(r.image_id): place for place, r in enumerate(reader.records)}
    objects = {}
    for r in reader.records:
        truth = r.truth
        objects[str(r.image_id)] = [
            [x + 1, y + 1, x + w, y + h, bool(hard), False]
            for (x, y, w, h), of, hard in zip(truth.xywh, truth.labels, truth.ignore, strict=True)
            if of == category
        ]
    total = sum(not o[4] for group in objects.values() for o in group)
    if total == 0:
        return None
    found = sorted(found, key=lambda one: places[str(one.image_id)])
    right = wrong = 0
    points = []
    for image_id, _, *box in sorted(written(found, category), key=lambda line: -line[1]):
        best, best_overlap = None, -1.0
        for thing in objects[image_id]:
            width = min(box[2], thing[2]) - max(box[0], thing[0]) + 1
            height = min(box[3], thing[3]) - max(box[1], thing[1]) + 1
            inter = max(width, 0) * max(height, 0)
            area = (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
            other = (thing[2] - thing[0] + 1) * (thing[3] - thing[1] + 1)
            overlap = inter / (area + other - inter)
            if overlap > best_overlap:
                best, best_overlap = thing, overlap
        if best is not None and best_overlap > threshold:
            if best[4]:
                continue
            if best[5]:
                wrong += 1
            else:
                right += 1
                best[5] = True
        else:
            wrong += 1
        points.append((right / total, right / (right + wrong)))
    if eleven_points:
        total_precision = 0.0
        for step in range(11):
            recall = step * 0.1  # 3 * 0.1 > 0.3, as in numpy's arange
            total_precision += max((p for r, p in points if r >= recall), default=0.0) / 11
        return total_precision
    area, before = 0.0, 0.0
    for recall in sorted({r for r, _ in points}):
        area += (recall - before) * max(p for r, p in points if r >= recall)
        before = recall
    return area


@pytest.mark.parametrize("metric", ["11point", "area"])
@settings(max_examples=150)
@given(data=data_sets())
def test_equals_plain_loops(metric, data):
    reader, found = data
    result = evaluate(reader, found, metric=metric)
    for category, name in enumerate(reader.classes):
        for threshold in (0.5, 0.7):
            expected = slow_average_precision(
                reader, found, category, threshold, metric == "11point"
            )
            got = result["per_class"][name][f"AP@{threshold}"]
            assert got == (None if expected is None else pytest.approx(expected, abs=1e-12))
    for threshold in (0.5, 0.7):
        values = [c[f"AP@{threshold}"] for c in result["per_class"].values()]
        values = [v for v in values if v is not None]
        expected = pytest.approx(sum(values) / len(values)) if values else None
        assert result[f"mAP@{threshold}"] == expected


def test_golden_average_precision(shared):
    golden = np.load(shared / "golden" / "ops" / "utils_voc_ap.npz")
    recall, precision = curve(golden["tp"] > 0, int(golden["npos"][0]))
    np.testing.assert_allclose(recall, golden["rec"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(precision, golden["prec"], rtol=0, atol=1e-12)
    assert average_precision(recall, precision, True) == pytest.approx(golden["ap07"][0], abs=1e-12)
    assert average_precision(recall, precision, False) == pytest.approx(
        golden["ap12"][0], abs=1e-12
    )


def test_worked_example():
    """Two objects; found: the first, the first again, a difficult one, nothing, the second."""
    reader = FakeReader("x", ["a"], [1], [
        record("i", [(0, 0, 10, 10), (50, 50, 10, 10), (20, 20, 10, 10)], [0, 0, 0],
               [False, False, True]),
    ])  # fmt: skip
    found = [detections("i", [(0, 0, 10, 10), (1, 0, 10, 10), (20, 20, 30, 30), (80, 0, 90, 9),
                              (50, 50, 60, 60)], [0.9, 0.8, 0.7, 0.6, 0.5], [0] * 5)]  # fmt: skip
    # Precision 1 at recall 1/2, 2/4 at recall 1.
    assert evaluate(reader, found, metric="area")["mAP@0.5"] == pytest.approx(0.75)
    eleven = evaluate(reader, found, metric="11point")
    assert eleven["mAP@0.5"] == pytest.approx((6 * 1 + 5 * 0.5) / 11)
    assert eleven["per_class"] == {
        "a": {"AP@0.5": eleven["mAP@0.5"], "AP@0.7": eleven["mAP@0.7"], "objects": 2}
    }


def test_overlap_must_exceed_the_threshold():
    reader = FakeReader("x", ["a"], [1], [record("i", [(0, 0, 10, 10)], [0])])
    half = evaluate(reader, [detections("i", [(0, 0, 10, 5)], [0.5], [0])])
    assert half["mAP@0.5"] == 0.0
    more = evaluate(reader, [detections("i", [(0, 0, 10, 5.1)], [0.5], [0])])
    assert more["mAP@0.5"] == 1.0


def test_text_file_rounds_scores_and_corners():
    """A wrong detection that is ahead by 0.0002 only ties in the file, where order decides."""
    reader = FakeReader("x", ["a"], [1], [record("i", [(0, 0, 10, 10)], [0])])
    found = [detections("i", [(0, 0, 10, 10), (50, 50, 60, 60)], [0.9001, 0.9003], [0, 0])]
    assert evaluate(reader, found, metric="area", through_text=True)["mAP@0.5"] == 1.0
    assert evaluate(reader, found, metric="area", through_text=False)["mAP@0.5"] == 0.5
    # 5.04 of 10 rows is more than a half, but the file says 5.0.
    found = [detections("i", [(0, 0, 10, 5.04)], [0.9], [0])]
    assert evaluate(reader, found, through_text=True)["mAP@0.5"] == 0.0
    assert evaluate(reader, found, through_text=False)["mAP@0.5"] == 1.0


@pytest.mark.parametrize(
    ("name", "metric", "eleven_points"),
    [
        ("VOC 2007_test", "auto", True),
        ("VOC 2007_trainval+2012_trainval", "auto", False),
        ("VOC 2012_val", "auto", False),
        ("VOC test", "auto", False),
        ("VOC test", "11point", True),
        ("VOC 2007_test", "area", False),
    ],
)
def test_metric_by_year(name, metric, eleven_points):
    reader = FakeReader(name, ["a"], [1], [])
    assert VOCEvaluator(reader, metric=metric).eleven_points is eleven_points


def test_nothing_found_is_zero_and_no_objects_is_undefined():
    records = [record("i", [(0, 0, 10, 10)], [0]), record("j", [(0, 0, 5, 5)], [1], [True])]
    reader = FakeReader("x", ["a", "b"], [1, 2], records)
    result = evaluate(reader, [detections("i", [], [], []), detections("j", [], [], [])])
    assert result["mAP@0.5"] == 0.0
    assert result["per_class"]["a"]["AP@0.5"] == 0.0
    assert result["per_class"]["b"] == {"AP@0.5": None, "AP@0.7": None, "objects": 0}
    only_difficult = evaluate(reader, [detections("j", [(0, 0, 5, 5)], [0.9], [1])])
    assert only_difficult["mAP@0.7"] is None
    assert evaluate(reader, [])["mAP@0.5"] is None
    json.dumps(result, allow_nan=False)


def test_only_evaluated_images_count():
    records = [record("i", [(0, 0, 10, 10)], [0]), record("j", [(0, 0, 10, 10)], [0])]
    reader = FakeReader("x", ["a"], [1], records)
    result = evaluate(reader, [detections("i", [(0, 0, 10, 10)], [0.9], [0])])
    assert result["mAP@0.5"] == 1.0
    assert result["per_class"]["a"]["objects"] == 1


HOSTILE = [float("nan"), float("inf"), float("-inf")]


@settings(max_examples=60)
@given(data=data_sets(), draw=st.data())
def test_non_finite_rows_are_dropped_and_counted(data, draw):
    reader, found = data
    clean = VOCEvaluator(reader)
    dirty = VOCEvaluator(reader)
    added = 0
    for one in found:
        clean.update(one)
        rows = torch.cat([one.boxes, one.scores[:, None], one.labels[:, None].float()], dim=1)
        for _ in range(draw.draw(st.integers(0, 3))):
            bad = [1.0, 1.0, 5.0, 5.0, 0.9, 0.0]
            bad[draw.draw(st.integers(0, 4))] = draw.draw(st.sampled_from(HOSTILE))
            place = draw.draw(st.integers(0, len(rows)))
            rows = torch.cat([rows[:place], torch.tensor([bad]), rows[place:]])
            added += 1
        dirty.update(Detections(one.image_id, rows[:, :4], rows[:, 4], rows[:, 5].long()))
    assert dirty.result() == clean.result()
    assert dirty.detections_json() == clean.detections_json()
    assert (clean.dropped, dirty.dropped) == (0, added)


def test_wrong_image_and_label_are_refused():
    evaluator = VOCEvaluator(FakeReader("a set", ["a", "b"], [1, 2], [record("i", [], [])]))
    with pytest.raises(ValueError, match=r"image 'j' is not in a set"):
        evaluator.update(detections("j", [], [], []))
    with pytest.raises(ValueError, match="label 2 with 2 classes"):
        evaluator.update(detections("i", [(0, 0, 1, 1)], [0.5], [2]))


@settings(max_examples=40)
@given(data=data_sets(), seed=st.integers(0, 9))
def test_order_of_updates_changes_nothing(data, seed):
    """As images arrive from several processes; the last word on an image counts."""
    reader, found = data
    evaluator = VOCEvaluator(reader)
    for place in np.random.default_rng(seed).permutation(2 * len(found)):
        evaluator.update(found[place % len(found)])
    straight = VOCEvaluator(reader)
    for one in found:
        straight.update(one)
    assert evaluator.result() == straight.result()
    assert evaluator.detections_json() == straight.detections_json()


def test_detections_json_has_original_ids_and_strict_numbers():
    reader = FakeReader("x", ["a", "b"], [3, 90], [record("000007", [], []), record(12, [], [])])
    evaluator = VOCEvaluator(reader)
    evaluator.update(detections(12, [(1, 2, 4, 8.5), (3e38, 0, -3e38, 3e38)], [0.5, 0.25], [1, 0]))
    evaluator.update(detections("000007", [(0, 0, 1, 1)], [1.0], [0]))
    rows = json.loads(json.dumps(evaluator.detections_json(), allow_nan=False))
    assert rows[:2] == [
        {"image_id": "000007", "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1.0},
        {"image_id": 12, "category_id": 90, "bbox": [1, 2, 3, 6.5], "score": 0.5},
    ]
    assert rows[2]["bbox"][2] == 0.0


@settings(max_examples=60)
@given(data=data_sets())
def test_results_file_read_back_gives_the_same_figures(tmp_path_factory, data):
    reader, found = data
    evaluator = VOCEvaluator(reader)
    for one in found:
        evaluator.update(one)
    path = tmp_path_factory.mktemp("results") / "detections.json"
    path.write_text(json.dumps(evaluator.detections_json()))
    again = VOCEvaluator(reader)
    for one in found:
        again.update(detections(one.image_id, [], [], []))
    for one in read_detections(path, reader):
        assert (one.scores.diff() <= 0).all()
        again.update(one)
    assert again.result() == evaluator.result()


GOOD = {"image_id": 5, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5}


def with_mask(counts, size=(100, 100)):
    return {**GOOD, "segmentation": {"size": list(size), "counts": counts}}


MASKED = with_mask([5000, 5000])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([MASKED, GOOD], r"\[1\].segmentation: is missing, unlike in \[0\]"),
        ([GOOD, MASKED], r"\[1\].segmentation: is there, unlike in \[0\]"),
        ([{**GOOD, "segmentation": None}], "segmentation: must be run lengths"),
        ([{**GOOD, "segmentation": [[1, 1, 5, 1, 5, 5]]}], "segmentation: must be run lengths"),
        ([{**GOOD, "segmentation": {}}], "segmentation: run lengths of another size"),
        ([with_mask("h3", [100, 99])], "segmentation: run lengths of another size than the image"),
        ([with_mask([5000, 5001])], "segmentation: run lengths that do not fill the image$"),
        ([MASKED, with_mask("h")], r"\[1\].segmentation: run lengths that cannot be decompressed"),
        ([with_mask(None)], "segmentation: run lengths that are not letters or whole numbers"),
    ],
)
def test_malformed_masks_are_named_before_the_first_image(tmp_path, rows, message):
    path = tmp_path / "detections.json"
    path.write_text(json.dumps(rows))
    reader = FakeReader("the set", ["a"], [3], [record(5, [], [])])
    with pytest.raises(UserError, match=message) as error:
        read_detections(path, reader)
    assert str(path) in str(error.value)


def test_masks_of_a_results_file(tmp_path):
    """Letters or numbers, best score first; an empty mask is one."""
    path = tmp_path / "detections.json"
    rows = [{**with_mask([10000]), "score": 0.1}, with_mask([100, 200, 9700])]
    path.write_text(json.dumps(rows))
    [found] = read_detections(path, FakeReader("the set", ["a"], [3], [record(5, [], [])]))
    assert found.masks.flatten(1).sum(1).tolist() == [200, 0]
    assert found.masks[0, :, 1:3].all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "holds a dict, wanted a list"),
        ([1], r"\[0\]: is a int"),
        ([GOOD, {**GOOD, "image_id": 6}], r"\[1\].image_id: 6 is not in the set"),
        ([{**GOOD, "image_id": True}], "image_id: True"),
        ([{**GOOD, "image_id": [5]}], "image_id"),
        ([{**GOOD, "category_id": "3"}], "category_id: '3'"),
        ([{**GOOD, "category_id": None}], "category_id: None"),
        ([{**GOOD, "bbox": [1, 2, 3]}], r"bbox: is \[1, 2, 3\], wanted four"),
        ([{**GOOD, "bbox": [1, 2, "3", 4]}], "bbox: .*wanted four"),
        ([{**GOOD, "bbox": [1, 2, -3, 4]}], r"bbox: .*wanted x, y, width, height"),
        ([{**GOOD, "score": float("nan")}], "score: is nan"),
        ([{**GOOD, "score": float("inf")}], "score: is inf"),
        ([{**GOOD, "score": "1e400"}], "score"),
        ([{k: v for k, v in GOOD.items() if k != "score"}], "score: is None"),
    ],
)
def test_malformed_results_file_is_named(tmp_path, content, message):
    path = tmp_path / "detections.json"
    if isinstance(content, list):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    reader = FakeReader("the set", ["a"], [3], [record(5, [], [])])
    with pytest.raises(UserError, match=message) as error:
        read_detections(path, reader)
    assert str(path) in str(error.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from([*GOOD, "size", "counts"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150)
@given(rows=st.lists(st.one_of(json_values, st.fixed_dictionaries({
    "image_id": st.just(5) | json_values, "category_id": st.just(3) | json_values,
    "bbox": st.just([1, 2, 3, 4]) | json_values, "score": st.just(0.5) | json_values,
}, optional={
    "segmentation": st.just(MASKED["segmentation"]) | json_values,
})), max_size=3))  # fmt: skip
def test_any_json_is_read_or_named(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(rows))
    reader = FakeReader("the set", ["a"], [3], [record(5, [], [])])
    try:
        found = read_detections(path, reader)
    except UserError as error:
        assert str(error.where).startswith(f"{path}: [")  # noqa: PT017
    else:
        assert sum(len(one.scores) for one in found) == len(rows)
        assert all(one.boxes.isfinite().all() for one in found)
