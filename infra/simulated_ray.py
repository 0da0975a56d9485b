"""Ray as `pipeline/ray_map.py` uses it, on machines that come and go and a clock that jumps.

No process is started: a worker's items take the seconds that a `Work` says, and their results are
made at the moment they end. The same seed gives the same course of events.
"""

import contextlib
import heapq
import math
import os
import random
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol
from unittest import mock

from glipv2.pipeline import ray_map


class Work(Protocol):
    """What workers do."""

    start_s: float

    def seconds(self, item: Any) -> dict[str, float]:
        """Of each part of an item's work, in their order."""
        ...

    def result(self, make_worker: Any, item: Any) -> Any: ...


class DriverKilled(BaseException):
    """No Exception, so that nothing handles it."""


class ActorDied(Exception):
    pass


class NeverRaised(Exception):
    """In place of what Ray raises of deaths that don't happen here."""


class Unheard:
    """In place of `worker_notes.Notes`: whoever dies here does it with its machine."""

    actor = None

    def last(self, _worker: int) -> None:
        return None

    def all(self) -> list[Any]:
        return []

    def end(self) -> None:
        pass


@dataclass(eq=False)
class Ref:
    """What a remote call returns."""

    value: Any = None
    error: Exception | None = None
    done: bool = False

    def end(self, value: Any = None, error: Exception | None = None) -> "Ref":
        self.value, self.error, self.done = value, error, True
        return self


@dataclass(frozen=True)
class Method:
    remote: Callable[..., Ref]


@dataclass(eq=False)
class Job:
    """What a worker is at: an item, or its start where there is none."""

    item: Any
    parts: dict[str, float]
    ref: Ref = field(default_factory=Ref)
    began: float = math.inf


class Machine:
    """Has room for one worker."""

    def __init__(self, name: str) -> None:
        self.name, self.lent = name, 0
        self.rng = random.Random(name)
        self.up = False
        self.actor: Actor | None = None

    @property
    def node(self) -> str:
        """Another one whenever it was replaced."""
        return f"{self.name}/{self.lent}"


class Actor:
    """A worker: waits for a machine, starts, then does one item at a time."""

    def __init__(self, cluster: "Cluster", make_worker: Any, number: int, _notes: Any) -> None:
        self.cluster, self.make_worker, self.number = cluster, make_worker, number
        self.on: Machine | None = None
        self.job: Job | None = None
        self.dead = False
        self.node = Ref()
        self.start, self.work = Method(self._start), Method(self._work)
        self.machine = Method(lambda: self.node)

    def _start(self) -> Ref:
        self.job = Job(None, {"starting": self.cluster.work.start_s})
        self.cluster.waiting.append(self)
        self.cluster.place()
        return self.job.ref

    def _work(self, item: Any) -> Ref:
        if self.dead:
            return Ref().end(error=ActorDied())
        self.job = Job(item, self.cluster.work.seconds(item))
        self.begin()
        return self.job.ref

    def begin(self) -> None:
        assert self.job is not None
        self.job.began = self.cluster.now
        self.cluster.after(sum(self.job.parts.values()), partial(self._finish, self.job))

    def _finish(self, job: Job) -> None:
        if self.job is not job:
            return  # it died, or was ended, before
        self.job = None
        for part, seconds in job.parts.items():
            self.cluster.spent_s[part] += seconds
        started = job.item is None
        job.ref.end(None if started else self.cluster.work.result(self.make_worker, job.item))

    def stop(self) -> None:
        """Its machine is gone, or the driver wants no more of it."""
        job, machine = self.job, self.on
        if job is not None and machine is not None:
            kind = "starting" if job.item is None else "lost"
            self.cluster.spent_s[kind] += self.cluster.now - job.began
        if machine is not None:
            machine.actor = None
        elif not self.dead:
            self.cluster.waiting.remove(self)
        self.job, self.on, self.dead = None, None, True
        self.cluster.place()


class Cluster:
    """So many machines of one worker each; each fails and is replaced on its own."""

    def __init__(
        self,
        work: Work,
        machines: int,
        *,
        failures_per_s: float = 0.0,
        replaced_after_s: float = 300.0,
        driver_dies_s: float = math.inf,
        seed: int = 0,
    ) -> None:
        self.work, self.failures_per_s = work, failures_per_s
        self.replaced_after_s, self.driver_dies_s = replaced_after_s, driver_dies_s
        self.now = 0.0
        self.spent_s: dict[str, float] = defaultdict(float)
        """Seconds of all machines: the parts of finished items, "starting", and "lost"."""
        self.deaths = 0
        """Of workers."""
        self.waiting: deque[Actor] = deque()
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.scheduled = 0
        self.machines = [Machine(f"{seed}/{number}") for number in range(machines)]
        for machine in self.machines:
            self._lend(machine)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """In the place of Ray."""
        ray = SimpleNamespace(
            exceptions=SimpleNamespace(
                RayActorError=ActorDied,
                RayTaskError=(),
                ActorUnavailableError=NeverRaised,
                OutOfMemoryError=NeverRaised,
                NodeDiedError=NeverRaised,
                LocalRayletDiedError=NeverRaised,
            ),
            nodes=self.nodes,
            get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "the driver's"),
            is_initialized=lambda: True,
            wait=self.wait,
            get=_get,
            kill=lambda actor: actor.stop(),
        )
        actors = SimpleNamespace(remote=partial(Actor, self))
        real = sys.modules.get("ray")
        sys.modules["ray"] = ray  # type: ignore[assignment]
        try:
            with (
                mock.patch.dict(os.environ, {"RAY_ADDRESS": "simulated"}),
                mock.patch.object(ray_map, "_actor_class", lambda gpus, cpus: actors),
                mock.patch.object(ray_map, "Notes", Unheard),
            ):
                yield
        finally:
            del sys.modules["ray"]
            if real is not None:
                sys.modules["ray"] = real

    def nodes(self) -> list[dict[str, Any]]:
        """As Ray tells of its nodes; each has room for one worker."""
        room = {"CPU": 1, "GPU": 1}
        return [{"NodeID": m.node, "Alive": m.up, "Resources": room} for m in self.machines]

    def wait(
        self, refs: Sequence[Ref], num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Ref], list[Ref]]:
        """With any timeout but 0 without end: nobody here watches."""
        while not (done := [ref for ref in refs if ref.done]) and timeout != 0:
            if self.events[0][0] > self.driver_dies_s:
                self.now, self.driver_dies_s = self.driver_dies_s, math.inf
                raise DriverKilled
            self._next_event()
        return done[:num_returns], [ref for ref in refs if ref not in done[:num_returns]]

    def pass_time(self, seconds: float) -> None:
        """Without a driver."""
        until = self.now + seconds
        while self.events and self.events[0][0] <= until:
            self._next_event()
        self.now = until

    def after(self, seconds: float, happen: Callable[[], None]) -> None:
        self.scheduled += 1
        heapq.heappush(self.events, (self.now + seconds, self.scheduled, happen))

    def place(self) -> None:
        """Workers that wait on machines that are free."""
        for machine in self.machines:
            if self.waiting and machine.up and machine.actor is None:
                actor = self.waiting.popleft()
                machine.actor, actor.on = actor, machine
                actor.node.end(machine.node)
                actor.begin()

    def _next_event(self) -> None:
        self.now, _, happen = heapq.heappop(self.events)
        happen()

    def _lend(self, machine: Machine) -> None:
        machine.up, machine.lent = True, machine.lent + 1
        if self.failures_per_s:
            lent_s = machine.rng.expovariate(self.failures_per_s)
            self.after(lent_s, partial(self._fail, machine))
        self.place()

    def _fail(self, machine: Machine) -> None:
        machine.up = False
        self.after(self.replaced_after_s, partial(self._lend, machine))
        actor = machine.actor
        if actor is None:
            return
        self.deaths += 1
        job = actor.job
        actor.stop()
        if job is not None:
            job.ref.end(error=ActorDied())


def _get(ref: Ref) -> Any:
    if ref.error is not None:
        raise ref.error
    return ref.value
