"""Whole networks against recorded runs of mmdetection 3.3, inference and training steps."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_mmdet import (
    load,
    load_param_module,
    mmdet_name,
    mmdet_weights,
    our_weights,
    theirs_from_ours,
)
from test_golden_nets import Recorder, close, same_boxes
from torch import Tensor

from dcdet import build_model, load_config
from dcdet.masks import paste
from dcdet.models import rpn as rpn_module
from dcdet.models import targets as targets_module
from dcdet.models.roi_head import pyramid_levels
from dcdet.structures import Batch, Target

CONFIGS = Path(__file__).parents[1] / "configs" / "dcnv2"
NETWORKS = {
    "faster_plain": "faster_rcnn_r50_fpn_coco",
    "faster_dconv": "faster_rcnn_dconv_r50_fpn_coco",
    "faster_mdconv": "faster_rcnn_mdconv_r50_fpn_coco",
    "faster_mdconv_group4": "faster_rcnn_mdconv_group4_r50_fpn_coco",
    "faster_dpool": "faster_rcnn_dpool_r50_fpn_coco",
    "faster_mdpool": "faster_rcnn_mdpool_r50_fpn_coco",
    "mask_plain": "mask_rcnn_r50_fpn_coco",
    "mask_mdconv": "mask_rcnn_mdconv_r50_fpn_coco",
}
PADDED = 256, 320


@dataclass(frozen=True)
class Network:
    """A recorded network, ours with its weights, and what was recorded of it."""

    name: str
    model: Any
    arrays: Any
    train: Any
    info: dict[str, Any]

    def steps(self, name: str) -> tuple[slice, ...]:
        key = name if "_layer" not in name else name.partition("_")[0]
        return tuple(slice(None, None, step) for step in self.info["steps"][key])


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest, shared: Path) -> Network:
    found = load(shared, request.param)
    if found is None:
        pytest.skip(f"{request.param} is not among the recorded networks")
    arrays, train, info = found
    model = build_model(load_config(CONFIGS / f"{NETWORKS[request.param]}.yaml"))
    model.load_state_dict(our_weights(model, mmdet_weights(shared, info)))
    return Network(request.param, model, arrays, train, info)


def make_batch(shared: Path, images: int, *, masks: bool = False) -> Batch:
    """The recorded images, scale 1, with their objects."""
    module = load_param_module(shared)
    pixels = torch.zeros(images, 3, *PADDED, dtype=torch.uint8)
    targets = []
    for image in range(images):
        height, width = module.SHAPES[image]
        rgb = module.image_u8(height, width, image)[:, :, ::-1].transpose(2, 0, 1)
        pixels[image, :, :height, :width] = torch.from_numpy(rgb.copy())
        objects = torch.tensor(module.GT[image])
        bitmaps = torch.from_numpy(module.gt_masks(image)).bool() if masks else None
        targets.append(
            Target(image, (height, width), objects[:, :4], objects[:, 4].long(),
                   torch.zeros(0, 4), bitmaps)
        )  # fmt: skip
    sizes = [tuple(size) for size in module.SHAPES[:images]]
    return Batch(pixels, sizes, targets, [1.0] * images, list(range(images)))


def test_every_recorded_map_proposals_and_detections(shared: Path, network: Network) -> None:
    model, arrays, recorder = network.model.eval(), network.arrays, Recorder()
    head = model.roi_head
    handles = []
    for name, output in (("score", "rpn_cls"), ("delta", "rpn_reg")):
        handles.append(
            recorder.output(getattr(model.rpn, name), *(f"{output}{n}" for n in range(2, 7)))
        )
    for layer in (2, 3, 4):
        for index, block in enumerate(getattr(model.backbone, f"layer{layer}")):
            if hasattr(block.conv2, "offset"):
                recorder.output(block.conv2.offset, f"offset_layer{layer}.{index}")
                recorder.output(block.conv2, f"dconv_layer{layer}.{index}")
    batch = make_batch(shared, 1)
    with torch.no_grad():
        features = model.features(batch)
        raw = model.rpn(features)
        maps = {**recorder.maps, **features}
        x = (batch.images.float() - model.pixel_mean) / model.pixel_std
        x[..., 250:, :] = 0
        x[..., 310:] = 0
        maps |= model.backbone(x.contiguous(memory_format=torch.channels_last))
        proposals = model.rpn.proposals(raw, batch.sizes, batch.scales)[0]

    names = set(arrays.files) & maps.keys()
    for name in sorted(names):
        close(maps[name][network.steps(name)].numpy(), arrays[name], name)
    assert len(names) >= 19 + 10 * ("conv" in network.name)

    recorded = torch.from_numpy(arrays["proposals"])
    assert len(proposals) == len(recorded)
    assert same_boxes(proposals.numpy(), arrays["proposals"][:, :4], 5e-3) == 1

    # The head gets the recorded RoIs, so that its rows can be compared one by one.
    pooled: dict[str, Tensor] = {}
    head.fc1.register_forward_pre_hook(lambda _m, inputs: pooled.update(x=inputs[0]))
    for kind, rois in (
        ("roi", torch.cat([torch.zeros(1000, 1), recorded[:, :4]], 1)),
        ("probe", torch.from_numpy(arrays["probe_rois"])),
    ):
        with torch.no_grad():
            output = head(features, rois)
        scores = output.logits.roll(-1, 1)
        deltas = output.deltas[:, 1:].flatten(1)
        assert (pyramid_levels(rois, head.strides).numpy() == arrays[f"{kind}_level"]).all()
        for name, ours in (
            ("cls", scores), ("reg", deltas), ("feat", pooled["x"].view(-1, 256, 7, 7)),
        ):  # fmt: skip
            key = f"{kind}_{name}"
            close(ours[network.steps(key)].numpy(), arrays[key], key)

    found = model.predict(batch)[0]
    ours = torch.cat([found.boxes, found.scores[:, None], found.labels[:, None]], 1)
    assert len(ours) == len(arrays["dets"])
    assert same_boxes(ours.numpy(), arrays["dets"], 5e-3) == 1
    if model.mask_head is not None:
        check_masks(network, features, found)

    # Of an image that was enlarged, each axis by its own factor: the same in its own pixels.
    original, scale = (150, 186), (250 / 150, 310 / 186)
    target = replace(batch.targets[0], size=original)
    small = model.predict(replace(batch, targets=[target], scales=[scale]))[0]
    enlarged = small.boxes * torch.tensor([scale[1], scale[0]]).repeat(2)
    ours = torch.cat([enlarged, small.scores[:, None], small.labels[:, None]], 1)
    assert len(ours) == len(arrays["dets"])
    assert same_boxes(ours.numpy(), arrays["dets"], 5e-3) == 1
    assert small.masks is None or small.masks.shape == (len(ours), *original)


def check_masks(network: Network, features: dict[str, Tensor], found: Any) -> None:
    model, arrays = network.model, network.arrays
    dets = torch.from_numpy(arrays["dets"])
    first = dets[: len(arrays["mask_logits"])]
    with torch.no_grad():
        logits = model.mask_head(features, torch.nn.functional.pad(first[:, :4], (1, 0)))
    own = logits[torch.arange(len(first)), first[:, 5].long()]
    close(own.numpy(), arrays["mask_logits"], "mask_logits")
    assert found.masks.shape == (len(dets), 250, 310)
    place = (found.boxes[None] - dets[:, None, :4]).abs().amax(-1)
    place = (place + 1e3 * (found.labels[None] != dets[:, None, 5])).argmin(1)
    masks = found.masks[place].numpy()
    recorded = np.unpackbits(arrays["masks_bits"], axis=1)[:, : 250 * 310].reshape(-1, 250, 310)
    # Pixels whose probability is 0.5 but for rounding may fall on either side.
    assert (masks[: len(recorded)] != recorded).sum() <= 1e-4 * recorded.sum()
    assert np.abs(masks.sum((1, 2)) - arrays["mask_area"]).max() <= 5
    cells = torch.from_numpy(arrays["mask_logits"]).sigmoid()
    assert (paste(cells, first[:, :4], (250, 310), "grid").numpy() == recorded).all()


@pytest.mark.parametrize("images", [1, 2])
def test_a_training_step(shared: Path, network: Network, images: int) -> None:
    model, train = network.model.train(), network.train
    model.zero_grad()
    info = network.info[f"train{images}"]
    batch = make_batch(shared, images, masks=model.mask_head is not None)
    turn = {"rpn": 0, "roi": 0}

    def draw(kind: str, labels: Tensor, wanted: dict[str, np.ndarray]) -> Tensor:
        """The recorded positive and negative ones, which must be among ours."""
        drawn = torch.full_like(labels, -1)
        positive, negative = (torch.from_numpy(wanted[key]).long() for key in ("pos", "neg"))
        assert (labels[positive] > 0).all()
        assert (labels[negative] == 0).all()
        drawn[positive], drawn[negative] = labels[positive], 0
        turn[kind] += 1
        return drawn

    def rpn_draw(labels: Tensor, *_arguments: Any) -> Tensor:
        image = turn["rpn"]
        positive = (labels > 0).nonzero().squeeze(1)
        assert len(positive) == len(train[f"t{images}_rpn_pos{image}"])  # never cut here
        return draw("rpn", labels, {k: train[f"t{images}_rpn_{k}{image}"] for k in ("pos", "neg")})

    def roi_draw(labels: Tensor, *_arguments: Any) -> Tensor:
        image = turn["roi"]
        objects = len(batch.targets[image].boxes)
        # There objects stand before the proposals, here after them.
        wanted = {
            k: (train[f"t{images}_roi_{k}{image}"] - objects) % len(labels) for k in ("pos", "neg")
        }
        assert int((labels > 0).sum()) == len(wanted["pos"])
        return draw("roi", labels, wanted)

    own = model.rpn.proposals

    def recorded_proposals(*arguments: Any) -> list[Tensor]:
        result = []
        for image, ours in enumerate(own(*arguments)):
            recorded = train[f"t{images}_proposals{image}"][:, :4]
            assert same_boxes(ours.numpy(), recorded, 5e-3) >= 0.998
            result.append(torch.from_numpy(recorded))
        return result

    samples: list[Any] = []
    own_sample = model.roi_head.sample

    def keep_sample(*arguments: Any) -> Any:
        samples.append(own_sample(*arguments))
        return samples[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.rpn, "proposals", recorded_proposals)
        patch.setattr(model.roi_head, "sample", keep_sample)
        patch.setattr(rpn_module, "subsample", rpn_draw)
        patch.setattr(targets_module, "subsample", roi_draw)
        losses, _stats = model(batch)
    torch.stack(list(losses.values())).sum().backward()

    check_samples(samples[0], train, images)
    if model.mask_head is not None:
        check_mask_targets(model, samples[0], batch, train, images)
    recorded = info["losses"]
    for ours, wanted in (
        ("rpn_score", sum(recorded["loss_rpn_cls"])), ("rpn_box", sum(recorded["loss_rpn_bbox"])),
        ("roi_score", recorded["loss_cls"]), ("roi_box", recorded["loss_bbox"]),
        ("mask", recorded.get("loss_mask")),
    ):  # fmt: skip
        if wanted is not None:
            assert losses[ours].item() == pytest.approx(wanted, abs=1e-4), ours
    assert sum(loss.item() for loss in losses.values()) == pytest.approx(info["total"], abs=1e-4)
    if images == 1:
        check_gradients(network, info)


def check_samples(samples: Any, train: Any, images: int) -> None:
    """RoIs, labels (80 is background there) and box targets, as sets."""
    theirs = torch.cat([torch.from_numpy(train[f"t{images}_rois"]),
                        torch.from_numpy(train[f"t{images}_roi_labels"])[:, None]], 1)  # fmt: skip
    labels = torch.where(samples.labels > 0, samples.labels - 1, 80)
    ours = torch.cat([samples.rois, labels[:, None]], 1)
    assert same_boxes(ours.numpy(), theirs.numpy(), 1e-3) == 1
    positive = theirs[theirs[:, 5] < 80]
    targets = torch.cat([positive, torch.from_numpy(train[f"t{images}_roi_target"])], 1)
    mine = torch.cat([ours, samples.deltas], 1)[samples.labels > 0]
    assert len(mine) == len(targets)
    assert same_boxes(mine.numpy(), targets.numpy(), 1e-3) == 1


def check_mask_targets(model: Any, samples: Any, batch: Batch, train: Any, images: int) -> None:
    foreground = samples.foreground()
    ours = model.mask_head.targets(foreground, batch).flatten(1).numpy()
    bits = np.unpackbits(train[f"t{images}_mask_target_bits"], axis=1)[:, :784]
    theirs = torch.from_numpy(train[f"t{images}_rois"])
    theirs = theirs[train[f"t{images}_roi_labels"] < 80].numpy()
    distance = np.abs(foreground.rois.numpy()[:, None] - theirs[None]).max(-1)
    assert distance.min(1).max() < 1e-3
    place = distance.argmin(1)
    assert (ours != bits[place]).sum() <= 2


def check_gradients(network: Network, info: dict[str, Any]) -> None:
    compared = 0
    # Where samples of deformable pooling lie on a pixel's border, rounding decides on a slope.
    pooling = "pool" in network.name
    for name, parameter in network.model.named_parameters():
        theirs = mmdet_name(name)
        if parameter.grad is None:
            assert theirs in info["no_grad"], name
            continue
        ours = theirs_from_ours(name, parameter.grad)
        tolerance = 1e-3
        if pooling and ".offset." in name:
            tolerance = 5e-3
        norm = float(ours.double().norm())
        assert norm == pytest.approx(info["grad_norm"][theirs], rel=tolerance, abs=1e-7), name
        key = f"t1_grad:{theirs}"
        if key in network.train.files:
            recorded = network.train[key]
            flat = ours.flatten()[:: info["grad_step"][theirs]].numpy()
            largest = np.abs(recorded).max() or 1.0
            close(flat / largest, recorded / largest, theirs, tolerance)
            compared += 1
    assert compared == sum("t1_grad:" in name for name in network.train.files) > 20
