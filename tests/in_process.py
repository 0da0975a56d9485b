"""Jobs whose work is done in the process of the test, without Ray."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from glipv2.pipeline import ray_map


@contextmanager
def without_ray() -> Iterator[None]:
    def mapped(
        make: Callable[[], Any], items: Iterable[Any], watch: Any = None, **_: Any
    ) -> Iterator[Any]:
        return ray_map.map_in_process(make, items, watch)

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_map, "map_on_ray", mapped)
        yield
    torch.set_num_threads(threads)  # workers set their own
