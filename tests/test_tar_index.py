import json
import sys
import tarfile
from pathlib import Path

import pytest
import webdataset

sys.path.insert(0, str(Path(__file__).parent))
from sample_records import jpeg  # noqa: E402

from glipv2.jobs.cli import main  # noqa: E402
from glipv2.pipeline import storage  # noqa: E402
from glipv2.pipeline.errors import DataError  # noqa: E402
from glipv2.pipeline.shards import (  # noqa: E402
    check_shard_sizes,
    iterate_records,
    open_shard_set,
    read_raw,
)
from glipv2.pipeline.stream import Stream, StreamConfig  # noqa: E402


@pytest.fixture
def tars(tmp_path):
    """Two tars as img2dataset writes them, with one sample that lost its image."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(2):
        with webdataset.TarWriter(str(folder / f"{number:05d}.tar")) as tar:
            for sample in range(5):
                key = f"{number:05d}{sample:04d}"
                members = {"txt": f"thing {key}", "json": {"caption": "x", "url": "http://a.b/c"}}
                if (number, sample) != (1, 3):
                    members["jpg"] = jpeg(10 * number + sample)
                tar.write({"__key__": key, **members})
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def test_tars_become_a_set_where_they_are(tars, capsys):
    before = contents(tars)
    assert main(["prepare", "webdataset", "--root", str(tars), "--index-only"]) == 0
    assert contents(tars) == before
    assert "9 samples, 0 boxes" in capsys.readouterr().out
    made = open_shard_set(str(tars))
    assert [shard.samples for shard in made.shards] == [5, 4]
    assert made.info["counts"] == {"image_missing": 1}
    records = list(iterate_records(str(tars)))
    assert [record.caption for record in records][:2] == ["thing 000000000", "thing 000000001"]
    assert [record.image for record in records[:5]] == [jpeg(sample) for sample in range(5)]
    assert {record.task for record in records} == {"pairs"}
    assert main(["check", str(tars), "--workers", "1"]) == 0
    assert main(["prepare", "webdataset", "--root", str(tars), "--index-only"]) == 0
    assert "are there already" in capsys.readouterr().out


def test_an_indexed_set_holds_the_same_records_as_a_copy(tars, tmp_path):
    out = str(tmp_path / "copy")
    assert main(["prepare", "webdataset", "--root", str(tars), "--out", out]) == 0
    assert main(["prepare", "webdataset", "--root", str(tars), "--index-only"]) == 0

    def said(url):
        return [(r.image, r.caption, r.width, r.height, r.provenance) for r in iterate_records(url)]

    assert said(out) == said(str(tars))


def test_an_indexed_set_streams_like_any_other(tars):
    assert main(["prepare", "webdataset", "--root", str(tars), "--index-only"]) == 0
    sets = {"web": open_shard_set(str(tars))}
    stream = Stream(sets, {"web": 1.0}, StreamConfig(seed=1, global_batch=3, lanes=3))
    batches = stream.batches(stream.start())
    captions = {slot.record.caption for _ in range(6) for slot in next(batches)[0]}
    assert len(captions) == 9


def test_a_changed_tar_is_noticed(tars):
    assert main(["prepare", "webdataset", "--root", str(tars), "--index-only"]) == 0
    path = tars / "00000.tar"
    data = bytearray(path.read_bytes())
    data[data.index(jpeg(0)) + 30] ^= 1
    path.write_bytes(data)
    raws = read_raw(open_shard_set(str(tars)), 0, 0, 5)
    assert [raw.error.reason if raw.error else "" for raw in raws] == ["crc_mismatch"] + [""] * 4
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match="holds .* bytes instead of"):
        check_shard_sizes(open_shard_set(str(tars)))


def test_a_tar_that_is_cut_off_gives_what_comes_before(tars):
    path = tars / "00001.tar"
    path.write_bytes(path.read_bytes()[: 512 * 13 + 100])
    assert main(["prepare", "webdataset", "--root", str(tars), "--index-only"]) == 0
    made = open_shard_set(str(tars))
    assert made.info["counts"]["tar_damaged"] == 1
    assert 5 < len(list(iterate_records(str(tars)))) == made.samples < 9
    lines = storage.read_bytes(f"{tars}/dropped/00001.jsonl").decode().splitlines()
    assert any("00001.tar at byte" in json.loads(line)["where"] for line in lines)


def test_an_index_of_nothing_leaves_the_tars(tars, tmp_path):
    for path in tars.glob("*.tar"):
        path.write_bytes(b"\0" * 10_240)
    before = contents(tars)
    assert main(["prepare", "webdataset", "--root", str(tars), "--index-only"]) == 2
    assert contents(tars) == before and not list((tars / "commits").iterdir())


def test_mistakes_are_named(tars, tmp_path, capsys):
    root = ["prepare", "webdataset", "--root", str(tars)]
    assert main(root) == 2
    assert main([*root, "--out", str(tmp_path / "x"), "--index-only"]) == 2
    assert main([*root, "--index-only", "--min-side", "9"]) == 2
    (tars / "00001.tar").rename(tars / "part 1.tar")
    assert main([*root, "--index-only"]) == 2
    said = capsys.readouterr().err
    assert said.count("give either --out") == 2 and "leaves nothing out by choice" in said
    assert "rename it to letters" in said


def test_members_with_long_names_are_found(tmp_path):
    folder = tmp_path / "long"
    folder.mkdir()
    stem = "a" * 120
    with tarfile.open(folder / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for kind, data in (("jpg", jpeg()), ("txt", b"a long name")):
            (tmp_path / "data").write_bytes(data)
            tar.add(tmp_path / "data", f"{stem}.{kind}")
    assert main(["prepare", "webdataset", "--root", str(folder), "--index-only"]) == 0
    (record,) = iterate_records(str(folder))
    assert record.caption == "a long name" and record.image == jpeg()
