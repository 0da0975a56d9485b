import io
import itertools
import json
import uuid
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from glipv2.pipeline import lanes, shards, storage
from glipv2.pipeline.errors import BadSample, ConfigError, DataError
from glipv2.pipeline.negatives import Negatives, caption_text
from glipv2.pipeline.quarantine import Quarantine
from glipv2.pipeline.records import Record, Region
from glipv2.pipeline.stream import Position, Stream, StreamConfig, merge_positions

CONFIG = StreamConfig(seed=5, global_batch=8, lanes=4, unit_samples=4)


def jpeg():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(buffer, format="JPEG")
    return buffer.getvalue()


IMAGE = jpeg()


def record(source, number):
    return Record(
        key=f"{source}-{number:04d}",
        image=IMAGE,
        image_format="jpg",
        width=8,
        height=8,
        task="pairs",
        caption=f"caption {number}",
    )


def make_set(source, count, bad=(), url=None, per_shard=16):
    """A shard set whose samples number `bad` hold no usable description."""
    url = url or f"memory://{uuid.uuid4().hex}"
    raws = []
    for number in range(count):
        members = shards.record_members(record(source, number))
        if number in bad:
            members["json"] = b"{}"
        raws.append(shards.RawSample(key=f"{source}-{number:04d}", members=members))
    done = [
        shards.write_raw_shard(url, shards.shard_name(i), raws[first : first + per_shard])
        for i, first in enumerate(range(0, count, per_shard))
    ]
    return shards.write_manifest(url, done, [], {})


def make_stream(sets, weights=None, config=CONFIG, rank=0, world_size=1, on_bad=None):
    return Stream(sets, weights or dict.fromkeys(sets, 1.0), config, rank, world_size, on_bad)


def take(stream, steps, position=None):
    """The keys of each batch, and the position after the last."""
    batches = itertools.islice(stream.batches(position or stream.start()), steps)
    keys = []
    for batch, position in batches:  # noqa: B007
        keys.append([slot.record.key for slot in batch])
    return keys, position


def in_lane_order(per_rank, config, world_size):
    """One global batch from the ranks' shares."""
    each = config.global_batch // config.lanes
    return [
        key
        for lane in range(config.lanes)
        for key in per_rank[lane % world_size][lane // world_size * each :][:each]
    ]


@pytest.fixture(scope="module")
def two_sets():
    return {"a": make_set("a", 70, bad={3, 30, 31}), "b": make_set("b", 45, bad={44})}


LENIENT = replace(CONFIG, max_bad_share=0.2)


def test_world_sizes_1_2_and_4_see_the_same_global_batches(two_sets):
    alone, _ = take(make_stream(two_sets, config=LENIENT), 30)
    for world_size in (2, 4):
        shares = [
            take(make_stream(two_sets, None, LENIENT, rank, world_size), 30)[0]
            for rank in range(world_size)
        ]
        together = [in_lane_order(step, LENIENT, world_size) for step in zip(*shares, strict=True)]
        assert together == alone


def test_resuming_at_any_step_continues_the_uninterrupted_sequence(two_sets):
    stream = make_stream(two_sets, config=LENIENT)
    whole, _ = take(stream, 40)
    for step in range(1, 40, 3):
        first, position = take(stream, step)
        saved = Position.from_dict(json.loads(json.dumps(position.to_dict())))
        assert saved.step == step
        again, _ = take(make_stream(two_sets, config=LENIENT), 40 - step, saved)
        assert first + again == whole


def test_three_resumes_and_changes_of_world_size_in_one_epoch_lose_nothing(two_sets):
    whole, _ = take(make_stream(two_sets, config=LENIENT), 12)
    position, seen = make_stream(two_sets, config=LENIENT).start(), []
    for world_size in (4, 1, 2, 4):
        shares, positions = [], []
        for rank in range(world_size):
            stream = make_stream(two_sets, None, LENIENT, rank, world_size)
            keys, after = take(stream, 3, position)
            shares.append(keys)
            positions.append(after)
        seen += [in_lane_order(step, LENIENT, world_size) for step in zip(*shares, strict=True)]
        position = merge_positions(positions)
    assert seen == whole
    assert position.step == 12


@pytest.mark.parametrize("count", [64, 61, 130])
def test_each_sample_comes_exactly_once_per_epoch_with_bad_ones_in_between(count):
    bad_numbers = {0, 7, count - 1}
    reported = Counter()
    stream = make_stream(
        {"a": make_set("a", count, bad=bad_numbers)},
        config=replace(LENIENT, global_batch=LENIENT.lanes),
        on_bad=lambda source, shard, key, why: reported.update([(source, key, why.reason)]),
    )
    per_epoch: dict[int, Counter] = {}
    for batch, after in stream.batches(stream.start()):
        for slot in batch:  # one per lane, so the position tells the epoch it came from
            epoch, _, _ = after.lanes["a"][slot.lane]
            per_epoch.setdefault(epoch, Counter())[slot.record.key] += 1
        if all(epoch >= 2 for epoch, _, _ in after.lanes["a"]):
            break
    good = Counter(f"a-{n:04d}" for n in range(count) if n not in bad_numbers)
    assert per_epoch[0] == good
    assert per_epoch[1] == good
    assert {key for _, key, _ in reported} == {f"a-{n:04d}" for n in bad_numbers}
    assert {reason for _, _, reason in reported} == {"json_schema"}


@pytest.mark.parametrize(("count", "lane_count"), [(64, 4), (61, 4), (130, 8), (9, 8), (8, 8)])
def test_the_lanes_of_an_epoch_hold_every_sample_exactly_once(count, lane_count):
    shard_set = make_set("a", count, per_shard=13)
    dealing = lanes.Dealing(seed=1, lanes=lane_count, window_units=2)
    units = lanes.cut_into_units("a", shard_set, lane_count, 8)
    for epoch in (0, 1):
        keys = Counter()
        for lane in range(lane_count):
            reader = lanes.LaneReader("a", shard_set, units, lane, dealing, shards.read_raw)
            reader.seek((epoch, 0, 0))
            read = 0
            while (taken := reader.next(None)) and reader.epoch == epoch:
                window, place = taken
                keys[window.keys[place]] += 1
                read += 1
            assert read > 0
        assert keys == Counter(f"a-{n:04d}" for n in range(count))


def test_epochs_and_seeds_have_different_orders():
    sets = {"a": make_set("a", 64)}
    keys, _ = take(make_stream(sets), 16)
    flat = list(itertools.chain(*keys))
    assert sorted(flat[:64]) == sorted(flat[64:])
    assert flat[:64] != flat[64:]
    other, _ = take(make_stream(sets, config=replace(CONFIG, seed=6)), 16)
    assert other != keys


def test_mixture_shares_approach_the_weights():
    sets = {"a": make_set("a", 40), "b": make_set("b", 40), "c": make_set("c", 40)}
    keys, _ = take(make_stream(sets, {"a": 5.0, "b": 3.0, "c": 2.0}), 500)
    counts = Counter(key[0] for batch in keys for key in batch)
    shares = [counts[name] / 4000 for name in "abc"]
    assert np.allclose(shares, [0.5, 0.3, 0.2], atol=0.03)


def test_the_randomness_of_a_slot_belongs_to_its_place_not_to_the_run_so_far(two_sets):
    stream = make_stream(two_sets, config=LENIENT)
    draws = [
        [(s.record.key, s.rng.random()) for s in batch]
        for batch, _ in itertools.islice(stream.batches(stream.start()), 10)
    ]
    _, middle = take(stream, 6)
    again = [
        [(s.record.key, s.rng.random()) for s in batch]
        for batch, _ in itertools.islice(stream.batches(middle), 4)
    ]
    assert again == draws[6:]
    values = [value for batch in draws for _, value in batch]
    assert len(set(values)) == len(values)


def test_neighbours_are_captions_of_other_samples_of_the_same_source(two_sets):
    stream = make_stream(two_sets, config=LENIENT)
    for batch, _ in itertools.islice(stream.batches(stream.start()), 5):
        for slot in batch:
            assert slot.neighbours
            assert slot.record.caption not in slot.neighbours


def test_captions_without_any_box_are_neighbours_of_others_as_well():
    """What a labelling keeps with `label.keep_empty`."""
    box = Region(box=(1, 1, 5, 5), spans=((0, 7),), score=0.7)
    url = f"memory://{uuid.uuid4().hex}"
    records = [
        replace(record("web", n), task="grounding", regions=(box,) * (n % 4 == 0))
        for n in range(32)
    ]
    made = shards.write_shard_set(url, records, (), {}, samples_per_shard=16)
    stream = make_stream({"web": made}, config=LENIENT)
    empty = {r.caption for r in records if not r.regions}
    rules = Negatives(max_categories=1, full_share=1.0, packing=1.0, max_captions=3)
    packed = set[str]()
    for batch, _ in itertools.islice(stream.batches(stream.start()), 8):
        for slot in batch:
            assert empty & set(slot.neighbours)
            if not slot.record.regions:
                continue
            made_text = caption_text(slot.record, slot.neighbours, len, 60, rules, slot.rng)
            packed.update(c for c in empty if f"{c}." in f"{made_text.prompt.text}.")
    assert packed


def test_opening_a_position_costs_the_same_at_any_step(two_sets, monkeypatch):
    stream = make_stream(two_sets, config=LENIENT)
    near = take(stream, 1)[1]
    far = replace(
        near,
        step=10**9,
        lanes={name: [(10**7, 1, 0)] * CONFIG.lanes for name in near.lanes},
    )
    reads = []
    real = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda *a: reads.append(a) or real(*a))
    costs = []
    for position in (near, far):
        reads.clear()
        next(stream.batches(position))
        costs.append(len(reads))
    most = len(two_sets) * CONFIG.lanes * CONFIG.window_units
    assert max(costs) <= most


def test_a_window_is_read_with_one_ranged_read_per_unit(monkeypatch):
    shard_set = make_set("a", 64)
    stream = make_stream({"a": shard_set})
    for number in range(len(shard_set.shards)):
        shards.read_index(shard_set, number)
    reads = []
    real = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda *a: reads.append(a) or real(*a))
    take(stream, 8)  # one epoch: 64 samples in units of 4
    assert len(reads) == 16


def test_samples_that_prepare_refuses_count_as_bad_and_are_replaced():
    reported = []
    stream = make_stream(
        {"a": make_set("a", 64)},
        config=LENIENT,
        on_bad=lambda source, shard, key, why: reported.append((shard, key, why.reason)),
    )

    def prepare(slot):
        if slot.record.key.endswith("7"):
            raise BadSample("image_undecodable")
        return slot.record.key

    batches = [batch for batch, _ in itertools.islice(stream.batches(stream.start(), prepare), 7)]
    keys = list(itertools.chain(*batches))
    assert [len(batch) for batch in batches] == [8] * 7
    assert not any(key.endswith("7") for key in keys)
    assert reported
    assert all(key.endswith("7") and shard.startswith("shard-0") for shard, key, _ in reported)


def test_more_bad_samples_than_the_budget_stop_the_run_with_their_counts():
    stream = make_stream({"a": make_set("a", 200, bad=set(range(0, 200, 10)))})
    with pytest.raises(DataError, match=r"of 1\d\d samples could not be used.*max_bad_share"):
        take(stream, 100)


def test_a_few_bad_samples_within_the_budget_do_not_stop_the_run():
    stream = make_stream({"a": make_set("a", 300, bad={5, 150})})
    keys, _ = take(stream, 80)
    assert len(keys) == 80


def test_a_source_of_nothing_but_bad_samples_stops_the_run():
    stream = make_stream({"a": make_set("a", 20, bad=set(range(20)))})
    with pytest.raises(DataError, match="could not be used"):
        take(stream, 1)


def test_more_ranks_than_lanes_is_refused_with_the_cure(two_sets):
    with pytest.raises(ConfigError, match="8 ranks can't share 4 lanes equally: start 4 ranks"):
        make_stream(two_sets, world_size=8)
    with pytest.raises(ConfigError, match="3 ranks can't share 4 lanes equally: start 2 ranks"):
        make_stream(two_sets, world_size=3)


def test_lanes_that_do_not_divide_the_batch_are_refused_with_the_cure(two_sets):
    config = replace(CONFIG, global_batch=10)
    with pytest.raises(ConfigError, match=r"data\.lanes \(4\) must divide .*set data\.lanes to 2"):
        make_stream(two_sets, config=config)


def test_a_set_with_an_empty_shard_gives_all_of_its_samples():
    url = f"memory://{uuid.uuid4().hex}"
    raws = [
        shards.RawSample(key=f"a-{n:04d}", members=shards.record_members(record("a", n)))
        for n in range(40)
    ]
    parts = [raws[:20], [], raws[20:], []]
    done = [shards.write_raw_shard(url, shards.shard_name(i), p) for i, p in enumerate(parts)]
    sets = {"a": shards.write_manifest(url, done, [], {})}
    keys, _ = take(make_stream(sets), 5)
    assert sorted(key for batch in keys for key in batch) == [raw.key for raw in raws]


def test_a_set_with_fewer_samples_than_lanes_is_refused_with_the_cure():
    with pytest.raises(DataError, match=r"3 samples for 4 lanes: set data\.lanes to at most 3"):
        make_stream({"a": make_set("a", 3)})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("seed", {"config": replace(CONFIG, seed=6)}),
        ("global_batch", {"config": replace(CONFIG, global_batch=16)}),
        ("global_batch, lanes", {"config": replace(CONFIG, global_batch=2, lanes=2)}),
        ("units", {"config": replace(CONFIG, window_units=3)}),
        ("mixture", {"weights": {"a": 2.0, "b": 1.0}}),
        ("data", {"sets": "other"}),
    ],
)
def test_a_position_of_another_sequence_is_refused_and_the_change_is_named(two_sets, name, change):
    _, position = take(make_stream(two_sets), 2)
    sets = {"a": two_sets["a"], "b": make_set("b", 46)} if "sets" in change else two_sets
    stream = make_stream(sets, change.get("weights"), change.get("config", CONFIG))
    with pytest.raises(ConfigError, match=rf"step 2 with another {name}: .*train\.init"):
        next(stream.batches(position))


def test_a_copy_of_the_data_elsewhere_continues_the_run(tmp_path):
    here, there = make_set("a", 40), make_set("a", 40, url=str(tmp_path / "copy"))
    _, position = take(make_stream({"a": here}), 3)
    assert take(make_stream({"a": there}), 5, position) == take(
        make_stream({"a": here}), 5, position
    )


def test_positions_that_cannot_be_merged_are_refused(two_sets):
    ranks = [make_stream(two_sets, rank=rank, world_size=2) for rank in range(2)]
    _, one = take(ranks[0], 2)
    _, two = take(ranks[1], 3)
    with pytest.raises(DataError, match="different moments"):
        merge_positions([one, two])
    with pytest.raises(DataError, match="doesn't cover lane 1"):
        next(ranks[1].batches(one))
    with pytest.raises(DataError, match="no stream position"):
        Position.from_dict({"step": 1})


def test_a_shard_that_was_truncated_stops_the_stream_with_file_and_sizes():
    shard_set = make_set("a", 64)
    url = shard_set.shard_url(2)
    storage.write_bytes(url, storage.read_bytes(url)[:4096])
    with pytest.raises(DataError, match=r"shard-000002\.tar holds 4096 bytes instead of"):
        take(make_stream({"a": shard_set}), 16)


def test_the_quarantine_file_holds_one_line_per_skipped_sample(tmp_path):
    quarantine = Quarantine(str(tmp_path / "run" / "quarantine.jsonl"))
    stream = make_stream({"a": make_set("a", 64, bad={9})}, config=LENIENT, on_bad=quarantine)
    take(stream, 7)
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["key"] == "a-0009"
    assert json.loads(lines[0])["source"] == "a"
    assert quarantine.counts() == {"json_schema": len(lines)}
    assert Quarantine().counts() == {}
