"""Whole networks against recorded runs of the 2017 release (MXNet)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import load, load_param_module, release_name, release_weights, subsample
from torch import Tensor, nn

from dcdet import build_model, load_config
from dcdet.structures import Batch, Target

CONFIG = Path(__file__).parents[1] / "configs" / "rfcn" / "rfcn_dcn_r101_coco.yaml"
TOLERANCE = 1e-4


def build(shared: Path, name: str, test_time: bool) -> nn.Module:
    model = build_model(load_config(CONFIG, ["model.rpn.train.post_nms=185"]))
    std = model.roi_head.box_std if test_time else None
    model.load_state_dict(release_weights(model, shared, name, std))
    return model


def make_batch(shared: Path, target: Target | None = None) -> Batch:
    image = load_param_module(shared).image(199, 271)
    mean = np.array([123.15, 115.90, 103.06]).reshape(1, 3, 1, 1)
    pixels = torch.from_numpy(np.rint(image + mean).astype(np.uint8))
    target = target or Target(
        "golden", (133, 181), torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0, 4)
    )
    return Batch(pixels, [(199, 271)], [target], [1.5], [0])


def close(ours: np.ndarray, theirs: np.ndarray, name: str, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == theirs.shape, name
    assert np.abs(ours - theirs).max() <= tolerance, (name, np.abs(ours - theirs).max())


def same_boxes(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> float:
    """The share of `theirs` rows that have a row in `ours` within `tolerance`."""
    distance = np.abs(ours[None] - theirs[:, None]).max(-1).min(1)
    return float((distance <= tolerance).mean())


@pytest.fixture(scope="module")
def recorded_run(shared: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model at test time, and all maps of one image."""
    model = build(shared, "rfcn_dcn", test_time=True).eval()
    maps: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda _module, _inputs, output: maps.__setitem__(name, output)

    for block, letter in enumerate("abc"):
        offset = model.backbone.layer4[block].conv2.offset
        offset.register_forward_hook(keep(f"res5{letter}_branch2b_offset"))
    for module, name in (
        (model.rpn.score, "rpn_cls_score"), (model.rpn.delta, "rpn_bbox_pred"),
        (model.roi_head.reduce, "conv_new_1"), (model.roi_head.score, "rfcn_cls"),
        (model.roi_head.delta, "rfcn_bbox"), (model.roi_head.score_offset, "rfcn_cls_offset_t"),
        (model.roi_head.delta_offset, "rfcn_bbox_offset_t"),
    ):  # fmt: skip
        module.register_forward_hook(keep(name))
    rois = torch.from_numpy(load(shared, "rfcn_dcn")[0]["rois"])
    rois = rois + rois.new_tensor([0, 0, 0, 1, 1])
    with torch.no_grad():
        batch = make_batch(shared)
        features = model.features(batch)
        for own, name in (
            ("c2", "res2c_relu"),
            ("c3", "res3b3_relu"),
            ("c4", "res4b22_relu"),
            ("c5", "res5c_relu"),
        ):
            maps[name] = features[own]
        raw = model.rpn(features)
        maps["rois"] = model.rpn.proposals(raw, batch.sizes, batch.scales)[0]
        output = model.roi_head(features, rois)
        maps["cls_score_reshape"], maps["bbox_pred"] = output.logits, output.deltas
        maps["cls_prob"] = output.logits.softmax(1)
        # Recorded at test time, when the standard deviations are folded into the weights.
        std = model.roi_head.box_std.repeat(2).repeat_interleave(49)
        maps["rfcn_bbox"] = maps["rfcn_bbox"] * std[:, None, None]
    return model, maps


def test_every_recorded_map_agrees(
    shared: Path, recorded_run: tuple[nn.Module, dict[str, Tensor]]
) -> None:
    arrays, info = load(shared, "rfcn_dcn")
    model, maps = recorded_run
    compared = 0
    for name in arrays.files:
        if name not in maps or name in ("rois", "bbox_pred"):
            continue
        close(subsample(maps[name], info["subsample_steps"].get(name)), arrays[name], name)
        compared += 1
    assert compared == 16
    close(
        (maps["bbox_pred"] * model.roi_head.box_std).numpy(),
        arrays["bbox_pred"][:, 4:],
        "bbox_pred",
    )


def test_proposals_agree_as_sets(
    shared: Path, recorded_run: tuple[nn.Module, dict[str, Tensor]]
) -> None:
    recorded = load(shared, "rfcn_dcn")[0]["rois"][:, 1:] + [0, 0, 1, 1]
    ours = recorded_run[1]["rois"].numpy()
    assert ours.shape == recorded.shape
    assert same_boxes(ours, recorded, 5e-3) >= 0.99


def test_detections_agree(shared: Path, recorded_run: tuple[nn.Module, dict[str, Tensor]]) -> None:
    recorded = load(shared, "rfcn_dcn")[0]["detections"]
    found = recorded_run[0].predict(make_batch(shared))[0]
    ours = torch.cat(
        [
            found.labels[:, None] + 1,
            found.boxes - found.boxes.new_tensor([0, 0, 1, 1]),
            found.scores[:, None],
        ],
        1,
    )
    assert len(ours) == len(recorded)
    assert same_boxes(ours.numpy(), recorded, 5e-3) >= 0.99


def test_a_changed_border_rule_is_noticed(
    shared: Path, recorded_run: tuple[nn.Module, dict[str, Tensor]]
) -> None:
    """The comparison can fail: zero padding instead of the original border changes res5."""
    model = build_model(load_config(CONFIG, ["model.backbone.deform.border=zero"])).eval()
    model.load_state_dict(recorded_run[0].state_dict())
    with torch.no_grad():
        c5 = model.features(make_batch(shared))["c5"]
    assert (c5 - recorded_run[1]["res5c_relu"]).abs().max() > 0.1


@pytest.fixture(scope="module")
def training_step(shared: Path) -> tuple[nn.Module, dict[str, Tensor], Batch]:
    """One step on the recorded image, objects and proposals; gradients are in the parameters."""
    arrays, _ = load(shared, "train_rfcn_dcn")
    model = build(shared, "rfcn_dcn", test_time=False).train()
    objects = torch.from_numpy(arrays["in_gt_boxes"][0])
    boxes = objects[:, :4] + objects.new_tensor([0, 0, 1, 1])
    target = Target("golden", (133, 181), boxes, objects[:, 4].long() - 1, torch.zeros(0, 4))
    batch = make_batch(shared, target)
    rois = torch.from_numpy(arrays["mid_rois_output"])[:, 1:] + objects.new_tensor([0, 0, 1, 1])
    own = model.rpn.proposals

    def recorded_proposals(*arguments: object) -> list[Tensor]:
        ours = own(*arguments)[0]
        assert same_boxes(ours.numpy(), rois.numpy(), 5e-3) >= 0.99
        return [rois]

    model.rpn.proposals = recorded_proposals
    losses, _stats = model(batch)
    torch.stack(list(losses.values())).sum().backward()
    return model, losses, batch


def test_losses_agree(
    shared: Path, training_step: tuple[nn.Module, dict[str, Tensor], Batch]
) -> None:
    arrays, _ = load(shared, "train_rfcn_dcn")
    losses = {name: value.item() for name, value in training_step[1].items()}
    labels = arrays["in_label"].ravel()
    probability = arrays["out_rpn_cls_prob"].reshape(2, -1)
    taken = labels >= 0
    wanted = -np.log(probability[labels[taken].astype(int), taken.nonzero()[0]]).mean()
    assert losses["rpn_score"] == pytest.approx(wanted, abs=1e-4)
    assert losses["rpn_box"] == pytest.approx(
        float(arrays["out_rpn_bbox_loss_sum"]) / 256, abs=1e-4
    )
    kept = arrays["mid_custom1_labels_ohem"]
    rows = (kept >= 0).nonzero()[0]
    scores = arrays["out_cls_prob_reshape"][0, rows, kept[rows].astype(int)]
    assert losses["roi_score"] == pytest.approx(-np.log(scores).mean(), abs=1e-4)
    assert losses["roi_box"] == pytest.approx(arrays["out_bbox_loss_reshape"].sum() / 128, abs=1e-4)


def test_gradients_agree(
    shared: Path, training_step: tuple[nn.Module, dict[str, Tensor], Batch]
) -> None:
    arrays, _ = load(shared, "train_rfcn_dcn")
    steps = json.loads(str(arrays["meta"]))["grad_flat_steps"]
    compared = 0
    for name, parameter in training_step[0].named_parameters():
        key = release_name(name)
        if f"grad_{key}" not in arrays.files:
            continue
        recorded = arrays[f"grad_{key}"].ravel()
        ours = parameter.grad.flatten()[:: steps.get(key, 1)].numpy()
        # Below the heads rounding flips a few of the ReLUs that are near 0.
        tolerance = TOLERANCE if key.startswith(("rpn", "rfcn")) else 3e-3
        close(ours / np.abs(recorded).max(), recorded / np.abs(recorded).max(), key, tolerance)
        total = float(parameter.grad.double().abs().sum())
        assert total == pytest.approx(float(arrays[f"gradsum_{key}"][1]), rel=tolerance / 5), key
        compared += 1
    assert compared == sum(name.startswith("grad_") for name in arrays.files) > 20
