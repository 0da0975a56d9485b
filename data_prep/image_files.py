"""Images of a user's folders: found by name, checked by content, never trusted.

A folder is a path or a URL of any store that `pipeline.storage` reads.
"""

import contextlib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from glipv2.data_prep.text_cleaning import clean_text
from glipv2.pipeline import storage
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.images import MAX_BYTES, decode_image, image_size

FORMAT_OF_SUFFIX = {".jpg": "jpg", ".jpeg": "jpg", ".jpe": "jpg", ".png": "png", ".webp": "webp"}
OTHER_SUFFIXES = (".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".svg")
"""Known as images, though not readable here: they are counted, not overlooked."""
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md")


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    data: bytes
    format: Literal["jpg", "png", "webp"]
    width: int
    height: int
    """Width and height after EXIF orientation is applied."""

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height


@dataclass(frozen=True)
class ImageFolders:
    """Where a source's images are: the first folder that holds a name wins."""

    urls: tuple[str, ...]

    def check(self) -> None:
        """DataError unless every folder is there and holds something."""
        for url in self.urls:
            check_folder(url, "image")

    def load(self, name: str) -> ImageFile:
        """The image `name` (a path below a folder); BadSample with the reason if it can't be used.

        Names that lead out of their folder (absolute, `..`, a link outwards) are never opened.
        """
        for url in self.urls:
            data = read_inside(url, name)
            if data is not None:
                return image_file(data, name)
        raise BadSample("image_missing", f"{', '.join(self.urls)}: {name!r}"[:300])

    def by_stem(self) -> dict[str, str]:
        """Stem -> name of every image of the folders; of several formats the first wins."""
        known = (*FORMAT_OF_SUFFIX, *OTHER_SUFFIXES)
        names: dict[str, str] = {}
        for url in self.urls:
            for name in storage.list_names(url):
                if Path(name).suffix.lower() in known:
                    names.setdefault(Path(name).stem, name)
        return names

    def digest(self) -> str:
        """Of the names and sizes of all files: changes when an image is added or replaced."""
        return storage.digest([_listing(url) for url in self.urls])


def image_file(data: bytes, name: str) -> ImageFile:
    """Bytes as an image, once they were decoded to the end; otherwise BadSample."""
    if len(data) > MAX_BYTES:
        raise BadSample("image_too_large", f"{name}: {len(data)} bytes")
    (width, height), found = image_size(data)
    named = FORMAT_OF_SUFFIX.get(Path(name).suffix.lower())
    if found != named:
        raise BadSample("image_wrong_extension", f"{name} holds {found}")
    decode_image(data)  # a truncated file has a sound header
    return ImageFile(
        data=data,
        format=cast(Literal["jpg", "png", "webp"], found),
        width=width,
        height=height,
    )


def read_inside(folder: str, name: str) -> bytes | None:
    """The file folder/name, at most one byte more than MAX_BYTES of it; None when it is absent."""
    if not storage.is_local(folder):
        if not name or name.startswith("/") or ".." in name.split("/") or ":" in name:
            raise BadSample("image_outside_folder", repr(name)[:200])
        try:
            return storage.read_bytes(storage.join(folder, name), 0, MAX_BYTES + 1)
        except storage.MissingFileError:
            return None
    root = Path(storage.local_path(folder))
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root.resolve()):
            raise BadSample("image_outside_folder", repr(name)[:200])
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError):  # absent, a folder, a name too long or with a NUL
        return None


def record_key(name: str, number: int | None = None) -> str:
    """A key for the shard set: the name's safe characters, with a digest where some were lost."""
    safe = re.sub(r"[^A-Za-z0-9_-]", "-", name)[:48]
    if safe != name:
        safe = f"{safe}-{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:8]}"
    return safe if number is None else f"{safe}-{number:08d}"


def check_folder(url: str, what: str) -> None:
    """DataError unless the folder is there and holds something."""
    if storage.is_local(url):
        folder = Path(storage.local_path(url))
        if folder.is_dir():
            if any(folder.iterdir()):
                return
            kind = "is empty"
        else:
            kind = "is a file, not a folder" if folder.exists() else "does not exist"
    elif storage.list_names(url):
        return
    else:
        kind = "is empty or does not exist"
    raise DataError(f"{what} folder {url} {kind}; give the folder that holds the files")


def check_file(url: str, what: str) -> None:
    """DataError unless the file is there."""
    if storage.is_local(url):
        path = Path(storage.local_path(url))
        if path.is_file():
            return
        kind = "is a folder, not a file" if path.exists() else "does not exist"
    elif storage.exists(url):
        return
    else:
        kind = "does not exist"
    raise DataError(f"{what} {url} {kind}; check the path")


def parent(url: str) -> str:
    """The folder of a file."""
    return url.rsplit("/", 1)[0] if "/" in url else "."


def licence_of(folder: str) -> str:
    """First line of the licence file beside the data; "not stated" if there is none."""
    for name in LICENCE_FILES:
        with contextlib.suppress(storage.MissingFileError):
            text = storage.read_bytes(storage.join(folder, name)).decode("utf-8", "replace")
            lines = [clean_text(line) for line in text.splitlines() if line.strip(" #\n")]
            return lines[0].lstrip("# ") if lines else "not stated"
    return "not stated"


def files_digest(urls: Sequence[str]) -> str:
    """Of the content of annotation files."""
    return storage.digest([storage.file_crc32c(url) for url in urls])


def _listing(url: str) -> list[tuple[str, int]]:
    return sorted((clean_text(name), size) for name, size in storage.tree_sizes(url).items())
