"""Checkpoints of other frameworks in, a dcdet checkpoint out."""

import hashlib
import logging
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from dcdet.config import short
from dcdet.datasets.coco import CATEGORY_IDS
from dcdet.datasets.transforms import read_file
from dcdet.engine import checkpoint
from dcdet.errors import UserError
from dcdet.models.build import build_model
from dcdet.registry import lookup, task_of
from dcdet.weights import Translated, detectron2, mmdet, mxnet, pickles, torchvision
from dcdet.weights.pickles import File

OFFICIAL_SET = re.compile(r"[a-z-]+20(14|15|17)")
log = logging.getLogger("dcdet.convert")


class Family(Protocol):
    """What a module of dcdet/weights offers."""

    def knows(self, names: Collection[str]) -> bool:
        """Whether these are the names of an architecture of this family."""

    def translate(self, file: File) -> Translated:
        """The entries in dcdet's terms."""


FAMILIES: dict[str, Family] = {
    "mmdetection": mmdet, "torchvision": torchvision, "detectron2": detectron2,
}  # fmt: skip
READ = (
    "it reads MXNet's .params files, and mmdetection's, torchvision's and detectron2's .pth and "
    ".pkl files of ResNets and of Faster and Mask R-CNN with them"
)


def convert(config: Any, source: Path, destination: Path, report: Callable[[str], None]) -> int:
    """Write the weights in `source` as a checkpoint for the config's model, or for its backbone
    where the file has nothing else; `report` is given the lines to show.

    The command's exit code returns. Raises UserError, before anything is written, for a file that
    is not known, is damaged, or does not fit the config.
    """
    if destination.exists() and destination.samefile(source):
        raise UserError(destination, "is the file that is to be converted", "name another")
    try:
        content = read_file(str(source), checkpoint.MAX_BYTES)
    except OSError as error:
        raise UserError(source, f"cannot be read: {error.strerror or error}") from error
    sha256 = hashlib.sha256(content).hexdigest()
    name, file = _read(content, source, sha256)
    model = build_model(config)
    if name == "MXNet":
        box_std = dict(model.named_buffers()).get("roi_head.box_std")
        translated = mxnet.translate(file.weights, box_std, source)
    else:
        translated = FAMILIES[name].translate(file)
    weights = _fitting(model, translated, source, config.where())
    for key, wanted in translated.rules.items():
        value = _look_up(config, key)
        if value is not None and value != wanted:
            log.warning("%s: %s is %s, these weights were trained with %s",
                        config.where(key), key, short(value), short(wanted))  # fmt: skip
    names = None if translated.backbone_only else translated.classes
    meta = {
        **_classes(config, names),
        "config": config.plain(),
        "origin": {"family": name, "file": source.name, "sha256": sha256},
    }
    checkpoint.save(destination, {"model": weights, "meta": meta})
    only = translated.backbone_only
    into = "model.backbone, the file has nothing else" if only else "the whole model"
    report(f"{source}: {name}, {len(file.weights)} arrays, sha256 {sha256}")
    report(f"{len(translated.values)} loaded into {into}")
    report("0 missing")
    report(f"{len(translated.unknown)} unused{checkpoint.first(translated.unknown)}")
    for note in translated.notes:
        report(note)
    use = f"model.backbone.pretrained={destination}" if only else f"--weights {destination}"
    report(f"written: {destination} (use it with {use})")
    return 0


def _read(content: bytes, source: Path, sha256: str) -> tuple[str, File]:
    """The name of a file's family, and what is in it."""
    arrays = mxnet.read(content, source)
    if arrays is not None:
        return "MXNet", File(source, sha256, arrays, [], {})
    file = pickles.read(content, source, sha256)
    if file is None:
        raise UserError(source, "is of no kind that convert reads", READ)
    if {"format", "digest"} <= file.about.keys():
        raise UserError(source, "is a dcdet checkpoint already", "give it to --weights as it is")
    file = replace(file, weights=checkpoint.plain_names(file.weights))
    known = [name for name, family in FAMILIES.items() if family.knows(file.weights)]
    if not known:
        what = f"has names of no network that is known{checkpoint.first(list(file.weights))}"
        raise UserError(source, what, READ)
    if len(known) > 1:
        raise UserError(source, f"has the names of {' and '.join(known)}", "only one can be right")
    return known[0], file


def _fitting(
    model: nn.Module, translated: Translated, source: Path, config: str
) -> dict[str, Tensor]:
    """The state dict to be saved, if nothing is missing or left over. Raises UserError."""
    values, entries, target = translated.values, translated.entries, model
    if translated.backbone_only:
        target = model.get_submodule("backbone")
        values = {name.removeprefix("backbone."): value for name, value in values.items()}
        entries = {name.removeprefix("backbone."): entry for name, entry in entries.items()}
    bad = checkpoint.first_non_finite(values)
    if bad:
        raise UserError(f"{source}: {entries[bad]}", "has non-finite values")
    spare = checkpoint.own_parts(target)
    if not translated.backbone_only:
        spare = {name: value for name, value in spare.items() if ".offset." not in name}
    own = {n: v for n, v in target.state_dict().items() if n in values or n not in spare}
    found = checkpoint.compare(own, values, entries)
    for name in found.fitting:
        log.debug("loaded: %s from %s", name, entries[name])
    for title, names in (
        ("missing", found.missing), ("unused", found.unused + translated.unknown),
        ("of another shape", found.shaped),
    ):  # fmt: skip
        for name in names:
            log.debug("%s: %s", title, name)
    if found.differ:
        what = f"does not fit the model of {config}: {found}"
        raise UserError(source, what, "is it the config that these weights were trained with?")
    return values if translated.backbone_only else {**spare, **values}


def _look_up(config: Any, key_path: str) -> Any:
    for key in key_path.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _classes(config: Any, of_file: list[str] | None = None) -> dict[str, Any]:
    """Names and category ids of the labels, as entries of `meta`, as far as the file, whose names
    come first, and the config tell."""
    names, test, number = config.data.classes, config.data.test, config.model.num_classes
    official = test.type == "COCO" and all(
        OFFICIAL_SET.fullmatch(part) for part in (test.get("image_set") or "").split("+")
    )
    data_set = lookup(test, "dataset")
    fixed, fixed_ids = (getattr(data_set, name, None) for name in ("CLASSES", "CATEGORY_IDS"))
    if names is None and official and number == len(CATEGORY_IDS):
        names = CATEGORY_IDS
    names = fixed if names is None else names
    if of_file and len(of_file) == number:
        if names is not None and list(names) != of_file:
            log.warning(
                "%s: data.classes are %s, those of the file %s: the file's are kept",
                config.where("data.classes"), short(list(names)), short(of_file),
            )  # fmt: skip
        names = of_file
    if names is None:
        return {}
    if len(names) != number:
        raise UserError(
            config.where("data.classes"), f"{len(names)} names, but model.num_classes is {number}"
        )
    classes: dict[str, Any] = {"classes": list(names)}
    if official and all(name in CATEGORY_IDS for name in names):
        classes["category_ids"] = [CATEGORY_IDS[name] for name in names]
    elif fixed_ids is not None and list(names) == list(fixed or ()):
        classes["category_ids"] = list(fixed_ids)
    elif test.type != "COCO":  # whose ids stand in its annotation file
        first = 0 if task_of(config) == "segmentation" else 1
        classes["category_ids"] = list(range(first, first + number))
    return classes
