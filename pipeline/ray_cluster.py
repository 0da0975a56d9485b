"""Joining a Ray cluster, or starting a private one on this machine."""

import logging
import os
import secrets
import socket
import sys
from typing import Any

from glipv2.pipeline.errors import ConfigError


def start_ray(num_cpus: int, show_workers: bool = False) -> None:
    """Join the cluster that RAY_ADDRESS names, or start a private one on this machine.

    With `show_workers` what they print appears here as well.
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
    own: dict[str, Any] = {
        "address": "local",  # without it Ray would join a cluster that somebody started here
        "num_cpus": max(num_cpus, os.cpu_count() or 1),
        "object_store_memory": 200 << 20,
        "include_dashboard": False,
    }
    try:
        if existing:
            _reach(os.environ["RAY_ADDRESS"])
        ray.init(
            log_to_driver=show_workers,
            logging_level=logging.WARNING,
            **({} if existing else own),
        )
    except (OSError, ValueError) as error:
        if not existing:
            raise
        raise ConfigError(
            f"no Ray cluster can be joined at {os.environ['RAY_ADDRESS']}: {error}; start one with "
            "`ray start --head`, or give no address to run on this machine alone"
        ) from error


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


def room_for(gpus_per_actor: float, cpus_per_actor: float = 1) -> int:
    """How many such actors the cluster can hold as it is now."""
    import ray

    resources = ray.cluster_resources()
    room = int(resources.get("CPU", 1) / cpus_per_actor)
    if gpus_per_actor:
        room = min(room, int(resources.get("GPU", 0) / gpus_per_actor))
    return room
