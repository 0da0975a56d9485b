"""How large a private Ray cluster is, and how many actors nodes hold."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
import ray
import torch
from ray.exceptions import AuthenticationError

from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.ray_cluster import room_on, start_ray
from glipv2.pipeline.ray_map import map_on_ray


@pytest.fixture
def no_cluster() -> Iterator[None]:
    ray.shutdown()
    yield
    ray.shutdown()


SLOW_TO_STOP = """
import signal, sys, time
from glipv2.pipeline.ray_cluster import start_ray
if sys.argv[1] == "own":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
start_ray(1)
try:
    print("started", flush=True)
    time.sleep(600)
except SystemExit:
    time.sleep(4)
    sys.exit(75)
"""


@pytest.mark.parametrize("handler", ["own", pytest.param("Ray's", marks=pytest.mark.slow)])
def test_who_is_told_to_stop_has_the_time_for_it(handler: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_TO_STOP, handler],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    process.terminate()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "SIGTERM" not in said


def make_length() -> object:
    return len


@pytest.mark.usefixtures("no_cluster")
def test_a_private_cluster_has_the_cpus_of_the_machine_or_what_the_least_actors_need() -> None:
    needed = (os.cpu_count() or 1) + 1
    ray.cloudpickle.register_pickle_by_value(__import__("sys").modules[__name__])
    pool = {"num_actors": 64, "min_actors": 1, "cpus_per_actor": needed}
    assert list(map_on_ray(make_length, ["abc"], **pool)) == [("abc", 3)]  # type: ignore[arg-type]
    assert ray.cluster_resources()["CPU"] == needed


@pytest.mark.usefixtures("no_cluster")
def test_a_cluster_that_wants_another_token_is_told_from_one_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(**_: object) -> None:
        raise errors.pop()

    def told(address: str) -> str:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConfigError, match=f"no Ray cluster can be joined at {address}") as told:
            start_ray(1)
        return str(told.value)

    monkeypatch.setattr(ray, "init", refuse)
    errors = [AuthenticationError("no token was found"), ConnectionError("Failed to connect")]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        there = f"127.0.0.1:{listening.getsockname()[1]}"
        for address in ("auto", there):
            said = told(address)
            assert "it may want its token" in said and "RAY_AUTH_MODE=token" in said
            assert "RAY_AUTH_TOKEN or ~/.ray/auth_token; else start one with `ray start" in said
    said = told(there)
    assert "token" not in said and "start one with `ray start --head`" in said


@pytest.mark.usefixtures("no_cluster")
def test_gpus_that_this_machine_lacks_are_missed_before_ray_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="this machine has 1 GPUs, too few for an actor with 2"):
        list(map_on_ray(make_length, ["abc"], num_actors=1, gpus_per_actor=2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gpus", "cpus", "room"),
    [(0, 1, 15), (0, 4, 2), (0, 7, 2), (0, 8, 0), (0.5, 1, 4), (0.5, 5, 2), (1, 8, 0), (2, 1, 0)],
)
def test_an_actor_needs_all_it_asks_of_one_node(gpus: float, cpus: float, room: int) -> None:
    head, worker = (1.0, 0.0), (7.0, 1.0)
    assert room_on([head, worker, worker], gpus, cpus) == room
