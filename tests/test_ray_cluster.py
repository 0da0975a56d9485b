"""How large a private Ray cluster is, and how many actors nodes hold."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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


PRIVATE = """
import json, os, urllib.request
from glipv2.pipeline.ray_cluster import start_ray
start_ray(1)
import ray
from ray._private.worker import global_worker
print(json.dumps({
    "mode": os.environ["RAY_AUTH_MODE"], "token": os.environ["RAY_AUTH_TOKEN"],
    "dashboard": global_worker.node.address_info.get("webui_url") or "",
    "address": ray.get_runtime_context().gcs_address,
}), flush=True)
input()
"""
STRANGER = """
import sys, ray
try:
    ray.init(sys.argv[1], log_to_driver=False)
except Exception as error:
    sys.exit(f"refused: {type(error).__name__}")
print("joined")
"""


def test_a_private_cluster_wants_a_token_of_its_own_and_has_no_dashboard(tmp_path: Path) -> None:
    own = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_AUTH", "RAY_ADDRESS"))}
    own["HOME"] = str(tmp_path)  # where Ray would keep a token that others share
    process = subprocess.Popen(
        [sys.executable, "-c", PRIVATE], env=own, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    found = json.loads(process.stdout.readline())
    assert (found["mode"], found["dashboard"]) == ("token", "")
    assert len(found["token"]) == 64 and not list(tmp_path.rglob("auth_token"))
    for token, said in (("0" * 64, "refused"), (found["token"], "joined")):
        stranger = subprocess.run(
            [sys.executable, "-c", STRANGER, found["address"]], capture_output=True, text=True,
            env={**own, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}, timeout=120,
        )  # fmt: skip
        assert said in stranger.stdout + stranger.stderr, stranger.stderr
    process.communicate("\n", timeout=60)


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
