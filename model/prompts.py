"""From categories or captions to text, character spans and token maps.

Training and prediction share this file, so a category reads the same to both.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glipv2.model.tokenizer import Tokenizer, Tokens

SEPARATOR = ". "
Span = tuple[int, int]
Spans = Sequence[Span]
Caption = str | tuple[str, Sequence[str | Spans]]
"""What to ground: a text whose sentences are the phrases ("a red square. a blue circle."), or a
text with its phrases, each as its words or as its [start, end) character spans."""
_SENTENCE = re.compile(r"(?:[^.]|(?<=\d)\.(?=\d))+")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text and the characters of it that name each phrase."""

    text: str
    spans: tuple[tuple[Span, ...], ...]
    """[start, end) character spans, one tuple a phrase; a phrase may be spread over several."""

    @property
    def phrases(self) -> list[str]:
        """The words of each phrase."""
        return [" ".join(self.text[a:b] for a, b in spans) for spans in self.spans]


def clean_category(name: str) -> str:
    """GLIP's reading of data set names: `dining_table (wood)` becomes `dining table`."""
    without_note = re.sub(r"\([^()]*\)", " ", name)
    return re.sub(r"\s+", " ", without_note.replace("_", " ")).strip() or name


def category_prompt(names: Sequence[str]) -> Prompt:
    """Join category names to one text, "a. b. c", in the given order (GLIP, facts C.4)."""
    spans: list[tuple[Span, ...]] = []
    text = ""
    for name in names:
        text += SEPARATOR if spans else ""
        cleaned = clean_category(name)
        spans.append(((len(text), len(text) + len(cleaned)),))
        text += cleaned
    return Prompt(text=text, spans=tuple(spans))


def caption_prompt(caption: str, phrases: Sequence[str | Spans]) -> Prompt:
    """A caption as it stands, with its phrases, given as words or as character spans.

    ValueError names a phrase that is not in the caption.
    """
    words = locate(caption, [phrase for phrase in phrases if isinstance(phrase, str)])
    spans = [[words.pop(0)] if isinstance(phrase, str) else phrase for phrase in phrases]
    for start, end in (span for phrase in spans for span in phrase):
        if not 0 <= start < end <= len(caption):
            raise ValueError(f"span [{start}, {end}) is outside a text of {len(caption)}")
    return Prompt(text=caption, spans=tuple(tuple(phrase) for phrase in spans))


def grounding_prompt(caption: Caption) -> Prompt:
    """The prompt of a `Caption`; ValueError says what is wrong with it."""
    if isinstance(caption, str):
        sentences = [match.span() for match in _SENTENCE.finditer(caption)]
        spans = [_without_spaces(caption, span) for span in sentences]
        return caption_prompt(caption, [[(a, b)] for a, b in spans if a < b])
    text, phrases = caption
    if isinstance(phrases, str):
        raise ValueError(f"the phrases of {text!r} must be a list, not the text {phrases!r}")
    return caption_prompt(text, phrases)


def locate(caption: str, phrases: Sequence[str]) -> list[Span]:
    """Where each phrase stands in the caption: whole words, in any case and with any white space.

    Phrases avoid each other where they can; longer ones choose first, then earlier ones. So
    "square" asked twice is the first and the second square, and next to "red square" it is another
    one. ValueError names a phrase that does not occur.
    """
    chosen: dict[int, Span] = {}
    for number in sorted(range(len(phrases)), key=lambda number: -len(phrases[number])):
        spans = _occurrences(caption, phrases[number])
        if not spans:
            raise ValueError(f"the phrase {phrases[number]!r} is not in the caption {caption!r}")
        taken = list(chosen.values())
        free = [(a, b) for a, b in spans if all(b <= start or end <= a for start, end in taken)]
        chosen[number] = (free or spans)[0]
    return [chosen[number] for number in range(len(phrases))]


def _occurrences(caption: str, phrase: str) -> list[Span]:
    words = [re.escape(word) for word in phrase.split()]
    if not words:
        return []
    pattern = r"(?<!\w)" + r"\s+".join(words) + r"(?!\w)"
    return [match.span() for match in re.finditer(pattern, caption, re.IGNORECASE)]


def _without_spaces(text: str, span: Span) -> Span:
    part = text[slice(*span)]
    return span[0] + len(part) - len(part.lstrip()), span[1] - len(part) + len(part.rstrip())


def token_map(tokens: Tokens, spans_per_phrase: Sequence[Spans]) -> np.ndarray:
    """Which tokens name which phrase: bool (phrases, tokens).

    Every token from the one that holds a span's first character to the one that holds its last.
    A span that starts or ends on a character without a token (white space, a dropped accent) is
    tried up to two characters further in; a span with no token left is a row of False (facts C.2).
    """
    token_of = {
        character: token
        for token, (start, end) in enumerate(tokens.offsets)
        for character in range(start, end)
    }
    positive_PT = np.zeros((len(spans_per_phrase), len(tokens.ids)), dtype=bool)
    for row, spans in enumerate(spans_per_phrase):
        for start, end in spans:
            first = _first_known(token_of, (start, start + 1, start + 2))
            last = _first_known(token_of, (end - 1, end - 2, end - 3))
            if first is not None and last is not None:
                positive_PT[row, first : last + 1] = True
    return positive_PT


def _first_known(token_of: dict[int, int], characters: Sequence[int]) -> int | None:
    return next((token_of[c] for c in characters if c in token_of), None)


def split_categories(
    names: Sequence[str], tokenizer: Tokenizer, max_categories: int | None = None
) -> list[list[int]]:
    """Cut a category list into prompts that fit the token budget, keeping the order.

    Returns lists of indices into `names`. A name that is too long for a prompt of its own gets
    one all the same, cut at its end by the tokenizer.
    """
    budget = tokenizer.max_tokens - 2
    separator_cost = len(tokenizer.encode(SEPARATOR).ids) - 2
    chunks: list[list[int]] = []
    used = 0
    for index, name in enumerate(names):
        cost = len(tokenizer.encode(clean_category(name)).ids) - 2
        full = not chunks or len(chunks[-1]) == max_categories
        if full or used + separator_cost + cost > budget:
            chunks.append([index])
            used = cost
        else:
            chunks[-1].append(index)
            used += separator_cost + cost
    return chunks
