"""A real local Ray: killed workers, poison items, errors that must come through."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from glipv2.pipeline import ray_map
from glipv2.pipeline.errors import ConfigError, DataError, PoisonItemError
from glipv2.pipeline.ray_cluster import start_ray
from glipv2.pipeline.ray_map import map_in_process, map_on_ray
from glipv2.pipeline.worker_notes import note


@pytest.fixture(scope="module", autouse=True)
def ray_with_a_gpu() -> Iterator[None]:
    """One that is declared only."""
    import ray

    cpus = max(2, os.cpu_count() or 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # where it is empty Ray refuses
        ray.init("local", num_cpus=cpus, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def make_squarer(folder: str) -> Callable[[int], int]:
    """A worker that kills its own process: once at item 3, every time at item 13."""

    def square(item: int) -> int:
        marker = Path(folder) / f"seen-{item}"
        if item == 13 or (item == 3 and not marker.exists()):
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if item < 0:
            raise DataError(f"item {item} is negative")
        return item * item

    return square


def make_reporter(folder: str) -> Callable[[int], int]:
    """A worker that tells its process."""
    return lambda item: os.getpid()


def make_noting(folder: str) -> Callable[[int], int]:
    """A worker that tells how far it is."""

    def work(item: int) -> int:
        for step in range(20):
            note((item, step))
            time.sleep(0.02)
        return item

    return work


def ship(make: Callable[..., object], folder: Path) -> Callable[[], object]:
    import ray.cloudpickle

    # test modules are not importable on the workers
    ray.cloudpickle.register_pickle_by_value(__import__("sys").modules[make.__module__])
    return partial(make, str(folder))


def test_a_killed_worker_is_replaced_and_an_item_that_kills_two_is_named_at_the_end(
    tmp_path: Path,
) -> None:
    items, done = [13, *range(6)], {}
    with pytest.raises(PoisonItemError, match="on: 13; all other"):
        for item, result in map_on_ray(ship(make_squarer, tmp_path), items, num_actors=2):  # type: ignore[arg-type]
            done[item] = result
    assert done == {n: n * n for n in range(6)}
    assert (tmp_path / "seen-3").exists()


def test_how_far_items_are_is_heard_while_they_are_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_map, "LOOK_S", 0.03)
    heard: list[tuple[int, int]] = []
    make = ship(make_noting, tmp_path)
    ended = [item for item, _ in map_on_ray(make, [1, 2], num_actors=1, watch=heard.extend)]  # type: ignore[arg-type]
    assert sorted(ended) == [1, 2]
    assert heard == sorted(heard) and {1, 2} == {item for item, _ in heard}
    assert len(set(heard)) > 8
    own: list[tuple[int, int]] = []
    assert dict(map_in_process(partial(make_noting, ""), [3], own.extend)) == {3: 3}
    assert own == [(3, step) for step in range(20)]
    note("nobody hears this")
    assert len(own) == 20


def test_an_error_of_the_worker_is_raised_with_its_own_type(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="item -1 is negative"):
        list(map_on_ray(ship(make_squarer, tmp_path), [-1], num_actors=1))  # type: ignore[arg-type]


def test_more_actors_than_the_cluster_has_room_for_are_not_waited_for(tmp_path: Path) -> None:
    start_ray(2)
    import ray

    cpus = int(ray.cluster_resources()["CPU"])
    make = ship(make_reporter, tmp_path)
    processes = dict(map_on_ray(make, range(3 * cpus), num_actors=3 * cpus))  # type: ignore[arg-type]
    assert len(processes) == 3 * cpus
    assert len(set(processes.values())) <= cpus


def test_actors_that_the_cluster_can_never_hold_are_refused(tmp_path: Path) -> None:
    make = ship(make_reporter, tmp_path)
    told = r"no room for an actor with 1000 GPUs and 1 CPUs: it has 1 x \d+ CPUs and 1 GPUs"
    with pytest.raises(ConfigError, match=told):
        list(map_on_ray(make, [1], num_actors=1, gpus_per_actor=1000))  # type: ignore[arg-type]


def make_noter(folder: str) -> Callable[[range], int]:
    """A worker that notes each number of a range before it works on it, and dies of 7."""

    def add(numbers: range) -> int:
        for number in numbers:
            note(number)
            if number == 7:
                os.kill(os.getpid(), signal.SIGKILL)
        return sum(numbers)

    return add


def test_what_a_worker_noted_last_is_known_after_its_death(tmp_path: Path) -> None:
    seen = []

    def without_the_killer(numbers: range, kills: int, last_note: int) -> range | None:
        seen.append((numbers, kills, last_note))
        return range(numbers.start, last_note) if kills < 2 else None

    items = [range(3), range(5, 9), range(10, 12)]
    make = ship(make_noter, tmp_path)
    done = dict(map_on_ray(make, items, num_actors=2, after_kill=without_the_killer))  # type: ignore[arg-type]
    assert seen == [(range(5, 9), 1, 7)]
    assert done == {range(3): 3, range(5, 7): 11, range(10, 12): 21}


def make_crowded(folder: str) -> Callable[[int], int]:
    """A worker that notes its process, and ends an item only when enough others are at work."""
    here = Path(folder) / f"worker-{os.getpid()}"
    here.touch()

    def wait(needed: int) -> int:
        deadline = time.monotonic() + 60
        while (count := len(list(here.parent.glob("worker-*")))) < needed:
            assert time.monotonic() < deadline, count
            time.sleep(0.02)
        return count

    return wait


def test_the_pool_grows_while_items_wait_and_never_past_its_most(tmp_path: Path) -> None:
    start_ray(2)
    import ray

    most = int(ray.cluster_resources()["CPU"])
    make = ship(make_crowded, tmp_path)
    done = [n for _, n in map_on_ray(make, [1, *[most] * 5], num_actors=99, min_actors=1)]  # type: ignore[arg-type]
    assert max(done) == most and len(done) == 6
    (few := tmp_path / "few").mkdir()
    make = ship(make_crowded, few)
    assert max(n for _, n in map_on_ray(make, [1] * 6, num_actors=1)) == 1  # type: ignore[arg-type]


def make_last(folder: str) -> Callable[[str], int]:
    """A worker whose long item ends only when the worker of the short one is gone."""
    here = Path(folder)

    def until(holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < deadline, os.listdir(folder)
            time.sleep(0.02)

    def work(item: str) -> int:
        (here / item).write_text(str(os.getpid()))
        until(lambda: (here / "long").exists() and (here / "short").exists())
        if item == "long":
            until(lambda: not Path("/proc", (here / "short").read_text() or "self").exists())
        return os.getpid()

    return work


def test_the_pool_shrinks_while_the_last_item_is_at_work(tmp_path: Path) -> None:
    pool = map_on_ray(ship(make_last, tmp_path), ["long", "short"], num_actors=2, min_actors=2)  # type: ignore[arg-type]
    done = dict(pool)
    assert list(done) == ["short", "long"] and len(set(done.values())) == 2


def test_two_actors_of_half_a_gpu_share_one_and_no_third_does(tmp_path: Path) -> None:
    share = {"num_actors": 3, "min_actors": 3, "gpus_per_actor": 0.5, "cpus_per_actor": 0.1}
    done = [n for _, n in map_on_ray(ship(make_crowded, tmp_path), [2] * 4, **share)]  # type: ignore[arg-type]
    assert done == [2] * 4


def make_stillborn(folder: str) -> Callable[[int], int]:
    os.kill(os.getpid(), signal.SIGKILL)
    return len


def test_workers_that_die_while_they_start_end_the_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_map, "MAX_DEAD_STARTS", 2)
    with pytest.raises(PoisonItemError, match="2 workers in a row died while they started"):
        list(map_on_ray(ship(make_stillborn, tmp_path), [1], num_actors=1))  # type: ignore[arg-type]


def test_the_same_work_runs_without_ray(tmp_path: Path) -> None:
    assert dict(map_in_process(partial(make_squarer, str(tmp_path)), [4, 5])) == {4: 16, 5: 25}


def test_a_cluster_of_somebody_else_on_this_machine_is_not_joined() -> None:
    """`ray start` leaves its address in a file, which Ray takes for ours without being told."""
    code = (
        "from glipv2.pipeline.ray_map import map_on_ray\n"
        "print([r for _, r in map_on_ray(lambda: abs, [-2], num_actors=1)])"
    )
    short = "/tmp"  # for sockets
    with tempfile.TemporaryDirectory(prefix="ray", dir=short) as folder:
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
        own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        done = subprocess.run(
            [sys.executable, "-c", code], env={**own, "RAY_TMPDIR": folder}, check=False,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "[2]"
