"""The training loop, in the order in which things happen."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from dcdet.datasets.loader import (
    DataSection,
    DetectionDataset,
    pad_to,
    steps_per_epoch,
    train_loader,
)
from dcdet.engine import checkpoint, runtime
from dcdet.engine.logs import Logs
from dcdet.engine.runtime import Runtime, Signals
from dcdet.engine.setup import build_dataset, build_reader, comparable
from dcdet.engine.solver import (
    SolverSection,
    build_optimizer,
    learning_rate,
    milestones_in_updates,
    set_learning_rate,
)
from dcdet.errors import DivergedError, MachineError, UserError, first_line
from dcdet.models.build import build_model
from dcdet.registry import check
from dcdet.structures import Batch

log = logging.getLogger("dcdet.train")


@dataclass
class State:
    """What a step changes: all of it is in a checkpoint."""

    model: nn.Module
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler
    step: int = 0


def train(
    config: Any,
    output: Path,
    *,
    weights: Path | None = None,
    resume: bool = False,
    device: str | None = None,
) -> int:
    """Train the config's model; results go to `output`. The command's exit code returns.

    A new run starts from the checkpoint `weights` where one is given, instead of a pretrained
    backbone. Raises UserError, DivergedError, MachineError.
    """
    with ExitStack() as stack:
        run = stack.enter_context(runtime.processes(device))
        if run.rank == 0:
            stack.enter_context(runtime.output_folder(output))
        return _train(config, output, weights, resume, run, stack.enter_context(Signals()))


def _train(
    config: Any, output: Path, weights: Path | None, resume: bool, run: Runtime, signals: Signals
) -> int:
    experiment = check(config)
    data, solver = experiment.data, experiment.solver
    runtime.seed_everything(config.seed + run.rank)
    reader = build_reader(config, "train")
    dataset = build_dataset(config, reader, data, training=True)
    state, meta = _start(config, output, weights, resume, run, solver, reader)
    per_epoch = steps_per_epoch(dataset, data)
    steps = max(1, round(solver.epochs * per_epoch))
    save_every = max(1, round(solver.checkpoint_every * per_epoch))
    base_lr = solver.scaled_lr(data.batch_size)
    milestones = milestones_in_updates(solver.milestones, len(dataset), data.batch_size)
    if run.rank == 0:
        config.dump(output / "config.yaml")
        rates = f"{base_lr:g} ({solver.lr:g} for a batch of {solver.reference_batch})"
        log.info("%d images, %d steps of %d images, learning rate %s", len(dataset), steps,
                 data.batch_size, rates)  # fmt: skip
        log.info("%s on %s, %d process(es), results in %s", solver.precision, run.device,
                 run.world, output)  # fmt: skip

    model, optimizer, scaler = state.model, state.optimizer, state.scaler
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    statistics = [b for name, b in model.named_buffers() if "running" in name]
    forward: nn.Module = model
    if run.world > 1:
        forward = DistributedDataParallel(model, broadcast_buffers=False)
    logs = Logs(output, run, solver.log_every, data.batch_size, steps, state.step)
    bad_in_a_row = skipped_steps = 0
    for batch in _batches(dataset, data, config.seed, run, state.step, steps, per_epoch):
        rate = learning_rate(state.step + 1, base_lr, solver.warmup, milestones, solver.lr_factor)
        set_learning_rate(optimizer, rate, solver.rescale_momentum)
        before = [buffer.clone() for buffer in statistics]
        losses, stats = _forward_backward(forward, batch.to(run.device), scaler, solver, run)
        scaler.unscale_(optimizer)
        norm = clip_grad_norm_(parameters, solver.clip_gradient or float("inf"))
        # One exchange a step: every process sees the same losses and takes the same decisions.
        counts = norm.new_tensor([len(batch.skipped), signals.received > 0])
        shared = run.mean(torch.cat([torch.stack([*losses.values(), *stats.values()]), counts]))
        values = dict(zip([*losses, *stats, "skipped", "signal"], shared.tolist(), strict=True))
        finite_losses = bool(shared[: len(losses)].isfinite().all())
        if finite_losses and norm.isfinite():
            scaler.step(optimizer)
            bad_in_a_row = 0
        else:
            for buffer, old in zip(statistics, before, strict=True):
                buffer.copy_(old)
            overflow = finite_losses and scaler.is_enabled()
            bad_in_a_row, skipped_steps = bad_in_a_row + (not overflow), skipped_steps + 1
            _report_bad_step(output, state.step + 1, batch, values, norm.item(), run, overflow)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        state.step += 1
        logs.step(state.step, values, list(losses), norm.item(), rate, skipped_steps)
        if bad_in_a_row >= solver.max_bad_steps:
            raise DivergedError(
                f"step {state.step}: {bad_in_a_row} steps in a row were not finite (a smaller "
                "solver.lr, a longer warm-up or solver.clip_gradient may help); checkpoints in "
                f"{output / 'checkpoints'} are good"
            )
        stop = values["signal"] > 0
        if run.rank == 0 and (state.step % save_every == 0 or state.step == steps or stop):
            _save(state, output / "checkpoints", meta, solver.keep_checkpoints)
        if stop:
            return 128 + (signals.received or 15)
    logs.close()
    if run.rank == 0:
        log.info("done: %s", output / "checkpoints" / f"step_{state.step:08d}.pth")
    return 1 if logs.skipped_images else 0


def _start(
    config: Any, output: Path, weights: Path | None, resume: bool, run: Runtime,
    solver: SolverSection, reader: Any,
) -> tuple[State, dict[str, Any]]:  # fmt: skip
    """Model and optimiser, new or as the newest whole checkpoint has them; and meta data."""
    model = build_model(config)
    folder = output / "checkpoints"
    found = checkpoint.newest(folder) if resume else None
    if found is None and resume:
        log.warning("%s: nothing to resume, starting anew", folder)
    if found is None and checkpoint.sorted_checkpoints(folder):
        raise UserError(output, "holds the checkpoints of another run",
                        "continue it with --resume, or choose another --output")  # fmt: skip
    pretrained = config.model.backbone.get("pretrained")
    if found is None and weights:
        checkpoint.load_weights(model, weights)
    elif found is None and pretrained:
        checkpoint.load_pretrained(model.get_submodule("backbone"), pretrained)
    model.to(run.device).train()
    scaler = torch.amp.GradScaler(run.device.type, enabled=solver.precision == "fp16")
    state = State(model, build_optimizer(model, solver), scaler)
    meta = {
        "classes": reader.classes,
        "category_ids": reader.category_ids,
        "config": config.plain(),
        "images": len(reader.records),
    }
    if found is not None:
        _restore(state, *found, meta)
        if run.rank == 0:
            log.info("resumed from %s at step %d", found[0], state.step)
    return state, meta


def _restore(state: State, path: Path, saved: dict[str, Any], meta: dict[str, Any]) -> None:
    if "optimizer" not in saved:
        raise UserError(path, "holds weights only, a run cannot be resumed from it")
    then, now = ({**m, "config": None, **comparable(m["config"])} for m in (saved["meta"], meta))
    changed = [
        f"{key} was {then.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(then | now)
        if then.get(key) != now.get(key)
    ]
    if changed:
        hint = "resume with the same config and data, or start anew in another --output"
        raise UserError(path, f"was trained otherwise: {'; '.join(changed[:3])}", hint)
    checkpoint.copy_weights(state.model, saved["model"], path)
    try:
        state.optimizer.load_state_dict(saved["optimizer"])
        state.scaler.load_state_dict(saved["scaler"])
    except (ValueError, RuntimeError) as error:
        raise UserError(path, f"optimizer state does not fit: {first_line(error)}") from error
    runtime.set_random_state(saved["random"])
    state.step = saved["step"]


def _save(state: State, folder: Path, meta: dict[str, Any], keep: int) -> None:
    content = {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "step": state.step,
        "random": runtime.random_state(),
        "meta": meta,
    }
    folder.mkdir(exist_ok=True)
    checkpoint.save(folder / f"step_{state.step:08d}.pth", content)
    checkpoint.prune(folder, keep)


def _batches(
    dataset: DetectionDataset, data: DataSection, seed: int, run: Runtime,
    step: int, steps: int, per_epoch: int,
) -> Iterator[Batch]:  # fmt: skip
    """The batches of this process from step `step` on, padded alike on all processes."""
    while step < steps:
        epoch, start = divmod(step, per_epoch)
        for batch in train_loader(dataset, data, seed=seed, epoch=epoch, rank=run.rank,
                                  world=run.world, start_step=start):  # fmt: skip
            yield pad_to(batch, run.largest(list(batch.images.shape[-2:])))
            step += 1
            if step == steps:
                return


def _forward_backward(
    model: nn.Module, batch: Batch, scaler: torch.amp.GradScaler, solver: SolverSection,
    run: Runtime,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """Losses and statistics, detached; gradients are left in the parameters."""
    for attempt in (1, 2):
        try:
            with runtime.autocast(run.device, solver.precision):
                losses, stats = model(batch)
            scaler.scale(torch.stack(list(losses.values())).sum()).backward()
            break
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
            if not memory and "allocate memory" not in str(error):
                raise
            images = ", ".join(str(target.image_id) for target in batch.targets)
            # Other processes wait for this one's gradients: only a lone process can try again.
            if attempt == 2 or run.world > 1:
                raise MachineError(f"out of memory on {images}: {first_line(error)}") from error
            log.warning("out of memory on images %s, trying once more", images)
            model.zero_grad(set_to_none=True)
            if run.device.type == "cuda":
                torch.cuda.empty_cache()
    return {name: loss.detach() for name, loss in losses.items()}, stats


def _report_bad_step(
    output: Path, step: int, batch: Batch, values: dict[str, float], norm: float, run: Runtime,
    overflow: bool,
) -> None:  # fmt: skip
    """Say what was not finite, and keep the batch."""
    if overflow:
        log.info("step %d: fp16 overflow, step skipped, loss scale lowered", step)
        return
    images = [target.image_id for target in batch.targets]
    shown = ", ".join(f"{name} {value:g}" for name, value in values.items())
    log.warning("step %d: not finite, step skipped: %s, gradient norm %g; images %s",
                step, shown, norm, ", ".join(map(str, images)))  # fmt: skip
    content = {
        "images": batch.images,
        "sizes": batch.sizes,
        "image_ids": images,
        "boxes": [target.boxes for target in batch.targets],
        "labels": [target.labels for target in batch.targets],
        "label_maps": [target.label_map for target in batch.targets],
    }
    torch.save(content, output / f"bad_batch_rank{run.rank}.pth")
