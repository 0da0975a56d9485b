"""What the stages share, run one by one or as the main job: arguments, configuration, time."""

import argparse
import contextlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from glipv2.pipeline import storage
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.config_loader import load_config
from glipv2.pipeline.errors import StoreError

OVERRIDES = (
    "section.key=value, applied last; section={...} changes the settings it names, but the {...} "
    "of a key that holds names of your own (label.inputs, data.mixture, ...) replaces all of them"
)
TICK = 5.0
"""Seconds between two notes of a running stage's time: what a kill may lose."""


def add_recipe_arguments(
    parser: argparse.ArgumentParser, *, phase: str = "", cluster: bool = False
) -> None:
    """RECIPE and its overrides; with `phase`, the help of --phase; with `cluster`, --address."""
    parser.add_argument("recipe", help="YAML file, see infra/recipes/")
    parser.add_argument("overrides", nargs="*", default=[], help=OVERRIDES)
    if phase:
        parser.add_argument("--phase", help=phase)
    if cluster:
        parser.add_argument(
            "--address", help="Ray cluster to run on: auto (this machine's) or HOST:6379"
        )


def recipe_config(arguments: argparse.Namespace, phase: str | None = None) -> RunConfig:
    """The configuration that the arguments name, of the whole run or of a phase."""
    return load_config(arguments.recipe, arguments.overrides, phase)


def use_cluster(address: str | None) -> None:
    """Let Ray join the cluster at `address`, where one is given.

    auto is that of a submitted job, else this machine's.
    """
    if address == "auto":  # of several clusters on a machine Ray would take the newest
        os.environ["RAY_ADDRESS"] = os.environ.get("RAY_ADDRESS") or address
    elif address:
        os.environ["RAY_ADDRESS"] = address


@contextmanager
def stage(run_dir: str, name: str) -> Iterator[None]:
    """Note in RUN/seconds/NAME.json how long a stage takes, over all attempts together.

    A killed attempt counts to within TICK. A stage once completed keeps its figure when it is run
    again.
    """
    url = storage.join(run_dir, "seconds", f"{name}.json")
    known = storage.read_json(url) if storage.exists(url) else {"seconds": 0.0, "done": False}
    if known["done"]:
        yield
        return
    started = time.monotonic()

    def note(done: bool) -> None:
        seconds = known["seconds"] + time.monotonic() - started
        storage.write_json(url, {"seconds": round(seconds, 1), "done": done})

    ended = threading.Event()

    def note_now_and_then() -> None:
        while not ended.wait(TICK):
            with contextlib.suppress(OSError, StoreError):  # for the stage itself to report
                note(done=False)

    clock = threading.Thread(target=note_now_and_then, daemon=True)
    clock.start()

    def end(done: bool) -> None:
        ended.set()
        clock.join()
        note(done)

    try:
        yield
    except StoreError:  # a note would wait as long again for a store that fails
        ended.set()
        raise
    except BaseException:
        end(done=False)
        raise
    end(done=True)


def stage_seconds(run_dir: str, names: list[str]) -> dict[str, float]:
    """Stage -> seconds, in the order of `names`; stages that were never run are left out."""
    urls = {name: storage.join(run_dir, "seconds", f"{name}.json") for name in names}
    return {n: storage.read_json(url)["seconds"] for n, url in urls.items() if storage.exists(url)}
