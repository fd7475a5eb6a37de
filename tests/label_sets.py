"""Small segmentation data sets on disk and in memory, made without dcdet's readers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from conftest import ROOT
from data_sets import picture
from torch import Tensor

from dcdet.structures import Batch, Target

CONFIG = ROOT / "configs" / "small" / "deeplab_r18_camvid.yaml"
CLASSES = ["sky", "road", "car"]
# The smallest network and images that the config can be shrunk to.
SMALL = [
    "model.num_classes=3", f"data.classes=[{', '.join(CLASSES)}]", "model.channels=8",
    "data.resize={short: 48, long: 64}", "data.crop=[48, 48]", "data.batch_size=2",
    "data.workers=0", "solver.epochs=1", "solver.log_every=1", "solver.warmup=null",
    "solver.milestones=[]",
]  # fmt: skip


def label_map(size: tuple[int, int] = (48, 64), seed: int = 0) -> np.ndarray:
    """Areas of the labels 0, 1, 2 and some of 255, (h, w) uint8."""
    values = np.array([0, 0, 1, 1, 2, 255], dtype=np.uint8)
    small = np.random.default_rng(seed).choice(values, (5, 6))
    return cv2.resize(small, size[::-1], interpolation=cv2.INTER_NEAREST)


def write_labels(root: Path, split: str, maps: Mapping[str, np.ndarray]) -> Path:
    """images/SPLIT and labels/SPLIT with a picture of each label map's size."""
    for folder in ("images", "labels"):
        (root / folder / split).mkdir(parents=True, exist_ok=True)
    for seed, (name, labels) in enumerate(maps.items()):
        size = labels.shape[0], labels.shape[1]
        cv2.imwrite(str(root / "images" / split / f"{name}.png"), picture(size, seed))
        cv2.imwrite(str(root / "labels" / split / f"{name}.png"), labels)
    return root


def folder(root: Path, *more: str, train: int = 4, test: int = 3) -> list[str]:
    """Overrides that put a small folder, written here, in place of the config's data."""
    for number, split, seed in ((train, "train", 0), (test, "val", 100)):
        maps = {f"{split}{i}": label_map(seed=seed + i) for i in range(number)}
        write_labels(root, split, maps)
    nodes = [f"data.{part}={{type: LabelFolder, root: {root}, split: {split}}}"
             for part, split in (("train", "train"), ("test", "val"))]  # fmt: skip
    return [*SMALL, *nodes, *more]


def batch(
    images: Tensor, sizes: list[tuple[int, int]] | None = None, maps: Any = None, flip: bool = False
) -> Batch:
    """Images (B, 3, H, W), with label maps where there are any; originals are of the same size."""
    number = len(images)
    sizes = sizes or [(images.shape[2], images.shape[3])] * number
    targets = [
        Target.without_objects(f"i{i}", size, None if maps is None else torch.as_tensor(maps[i]))
        for i, size in enumerate(sizes)
    ]
    return Batch(
        images=images, sizes=sizes, targets=targets, scales=[1.0] * number,
        seeds=list(range(number)), flips=(flip,) * number,
    )  # fmt: skip
