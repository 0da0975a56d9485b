"""The parser that needs no download: noun phrases by a lexicon tagger and rules.

Words are cut by our own tokeniser (so offsets are exact by construction), tagged by textblob's
lexicon tagger (part of its wheel; about 10,000 captions a second) and chunked by rule: adjectives
and nouns without article or number. See facts D.4 and F for GLIP's own practice.
"""

import functools
import re
import threading
from collections.abc import Container, Iterator
from typing import Any

from glipv2.data_prep.phrase_filters import (
    OPENERS,
    QUANTITIES,
    Chunk,
    Phrase,
    Word,
    find_phrases,
    word_set,
)
from glipv2.pipeline.config import PhraseConfig

RULES = 2
"""Raise it when a caption may give other phrases than before: labels made so far are then stale."""
MAX_WORD_LENGTH = 30

_TOKEN = re.compile(r"['’](?:s|t|re|ve|ll|d|m)\b|[^\W_]+(?:-[^\W_]+)*|[^\w\s]|_", re.UNICODE)

_FORM_NOUNS = word_set(
    "circle cross diamond ring square triangle star rectangle oval heart cube sphere orange"
    " circles crosses diamonds rings squares triangles stars rectangles ovals hearts cubes spheres"
    " oranges"
)
"""Nouns that the tagger may take for adjectives or verbs."""
_LOOK_WORDS = word_set(
    "red green blue yellow orange purple teal pink brown black white grey gray golden silver tan"
    " beige turquoise maroon striped dotted plain spotted checkered plaid patterned colored"
    " coloured small large big tiny huge tall short long round wooden metal young old smiling"
)
"""Adjectives, whatever the tagger says."""
_PEOPLE = word_set(
    "man woman boy girl child person people men women boys girls children kid kids baby lady guy"
    " player players climber skier rider dog"
)
"""After these a word in -s is what they do ("a boy rides"), not the head of a longer name."""
_ACTORS = word_set("i he she it we they who that which")
_THINGS_IN_ING = word_set(
    "building clothing painting railing ceiling string wing awning crossing swing sling siding"
)
_AUXILIARIES = word_set(
    "is are was were be been am has have had do does did can will would may must should could might"
)

_ADJECTIVES = ("JJ", "JJR", "JJS")
_NOUNS = ("NN", "NNS", "NNP", "NNPS")
_FINITE_VERBS = ("VB", "VBP", "VBZ")
_COMPLEMENTS = (*OPENERS, "IN", "TO", "RB", "VBG", "PRP")
_END = Word(".", 0, 0, ".")

_DEFAULTS = PhraseConfig()
_LOADING = threading.Lock()


def noun_phrases(caption: str) -> list[Phrase]:
    """Phrases by the default rules, in the order of the caption. Any text is accepted."""
    return find_phrases(lexicon_chunks, _DEFAULTS, caption).phrases


def lexicon_chunks(caption: str) -> Iterator[Chunk]:
    words = _tagged_words(caption)
    position = 0
    while position < len(words):
        stop = _chunk_end(words, position)
        if stop is None:
            position += 1
            continue
        before_of = stop < len(words) and words[stop].text == "of"
        yield Chunk(words[position:stop], before_of)
        position = stop


@functools.cache
def _tagger() -> Any:
    """textblob's, complete: it fills its lexicon at first use, which threads must not see."""
    with _LOADING:
        from textblob.en import parser  # half a second, and only labelling and prepare need it

        len(parser.lexicon)
        return parser


def _tagged_words(text: str) -> list[Word]:
    parser = _tagger()
    words: list[Word] = []
    sentence: list[tuple[int, int]] = []
    for match in _TOKEN.finditer(text):
        sentence.append(match.span())
        if match.group() in ".!?;:":
            words += _tag_sentence(text, sentence, parser)
            sentence = []
    return words + _tag_sentence(text, sentence, parser)


def _tag_sentence(text: str, spans: list[tuple[int, int]], parser: Any) -> list[Word]:
    """Tag one sentence; its first word loses its capital, which says nothing there."""
    if not spans:
        return []
    tokens = [text[start:end] for start, end in spans]
    tokens[0] = tokens[0].lower()
    tags = [str(pair[1]) for pair in parser.find_tags(list(tokens))]
    words = [
        Word(token.lower(), start, end, _plain_tag(token, tag, parser.lexicon))
        for token, tag, (start, end) in zip(tokens, tags, spans, strict=True)
    ]
    return _mend_verbs(_mend_nouns(words))


def _plain_tag(token: str, tag: str, lexicon: Container[str]) -> str:
    """What needs no context: punctuation, numbers, possessives, words that count or look."""
    word = token.lower()
    if word in ("'s", "’s"):
        return "POS"
    if word[0] in "'’" or not any(letter.isalnum() for letter in word):
        return word
    if word.isnumeric() or len(word) > MAX_WORD_LENGTH:
        return "CD"
    if word in QUANTITIES:
        return "DT"
    if word in _LOOK_WORDS:
        return "JJ"
    if word in _AUXILIARIES:
        return "VBZ"
    guessed = token not in lexicon and word not in lexicon
    if (
        guessed
        and tag == "JJ"
        and not word.endswith(("ed", "y", "al", "ish", "ous", "ful", "less"))
    ):
        return "NN"  # t-shirt
    return "NN" if tag in ("SYM", "LS") else tag


def _mend_nouns(words: list[Word]) -> list[Word]:
    """Make nouns of what stands where only a noun can: after "a purple" comes no verb."""
    mended: list[Word] = []
    opened = False  # inside "a", "two", "a purple", "her small striped"
    for number, word in enumerate(words):
        follower = words[number + 1] if number + 1 < len(words) else _END
        noun_follows = (
            follower.tag in (*_NOUNS, *_ADJECTIVES, "VBN") or follower.text in _FORM_NOUNS
        )
        tag = word.tag
        if word.text in _FORM_NOUNS and (opened or (mended and mended[-1].tag in _ADJECTIVES)):
            tag = "JJ" if noun_follows else "NN"
        elif opened and tag in (*_FINITE_VERBS, "VBD") and word.text not in _AUXILIARIES:
            tag = tag if noun_follows else "NN"
        elif opened and tag == "RB" and noun_follows and word.text.endswith("ly"):
            tag = "JJ"  # brightly coloured
        mended.append(word if tag == word.tag else word._replace(tag=tag))
        opened = tag in OPENERS or (opened and (tag in _ADJECTIVES or tag in ("VBN", "VBG")))
    return mended


def _mend_verbs(words: list[Word]) -> list[Word]:
    """Make verbs of "nouns" that follow a noun and take an object: "a boy rides the"."""
    mended: list[Word] = []
    for number, word in enumerate(words):
        before = mended[-1] if mended else _END
        follower = words[number + 1].tag if number + 1 < len(words) else "."
        tag = word.tag
        if before.text in _ACTORS and tag in _NOUNS and follower not in _NOUNS:
            tag = "VB"  # they wave
        elif before.tag == "TO" and tag == "NN" and follower in (*OPENERS, "PRP"):
            tag = "VB"  # to balance himself
        elif before.text in _AUXILIARIES and tag in _NOUNS and _is_doing(word, follower):
            tag = "VBG"  # is balancing on
        elif before.tag in _NOUNS and tag in _NOUNS:
            acts = before.text in _PEOPLE and follower in _COMPLEMENTS
            if tag == "NNS" and (acts or (before.tag == "NN" and follower in OPENERS)):
                tag = "VBZ"
            elif tag == "NN" and before.tag == "NNS" and follower in OPENERS:
                tag = "VB"  # dancers twirl their
            elif _is_doing(word, follower):
                tag = "VBG"  # a couch smoking
        mended.append(word if tag == word.tag else word._replace(tag=tag))
    return mended


def _is_doing(word: Word, follower: str) -> bool:
    """Whether a "noun" in -ing is what something does."""
    return word.text.endswith("ing") and word.text not in _THINGS_IN_ING and follower not in _NOUNS


def _chunk_end(words: list[Word], start: int) -> int | None:
    """One past the last noun of the phrase that starts at `start`; None if none does."""
    position = start
    while position < len(words) and _modifies(words, position, position == start):
        position += 1
        if position > start and _joins_adjectives(words, position):
            position += 1
    first_noun = position
    while position < len(words) and (
        words[position].tag in _NOUNS or (position > first_noun and _possesses(words, position))
    ):
        position += 1
    return position if position > first_noun else None


def _modifies(words: list[Word], position: int, at_start: bool) -> bool:
    """Whether the word is an adjective, or a participle that stands where one does."""
    word = words[position]
    following = words[position + 1].tag if position + 1 < len(words) else "."
    if word.tag in _ADJECTIVES:
        return True
    if word.tag not in ("VBN", "VBG") or following not in (*_NOUNS, *_ADJECTIVES, "VBN"):
        return False
    before = words[position - 1].tag if position else "START"
    if before in (*OPENERS, *_ADJECTIVES) or not at_start:
        return True
    if word.tag == "VBG":  # "Smiling boy", but not "Wearing hats" or "a man holding signs"
        return before in ("START", ".") and following == "NN"
    return before in ("START", ".", ",", "IN", "CC", "VBG", "VB", "VBZ", "VBP")


def _joins_adjectives(words: list[Word], position: int) -> bool:
    """The "and" of "black and white dog", the comma of "long, red coat"."""
    if position + 2 >= len(words) or words[position].text not in ("and", ",", "or"):
        return False
    return words[position - 1].tag in _ADJECTIVES and words[position + 1].tag in _ADJECTIVES


def _possesses(words: list[Word], position: int) -> bool:
    """The 's of "the man's hat"."""
    if words[position].tag != "POS" or position + 1 >= len(words):
        return False
    return words[position + 1].tag in _NOUNS
