"""One trainer per run folder: the second one is refused, wherever it runs.

On a local disk the kernel's lock does that, and ends with its process. On an object store it is a
lease: RUN/lease/000001.json says who holds it, RUN/lease/000001.beat is rewritten now and then. A
holder is taken for dead when its beat stays the same for EXPIRES seconds on the clock of whoever
looks, so clocks need not agree; the next number is then created on condition that nobody else has.
A holder that finds a higher number, because it had been stopped for long, ends at once.
"""

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from glipv2.pipeline import storage
from glipv2.pipeline.errors import StoreError, UserError

log = logging.getLogger(__name__)

EXPIRES = 60.0
BEATS = 10.0
"""Seconds between two beats."""


@contextmanager
def only_trainer(run_dir: str, expires: float = EXPIRES, beats: float = BEATS) -> Iterator[None]:
    """Hold the run folder while it is trained in; UserError if somebody else does."""
    if storage.is_local(run_dir):
        with exclusive(run_dir):
            yield
        return
    lease = Lease(storage.join(run_dir, "lease"), expires, beats)
    lease.take()
    try:
        yield
    finally:
        lease.release()


@contextmanager
def exclusive(folder: str) -> Iterator[None]:
    """Hold a local folder by a lock that ends with the process; does nothing on object stores.

    UserError if another process holds it.
    """
    if not storage.is_local(folder):
        yield
        return
    import fcntl

    path = Path(storage.local_path(folder)) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _refusal(folder, file.read().strip() or "another process") from None
        file.truncate(0)
        file.write(_told(identity()))
        file.flush()
        yield


class Lease:
    """The right to write to a run folder of an object store, held by beating."""

    def __init__(self, folder: str, expires: float, beats: float) -> None:
        self.folder, self.expires, self.beats = folder, expires, beats
        self.me = {**identity(), "token": uuid4().hex}
        self.ended = threading.Event()

    def take(self) -> None:
        """Become the holder, if need be after the last one is known to be dead."""
        while True:
            number = self._newest()
            if number:
                self._wait_for_death_of(number)
            self.number = number + 1
            if storage.create_once(self._url(self.number, "json"), storage.canonical_json(self.me)):
                break
        for old in self._numbers():
            if old < self.number:
                self._delete(old)
        self.thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self.thread.start()

    def release(self) -> None:
        self.ended.set()
        self.thread.join()
        with suppress(StoreError):  # it expires anyway
            self._delete(self.number)

    def _wait_for_death_of(self, number: int) -> None:
        """Return once the holder is known to be dead; UserError once it is known to live."""
        holder = self._holder(number)
        if holder is None:
            return
        if (alive := lives_here(holder)) is not None:
            if alive:
                raise _refusal(self.folder.removesuffix("/lease"), _told(holder))
            return
        log.warning(
            "%s: waiting %.0f seconds to see whether it is still in use by %s",
            self.folder, self.expires, _told(holder),
        )  # fmt: skip
        beat, deadline = self._last_beat(number), time.monotonic() + self.expires
        while time.monotonic() < deadline:
            time.sleep(self.beats / 4)
            if self._holder(number) is None:
                return
            if self._last_beat(number) != beat:
                raise _refusal(self.folder.removesuffix("/lease"), _told(holder))

    def _beat(self) -> None:
        count = 0
        while True:
            with suppress(StoreError):  # nobody can take it over from a store that fails
                storage.write_bytes(self._url(self.number, "beat"), str(count).encode())
                if not self._is_mine():
                    print(  # noqa: T201
                        f"glipv2: {self.folder} was taken over by another trainer after this one "
                        "had given no sign of life; this one ends",
                        file=sys.stderr,
                    )
                    os._exit(2)
            count += 1
            if self.ended.wait(self.beats):
                return

    def _is_mine(self) -> bool:
        return self._newest() == self.number and self._holder(self.number) == self.me

    def _numbers(self) -> list[int]:
        names = storage.list_names(self.folder)
        return sorted(int(name[:-5]) for name in names if name.endswith(".json"))

    def _newest(self) -> int:
        return max(self._numbers(), default=0)

    def _holder(self, number: int) -> dict[str, Any] | None:
        with suppress(storage.MissingFileError):
            holder: dict[str, Any] = storage.read_json(self._url(number, "json"))
            return holder
        return None

    def _last_beat(self, number: int) -> bytes:
        with suppress(storage.MissingFileError):
            return storage.read_bytes(self._url(number, "beat"))
        return b""

    def _delete(self, number: int) -> None:
        for kind in ("json", "beat"):
            storage.delete(self._url(number, kind))

    def _url(self, number: int, kind: str) -> str:
        return storage.join(self.folder, f"{number:06d}.{kind}")


def _refusal(folder: str, holder: str) -> UserError:
    return UserError(
        f"{folder} is in use by another process ({holder}); wait for it, stop it, or choose "
        "another run_dir"
    )


def identity() -> dict[str, Any]:
    """Who this process is, for people and for `lives_here`."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "processes_of": _process_space(),
        "started": _start_time(os.getpid()),
    }


def _told(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']} since {holder['since']}"


def lives_here(holder: dict[str, Any]) -> bool | None:
    """Whether the holder lives; None when it is of another machine or container."""
    if not holder["processes_of"] or holder["processes_of"] != _process_space():
        return None
    return _start_time(holder["pid"]) == holder["started"]


def _process_space() -> str:
    """What tells this boot and container from others: a process number means nothing elsewhere."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """Clock ticks from boot to the start of a process; empty when it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
