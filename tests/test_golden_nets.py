"""Whole networks against recorded runs of the 2017 release (MXNet)."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import (
    box_scale,
    load,
    load_param_module,
    release_name,
    release_weights,
    subsample,
    system_of,
)
from torch import Tensor, nn

from dcdet import build_model, load_config
from dcdet.models import rpn as rpn_module
from dcdet.models.postprocess import SoftNMSSpec, select
from dcdet.structures import Batch, Target

CONFIGS = Path(__file__).parents[1] / "configs"
TOLERANCE = 1e-4
CORNERS = torch.tensor([0, 0, 1, 1])
SOFT_NMS = {"detections": None, "detections_softnms": SoftNMSSpec("gaussian", sigma=0.6)}


@dataclass(frozen=True)
class Network:
    """A recorded network: its config, what the recordings override, and how much they hold."""

    name: str
    config: str
    size: tuple[int, int]
    maps: int
    train_size: tuple[int, int]
    train: list[str]
    heads: tuple[str, ...]  # whose gradients rounding cannot have changed by much
    test: list[str] = field(default_factory=list)


NETWORKS = [
    Network(
        "rfcn_dcn", "rfcn/rfcn_dcn_r101_coco.yaml", (199, 271), 17, (199, 271),
        ["model.rpn.train.post_nms=185"], ("rpn", "rfcn"),
    ),
    Network(
        "fpn_dcn", "fpn/fpn_dcn_r101_coco.yaml", (512, 576), 33, (256, 320),
        ["model.rpn.train.post_nms=150", "model.roi_head.hard_examples=64"],
        ("rpn", "fc_new", "cls_score", "bbox_pred"),
        ["model.rpn.test.pre_nms=6000", "model.rpn.test.post_nms=300"],
    ),
]  # fmt: skip


def build(shared: Path, network: Network, *, test_time: bool) -> Any:
    overrides = network.test if test_time else network.train
    model = build_model(load_config(CONFIGS / network.config, overrides))
    model.load_state_dict(release_weights(model, shared, network.name, test_time=test_time))
    return model


def make_batch(shared: Path, size: tuple[int, int], target: Target | None = None) -> Batch:
    image = load_param_module(shared).image(*size)
    mean = np.array([123.15, 115.90, 103.06]).reshape(1, 3, 1, 1)
    pixels = torch.from_numpy(np.rint(image + mean).astype(np.uint8))
    original = (round(size[0] / 1.5), round(size[1] / 1.5))
    nothing = Target(
        "golden", original, torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0, 4)
    )
    return Batch(pixels, [size], [target or nothing], [1.5], [0])


def close(ours: np.ndarray, theirs: np.ndarray, name: str, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == theirs.shape, name
    assert np.abs(ours - theirs).max() <= tolerance, (name, np.abs(ours - theirs).max())


def same_boxes(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> float:
    """The share of `theirs` rows that have a row in `ours` within `tolerance`."""
    distance = np.abs(ours[None] - theirs[:, None]).max(-1).min(1)
    return float((distance <= tolerance).mean())


class Recorder:
    """Keeps what goes into and comes out of modules, under the release's names."""

    def __init__(self) -> None:
        self.maps: dict[str, Tensor] = {}

    def output(self, module: nn.Module, *names: str) -> None:
        """The outputs of the first calls, as many as there are names."""
        calls = iter(names)

        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self.maps[next(calls, "later")] = output

        module.register_forward_hook(keep)

    def input(self, module: nn.Module, name: str) -> None:
        """The input of the first call."""

        def keep(_module: nn.Module, inputs: Any) -> None:
            self.maps.setdefault(name, inputs[0])

        module.register_forward_pre_hook(keep)


def watch_rfcn(model: Any, recorder: Recorder) -> None:
    recorder.output(model.rpn.score, "rpn_cls_score")
    recorder.output(model.rpn.delta, "rpn_bbox_pred")
    recorder.output(model.roi_head.reduce, "conv_new_1")
    recorder.output(model.roi_head.score, "rfcn_cls")
    recorder.output(model.roi_head.delta, "rfcn_bbox")
    recorder.output(model.roi_head.score_offset, "rfcn_cls_offset_t")
    recorder.output(model.roi_head.delta_offset, "rfcn_bbox_offset_t")


def watch_fpn(model: Any, recorder: Recorder) -> None:
    for name, output in model.neck.output.items():
        recorder.output(output, f"fpn_{name}")
        recorder.input(output, f"fpn_{name}_sum")
    recorder.output(model.neck.extra, "fpn_p6")
    for module, name in ((model.rpn.score, "rpn_cls_score"), (model.rpn.delta, "rpn_bbox_pred")):
        recorder.output(module, *(f"{name}_p{level}" for level in range(2, 7)))
    head = model.roi_head
    recorder.input(head.fc1, "fpn_roi_pooling")
    recorder.input(head.fc2, "fc_new_1_relu")
    recorder.input(head.score, "fc_new_2_relu")
    recorder.output(head.score, "cls_score")
    recorder.output(head.delta, "bbox_pred")


@dataclass(frozen=True)
class Run:
    """A network at test time, all maps of one image, and what was recorded of it."""

    network: Network
    model: Any
    maps: dict[str, Tensor]
    arrays: Any
    steps: dict[str, list[int]]


@pytest.fixture(scope="module", params=NETWORKS, ids=lambda network: network.name)
def run(request: pytest.FixtureRequest, shared: Path) -> Run:
    network = request.param
    arrays, info = load(shared, network.name)
    model = build(shared, network, test_time=True).eval()
    recorder = Recorder()
    (watch_fpn if model.neck else watch_rfcn)(model, recorder)
    for stage, blocks in (("3", {3: "b3"}), ("4", {22: "b22"}), ("5", dict(enumerate("abc")))):
        for block, letter in blocks.items():
            conv = getattr(model.backbone, f"layer{int(stage) - 1}")[block].conv2
            if hasattr(conv, "offset"):
                recorder.output(conv.offset, f"res{stage}{letter}_branch2b_offset")
    maps = recorder.maps
    for layer, name in enumerate(("res2c", "res3b3", "res4b22", "res5c"), 1):
        recorder.output(getattr(model.backbone, f"layer{layer}"), f"{name}_relu")
    with torch.no_grad():
        batch = make_batch(shared, network.size)
        features = model.features(batch)
        maps["rois"] = model.rpn.proposals(model.rpn(features), batch.sizes, batch.scales)[0]
        # The head gets the recorded RoIs, so that its rows can be compared one by one.
        rois = torch.from_numpy(arrays["rois"])
        rois = torch.cat([rois[:, :1], rois[:, 1:] + CORNERS], 1)
        output = model.roi_head(features, rois)
    maps["cls_score_reshape"], maps["cls_prob"] = output.logits, output.logits.softmax(1)
    if system_of(model) == "rfcn":
        # Background's deltas, which the release records too, are not computed.
        objects = output.deltas * model.roi_head.box_std
        maps["bbox_pred"] = torch.cat([torch.from_numpy(arrays["bbox_pred"][:, :4]), objects], 1)
        maps["rfcn_bbox"] = maps["rfcn_bbox"] * box_scale(model, maps["rfcn_bbox"][0])
    else:
        maps["fpn_roi_pooling"] = maps["fpn_roi_pooling"].view(-1, 256, 7, 7)
        maps["bbox_pred"] = maps["bbox_pred"] * box_scale(model, maps["bbox_pred"][0])
    return Run(network, model, maps, arrays, info["subsample_steps"])


def test_every_recorded_map_agrees(run: Run) -> None:
    names = set(run.arrays.files) & run.maps.keys() - {"rois"}
    for name in sorted(names):
        ours = subsample(run.maps[name], run.steps.get(name))
        close(ours, run.arrays[name], name)
    assert len(names) == run.network.maps


def test_proposals_agree_as_sets(run: Run) -> None:
    recorded = run.arrays["rois"][:, 1:] + CORNERS.numpy()
    ours = run.maps["rois"].numpy()
    assert ours.shape == recorded.shape
    assert same_boxes(ours, recorded, 5e-3) >= 0.99


def test_detections_agree(shared: Path, run: Run) -> None:
    """With the hard NMS and, where that was recorded, with the soft one."""
    [candidates] = run.model.candidates(make_batch(shared, run.network.size))
    for name, soft in SOFT_NMS.items():
        if name not in run.arrays:
            continue
        spec = replace(run.model.postprocess, soft_nms=soft)
        boxes, scores, labels = select(*candidates, spec)
        ours = torch.cat([labels[:, None] + 1, boxes - CORNERS, scores[:, None]], 1)
        assert len(ours) == len(run.arrays[name])
        assert same_boxes(ours.numpy(), run.arrays[name], 5e-3) >= 0.99


@pytest.mark.parametrize("run", NETWORKS[:1], indirect=True, ids=["rfcn_dcn"])
def test_parts_move_by_the_recorded_offsets(run: Run) -> None:
    """Of every 20th RoI the recording has every 9th channel: channel 18k is the x of class 9k."""
    corners = torch.from_numpy(run.arrays["rois"])[::20].round()
    rois = corners + torch.tensor([0, 0, 0, 1, 1])
    left, width = rois[:, 1, None, None], (rois[:, 3] - rois[:, 1])[:, None, None]
    for channel in range(1, 9):
        shift = 0.1 * torch.from_numpy(run.arrays["rfcn_cls_offset"][:, 2 * channel]) * width
        label = torch.full((len(rois),), 9 * channel - 1)  # background is the release's class 0
        with torch.no_grad():
            parts = run.model.roi_head.parts({"c5": run.maps["res5c_relu"]}, rois, label)
        columns = left + width * torch.arange(7) / 7
        torch.testing.assert_close(parts[..., 0], columns + shift, rtol=0, atol=1e-3)
        torch.testing.assert_close(parts[..., 2], columns + shift + width / 7, rtol=0, atol=1e-3)


def test_a_changed_border_rule_is_noticed(shared: Path, run: Run) -> None:
    """The comparison can fail: zero padding instead of the original border changes res5."""
    config = load_config(CONFIGS / run.network.config, ["model.backbone.deform.border=zero"])
    model = build_model(config).eval()
    model.load_state_dict(run.model.state_dict())
    with torch.no_grad():
        batch = make_batch(shared, run.network.size)
        x = (batch.images.float() - model.pixel_mean) / model.pixel_std
        c5 = model.backbone(x)["c5"]
    assert (c5 - run.maps["res5c_relu"]).abs().max() > 0.1


@dataclass(frozen=True)
class Step:
    """One step on the recorded image, objects, anchor labels and proposals; gradients are in the
    parameters."""

    network: Network
    model: Any
    losses: dict[str, float]
    arrays: Any


def recorded_labels(arrays: Any, network: Network, model: Any) -> Tensor:
    """The drawn labels of the anchors, (N,) in our order: a level's rows, columns, anchors."""
    with torch.no_grad():
        maps = model.rpn.in_features
        features = model.eval().backbone(torch.zeros(1, 3, *network.train_size))
        features = features if model.neck is None else model.neck(features)
        sizes = [features[name].shape[2:] for name in maps]
    labels = torch.from_numpy(arrays["in_label"].ravel()).long()
    anchors = len(labels) // sum(height * width for height, width in sizes)
    parts = labels.split([anchors * height * width for height, width in sizes])
    ours = [
        part.view(anchors, *size).permute(1, 2, 0) for part, size in zip(parts, sizes, strict=True)
    ]
    return torch.cat([part.flatten() for part in ours])


@pytest.fixture(scope="module", params=NETWORKS, ids=lambda network: network.name)
def step(request: pytest.FixtureRequest, shared: Path) -> Step:
    network = request.param
    arrays, _ = load(shared, f"train_{network.name}")
    model = build(shared, network, test_time=False)
    drawn = recorded_labels(arrays, network, model)
    model.train()
    objects = torch.from_numpy(arrays["in_gt_boxes"][0])
    target = Target("golden", (1, 1), objects[:, :4] + CORNERS, objects[:, 4].long() - 1,
                    torch.zeros(0, 4))  # fmt: skip
    rois = torch.from_numpy(arrays["mid_rois_output"])[:, 1:] + CORNERS
    own = model.rpn.proposals

    def recorded_proposals(*arguments: Any) -> list[Tensor]:
        ours = own(*arguments)[0]
        assert same_boxes(ours.numpy(), rois.numpy(), 5e-3) >= 0.99
        return [rois]

    def recorded_draw(labels: Tensor, number: int, *_arguments: Any) -> Tensor:
        assert (labels[drawn >= 0] == drawn[drawn >= 0]).all()
        assert (drawn >= 0).sum() == min(number, int((labels >= 0).sum()))
        return drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.rpn, "proposals", recorded_proposals)
        patch.setattr(rpn_module, "subsample", recorded_draw)
        losses, _stats = model(make_batch(shared, network.train_size, target))
    torch.stack(list(losses.values())).sum().backward()
    return Step(network, model, {name: value.item() for name, value in losses.items()}, arrays)


def test_losses_agree(step: Step) -> None:
    losses, arrays = step.losses, step.arrays
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
    box_loss = arrays["out_bbox_loss_reshape"].sum() / step.model.roi_head.hard_examples
    assert losses["roi_box"] == pytest.approx(box_loss, abs=1e-4)


def test_gradients_agree(step: Step) -> None:
    arrays, system = step.arrays, system_of(step.model)
    steps = json.loads(str(arrays["meta"]))["grad_flat_steps"]
    compared = 0
    for name, parameter in step.model.named_parameters():
        key = release_name(name, system)
        if f"grad_{key}" not in arrays.files:
            continue
        recorded = arrays[f"grad_{key}"].ravel()
        ours = parameter.grad.flatten()[:: steps.get(key, 1)].numpy()
        # Below the heads rounding flips a few of the ReLUs that are near 0.
        tolerance = TOLERANCE if key.startswith(step.network.heads) else 3e-3
        largest = np.abs(recorded).max() or 1.0  # 0 for a level without RoIs
        close(ours / largest, recorded / largest, key, tolerance)
        total = float(parameter.grad.double().abs().sum())
        assert total == pytest.approx(float(arrays[f"gradsum_{key}"][1]), rel=tolerance / 5), key
        compared += 1
    assert compared == sum(name.startswith("grad_") for name in arrays.files) > 20
