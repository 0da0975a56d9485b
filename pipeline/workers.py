"""The stream served by several processes, with the same result as by one.

Worker i prepares lanes i, i + n, ... of the rank; the main process puts their shares together in
lane order. What was prefetched when a run stops doesn't matter: positions travel with the batches.

Pictures don't travel: each worker writes them into shared memory that lasts as long as the workers,
because fresh shared memory for every picture costs more time than decoding it.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from glipv2.pipeline import preemption
from glipv2.pipeline.collate import Sample
from glipv2.pipeline.errors import UserError
from glipv2.pipeline.position import Position, merge_positions
from glipv2.pipeline.stream import Slot, Stream

PREFETCH = 2
"""Batches that each worker prepares ahead."""
Prepare = Callable[[Slot], Sample]


def batches_from_workers(
    stream: Stream, position: Position, prepare: Prepare, workers: int, picture_bytes: int
) -> Iterator[tuple[list[Sample], Position]]:
    """What stream.batches(position, prepare) yields, made by `workers` processes.

    No picture has more than `picture_bytes`; it is to be copied before the next batch is asked
    for, as its memory is used again. The processes are spawned, not forked: object store clients
    don't survive a fork.
    """
    workers = min(workers, len(stream.lanes))
    most = -(-len(stream.lanes) // workers) * stream.config.global_batch // stream.config.lanes
    desks = [PictureDesk(most * picture_bytes) for _ in range(workers)]
    loader = DataLoader(
        _Lanes(stream, position, prepare, desks),
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        prefetch_factor=PREFETCH,
        multiprocessing_context="spawn",
    )
    shares: list[list[Sample]] = []
    positions: list[Position] = []
    for item in loader:  # worker 0's batch, worker 1's, ..., then worker 0's next
        if isinstance(item, UserError):
            raise item
        shares.append(desks[len(shares)].pick_up(item[0]))
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


class PictureDesk:
    """Shared memory in which one worker lays the pictures of its batches, turn by turn.

    It never has more than PREFETCH batches under way, and the next one is only asked for once the
    last was taken, so PREFETCH + 1 places are enough without any lock.
    """

    def __init__(self, batch_bytes: int) -> None:
        self.memory_PB = torch.empty((PREFETCH + 1, batch_bytes), dtype=torch.uint8)
        self.memory_PB.share_memory_()
        self.place = self.end = 0

    def lay_down(self, sample: Sample) -> Sample:
        """The sample with (place, start, height, width) instead of its picture.

        To be done as soon as it is made: the processor's cache has it then, and its own memory
        serves the next.
        """
        _, height, width = sample.image_3HW.shape
        note = torch.tensor([self.place, self.end, height, width]).numpy()
        self._at(*map(int, note)).copy_(sample.image_3HW)
        self.end += sample.image_3HW.numel()
        return replace(sample, image_3HW=note)  # type: ignore[arg-type]

    def next_batch(self) -> None:
        """What is laid down from now on belongs to the next batch."""
        self.place, self.end = (self.place + 1) % (PREFETCH + 1), 0

    def pick_up(self, samples: list[Sample]) -> list[Sample]:
        """The inverse; the pictures are views of the shared memory."""
        return [replace(s, image_3HW=self._at(*map(int, s.image_3HW))) for s in samples]

    def _at(self, place: int, start: int, height: int, width: int) -> Tensor:
        """uint8 (3, H, W) at a place, the colours of a pixel beside each other."""
        flat_B = self.memory_PB[place, start : start + 3 * height * width]
        return flat_B.view(height, width, 3).permute(2, 0, 1)


class _Lanes(IterableDataset):
    """One worker's share of the rank's lanes."""

    def __init__(
        self, stream: Stream, position: Position, prepare: Prepare, desks: list[PictureDesk]
    ) -> None:
        self.stream, self.position, self.prepare, self.desks = stream, position, prepare, desks

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        assert worker is not None
        preemption.ignore()
        try:
            part = self.stream.part(worker.id, worker.num_workers)
            desk = self.desks[worker.id]
            for batch in part.batches(
                self.position, lambda slot: desk.lay_down(self.prepare(slot))
            ):
                yield batch
                desk.next_batch()
        except UserError as error:
            yield error  # DataLoader itself would wrap the message into a traceback


def _unchanged(item: Any) -> Any:
    return item
