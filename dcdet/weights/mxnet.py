"""MXNet's `.params` files, and the names in those of the 2017 release.

Layout, little endian; u: unsigned, i: signed integers:

    file    u64 0x112; u64 0; u64 n; n arrays; u64 n, or 0 without names; n times u64 length, name
    array   u32 word, which says how the shape follows:
              0xF993FAC9, 0xF993FACA (V2, V3): i32 storage (0: dense); i32 rank; i64 each side
              0xF993FAC8 (V1): i32 rank; i64 each side
              any other word (V0) is the rank itself; u32 each side
            i32 device type; i32 device; i32 dtype; the values in C order
    An array of rank 0 ends after its shape and holds nothing; in V3 that is rank -1 or a side of
    -1, and rank 0 is a scalar.
"""

import math
import re
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dcdet.errors import UserError
from dcdet.weights import Translated, tensor

MAGIC = struct.pack("<Q", 0x112)
V1, V2, V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
STORAGE = {1: "row_sparse", 2: "csr"}
DTYPES = [np.dtype(code) for code in ("<f4", "<f8", "<f2", "u1", "<i4", "i1", "<i8", "?")]
# More than any network has; they keep a damaged file from being taken for endless small arrays.
MAX_ARRAYS, MAX_RANK = 100_000, 32

# The release's layers, but for those of residual blocks: `own_name`.
MODULES = {
    "conv1": "backbone.conv1",
    "bn_conv1": "backbone.bn1",
    **{f"fpn_p{level}_1x1": f"neck.lateral.c{level}" for level in range(2, 6)},
    **{f"fpn_p{level}": f"neck.output.p{level}" for level in range(2, 6)},
    "fpn_p6": "neck.extra",
    "rpn_conv_3x3": "rpn.conv",
    "rpn_conv": "rpn.conv",  # FPN
    "rpn_cls_score": "rpn.score",
    "rpn_bbox_pred": "rpn.delta",
    "conv_new_1": "roi_head.reduce",
    "rfcn_cls": "roi_head.score",
    "rfcn_bbox": "roi_head.delta",
    "rfcn_cls_offset_t": "roi_head.score_offset",
    "rfcn_bbox_offset_t": "roi_head.delta_offset",
    "fc_new_1": "roi_head.fc1",
    "fc_new_2": "roi_head.fc2",
    "cls_score": "roi_head.score",
    "bbox_pred": "roi_head.delta",
    "offset": "roi_head.offset.c5",
    **{f"offset_p{level}": f"roi_head.offset.p{level}" for level in range(2, 6)},
    "fc6": "fc6",  # DeepLab
    "score": "score",
}
UPSAMPLING = "upsampling_weight"  # DeepLab's: bilinear and never trained; dcdet computes it
KINDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias",
         "moving_mean": "running_mean", "moving_var": "running_var"}  # fmt: skip
_ENTRY = re.compile(rf"(\w+?)_({'|'.join(KINDS)})")
_BLOCK = re.compile(r"(res|bn)([2-5])(?:([a-f])|b(\d{1,2}))_branch(1|2[abc])(_offset)?")

# What the release's networks were trained with.
BACKBONE_RULES = {
    "model.pixel_mean": (123.15, 115.90, 103.06),
    "model.pixel_std": (1.0, 1.0, 1.0),
    "model.backbone.stride_in": "1x1",
    "model.backbone.stem_pool": "ceil",
}
RULES = {
    **BACKBONE_RULES,
    "model.pixels": "inclusive",
    "model.backbone.deform.border": "original",
}


def read(content: bytes, path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a `.params` file, views of `content`, by name; None for another kind of file.

    Arrays without names are called by their number, from "0". Raises UserError for a file that is
    damaged, or holds sparse arrays. Nothing is allocated that `content` has no bytes for.
    """
    if not content.startswith(MAGIC):
        return None
    file = _Cursor(content, path)
    _, _, number = file.numbers("QQQ")
    if number > MAX_ARRAYS:
        raise file.error(f"damaged: {number} arrays, at most {MAX_ARRAYS} are read")
    arrays = []
    for index in range(number):
        file.part = f"array {index + 1} of {number}"
        arrays.append(file.array())
    file.part = "names"
    (named,) = file.numbers("Q")
    if named not in (0, number):
        raise file.error(f"damaged: {named} names for {number} arrays")
    names: dict[str, None] = {}
    for index in range(named):
        file.part = f"name {index + 1} of {named}"
        name = file.text()
        if name in names:
            raise file.error(f"{name!r:.80} is the name of two arrays")
        names[name] = None
    if file.left:
        file.part = "end"
        raise file.error(f"damaged: {file.left} bytes after the last name")
    return dict(zip(names or map(str, range(number)), arrays, strict=True))


class _Cursor:
    """A place in a file's bytes; `part` says what is read there."""

    def __init__(self, content: bytes, path: Path) -> None:
        self.content, self.path, self.place, self.part = content, path, 0, "header"

    @property
    def left(self) -> int:
        return len(self.content) - self.place

    def error(self, what: str, hint: str = "") -> UserError:
        return UserError(f"{self.path}: {self.part}", what, hint)

    def take(self, size: int) -> int:
        """Step over `size` bytes; where they begin."""
        if size > self.left:
            raise self.error(f"cut off or damaged: {size} bytes wanted, {self.left} are left",
                             "download or copy it again")  # fmt: skip
        begin = self.place
        self.place += size
        return begin

    def numbers(self, form: str) -> tuple[int, ...]:
        form = "<" + form
        return struct.unpack_from(form, self.content, self.take(struct.calcsize(form)))

    def text(self) -> str:
        (size,) = self.numbers("Q")
        begin = self.take(size)
        try:
            return self.content[begin : begin + size].decode()
        except UnicodeDecodeError as error:
            raise self.error("damaged: not UTF-8") from error

    def array(self) -> np.ndarray:
        (word,) = self.numbers("I")
        storage, rank, side = 0, word, "I"
        if word in (V2, V3):
            (storage, rank), side = self.numbers("ii"), "q"
        elif word == V1:
            (rank,), side = self.numbers("i"), "q"
        if storage in STORAGE:
            raise self.error(f"{STORAGE[storage]} storage is not read",
                             "in MXNet, array.tostype('default') makes it dense")  # fmt: skip
        if storage or not -1 <= rank <= MAX_RANK:
            raise self.error(f"damaged: storage type {storage}, {rank} dimensions")
        shape = self.numbers(f"{rank}{side}") if rank > 0 else ()
        if rank == -1 or (word == V3 and -1 in shape) or (word != V3 and rank == 0):
            return np.zeros(0, np.float32)  # MXNet's "none"
        _device_type, _device, code = self.numbers("iii")
        if not 0 <= code < len(DTYPES):
            raise self.error(f"dtype {code} is not known")
        if min(shape, default=0) < 0:
            raise self.error(f"damaged: shape {shape}")
        count = math.prod(shape)
        begin = self.take(count * DTYPES[code].itemsize)
        try:
            return np.frombuffer(self.content, DTYPES[code], count, begin).reshape(shape)
        except ValueError as error:  # nothing, but of sides that no array can have
            raise self.error(f"damaged: shape {shape}") from error


def own_name(name: str) -> str | None:
    """dcdet's name of a parameter of the release: `res4b1_branch2b_offset_bias` ->
    `backbone.layer3.1.conv2.offset.bias`; None for what dcdet has no counterpart of."""
    entry = _ENTRY.fullmatch(name)
    if not entry:
        return None
    module, kind = entry.groups()
    if module not in MODULES:
        block = _BLOCK.fullmatch(module)
        if not block:
            return None
        layer, stage, letter, number, branch, offset = block.groups()
        index = int(number) if number else "abcdef".index(letter)
        norm = layer == "bn"
        if branch == "1":
            part = f"downsample.{int(norm)}"
        else:
            part = f"{'bn' if norm else 'conv'}{'abc'.index(branch[1]) + 1}"
        part += ".offset" if offset else ""
        return f"backbone.layer{int(stage) - 1}.{index}.{part}.{KINDS[kind]}"
    return f"{MODULES[module]}.{KINDS[kind]}"


def translate(arrays: dict[str, np.ndarray], box_std: Tensor | None, path: Path) -> Translated:
    """The release's entries under dcdet's names; only those prefixed `arg:` or `aux:` count.

    dcdet keeps the box weights X of training, whose output is in units of `box_std` (4,). The
    release's files have them as X and, for its test network, X * box_std as X_test; an X alone is
    the test network's. Raises UserError.
    """
    found: dict[str, dict[bool, str]] = {}  # dcdet's name -> whether it is X_test -> entry
    unknown, notes = [], []
    for entry in arrays:
        prefix, _, name = entry.partition(":")
        plain = name.replace("_test", "")
        own = own_name(plain) if prefix in ("arg", "aux") else None
        if name == UPSAMPLING and prefix == "arg":
            _check_bilinear(arrays[entry], f"{path}: {entry}")
            notes.append(f"{entry}: the bilinear upsampling, which dcdet computes")
            continue
        if own is None:
            unknown.append(entry)
            continue
        first = found.setdefault(own, {}).setdefault(name != plain, entry)
        if first != entry:
            raise UserError(f"{path}: {entry}", f"{first} is the same parameter")
    values, entries = {}, {}
    for own, pair in found.items():
        tensors = {test: tensor(arrays[entry], f"{path}: {entry}") for test, entry in pair.items()}
        if len({value.shape for value in tensors.values()}) > 1:
            raise UserError(f"{path}: {' and '.join(pair.values())}", "have other shapes")
        entries[own] = pair[min(pair)]  # X, if it is there
        scale = _box_scale(own, entries[own], tensors[min(pair)], box_std)
        values[own], note = _training_weight(tensors.get(False), tensors.get(True), scale)
        if note:
            notes.append(f"{entries[own]}: {note}")
    heads = any(not own.startswith("backbone.") for own in values)
    return Translated(values, entries, unknown, notes, RULES if heads else BACKBONE_RULES)


def _check_bilinear(array: np.ndarray, where: str) -> None:
    """Raises UserError for upsampling weights (K, 1, n, n) that are not the bilinear ones."""
    side = array.shape[-1] if array.ndim == 4 else 0
    ramp = 1 - np.abs(2 * np.arange(side) + 1 - side) / (side + side % 2)
    if not side or not np.allclose(array, ramp[:, None] * ramp, atol=1e-6):
        raise UserError(where, "is not the bilinear upsampling that dcdet's DeepLab computes")


def _box_scale(own: str, entry: str, value: Tensor, box_std: Tensor | None) -> Tensor | float:
    """What a row of box weights is multiplied with for the test network: its coordinate's std.

    R-FCN's rows are x, y, w, h of background and object, G * G rows each; the others' x, y, w, h of
    each class.
    """
    rows = len(value) if value.dim() else 0
    unit = 8 if "rfcn" in entry else 4
    if box_std is None or not own.startswith("roi_head.delta.") or rows % unit:
        return 1.0
    std = box_std.repeat(2).repeat_interleave(rows // 8) if unit == 8 else box_std.repeat(rows // 4)
    return std.view(-1, *[1] * (value.dim() - 1))


def _training_weight(
    plain: Tensor | None, test: Tensor | None, scale: Tensor | float
) -> tuple[Tensor, str]:
    """The weight for training out of X and X_test, and what there is to say about it."""
    if plain is not None and test is not None:
        wanted = plain * scale
        # Another std than the config's, or a mean, leaves only X_test right.
        if torch.allclose(wanted, test, rtol=1e-2, atol=1e-5):
            return plain, ""
        note = "its _test is not it times model.roi_head.box_std; the _test is taken"
        return test / scale, note
    only = test if plain is None else plain
    assert only is not None
    if isinstance(scale, float):
        return only, ""
    return only / scale, "taken for the test network's, divided by model.roi_head.box_std"
