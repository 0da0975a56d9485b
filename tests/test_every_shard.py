"""Work spread over processes gives what one process gives."""

import pickle
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from sample_records import CATEGORIES, record

from glipv2.jobs.check import check
from glipv2.jobs.survey import survey_shard
from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.shards import open_shard_set, write_shard_set


@pytest.fixture
def folder(tmp_path):
    write_shard_set(str(tmp_path), map(record, range(30)), CATEGORIES, {}, samples_per_shard=8)
    return tmp_path


def test_two_ray_actors_find_the_problems_that_one_process_finds(folder):
    import ray

    (folder / "shard-000001.tar").unlink()
    tar = folder / "shard-000002.tar"
    tar.write_bytes(tar.read_bytes().replace(b"red square", b"red sphere", 1))
    one = check(str(folder), workers=1)
    try:
        two = check(str(folder), workers=2)
    finally:
        ray.shutdown()
    assert one == two
    assert [problem.reason for problem in one] == ["shard_missing", "shard_crc", "crc_mismatch"]


def test_figures_survive_the_way_from_another_process(folder):
    survey = survey_shard(open_shard_set(str(folder)), 0)
    assert pickle.loads(pickle.dumps(survey)) == survey
    assert survey.samples == 8


def test_fewer_workers_than_one_are_refused(folder):
    with pytest.raises(ConfigError, match="--workers"):
        check(str(folder), workers=0)
