"""Logs of a run by step: RUN/losses.jsonl without clock times, so that runs can be compared,
RUN/metrics.jsonl with them, and RUN/samples.jsonl with the samples of each step.

After a kill a log is cut back to the step that training resumes from.
"""

import json
from collections.abc import Mapping
from typing import Any

from glipv2.pipeline import storage

LOSSES, METRICS, SAMPLES = "losses.jsonl", "metrics.jsonl", "samples.jsonl"


class StepLog:
    """Appended line by line on a local disk; an object store gets the whole file at `flush`."""

    def __init__(self, run_dir: str, first_step: int, name: str = LOSSES) -> None:
        self.url = storage.join(run_dir, name)
        known = storage.read_json_lines(self.url)
        self.lines = [_line(entry) for entry in known if entry["step"] < first_step]
        self.flush()

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        line = _line({"step": step, **values})
        self.lines.append(line)
        if storage.is_local(self.url):
            with open(storage.local_path(self.url), "ab", buffering=0) as file:
                file.write(line)

    def flush(self) -> None:
        """Make all lines so far durable."""
        storage.write_bytes(self.url, b"".join(self.lines))


def read_losses(run_dir: str) -> list[dict[str, Any]]:
    """The entries of a run's log; a last line cut off by a kill is left out."""
    return storage.read_json_lines(storage.join(run_dir, LOSSES))


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"
