"""`dcdet check CONFIG`: read a config's data sets once and report everything wrong in them."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dcdet.config import Config
from dcdet.datasets.label_maps import LabelledImage, SegmentationDataset, check_size
from dcdet.datasets.loader import DataSection, DetectionDataset, Reader, View, test_loader
from dcdet.datasets.records import DataError, Problem
from dcdet.datasets.transforms import BadImage, read_image
from dcdet.engine.setup import misfits, read_data_set
from dcdet.errors import UserError
from dcdet.registry import check as check_config
from dcdet.registry import task_of
from dcdet.structures import UNLABELLED

Write = Callable[[str], None]
PROGRESS_EVERY = 2000  # images
BAD_IMAGE, WRONG_LABELS = "bad image", "wrong label map"  # kinds of problems


def check(config: Config, write: Write) -> int:
    """Report on `data.train` and `data.test`, line by line through `write`.

    0: nothing wrong; 1: something is wrong that training leaves out or mends; 2: a set is not
    usable. Raises UserError for a mistake in the config itself.
    """
    experiment = check_config(config)
    section = experiment.data
    views = {"train": [View(section.resize)], "test": experiment.test.views(section.resize)}
    with _quiet():
        codes, files = [], []
        for part in ("train", "test"):
            code, paths = _check_part(config, section, part, views[part], write)
            codes.append(code)
            files.append(paths)
    if common := files[0] & files[1]:
        write(f"note: {len(common)} images are in both train and test, e.g. {min(common)}")
    write({0: "nothing wrong", 1: "usable, but see above", 2: "not usable"}[max(codes)])
    return max(codes)


def _check_part(
    config: Config, section: DataSection, part: str, views: list[View], write: Write
) -> tuple[int, set[str]]:
    """Exit code and image files of `data.train` or `data.test`."""
    try:
        reader = read_data_set(config, part)
    except UserError as error:
        problems = error.problems if isinstance(error, DataError) else []
        what = error.what + (f" ({error.hint})" if error.hint else "")
        write(f"{part}: not usable")
        _write_problems(problems or [Problem(error.where, what, "error")], write)
        return 2, set()
    codes = [1 if reader.problems else 0]
    if task_of(config) == "segmentation":
        images, limit = _read_label_maps(reader, section, views, write)
        found = [problem for image in images for problem in image.problems]
        _describe_label_maps(reader, part, images, write)
        if part == "train" and any(record.label_path is None for record in reader.records):
            codes.append(2)
    else:
        _describe(reader, part, write)
        found, limit = _read_images(reader, section, views, write)
    _write_problems([*reader.problems, *found], write)
    for misfit in misfits(config, part, reader):
        write(f"  {misfit}")
        codes.append(2)
    bad = sum(problem.kind == BAD_IMAGE for problem in found)
    if bad:
        codes.append(1)
    if bad > limit:
        write(f"  {bad} bad images are more than data.max_bad_images allows: {limit}")
        codes.append(2)
    if len(found) > bad:  # training and testing stop at a wrong label map
        codes.append(2)
    return max(codes), {record.path for record in reader.records}


def _read_images(
    reader: Reader, section: DataSection, views: list[View], write: Write
) -> tuple[list[Problem], int]:
    """Decode and resize every image; the bad ones, and how many training accepts."""
    dataset = DetectionDataset(reader, section, training=False, views=views)
    for number, _ in enumerate(test_loader(dataset, section, rank=0, world=1), 1):
        _progress(number, len(dataset), write)
    bad = [Problem(path, reason, BAD_IMAGE) for path, reason in dataset.bad.items()]
    return bad, dataset.bad_limit()


def _progress(number: int, total: int, write: Write) -> None:
    if number % PROGRESS_EVERY == 0:
        write(f"  {number} of {total} images read")


class _Image(NamedTuple):
    """One image and its label map, as they were found.

    `size` is (h, w), `pixels` (256,) int64 how many pixels have each label; None where unknown.
    """

    size: tuple[int, int] | None
    pixels: NDArray[np.int64] | None
    problems: list[Problem]


def _read_label_maps(
    reader: Any, section: DataSection, views: list[View], write: Write
) -> tuple[list[_Image], int]:
    """Decode every image and label map, and resize the image; how many training accepts bad."""
    dataset = SegmentationDataset(reader, section, training=False, views=views)
    images = []
    # Threads: Pillow and OpenCV work side by side in them, and nothing large has to be sent.
    pool = ThreadPoolExecutor(max(1, section.workers))
    try:
        for image in pool.map(partial(_read_one, reader, section, views), dataset.records):
            images.append(image)
            _progress(len(images), len(dataset), write)
    finally:  # ctrl-c does not wait for all the others
        pool.shutdown(cancel_futures=True)
    return images, dataset.bad_limit()


def _read_one(
    reader: Any, section: DataSection, views: list[View], record: LabelledImage
) -> _Image:
    size = pixels = None
    problems = []
    try:
        image = read_image(record.path, section.orientation, section.max_pixels)
        size = image.shape[0], image.shape[1]
        for view in views:
            view.of(image, section.pad_images)
    except BadImage as error:
        problems.append(Problem(record.path, str(error), BAD_IMAGE))
    try:
        labels = reader.label_map(record)
        if labels is not None:
            if size is not None:
                check_size(labels, size, record)
            pixels = np.bincount(labels.ravel(), minlength=256)
    except BadImage as error:
        problems.append(Problem(error.path or str(record.label_path), str(error), WRONG_LABELS))
    return _Image(size, pixels, problems)


def _describe_label_maps(reader: Any, part: str, images: list[_Image], write: Write) -> None:
    sizes = np.array([image.size for image in images if image.size] or [(0, 0)])
    height, width = (
        str(least) if least == most else f"{least} to {most}"
        for least, most in zip(sizes.min(0), sizes.max(0), strict=True)
    )
    write(
        f"{part}: {reader.name}: {len(images)} images, {width} pixels wide and {height} high, "
        f"{len(reader.classes)} classes"
    )
    missing = [record.path for record in reader.records if record.label_path is None]
    if missing:
        write(f"  images without a label map: {len(missing)}, e.g. {missing[0]}")
    known = [image.pixels for image in images if image.pixels is not None]
    if not known:
        return
    table = np.array(known)
    total = table.sum(0)
    everything, ignored = total.sum(), total[UNLABELLED]
    shares = total / max(1, everything - ignored)
    counts = (table > 0).sum(0)
    longest = max(len(name) for name in reader.classes)
    for label, name in enumerate(reader.classes):
        share = f"{shares[label]:8.3%} of labelled pixels"
        write(f"  {name:<{longest}}  {share}, in {counts[label]} images")
    write(f"  without a label: {ignored / max(1, everything):.3%} of all pixels")
    never = [name for label, name in enumerate(reader.classes) if not total[label]]
    if never:
        write(f"  classes that never occur: {', '.join(never)}")
    empty = sum(pixels[UNLABELLED] == pixels.sum() for pixels in known)
    write(f"  images without a labelled pixel: {empty}")


def _describe(reader: Reader, part: str, write: Write) -> None:
    truths = [record.truth for record in reader.records]
    labels = np.concatenate([truth.labels for truth in truths])
    ignore = np.concatenate([truth.ignore for truth in truths])
    sides = np.concatenate([truth.xywh for truth in truths])[:, 2:]
    masks = ", with masks" if truths[0].masks is not None else ""
    write(
        f"{part}: {reader.name}: {len(truths)} images, {len(labels)} objects "
        f"({int(ignore.sum())} difficult or crowd){masks}, {len(reader.classes)} classes"
    )
    width = max(len(name) for name in reader.classes)
    for label, name in enumerate(reader.classes):
        images = sum(bool((truth.labels == label).any()) for truth in truths)
        write(f"  {name:<{width}}  {int((labels == label).sum()):>8} objects in {images} images")
    if len(sides):
        for name, values in (("width", sides[:, 0]), ("height", sides[:, 1])):
            quantiles = ", ".join(f"{v:.4g}" for v in np.quantile(values, (0, 0.05, 0.5, 0.95, 1)))
            write(f"  box {name} (least, 5%, median, 95%, most): {quantiles}")
    empty = sum(not len(record.boxes) for record in reader.records)
    write(f"  images without objects to train on: {empty}")


def _write_problems(problems: list[Problem], write: Write) -> None:
    kinds: defaultdict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        kinds[problem.kind].append(problem)
    for kind, members in kinds.items():
        write(f"  {len(members)} x {kind}:")
        for problem in members:
            write(f"    {problem}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the readers' own warnings: the report holds them all."""
    log: Any = logging.getLogger("dcdet.datasets")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
