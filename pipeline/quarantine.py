"""Where samples that can't be used are noted: one JSON line each, and a count per reason."""

import json
import logging
import os
from collections import Counter

from glipv2.pipeline import storage
from glipv2.pipeline.errors import BadSample

MAX_DETAIL = 500
log = logging.getLogger(__name__)


def quarantine_line(source: str, shard: str, key: str, bad: BadSample) -> bytes:
    """A sample's line {source, shard, key, reason, detail}."""
    line = {
        "source": source,
        "shard": shard,
        "key": key,
        "reason": bad.reason,
        "detail": bad.detail[:MAX_DETAIL],
    }
    return json.dumps(line).encode() + b"\n"


class Quarantine:
    """Callable as `on_bad`; any number of processes may append to one file at once.

    With a local `path` a `quarantine_line` each goes there; without one, or on an object store,
    which can't append, only this process's counts are kept. It may be pickled: the copy starts
    counting at zero.
    """

    def __init__(self, path: str | None = None) -> None:
        local = path is not None and storage.is_local(path)
        self.path = storage.local_path(path) if local and path else None
        self._counts: Counter[str] = Counter()
        if self.path is not None:
            self._append(b"")  # an empty file says: nothing was skipped

    def __call__(self, source: str, shard: str, key: str, bad: BadSample) -> None:
        self._counts[bad.reason] += 1
        log.warning("skipped %s/%s in %s: %s", source, key, shard, bad)
        if self.path is None:
            return
        self._append(quarantine_line(source, shard, key, bad))

    def counts(self) -> Counter[str]:
        """Reason -> samples: of all processes with a file, of this one without."""
        if self.path is None or not os.path.exists(self.path):
            return Counter(self._counts)
        with open(self.path, encoding="utf-8") as file:
            return Counter(json.loads(line)["reason"] for line in file if line.endswith("\n"))

    def _append(self, line: bytes) -> None:
        assert self.path is not None
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line)  # one write: lines of several processes never mix
        finally:
            os.close(file)

    def __reduce__(self) -> tuple[type["Quarantine"], tuple[str | None]]:
        return Quarantine, (self.path,)
