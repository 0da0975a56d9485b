"""Checkpoints, written while training goes on.

Every rank copies its fragments to the host, writes them as a file of its own and a note of its
checksum; rank 0 waits for all notes, puts the model's weights together from the files, as any
reader would, and commits. An attempt has a name of its own, so that what a dead one left, or one
that still writes somewhere, can't be taken for this one's.
"""

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glipv2.model.folders import WEIGHTS, step_url
from glipv2.model.weights import weights_file
from glipv2.pipeline import dist, storage
from glipv2.pipeline.checkpoint import (
    Listed,
    commit,
    drop_unlisted,
    open_checkpoint,
    prune_checkpoints,
)
from glipv2.pipeline.ema import EMA, Ema
from glipv2.pipeline.errors import UserError
from glipv2.pipeline.fragments import WEIGHT, Fragment, saved_fragments
from glipv2.pipeline.position import Position, merge_positions
from glipv2.pipeline.state_file import HostCopy, copy_saved

log = logging.getLogger(__name__)

TRAINER = "trainer.json"
LOOK_EVERY = 0.05
"""Seconds between two looks for the notes of the other ranks, at first; then longer."""


@dataclass(frozen=True)
class ModelParts:
    """What is known of a model before DeepSpeed takes it apart."""

    files: Mapping[str, bytes]
    """Of the exchange format, without the weights."""
    trained: Mapping[str, torch.Size]
    frozen: Mapping[str, Tensor]
    """In full precision, which an engine of 16 bits doesn't keep."""


def model_parts(model: nn.Module, files: Mapping[str, bytes]) -> ModelParts:
    named = dict(model.named_parameters())
    return ModelParts(
        files=files,
        trained={name: p.shape for name, p in named.items() if p.requires_grad},
        frozen={name: p.detach().clone() for name, p in named.items() if not p.requires_grad},
    )


def state_files(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.startswith("state-") and name.endswith(".safetensors")]


def whole_tensors(
    urls: Sequence[str], shapes: Mapping[str, torch.Size], kind: str
) -> dict[str, Tensor]:
    """Tensors by name, put together from the files of all ranks."""
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    copy_saved(urls, [Fragment(name, 0, {kind: t.view(-1)}) for name, t in tensors.items()])
    return tensors


class Saver:
    """One for each rank of a run."""

    def __init__(
        self,
        run_dir: str,
        engine: Any,
        ema: Ema | None,
        parts: ModelParts,
        keep: int,
        patience: float,
        bounded: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`patience`: seconds that rank 0 waits for the files of the others; `bounded`: around the
        writing of the own one, so that the rank in which it hangs is the one that says so."""
        self.run_dir, self.engine, self.ema, self.parts = run_dir, engine, ema, parts
        self.keep, self.patience, self.bounded = keep, patience, bounded
        self.host: HostCopy | None = None
        self.copied = threading.Event()
        self.copied.set()
        self.writing: Future[None] | None = None

    def save(self, step: int, position: Position, trainer: Mapping[str, Any]) -> None:
        """Begin to save the state after `step` steps; every rank must call it.

        The engine may not update before `wait_until_copied`. A save before this one is waited for.
        """
        self.wait()
        fragments = saved_fragments(self.engine)
        if self.ema:
            fragments = [
                Fragment(f.name, f.start, f.values | average.values)
                for f, average in zip(fragments, self.ema.shares, strict=True)
            ]
        told = dist.gather_objects((position, uuid.uuid4().hex[:8]))
        attempt = told[0][1]
        state = {
            "step": step,
            "position": merge_positions([position for position, _ in told]).to_dict(),
            **trainer,
        }
        self.copied.clear()
        self.writing = _in_background(lambda: self._write(step, attempt, fragments, state))

    def wait_until_copied(self) -> None:
        """Until the state may change again; raises what went wrong with the save."""
        self.copied.wait()
        if self.writing and self.writing.done():
            self.wait()

    def wait(self) -> None:
        """Until the last save is committed (on rank 0) or written; raises what went wrong."""
        if self.writing:
            self.writing.result()
            self.writing = None

    def _write(
        self, step: int, attempt: str, fragments: Sequence[Fragment], state: Mapping[str, Any]
    ) -> None:
        url = step_url(self.run_dir, step)
        with self.bounded():
            try:
                self.host = self.host or HostCopy(fragments)
                self.host.fill(fragments)
            finally:
                self.copied.set()
            name = storage.join(url, f"state-{attempt}-{dist.rank():05d}")
            listed = storage.write_pieces(f"{name}.safetensors", self.host.pieces())
            storage.write_json(f"{name}.json", listed)
        if dist.is_main():
            self._commit(url, step, attempt, state)

    def _commit(self, url: str, step: int, attempt: str, state: Mapping[str, Any]) -> None:
        files = self._all_written(url, attempt)
        kind = EMA if self.ema else WEIGHT
        urls = [storage.join(url, name) for name in files]
        tensors = whole_tensors(urls, self.parts.trained, kind) | dict(self.parts.frozen)
        contents = {
            **self.parts.files,
            WEIGHTS: weights_file(tensors),
            TRAINER: json.dumps(state).encode(),
        }
        for name, data in contents.items():
            storage.write_bytes(storage.join(url, name), data)
            files[name] = (len(data), storage.crc32c(data))
        if not commit(url, step, files):
            raise UserError(
                f"{url} was committed by another process: two trainers write to {self.run_dir}; "
                "stop one of them, or choose another run_dir"
            )
        drop_unlisted(open_checkpoint(url))
        prune_checkpoints(self.run_dir, self.keep)

    def _all_written(self, url: str, attempt: str) -> dict[str, Listed]:
        """The files of all ranks, once every one has noted its own."""
        deadline = time.monotonic() + self.patience
        pause = LOOK_EVERY
        names = [f"state-{attempt}-{rank:05d}" for rank in range(dist.world_size())]
        files: dict[str, Listed] = {}
        for name in names:
            note = storage.join(url, f"{name}.json")
            while not storage.exists(note):
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"{url}: {name}.safetensors was not written within {self.patience:.0f} s; "
                        "see what stopped its rank, and run the same command again"
                    )
                time.sleep(pause)
                pause = min(2.0, pause * 1.5)
            size, checksum = storage.read_json(note)
            files[f"{name}.safetensors"] = (size, checksum)
        return files


def _in_background(work: Any) -> Future[None]:
    """The result of `work` on a thread that does not outlive the process."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="saver", daemon=True).start()
    return future
