"""glipv2 check finds every kind of damage, says where it is, and finds none in a good set."""

import io
import json
import os
import re
import shutil
import sys
import tarfile
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from sample_records import CATEGORIES, jpeg, record

from glipv2.jobs import check as check_job
from glipv2.jobs import cli
from glipv2.jobs.check import CURES, check
from glipv2.jobs.prepare import prepare_set
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Region
from glipv2.pipeline.shards import (
    RawSample,
    record_members,
    shard_name,
    write_manifest,
    write_raw_shard,
    write_shard,
    write_shard_set,
)


@pytest.fixture(scope="module")
def good_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check") / "set"
    write_shard_set(str(folder), map(record, range(10)), CATEGORIES, {}, samples_per_shard=4)
    return folder


@pytest.fixture
def folder(good_set, tmp_path):
    """A good set of 3 shards with 4, 4 and 2 samples, to be damaged."""
    return Path(shutil.copytree(good_set, tmp_path / "set"))


def found(url):
    """(file, key, reason) of each problem."""
    return [(p.file.rsplit("/", 1)[1], p.key, p.reason) for p in check(str(url), workers=1)]


def offset_in_tar(path, member):
    """Where a member's header begins, as the standard library reads it."""
    with tarfile.open(path) as tar:
        return tar.getmember(member).offset


def test_a_good_set_is_ok_anywhere(folder, capsys):
    assert check(str(folder), decode=True, workers=1) == []
    assert cli.main(["check", str(folder), "--workers", "1"]) == 0
    assert capsys.readouterr().out == f"{folder}: ok, 10 samples in 3 shards\n"
    url = f"memory://{uuid.uuid4().hex}"
    write_shard_set(url, map(record, range(3)), CATEGORIES, {})
    assert check(url) == []


def test_a_flipped_bit_is_found_with_its_sample_and_its_place(folder):
    tar = folder / "shard-000001.tar"
    start = offset_in_tar(tar, "key0006.jpg")
    data = bytearray(tar.read_bytes())
    data[start + 700] ^= 4
    tar.write_bytes(data)
    whole, sample = check(str(folder), workers=1)
    assert (whole.file, whole.key, whole.reason) == (str(tar), "", "shard_crc")
    assert (sample.file, sample.key, sample.reason) == (str(tar), "key0006", "crc_mismatch")
    assert sample.offset == start


def test_a_flipped_bit_in_the_end_mark_is_found_too(folder):
    tar = folder / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[-1] ^= 1
    tar.write_bytes(data)
    assert found(folder) == [("shard-000000.tar", "", "shard_crc")]


def test_truncated_and_missing_shards_are_found_in_one_go(folder):
    tar = folder / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    (folder / "shard-000002.tar").unlink()
    assert found(folder) == [
        ("shard-000000.tar", "", "shard_size"),
        ("shard-000002.tar", "", "shard_missing"),
    ]


def edit_index(record):
    record["index"][0][1] += 512


def edit_bytes(record):
    record["bytes"] += 1


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (edit_index, "commit_other"),
        (edit_bytes, "commit_other"),
        (lambda record: record.pop("index"), "commit_damaged"),
        (lambda record: record.update(schema=0), "commit_damaged"),
        (lambda record: record.update(stats=float("nan")), "commit_damaged"),
    ],
)
def test_an_edited_commit_record_is_found(folder, damage, reason):
    path = folder / "commits" / "shard-000001.json"
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    assert found(folder) == [("shard-000001.json", "", reason)]


def test_a_missing_commit_record_is_found_and_other_shards_are_still_checked(folder):
    (folder / "commits" / "shard-000000.json").unlink()
    (folder / "shard-000001.tar").unlink()
    assert found(folder) == [
        ("shard-000000.json", "", "commit_missing"),
        ("shard-000001.tar", "", "shard_missing"),
    ]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-10],
        lambda data: data.replace(b"red square", b"red sphere"),
        lambda data: b"[]",
        lambda data: b"\xff" + data,
        lambda data: data.replace(b'"info":{}', b'"info":{"x":NaN}'),
        lambda data: data.replace(b'"shards":[', b'"shards":[7,'),
    ],
)
def test_a_damaged_manifest_is_a_problem_in_the_list(folder, damage, capsys):
    manifest = folder / "dataset.json"
    data = manifest.read_bytes()
    manifest.write_bytes(damage(data))
    assert manifest.read_bytes() != data
    assert found(folder) == [("dataset.json", "", "manifest_invalid")]
    assert cli.main(["check", str(folder)]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_key_that_occurs_twice_is_found_in_any_shards(tmp_path):
    url = str(tmp_path / "set")
    keys = (["a", "b", "c"], ["d", "b"], ["b", "a"])
    shards = [
        write_shard(url, shard_name(n), [replace(record(n), key=key) for key in own])
        for n, own in enumerate(keys)
    ]
    write_manifest(url, shards, CATEGORIES, {})
    assert found(url) == [
        ("shard-000001.tar", "b", "key_twice"),
        ("shard-000002.tar", "b", "key_twice"),
        ("shard-000002.tar", "a", "key_twice"),
    ]
    problem = check(url, workers=1)[0]
    first = offset_in_tar(tmp_path / "set" / "shard-000000.tar", "b.jpg")
    assert problem.detail == f"it is also in shard-000000 at byte {first}"
    assert problem.offset == offset_in_tar(tmp_path / "set" / "shard-000001.tar", "b.jpg")


def raw(key, **fields):
    """A sample whose first region, or else the record itself, has other fields."""
    members = record_members(record())
    document = json.loads(members["json"])
    for name, value in fields.items():
        (document if name in document else document["regions"][0])[name] = value
    return RawSample(key=key, members={**members, "json": json.dumps(document).encode()})


CAPTION = len(record().caption)
BAD = {
    "span": (raw("span", spans=[[2, CAPTION + 1]]), "span_outside"),
    "box": (raw("box", box=[30.0, 2.0, 34.0, 20.0]), "box_outside"),
    "inverted": (raw("inverted", box=[20.0, 2.0, 3.0, 20.0]), "box_inverted"),
    "category": (raw("category", category=2), "category_unknown"),
    "unnamed": (raw("unnamed", task="detection"), "category_missing"),
    "score": (raw("score", score=1.5), "score_invalid"),
    "mask": (raw("mask", mask={"size": [24, 32], "counts": "01"}), "mask_invalid"),
    "schema": (raw("schema", provenance=3), "json_schema"),
    "size": (raw("size", width=31), "size_mismatch"),
    "text": (RawSample(key="text", members={"jpg": jpeg(), "json": b"{"}), "json_invalid"),
    "image": (RawSample(key="image", members={"json": b"{}"}), "json_schema"),
}


def test_every_sample_that_training_would_refuse_is_found(tmp_path):
    url = str(tmp_path / "set")
    samples = [raw("good", category=1), *(sample for sample, _ in BAD.values())]
    write_manifest(url, [write_raw_shard(url, shard_name(0), samples)], CATEGORIES, {})
    expected = [("shard-000000.tar", key, reason) for key, (_, reason) in BAD.items()]
    assert found(url) == expected


def test_a_picture_damaged_behind_its_header_needs_decode(tmp_path):
    url = str(tmp_path / "set")
    whole = jpeg(size=(320, 240))
    cut = record(image=whole[: len(whole) * 3 // 4], width=320, height=240, regions=())
    write_shard_set(url, [cut], CATEGORIES, {})
    assert check(url) == []
    [problem] = check(url, decode=True)
    assert (problem.key, problem.reason) == ("key0000", "image_undecodable")


def test_a_good_mask_is_no_problem(tmp_path):
    url = str(tmp_path / "set")
    half = {"size": [24, 32], "counts": "P<P<"}  # 384 pixels outside, 384 inside
    region = Region(box=(16, 0, 32, 24), spans=((0, 3),), mask=half)
    write_shard_set(url, [record(regions=(region,))], CATEGORIES, {})
    assert check(url) == []


def test_each_problem_is_a_line_with_its_cure_and_the_file_has_all(folder, tmp_path, capsys):
    for shard in range(3):
        tar = folder / f"shard-{shard:06d}.tar"
        data = bytearray(tar.read_bytes())
        data[600] ^= 1
        tar.write_bytes(data)
    out = tmp_path / "problems.json"
    words = ["check", str(folder), "--workers", "1", "--limit", "2", "--json", str(out)]
    assert cli.main(words) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(f"{folder}/shard-000000.tar: shard_crc (crc32c ")
    assert lines[1].startswith(f"{folder}/shard-000000.tar key0000 at byte 0: crc_mismatch (")
    cure = CURES["crc_mismatch"].format(shard="shard-000000")
    assert all(line.endswith(f" -> {cure}") for line in lines[:2])
    assert lines[2] == f"... and 4 more; all are in {out}"
    assert lines[3].endswith("6 problems: shard_crc 3, crc_mismatch 3")
    problems = json.loads(out.read_text())["problems"]
    assert [p["key"] for p in problems] == ["", "key0000", "", "key0004", "", "key0008"]
    assert all(p["cure"] for p in problems)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-700])


TAR, COMMIT = "shard-000001.tar", "commits/shard-000001.json"


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        (TAR, flip_a_bit, "shard_crc"),
        (TAR, cut, "shard_size"),
        (TAR, Path.unlink, "shard_missing"),
        (COMMIT, Path.unlink, "commit_missing"),
        (COMMIT, cut, "commit_damaged"),
        (COMMIT, lambda path: shutil.copy(path.with_name("shard-000000.json"), path),
         "commit_other"),
        ("dataset.json", cut, "manifest_invalid"),
    ],
)  # fmt: skip
def test_the_printed_cure_cures(tmp_path, name, damage, reason, capsys):
    """Followed to the letter: delete what it names, run the command again."""
    url, options = tmp_path / "set", PrepareConfig(source="toy", set="toy_val", count=10, size=64)
    made = prepare_set(str(url), options, samples_per_shard=4)
    before = {path.name: path.read_bytes() for path in url.glob("*.tar")}
    damage(url / name)
    assert cli.main(["check", str(url)]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if reason in line)
    _, _, cure = line.partition(" -> ")
    if reason in ("shard_size", "shard_missing"):
        with pytest.raises(DataError, match=f"`glipv2 check {url}` says how"):
            prepare_set(str(url), options, samples_per_shard=4)
    named = re.search(r"delete (.+?)(?:, as far as they are there,)? and run", cure)[1]
    files = re.split(r", | and ", named) if named != "it" else ["dataset.json"]
    for file in files:
        (url / file).unlink(missing_ok=True)
    assert prepare_set(str(url), options, samples_per_shard=4).digest == made.digest
    assert check(str(url)) == []
    assert {path.name: path.read_bytes() for path in url.glob("*.tar")} == before


@pytest.fixture
def tars(tmp_path):
    """Tars of a user, indexed in place."""
    for number in range(2):
        with tarfile.open(tmp_path / f"{number:05d}.tar", "w") as tar:
            for name, data in (("a.jpg", jpeg(number)), ("a.txt", b"a dog")):
                info = tarfile.TarInfo(f"{number}{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert cli.main(["prepare", "webdataset", "--root", str(tmp_path), "--index-only"]) == 0
    return tmp_path


@pytest.mark.parametrize("damage", [flip_a_bit, cut, Path.unlink])
def test_the_cure_for_an_index_leaves_the_tars_alone(tars, damage, capsys):
    original = (tars / "00001.tar").read_bytes()
    damage(tars / "00001.tar")
    assert cli.main(["check", str(tars)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if " -> " in line]
    assert lines
    for line in lines:
        assert "copy 00001.tar again from where it came from; if" in line
        assert "delete dataset.json, prepare.json and the folder commits, but no tar" in line
        assert not re.search(r"delete [^:;]*00001\.tar", line)
    (tars / "00001.tar").write_bytes(original)  # the first cure
    assert check(str(tars)) == []


@pytest.mark.parametrize("what", ["another tar", "commit"])
def test_an_index_is_made_anew_as_it_is_said(tars, what, capsys):
    if what == "commit":
        (tars / "commits" / "00001.json").unlink()
    else:
        (tars / "00001.tar").write_bytes((tars / "00000.tar").read_bytes() + b"\0" * 10_240)
        words = ["prepare", "webdataset", "--root", str(tars), "--index-only"]
        assert cli.main(words) == 2  # and does not say to delete the folder
        said = capsys.readouterr().err
        assert "not the same tars" in said and "delete that folder" not in said
        assert "delete dataset.json, prepare.json and the folder commits there, but no tar" in said
    assert cli.main(["check", str(tars)]) == 1
    said = capsys.readouterr().out
    assert "delete dataset.json, prepare.json and the folder commits, but no tar, and run" in said
    (tars / "dataset.json").unlink()
    (tars / "prepare.json").unlink()
    shutil.rmtree(tars / "commits")
    assert cli.main(["prepare", "webdataset", "--root", str(tars), "--index-only"]) == 0
    assert check(str(tars)) == []


def test_no_set_at_all_is_a_mistake(tmp_path, capsys):
    assert cli.main(["check", str(tmp_path / "nothing")]) == 2
    assert "doesn't exist" in capsys.readouterr().err


def test_a_shard_that_ends_while_it_is_read_is_a_problem_not_a_crash(folder, monkeypatch):
    def short(number, length, offset):
        second = os.path.realpath(f"/proc/self/fd/{number}").endswith("1.tar")
        return read(number, min(length, 100) if second else length, offset)

    read = os.pread
    monkeypatch.setattr(os, "pread", short)
    assert found(folder) == [("shard-000001.tar", "", "read_failed")]
    assert check_job.CURES["read_failed"].startswith("check again")
