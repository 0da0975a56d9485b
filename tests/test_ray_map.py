"""A real local Ray: killed workers, poison items, errors that must come through."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from glipv2.pipeline import ray_map
from glipv2.pipeline.errors import ConfigError, DataError, PoisonItemError
from glipv2.pipeline.ray_cluster import start_ray
from glipv2.pipeline.ray_map import map_in_process, map_on_ray, note


@pytest.fixture(scope="module", autouse=True)
def stop_ray_at_the_end() -> Iterator[None]:
    yield
    import ray

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
    with pytest.raises(ConfigError, match="no room for an actor with 1000 GPUs"):
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


def test_a_cluster_that_somebody_started_here_is_not_joined_unasked() -> None:
    """`ray start` leaves its address in Ray's folder for all who come after."""
    code = (
        "from glipv2.pipeline.ray_cluster import start_ray; start_ray(1)\n"
        "import ray; print(ray.get(ray.put('own')))"
    )
    with TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        Path(folder, "ray").mkdir()
        Path(folder, "ray", "ray_current_cluster").write_text("127.0.0.1:9")
        clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_A")}
        done = subprocess.run([sys.executable, "-c", code], env=clean | {"RAY_TMPDIR": folder},
                              capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.stdout.strip() == "own", done.stderr[-2000:]
