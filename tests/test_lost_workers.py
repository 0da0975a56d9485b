"""Deaths of workers that no item is to blame for, on a real Ray: memory, machines, lost notes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commands import command_line, descendants  # noqa: E402

from glipv2.pipeline import ray_map  # noqa: E402
from glipv2.pipeline.errors import MachinesLostError, PoisonItemError  # noqa: E402
from glipv2.pipeline.ray_map import map_on_ray  # noqa: E402
from glipv2.pipeline.worker_notes import note  # noqa: E402


@pytest.fixture(autouse=True)
def own_cluster() -> Iterator[None]:
    import ray

    ray.shutdown()
    yield
    ray.shutdown()


def ship(make: Callable[..., object], *arguments: object) -> Any:
    import ray.cloudpickle

    # test modules are not importable on the workers
    ray.cloudpickle.register_pickle_by_value(sys.modules[make.__module__])
    return partial(make, *arguments)


def make_sleeper(folder: str) -> Callable[[int], int]:
    """A worker that waits to be killed in its first life, and writes down where."""

    def work(item: int) -> int:
        first = Path(folder, f"item-{item}")
        if not first.exists():
            import ray

            first.write_text(ray.get_runtime_context().get_node_id())
            time.sleep(60)
        return item

    return work


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.02)
    return found


def test_a_kill_by_the_memory_monitor_is_a_death_of_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # to this Ray any use of memory is too much
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    monkeypatch.setattr(ray_map, "MAX_DEAD_STARTS", 2)
    with pytest.raises(PoisonItemError):
        list(map_on_ray(ship(make_sleeper, str(tmp_path)), [1], num_actors=1))


def make_noter(folder: str) -> Callable[[int], int]:
    """A worker that notes its item, waits until its notes are killed, and goes on noting."""

    def work(item: int) -> int:
        for step in range(3):
            note((item, step))
            if step == 0:
                Path(folder, f"noted-{item}").touch()
                deadline = time.monotonic() + 60
                while not Path(folder, "killed").exists() and time.monotonic() < deadline:
                    time.sleep(0.02)
        return item

    return work


def test_without_the_actor_that_keeps_the_notes_work_goes_on_and_notes_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_map, "LOOK_S", 0.05)
    heard: list[tuple[int, int]] = []

    def kill() -> None:
        until(lambda: (tmp_path / "noted-1").exists() and (1, 0) in heard)
        [actor] = [p for p in descendants(os.getpid()) if "ray::_Notes" in command_line(p)]
        os.kill(actor, signal.SIGKILL)
        (tmp_path / "killed").touch()

    killer = threading.Thread(target=kill)
    killer.start()
    kills: list[int] = []
    done = map_on_ray(
        ship(make_noter, str(tmp_path)),
        [1, 2],
        num_actors=1,
        after_kill=lambda item, number, _: kills.append(number),
        watch=heard.extend,
    )
    assert sorted(item for item, _ in done) == [1, 2]
    killer.join()
    assert kills == [] and heard[0] == (1, 0)


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster with two machines for workers, and a head that has no room for any."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    import ray

    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("most", [10, 0])
def test_a_machine_that_is_taken_away_is_no_kill_by_the_item(
    tmp_path: Path, machines: Any, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(ray_map, "MAX_LOSSES", most)

    def take_away() -> None:
        where = until(lambda: (item := tmp_path / "item-1").exists() and item.read_text())
        [machine] = [node for node in machines.list_all_nodes() if node.node_id == where]
        machines.remove_node(machine, allow_graceful=False)

    taker = threading.Thread(target=take_away)
    taker.start()
    kills: list[int] = []
    done = map_on_ray(
        ship(make_sleeper, str(tmp_path)),
        [1],
        num_actors=1,
        after_kill=lambda item, number, _: kills.append(number),
    )
    if most:
        assert dict(done) == {1: 1}
    else:
        with pytest.raises(MachinesLostError, match="1; all other items are done"):
            list(done)
    taker.join()
    assert kills == []


RAYLET_DIES = """
import os, signal, sys, time
sys.path[:0] = sys.argv[3:]
from commands import command_line, descendants
from glipv2.pipeline.errors import MachinesLostError
from glipv2.pipeline.ray_map import map_on_ray

def make(when=sys.argv[1], folder=sys.argv[2]):
    open(f"{folder}/starts", "w").close()
    if when == "starts":
        time.sleep(20)
    return lambda item: (open(f"{folder}/works", "w").close(), time.sleep(20))

def kill():
    while not os.path.exists(f"{sys.argv[2]}/{sys.argv[1]}"):
        time.sleep(0.02)
    [raylet] = [p for p in descendants(os.getpid()) if "raylet/raylet" in command_line(p)]
    os.kill(raylet, signal.SIGKILL)

import threading
threading.Thread(target=kill).start()
try:
    list(map_on_ray(make, [1, 2], num_actors=1))
except MachinesLostError as error:
    sys.exit(str(error))
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["starts", "works"])
def test_without_rays_daemon_on_this_machine_nothing_is_waited_for(
    tmp_path: Path, when: str
) -> None:
    """In a process of its own: Ray ends some in which its daemon is missed."""
    script = [sys.executable, "-c", RAYLET_DIES, when, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=150)
    assert done.returncode == 1
    assert "Ray's daemon on this machine has died (killed, or out of memory?). Run" in done.stderr
