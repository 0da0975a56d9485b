import json
import pickle
import sys
import tarfile
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from sample_records import CATEGORIES, jpeg, record  # noqa: E402

from glipv2.pipeline import shard_format, shards  # noqa: E402
from glipv2.pipeline.errors import BadSample  # noqa: E402


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


def test_links_and_second_members_of_one_name_are_refused(tmp_path):
    content = tarfile.TarInfo("one.json")
    link = tarfile.TarInfo("one.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    for second in (link, content):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            tar.addfile(content)
            tar.addfile(second)
        with (
            open(tmp_path / "a.tar", "rb") as file,
            pytest.raises(tarfile.HeaderError, match=second.name),
        ):
            list(shard_format.walk_samples(file))


def test_an_area_is_kept_and_only_written_where_there_is_one():
    plain = record()
    stated = replace(plain, regions=(replace(plain.regions[0], area=1023.5),))
    members = shards.record_members(stated)
    assert json.loads(members["json"])["regions"][0]["area"] == 1023.5
    assert shards.parse_record(shards.RawSample(key=stated.key, members=members)) == stated
    assert b"area" not in shards.record_members(plain)["json"]
    for wrong in (-1, "9", True):
        text = altered(lambda d, area=wrong: d["regions"][0].update(area=area))
        with pytest.raises(BadSample, match="json_schema: area"):
            shards.parse_record(raw_with(json=text))


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
