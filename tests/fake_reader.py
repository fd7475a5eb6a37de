"""A data set made of numbers, for the evaluators' tests."""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from dcdet.datasets.records import Record, Truth
from dcdet.structures import Detections


@dataclass
class FakeReader:
    name: str
    classes: list[str]
    category_ids: list[int]
    records: list[Record]


def record(image_id, xywh, labels, ignore=None, areas=None) -> Record:
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
        ),
    )


def detections(image_id, boxes, scores, labels) -> Detections:
    return Detections(
        image_id,
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(labels, dtype=torch.int64),
    )


@st.composite
def data_sets(draw, num_classes: int = 3, most_images: int = 4):
    """(reader, detections): crowded, with ties in score and overlap, and truth without finds."""
    place, side = st.integers(0, 12), st.integers(1, 12)
    ids = draw(st.lists(st.integers(1, 99), min_size=1, max_size=most_images, unique=True))
    records, found = [], []
    for image_id in ids:
        objects = draw(st.lists(st.tuples(place, place, side, side, st.integers(0, num_classes - 1),
                                          st.sampled_from([False, False, True])), max_size=6))
        records.append(record(image_id, [o[:4] for o in objects], [o[4] for o in objects],
                              [o[5] for o in objects]))
        rows = draw(st.lists(st.tuples(place, place, side, side, st.integers(0, num_classes - 1),
                                       st.integers(0, 6), st.sampled_from([0.0, 0.26, 0.5])),
                             max_size=10))
        # Some detections are exactly on an object, so that there is something to find.
        rows += [(*o[:5], draw(st.integers(0, 6)), 0.0) for o in objects if draw(st.booleans())]
        found.append(detections(image_id, [(x + d, y, x + d + w, y + h)
                                           for x, y, w, h, _, _, d in rows],
                                [s / 8 for *_, s, _ in rows], [row[4] for row in rows]))
    names = [f"class {number}" for number in range(num_classes)]
    reader = FakeReader("fake 2007_test", names, [3, 17, 90][:num_classes], records)
    return reader, found
