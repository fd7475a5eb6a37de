"""What a data set reader delivers (records) and what it found wrong (problems)."""

import logging
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from dcdet.errors import UserError

log = logging.getLogger("dcdet.datasets")

# A box that is thinner than this after clipping, in pixels, is dropped: float32 could not keep
# x1 < x2 through a rescale.
MIN_BOX_SIDE = 0.1
LARGEST = 1e7  # no box number of a real image is beyond this
NAMED_PROBLEMS = 10


@dataclass(frozen=True, eq=False)
class Truth:
    """Every usable annotation of one image, as evaluation needs it: A annotations.

    Shapes: xywh (A, 4) float64: x, y, width, height in continuous pixels, exactly as annotated,
    not clipped; labels (A,) int64; ignore (A,) bool: VOC difficult, COCO crowd; areas (A,) float64
    square pixels; ids (A,) int64. masks: one array of letters for all of them, see `mask_array`;
    None where the reader was not asked for masks.
    """

    xywh: np.ndarray
    labels: np.ndarray
    ignore: np.ndarray
    areas: np.ndarray
    ids: np.ndarray
    masks: np.ndarray | None = None

    def run_lengths(self) -> list[bytes] | None:
        """The compressed run lengths (masks.py) of the A masks."""
        return None if self.masks is None else self.masks.tobytes().split()


@dataclass(frozen=True, eq=False)
class Record:
    """One image of a data set, for training: N objects, M ignored regions.

    `size` is (h, w) as annotated, (0, 0) where unknown. Shapes: boxes (N, 4) and ignored (M, 4)
    float32, continuous xyxy with 0 <= x1 < x2 <= w; labels (N,) int64. The N objects are the
    annotations of `truth` that are not to be ignored, in the same order.
    """

    path: str
    image_id: int | str
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    truth: Truth

    @property
    def masks(self) -> list[bytes] | None:
        """The compressed run lengths of the N objects' masks, None without masks."""
        masks = self.truth.run_lengths()
        if masks is None:
            return None
        return [mask for mask, ignore in zip(masks, self.truth.ignore, strict=True) if not ignore]


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a data set: `where` names file, line or index; `kind` is for counting."""

    where: str
    what: str
    kind: str
    image_id: int | str | None = None
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class DataError(UserError):
    """A data set that cannot be used; `problems` lists everything that was found."""

    def __init__(self, where: object, what: str, hint: str, problems: list[Problem]) -> None:
        super().__init__(where, what, hint)
        self.problems = problems


@dataclass
class ProblemList:
    """Collects problems while a reader reads; `finish` raises or logs them."""

    strict: bool
    items: list[Problem] = field(default_factory=list)

    def add(
        self,
        where: object,
        what: str,
        kind: str,
        image_id: int | str | None = None,
        *,
        fatal: bool = False,
    ) -> None:
        self.items.append(Problem(str(where), what, kind, image_id, fatal))

    def finish(self, name: str, num_images: int) -> list[Problem]:
        """Log what was found; raise DataError at a fatal problem, or at any when strict."""
        stops = [p for p in self.items if p.fatal or self.strict]
        if stops:
            first, rest = stops[0], len(stops) - 1
            hint = f"and {rest} more; `dcdet check CONFIG` lists them" if rest else ""
            raise DataError(first.where, first.what, hint, self.items)
        for number, problem in enumerate(self.items):
            log.log(logging.WARNING if number < NAMED_PROBLEMS else logging.DEBUG, "%s", problem)
        if self.items:
            counts = count_kinds(self.items)
            log.warning("%s: %d images, problems: %s", name, num_images, counts)
        return self.items


def count_kinds(problems: Iterable[Problem]) -> str:
    """The problems counted by kind, most frequent first: "2 x degenerate box, 1 x no images"."""
    counts = Counter(problem.kind for problem in problems)
    return ", ".join(f"{number} x {kind}" for kind, number in counts.most_common())


def clean_box(
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    thinnest: float = MIN_BOX_SIDE,
) -> tuple[tuple[float, float, float, float] | None, str]:
    """A continuous xyxy box clipped to an image of `size` (h, w), and what was wrong with it.

    None instead of a box that is not usable. A box that reaches at most one pixel out of the image
    is clipped without a word: annotators count from 0 or from 1.
    """
    if not all(abs(value) <= LARGEST for value in box):  # false for NaN too
        return None, "non-finite or huge box"
    x1, y1, x2, y2 = box
    if x2 <= x1 or y2 <= y1:
        return None, "degenerate box"
    height, width = size if size != (0, 0) else (float("inf"), float("inf"))
    clipped = (max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height))
    if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
        return None, "box outside the image"
    if min(clipped[2] - clipped[0], clipped[3] - clipped[1]) < thinnest:
        return None, "sub-pixel box"
    partly = x1 < -1 or y1 < -1 or x2 > width + 1 or y2 > height + 1
    return clipped, "box partly outside the image (clipped)" if partly else ""


def path_inside(folder: str, name: str) -> str | None:
    """`folder`/`name`, or None where that leaves the folder: "..", absolute, URL, symbolic link.

    None also for a name that no file can have.
    """
    inside = os.path.normpath(name)
    if not name or "\0" in name or "://" in name or os.path.isabs(name) or inside[:2] == "..":
        return None
    try:
        os.fsencode(inside)
    except UnicodeEncodeError:
        return None
    path = os.path.join(folder, inside)
    # Only a path with a link in it can lead elsewhere, and looking for one link is cheap.
    if os.path.islink(path) or os.path.dirname(inside):
        real = os.path.realpath(path)
        if not real.startswith(os.path.realpath(folder) + os.sep):
            return None
    return path


def have_masks(records: Iterable[Record]) -> bool:
    """Whether a data set has instance masks."""
    return any(record.truth.masks is not None for record in records)


def mask_array(masks: list[bytes]) -> np.ndarray:
    """Compressed run lengths as one array of letters, parted by spaces.

    Many small Python objects would be copied to every worker, as soon as it counts references.
    """
    return np.frombuffer(b" ".join(masks), dtype=np.uint8)


def box_array(boxes: list[tuple[float, float, float, float]]) -> np.ndarray:
    """Boxes as (N, 4) float32, also when there are none."""
    return np.array(boxes, dtype=np.float32).reshape(-1, 4)
