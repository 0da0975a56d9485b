import io
import json
import pickle
import threading
import uuid
from dataclasses import replace

import pytest
import webdataset
from PIL import Image

from glipv2.pipeline import shard_reader, shards, storage
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.records import Record, Region

CATEGORIES = ("red square", "blue circle")


def jpeg(shade=0, size=(32, 24), image_format="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade % 256, 90, 30)).save(buffer, format=image_format)
    return buffer.getvalue()


def record(number=0, **changes):
    caption = f"picture {number} of a red square"
    region = Region(box=(1.0, 2.0, 20.5, 20.0), spans=((len(caption) - 10, len(caption)),))
    return replace(
        Record(
            key=f"key{number:04d}",
            image=jpeg(number),
            image_format="jpg",
            width=32,
            height=24,
            task="grounding",
            caption=caption,
            regions=(region,),
            provenance={"source": "test"},
        ),
        **changes,
    )


def records(count):
    return [record(number) for number in range(count)]


def write_set(url, count=10, per_shard=4):
    return shards.write_shard_set(url, records(count), CATEGORIES, {"from": "test"}, per_shard)


def contents(url):
    """Every byte of a set but for the name of the winning attempt."""
    names = [f"{s.name}.tar" for s in shards.open_shard_set(url).shards] + ["dataset.json"]
    return {name: storage.read_bytes(storage.join(url, name)) for name in names}


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    return str(tmp_path / "set") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def test_records_come_back_equal_and_in_order(folder):
    written = write_set(folder)
    assert [shard.samples for shard in written.shards] == [4, 4, 2]
    assert written.samples == 10
    assert shards.open_shard_set(folder) == written
    assert list(shards.iterate_records(folder)) == records(10)
    assert storage.list_names(storage.join(folder, "attempts")) == []


def test_plain_webdataset_reads_our_shards(tmp_path):
    url = str(tmp_path / "set")
    write_set(url)
    paths = [str(tmp_path / "set" / f"shard-00000{number}.tar") for number in range(3)]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"key{n:04d}" for n in range(10)]
    assert samples[3]["jpg"] == jpeg(3)
    assert json.loads(samples[3]["json"])["caption"] == record(3).caption


def test_the_same_records_give_the_same_bytes_anywhere(tmp_path):
    one, two = str(tmp_path / "one"), f"memory://{uuid.uuid4().hex}"
    assert write_set(one).digest == write_set(two).digest
    assert contents(one) == contents(two)


def test_one_ranged_read_fetches_a_slice_of_a_shard(folder, monkeypatch):
    shard_set = write_set(folder, 12, 12)
    shards.read_index(shard_set, 0)
    reads = []
    real = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda *args: reads.append(args) or real(*args))
    raws = shards.read_raw(shard_set, 0, 5, 8)
    assert [raw.key for raw in raws] == ["key0005", "key0006", "key0007"]
    assert [shards.parse_record(raw) for raw in raws] == records(8)[5:]
    assert len(reads) == 1
    assert reads[0][2] - reads[0][1] < storage.size(shard_set.shard_url(0)) / 3


# ---- commits ----


def test_two_writers_racing_on_one_shard_make_one_commit_and_the_loser_cleans_up(
    folder, monkeypatch
):
    barrier = threading.Barrier(2)
    real = storage.create_once

    def create_together(url, data):
        barrier.wait(timeout=20)
        return real(url, data)

    monkeypatch.setattr(storage, "create_once", create_together)
    results, errors = [], []

    def write(first):
        try:
            results.append(shards.write_shard(folder, "shard-000000", records(8)[first:]))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert results[0] == results[1]
    assert storage.list_names(storage.join(folder, "attempts")) == []
    assert storage.list_names(storage.join(folder, "commits")) == ["shard-000000.json"]
    tar = storage.join(folder, "shard-000000.tar")
    assert storage.file_crc32c(tar) == results[0].crc32c


class Killed(BaseException):
    pass


WRITING = ("upload", "create_once", "move", "delete", "write_bytes")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("act", range(12))
def test_a_kill_around_any_write_and_a_rerun_give_the_same_bytes(tmp_path, monkeypatch, act, when):
    write_set(str(tmp_path / "whole"), 7)
    url, done = str(tmp_path / "killed"), []

    def killing(name):
        real = getattr(storage, name)

        def call(*args):
            done.append(name)
            number = len(done) - 1
            if number == act and when == "before":
                raise Killed
            result = real(*args)
            if number == act:
                raise Killed
            return result

        return call

    with monkeypatch.context() as patch:
        for name in WRITING:
            patch.setattr(storage, name, killing(name))
        if act < 9:
            with pytest.raises(Killed):
                write_set(url, 7)
            assert not storage.exists(f"{url}/dataset.json") or done[-1] == "write_bytes"
        else:
            write_set(url, 7)
            assert done == [*WRITING[:4]] * 2 + ["write_bytes"]
    write_set(url, 7)
    assert contents(url) == contents(str(tmp_path / "whole"))
    assert storage.list_names(f"{url}/attempts") == []


def test_a_committed_shard_is_not_made_again(folder):
    first = shards.write_shard(folder, "shard-000000", records(3))

    def never():
        pytest.fail("asked for records of a committed shard")
        yield

    assert shards.write_shard(folder, "shard-000000", never()) == first
    assert shards.committed_shard(folder, "shard-000000") == first
    assert shards.committed_shard(folder, "shard-000001") is None


def test_stats_filled_while_writing_are_in_the_commit_and_the_manifest(folder):
    stats = {}

    def counted():
        for item in records(3):
            stats["seen"] = stats.get("seen", 0) + 1
            yield item

    shard = shards.write_shard(folder, "shard-000000", counted(), stats)
    assert shard.stats == {"seen": 3}
    assert shards.write_manifest(folder, [shard], CATEGORIES, {}).shards[0].stats == {"seen": 3}


def test_a_shard_may_be_empty_but_a_set_may_not(folder):
    empty = shards.write_shard(folder, "shard-000000", [])
    assert empty.samples == 0
    with pytest.raises(DataError, match="no samples"):
        shards.write_manifest(folder, [empty], CATEGORIES, {})
    full = shards.write_shard(folder, "shard-000001", records(2))
    shards.write_manifest(folder, [empty, full], CATEGORIES, {})
    assert [item.key for item in shards.iterate_records(folder)] == ["key0000", "key0001"]


def test_a_folder_with_shards_of_other_records_is_not_mixed_into(folder):
    write_set(folder)
    with pytest.raises(DataError, match="committed from other records"):
        shards.write_shard_set(folder, records(9)[1:], CATEGORIES, {}, 4)


def test_a_commit_whose_files_are_gone_is_an_error_with_its_cure(folder):
    write_set(folder)
    storage.delete(storage.join(folder, "shard-000001.tar"))
    with pytest.raises(DataError, match=r"delete .*commits/shard-000001\.json and run"):
        shards.committed_shard(folder, "shard-000001")


def test_keys_that_repeat_or_could_leave_the_folder_are_refused(folder):
    with pytest.raises(DataError, match="occurs twice"):
        shards.write_shard(folder, "shard-000000", [record(1), record(1)])
    with pytest.raises(DataError, match="occurs twice"):
        write_twice = [record(1), record(2), record(1)]
        shards.write_shard_set(folder, write_twice, CATEGORIES, {}, 2)
    with pytest.raises(DataError, match="key_invalid"):
        shards.write_shard(folder, "shard-000009", [record(1, key="../../etc/passwd")])
    with pytest.raises(DataError, match="no shard name"):
        shards.write_shard(folder, "../up", records(1))


# ---- damage ----


def test_a_truncated_shard_is_an_error_with_file_and_sizes_before_any_sample(folder):
    shard_set = write_set(folder)
    url = storage.join(folder, "shard-000001.tar")
    whole = storage.read_bytes(url)
    storage.write_bytes(url, whole[:-5000])
    message = rf"shard-000001\.tar holds {len(whole) - 5000} bytes instead of {len(whole)}"
    with pytest.raises(DataError, match=message):
        shards.check_shard_sizes(shard_set)
    with pytest.raises(DataError, match=message):
        shards.read_raw(shard_set, 1, 0, 1)


def test_a_shard_truncated_while_it_is_being_read_is_an_error(folder):
    shard_set = write_set(folder)
    shards.read_raw(shard_set, 0, 0, 4)
    url = storage.join(folder, "shard-000000.tar")
    storage.write_bytes(url, storage.read_bytes(url)[:3000])
    with pytest.raises(DataError, match=r"shard-000000\.tar holds 3000 bytes instead of"):
        shards.read_raw(shard_set, 0, 0, 4)


def test_a_missing_shard_is_named(folder):
    shard_set = write_set(folder)
    storage.delete(storage.join(folder, "shard-000002.tar"))
    with pytest.raises(DataError, match=r"shard-000002\.tar is missing"):
        shards.check_shard_sizes(shard_set)


@pytest.mark.parametrize("where", [0, 600, 1100, 2000])
def test_an_altered_byte_condemns_its_own_sample_only(folder, where):
    shard_set = write_set(folder)
    entry = shards.read_index(shard_set, 0)[1]
    url = storage.join(folder, "shard-000000.tar")
    data = bytearray(storage.read_bytes(url))
    data[entry.offset + where] ^= 1
    storage.write_bytes(url, bytes(data))
    raws = shards.read_raw(shard_set, 0, 0, 4)
    assert [raw.error and raw.error.reason for raw in raws] == [None, "crc_mismatch", None, None]
    with pytest.raises(BadSample, match="crc_mismatch"):
        shards.parse_record(raws[1])


def test_bad_samples_are_reported_and_the_others_still_come(folder):
    shard_set = write_set(folder)
    entry = shards.read_index(shard_set, 1)[2]
    url = storage.join(folder, "shard-000001.tar")
    data = bytearray(storage.read_bytes(url))
    data[entry.offset + 700] ^= 1
    storage.write_bytes(url, bytes(data))
    bad = []
    keys = [r.key for r in shards.iterate_records(folder, lambda *args: bad.append(args))]
    assert keys == [f"key{n:04d}" for n in range(10) if n != 6]
    assert [(name, key, why.reason) for name, key, why in bad] == [
        ("shard-000001", "key0006", "crc_mismatch")
    ]
    with pytest.raises(DataError, match="key0006: crc_mismatch"):
        list(shards.iterate_records(folder))


def test_an_edited_manifest_is_refused(folder):
    write_set(folder)
    url = storage.join(folder, "dataset.json")
    storage.write_bytes(url, storage.read_bytes(url).replace(b"red square", b"red sphere"))
    with pytest.raises(DataError, match="altered after it was written"):
        shards.open_shard_set(folder)


@pytest.mark.parametrize("content", [b"<html>404</html>", b"[]", b"{}", b'{"schema": 99}', b"\xff"])
def test_a_file_that_is_no_manifest_is_refused(folder, content):
    storage.write_bytes(storage.join(folder, "dataset.json"), content)
    with pytest.raises(DataError, match=r"dataset\.json is no shard set manifest"):
        shards.open_shard_set(folder)


def test_an_incomplete_set_names_the_command_that_completes_it(folder):
    shards.write_shard(folder, "shard-000000", records(2))
    with pytest.raises(DataError, match="no complete shard set; make it with `glipv2 prepare`"):
        shards.open_shard_set(folder)


def test_another_commit_record_than_the_manifest_knows_is_refused(folder):
    shard_set = write_set(folder)
    url = storage.join(folder, "commits", "shard-000000.json")
    storage.write_bytes(url, storage.read_bytes(url).replace(b"key0001", b"key9999"))
    shard_reader._read_index.cache_clear()
    with pytest.raises(DataError, match="not the commit record"):
        shards.read_index(shard_set, 0)


# ---- strangers' samples ----


class Canary:
    def __reduce__(self):
        return (open, ("canary", "w"))


def raw_with(**members):
    base = shards.record_members(record())
    return shards.RawSample(key="key0000", members={**base, **members})


def test_a_pickle_member_is_never_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = f"memory://{uuid.uuid4().hex}"
    raw = raw_with(**{"pkl": pickle.dumps(Canary()), "pth": pickle.dumps(Canary())})
    shard = shards.write_raw_shard(url, "shard-000000", [raw])
    shards.write_manifest(url, [shard], CATEGORIES, {})
    assert list(shards.iterate_records(url)) == [record()]
    assert list(tmp_path.iterdir()) == []


def test_members_of_another_sample_or_links_are_refused():
    good = shards.RawSample(key="other", members={"json": b"{}"})
    url = f"memory://{uuid.uuid4().hex}"
    shards.write_raw_shard(url, "shard-000000", [good])
    data = storage.read_bytes(storage.join(url, "shard-000000.tar"))
    entry = shards.SampleEntry(
        key="mine", offset=0, length=1024, crc32c=storage.crc32c(data[:1024])
    )
    assert shard_reader._raw_sample(entry, data[:1024]).error.reason == "tar_invalid"


def altered(change):
    document = json.loads(shards.record_members(record())["json"])
    change(document)
    return json.dumps(document).encode()


def with_box(*box):
    return altered(lambda d: d["regions"][0].update(box=list(box)))


def with_span(*span):
    return altered(lambda d: d["regions"][0].update(spans=[list(span)]))


DEEP = b"[" * 100_000 + b"]" * 100_000
BAD_JSON = {
    "json_invalid: NaN": with_box(float("nan"), 0, 5, 5),
    "json_invalid: Infinity": with_box(0, 0, float("inf"), 5),
    "json_invalid: 1e999": with_box(0, 0, 5, 5).replace(b"[0, 0, 5, 5]", b"[0, 0, 1e999, 5]"),
    "json_invalid: maximum recursion": DEEP,
    "json_invalid: a field occurs twice": b'{"task": "pairs", "task": "pairs"}',
    "json_invalid: 'utf-8' codec": "{}é".encode("latin-1"),
    "json_invalid: Unexpected UTF-8 BOM": b"\xef\xbb\xbf{}",
    "json_invalid: Expecting": b"<html>",
    "json_schema: fields must be": b'{"caption": "x"}',
    "json_schema: task": altered(lambda d: d.update(task="eval")),
    "json_schema: width": altered(lambda d: d.update(width="32")),
    "json_schema: caption": altered(lambda d: d.update(caption=7)),
    "json_schema: caption must": altered(lambda d: d.update(caption="x" * 1_000_000)),
    "json_schema: caption: 'utf-8'": altered(lambda d: d.update(caption="\ud800")),
    "json_schema: regions": altered(lambda d: d.update(regions=d["regions"] * 10_000)),
    "json_schema: box": with_box(0, 0, "5", 5),
    "json_schema: box ": with_box(0, 0, 5),
    "json_schema: box is": with_box(0, 0, 10**400, 5),
    "json_schema: category": altered(lambda d: d["regions"][0].update(category=-1)),
    "box_inverted": with_box(9, 0, 5, 5),
    "box_empty": with_box(5, 0, 5, 5),
    "box_outside": with_box(0, 0, 40, 5),
    "box_outside: ": with_box(-30, -30, -10, -10),
    "score_invalid": altered(lambda d: d["regions"][0].update(score=1.5)),
    "span_outside": with_span(0, 500),
    "span_outside: [-3": with_span(-3, 2),
    "span_outside: [5, 5]": with_span(5, 5),
    "span_missing": altered(lambda d: d["regions"][0].update(spans=[])),
    "caption_empty": altered(lambda d: d.update(caption="  ", regions=[])),
    "category_missing": altered(lambda d: d.update(task="detection")),
    "category_unknown": altered(lambda d: d["regions"][0].update(category=2)),
    "size_mismatch": altered(lambda d: d.update(width=31)),
}


@pytest.mark.parametrize("message", BAD_JSON)
def test_a_broken_description_is_a_bad_sample_with_its_reason(message):
    with pytest.raises(BadSample) as caught:
        shards.parse_record(raw_with(json=BAD_JSON[message]), len(CATEGORIES))
    assert str(caught.value).startswith(message.strip()) or message in str(caught.value)


def test_a_box_reaching_a_pixel_over_the_edge_is_clipped():
    parsed = shards.parse_record(raw_with(json=with_box(-0.5, 0, 32.9, 24)))
    assert parsed.regions[0].box == (0.0, 0.0, 32.0, 24.0)


def test_an_image_under_the_wrong_extension_is_a_bad_sample():
    with pytest.raises(BadSample, match=r"image_format: named \.jpg but holds png"):
        shards.parse_record(raw_with(jpg=jpeg(image_format="PNG")))


def test_a_sample_without_image_or_description_is_a_bad_sample():
    members = shards.record_members(record())
    for missing, reason in (("jpg", "image_missing"), ("json", "json_missing")):
        rest = {name: data for name, data in members.items() if name != missing}
        with pytest.raises(BadSample, match=reason):
            shards.parse_record(shards.RawSample(key="key0000", members=rest))


def test_a_writer_refuses_what_a_reader_would_refuse(folder):
    outside = Region(box=(0.0, 0.0, 90.0, 5.0), spans=((0, 3),))
    with pytest.raises(DataError, match="record key0000 can't be stored: box_outside"):
        shards.write_shard(folder, "shard-000000", [record(regions=(outside,))])
    nan = Region(box=(0.0, 0.0, float("nan"), 5.0), spans=((0, 3),))
    with pytest.raises(DataError, match="json_invalid"):
        shards.write_shard(folder, "shard-000000", [record(regions=(nan,))])
