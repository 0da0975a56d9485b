"""Few-shot subsets of a detection set: at least k examples of every category, drawn by a seed.

An example is a box that is no crowd (facts G.3). Images come with all of their boxes, so common
categories get more than k.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from glipv2.pipeline import storage
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.record_json import parse_record
from glipv2.pipeline.shard_format import MANIFEST, RawSample, ShardSet
from glipv2.pipeline.shard_reader import SLICE, open_shard_set, raw_samples
from glipv2.pipeline.shards import shard_name, write_manifest, write_raw_shard

log = logging.getLogger(__name__)

LEAST = 64
"""Samples of a subset, for which its images are repeated: a stream has up to so many lanes."""


class Image(NamedTuple):
    """An image of the whole set, and how many examples of which category it has."""

    shard: int
    place: int
    tall: bool
    examples: Counter[int]


def draw(examples: Sequence[Counter[int]], shots: int, seed: int) -> list[int]:
    """Numbers of images that have `shots` examples of every category between them, or all there
    are; rising, and none could be left out.

    The images are gone through in random order: each that has a category which is still short is
    taken, and what became superfluous by later ones is put back.
    """
    total: Counter[int] = sum(examples, Counter())
    wanted = {category: min(shots, count) for category, count in total.items()}
    have: Counter[int] = Counter()
    taken: list[int] = []
    for number in np.random.default_rng(seed).permutation(len(examples)).tolist():
        if any(have[category] < wanted[category] for category in examples[number]):
            taken.append(number)
            have.update(examples[number])
    for number in list(taken):
        own = examples[number]
        if all(have[category] - count >= wanted[category] for category, count in own.items()):
            taken.remove(number)
            have.subtract(own)
    return sorted(taken)


def few_shot_set(url: str, whole: ShardSet, shots: int, seed: int) -> ShardSet:
    """The subset of `whole` at `url`, made unless it is there; 0 shots take all images.

    DataError if another subset is there, or if no image has a box.
    """
    wanted = {"of": whole.digest, "shots": shots, "seed": seed}
    if storage.exists(storage.join(url, MANIFEST)):
        known = open_shard_set(url)
        if not wanted.items() <= known.info.get("few_shot", {}).items():
            raise DataError(f"{url} holds another subset than {wanted}; delete it, or move away")
        return known
    images = list(read_images(whole))
    examples = [image.examples for image in images]
    chosen = draw(examples, shots, seed) if shots else list(range(len(images)))
    if not chosen:
        raise DataError(f"{whole.url} has no box to learn from, so there is no subset to draw")
    samples = repeated(whole, [images[number] for number in chosen])
    stats: dict[str, Any] = {}  # filled as the samples are written
    shard = write_raw_shard(url, shard_name(0), _counted(samples, stats), stats)
    info = {"licence": whole.info.get("licence"), "few_shot": {**wanted, "images": len(chosen)}}
    return write_manifest(url, [shard], whole.categories, info)


def read_images(whole: ShardSet) -> Iterator[Image]:
    """Every image of a set, without its pixels; those with a bad record are left out."""
    for number, shard in enumerate(whole.shards):
        for first in range(0, shard.samples, SLICE):
            for place, raw in enumerate(raw_samples(whole, number, first, first + SLICE), first):
                try:
                    record = parse_record(raw, len(whole.categories))
                except BadSample as bad:
                    log.warning("%s: %s is left out of the subsets: %s", whole.url, raw.key, bad)
                    continue
                examples = Counter(
                    region.category
                    for region in record.regions
                    if region.category is not None and not region.crowd
                )
                yield Image(number, place, record.height > record.width, examples)


def repeated(whole: ShardSet, images: Sequence[Image]) -> Iterator[tuple[Image, RawSample]]:
    """The images' samples, all of them once, then once more until there are LEAST."""
    for copy in range(-(-LEAST // len(images))):
        for image in images:
            [raw] = raw_samples(whole, image.shard, image.place, image.place + 1)
            key = f"{raw.key[:70]}_again{copy}" if copy else raw.key
            yield image, RawSample(key=key, members=raw.members, error=raw.error)


def _counted(
    samples: Iterator[tuple[Image, RawSample]], stats: dict[str, Any]
) -> Iterator[RawSample]:
    tall, boxes = 0, Counter[str]()
    for image, raw in samples:
        tall += image.tall
        boxes.update(samples=1, boxes=image.examples.total())
        yield raw
    stats |= {"tall": tall, "totals": dict(boxes)}
