"""A function run on every shard of a set, here or on Ray actors, under one progress bar."""

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.progress import bar
from glipv2.pipeline.ray_map import map_in_process, map_on_ray
from glipv2.pipeline.shard_format import ShardSet

Result = TypeVar("Result")
SAMPLES_A_WORKER = 20_000
"""For fewer a further process costs more than it saves: it takes seconds to start."""


def add_workers_argument(
    parser: argparse.ArgumentParser,
    text: str = f"processes (default: one for {SAMPLES_A_WORKER:,} samples, at most one a CPU)",
    least: int = 1,
) -> None:
    """`--workers N`, which `text` explains."""
    parser.add_argument("--workers", type=at_least(least), metavar="N", help=text)


def at_least(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of {least} or more, not {text!r}"
            )
        return value

    return number


def every_shard(
    shard_set: ShardSet,
    work: Callable[[ShardSet, int], Result],
    text: str,
    workers: int | None = None,
) -> Iterator[tuple[int, Result]]:
    """(shard number, work(set, shard number)) of each shard, in any order.

    With one worker it runs in this process, else on Ray actors (RAY_ADDRESS names a cluster).
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {workers}")
    numbers = range(len(shard_set.shards))
    enough = min(os.cpu_count() or 1, 1 + shard_set.samples // SAMPLES_A_WORKER)
    count = min(workers or enough, len(numbers))
    make = partial(partial, work, shard_set)  # called once an actor, it gives `work` of that set
    results = None
    if count > 1:
        results = map_on_ray(make, numbers, num_actors=count, min_actors=count)
    shown = bar(shard_set.samples, text, "sample")
    try:
        for number, result in results or map_in_process(make, numbers):
            yield number, result
            shown.update(shard_set.shards[number].samples)
    finally:
        shown.close()
