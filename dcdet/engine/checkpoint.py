"""Checkpoints: written atomically, read without executing anything, checked on the way in.

A checkpoint is a dictionary of plain types and tensors: `format`, `model` (state dict), `meta`
(class names, config), and for resuming `optimizer`, `step` and so on; `digest` is the SHA-256 of
all the rest.
"""

import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dcdet.datasets.transforms import read_file
from dcdet.errors import DivergedError, MachineError, UserError, first_line
from dcdet.models.timm_backbone import TimmBackbone
from dcdet.weights import pickles

T = TypeVar("T")
FORMAT = 1
MAX_BYTES = 8 << 30
NAME = re.compile(r"step_(\d{8})\.pth")
log = logging.getLogger("dcdet.checkpoint")


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that `path` is at any moment the old file or the whole new one.

    Raises MachineError when the disk is full or the folder cannot be written, DivergedError for
    values that are not finite.
    """
    bad = first_non_finite(state)
    if bad:
        raise DivergedError(f"{path}: not saved: {bad} has non-finite values")
    state = {"format": FORMAT, **state}
    state["digest"] = _digest(state)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # torch reports a short write as a RuntimeError.
        what = error.strerror if isinstance(error, OSError) else "disk full or file too large"
        raise MachineError(f"{path}: checkpoint not written: {what}") from error


def load(path: Path) -> dict[str, Any]:
    """The checkpoint at `path` on the CPU. A bare state dict comes back as {"model": ...}.

    Raises UserError for a file that is missing, damaged, of another kind, or would run code.
    """
    if not path.is_file():
        raise UserError(path, "no such checkpoint")
    if path.suffix == ".safetensors":
        state = _load_safetensors(path)
    else:
        try:
            state = pickles.read_all(read_file(str(path), MAX_BYTES), path)
        except OSError as error:
            raise UserError(path, f"cannot be read: {error.strerror or error}") from error
    if state is None:
        raise UserError(path, "is not a checkpoint", "a .pth file that torch.save wrote is wanted")
    if not isinstance(state, dict):
        raise UserError(path, f"holds a {type(state).__name__}, not a checkpoint")
    if "digest" in state or "format" in state:
        digest = state.pop("digest", None)
        if _digest(state) != digest:
            raise UserError(path, "damaged: its content does not match its checksum")
        if state.get("format") != FORMAT:
            raise UserError(path, f"format {state.get('format')} is not known",
                            "written by a newer dcdet?")  # fmt: skip
    elif isinstance(state.get("model"), dict):
        state = {"model": state["model"]}
    elif isinstance(state.get("state_dict"), dict):
        state = {"model": state["state_dict"]}
    else:
        state = {"model": state}
    meta = state.get("meta", {})
    if not (
        _all(state.get("model"), Tensor)
        and state["model"]
        and isinstance(meta, dict)
        and _all(meta.get("classes", []), str)
        and _all(meta.get("category_ids", []), int)
    ):
        raise UserError(path, "holds no model weights")
    return state


def _all(items: Any, kind: type) -> bool:
    """Whether it is a list of such items, or a dictionary of them by name."""
    if isinstance(items, dict):
        return all(isinstance(name, str) for name in items) and _all([*items.values()], kind)
    return isinstance(items, list) and all(isinstance(item, kind) for item in items)


def _load_safetensors(path: Path) -> Any:
    from safetensors.torch import load_file  # comes with timm

    try:
        return load_file(path)
    except Exception as error:  # of many types
        raise UserError(path, f"not a readable checkpoint ({first_line(error)})") from error


def load_weights(model: nn.Module, path: str | Path, partial: bool = False) -> dict[str, Any]:
    """Copy the weights at `path` into `model`; the file's `meta` (class names and so on) returns.

    Every name and shape must agree, unless `partial`; then differences are logged and what fits is
    loaded. Raises UserError with the first differences, for non-finite weights, and when nothing
    fits.
    """
    path = Path(path)
    state = load(path)
    weights = plain_names(state["model"])
    copy_weights(model, weights, path, partial=partial)
    return state.get("meta", {})


def load_pretrained(backbone: nn.Module, source: str | bool) -> None:
    """ImageNet weights under torchvision's names, from a file or from its hub: "torchvision" for
    today's, "torchvision_v1" for its first ones, with which most detectors were trained.

    `dcdet convert` makes such files of other frameworks'. Classifier weights are left out; offset
    convolutions keep their zeros. A TimmBackbone has timm's weights, under timm's names; True
    downloads them. Raises UserError.
    """
    if isinstance(backbone, TimmBackbone):
        _load_timm(backbone, source)
        return
    source = str(source)
    if source in ("torchvision", "torchvision_v1"):
        from torchvision.models import get_model_weights

        bottleneck = hasattr(backbone.get_submodule("layer3.0"), "conv3")
        blocks = len(list(backbone.get_submodule("layer3").children()))
        depth = {2: 18, 6: 50 if bottleneck else 34, 23: 101}[blocks]
        known = get_model_weights(f"resnet{depth}")
        entry = known.DEFAULT if source == "torchvision" else known["IMAGENET1K_V1"]
        try:
            state = entry.get_state_dict(progress=False, check_hash=True)
        except OSError as error:
            raise UserError("model.backbone.pretrained", f"cannot download {entry.url}: {error}",
                            "save that file yourself and name its path") from error  # fmt: skip
        path = Path(entry.url)
    else:
        path = Path(source)
        if not path.is_file():
            raise UserError(
                f"model.backbone.pretrained: {source}", "no such file",
                "model/README.md tells how to get and convert it; or set it to torchvision to "
                "download today's weights, to null to train from scratch",
            )  # fmt: skip
        state = load(path)["model"]
    weights = plain_names(state)
    prefix = "backbone." if any(name.startswith("backbone.") for name in weights) else ""
    weights = {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix) and not name.startswith("fc.")
        if not name.endswith("num_batches_tracked")
    }
    copy_weights(backbone, {**own_parts(backbone), **weights}, path)


def _load_timm(backbone: TimmBackbone, source: str | bool) -> None:
    place = "model.backbone.pretrained"
    if source is True:
        try:
            weights = backbone.published_weights()
        except Exception as error:  # the hub's client raises many kinds
            what = f"cannot download timm's weights of {backbone.name}: {first_line(error)}"
            raise UserError(place, what, "save them yourself and name the file") from error
        path = Path(backbone.name)
    else:
        path = Path(str(source))
        if not path.is_file():
            raise UserError(
                f"{place}: {source}", "no such file",
                f"timm's weights of {backbone.name} are wanted; or set it to true to download "
                "them, to null to train from scratch",
            )  # fmt: skip
        weights = backbone.own_names(plain_names(load(path)["model"]))
    copy_weights(backbone, {**own_parts(backbone), **weights}, path)


def own_parts(backbone: nn.Module) -> dict[str, Tensor]:
    """What a backbone has beyond pretrained weights: offset convolutions, and BatchNorm's count."""
    return {
        name: value for name, value in backbone.state_dict().items()
        if ".offset." in name or name.endswith("num_batches_tracked")
    }  # fmt: skip


def copy_weights(
    model: nn.Module, weights: dict[str, Tensor], source: Path, partial: bool = False
) -> None:
    """Copy `weights` into `model`, all of them, or with `partial` those that fit."""
    found = compare(model.state_dict(), weights)
    if not found.fitting or (not partial and found.differ):
        raise UserError(source, f"weights do not fit this model: {found}",
                        "is it the config they were trained with? weights of another framework "
                        "need dcdet convert")  # fmt: skip
    bad = first_non_finite(found.fitting)
    if bad:
        raise UserError(source, f"{bad} has non-finite values")
    if partial:
        log.warning("%s: %s", source, found)
    model.load_state_dict(found.fitting, strict=False)


@dataclass(frozen=True)
class Comparison:
    """Weights beside those that a model has: `shaped` are those of another shape, described."""

    fitting: dict[str, Tensor]
    missing: list[str]
    unused: list[str]
    shaped: list[str]

    @property
    def differ(self) -> bool:
        """Whether anything does not fit."""
        return bool(self.missing or self.unused or self.shaped)

    def __str__(self) -> str:
        return (
            f"{len(self.fitting)} loaded, {len(self.missing)} missing{first(self.missing)}, "
            f"{len(self.unused)} unused{first(self.unused)}, "
            f"{len(self.shaped)} of another shape{first(self.shaped)}"
        )


def compare(
    own: dict[str, Tensor], weights: dict[str, Tensor], entries: dict[str, str] | None = None
) -> Comparison:
    """What of `weights` fits the state dict `own`; `entries` may say how their file calls them."""
    entries = entries or {}
    return Comparison(
        fitting={n: w for n, w in weights.items() if n in own and w.shape == own[n].shape},
        missing=[name for name in own if name not in weights],
        unused=[entries.get(name, name) for name in weights if name not in own],
        shaped=[
            f"{entries.get(n, n)} is {tuple(weights[n].shape)}, wanted {tuple(own[n].shape)}"
            for n in own
            if n in weights and weights[n].shape != own[n].shape
        ],
    )


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint in `folder` that is whole; damaged ones are named and passed over."""
    for path in sorted_checkpoints(folder, reverse=True):
        try:
            return path, load(path)
        except UserError as error:
            log.warning("passed over: %s", error)
    return None


def sorted_checkpoints(folder: Path, reverse: bool = False) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if NAME.fullmatch(p.name)), reverse=reverse)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what killed writers left behind."""
    for path in sorted_checkpoints(folder)[:-keep]:
        path.unlink(missing_ok=True)
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def plain_names(weights: dict[str, T]) -> dict[str, T]:
    """Without what a wrapper of the model put before every name."""
    for prefix in ("module.", "_orig_mod."):
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def first(names: list[str]) -> str:
    """The first of some names in brackets, for a message."""
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


def first_non_finite(value: Any, name: str = "") -> str:
    """The name of a tensor with a NaN or an infinity in a nesting of dictionaries, or ""."""
    if isinstance(value, Tensor):
        return name if value.is_floating_point() and not bool(value.isfinite().all()) else ""
    if isinstance(value, dict):
        found = (first_non_finite(item, f"{name}.{key}".lstrip(".")) for key, item in value.items())
        return next(filter(None, found), "")
    return ""


def _digest(value: Any) -> str:
    """SHA-256 over a nesting of dictionaries, lists, plain values and tensors."""
    sha = hashlib.sha256()

    def feed(item: Any) -> None:
        if isinstance(item, Tensor):
            sha.update(f"{item.dtype}{tuple(item.shape)}".encode())
            sha.update(
                item.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
        elif isinstance(item, dict):
            for key, inner in item.items():
                sha.update(json.dumps(key).encode())
                feed(inner)
        elif isinstance(item, list | tuple):
            sha.update(f"[{len(item)}]".encode())
            for inner in item:
                feed(inner)
        else:
            sha.update(json.dumps(item).encode())

    feed(value)
    return sha.hexdigest()
