import io
import json
import os
import pickle
import tarfile
import tracemalloc

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.sources import open_source
from glipv2.data_prep.webdataset import tar_members
from glipv2.pipeline import storage
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import DataError


def image_bytes(image_format="JPEG", size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (90, 120, 30)).save(buffer, image_format)
    return buffer.getvalue()


def tar(*members, tar_format=tarfile.USTAR_FORMAT):
    """Bytes of a tar of (name, content) or TarInfo."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            data = content if isinstance(content, bytes) else content.encode()
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def special(name, kind, **fields):
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def sample(key, text="a dog"):
    return [(f"{key}.jpg", image_bytes()), (f"{key}.txt", text)]


def read(folder, tars=None, **options):
    for name, data in (tars or {}).items():
        (folder / name).write_bytes(data)
    dropped = Dropped()
    source = open_source(PrepareConfig(source="webdataset", root=str(folder), **options))
    return list(source.records(dropped)), dropped


def captions(records):
    return [record.caption for record in records]


def test_the_writers_own_tars_are_read_in_order(tmp_path):
    for number in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{number:05d}.tar")) as writer:
            for row in range(3):
                key = f"{number:05d}{row:04d}"
                about = {"caption": f"json {key}", "url": f"http://x/{key}", "status": "success"}
                content = {"jpg": image_bytes(), "txt": f"text\n {key}", "json": about}
                writer.write({"__key__": key, **content})
    (tmp_path / "00000_stats.json").write_text("{}")
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    records, dropped = read(tmp_path)
    keys = [f"{number:05d}{row:04d}" for number in range(2) for row in range(3)]
    assert captions(records) == [f"text {key}" for key in keys] and not dropped
    assert len({record.key for record in records}) == 6
    first = records[0]
    assert (first.task, first.image, first.width) == ("pairs", image_bytes(), 40)
    assert first.provenance == {
        "source": "webdataset",
        "file": "00000.tar",
        "key": "000000000",
        "origin": "http://x/000000000",
    }
    assert captions(read(tmp_path, caption_field="caption")[0]) == [f"json {key}" for key in keys]
    assert captions(read(tmp_path / "00001.tar")[0]) == [f"text {key}" for key in keys[3:]]


def test_keys_are_unique_across_tars_and_texts_may_be_json_alone(tmp_path):
    members = [("0.PNG", image_bytes("PNG")), ("0.json", '{"caption": "", "text": "a cat"}')]
    members += [("./deep/0.jpeg", image_bytes()), ("./deep/0.txt", "\ufeffa bird")]
    records, dropped = read(tmp_path, {"a.tar": tar(*members), "a-0.tar": tar(*sample("0"))})
    assert captions(records) == ["a dog", "a cat", "a bird"] and not dropped
    assert [r.provenance["key"] for r in records] == ["0", "0", "deep/0"]
    assert len({record.key for record in records}) == 3


def test_a_store_is_read_like_a_disk(tmp_path):
    url = f"memory://{tmp_path.name}"
    storage.write_bytes(f"{url}/a.tar", tar(*sample("0"), *sample("1", "a cat")))
    source = open_source(PrepareConfig(source="webdataset", root=url))
    assert captions(source.records(Dropped())) == ["a dog", "a cat"]


def test_members_that_can_not_be_used_are_counted_and_never_read(tmp_path):
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    members = [
        *sample("good"),
        ("good.pkl", pickle.dumps(Bomb())),
        ("good.pth", pickle.dumps(Bomb())),
        ("good.seg.png", image_bytes("PNG")),
        (".DS_Store", "x"),
        ("README", "x"),
        special("folder", tarfile.DIRTYPE),
        *sample("../outside"),
        *sample("/absolute"),
        *sample("in/../../side"),
        special("link.jpg", tarfile.SYMTYPE, linkname="/etc/passwd"),
        ("link.txt", "a link"),
        special("hard.jpg", tarfile.LNKTYPE, linkname="good.jpg"),
        special("device.jpg", tarfile.CHRTYPE, devmajor=1, devminor=3),
        special("pipe.jpg", tarfile.FIFOTYPE),
        *sample("last"),
    ]
    before = sorted(p.name for p in tmp_path.parent.iterdir())
    records, dropped = read(tmp_path, {"a.tar": tar(*members)})
    assert [r.provenance["key"] for r in records] == ["good", "last"]
    assert dropped == {"member_ignored": 5, "member_refused": 10, "image_missing": 1}
    assert dropped.first["member_refused"] == "a.tar: ../outside.jpg"
    assert not canary.exists() and sorted(p.name for p in tmp_path.parent.iterdir()) == before


def test_samples_that_can_not_be_used_are_counted_by_reason(tmp_path):
    members = [
        ("noimage.txt", "x"),
        ("notext.jpg", image_bytes()),
        ("two.jpg", image_bytes()),
        ("two.png", image_bytes("PNG")),
        ("two.txt", "two images"),
        *sample("twice"),
        *sample("other"),
        *sample("twice", "never paired with the first"),
        *sample("same"),
        ("same.txt", "a second text"),
        *sample("empty", " \0 "),
        *sample("named", "named.jpg"),
        *sample("latin", b"caf\xe9"),
        ("cut.jpg", image_bytes()[:300]),
        ("cut.txt", "x"),
        ("wrong.png", image_bytes()),
        ("wrong.txt", "x"),
        ("moving.gif", image_bytes("GIF")),
        ("moving.txt", "x"),
        ("nocaption.jpg", image_bytes()),
        ("nocaption.json", '{"caption": 7}'),
        ("broken.jpg", image_bytes()),
        ("broken.json", "[" * 99_999),
        ("list.jpg", image_bytes()),
        ("list.json", "[]"),
        *sample("long", "word " * 500),
    ]
    records, dropped = read(tmp_path, {"a.tar": tar(*members)})
    assert [r.provenance["key"] for r in records] == ["twice", "other", "long"]
    assert dropped == {
        "image_missing": 1,
        "text_missing": 2,
        "image_ambiguous": 1,
        "key_repeated": 2,
        "caption_empty": 1,
        "caption_is_filename": 1,
        "row_unreadable": 3,
        "image_undecodable": 1,
        "image_wrong_extension": 1,
        "image_format": 1,
        "caption_cut": 1,
    }


WHOLE = tar(*sample("0"), *sample("1"))


@pytest.mark.parametrize(
    ("data", "kept", "place"),
    [
        (b"", 0, "at byte 0: it has no end mark"),
        (b"<html>" + b"not found" * 200, 0, "at byte 0: invalid header; found b'<html>not fo'"),
        (b"\x1f\x8b\x08" + bytes(range(256)) * 4, 0, r"found b'\x1f\x8b\x08"),
        (WHOLE[:100], 0, "at byte 0: truncated header"),
        (WHOLE[:700], 0, f"next member ends at {512 + len(image_bytes())}, the tar at 700"),
        (WHOLE[: 512 + 1024], 0, "at byte 1536: it has no end mark"),
        (WHOLE[: 512 + 1024 + 1024], 1, "at byte 2560: it has no end mark"),
        (WHOLE[:3100], 1, "at byte 2560: next member ends at "),
        (WHOLE[:2560] + b"\xff" * 512 + WHOLE[3072:], 1, "at byte 2560: "),
        (WHOLE + WHOLE, 2, "something follows its end mark; found b'0.jpg"),
    ],
)  # fmt: skip
def test_a_damaged_tar_is_read_up_to_the_place_that_is_named(tmp_path, data, kept, place):
    assert len(image_bytes()) <= 1024 and WHOLE.index(b"1.jpg") == 2560
    records, dropped = read(tmp_path, {"a.tar": data, "b.tar": tar(*sample("2"))})
    assert len(records) == kept + 1 and dropped["tar_damaged"] == 1
    assert dropped.first["tar_damaged"].startswith("a.tar at byte ")
    assert place in dropped.first["tar_damaged"]


def test_a_tar_that_shrinks_before_its_images_are_read_is_noticed(tmp_path):
    (tmp_path / "a.tar").write_bytes(WHOLE)
    source = open_source(PrepareConfig(source="webdataset", root=str(tmp_path)))
    dropped = Dropped()
    rows = list(source.rows(dropped))
    (tmp_path / "a.tar").write_bytes(WHOLE[:600])
    again = Dropped()
    with pytest.raises(Exception, match="tar_damaged: .*a.tar ends before byte"):
        source.record(rows[0], again)


def test_a_member_of_9_gb_is_passed_over_without_reading_it(tmp_path):
    """A sparse file, whose size only base-256 can state."""
    info = special("huge.jpg", tarfile.REGTYPE, size=9 * 2**30)
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.seek(info.size, os.SEEK_CUR)
        file.write(tar(("huge.txt", "a dog"), *sample("1", "a cat")))
    tracemalloc.start()
    records, dropped = read(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert captions(records) == ["a cat"] and dropped == {"image_too_large": 1}
    assert peak < 20e6


@pytest.mark.parametrize("size", [9 * 2**30, 2**62, 2**70, -512])
def test_a_size_that_is_a_lie_ends_the_tar(tmp_path, size):
    header = bytearray(special("0.jpg", tarfile.REGTYPE).tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = (b"\x80" if size > 0 else b"\xff") + (size % 2**88).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    records, dropped = read(tmp_path, {"a.tar": tar(*sample("x"))[:-10240] + bytes(header)})
    assert dropped["tar_damaged"] == 1 and len(records) <= 1


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_harmless_headers_are_understood(tmp_path, tar_format):
    key = "é" * 80 + "x" * 120
    info = special(f"{key}.jpg", tarfile.REGTYPE, mtime=1.5, size=len(image_bytes()))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as file:
        file.addfile(info, io.BytesIO(image_bytes()))
        file.addfile(special(f"{key}.txt", tarfile.REGTYPE, size=5), io.BytesIO(b"a dog"))
        for name, data in sample("plain", "a cat"):
            file.addfile(
                special(name, tarfile.REGTYPE, size=len(data)),
                io.BytesIO(data if isinstance(data, bytes) else data.encode()),
            )
    (first, second), dropped = read(tmp_path, {"a.tar": buffer.getvalue()})
    assert (first.caption, first.provenance["key"]) == ("a dog", key)
    assert second.provenance["key"] == "plain" and not dropped


def pax(text, kind=tarfile.XHDTYPE):
    """An extra header with this content."""
    info = special("pax", kind, size=len(text))
    return info.tobuf(tarfile.USTAR_FORMAT) + text + b"\0" * (-len(text) % 512)


def pax_record(name, value):
    rest = f" {name}={value}\n".encode()
    length = next(n for n in range(len(rest), len(rest) + 9) if n == len(rest) + len(str(n)))
    return str(length).encode() + rest


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (pax(pax_record("size", 9 * 2**30)), "PAX header overrides size"),
        (pax(pax_record("GNU.sparse.realsize", 5)), "PAX header overrides GNU.sparse.realsize"),
        (pax(pax_record("path", "x.jpg"), tarfile.XGLTYPE), "PAX header overrides path"),
        (pax(b"99 path=x\n"), "PAX header is broken"),
        (pax(b"x path=x\n"), "PAX header is broken"),
        (pax(b"0 path=x\n"), "PAX header is broken"),
        (pax(b"-3 a=b\n"), "PAX header is broken"),
    ],
)
def test_headers_that_move_members_end_the_tar(tmp_path, header, why):
    good, rest = tar(*sample("0"))[:2560], tar(*sample("1"))
    records, dropped = read(tmp_path, {"a.tar": good + header + rest})
    assert [r.provenance["key"] for r in records] == ["0"]
    assert dropped.first["tar_damaged"].startswith(f"a.tar at byte 2560: {why}; found ")
    assert dropped == {"tar_damaged": 1}


def test_a_pax_path_that_leads_out_is_refused_and_the_next_name_is_its_own(tmp_path):
    header = pax(pax_record("mtime", "1.5") + pax_record("path", "../../out.jpg"))
    data = header + tar(("a.jpg", image_bytes()), ("b.jpg", image_bytes()), ("b.txt", "a dog"))
    records, dropped = read(tmp_path, {"a.tar": data})
    assert [r.provenance["key"] for r in records] == ["b"]
    assert dropped == {"member_refused": 1}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=6),
       st.integers(0, len(WHOLE)))  # fmt: skip
def test_no_damage_makes_a_traceback_and_members_stay_inside(changes, length):
    data = bytearray(WHOLE)
    for place, value in changes:
        data[place] = value
    url = "memory://webdataset_fuzz/a.tar"
    storage.write_bytes(url, bytes(data[:length]))
    dropped = Dropped()
    for member in tar_members(url, length, dropped):
        assert 0 <= member.start <= member.start + member.size <= length
        assert ".." not in member.key.split("/") and not member.key.startswith("/")


def test_many_members_take_little_memory(tmp_path):
    header = special("0.jpg", tarfile.REGTYPE).tobuf(tarfile.USTAR_FORMAT)
    (tmp_path / "a.tar").write_bytes(header * 5_000 + b"\0" * 1024)
    dropped = Dropped()
    tracemalloc.start()
    count = sum(1 for _ in tar_members(str(tmp_path / "a.tar"), 512 * 5_002, dropped))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 5_000 and not dropped and peak < 5e5


def test_what_the_user_named_must_be_there(tmp_path):
    with pytest.raises(DataError, match="tar folder .*gone does not exist"):
        read(tmp_path / "gone")
    with pytest.raises(DataError, match=r"tar .*gone\.tar does not exist"):
        read(tmp_path / "gone.tar")
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"no \.tar in "):
        read(tmp_path)


def test_a_field_that_no_json_has_is_refused_at_once(tmp_path):
    members = [*sample("0"), ("0.json", '{"caption": "x", "url": "y"}'), *sample("1")]
    broken = [*sample("2"), ("2.json", "{")]
    (tmp_path / "a.tar").write_bytes(tar(*members, *broken))
    message = r"JSON: none of 2 rows has the field 'title'; there are caption, url$"
    with pytest.raises(DataError, match=message):
        read(tmp_path, caption_field="title")
    records, dropped = read(tmp_path, caption_field="url")
    assert captions(records) == ["y"] and dropped == {"text_missing": 1, "row_unreadable": 1}


def test_another_size_or_field_is_other_content(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar(*sample("0"), ("0.json", '{"alt": "a cat"}')))
    options = {"source": "webdataset", "root": str(tmp_path)}
    before = open_source(PrepareConfig(**options)).content
    assert open_source(PrepareConfig(**options)).content == before
    assert open_source(PrepareConfig(**options, caption_field="alt")).content != before
    (tmp_path / "a.tar").write_bytes(tar(*sample("0"), ("a.json", json.dumps({"a": "b" * 20_000}))))
    assert open_source(PrepareConfig(**options)).content != before
