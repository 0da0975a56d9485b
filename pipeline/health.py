"""What is done about steps whose loss or gradient is not finite, and about loss spikes.

All ranks see the same averaged losses, so each decides alone and all alike.
"""

import dataclasses
import json
import logging
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import save

from glipv2.model.batch import Batch
from glipv2.pipeline import dist, storage
from glipv2.pipeline.checkpoint import committed_steps
from glipv2.pipeline.errors import NonFiniteLossError, UserError
from glipv2.pipeline.train_config import SuperviseConfig

log = logging.getLogger(__name__)

SKIPS = "skips.json"
LEFT_OUT = "left_out"
RECENT = 100
"""Steps over which updates that were left out are counted, and losses are compared."""


@dataclasses.dataclass(frozen=True)
class Skip:
    """Before step `step` the stream leaves out `batches` global batches."""

    step: int
    batches: int
    spike_step: int
    loss: float
    usual_loss: float


def read_skips(run_dir: str) -> list[Skip]:
    """All that a run has left out so far, in the order in which it was decided."""
    url = storage.join(run_dir, SKIPS)
    return [Skip(**entry) for entry in storage.read_json(url)] if storage.exists(url) else []


class Health:
    """Of one run, on one rank."""

    def __init__(self, run_dir: str, limits: SuperviseConfig, skips: Sequence[Skip]) -> None:
        self.run_dir, self.limits, self.skips = run_dir, limits, list(skips)
        self.left_out: deque[int] = deque()
        self.losses: deque[float] = deque(maxlen=RECENT)

    def batches_to_skip(self, step: int) -> int:
        """Global batches that are left out before this step."""
        return sum(skip.batches for skip in self.skips if skip.step == step)

    def leave_out(
        self, step: int, micro_batches: Sequence[Batch], error: NonFiniteLossError
    ) -> None:
        """Note a step without an update, with its batch; raises `error` if there were too many."""
        for number, batch in enumerate(micro_batches):
            name = f"step-{step:06d}-rank-{dist.rank():05d}-{number}.safetensors"
            url = storage.join(self.run_dir, LEFT_OUT, name)
            storage.write_bytes(url, _batch_file(batch, str(error)))
        self.left_out.append(step)
        while self.left_out[0] <= step - RECENT:
            self.left_out.popleft()
        if len(self.left_out) > self.limits.max_left_out:
            raise NonFiniteLossError(
                f"{error}. That makes {len(self.left_out)} of the last {RECENT} steps, and "
                f"supervise.max_left_out is {self.limits.max_left_out}; the batches are in "
                f"{storage.join(self.run_dir, LEFT_OUT)}"
            )
        kept = storage.join(self.run_dir, LEFT_OUT)
        log.warning("%s. The step is left out; its batch is in %s", error, kept)

    def spike(self, step: int, loss: float) -> Skip | None:
        """What to leave out because the loss of this step is far above the usual; notes losses."""
        usual = statistics.median(self.losses) if len(self.losses) == RECENT else None
        self.losses.append(loss)
        factor = self.limits.spike_factor
        if not factor or usual is None or loss <= factor * usual:
            return None
        back = max(0, step - self.limits.spike_back)
        found = f"step {step}: the loss is {loss:.4g}, {loss / usual:.1f} times the usual"
        committed = dist.gather_objects(committed_steps(self.run_dir))[0]  # one view of the store
        if not any(known <= back for known in committed):
            log.warning(
                "%s; no checkpoint before step %d to go back to, so it goes on", found, back
            )
            return None
        if len(self.skips) >= self.limits.max_rollbacks:
            raise UserError(
                f"{found}, after {len(self.skips)} times of going back (supervise.max_rollbacks). "
                "Lower train.learning_rate, look at the data around that step, or set "
                "supervise.spike_factor higher"
            )
        log.warning("%s; going back to step %d or before, without the %d batches from there",
                    found, back, self.limits.spike_skip)  # fmt: skip
        return Skip(back, self.limits.spike_skip, step, loss, usual)

    def note(self, skip: Skip) -> None:
        """Make a skip part of the run, before anything goes back to it (main rank only)."""
        entries = [dataclasses.asdict(known) for known in (*self.skips, skip)]
        storage.write_json(storage.join(self.run_dir, SKIPS), entries)


def _batch_file(batch: Batch, reason: str) -> bytes:
    tensors: dict[str, torch.Tensor] = {}
    for field in dataclasses.fields(batch):
        _collect(field.name, getattr(batch, field.name), tensors)
    metadata = {"keys": json.dumps(list(batch.keys)), "reason": reason}
    return save(tensors, metadata=metadata)


def _collect(name: str, value: Any, tensors: dict[str, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous()
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            _collect(f"{name}.{number}", item, tensors)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _collect(f"{name}.{field.name}", getattr(value, field.name), tensors)
