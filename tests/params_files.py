"""A writer of MXNet's `.params` files, by the layout in SEEDS.md 8.1, without dcdet's own code."""

import struct
from collections.abc import Mapping

import numpy as np

CODES = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4, "int8": 5, "int64": 6,
         "bool": 7}  # fmt: skip


def array_bytes(array: np.ndarray, version: int = 2, device: tuple[int, int] = (1, 0)) -> bytes:
    """One array with the header of V0 to V3."""
    rank = array.ndim
    if version == 0:
        head = struct.pack(f"<I{rank}I", rank, *array.shape)
    elif version == 1:
        head = struct.pack(f"<II{rank}q", 0xF993FAC8, rank, *array.shape)
    else:
        head = struct.pack(f"<Iii{rank}q", 0xF993FAC7 + version, 0, rank, *array.shape)
    return head + struct.pack("<iii", *device, CODES[array.dtype.name]) + array.tobytes()


def file_bytes(arrays: list[bytes], names: list[str]) -> bytes:
    """A whole file."""
    parts = [struct.pack("<QQQ", 0x112, 0, len(arrays)), *arrays, struct.pack("<Q", len(names))]
    for name in names:
        parts += [struct.pack("<Q", len(name.encode())), name.encode()]
    return b"".join(parts)


def params_bytes(entries: Mapping[str, np.ndarray], version: int = 2) -> bytes:
    """A file of named arrays."""
    return file_bytes([array_bytes(a, version) for a in entries.values()], list(entries))
