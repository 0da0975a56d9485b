"""Who scores what, decided by files that any number of schedulers on any machines agree on.

    RUN/eval/schedule/step-000200/SUITE-KEY/0001.json     the first attempt: who makes it
    RUN/eval/schedule/step-000200/SUITE-KEY/0001.beat     rewritten while it lives
    RUN/eval/schedule/step-000200/SUITE-KEY/0001.failed   why it came to nothing

An attempt is made by creating the next number, which succeeds for one only. It has ended when the
result exists, when it failed, or when its maker is dead: known at once where the process can be
looked at, elsewhere by a beat that stays the same for `schedule.claim_seconds` on the clock of
whoever looks, so clocks need not agree. One that takes longer than `schedule.attempt_seconds` is
noted as failed, and its process ends with all stacks told: nothing else stops a thread that hangs.
What decides the figures is in KEY, so other data or settings begin anew.
"""

import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

from glipv2.pipeline import storage
from glipv2.pipeline.errors import StoreError
from glipv2.pipeline.eval_config import ScheduleConfig
from glipv2.pipeline.lease import identity, lives_here
from glipv2.pipeline.watch import HUNG

MAX_DEATHS = 10
"""A job that schedulers died at so often is taken for the cause and given up."""
BEATS = 6
"""In the time after which silence is taken for death."""
State = Literal["ready", "running", "waiting", "failed"]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a job without a result stands."""

    state: State
    """waiting: for the time of its next attempt. failed: given up."""
    last: int = 0
    """The number of the last attempt."""
    told: str = ""
    """Who runs it, or why it failed."""


@dataclass
class Attempts:
    """What one scheduler knows of the attempts of all."""

    settings: ScheduleConfig
    me: dict[str, Any] = field(default_factory=lambda: {**identity(), "token": uuid4().hex})
    heard: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    """Attempt -> its last beat, and when it was first seen."""

    def standing(self, folder: str) -> Standing:
        names = storage.list_names(folder)
        made = sorted(name[:4] for name in names if name.endswith(".json"))
        if not made:
            return Standing(state="ready")
        last, failed = int(made[-1]), [n for n in made if f"{n}.failed" in names]
        if f"{made[-1]}.failed" not in names:
            holder = self._holder(folder, made[-1])
            if holder is None:  # given back at this moment
                return Standing(state="ready", last=last)
            if self._lives(f"{folder}/{made[-1]}", holder):
                told = f"{holder['host']} process {holder['pid']}"
                return Standing(state="running", last=last, told=told)
            if len(made) - len(failed) >= MAX_DEATHS:
                told = f"{MAX_DEATHS} schedulers died at it"
                return Standing(state="failed", last=last, told=told)
            return Standing(state="ready", last=last)
        end = storage.read_json(storage.join(folder, f"{made[-1]}.failed"))
        if len(failed) >= self.settings.attempts:
            return Standing(state="failed", last=last, told=end["reason"])
        again = end["at"] + self.settings.retry_seconds * 2 ** (len(failed) - 1)
        state: State = "waiting" if time.time() < again else "ready"
        return Standing(state=state, last=last, told=end["reason"])

    @contextmanager
    def attempt(self, folder: str, last: int) -> Iterator[bool]:
        """Make the attempt after `last`; False if somebody else does.

        After the body nothing of the attempts is left: the result says it all. An exception in it
        is noted as a failure and goes on; being told to stop is none, and gives the attempt back.
        """
        url = storage.join(folder, f"{last + 1:04d}")
        if not storage.create_once(f"{url}.json", storage.canonical_json(self.me)):
            yield False
            return
        ended = threading.Event()
        thread = threading.Thread(target=self._beat, args=(url, ended), name="beat", daemon=True)
        thread.start()
        try:
            yield True
            for name in storage.list_names(folder):
                storage.delete(storage.join(folder, name))
        except StoreError:  # nothing can be noted, and nothing is wrong with the job
            raise
        except Exception as error:
            _note_failure(url, f"{type(error).__name__}: {error}")
            raise
        except BaseException:
            storage.delete(f"{url}.json")
            raise
        finally:
            ended.set()
            thread.join()
            with suppress(StoreError):
                storage.delete(f"{url}.beat")
            storage.delete_empty(folder)

    def _beat(self, url: str, ended: threading.Event) -> None:
        count, last = 0, time.monotonic() + (self.settings.attempt_seconds or math.inf)
        pause = self.settings.claim_seconds / BEATS
        while not ended.wait(min(pause, max(0.0, last - time.monotonic()))):
            if time.monotonic() >= last:
                self._end_hung(url)
            with suppress(StoreError):  # the next one may come through
                storage.write_bytes(f"{url}.beat", str(count).encode())
            count += 1

    def _end_hung(self, url: str) -> None:
        why = f"no end after {self.settings.attempt_seconds:g} s (schedule.attempt_seconds)"
        print(f"glipv2 schedule: {url}: {why}; run again, it goes on", file=sys.stderr)  # noqa: T201
        faulthandler.dump_traceback(all_threads=True)
        with suppress(StoreError):
            _note_failure(url, why)
        os._exit(HUNG)

    def _holder(self, folder: str, number: str) -> dict[str, Any] | None:
        with suppress(storage.MissingFileError):
            holder: dict[str, Any] = storage.read_json(storage.join(folder, f"{number}.json"))
            return holder
        return None

    def _lives(self, url: str, holder: dict[str, Any]) -> bool:
        if holder["token"] == self.me["token"]:
            return False  # of a body that has ended
        if (here := lives_here(holder)) is not None:
            return here
        beat = b""
        with suppress(storage.MissingFileError):
            beat = storage.read_bytes(f"{url}.beat")
        if self.heard.get(url, (None, 0.0))[0] != beat:
            self.heard[url] = (beat, time.monotonic())
        return time.monotonic() - self.heard[url][1] < self.settings.claim_seconds


def _note_failure(url: str, reason: str) -> None:
    storage.write_json(f"{url}.failed", {"reason": reason[:2000], "at": time.time()})
