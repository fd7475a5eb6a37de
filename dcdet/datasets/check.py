"""`dcdet check CONFIG`: read a config's data sets once and report everything wrong in them."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from dcdet.config import Config
from dcdet.datasets.loader import DataSection, DetectionDataset, Reader, View, test_loader
from dcdet.datasets.records import DataError, Problem, have_masks
from dcdet.errors import UserError
from dcdet.registry import build
from dcdet.registry import check as check_config

Write = Callable[[str], None]
PROGRESS_EVERY = 2000  # images


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
        reader = build(
            config.data[part], "dataset", classes=config.data.classes, pixels=config.model.pixels
        )
    except UserError as error:
        problems = error.problems if isinstance(error, DataError) else []
        what = error.what + (f" ({error.hint})" if error.hint else "")
        write(f"{part}: not usable")
        _write_problems(problems or [Problem(error.where, what, "error")], write)
        return 2, set()
    _describe(reader, part, write)
    _write_problems(reader.problems, write)
    codes = [1 if reader.problems else 0]
    if len(reader.classes) != config.model.num_classes:
        where = config.where("model.num_classes")
        write(f"  {where}: {config.model.num_classes}, wanted {len(reader.classes)}")
        codes.append(2)
    learns_masks = part == "train" and config.model.get("mask_head") is not None
    if learns_masks and not have_masks(reader.records):
        write("  no instance masks, which model.mask_head learns from")
        codes.append(2)
    bad, limit = _read_images(reader, section, views, write)
    _write_problems([Problem(path, reason, "bad image") for path, reason in bad.items()], write)
    if bad:
        codes.append(1)
    if len(bad) > limit:
        write(f"  {len(bad)} bad images are more than data.max_bad_images allows: {limit}")
        codes.append(2)
    return max(codes), {record.path for record in reader.records}


def _read_images(
    reader: Reader, section: DataSection, views: list[View], write: Write
) -> tuple[dict[str, str], int]:
    """Decode and resize every image; the bad ones, with reasons, and how many training accepts."""
    dataset = DetectionDataset(reader, section, training=False, views=views)
    for number, _ in enumerate(test_loader(dataset, section, rank=0, world=1), 1):
        if number % PROGRESS_EVERY == 0:
            write(f"  {number} of {len(dataset)} images read")
    return dataset.bad, dataset.bad_limit()


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
