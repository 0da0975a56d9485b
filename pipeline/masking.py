"""Masked language modelling: which tokens are hidden and must be predicted (facts B.5)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

IGNORE = -100
"""Label of tokens that are not predicted."""
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1
"""Of the chosen tokens: this share becomes [MASK], this one a random word, the rest stays."""
Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Masking:
    probability: float
    mask_id: int
    vocab_size: int
    special_ids: frozenset[int]
    """Never chosen, and never put in as a random word."""

    @cached_property
    def is_special(self) -> np.ndarray:
        """bool (V,), one entry per id of the vocabulary."""
        return np.isin(np.arange(self.vocab_size), list(self.special_ids))

    @cached_property
    def words(self) -> np.ndarray:
        return np.flatnonzero(~self.is_special)


def tokens_within(offsets: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
    """bool (T,): the tokens of which at least one character lies in a span."""
    return np.array(
        [any(a < end and b > start for start, end in spans) if b > a else False for a, b in offsets]
    )


def mask_tokens(
    ids_T: np.ndarray, open_T: np.ndarray, masking: Masking, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupted ids and labels, both int64 (T,).

    Only tokens that are True in `open_T` and not special are ever changed or predicted.
    """
    chosen_T = open_T & ~masking.is_special[ids_T] & (rng.random(len(ids_T)) < masking.probability)
    fate_T = rng.random(len(ids_T))
    random_T = masking.words[rng.integers(len(masking.words), size=len(ids_T))]
    corrupted_T = np.where(chosen_T & (fate_T < MASK_SHARE), masking.mask_id, ids_T)
    as_word_T = chosen_T & (fate_T >= MASK_SHARE) & (fate_T < MASK_SHARE + RANDOM_SHARE)
    corrupted_T = np.where(as_word_T, random_T, corrupted_T)
    return corrupted_T.astype(np.int64), np.where(chosen_T, ids_T, IGNORE).astype(np.int64)
