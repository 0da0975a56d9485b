"""The same training as a Ray Train job: its ranks are actors anywhere in a cluster.

Ray starts the ranks again when one dies, also with fewer of them when nodes are lost and
supervise.min_processes allows it; they go on from our own checkpoints, so Ray keeps none. When a
node is to be drained (Ray's word for a machine that will be taken away) the ranks save at once.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from glipv2.pipeline import dist, preemption
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.errors import PreemptedError, RankFailedError, UserError, is_disk_full
from glipv2.pipeline.launch import newest_step
from glipv2.pipeline.loader import lane_count
from glipv2.pipeline.ray_cluster import actor_here, start_ray

log = logging.getLogger(__name__)

POLL = 1.0
"""Seconds between two questions of the first rank whether the job is to stop, or a node to go."""


def train_on_ray(config: RunConfig) -> None:
    """Train to the last step on a Ray cluster; every node must reach the same paths.

    Raises what `launch_ranks` does, for the same reasons.
    """
    start_ray(config.train.processes * config.train.threads, show_workers=True)
    import ray
    from ray.train import TrainingFailedError

    ends = actor_here(_Ends)
    failure: Exception | None = None
    with TemporaryDirectory(prefix="glipv2-ray-train-") as folder, _signals_to(ends):
        progress = True
        while progress:
            before, failure = newest_step(config), None
            try:
                _job(config, ends, folder).fit()
            except TrainingFailedError as error:
                failure = error
            step = newest_step(config)
            over = step == config.train.steps or ray.get(ends.first.remote()) is not None
            progress = not over and (failure is None or step > before)
            if progress:  # Ray counts all failures, we those since the newest checkpoint
                why = "a node is to go" if failure is None else _last_line(failure)
                log.warning("going on from step %d after: %s", step, why)
    end = ray.get(ends.first.remote())
    if end is not None:
        raise end
    if failure is not None:
        raise RankFailedError(
            f"the ranks failed more than {config.supervise.max_restarts} times since step "
            f"{newest_step(config)} (supervise.max_restarts), the last time with: "
            f"{_last_line(failure)}. Run the same command again to go on"
        ) from failure


def _job(config: RunConfig, ends: Any, folder: str) -> Any:
    """The TorchTrainer; `folder` takes what Ray notes, which nothing of ours reads."""
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as JobConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            """Not Ray's, which drops the steps since the last checkpoint."""

        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            if self.scaling_config.elasticity_enabled:
                parts["scaling_policy"] = scaling_policy(self.scaling_config, world_sizes(config))
            return super()._initialize_and_run_controller(**parts)

    supervise, processes = config.supervise, config.train.processes
    gpus = {"GPU": supervise.gpus_per_process} if supervise.gpus_per_process else {}
    least = supervise.min_processes
    return Trainer(
        _rank,
        train_loop_config={"config": config, "ends": ends, "folder": os.getcwd()},
        scaling_config=ScalingConfig(
            num_workers=(least, processes) if least else processes,
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": config.train.threads, **gpus},
        ),
        torch_config=TorchConfig(timeout_s=int(dist.COLLECTIVE_TIMEOUT.total_seconds())),
        run_config=JobConfig(
            name=uuid4().hex,
            storage_path=folder,
            failure_config=FailureConfig(max_failures=supervise.max_restarts),
        ),
    )


def world_sizes(config: RunConfig) -> list[int]:
    """The numbers of ranks that may run, falling: those that can share batch and lanes equally."""
    train, most = config.train, config.train.processes
    lanes = lane_count(config.data, train.global_batch, most)
    return [
        size
        for size in range(most, (config.supervise.min_processes or most) - 1, -1)
        if lanes % size == 0 and train.global_batch % (size * train.accumulation) == 0
    ]


def scaling_policy(scaling: Any, sizes: Sequence[int]) -> Any:
    """Ray's elastic policy, which would start any number of ranks that there is room for."""
    from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

    class Policy(ElasticScalingPolicy):
        def _count_possible_workers(self, reserved_resources: Any) -> int:
            room = super()._count_possible_workers(reserved_resources)
            return next((size for size in sizes if size <= room), 0)

    return Policy(scaling)


class _Ends:
    """An actor that ranks tell how they ended, where starting them again would not help."""

    def __init__(self) -> None:
        self.end: Exception | None = None
        self.told = False

    def note(self, end: Exception) -> None:
        self.end = self.end or end

    def first(self) -> Exception | None:
        return self.end

    def tell(self) -> None:
        self.told = True

    def told_to_stop(self) -> bool:
        return self.told


def _rank(job: dict[str, Any]) -> None:
    """One worker of the job."""
    import ray
    import torch

    from glipv2.pipeline.trainer import train

    ends = job["ends"]
    if ray.get(ends.first.remote()) is not None:
        return  # started again though all is said
    if os.path.isdir(job["folder"]):
        os.chdir(job["folder"])  # where relative paths of the recipe begin
    if torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = str(ray.train.torch.get_device().index)
    if dist.is_main():
        threading.Thread(target=_listen_to, args=(ends,), daemon=True).start()
    try:
        train(job["config"])
    except PreemptedError as error:
        if ray.get(ends.told_to_stop.remote()):
            ray.get(ends.note.remote(error))
    except UserError as error:
        ray.get(ends.note.remote(error))
    except OSError as error:
        if not is_disk_full(error):
            raise
        ray.get(ends.note.remote(error))


def _listen_to(ends: Any) -> None:
    """Until the job is told to stop, or a node of it to go: the rank is told then."""
    import ray
    from ray.train.v2._internal.execution.context import get_train_context

    # ray.train.get_preemption_info would make all ranks wait for each other in every step
    notice = get_train_context().preemption_context
    while notice.preemption_info is None and not ray.get(ends.told_to_stop.remote()):
        time.sleep(POLL)
    preemption.ask()


@contextmanager
def _signals_to(ends: Any) -> Iterator[None]:
    """The first signal that tells this process to stop is passed on, the second one obeyed."""
    told: list[int] = []

    def handle(number: int, _: Any) -> None:
        told.append(number)
        if len(told) > 1:
            raise KeyboardInterrupt
        ends.tell.remote()

    before = {number: signal.signal(number, handle) for number in preemption.SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
