"""MATLAB 5 files, as far as SBD's masks need them.

scipy.io.loadmat reads all of the format, but some damaged files end Python with it. Source:
MathWorks, MAT-File Format, chapter 1.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Element = tuple[int, bytes]  # type, content

MAX_BYTES = 64 << 20
INTEGERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4"}  # types of elements
MATRIX, COMPRESSED = 14, 15
STRUCT, NUMERIC = 2, range(6, 16)  # classes of matrices


def read_field(data: bytes, variable: str, field: str) -> NDArray[Any]:
    """The whole numbers (H, W) in a field of a variable that is one struct.

    Raises ValueError, struct.error or zlib.error for anything else.
    """
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if order is None:
        raise ValueError("not a MATLAB 5 file")
    for element in elements(data[128:], order):
        if element[0] == COMPRESSED:
            [element] = elements(inflate(element[1]), order)
        kind, shape, name, parts = matrix(element, order)
        if name == variable.encode() and kind == STRUCT and shape == (1, 1):
            (_, length), (_, names), *fields = parts
            [width] = struct.unpack(order + "i", length)
            known = [one.rstrip(b"\0") for [one] in struct.iter_unpack(f"{width}s", names)]
            found = dict(zip(known, fields, strict=True))
            if field.encode() in found:
                return numbers(found[field.encode()], order)
    raise ValueError(f"no struct {variable} with a field {field}")


def elements(data: bytes, order: str) -> Iterator[Element]:
    """The data elements that follow each other in `data`."""
    place = 0
    while place < len(data):
        kind, size = struct.unpack_from(order + "II", data, place)
        start, aligned = place + 8, 0 if kind == COMPRESSED else -size % 8
        if kind >> 16:  # at most four bytes, in the place of the size
            kind, size, start, aligned = kind & 0xFFFF, kind >> 16, place + 4, 4 - (kind >> 16)
        content = data[start : start + size]
        if len(content) < size or aligned < 0:
            raise ValueError("cut short")
        yield kind, content
        place = start + size + aligned


def inflate(data: bytes) -> bytes:
    """The content of a compressed element."""
    inflater = zlib.decompressobj()
    content = inflater.decompress(data, MAX_BYTES)
    if not inflater.eof:
        raise ValueError(f"cut short, or more than {MAX_BYTES} bytes")
    return content


def matrix(element: Element, order: str) -> tuple[int, tuple[int, ...], bytes, list[Element]]:
    """Class, shape, name, and what else there is of a matrix."""
    if element[0] != MATRIX:
        raise ValueError(f"a data element of type {element[0]}")
    (_, flags), (_, shape), (_, name), *parts = elements(element[1], order)
    [kind] = struct.unpack_from(order + "I", flags)
    return kind & 255, struct.unpack(f"{order}{len(shape) // 4}i", shape), name, parts


def numbers(element: Element, order: str) -> NDArray[Any]:
    """The values of a matrix of whole numbers."""
    kind, shape, _, parts = matrix(element, order)
    form = parts[0][0] if parts and kind in NUMERIC else None
    if len(shape) != 2 or min(shape) < 1 or form not in INTEGERS:
        raise ValueError(f"a matrix of class {kind}, shape {shape}, values of type {form}")
    return np.frombuffer(parts[0][1], order + INTEGERS[form]).reshape(shape, order="F")
