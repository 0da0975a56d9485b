"""What a run leaves behind while it trains, and what its user sees: bar, logs, summary."""

import os
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from glipv2.model.batch import Batch, Collectives
from glipv2.pipeline import dist, storage
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.engine import LEFT_OUT
from glipv2.pipeline.flops import peak_flops, training_operations
from glipv2.pipeline.profiling import Profile
from glipv2.pipeline.progress import bar, say
from glipv2.pipeline.runlog import METRICS, SAMPLES, StepLog
from glipv2.pipeline.trackers import trackers

SUMMARY = "pretrain.json"
RECENT = 50
"""Steps that the figures of the bar are averaged over."""


@dataclass(frozen=True)
class StepTimes:
    """Of one step of this rank."""

    seconds: float
    waited: float
    """Seconds of it that were spent waiting for data."""
    pixels: int
    """That went through the model, padding included."""


def step_times(micro_batches: Sequence[Batch], seconds: float, waited: float) -> StepTimes:
    return StepTimes(seconds, waited, sum(map(pixels, micro_batches)))


def pixels(batch: Batch) -> int:
    return batch.images_B3HW[:, 0].numel()


class Recorder:
    """Of one run; only the main rank's does anything."""

    def __init__(self, config: RunConfig, first_step: int) -> None:
        self.config = config
        self.main = dist.is_main()
        self.peak = config.log.peak_tflops * 1e12 or peak_flops()
        self.operations_per_pixel = 0.0
        if not self.main:
            return
        self.first_step, self.began = first_step, time.monotonic()
        self.recent: deque[StepTimes] = deque(maxlen=RECENT)
        self.recent_losses: deque[float] = deque(maxlen=RECENT)
        self.seconds = self.waited = 0.0
        self.noted = self.overflows = 0
        self.losses = StepLog(config.run_dir, first_step)
        self.metrics = StepLog(config.run_dir, first_step, METRICS)
        self.samples = StepLog(config.run_dir, first_step, SAMPLES) if config.log.samples else None
        self.trackers = trackers(config, first_step)
        self.profile = Profile(config.run_dir, config.profile)
        name = os.path.basename(config.run_dir.rstrip("/"))
        self.bar = bar(config.train.steps, f"pretrain {name}", "step", first_step)

    def count_operations(self, model: nn.Module, batch: Batch, collectives: Collectives) -> None:
        """Find out what arithmetic a pixel costs, if the device's peak is known; every rank must
        call it."""
        if self.peak:
            found = training_operations(lambda: model(batch, collectives, self.config.losses))
            self.operations_per_pixel = found / pixels(batch)

    def step(self, step: int, losses: dict[str, float], times: StepTimes) -> None:
        """Note a step whose losses and gradients were fine, in fp16 but for an overflow."""
        if not self.main:
            return
        self.losses.append(step, losses)
        self.recent.append(times)
        self.recent_losses.append(losses["loss"])
        self.noted += 1
        self.overflows += int(losses.get(LEFT_OUT, 0))
        self.seconds += times.seconds
        self.waited += times.waited
        figures = self._figures() | {LEFT_OUT: float(self._left_out(step + 1))}
        self.bar.set_postfix_str(_line(losses, figures), refresh=False)
        self.bar.update(1)
        if (step + 1) % self.config.log.every == 0:
            self.metrics.append(step, {"time": round(time.time(), 1), **losses, **figures})
            for tracker in self.trackers:
                tracker.log(step, losses | figures)
        self.profile.step()

    def consumed(self, step: int, keys_by_rank: Sequence[Sequence[str]]) -> None:
        """Note the samples of a step that updated the weights, in an order that does not depend on
        the number of ranks."""
        if self.main and self.samples:
            keys = sorted(key for own in keys_by_rank for key in own)
            self.samples.append(step, {"samples": keys})

    def _left_out(self, step: int) -> int:
        """Of the steps that this start of the run made before `step`, those without an update."""
        return step - self.first_step - self.noted + self.overflows

    def _figures(self) -> dict[str, float]:
        """Over the recent steps."""
        seconds = max(1e-9, sum(times.seconds for times in self.recent))
        figures = {
            "step_seconds": seconds / max(1, len(self.recent)),
            "devices": float(dist.world_size()),
            "images_per_second": len(self.recent) * self.config.train.global_batch / seconds,
            "data_wait_share": sum(times.waited for times in self.recent) / seconds,
            "memory_gb": memory_gb(),
        }
        if self.peak and self.operations_per_pixel:
            done = self.operations_per_pixel * sum(times.pixels for times in self.recent)
            figures["flops_utilisation"] = done / seconds / self.peak
        return figures

    def flush(self) -> None:
        """Make the logs so far durable, before a checkpoint that goes on from here."""
        if self.main:
            self.losses.flush()
            self.metrics.flush()
            if self.samples:
                self.samples.flush()
            for tracker in self.trackers:
                tracker.flush()

    def close(self, step: int) -> None:
        """The end of a run, or of this start of it, after `step` steps."""
        if not self.main:
            return
        self.bar.close()
        self.flush()
        self.profile.close()
        for tracker in self.trackers:
            tracker.close(finished=step == self.config.train.steps)
        if self.recent:
            self._summarise(step)

    def _summarise(self, step: int) -> None:
        """Say in a few words, and in RUN/pretrain.json, what this start of the run did."""
        steps = step - self.first_step
        found = {
            "steps": steps,
            "from_step": self.first_step,
            "to_step": step,
            "seconds": round(time.monotonic() - self.began, 1),
            "images_per_second": round(
                steps * self.config.train.global_batch / max(1e-9, self.seconds), 2
            ),
            "data_wait_share": round(self.waited / max(1e-9, self.seconds), 4),
            "memory_gb": round(memory_gb(), 2),
            LEFT_OUT: self._left_out(step),
            "loss": round(statistics.fmean(self.recent_losses or [0.0]), 4),
        }
        storage.write_json(storage.join(self.config.run_dir, SUMMARY), found)
        utilisation = self._figures().get("flops_utilisation")
        used = f", {utilisation:.1%} of the device's arithmetic" if utilisation else ""
        say(
            f"{self.config.run_dir}: steps {self.first_step} to {step} in "
            f"{found['seconds']:.0f} s, {found['images_per_second']:.1f} img/s, "
            f"{found['data_wait_share']:.1%} of the time waiting for data{used}, "
            f"{found['memory_gb']:.1f} GB of memory, loss of the last "
            f"{len(self.recent_losses)} steps {found['loss']:.3f}, {found[LEFT_OUT]} left out"
        )


def memory_gb() -> float:
    """The most memory that this rank has had: of its GPU, without one of the process (10^9 B)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text()  # ru_maxrss begins with that of the parent
    kilobytes = next(line.split()[1] for line in status.splitlines() if "VmHWM" in line)
    return int(kilobytes) * 1024 / 1e9


def _line(losses: dict[str, float], figures: dict[str, float]) -> str:
    terms = " ".join(
        f"{name} {value:.2f}" for name, value in losses.items() if name not in ("lr", LEFT_OUT)
    )
    shown = [terms, f"{figures['images_per_second']:.0f} img/s"]
    shown.append(f"data {figures['data_wait_share']:.0%}")
    shown.append(f"{figures['memory_gb']:.1f} GB")
    if "flops_utilisation" in figures:
        shown.append(f"flops {figures['flops_utilisation']:.0%}")
    return ", ".join(shown)
