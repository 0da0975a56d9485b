"""Which of a source's JSON files is which, by what is in them: names of files say nothing."""

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

from glipv2.data_prep.image_files import check_file
from glipv2.data_prep.json_stream import items, sections
from glipv2.pipeline import storage
from glipv2.pipeline.errors import DataError

LOOKED_AT = 100
"""Items of a list, as the first ones may be broken."""


class FileKind(NamedTuple):
    section: str
    """Key of the list; empty where the file is a list itself."""
    fields: tuple[str, ...]
    """What its items have; the first kind that fits is taken."""


def recognise(urls: Sequence[str], kinds: dict[str, FileKind]) -> dict[str, str]:
    """Kind -> file; DataError when a file is of no kind, or two are of one."""
    found: dict[str, str] = {}
    for url in urls:
        check_file(url, "annotation file")
        kind = _kind(url, kinds)
        if kind in found:
            raise DataError(f"{found[kind]} and {url} are both {kind}; give one of them at a time")
        found[kind] = url
    return found


def _kind(url: str, kinds: dict[str, FileKind]) -> str:
    _refuse_pickle(url)
    names = {kind.section for kind in kinds.values()}
    section, first = _first_items(url, names)
    for name, kind in kinds.items():
        if kind.section == section and any(set(kind.fields) <= set(item) for item in first):
            return name
    wanted = "; ".join(
        f"{name}: {kind.section or 'a list'} of objects with {', '.join(kind.fields)}"
        for name, kind in kinds.items()
    )
    raise DataError(f"{url} is none of the files that are read here ({wanted}); check the path")


def _first_items(url: str, names: set[str]) -> tuple[str, list[dict[str, Any]]]:
    """The file's list of one of these names, and the objects that it begins with."""
    if _starts_with(url, b"["):
        first = list(islice(items(url), LOOKED_AT))
        return "", [item for item in first if isinstance(item, dict)]
    for name, values in sections(url):
        if name in names:
            return name, [item for item in islice(values, LOOKED_AT) if isinstance(item, dict)]
    return "", []


def _refuse_pickle(url: str) -> None:
    if _starts_with(url, b"[") or _starts_with(url, b"{"):
        return
    if url.endswith((".p", ".pkl", ".pickle")) or _starts_with(url, b"\x80"):
        raise DataError(
            f"{url} is a Python pickle, which may run any code when it is opened and so is never "
            "read; if you trust its origin, make JSON of it yourself and give that: python -c "
            "\"import json, pickle; json.dump(pickle.load(open('refs.p', 'rb'), "
            "encoding='latin1'), open('refs.json', 'w'))\""
        )


def _starts_with(url: str, mark: bytes) -> bool:
    return storage.read_bytes(url, 0, 1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(mark)
