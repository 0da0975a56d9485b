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
    without_note = re.sub(r"\(.*?\)", " ", name)
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


def caption_prompt(caption: str, spans_per_phrase: Sequence[Spans]) -> Prompt:
    """A caption as it stands, with the spans of its phrases; ValueError if a span is outside it."""
    for spans in spans_per_phrase:
        for start, end in spans:
            if not 0 <= start < end <= len(caption):
                raise ValueError(f"span [{start}, {end}) is outside a text of {len(caption)}")
    return Prompt(text=caption, spans=tuple(tuple(spans) for spans in spans_per_phrase))


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
