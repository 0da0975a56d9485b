"""Visual question answering: VQAv2's two JSON files, and two simpler forms of the same.

- questions JSON and, unless the answers are secret, annotations JSON with ten answers a question
- JSON lines with `image`, `text` and `label` (POPE's yes/no questions), or `question`, `answer`
- a .csv or .tsv with the columns image_id, question and answer (DAQUAR)

Files are recognised by content. One record per image has all its questions.
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from glipv2.data_prep.image_files import (
    ImageFolders,
    check_file,
    files_digest,
    licence_of,
    parent,
    record_key,
)
from glipv2.data_prep.json_kinds import FileKind, recognise
from glipv2.data_prep.json_stream import Lookup, items
from glipv2.data_prep.pairs import MAX_CAPTION, MAX_LINE, csv_objects, json_objects
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.source import Row, Source
from glipv2.data_prep.text_cleaning import clean_text, has_letters
from glipv2.pipeline import storage
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import BadSample, ConfigError, DataError
from glipv2.pipeline.records import Question, Record

KINDS = {
    "questions": FileKind("questions", ("question_id", "image_id", "question")),
    "annotations": FileKind("annotations", ("question_id", "answers")),
}
IMAGE_FIELDS = ("image_id", "image")
NUMBERED = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{1,18})")
"""Stems that hold COCO's number of the image, which is the same in all its releases."""
MAX_QUESTIONS = 1_000
MAX_ANSWERS = 100
"""Of a question; further ones are of no use."""


def vqav2_source(options: PrepareConfig) -> Source:
    """One vqa record per image, in the order of their first questions."""
    for url in options.annotations:
        check_file(url, "annotation file")
    images = ImageFolders(options.images)
    images.check()
    if tables := [url for url in options.annotations if _is_table(url)]:
        if len(options.annotations) > 1:
            raise ConfigError(f"{tables[0]} has questions and answers in one; give it alone")
        files, asked = tables, partial(_of_table, tables[0])
    else:
        found = recognise(options.annotations, KINDS)
        if "questions" not in found:
            raise DataError(f"{options.annotations[0]} has answers only; give the questions too")
        files = [found[kind] for kind in KINDS if kind in found]
        asked = partial(_of_json, found["questions"], found.get("annotations", ""))
    return Source(
        rows=partial(_rows, asked, images),
        record=partial(_record, images),
        licence=licence_of(parent(files[0])),
        content={"annotations": files_digest(files), "images": images.digest()},
    )


def _is_table(url: str) -> bool:
    """Of columns, or of JSON lines."""
    if url.lower().endswith((".csv", ".tsv", ".jsonl")):
        return True
    line = storage.read_bytes(url, 0, MAX_LINE).split(b"\n", 1)[0]
    try:
        first = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and bool(set(IMAGE_FIELDS) & set(first))


def _of_table(url: str, dropped: Dropped) -> Iterator[dict[str, Any]]:
    columns = url.lower().endswith((".csv", ".tsv"))
    rows = csv_objects(url, dropped, IMAGE_FIELDS) if columns else json_objects(url, dropped)
    for number, row in enumerate(rows):
        answers = row.get("answers", [row.get("answer", row.get("label"))])
        yield {
            "image_id": row.get("image_id", row.get("image")),
            "question_id": row.get("question_id", number),
            "question": row.get("question", row.get("text")),
            "answers": answers if isinstance(answers, list) else [answers],
        }


def _of_json(questions: str, annotations: str, dropped: Dropped) -> Iterator[dict[str, Any]]:
    known = Lookup(items(annotations, "annotations"), "question_id") if annotations else None
    for item in items(questions, "questions"):
        asked = dict(item) if isinstance(item, dict) else {}
        asked["answers"] = []
        if known is not None:
            found = known.get(asked.get("question_id"))
            answers = found[0].get("answers") if found else None
            asked["answers"] = answers if isinstance(answers, list) else [None]
        yield asked


def _rows(
    asked: Callable[[Dropped], Iterator[dict[str, Any]]], images: ImageFolders, dropped: Dropped
) -> Iterator[Row]:
    lookup = Lookup(_readable(asked(dropped), dropped), "image_id")
    names = images.by_stem()
    numbered: dict[int, str] = {}
    for stem, name in names.items():
        if match := NUMBERED.fullmatch(stem):
            numbered.setdefault(int(match[1]), name)
    for image_id in lookup.values():
        found = _image_name(image_id, names, numbered)
        if found is None:
            dropped.note("image_missing", clean_text(image_id))
        else:
            yield Row(clean_text(image_id), (image_id, found, lookup.get(image_id)))


def _readable(asked: Iterator[dict[str, Any]], dropped: Dropped) -> Iterator[dict[str, Any]]:
    """Questions with ids as text; the others are noted."""
    for number, item in enumerate(asked):
        image_id, question_id = item.get("image_id"), item.get("question_id")
        if isinstance(image_id, int | str) and isinstance(question_id, int | str):
            ids = {"image_id": str(image_id), "id": str(question_id)}
            yield {**ids, "text": item.get("question"), "answers": item["answers"]}
        else:
            dropped.note("question_unreadable", f"question {number}")


def _image_name(image_id: str, names: dict[str, str], numbered: dict[int, str]) -> str | None:
    """By its stem, else by COCO's number, so that images of another release are found too."""
    stem = PurePosixPath(image_id).stem
    match = NUMBERED.fullmatch(stem)
    number = int(match[1]) if match else -1
    return names.get(image_id) or names.get(stem) or numbered.get(number)


def _record(images: ImageFolders, row: Row, dropped: Dropped) -> Record:
    image_id, name, asked = row.item
    if len(asked) > MAX_QUESTIONS:
        raise BadSample("texts_too_many", f"{len(asked)} questions")
    questions: dict[str, Question] = {}
    for item in asked:
        text = _text(item["text"])
        if not has_letters(text):
            dropped.note("question_unreadable", row.where)
        elif item["id"] in questions:
            dropped.note("question_repeated", row.where)
        else:
            answers = _answers(item["answers"], dropped, row.where)
            question = Question(id=clean_text(item["id"])[:80], text=text, answers=answers)
            questions[item["id"]] = question
    if not questions:
        raise BadSample("question_missing", row.where)
    image = images.load(name)
    return Record(
        key=record_key(image_id),
        image=image.data,
        image_format=image.format,
        width=image.width,
        height=image.height,
        task="vqa",
        questions=tuple(questions.values()),
        provenance={"source": "vqav2", "file": clean_text(name), "image_id": clean_text(image_id)},
    )


def _answers(raw: list[Any], dropped: Dropped, where: str) -> tuple[str, ...]:
    answers = []
    for item in raw[:MAX_ANSWERS]:
        text = _text(item.get("answer") if isinstance(item, dict) else item)
        if text:
            answers.append(text)
        else:
            dropped.note("answer_unreadable", where)
    return tuple(answers)


def _text(raw: Any) -> str:
    """Clean; empty when it is no text, or too long to be a question or an answer."""
    text = clean_text(raw) if isinstance(raw, str) else ""
    return text if len(text) <= MAX_CAPTION else ""
