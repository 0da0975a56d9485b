"""Joining a Ray cluster, or starting a private one on this machine."""

import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from glipv2.pipeline.errors import ConfigError

START_ONE = "start one with `ray start --head`, or give no address to run on this machine alone"
GIVE_TOKEN = (
    "if it runs it may want its token, which Ray takes, with RAY_AUTH_MODE=token, from "
    "RAY_AUTH_TOKEN or ~/.ray/auth_token"
)
"""Ray itself only says that it can't connect."""


def start_ray(num_cpus: int, show_workers: bool = False, gpus_per_actor: float = 0.0) -> None:
    """Join the cluster that RAY_ADDRESS names, or start a private one on this machine.

    A private one has as many CPUs as the machine, or `num_cpus` if those are more: what can't be
    done with fewer. With `show_workers` what workers print appears here as well. ConfigError where
    a private one would have no room for an actor's GPUs.
    """
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
    if gpus_per_actor and not existing:
        _check_gpus(gpus_per_actor)
    own: dict[str, Any] = {
        "address": "local",  # Ray would join what somebody has started on this machine
        "num_cpus": max(num_cpus, os.cpu_count() or 1),
        "object_store_memory": 200 << 20,
        "include_dashboard": False,
    }
    cure = START_ONE
    try:
        if existing:
            _reach(os.environ["RAY_ADDRESS"])
            cure = f"{GIVE_TOKEN}; else {START_ONE}"
        with _time_to_stop():
            ray.init(
                log_to_driver=show_workers,
                logging_level=logging.WARNING,
                **({} if existing else own),
            )
    except (OSError, ValueError, ray.exceptions.AuthenticationError) as error:
        if not existing:
            raise
        raise ConfigError(
            f"no Ray cluster can be joined at {os.environ['RAY_ADDRESS']}: {error}; {cure}"
        ) from error


def _check_gpus(per_actor: float) -> None:
    """What Ray would only tell after the seconds that it takes to start."""
    import torch  # slow as well, and not asked of who wants no GPU

    if per_actor > (here := torch.cuda.device_count()):
        raise ConfigError(
            f"this machine has {here} GPUs, too few for an actor with {per_actor:g}: ask for fewer "
            "(0 works on CPUs), or give the address of a Ray cluster that has them"
        )


@contextmanager
def _time_to_stop() -> Iterator[None]:
    """SIGTERM afterwards does what it did before, or else what Ray's Python side makes of it.

    Ray's other side puts a handler before these, which aborts a process that has not ended three
    seconds later.
    """
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        own = before if callable(before) else signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, own)


def _reach(address: str) -> None:
    """OSError when nothing listens at host:port; Ray itself would go on trying for minutes."""
    if address.startswith(("http://", "https://")):
        raise OSError("that is a dashboard, for `glipv2 submit`; a stage takes auto or HOST:6379")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def is_private() -> bool:
    """Whether the cluster is this process's own, which never grows."""
    return not os.environ.get("RAY_ADDRESS")


def actor_here(of: type) -> Any:
    """An actor that takes no CPU, on the machine of this process, so that it outlives those of the
    workers; killed, it is started again."""
    import ray

    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=True
    )
    kept = ray.remote(num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1)
    return kept(of).remote()


def room_for(gpus_per_actor: float, cpus_per_actor: float = 1) -> int:
    """How many such actors the cluster can hold as it is now."""
    return room_on(_nodes(), gpus_per_actor, cpus_per_actor)


def room_on(
    nodes: Sequence[tuple[float, float]], gpus_per_actor: float, cpus_per_actor: float
) -> int:
    """How many such actors nodes of (CPUs, GPUs) hold, each on one of them."""
    room = 0
    for cpus, gpus in nodes:
        here = int(cpus / cpus_per_actor)
        room += min(here, int(gpus / gpus_per_actor)) if gpus_per_actor else here
    return room


def node_sizes() -> str:
    """What the cluster is made of: "2 x 7 CPUs and 1 GPUs, 1 x 4 CPUs and 0 GPUs"."""
    sizes = Counter(_nodes()).items()
    return ", ".join(f"{n} x {cpus:g} CPUs and {gpus:g} GPUs" for (cpus, gpus), n in sizes)


def _nodes() -> list[tuple[float, float]]:
    """CPUs and GPUs of each node that is alive."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(own.get("CPU", 0.0), own.get("GPU", 0.0)) for own in alive]
