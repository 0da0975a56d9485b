"""The stream served by several processes, with the same result as by one.

Worker i prepares lanes i, i + n, ... of the rank; the main process puts their shares together in
lane order. What was prefetched when a run stops doesn't matter: positions travel with the batches.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from glipv2.pipeline.errors import UserError
from glipv2.pipeline.position import Position, merge_positions
from glipv2.pipeline.stream import Slot, Stream

PREFETCH = 2
"""Batches that each worker prepares ahead."""


def batches_from_workers(
    stream: Stream, position: Position, prepare: Callable[[Slot], Any], workers: int
) -> Iterator[tuple[list[Any], Position]]:
    """What stream.batches(position, prepare) yields, made by `workers` processes.

    The processes are spawned, not forked: object store clients don't survive a fork.
    """
    workers = min(workers, len(stream.lanes))
    loader = DataLoader(
        _Lanes(stream, position, prepare),
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        prefetch_factor=PREFETCH,
        multiprocessing_context="spawn",
    )
    shares: list[list[Any]] = []
    positions: list[Position] = []
    for item in loader:  # worker 0's batch, worker 1's, ..., then worker 0's next
        if isinstance(item, UserError):
            raise item
        shares.append(item[0])
        positions.append(item[1])
        if len(shares) == workers:
            yield _in_lane_order(shares, len(stream.lanes)), merge_positions(positions)
            shares, positions = [], []


def _in_lane_order(shares: list[list[Any]], lanes: int) -> list[Any]:
    workers, per_lane = len(shares), sum(map(len, shares)) // lanes
    return [
        sample
        for lane in range(lanes)
        for sample in shares[lane % workers][lane // workers * per_lane :][:per_lane]
    ]


class _Lanes(IterableDataset):
    """One worker's share of the rank's lanes."""

    def __init__(self, stream: Stream, position: Position, prepare: Callable[[Slot], Any]) -> None:
        self.stream, self.position, self.prepare = stream, position, prepare

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        assert worker is not None
        try:
            part = self.stream.part(worker.id, worker.num_workers)
            yield from part.batches(self.position, self.prepare)
        except UserError as error:
            yield error  # DataLoader itself would wrap the message into a traceback


def _unchanged(item: Any) -> Any:
    return item
