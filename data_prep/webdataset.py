"""Image-text pairs in existing tars, as img2dataset writes them: KEY.jpg with KEY.txt or KEY.json.

Rows are found by walking the tar headers; images are read, by their place in the tar, when their
records are made. Nothing is ever unpacked, and members of other kinds (pickles, say) are not read.
A tar that is damaged is read up to that place.
"""

import contextlib
import json
import tarfile
from collections.abc import Iterator
from functools import partial
from itertools import groupby, islice
from typing import Any, BinaryIO, NamedTuple

from glipv2.data_prep.grounded import clean_caption
from glipv2.data_prep.image_files import (
    FORMAT_OF_SUFFIX,
    OTHER_SUFFIXES,
    check_file,
    check_folder,
    image_file,
    licence_of,
    parent,
    record_key,
)
from glipv2.data_prep.pairs import CAPTION_FIELDS, MAX_CAPTION, MAX_LINE, check_field
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.source import Row, Source
from glipv2.data_prep.text_cleaning import clean_text
from glipv2.pipeline import storage
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.images import MAX_BYTES
from glipv2.pipeline.records import Record
from glipv2.pipeline.shard_format import TAR_BLOCK, padded, walk_tar

JSON_FIELDS = tuple(dict.fromkeys(("caption", *CAPTION_FIELDS)))
"""Of the caption where there is no .txt, in order of preference."""
IMAGE_KINDS = {suffix[1:] for suffix in (*FORMAT_OF_SUFFIX, *OTHER_SUFFIXES)}
TEXT_KINDS = {"txt", "json"}
PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)
MAX_SAMPLES = 1_000_000
"""Of one tar: their keys are kept, to see that none comes twice."""
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
LOOKED_AT = 1_000
"""Samples, to see whether they have the field of the caption."""
MAX_HEADER = 1 << 16
"""Bytes of an extra header, and of what is looked at behind the end mark."""


class Member(NamedTuple):
    key: str
    kind: str
    """What follows the first dot of the file's name, in lower case."""
    start: int
    size: int
    """Of the content, bytes of the tar."""


def webdataset_source(options: PrepareConfig) -> Source:
    """One `pairs` record per sample, tar by tar in the order of their names."""
    folder, sizes = list_tars(options.root)
    if options.caption_field:
        check_field(options.caption_field, _documents(folder, sizes), f"{options.root}, JSON")
    return Source(
        rows=partial(tar_rows, folder, sizes),
        record=partial(tar_record, folder, options.caption_field),
        licence=licence_of(folder),
        content={
            "tars": storage.digest([[clean_text(name), size] for name, size in sizes.items()]),
            **({"caption_field": options.caption_field} if options.caption_field else {}),
        },
    )


def list_tars(root: str) -> tuple[str, dict[str, int]]:
    """The folder, and the bytes of each tar in it by name; `root` may also be one tar."""
    if root.endswith(".tar"):
        check_file(root, "tar")
        return parent(root), {root.rsplit("/", 1)[-1]: storage.size(root)}
    check_folder(root, "tar")
    found = storage.sizes(root)
    sizes = {name: found[name] for name in sorted(found) if name.endswith(".tar")}
    if not sizes:
        raise DataError(f"no .tar in {root}; give the folder that holds the tars, or one of them")
    return root, sizes


def _documents(folder: str, sizes: dict[str, int]) -> Iterator[dict[str, Any]]:
    """The JSON of the first samples, as far as it can be read."""
    for row in islice(tar_rows(folder, sizes, Dropped()), LOOKED_AT):
        _, tar, members = row.item
        found = next((member for member in members if member.kind == "json"), None)
        with contextlib.suppress(BadSample):
            yield _json(storage.join(folder, tar), found)


def tar_rows(folder: str, sizes: dict[str, int], dropped: Dropped) -> Iterator[Row]:
    """A row for each image with a text, from the headers of the tars."""
    number = 0
    for tar, size in sizes.items():
        seen: set[str] = set()
        members = tar_members(storage.join(folder, tar), size, dropped)
        for key, group in groupby(members, key=lambda member: member.key):
            where = f"{clean_text(tar)}: {clean_text(key)}"
            if len(seen) == MAX_SAMPLES:
                dropped.note("tar_damaged", f"{where} is one more than {MAX_SAMPLES} samples")
                break
            parts = list(islice(group, len(IMAGE_KINDS | TEXT_KINDS) + 1))
            kinds = [member.kind for member in parts]
            if key in seen or len(set(kinds)) < len(kinds):
                dropped.note("key_repeated", where)
            elif len(IMAGE_KINDS & set(kinds)) > 1:
                dropped.note("image_ambiguous", where)
            elif not IMAGE_KINDS & set(kinds):
                dropped.note("image_missing", where)
            elif not TEXT_KINDS & set(kinds):
                dropped.note("text_missing", where)
            else:
                yield Row(where, (number, tar, parts))
                number += 1
            seen.add(key)


def tar_members(url: str, size: int, dropped: Dropped) -> Iterator[Member]:
    """Images, texts and JSON of a tar, from its headers alone; what else it holds is noted.

    Offset and reason are in the note of the place from which a tar is damaged.
    """
    name, end = clean_text(url.rsplit("/", 1)[-1]), 0
    renamed = ""
    with storage.open_read(url) as file:
        try:
            for offset, member in walk_tar(file):
                end = offset
                if offset + TAR_BLOCK + member.size > size:
                    needed = offset + TAR_BLOCK + member.size
                    raise tarfile.ReadError(f"next member ends at {needed}, the tar at {size}")
                if member.type in (*PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                    renamed = _new_name(file, member) or renamed
                else:
                    path, renamed = renamed or member.name, ""
                    found = _member(path, member, offset + TAR_BLOCK, dropped, name)
                    if found is not None:
                        yield found
                end = offset + TAR_BLOCK + padded(member.size)
            file.seek(end)
            rest = file.read(MAX_HEADER)
            if not rest or rest.strip(b"\0"):
                why = "something follows its end mark" if rest else "it has no end mark"
                raise tarfile.ReadError(why)
        except tarfile.TarError as error:
            file.seek(end)
            there = file.read(MAX_HEADER).lstrip(b"\0")[:12]
            dropped.note("tar_damaged", f"{name} at byte {end}: {error}; found {there!r}")


def _member(
    path: str, member: tarfile.TarInfo, start: int, dropped: Dropped, tar: str
) -> Member | None:
    where = f"{tar}: {clean_text(path)}"[:300]
    path = path.removeprefix("./")
    if member.isdir():
        return None
    if member.type not in PLAIN or path.startswith("/") or ".." in path.split("/"):
        dropped.note("member_refused", where)
        return None
    folder, slash, file = path.rpartition("/")
    stem, _, kind = file.partition(".")
    if not stem or kind.lower() not in IMAGE_KINDS | TEXT_KINDS:
        dropped.note("member_ignored", where)
        return None
    return Member(f"{folder}{slash}{stem}", kind.lower(), start, member.size)


def _new_name(file: BinaryIO, member: tarfile.TarInfo) -> str:
    """The name that an extra header gives the next member; empty when it gives none.

    TarError when the header changes where members lie, or the names of all.
    """
    if member.size > MAX_HEADER:
        raise tarfile.HeaderError(f"extra header of {member.size} bytes")
    data = file.read(member.size)
    if member.type not in PAX:
        is_name = member.type == tarfile.GNUTYPE_LONGNAME
        return data.rstrip(b"\0").decode("utf-8", "surrogateescape") if is_name else ""
    fields = _pax_fields(data)
    moves = [name for name in fields if name == "size" or name.startswith("GNU.sparse")]
    if moves or (member.type == tarfile.XGLTYPE and "path" in fields):
        raise tarfile.HeaderError(f"PAX header overrides {', '.join(moves) or 'path'}")
    return fields.get("path", "")


def _pax_fields(data: bytes) -> dict[str, str]:
    """Of records "LENGTH NAME=VALUE\\n", LENGTH counting the whole record."""
    fields = {}
    while data.strip(b"\0"):
        digits, blank, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        name, mark, value = data[len(digits) + 1 : length].partition(b"=")
        if not blank or not mark or not value.endswith(b"\n") or length > len(data):
            raise tarfile.HeaderError("PAX header is broken")
        fields[name.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
        data = data[length:]
    return fields


def tar_record(folder: str, caption_field: str, row: Row, dropped: Dropped) -> Record:
    """The record of one of `tar_rows`."""
    number, tar, members = row.item
    url, of_kind = storage.join(folder, tar), {member.kind: member for member in members}
    document = _json(url, of_kind.get("json"))
    text = _text(url, of_kind.get("txt"), document, caption_field)
    caption = clean_caption(text, dropped, row.where).text
    (member,) = (member for member in members if member.kind in IMAGE_KINDS)
    stem = member.key.rsplit("/", 1)[-1]
    if caption in (stem, f"{stem}.{member.kind}"):
        raise BadSample("caption_is_filename", row.where)
    if member.size > MAX_BYTES:
        raise BadSample("image_too_large", f"{row.where}: {member.size} bytes")
    image = image_file(_read(url, member), f"{stem}.{member.kind}")
    provenance = {"source": "webdataset", "file": clean_text(tar), "key": clean_text(member.key)}
    if isinstance(origin := document.get("url"), str):
        provenance["origin"] = clean_text(origin)[:MAX_CAPTION]
    return Record(
        key=record_key(f"{tar.removesuffix('.tar')}-{stem}", number),
        image=image.data,
        image_format=image.format,
        width=image.width,
        height=image.height,
        task="pairs",
        caption=caption,
        provenance=provenance,
    )


def _read(url: str, member: Member) -> bytes:
    data = storage.read_bytes(url, member.start, member.start + member.size)
    if len(data) < member.size:
        raise BadSample("tar_damaged", f"{url} ends before byte {member.start + member.size}")
    return data


def _json(url: str, member: Member | None) -> dict[str, Any]:
    """Empty when there is none; BadSample when it is no JSON object."""
    if member is None:
        return {}
    if member.size > MAX_LINE:
        raise BadSample("row_unreadable", f"{member.key}.json has {member.size} bytes")
    try:
        document = json.loads(_read(url, member).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadSample("row_unreadable", f"{member.key}.json: {error}"[:300]) from error
    if not isinstance(document, dict):
        raise BadSample("row_unreadable", f"{member.key}.json holds no object")
    return document


def _text(url: str, member: Member | None, document: dict[str, Any], caption_field: str) -> str:
    """Of the field asked for; else of the .txt; else of the usual fields."""
    if member is None or caption_field:
        names = (caption_field,) if caption_field else JSON_FIELDS
        texts = (document.get(name) for name in names)
        found = next((text for text in texts if isinstance(text, str) and text.strip()), None)
        if found is None:
            raise BadSample("text_missing", f"no {' or '.join(names)} in the JSON")
        return found
    try:
        return _read(url, member._replace(size=min(member.size, MAX_LINE))).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("row_unreadable", f"{member.key}.txt: {error}") from error
