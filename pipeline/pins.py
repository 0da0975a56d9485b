"""Pins: checkpoints that retention must keep, because somebody reads them or they are the best.

RUN/pins/NAME.json is {"step", "until"}: seconds since 1970, or null for a pin without end. Anybody
may write one, on any machine; a trainer that prunes its checkpoints looks at them first.
"""

import logging
import time
from collections.abc import Mapping

from glipv2.pipeline import storage
from glipv2.pipeline.errors import DataError

log = logging.getLogger(__name__)


def pin(run_dir: str, name: str, step: int, seconds: float | None = None) -> None:
    """Keep a step, for so many seconds from now or without end; replaces the pin of that name.

    A step that is being pruned at this moment may be gone all the same: look for it afterwards.
    """
    until = None if seconds is None else time.time() + seconds
    storage.write_json(_url(run_dir, name), {"step": step, "until": until})


def unpin(run_dir: str, name: str) -> None:
    storage.delete(_url(run_dir, name))


def pins(run_dir: str) -> Mapping[str, int]:
    """Name -> step of the pins that hold now; one that can't be read holds nothing."""
    found = {}
    for file in storage.list_names(storage.join(run_dir, "pins")):
        name, dot, kind = file.rpartition(".")
        if not dot or kind != "json":
            continue
        try:
            entry = storage.read_json(_url(run_dir, name))
            step, until = int(entry["step"]), entry["until"]
            if until is None or float(until) > time.time():
                found[name] = step
        except storage.MissingFileError:
            continue
        except (DataError, KeyError, TypeError, ValueError) as error:
            log.warning("%s is no pin, so it keeps nothing: %s", _url(run_dir, name), error)
    return found


def _url(run_dir: str, name: str) -> str:
    return storage.join(run_dir, "pins", f"{name}.json")
