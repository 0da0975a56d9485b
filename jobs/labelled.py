"""What a labelled set says of its making, and the parser that finds its captions' phrases again."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from glipv2.jobs.label_plan import SETTINGS, read_claim
from glipv2.pipeline import storage
from glipv2.pipeline.config import PhraseConfig
from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.shard_format import ShardSet

if TYPE_CHECKING:
    from glipv2.data_prep.phrase_filters import PhrasesFound

RULES = "phrases."
_INSTALLED = re.compile(r"lexicon|spacy:\w+")
"""Parsers that a set may ask for: no folder is loaded because a file from elsewhere names it."""


@dataclass(frozen=True, kw_only=True)
class Making:
    """How a set came to its boxes; empty for sets that `glipv2 label` did not make."""

    find: "Callable[[str], PhrasesFound] | None" = None
    """Captions -> the phrases that the teacher was asked about."""
    why_not: str = ""
    """Why they can't be found again."""
    keeps_empty: bool = False
    """Whether pairs without a box are in the set too."""


def making_of(shard_set: ShardSet) -> Making:
    """From the label.json in the set's folder; DataError when that is damaged."""
    return _making(shard_set.url, shard_set.digest)


@lru_cache(maxsize=8)
def _making(url: str, _digest: str) -> Making:
    where = storage.join(url, SETTINGS)
    if not storage.exists(where):
        return Making()
    settings = read_claim(where).deciding
    keeps_empty = bool(settings.get("keep_empty"))
    given = {k.removeprefix(RULES): v for k, v in settings.items() if k.startswith(RULES)}
    try:
        find = _parser(given, settings.get("parser"))
    except (ConfigError, TypeError) as error:
        return Making(why_not=str(error), keeps_empty=keeps_empty)
    return Making(find=find, keeps_empty=keeps_empty)


def _parser(given: dict[str, object], version: object) -> "Callable[[str], PhrasesFound]":
    """The set's own; ConfigError or TypeError when it isn't here."""
    from glipv2.data_prep.phrases import load_parser, parser_version

    if not _INSTALLED.fullmatch(str(given.get("parser"))):
        raise ConfigError(f"its parser {given.get('parser')} is no installed one")
    plain = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    rules = PhraseConfig(**plain)  # type: ignore[arg-type]
    if (found := parser_version(rules)) != version:
        raise ConfigError(f"they were found by {version}, here is {found}")
    return load_parser(rules)
