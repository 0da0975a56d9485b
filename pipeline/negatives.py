"""The text of a training sample: its own words among words that are not in the picture.

Detection data: the image's categories and random others, shuffled (GLIP, facts C.4). Captions: the
caption; those with a model's boxes sometimes packed between captions of other images (facts C.5).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from glipv2.model.batch import NO_CATEGORY
from glipv2.model.prompts import Prompt, caption_prompt, category_prompt
from glipv2.pipeline.records import Record, Span

SEPARATOR_COST = 1
"""Tokens of the full stop between two names or captions."""


@dataclass(frozen=True, kw_only=True)
class TrainingText:
    """A prompt and what its phrases have to do with the image's regions."""

    prompt: Prompt
    phrase_of_region: list[int | None]
    """Which phrase names each region of the record; None when it didn't fit into the text, and for
    crowds, which have no single box to learn."""
    categories: list[int | None]
    """Category number of each phrase in its own shard set; None for phrases of captions."""
    maskable: tuple[Span, ...]
    """Characters that masked language modelling may hide: those that tell of this image."""


@dataclass(frozen=True, kw_only=True)
class Categories:
    """The category names of one shard set."""

    names: tuple[str, ...]
    costs: tuple[int, ...]
    """Tokens of each name."""
    ids: tuple[int, ...]
    """Number of each name in the vocabulary shared by all sets of the mixture."""

    def shared_ids(self, numbers: Sequence[int | None]) -> np.ndarray:
        """int64, NO_CATEGORY for None."""
        ids = [NO_CATEGORY if number is None else self.ids[number] for number in numbers]
        return np.array(ids, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Negatives:
    """How many words of other images a text may hold."""

    max_categories: int
    full_share: float
    """Share of prompts with as many as allowed; the others draw a uniform number."""
    packing: float
    """Probability that a caption is packed at all."""
    max_captions: int
    pack_gold: bool = False
    """Whether captions whose boxes people drew are packed too."""
    fixed: bool = False
    """Detection prompts hold all categories in their order."""

    def draw_count(self, most: int, rng: np.random.Generator) -> int:
        full, some = rng.random() < self.full_share, int(rng.integers(1, max(most, 1) + 1))
        return most if full else min(some, most)


def detection_text(
    record: Record,
    categories: Categories,
    budget: int,
    settings: Negatives,
    rng: np.random.Generator,
) -> TrainingText:
    """Names of the record's categories and of absent ones, in random order.

    The text takes at most `budget` tokens. Present categories go first: only a budget too small
    for them loses any. Where annotators looked for some categories only (LVIS' federated labels),
    only those that they did not find are negatives.
    """
    shown = {r.category for r in record.regions if r.category is not None}
    present = sorted(shown & {r.category for r in record.regions if not r.crowd})
    shown_ids = {categories.ids[c] for c in shown}  # a crowd's category is no negative either
    verified = None if settings.fixed else record.provenance.get("neg_categories")
    candidates = range(len(categories.ids)) if verified is None else _known(verified, categories)
    absent = [c for c in candidates if categories.ids[c] not in shown_ids]
    names, costs = categories.names, categories.costs
    count = len(names) if settings.fixed else settings.draw_count(settings.max_categories, rng)
    chosen: list[int] = []
    for category in map(int, [*rng.permutation(present), *rng.permutation(absent)[:count]]):
        cost = costs[category] + SEPARATOR_COST
        if cost - SEPARATOR_COST * (not chosen) <= budget:
            chosen.append(category)
            budget -= cost
    order = np.argsort(chosen) if settings.fixed else rng.permutation(len(chosen))
    chosen = [chosen[place] for place in order]
    prompt = category_prompt([names[category] for category in chosen])
    phrase_of = {category: phrase for phrase, category in enumerate(chosen)}
    return TrainingText(
        prompt=prompt,
        phrase_of_region=[
            None if region.crowd else phrase_of.get(region.category)  # type: ignore[arg-type]
            for region in record.regions
        ],
        categories=list(chosen),
        maskable=tuple(
            span for c in present if c in phrase_of for span in prompt.spans[phrase_of[c]]
        ),
    )


def _known(numbers: object, categories: Categories) -> list[int]:
    """Those of a record's category numbers that there are."""
    listed = numbers if isinstance(numbers, list) else []
    return sorted({n for n in listed if type(n) is int and 0 <= n < len(categories.ids)})


def caption_text(
    record: Record,
    neighbours: Sequence[str],
    count_tokens: Callable[[str], int],
    budget: int,
    settings: Negatives,
    rng: np.random.Generator,
) -> TrainingText:
    """The record's caption, perhaps among captions of `neighbours`, in random order.

    Captions are added while the text stays within `budget` tokens, the own one always first.
    """
    before, after = "", ""
    may_pack = settings.pack_gold or any(region.score < 1 for region in record.regions)
    if neighbours and rng.random() < settings.packing and may_pack:
        before, after = _packing(record.caption, neighbours, count_tokens, budget, settings, rng)
    shift = len(before)
    prompt = caption_prompt(
        before + record.caption + after,
        [[(a + shift, b + shift) for a, b in region.spans] for region in record.regions],
    )
    return TrainingText(
        prompt=prompt,
        phrase_of_region=[None if r.crowd else n for n, r in enumerate(record.regions)],
        categories=[None] * len(record.regions),
        maskable=((shift, shift + len(record.caption)),),
    )


def _packing(
    caption: str,
    neighbours: Sequence[str],
    count_tokens: Callable[[str], int],
    budget: int,
    settings: Negatives,
    rng: np.random.Generator,
) -> tuple[str, str]:
    """What to put before and after a caption."""
    count = settings.draw_count(settings.max_captions, rng)
    budget -= count_tokens(caption) + SEPARATOR_COST
    texts: list[str] = []
    for place in rng.permutation(len(neighbours))[:count]:
        text = neighbours[place].strip().rstrip(".")
        cost = count_tokens(text) + SEPARATOR_COST
        if cost > budget or not text:
            break
        texts.append(text)
        budget -= cost
    cut = int(rng.integers(len(texts) + 1))
    before = "".join(f"{text}. " for text in texts[:cut])
    separator = " " if caption.rstrip().endswith(".") else ". "
    return before, separator + "".join(f"{text}. " for text in texts[cut:]) if texts else ""
