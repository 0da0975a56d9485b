"""PASCAL VOC: one XML file per image, boxes 1-based with both ends included.

`xmin ymin xmax ymax` become `xmin-1, ymin-1, xmax, ymax`: 0-based with exclusive ends. Objects
marked `difficult` or `truncated` are kept: training uses them.
"""

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from glipv2.data_prep.boxes_cleaning import check_box_count, clean_box
from glipv2.data_prep.image_files import (
    ImageFolders,
    check_file,
    check_folder,
    licence_of,
    parent,
    record_key,
)
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.source import Row, Source
from glipv2.data_prep.text_cleaning import clean_text
from glipv2.pipeline import storage
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.records import Record, Region

MAX_XML_BYTES = 16 * 2**20
CORNERS = (("xmin", 1.0), ("ymin", 1.0), ("xmax", 0.0), ("ymax", 0.0))


def voc_source(options: PrepareConfig) -> Source:
    """One detection record per annotation file, in the order of their names.

    The categories are all names of the folder, sorted, whatever `list` takes of it: every split
    numbers them equally.
    """
    (folder,), images = options.annotations, ImageFolders(options.images)
    stems = listed_names(options.list) if options.list else None
    urls = voc_annotation_files(folder, stems)
    images.check()
    categories = voc_categories(folder)
    return Source(
        rows=partial(_rows, urls, images),
        record=partial(_record, images, {name: number for number, name in enumerate(categories)}),
        categories=categories,
        total=len(urls),
        licence=licence_of(parent(folder.rstrip("/"))),
        content={
            "annotations": storage.digest(
                [(clean_text(_file_name(url)), storage.file_crc32c(url)) for url in urls]
            ),
            "categories": list(categories),
            "images": images.digest(),
        },
    )


def voc_annotation_files(folder: str, stems: Collection[str] | None = None) -> list[str]:
    """The XML files in name order; DataError when there are none or a listed one is missing."""
    check_folder(folder, "annotation")
    names = [name for name in storage.list_names(folder) if name.endswith(".xml")]
    if stems is not None:
        absent = sorted(set(stems) - {name.removesuffix(".xml") for name in names})
        if absent:
            raise DataError(
                f"{len(absent)} of {len(set(stems))} listed names have no annotation in "
                f"{folder}, the first is {absent[0]}.xml; mend the list"
            )
        names = [name for name in names if name.removesuffix(".xml") in set(stems)]
    if not names:
        raise DataError(f"no .xml file to read in {folder}; give the folder with the XML")
    return [storage.join(folder, name) for name in names]


def voc_categories(folder: str) -> tuple[str, ...]:
    """All object names of the folder, sorted: the same for every split of it."""
    names: set[str] = set()
    for url in voc_annotation_files(folder):
        try:
            names.update(_name(item) for item in parse_xml(url).iter("object"))
        except BadSample:
            continue  # it is counted when its record is made
    return tuple(sorted(names - {""}))


def _rows(urls: Sequence[str], images: ImageFolders, dropped: Dropped) -> Iterator[Row]:
    names = images.by_stem()
    for url in urls:
        where = clean_text(_file_name(url))
        try:
            root = parse_xml(url)
            image = _image_of(url, root, names)
        except BadSample as error:
            dropped.note(error.reason, where)
        else:
            yield Row(where, (url, image))


def listed_names(url: str) -> set[str]:
    """Names in a VOC list file: the first word of each line."""
    check_file(url, "list file")
    try:
        lines = storage.read_bytes(url).decode("utf-8-sig").splitlines()
    except ValueError as error:
        raise DataError(f"list file {url} is not UTF-8 text: {error}") from error
    names = {line.split()[0] for line in lines if line.strip()}
    if not names:
        raise DataError(f"list file {url} names nothing; write one image name per line")
    return names


def _file_name(url: str) -> str:
    return url.rsplit("/", 1)[-1]


def parse_xml(url: str) -> ElementTree.Element:
    """An annotation file; BadSample when it is too large, no XML, or defines entities."""
    try:
        data = storage.read_bytes(url, 0, MAX_XML_BYTES + 1)
        if len(data) > MAX_XML_BYTES:
            raise BadSample("annotation_unreadable", f"{url}: more than {MAX_XML_BYTES} bytes")
        return fromstring(data, forbid_dtd=True)
    except (ElementTree.ParseError, DefusedXmlException, ValueError, LookupError) as error:
        raise BadSample("annotation_unreadable", f"{url}: {error}") from error


def _image_of(url: str, root: ElementTree.Element, names: dict[str, str]) -> str:
    """The image of the same stem, else of the name inside the XML (its folders don't count)."""
    named = (root.findtext("filename") or "").replace("\\", "/").rsplit("/", 1)[-1]
    own = _file_name(url).removesuffix(".xml")
    for stem in (own, Path(named).stem):
        if stem in names:
            return names[stem]
    raise BadSample("image_missing", f"{url}: no image {own}.*")


def _record(images: ImageFolders, numbers: dict[str, int], row: Row, dropped: Dropped) -> Record:
    url, image_name = row.item
    root = parse_xml(url)
    image = images.load(image_name)
    check_stated_size(root, image.size, url)
    objects = root.findall("object")
    check_box_count(objects, url)
    regions = []
    for item in objects:
        region = _region(item, image.size, numbers, dropped, row.where)
        if region is not None:
            regions.append(region)
    if not regions:
        dropped.note("no_boxes", row.where)
    return Record(
        key=record_key(_file_name(url).removesuffix(".xml")),
        image=image.data,
        image_format=image.format,
        width=image.width,
        height=image.height,
        task="detection",
        regions=tuple(regions),
        provenance={"source": "voc", "file": clean_text(image_name)},
    )


def check_stated_size(root: ElementTree.Element, found: tuple[int, int], where: str) -> None:
    """BadSample when the annotation states another size; zeros, or none, state nothing."""
    stated = (root.findtext("size/width"), root.findtext("size/height"))
    try:
        sizes = [float(text or 0) for text in stated]
    except ValueError:
        sizes = [math.nan, math.nan]
    if not all(size in (0, actual) for size, actual in zip(sizes, found, strict=True)):
        raise BadSample("size_mismatch", f"{where} says {stated}, the image is {found}")


def _region(
    item: ElementTree.Element,
    size: tuple[int, int],
    numbers: dict[str, int],
    dropped: Dropped,
    where: str,
) -> Region | None:
    name = _name(item)
    if name not in numbers:
        dropped.note("category_unknown", where)
        return None
    box = clean_box(box_corners(item), size, dropped, where)
    return None if box is None else Region(box=box, phrase=name, category=numbers[name])


def box_corners(item: ElementTree.Element) -> list[float | None]:
    """An object's x0, y0, x1, y1, 0-based with exclusive ends; None for what is no number."""
    corners: list[float | None] = []
    for tag, offset in CORNERS:
        try:
            corners.append(float(item.findtext(f"bndbox/{tag}") or "") - offset)
        except ValueError:
            corners.append(None)
    return corners


def _name(item: ElementTree.Element) -> str:
    return (item.findtext("name") or "").strip()
