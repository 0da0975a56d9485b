"""Say what stands in a toy scene, in varied words, with the exact characters of every phrase."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glipv2.data_prep.toy_drawing import Drawn
from glipv2.pipeline.records import Span

COUNT_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}
OPENINGS = (
    *("", "", ""),
    "there {be} ",
    "here {be} ",
    "we see ",
    "this picture shows ",
    "a photo of ",
)
RELATIONS = ("next to", "near", "beside", "with", "and")
ENDINGS = ("", "", "", " in the picture")


@dataclass(frozen=True, kw_only=True)
class Mention:
    """Objects that one phrase names."""

    members: tuple[int, ...]
    """Indices into the drawn objects."""
    text: str
    """The phrase without article or number word, e.g. "small striped red square"."""
    span: Span = (0, 0)


@dataclass(frozen=True, kw_only=True)
class Description:
    caption: str
    mentions: tuple[Mention, ...]
    """In the order of the caption; caption[span] is the mention's text."""


def describe(drawn: Sequence[Drawn], omit_share: float, rng: np.random.Generator) -> Description:
    """One caption; each category is left out with probability `omit_share`, but never all."""
    groups: dict[str, list[int]] = {}
    for number, item in enumerate(drawn):
        groups.setdefault(item.thing.name, []).append(number)
    names = list(groups)
    kept = [name for name in names if rng.random() >= omit_share]
    kept = kept or [names[int(rng.integers(len(names)))]]
    rng.shuffle(kept)
    mentions = [_mention(drawn, groups[name], rng) for name in kept]
    return _assemble(_sentence(drawn, mentions, rng), rng)


def _mention(drawn: Sequence[Drawn], members: list[int], rng: np.random.Generator) -> Mention:
    thing = drawn[members[0]].thing
    words = []
    if rng.random() < 0.4:
        words.append(thing.size)
    if rng.random() < (0.15 if thing.texture == "plain" else 0.5):
        words.append(thing.texture)
    words += [thing.colour, thing.shape if len(members) == 1 else plural(thing.shape)]
    return Mention(members=tuple(members), text=" ".join(words))


def plural(noun: str) -> str:
    """Of the shape words."""
    return noun + ("es" if noun.endswith("s") else "s")


def _determiner(mention: Mention) -> str:
    count = len(mention.members)
    if count > 1:
        return COUNT_WORDS[count] + " "
    return "an " if mention.text[0] in "aeiou" else "a "


def _sentence(
    drawn: Sequence[Drawn], mentions: list[Mention], rng: np.random.Generator
) -> list[str | Mention]:
    """Plain strings and mentions in order; joined they are the caption."""
    opening = OPENINGS[int(rng.integers(len(OPENINGS)))]
    plural_start = len(mentions[0].members) > 1
    parts: list[str | Mention] = [opening.format(be="are" if plural_start else "is")]
    for number, mention in enumerate(mentions):
        if number:
            parts.append(_link(drawn, mentions, number, rng))
        parts += [_determiner(mention), mention]
    parts.append(ENDINGS[int(rng.integers(len(ENDINGS)))] + ".")
    return parts


def _link(
    drawn: Sequence[Drawn], mentions: list[Mention], number: int, rng: np.random.Generator
) -> str:
    if number == 1 and (len(mentions) == 2 or rng.random() < 0.5):
        words = RELATIONS[int(rng.integers(len(RELATIONS)))]
        if rng.random() < 0.4:
            words = _true_relation(drawn, mentions[0], mentions[1]) or words
        return f" {words} "
    return " and " if number == len(mentions) - 1 else ", "


def _true_relation(drawn: Sequence[Drawn], first: Mention, second: Mention) -> str | None:
    """Words for where `first` lies, when it is one object clearly off the other."""
    if len(first.members) + len(second.members) > 2:
        return None
    a, b = drawn[first.members[0]].box, drawn[second.members[0]].box
    if a[3] <= b[1]:
        return "above"
    if a[1] >= b[3]:
        return "below"
    if a[2] <= b[0]:
        return "to the left of"
    return "to the right of" if a[0] >= b[2] else None


def _assemble(parts: list[str | Mention], rng: np.random.Generator) -> Description:
    text = ""
    mentions = []
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        span = (len(text), len(text) + len(part.text))
        mentions.append(Mention(members=part.members, text=part.text, span=span))
        text += part.text
    if rng.random() < 0.3:  # the first word is never part of a phrase, so spans stay true
        text = text[0].upper() + text[1:]
    return Description(caption=text, mentions=tuple(mentions))
