"""PASCAL VOC: one XML file per image, boxes 1-based with both ends included.

`xmin ymin xmax ymax` become `xmin-1, ymin-1, xmax, ymax`: 0-based with exclusive ends. Objects
marked `difficult` or `truncated` are kept: training uses them.
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from glipv2.data_prep.boxes_cleaning import MAX_BOXES, clean_box
from glipv2.data_prep.image_files import check_folder, images_by_stem, load_image, record_key
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.text_cleaning import clean_text
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.records import Record, Region

MAX_XML_BYTES = 16 * 2**20
CORNERS = (("xmin", 1.0), ("ymin", 1.0), ("xmax", 0.0), ("ymax", 0.0))


def read_voc(
    annotations: Path,
    images: Path,
    dropped: Dropped,
    categories: Sequence[str] | None = None,
    stems: Collection[str] | None = None,
) -> Iterator[Record]:
    """One detection record per annotation file, in the order of their names.

    `categories` are the names that Region.category counts (default: `voc_categories`); `stems`
    limits the set to annotation files of these names (without `.xml`). What is left out is
    noted in `dropped` by reason.
    """
    known = tuple(categories) if categories is not None else voc_categories(annotations)
    numbers = {name: number for number, name in enumerate(known)}
    image_files = images_by_stem(images)
    for path in voc_annotation_files(annotations, stems):
        try:
            root = _parse(path)
            image_path = _image_of(path, root, image_files)
            yield _record(path, root, image_path, numbers, dropped)
        except BadSample as error:
            dropped.note(error.reason, clean_text(path.name))


def voc_annotation_files(annotations: Path, stems: Collection[str] | None = None) -> list[Path]:
    """The XML files in name order; DataError when there are none or a listed one is missing."""
    check_folder(annotations, "annotation")
    files = sorted(annotations.glob("*.xml"))
    if stems is not None:
        absent = sorted(set(stems) - {path.stem for path in files})
        if absent:
            raise DataError(
                f"{len(absent)} of {len(set(stems))} listed names have no annotation in "
                f"{annotations}, the first is {absent[0]}.xml; mend the list"
            )
        files = [path for path in files if path.stem in set(stems)]
    if not files:
        raise DataError(f"no .xml file to read in {annotations}; give the folder with the XML")
    return files


def voc_categories(annotations: Path) -> tuple[str, ...]:
    """All object names of the folder, sorted: the same for every split of it."""
    names: set[str] = set()
    for path in voc_annotation_files(annotations):
        try:
            names.update(_name(item) for item in _parse(path).iter("object"))
        except BadSample:
            continue  # read_voc counts it
    return tuple(sorted(names - {""}))


def _parse(path: Path) -> ElementTree.Element:
    try:
        if path.stat().st_size > MAX_XML_BYTES:
            raise BadSample("annotation_unreadable", f"{path}: more than {MAX_XML_BYTES} bytes")
        return fromstring(path.read_bytes(), forbid_dtd=True)
    except (ElementTree.ParseError, DefusedXmlException, ValueError, LookupError, OSError) as error:
        raise BadSample("annotation_unreadable", f"{path}: {error}") from error


def _image_of(path: Path, root: ElementTree.Element, image_files: dict[str, Path]) -> Path:
    """The image of the same stem, else of the name inside the XML (its folders don't count)."""
    named = (root.findtext("filename") or "").replace("\\", "/").rsplit("/", 1)[-1]
    for stem in (path.stem, Path(named).stem):
        if stem in image_files:
            return image_files[stem]
    raise BadSample("image_missing", f"{path}: no image {path.stem}.*")


def _record(
    path: Path,
    root: ElementTree.Element,
    image_path: Path,
    numbers: dict[str, int],
    dropped: Dropped,
) -> Record:
    image = load_image(image_path)
    stated = (root.findtext("size/width"), root.findtext("size/height"))
    if not _agrees(stated, image.size):
        raise BadSample("size_mismatch", f"{path} says {stated}, {image_path} is {image.size}")
    where = clean_text(path.name)
    objects = root.findall("object")
    if len(objects) > MAX_BOXES:
        raise BadSample("boxes_too_many", f"{path}: {len(objects)}")
    regions = []
    for item in objects:
        region = _region(item, image.size, numbers, dropped, where)
        if region is not None:
            regions.append(region)
    if not regions:
        dropped.note("no_boxes", where)
    return Record(
        key=record_key(path.stem),
        image=image.data,
        image_format=image.format,
        width=image.width,
        height=image.height,
        task="detection",
        regions=tuple(regions),
        provenance={"source": "voc", "file": clean_text(image_path.name)},
    )


def _agrees(stated: tuple[str | None, str | None], found: tuple[int, int]) -> bool:
    """Annotations without a size, or with zeros, are taken at their word."""
    try:
        sizes = [float(text or 0) for text in stated]
    except ValueError:
        return False
    return all(size in (0, actual) for size, actual in zip(sizes, found, strict=True))


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
    corners: list[float | None] = []
    for tag, offset in CORNERS:
        try:
            corners.append(float(item.findtext(f"bndbox/{tag}") or "") - offset)
        except ValueError:
            corners.append(None)  # clean_box names the reason
    box = clean_box(corners, size, dropped, where)
    return None if box is None else Region(box=box, phrase=name, category=numbers[name])


def _name(item: ElementTree.Element) -> str:
    return (item.findtext("name") or "").strip()
