"""Start the ranks of a pretraining run on this machine, when no launcher has done so."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glipv2.pipeline import storage
from glipv2.pipeline.errors import UserError

LAUNCHER = "GLIPV2_LAUNCHER"
"""Environment variable with the process number of the launcher, for the ranks it starts."""


def under_launcher() -> bool:
    """torchrun, deepspeed and Ray Train all set WORLD_SIZE for their ranks."""
    return "WORLD_SIZE" in os.environ


class RankFailedError(Exception):
    """A rank ended abnormally; the command can be run again and goes on from its checkpoint."""


def launch_ranks(arguments: list[str], processes: int, threads: int) -> None:
    """Run `python -m glipv2.jobs.cli ARGUMENTS` on `processes` ranks and wait for them.

    Raises UserError when a rank ended with exit code 2 (it has printed why), else RankFailedError.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ[LAUNCHER] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="glipv2",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
    )
    try:
        elastic_launch(config, sys.executable)("-m", "glipv2.jobs.cli", *arguments)
    except SignalException as signal:
        raise RankFailedError(
            f"stopped by signal {signal.sigval.name}; run the same command again to go on"
        ) from None
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if 2 in codes:
            raise UserError("pretraining stopped; the reason is printed above") from None
        code, failure = error.get_first_failure()
        raise RankFailedError(
            f"rank {code} ended with exit code {failure.exitcode}; "
            "run the same command again to go on from the last checkpoint"
        ) from None
    finally:
        del os.environ[LAUNCHER]  # what this process starts later has another parent


@contextmanager
def exclusive(run_dir: str) -> Iterator[None]:
    """Hold the run folder: a second trainer on the same local folder is refused.

    The lock is the kernel's, so it ends with the process, however that dies.
    """
    if not storage.is_local(run_dir):
        yield
        return
    import fcntl

    folder = Path(storage.local_path(run_dir))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{run_dir} is in use by another process; wait for it, stop it, or choose "
                "another run_dir"
            ) from None
        yield
