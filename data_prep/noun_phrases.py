"""Find the noun phrases of a caption that a box could stand for, with their exact characters.

Words are cut by our own tokeniser (so offsets are exact by construction), tagged by textblob's
lexicon tagger (part of its wheel, nothing is downloaded; about 20,000 captions a second) and
chunked by rule: adjectives and nouns without article or number. Phrases that name no visible thing
("the left side", "night", "a photo") are dropped. See facts D.4 and F for GLIP's own practice.
"""

import importlib.metadata
import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, NamedTuple

RULES = 1
"""Raise it when a caption may give other phrases than before: labels made so far are then stale."""
MAX_WORDS = 6
"""A longer run of nouns keeps its last words, where the head is."""
MAX_WORD_LENGTH = 30
MAX_CAPTION = 4000
"""Characters that are read; what a model can take in is far shorter."""

_TOKEN = re.compile(r"['’](?:s|t|re|ve|ll|d|m)\b|[^\W_]+(?:-[^\W_]+)*|[^\w\s]|_", re.UNICODE)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FORM_NOUNS = _words(
    "circle cross diamond ring square triangle star rectangle oval heart cube sphere orange"
    " circles crosses diamonds rings squares triangles stars rectangles ovals hearts cubes spheres"
    " oranges"
)
"""Nouns that the tagger may take for adjectives or verbs."""
_LOOK_WORDS = _words(
    "red green blue yellow orange purple teal pink brown black white grey gray golden silver tan"
    " beige turquoise maroon striped dotted plain spotted checkered plaid patterned colored"
    " coloured small large big tiny huge tall short long round wooden metal young old smiling"
)
"""Adjectives, whatever the tagger says."""
_QUANTITIES = _words(
    "another other others several many few some various different own same such more most certain"
    " each both all every any no next last first second third numerous multiple single hundred"
    " thousand dozen dozens hundreds approximately about"
)
"""Words that count or point: they open a phrase and stay outside it."""
_COLLECTIVES = _words(
    "group groups pair pairs couple bunch collection number lot lots series row rows stack set"
    " piece pieces crowd pile part parts kind kinds type types variety range majority assortment"
)
"""Before "of" these say how many; the phrase is what follows."""
_UNSEEN_HEADS = _words(
    "side sides front back top bottom left right middle center centre background foreground image"
    " images picture pictures photo photos photograph photographs portrait headshot screenshot"
    " illustration diagram infographic view scene shot close-up closeup night day morning evening"
    " afternoon time year years century date age end edge way part parts kind type variety color"
    " colour colors shape style design look expression distance direction angle one ones others"
    " each someone something everyone anything nothing number name title credit caption manner"
    " order addition example place position half rest use thing things midair air"
)
"""Heads of phrases that nobody can draw a box around."""
_PEOPLE = _words(
    "man woman boy girl child person people men women boys girls children kid kids baby lady guy"
    " player players climber skier rider dog"
)
"""After these a word in -s is what they do ("a boy rides"), not the head of a longer name."""
_ACTORS = _words("i he she it we they who that which")
_THINGS_IN_ING = _words(
    "building clothing painting railing ceiling string wing awning crossing swing sling siding"
)
_AUXILIARIES = _words(
    "is are was were be been am has have had do does did can will would may must should could might"
)

_ADJECTIVES = ("JJ", "JJR", "JJS")
_NOUNS = ("NN", "NNS", "NNP", "NNPS")
_OPENERS = ("DT", "PDT", "PRP$", "WP$", "CD")
_FINITE_VERBS = ("VB", "VBP", "VBZ")
_COMPLEMENTS = (*_OPENERS, "IN", "TO", "RB", "VBG", "PRP")


@dataclass(frozen=True)
class Phrase:
    """caption[start:end] == text, always."""

    text: str
    start: int
    end: int


class _Word(NamedTuple):
    text: str  # lower case
    start: int
    end: int
    tag: str


_END = _Word(".", 0, 0, ".")


def parser_version() -> str:
    """Name and version of all that decides which phrases a caption has: our rules, the tagger."""
    return f"glipv2 rules {RULES}, textblob {importlib.metadata.version('textblob')}"


def noun_phrases(caption: str) -> list[Phrase]:
    """Phrases in the order of the caption; they never overlap. Any text is accepted."""
    words = _tagged_words(caption[:MAX_CAPTION])
    phrases = []
    position = 0
    while position < len(words):
        stop = _chunk_end(words, position)
        if stop is None:
            position += 1
            continue
        kept = _trim(words, position, stop)
        if kept:
            start, end = kept[0].start, kept[-1].end
            phrases.append(Phrase(caption[start:end], start, end))
        position = stop
    return phrases


def _tagged_words(text: str) -> list[_Word]:
    from textblob.en import parser  # half a second, and only labelling and prepare need it

    words: list[_Word] = []
    sentence: list[tuple[int, int]] = []
    for match in _TOKEN.finditer(text):
        sentence.append(match.span())
        if match.group() in ".!?;:":
            words += _tag_sentence(text, sentence, parser)
            sentence = []
    return words + _tag_sentence(text, sentence, parser)


def _tag_sentence(text: str, spans: list[tuple[int, int]], parser: Any) -> list[_Word]:
    """Tag one sentence; its first word loses its capital, which says nothing there."""
    if not spans:
        return []
    tokens = [text[start:end] for start, end in spans]
    tokens[0] = tokens[0].lower()
    tags = [str(pair[1]) for pair in parser.find_tags(list(tokens))]
    words = [
        _Word(token.lower(), start, end, _plain_tag(token, tag, parser.lexicon))
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
    if word in _QUANTITIES:
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


def _mend_nouns(words: list[_Word]) -> list[_Word]:
    """Make nouns of what stands where only a noun can: after "a purple" comes no verb."""
    mended: list[_Word] = []
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
        mended.append(word._replace(tag=tag))
        opened = tag in _OPENERS or (opened and (tag in _ADJECTIVES or tag in ("VBN", "VBG")))
    return mended


def _mend_verbs(words: list[_Word]) -> list[_Word]:
    """Make verbs of "nouns" that follow a noun and take an object: "a boy rides the"."""
    mended: list[_Word] = []
    for number, word in enumerate(words):
        before = mended[-1] if mended else _END
        follower = words[number + 1].tag if number + 1 < len(words) else "."
        tag = word.tag
        if before.text in _ACTORS and tag in _NOUNS and follower not in _NOUNS:
            tag = "VB"  # they wave
        elif before.tag in _NOUNS and tag in _NOUNS:
            acts = before.text in _PEOPLE and follower in _COMPLEMENTS
            takes = before.tag == "NN" and follower in _OPENERS
            if tag == "NNS" and (acts or takes):
                tag = "VBZ"
            elif (
                word.text.endswith("ing")
                and word.text not in _THINGS_IN_ING
                and follower not in _NOUNS
            ):
                tag = "VBG"  # a couch smoking
        mended.append(word._replace(tag=tag))
    return mended


def _chunk_end(words: list[_Word], start: int) -> int | None:
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


def _modifies(words: list[_Word], position: int, at_start: bool) -> bool:
    """Whether the word is an adjective, or a participle that stands where one does."""
    word = words[position]
    following = words[position + 1].tag if position + 1 < len(words) else "."
    if word.tag in _ADJECTIVES:
        return True
    if word.tag not in ("VBN", "VBG") or following not in (*_NOUNS, *_ADJECTIVES, "VBN"):
        return False
    before = words[position - 1].tag if position else "START"
    if before in (*_OPENERS, *_ADJECTIVES) or not at_start:
        return True
    if word.tag == "VBG":  # "Smiling boy", but not "Wearing hats" or "a man holding signs"
        return before in ("START", ".") and following == "NN"
    return before in ("START", ".", ",", "IN", "CC", "VBG", "VB", "VBZ", "VBP")


def _joins_adjectives(words: list[_Word], position: int) -> bool:
    """The "and" of "black and white dog", the comma of "long, red coat"."""
    if position + 2 >= len(words) or words[position].text not in ("and", ",", "or"):
        return False
    return words[position - 1].tag in _ADJECTIVES and words[position + 1].tag in _ADJECTIVES


def _possesses(words: list[_Word], position: int) -> bool:
    """The 's of "the man's hat"."""
    if words[position].tag != "POS" or position + 1 >= len(words):
        return False
    return words[position + 1].tag in _NOUNS


def _trim(words: list[_Word], start: int, stop: int) -> list[_Word]:
    """The words of a phrase worth a box; empty if there is nothing to see."""
    head = words[stop - 1]
    follower = words[stop].text if stop < len(words) else ""
    if head.text in _UNSEEN_HEADS or (head.text in _COLLECTIVES and follower == "of"):
        return []
    if not any(letter.isalpha() for letter in head.text) or len(head.text) < 2:
        return []
    kept = words[max(start, stop - MAX_WORDS) : stop]
    while kept and (kept[0].tag in (",", "POS", "CC") or kept[0].text in ("and", "or")):
        kept = kept[1:]
    return kept
