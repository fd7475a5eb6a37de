"""MXNet's files: every header, every damage; the release's names, its two sets of box weights."""

import contextlib
import json
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from golden import load_param_module, release_name, release_weights, system_of
from hypothesis import given
from hypothesis import strategies as st
from params_files import CODES, array_bytes, file_bytes, params_bytes

from dcdet import build_model, load_config
from dcdet.errors import UserError
from dcdet.weights.mxnet import own_name, read, translate

FILE = Path("some.params")
SYSTEMS = ("rfcn", "faster_rcnn", "fpn", "deeplab")
RELEASED = sorted(path for name in SYSTEMS for path in (ROOT / "configs" / name).glob("*.yaml"))
RECORDED = [
    path for path in RELEASED
    if path.stem in ("rfcn_dcn_r101_coco", "fpn_dcn_r101_coco", "deeplab_dcn_r101_cityscapes")
]  # fmt: skip
STD = (0.1, 0.1, 0.2, 0.2)
SMALL = {
    "arg:w": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "arg:b": np.array([1, 2, 3], np.float32),
    "aux:m": np.array([0.5, 0.25], np.float32),
    "arg:h": np.arange(4, dtype=np.float16).reshape(2, 2),
}


def same(ours: dict[str, np.ndarray] | None, wanted: dict[str, np.ndarray]) -> None:
    assert ours is not None
    assert list(ours) == list(wanted)
    for name, array in wanted.items():
        assert ours[name].dtype == array.dtype, name
        np.testing.assert_array_equal(ours[name], array)


# The reader.


@pytest.mark.parametrize("version", [0, 1, 3])
def test_recorded_samples_of_every_version(shared: Path, version: int) -> None:
    content = (shared / f"golden/nets/sample_v{version}.params").read_bytes()
    same(read(content, FILE), SMALL)
    assert params_bytes(SMALL, version) == content  # so the tests' writer is right


def test_a_recorded_sample_of_mxnets_own(shared: Path) -> None:
    found = read((shared / "golden/nets/sample_v2.params").read_bytes(), FILE)
    assert found is not None
    param = load_param_module(shared).param
    compared = 0
    for entry, array in found.items():
        name = entry[4:]
        if name.startswith("dtype_"):
            first = 0 if name == "dtype_uint8" else -2
            assert array.dtype.name == name[6:]
            assert array.tolist() == [
                [first, first + 1, first + 2],
                [first + 3, first + 4, first + 5],
            ]
        elif name != "one":
            np.testing.assert_array_equal(array, param(name, array.shape))
            compared += 1
    assert compared == 7
    assert found["arg:one"].tolist() == [7.5]


def test_arrays_without_names_are_numbered(shared: Path) -> None:
    found = read((shared / "golden/nets/sample_list_noname.params").read_bytes(), FILE)
    same(found, {"0": np.float32([[1, 2], [3, 4]]), "1": np.float32([5])})


@pytest.mark.parametrize("version", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", CODES)
def test_every_dtype_in_every_version(version: int, dtype: str) -> None:
    arrays = {"arg:a": np.array([[0, 1, 2], [3, 4, 5]]).astype(dtype),
              "arg:é": np.zeros((2, 0, 3), dtype), "aux:c": np.ones(1, dtype)}  # fmt: skip
    same(read(params_bytes(arrays, version), FILE), arrays)


def test_the_device_does_not_matter() -> None:
    array = np.float32([1, 2])
    for device in ((2, 7), (3, 0), (1, 0)):
        content = file_bytes([array_bytes(array, 2, device)], ["arg:a"])
        same(read(content, FILE), {"arg:a": array})


def test_nothing_and_scalars() -> None:
    """Rank 0 is nothing at all; with V3 that is rank -1 or an unknown side, and 0 is a scalar."""
    nothing = np.zeros(0, np.float32)
    last = array_bytes(np.float32([7]))
    for array in (
        struct.pack("<I", 0), struct.pack("<II", 0xF993FAC8, 0),
        struct.pack("<Iii", 0xF993FAC9, 0, 0), struct.pack("<Iii", 0xF993FACA, 0, -1),
        struct.pack("<Iiiqq", 0xF993FACA, 0, 2, 3, -1),
    ):  # fmt: skip
        content = file_bytes([array, last], ["arg:a", "arg:b"])
        same(read(content, FILE), {"arg:a": nothing, "arg:b": np.float32([7])})
    content = params_bytes({"arg:a": np.array(3, np.float32)}, version=3)
    same(read(content, FILE), {"arg:a": np.array(3, np.float32)})
    same(read(file_bytes([], []), FILE), {})


def test_another_kind_of_file_is_left_to_others() -> None:
    for content in (b"", b"\x12\x01", b"PK\x03\x04" + bytes(100), b"<html>", b'{"nodes": []}'):
        assert read(content, FILE) is None


@pytest.mark.parametrize(("storage", "word"), [(1, "row_sparse"), (2, "csr")])
def test_sparse_arrays_are_refused_by_name(storage: int, word: str) -> None:
    sparse = struct.pack("<Iiiqiq", 0xF993FAC9, storage, 1, 3, 1, 3) + bytes(40)
    content = file_bytes([array_bytes(np.float32([1])), sparse], ["arg:a", "arg:b"])
    with pytest.raises(UserError, match=rf"some\.params: array 2 of 2: {word} storage .*tostype"):
        read(content, FILE)


ONE = array_bytes(np.float32([1, 2]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (params_bytes(SMALL) + b"\0", "end: damaged: 1 bytes after the last name"),
        (file_bytes([ONE, ONE], ["arg:a"]), "names: damaged: 1 names for 2 arrays"),
        (file_bytes([ONE, ONE], ["arg:a", "arg:a"]), "name 2 of 2: 'arg:a' is the name of two"),
        (file_bytes([ONE], ["xx"]).replace(b"xx", b"\xff\xfe"), "name 1 of 1: damaged: not UTF-8"),
        (struct.pack("<QQQ", 0x112, 0, 1 << 60), "header: damaged: 1152921504606846976 arrays"),
        (struct.pack("<QQQ", 0x112, 0, 100_000) + bytes(100_000), "array 25001 of 100000: cut off"),
        (file_bytes([struct.pack("<I", 4_000_000_000)], []), "0 of 1|4000000000 dimensions"),
        (file_bytes([struct.pack("<Iii", 0xF993FAC9, 0, -2)], []), "-2 dimensions"),
        (file_bytes([struct.pack("<Iii", 0xF993FAC9, 9, 1)], []), "storage type 9"),
        (file_bytes([struct.pack("<Iiiqiii", 0xF993FAC9, 0, 1, -5, 1, 0, 0)], []), r"shape \(-5,"),
        (file_bytes([struct.pack("<Iiiqiii", 0xF993FAC9, 0, 1, 5, 1, 0, 99)], []), "dtype 99"),
        (file_bytes([struct.pack("<Iiiqiii", 0xF993FAC9, 0, 1, 5, 1, 0, -1)], []), "dtype -1"),
        (
            file_bytes(
                [struct.pack("<Iii3qiii", 0xF993FAC9, 0, 3, 0, *[1 << 62] * 2, 1, 0, 0)], []
            ),
            "array 1 of 1: damaged: shape",
        ),
        (
            file_bytes([struct.pack("<Iii2qiii", 0xF993FAC9, 0, 2, *[1 << 40] * 2, 1, 0, 0)], []),
            "array 1 of 1: cut off or damaged: 4835703278458516698824704 bytes wanted, 8 are left",
        ),
        (
            file_bytes([ONE], [])[:-8] + struct.pack("<QQ", 1, 1 << 62) + b"arg",
            "name 1 of 1: cut off or damaged: 4611686018427387904 bytes wanted, 3 are left",
        ),
    ],
)
def test_damage_is_named_and_costs_nothing(content: bytes, message: str) -> None:
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(UserError, match=rf"^some\.params: .*({message})"):
            read(content, FILE)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 5


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_a_file_cut_anywhere_is_refused(version: int) -> None:
    content = params_bytes(SMALL, version)
    for size in range(8, len(content)):
        with pytest.raises(UserError, match=r"^some\.params: .*(\d of \d|header|names): cut off"):
            read(content[:size], FILE)


@given(
    version=st.integers(0, 3),
    place=st.integers(0, 10**6),
    change=st.one_of(st.integers(1, 255), st.binary(min_size=1, max_size=12)),
)
def test_a_changed_byte_loads_or_is_refused(version: int, place: int, change: int | bytes) -> None:
    content = bytearray(params_bytes(SMALL, version))
    place %= len(content)
    if isinstance(change, int):
        content[place] ^= change
    else:
        content[place : place + len(change)] = change
    with contextlib.suppress(UserError):
        found = read(bytes(content), FILE)
        assert found is None or sum(array.nbytes for array in found.values()) <= len(content)


@given(st.binary(max_size=200))
def test_garbage_loads_or_is_refused(tail: bytes) -> None:
    with contextlib.suppress(UserError):
        read(struct.pack("<QQ", 0x112, 0) + tail, FILE)


# Names.


def test_names_that_the_release_never_had() -> None:
    for strange in (
        "fc1_weight", "fc7_weight", "data", "", "conv1", "_weight", "res6a_branch1_weight",
        "res2a_branch3_weight", "res2a_branch2d_weight", "res4b100_branch2a_weight",
        "fpn_p7_weight", "offset_p6_bias", "stage1_conv1_weight", "res2a_branch2a_weight_test",
    ):  # fmt: skip
        assert own_name(strange) is None, strange


@pytest.mark.parametrize("config", RELEASED, ids=lambda path: path.stem)
def test_every_name_comes_back(config: Path) -> None:
    with torch.device("meta"):  # nothing is allocated
        model = build_model(load_config(config))
    names = [release_name(name, system_of(model)) for name in model.state_dict()]
    assert [own_name(name) for name in names] == list(model.state_dict())
    assert len(names) > 500


@pytest.mark.parametrize("config", RECORDED, ids=lambda path: path.stem)
def test_a_recorded_network_has_the_models_values(shared: Path, config: Path) -> None:
    """The same weights as those of the golden tests, whose names and scales stand in `golden.py`;
    what is recorded is the test network."""
    network = config.stem.rpartition("_r101_")[0]
    model = build_model(load_config(config))
    wanted = release_weights(model, shared, network, test_time=True)
    param = load_param_module(shared).param
    recorded = json.loads((shared / f"golden/nets/{network}.json").read_text())["params"]
    arrays = {
        f"{kind}:{name}": param(name, shape)
        for kind in ("arg", "aux")
        for name, shape in recorded[kind].items()
    }
    found = translate(arrays, torch.tensor(STD), FILE)
    notes = 1 if network == "deeplab_dcn" else 2  # about the upsampling, or box weights
    assert (found.unknown, found.backbone_only, len(found.notes)) == ([], False, notes)
    assert found.values.keys() == wanted.keys() == found.entries.keys()
    for name, value in wanted.items():
        assert torch.equal(found.values[name], value), name


def bilinear(side: int) -> np.ndarray:
    """MXNet's formula for the weights of a bilinear upsampling."""
    factor = np.ceil(side / 2)
    centre = (2 * factor - 1 - factor % 2) / (2 * factor)
    kernel = np.zeros((side, side), np.float32)
    for y in range(side):
        for x in range(side):
            kernel[y, x] = (1 - abs(x / factor - centre)) * (1 - abs(y / factor - centre))
    return np.tile(kernel, (3, 1, 1, 1))


def test_the_upsampling_must_be_bilinear() -> None:
    for side in (32, 16, 4):
        found = translate({"arg:upsampling_weight": bilinear(side)}, None, FILE)
        assert (found.values, found.unknown, len(found.notes)) == ({}, [], 1)
    changed = bilinear(32)
    changed[1, 0, 3, 5] += 1e-3
    for array in (changed, bilinear(32)[0, 0], np.zeros((3, 1, 32, 32), np.float32)):
        with pytest.raises(UserError, match="arg:upsampling_weight: is not the bilinear"):
            translate({"arg:upsampling_weight": array}, None, FILE)


# The two kinds of box weights.


def box_arrays(name: str, rows: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(X, X_test) as do_checkpoint of the release computes them, row by row."""
    rng = np.random.default_rng(rows)
    side = (1, 1) if name == "rfcn_bbox" else ()
    plain = {f"arg:{name}_weight": rng.normal(0, 0.01, (rows, 5, *side)).astype(np.float32),
             f"arg:{name}_bias": rng.normal(0, 0.1, rows).astype(np.float32)}  # fmt: skip
    test = {}
    for key, value in plain.items():
        test[f"{key}_test"] = value.copy()
        for row in range(rows):
            coordinate = (row // 49) % 4 if name == "rfcn_bbox" else row % 4
            test[f"{key}_test"][row] *= np.float32(STD[coordinate])
    return plain, test


@pytest.mark.parametrize(("name", "rows"), [("rfcn_bbox", 392), ("bbox_pred", 84)])
def test_box_weights_are_those_of_training(name: str, rows: int) -> None:
    plain, test = box_arrays(name, rows)
    std = torch.tensor(STD)

    def weights(arrays: dict[str, np.ndarray]) -> tuple[list[torch.Tensor], list[str]]:
        found = translate(arrays, std, FILE)
        assert found.values.keys() == {"roi_head.delta.weight", "roi_head.delta.bias"}
        assert not found.unknown
        return [found.values[f"roi_head.delta.{kind}"] for kind in ("weight", "bias")], found.notes

    wanted = [torch.from_numpy(value) for value in plain.values()]
    both, notes = weights({**test, **plain})
    assert all(map(torch.equal, both, wanted))
    assert notes == []
    alone = {key.removesuffix("_test"): value for key, value in test.items()}
    for arrays in (alone, test):  # X alone is the test network's, and so is X_test alone
        found, notes = weights(arrays)
        torch.testing.assert_close(found, wanted)
        assert len(notes) == 2
        assert "arg:" + name in notes[0]
        assert "divided by model.roi_head.box_std" in notes[0]
    # Trained with other deviations than the config's: X_test is what the test network uses.
    found, notes = weights({**test, **{key: 3 * value for key, value in plain.items()}})
    torch.testing.assert_close(found, wanted)
    assert f"arg:{name}_weight: its _test is not it times" in notes[0]


def test_rpn_box_weights_are_left_alone() -> None:
    arrays = {"arg:rpn_bbox_pred_weight": np.ones((48, 2, 1, 1), np.float32)}
    found = translate(arrays, torch.tensor(STD), FILE)
    assert torch.equal(found.values["rpn.delta.weight"], torch.ones(48, 2, 1, 1))


def test_what_counts_and_what_does_not() -> None:
    value = np.float32([1, 2])
    arrays = {"arg:bn_conv1_gamma": value, "aux:bn_conv1_moving_mean": value.astype(np.float16),
              "arg:fc1_bias": value, "bn_conv1_beta": value, "opt:bn_conv1_beta": value,
              "": value}  # fmt: skip
    found = translate(arrays, None, FILE)
    assert list(found.values) == ["backbone.bn1.weight", "backbone.bn1.running_mean"]
    assert all(v.dtype == torch.float32 and v.tolist() == [1, 2] for v in found.values.values())
    assert found.unknown == ["arg:fc1_bias", "bn_conv1_beta", "opt:bn_conv1_beta", ""]
    assert found.entries["backbone.bn1.weight"] == "arg:bn_conv1_gamma"
    assert found.backbone_only
    assert "model.pixels" not in found.rules
    heads = translate({"arg:rpn_conv_bias": value}, None, FILE)
    assert not heads.backbone_only
    assert heads.rules["model.pixels"] == "inclusive"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arg:conv1_weight": np.int8([1])}, "some.params: arg:conv1_weight: holds int8"),
        (
            {"arg:rpn_conv_bias": np.float32([1]), "arg:rpn_conv_3x3_bias": np.float32([1])},
            "arg:rpn_conv_3x3_bias: arg:rpn_conv_bias is the same parameter",
        ),
        (
            {"arg:bbox_pred_bias": np.zeros(8, "f"), "arg:bbox_pred_bias_test": np.zeros(4, "f")},
            "arg:bbox_pred_bias and arg:bbox_pred_bias_test: have other shapes",
        ),
    ],
)
def test_what_cannot_be_weights(arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(UserError, match=message):
        translate(arrays, torch.tensor(STD), FILE)
