"""Start the ranks of a pretraining run on this machine, and start them again when they die.

Each rank is a process in a session of its own, so that the terminal's ctrl-C reaches the launcher
only, and a rank's loader processes are killed with it. The launcher holds the store through which
the ranks find each other. It knows no more of a rank than how it ended.
"""

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from glipv2.pipeline import preemption, storage
from glipv2.pipeline.checkpoint import committed_steps
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.errors import DISK_FULL, PreemptedError, RankFailedError, UserError
from glipv2.pipeline.watch import HUNG, LOST_PEER, STACKS

log = logging.getLogger(__name__)

LAUNCHER = "GLIPV2_LAUNCHER"
"""Environment variable with the process number of the launcher, for the ranks it starts."""
USER_ERROR, STORE_FAILED = 2, 3
"""Exit codes of a rank that would only end in the same way if it were started again."""
LINGER = 4.0
"""Seconds that ranks get to end by themselves when one has failed, and say why."""
LOOK = 1.0
"""Seconds between two looks for ranks that somebody has stopped."""
WATCHES_FIRST = 5.0
"""Seconds that the watches of the other ranks get to notice a stopped one before it is woken."""
RESTARTS = "restarts.jsonl"


def under_launcher() -> bool:
    """torchrun, deepspeed, Slurm scripts and our own launcher set WORLD_SIZE for their ranks."""
    return "WORLD_SIZE" in os.environ


def has_our_launcher() -> bool:
    """Whether this process is a rank of a launcher that holds the run folder already."""
    return LAUNCHER in os.environ


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Ended:
    """How a rank ended: exit code, or minus the number of the signal that killed it."""

    rank: int
    code: int

    def __str__(self) -> str:
        if self.code < 0:
            return f"rank {self.rank} was killed by {signal.Signals(-self.code).name}"
        why = {HUNG: " (it hung)", LOST_PEER: " (it lost another rank)"}.get(self.code, "")
        return f"rank {self.rank} ended with exit code {self.code}{why}"


def launch_ranks(command: list[str], config: RunConfig) -> None:
    """Run a command as train.processes ranks until they are done.

    Raises UserError when a rank ended with exit code 2 (it has printed why), PreemptedError when
    the ranks were told to stop and have saved, OSError when a disk is full, RankFailedError when
    they keep dying.
    """
    limit, restarts, newest = config.supervise.max_restarts, 0, newest_step(config)
    with _signals_as_events() as events:
        for attempt in count():
            ended = _attempt(command, config, attempt, events)
            if ended is None:
                return
            step = newest_step(config)
            restarts = 1 if step > newest else restarts + 1
            newest = step
            _note(config.run_dir, ended, step)
            if restarts > limit:
                raise RankFailedError(
                    f"{ended}, for the {_ordinal(restarts)} time since the checkpoint of step "
                    f"{step} (supervise.max_restarts={limit}); {_where_to_look(config.run_dir)}. "
                    "Run the same command again to go on"
                )
            log.warning(
                "%s; starting all ranks again from step %d (restart %d of %d without progress)",
                ended, step, restarts, limit,
            )  # fmt: skip


def _attempt(
    command: list[str], config: RunConfig, attempt: int, events: "SimpleQueue[Any]"
) -> Ended | None:
    """Run all ranks once, until none is left: None when they are done, or who failed first."""
    from torch.distributed import TCPStore

    world_size = config.train.processes
    store = TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(config.train.threads),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        LAUNCHER: str(os.getpid()),
    }
    ranks = _Ranks(events, config.supervise.step_seconds)
    try:
        for rank in range(world_size):
            ranks.start(command, environment, rank)
        ended, told = ranks.attend(config.supervise.grace_seconds)
    finally:
        ranks.kill()
    return _verdict(ended, told, world_size)


@dataclass
class _Ranks:
    """The processes of one attempt."""

    events: "SimpleQueue[Any]"
    longest_stop: float
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    stopped_since: dict[int, float] = field(default_factory=dict)

    def start(self, command: list[str], environment: dict[str, str], rank: int) -> None:
        """Rank 0 has the terminal; what the others say is passed on under their number."""
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if rank else {}
        process = subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            **quiet,  # type: ignore[call-overload]
        )
        self.processes.append(process)
        if rank:
            threading.Thread(target=_pass_on, args=(process, rank), daemon=True).start()
        waiter = threading.Thread(target=self._wait, args=(process, rank), daemon=True)
        waiter.start()

    def _wait(self, process: "subprocess.Popen[bytes]", rank: int) -> None:
        code = process.wait()
        self.events.put((process, Ended(rank, code)))

    def attend(self, grace: float) -> tuple[list[Ended], signal.Signals | None]:
        """(how ranks ended, in that order; the signal that told the launcher to stop).

        Returns when all have ended, or when those that are left have had their time to.
        """
        ended: list[Ended] = []
        told: signal.Signals | None = None
        deadline = float("inf")
        while len(ended) < len(self.processes) and time.monotonic() < deadline:
            try:
                event = self.events.get(timeout=min(LOOK, max(0, deadline - time.monotonic())))
            except Empty:
                self._wake_stopped()
                continue
            if isinstance(event, signal.Signals):
                if told is not None:  # told twice: no more waiting
                    self.kill()
                    raise KeyboardInterrupt
                told, deadline = event, time.monotonic() + grace
                self._send(signal.SIGTERM)
            elif event[0] in self.processes:  # and not left from an earlier attempt
                ended.append(event[1])
                wait = grace if event[1].code in (0, preemption.EXIT_CODE) else LINGER
                deadline = min(deadline, time.monotonic() + wait)
                if event[1].code == HUNG:
                    self._send(signal.SIGUSR1)  # writes their stacks
                    self._send(signal.SIGCONT)  # also of those that were stopped
        return ended, told

    def kill(self) -> None:
        """No process of any rank is left afterwards."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def _send(self, number: signal.Signals) -> None:
        for process in self.processes:
            process.send_signal(number)

    def _wake_stopped(self) -> None:
        """Continue ranks that have been stopped for too long: their watch ends them then."""
        for process in self.processes:
            if not _is_stopped(process.pid):
                self.stopped_since.pop(process.pid, None)
                continue
            since = self.stopped_since.setdefault(process.pid, time.monotonic())
            if time.monotonic() - since > self.longest_stop + WATCHES_FIRST:
                process.send_signal(signal.SIGCONT)


def _verdict(ended: list[Ended], told: signal.Signals | None, world_size: int) -> Ended | None:
    """None when all is done, the rank to blame when the ranks are to be started again."""
    codes = [end.code for end in ended]
    if USER_ERROR in codes:
        raise UserError("pretraining stopped; the reason is printed above")
    if codes == [0] * world_size:
        return None
    if codes == [preemption.EXIT_CODE] * world_size:
        raise PreemptedError(
            "stopped as told to; the checkpoint of the last step is committed. Run the same "
            "command again to go on"
        )
    if told is not None:
        raise RankFailedError(
            f"stopped by {told.name} before all ranks had saved; run the same command again to go "
            "on from the last checkpoint"
        )
    failed = [end for end in ended if end.code not in (0, preemption.EXIT_CODE)]
    if not failed:  # the others did not come to their end
        return Ended(next(r for r in range(world_size) if r not in {e.rank for e in ended}), HUNG)
    if DISK_FULL in codes:
        raise OSError(errno.ENOSPC, "a rank could not write, for the reason printed above")
    if STORE_FAILED in codes:
        raise RankFailedError("pretraining stopped; the reason is printed above")
    return next((end for end in failed if end.code != LOST_PEER), failed[0])


@contextmanager
def _signals_as_events() -> Iterator["SimpleQueue[Any]"]:
    """Signals that tell this process to stop become events, among the ends of ranks."""
    events: SimpleQueue[Any] = SimpleQueue()
    before = {
        number: signal.signal(number, lambda number, _: events.put(signal.Signals(number)))
        for number in preemption.SIGNALS
    }
    try:
        yield events
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_on(process: "subprocess.Popen[bytes]", rank: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        sys.stderr.write(f"[rank {rank}] {line.decode(errors='replace')}")
        sys.stderr.flush()


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def newest_step(config: RunConfig) -> int:
    """The newest step with a commit record, 0 without any."""
    return max(committed_steps(config.run_dir), default=0)


def _note(run_dir: str, ended: Ended, step: int) -> None:
    """Add a line to RUN/restarts.jsonl: what died when, and the step that is gone on from."""
    url = storage.join(run_dir, RESTARTS)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    entry = {"time": now, "rank": ended.rank, "code": ended.code, "what": str(ended), "step": step}
    lines = [*storage.read_json_lines(url), entry]
    storage.write_bytes(url, b"".join(storage.canonical_json(line) + b"\n" for line in lines))


def _where_to_look(run_dir: str) -> str:
    return f"see {storage.join(run_dir, STACKS)}/ and {storage.join(run_dir, RESTARTS)}"


def _ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")
