"""A data set made of numbers, for the evaluators' tests."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from dcdet.datasets.records import Record, Truth, mask_array
from dcdet.masks import encode
from dcdet.structures import Detections


@dataclass
class FakeReader:
    name: str
    classes: list[str]
    category_ids: list[int]
    records: list[Record]


def record(
    image_id: int | str, xywh: Any, labels: Any, ignore: Any = None, areas: Any = None,
    masks: Any = None,
) -> Record:  # fmt: skip
    """A record with the given truth; boxes for training, which evaluators must not use, are odd."""
    corners = np.array(xywh, dtype=np.float64).reshape(-1, 4)
    number = len(corners)
    return Record(
        path=f"{image_id}.jpg",
        image_id=image_id,
        size=(100, 100),
        boxes=np.full((1, 4), 7, dtype=np.float32),
        labels=np.zeros(1, dtype=np.int64),
        ignored=np.zeros((0, 4), dtype=np.float32),
        truth=Truth(
            xywh=corners,
            labels=np.array(labels, dtype=np.int64),
            ignore=np.zeros(number, bool) if ignore is None else np.array(ignore, dtype=bool),
            areas=corners[:, 2] * corners[:, 3] if areas is None else np.array(areas, np.float64),
            ids=np.arange(number),
            masks=None
            if masks is None
            else mask_array([rle["counts"].encode() for rle in encode(torch.tensor(masks))]),
        ),
    )


def detections(
    image_id: int | str, boxes: Any, scores: Any, labels: Any, masks: Any = None
) -> Detections:
    return Detections(
        image_id,
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(labels, dtype=torch.int64),
        None if masks is None else torch.tensor(masks, dtype=torch.bool),
    )


@st.composite
def data_sets(draw: st.DrawFn) -> tuple[FakeReader, list[Detections]]:
    """Up to 4 images of 3 classes: crowded, with ties in score and overlap, and misses."""
    place, side = st.integers(0, 12), st.integers(1, 12)
    box_and_class = (place, place, side, side, st.integers(0, 2))
    an_object = st.tuples(*box_and_class, st.sampled_from([False, False, True]))
    a_detection = st.tuples(*box_and_class, st.integers(0, 6), st.sampled_from([0.0, 0.26, 0.5]))
    ids = draw(st.lists(st.integers(1, 99), min_size=1, max_size=4, unique=True))
    records, found = [], []
    for image_id in ids:
        objects = draw(st.lists(an_object, max_size=6))
        truth = ([o[:4] for o in objects], [o[4] for o in objects], [o[5] for o in objects])
        records.append(record(image_id, *truth))
        rows = draw(st.lists(a_detection, max_size=10))
        # Some detections are exactly on an object, so that there is something to find.
        rows += [(*o[:5], draw(st.integers(0, 6)), 0.0) for o in objects if draw(st.booleans())]
        boxes = [(x + d, y, x + d + w, y + h) for x, y, w, h, _, _, d in rows]
        scores = [score / 8 for *_, score, _ in rows]
        found.append(detections(image_id, boxes, scores, [row[4] for row in rows]))
    return FakeReader("fake 2007_test", ["a", "b", "c"], [3, 17, 90], records), found
