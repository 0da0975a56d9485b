"""Every read and write of shards, checkpoints and reports: local paths and object stores alike.

A URL is a local path or file://, memory:// (tests), s3://, gs://, az:// or http(s):// (reading
only). Anything else is refused, above all schemes that would run a shell. Writes are complete or
absent: a reader never sees half a file. A store that fails for a moment is tried again (`retries`).
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c

from glipv2.model.urls import scheme_of
from glipv2.pipeline import object_store
from glipv2.pipeline.errors import ConfigError, DataError, UserError
from glipv2.pipeline.retries import has_no_bucket, is_of_store, reason

CHUNK = 16 * 2**20
ATTEMPT = ".attempt-"
"""How the names of files begin that are not yet complete."""


def join(url: str, *parts: str) -> str:
    return "/".join([url.rstrip("/") or "/", *(part.strip("/") for part in parts)])


def is_local(url: str) -> bool:
    return _scheme(url) == "file"


def local_path(url: str) -> str:
    """The absolute file system path of a local URL."""
    if not is_local(url):
        raise ConfigError(f"{url} is not on a local disk")
    return os.path.abspath(os.path.expanduser(url.removeprefix("file://")))


def exists(url: str) -> bool:
    if is_local(url):
        return os.path.exists(local_path(url))
    with _explained(url):
        return object_store.exists(url)


def size(url: str) -> int:
    """Bytes of the file."""
    with _explained(url):
        if is_local(url):
            return os.stat(local_path(url)).st_size
        return object_store.size(url)


def age(url: str) -> float:
    """Seconds since the file was written."""
    with _explained(url):
        if is_local(url):
            return time.time() - os.stat(local_path(url)).st_mtime
        return object_store.age(url)


def read_bytes(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """The file, or its bytes [start, end) in one request; shorter when the file ends before."""
    with _explained(url):
        if not is_local(url):
            return object_store.read(url, start, end)
        with open(local_path(url), "rb") as file:
            file.seek(start or 0)
            return file.read(-1 if end is None else max(0, end - (start or 0)))


def open_read(url: str) -> BinaryIO:
    """The file, to be read from its start in pieces; close it."""
    with _explained(url):
        if is_local(url):
            return open(local_path(url), "rb")
        return object_store.open_read(url)


def write_bytes(url: str, data: bytes) -> None:
    """Create or replace a file in one act."""
    with _explained(url):
        if is_local(url):
            with _local_attempt(url, [data]) as attempt:
                os.replace(attempt, local_path(url))
            return
        object_store.write(url, data)


def write_pieces(url: str, pieces: Iterable[bytes]) -> tuple[int, str]:
    """Create or replace a file in one act, without all of it in memory: its size and checksum."""
    size, checksum = 0, 0

    def counted() -> Iterator[bytes]:
        nonlocal size, checksum
        for piece in pieces:
            size, checksum = size + len(piece), google_crc32c.extend(checksum, piece)
            yield piece

    with _explained(url):
        if is_local(url):
            with _local_attempt(url, counted()) as attempt:
                os.replace(attempt, local_path(url))
        else:
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "file")
                with open(path, "wb") as file:
                    file.writelines(counted())
                object_store.upload(path, url)
    return size, f"{checksum:08x}"


def read_json(url: str) -> Any:
    """The value of a JSON file; DataError when it is damaged."""
    try:
        return json.loads(read_bytes(url))
    except ValueError as error:
        raise DataError(
            f"{url} is no valid JSON: {error}; delete it, and run what wrote it again"
        ) from error


def read_json_lines(url: str) -> list[dict[str, Any]]:
    """The entries of a .jsonl file, [] when it is absent.

    A last line cut off by a kill is left out; any other damaged line is a DataError.
    """
    if not exists(url):
        return []
    entries = []
    for number, line in enumerate(read_bytes(url).split(b"\n")[:-1], start=1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{url}, line {number} is no valid JSON: {error}; delete that line to do without it"
            ) from error
        if not isinstance(entry, dict):
            raise DataError(f"{url}, line {number} is no entry; delete that line to do without it")
        entries.append(entry)
    return entries


def write_json(url: str, value: Any) -> None:
    """Create or replace a JSON file that people may read, in one act."""
    write_bytes(url, json.dumps(value, indent=1).encode())


def create_once(url: str, data: bytes) -> bool:
    """Create the file, complete or not at all; False when it exists already (then untouched).

    Of any number of callers at once, on any machine, exactly one gets True. On S3 that holds also
    when the answer to its success was lost on the network; elsewhere it may then get False, so
    compare the content before calling it a loss.
    """
    with _explained(url):
        if not is_local(url):
            return object_store.create(url, data)
        with _local_attempt(url, [data]) as attempt:
            try:
                os.link(attempt, local_path(url))
            except FileExistsError:
                return False
            _sync_folder(url)
        return True


def upload(path: str | Path, url: str) -> None:
    """Copy a local file to a URL; complete or absent there."""
    with _explained(url):
        if not is_local(url):
            object_store.upload(str(path), url)
            return
        with _local_attempt(url, []) as attempt:
            shutil.copyfile(path, attempt)
            with open(attempt, "rb") as file:
                os.fsync(file.fileno())
            os.replace(attempt, local_path(url))


def move(source: str, target: str) -> None:
    """Rename within one store: atomic on disk, copy and delete on object stores.

    Cut off in between, the file stands under both names, whole; moving it again ends it.
    """
    with _explained(source):
        if is_local(source) and is_local(target):
            os.makedirs(os.path.dirname(local_path(target)), exist_ok=True)
            os.replace(local_path(source), local_path(target))
            _sync_folder(target)
            return
        object_store.copy(source, target)
        delete(source)


def delete(url: str) -> None:
    """Remove a file; one that is gone already is fine."""
    with _explained(url), contextlib.suppress(FileNotFoundError):
        if is_local(url):
            os.unlink(local_path(url))
        else:
            object_store.delete(url)


def delete_empty(url: str) -> None:
    """Remove a folder with nothing in it; object stores have no folders."""
    if is_local(url):
        with contextlib.suppress(OSError):
            os.rmdir(local_path(url))


def drop_uploads(url: str, spare_s: float) -> tuple[int, int]:
    """Remove what a store holds, unlisted, of files directly in a folder whose upload was cut off.

    How many they were, and how many are left because they began less than `spare_s` ago.
    """
    with _explained(url):
        return (0, 0) if is_local(url) else object_store.drop_uploads(url, spare_s)


def sizes(url: str) -> dict[str, int]:
    """Name -> bytes of the files in a folder, from one listing; empty when it is absent."""
    with _explained(url), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if is_local(url):
            return {e.name: e.stat().st_size for e in os.scandir(local_path(url)) if e.is_file()}
        found = object_store.entries(url)
        return {name: bytes_ for name, bytes_ in found.items() if bytes_ is not None}
    return {}


def tree_sizes(url: str) -> dict[str, int]:
    """Path below the folder -> bytes of every file in it and its folders; empty when absent."""
    with _explained(url), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if is_local(url):
            root = Path(local_path(url))
            files = (path for path in root.rglob("*") if path.is_file())
            return {str(path.relative_to(root)): path.stat().st_size for path in files}
        return object_store.tree(url)
    return {}


def list_names(url: str) -> list[str]:
    """Sorted names of the files and folders in a folder, [] when it is absent."""
    with _explained(url), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if is_local(url):
            return sorted(os.listdir(local_path(url)))
        return sorted(object_store.entries(url))
    return []


def crc32c(data: bytes) -> str:
    """8 hex digits."""
    return f"{google_crc32c.value(data):08x}"


def file_crc32c(url: str) -> str:
    """Checksum of a whole file, read back in pieces."""
    value = 0
    for start in range(0, size(url), CHUNK):
        value = google_crc32c.extend(value, read_bytes(url, start, start + CHUNK))
    return f"{value:08x}"


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def digest(value: Any) -> str:
    """16 hex digits that change whenever the JSON value does."""
    return hashlib.sha256(canonical_json(value)).hexdigest()[:16]


def _scheme(url: str) -> str:
    try:
        return scheme_of(url)
    except ValueError as error:
        raise ConfigError(str(error)) from error


@contextlib.contextmanager
def _local_attempt(url: str, pieces: Iterable[bytes]) -> Iterator[str]:
    """A synced temporary file next to the target; gone afterwards unless it was renamed."""
    path = local_path(url)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle, attempt = tempfile.mkstemp(prefix=ATTEMPT, dir=os.path.dirname(path))
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(attempt, 0o644)  # mkstemp's 0600 would hide the result from other users
        yield attempt
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(attempt)


def _sync_folder(url: str) -> None:
    folder = os.open(os.path.dirname(local_path(url)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn the failures that a user can cure into messages; others pass unchanged."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        if has_no_bucket(error):
            raise DataError(f"{url}: there is no such bucket; create it first") from error
        raise MissingFileError(f"{url} doesn't exist") from error
    except PermissionError as error:
        raise DataError(f"{url}: permission denied ({error})") from error
    except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        raise DataError(f"{url}: a folder where a file is expected, or the reverse") from error
    except ImportError as error:
        raise ConfigError(f"{url}: this kind of storage needs another package: {error}") from error
    except Exception as error:
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
            raise DataError(f"{url}: no credentials for this store in the environment") from error
        if not is_local(url) and is_of_store(error):
            raise DataError(f"{url}: the store refuses this: {reason(error)}") from error
        raise


class MissingFileError(DataError):
    """The file is not there."""
