"""A watch in every rank: what hangs is found, leaves its stacks, and ends.

A rank says which section of its work it begins; each has a time limit, and so has what a thread
does beside it. When one is passed,
the stacks of all threads are written to RUN/stacks and the process ends with exit code HUNG;
whoever started it (our launcher, torchrun, Ray) starts the ranks again. SIGUSR1 writes the stacks
of a healthy rank. Needs neither the process group nor the main thread.
"""

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from tempfile import TemporaryFile
from types import TracebackType
from typing import Literal

from glipv2.pipeline import storage
from glipv2.pipeline.errors import PreemptedError, UserError
from glipv2.pipeline.train_config import SuperviseConfig

Section = Literal["setup", "data", "step", "save"]
log = logging.getLogger(__name__)

HUNG = 70
"""Exit code of a rank that ended itself because a section took too long."""
LOST_PEER = 71
"""Exit code of a rank whose connection to another one broke: that one is the cause."""
STACKS = "stacks"
TICK = 0.2
LINGER = 2.0
"""Seconds that a hung rank waits before it ends, in which the others write their stacks as well."""
PUBLISH_SECONDS = 20.0
"""What writing stacks to an object store may take."""
BACKUP_SECONDS = 15.0
"""How much later than the limit a rank is ended that runs no Python any more."""


class Watch:
    """`with Watch(...) as watch:` around a rank's work, `watch.begin("save")` inside."""

    def __init__(self, run_dir: str, rank: int, limits: SuperviseConfig) -> None:
        self.folder, self.rank = storage.join(run_dir, STACKS), rank
        self.seconds: dict[Section, float] = {
            "setup": limits.setup_seconds,
            "data": limits.data_seconds,
            "step": limits.step_seconds,
            "save": limits.save_seconds,
        }
        self.current: tuple[Section, float] | None = None  # and until when it may last
        self.other: tuple[Section, float] | None = None
        self.ended = threading.Event()

    def __enter__(self) -> "Watch":
        self.file = TemporaryFile("ab")  # open beforehand: a signal handler can't open any
        self.stacks, self.published = self.file.fileno(), 0
        faulthandler.register(signal.SIGUSR1, file=self.stacks, all_threads=True)
        self.thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.ended.set()
        self.thread.join()
        faulthandler.unregister(signal.SIGUSR1)
        if error is not None and not _is_explained(error):
            self._publish("".join(traceback.format_exception(error)).encode())
        self.file.close()

    def begin(self, section: Section) -> None:
        """What is done from now on is `section`, until the next one begins."""
        self.current = section, time.monotonic() + self.seconds[section]
        # C code that keeps Python's lock would stop the watch's own thread
        later = self.seconds[section] + PUBLISH_SECONDS + BACKUP_SECONDS
        faulthandler.dump_traceback_later(later, exit=True, file=sys.__stderr__ or 2)

    @contextmanager
    def beside(self, section: Section) -> Iterator[None]:
        """Around what another thread does of `section`, whatever the rank itself does meanwhile."""
        self.other = section, time.monotonic() + self.seconds[section]
        try:
            yield
        finally:
            self.other = None

    def _look(self) -> None:
        while not self.ended.wait(TICK):
            if os.fstat(self.stacks).st_size > self.published:
                time.sleep(TICK)  # for the handler to end
                self._publish_new("asked for by SIGUSR1")
            for begun in (self.current, self.other):
                if begun and time.monotonic() > begun[1]:
                    self._end(begun[0])

    def _end(self, section: Section) -> None:
        faulthandler.dump_traceback(self.stacks, all_threads=True)
        limit = f"supervise.{section}_seconds={self.seconds[section]:g}"
        self._publish_new(f"{section} takes more than {limit}")
        time.sleep(LINGER)
        os._exit(HUNG)

    def _publish_new(self, why: str) -> None:
        size = os.fstat(self.stacks).st_size - self.published
        text = os.pread(self.stacks, size, self.published)
        self.published += size
        url = self._publish(f"rank {self.rank}: {why}\n".encode() + text)
        log.error("rank %d: %s; its stacks are in %s", self.rank, why, url)

    def _publish(self, text: bytes) -> str:
        """Write to RUN/stacks, however badly the store does; returns where."""
        now = time.time()
        moment = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}"
        url = storage.join(self.folder, f"rank-{self.rank}-{moment}-{os.getpid()}.txt")

        def write() -> None:
            with suppress(Exception):
                storage.write_bytes(url, text)

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(PUBLISH_SECONDS)
        return url


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    from torch.distributed import DistBackendError, DistNetworkError

    if isinstance(error, DistBackendError | DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def _is_explained(error: BaseException) -> bool:
    """Whether the error says all there is to know without a traceback."""
    told = UserError | PreemptedError | SystemExit | KeyboardInterrupt
    return isinstance(error, told) or lost_peer(error)
