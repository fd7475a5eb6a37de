"""DeepLab against recorded runs of the 2017 release (MXNet)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import load, load_param_module, release_name, release_weights, subsample
from test_golden_nets import CONFIGS, Recorder, close
from torch import Tensor

from dcdet import build_model, load_config
from dcdet.structures import Batch, Target

SIZE = (199, 271)


@pytest.fixture(scope="module", params=["deeplab_dcn", "deeplab"])
def run(request: pytest.FixtureRequest, shared: Path) -> tuple[Any, dict[str, Tensor], Any, Any]:
    name = request.param
    if not (shared / "golden" / "nets" / f"{name}.npz").exists():
        pytest.skip(f"no recording of {name}")
    arrays, info = load(shared, name)
    model = build_model(load_config(CONFIGS / f"deeplab/{name}_r101_cityscapes.yaml")).eval()
    model.load_state_dict(release_weights(model, shared, name, test_time=True))
    recorder = Recorder()
    for layer, output in enumerate(("res2c", "res3b3", "res4b22", "res5c"), 1):
        recorder.output(getattr(model.backbone, f"layer{layer}"), f"{output}_relu")
    for block, letter in enumerate("abc"):
        conv = model.backbone.layer4[block].conv2
        if hasattr(conv, "offset"):
            recorder.output(conv.offset, f"res5{letter}_branch2b_offset")
    recorder.output(model.score, "score")
    recorder.output(model.fc6, "fc6")
    batch = make_batch(shared)
    with torch.no_grad():
        recorder.maps["croped_score"] = model.logits(model.normalised(batch))
        recorder.maps["softmax_sub"] = model.probabilities(batch)[0][None]
    return model, recorder.maps, arrays, info["subsample_steps"] | {"softmax_sub": [1, 1, 4, 4]}


def make_batch(shared: Path, labels: Tensor | None = None) -> Batch:
    image = load_param_module(shared).image(*SIZE)
    mean = np.array([123.15, 115.90, 103.06]).reshape(1, 3, 1, 1)
    pixels = torch.from_numpy(np.rint(image + mean).astype(np.uint8))
    target = Target.without_objects("golden", SIZE, labels)
    return Batch(pixels, [SIZE], [target], [1.0], [0])


def test_every_recorded_map_agrees(run: tuple[Any, dict[str, Tensor], Any, Any]) -> None:
    _, maps, arrays, steps = run
    names = [name for name in arrays.files if name in maps]
    for name in names:
        ours = maps[name]
        if name == "fc6" and arrays["fc6"].min() >= 0:  # recorded behind its ReLU
            ours = ours.relu()
        close(subsample(ours, steps.get(name)), arrays[name], name)
    assert set(arrays.files) - set(names) == {"meta", "upsampling", "argmax"}


def test_predictions_agree(run: tuple[Any, dict[str, Tensor], Any, Any], shared: Path) -> None:
    """Every pixel, but for those where two classes are equal to rounding."""
    model, maps, arrays, _ = run
    [found] = model.predict(make_batch(shared))
    ours, theirs = found.network_labels.numpy(), arrays["argmax"]
    best = maps["softmax_sub"][0].topk(2, dim=0).values
    unclear = (best[0] - best[1] < 1e-4).numpy()
    assert ((ours == theirs) | unclear).all()
    assert (ours == theirs).mean() > 0.999
    np.testing.assert_array_equal(found.labels, ours)


@pytest.mark.parametrize("name", ["deeplab_dcn", "deeplab"])
def test_gradients_agree(name: str, shared: Path) -> None:
    """A step on the recorded label map: the mean over its labelled pixels is what is learnt."""
    if not (shared / "golden" / "nets" / f"train_{name}.npz").exists():
        pytest.skip(f"no recorded training step of {name}")
    arrays, _ = load(shared, f"train_{name}")
    model = build_model(load_config(CONFIGS / f"deeplab/{name}_r101_cityscapes.yaml")).train()
    model.load_state_dict(release_weights(model, shared, name, test_time=False))
    labels = torch.from_numpy(arrays["in_label"].reshape(SIZE)).byte()
    losses, _ = model(make_batch(shared, labels))
    losses["segmentation"].backward()
    steps = json.loads(str(arrays["meta"]))["grad_flat_steps"]
    compared = 0
    for own, parameter in model.named_parameters():
        key = release_name(own, "deeplab")
        if f"grad_{key}" not in arrays.files:
            continue
        recorded = arrays[f"grad_{key}"].ravel()
        ours = parameter.grad.flatten()[:: steps.get(key, 1)].numpy()
        largest = np.abs(recorded).max()
        # Rounding flips a few of the backbone's ReLUs that are near 0.
        tolerance = 1e-4 if key.startswith(("fc6", "score")) else 3e-3
        close(ours / largest, recorded / largest, key, tolerance)
        total = float(parameter.grad.double().abs().sum())
        assert total == pytest.approx(float(arrays[f"gradsum_{key}"][1]), rel=1e-3), key
        compared += 1
    assert compared == sum(name.startswith("grad_") for name in arrays.files) > 4
