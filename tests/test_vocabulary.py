import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from sample_records import jpeg  # noqa: E402

from glipv2.jobs.cli import main
from glipv2.model.tokenizer import Tokenizer, tiny_vocab
from glipv2.pipeline import storage
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.loader import shared_categories
from glipv2.pipeline.records import Record, Region
from glipv2.pipeline.shards import write_shard_set
from glipv2.pipeline.vocabulary import read_vocabulary, vocabulary_of, write_vocabulary

COCO, GENOME = ("person", "tv", "dog"), ("television_(set)", "man", "dog", "tv")


def make_set(folder, name, categories):
    record = Record(key="one", image=jpeg(), image_format="jpg", width=32, height=24,
                    task="detection", regions=(Region(box=(0, 0, 9, 9), category=0),))  # fmt: skip
    return write_shard_set(str(folder / name), [record], categories, {})


@pytest.fixture
def sets(tmp_path):
    return {"coco": make_set(tmp_path, "coco", COCO), "vg": make_set(tmp_path, "vg", GENOME)}


def test_names_that_are_said_to_be_the_same_share_an_id(sets):
    ids = vocabulary_of(sets.values(), [["tv", "television_(set)"], ["person", "man"]])
    assert ids["tv"] == ids["television"] and ids["person"] == ids["man"]
    assert len(set(ids.values())) == 3 and sorted(ids) == [
        "dog",
        "man",
        "person",
        "television",
        "tv",
    ]


def test_the_command_makes_what_the_loader_reads(sets, tmp_path, capsys):
    tokenizer = Tokenizer.from_vocab(tiny_vocab(), 64)
    out = str(tmp_path / "vocabulary.json")
    urls = [shard_set.url for shard_set in sets.values()]
    assert main(["prepare", "vocabulary", *urls, "--same", "tv,television", "--out", out]) == 0
    assert "5 names of 4 categories" in capsys.readouterr().out
    found = shared_categories(sets, tokenizer, out)
    coco, genome = found["coco"].ids, found["vg"].ids
    assert coco[1] == genome[0] == genome[3] and coco[2] == genome[2]
    assert len({*coco, *genome}) == 4
    plain = shared_categories(sets, tokenizer)
    assert plain["coco"].ids[1] == plain["vg"].ids[3] != plain["vg"].ids[0]


def test_mistakes_are_named(sets, tmp_path):
    with pytest.raises(DataError, match="'televisions'; the nearest there are television$"):
        vocabulary_of(sets.values(), [["tv", "televisions"]])
    with pytest.raises(DataError, match="no set has the category 'xyz'; check its spelling"):
        vocabulary_of(sets.values(), [["tv", "xyz"]])
    with pytest.raises(DataError, match="'tv' is in two groups"):
        vocabulary_of(sets.values(), [["tv", "dog"], ["tv", "man"]])
    url = str(tmp_path / "vocabulary.json")
    write_vocabulary(url, vocabulary_of([sets["coco"]]))
    with pytest.raises(DataError, match="lacks 2 categories of the mixture, the first is 'man'"):
        read_vocabulary(url, ["man", "television", "tv"])
    for broken in ({"tv": 1}, {"schema": 1, "ids": {"tv": "1"}}, {"schema": 2, "ids": {}}):
        storage.write_json(url, broken)
        with pytest.raises(DataError, match=url):
            read_vocabulary(url, ["tv"])
