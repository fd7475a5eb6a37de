"""From config sections to the objects that training and testing share."""

from collections.abc import Iterator, Sequence
from typing import Any

from dcdet.datasets.label_maps import SegmentationDataset
from dcdet.datasets.loader import DataSection, DetectionDataset, View
from dcdet.datasets.records import have_masks
from dcdet.errors import UserError
from dcdet.registry import build, task_of

# Keys that a resumed run may change: they do not change what a step computes.
FREE_ON_RESUME = (
    "solver.epochs", "solver.max_bad_steps", "solver.log_every", "solver.checkpoint_every",
    "solver.keep_checkpoints", "data.workers", "data.test", "model.backbone.pretrained", "test",
    "model.postprocess", "model.tiles",
)  # fmt: skip


def build_reader(config: Any, part: str) -> Any:
    """The reader of `data.train` or `data.test`, which must fit the model.

    Raises UserError.
    """
    reader = read_data_set(config, part)
    for error in misfits(config, part, reader):
        raise error
    return reader


def read_data_set(config: Any, part: str) -> Any:
    """The reader of `data.train` or `data.test`. Raises UserError."""
    return build(
        config.data[part], "dataset",
        classes=config.data.classes, pixels=config.model.get("pixels"),
    )  # fmt: skip


def misfits(config: Any, part: str, reader: Any) -> Iterator[UserError]:
    """Why a data set cannot be used with the config's model: other classes; to train, a mask head
    needs masks, and the statistics of a segmentation's batches more than one image."""
    if len(reader.classes) != config.model.num_classes:
        yield UserError(
            config.where("model.num_classes"),
            f"{config.model.num_classes}, but data.{part} has {len(reader.classes)} classes: "
            + ", ".join(reader.classes[:8]) + (", ..." if len(reader.classes) > 8 else ""),
            f"set model.num_classes={len(reader.classes)}, or list the classes in data.classes",
        )  # fmt: skip
    if part != "train":
        return
    if config.model.get("mask_head") is not None and not have_masks(reader.records):
        yield UserError(
            config.where("data.train"),
            "delivers no instance masks, which model.mask_head learns from",
            "add masks: true, where the data set has them, or set model.mask_head to null",
        )
    batch_norm = config.model.backbone.get("norm") == "bn"
    if task_of(config) == "segmentation" and batch_norm and config.data.batch_size == 1:
        yield UserError(
            config.where("data.batch_size"),
            "1 image is too few for model.backbone.norm: bn, whose statistics are the batch's",
            "set data.batch_size to 2 or more, or model.backbone.norm to eval_bn or frozen_bn",
        )


def build_dataset(
    config: Any,
    reader: Any,
    section: DataSection,
    *,
    training: bool,
    views: Sequence[View] | None = None,
) -> DetectionDataset:
    """A reader's images as samples for the config's model."""
    kind = SegmentationDataset if task_of(config) == "segmentation" else DetectionDataset
    return kind(reader, section, training=training, views=views)


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """A plain config as {"section.key": value}, without what may change on resuming."""
    flat: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if any(path == free or path.startswith(free + ".") for free in FREE_ON_RESUME):
            return
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else str(key))
        else:
            flat[path] = value

    walk(config, "")
    return flat
