"""Inputs for `fuzz`: real files and values, damaged at random and by what readers stumble over."""

import io
import json
import random
import tarfile
from typing import Any

from PIL import Image

TEXTS = [
    "", " ", ".", "...!?", "\0", "a\0b", "\ud800", "x\udfff y", "\u202eabc\u202c", "\ufeff",
    "👩\u200d🚀", "é", "e\u0301", "ﬁ", "İ", "ß", "שלום", "مرحبا", "漢字", "a\u200bb", "\u2028",
    "(" * 50, "[MASK] [SEP] [CLS]", "a. b. c", "1.5", "1. 5", "red_square (toy)", "../..", "NaN",
    "\x1b[31m", "<b>", "a" * 200, "dog " * 40,
]  # fmt: skip
WORDS = ["a", "red", "square", "blue", "circle", "and", "the", "small", "dog", "under", "cells"]
NUMBERS = [
    0, 1, -1, 2, 7, 255, 256, 2**31, -(2**31) - 1, 2**63, 2**64, -(2**70), 10**400, 0.5, -0.0,
    1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), 31.999999, 33.0,
]  # fmt: skip
BLOCK = 512
HEADER_FIELDS = {
    "name": (0, 100), "mode": (100, 8), "size": (124, 12), "type": (156, 1), "linkname": (157, 100),
    "magic": (257, 8), "prefix": (345, 155), "sparse": (386, 97),
}  # fmt: skip
NAMES = [
    b"a.jpg", b"a.txt", b"b.JSON", b"../a.jpg", b"/etc/a.txt", b"x/../a.jpg", b"./a.png", b"./",
    b".jpg", b"a", b"a.", b"a.jpg/", b"\xff\xfe.jpg", b"a.pkl", b"a.b.jpg", b"", b"n" * 100,
    b"\xed\xa0\x80.txt", b"a\x1b[1m.txt", "é.webp".encode(),
]  # fmt: skip
SIZES = [
    b"00000000000\0", b"00000001000\0", b"00000100000\0", b"77777777777\0", b"-0000000001\0",
    b"\x80" + b"\0" * 10 + b"\x01", b"\x80" + b"\x7f" * 11, b"\xff" * 12, b"\xff" * 11 + b"\0",
    b"garbage     ", b"\0" * 12, b"           \0",
]  # fmt: skip


def words(rng: random.Random, most: int = 12) -> str:
    """A plain caption, or one with something strange in it."""
    parts = [rng.choice(WORDS) for _ in range(rng.randint(0, most))]
    for _ in range(rng.choice([0, 0, 1, 3])):
        parts.insert(rng.randint(0, len(parts)), rng.choice(TEXTS))
    if rng.random() < 0.1:
        parts.append("".join(chr(rng.randrange(0x110000)) for _ in range(rng.randint(1, 20))))
    text = rng.choice(["", " ", " ", " ", ". "]).join(parts)
    return text * rng.choice([20, 500]) if rng.random() < 0.005 else text


def number(rng: random.Random) -> Any:
    plain = rng.choice([rng.randint(-5, 50), rng.uniform(-5, 50)])
    return rng.choice(NUMBERS) if rng.random() < 0.3 else plain


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kind = rng.randrange(7 if depth < 3 else 5)
    if kind < 2:
        return number(rng)
    if kind < 4:
        return words(rng, 3)
    if kind == 4:
        return rng.choice([None, True, False])
    inner = [value(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    return inner if kind == 5 else {words(rng, 1): item for item in inner}


def damaged_value(document: Any, rng: random.Random) -> Any:
    """The document with some places replaced, removed or repeated; one of them very often."""
    repeats = [1, 2, 1500]
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        holders = list(_holders(document))
        if not holders:
            break
        holder, place = rng.choice(holders)
        act = rng.random()
        if act < 0.7:
            old = holder[place]
            holder[place] = number(rng) if isinstance(old, int | float) else value(rng)
        elif act < 0.85:
            del holder[place]
        elif isinstance(holder, list):
            times = rng.choice(repeats)
            holder.extend([holder[place]] * times)
            repeats = [1, 2] if times > 2 else repeats
        else:
            holder[words(rng, 1)] = value(rng)
    return document


def _holders(document: Any) -> Any:
    """Every (container, key) below a value."""
    keys = document if isinstance(document, dict) else range(len(document))
    for key in list(keys) if isinstance(document, dict | list) else []:
        yield document, key
        if isinstance(document[key], dict | list):
            yield from _holders(document[key])


def json_bytes(document: Any, rng: random.Random, damage: float = 0.3) -> bytes:
    """The document's JSON in some spelling, and with probability `damage` with broken bytes."""
    layout = rng.choice([{}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}])
    data = json.dumps(document, **layout).encode("utf-8", "surrogatepass")
    return damaged(data, rng) if rng.random() < damage else data


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes with bits flipped and pieces overwritten, removed, repeated, inserted or cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        first, last = sorted(rng.randint(0, len(changed)) for _ in range(2))
        last = min(last, first + rng.choice([1, 4, 64, 5000]))
        act = rng.randrange(7)
        if act == 0 and first < len(changed):
            changed[first] ^= 1 << rng.randrange(8)
        elif act == 1:
            changed[first:last] = rng.randbytes(last - first)
        elif act == 2:
            del changed[first:last]
        elif act == 3:
            changed[first:first] = changed[first:last] * rng.choice([1, 1, 30])
        elif act == 4:
            changed[first:first] = rng.choice([b"\0", b"\xff\xda", b"[", b'"', b"\xef\xbb\xbf"])
        elif act == 5:
            changed[first:last] = rng.choice([b"\0", b"\xff"]) * (last - first)
        elif rng.random() < 0.3:
            del changed[first:]
    return bytes(changed)


def picture(rng: random.Random) -> tuple[str, bytes]:
    """Extension and bytes of a small image."""
    name = rng.choice(["jpg", "png", "webp", "gif"])
    buffer = io.BytesIO()
    mode = "CMYK" if name == "jpg" and rng.random() < 0.2 else "RGB"
    size = (rng.choice([1, 32, 32, 32, 200]), rng.choice([1, 24, 24, 24]))
    Image.new(mode, size).save(buffer, {"jpg": "JPEG"}.get(name, name))
    data = buffer.getvalue()
    return name, damaged(data, rng) if rng.random() < 0.1 else data


def png(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    return buffer.getvalue()


def tar_bytes(rng: random.Random) -> bytes:
    """A tar of image-text samples, odd members and extra headers, then damaged."""
    buffer = io.BytesIO()
    kind = rng.choice([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for _ in range(rng.randint(0, 5)):
            _add_sample(tar, kind, rng)
    data = bytearray(buffer.getvalue()[: -rng.choice([1, 8000])])
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        data = _with_damaged_block(data, rng)
    data += b"\0" * rng.choice([0, 1024, 1024, 1024])
    return damaged(bytes(data), rng) if rng.random() < 0.3 else bytes(data)


def _add_sample(tar: tarfile.TarFile, kind: int, rng: random.Random) -> None:
    longest = 80 if kind == tarfile.USTAR_FORMAT else 200
    stem = rng.choice(["0", "1", "deep/2", "k" * 60, "é", "x" * longest])
    extension, data = picture(rng)
    members = [(f".{extension}", data), (".txt", words(rng).encode("utf-8", "surrogatepass"))]
    if rng.random() < 0.5:
        document = damaged_value({"caption": words(rng), "url": "http://x", "status": 1}, rng)
        members.append((".json", json_bytes(document, rng)))
    rng.shuffle(members)
    for suffix, content in members[: rng.choice([1, 2, 3, 3])]:
        info = tarfile.TarInfo(stem + suffix)
        info.size = len(content)
        if kind == tarfile.PAX_FORMAT and rng.random() < 0.3:
            names = ["path", "size", "mtime", "GNU.sparse.size", "comment"]
            info.pax_headers = {rng.choice(names): rng.choice(["9", "a/b.jpg", "../c.txt", "-1"])}
        tar.addfile(info, io.BytesIO(content))


def _with_damaged_block(data: bytearray, rng: random.Random) -> bytearray:
    """One block moved, repeated or dropped, or one field of a header changed, checksum made good.

    A checksum that doesn't fit would hide from the reader what else is wrong with a header.
    """
    blocks = [data[place : place + BLOCK] for place in range(0, len(data), BLOCK)]
    headers = [place for place, block in enumerate(blocks) if block[257:262] == b"ustar"]
    act = rng.random()
    if act < 0.7 and headers:
        block = blocks[rng.choice(headers)]
        field, (start, length) = rng.choice(list(HEADER_FIELDS.items()))
        wanted = {"name": NAMES, "prefix": NAMES, "linkname": NAMES, "size": SIZES}.get(field)
        content = rng.choice(wanted) if wanted else rng.randbytes(length)
        if field == "type":
            content = rng.choice([bytes([n]) for n in b"\x000123456789DKLMNSVXgxA"])
        block[start : start + length] = content.ljust(length, b"\0")
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    elif blocks:
        place = rng.randrange(len(blocks))
        block = blocks.pop(place)
        for _ in range(rng.choice([0, 1, 2])):
            blocks.insert(rng.randint(0, len(blocks)), block)
    return bytearray().join(blocks)
