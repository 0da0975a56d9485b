"""How the benchmarks take and print their figures."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path


def seconds(*works: Callable[[], object], repeats: int = 5, warm_up: bool = True) -> list[float]:
    """Median processor time of one call of each, taken in turns."""
    for work in works if warm_up else ():
        work()
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for taken, work in zip(times, works, strict=True):
            start = time.process_time()
            work()
            taken.append(time.process_time() - start)
    return [statistics.median(taken) for taken in times]


def peak_memory() -> float:
    """MiB that this process has had resident at most: not `ru_maxrss`, which begins with that of
    the process that started this one."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) / 1024


def row(name: str, ours: float, peer: float, peer_name: str, unit: str = "s") -> None:
    print(  # noqa: T201
        f"{name:52s} {ours:9.4f} {unit}   {peer / ours:6.2f} x {peer_name}", flush=True
    )


def note(name: str, value: str) -> None:
    print(f"{name:52s} {value}", flush=True)  # noqa: T201
