"""A record as tar members and back; the reading side believes nothing it has not checked."""

import json
from typing import Any

from glipv2.pipeline.errors import BadSample
from glipv2.pipeline.images import image_format, image_size
from glipv2.pipeline.records import TASKS, Box, Question, Record, Region, Span
from glipv2.pipeline.shard_format import KEY, RawSample, finite, refuse_constant
from glipv2.pipeline.storage import canonical_json

MAX_JSON_BYTES = 8 * 2**20
MAX_CAPTION = 20_000
MAX_REGIONS = 1_000
BOX_TOLERANCE = 1.0
"""Pixels by which a box may reach over the image's edge (it is clipped then)."""
TEXT_TASKS = ("grounding", "pairs", "captioning", "referring")
MAX_QUESTIONS = 10_000
MAX_ANSWERS = 1_000
RECORD_FIELDS = {"task", "caption", "width", "height", "regions", "provenance"}
TASK_FIELDS = {"captions", "questions"}
"""Only there when they hold something."""
REGION_FIELDS = {"box", "spans", "phrase", "category", "score", "mask", "crowd", "area"}


def record_members(record: Record) -> dict[str, bytes]:
    """Extension -> content; the same record always gives the same bytes."""
    document: dict[str, Any] = {
        "task": record.task,
        "caption": record.caption,
        "width": record.width,
        "height": record.height,
        "regions": [_region_json(region) for region in record.regions],
        "provenance": record.provenance,
    }
    if record.captions:
        document["captions"] = list(record.captions)
    if record.questions:
        document["questions"] = [
            {"id": asked.id, "text": asked.text, "answers": list(asked.answers)}
            for asked in record.questions
        ]
    try:
        text = canonical_json(document)
    except (ValueError, TypeError) as error:
        raise BadSample("json_invalid", str(error)) from error
    return {record.image_format: record.image, "json": text}


def parse_record(raw: RawSample, category_count: int | None = None) -> Record:
    """The record, or BadSample with a reason code; nothing is decoded beyond the image's header.

    Boxes that reach over the edge by at most BOX_TOLERANCE are clipped. With `category_count`,
    category numbers of regions must lie below it.
    """
    if raw.error is not None:
        raise raw.error
    if not KEY.fullmatch(raw.key):
        raise BadSample("key_invalid", repr(raw.key)[:100])
    document = _load_json(raw.members)
    format_ = _checked_format(raw.members)
    image = raw.members[format_]
    width, height = (_integer(document[name], name, minimum=1) for name in ("width", "height"))
    found, _ = image_size(image)
    if found != (width, height):
        raise BadSample("size_mismatch", f"image {found}, record {(width, height)}")
    task, caption = document["task"], _text(document["caption"], "caption")
    if task not in TASKS:
        raise BadSample("json_schema", f"task {task!r}")
    if task in TEXT_TASKS and not caption.strip():
        raise BadSample("caption_empty", f"task {task}")
    regions = document["regions"]
    if not isinstance(regions, list) or len(regions) > MAX_REGIONS:
        raise BadSample("json_schema", f"regions must be a list of at most {MAX_REGIONS}")
    if not isinstance(document["provenance"], dict):
        raise BadSample("json_schema", "provenance must be an object")
    record = Record(
        key=raw.key,
        image=image,
        image_format=format_,  # type: ignore[arg-type]
        width=width,
        height=height,
        task=task,
        caption=caption,
        captions=_texts(document.get("captions", []), "captions", MAX_QUESTIONS),
        regions=tuple(_region(item, caption, (width, height)) for item in regions),
        questions=_questions(document.get("questions", [])),
        provenance=document["provenance"],
    )
    _check_labels(record, category_count)
    return record


def _checked_format(members: Any) -> str:
    images = [name for name in members if name != "json"]
    if len(images) != 1:
        raise BadSample("image_missing" if not images else "image_ambiguous", str(images))
    found = image_format(members[images[0]])
    if found != images[0]:
        raise BadSample("image_format", f"named .{images[0]} but holds {found}")
    return found


def _load_json(members: Any) -> dict[str, Any]:
    if "json" not in members:
        raise BadSample("json_missing")
    if len(members["json"]) > MAX_JSON_BYTES:
        raise BadSample("json_invalid", f"{len(members['json'])} bytes")
    try:
        document = json.loads(
            members["json"].decode("utf-8"),
            parse_constant=refuse_constant,
            parse_float=finite,
            object_pairs_hook=_unique_fields,
        )
    except (ValueError, RecursionError) as error:
        raise BadSample("json_invalid", str(error)[:200]) from error
    if not isinstance(document, dict) or set(document) - TASK_FIELDS != RECORD_FIELDS:
        raise BadSample("json_schema", f"fields must be {sorted(RECORD_FIELDS)}")
    return document


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a field occurs twice")
    return fields


def _region_json(region: Region) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "box": [float(value) for value in region.box],
        "spans": [list(span) for span in region.spans],
        "phrase": region.phrase,
        "category": region.category,
        "score": float(region.score),
        "mask": region.mask,
        "crowd": region.crowd or None,
        "area": None if region.area is None else float(region.area),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _region(item: Any, caption: str, size: tuple[int, int]) -> Region:
    if not isinstance(item, dict) or not {"box"} <= set(item) <= REGION_FIELDS:
        raise BadSample("json_schema", f"fields of a region must be among {sorted(REGION_FIELDS)}")
    category, mask = item.get("category"), item.get("mask")
    score = _number(item.get("score", 1.0), "score")
    if not 0 <= score <= 1:
        raise BadSample("score_invalid", str(score))
    if mask is not None and not isinstance(mask, dict):
        raise BadSample("json_schema", "mask must be an object")
    crowd = item.get("crowd", False)
    if not isinstance(crowd, bool):
        raise BadSample("json_schema", "crowd must be true or false")
    area = None if item.get("area") is None else _number(item["area"], "area")
    if area is not None and area < 0:
        raise BadSample("json_schema", f"area {area}")
    spans = item.get("spans", [])
    if not isinstance(spans, list):
        raise BadSample("json_schema", "spans must be a list")
    return Region(
        box=_box(item["box"], size),
        spans=tuple(_span(span, caption) for span in spans),
        phrase=_text(item.get("phrase", ""), "phrase"),
        category=None if category is None else _integer(category, "category", minimum=0),
        score=score,
        mask=mask,
        crowd=crowd,
        area=area,
    )


def _questions(value: Any) -> tuple[Question, ...]:
    if not isinstance(value, list) or len(value) > MAX_QUESTIONS:
        raise BadSample("json_schema", f"questions must be a list of at most {MAX_QUESTIONS}")
    questions = []
    for item in value:
        if not isinstance(item, dict) or set(item) != {"id", "text", "answers"}:
            raise BadSample("json_schema", "a question has the fields id, text and answers")
        questions.append(
            Question(
                id=_text(item["id"], "question id"),
                text=_text(item["text"], "question"),
                answers=_texts(item["answers"], "answers", MAX_ANSWERS),
            )
        )
    return tuple(questions)


def _texts(value: Any, name: str, most: int) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > most:
        raise BadSample("json_schema", f"{name} must be a list of at most {most}")
    return tuple(_text(item, name) for item in value)


def _box(value: Any, size: tuple[int, int]) -> Box:
    if not isinstance(value, list) or len(value) != 4:
        raise BadSample("json_schema", f"box {str(value)[:80]}")
    x0, y0, x1, y1 = (_number(side, "box") for side in value)
    if x0 > x1 or y0 > y1:
        raise BadSample("box_inverted", str(value))
    if x0 == x1 or y0 == y1:
        raise BadSample("box_empty", str(value))
    width, height = size
    clipped = (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
    reach = max(-x0, -y0, x1 - width, y1 - height)
    if reach > BOX_TOLERANCE or clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        raise BadSample("box_outside", f"{value} in {width}x{height}")
    return clipped


def _span(value: Any, caption: str) -> Span:
    if not isinstance(value, list) or len(value) != 2:
        raise BadSample("json_schema", f"span {str(value)[:80]}")
    start, end = (_integer(side, "span") for side in value)
    if not 0 <= start < end <= len(caption):
        raise BadSample("span_outside", f"{value} in a caption of {len(caption)} characters")
    return start, end


def _check_labels(record: Record, category_count: int | None) -> None:
    """What the task needs of every region, so that training never meets a box without a name."""
    if record.task == "vqa" and not record.questions:
        raise BadSample("question_missing")
    for region in record.regions:
        if record.task == "detection" and region.category is None:
            raise BadSample("category_missing", str(region.box))
        if record.task in ("grounding", "referring") and not region.spans:
            raise BadSample("span_missing", str(region.box))
        outside = category_count is not None and (region.category or 0) >= category_count
        if region.category is not None and outside:
            raise BadSample("category_unknown", f"{region.category} of {category_count}")


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadSample("json_schema", f"{name} {str(value)[:80]!r} is no number")
    try:
        return float(value)
    except OverflowError as error:
        raise BadSample("json_schema", f"{name} is too large") from error


def _integer(value: Any, name: str, minimum: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadSample("json_schema", f"{name} {str(value)[:80]!r} is no integer")
    if abs(value) > 2**31 or (minimum is not None and value < minimum):
        raise BadSample("json_schema", f"{name} {str(value)[:80]} is out of range")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_CAPTION:
        raise BadSample("json_schema", f"{name} must be text of at most {MAX_CAPTION} characters")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # a lone surrogate
        raise BadSample("json_schema", f"{name}: {error}") from error
    return value
