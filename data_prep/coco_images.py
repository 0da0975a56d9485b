"""Images of COCO under the several names that its years, its URLs and its offspring give them."""

import re
from typing import Any
from urllib.parse import urlsplit

from glipv2.data_prep.coco import load_stated
from glipv2.data_prep.image_files import ImageFile, ImageFolders
from glipv2.pipeline.errors import BadSample

NAME = re.compile(r"(COCO_\w+?_)?(\d{12})(?:_\d+)?(\.jpg)")
"""2014 has a prefix, 2017 none; RefCOCO appends the number of the object."""


def load_coco(images: ImageFolders, name: str, entry: dict[str, Any]) -> ImageFile:
    """The image by the first of `coco_names`; its size must be what the entry states."""
    stated = {side: _number(entry.get(side)) for side in ("width", "height")}
    names = coco_names(name)
    for tried in names[:-1]:
        try:
            return load_stated(images, tried, stated)
        except BadSample as error:
            if error.reason != "image_missing":
                raise
    return load_stated(images, names[-1], stated)


def coco_names(name: str) -> list[str]:
    """The names to look for: as given (of a URL, its path), then as other releases have it."""
    name = urlsplit(name).path.lstrip("/") if "://" in name else name
    names = [name]
    if match := NAME.fullmatch(name.rsplit("/", 1)[-1]):
        prefix, number, suffix = match.groups()
        names += [f"{prefix or ''}{number}{suffix}", f"{number}{suffix}"]
    return list(dict.fromkeys(names))


def _number(side: Any) -> Any:
    """MDETR's Flickr30k files state sizes as text."""
    return int(side) if isinstance(side, str) and side.isascii() and side.isdigit() else side
