"""glipv2 prepare SOURCE ... --out URL: turn a source into a shard set; or all sets of a recipe.

Run again with the same settings it reuses what is there; cut off, it goes on.
"""

import argparse
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from glipv2.data_prep.cleaning import (
    Cleaner,
    check_languages,
    clean_plan,
    hashes_of_shard,
    shards_of,
)
from glipv2.data_prep.looks import Looks
from glipv2.data_prep.reasons import REASONS, Dropped
from glipv2.data_prep.source import Source
from glipv2.data_prep.sources import KINDS, open_source
from glipv2.data_prep.tar_index import tar_indexer, tars_to_index
from glipv2.data_prep.toy import TOY_SETS
from glipv2.data_prep.writing import (
    LOOKS,
    chunk_writer,
    chunks,
    forget,
    looks_noter,
    summed,
    without_repeated,
)
from glipv2.jobs import prepare_lists
from glipv2.jobs.every_shard import add_workers_argument, at_least
from glipv2.jobs.prepare_plan import IN_PLACE, check_all_ours, done_or_begun, undo
from glipv2.jobs.stages import add_recipe_arguments, recipe_config, stage, use_cluster
from glipv2.jobs.stats import counted
from glipv2.pipeline import storage
from glipv2.pipeline.config import CleanConfig, PrepareConfig, RunConfig
from glipv2.pipeline.errors import ConfigError, DataError
from glipv2.pipeline.progress import bar
from glipv2.pipeline.ray_map import map_in_process, map_on_ray
from glipv2.pipeline.shards import ShardInfo, ShardSet, write_manifest

SAMPLES_PER_SHARD = 256
SMALL = 16 * SAMPLES_PER_SHARD
"""Rows that one process reads faster than others could be started."""
OPTIONS: dict[str, dict[str, Any]] = {
    "set": {"choices": tuple(TOY_SETS)},
    "count": {"type": at_least(1), "help": "number of images"},
    "size": {"type": int, "default": 128, "help": "image side in pixels (default 128)"},
    "hard": {"action": "store_true", "help": "more, smaller objects, strong colours"},
    "seed": {"type": int, "default": 0},
    "annotations": {"nargs": "+", "metavar": "URL", "help": "annotation files"},
    "images": {"nargs": "+", "metavar": "URL", "help": "folders of images, searched in this order"},
    "root": {"metavar": "URL", "help": "the folder that the source comes as"},
    "list": {"metavar": "FILE", "help": "a file of image names, one a line: only these"},
    "split": {"help": "only this part of the data, by the source's own name for it"},
    "min_count": {"type": int, "help": "objects that a name needs to be a category (default 1)"},
    "caption_field": {"metavar": "NAME", "help": "the field that holds the text"},
}
"""What sources take; `KINDS` may say more exactly what one of them takes."""
COUNTED = {
    "boxes": "box",
    "phrases": "phrase",
    "captions": "caption",
    "questions": "question",
    "answers": "answer",
}
"""What the samples of a set hold, and one of it."""
RULES: dict[str, dict[str, Any]] = {
    "exclude": {"nargs": "+", "metavar": "SHARDS",
                "help": "drop images that look like one of these sets (evaluation sets)"},
    "duplicates": {"action": "store_true", "default": None,
                   "help": "drop repeated samples and other files that look the same"},
    "look_distance": {"type": int, "metavar": "BITS",
                      "help": "how much images that look the same may differ (default 3 of 64)"},
    "min_side": {"type": int, "metavar": "PX", "help": "drop images whose shorter side is less"},
    "max_aspect": {"type": float, "metavar": "RATIO",
                   "help": "drop images whose longer side is more than so many shorter ones"},
    "min_words": {"type": int, "metavar": "N", "help": "drop captions of fewer words"},
    "max_words": {"type": int, "metavar": "N", "help": "drop captions of more words"},
    "languages": {"nargs": "+", "metavar": "CODE",
                  "help": "drop captions that are surely in none of these (ISO 639: en de ...)"},
}  # fmt: skip
"""What is left out by choice; every drop is listed in OUT/dropped/."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for name, kind in KINDS.items():
        source = sources.add_parser(name, help=kind.help, description=kind.help)
        for option in (*kind.needs, *kind.takes):
            how = OPTIONS[option] | ({"required": True} if option in kind.needs else {})
            how |= {"help": kind.says[option]} if option in kind.says else {}
            source.add_argument(_flag(option), **how)
        rules = source.add_argument_group("leave out", "off by default; listed in OUT/dropped/")
        for rule, how in RULES.items():
            rules.add_argument(_flag(rule), **how)
        if name == "webdataset":
            in_place = "no copy: write index and manifest beside the tars"
            source.add_argument("--index-only", action="store_true", help=in_place)
        needs_out = name != "webdataset"
        source.add_argument("--out", required=needs_out, metavar="URL", help="folder of the set")
        reading = "processes that read images (default: one a CPU; 0: this one reads them)"
        add_workers_argument(source, reading, least=0)
        source.add_argument("--address", help="Ray cluster to run on, for example auto")
    prepare_lists.add_parsers(sources.add_parser)
    add_recipe_arguments(sources.add_parser("recipe", help="all sets of a recipe, under data.root"))


def run(arguments: argparse.Namespace) -> int:
    if arguments.source == "recipe":
        config = recipe_config(arguments)
        if not config.prepare:
            raise ConfigError(f"{arguments.recipe} names no set to make: its `prepare` is empty")
        with stage(config.run_dir, "prepare"):
            prepare_recipe(config)
        return 0
    if "listed" in arguments:
        arguments.listed(arguments)
        return 0
    use_cluster(arguments.address)
    try:
        _prepare(arguments)
    except ConfigError as error:  # keys of the configuration are options here
        key = re.compile(r"^(?:clean\.)?(\w+)(?= must be )")
        raise ConfigError(key.sub(lambda found: _flag(found[1]), str(error))) from error
    return 0


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def _prepare(arguments: argparse.Namespace) -> None:
    if arguments.source == "webdataset" and bool(arguments.out) == arguments.index_only:
        raise ConfigError("give either --out, for a copy, or --index-only, which makes none")
    options = PrepareConfig(
        **_given(arguments, PrepareConfig), clean=CleanConfig(**_given(arguments, CleanConfig))
    )
    if arguments.source == "webdataset" and arguments.index_only:
        index_in_place(options, arguments.workers)
    else:
        prepare_set(arguments.out, options, workers=arguments.workers)


def _given(arguments: argparse.Namespace, config: type) -> dict[str, Any]:
    """What the command line says of a configuration class."""
    values = {field.name: getattr(arguments, field.name, None) for field in fields(config)}
    given = {name: value for name, value in values.items() if value is not None}
    return {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}


def prepare_recipe(config: RunConfig) -> None:
    """Make every shard set that the recipe says how to make."""
    for name, options in config.prepare.items():
        prepare_set(config.set_url(name), options)


def prepare_set(
    url: str,
    options: PrepareConfig,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    workers: int | None = None,
) -> ShardSet:
    """Make the shard set at `url`, or return it when it is there already.

    `workers` processes read the images, none for 0; None takes all CPUs, but none for a small set.
    A folder that holds, or was begun with, other settings is a DataError: nothing is overwritten.
    """
    check_languages(options.clean.languages)
    source = open_source(options)
    plan = {
        "source": options.source,
        "samples_per_shard": samples_per_shard,
        "content": source.content | clean_plan(options.clean),
    }
    done = done_or_begun(url, plan, options)
    if done is not None:
        return _as_found(done)
    workers = _worker_count(source, url, workers)
    shards = _shards(source, url, options, plan, workers)
    shard_set = _complete(url, source, shards, plan)
    forget(url, LOOKS)
    return shard_set


def index_in_place(options: PrepareConfig, workers: int | None = None) -> ShardSet:
    """Make existing webdataset tars a shard set where they are, as `prepare_set` would a copy."""
    if options.clean != CleanConfig():
        raise ConfigError("--index-only leaves nothing out by choice; make a copy with --out")
    source, url = open_source(options), options.root.rstrip("/")
    tars = tars_to_index(url)
    plan = {"source": IN_PLACE, "content": source.content}
    done = done_or_begun(url, plan, options)
    if done is not None:
        return _as_found(done)
    workers = _worker_count(source, url, workers)
    make_indexer = partial(tar_indexer, url, options.caption_field, storage.digest(plan))
    text, size = f"index {url.rsplit('/', 1)[-1]}", sum(size for _, size in tars)
    indexed = dict(_mapped(make_indexer, tars, workers, text, BYTES, size))
    return _complete(url, source, [indexed[tar] for tar in tars], plan)


def _as_found(shard_set: ShardSet) -> ShardSet:
    number = counted(shard_set.samples, "sample")
    are = "is" if shard_set.samples == 1 else "are"
    print(f"{shard_set.url}: {number} {are} there already")  # noqa: T201 - the answer
    return shard_set


def _complete(url: str, source: Source, shards: list[ShardInfo], plan: dict[str, Any]) -> ShardSet:
    """Write the manifest and say what was made."""
    check_all_ours(url, shards, plan)
    info = {"plan": plan, "licence": source.licence, **source.info, **summed(shards)}
    if not info["totals"]["samples"]:
        counts, first = info["counts"], info["first"]
        reasons = "; ".join(
            f"{number} {code} ({REASONS[code].meaning}), first {first[code]}"
            for code, number in counts.items()
        )
        undo(url, shards, plan)
        raise DataError(f"{url}: no usable sample in the source ({reasons or 'it is empty'})")
    filled = [shard for shard in shards if shard.samples]
    shard_set = write_manifest(url, filled, source.categories, info)
    print(closing_table(shard_set))  # noqa: T201 - the answer of the command
    return shard_set


def _shards(
    source: Source, url: str, options: PrepareConfig, plan: dict[str, Any], workers: int
) -> list[ShardInfo]:
    """Every shard of the set in order, written where it is not there yet."""
    name, size = url.rstrip("/").rsplit("/", 1)[-1], plan["samples_per_shard"]
    rules = options.clean
    excluded, names = Looks(rules.look_distance), dict[int, str]()
    unwanted = shards_of(rules.exclude)
    total = sum(shard.samples for shard in unwanted)
    named = "hash excluded images"
    hashed = dict(_mapped(lambda: hashes_of_shard, unwanted, workers, named, IMAGES, total))
    for value, image in (found for shard in unwanted for found in hashed[shard]):
        excluded.add(value)
        names.setdefault(value, image)
    cleaner = Cleaner(source.record, rules, excluded, names)
    todo = chunks(source, size)
    if rules.duplicates:
        make_noter = partial(looks_noter, url, cleaner)
        _exhaust(_mapped(make_noter, todo, workers, f"compare {name}", ROWS, source.total))
        todo = without_repeated(url, chunks(source, size), rules.look_distance)
    make_writer = partial(chunk_writer, url, cleaner, storage.digest(plan))
    done = _mapped(make_writer, todo, workers, f"prepare {name}", ROWS, source.total)
    finished = {chunk.number: shard for chunk, shard in done}
    return [finished[number] for number in sorted(finished)]


class _Unit(NamedTuple):
    """What a bar counts."""

    name: str
    of: Callable[[Any], tuple[Any, int]]
    """Of an item: what it is called in notes, and how many it holds."""


ROWS = _Unit("row", lambda chunk: (chunk.number, len(chunk.rows)))
BYTES = _Unit("byte", lambda tar: tar)
IMAGES = _Unit("image", lambda shard: (shard, shard.samples))


def _mapped(
    make_worker: Any,
    items: Iterable[Any],
    workers: int,
    text: str,
    unit: _Unit,
    total: int | None,
) -> Iterator[tuple[Any, Any]]:
    """(item, the worker's result) of each, with a progress bar that counts what items hold."""
    shown = _Shown(text, unit, total)
    if workers:
        done = map_on_ray(
            make_worker, items, num_actors=workers, min_actors=workers, watch=shown.watch
        )
    else:
        done = map_in_process(make_worker, items, shown.watch)
    try:
        for item, result in done:
            shown.finish(item)
            yield item, result
    finally:
        shown.close()


class _Shown:
    """A bar in which unfinished items count as far as noted."""

    def __init__(self, text: str, unit: _Unit, total: int | None) -> None:
        self.text, self.unit, self.total = text, unit, total
        self.bar: Any = None
        self.began = time.time()
        self.done = 0
        self.finished: set[Any] = set()
        """Items of which old notes may still come."""

    def watch(self, notes: Iterable[tuple[Any, int]]) -> None:
        """(item's name, how many are done) of each worker."""
        under_way = sum(count for name, count in notes if name not in self.finished)
        if under_way:
            self._show(self.done + under_way)

    def finish(self, item: Any) -> None:
        name, count = self.unit.of(item)
        self.finished.add(name)
        self.done += count
        self._show(self.done)

    def _show(self, done: int) -> None:
        if self.bar is None:  # after Ray has said what it has to say
            self.bar = bar(self.total, self.text, self.unit.name)
            self.bar.start_t = self.began  # what it shows at first wasn't done in no time
        self.bar.update(max(0, done - self.bar.n))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _exhaust(items: Iterable[Any]) -> None:
    deque(items, maxlen=0)


def _worker_count(source: Source, url: str, wanted: int | None) -> int:
    if url.startswith("memory:"):  # nobody else sees this process's memory
        return 0
    if wanted is not None:
        return wanted
    total = source.total
    if total is None:
        total = sum(1 for _ in islice(source.rows(Dropped()), SMALL + 1))
    return 0 if total <= SMALL else os.cpu_count() or 1


def closing_table(shard_set: ShardSet) -> str:
    """What was made and what was left out, for a person."""
    totals, counts = shard_set.info["totals"], shard_set.info["counts"]
    first = shard_set.info["first"]
    size = sum(shard.bytes for shard in shard_set.shards) / 2**20
    held = [counted(totals[many], one, many) for many, one in COUNTED.items() if totals.get(many)]
    parts = [
        counted(totals["samples"], "sample"),
        *(held or ["0 boxes"]),
        counted(len(shard_set.shards), "shard"),
    ]
    lines = [f"{shard_set.url}: {', '.join(parts)}, {size:.1f} MB"]
    for code, number in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        unit, meaning = REASONS[code]
        what = f"{unit} left out" if unit != "kept" else "kept"
        lines.append(f"  {number:7d}  {what:15s}  {code:22s} {meaning}; first: {first[code]}")
    return "\n".join(lines)
