"""Checkpoints under a commit rule: a step exists when its COMMIT.json does and every file fits it.

RUN/checkpoints/step-000200/{model.safetensors, config.json, vocab.txt, optimizer.safetensors,
trainer.json, COMMIT.json}. The first three are the exchange format: any step's folder can be given
to `glipv2 ground` or be a teacher.
"""

import json
import logging
from typing import TYPE_CHECKING, Any

from glipv2.model import folders
from glipv2.model.folders import COMMIT, MODEL_FILES, WEIGHTS, step_name
from glipv2.pipeline import storage
from glipv2.pipeline.errors import DataError

if TYPE_CHECKING:  # the launcher looks for checkpoints without loading torch
    from glipv2.model.glip import GLIPv2
    from glipv2.model.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def save_checkpoint(run_dir: str, step: int, files: dict[str, bytes]) -> str:
    """Write the files, then the commit record that makes them a checkpoint; returns its URL.

    Only the main rank calls it. Files of an earlier attempt that never committed are overwritten.
    """
    url = storage.join(run_dir, "checkpoints", step_name(step))
    write_folder(url, files, step)
    return url


def write_folder(url: str, files: dict[str, bytes], step: int) -> None:
    """Write files, then the commit record that lists them with size and checksum."""
    for name, data in files.items():
        storage.write_bytes(storage.join(url, name), data)
    listed = {
        name: {"bytes": len(data), "crc32c": storage.crc32c(data)} for name, data in files.items()
    }
    commit = json.dumps({"step": step, "files": listed}, indent=1, sort_keys=True)
    storage.write_bytes(storage.join(url, COMMIT), commit.encode())


def read_checkpoint(url: str, names: tuple[str, ...] | None = None) -> dict[str, bytes]:
    """The named files (all of them by default), each checked against the commit record.

    Raises DataError naming the file when one is missing or altered.
    """
    commit_url = storage.join(url, COMMIT)
    if not storage.exists(commit_url):
        raise DataError(f"{url} is not a committed checkpoint: it has no {COMMIT}")
    try:
        listed = {
            name: (int(entry["bytes"]), str(entry["crc32c"]))
            for name, entry in json.loads(storage.read_bytes(commit_url))["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{commit_url} is damaged: {error}; use another step") from error
    files = {}
    for name in names or tuple(listed):
        if name not in listed:
            raise DataError(f"checkpoint {url} has no {name}")
        data = storage.read_bytes(storage.join(url, name))
        if (len(data), storage.crc32c(data)) != listed[name]:
            raise DataError(
                f"{storage.join(url, name)} differs from its commit record (expected "
                f"{listed[name][0]} bytes, crc {listed[name][1]}); use another step"
            )
        files[name] = data
    return files


def committed_steps(run_dir: str) -> list[int]:
    """Steps with a commit record, oldest first; their files are not checked here."""
    return folders.committed_steps(run_dir, storage.exists, storage.list_names)


def newest_checkpoint(run_dir: str) -> tuple[str, dict[str, bytes]] | None:
    """URL and files of the newest checkpoint that verifies; None if none was ever committed.

    Raises DataError when there are commits but none can be read: a run with checkpoints never
    starts over silently.
    """
    problems = []
    for step in reversed(committed_steps(run_dir)):
        url = storage.join(run_dir, "checkpoints", step_name(step))
        try:
            return url, read_checkpoint(url)
        except DataError as error:
            log.warning("skipping a checkpoint: %s", error)
            problems.append(str(error))
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
        return read_checkpoint(url, names)
    return {name: storage.read_bytes(storage.join(url, name)) for name in names}


def weights_identity(url: str) -> list[Any]:
    """What tells a folder's weights from others: the step (0 without one), size and checksum."""
    commit, weights = storage.join(url, COMMIT), storage.join(url, WEIGHTS)
    if storage.exists(commit):
        found = storage.read_json(commit)
        return [found["step"], found["files"][WEIGHTS]]
    return [0, {"bytes": storage.size(weights), "crc32c": storage.file_crc32c(weights)}]


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
    """Delete all but the newest `keep` committed steps; COMMIT.json goes first, so none is torn."""
    for step in committed_steps(run_dir)[:-keep]:
        folder = storage.join(run_dir, "checkpoints", step_name(step))
        names = storage.list_names(folder)
        for name in sorted(names, key=lambda name: name != COMMIT):
            storage.delete(storage.join(folder, name))
