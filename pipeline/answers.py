"""Answers to questions: which are the same, how right each is, and the list that a model knows."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from glipv2.pipeline import storage
from glipv2.pipeline.errors import ConfigError

MARKS = frozenset(';/[]"{}()=+\\_-<>@`,?!')
THOUSANDS = re.compile(r"\d,\d")
LONE_PERIOD = re.compile(r"\.(?!\d)")
ARTICLES = {"a", "an", "the"}
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)} | {"none": "0"}
SPELLED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in SPELLED.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
"""As people write them, without one apostrophe: what VQA's own code mends, its slip included."""


@lru_cache(maxsize=1 << 16)
def normal_answer(text: str) -> str:
    """The form in which VQA compares answers (facts I): lower case, without articles and
    punctuation, numbers up to ten as digits, contractions with their apostrophe.

    An answer that is nothing but articles and punctuation stays, in lower case.
    """
    text = " ".join(text.split())
    kept = text
    for mark in MARKS.intersection(text):
        at_blank = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if at_blank or THOUSANDS.search(text) else " ")
    words = [DIGITS.get(word, word) for word in LONE_PERIOD.sub("", kept).lower().split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ARTICLES) or text.lower()


def agreed_answer(answers: Sequence[str]) -> str | None:
    """The normal form that most people gave, the first of equals; None without answers."""
    counted = Counter(map(normal_answer, answers)).most_common(1)
    return counted[0][0] if counted else None


def answer_numbers(answers: Sequence[str]) -> dict[str, int]:
    """Normal form -> place in the list; ConfigError for two answers of one form."""
    numbers: dict[str, int] = {}
    for number, answer in enumerate(answers):
        first = numbers.setdefault(normal_answer(answer), number)
        if first != number:
            raise ConfigError(
                f"model.answers: {answers[first]!r} and {answer!r} are one answer to VQA's way of "
                "comparing; leave out one of them"
            )
    return numbers


def soft_targets(answers: Sequence[str], numbers: Mapping[str, int]) -> np.ndarray:
    """float32 (V,): how right each known answer is to a question that people answered so.

    VQA's accuracy: 0, 0.3, 0.6, 0.9, 1 if none, one, two, three or more of them gave it (facts I).
    The answer of a question that has only one is right.
    """
    targets_V = np.zeros(len(numbers), dtype=np.float32)
    for answer, people in Counter(map(normal_answer, answers)).items():
        if answer in numbers:
            targets_V[numbers[answer]] = min(0.3 * people, 1.0) if len(answers) > 1 else 1.0
    return targets_V


def write_answers(url: str, answers: Sequence[str]) -> None:
    """One a line."""
    storage.write_bytes(url, "".join(f"{answer}\n" for answer in answers).encode())


def read_answers(url: str) -> tuple[str, ...]:
    """The lines of a file of `glipv2 prepare answers`, or of one written by hand."""
    try:
        lines = storage.read_bytes(url).decode("utf-8-sig").split("\n")
    except storage.MissingFileError as error:
        raise ConfigError(
            f"model.answers: {url} doesn't exist; make it with `glipv2 prepare answers`, or give "
            "the answers as a list"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"model.answers: {url} is no text in UTF-8: {error}") from error
    return tuple(line.strip() for line in lines if line.strip())
