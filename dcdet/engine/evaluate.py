"""Evaluation of a trained model on a data set."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from dcdet.datasets.loader import ResizeSpec, View, test_loader
from dcdet.engine.checkpoint import load_weights
from dcdet.engine.runtime import (
    Precision,
    Runtime,
    autocast,
    output_folder,
    processes,
    strict_json,
    write_bytes,
)
from dcdet.engine.setup import build_dataset, build_reader
from dcdet.models.build import build_model
from dcdet.registry import build, check
from dcdet.structures import Batch

log = logging.getLogger("dcdet.test")


@dataclass(frozen=True)
class TestSection:
    """How a model is measured, and how it looks at images.

    Args:
        evaluator: a node of role evaluator.
        precision: the forward pass's.
        scales: every image is shown at each of these sizes, and detections are chosen among what
            is found at all of them; None: at `data.resize`.
        flip: it is shown mirrored, too.
    """

    evaluator: Mapping[str, Any]
    precision: Precision
    scales: list[ResizeSpec] | None = None
    flip: bool = False

    def __post_init__(self) -> None:
        if self.scales == []:
            raise ValueError("scales: name at least one, or write null")

    def views(self, resize: ResizeSpec) -> list[View]:
        """What the network is shown of each image, where `data.resize` is `resize`."""
        flips = (False, True) if self.flip else (False,)
        return [View(scale, flip) for scale in self.scales or [resize] for flip in flips]


def evaluate(config: Any, weights: Path, output: Path, *, device: str | None = None) -> int:
    """Detect on, or segment, every image of `data.test`; write metrics.json, and detections.json or
    predictions/*.png, to `output`.

    The command's exit code returns: 1 if images had to be skipped. Raises UserError, MachineError.
    """
    with ExitStack() as stack:
        runtime = stack.enter_context(processes(device))
        if runtime.rank == 0:
            stack.enter_context(output_folder(output))
        return _evaluate(config, weights, output, runtime)


def _evaluate(config: Any, weights: Path, output: Path, runtime: Runtime) -> int:
    experiment = check(config)
    data = experiment.data
    reader = build_reader(config, "test")
    model = build_model(config)
    meta = load_weights(model, weights)
    if meta.get("classes", reader.classes) != reader.classes:
        log.warning("%s was trained for other class names: %s", weights, ", ".join(meta["classes"]))
    model.to(runtime.device).eval()
    views = experiment.test.views(data.resize)
    dataset = build_dataset(config, reader, data, training=False, views=views)
    evaluator = build(config.test.evaluator, "evaluator", reader=reader)
    start = time.perf_counter()
    images = test_loader(dataset, data, runtime.rank, runtime.world)
    folders: dict[str, None] = {}  # with a file for each image
    # One by one: all bitmaps of a data set together would not fit into memory.
    for one in detect(model, images, experiment.test.precision, runtime.device):
        evaluator.update(one)
        for name in _write(output, evaluator.image_files(one)):
            folders[name.split("/")[0]] = None
    parts = runtime.gather((evaluator.found, evaluator.dropped, dataset.bad))
    if runtime.rank:
        return 0
    seconds = time.perf_counter() - start
    skipped: dict[str, str] = {}
    for found, _, bad in parts:
        evaluator.found |= found
        skipped |= bad
    evaluator.dropped = sum(dropped for _, dropped, _ in parts)
    total = len(reader.records)
    metrics = {"images": total - len(skipped), "of": total, **evaluator.result()}
    results = {**evaluator.result_files(), "metrics.json": metrics}
    _write(output, {name: strict_json(value).encode() for name, value in results.items()})
    log.info(
        "evaluated %d of %d images, %.1f images/s", total - len(skipped), total, total / seconds
    )
    if evaluator.dropped:
        log.warning("%d %s", evaluator.dropped, evaluator.dropped_are)
    masks = {f"segm {name}": value for name, value in metrics.get("segm", {}).items()}
    classes = {}
    if figure := evaluator.class_figure:
        classes = {f"{figure} {name}": of[figure] for name, of in metrics["per_class"].items()}
    for name, value in {**classes, **metrics, **masks}.items():
        if isinstance(value, float) or value is None:
            log.info("%s %s", name, "not defined" if value is None else f"{value:.4f}")
    log.info("written: %s", ", ".join(str(output / name) for name in [*results, *folders]))
    return 1 if skipped else 0


def detect(
    model: nn.Module, images: Iterable[list[Batch]], precision: Precision, device: torch.device
) -> Iterator[Any]:
    """What the model finds in every image, given as its views: Detections or a Segmentation, on the
    CPU."""
    for views in images:
        with autocast(device, precision):
            shown = [view.to(device) for view in views]
            found = cast(Any, model).predict(*shown)
        yield from (one.cpu() for one in found)


def _write(output: Path, files: Mapping[str, bytes]) -> list[str]:
    """Write files into the output folder and its folders; their names."""
    for name, content in files.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(output / name, content)
    return list(files)
