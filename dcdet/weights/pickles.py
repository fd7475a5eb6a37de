"""Files with a pickle inside, torch's `.pth` in both its forms and plain `.pkl`: read, never run.

Python's pickle runs what a file says; torch's restricted reader can still be crashed, stalled or
filled by one. Here `pickletools` takes the pickle apart, and a small machine puts together what
weights are made of. Nothing is imported or called by the names in a file: those of dictionaries,
arrays and tensors are acted out below, some stand for objects that nobody needs, and any other
refuses the file.

Memory stays within a few times the size of the file: arrays are views of its bytes, what is copied
is counted. Only text and small numbers are hashed: other keys can stall or crash the hashing.

    .pkl            one pickle of protocol 2 or later, of Python 2 or 3
    .pth            a zip archive: NAME/data.pkl, and NAME/data/KEY for each storage
    .pth, before    pickles: magic number, version, machine, content, the storages' keys; then each
      torch 1.6     storage: its number of elements (i64), the elements
"""

import io
import math
import pickletools
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcdet.errors import UserError

# A training checkpoint of ResNet-101 has 50 thousand.
MAX_OPERATIONS = 500_000
MAX_INTEGER_BITS, MAX_RANK = 128, 32
MAX_KEY = 1 << 16  # of the numbers that are keys: parameters in the state of an optimizer
MAGIC = 0x1950A86A20F9469CFC6C

STORAGES = {
    f"torch.{kind}Storage": np.dtype(code)
    for kind, code in {
        "Double": "<f8", "Float": "<f4", "Half": "<f2", "BFloat16": "<u2", "Long": "<i8",
        "Int": "<i4", "Short": "<i2", "Char": "i1", "Byte": "u1", "Bool": "?",
    }.items()
}  # fmt: skip
DICTIONARIES = {
    "addict.addict.Dict", "builtins.dict", "collections.OrderedDict", "collections.defaultdict",
    "detectron2.config.config.CfgNode", "fvcore.common.config.CfgNode",
    "mmcv.utils.config.ConfigDict", "mmengine.config.config.ConfigDict", "yacs.config.CfgNode",
}  # fmt: skip
RECONSTRUCT = {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")}
FROM_BUFFER = {f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")}
TENSORS = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
PARAMETERS = {"torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter"}
# Of configs, logs, schedules and random states, which stand beside the weights.
HARMLESS = {
    "argparse.Namespace", "builtins.bool", "builtins.bytearray", "builtins.complex",
    "builtins.float", "builtins.frozenset", "builtins.int", "builtins.list", "builtins.set",
    "builtins.slice", "collections.Counter", "collections.deque", "datetime.date",
    "datetime.datetime", "datetime.timedelta", "datetime.timezone", "mmcv.utils.config.Config",
    "mmengine.config.config.Config", "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.ndarray",
    "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath", "torch.Size",
    "torch.device",
    *(f"torch.{kind}" for kind in ("bfloat16", "bool", "float16", "float32", "float64", "int16",
                                   "int32", "int64", "int8", "uint8")),
}  # fmt: skip
KNOWN = {
    "_codecs.encode", "builtins.bytes", "numpy.dtype", *STORAGES, *DICTIONARIES, *RECONSTRUCT,
    *FROM_BUFFER, *TENSORS, *PARAMETERS, *HARMLESS,
}  # fmt: skip
# What damaged or hostile bytes make the code below raise.
DAMAGED = (
    AttributeError, EOFError, IndexError, KeyError, OverflowError, RuntimeError, TypeError,
    ValueError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


@dataclass(frozen=True)
class File:
    """`weights`: the arrays of a model, by name; `others`: names of what else stands among them;
    `about`: what the file says beside them, by key."""

    path: Path
    sha256: str
    weights: dict[str, np.ndarray]
    others: list[str]
    about: dict[str, Any]


@dataclass(frozen=True)
class _Global:
    """A name, of what nobody looks up."""

    name: str


class _Inert:
    """Any object that nobody needs."""


@dataclass
class _DType:
    code: str
    order: str = "="


@dataclass
class _Array:
    """`value`: None for an array of other things than numbers."""

    value: np.ndarray | None = None


@dataclass(frozen=True)
class _Storage:
    """`count` numbers from `start` on of those under `key`."""

    key: str
    start: int
    count: int
    dtype: np.dtype


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read(content: bytes, path: Path, sha256: str) -> File | None:
    """The weights in a file, which stand alone or under `state_dict`, `model` or `blobs`; None for
    a file of another kind. bfloat16 becomes float32.

    Raises UserError for a file that is damaged, or holds anything that is not known.
    """
    reader = _Reader(content, path)
    try:
        tree = reader.content_tree()
        about = tree if isinstance(tree, dict) else {}
        places = (about.get(key) for key in ("state_dict", "model", "blobs"))
        state: dict[str, Any] = next((item for item in places if isinstance(item, dict)), about)
        weights = {name: reader.array(name, item) for name, item in state.items()
                   if isinstance(name, str) and isinstance(item, _Array | _Tensor)}  # fmt: skip
    except DAMAGED as error:
        raise _damaged(path, error) from error
    if not weights:
        return None
    others = [name for name in state if isinstance(name, str) and name not in weights]
    about = {key: item for key, item in about.items() if item is not state}
    return File(path, sha256, weights, others, about)


def read_all(content: bytes, path: Path) -> Any:
    """Everything in one of torch's files: dictionaries by text or small numbers, lists, tuples,
    plain values, and tensors, with their dtypes and strides; None in place of all else, and for a
    file of another kind. Nothing in it is shared, tensors' memory neither.

    Raises UserError for a file that is damaged, or holds anything that is not known.
    """
    reader = _Reader(content, path)
    try:
        return reader.unfolded(reader.content_tree())
    except DAMAGED as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    what = f"cut off or damaged ({type(error).__name__})"
    return UserError(path, what, "download or copy it again")


class _Reader:
    def __init__(self, content: bytes, path: Path) -> None:
        self.content, self.path = content, path
        self.left = 4 * len(content)  # bytes that may still be copied
        self.operations = 0
        self.zip: zipfile.ZipFile | None = None
        self.root = ""
        self.dtypes: dict[str, np.dtype] = {}
        self.storages: dict[str, np.ndarray] = {}

    def content_tree(self) -> Any:
        """The content of a file; None for one of another kind."""
        if self.content.startswith(b"PK\x03\x04"):
            return self.archive()
        if re.match(rb"\x80[\2-\5]", self.content):
            return self.pickles()
        return None

    def archive(self) -> Any:
        """The content of a zip archive; None for one that is not torch's."""
        self.zip = zipfile.ZipFile(io.BytesIO(self.content))
        names = [name for name in self.zip.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            return None
        self.root = names[0].removesuffix("data.pkl")
        if f"{self.root}byteorder" in self.zip.namelist():
            self._little_endian(self._member("byteorder") == b"little")
        return self.tree(io.BytesIO(self._member("data.pkl")))

    def pickles(self) -> Any:
        """The content of a plain pickle, or of torch's row of them."""
        file = io.BytesIO(self.content)
        tree = self.tree(file)
        if not (isinstance(tree, int) and tree == MAGIC):
            return tree
        _version, machine, tree, keys = (self.tree(file) for _ in range(4))
        self._little_endian(machine["little_endian"] is True)
        for key in keys:
            if not isinstance(key, str):
                raise TypeError(type(key))
            dtype, (count,) = self.dtypes[key], struct.unpack("<q", file.read(8))
            begin = file.tell()
            if not 0 <= count * dtype.itemsize <= len(self.content) - begin:
                raise ValueError(count)
            self.storages[key] = np.frombuffer(self.content, dtype, count, begin)
            file.seek(begin + count * dtype.itemsize)
        return tree

    def _little_endian(self, little: bool) -> None:
        if not little:
            raise UserError(self.path, "was written by a big-endian machine")

    def _member(self, name: str) -> memoryview:
        if self.zip is None:
            raise KeyError(name)
        info = self.zip.getinfo(self.root + name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{self.path}: {name:.100}", "is compressed, as torch never does")
        header, view = info.header_offset, memoryview(self.content)
        lengths = struct.unpack("<HH", view[header + 26 : header + 30])  # of a name and more
        begin = header + 30 + sum(lengths)
        data = view[begin : begin + info.file_size]
        if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
            raise zipfile.BadZipFile(name)
        return data

    def _spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise UserError(self.path, f"unfolds to more than {4 * len(self.content)} bytes")

    def _operate(self) -> None:
        self.operations += 1
        if self.operations > MAX_OPERATIONS:
            what = f"has more than {MAX_OPERATIONS} pickle operations"
            raise UserError(self.path, what, "no checkpoint needs so many")

    # The machine. A stack, marks in it, and a memo: see pickletools for what each operation does.

    def tree(self, file: io.BytesIO) -> Any:
        """What the next pickle in `file` is made of."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[Any, Any] = {}
        argument: Any

        def marked() -> list[Any]:
            begin = marks.pop()
            items = stack[begin:]
            del stack[begin:]
            return items

        for opcode, argument, _ in pickletools.genops(file):
            self._operate()
            match opcode.name:
                case (
                    "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4"
                    | "FLOAT" | "BINFLOAT" | "STRING" | "BINSTRING" | "SHORT_BINSTRING"
                    | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8" | "UNICODE"
                    | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8"
                ):  # fmt: skip
                    if isinstance(argument, int) and argument.bit_length() > MAX_INTEGER_BITS:
                        raise ValueError("integer")
                    stack.append(argument)
                case "NONE":
                    stack.append(None)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(opcode.name == "NEWTRUE")
                case "MARK":
                    marks.append(len(stack))
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    items = [stack.pop() for _ in range(int(opcode.name[-1]))]
                    stack.append(tuple(items[::-1]))
                case "TUPLE":
                    stack.append(tuple(marked()))
                case "EMPTY_LIST":
                    stack.append([])
                case "LIST":
                    stack.append(marked())
                case "APPEND":
                    _extend(stack[-2], [stack.pop()])
                case "APPENDS":
                    items = marked()
                    _extend(stack[-1], items)
                case "EMPTY_DICT":
                    stack.append({})
                case "DICT":
                    items = marked()
                    stack.append(_updated({}, items[::2], items[1::2]))
                case "SETITEM":
                    item, key = stack.pop(), stack.pop()
                    _updated(stack[-1], [key], [item])
                case "SETITEMS":
                    items = marked()
                    _updated(stack[-1], items[::2], items[1::2])
                case "EMPTY_SET":
                    stack.append(_Inert())
                case "ADDITEMS":
                    marked()
                case "FROZENSET":
                    marked()
                    stack.append(_Inert())
                case "POP":
                    stack.pop()
                case "POP_MARK":
                    marked()
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GLOBAL":
                    stack.append(self._global(*argument.split(" ", 1)))
                case "STACK_GLOBAL":
                    name = stack.pop()
                    stack.append(self._global(stack.pop(), name))
                case "REDUCE" | "NEWOBJ":
                    arguments = stack.pop()
                    stack.append(self._made(stack.pop().name, arguments))
                case "NEWOBJ_EX":
                    _keywords, arguments = stack.pop(), stack.pop()
                    stack.append(self._made(stack.pop().name, arguments))
                case "BUILD":
                    state = stack.pop()
                    if isinstance(stack[-1], _Array):
                        _version, shape, dtype, fortran, data = state
                        order = "F" if fortran else "C"
                        stack[-1].value = self._numbers(data, dtype, shape, order)
                    elif isinstance(stack[-1], _DType):
                        stack[-1].order = state[1]
                case "BINPERSID":
                    stack.append(self._storage(stack.pop()))
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case other:
                    raise UserError(self.path, f"has the pickle operation {other}",
                                    "no weights need it; nothing was run")  # fmt: skip
        raise EOFError

    def _global(self, module: Any, name: Any) -> _Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError(type(name))
        module = {"__builtin__": "builtins"}.get(module, module)
        if f"{module}.{name}" not in KNOWN:
            raise UserError(
                self.path, f"holds '{f'{module}.{name}':.100}', which is no part of weights",
                "files can hide code in such names; nothing was run",
            )  # fmt: skip
        return _Global(f"{module}.{name}")

    def _made(self, name: str, arguments: Any) -> Any:
        """What the object of this name, called with these arguments, stands for."""
        if name in DICTIONARIES:
            pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
            return _updated({}, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
        if name == "_codecs.encode":
            text, encoding = arguments
            if encoding != "latin1":
                raise ValueError("encoding")
            return self._bytes(text)
        if name == "builtins.bytes" and not arguments:  # as protocol 2 has no bytes at all
            return b""
        if name == "numpy.dtype":
            return _DType(arguments[0])
        if name in RECONSTRUCT:
            return _Array()
        if name in FROM_BUFFER:
            return _Array(self._numbers(*arguments))
        if name in PARAMETERS:
            return arguments[0]
        if name in TENSORS:
            return _Tensor(*arguments[:4])
        return _Inert()

    def _bytes(self, data: Any) -> bytes | bytearray:
        """Bytes, or those of the text that Python 2, and protocol 2, have in their place."""
        if isinstance(data, bytes | bytearray):
            return data
        self._spend(len(data))
        encoded: bytes = data.encode("latin1")
        return encoded

    def _numbers(self, data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray | None:
        if not re.fullmatch(r"[fiu][1248]|b1", dtype.code):
            return None
        if dtype.order not in ("<", ">", "=", "|"):
            raise ValueError("order")
        data, kind = self._bytes(data), np.dtype(dtype.code).newbyteorder(dtype.order)
        if _count(shape) * kind.itemsize != len(data):
            raise ValueError(shape)
        return np.frombuffer(data, kind).reshape(shape, order=order)

    def _storage(self, identity: Any) -> _Storage:
        kind, storage, key, _device, count, *view = identity
        if kind != "storage" or not isinstance(key, str):
            raise UserError(self.path, "holds a whole pickled model", "save its state_dict alone")
        dtype = STORAGES[storage.name]
        if self.dtypes.setdefault(key, dtype) != dtype:
            raise TypeError(key)
        start = 0
        if view and view[0] is not None:
            _key, start, count = view[0]
        return _Storage(key, start, count, dtype)

    def array(self, name: str, item: Any) -> np.ndarray:
        """A view of the numbers of an array or a tensor."""
        if isinstance(item, _Array):
            if item.value is None:
                raise UserError(f"{self.path}: {name:.100}", "holds other things than numbers")
            self._spend(4 * item.value.size)
            return item.value
        numbers, kind = self._span(item), item.storage.dtype
        strides = [stride * kind.itemsize for stride in item.stride]
        numbers = np.lib.stride_tricks.as_strided(numbers, item.shape, strides)
        if kind == STORAGES["torch.BFloat16Storage"]:
            return (numbers.astype("<u4") << 16).view("<f4")
        return numbers

    def unfolded(self, item: Any) -> Any:
        """A copy without anything shared: see `read_all`."""
        self._operate()
        if isinstance(item, dict):
            return {key: self.unfolded(inner) for key, inner in item.items()
                    if isinstance(key, str | int)}  # fmt: skip
        if isinstance(item, list | tuple):
            return type(item)([self.unfolded(inner) for inner in item])
        if isinstance(item, _Tensor):
            return self._tensor(item)
        return item if isinstance(item, bool | int | float | str) else None

    def _tensor(self, item: _Tensor) -> Tensor:
        numbers = torch.from_numpy(self._span(item).copy())
        if item.storage.dtype == STORAGES["torch.BFloat16Storage"]:
            numbers = numbers.view(torch.bfloat16)
        return numbers.as_strided(item.shape, item.stride)

    def _span(self, item: _Tensor) -> np.ndarray:
        """A view of the numbers of a tensor, with what lies between them in its storage."""
        storage = item.storage
        if storage.key not in self.storages:
            member = self._member(f"data/{storage.key}")
            self.storages[storage.key] = np.frombuffer(member, storage.dtype)
        numbers = self.storages[storage.key][_whole(storage.start) :][: _whole(storage.count)]
        # Strides of 0 could show a few numbers as an endless array.
        count, begin = _count(item.shape), _whole(item.offset)
        last = begin
        for side, stride in zip(item.shape, item.stride, strict=True):
            last += max(0, side - 1) * _whole(stride)
        if count > len(numbers) or (count and last >= len(numbers)):
            raise ValueError(item.shape)
        numbers = numbers[begin : last + 1] if count else numbers[:0]
        self._spend(max(4, storage.dtype.itemsize) * len(numbers))
        return numbers


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target += items
    elif not isinstance(target, _Inert):
        raise TypeError(type(target))


def _updated(target: Any, keys: list[Any], items: list[Any]) -> Any:
    if isinstance(target, dict):
        for key, item in zip(keys, items, strict=True):
            known = isinstance(key, str) or (type(key) is int and 0 <= key < MAX_KEY)
            target[key if known else object()] = item
    elif not isinstance(target, _Inert):
        raise TypeError(type(target))
    return target


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise TypeError(type(number))
    return number


def _count(shape: Any) -> int:
    if type(shape) is not tuple or len(shape) > MAX_RANK:
        raise TypeError(type(shape))
    return math.prod(map(_whole, shape))
