import importlib
from pathlib import Path
from typing import Any

import op_cases
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dcdet.ops import compiled, deform_conv2d, reference

module = importlib.import_module("dcdet.ops.deform_conv")
Pair = tuple[int, int]
pytestmark = pytest.mark.usefixtures("way")


def case(
    seed: int = 0,
    *,
    batch: int = 2,
    size: Pair = (7, 6),
    groups: int = 1,
    offset_groups: int = 1,
    depth: int = 1,
    outputs: int = 2,
    kernel: Pair = (3, 3),
    stride: Pair = (1, 1),
    padding: Pair = (1, 1),
    dilation: Pair = (1, 1),
    masked: bool = True,
    biased: bool = True,
    border: str = "zero",
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Arguments of deform_conv2d; C = groups * offset_groups * depth, O = groups * outputs."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    channels = groups * offset_groups * depth
    out = [
        (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]
    taps = kernel[0] * kernel[1]
    return {
        "input": random(batch, channels, *size),
        "offset": random(batch, 2 * offset_groups * taps, *out) * 2,
        "weight": random(groups * outputs, channels // groups, *kernel),
        "bias": random(groups * outputs) if biased else None,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "mask": random(batch, offset_groups * taps, *out) if masked else None,
        "border": border,
    }


TENSORS = ("input", "offset", "weight", "bias", "mask")


def run(op: Any, arguments: dict[str, Any]) -> list[Tensor]:
    """Output and gradients of one call."""
    arguments = arguments | {name: op_cases.leaf(arguments[name]) for name in TENSORS}
    output = op(**arguments)
    grad = op_cases.whole_numbers(output)
    inputs = [arguments[name] for name in TENSORS]
    return [output.detach(), *op_cases.gradients(output, grad, inputs)]


@pytest.mark.parametrize("prefix", ["dcnv1", "dcnv2"])
def test_golden(shared: Path, prefix: str) -> None:
    """The recorded runs of the 2017 release's v1, of its updated v1 ("_new") and of v2."""
    for name, attributes, arrays in op_cases.golden(shared, prefix):
        rules = [("original", ""), ("zero", "_new")] if prefix == "dcnv1" else [("zero", "")]
        for border, suffix in rules:
            inputs = {
                key: arrays[key].clone().requires_grad_()
                for key in ("data", "offset", "weight", "bias", "mask")
                if key in arrays
            }
            output = deform_conv2d(
                inputs["data"],
                inputs["offset"],
                inputs["weight"],
                inputs.get("bias"),
                attributes["stride"],
                attributes["pad"],
                attributes["dilate"],
                inputs.get("mask"),
                border,  # type: ignore[arg-type]
            )
            output.backward(arrays["grad_out"])
            op_cases.same(output, arrays[f"out{suffix}"], 1e-4)
            compared = 0
            for key, value in inputs.items():
                if f"grad_{key}{suffix}" in arrays:
                    assert value.grad is not None, name
                    op_cases.same(value.grad, arrays[f"grad_{key}{suffix}"], 1e-4)
                    compared += 1
            assert compared >= 3, name


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, Any]:
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, dilation = draw(pairs), draw(pairs)
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in (0, 1)]
    return case(
        draw(st.integers(0, 99)),
        batch=draw(st.integers(0, 3)),
        size=(draw(st.integers(least[0], 8)), draw(st.integers(least[1], 8))),
        groups=draw(st.integers(1, 3)),
        offset_groups=draw(st.integers(1, 3)),
        depth=draw(st.integers(1, 2)),
        outputs=draw(st.integers(1, 2)),
        kernel=kernel,
        stride=draw(pairs),
        padding=padding,
        dilation=dilation,
        masked=draw(st.booleans()),
        biased=draw(st.booleans()),
        border=draw(st.sampled_from(["zero", "original"])),
    )


def plant(draw: Any, offset: Tensor, values: st.SearchStrategy[float]) -> None:
    """Some offsets become drawn values."""
    for _ in range(draw(st.integers(0, 8)) if offset.numel() else 0):
        offset.view(-1)[draw(st.integers(0, offset.numel() - 1))] = draw(values)


@pytest.mark.parametrize("version", ["dcn", "dcnv2"])
def test_golden_packs_of_mmdetection(shared: Path, version: str) -> None:
    """mmcv's DCN and DCNv2: a convolution finds the offsets, and v2's mask, of a second one.

    v2's channels are three chunks; the first two are not y and x, but together v1's offsets, and
    the sigmoid of the last is the mask. Both recorded with stride 2 and two offset groups.
    """
    arrays = op_cases.golden_mmdet(shared, f"{version}_")
    inputs = [
        arrays[name].requires_grad_()
        for name in (
            "input",
            "param:weight",
            "param:conv_offset.weight",
            "param:conv_offset.bias",
        )
    ]
    input, weight, offset_weight, offset_bias = inputs
    found = F.conv2d(input, offset_weight, offset_bias, stride=2, padding=1)
    offset = found[:, : 2 * 9 * 2]
    mask = found[:, 2 * 9 * 2 :].sigmoid() if version == "dcnv2" else None
    output = deform_conv2d(input, offset, weight, stride=2, padding=1, mask=mask)
    op_cases.same(output, arrays["out"], 1e-12)
    grads = torch.autograd.grad(output, inputs, arrays["grad"])
    names = ("grad_input", "grad:weight", "grad:conv_offset.weight", "grad:conv_offset.bias")
    for name, grad in zip(names, grads, strict=True):
        op_cases.same(grad, arrays[name], 1e-11)


@settings(max_examples=200)
@given(geometries(), st.data())
def test_equals_the_reference(arguments: dict[str, Any], data: st.DataObject) -> None:
    """Values and gradients in any geometry and layout, with sampled whole, far and huge offsets."""
    finite = [value for value in op_cases.HOSTILE if value == value]
    plant(data.draw, arguments["offset"], op_cases.positions | st.sampled_from(finite))
    layout = data.draw(st.sampled_from([x for x in op_cases.LAYOUTS if x != "expanded"]))
    twisted = {
        name: None if arguments[name] is None else op_cases.laid_out(arguments[name], layout)
        for name in TENSORS
    }
    for own, twin in zip(
        run(deform_conv2d, arguments | twisted),
        run(reference.deform_conv2d, arguments),
        strict=True,
    ):
        op_cases.same(own, twin, 1e-9)


@settings(max_examples=40)
@given(geometries(), st.data())
def test_a_nan_offset_stays_where_it_is(arguments: dict[str, Any], data: st.DataObject) -> None:
    """NaN in, NaN out at the outputs that read it; the input's gradient never sees it."""
    plant(data.draw, arguments["offset"], st.sampled_from(op_cases.HOSTILE))
    own, twin = run(deform_conv2d, arguments), run(reference.deform_conv2d, arguments)
    op_cases.same(own[0], twin[0], 1e-9)
    op_cases.same(own[1], twin[1], 1e-9)
    assert own[1].isfinite().all()
    tainted = arguments["offset"].isnan().unflatten(1, (-1, 2)).any(2, keepdim=True)
    tainted = tainted.expand(-1, -1, 2, -1, -1).flatten(1, 2)
    assert own[2][~tainted].isfinite().all()


def test_zero_offsets_are_a_plain_convolution() -> None:
    for border in ("zero", "original"):
        for kernel, groups in (((3, 3), 1), ((1, 2), 2), ((5, 5), 1)):
            arguments = case(
                kernel=kernel,
                groups=groups,
                stride=(2, 1),
                padding=(2, 3),
                masked=False,
                border=border,
            )
            arguments["offset"].zero_()
            own = deform_conv2d(**arguments)
            names = ("input", "weight", "bias", "stride", "padding", "dilation")
            plain = F.conv2d(*(arguments[name] for name in names), groups)
            op_cases.same(own, plain, 1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_equals_torchvision(masked: bool) -> None:
    """Everything but the slope at exactly -1, which random offsets do not meet."""
    arguments = case(groups=2, offset_groups=3, stride=(2, 1), padding=(2, 1), masked=masked)
    arguments.pop("border")
    for own, other in zip(
        run(deform_conv2d, arguments), run(torchvision.ops.deform_conv2d, arguments), strict=True
    ):
        op_cases.same(own, other, 1e-11)


def slopes(place: float, border: str) -> tuple[float, float]:
    """Value and slope of a map (1, 2, 5) in one column, sampled at y = `place`."""
    column = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).view(1, 1, 3, 1)
    offset = torch.tensor([place, 0.0], dtype=torch.float64).view(1, 2, 1, 1).requires_grad_()
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    output = deform_conv2d(column, offset, one, stride=3, border=border)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(output.sum(), offset)
    return output.item(), grad[0, 0].item()


@pytest.mark.parametrize(
    ("place", "zero", "original"),
    [
        (-1.0, (0, 0), (0, 0)),
        (-0.5, (0.5, 1), (0, 0)),
        (0.0, (1, 1), (1, 1)),
        (1.0, (2, 3), (2, 3)),
        (1.5, (3.5, 3), (3.5, 3)),
        (2.0, (5, -5), (5, 0)),
        (2.5, (2.5, -5), (5, 0)),
        (3.0, (0, 0), (0, 0)),
        (torch.inf, (0, 0), (0, 0)),
        (-torch.inf, (0, 0), (0, 0)),
        (-1e30, (0, 0), (0, 0)),
        (2.0**31, (0, 0), (0, 0)),
    ],
)
def test_borders_by_hand(place: float, zero: Pair, original: Pair) -> None:
    assert slopes(place, "zero") == zero
    assert slopes(place, "original") == original


@pytest.mark.parametrize("border", ["zero", "original"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(border: str, masked: bool) -> None:
    arguments = case(
        batch=1, size=(3, 2), groups=2, kernel=(2, 2), outputs=1, masked=masked, border=border
    )
    # a numeric slope needs positions away from whole numbers
    whole = arguments["offset"].floor()
    arguments["offset"] = whole + 0.2 + 0.6 * (arguments["offset"] - whole)
    names = [name for name in TENSORS if arguments[name] is not None]

    def call(*tensors: Tensor) -> Tensor:
        return deform_conv2d(**arguments | dict(zip(names, tensors, strict=True)))

    inputs = tuple(arguments[name].requires_grad_() for name in names)
    assert torch.autograd.gradcheck(call, inputs)
    for name in names:
        alone = tuple(arguments[n].detach().requires_grad_(n == name) for n in names)
        assert torch.autograd.gradcheck(call, alone, fast_mode=True), name


@pytest.mark.parametrize(
    "geometry",
    [
        {"batch": 0},
        {"size": (1, 1)},
        {"size": (1, 1), "padding": (0, 0), "kernel": (1, 1)},
        {"size": (2, 3), "kernel": (5, 7), "padding": (2, 3)},
        {"batch": 7, "size": (3, 5)},
    ],
)
def test_edges(geometry: dict[str, Any]) -> None:
    arguments = case(**geometry)
    own, twin = run(deform_conv2d, arguments), run(reference.deform_conv2d, arguments)
    for one, other in zip(own, twin, strict=True):
        assert one.shape == other.shape
        op_cases.same(one, other, 1e-10)


@pytest.mark.parametrize("limit", [1, 5000])
def test_runs_of_pixels_change_nothing(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Cut into single pixels, or into runs across images, the results are those of one run."""
    arguments = case(batch=5, groups=2, offset_groups=2, border="original")
    whole = run(deform_conv2d, arguments)
    monkeypatch.setitem(module.COLUMN_BYTES, "cpu", limit)
    for one, other in zip(run(deform_conv2d, arguments), whole, strict=True):
        op_cases.same(one, other, 1e-12)


def test_twice_the_same_bits() -> None:
    arguments = case(
        batch=2, size=(40, 30), offset_groups=4, depth=8, outputs=32, dtype=torch.float32
    )
    for one, other in zip(
        run(deform_conv2d, arguments), run(deform_conv2d, arguments), strict=True
    ):
        assert torch.equal(one, other)


def test_layouts() -> None:
    """Any strides are read as they are, zeros and holes included; the result is channels_last."""
    arguments = case(offset_groups=2, depth=2, outputs=3)
    for layout in op_cases.LAYOUTS:
        twisted = {name: op_cases.laid_out(arguments[name], layout) for name in TENSORS[1:]}
        twisted["input"] = op_cases.laid_out(arguments["input"], layout)
        own = deform_conv2d(**arguments | twisted)
        plain = deform_conv2d(**arguments | {k: v.contiguous() for k, v in twisted.items()})
        assert torch.equal(own, plain), layout
        assert own.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_compute_in_float32(dtype: torch.dtype) -> None:
    """The result is the float32 result on the same numbers, rounded once; but see bfloat16."""
    arguments = case(dtype=dtype, offset_groups=2)
    wide = {name: arguments[name].float() for name in TENSORS}
    own, full = run(deform_conv2d, arguments), run(deform_conv2d, arguments | wide)
    for one, other in zip(own, full, strict=True):
        assert one.dtype == dtype
        if compiled.covers("deform_conv2d", arguments["input"]):
            close_in_bfloat16(one, other)
        else:
            assert torch.equal(one, other.to(dtype))
    precise = arguments | {name: arguments[name].float() for name in ("offset", "mask")}
    assert torch.equal(deform_conv2d(**precise), own[0])


def close_in_bfloat16(one: Tensor, other: Tensor) -> None:
    """As close as numbers of 8 bits are, of which the largest give the scale."""
    scale = other.abs().max()
    op_cases.same(one.float() / scale, other / scale, 1e-2)


@pytest.mark.parametrize("border", ["zero", "original"])
@pytest.mark.parametrize(("groups", "offset_groups", "depth"), [(1, 1, 102), (2, 3, 17), (1, 5, 8)])
def test_bfloat16(groups: int, offset_groups: int, depth: int, border: str) -> None:
    """Channels in whole vectors and not; gradients have the arguments' dtypes."""
    layout = {"groups": groups, "offset_groups": offset_groups, "depth": depth, "outputs": 35}
    arguments = case(size=(9, 11), border=border, dtype=torch.bfloat16, **layout)
    arguments |= {name: arguments[name].float() for name in ("offset", "mask")}
    wide = {name: arguments[name].float() for name in TENSORS}
    own, full = run(deform_conv2d, arguments), run(deform_conv2d, arguments | wide)
    for one, other in zip(own, full, strict=True):
        close_in_bfloat16(one, other)
    assert [one.dtype for one in own[1:]] == [arguments[name].dtype for name in TENSORS]


def test_autocast() -> None:
    """Computes in float32 whatever autocast says, and returns the input's dtype."""
    arguments = case(dtype=torch.float32)
    plain = run(deform_conv2d, arguments)
    layer = torch.nn.Conv2d(2, 18, 3, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        for one, other in zip(run(deform_conv2d, arguments), plain, strict=True):
            assert torch.equal(one, other)
        arguments = case(dtype=torch.float32, groups=2)
        offset = layer(arguments["input"])
        assert offset.dtype == torch.bfloat16
        own = deform_conv2d(**arguments | {"offset": offset})
    assert own.dtype == torch.float32
    assert torch.equal(own, deform_conv2d(**arguments | {"offset": offset.float()}))
    own.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()


def test_outside_reads_nothing() -> None:
    """Infinite pixels do not leak into samples outside; infinite samples stay visible."""
    arguments = case(masked=False, biased=False)
    arguments["input"].fill_(torch.inf)
    arguments["offset"].fill_(1e4)
    assert (deform_conv2d(**arguments) == 0).all()
    arguments["offset"].fill_(0.25)
    assert not deform_conv2d(**arguments).isfinite().any()


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("input type", {"input": [[1.0]]}, TypeError, "input must be a tensor, got list"),
    ("input rank", {"input": torch.zeros(2, 7, 6)}, ValueError, "input must be a tensor of 4"),
    ("input dtype", {"input": torch.zeros(2, 1, 7, 6).int()}, TypeError, "input .*int32"),
    ("input sparse", {"input": torch.zeros(2, 1, 7, 6).to_sparse()}, TypeError, "input .*dense"),
    ("input empty", {"input": torch.zeros(2, 1, 0, 6)}, ValueError, "input must be of at least"),
    ("no channels", {"input": torch.zeros(2, 0, 7, 6)}, ValueError, "input must be of at least"),
    ("weight rank", {"weight": torch.zeros(2, 9)}, ValueError, "weight must be a tensor of 4"),
    ("weight dtype", {"weight": torch.zeros(2, 1, 3, 3).double()}, TypeError, "weight .*float64"),
    ("weight channels", {"weight": torch.zeros(2, 2, 3, 3)}, ValueError, r"weight .*C = 1"),
    ("no taps", {"weight": torch.zeros(2, 1, 0, 3)}, ValueError, "weight must be"),
    ("no outputs", {"weight": torch.zeros(0, 1, 3, 3)}, ValueError, "weight must be"),
    ("no group channels", {"weight": torch.zeros(2, 0, 3, 3)}, ValueError, "weight must be"),
    (
        "weight device",
        {"weight": torch.zeros(2, 1, 3, 3, device="meta")},
        ValueError,
        "weight .*meta",
    ),
    ("offset rank", {"offset": torch.zeros(18)}, ValueError, "offset must be a tensor of 4"),
    ("offset dtype", {"offset": torch.zeros(2, 18, 7, 6).long()}, TypeError, "offset .*int64"),
    (
        "offset batch",
        {"offset": torch.zeros(1, 18, 7, 6)},
        ValueError,
        r"offset .*\(2, 18, 7, 6\), got",
    ),
    (
        "offset size",
        {"offset": torch.zeros(2, 18, 7, 5)},
        ValueError,
        r"offset .*\(2, 18, 7, 6\), got",
    ),
    ("offset channels", {"offset": torch.zeros(2, 19, 7, 6)}, ValueError, "offset .*19"),
    ("few offset channels", {"offset": torch.zeros(2, 2, 7, 6)}, ValueError, "offset .*2"),
    ("offset groups", {"offset": torch.zeros(2, 36, 7, 6)}, ValueError, "offset .*divisor of 1"),
    ("mask rank", {"mask": torch.zeros(9)}, ValueError, "mask must be a tensor of 4"),
    ("mask size", {"mask": torch.zeros(2, 18, 7, 6)}, ValueError, r"mask .*\(2, 9, 7, 6\), got"),
    ("mask dtype", {"mask": torch.zeros(2, 9, 7, 6).bool()}, TypeError, "mask .*bool"),
    ("bias size", {"bias": torch.zeros(3)}, ValueError, r"bias .*\(2,\)"),
    ("bias dtype", {"bias": torch.zeros(2).half()}, TypeError, "bias .*float16"),
    ("stride 0", {"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    ("stride pair", {"stride": (1, 0)}, ValueError, "stride must be at least 1, got 0"),
    ("stride triple", {"stride": (1, 1, 1)}, ValueError, "stride must be an int or a pair"),
    ("stride float", {"stride": 1.5}, TypeError, "stride must be an int, got 1.5"),
    ("dilation 0", {"dilation": 0}, ValueError, "dilation must be at least 1"),
    ("dilation bool", {"dilation": True}, TypeError, "dilation must be an int"),
    ("padding -1", {"padding": -1}, ValueError, "padding must be at least 0"),
    ("kernel too large", {"padding": 0, "dilation": 9}, ValueError, "kernel must be no larger"),
    ("border", {"border": "reflect"}, ValueError, "border must be .*'reflect'"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """One mutation an argument: the message names the argument, what was wanted, what came."""
    good = case(dtype=torch.float32)
    deform_conv2d(**good)
    with pytest.raises(error, match=f"deform_conv2d: {message}"):
        deform_conv2d(**good | change)


def test_wrong_groups() -> None:
    good = case(groups=2, dtype=torch.float32)
    with pytest.raises(ValueError, match="weight must be of O divisible by the 2 groups"):
        deform_conv2d(**good | {"weight": torch.zeros(3, 1, 3, 3), "bias": None})


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_operator_refuses_what_the_function_refuses(backward: bool, fake: bool) -> None:
    """Whoever calls the operator itself, its backward or its fake kernel: never a read outside."""
    good = {name: case(dtype=torch.float32)[name] for name in TENSORS}
    good |= {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
    if backward:
        good["grad"] = torch.zeros(2, 2, 7, 6)

    def call(change: dict[str, Any]) -> None:
        arguments = good | change
        if fake:
            mode = FakeTensorMode()
            arguments = {
                k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()
            }
        names = ["weight", "mask"] if backward else ["weight", "bias", "mask"]
        tensors = [arguments[name] for name in ("input", "offset", *names)]
        geometry = [arguments[name] for name in ("stride", "padding", "dilation")]
        if backward:
            module._deform_conv2d_backward(arguments["grad"], *tensors, *geometry, False)
        else:
            module._deform_conv2d(*tensors, *geometry, False)

    call({})
    bad: list[tuple[dict[str, Any], str]] = [
        ({"weight": torch.zeros(2, 0, 3, 3)}, "weight must be"),
        ({"weight": torch.zeros(2, 1, 0, 3)}, "weight must be"),
        ({"offset": torch.zeros(2, 2, 7, 6)}, "offset must be"),
        ({"offset": torch.zeros(1, 18, 7, 6)}, "offset must be"),
        ({"offset": torch.zeros(2, 18, 7, 6).bfloat16()}, "offset must be"),
        ({"mask": torch.zeros(2, 9, 7, 5)}, "mask must be"),
        ({"stride": [0, 1]}, "stride must be"),
        ({"stride": [1]}, "stride must be"),
        ({"dilation": [1, 0]}, "dilation must be"),
        ({"padding": [0, 0], "dilation": [9, 9]}, "kernel must be"),
        ({"grad": torch.zeros(2, 2, 7, 5)} if backward else {"bias": torch.zeros(3)}, "must be"),
    ]
    for change, message in bad:
        with pytest.raises((TypeError, ValueError), match=f"deform_conv2d: .*{message}"):
            call(change)


def test_operator_contract() -> None:
    """Schema, fake kernel and autograd fit together, as torch.compile and export need them."""
    for masked, border in ((True, "zero"), (False, "original")):
        arguments = case(groups=2, masked=masked, border=border, dtype=torch.float32)
        tensors = [op_cases.leaf(arguments[name]) for name in TENSORS]
        sample = (*tensors, [1, 1], [1, 1], [1, 1], border == "original")
        torch.library.opcheck(module._deform_conv2d, sample)
        plain = [None if t is None else t.detach() for t in tensors]
        input, offset, weight, _, mask = plain
        sample = (torch.ones(2, 4, 7, 6), input, offset, weight, mask, *sample[5:])
        torch.library.opcheck(module._deform_conv2d_backward, sample)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic: bool) -> None:
    arguments = case(dtype=torch.float32)
    compiled = torch.compile(deform_conv2d, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for one, other in zip(run(compiled, arguments), run(deform_conv2d, arguments), strict=True):
        op_cases.same(one, other, 1e-6)


@op_cases.needs_cuda
@pytest.mark.parametrize("border", ["zero", "original"])
def test_cuda_equals_cpu(border: str) -> None:
    arguments = case(batch=3, groups=2, offset_groups=4, border=border, dtype=torch.float32)
    arguments["offset"].view(-1)[:4] = torch.tensor([1e30, -torch.inf, 2.0**31, -1.0])
    moved = {name: arguments[name].cuda() for name in TENSORS}
    on_gpu = run(lambda **a: deform_conv2d(**a).cpu(), arguments | moved)
    for one, other in zip(on_gpu, run(deform_conv2d, arguments), strict=True):
        op_cases.same(one.cpu(), other, 1e-4)
