"""Map a function over items on Ray actors; the only module that imports Ray for mapping.

Ray core instead of Ray Data: our items are shard names whose results are committed by the worker
itself, so all that is needed is an actor pool with restarts, and a poison item must be found out.
"""

import logging
import os
import secrets
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from glipv2.pipeline.errors import ConfigError, PoisonItemError

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
MakeWorker = Callable[[], Callable[[Item], Result]]

MAX_KILLS = 2
"""An item whose actor died this often is taken for the cause and given up."""


def start_ray(num_cpus: int) -> None:
    """Join the cluster that RAY_ADDRESS names, or start a private one on this machine."""
    existing = bool(os.environ.get("RAY_ADDRESS"))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not existing and "ray" not in sys.modules:
        # a private cluster needs a private token, not one that Ray writes into the home folder;
        # Ray reads these at import only
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    if ray.is_initialized():
        return
    own: dict[str, Any] = {
        "num_cpus": max(num_cpus, os.cpu_count() or 1),
        "object_store_memory": 200 << 20,
        "include_dashboard": False,
    }
    try:
        if existing:
            _reach(os.environ["RAY_ADDRESS"])
        ray.init(log_to_driver=False, logging_level=logging.WARNING, **({} if existing else own))
    except (OSError, ValueError) as error:
        if not existing:
            raise
        raise ConfigError(
            f"no Ray cluster can be joined at {os.environ['RAY_ADDRESS']}: {error}; start one with "
            "`ray start --head`, or give no address to run on this machine alone"
        ) from error


def _reach(address: str) -> None:
    """OSError when nothing listens at host:port; Ray itself would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def map_in_process(
    make_worker: MakeWorker[Item, Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    """The same as `map_on_ray` in this process, for debugging and tests."""
    worker = make_worker()
    for item in items:
        yield item, worker(item)


def map_on_ray(
    make_worker: MakeWorker[Item, Result],
    items: Iterable[Item],
    *,
    num_actors: int,
    gpus_per_actor: float = 0.0,
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, result) as they finish, in any order.

    Items are taken when an actor is free for them, so any number of them needs little memory. Each
    actor calls `make_worker()` once. An actor that dies is replaced and its item tried again; an
    exception of the worker ends the map and is raised here. Raises PoisonItemError at the end when
    an item killed MAX_KILLS actors. Workers must be safe to run twice on one item.
    """
    waiting = ((item, 0) for item in items)
    again = deque(islice(waiting, 1))
    """Items to take first, and how many actors each has killed."""
    if not again:
        return
    start_ray(num_actors)
    import ray

    actor_class = _actor_class(gpus_per_actor)
    num_actors = min(num_actors, _room(gpus_per_actor))
    poison: list[str] = []
    idle: list[Any] = []
    running: dict[Any, tuple[Item, int, Any]] = {}
    try:
        while True:
            while len(running) < num_actors:
                again = again or deque(islice(waiting, 1))
                if not again:
                    break
                item, kills = again.popleft()
                actor = idle.pop() if idle else actor_class.remote(make_worker)
                running[actor.work.remote(item)] = (item, kills, actor)
            if not running:
                break
            [done], _ = ray.wait(list(running), num_returns=1)
            item, kills, actor = running.pop(done)
            try:
                result = _result(done)
            except ray.exceptions.RayActorError as error:
                log.warning("a worker died on %s: %s", item, error)
                if kills + 1 < MAX_KILLS:
                    again.append((item, kills + 1))
                else:
                    poison.append(str(item))
                continue
            idle.append(actor)
            yield item, result
    finally:
        for actor in [*idle, *(actor for _, _, actor in running.values())]:
            ray.kill(actor)
    if poison:
        raise PoisonItemError(
            f"workers died {MAX_KILLS} times on: {', '.join(poison)}; all other items are done. "
            "If memory ran out, use fewer actors or smaller batches; else look at these items"
        )


def _result(reference: Any) -> Any:
    """The worker's result, or its own exception."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None


def _room(gpus_per_actor: float) -> int:
    """How many actors the cluster can hold: one that never starts would keep its item for ever."""
    import ray

    resources = ray.cluster_resources()
    room = int(resources.get("CPU", 1))
    if gpus_per_actor:
        room = min(room, int(resources.get("GPU", 0) / gpus_per_actor))
    if room < 1:
        raise ConfigError(
            f"the Ray cluster has no room for an actor with {gpus_per_actor} GPUs: {resources}"
        )
    return room


def _actor_class(gpus_per_actor: float) -> Any:
    import ray

    @ray.remote(num_cpus=1, num_gpus=gpus_per_actor)
    class Actor:
        def __init__(self, make_worker: MakeWorker[Any, Any]) -> None:
            from glipv2.pipeline.dist import die_with_parent

            die_with_parent()
            self.worker = make_worker()

        def work(self, item: Any) -> Any:
            return self.worker(item)

    return Actor
