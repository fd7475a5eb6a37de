"""Samples, batches, order and bad images, with one process and several."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from data_sets import write_voc
from torch import nn

from dcdet.datasets import loader
from dcdet.datasets.loader import (
    DataSection,
    DetectionDataset,
    Pick,
    ResizeSpec,
    collate,
    epoch_order,
    pad_to,
    stable_seed,
    steps_per_epoch,
    train_loader,
)
from dcdet.datasets.shapes import Shapes
from dcdet.datasets.transforms import network_scale, read_image
from dcdet.datasets.voc import VOC
from dcdet.errors import MachineError, UserError
from dcdet.models.postprocess import PostprocessSpec
from dcdet.models.two_stage import TwoStageDetector
from dcdet.structures import Batch

WIDE, TALL = (24, 36), (36, 24)


def section(**changes: Any) -> DataSection:
    values: dict[str, Any] = {
        "classes": ["cat"],
        "train": {},
        "test": {},
        "resize": ResizeSpec(32, 48),
        "flip": "append",
        "aspect_grouping": True,
        "filter_empty": False,
        "batch_size": 4,
        "workers": 0,
        "pad_multiple": 1,
        "orientation": "ignore",
        "max_bad_images": 0.01,
        **changes,
    }
    return DataSection(**values)


def data_set(
    root: Path, sizes: Sequence[tuple[int, int]], training: bool = True, **changes: Any
) -> DetectionDataset:
    """Images named i0, i1, ... of these sizes, each with one object; the last has none."""
    images = {
        f"i{i}": (size, [("cat", 3, 4, 10 + i % 10, 20)] if i < len(sizes) - 1 else [])
        for i, size in enumerate(sizes)
    }
    write_voc(root, images)
    reader = VOC(str(root), "train", ["cat"], "inclusive")
    return DetectionDataset(reader, section(**changes), training=training)


def epoch(dataset: DetectionDataset, number: int = 0, **options: Any) -> list[Batch]:
    return list(train_loader(dataset, dataset.section, seed=5, epoch=number, **options))


def same(one: Batch, two: Batch) -> bool:
    tensors = [
        (one.images, two.images),
        *(
            (getattr(a, name), getattr(b, name))
            for a, b in zip(one.targets, two.targets, strict=True)
            for name in ("boxes", "labels", "ignored")
        ),
    ]
    plain = [
        (batch.sizes, batch.scales, batch.seeds, [t.image_id for t in batch.targets])
        for batch in (one, two)
    ]
    return plain[0] == plain[1] and all(torch.equal(a, b) for a, b in tensors)


def test_a_sample_is_the_image_resized_and_its_boxes(tmp_path: Path) -> None:
    dataset = data_set(tmp_path, [WIDE, WIDE])
    for place, flip in ((0, False), (2, True)):
        pick = dataset.pick(place, 5, 0)
        assert pick.flip is flip
        [sample] = dataset.samples(pick, dataset.records[0])
        image = read_image(dataset.records[0].path)
        image = cv2.flip(image, 1) if flip else image
        scale = network_scale(WIDE, 32, 48)
        expected = cv2.resize(image, None, fx=scale, fy=scale)
        np.testing.assert_array_equal(sample.image.permute(1, 2, 0), expected)
        assert sample.scale == scale
        inclusive = np.array([36 - 10, 3, 36 - 3, 19]) if flip else np.array([2, 3, 9, 19])
        np.testing.assert_array_equal(
            sample.target.boxes[0], np.round(inclusive * scale) + np.array([0, 0, 1, 1])
        )
        assert sample.target.size == WIDE


def test_black_pixels_count_as_image(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": ((25, 35), [("cat", 1, 1, 35, 25)])})
    found = {}
    for multiple in (1, 32):
        spec = section(resize=ResizeSpec(10, 100), pad_images=multiple)
        reader = VOC(str(tmp_path), "train", ["cat"], "inclusive")
        dataset = DetectionDataset(reader, spec, training=True)
        found[multiple] = collate(dataset.samples(dataset.pick(0, 5, 0), dataset.records[0]), 1)
    plain, padded = found[1], found[32]
    assert plain.sizes == [(10, 14)]
    assert padded.sizes == [(32, 32)]
    assert torch.equal(padded.images[..., :10, :14], plain.images)
    assert padded.images.sum() == plain.images.sum()
    assert padded.scales == plain.scales == [0.4]
    # Inclusive (34, 24) * 0.4 = (13.6, 9.6), rounded, is (14, 10): just outside without padding.
    assert plain.targets[0].boxes.tolist() == [[0, 0, 14, 10]]
    assert padded.targets[0].boxes.tolist() == [[0, 0, 15, 11]]


def test_images_of_a_batch_equal_mmdetections(shared: Path, tmp_path: Path) -> None:
    """From image files to the network's input: DetDataPreprocessor's recorded batch."""
    folder = shared / "golden_mmdet"
    image_u8 = runpy.run_path(str(folder / "param_mmdet.py"))["image_u8"]
    recorded = json.loads((folder / "preprocess.json").read_text())
    cases = [recorded["resize"][number] for number in recorded["batch"]["images"]]
    write_voc(tmp_path, {str(c["seed"]): (tuple(c["size"]), [("cat", 1, 1, 9, 9)]) for c in cases})
    for case in cases:
        path = tmp_path / "JPEGImages" / f"{case['seed']}.png"
        cv2.imwrite(str(path), image_u8(*case["size"], case["seed"]))
    spec = section(resize=ResizeSpec(800, 1333, "mmdetection"), pad_multiple=32)
    dataset = DetectionDataset(VOC(str(tmp_path), "train", ["cat"], "continuous"), spec,
                               training=False)  # fmt: skip
    samples = [dataset.samples(Pick(i, False, 0), dataset.records[i])[0] for i in range(2)]
    batch = collate(samples, spec.pad_multiple)
    assert batch.sizes == [tuple(case["new"]) for case in cases]
    assert batch.scales == [tuple(case["scale_factor"][::-1]) for case in cases]
    model = TwoStageDetector(
        nn.Identity(), None, nn.Identity(), nn.Identity(), 1, "continuous",
        [123.675, 116.28, 103.53], [58.395, 57.12, 57.375], PostprocessSpec(0.05, 0.5, 100),
    )  # fmt: skip
    found: Any = model.features(batch)
    assert list(found.shape) == recorded["batch"]["shape"]
    expected = np.load(folder / "preprocess.npz")["batch_s41"]
    # Equal up to float32 where OpenCV is of the recording's version; others may round.
    limit = 1e-6 if cv2.__version__ == recorded["cv2"] else 1.01 / 57
    assert np.abs(found[:, :, ::41, ::41].numpy() - expected).max() <= limit


def test_float_pixels_travel_through_a_batch(tmp_path: Path) -> None:
    spec = ResizeSpec(32, 48, "torchvision")
    dataset = data_set(tmp_path, [(23, 36), (36, 25)] * 2, resize=spec, flip="none")
    [batch] = epoch(dataset)
    assert batch.images.dtype == torch.float32
    assert 1 < batch.images.max() <= 255
    assert sorted(set(batch.sizes)) == [(30, 48), (46, 32)]
    assert set(batch.scales) == {(30 / 23, 48 / 36), (46 / 36, 32 / 25)}
    padded = pad_to(batch, [50, 50])
    assert padded.images.dtype == torch.float32
    assert padded.images[:, :, 48:].abs().sum() == 0


def with_masks(root: Path, training: bool = True, **changes: Any) -> DetectionDataset:
    """Four images of the embedded set, with masks."""
    reader = Shapes(str(root / "shapes"), "train", None, "continuous", "coco", 4, 1, masks=True)
    values = {"batch_size": 2, "pad_images": 32, "resize": ResizeSpec(70, 110), **changes}
    return DetectionDataset(reader, section(**values), training=training)


def test_masks_come_with_the_boxes(tmp_path: Path) -> None:
    """Boxes are tight around their masks, but for a thin end that no sampled pixel met."""
    dataset = with_masks(tmp_path)
    batches = epoch(dataset)
    assert len(batches) == 4
    for batch in batches:
        for target, size in zip(batch.targets, batch.sizes, strict=True):
            masks = target.masks
            assert masks is not None
            assert (masks.dtype, masks.shape) == (torch.bool, (len(target.boxes), *size))
            assert size == (96, 96)
            assert not masks[:, 70:].any()
            assert not masks[:, :, 88:].any()
            for mask, box in zip(masks, target.boxes, strict=True):
                rows, columns = mask.nonzero().unbind(1)
                found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert (torch.tensor(found) - box).abs().max() < 2
    [one], [other] = (dataset.samples(dataset.pick(p, 0, 0), dataset.records[0]) for p in (0, 4))
    assert one.target.masks is not None
    assert other.target.masks is not None
    assert torch.equal(one.target.masks[:, :, :88].flip(2), other.target.masks[:, :, :88])


def test_masks_from_workers_and_on_another_device(tmp_path: Path) -> None:
    batches = [epoch(with_masks(tmp_path, workers=workers)) for workers in (0, 2)]
    for one, two in zip(*batches, strict=True):
        assert same(one, two)
        for a, b in zip(one.targets, two.targets, strict=True):
            assert a.masks is not None
            assert b.masks is not None
            assert torch.equal(a.masks, b.masks)
    moved = batches[0][0].to("meta").targets[0].masks
    assert moved is not None
    assert moved.device.type == "meta"
    assert epoch(data_set(tmp_path / "voc", [WIDE] * 4))[0].to("meta").targets[0].masks is None


def test_no_masks_are_made_in_testing(tmp_path: Path) -> None:
    dataset = with_masks(tmp_path, training=False)
    [sample] = dataset.samples(dataset.pick(0, 0, 0), dataset.records[0])
    assert sample.target.masks is None


def test_any_number_of_workers_gives_the_same_batches(tmp_path: Path) -> None:
    batches = {}
    for workers in (0, 1, 3):
        dataset = data_set(tmp_path, [WIDE, TALL] * 5, workers=workers, flip="random")
        batches[workers] = epoch(dataset)
    for workers in (1, 3):
        assert len(batches[workers]) == 2
        assert all(map(same, batches[0], batches[workers]))


def test_two_processes_share_each_batch(tmp_path: Path) -> None:
    dataset = data_set(tmp_path, [WIDE] * 10)
    whole = epoch(dataset)
    halves = [epoch(dataset, rank=rank, world=2) for rank in (0, 1)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
        assert batch.seeds == [seed for part in parts for seed in part.seeds]
    with pytest.raises(UserError, match=r"data\.batch_size: 4 images do not divide among 3"):
        epoch(dataset, rank=0, world=3)


def test_an_epoch_can_start_in_its_middle(tmp_path: Path) -> None:
    dataset = data_set(tmp_path, [WIDE] * 10)
    assert all(map(same, epoch(dataset)[2:], epoch(dataset, start_step=2)))
    assert len(epoch(dataset, start_step=2)) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_draws_nothing_from_the_global_generator(tmp_path: Path, workers: int) -> None:
    """A run that is resumed in mid-epoch would draw once more than an undisturbed one."""
    dataset = data_set(tmp_path, [WIDE] * 10, workers=workers)
    before = torch.get_rng_state()
    epoch(dataset)
    assert torch.equal(torch.get_rng_state(), before)


def test_appended_flips_show_each_image_twice(tmp_path: Path) -> None:
    dataset = data_set(tmp_path, [WIDE] * 10)
    assert len(dataset) == 20
    assert steps_per_epoch(dataset, dataset.section) == 5
    seen = Counter(t.image_id for batch in epoch(dataset) for t in batch.targets)
    assert seen == {f"i{i}": 2 for i in range(10)}


def test_random_flips_and_seeds_differ_by_epoch(tmp_path: Path) -> None:
    dataset = data_set(tmp_path, [WIDE] * 64, flip="random")
    picks = [[dataset.pick(i, 5, e) for i in range(64)] for e in (0, 1)]
    assert 16 < sum(pick.flip for pick in picks[0]) < 48
    assert [p.flip for p in picks[0]] != [p.flip for p in picks[1]]
    assert len({p.seed for ps in picks for p in ps}) == 128
    assert all(0 <= p.seed < 1 << 63 for ps in picks for p in ps)
    assert picks[0] == [dataset.pick(i, 5, 0) for i in range(64)]
    # Fixed for ever: a resumed run may go on under another version or machine.
    assert stable_seed(1, 2, 3) == 2904650318439132554


def test_order_depends_on_seed_and_epoch_only_and_groups_aspects(tmp_path: Path) -> None:
    dataset = data_set(tmp_path, [WIDE, TALL, WIDE] * 7, flip="none")
    orders = [epoch_order(dataset, dataset.section, 5, e) for e in range(20)]
    np.testing.assert_array_equal(orders[3], epoch_order(dataset, dataset.section, 5, 3))
    assert len({order.tobytes() for order in orders}) == 20
    mixed_at = set()
    for order in orders:
        assert order.shape == (5, 4)
        assert len(set(order.ravel())) == 20
        tall = order % 3 == 1
        mixed = np.flatnonzero(tall.any(axis=1) & ~tall.all(axis=1))
        assert len(mixed) <= 1
        mixed_at.update(mixed.tolist())
    assert len(mixed_at) > 1  # batches are shuffled, the mixed one is not always last
    free = section(aspect_grouping=False, flip="none")
    tall = epoch_order(dataset, free, 5, 0) % 3 == 1
    assert (tall.any(axis=1) & ~tall.all(axis=1)).sum() > 1


def test_a_set_smaller_than_a_batch_is_an_error(tmp_path: Path) -> None:
    dataset = data_set(tmp_path, [WIDE] * 3, flip="none")
    with pytest.raises(UserError, match=r"a batch of 4 images, but VOC train has 3 \(set data"):
        epoch(dataset)


def test_images_without_objects(tmp_path: Path) -> None:
    dataset = data_set(tmp_path, [WIDE] * 4, flip="none")
    assert len(dataset) == 4
    counts = [len(t.boxes) for batch in epoch(dataset) for t in batch.targets]
    assert sorted(counts) == [0, 1, 1, 1]
    assert len(data_set(tmp_path, [WIDE] * 4, flip="none", filter_empty=True)) == 3
    assert len(data_set(tmp_path, [WIDE] * 4, training=False, filter_empty=True)) == 4


def test_padding(tmp_path: Path) -> None:
    dataset = data_set(tmp_path, [WIDE, TALL])
    samples = [dataset.samples(dataset.pick(i, 0, 0), dataset.records[i])[0] for i in (0, 1)]
    batch = collate(samples, 1)
    assert batch.images.shape == (2, 3, 48, 48)
    assert batch.sizes == [(32, 48), (48, 32)]
    assert torch.equal(batch.images[0, :, :32], samples[0].image)
    assert batch.images[0, :, 32:].sum() == 0
    assert batch.images[1, :, :, 32:].sum() == 0
    assert collate(samples[:1], 32).images.shape == (1, 3, 32, 64)
    padded = pad_to(batch, [50, 40])
    assert padded.images.shape == (2, 3, 50, 48)
    assert torch.equal(padded.images[:, :, :48], batch.images)
    assert padded.images[:, :, 48:].sum() == 0


def test_testing_takes_every_image_once_in_order(tmp_path: Path) -> None:
    dataset = data_set(tmp_path, [WIDE] * 7, training=False, workers=2)
    shares = [
        [
            t.image_id
            for [b] in loader.test_loader(dataset, dataset.section, rank, 3)
            for t in b.targets
        ]
        for rank in range(3)
    ]
    assert shares == [["i0", "i3", "i6"], ["i1", "i4"], ["i2", "i5"]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_named_counted_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    dataset = data_set(tmp_path, [WIDE] * 8, workers=workers, flip="none")
    path = Path(dataset.records[3].path)
    path.write_bytes(path.read_bytes()[:40])
    for number in range(2):
        batches = epoch(dataset, number)
        assert [len(batch.targets) for batch in batches] == [4, 4]
        assert sum((batch.skipped for batch in batches), ())[0][0] == str(path)
        ids = Counter(t.image_id for batch in batches for t in batch.targets)
        assert ids["i3"] == 0
        assert ids["i4"] == 2
    assert list(dataset.bad) == [str(path)]
    assert caplog.text.count(f"skipped: {path}") == 1


def test_too_many_bad_images_stop_training(tmp_path: Path) -> None:
    dataset = data_set(tmp_path, [WIDE] * 8, flip="none")
    for record in dataset.records[2:4]:
        Path(record.path).unlink()
    with pytest.raises(UserError, match="2 of 8 images are bad, 1 may be"):
        epoch(dataset)
    dataset = data_set(tmp_path / "b", [WIDE] * 8, flip="none", max_bad_images=0.25)
    for record in dataset.records[2:4]:
        Path(record.path).unlink()
    assert [len(batch.targets) for batch in epoch(dataset)] == [4, 4]


@pytest.mark.parametrize("number", [1, 4])
def test_only_bad_images(tmp_path: Path, number: int) -> None:
    dataset = data_set(tmp_path, [WIDE] * number, flip="none", batch_size=1, max_bad_images=1.0)
    for record in dataset.records:
        Path(record.path).write_text("")
    with pytest.raises(UserError, match=f"{number} of {number} images are bad"):
        epoch(dataset)


def test_bad_images_at_test_are_left_out_and_named(tmp_path: Path) -> None:
    dataset = data_set(tmp_path, [WIDE] * 5, training=False)
    for place in (0, 2):
        Path(dataset.records[place].path).write_text("<html>")
    batches = list(loader.test_loader(dataset, dataset.section, 0, 1))
    ids = [[t.image_id for t in b.targets] for [b] in batches]
    assert ids == [["i1"], ["i3"], ["i4"]]
    assert list(dataset.bad) == [dataset.records[place].path for place in (0, 2)]


def test_a_size_unlike_the_annotation_makes_an_image_bad(tmp_path: Path) -> None:
    dataset = data_set(tmp_path, [WIDE] * 5, training=False)
    for place, shape in ((1, (20, 30, 3)), (2, (36, 24, 3))):
        cv2.imwrite(dataset.records[place].path, np.zeros(shape, np.uint8))
    list(loader.test_loader(dataset, dataset.section, 0, 1))
    reasons = list(dataset.bad.values())
    assert reasons[0] == "is 30 x 20 pixels (width x height), annotated as 36 x 24"
    assert reasons[1].endswith("annotated as 36 x 24; is data.orientation right?")


def _misbehave(monkeypatch: pytest.MonkeyPatch, name: str, action: Any) -> None:
    """Let workers, which are forks of this process, do `action` when they read image `name`."""
    original = read_image

    def read(path: str, *options: Any) -> np.ndarray:
        if name in path:
            action()
        return original(path, *options)

    monkeypatch.setattr(loader, "read_image", read)


@pytest.mark.parametrize(("how", "timeout"), [("killed", 60), ("hung", 5), ("crashed", 60)])
def test_a_lost_worker_is_reported_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, timeout: float
) -> None:
    actions = {
        "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "hung": lambda: time.sleep(60),
        "crashed": lambda: os._exit(3),
    }
    dataset = data_set(tmp_path, [WIDE] * 12, workers=2, flip="none", timeout=timeout)
    _misbehave(monkeypatch, "i5.png", actions[how])
    start = time.perf_counter()
    with pytest.raises(MachineError, match=r"data worker lost while reading .*i5\.png") as caught:
        epoch(dataset)
    assert time.perf_counter() - start < 30
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("error", ["UserError('x', 'bad')", "ValueError('diverged')"])
def test_an_error_that_nobody_catches_ends_python(tmp_path: Path, error: str) -> None:
    """It holds on to the loader, whose workers must not be waited for."""
    dataset = data_set(tmp_path, [WIDE] * 12)
    if "bad" in error:  # within the loader
        for record in dataset.records:
            Path(record.path).write_text("")
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_loader import *
reader = VOC({str(tmp_path)!r}, "train", ["cat"], "inclusive")
dataset = DetectionDataset(reader, section(workers=2), training=True)
def loop(batches):
    for _ in batches:
        raise {error}
loop(train_loader(dataset, dataset.section, seed=0, epoch=0))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "bad" in done.stderr.splitlines()[-1] or "diverged" in done.stderr.splitlines()[-1]


def test_few_open_files_do_not_hang(tmp_path: Path) -> None:
    data_set(tmp_path, [WIDE] * 40, workers=4)
    script = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_loader import DetectionDataset, VOC, epoch, section
from dcdet.errors import MachineError
reader = VOC({str(tmp_path)!r}, "train", ["cat"], "inclusive")
dataset = DetectionDataset(reader, section(workers=4, timeout=10), training=True)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
try:
    print(len(epoch(dataset)))
except MachineError as error:
    print("MachineError", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.startswith(("20", "MachineError")), done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size: must be in"),
        ({"workers": -1}, "workers: must be in"),
        ({"pad_multiple": 0}, "pad_multiple: must be in"),
        ({"pad_images": 0}, "pad_images: must be in"),
        ({"max_bad_images": 1.5}, "max_bad_images: must be in"),
        ({"max_bad_images": float("nan")}, "max_bad_images: must be in"),
        ({"classes": []}, "classes: name at least one"),
        ({"classes": ["a", "b", "a"]}, "classes: 'a' is listed twice"),
    ],
)
def test_sections_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        section(**changes)


@pytest.mark.parametrize("sides", [(0, 10), (20, 10), (600, 100_000)])
def test_resize_out_of_range(sides: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="short: must be in"):
        ResizeSpec(*sides)
