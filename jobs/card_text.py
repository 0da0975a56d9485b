"""What a card says in words: questions and their answers, further captions, provenance."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from glipv2.pipeline.answers import normal_answer
from glipv2.pipeline.records import Record

SOURCE_FIELDS = ("source", "origin", "title", "author", "licence", "license", "url")
"""Provenance that a reader of pictures needs; the rest identifies how they were made."""
MAX_SAID, MAX_ANSWERS = 6, 3
"""Questions and captions that a card has room for, and answers of a question."""
MAKING = ("teacher", "label_settings")
"""Provenance that is a digest: its first letters tell one from another."""
SHORT_DIGEST = 6
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
"""Control characters, direction overrides and lone surrogates: no page can hold or show them."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """A question about the picture, or one more caption of it."""

    text: str
    answer: str = ""
    """The answers, and how many people gave each."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """The task, or an entry of the provenance."""

    name: str
    value: str
    whole: str = ""
    """Where `value` is only its beginning."""


def plain_text(text: object) -> str:
    """Text that a page can hold: same length, unprintable characters replaced. Not yet escaped."""
    return _UNPRINTABLE.sub("\ufffd", str(text))


def said_of(record: Record) -> tuple[Said, ...]:
    """The questions and the captions after the first, which the card shows by itself."""
    captions = [Said(text=plain_text(caption)) for caption in record.captions[1:]]
    questions = [
        Said(text=plain_text(question.text), answer=plain_text(answers_text(question.answers)))
        for question in record.questions
    ]
    return (*captions, *questions)


def answers_text(answers: Sequence[str]) -> str:
    """`red (7 of 10), maroon (2), pink (1)`, in the form in which answers are compared."""
    counted = Counter(map(normal_answer, answers)).most_common()
    if not counted:
        return "no answer given"
    if len(answers) == 1:
        return answers[0]
    [(first, most), *others] = counted[:MAX_ANSWERS]
    shown = [f"{first} ({most} of {len(answers)})", *(f"{text} ({n})" for text, n in others)]
    return ", ".join(shown) + (", ..." if len(counted) > MAX_ANSWERS else "")


def notes_of(record: Record, brief: bool) -> tuple[Note, ...]:
    """The task and the provenance; `brief` keeps only its origin."""
    return tuple(
        _note(plain_text(name), plain_text(value))
        for name, value in {"task": record.task, **record.provenance}.items()
        if isinstance(value, (str, int, float)) and value != ""
        if name in SOURCE_FIELDS or not brief
    )


def _note(name: str, value: str) -> Note:
    if name in MAKING and len(value) > SHORT_DIGEST:
        return Note(name=name, value=f"{value[:SHORT_DIGEST]}…", whole=value)
    return Note(name=name, value=value)
