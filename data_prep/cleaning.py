"""What is left out of a source by choice: odd web images and texts, duplicates, evaluation images.

Every rule is a setting (`clean` in a recipe), every drop is counted by its reason and listed in
dropped/SHARD.jsonl; without the rule the same command brings the samples back.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from glipv2.data_prep.looks import Look, Looks, look_of, perceptual_hash
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.source import Row
from glipv2.pipeline import storage
from glipv2.pipeline.config import CleanConfig
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.records import Record
from glipv2.pipeline.shards import open_shard_set, parse_record, read_raw

SURE = 0.9
"""Probability from which a caption's language is believed."""


@dataclass(frozen=True)
class Cleaner:
    """A source's `record` with the rules that look at one sample."""

    record: Callable[[Row, Dropped], Record]
    rules: CleanConfig
    excluded: Looks

    def __call__(self, row: Row, dropped: Dropped) -> Record:
        made = self.record(row, dropped)
        _check_image(made, self.rules)
        _check_caption(made, self.rules)
        if self.excluded and self.excluded.has(perceptual_hash(made.image)):
            raise BadSample("excluded")
        return made


def clean_plan(rules: CleanConfig) -> dict[str, Any]:
    """What the rules are, for the set's plan: excluded sets by their digests; empty by default."""
    if rules == CleanConfig():
        return {}
    digests = sorted(open_shard_set(url).digest for url in rules.exclude)
    return {**asdict(rules), "exclude": digests, "languages": list(rules.languages)}


def hashes_of_shard(place: tuple[str, int]) -> list[int]:
    """Perceptual hashes of all images of one shard: (set's URL, number of the shard)."""
    url, number = place
    shard_set = open_shard_set(url)
    hashes = []
    for raw in read_raw(shard_set, number, 0, shard_set.shards[number].samples):
        try:
            hashes.append(perceptual_hash(parse_record(raw).image))
        except BadSample as bad:
            raise DataError(
                f"{shard_set.shard_url(number)}: {raw.key}: {bad}; an --exclude set must be whole"
            ) from bad
    return hashes


def shards_of(urls: Sequence[str]) -> list[tuple[str, int]]:
    """Every shard of the sets."""
    return [(url, number) for url in urls for number in range(len(open_shard_set(url).shards))]


def write_looks(url: str, record: Callable[[Row, Dropped], Record], rows: Sequence[Row]) -> None:
    """Keep at `url` what each row looks like, null where it can't be used."""
    if storage.exists(url):
        return
    looks: list[Look | None] = []
    for row in rows:
        try:
            looks.append(look_of(record(row, Dropped())))
        except BadSample:
            looks.append(None)
    storage.write_bytes(url, json.dumps(looks).encode())


class Repeats:
    """Which samples occurred before; asked in the order of the source."""

    def __init__(self, distance: int) -> None:
        self.samples: set[tuple[int, int]] = set()
        self.files: set[int] = set()
        self.looks = Looks(distance)

    def find(self, looks_url: str) -> Iterator[tuple[int, str]]:
        """(row's number in its chunk, reason) of the repeated ones.

        The same file with another text is no repetition: an image may have several captions.
        """
        for number, entry in enumerate(storage.read_json(looks_url)):
            if entry is None:
                continue
            look = Look(*entry)
            if look[:2] in self.samples:
                yield number, "duplicate"
            elif look.file not in self.files and self.looks.has(look.hash):
                yield number, "duplicate_look"
            else:
                self.samples.add((look.file, look.text))
                self.files.add(look.file)
                self.looks.add(look.hash)


def _check_image(record: Record, rules: CleanConfig) -> None:
    short, long = sorted((record.width, record.height))
    if short < rules.min_side:
        raise BadSample("image_small", f"{short} px")
    if rules.max_aspect and long > rules.max_aspect * short:
        raise BadSample("image_narrow", f"{record.width}x{record.height}")


def _check_caption(record: Record, rules: CleanConfig) -> None:
    if not record.caption:
        return
    words = len(record.caption.split())
    if words < rules.min_words:
        raise BadSample("caption_short", f"{words} words")
    if rules.max_words and words > rules.max_words:
        raise BadSample("caption_long", f"{words} words")
    if rules.languages:
        language, probability = _identifier().classify(record.caption)
        if language not in rules.languages and probability >= SURE:
            raise BadSample("caption_language", language)


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
