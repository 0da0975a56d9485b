"""Checkpoints under a commit rule: a step exists when its COMMIT.json does and every file fits it.

RUN/checkpoints/step-000200/{model.safetensors, config.json, vocab.txt, trainer.json, COMMIT.json,
and of every rank state-ATTEMPT-RANK.safetensors}. The first three are the exchange format: any
step's folder can be given to `glipv2 ground` or be a teacher. `saver` writes them.
"""

import json
import logging
import os
import posixpath
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glipv2.model import folders
from glipv2.model.folders import COMMIT, MODEL_FILES, WEIGHTS, step_url
from glipv2.pipeline import storage
from glipv2.pipeline.errors import ConfigError, DataError
from glipv2.pipeline.pins import pins

if TYPE_CHECKING:  # the launcher looks for checkpoints without loading torch
    from glipv2.model.glip import GLIPv2
    from glipv2.model.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Listed = tuple[int, str]
"""Bytes and crc32c of a file."""


@dataclass(frozen=True)
class Checkpoint:
    """What the commit record of a step says."""

    url: str
    step: int
    files: Mapping[str, Listed]

    def file(self, name: str) -> str:
        return storage.join(self.url, name)

    def read(self, name: str) -> bytes:
        """A whole file, checked. Raises DataError naming it when it is missing or altered."""
        if name not in self.files:
            raise DataError(f"checkpoint {self.url} has no {name}")
        data = storage.read_bytes(self.file(name))
        self._check(name, (len(data), storage.crc32c(data)))
        return data

    def verify(self, names: Sequence[str]) -> list[str]:
        """What is wrong with these files, read piece by piece."""
        problems = []
        for name in names:
            try:
                url = self.file(name)
                self._check(name, (storage.size(url), storage.file_crc32c(url)))
            except DataError as error:
                problems.append(str(error))
        return problems

    def _check(self, name: str, found: Listed) -> None:
        if found != self.files[name]:
            size, checksum = self.files[name]
            raise DataError(
                f"{self.file(name)} differs from its commit record (expected {size} bytes, crc "
                f"{checksum}); use another step"
            )


def open_checkpoint(url: str) -> Checkpoint:
    """Raises DataError when there is none at `url`, or its commit record is damaged."""
    commit_url = storage.join(url, COMMIT)
    if not storage.exists(commit_url):
        raise DataError(f"{url} is not a committed checkpoint: it has no {COMMIT}")
    try:
        record = json.loads(storage.read_bytes(commit_url))
        files = {
            str(name): (int(entry["bytes"]), str(entry["crc32c"]))
            for name, entry in record["files"].items()
        }
        return Checkpoint(url, int(record["step"]), files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{commit_url} is damaged: {error}; use another step") from error


def commit(url: str, step: int, files: Mapping[str, Listed]) -> bool:
    """Make a step exist, once all its files are durable; False if another process did so first."""
    listed = {name: {"bytes": size, "crc32c": crc} for name, (size, crc) in files.items()}
    record = json.dumps({"step": step, "files": listed}, indent=1, sort_keys=True)
    return storage.create_once(storage.join(url, COMMIT), record.encode())


def write_model(url: str, files: Mapping[str, bytes], step: int) -> None:
    """`write_folder` of a model, where somebody asked for it.

    Raises ConfigError for a run's own folders, whose newest step it would seem to be, and for a
    folder with more files than the model's.
    """
    where = url.rstrip("/") if "://" in url else os.path.abspath(url)
    for run in (where, posixpath.dirname(where), posixpath.dirname(posixpath.dirname(where))):
        inside = where.removeprefix(run).split("/")[1:2]
        if inside in ([], ["checkpoints"]) and folders.begun_steps(run, storage.list_names):
            raise ConfigError(f"{url} belongs to the run {run}; write to a folder outside it")
    with suppress(DataError):  # none, or one that can't be read
        if more := sorted(open_checkpoint(url).files.keys() - files.keys()):
            raise ConfigError(
                f"{url} holds {', '.join(more)} as well; write elsewhere, or delete that folder"
            )
    write_folder(url, files, step)


def write_folder(url: str, files: Mapping[str, bytes], step: int) -> None:
    """Write a folder of files under the commit rule, in place of an earlier one."""
    storage.delete(storage.join(url, COMMIT))
    for name, data in files.items():
        storage.write_bytes(storage.join(url, name), data)
    commit(url, step, {n: (len(data), storage.crc32c(data)) for n, data in files.items()})


def committed_steps(run_dir: str) -> list[int]:
    """Steps with a commit record, oldest first; their files are not checked here."""
    return folders.committed_steps(run_dir, storage.exists, storage.list_names)


def verify(checkpoint: Checkpoint) -> list[str]:
    """What is wrong with any file of a checkpoint."""
    return checkpoint.verify(tuple(checkpoint.files))


def newest_checkpoint(
    run_dir: str, problems_of: Callable[[Checkpoint], list[str]] = verify
) -> Checkpoint | None:
    """The newest checkpoint without problems; None if none was ever committed.

    Raises DataError when there are commits but none can be read: a run with checkpoints never
    starts over silently.
    """
    problems: list[str] = []
    for step in reversed(committed_steps(run_dir)):
        url = step_url(run_dir, step)
        try:
            checkpoint = open_checkpoint(url)
            found = problems_of(checkpoint)
        except DataError as error:
            found = [str(error)]
        if not found:
            return checkpoint
        for problem in found:
            log.warning("skipping a checkpoint: %s", problem)
        problems += found
    if problems:
        raise DataError(
            f"{run_dir} has checkpoints but none can be read:\n  " + "\n  ".join(problems) +
            "\nrestore one of them, or choose another run_dir to start over"
        )  # fmt: skip
    return None


def resolve_checkpoint(url: str) -> str:
    """The folder that a checkpoint argument means; see `folders.model_folder`.

    Raises DataError when there is none.
    """
    try:
        return folders.model_folder(url, storage.exists, storage.list_names)
    except ValueError as error:
        raise DataError(str(error)) from error


def read_model(url: str, *others: str) -> dict[str, bytes]:
    """A model's files in a folder, and those of `others` that it has.

    Each is checked against the folder's commit record, if it has one.
    """
    there = (name for name in others if storage.exists(storage.join(url, name)))
    names = (*MODEL_FILES, *there)
    if storage.exists(storage.join(url, COMMIT)):
        checkpoint = open_checkpoint(url)
        return {name: checkpoint.read(name) for name in names}
    return {name: storage.read_bytes(storage.join(url, name)) for name in names}


def weights_identity(url: str) -> list[Any]:
    """What tells a folder's weights from others: the step (0 without one), size and checksum."""
    commit, weights = storage.join(url, COMMIT), storage.join(url, WEIGHTS)
    if storage.exists(commit):
        found = storage.read_json(commit)
        return [found["step"], found["files"][WEIGHTS]]
    return [0, {"bytes": storage.size(weights), "crc32c": storage.file_crc32c(weights)}]


def model_digest(url: str) -> str:
    """What tells a folder's model from others: 16 hex digits of its files' sizes and checksums."""
    if storage.exists(storage.join(url, COMMIT)):
        listed = open_checkpoint(url).files
    else:
        urls = {name: storage.join(url, name) for name in MODEL_FILES}
        listed = {n: (storage.size(u), storage.file_crc32c(u)) for n, u in urls.items()}
    return storage.digest([listed.get(name) for name in MODEL_FILES])


def load_model(url: str) -> tuple["GLIPv2", "Tokenizer"]:
    """The model that a checkpoint argument means, in evaluation mode.

    Raises DataError when there is none or it is damaged.
    """
    from glipv2.model.weights import model_from_files

    folder = resolve_checkpoint(url)
    try:
        model, tokenizer = model_from_files(read_model(folder))
    except ValueError as error:
        raise DataError(f"{folder}: {error}") from error
    return model.eval(), tokenizer


def prune_checkpoints(run_dir: str, keep: int) -> None:
    """Delete all but the newest `keep` committed steps and those with a pin, and what older saves
    left unfinished.

    COMMIT.json goes first, so no step is torn; half-written steps are never counted.
    """
    committed = committed_steps(run_dir)
    kept = {*committed[-keep:], *pins(run_dir).values()}
    for step in folders.begun_steps(run_dir, storage.list_names):
        if step < committed[-1] and step not in kept:
            folder = step_url(run_dir, step)
            names = storage.list_names(folder)
            for name in sorted(names, key=lambda name: name != COMMIT):
                storage.delete(storage.join(folder, name))
            storage.delete_empty(folder)


def drop_unlisted(checkpoint: Checkpoint) -> None:
    """Delete what attempts that never committed left in a step's folder."""
    for name in storage.list_names(checkpoint.url):
        if name not in checkpoint.files and name != COMMIT:
            storage.delete(checkpoint.file(name))
