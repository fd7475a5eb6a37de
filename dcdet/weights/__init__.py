"""Checkpoints of other frameworks, one module a family, in dcdet's own terms.

A family's `read` takes a file's bytes apart, or says that they are of another family; its
`translate` gives the entries dcdet's names and values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Translated:
    """A checkpoint in dcdet's terms.

    `values` are float32, by dcdet's names; `entries` name what each was made from in the file;
    `unknown` are the entries that mean nothing to dcdet; `notes` say what had to be decided.
    `rules` are values that the config must have for these weights to mean the same, by key path.
    """

    values: dict[str, Tensor]
    entries: dict[str, str]
    unknown: list[str]
    notes: list[str]
    rules: Mapping[str, Any]

    @property
    def backbone_only(self) -> bool:
        """Whether there are weights of a backbone and of nothing else."""
        return bool(self.values) and all(name.startswith("backbone.") for name in self.values)
