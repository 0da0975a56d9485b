"""What `storage` does on stores that aren't a local disk: fsspec file systems, S3 above all.

Errors are those of fsspec (FileNotFoundError, PermissionError, ...), or StoreError when the store
kept failing; `storage` explains them.
"""

import contextlib
import errno
import io
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO, cast
from uuid import uuid4

import fsspec

from glipv2.model.urls import scheme_of
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.retries import reason, retried, s3_client_config, upload_limit

PART = 50 * 2**20
"""S3 objects of twice this size and more are sent in parts, several at once."""
PIECE = 16 * 2**20
"""Bytes that a file opened for reading fetches at once."""
OWNER = "glipv2-owner"
"""Metadata of an S3 object made by `create`: whose it is."""
_memory_lock = threading.Lock()
log = logging.getLogger(__name__)


def size(url: str) -> int:
    """Bytes of the file, 0 of a folder; FileNotFoundError when there is neither."""
    return int(retried(url, "looked up", lambda: _store(url).info(url))["size"])


def exists(url: str) -> bool:
    """Whether there is a file or folder."""
    try:
        size(url)
    except FileNotFoundError:
        return False
    return True


def read(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """The file, or its bytes [start, end)."""
    try:
        return retried(url, "read", lambda: bytes(_store(url).cat_file(url, start=start, end=end)))
    except OSError as error:
        if error.errno == errno.EINVAL and start is not None and start >= size(url):
            return b""  # object stores refuse a range that begins past the end
        raise


def open_read(url: str) -> BinaryIO:
    """The file, to be read from its start in pieces."""
    if scheme_of(url) in ("http", "https"):  # many web servers know no ranges
        return cast(BinaryIO, _store(url).open(url, "rb", cache_type="readahead"))
    return io.BufferedReader(_Pieces(url), PIECE)


def write(url: str, data: bytes) -> None:
    """Create or replace the file; visible when it is whole."""
    _send(url, len(data), lambda **options: _store(url).pipe_file(url, data, **options))


def upload(path: str, url: str) -> None:
    """Create or replace the file with the content of a local one; visible when it is whole."""
    _send(url, os.stat(path).st_size, lambda **o: _store(url).put_file(path, url, **o))


def create(url: str, data: bytes) -> bool:
    """Create the file unless it exists; whether this call did it.

    On S3 the object carries a token of its creator: one whose success was lost on the network finds
    it there when it tries again.
    """
    token = uuid4().hex
    mark = {"Metadata": {OWNER: token}} if scheme_of(url) == "s3" else {}

    def attempt(**options: Any) -> None:
        with _memory_lock if scheme_of(url) == "memory" else contextlib.nullcontext():
            _store(url).pipe_file(url, data, mode="create", **mark, **options)

    try:
        _send(url, len(data), attempt)
    except PermissionError:
        raise
    except OSError:  # stores differ in what they call a failed condition
        if not exists(url):
            raise
    else:
        return True
    if not mark:
        return False
    found = retried(url, "looked up", lambda: _store(url).metadata(url))
    return bool(found.get(OWNER) == token)


def copy(source: str, target: str) -> None:
    """Copy within one store; the target is visible when it is whole."""
    expected = size(source)
    _send(target, expected, lambda **_: _store(source).cp_file(source, target))
    if (copied := size(target)) != expected:
        raise DataError(f"{target} holds {copied} bytes of the {expected} of {source}; try again")


def delete(url: str) -> None:
    """Remove the file; one that is gone already is fine or a FileNotFoundError."""
    retried(url, "deleted", lambda: _store(url).rm_file(url))


def entries(url: str) -> dict[str, int | None]:
    """Name -> bytes of what is directly in a folder, None of folders; FileNotFoundError without."""
    found = retried(url, "listed", lambda: _store(url).ls(url, detail=True))
    below = (entry for entry in found if not _is_marker(entry["name"], url))
    return {
        entry["name"].rstrip("/").rsplit("/", 1)[-1]: (
            int(entry["size"]) if entry["type"] == "file" else None
        )
        for entry in below
    }


def age(url: str) -> float:
    """Seconds since the file was written, by the store's clock and ours."""
    written = retried(url, "looked up", lambda: _store(url).modified(url))
    return time.time() - float(written.timestamp())


def drop_uploads(url: str, spare_s: float) -> tuple[int, int]:
    """Remove parts of files directly in a folder that never became whole: unseen, but paid for.

    How many uploads that were, and how many are left because they began less than `spare_s` ago.
    Of stores other than S3, which drop such parts themselves after some days, none. A store that
    knows no such request, or doesn't allow it to all who may write, costs no more than a warning.
    """
    if scheme_of(url) != "s3":
        return 0, 0
    store = _store(url)
    bucket, folder, _ = store.split_path(url.rstrip("/") + "/")
    dropped = spared = 0
    try:
        for upload in retried(url, "listed", lambda: list(_unfinished(store, bucket, folder))):
            if "/" in upload["Key"].removeprefix(folder):
                continue
            if time.time() - upload["Initiated"].timestamp() < spare_s:
                spared += 1
                continue
            retried(url, "tidied", partial(_abort, store, bucket, upload))
            dropped += 1
    except OSError as error:
        log.warning("%s: parts of uploads that were cut off can't go: %s", url, reason(error))
    return dropped, spared


def tree(url: str) -> dict[str, int]:
    """Path below the folder -> bytes of every file in it and its folders; empty when absent."""
    store = _store(url)
    root = store._strip_protocol(url).rstrip("/") + "/"
    found = retried(url, "listed", lambda: store.find(url, detail=True))
    below = {name: entry for name, entry in found.items() if name.startswith(root)}
    return {name.removeprefix(root): int(entry["size"]) for name, entry in below.items()}


def _store(url: str) -> Any:
    """The fsspec file system of a URL; fsspec keeps one a process.

    s3fs may hang in a process that was forked from one that used it, so ours are all spawned.
    """
    scheme = scheme_of(url)
    if scheme in ("memory", "http", "https"):
        return fsspec.filesystem(scheme)
    if scheme != "s3":
        return fsspec.filesystem(scheme, use_listings_cache=False)
    users = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    config = {**users, **s3_client_config()}
    store = fsspec.filesystem("s3", use_listings_cache=False, config_kwargs=config)
    store.retries = 1  # `retried` does it
    return store


class _Pieces(io.RawIOBase):
    """A file read in ranges, each tried again on its own."""

    def __init__(self, url: str) -> None:
        self.url, self.place, self.size = url, 0, size(url)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place}.get(whence, self.size)
        return self.place

    def readinto(self, buffer: Any) -> int:
        end = min(self.place + len(buffer), self.size)
        data = read(self.url, self.place, end) if self.place < end else b""
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)


def _send(url: str, bytes_sent: int, act: Callable[..., Any]) -> None:
    """Make an object by `act(**options)`, again while the store fails."""
    if scheme_of(url) != "s3":
        retried(url, "written", act)
        return
    tidy = partial(_drop_parts, url) if bytes_sent >= 2 * PART else None
    options = {"chunksize": PART, "timeout": upload_limit(bytes_sent)}
    retried(url, "written", lambda: act(**options), tidy)


def _drop_parts(url: str) -> None:
    """Remove parts of uploads to this name that never became an object: unseen, but paid for."""
    store = _store(url)
    bucket, key, _ = store.split_path(url)
    for upload in _unfinished(store, bucket, key):
        if upload["Key"] == key:
            _abort(store, bucket, upload)


def _abort(store: Any, bucket: str, upload: dict[str, Any]) -> None:
    with contextlib.suppress(FileNotFoundError):  # it has just become whole, or was aborted
        store.abort_mpu(bucket, upload["Key"], upload["UploadId"])


def _unfinished(store: Any, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    """Uploads in parts to names that begin so."""
    place: dict[str, str] = {}
    while True:
        found = store.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **place)
        yield from found.get("Uploads", [])
        if not found.get("IsTruncated"):
            return
        markers = ("KeyMarker", "UploadIdMarker")  # some stores give the second only
        place = {name: found[f"Next{name}"] for name in markers if found.get(f"Next{name}")}


def _is_marker(name: str, url: str) -> bool:
    """Some object stores list an object for the folder itself among its content."""
    return url.rstrip("/").endswith(name.rstrip("/"))
