"""What is left out of a source by choice: odd web images and texts, duplicates, evaluation images.

Every rule is a setting (`clean` in a recipe), every drop is counted by its reason and listed in
dropped/SHARD.jsonl; without the rule the same command brings the samples back.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from functools import cache
from locale import locale_alias
from typing import Any, NamedTuple

from glipv2.data_prep.looks import Look, Looks, Numbers, look_of, perceptual_hash
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.source import Row
from glipv2.pipeline import storage
from glipv2.pipeline.config import CleanConfig
from glipv2.pipeline.errors import BadSample, ConfigError, DataError
from glipv2.pipeline.records import Record
from glipv2.pipeline.shards import open_shard_set, parse_record, read_raw
from glipv2.pipeline.worker_notes import noting

SURE = 0.9
"""Probability from which a caption's language is believed."""


@dataclass(frozen=True)
class Cleaner:
    """A source's `record` with the rules that look at one sample."""

    record: Callable[[Row, Dropped], Record]
    rules: CleanConfig
    excluded: Looks
    excluded_names: Mapping[int, str] = field(default_factory=dict)
    """Hash -> an image that has it, for people."""

    def __call__(self, row: Row, dropped: Dropped) -> Record:
        made = self.record(row, dropped)
        _check_image(made, self.rules)
        _check_caption(made, self.rules)
        if self.excluded:
            found = self.excluded.nearest(perceptual_hash(made.image))
            if found is not None:
                raise BadSample("excluded", self.excluded_names.get(found, ""))
        return made


def clean_plan(rules: CleanConfig) -> dict[str, Any]:
    """What the rules are, for the set's plan: excluded sets by their digests; empty by default."""
    if rules == CleanConfig():
        return {}
    digests = sorted(open_shard_set(url).digest for url in rules.exclude)
    return {**asdict(rules), "exclude": digests, "languages": list(rules.languages)}


def check_languages(languages: Sequence[str]) -> None:
    """ConfigError for a code that captions are never found to have."""
    known = sorted(set(_identifier().labels)) if languages else []
    for code in languages:
        if code not in known:
            plain = code.lower()
            word = locale_alias.get(plain, plain).split("_")[0]  # english is en_EN.ISO8859-1
            near = [word] if word in known else get_close_matches(plain[:2], known, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ConfigError(
                f"clean.languages must be ISO 639 codes, not {code!r}; {hint}known codes: "
                f"{', '.join(known)}"
            )


class UnwantedShard(NamedTuple):
    """A shard whose images may not be in the set."""

    url: str
    number: int
    samples: int


def shards_of(urls: Sequence[str]) -> list[UnwantedShard]:
    """Every shard of the sets."""
    return [
        UnwantedShard(url, number, shard.samples)
        for url in urls
        for number, shard in enumerate(open_shard_set(url).shards)
    ]


def hashes_of_shard(shard: UnwantedShard) -> list[tuple[int, str]]:
    """The perceptual hash of each image, and the image's key and set."""
    url, number, samples = shard
    shard_set = open_shard_set(url)
    hashes = []
    for raw in noting(shard, read_raw(shard_set, number, 0, samples)):
        try:
            hashes.append((perceptual_hash(parse_record(raw).image), f"{raw.key} of {url}"))
        except BadSample as bad:
            raise DataError(
                f"{shard_set.shard_url(number)}: {raw.key}: {bad}; an --exclude set must be whole"
            ) from bad
    return hashes


def write_looks(url: str, record: Callable[[Row, Dropped], Record], rows: Iterable[Row]) -> None:
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
    """Which samples occurred before; asked in the order of the source. About 50 bytes a sample."""

    def __init__(self, distance: int) -> None:
        self.samples, self.files = Numbers(), Numbers()
        self.looks = Looks(distance)

    def find(self, looks_url: str) -> Iterator[tuple[int, str]]:
        """(row's number in its chunk, reason) of the repeated ones.

        The same file with another text is no repetition: an image may have several captions.
        """
        for number, entry in enumerate(storage.read_json(looks_url)):
            if entry is None:
                continue
            look = Look(*entry)
            seen = look.file in self.files
            if look.sample in self.samples:
                yield number, "duplicate"
            elif not seen and self.looks.has(look.hash):
                yield number, "duplicate_look"
            else:
                self.samples.add(look.sample)
                if not seen:
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
