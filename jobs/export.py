"""glipv2 export RUN --out DIR: the model of a step as a folder of its own, average or raw."""

import argparse

from glipv2.pipeline.checkpoint import (
    committed_steps,
    open_checkpoint,
    resolve_checkpoint,
    write_model,
)
from glipv2.pipeline.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run folder, or a step of it; any storage")
    parser.add_argument("--step", type=int, help="default: the newest that is committed")
    parser.add_argument("--out", required=True, help="folder to write; any storage")
    parser.add_argument(
        "--raw",
        action="store_true",
        help="the weights of training, for runs with train.ema_decay; default: the average",
    )


def run(arguments: argparse.Namespace) -> int:
    url = step_of(arguments.run, arguments.step)
    names = export(url, arguments.out, arguments.raw)
    kind = "weights of training" if arguments.raw else "model"
    print(f"{arguments.out}: the {kind} of {url} ({', '.join(names)})")  # noqa: T201
    return 0


def step_of(run_dir: str, step: int | None) -> str:
    """The folder of a run's step, the newest by default. DataError says which there are."""
    from glipv2.model.folders import step_url

    if step is None:
        return resolve_checkpoint(run_dir)
    steps = committed_steps(run_dir)
    if step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise DataError(f"{run_dir} has no committed step {step}; it has {known}")
    return step_url(run_dir, step)


def export(url: str, out: str, raw: bool = False) -> list[str]:
    """Write the model's files of a committed step to `out`; returns their names.

    Every file that is read is checked. Raises DataError when one is missing or altered.
    """
    from safetensors.torch import load

    from glipv2.model.folders import MODEL_FILES, WEIGHTS
    from glipv2.model.weights import weights_file
    from glipv2.pipeline.fragments import WEIGHT
    from glipv2.pipeline.saver import state_files, whole_tensors
    from glipv2.pipeline.state_file import read_entries

    checkpoint = open_checkpoint(url)
    files = {name: checkpoint.read(name) for name in MODEL_FILES}
    if raw:
        states = state_files(sorted(checkpoint.files))
        problems = checkpoint.verify(states)
        if problems or not states:
            raise DataError(problems[0] if problems else f"{url} holds no state of training")
        urls = [checkpoint.file(name) for name in states]
        tensors = load(files[WEIGHTS])
        trained = {entry.name for file in urls for entry in read_entries(file)}
        shapes = {name: tensors[name].shape for name in trained}
        files[WEIGHTS] = weights_file(tensors | whole_tensors(urls, shapes, WEIGHT))
    write_model(out, files, checkpoint.step)
    return list(files)
