"""What a training run shows and records."""

import json
import logging
import time
from pathlib import Path

from dcdet.engine.runtime import Runtime, strict_json, write_text

log = logging.getLogger("dcdet.train")


class Logs:
    """Progress lines, metrics.jsonl and TensorBoard events, by process 0."""

    def __init__(
        self, output: Path, runtime: Runtime, every: int, batch_size: int, steps: int, step: int
    ) -> None:
        self.every, self.batch_size, self.steps = every, batch_size, steps
        self.skipped_images, self.world = 0, runtime.world
        self.first, self.start = step, time.perf_counter()
        self.last, self.last_time = step, self.start
        self.file, self.board = None, None
        if runtime.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            path = output / "metrics.jsonl"
            _forget_after(path, step)
            self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115
            self.board = SummaryWriter(str(output), purge_step=step)

    def step(
        self, step: int, values: dict[str, float], loss_names: list[str], norm: float,
        rate: float, skipped_steps: int,
    ) -> None:  # fmt: skip
        """Count a step, and show it when it is time."""
        self.skipped_images += round(values["skipped"] * self.world)
        values = {n: value for n, value in values.items() if n not in ("skipped", "signal")}
        if self.file is None or self.board is None or (step % self.every and step != self.steps):
            return
        now = time.perf_counter()
        images_per_second = (step - self.last) * self.batch_size / (now - self.last_time)
        left = (now - self.start) / (step - self.first) * (self.steps - step)
        self.last, self.last_time = step, now
        total = sum(values[name] for name in loss_names)
        parts = ", ".join(f"{name} {values[name]:.4f}" for name in loss_names)
        log.info("step %d/%d  loss %.4f (%s)  lr %.3g  %.1f images/s  %d:%02d:%02d left",
                 step, self.steps, total, parts, rate, images_per_second,
                 left // 3600, left // 60 % 60, left % 60)  # fmt: skip
        record = {
            "step": step, "lr": rate, "loss": total, **values, "grad_norm": norm,
            "images_per_second": images_per_second, "seconds": now - self.start,
            "skipped_images": self.skipped_images, "skipped_steps": skipped_steps,
        }  # fmt: skip
        self.file.write(strict_json(record) + "\n")
        self.file.flush()
        for name, value in record.items():
            self.board.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        """Finish the files."""
        if self.file is not None and self.board is not None:
            self.file.close()
            self.board.close()


def _forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps that a killed run took after its last checkpoint."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):  # the line that the kill cut short
            continue
    write_text(path, "".join(kept))
