"""How large a private Ray cluster is, and how many actors nodes hold."""

import os
from collections.abc import Iterator

import pytest
import ray

from glipv2.pipeline.ray_cluster import room_on
from glipv2.pipeline.ray_map import map_on_ray


@pytest.fixture
def no_cluster() -> Iterator[None]:
    ray.shutdown()
    yield
    ray.shutdown()


def make_length() -> object:
    return len


@pytest.mark.usefixtures("no_cluster")
def test_a_private_cluster_has_the_cpus_of_the_machine_or_what_the_least_actors_need() -> None:
    needed = (os.cpu_count() or 1) + 1
    ray.cloudpickle.register_pickle_by_value(__import__("sys").modules[__name__])
    pool = {"num_actors": 64, "min_actors": 1, "cpus_per_actor": needed}
    assert list(map_on_ray(make_length, ["abc"], **pool)) == [("abc", 3)]  # type: ignore[arg-type]
    assert ray.cluster_resources()["CPU"] == needed


@pytest.mark.parametrize(
    ("gpus", "cpus", "room"),
    [(0, 1, 15), (0, 4, 2), (0, 7, 2), (0, 8, 0), (0.5, 1, 4), (0.5, 5, 2), (1, 8, 0), (2, 1, 0)],
)
def test_an_actor_needs_all_it_asks_of_one_node(gpus: float, cpus: float, room: int) -> None:
    head, worker = (1.0, 0.0), (7.0, 1.0)
    assert room_on([head, worker, worker], gpus, cpus) == room
