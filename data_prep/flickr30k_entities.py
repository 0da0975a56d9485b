"""Flickr30k Entities as published: sentences whose phrases stand in brackets, and XML with boxes.

A sentence reads `[/EN#123/people A man] waves .`; the number is a chain of phrases that mean the
same things, whose boxes are in Annotations/IMAGE.xml, 1-based with both ends included. A phrase
gets a region for each box of its chain. Phrases without boxes (scenes, what is not visible) stay in
the caption and have none.

A record's provenance has two lists beside its regions: `chains`, their numbers, and `groups`, the
kinds of their phrases (people, clothing, ...), by which recall is reported.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple
from xml.etree.ElementTree import Element

from glipv2.data_prep.boxes_cleaning import check_box_count, clean_box
from glipv2.data_prep.grounded import clean_caption, grounded_record
from glipv2.data_prep.image_files import ImageFolders, check_folder, licence_of, record_key
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.source import Row, Source
from glipv2.data_prep.text_cleaning import clean_text
from glipv2.data_prep.voc import box_corners, check_stated_size, listed_names, parse_xml
from glipv2.pipeline import storage
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.records import Record, Region

PHRASE = re.compile(r"\[/EN#(\d+)/(\S+)\s+([^][]*)\]")
MARK = "/EN#"
IMAGE_FOLDERS = ("flickr30k_images", "flickr30k-images")
MAX_SENTENCES_BYTES = 1_000_000


class Phrase(NamedTuple):
    start: int
    end: int
    """Characters of the sentence without its marks."""
    chain: str
    kind: str
    """Of several the first."""


def flickr30k_source(options: PrepareConfig) -> Source:
    """One grounding record per sentence, in the order of the images' ids."""
    root = options.root
    for folder in ("Sentences", "Annotations"):
        check_folder(storage.join(root, folder), "Flickr30k Entities")
    found = [storage.join(root, name) for name in IMAGE_FOLDERS]
    images = ImageFolders(options.images or tuple(url for url in found if storage.list_names(url)))
    if not images.urls:
        raise DataError(f"{root} holds no {' or '.join(IMAGE_FOLDERS)}; give images")
    images.check()
    ids = _ids(root, options.list)
    files = [_file(root, kind, name) for name in ids for kind in ("Sentences", "Annotations")]
    return Source(
        rows=partial(_rows, root, ids, images),
        record=partial(_record, root, images),
        licence=licence_of(root),
        content={
            "ids": storage.digest(ids),
            "annotations": storage.digest([_crc(url) for url in files]),
            "images": images.digest(),
        },
    )


def _ids(root: str, listed: str) -> list[str]:
    """Of all sentence files, or of those that a list names; DataError when one is not there."""
    folder = storage.join(root, "Sentences")
    ids = [n.removesuffix(".txt") for n in storage.list_names(folder) if n.endswith(".txt")]
    if listed:
        wanted = listed_names(listed)
        if absent := sorted(wanted - set(ids)):
            raise DataError(
                f"{len(absent)} of {len(wanted)} names of {listed} have no file in {folder}, the "
                f"first is {absent[0]}.txt; mend the list"
            )
        ids = [name for name in ids if name in wanted]
    if not ids:
        raise DataError(f"no .txt file in {folder}; give the folder that Flickr30k Entities is in")
    return ids


def _file(root: str, kind: str, name: str) -> str:
    return storage.join(root, kind, f"{name}.{'txt' if kind == 'Sentences' else 'xml'}")


def _crc(url: str) -> str:
    try:
        return storage.file_crc32c(url)
    except storage.MissingFileError:
        return ""


def _rows(root: str, ids: list[str], images: ImageFolders, dropped: Dropped) -> Iterator[Row]:
    names = images.by_stem()
    for name in ids:
        where = f"{clean_text(name)}.txt"
        data = storage.read_bytes(_file(root, "Sentences", name), 0, MAX_SENTENCES_BYTES + 1)
        try:
            lines = data.decode("utf-8-sig").splitlines()
        except ValueError:
            lines = []
        if not lines or len(data) > MAX_SENTENCES_BYTES:
            dropped.note("annotation_unreadable", where)
        elif name not in names:
            dropped.note("image_missing", where)
        else:
            for number, line in enumerate(lines):
                if line.strip():
                    yield Row(f"{where} line {number + 1}", (name, number, line, names[name]))


def _record(root: str, images: ImageFolders, row: Row, dropped: Dropped) -> Record:
    name, number, line, image_name = row.item
    text, phrases = parse_sentence(line)
    caption = clean_caption(text, dropped, row.where)
    boxes_of = _boxes(root, name)
    image = images.load(image_name)
    check_stated_size(boxes_of.root, image.size, row.where)
    regions, chains, groups = [], [], []
    for phrase in phrases:
        spans = caption.spans([[phrase.start, phrase.end]], dropped, row.where)
        objects = boxes_of.chains.get(phrase.chain, [])
        if not objects:
            dropped.note("phrase_without_box", row.where)
        for item in objects if spans else ():
            box = clean_box(box_corners(item), image.size, dropped, row.where)
            if box is not None:
                regions.append(Region(box=box, spans=spans, phrase=caption.phrase(spans)))
                chains.append(phrase.chain)
                groups.append(phrase.kind)
    check_box_count(regions, row.where)
    return grounded_record(
        key=record_key(name, number),
        image=image,
        task="grounding",
        caption=caption.text,
        regions=regions,
        provenance={
            "source": "flickr30k-entities",
            "file": clean_text(image_name),
            "sentence": number,
            "chains": chains,
            "groups": groups,
        },
    )


def parse_sentence(line: str) -> tuple[str, list[Phrase]]:
    """The sentence without its marks, and its phrases; BadSample when a bracket doesn't close."""
    text, phrases, end = "", [], 0
    for match in PHRASE.finditer(line):
        chain, kinds, words = match.groups()
        text += line[end : match.start()]
        phrases.append(Phrase(len(text), len(text) + len(words), chain, kinds.split("/")[0]))
        text += words
        end = match.end()
    text += line[end:]
    if MARK in text:
        raise BadSample("markup_unreadable", line[:200])
    return text, phrases


class _Annotation(NamedTuple):
    root: Element
    chains: dict[str, list[Element]]
    """Number -> the objects with a box; one box may stand for several chains."""


def _boxes(root: str, name: str) -> _Annotation:
    try:
        document = parse_xml(_file(root, "Annotations", name))
    except storage.MissingFileError as error:
        raise BadSample("entry_missing", str(error)) from error
    chains = defaultdict(list)
    for item in document.iter("object"):
        if item.find("bndbox") is not None:
            for chain in item.findall("name"):
                chains[(chain.text or "").strip()].append(item)
    return _Annotation(document, dict(chains))
