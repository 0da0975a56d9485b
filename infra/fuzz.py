"""Random and damaged input for everything that reads what strangers wrote.

    python infra/fuzz.py --minutes 60 --seed 1      all targets in turn; exit code 1 on any failure
                                                    (minutes of CPU, so that load doesn't matter)
    python infra/fuzz.py --replay runs/fuzz/FILE    one failure again, with its traceback

A case is bytes, made from (seed, target, number) alone. It fails on an exception that is not
documented, a result that breaks the rules of a record, CASE_SECONDS of CPU, or MAX_RSS of memory.
"""

import argparse
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fuzz_targets import TARGETS

CASE_SECONDS = 2.0
MAX_RSS = 10**9
NOTE_EVERY = 300.0
"""Seconds of CPU between two interim tables."""
MAX_FAILURES = 20
"""Kept of each target; more would be the same mistake again."""


class TooSlow(BaseException):
    """No Exception, so that nothing takes it for a bad input."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Random and damaged input for all readers.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=tuple(TARGETS), action="append")
    parser.add_argument("--out", default="runs/fuzz", help="folder of what failed")
    parser.add_argument("--replay", metavar="FILE")
    arguments = parser.parse_args()
    if arguments.replay:
        path = Path(arguments.replay)
        TARGETS[path.name.split("-")[0]].check(path.read_bytes())
        print(f"{path}: fine")  # noqa: T201
        return 0
    targets = arguments.target or list(TARGETS)
    cases, failures = fuzz(targets, arguments.seed, arguments.minutes * 60, arguments.out)
    print_table(targets, arguments.seed, cases, failures)
    return 1 if failures.total() else 0


def fuzz(
    targets: list[str], seed: int, seconds: float, out: str
) -> tuple[Counter[str], Counter[str]]:
    """Cases and failures of each target, which share the time equally; failures go to `out`."""
    cases, failures = Counter[str](), Counter[str]()
    spent = dict.fromkeys(targets, 0.0)
    begun = noted = start = time.process_time()
    while start < begun + seconds:
        name = min(targets, key=lambda target: spent[target])
        data = TARGETS[name].make(random.Random(f"{seed}/{name}/{cases[name]}"))
        error = failure_of(name, data)
        start, before = time.process_time(), start
        spent[name] += start - before
        if error:
            failures[name] += 1
            if failures[name] <= MAX_FAILURES:
                keep(Path(out), f"{name}-{seed}-{cases[name]}", data, error)
        cases[name] += 1
        if peak_rss() > MAX_RSS:  # the peak never falls again, so no later case could be judged
            break
        if start > noted + NOTE_EVERY:
            print_table(targets, seed, cases, failures)
            noted = start
    return cases, failures


def print_table(targets: list[str], seed: int, cases: Counter[str], failures: Counter[str]) -> None:
    for name in targets:
        print(f"{name:12s} {cases[name]:9d} cases {failures[name]:4d} failures")  # noqa: T201
    minutes, peak = time.process_time() / 60, peak_rss() / 1e6
    print(f"seed {seed}, {minutes:.1f} CPU min, peak {peak:.0f} MB", flush=True)  # noqa: T201


def failure_of(name: str, data: bytes) -> str:
    """What is wrong with the reader's answer to one case; empty when nothing is."""
    try:
        with cpu_limit(CASE_SECONDS):
            TARGETS[name].check(data)
    except (Exception, TooSlow):
        return traceback.format_exc()
    return f"{peak_rss() / 1e6:.0f} MB in memory" if peak_rss() > MAX_RSS else ""


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """TooSlow after so much CPU time of this process: other work on the machine doesn't count."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def keep(folder: Path, name: str, data: bytes, error: str) -> None:
    """The bytes and the traceback of a failure."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.bin").write_bytes(data)
    (folder / f"{name}.txt").write_text(error)
    said = f"FAILED {name}: {error.strip().splitlines()[-1][:200]}"
    print(f"{said}\n  replay: python infra/fuzz.py --replay {folder / name}.bin")  # noqa: T201
    sys.stdout.flush()


def peak_rss() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
