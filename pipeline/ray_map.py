"""Map a function over items on a pool of Ray actors that grows, shrinks and survives kills.

Ray core instead of Ray Data: our items are shard names whose results are committed by the worker
itself, so no data needs to flow between stages; and what Ray Data lacks is needed, to find out
which part of an item kills its worker (Ray retries a task that ran out of memory without end).
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

from glipv2.pipeline.errors import ConfigError, MachinesLostError, PoisonItemError
from glipv2.pipeline.ray_cluster import is_private, node_sizes, room_for, start_ray
from glipv2.pipeline.worker_notes import Notes, Watch, notes_to, notes_to_actor

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
MakeWorker = Callable[[], Callable[[Item], Result]]
AfterKill = Callable[[Item, int, Any], "Item | None"]
"""(item, how many workers it has killed, the last note of the last one) -> what to try now."""

LOOK_S = 0.5
"""Seconds between two looks at the notes."""
CHECK_S = 5.0
"""And, when nothing ends, at whether Ray is still there."""
MAX_KILLS = 2
"""An item whose worker died this often is taken for the cause and given up."""
MAX_LOSSES = 10
"""An item that lost its worker with the machine more often is given up."""
WHY = "it was killed or ran out of memory: see Ray's logs"
MAX_DEAD_STARTS = 5
"""So many workers in a row that die before their first item end the map."""


def try_again(item: Item, kills: int, _last_note: Any) -> Item | None:
    """The same item, until it has killed MAX_KILLS workers."""
    return item if kills < MAX_KILLS else None


def map_in_process(
    make_worker: MakeWorker[Item, Result], items: Iterable[Item], watch: Watch | None = None
) -> Iterator[tuple[Item, Result]]:
    """The same as `map_on_ray` in this process, for small work, debugging and tests."""
    worker = make_worker()
    for item in items:
        with notes_to(watch) if watch else nullcontext():
            result = worker(item)
        yield item, result


def map_on_ray(  # noqa: PLR0913 (each is a setting of the pool)
    make_worker: MakeWorker[Item, Result],
    items: Iterable[Item],
    *,
    num_actors: int,
    min_actors: int = 1,
    gpus_per_actor: float = 0.0,
    cpus_per_actor: float = 1.0,
    after_kill: AfterKill[Item] | None = None,
    watch: Watch | None = None,
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, result) as they finish, in any order.

    Items are taken when a worker is free for them, so any number of them needs little memory. Each
    worker calls `make_worker()` once. `min_actors` are asked for at once, more up to `num_actors`
    while items wait, as many again as there are each time: a cluster that can grow then does, on
    one that can't the rest stays pending. On this machine alone there are no more than its CPUs
    serve, but for `min_actors`. Workers with nothing left to do are ended.

    A worker that dies is replaced and its item tried again, or what `after_kill` says instead; when
    that is None the item is given up, and PoisonItemError raised at the end. One that dies because
    its machine is gone is no kill by the item, which is given to another as it is; an item that
    MAX_LOSSES machines did not suffice for is a MachinesLostError at the end. An exception of the
    worker ends the map and is raised here. Workers must be safe to run twice on one item.
    """
    waiting = _Waiting(items)
    if not waiting:
        return
    start_ray(math.ceil(min_actors * cpus_per_actor), gpus_per_actor=gpus_per_actor)
    pool = _Pool(make_worker, gpus_per_actor, cpus_per_actor, notes=bool(after_kill or watch))
    most = _most_actors(num_actors, gpus_per_actor, cpus_per_actor)
    retry = after_kill or try_again
    poison, lost = list[str](), list[str]()
    try:
        while waiting or pool.running:
            pool.resize(min(most, len(pool.running) + waiting.at_least(most)), min_actors)
            while waiting and pool.idle:
                pool.give(waiting.take())
            ended = pool.next_end()
            if watch is not None:
                watch(pool.last_notes())
            if ended is None:
                continue
            task, result = ended
            if not isinstance(result, _Died):
                yield task.item, result
            elif (again := _after_death(task, result, retry)) is not None:
                waiting.put_back(again)
            else:
                (lost if result.machine_gone else poison).append(str(task.item))
    finally:
        pool.end()
    if poison:
        raise PoisonItemError(
            f"workers died {MAX_KILLS} times or more on: {', '.join(poison)}; all other items are "
            f"done{', or lost with their machines' if lost else ''}. If memory ran out, use fewer "
            "actors or smaller batches; else look at these items"
        )
    if lost:
        raise MachinesLostError(
            f"more than {MAX_LOSSES} machines went away while they worked on: {', '.join(lost)}; "
            "all other items are done. Run the same command again"
        )


@dataclass(frozen=True)
class _Task(Generic[Item]):
    item: Item
    kills: int = 0
    losses: int = 0
    """Workers that went with their machines."""


@dataclass(frozen=True)
class _Died:
    last_note: Any
    machine_gone: bool


def _after_death(
    task: _Task[Item], death: _Died, after_kill: AfterKill[Item]
) -> "_Task[Item] | None":
    """What to try now; None gives the item up."""
    if death.machine_gone:
        log.warning("the machine of a worker on %s is gone", task.item)
        return replace(task, losses=task.losses + 1) if task.losses < MAX_LOSSES else None
    log.warning("a worker died on %s; %s", task.item, WHY)
    item = after_kill(task.item, task.kills + 1, death.last_note)
    return None if item is None else replace(task, item=item, kills=task.kills + 1)


class _Waiting(Generic[Item]):
    """Items still to be done, those of dead workers first; read no further than needed."""

    def __init__(self, items: Iterable[Item]) -> None:
        self.ahead: deque[_Task[Item]] = deque()
        self.rest = (_Task(item) for item in items)

    def at_least(self, count: int) -> int:
        """`count`, or how many wait if those are fewer."""
        self.ahead.extend(islice(self.rest, max(0, count - len(self.ahead))))
        return min(count, len(self.ahead))

    def __bool__(self) -> bool:
        return self.at_least(1) > 0

    def take(self) -> _Task[Item]:
        return self.ahead.popleft()

    def put_back(self, task: _Task[Item]) -> None:
        self.ahead.appendleft(task)


class _Worker(NamedTuple):
    number: int
    actor: Any
    machine: Any
    """Where it is: known as soon as its process runs."""


class _Pool:
    """Workers that are starting, idle, or at work."""

    def __init__(
        self, make_worker: MakeWorker[Any, Any], gpus: float, cpus: float, notes: bool
    ) -> None:
        self.make_worker = make_worker
        self.actor_class = _actor_class(gpus, cpus)
        self.notes = Notes() if notes else None
        self.starting: dict[Any, _Worker] = {}
        self.idle: list[_Worker] = []
        self.running: dict[Any, tuple[_Task[Any], _Worker]] = {}
        self.started = self.dead_starts = 0
        self.checked = time.monotonic()

    def resize(self, wanted: int, at_once: int) -> None:
        """Towards `wanted` workers: to `at_once` immediately, then by as many as there are."""
        ready = len(self.idle) + len(self.running)
        step = max(at_once - ready, ready, 1)
        while len(self.starting) < min(step, wanted - ready):
            self.started += 1
            notes = self.notes.actor if self.notes else None
            actor = self.actor_class.remote(self.make_worker, self.started, notes)
            worker = _Worker(self.started, actor, actor.machine.remote())
            self.starting[actor.start.remote()] = worker
        while self.starting and len(self.starting) > wanted - ready:
            _kill(self.starting.popitem()[1])
        while self.idle and len(self.idle) + len(self.running) > wanted:
            _kill(self.idle.pop())

    def give(self, task: _Task[Any]) -> None:
        worker = self.idle.pop()
        self.running[worker.actor.work.remote(task.item)] = (task, worker)

    def next_end(self) -> tuple[_Task[Any], Any] | None:
        """What ends next: an item with its result or _Died; None for the start of an actor, and
        for nothing in LOOK_S. MachinesLostError when nothing can ever end."""
        import ray

        under_way = [*self.running, *self.starting]
        ended, _ = ray.wait(under_way, num_returns=1, timeout=LOOK_S)
        if not ended:
            if time.monotonic() > self.checked + CHECK_S:
                self.checked = time.monotonic()
                _check_own_machine()
            return None
        [done] = ended
        if done in self.starting:
            self._has_started(done)
            return None
        task, worker = self.running.pop(done)
        try:
            result = _result(done)
        except _deaths() as error:
            _check_own_machine()
            _kill(worker)  # one that is only out of reach must not go on
            last_note = self.notes.last(worker.number) if self.notes else None
            return task, _Died(last_note, _machine_gone(worker, error))
        self.idle.append(worker)
        return task, result

    def last_notes(self) -> list[Any]:
        """Of every worker that made any, about as they are now."""
        return self.notes.all() if self.notes else []

    def _has_started(self, done: Any) -> None:
        worker = self.starting.pop(done)
        try:
            _result(done)
        except _deaths() as error:
            _kill(worker)
            if _machine_gone(worker, error):
                log.warning("the machine of a worker that started is gone")
                return
            log.warning("a worker died while it started; %s", WHY)
            self.dead_starts += 1
            if self.dead_starts == MAX_DEAD_STARTS:
                raise PoisonItemError(
                    f"{MAX_DEAD_STARTS} workers in a row died while they started ({error}); look "
                    "at their memory and at the cluster's logs"
                ) from error
            return
        self.dead_starts = 0
        self.idle.append(worker)

    def end(self) -> None:
        busy = (worker for _, worker in self.running.values())
        for worker in [*self.idle, *self.starting.values(), *busy]:
            _kill(worker)
        if self.notes:
            self.notes.end()


def _check_own_machine() -> None:
    """MachinesLostError when Ray's daemon on this machine, through which all goes, has died."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    if any(node["NodeID"] == own and not node["Alive"] for node in ray.nodes()):
        raise MachinesLostError(
            "Ray's daemon on this machine has died (killed, or out of memory?). Run the same "
            "command again"
        )


def _kill(worker: _Worker) -> None:
    import ray

    ray.kill(worker.actor)


def _deaths() -> tuple[type[Exception], ...]:
    """How Ray says that a worker is dead: the memory monitor's kills are no RayActorError."""
    from ray import exceptions

    return (
        exceptions.RayActorError,
        exceptions.OutOfMemoryError,
        exceptions.NodeDiedError,
        exceptions.LocalRayletDiedError,
    )


def _machine_gone(worker: _Worker, error: Exception) -> bool:
    """Whether a worker's machine was taken away, or can't be reached.

    Ray may tell of the worker first that it is unavailable, and only later that its machine is
    gone; of workers on this machine that means no more than that it is busy.
    """
    import ray

    if isinstance(error, ray.exceptions.NodeDiedError) or getattr(error, "preempted", False):
        return True
    known, _ = ray.wait([worker.machine], timeout=0)
    try:
        machine = ray.get(worker.machine) if known else None
    except _deaths():
        machine = None
    if machine in (None, ray.get_runtime_context().get_node_id()):
        return False
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return isinstance(error, ray.exceptions.ActorUnavailableError) or machine not in alive


def _result(reference: Any) -> Any:
    """The worker's result, or its own exception."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None


def _most_actors(num_actors: int, gpus: float, cpus: float) -> int:
    """No more than a cluster that never grows can hold."""
    room = room_for(gpus, cpus)
    if room < 1 and is_private():
        raise ConfigError(
            f"the Ray cluster has no room for an actor with {gpus:g} GPUs and {cpus:g} CPUs: "
            f"it has {node_sizes()}"
        )
    if room < 1:
        log.warning(
            "no node of the Ray cluster has room for an actor with %g GPUs and %g CPUs; waiting "
            "for one that has (nodes: %s)",
            gpus,
            cpus,
            node_sizes(),
        )
    return min(num_actors, room) if is_private() else num_actors


def _actor_class(gpus: float, cpus: float) -> Any:
    import ray

    @ray.remote(num_cpus=cpus, num_gpus=gpus)
    class Worker:
        def __init__(self, make_worker: MakeWorker[Any, Any], number: int, notes: Any) -> None:
            from glipv2.pipeline.dist import die_with_parent

            die_with_parent()
            self.make_worker = make_worker
            if notes is not None:
                notes_to_actor(notes, number)

        def machine(self) -> str:
            return ray.get_runtime_context().get_node_id()

        def start(self) -> None:
            """Apart from the constructor, whose exceptions would look like a death."""
            self.work_on = self.make_worker()

        def work(self, item: Any) -> Any:
            return self.work_on(item)

    return Worker
