"""Few-shot subsets: at least k examples of every category, the same for a seed, none too many."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glipv2.data_prep.few_shot import LEAST, draw, few_shot_set
from glipv2.jobs.prepare import prepare_set
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.shard_format import RawSample
from glipv2.pipeline.shard_reader import iterate_records, open_shard_set, raw_samples
from glipv2.pipeline.shards import (
    shard_name,
    write_manifest,
    write_raw_shard,
    write_shard_set,
)

IMAGES = st.lists(st.dictionaries(st.integers(0, 5), st.integers(1, 4), max_size=3), max_size=40)


@settings(max_examples=200, deadline=None)
@given(IMAGES, st.integers(1, 10), st.integers(0, 5))
def test_every_category_has_enough_and_no_image_could_be_left_out(images, shots, seed):
    examples = [Counter(own) for own in images]
    taken = draw(examples, shots, seed)
    assert taken == sorted(set(taken)) == draw(examples, shots, seed)
    total, have = sum(examples, Counter()), sum((examples[n] for n in taken), Counter())
    wanted = {category: min(shots, count) for category, count in total.items()}
    assert all(have[category] >= wanted[category] for category in wanted)
    for number in taken:
        fewer = have - examples[number]
        assert any(fewer[category] < wanted[category] for category in wanted)


def test_every_image_of_a_rare_category_can_be_drawn():
    """GLIP's own sampler goes by image number, so its seeds make no difference."""
    examples = [Counter({number % 2: 1}) for number in range(20)]
    drawn = Counter(number for seed in range(400) for number in draw(examples, 1, seed))
    assert len(drawn) == 20 and sum(drawn.values()) == 800
    counts = np.array(list(drawn.values()))
    assert ((counts - 40) ** 2 / 40).sum() < 50  # chi square of 18 degrees: 99.99 %


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data") / "toy")
    options = PrepareConfig(source="toy", set="toy_detection", count=40, size=64, seed=3)
    prepare_set(folder, options, samples_per_shard=16)
    return open_shard_set(folder)


def test_a_subset_holds_its_images_whole_and_repeated(whole, tmp_path):
    url = str(tmp_path / "subset")
    subset = few_shot_set(url, whole, 2, seed=30)
    there = {record.key: record for record in iterate_records(whole.url)}
    records = list(iterate_records(url))
    own = [record for record in records if "_again" not in record.key]
    assert subset.info["few_shot"] == {
        "of": whole.digest, "shots": 2, "seed": 30, "images": len(own)
    }  # fmt: skip
    assert subset.categories == whole.categories
    assert 0 < len(own) < len(there) and len(records) >= LEAST and len(records) % len(own) == 0
    assert own == [there[record.key] for record in own]
    repeats = Counter(record.image for record in records)
    assert set(repeats.values()) == {len(records) // len(own)}
    total = Counter(r.category for record in there.values() for r in record.regions)
    have = Counter(r.category for record in own for r in record.regions)
    assert all(have[category] >= min(2, count) for category, count in total.items())
    stats = subset.shards[0].stats
    assert stats["totals"] == {
        "samples": len(records), "boxes": sum(len(record.regions) for record in records)
    }  # fmt: skip
    assert stats["tall"] == sum(record.height > record.width for record in records)


def test_a_bad_sample_is_left_out(whole, tmp_path, caplog):
    bad = RawSample(key="bad", members={"jpg": b"?", "json": b"{"})
    samples = [*raw_samples(whole, 0, 0, 6), bad]
    shard = write_raw_shard(str(tmp_path / "damaged"), shard_name(0), samples)
    damaged = write_manifest(str(tmp_path / "damaged"), [shard], whole.categories, {})
    subset = few_shot_set(str(tmp_path / "subset"), damaged, 0, seed=3)
    assert subset.info["few_shot"]["images"] == 6
    assert "bad is left out of the subsets" in caplog.text


def test_a_subset_is_made_once_and_another_is_not_put_in_its_place(whole, tmp_path):
    url = str(tmp_path / "subset")
    first = few_shot_set(url, whole, 1, seed=3)
    assert few_shot_set(url, whole, 1, seed=3) == first
    other = few_shot_set(str(tmp_path / "other"), whole, 1, seed=300)
    assert other.shards[0].crc32c != first.shards[0].crc32c
    with pytest.raises(DataError, match="holds another subset"):
        few_shot_set(url, whole, 1, seed=300)


def test_a_set_without_boxes_has_no_examples(whole, tmp_path: Path):
    from dataclasses import replace

    empty = [replace(record, regions=()) for record in iterate_records(whole.url)]
    bare = write_shard_set(str(tmp_path / "bare"), empty, whole.categories, {})
    with pytest.raises(DataError, match="no box to learn from"):
        few_shot_set(str(tmp_path / "subset"), bare, 1, seed=3)
