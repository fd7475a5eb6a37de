"""torchvision's Faster R-CNN (ResNet, FPN) on a config's data, for figures beside dcdet's.

`python tools/torchvision_baseline.py CONFIG [key.path=value ...] --output DIR` takes batches,
schedule, precision and evaluator from the config, as `dcdet train` and `dcdet test` do, and of its
model, which must have an FPN, the depth, the sizes of the anchors, the numbers of proposals and of
RoIs in the loss, and how detections are chosen. All else is torchvision's default.
"""

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger("dcdet.torchvision")


def build_torchvision(config: Any) -> nn.Module:
    """A torchvision Faster R-CNN from scratch with the sizes of `config`'s model."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.rpn import AnchorGenerator

    model, resize = config.model, config.data.resize
    strides = [4, 8, 16, 32, 64]
    sizes = tuple(tuple(stride * scale for scale in model.rpn.anchor_scales) for stride in strides)
    anchors = AnchorGenerator(sizes, (tuple(model.rpn.anchor_ratios),) * len(strides))
    backbone = resnet_fpn_backbone(
        backbone_name=f"resnet{model.backbone.depth}", weights=None, trainable_layers=5,
        norm_layer=nn.BatchNorm2d,
    )  # fmt: skip
    rpn, head, chosen = model.rpn, model.roi_head, model.postprocess
    return FasterRCNN(
        backbone, num_classes=1 + model.num_classes, min_size=resize.short, max_size=resize.long,
        image_mean=[mean / 255 for mean in model.pixel_mean],
        image_std=[std / 255 for std in model.pixel_std], rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=rpn.train.pre_nms, rpn_post_nms_top_n_train=rpn.train.post_nms,
        rpn_pre_nms_top_n_test=rpn.test.pre_nms, rpn_post_nms_top_n_test=rpn.test.post_nms,
        box_batch_size_per_image=head.hard_examples or head.samples.number,
        box_score_thresh=chosen.score_threshold, box_nms_thresh=chosen.nms_iou,
        box_detections_per_img=chosen.max_per_image,
    )  # fmt: skip


def images_and_targets(batch: Any) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """A dcdet Batch in torchvision's terms: images in 0..1, labels from 1 on."""
    images = [
        batch.images[i, :, :height, :width].float() / 255
        for i, (height, width) in enumerate(batch.sizes)
    ]
    targets = [{"boxes": t.boxes, "labels": t.labels + 1} for t in batch.targets]
    return images, targets


def train(config: Any) -> nn.Module:
    """The trained model; same batches, steps and learning rates as `dcdet train`."""
    from dcdet.datasets.loader import DetectionDataset, steps_per_epoch, train_loader
    from dcdet.engine import solver
    from dcdet.engine.runtime import autocast, seed_everything
    from dcdet.engine.setup import build_reader
    from dcdet.registry import check

    experiment = check(config)
    data, section = experiment.data, experiment.solver
    seed_everything(config.seed)
    model = build_torchvision(config).train()
    dataset = DetectionDataset(build_reader(config, "train"), data, training=True)
    optimizer = solver.build_optimizer(model, section)
    rate = section.scaled_lr(data.batch_size)
    milestones = solver.milestones_in_updates(section.milestones, len(dataset), data.batch_size)
    steps = max(1, round(section.epochs * steps_per_epoch(dataset, data)))
    step, epoch, start = 0, 0, time.perf_counter()
    while step < steps:
        for batch in train_loader(dataset, data, seed=config.seed, epoch=epoch):
            step += 1
            now = solver.learning_rate(step, rate, section.warmup, milestones, section.lr_factor)
            solver.set_learning_rate(optimizer, now)
            with autocast(torch.device("cpu"), section.precision):
                losses = model(*images_and_targets(batch))
            loss = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), section.clip_gradient or float("inf"))
            optimizer.step()
            if step % section.log_every == 0:
                seconds = time.perf_counter() - start
                log.info("step %d/%d  loss %.4f  %.0f s", step, steps, loss.item(), seconds)
            if step == steps:
                break
        epoch += 1
    return model


@torch.no_grad()
def evaluate(config: Any, model: nn.Module) -> dict[str, Any]:
    """The config's metrics of a torchvision detector."""
    from dcdet import boxes as box_ops
    from dcdet.datasets.loader import DetectionDataset, test_loader
    from dcdet.engine.setup import build_reader
    from dcdet.registry import build, check
    from dcdet.structures import Detections

    data = check(config).data
    reader = build_reader(config, "test")
    evaluator = build(config.test.evaluator, "evaluator", reader=reader)
    model.eval()
    dataset = DetectionDataset(reader, data, training=False)
    for [batch] in test_loader(dataset, data, 0, 1):
        images, _ = images_and_targets(batch)
        for found, scale, target in zip(model(images), batch.scales, batch.targets, strict=True):
            boxes = box_ops.rescale(found["boxes"], box_ops.inverse(scale), config.model.pixels)
            evaluator.update(
                Detections(target.image_id, boxes, found["scores"], found["labels"] - 1)
            )
    return evaluator.result()


def main() -> int:
    """Train, evaluate, write metrics.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    from dcdet import load_config
    from dcdet.engine.runtime import strict_json, write_text

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = load_config(args.config, args.overrides)
    args.output.mkdir(parents=True, exist_ok=True)
    metrics = evaluate(config, train(config))
    write_text(args.output / "metrics.json", strict_json(metrics))
    for name, value in metrics.items():
        log.info("%s %s", name, value)
    return 0


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    sys.exit(main())
