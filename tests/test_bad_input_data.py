"""Data as strangers may send it: through the commands, the readers and the loader, each has its
documented outcome, in bounded time and memory. The list is in test_bad_input_checklist."""

import gzip
import io
import json
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from odd_files import prepared, run_measured, sample, tar, write_tars  # noqa: E402
from sample_records import CATEGORIES, jpeg, record  # noqa: E402

from glipv2.data_prep import reasons, webdataset  # noqa: E402
from glipv2.data_prep.image_files import image_file  # noqa: E402
from glipv2.data_prep.reasons import Dropped  # noqa: E402
from glipv2.jobs.cli import main  # noqa: E402
from glipv2.pipeline import shards, storage  # noqa: E402
from glipv2.pipeline.errors import BadSample, DataError  # noqa: E402
from glipv2.pipeline.images import decode_image  # noqa: E402

GB = 10**9
SECONDS = 2.0


# ---- tars ----

PAGE = b"<html><body>404 not found</body></html>" * 40
NO_TAR = {
    "zero length": (b"", "no end mark; found b''"),
    "an error page": (PAGE, "invalid header; found b'<html><body>'"),
    "gzip": (gzip.compress(tar(*sample("0"))), r"found b'\x1f\x8b"),
    "truncated": (tar(*sample("0"))[:600], "the tar at 600"),
}


@pytest.mark.parametrize("kind", NO_TAR)
def test_a_file_that_is_no_tar_is_refused_with_its_place(tmp_path, capsys, kind):
    data, said = NO_TAR[kind]
    folder = write_tars(tmp_path, bad=data)
    out = str(tmp_path / "out")
    assert main(["prepare", "webdataset", "--root", str(folder), "--out", out]) == 2
    error = capsys.readouterr().err
    assert "bad.tar at byte 0: " in error and said in error and "Traceback" not in error
    assert not storage.exists(f"{out}/dataset.json")


@pytest.mark.parametrize("kind", NO_TAR)
def test_a_shard_replaced_by_something_else_is_refused(tmp_path, kind):
    made = shards.write_shard_set(str(tmp_path), map(record, range(4)), CATEGORIES, {})
    path = tmp_path / "shard-000000.tar"
    size, data = path.stat().st_size, NO_TAR[kind][0]
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"shard-000000\.tar holds {len(data)} bytes instead of"):
        shards.check_shard_sizes(made)
    path.write_bytes(data.ljust(size, b"\0"))
    shards.check_shard_sizes(made)
    raws = shards.read_raw(made, 0, 0, 4)
    assert [raw.error.reason for raw in raws] == ["crc_mismatch"] * 4


def test_a_sample_is_never_paired_across_tars_or_with_what_is_not_beside_it(tmp_path):
    folder = write_tars(
        tmp_path,
        a=tar(("k.jpg", jpeg())),
        b=tar(("k.txt", b"of another tar")),
        c=tar(("x.jpg", jpeg()), *sample("y", b"a cat"), ("x.txt", b"too far")),
        d=tar(*sample("y", b"a bird")),
    )
    made = prepared(tmp_path, "webdataset", "--root", folder)
    found = list(shards.iterate_records(made.url))
    assert [r.caption for r in found] == ["a cat", "a bird"]
    assert len({r.key for r in found}) == 2
    assert made.info["counts"] == {"text_missing": 2, "image_missing": 1, "key_repeated": 1}


def test_what_is_noted_of_many_members_is_counted_but_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(reasons, "MAX_NOTES", 50)
    junk = tar(*[(f"{n}.{'n' * 60}.pkl", b"") for n in range(2_000)])
    folder = write_tars(tmp_path, a=junk, b=tar(("z.jpg", jpeg())), c=tar(*sample("0")))
    made = prepared(tmp_path, "webdataset", "--root", folder)
    assert made.samples == 1
    assert made.info["counts"] == {"member_ignored": 2_000, "text_missing": 1}
    assert made.info["first"]["text_missing"] == "b.tar: z"
    lines = storage.read_bytes(f"{made.url}/dropped/shard-000000.jsonl").decode().splitlines()
    assert len(lines) == 52
    assert json.loads(lines[-1]) == {"reason": "member_ignored", "where": "and 1950 more"}


def test_notes_have_a_bound_and_survive_the_way_to_another_process():
    import pickle

    dropped = Dropped()
    for _ in range(reasons.MAX_NOTES + 5):
        dropped.note("box_empty", "x" * 10_000)
    dropped.note("box_outside", "here")
    assert len(dropped.notes) == reasons.MAX_NOTES + 1
    assert max(len(note.where) for note in dropped.notes) == reasons.MAX_WHERE
    assert dropped.unlisted == {"box_empty": 5} and dropped.first["box_outside"] == "here"
    sent = pickle.loads(pickle.dumps(dropped))
    assert (sent, sent.notes) == (dropped, dropped.notes)
    taken = dropped.take()
    assert (taken, taken.notes) == (sent, sent.notes) and not dropped and not dropped.notes


def test_a_tar_of_endless_samples_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_SAMPLES", 3)
    members = [member for n in range(9) for member in sample(str(n))]
    made = prepared(tmp_path, "webdataset", "--root", write_tars(tmp_path, a=tar(*members)))
    assert made.samples == 3 and made.info["counts"] == {"tar_damaged": 1}
    assert made.info["first"]["tar_damaged"] == "a.tar: 3 is one more than 3 samples"


# ---- images ----


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(size=(8, 6), mode="RGB"):
    return Image.new(mode, size, (200, 30, 60)[: len(mode)] if mode == "RGB" else 0)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size, depth=8, colour=2, extra=b""):
    """A black PNG, whatever its size a small file."""
    bits = size[0] * depth * {0: 1, 2: 3, 6: 4}[colour]
    packer, row = zlib.compressobj(1), bytes(1 + bits // 8)
    pixels = b"".join(packer.compress(row) for _ in range(size[1])) + packer.flush()
    head = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra
        + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )  # fmt: skip


def text_bomb(kind=b"zTXt"):
    """A PNG of 100 KB, one of whose texts (or whose colour profile) unpacks to 100 MB."""
    packer = zlib.compressobj(9)
    zeros = b"".join(packer.compress(bytes(10**6)) for _ in range(100)) + packer.flush()
    return png((8, 6), extra=chunk(kind, b"name\0\0" + zeros))


def resized(data, side, frame):
    """A JPEG whose header claims another size."""
    place = data.index(frame) + 5
    return data[:place] + struct.pack(">HH", side, side) + data[place + 4 :]


def many_scans(side, count):
    """A progressive JPEG with so many scans of nothing."""
    data = resized(encoded(flat((64, 64)), "JPEG", progressive=True), side, b"\xff\xc2")
    return data[:-2] + b"\xff\xda\0\x08\x01\x01\x11\x01\x3f\0" * count + b"\xff\xd9"


def ycck():
    """A JPEG as Photoshop writes it, of (200, 30, 60): luma, colour and black, all inverted."""
    y, cb, cr = Image.new("YCbCr", (8, 6), Image.new("RGB", (1, 1), (55, 225, 195)).convert(
        "YCbCr").getpixel((0, 0))).split()  # fmt: skip
    stored = Image.merge("CMYK", [band.point(lambda v: 255 - v) for band in (y, cb, cr)] + [
        Image.new("L", (8, 6), 0)])  # fmt: skip
    data = bytearray(encoded(stored, "JPEG", quality=98))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def moving(kind):
    frames = [Image.new("RGB", (8, 6), (200, 30, n)) for n in range(60, 100)]
    options = {"lossless": True} if kind == "WEBP" else {}
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def canvas_bomb(side):
    """An animated WebP whose header asks for a canvas of this size."""
    data = bytearray(moving("WEBP"))
    data[24:30] = (side - 1).to_bytes(3, "little") * 2
    return bytes(data)


HALF = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")
PICTURES = {
    "jpeg bomb.jpg": (resized(jpeg(), 30_000, b"\xff\xc0"), "image_too_large"),
    "text bomb.png": (text_bomb(), "image_undecodable"),
    "profile bomb.png": (text_bomb(b"iCCP"), "image_undecodable"),
    "16 bit.png": (png((8, 6), 16), (8, 6)),
    "16 bit grey.png": (png((8, 6), 16, 0), (8, 6)),
    "cmyk.jpg": (encoded(flat().convert("CMYK"), "JPEG"), (8, 6)),
    "ycck.jpg": (ycck(), (8, 6)),
    "10000 scans.jpg": (many_scans(5_000, 10_000), "image_too_large"),
    "moving.gif": (moving("GIF"), "image_format"),
    "moving.webp": (moving("WEBP"), (8, 6)),
    "canvas.webp": (canvas_bomb(16_384), "image_too_large"),
    "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "image_format"),
    "stars.png": (b"SIMPLE  =                    T" + b" " * 2850, "image_format"),
    "point.png": (png((1, 1)), (1, 1)),
    "thin.png": (png((1, 5_000)), (1, 5_000)),
    "wide.jpg": (encoded(flat((5_000, 1)), "JPEG"), (5_000, 1)),
    "half.jpg": (HALF[: len(HALF) // 2], "image_undecodable"),
    "really a png.jpg": (png((8, 6)), "image_wrong_extension"),
    "empty.jpg": (b"", "image_format"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_read_or_refused_in_time(name):
    data, expected = PICTURES[name]
    assert len(data) < 200_000
    start = time.process_time()
    if isinstance(expected, str):
        with pytest.raises(BadSample) as caught:
            image_file(data, name)
        assert caught.value.reason == expected
    else:
        assert image_file(data, name).size == expected
    assert time.process_time() - start < SECONDS


def test_photoshops_jpeg_and_the_first_frame_have_the_right_colours():
    for name in ("ycck.jpg", "cmyk.jpg", "moving.webp"):
        colour = decode_image(PICTURES[name][0])[:, 3, 4].tolist()
        assert np.allclose(colour, (200, 30, 60), atol=8), name


def test_scans_are_those_of_the_picture_itself():
    thumbnail_like = b"\xff\xe2" + struct.pack(">H", 302) + b"\xff\xda" * 150
    data = encoded(flat((64, 64)), "JPEG", progressive=True)
    busy = data[:2] + thumbnail_like + data[2:] + b"\xff\xda" * 500  # in a segment, and appended
    assert decode_image(busy).equal(decode_image(data))


def test_the_largest_pictures_are_prepared_within_a_gb(tmp_path):
    """Small files that unpack to as much as is allowed, and somewhat more."""
    pictures = {
        "rgba.png": png((5_000, 5_000), 8, 6),
        "grey.png": png((5_000, 5_000), 16, 0),
        "scans.jpg": many_scans(5_000, 80),
        "more.png": png((5_000, 5_001)),
        "large.jpg": resized(jpeg(), 9_000, b"\xff\xc0"),
        "canvas.webp": canvas_bomb(9_990),
    }
    members = [
        member
        for name, data in pictures.items()
        for member in ((name, data), (f"{name.split('.')[0]}.txt", b"a dog"))
    ]
    folder, out = write_tars(tmp_path, a=tar(*members)), tmp_path / "out"
    code, printed, memory = run_measured(
        "-m", "glipv2.jobs.cli", "prepare", "webdataset", "--root", folder, "--out", out
    )
    assert code == 0, printed
    made = shards.open_shard_set(str(out))
    assert (made.samples, made.info["counts"]) == (3, {"image_too_large": 3})
    assert memory < GB, f"{memory / 1e6:.0f} MB"
