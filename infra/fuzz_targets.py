"""What `fuzz` runs: for each reader, how its input is made and what must hold of its answer."""

import io
import json
import random
import tarfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from fuzz_inputs import damaged_value, json_bytes, number, picture, png, tar_bytes, value, words

from glipv2.data_prep import json_stream
from glipv2.data_prep.boxes_cleaning import clean_box
from glipv2.data_prep.grounded import Caption, clean_caption
from glipv2.data_prep.pairs import MAX_CAPTION
from glipv2.data_prep.reasons import REASONS, Dropped
from glipv2.data_prep.text_cleaning import clean_text, has_letters
from glipv2.data_prep.webdataset import tar_members, tar_record, tar_rows
from glipv2.model.prompts import (
    Prompt,
    caption_prompt,
    clean_category,
    grounding_prompt,
    split_categories,
    token_map,
)
from glipv2.model.tokenizer import Tokenizer, tiny_vocab
from glipv2.pipeline import storage
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.negatives import Categories, Negatives, caption_text, detection_text
from glipv2.pipeline.record_json import parse_record, record_members
from glipv2.pipeline.records import TASKS, Record, Region
from glipv2.pipeline.shard_format import RawSample, walk_samples

FOLDER = "memory://fuzz"
TOKENIZER = Tokenizer.from_vocab(tiny_vocab(), 64)
UNCUT = Tokenizer.from_vocab(tiny_vocab(), 10**6)
BUDGET = TOKENIZER.max_tokens - 2
IMAGE = png((32, 24))
NEGATIVES = Negatives(max_categories=8, full_share=0.5, packing=0.7, max_captions=3, pack_gold=True)


class Target(NamedTuple):
    make: Callable[[random.Random], bytes]
    check: Callable[[bytes], None]
    """Raises when something is wrong; what is documented to be raised is caught in it."""


def check_tar(data: bytes) -> None:
    """Foreign tars: members lie inside, and every record can be stored."""
    storage.write_bytes(f"{FOLDER}/a.tar", data)
    for member in tar_members(f"{FOLDER}/a.tar", len(data), Dropped()):
        assert 0 <= member.start <= member.start + member.size <= len(data), member
        assert ".." not in member.key.split("/") and not member.key.startswith("/"), member
    dropped, keys = Dropped(), set()
    for row in tar_rows(FOLDER, {"a.tar": len(data)}, dropped):
        with suppress(BadSample):
            record = tar_record(FOLDER, "", row, dropped)
            assert record.key not in keys, record.key
            keys.add(record.key)
            assert_stored_alike(record)
    assert_noted(dropped)


def check_own_tar(data: bytes) -> None:
    """The index of a shard: samples follow each other, members lie inside them."""
    end = 0
    with suppress(tarfile.HeaderError):
        for key, offset, length, members in walk_samples(io.BytesIO(data)):
            assert key and offset >= end and length > 0
            end = offset + length
            for start, size in members.values():
                assert 0 < start <= start + size <= length, members


def make_sample(rng: random.Random) -> bytes:
    """A sample's JSON, and its image after a zero byte."""
    extension, image = picture(rng)
    caption = words(rng)
    places = [sorted(rng.randint(0, len(caption) + 1) for _ in range(2)) for _ in range(5)]
    regions = [
        {
            "box": sorted(rng.uniform(0, 24) for _ in range(4)),
            "spans": places[: rng.randint(0, 2)],
            "phrase": words(rng, 2),
            **({"category": rng.randint(0, 3)} if rng.random() < 0.5 else {}),
            **({"score": rng.random(), "crowd": True} if rng.random() < 0.2 else {}),
        }
        for _ in range(rng.randint(0, 3))
    ]
    document = {
        "task": rng.choice(TASKS), "caption": caption, "width": 32, "height": 24,
        "regions": regions, "provenance": {"source": "fuzz"},
        **({"captions": [caption]} if rng.random() < 0.2 else {}),
        **({"questions": [{"id": "1", "text": caption, "answers": ["a"]}]}
           if rng.random() < 0.2 else {}),
    }  # fmt: skip
    if rng.random() < 0.7:
        document = damaged_value(document, rng)
    return json_bytes(document, rng, 0.1) + b"\0" + extension.encode() + b"\0" + image


def check_sample(data: bytes) -> None:
    """A sample of a shard: a record by the rules, or a BadSample."""
    text, _, rest = data.partition(b"\0")
    extension, _, image = rest.partition(b"\0")
    members = {"json": text, extension.decode("latin-1"): image}
    with suppress(BadSample):
        record = parse_record(RawSample(key="fuzz", members=members), 3)
        for region in record.regions:
            assert_inside(region.box, record.width, record.height)
            assert all(0 <= a < b <= len(record.caption) for a, b in region.spans)
            assert 0 <= region.score <= 1
            assert region.category is None or 0 <= region.category < 3
        assert_stored_alike(record)


def make_caption(rng: random.Random) -> bytes:
    """A caption, phrases as spans and as words, captions of neighbours."""
    caption = words(rng, rng.choice([5, 12, 60]))
    sides = [*range(len(caption))[:80], len(caption), len(caption) + 1, -1]
    spans = [sorted(rng.choices(sides, k=2)) for _ in range(8)]
    phrases = [
        rng.sample(spans, rng.randint(1, 3)) if rng.random() < 0.9 else value(rng)
        for _ in range(rng.choice([1, 2, 3, 4, 5, 6, 300]))
    ]
    document = {
        "caption": caption,
        "phrases": phrases,
        "words": [words(rng, 2) for _ in range(2)],
        "neighbours": [words(rng) for _ in range(rng.randint(0, 4))],
        "seed": rng.randrange(1000),
    }
    return json_bytes(document, rng, 0.0)


def check_caption(data: bytes) -> None:
    """Captions with phrases: from the source's text to tokens, all spans keep their words."""
    document, dropped = json.loads(data), Dropped()
    try:
        caption = clean_caption(document["caption"], dropped, "here")
    except BadSample as bad:
        assert bad.reason in ("caption_empty", "row_unreadable")
        return
    text = caption.text
    assert 0 < len(text) <= MAX_CAPTION and has_letters(text) and clean_text(text) == text
    record = grounded(caption, document["phrases"], dropped)
    assert_noted(dropped)
    assert_stored_alike(record)
    neighbours = [clean_text(neighbour) for neighbour in document["neighbours"]]
    rng = np.random.default_rng(document["seed"])
    made = caption_text(record, neighbours, count_tokens, BUDGET, NEGATIVES, rng)
    said = made.prompt.phrases
    for region, phrase in zip(record.regions, made.phrase_of_region, strict=True):
        assert phrase is not None and said[phrase] == caption.phrase(region.spans)
    (own,) = made.maskable
    assert made.prompt.text[slice(*own)] == text
    assert_tokens(made.prompt)
    prompt = grounding_prompt(text)
    assert all(phrase.strip() == phrase != "" for phrase in prompt.phrases)
    assert_tokens(prompt)
    with suppress(ValueError):
        named = caption_prompt(text, document["words"])
        assert len(named.spans) == len(document["words"])
        assert_tokens(named)


def grounded(caption: Caption, phrases: Sequence[Any], dropped: Dropped) -> Record:
    """The caption with a region for each phrase that has a usable span."""
    regions = []
    for raw in phrases:
        spans = caption.spans(raw, dropped, "here")
        assert list(spans) == sorted(set(spans))
        for start, end in spans:
            words_of = caption.text[start:end]
            assert 0 <= start < end <= len(caption.text) and words_of == words_of.strip()
        if spans:
            box = (0.0, 0.0, 1.0, 1.0)
            regions.append(Region(box=box, spans=spans, phrase=caption.phrase(spans)))
    return plain_record("grounding", caption.text, regions, {})


def make_names(rng: random.Random) -> bytes:
    names = [words(rng, 3) for _ in range(rng.choice([1, 4, 30]))]
    listed = list(range(len(names)))
    document = {
        "names": names,
        "shown": [[rng.choice(listed), rng.random() < 0.2] for _ in range(rng.randint(0, 5))],
        "budget": rng.choice([0, 1, 5, 20, BUDGET]),
        "searched": rng.choice([None, rng.sample(listed, len(listed) // 2), value(rng)]),
        "fixed": rng.random() < 0.2,
        "seed": rng.randrange(1000),
    }
    return json_bytes(document, rng, 0.0)


def check_names(data: bytes) -> None:
    """Category names: every phrase of a prompt is its category, and the budget holds."""
    document = json.loads(data)
    given = dict.fromkeys(clean_text(name) for name in document["names"])
    names = tuple(clean_category(name) for name in given)
    chunks = split_categories(names, TOKENIZER, 5)
    assert [n for chunk in chunks for n in chunk] == list(range(len(names)))
    costs = tuple(count_tokens(name) for name in names)
    ids = {name: place for place, name in enumerate(dict.fromkeys(names))}
    categories = Categories(names=names, costs=costs, ids=tuple(ids[name] for name in names))
    box = (0.0, 0.0, 1.0, 1.0)
    regions = [
        Region(box=box, category=category % len(names), crowd=crowd)
        for category, crowd in document["shown"]
    ]
    searched = document["searched"]
    provenance = {} if searched is None else {"neg_categories": searched}
    settings = replace(NEGATIVES, fixed=document["fixed"])
    made = detection_text(
        plain_record("detection", "", regions, provenance),
        categories, document["budget"], settings, np.random.default_rng(document["seed"]),
    )  # fmt: skip
    chosen = [category for category in made.categories if category is not None]
    assert len(set(chosen)) == len(chosen) == len(made.prompt.spans)
    for category, ((start, end),) in zip(chosen, made.prompt.spans, strict=True):
        assert made.prompt.text[start:end] == clean_category(names[category])
    for region, phrase in zip(regions, made.phrase_of_region, strict=True):
        assert phrase is None or chosen[phrase] == region.category and not region.crowd
    assert count_tokens(made.prompt.text) <= document["budget"]
    assert_tokens(made.prompt)


def make_box(rng: random.Random) -> bytes:
    corners = [number(rng) for _ in range(4)]
    if rng.random() < 0.5:
        corners.sort(key=lambda side: (side != side, side))
    if rng.random() < 0.2:
        corners[rng.randrange(4)] = rng.choice([value(rng), "12", " 3e2 ", "nan", True, None])
    if rng.random() < 0.1:
        corners = corners[: rng.randint(0, 3)] + [number(rng)] * rng.randint(0, 3)
    size = [rng.choice([1, 2, 40, 5000]) for _ in range(2)]
    return json_bytes({"corners": corners, "size": size}, rng, 0.0)


def check_box(data: bytes) -> None:
    """Boxes of sources: inside the image with some area, or dropped for one reason."""
    document, dropped = json.loads(data), Dropped()
    width, height = document["size"]
    box = clean_box(document["corners"], (width, height), dropped, "here")
    assert_noted(dropped)
    assert dropped.total() <= 1
    if box is None:
        assert dropped.total() == 1 and "box_clipped" not in dropped
        return
    assert_inside(box, width, height)
    assert bool(dropped) == (tuple(map(float, document["corners"])) != box)


def make_json(rng: random.Random) -> bytes:
    document: Any = [value(rng) for _ in range(rng.randint(0, 6))]
    if rng.random() < 0.5:
        document = {"images": document, "info": value(rng), "annotations": [value(rng)]}
    if rng.random() < 0.02:
        deep = rng.choice(["[", '{"a":']) * rng.choice([990, 10_000, 100_000])
        return deep.encode()
    return bytes([rng.choice([1, 3, 40, 255])]) + json_bytes(document, rng, 0.6)


def check_json(data: bytes) -> None:
    """Large JSON files, at chunks as small as their first byte: what `json` reads, or DataError."""
    url, text = f"{FOLDER}/a.json", data[1:]
    storage.write_bytes(url, text)
    whole, json_stream.CHUNK = json_stream.CHUNK, data[0] if data else 1
    try:
        found: Any = {n: list(found) for n, found in json_stream.sections(url)}
    except DataError:
        try:
            found = list(json_stream.items(url))
        except DataError:
            found = None
    finally:
        json_stream.CHUNK = whole
    try:
        expected = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        expected = None
    if isinstance(expected, dict):
        expected = {name: items for name, items in expected.items() if isinstance(items, list)}
    if isinstance(expected, list | dict) and found is not None:
        assert repr(found) == repr(expected) or b'"' in text and _repeats_a_key(text)
    else:
        assert found is None and not isinstance(expected, list | dict)


def _repeats_a_key(text: bytes) -> bool:
    """Whether the outermost object has a key twice: `json` keeps the last one only."""
    pairs: list[Any] = []
    json.loads(text.decode("utf-8-sig"), object_pairs_hook=lambda found: pairs.append(found) or {})
    names = [name for name, _ in pairs[-1]]
    return len(set(names)) < len(names)


def plain_record(
    task: Any, caption: str, regions: Sequence[Region], provenance: dict[str, Any]
) -> Record:
    return Record(
        key="fuzz", image=IMAGE, image_format="png", width=32, height=24, task=task,
        caption=caption, regions=tuple(regions), provenance=provenance,
    )  # fmt: skip


def assert_stored_alike(record: Record) -> None:
    """A record of ours can be stored, and reads back equal; only more regions than it may hold
    and a lack of some can be refused."""
    try:
        raw = RawSample(key=record.key, members=record_members(record))
        assert parse_record(raw) == record
    except BadSample as bad:
        assert "regions must be a list" in str(bad), bad


def assert_noted(dropped: Dropped) -> None:
    assert set(dropped) <= set(REASONS) and len(dropped.notes) == dropped.total()
    json.dumps(dropped.notes, ensure_ascii=False).encode()


def assert_inside(box: Sequence[float], width: int, height: int) -> None:
    x0, y0, x1, y1 = box
    assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height, box


def assert_tokens(prompt: Prompt) -> None:
    """Tokens lie in the text, in order; those of a phrase lie where it does."""
    tokens = TOKENIZER.encode(prompt.text)
    assert len(tokens.ids) == len(tokens.offsets) <= TOKENIZER.max_tokens
    inner = tokens.offsets[1:-1]
    assert all(0 <= a <= b <= len(prompt.text) for a, b in inner), inner
    assert [a for a, _ in inner] == sorted(a for a, _ in inner), inner
    positive_PT = token_map(tokens, prompt.spans)
    for spans, positive_T in zip(prompt.spans, positive_PT, strict=True):
        for token in np.flatnonzero(positive_T):
            start, end = tokens.offsets[token]
            assert any(start < b and end > a for a, b in spans), (spans, token, start, end)


def count_tokens(text: str) -> int:
    return len(UNCUT.encode(text).ids) - 2


TARGETS = {
    "tar": Target(tar_bytes, check_tar),
    "own_tar": Target(tar_bytes, check_own_tar),
    "sample": Target(make_sample, check_sample),
    "caption": Target(make_caption, check_caption),
    "names": Target(make_names, check_names),
    "box": Target(make_box, check_box),
    "json": Target(make_json, check_json),
}
