"""Decoding, resizing and placing boxes, against OpenCV, numpy and the recorded release."""

import contextlib
import json
import os
import runpy
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import pytest
import torch
from data_sets import picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from dcdet.datasets.transforms import (
    BadImage,
    ResizeMethod,
    network_scale,
    network_size,
    place_boxes,
    place_masks,
    read_file,
    read_image,
    read_size,
    resize,
    shown,
)
from dcdet.masks import encode

IGNORE = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION


def opencv_read(path: str | Path, flags: int = cv2.IMREAD_COLOR) -> np.ndarray:
    image = cv2.imread(str(path), flags)
    assert image is not None
    return image[:, :, ::-1]


def save(path: Path, image: np.ndarray, **options: Any) -> str:
    Image.fromarray(image).save(path, **options)
    return str(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp"])
def test_decoding_equals_opencv(tmp_path: Path, suffix: str) -> None:
    path = str(tmp_path / f"image{suffix}")
    cv2.imwrite(path, picture((37, 53)))
    expected = opencv_read(path)
    np.testing.assert_array_equal(read_image(path), expected)
    assert read_size(path) == (37, 53)


@pytest.mark.parametrize("part", ["coco/val2017", "bccd/JPEGImages"])
def test_decoding_equals_opencv_on_photographs(shared: Path, part: str) -> None:
    for path in sorted((shared / "data" / part).glob("*.jpg"))[:10]:
        np.testing.assert_array_equal(read_image(str(path)), opencv_read(path, IGNORE))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "image.jpg", picture((24, 40)), exif=exif, quality=95)
    upright = opencv_read(path)  # OpenCV applies it
    stored = opencv_read(path, IGNORE)
    np.testing.assert_array_equal(read_image(path, "apply"), upright)
    np.testing.assert_array_equal(read_image(path, "ignore"), stored)
    assert (upright.shape == (40, 24, 3)) == (orientation > 4)


def test_pixel_forms_become_rgb(tmp_path: Path) -> None:
    rgb = picture((6, 7))
    grey = rgb[:, :, 0]
    alpha = np.full((6, 7), 99, np.uint8)
    palette = Image.fromarray(rgb).quantize(8)
    palette.info["transparency"] = 3
    palette.save(tmp_path / "palette.png")
    palette.save(tmp_path / "palette.gif")
    expected_palette = np.array(palette.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(palette)]
    np.testing.assert_array_equal(read_image(str(tmp_path / "palette.png")), expected_palette)
    np.testing.assert_array_equal(read_image(str(tmp_path / "palette.gif")), expected_palette)
    path = save(tmp_path / "grey.png", grey)
    np.testing.assert_array_equal(read_image(path), np.stack([grey] * 3, axis=2))
    path = save(tmp_path / "rgba.png", np.dstack([rgb, alpha]))
    np.testing.assert_array_equal(read_image(path), rgb)
    path = save(tmp_path / "la.png", np.dstack([grey, alpha]))
    np.testing.assert_array_equal(read_image(path), np.stack([grey] * 3, axis=2))
    Image.fromarray(grey > 100).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(
        read_image(str(tmp_path / "bits.png"))[:, :, 1], (grey > 100) * 255
    )
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.tiff")
    np.testing.assert_array_equal(read_image(str(tmp_path / "cmyk.tiff")), rgb)


@pytest.mark.parametrize("name", ["grey.png", "grey.tiff", "grey.pgm", "colour.png"])
def test_sixteen_bits_are_scaled(tmp_path: Path, name: str) -> None:
    shape = (4, 4) if name.startswith("grey") else (4, 4, 3)
    deep = np.linspace(0, 65535, int(np.prod(shape))).astype(np.uint16).reshape(shape)
    cv2.imwrite(str(tmp_path / name), deep[..., ::-1] if deep.ndim == 3 else deep)
    found = read_image(str(tmp_path / name)).astype(int)
    expected = deep / 257 if deep.ndim == 3 else np.stack([deep / 257] * 3, axis=2)
    assert np.abs(found - expected).max() <= 1
    assert found.min() == 0
    assert found.max() == 255


def _png_header(width: int, height: int) -> bytes:
    def chunk(content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
        )

    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(header) + chunk(pixels)


def _make_bad(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.jpg"
    good = cv2.imencode(".png" if "png" in kind else ".jpg", picture((60, 80)))[1].tobytes()
    content = {
        "empty": b"",
        "html": b"<!DOCTYPE html><title>404</title>",
        "garbage": bytes(range(256)) * 4,
        "truncated jpg": good[: len(good) // 2],
        "truncated png": good[: len(good) // 2],
        "flipped png": good[:60] + bytes([good[60] ^ 255]) + good[61:],
        "too large": _png_header(10_000, 8_000),
        "far too large": _png_header(60_000, 60_000),
        "too long": _png_header(1, 20_000),
        "too small": cv2.imencode(".png", picture((2, 2))[:1, :1])[1].tobytes(),
    }
    if kind in content:
        path.write_bytes(content[kind])
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        return Path("/dev/zero")
    elif kind == "link loop":
        path.symlink_to(path)
    elif kind.startswith("animated"):
        frames = [Image.fromarray(picture((20, 20), seed)) for seed in range(3)]
        path = folder / f"image.{kind.split()[1]}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
    elif kind == "float":
        path = folder / "float.tiff"
        Image.fromarray(np.ones((4, 4), np.float32)).save(path)
    elif kind == "32 bit":
        path = folder / "int.tiff"
        Image.fromarray(np.ones((4, 4), np.int32)).save(path)
    elif kind == "eps":
        Image.fromarray(picture((20, 20))).save(path, format="EPS")
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "No such file"),
        ("folder", "not a regular file"),
        ("fifo", "not a regular file"),
        ("device", "not a regular file"),
        ("link loop", "symbolic links"),
        ("empty", "not an image"),
        ("html", "not an image"),
        ("garbage", "not an image"),
        ("eps", "not an image"),
        ("truncated jpg", "truncated"),
        ("truncated png", "truncated"),
        ("flipped png", "."),
        ("too large", "10000 x 8000"),
        ("far too large", "3600000000 pixels"),
        ("too long", "1 x 20000"),
        ("too small", "1 x 1"),
        ("animated gif", "3 images"),
        ("animated webp", "3 images"),
        ("float", "32-bit"),
        ("32 bit", "32-bit"),
    ],
)
def test_bad_files_are_refused_with_a_reason(tmp_path: Path, kind: str, reason: str) -> None:
    path = _make_bad(tmp_path, kind)
    with pytest.raises(BadImage, match=reason) as caught:
        read_image(str(path))
    assert str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_a_file_takes_no_more_memory_than_its_size(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(bytes(1000))
    tracemalloc.start()
    try:
        assert read_file(str(path), limit=1 << 40) == bytes(1000)
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()


def test_pixel_limit_and_file_limit(tmp_path: Path) -> None:
    path = save(tmp_path / "image.png", picture((30, 40)))
    assert read_image(path, max_pixels=1200).shape == (30, 40, 3)
    with pytest.raises(BadImage, match="40 x 30"):
        read_image(path, max_pixels=1199)
    with pytest.raises(OSError, match="more than 10"):
        read_file(path, limit=10)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(cut=st.integers(0, 2000), change=st.integers(1, 255), place=st.integers(0, 2000))
def test_damaged_files_never_crash(
    tmp_path_factory: pytest.TempPathFactory, cut: int, change: int, place: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    for suffix in (".jpg", ".png", ".webp", ".tiff"):
        data = bytearray(cv2.imencode(suffix, picture((30, 40)))[1].tobytes())
        data[place % len(data)] ^= change
        path.write_bytes(bytes(data[: len(data) - cut]))
        with contextlib.suppress(BadImage):
            assert read_image(str(path)).shape[2] == 3


def test_resize_equals_the_release(shared: Path) -> None:
    golden = np.load(shared / "golden" / "ops" / "utils_preprocess.npz")
    image = golden["image"][:, :, ::-1]  # recorded as BGR
    for case, short, long in (("up", 60, 100), ("capped", 60, 80), ("down", 25, 100)):
        scale = network_scale(image.shape[:2], short, long)
        assert scale == golden[f"scale_{case}"][0]
        expected = golden[f"resized_{case}"][:, :, ::-1].astype(int)
        found = resize(image, scale)
        assert found.shape == expected.shape
        # The recording is OpenCV 4.7's; OpenCV 5.0 gives the very same, others may round.
        assert np.abs(found - expected).max() <= 1


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 2000), st.integers(0, 2000))
def test_scale_keeps_both_limits(height: int, width: int, short: int, more: int) -> None:
    scale = network_scale((height, width), short, short + more)
    assert max(height, width) * scale <= short + more + 0.5 + 1e-6
    reaches_short = abs(min(height, width) * scale - short) < 1e-6
    assert reaches_short or abs(max(height, width) * scale - short - more) < 1e-6


@pytest.mark.parametrize(
    ("size", "scale"),
    [
        ((60, 100), 1.0),
        ((100, 60), 1.0),
        ((60, 101), 100 / 101),
        ((30, 50), 2.0),
        ((30, 51), 100 / 51),
    ],
)
def test_the_long_side_limits_the_scale(size: tuple[int, int], scale: float) -> None:
    assert network_scale(size, 60, 100) == scale


def test_an_image_that_would_vanish_is_refused() -> None:
    for size, scale in (((2, 4000), 0.1), ((2, 640), 0.25)):
        with pytest.raises(BadImage, match="too narrow"):
            resize(picture(size), scale)
    assert resize(picture((3, 640)), 0.25).shape == (1, 160, 3)


def test_resize_equals_mmdetection(shared: Path) -> None:
    folder = shared / "golden_mmdet"
    image_u8 = runpy.run_path(str(folder / "param_mmdet.py"))["image_u8"]
    golden = np.load(folder / "preprocess.npz")
    recorded = json.loads((folder / "preprocess.json").read_text())
    assert len(recorded["resize"]) == 11
    for number, case in enumerate(recorded["resize"]):
        height, width = case["size"]
        assert network_size((height, width), 800, 1333, "mmdetection") == tuple(case["new"])
        if f"resized{number}_s37" not in golden:
            continue
        image = image_u8(height, width, case["seed"])[:, :, ::-1]  # recorded as BGR
        pixels, scale = shown(image, 800, 1333, "mmdetection", False)
        assert scale == tuple(case["scale_factor"][::-1])
        found = pixels.flip(0).permute(1, 2, 0)[::37, ::37].numpy().astype(int)
        # Equal to the recording where OpenCV is of its version; others may round.
        limit = 0 if cv2.__version__ == recorded["cv2"] else 1
        assert np.abs(found - golden[f"resized{number}_s37"]).max() <= limit


@given(st.integers(2, 3000), st.integers(2, 3000), st.integers(1, 900), st.integers(0, 700))
def test_sizes_equal_torchvisions(height: int, width: int, short: int, more: int) -> None:
    found = network_size((height, width), short, short + more, "torchvision")
    scale = min(short / min(height, width), (short + more) / max(height, width))
    if min(found) == 0:
        return
    image = torch.empty(1, 1, height, width, device="meta")
    expected = torch.nn.functional.interpolate(
        image, scale_factor=scale, recompute_scale_factor=True, mode="bilinear"
    )
    assert found == tuple(expected.shape[2:])


def test_resize_equals_torchvision() -> None:
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    random = np.random.default_rng(0)
    for short, long in ((160, 266), (37, 61), (90, 90)):
        theirs = GeneralizedRCNNTransform(short, long, mean.tolist(), std.tolist()).eval()
        for height, width in random.integers(9, 300, (8, 2)).tolist():
            image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            pixels, (y, x) = shown(image, short, long, "torchvision", False)
            assert pixels.dtype == torch.float32
            corners = random.random((5, 2, 2)) * [width, height]
            boxes = np.concatenate([corners.min(1), corners.max(1)], 1).astype(np.float32)
            target = {"boxes": torch.from_numpy(boxes)}
            batch, [target] = theirs([torch.from_numpy(image / np.float32(255)).permute(2, 0, 1)],
                                     [target])  # fmt: skip
            size = pixels.shape[1], pixels.shape[2]
            assert batch.image_sizes == [size]
            expected = batch.tensors[0, :, : size[0], : size[1]] * std[:, None, None]
            expected = (expected + mean[:, None, None]) * 255
            torch.testing.assert_close(pixels, expected, atol=1e-3, rtol=0)
            assert (y, x) == (size[0] / height, size[1] / width)
            placed = place_boxes(boxes, (height, width), size, (y, x), False, "continuous")
            torch.testing.assert_close(placed, target["boxes"], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("size", "expected"),  # of ResizeShortestEdge(800, 1333), worked out by hand
    [
        ((480, 640), (800, 1067)),
        ((640, 427), (1199, 800)),
        ((500, 1000), (667, 1333)),  # 666.5 rounds up
        ((150, 640), (312, 1333)),
        ((612, 612), (800, 800)),
        ((2000, 3000), (800, 1200)),
    ],
)
def test_resize_equals_detectron2(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = picture(size)
    pixels, scale = shown(image, 800, 1333, "detectron2", False)
    pillow = Image.fromarray(image).resize(expected[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(pixels.permute(1, 2, 0), np.asarray(pillow))
    assert scale == (expected[0] / size[0], expected[1] / size[1])


METHODS = get_args(ResizeMethod)


def test_mirroring_comes_first_or_last_as_in_each_system() -> None:
    size = 60, 100  # becomes 98 x 163, where OpenCV 5.0 gives other pixels in the other order
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for method in METHODS:
        plain, _ = shown(image, 98, 163, method, False)
        mirrored, scale = shown(image, 98, 163, method, True)
        first, _ = shown(np.ascontiguousarray(image[:, ::-1]), 98, 163, method, False)
        assert torch.equal(mirrored, first if method == "original" else plain.flip(2))
        height, width = mirrored.shape[1], mirrored.shape[2]
        box = np.array([[90, 3, 100, 60]], np.float32)  # at the right border
        placed = place_boxes(box, size, (height, width), scale, True, "continuous")
        expected = torch.tensor([[0, height / 20, width / 10, height]])
        torch.testing.assert_close(placed, expected, atol=0.04, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_thin_images_are_resized_or_refused(method: ResizeMethod) -> None:
    for size in ((1, 20_000), (20_000, 2), (2, 2), (2, 3), (1, 1), (16_384, 13)):
        image = np.full((*size, 3), 77, np.uint8)
        if max(size) > 1333 * min(size):
            with pytest.raises(BadImage, match="too narrow"):
                shown(image, 800, 1333, method, True)
            continue
        pixels, _ = shown(image, 800, 1333, method, True)
        assert min(pixels.shape[1:]) >= 1
        assert max(pixels.shape[1:]) <= 1333
        assert pixels.min() == pixels.max() == 77


@pytest.mark.parametrize("flip", [False, True])
def test_inclusive_boxes_scale_on_each_axis(flip: bool) -> None:
    box = np.array([[2, 3, 10, 20]], np.float32)
    found = place_boxes(box, (30, 40), (60, 120), (2.0, 3.0), flip, "inclusive")[0].tolist()
    assert found == ([90, 6, 112, 39] if flip else [6, 6, 28, 39])


sides = st.integers(2, 900)
fractions = st.tuples(*[st.floats(0, 1)] * 4)


@given(sides, sides, fractions, st.floats(0.05, 20), st.booleans())
def test_inclusive_boxes_follow_the_release(
    height: int, width: int, place: tuple[float, ...], scale: float, flip: bool
) -> None:
    # In the release's own terms: whole inclusive corners, flip, scale, round, clip.
    x1, x2 = sorted(round(f * (width - 1)) for f in place[:2])
    y1, y2 = sorted(round(f * (height - 1)) for f in place[2:])
    network_size = max(1, round(height * scale)), max(1, round(width * scale))
    expected = np.array([x1, y1, x2, y2])
    if flip:
        expected[[0, 2]] = width - x2 - 1, width - x1 - 1
    scaled = np.round(expected * scale)
    scaled[0::2] = scaled[0::2].clip(0, network_size[1] - 1)
    scaled[1::2] = scaled[1::2].clip(0, network_size[0] - 1)
    box = np.array([[x1, y1, x2 + 1, y2 + 1]], np.float32)
    found = place_boxes(box, (height, width), network_size, scale, flip, "inclusive")
    np.testing.assert_array_equal(found[0].numpy(), scaled + np.array([0, 0, 1, 1]))


@given(sides, sides, fractions, st.floats(0.05, 20), st.booleans())
def test_continuous_boxes_stay_inside_and_keep_a_size(
    height: int, width: int, place: tuple[float, ...], scale: float, flip: bool
) -> None:
    x1, x2 = sorted(f * (width - 0.1) for f in place[:2])
    y1, y2 = sorted(f * (height - 0.1) for f in place[2:])
    box = np.array([[x1, y1, max(x2, x1 + 0.1), max(y2, y1 + 0.1)]], np.float32)
    network_size = max(1, round(height * scale)), max(1, round(width * scale))
    found = place_boxes(box, (height, width), network_size, scale, flip, "continuous")[0].numpy()
    assert 0 <= found[0] < found[2] <= network_size[1]
    assert 0 <= found[1] < found[3] <= network_size[0]
    mirrored = np.array([width - box[0, 2], box[0, 1], width - box[0, 0], box[0, 3]])
    expected = (mirrored if flip else box[0]) * scale
    assert np.abs(found - expected).max() <= 0.52 + 1e-3 * scale


def run_lengths(masks: np.ndarray) -> list[bytes]:
    return [rle["counts"].encode() for rle in encode(torch.from_numpy(masks))]


@given(
    st.integers(8, 60), st.integers(8, 60), st.floats(0.1, 5), st.booleans(), st.integers(0, 40),
    st.integers(0, 3), st.integers(0, 99),
)  # fmt: skip
def test_masks_go_with_the_image(
    height: int, width: int, scale: float, flip: bool, padding: int, number: int, seed: int
) -> None:
    masks = np.random.default_rng(seed).random((number, height, width)) < 0.5
    image = resize(np.zeros((height, width, 3), np.uint8), scale)
    shown = image.shape[1], image.shape[0]
    network_size = shown[1] + padding, shown[0] + padding
    found = place_masks(run_lengths(masks), (height, width), network_size, scale, flip).numpy()
    assert found.shape == (number, *network_size)
    for mask, one in zip(masks, found, strict=True):
        expected = cv2.resize(mask.astype(np.uint8), shown, interpolation=cv2.INTER_NEAREST)
        expected = np.pad(expected[:, ::-1] if flip else expected, ((0, padding), (0, padding)))
        np.testing.assert_array_equal(one, expected)


def test_masks_at_a_scale_for_each_axis() -> None:
    mask = np.arange(20 * 30).reshape(1, 20, 30) % 7 < 3
    found = place_masks(run_lengths(mask), (20, 30), (31, 64), (31 / 20, 50 / 30), False)[0]
    expected = cv2.resize(mask[0].astype(np.uint8), (50, 31), interpolation=cv2.INTER_NEAREST)
    np.testing.assert_array_equal(found[:, :50], expected)
    assert not found[:, 50:].any()
