"""Pickled files: everything torch and numpy write, nothing that runs, nothing that unfolds."""

import argparse
import builtins
import collections
import datetime
import io
import os
import pathlib
import pickle
import struct
import sys
import time
import tracemalloc
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcdet.errors import UserError
from dcdet.weights.pickles import DICTIONARIES, HARMLESS, MAGIC, File, read, read_all

FILE = Path("some.pth")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
          torch.int16, torch.int8, torch.uint8, torch.bool)  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    """Of every dtype, shape and layout, and two that share a storage."""
    torch.manual_seed(0)
    shared = torch.randn(10)
    found = collections.OrderedDict(
        {str(dtype): (3 * torch.randn(3, 4)).to(dtype) for dtype in DTYPES},
        scalar=torch.tensor(3.5), empty=torch.zeros(0, 3), one=shared[:4], other=shared[3:],
        strided=torch.randn(4, 6).t()[1:, ::2], parameter=torch.nn.Parameter(torch.randn(2, 3)),
        last=torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        half=torch.randn(4, 6).bfloat16().t()[1:, ::2],
    )  # fmt: skip
    found._metadata = {"": {"version": 2}}  # type: ignore[attr-defined]  # as a state dict's
    return found


def saved(content: Any, form: str = "zip", protocol: int = 2) -> bytes:
    """As torch or pickle writes it."""
    file = io.BytesIO()
    if form == "pickle":
        pickle.dump(content, file, protocol)
    else:
        new = form == "zip"
        torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    return file.getvalue()


def taken(content: bytes) -> File:
    file = read(content, FILE, "")
    assert file is not None
    return file


# What is written by others.


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("form", ["zip", "old"])
def test_everything_torch_writes(form: str, protocol: int) -> None:
    content = saved({"meta": {"CLASSES": ("a",)}, "state_dict": tensors()}, form, protocol)
    file = taken(content)
    wanted = torch.load(io.BytesIO(content), weights_only=protocol == 2)["state_dict"]
    assert list(file.weights) == list(wanted)
    for name, value in wanted.items():
        value = value.detach().float() if value.dtype == torch.bfloat16 else value.detach()
        assert torch.equal(torch.from_numpy(file.weights[name].copy()), value), name
    assert (file.about, file.others) == ({"meta": {"CLASSES": ("a",)}}, [])


def same(found: Any, wanted: Any) -> bool:
    """Equal to the last bit, type, number and stride."""
    if isinstance(wanted, torch.Tensor):
        equal = torch.equal(found, wanted) and found.dtype == wanted.dtype
        return equal and found.stride() == wanted.stride()
    if isinstance(wanted, dict):
        return list(found) == list(wanted) and all(same(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list | tuple):
        pairs = zip(found, wanted, strict=True)
        return type(found) is type(wanted) and all(same(*pair) for pair in pairs)
    return type(found) is type(wanted) and bool(found == wanted)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("form", ["zip", "old"])
def test_all_of_a_training_checkpoint(form: str, protocol: int) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(1, 2, 4, 4)).sum().backward()
    optimizer.step()
    content = saved({
        "model": model.state_dict(), "tensors": tensors(), "optimizer": optimizer.state_dict(),
        "plain": {"tuple": (1, -2.5, True, None), "text": "ä", "numbers": list(range(2000)),
                  "nested": [[], {}, ({"a": [torch.ones(2)]},)], "large": 1 << 70},
    }, form, protocol)  # fmt: skip
    wanted = torch.load(io.BytesIO(content), weights_only=protocol == 2)
    wanted["tensors"]["parameter"] = wanted["tensors"]["parameter"].detach()
    found = read_all(content, FILE)
    assert same(found, wanted)
    found["tensors"]["one"].zero_()
    assert torch.equal(found["tensors"]["other"], wanted["tensors"]["other"])
    odd = {"a": 1, ("b",): 2, None: 3, -1: 4, 1 << 40: 5, True: 6, "c": {"d"}, "e": b"f"}
    assert read_all(saved(odd), FILE) == {"a": 1, "c": None, "e": None}


def test_a_view_of_a_storage() -> None:
    """As torch before 0.4 saved a tensor that is a part of another: here (3, 4, 5, 6)."""
    content = saved({"a": torch.arange(10.0)}, "old")
    view = b"(X\x01\x00\x00\x00vK\x03K\x04tt"
    assert content.count(b"K\x0aNt") == 1
    content = content.replace(b"K\x0aNt", b"K\x0a" + view)
    content = content.replace(b"K\x00K\x0a\x85", b"K\x00K\x04\x85")
    wanted = torch.load(io.BytesIO(content), weights_only=True)["a"]
    assert wanted.tolist() == taken(content).weights["a"].tolist() == [3, 4, 5, 6]


def test_where_the_weights_are() -> None:
    state = {"a": torch.ones(2), "b": 7, 3: torch.ones(2)}
    for key in ("state_dict", "model", "blobs"):
        file = taken(saved({key: state, "epoch": 2}))
        assert (list(file.weights), file.others, file.about) == (["a"], ["b"], {"epoch": 2})
    assert list(taken(saved(state)).weights) == ["a"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_array_numpy_writes(protocol: int) -> None:
    rows = np.arange(24).reshape(2, 3, 4)
    arrays = {
        "f4": rows.astype("f4"), "f8": rows.astype("f8"), "f2": rows.astype("f2"),
        "big": rows.astype(">f4"), "i8": rows, "u1": rows.astype("u1"), "bool": rows > 3,
        "fortran": np.asfortranarray(rows.astype("f4")), "strided": rows.astype("f4")[:, ::2],
        "empty": np.zeros((0, 3), "f4"), "scalar": np.array(2.5, "f4"),
    }  # fmt: skip
    others = {"text": np.array(["a", "bc"]), "objects": np.array([None, {}], object)}
    file = taken(saved({"model": arrays, "beside": others}, "pickle", protocol))
    assert list(file.weights) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.weights[name], array)
        assert file.weights[name].dtype == array.dtype, name
    for name, array in others.items():
        with pytest.raises(UserError, match=rf"some\.pth: {name}: holds other things than numbers"):
            read(saved({"model": {"a": rows, name: array}}, "pickle", protocol), FILE, "")


def python_2(entries: dict[str, np.ndarray]) -> bytes:
    """As cPickle of Python 2 writes a dictionary of arrays: text is bytes, and old module names."""

    def text(value: bytes) -> bytes:
        if len(value) < 256:
            return b"U" + bytes([len(value)]) + value
        return b"T" + struct.pack("<i", len(value)) + value

    parts = [b"\x80\x02}("]
    for name, array in entries.items():
        shape = b"(" + b"".join(b"M" + struct.pack("<H", side) for side in array.shape) + b"t"
        dtype = b"cnumpy\ndtype\n" + text(array.dtype.str[1:].encode()) + b"K\x00K\x01\x87R(K\x03"
        dtype += text(b"<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        parts += [
            text(name.encode()),
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85", text(b"b"),
            b"\x87R(K\x01", shape, dtype, b"\x89", text(array.tobytes()), b"tb",
        ]  # fmt: skip
    return b"".join([*parts, b"u."])


def test_python_2_wrote_it() -> None:
    arrays = {"conv1_w": np.random.default_rng(0).standard_normal((9, 3, 7)).astype("f4"),
              "conv1_b": np.arange(-4, 4, dtype="f4")}  # fmt: skip
    content = python_2(arrays)
    theirs = pickle.loads(content, encoding="latin1")
    for file in (taken(content), taken(python_2(theirs))):
        assert list(file.weights) == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.weights[name], array)


def test_a_python_2_ordered_dictionary() -> None:
    array = python_2({"a": np.float32([1, 2])})[2:-1]  # without protocol and stop
    content = b"\x80\x02ccollections\nOrderedDict\n]](X\x05\x00\x00\x00model" + array + b"ea\x85R."
    assert taken(content).weights["a"].tolist() == [1, 2]


def foreign(name: str, base: type = object) -> Any:
    """An object of a class that is not installed here."""
    module, _, short = name.rpartition(".")
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        parent = ".".join(parts[:end])
        sys.modules.setdefault(parent, types.ModuleType(parent))
    kind = type(short, (base,), {"__module__": module})
    setattr(sys.modules[module], short, kind)
    return kind()


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_harmless_things_beside_the_weights(form: str, protocol: int) -> None:
    """Logs, configs and so on, as training leaves them in its checkpoints."""
    names = set(sys.modules)
    buffer = foreign("mmengine.logging.history_buffer.HistoryBuffer")
    buffer._log_history, buffer.max_length = np.arange(4.0), 10
    config = foreign("mmcv.utils.config.ConfigDict", dict)
    config.update(lr=0.1, classes=["x"])
    weights = np.ones(2, "f4") if form == "pickle" else torch.ones(2)
    content = saved({
        "state_dict": {"a": weights}, "log": {"loss": buffer}, "args": argparse.Namespace(lr=1),
        "meta": config, "queue": collections.deque([1, 2]), "set": {1, 2}, "frozen": frozenset("a"),
        "time": datetime.datetime(2020, 1, 30, tzinfo=datetime.timezone.utc), "complex": 1j,
        "numbers": [np.float64(3), np.int64(3), np.bool_(True), np.float32(1)],
        "path": pathlib.PurePosixPath("a"), "dtype": torch.float32, "size": torch.Size([1]),
        "device": torch.device("cpu"), "counter": collections.Counter("aab"), ("tuple",): {1: 2},
        "default": collections.defaultdict(list, a=[1]), "bytes": b"a\xff", "array": bytearray(),
        "int": 1 << 100, "negative": -5, "list": [1, [2, (3, None)]], "float": 1e-5, "none": None,
    }, form, protocol)  # fmt: skip
    for name in set(sys.modules) - names:
        del sys.modules[name]
    file = taken(content)
    assert file.weights["a"].tolist() == [1, 1]
    assert file.about["meta"] == {"lr": 0.1, "classes": ["x"]}
    assert file.about["list"] == [1, [2, (3, None)]]
    assert (file.about["int"], file.about["negative"], file.about["float"]) == (1 << 100, -5, 1e-5)
    assert "mmengine.logging.history_buffer" not in sys.modules


# What runs code.


class Runs:
    """Calls something when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
@pytest.mark.parametrize("where", ["state_dict", "meta"])
def test_code_is_refused_by_name_and_not_run(form: str, where: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w')"
    calls = [
        (Runs(os.system, f"touch {marker}"), "posix.system"), (Runs(eval, code), "builtins.eval"),
        (Runs(exec, code), "builtins.exec"), (Runs(open, str(marker), "w"), "io.open"),
        (Runs(getattr, os, "system"), None), (Runs(torch.load, str(marker)), "torch.serialization"),
        (Runs(pathlib.Path.touch, marker), None), (Runs(np.load, str(marker)), "numpy"),
    ]  # fmt: skip
    for call, name in calls:
        content: dict[str, Any] = {"state_dict": {"a": torch.ones(2)}, "meta": {}}
        content[where]["b"] = call
        if form == "pickle":
            content["state_dict"]["a"] = np.ones(2)
        try:
            whole = saved(content, form)
        except TypeError:  # modules are not pickled
            continue
        with pytest.raises(UserError, match=rf"some\.pth: holds '{name or ''}.*nothing was run"):
            read(whole, FILE, "")
        assert not marker.exists()
    pickle.loads(saved(calls[0][0], "pickle"))
    assert marker.exists()  # so it would have run


def test_no_name_is_ever_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even of harmless names the class is neither imported nor made."""
    imported: list[str] = []
    real = builtins.__import__

    def spy(name: str, *rest: Any) -> Any:
        imported.append(name)
        return real(name, *rest)

    for full in sorted(HARMLESS | DICTIONARIES):
        module, _, name = full.rpartition(".")
        made = f"c{module}\n{name}\n)R".encode()
        content = b"\x80\x02}(X\x01\x00\x00\x00z" + made + b"X\x01\x00\x00\x00a" + ARRAY + b"u."
        with monkeypatch.context() as patch:
            patch.setattr(builtins, "__import__", spy)
            found = read(content, FILE, "")
        assert found is not None
        assert list(found.weights) == ["a"]
        assert module not in imported


# What is damaged, or made to unfold.

ARRAY = python_2({"a": np.float32([1, 2])})[7:-2]
assert pickle.loads(b"\x80\x02" + ARRAY + b".", encoding="latin1").tolist() == [1, 2]


def zipped(content: bytes, compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        for name, data in members.items():
            archive.writestr(f"archive/{name.replace('_', '/')}", data)
    return file.getvalue()


def torch_tensor(shape: bytes, stride: bytes, offset: bytes = b"K\x00", count: bytes = b"K\x04"
) -> bytes:  # fmt: skip
    """A pickle of {"a": a tensor of four numbers}; the numbers in it are pickled themselves."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    storage += b"X\x03\x00\x00\x00cpu" + count + b"tQ"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + stride
    return b"\x80\x02}X\x01\x00\x00\x00a" + rebuild + b"\x89}tRs."


def numpy_array(shape: bytes, code: bytes = b"f4", order: bytes = b"<") -> bytes:
    head, tail = ARRAY.split(b"(M\x02\x00t")
    tail = tail.replace(b"U\x02f4", b"U\x02" + code).replace(b"U\x01<", b"U\x01" + order)
    return b"\x80\x02}X\x01\x00\x00\x00a" + head + shape + tail + b"s."


FOUR = np.arange(4, dtype="f4").tobytes()
HUGE = b"\x8a\x08" + struct.pack("<q", 1 << 40)
KEY = b"X\x01\x00\x00\x00a"
OLD = saved({"a": torch.arange(4.0)}, "old")
ENCODE = (
    b"\x80\x02}(" + KEY + ARRAY + b"c_codecs\nencode\nq\x01X\x40\x42\x0f\x00" + 1_000_000 * b"a"
)
ENCODE += b"X\x06\x00\x00\x00latin1\x86q\x020" + 2000 * b"h\x01h\x02R0" + b"u."
# All of a file before torch 1.6 up to the list of its storages.
OLD_STORAGES = OLD[: OLD.rindex(b"\x80\x02]")] + b"\x80\x02"
HOSTILE = {
    "deep key": (b"\x80\x02})" + 120_000 * b"\x85" + KEY + b"s.", None),
    "shared key": (b"\x80\x02})" + 60 * b"q\x01h\x01\x86" + KEY + b"s.", None),
    "deep value": (
        b"\x80\x02}("
        + KEY
        + ARRAY
        + b"X\x01\x00\x00\x00b]"
        + 100_000 * b"]"
        + 100_000 * b"a"
        + b"u.",
        "a",
    ),
    "deep module": (b"\x80\x02)" + 400_000 * b"\x85" + b"N\x93.", "damaged"),
    "shared name": (b"\x80\x02N)" + 60 * b"q\x01h\x01\x86" + b"\x93.", "damaged"),
    "deep storage": (OLD_STORAGES + b"])" + 400_000 * b"\x85" + b"a.", "damaged"),
    "shared value": (
        b"\x80\x02}(" + KEY + ARRAY + b"X\x01\x00\x00\x00b)" + 60 * b"q\x01h\x01\x86" + b"u.",
        "a",
    ),
    "own value": (b"\x80\x02}(" + KEY + ARRAY + b"X\x01\x00\x00\x00b]q\x01h\x01au.", "a"),
    "colliding keys": (
        b"\x80\x02}("
        + KEY
        + ARRAY
        + b"".join(
            b"\x8a\x0a" + (n * ((1 << 61) - 1)).to_bytes(10, "little") + b"N" for n in range(50_000)
        )
        + b"u.",
        "a",
    ),
    "huge integer": (
        b"\x80\x02}(" + KEY + b"\x8b" + struct.pack("<i", 20_000) + bytes(19_999) + b"\x01u.",
        "damaged",
    ),
    "operations": (b"\x80\x02}" + 300_000 * b"N0" + b".", "more than 500000 pickle operations"),
    "copies": (ENCODE, "unfolds to more than"),
    "memo": (b"\x80\x02}r\xff\xff\xff\x7f" + KEY + ARRAY + b"s.", "a"),
    "length": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 50) + b"a.", "damaged"),
    "bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"a.", "damaged"),
    "frame": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.", None),
    "numpy shape": (numpy_array(b"(" + HUGE + HUGE + b"t"), "damaged"),
    "numpy negative shape": (numpy_array(b"(J\xfe\xff\xff\xffJ\xff\xff\xff\xfft"), "damaged"),
    "numpy empty shape": (numpy_array(b"(K\x00" + HUGE + HUGE + b"t"), "damaged"),
    "numpy fits no more": (numpy_array(b"(K\x03t"), "damaged"),
    "numpy objects": (numpy_array(b"(K\x01t", b"O8"), "a: holds other things than numbers"),
    "numpy order": (numpy_array(b"(K\x02t", order=b"x"), "damaged"),
    "numpy code": (numpy_array(b"(K\x02t", b"f1"), "damaged"),
    "tensor": (zipped(torch_tensor(b"K\x04\x85", b"K\x01\x85"), data_0=FOUR), "a"),
    "torch expands": (
        zipped(torch_tensor(HUGE + HUGE + b"\x86", b"K\x00K\x00\x86"), data_0=FOUR),
        "damaged",
    ),
    "torch expands a little": (
        zipped(torch_tensor(b"K\x05\x85", b"K\x00\x85"), data_0=FOUR),
        "damaged",
    ),
    "torch beyond": (
        zipped(torch_tensor(b"K\x04\x85", b"K\x01\x85", b"K\x01"), data_0=FOUR),
        "damaged",
    ),
    "torch strides beyond": (
        zipped(torch_tensor(b"K\x02\x85", HUGE + b"\x85"), data_0=FOUR),
        "damaged",
    ),
    "torch negative": (
        zipped(torch_tensor(b"K\x02\x85", b"J\xff\xff\xff\xff\x85", b"K\x03"), data_0=FOUR),
        "damaged",
    ),
    "torch before": (
        zipped(torch_tensor(b"K\x02\x85", b"K\x01\x85", b"J\xff\xff\xff\xff"), data_0=FOUR),
        "damaged",
    ),
    "torch short": (zipped(torch_tensor(b"K\x04\x85", b"K\x01\x85"), data_0=FOUR[:8]), "damaged"),
    "torch two dtypes": (
        zipped(
            torch_tensor(b"K\x04\x85", b"K\x01\x85")[:-1]
            + torch_tensor(b"K\x02\x85", b"K\x01\x85", count=b"K\x02")[3:-1]
            .replace(b"Float", b"Double")
            .replace(b"\x00\x00\x00a", b"\x00\x00\x00b")
            + b".",
            data_0=FOUR,
        ),
        "damaged",
    ),
    "torch no archive": (torch_tensor(b"K\x04\x85", b"K\x01\x85"), "damaged"),
    "torch no storage": (zipped(torch_tensor(b"K\x04\x85", b"K\x01\x85")), "damaged"),
    "compressed": (
        zipped(
            torch_tensor(b"K\x04\x85", b"K\x01\x85"), zipfile.ZIP_DEFLATED, data_0=bytes(1_000_000)
        ),
        "is compressed",
    ),
    "big-endian": (
        zipped(torch_tensor(b"K\x04\x85", b"K\x01\x85"), data_0=FOUR, byteorder=b"big"),
        "written by a big-endian machine",
    ),
    "old big-endian": (OLD.replace(b"endianq\x02\x88", b"endianq\x02\x89"), "big-endian"),
    "old count": (OLD[:-24] + struct.pack("<q", 1 << 60) + OLD[-16:], "damaged"),
    "old negative count": (OLD[:-24] + struct.pack("<q", -1) + OLD[-16:], "damaged"),
    "old cut": (OLD[:-1], "damaged"),
    "magic alone": (pickle.dumps(MAGIC, 2), "damaged"),
    "whole model": (saved(torch.nn.ReLU()), "torch.nn.modules.activation.ReLU"),
    "old whole model": (saved(torch.nn.ReLU(), "old"), "torch.nn.modules.activation.ReLU"),
    "extension": (b"\x80\x02\x82\x01.", "EXT1"),
    "instance": (b"\x80\x02(ios\nsystem\n.", "operation INST"),
    "stack": (b"\x80\x02\x87.", "damaged"),
    "empty": (b"\x80\x02.", "damaged"),
    "no end": (b"\x80\x02}", "damaged"),
    "calls a number": (b"\x80\x02K\x01)R.", "damaged"),
    "calls an array": (b"\x80\x02" + ARRAY + b")R.", "damaged"),
    "no dictionary": (b"\x80\x02]K\x01a.", None),
    "no zip": (b"PK\x03\x04" + bytes(50), "damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str) -> None:
    """Each is refused, or harmless: at once, in little memory."""
    content, wanted = HOSTILE[name]
    begin = time.monotonic()
    if not name.startswith(("deep", "operations")):  # which take long enough without
        tracemalloc.start()
    try:
        if wanted is None:
            assert read(content, FILE, "") is None
        elif wanted == "a":
            assert list(taken(content).weights) == ["a"]
        else:
            with pytest.raises(UserError, match=f"some.pth: .*{wanted}"):
                read(content, FILE, "")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * len(content) + 30_000_000
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_read_whole(name: str) -> None:
    begin = time.monotonic()
    try:
        found = read_all(HOSTILE[name][0], FILE)
    except UserError as error:
        assert str(error).startswith("some.pth: ")  # noqa: PT017
    else:
        assert found is None or type(found) in (dict, list)
    assert time.monotonic() - begin < 10


def test_one_tensor_many_times_is_counted() -> None:
    weight = torch.zeros(1000)
    assert len(read_all(saved([weight] * 3), FILE)) == 3
    with pytest.raises(UserError, match=r"some\.pth: unfolds to more than"):
        read_all(saved([weight] * 1000), FILE)


def test_other_files_are_left_to_others() -> None:
    for content in (b"", b"<html>", b"PK", b"\x80", b"\x80\x09abc", b"(dp0\n.", zipped(b"N.")[:3],
                    saved({"epoch": 3}), saved([torch.ones(2)])):  # fmt: skip
        assert read(content, FILE, "") is None
    docx = io.BytesIO()
    with zipfile.ZipFile(docx, "w") as archive:
        archive.writestr("word/document.xml", "a")
    assert read(docx.getvalue(), FILE, "") is None


SAMPLES = [saved({"state_dict": {"a": torch.ones(3), "b": torch.nn.Parameter(torch.ones(2, 2))},
                  "meta": {"CLASSES": ("a", "b"), "x": np.float64(2)}}, form, protocol)
           for form in ("zip", "old") for protocol in (2, 4)]  # fmt: skip
SAMPLES += [python_2({"a": np.ones((2, 2), "f4")}), saved({"a": np.ones(3, "f4")}, "pickle", 5)]


@given(st.data())
def test_damage_is_one_clear_error(data: st.DataObject) -> None:
    """Cut off, or with changed bytes: a UserError, or something that is still weights."""
    content = bytearray(data.draw(st.sampled_from(SAMPLES)))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    for reading in (lambda whole: read(whole, FILE, ""), lambda whole: read_all(whole, FILE)):
        try:
            reading(bytes(content[:end]))
        except UserError as error:
            assert str(error).startswith("some.pth")  # noqa: PT017


def test_changed_weights_of_a_zip_are_noticed() -> None:
    content = bytearray(SAMPLES[0])
    place = bytes(content).index(np.ones(3, "f4").tobytes())
    content[place + 1] ^= 4
    with pytest.raises(UserError, match="BadZipFile"):
        read(bytes(content), FILE, "")
