"""From a data set's records to batches, in an order that only run seed and epoch decide.

Worker processes and ranks change who prepares a batch, never what is in it. B images a batch.
"""

import atexit
import contextlib
import hashlib
import logging
import multiprocessing
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dcdet.boxes import Pixels, Scale
from dcdet.datasets.records import Problem, Record
from dcdet.datasets.transforms import (
    MAX_PIXELS,
    BadImage,
    Orientation,
    ResizeMethod,
    place_boxes,
    place_masks,
    read_image,
    shown,
)
from dcdet.errors import MachineError, UserError
from dcdet.structures import Batch, Sample, Target

log = logging.getLogger("dcdet.datasets")


@dataclass(frozen=True)
class ResizeSpec:
    """The short side becomes `short` pixels, unless the long one would exceed `long`.

    `method` is whose rule: weights find most where images are resized as when they were trained.
        original: the 2017 release's: one factor for both axes, OpenCV's bilinear on 8 bits.
        mmdetection: sides rounded, each axis with its own factor, OpenCV's bilinear on 8 bits.
        torchvision: sides rounded down, each axis with its own factor, bilinear on float pixels.
        detectron2: sides rounded, each axis with its own factor, Pillow's bilinear on 8 bits, which
            averages where an image shrinks.
    """

    short: int
    long: int
    method: ResizeMethod = "original"

    def __post_init__(self) -> None:
        if not 1 <= self.short <= self.long <= 16_384:
            raise ValueError(f"short: must be in 1..long, long in 1..16384, got {self}")


@dataclass(frozen=True)
class DataSection:
    """The data of a run.

    Args:
        classes: class names in the order of the labels; None takes them from the data set.
        train, test: nodes of role dataset.
        resize: how images are enlarged for the network.
        flip: "append" mirrors the whole set and appends it, as the 2017 release does (an epoch sees
            each image twice); "random" mirrors half of the images of an epoch.
        aspect_grouping: batches of only wide or only tall images.
        filter_empty: leave training images without objects out.
        batch_size: images a step, over all processes; testing takes them one by one.
        workers: processes that prepare batches, for each training process; 0 uses none.
        pad_multiple: padded sides are multiples of this; 1 pads to the largest image only. The
            padding is 0 after the mean is subtracted, and no box reaches into it.
        pad_images: before that, each image gets black pixels at its right and bottom until its
            sides are multiples of this; they count as image, and boxes may reach into them, as in
            the 2017 release's FPN (32). 1 adds none.
        orientation: whether EXIF orientation is applied to images; boxes are in the result's
            pixels.
        max_bad_images: training stops when more than this share of the images (but more than one)
            cannot be read.
        max_pixels: larger images are refused.
        timeout: seconds to wait for a worker before it counts as hung.
        random_scale: in training, each image is resized by a factor drawn from this range (evenly
            on a logarithmic scale) on top of `resize`; None: by none. Segmentation only.
        crop: in training, the part (h, w) of each resized image that is cut out at a random place,
            less where it is smaller; None: all of it. Segmentation only.
    """

    classes: list[str] | None
    train: Mapping[str, Any]
    test: Mapping[str, Any]
    resize: ResizeSpec
    flip: Literal["none", "append", "random"]
    aspect_grouping: bool
    filter_empty: bool
    batch_size: int
    workers: int
    pad_multiple: int
    orientation: Orientation
    max_bad_images: float
    max_pixels: int = MAX_PIXELS
    timeout: float = 120.0
    pad_images: int = 1
    random_scale: tuple[float, float] | None = None
    crop: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        names = self.classes or []
        repeated = next((name for name in names if names.count(name) > 1), None)
        if self.classes == []:
            raise ValueError("classes: name at least one class, or write null")
        if repeated is not None:
            raise ValueError(f"classes: {repeated!r} is listed twice")
        for name, low, high in (
            ("batch_size", 1, 65_536),
            ("workers", 0, 256),
            ("pad_multiple", 1, 4096),
            ("pad_images", 1, 4096),
            ("max_bad_images", 0, 1),
            ("max_pixels", 1, 1 << 31),
            ("timeout", 1, 86_400),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: must be in {low}..{high}, got {getattr(self, name)}")
        least, most = self.random_scale or (1.0, 1.0)
        if not 0.1 <= least <= most <= 10:
            raise ValueError(f"random_scale: must be two factors in 0.1..10, got {least}, {most}")
        if self.resize.long * most > 16_384:
            raise ValueError(f"random_scale: {most} times resize.long is more than 16384 pixels")
        if min(self.crop or (16, 16)) < 16:
            raise ValueError(f"crop: must be a height and a width of 16 or more, got {self.crop}")


class Reader(Protocol):
    """What every data set reader holds once it is built."""

    name: str
    classes: list[str]
    category_ids: list[int]
    pixels: Pixels
    records: list[Record]
    problems: list[Problem]


class Pick(NamedTuple):
    """One image of a batch: `place` in the epoch's set, whether mirrored, and its seed."""

    place: int
    flip: bool
    seed: int


class View(NamedTuple):
    """One way to show an image to the network."""

    resize: ResizeSpec
    flip: bool = False

    def of(self, image: np.ndarray, multiple: int) -> tuple[Tensor, Scale]:
        """Image (H, W, 3) uint8 -> what the network sees of it (3, H', W'), and its scale.

        Mirrored and resized, then padded with black pixels, which count as image, to sides that are
        multiples of `multiple` (IMAGE_STRIDE in lib/utils/image.py of the 2017 release). BadImage
        if it is too narrow.
        """
        resize = self.resize
        pixels, scale = shown(image, resize.short, resize.long, resize.method, self.flip)
        bottom, right = (-side % multiple for side in pixels.shape[1:])
        return torch.nn.functional.pad(pixels, (0, right, 0, bottom)), scale


class DetectionDataset:
    """A reader's images as samples for the network.

    Its length is the number of images of an epoch: twice the reader's with `flip: append`, where
    place i + N is image i mirrored. `bad` gathers the files that could not be used, with reasons.
    `views` are the ways to show each image in testing: `data.resize` alone unless given.
    """

    def __init__(
        self,
        reader: Reader,
        section: DataSection,
        *,
        training: bool,
        views: Sequence[View] | None = None,
    ) -> None:
        records = reader.records
        if training and section.filter_empty:
            records = [record for record in records if len(record.boxes)]
        if not records:
            raise UserError(reader.name, "has no images to use")
        self.name, self.pixels, self.section = reader.name, reader.pixels, section
        self.records, self.training = records, training
        self.views = views or [View(section.resize)]
        self.bad: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.records) * (2 if self.training and self.section.flip == "append" else 1)

    def pick(self, place: int, seed: int, epoch: int) -> Pick:
        """The choices about the image at `place`, from run seed and epoch."""
        flip = False
        if self.training and self.section.flip == "append":
            flip = place >= len(self.records)
        elif self.training and self.section.flip == "random":
            flip = bool(stable_seed(seed, epoch, place, 1) & 1)
        return Pick(place, flip, stable_seed(seed, epoch, place, 0))

    def samples(self, pick: Pick, record: Record) -> list[Sample]:
        """Read one image, once, and show it in every view; BadImage when that is not possible."""
        image = read_image(record.path, self.section.orientation, self.section.max_pixels)
        height, width = size = image.shape[:2]
        if record.size not in (size, (0, 0)):
            turned = "; is data.orientation right?" if record.size == (width, height) else ""
            raise BadImage(
                f"is {width} x {height} pixels (width x height), "
                f"annotated as {record.size[1]} x {record.size[0]}{turned}"
            )
        samples = []
        for view in self.views:
            view = view._replace(flip=view.flip != pick.flip)
            pixels, scale = view.of(image, self.section.pad_images)
            network_size = pixels.shape[1], pixels.shape[2]
            boxes, ignored = (
                place_boxes(boxes, size, network_size, scale, view.flip, self.pixels)
                for boxes in (record.boxes, record.ignored)
            )
            labels = torch.from_numpy(record.labels)
            masks = None
            if self.training and record.truth.masks is not None:
                masks = place_masks(record.masks or [], size, network_size, scale, view.flip)
            target = Target(record.image_id, size, boxes, labels, ignored, masks)
            samples.append(Sample(pixels, target, scale, pick.seed, view.flip))
        return samples

    def batches(self, picks: list[Pick], reading: Tensor) -> list[Batch]:
        """Read the images of a batch -> the batch in every view; `reading` is filled with the place
        of the image at work.

        A bad image is named in `skipped`; in training the next good one takes its place, so that
        the number of images stays.
        """
        samples, skipped = [], []
        for pick in picks:
            attempts = self.bad_limit() + 1 if self.training else 1
            for attempt in range(attempts):
                place = (pick.place + attempt) % len(self.records)
                record = self.records[place]
                reading.fill_(place)
                try:
                    samples.append(self.samples(pick, record))
                    break
                except BadImage as error:
                    skipped.append((error.path or record.path, str(error)))
        views = zip(*samples, strict=True) if samples else [()]
        return [collate(view, self.section.pad_multiple, skipped) for view in views]

    def bad_limit(self) -> int:
        """How many images may be bad: the configured share, but at least one and never all."""
        share = int(self.section.max_bad_images * len(self.records))
        return min(max(1, share), len(self.records) - 1)

    def count_bad(self, batch: Batch) -> None:
        """Log and count a batch's skipped images; UserError when they are too many."""
        for path, reason in batch.skipped:
            if path not in self.bad:
                self.bad[path] = reason
                log.warning("skipped: %s: %s", path, reason)
        if self.training and len(self.bad) > self.bad_limit():
            path, reason = next(iter(self.bad.items()))
            raise UserError(
                path,
                f"{reason}; with it {len(self.bad)} of {len(self.records)} images are bad, "
                f"{self.bad_limit()} may be",
                "`dcdet check CONFIG` lists them; data.max_bad_images allows more",
            )


def stable_seed(*numbers: int) -> int:
    """A 63-bit hash of whole numbers that is the same on every machine and in every process."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def collate(
    samples: Sequence[Sample], pad_multiple: int, skipped: list[tuple[str, str]] | None = None
) -> Batch:
    """Samples -> one batch; images are padded right and bottom with zeros."""
    sizes = [(sample.image.shape[1], sample.image.shape[2]) for sample in samples]
    height, width = (
        -(-max((size[axis] for size in sizes), default=0) // pad_multiple) * pad_multiple
        for axis in (0, 1)
    )
    dtype = samples[0].image.dtype if samples else torch.uint8
    images = torch.zeros(len(samples), 3, height, width, dtype=dtype)
    for image, sample, size in zip(images, samples, sizes, strict=True):
        image[:, : size[0], : size[1]] = sample.image
    return Batch(
        images=images,
        sizes=sizes,
        targets=[sample.target for sample in samples],
        scales=[sample.scale for sample in samples],
        seeds=[sample.seed for sample in samples],
        skipped=tuple(skipped or ()),
        flips=tuple(sample.flip for sample in samples),
    )


def pad_to(batch: Batch, size: list[int]) -> Batch:
    """The same batch with its images padded right and bottom to at least `size` (h, w)."""
    height, width = batch.images.shape[-2:]
    right, bottom = max(0, size[1] - width), max(0, size[0] - height)
    images: Tensor = torch.nn.functional.pad(batch.images, (0, right, 0, bottom))
    return replace(batch, images=images)


def steps_per_epoch(dataset: DetectionDataset, section: DataSection) -> int:
    """Full batches in an epoch, the incomplete last one left out; UserError if there is none."""
    steps = len(dataset) // section.batch_size
    if steps == 0:
        raise UserError(
            "data.batch_size",
            f"a batch of {section.batch_size} images, but {dataset.name} has {len(dataset)}",
            f"set data.batch_size to at most {len(dataset)}",
        )
    return steps


def epoch_order(
    dataset: DetectionDataset, section: DataSection, seed: int, epoch: int
) -> np.ndarray:
    """The places of an epoch's images, (steps, batch_size).

    With aspect grouping, wide and tall images are shuffled apart, joined, cut into batches, and the
    batches shuffled: at most one batch is mixed. Source: the 2017 release, core/loader.py.
    """
    random = np.random.Generator(np.random.PCG64([seed, epoch]))
    places = np.arange(len(dataset))
    steps = steps_per_epoch(dataset, section)
    if not section.aspect_grouping:
        return random.permutation(places)[: steps * section.batch_size].reshape(steps, -1)
    tall = np.array([record.size[0] > record.size[1] for record in dataset.records])
    tall = tall[places % len(dataset.records)]
    order = np.concatenate([random.permutation(places[~tall]), random.permutation(places[tall])])
    batches = order[: steps * section.batch_size].reshape(steps, -1)
    return batches[random.permutation(steps)]


def train_loader(
    dataset: DetectionDataset,
    section: DataSection,
    *,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
) -> Iterator[Batch]:
    """This rank's share of each batch of one epoch, from batch `start_step` on.

    Raises UserError when too many images are bad, MachineError when a worker is lost.
    """
    if section.batch_size % world:
        raise UserError(
            "data.batch_size",
            f"{section.batch_size} images do not divide among {world} processes",
        )
    share = section.batch_size // world
    order = epoch_order(dataset, section, seed, epoch)[start_step:, rank * share :][:, :share]
    plan = [[dataset.pick(int(place), seed, epoch) for place in places] for places in order]
    yield from (batch for [batch] in _load(dataset, section, plan))


def test_loader(
    dataset: DetectionDataset, section: DataSection, rank: int, world: int
) -> Iterator[list[Batch]]:
    """Every world-th image from `rank` on, in order: for each view of `dataset`, a batch of one.

    A bad image is left out; `dataset.bad` names it. Raises MachineError when a worker is lost.
    """
    plan = [[dataset.pick(place, 0, 0)] for place in range(rank, len(dataset), world)]
    yield from (views for views in _load(dataset, section, plan) if views[0].targets)


test_loader.__test__ = False  # type: ignore[attr-defined]  # for pytest, which goes by the name


class _Batches(Dataset[list[Batch]]):
    """A plan of batches for torch's DataLoader, which then has nothing to sample or collate.

    `reading` tells, for each worker, the place of the image that it is reading, or -1.
    """

    def __init__(self, dataset: DetectionDataset, plan: list[list[Pick]], reading: Tensor) -> None:
        self.dataset, self.plan, self.reading = dataset, plan, reading

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> list[Batch]:
        worker = get_worker_info()
        reading = self.reading[worker.id if worker else 0]
        views = self.dataset.batches(self.plan[index], reading)
        reading.fill_(-1)
        return views


def _load(
    dataset: DetectionDataset, section: DataSection, plan: list[list[Pick]]
) -> Iterator[list[Batch]]:
    workers = min(section.workers, len(plan))
    reading = torch.full((max(1, workers),), -1)
    loader: Any = None
    try:
        with warnings.catch_warnings():  # the config decides on workers, not the number of cores
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            loader = iter(
                DataLoader(
                    _Batches(dataset, plan, reading.share_memory_() if workers else reading),
                    batch_size=None,
                    num_workers=workers,
                    timeout=section.timeout if workers else 0,
                    worker_init_fn=_start_worker,
                    # Its own: the global one must stand the same after a resume in mid-epoch.
                    generator=torch.Generator().manual_seed(plan[0][0].seed) if plan else None,
                )
            )
        for views in loader:
            dataset.count_bad(views[0])
            yield views
    except (RuntimeError, OSError, UserError) as error:
        if workers == 0:
            raise
        _end_workers()
        if loader is not None:
            # Else it happens when `loader` is deleted, where a signal of a dying worker raises
            # once more and can only be printed.
            with contextlib.suppress(RuntimeError):
                loader._shutdown_workers()
        if isinstance(error, UserError):
            raise
        images = [dataset.records[place].path for place in reading.tolist() if place >= 0]
        at = f" while reading {' or '.join(images)}" if images else ""
        raise MachineError(f"data worker lost{at}: {error}") from error


def _end_workers() -> None:
    for worker in multiprocessing.active_children():
        if worker.daemon:  # DataLoader's; they do not heed SIGTERM
            worker.kill()


@atexit.register
def _exit() -> None:
    """Where an error holds on to a loader, Python would wait for its workers for ever."""
    if multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them
        _end_workers()


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)  # a forked process must not touch OpenCV's thread pool
    # A terminal or scheduler signals the whole group. The main process decides when to stop, and
    # its workers end with it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
