"""What workers tell the driver while they are at work; known there even when they die of it."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from glipv2.pipeline.ray_cluster import actor_here

Item = TypeVar("Item")

Watch = Callable[[Iterable[Any]], None]
"""Hears the last note of each worker, now and then; perhaps one about an item done since."""

NOTE_S = 0.5
"""Seconds between two notes on how far an item is."""
ENDS_S = 2.0
"""For which the end waits for an answer of the actor."""
_note: Callable[[Any], None] | None = None
"""Where notes of this worker process go."""


def note(value: Any) -> None:
    """Tell the driver what a worker is about to do; known there even if this process dies of it.

    About a millisecond. Nothing where nobody asked for notes.
    """
    if _note is not None:
        _note(value)


def noting(
    name: Any, items: Iterable[Item], so_far: Callable[[int, Item], int] = lambda place, _: place
) -> Iterator[Item]:
    """The items; now and then a note, (name, so_far(place, item)), tells how far they are."""
    noted = time.monotonic()
    for place, item in enumerate(items):
        if (now := time.monotonic()) - noted >= NOTE_S:
            noted = now
            note((name, so_far(place, item)))
        yield item


@contextlib.contextmanager
def notes_to(watch: Watch) -> Iterator[None]:
    """Notes of this process go to `watch`."""
    global _note
    before, _note = _note, lambda value: watch([value])
    try:
        yield
    finally:
        _note = before


def notes_to_actor(actor: Any, worker: int) -> None:
    """Notes of this worker's process go to the actor of the driver's `Notes`."""
    global _note
    import ray

    def put(value: Any) -> None:
        with contextlib.suppress(ray.exceptions.RayActorError):  # work goes on without a note
            ray.get(actor.put.remote(worker, value))

    _note = put


class Notes:
    """The driver's side: keeps the last note of each worker in an actor.

    Killed it is started again by Ray, and knows nothing then.
    """

    def __init__(self) -> None:
        self.actor: Any = actor_here(_Notes)
        self.asked: Any = None
        """The answer of the actor that is awaited."""

    def last(self, worker: int) -> Any:
        """Of a worker that is dead, to be forgotten then; None without any."""
        import ray

        try:
            return ray.get(self.actor.last.remote(worker))
        except ray.exceptions.RayActorError:
            return None

    def all(self) -> list[Any]:
        """Of every worker that made any, as they were asked for the last time; waits for none."""
        import ray

        asked, self.asked = self.asked, self.asked or self.actor.all.remote()
        if asked is None or not ray.wait([asked], timeout=0)[0]:
            return []
        self.asked = self.actor.all.remote()
        try:
            return ray.get(asked)
        except ray.exceptions.RayActorError:
            return []

    def end(self) -> None:
        import ray

        if self.asked is not None:  # Ray would report a question without answer as an error
            ray.wait([self.asked], timeout=ENDS_S)
        ray.kill(self.actor)


class _Notes:
    """The last note of each worker."""

    def __init__(self) -> None:
        from glipv2.pipeline.dist import die_with_parent

        die_with_parent()
        self.notes: dict[int, Any] = {}

    def put(self, worker: int, value: Any) -> None:
        self.notes[worker] = value

    def all(self) -> list[Any]:
        return list(self.notes.values())

    def last(self, worker: int) -> Any:
        return self.notes.pop(worker, None)
