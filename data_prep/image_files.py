"""Image files of a user's folder: found by name, checked by content, never trusted."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.images import MAX_BYTES, decode_image, image_size

FORMAT_OF_SUFFIX = {".jpg": "jpg", ".jpeg": "jpg", ".jpe": "jpg", ".png": "png", ".webp": "webp"}
OTHER_SUFFIXES = (".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".svg")
"""Known as images, though not readable here: they are counted, not overlooked."""


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


def load_image(path: Path) -> ImageFile:
    """The file as it is, once it was decoded to the end; otherwise BadSample with its reason."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise BadSample("image_too_large", f"{path}: {size} bytes")
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadSample("image_missing", f"{path}: {error}") from error
    (width, height), found = image_size(data)
    named = FORMAT_OF_SUFFIX.get(path.suffix.lower())
    if found != named:
        raise BadSample("image_wrong_extension", f"{path} holds {found}")
    decode_image(data)  # a truncated file has a sound header
    return ImageFile(
        data=data,
        format=cast(Literal["jpg", "png", "webp"], found),
        width=width,
        height=height,
    )


def images_by_stem(folder: Path) -> dict[str, Path]:
    """Stem -> file of every image in the folder; of several formats the first by name wins."""
    check_folder(folder, "image")
    known = (*FORMAT_OF_SUFFIX, *OTHER_SUFFIXES)
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in known:
            files.setdefault(path.stem, path)
    return files


def inside(folder: Path, name: str) -> Path:
    """folder/name; BadSample when the name leads elsewhere (absolute, `..`, a link outwards)."""
    try:
        path = (folder / name).resolve()
        if path.is_relative_to(folder.resolve()):
            return folder / name
    except (OSError, ValueError) as error:
        raise BadSample("image_missing", f"{name!r}: {error}") from error
    raise BadSample("image_outside_folder", repr(name)[:200])


def record_key(name: str, number: int | None = None) -> str:
    """A key for the shard set: the name's safe characters, with a digest where some were lost."""
    safe = re.sub(r"[^A-Za-z0-9_-]", "-", name)[:48]
    if safe != name:
        safe = f"{safe}-{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:8]}"
    return safe if number is None else f"{safe}-{number:08d}"


def check_folder(folder: Path, what: str) -> None:
    """DataError unless the folder is there."""
    if not folder.is_dir():
        kind = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(f"{what} folder {folder} {kind}; give the folder that holds the files")


def check_file(path: Path, what: str) -> None:
    """DataError unless the file is there."""
    if not path.is_file():
        kind = "is a folder, not a file" if path.exists() else "does not exist"
        raise DataError(f"{what} {path} {kind}; check the path")
