"""MATLAB 5 files: masks of SBD, by hand and from scipy, and everything that is not one."""

import io
import struct
import zlib

import numpy as np
import pytest
from label_trees import blocks, mat_file

from dcdet.datasets.mat import read_field

LABELS = blocks((30, 45), range(21))
DAMAGE = (ValueError, struct.error, zlib.error)


def read(content: bytes) -> np.ndarray:
    return read_field(content, "GTcls", "Segmentation")


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
def test_both_byte_orders(order: str, compress: bool) -> None:
    found = read(mat_file(LABELS, order, compress))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, LABELS)


def savemat(content: object, compress: bool = True) -> bytes:
    buffer = io.BytesIO()
    pytest.importorskip("scipy.io").savemat(buffer, content, do_compression=compress)
    return buffer.getvalue()


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int8])
def test_what_scipy_writes(kind: type, compress: bool) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    boundaries = np.empty((20, 1), object)
    boundaries[:, 0] = [sparse.csc_matrix(label == LABELS) for label in range(20)]
    for labels in (LABELS, LABELS[:1, :1], LABELS[:2, :1], LABELS[:1]):
        struct = {"Boundaries": boundaries, "Segmentation": labels.astype(kind), "b": [1.0, 2.0]}
        content = {"other": np.eye(3), "text": "GTcls", "GTcls": struct, "last": np.eye(2)}
        found = read(savemat(content, compress))
        np.testing.assert_array_equal(found, labels)
        assert found.dtype == kind


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"GTinst": {"Segmentation": LABELS}}, "no struct GTcls"),
        ({"GTcls": {"Boundaries": LABELS}}, "no struct GTcls with a field Segmentation"),
        ({"GTcls": LABELS}, "no struct GTcls"),
        ({"GTcls": np.zeros((2, 1), [("Segmentation", object)])}, "no struct GTcls"),
        ({"GTcls": {"Segmentation": np.zeros((3, 4))}}, r"shape \(3, 4\), values of type 9"),
        ({"GTcls": {"Segmentation": "text"}}, "class 4, "),
        ({"GTcls": {"Segmentation": {"a": LABELS}}}, "class 2, "),
        ({"GTcls": {"Segmentation": LABELS[:0]}}, r"shape \(0, 45\)"),
        ({"GTcls": {"Segmentation": np.zeros((3, 3, 3), np.uint8)}}, r"shape \(3, 3, 3\)"),
    ],
)
def test_other_contents(content: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read(savemat(content))


def test_other_files() -> None:
    good = mat_file(LABELS)
    for content in (b"", b"GTcls", b"\x89HDF" * 200, good[:128]):
        with pytest.raises(ValueError, match=r"not a MATLAB 5 file|no struct GTcls"):
            read(content)
    bomb = zlib.compress(bytes(65 << 20))
    with pytest.raises(ValueError, match="more than 67108864 bytes"):
        read(good[:128] + struct.pack("<II", 15, len(bomb)) + bomb)


@pytest.mark.parametrize("compress", [True, False])
def test_damage_raises_and_does_no_more(compress: bool) -> None:
    good = mat_file(LABELS, compress=compress)
    random = np.random.default_rng(0)
    bad = 0
    for number in range(600):
        content = bytearray(good)
        for _ in range(random.integers(1, 4)):
            content[random.integers(128, 700 if number % 2 else len(good)) % len(good)] ^= (
                1 << random.integers(8)
            )
        try:
            assert read(bytes(content)).ndim == 2
        except DAMAGE:
            bad += 1
    assert bad > 150
    for size in range(0, len(good) - 200, 7):  # what follows the mask does not matter
        with pytest.raises(DAMAGE):
            read(good[:size])
