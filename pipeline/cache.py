"""A folder on the local disk that keeps what was read from an object store.

Entries are whole or absent (written aside, then renamed), named by what they hold, and the oldest
go first when the folder outgrows its limit; any number of processes may share it, and a kill leaves
nothing that hurts.
"""

import contextlib
import logging
import os
import tempfile
from pathlib import Path

from glipv2.pipeline import storage
from glipv2.pipeline.errors import ConfigError, is_disk_full

KEEP = 0.9
"""Share of the limit, or of what it held on a full disk, that is left after old entries went."""
SCAN_SHARE = 0.02
"""Share of the limit that one process writes between two looks at the folder."""
log = logging.getLogger(__name__)


class RangeCache:
    """Byte ranges of remote files, at most `limit` bytes of them."""

    def __init__(self, folder: str, limit: int) -> None:
        self.folder = Path(storage.local_path(folder))
        self.limit = limit
        self._unscanned = limit  # so that the first write looks
        self._warned = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"data.cache={folder} can't be a folder of this machine: {error}"
            ) from error

    def read(self, url: str, start: int, end: int, version: str) -> bytes:
        """Bytes [start, end) of the file as its `version` (a checksum) has them."""
        path = self._path(url, start, end, version)
        with contextlib.suppress(OSError):
            data = path.read_bytes()
            if len(data) == end - start:
                os.utime(path)
                return data
        data = storage.read_bytes(url, start, end)
        if len(data) == end - start:
            self._keep(path, data)
        return data

    def forget(self, url: str, start: int, end: int, version: str) -> None:
        """Remove an entry that turned out to be damaged."""
        self._path(url, start, end, version).unlink(missing_ok=True)

    def _path(self, url: str, start: int, end: int, version: str) -> Path:
        return self.folder / storage.digest([url, start, end, version])

    def _keep(self, path: Path, data: bytes) -> None:
        """A full disk or a lost folder costs the entry, never the run."""
        try:
            handle, attempt = tempfile.mkstemp(prefix=".attempt-", dir=self.folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                os.replace(attempt, path)
            except BaseException:
                os.unlink(attempt)
                raise
        except OSError as error:
            if not self._warned:
                log.warning("%s: not all that is read is kept (%s)", self.folder, error)
            self._warned = True
            if is_disk_full(error):
                self._shrink(full=True)
            return
        self._unscanned += len(data)
        if self._unscanned > SCAN_SHARE * self.limit:
            self._unscanned = 0
            self._shrink()

    def _shrink(self, full: bool = False) -> None:
        """Remove the entries that were not used for longest, and attempts that a kill left.

        On a full disk some go even within the limit, for the next one to have room.
        """
        entries = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):  # another process removes as well
                status = entry.stat()
                entries.append((status.st_mtime, status.st_size, entry.path))
        total = sum(size for _, size, _ in entries)
        if total <= self.limit and not full:
            return
        rest = KEEP * min(total, self.limit)
        for _, size, path in sorted(entries):
            if total <= rest:
                return
            Path(path).unlink(missing_ok=True)
            total -= size
