"""The toy world: small rendered scenes with names, captions, spans and masks, all known exactly.

A record is a pure function of (set name, seed, index, size, hard): any part of a set can be
rendered anywhere and comes out the same, byte for byte with the same Pillow.

| set | task | holds |
| toy_detection   | detection | gold boxes with category names, seen combinations only |
| toy_grounding   | grounding | gold captions with phrase spans, seen combinations only |
| toy_calibration | grounding | gold, other scenes: thresholds are chosen here |
| toy_pairs       | pairs     | captions only; over-samples unseen combinations, some novel words |
| toy_pairs_truth | grounding | the truth of toy_pairs, same keys: scores labels, never trains |
| toy_val         | grounding | regions with categories, captions and spans, as rich as toy_pairs |
"""

import zlib
from collections.abc import Iterator

import numpy as np

from glipv2.data_prep.toy_captions import Description, describe
from glipv2.data_prep.toy_drawing import Drawn, draw_scene
from glipv2.data_prep.toy_scene import (
    NOVEL_NAMES,
    SEEN_NAMES,
    UNSEEN_NAMES,
    SceneRule,
    draw_things,
    group_of,
)
from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.records import Record, Region, Task

TOY_SETS: dict[str, Task] = {
    "toy_detection": "detection",
    "toy_grounding": "grounding",
    "toy_calibration": "grounding",
    "toy_pairs": "pairs",
    "toy_pairs_truth": "grounding",
    "toy_val": "grounding",
}
TOY_WORLD = 1
"""Raise it when equal arguments no longer give equal records."""
GOLD_SETS = ("toy_detection", "toy_grounding", "toy_calibration")
UNSEEN_SHARE = 0.45
NOVEL_SHARE = 0.10
OMIT_SHARE = 0.10
TERSE_SETS = ("toy_pairs", "toy_calibration")
"""Their captions leave objects out, as web captions do; a threshold must be chosen on the like."""


def toy_categories(set_name: str) -> tuple[str, ...]:
    """Names that `Region.category` of this set counts; an index means the same name in every set.

    Gold sets list only what they show: as a negative, a held-out name would be unlearned.
    """
    if set_name == "toy_detection":
        return SEEN_NAMES
    return SEEN_NAMES + UNSEEN_NAMES + NOVEL_NAMES if set_name == "toy_val" else ()


def toy_records(
    set_name: str, count: int, seed: int, size: int = 128, hard: bool = False
) -> Iterator[Record]:
    """The first `count` records of a set, images of `size` x `size` pixels."""
    if set_name not in TOY_SETS:
        raise ConfigError(f"unknown toy set {set_name!r}; the sets are {', '.join(TOY_SETS)}")
    if not 48 <= size <= 1024:
        raise ConfigError(f"toy images of {size} px: the size must lie between 48 and 1024")
    for index in range(count):
        yield toy_record(set_name, index, seed, size, hard)


def toy_record(set_name: str, index: int, seed: int, size: int = 128, hard: bool = False) -> Record:
    """Record number `index` of a set."""
    stream = "toy_pairs" if set_name == "toy_pairs_truth" else set_name
    rng = np.random.default_rng([seed, zlib.crc32(stream.encode()), index])
    gold = set_name in GOLD_SETS
    rule = SceneRule(
        unseen_share=0.0 if gold else UNSEEN_SHARE,
        novel_share=0.0 if gold else NOVEL_SHARE,
        hard=hard,
    )
    image, drawn = draw_scene(draw_things(rule, rng), size, hard, rng)
    text = describe(drawn, OMIT_SHARE if stream in TERSE_SETS else 0.0, rng)
    regions, provenance = _regions(set_name, drawn, text)
    return Record(
        key=f"{stream}-{index:06d}",
        image=image,
        image_format="jpg",
        width=size,
        height=size,
        task=TOY_SETS[set_name],
        caption="" if set_name == "toy_detection" else text.caption,
        regions=regions,
        provenance={"source": set_name, "seed": seed, "index": index, **provenance},
    )


def _regions(
    set_name: str, drawn: list[Drawn], text: Description
) -> tuple[tuple[Region, ...], dict[str, object]]:
    """Regions in drawing order, and what else is known about them."""
    if set_name == "toy_pairs":
        return (), {}
    categories = toy_categories(set_name)
    mention_of = {member: mention for mention in text.mentions for member in mention.members}
    regions, groups, omitted = [], [], []
    for number, item in enumerate(drawn):
        name = item.thing.name
        mention = mention_of.get(number)
        if mention is None:
            omitted.append({"name": name, "box": list(item.box)})
            continue
        with_text = set_name != "toy_detection"
        regions.append(
            Region(
                box=item.box,
                spans=(mention.span,) if with_text else (),
                phrase=mention.text if with_text else name,
                category=categories.index(name) if categories else None,
                mask=item.mask,
            )
        )
        groups.append(group_of(name))
    if set_name in GOLD_SETS:
        return tuple(regions), {}
    return tuple(regions), {"groups": groups, "omitted": omitted}
