"""The ledger: which sample was in which global batch, whatever the run went through."""

import io
import itertools
import random
import time
import tracemalloc
import uuid
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from glipv2.pipeline import shards
from glipv2.pipeline.lanes import Window, cut_into_units
from glipv2.pipeline.position import Position, merge_positions
from glipv2.pipeline.records import Record
from glipv2.pipeline.shard_format import ShardInfo, ShardSet
from glipv2.pipeline.stream import Stream, StreamConfig
from glipv2.pipeline.workers import _in_lane_order

LANES, PER_LANE = 8, 2
CONFIG = StreamConfig(
    seed=3, global_batch=LANES * PER_LANE, lanes=LANES, unit_samples=8, max_bad_share=0.2
)
STEPS = 36
BAD = {2, 77, 78, 140}


def picture(size):
    buffer = io.BytesIO()
    Image.new("RGB", size, (1, 2, 3)).save(buffer, format="JPEG")
    return buffer.getvalue()


PICTURES = {size: picture(size) for size in ((12, 8), (8, 12))}


def make_set(name, count, bad=()):
    url = f"memory://{uuid.uuid4().hex}"
    raws = []
    for number in range(count):
        size = (8, 12) if number % 3 == 0 else (12, 8)
        record = Record(
            key=f"{name}-{number:04d}",
            image=PICTURES[size],
            image_format="jpg",
            width=size[0],
            height=size[1],
            task="pairs",
            caption=f"no {number}",
        )
        members = shards.record_members(record)
        raws.append(shards.RawSample(key=record.key, members=members))
        if number in bad:
            members["json"] = b"{}"
    done = [
        shards.write_raw_shard(url, shards.shard_name(i), raws[first : first + 50])
        for i, first in enumerate(range(0, count, 50))
    ]
    return shards.write_manifest(url, done, [], {})


@pytest.fixture(scope="module")
def sets():
    return {"a": make_set("a", 211, BAD), "b": make_set("b", 96)}


def global_batches(sets, config, position, steps, world_size, workers):
    """`steps` global batches as `world_size` ranks with `workers` loader processes each make them.

    A worker process runs `Stream.part`; here it runs in this process.
    """
    per_rank, positions = [], []
    for rank in range(world_size):
        stream = Stream(sets, dict.fromkeys(sets, 1.0), config, rank, world_size)
        parts = min(workers, len(stream.lanes)) or 1
        shares = [
            list(itertools.islice(stream.part(n, parts).batches(position), steps))
            for n in range(parts)
        ]
        batches = [[batch for batch, _ in at] for at in zip(*shares, strict=True)]
        per_rank.append([_in_lane_order(batch, len(stream.lanes)) for batch in batches])
        positions += [share[-1][1] for share in shares]
    whole = []
    for shares in zip(*per_rank, strict=True):
        keys = [
            slot.record.key
            for lane in range(LANES)
            for slot in shares[lane % world_size][lane // world_size * PER_LANE :][:PER_LANE]
        ]
        whole.append(keys)
    return whole, merge_positions(positions)


@pytest.fixture(scope="module", params=[False, True], ids=["any aspect", "by aspect"])
def reference(request, sets):
    config = replace(CONFIG, group_by_aspect=request.param)
    start = Stream(sets, dict.fromkeys(sets, 1.0), config).start()
    return config, start, global_batches(sets, config, start, STEPS, 1, 0)[0]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_three_resumes_with_other_ranks_and_workers_change_nothing(
    sets, reference, world_size, workers
):
    config, position, whole = reference
    draw = random.Random(world_size * 10 + workers)
    stops = [0, *sorted(draw.sample(range(1, STEPS), 3)), STEPS]
    ledger = []
    for number, (first, last) in enumerate(itertools.pairwise(stops)):
        ranks = world_size if number % 2 == 0 else draw.choice([1, 2, 4, 8])
        keys, position = global_batches(sets, config, position, last - first, ranks, workers)
        position = Position.from_dict(position.to_dict())
        ledger += keys
    assert ledger == whole


def test_each_good_sample_comes_once_in_an_epoch_also_by_aspect(sets):
    for by_aspect in (False, True):
        config = replace(CONFIG, group_by_aspect=by_aspect, global_batch=LANES)
        stream = Stream({"a": sets["a"]}, {"a": 1.0}, config)
        per_epoch: dict[int, Counter] = {}
        for batch, after in stream.batches(stream.start()):
            for slot in batch:
                epoch = after.lanes["a"][slot.lane][0]
                per_epoch.setdefault(epoch, Counter())[slot.record.key] += 1
            if all(epoch >= 2 for epoch, _, _ in after.lanes["a"]):
                break
        good = Counter(f"a-{n:04d}" for n in range(211) if n not in BAD)
        assert per_epoch[0] == good and per_epoch[1] == good


def test_batches_by_aspect_are_mostly_of_one_aspect():
    shard_set, mixed = make_set("c", 1600), {}
    for by_aspect in (False, True):
        config = replace(CONFIG, group_by_aspect=by_aspect, unit_samples=64)
        stream = Stream({"c": shard_set}, {"c": 1.0}, config)
        batches = [batch for batch, _ in itertools.islice(stream.batches(stream.start()), 60)]
        tall = [sum(slot.record.height > slot.record.width for slot in batch) for batch in batches]
        mixed[by_aspect] = sum(0 < count < CONFIG.global_batch for count in tall)
    assert mixed[False] >= 55
    assert mixed[True] <= 15


def test_a_window_by_aspect_gives_the_other_kind_once_one_is_used_up():
    window = object.__new__(Window)
    window._wide, window._tall = [0, 3], [1, 2, 4]
    order, tall_taken = [], 0
    for taken, wanted in enumerate([True, False, False, False, True]):
        place, was_tall = window.place(taken, tall_taken, wanted)
        tall_taken += was_tall
        order.append(place)
    assert order == [1, 0, 3, 2, 4]


@pytest.fixture(scope="module")
def huge():
    """The manifest of 10^5 shards with 10^8 samples; there are no such shards."""
    shards_ = tuple(
        ShardInfo(name=f"shard-{n:06d}", samples=1000, bytes=1, crc32c="0", commit_crc32c="0")
        for n in range(100_000)
    )
    return ShardSet(url="memory://huge", categories=(), shards=shards_, info={}, digest="0" * 16)


def test_a_far_position_of_a_huge_set_opens_at_once(huge, monkeypatch):
    read = []

    def raw(shard_set, shard, first, last, cache=None):
        read.append((shard, first, last))
        return [shards.RawSample(key=f"{shard}-{n}", members=MEMBERS) for n in range(first, last)]

    monkeypatch.setattr("glipv2.pipeline.stream.read_raw", raw)
    config = StreamConfig(seed=1, global_batch=64, lanes=64)
    tracemalloc.start()
    began = time.process_time()
    stream = Stream({"huge": huge}, {"huge": 1.0}, config)
    start = replace(stream.start(), step=10**6, lanes={"huge": [(0, 10**6, 0)] * 64})
    readers = stream._readers(0, start, None)
    for lane in range(1, 64):
        readers = stream._readers(lane, start, None)
        readers["huge"]._span(10**6)
    seconds = time.process_time() - began
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert len(next(stream.batches(start))[0]) == 64
    assert len(read) == 64 * 2  # one window of two units a lane
    assert seconds < 1 and peak < 64, (seconds, peak)


MEMBERS = shards.record_members(
    Record(key="x", image=PICTURES[12, 8], image_format="jpg", width=12, height=8, task="pairs",
           caption="a cat")
)  # fmt: skip


def test_units_cover_every_sample_once_and_are_of_one_shard(huge):
    units = cut_into_units("huge", huge, 64, 256)
    assert (units[:, 2] - units[:, 1]).sum() == huge.samples
    assert (units[:, 2] - units[:, 1]).max() <= 256
    same = units[1:, 0] == units[:-1, 0]
    assert np.array_equal(units[1:, 1][same], units[:-1, 2][same])
    assert not units[1:, 1][~same].any()
