"""Which of the noun phrases that a parser finds are worth a box: the rules of `label.phrases`.

A parser cuts a caption into `Chunk`s of `Word`s; everything after that is the same for all parsers.
Nothing here touches the text: a phrase is where its first and last word are.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from glipv2.pipeline.config import PhraseConfig

MAX_CAPTION = 4000
"""Characters that are read; what a model can take in is far shorter."""
OPENERS = ("DT", "PDT", "PRP$", "WP$", "CD")
"""Tags of the Penn treebank: articles, possessives, numbers."""
_LEFT_OUT_AT_START = (*OPENERS, "POS", "CC")


def word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


QUANTITIES = word_set(
    "another other others several many few some various different own same such more most certain"
    " each both all every any no next last first second third numerous multiple single hundred"
    " thousand dozen dozens hundreds approximately about"
)
"""Words that count or point: they open a phrase and stay outside it."""
_COLLECTIVES = word_set(
    "group groups pair pairs couple bunch collection number lot lots series row rows stack set"
    " piece pieces crowd pile part parts kind kinds type types variety range majority assortment"
)
"""Before "of" these say how many; the phrase is what follows."""
_UNSEEN_HEADS = word_set(
    "side sides front back top bottom left right middle center centre background foreground image"
    " images picture pictures photo photos photograph photographs portrait headshot screenshot"
    " illustration diagram infographic view scene shot close-up closeup night day morning evening"
    " afternoon time year years century date age end edge way part parts kind type variety color"
    " colour colors shape style design look expression distance direction angle one ones others"
    " each someone something everyone anything nothing number name title credit caption manner"
    " order addition example place position half rest use thing things midair air"
    " noon midnight dawn dusk week weekend month months weeks days hour hours minute minutes moment"
    " season summer autumn winter january february april june july august september"
    " october november december monday tuesday wednesday thursday friday saturday sunday"
    " love freedom peace happiness joy fun life death idea information history experience"
    " opportunity success reason fact opinion culture tradition importance purpose price copyright"
)
"""Heads of phrases that nobody can draw a box around."""


@dataclass(frozen=True)
class Phrase:
    """caption[start:end] == text, always."""

    text: str
    start: int
    end: int


class Word(NamedTuple):
    text: str
    """In lower case; what is in the caption is caption[start:end]."""
    start: int
    end: int
    tag: str
    """Of the Penn treebank."""


class Chunk(NamedTuple):
    words: Sequence[Word]
    """The last is the head: what the phrase names."""
    before_of: bool
    """Whether "of" follows."""


Chunker = Callable[[str], Iterable[Chunk]]
"""Caption -> its noun phrases in its order; they never overlap."""


@dataclass
class PhrasesFound:
    phrases: list[Phrase] = field(default_factory=list)
    """In the order of the caption; they never overlap."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Noun phrases that were not kept, by reason: quantity ("a group" of people), short, digits,
    unseen, stop."""


def find_phrases(chunker: Chunker, rules: PhraseConfig, caption: str) -> PhrasesFound:
    """What a parser finds in a caption, less what the rules leave out. Any text is accepted."""
    found = PhrasesFound()
    for chunk in chunker(caption[:MAX_CAPTION]):
        words = _trim(chunk.words, rules.max_words)
        if not words:
            continue
        phrase = Phrase(caption[words[0].start : words[-1].end], words[0].start, words[-1].end)
        reason = _reason_against(phrase.text, words[-1].text, chunk.before_of, rules)
        if reason:
            found.dropped[reason] += 1
        else:
            found.phrases.append(phrase)
    return found


def _trim(words: Sequence[Word], max_words: int) -> Sequence[Word]:
    """Without articles, numbers and punctuation at its start, and not longer than allowed."""
    start = _opening(words, 0)
    return words[_opening(words, max(start, len(words) - max_words)) :]


def _opening(words: Sequence[Word], start: int) -> int:
    """The first word from `start` on that can begin a phrase."""
    while start < len(words):
        text, tag = words[start].text, words[start].tag
        if tag not in _LEFT_OUT_AT_START and text not in QUANTITIES and text[0].isalnum():
            break
        start += 1
    return start


def _reason_against(text: str, head: str, before_of: bool, rules: PhraseConfig) -> str:
    """Why the phrase is not kept; empty if it is."""
    if before_of and head in _COLLECTIVES:
        return "quantity"
    if len(head) < rules.min_length or not any(letter.isalpha() for letter in head):
        return "short"
    if not rules.digits and any(letter.isdigit() for letter in text):
        return "digits"
    if not rules.unseen and head in _UNSEEN_HEADS:
        return "unseen"
    if rules.stop and _ends_in(text, rules.stop):
        return "stop"
    return ""


def _ends_in(text: str, endings: tuple[str, ...]) -> bool:
    """Whether a phrase's last words are one of these, whatever their case and spaces."""
    said = [" " + " ".join(words.lower().split()) for words in (text, *endings)]
    return said[0].endswith(tuple(said[1:]))
