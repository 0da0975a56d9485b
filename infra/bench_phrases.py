"""How good and how fast the phrase parsers are, on real sentences whose phrases people marked.

A marked phrase is found when a phrase of ours ends at its head noun: its last word before "of" or
another preposition. So "people" does not find "a group of people", whose head is "group". Precision
counts the same way: it is a lower bound where only part of what can be seen was marked, as in
Flickr30k Entities.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from bench_measure import note, seconds

from glipv2.data_prep.flickr30k_entities import parse_sentence
from glipv2.data_prep.phrase_filters import PhrasesFound
from glipv2.data_prep.phrases import load_parser
from glipv2.pipeline.config import PhraseConfig

SAMPLES = Path(__file__).parent / "samples" / "web_pairs" / "phrases.txt"
_BRACKETS = re.compile(r"\[([^][]*)\]")
_PREPOSITION = re.compile(r" (?:of|in|on|with|at|for|from|by|near|behind|to)\b", re.IGNORECASE)


class Marked(NamedTuple):
    caption: str
    head_ends: frozenset[int]
    """One past the last character of each marked phrase's head noun."""


class Agreement(NamedTuple):
    recall: float
    precision: float
    phrases: int
    """Marked by people."""


def agreement(sentences: Iterable[Marked], find: Callable[[str], PhrasesFound]) -> Agreement:
    marked = found = both = 0
    for sentence in sentences:
        ends = {phrase.end for phrase in find(sentence.caption).phrases}
        marked += len(sentence.head_ends)
        found += len(ends)
        both += len(ends & sentence.head_ends)
    return Agreement(both / marked, both / found, marked)


def alt_texts() -> Iterator[Marked]:
    """The alternative texts of the repository's web figures, marked by us."""
    for line in SAMPLES.read_text(encoding="utf-8").splitlines():
        yield marked_sentence(_BRACKETS.sub(r"[/EN#1/other \1]", line))


def flickr30k_sentences(folder: str) -> Iterator[Marked]:
    """Every sentence of Flickr30k Entities; what nobody can see is marked there, and left out."""
    for path in sorted((Path(folder) / "Sentences").glob("*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            yield marked_sentence(line)


def marked_sentence(line: str) -> Marked:
    caption, phrases = parse_sentence(line)
    seen = (phrase for phrase in phrases if phrase.kind != "notvisual")
    return Marked(caption, frozenset(_head_end(caption, p.start, p.end) for p in seen))


def _head_end(caption: str, start: int, end: int) -> int:
    preposition = _PREPOSITION.search(caption, start, end)
    return preposition.start() if preposition else end


def parsers() -> list[str]:
    """Ours, and each spaCy model that is installed."""
    try:
        import spacy
    except ImportError:
        return ["lexicon"]
    return ["lexicon", *(f"spacy:{model}" for model in spacy.util.get_installed_models())]


def bench_phrases(flickr30k: str | None) -> None:
    sets = {"alt texts": list(alt_texts())}
    if flickr30k:
        sets["Flickr30k Entities"] = list(flickr30k_sentences(flickr30k))
    else:
        note("phrases of Flickr30k Entities", "not measured: make bench FLICKR30K=its folder")
    for parser in parsers():
        for name, sentences in sets.items():
            _bench(parser, name, sentences)


def _bench(parser: str, name: str, sentences: list[Marked]) -> None:
    find = load_parser(PhraseConfig(parser=parser))
    recall, precision, phrases = agreement(sentences, find)
    taken = seconds(lambda: [find(sentence.caption) for sentence in sentences])[0]
    note(
        f"phrases by {parser}, {name} ({phrases} marked)",
        f"recall {recall:.3f}   precision {precision:.3f}"
        f"   {len(sentences) / taken:7.0f} captions/s",
    )


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--flickr30k", help="folder of Flickr30k Entities")
    bench_phrases(options.parse_args().flickr30k)
