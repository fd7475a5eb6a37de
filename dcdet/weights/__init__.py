"""Checkpoints of other frameworks, one module a family, in dcdet's own terms.

A family's `translate` gives the entries of a file dcdet's names and values. MXNet's has a `read` of
its own; the others' files are read by `pickles`, and `knows` says whose the names are.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcdet.errors import UserError
from dcdet.weights.pickles import File

# Parameters of a ResNet, under torchvision's names.
RESNET = r"(?:conv1|bn1|layer[1-4]\.\d{1,3}\.(?:conv[123]|bn[123]|downsample\.[01]))"
KINDS = ("weight", "bias", "running_mean", "running_var")
STRANGE = "?"  # begins the names of entries that have no counterpart

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass
class Translated:
    """A checkpoint in dcdet's terms.

    `values` are float32, by dcdet's names; `entries` name what each was made from in the file;
    `unknown` are the entries that mean nothing to dcdet; `notes` say what had to be decided.
    `rules` are values that the config must have for these weights to mean the same, by key path.
    `classes`: the names of the classes, where the file tells.
    """

    values: dict[str, Tensor]
    entries: dict[str, str]
    unknown: list[str]
    notes: list[str] = field(default_factory=list)
    rules: Mapping[str, Any] = field(default_factory=dict)
    classes: list[str] | None = None

    @property
    def backbone_only(self) -> bool:
        """Whether there are weights of a backbone and of nothing else that dcdet has."""
        known = [name for name in self.values if not name.startswith(STRANGE)]
        return bool(known) and all(name.startswith("backbone.") for name in known)


def renamed(file: File, own_name: Callable[[str], str | None], unneeded: str) -> Translated:
    """The entries of a file under the names that `own_name` gives them.

    Those that match `unneeded` are left out, and BatchNorm's count without a word; those without
    a name are kept under one that fits no model, which is so refused by name.
    """
    found = Translated({}, {}, list(file.others))
    for entry, array in file.weights.items():
        if entry.endswith(".num_batches_tracked"):
            continue
        if re.fullmatch(unneeded, entry):
            found.unknown.append(entry)
            continue
        own = own_name(entry)
        if own is None:
            own, array = STRANGE + entry, np.zeros(0, np.float32)
        if own in found.values:
            raise UserError(f"{file.path}: {entry}", f"{found.entries[own]} is the same parameter")
        found.values[own] = tensor(array, f"{file.path}: {entry}")
        found.entries[own] = entry
    return found


def by_module(modules: Mapping[str, str], entry: str) -> str | None:
    """The name of a parameter whose module is one of `modules`."""
    module, _, kind = entry.rpartition(".")
    return f"{modules[module]}.{kind}" if kind in KINDS and module in modules else None


def tensor(array: np.ndarray, where: str) -> Tensor:
    """A copy in float32. Raises UserError for anything but floating point numbers."""
    if array.dtype.kind != "f":
        raise UserError(where, f"holds {array.dtype.name}, not the weights of a network")
    with np.errstate(over="ignore"):  # an infinity is found and named later
        return torch.from_numpy(array.astype(np.float32, order="C"))


def move_background(found: Translated) -> None:
    """Background from the last class to dcdet's place: first, with four unused rows for boxes."""
    for kind in ("weight", "bias"):
        score, delta = f"roi_head.score.{kind}", f"roi_head.delta.{kind}"
        if score in found.values:
            found.values[score] = found.values[score].roll(1, dims=0)
        if delta in found.values:
            value = found.values[delta]
            found.values[delta] = torch.cat([value.new_zeros(4, *value.shape[1:]), value])


def swap_colours(found: Translated) -> None:
    """The first convolution of a network of BGR images, for RGB images."""
    stem = found.values.get("backbone.conv1.weight")
    if stem is not None and stem.dim() == 4:
        found.values["backbone.conv1.weight"] = stem.flip(1)
