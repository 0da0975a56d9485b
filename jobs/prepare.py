"""glipv2 prepare SOURCE ... --out URL: turn a source into a shard set; or all sets of a recipe.

Run again with the same settings it reuses what is there; cut off, it goes on.
"""

import argparse
import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import fields
from functools import partial
from itertools import islice
from typing import Any

from glipv2.data_prep.cleaning import Cleaner, clean_plan, hashes_of_shard, shards_of
from glipv2.data_prep.looks import Looks
from glipv2.data_prep.reasons import REASONS, Dropped
from glipv2.data_prep.source import Source
from glipv2.data_prep.sources import KINDS, open_source
from glipv2.data_prep.tar_index import tar_indexer, tars_to_index
from glipv2.data_prep.toy import TOY_SETS
from glipv2.data_prep.writing import (
    Chunk,
    chunk_writer,
    chunks,
    forget_looks,
    looks_noter,
    summed,
    without_repeated,
)
from glipv2.jobs.every_shard import every_shard
from glipv2.jobs.stages import add_recipe_arguments, recipe_config, stage, use_cluster
from glipv2.jobs.survey import records_of
from glipv2.pipeline import storage
from glipv2.pipeline.answers import agreed_answer, write_answers
from glipv2.pipeline.config import CleanConfig, PrepareConfig, RunConfig
from glipv2.pipeline.errors import BadSample, ConfigError, DataError
from glipv2.pipeline.progress import bar
from glipv2.pipeline.ray_map import map_in_process, map_on_ray
from glipv2.pipeline.shard_format import MANIFEST
from glipv2.pipeline.shards import (
    ShardInfo,
    ShardSet,
    check_shard_sizes,
    open_shard_set,
    write_manifest,
)
from glipv2.pipeline.vocabulary import vocabulary_of, write_vocabulary

SAMPLES_PER_SHARD = 256
SMALL = 16 * SAMPLES_PER_SHARD
"""Rows that one process reads faster than others could be started."""
PLAN = "prepare.json"
"""What is being made in the folder, written first: a second command with other settings sees it."""
OPTIONS: dict[str, dict[str, Any]] = {
    "set": {"choices": tuple(TOY_SETS)},
    "count": {"type": int, "help": "number of images"},
    "size": {"type": int, "default": 128, "help": "image side in pixels (default 128)"},
    "hard": {"action": "store_true", "help": "more, smaller objects, strong colours"},
    "seed": {"type": int, "default": 0},
    "annotations": {"nargs": "+", "metavar": "URL", "help": "annotation files (voc: the folder)"},
    "images": {"nargs": "+", "metavar": "URL", "help": "folders of images, searched in this order"},
    "root": {"metavar": "URL", "help": "the folder that the source comes as, or its one file"},
    "list": {"metavar": "FILE", "help": "only these names, one a line"},
    "split": {"help": "only this part of the data, by the source's own name for it"},
    "min_count": {"type": int, "help": "objects that a name needs to be a category (default 1)"},
    "caption_field": {"metavar": "NAME", "help": "the field that holds the text"},
}
RULES: dict[str, dict[str, Any]] = {
    "exclude": {"nargs": "+", "metavar": "SHARDS",
                "help": "drop images that look like one of these sets (evaluation sets)"},
    "duplicates": {"action": "store_true", "default": None,
                   "help": "drop repeated samples and other files that look the same"},
    "look_distance": {"type": int, "metavar": "BITS",
                      "help": "how much images that look the same may differ (default 3 of 64)"},
    "min_side": {"type": int, "metavar": "PX", "help": "shortest side that is kept"},
    "max_aspect": {"type": float, "metavar": "RATIO", "help": "longer over shorter side"},
    "min_words": {"type": int, "help": "words of the caption"},
    "max_words": {"type": int, "help": "words of the caption"},
    "languages": {"nargs": "+", "metavar": "CODE",
                  "help": "drop captions that are surely in none of these (en de ...)"},
}  # fmt: skip
"""What is left out by choice; every drop is listed in OUT/dropped/."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for name, kind in KINDS.items():
        source = sources.add_parser(name, help=kind.help, description=kind.help)
        for option in (*kind.needs, *kind.takes):
            how = OPTIONS[option] | ({"required": True} if option in kind.needs else {})
            source.add_argument("--" + option.replace("_", "-"), **how)
        rules = source.add_argument_group("leave out", "off by default; listed in OUT/dropped/")
        for rule, how in RULES.items():
            rules.add_argument("--" + rule.replace("_", "-"), **how)
        if name == "webdataset":
            in_place = "no copy: write index and manifest beside the tars"
            source.add_argument("--index-only", action="store_true", help=in_place)
        needs_out = name != "webdataset"
        source.add_argument("--out", required=needs_out, metavar="URL", help="folder of the set")
        source.add_argument(
            "--workers", type=int, help="processes that read images (default: one per CPU; 0 none)"
        )
        source.add_argument("--address", help="Ray cluster to run on, for example auto")
    vocabulary = sources.add_parser(
        "vocabulary", help="which categories of several sets are the same, for data.vocabulary"
    )
    vocabulary.add_argument("shards", nargs="+", metavar="SHARDS", help="the sets of the mixture")
    same = "names of one category (tv,television); may be repeated"
    vocabulary.add_argument("--same", action="append", default=[], metavar="NAME,NAME", help=same)
    vocabulary.add_argument("--out", required=True, metavar="URL", help="the file to write")
    answers = sources.add_parser(
        "answers", help="the answers that several questions share, for model.answers"
    )
    answers.add_argument("shards", nargs="+", metavar="SHARDS", help="sets of questions")
    least = "questions that must agree on an answer (default 9)"
    answers.add_argument("--least", type=int, default=9, metavar="N", help=least)
    answers.add_argument("--out", required=True, metavar="URL", help="the file to write")
    add_recipe_arguments(sources.add_parser("recipe", help="all sets of a recipe, under data.root"))


def run(arguments: argparse.Namespace) -> int:
    if arguments.source == "recipe":
        config = recipe_config(arguments)
        if not config.prepare:
            raise ConfigError(f"{arguments.recipe} names no set to make: its `prepare` is empty")
        with stage(config.run_dir, "prepare"):
            prepare_recipe(config)
        return 0
    if arguments.source == "vocabulary":
        same = [group.split(",") for group in arguments.same]
        ids = vocabulary_of(map(open_shard_set, arguments.shards), same)
        write_vocabulary(arguments.out, ids)
        number = len(set(ids.values()))
        print(f"{arguments.out}: {len(ids)} names of {number} categories")  # noqa: T201
        return 0
    if arguments.source == "answers":
        list_answers(arguments.shards, arguments.least, arguments.out)
        return 0
    use_cluster(arguments.address)
    if arguments.source == "webdataset" and bool(arguments.out) == arguments.index_only:
        raise ConfigError("give either --out, for a copy, or --index-only, which makes none")
    options = PrepareConfig(
        **_given(arguments, PrepareConfig), clean=CleanConfig(**_given(arguments, CleanConfig))
    )
    if arguments.source == "webdataset" and arguments.index_only:
        index_in_place(options, arguments.workers)
    else:
        prepare_set(arguments.out, options, workers=arguments.workers)
    return 0


def _given(arguments: argparse.Namespace, config: type) -> dict[str, Any]:
    """What the command line says of a configuration class."""
    values = {field.name: getattr(arguments, field.name, None) for field in fields(config)}
    given = {name: value for name, value in values.items() if value is not None}
    return {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}


def list_answers(urls: Iterable[str], least: int, out: str) -> None:
    """Write the answers that people agree on for at least `least` questions, frequent ones first.

    With 9 and the training and validation sets of VQAv2 it is the usual list (facts E.5).
    """
    counts: Counter[str] = Counter()
    for shard_set in map(open_shard_set, urls):
        check_shard_sizes(shard_set)
        for _, found in every_shard(shard_set, agreed_answers, "read"):
            counts.update(found)
    answers = sorted(counts, key=lambda answer: (-counts[answer], answer))
    chosen = [answer for answer in answers if counts[answer] >= least]
    if not chosen:
        most = f"at most {counts[answers[0]]}" if answers else "no"
        raise DataError(f"{most} questions agree on an answer; choose other sets or --least")
    write_answers(out, chosen)
    share = sum(counts[answer] for answer in chosen) / counts.total()
    print(  # noqa: T201 - the answer of the command
        f"{out}: {len(chosen)} answers, which {share:.1%} of {counts.total()} questions agree on"
    )


def agreed_answers(shard_set: ShardSet, number: int) -> Counter[str]:
    """How many questions of a shard people answer so, by the answer that most of them give."""
    records = records_of(shard_set, number, 0, shard_set.shards[number].samples)
    questions = (q for r in records if not isinstance(r, BadSample) for q in r.questions)
    agreed = (agreed_answer(question.answers) for question in questions)
    return Counter(answer for answer in agreed if answer is not None)


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
    source = open_source(options)
    plan = {
        "source": options.source,
        "samples_per_shard": samples_per_shard,
        "content": source.content | clean_plan(options.clean),
    }
    done = _done_or_begun(url, plan)
    if done is not None:
        return done
    workers = _worker_count(source, url, workers)
    shards = _shards(source, url, options, samples_per_shard, workers)
    shard_set = _complete(url, source, shards, plan)
    forget_looks(url)
    return shard_set


def index_in_place(options: PrepareConfig, workers: int | None = None) -> ShardSet:
    """Make existing webdataset tars a shard set where they are, as `prepare_set` would a copy."""
    if options.clean != CleanConfig():
        raise ConfigError("--index-only leaves nothing out by choice; make a copy with --out")
    source, url = open_source(options), options.root.rstrip("/")
    tars = tars_to_index(url)
    plan = {"source": "webdataset in place", "content": source.content}
    done = _done_or_begun(url, plan)
    if done is not None:
        return done
    workers = _worker_count(source, url, workers)
    make_indexer = partial(tar_indexer, url, options.caption_field)
    indexed = dict(_mapped(make_indexer, tars, workers, f"index {url.rsplit('/', 1)[-1]}"))
    return _complete(url, source, [indexed[tar] for tar in tars], plan)


def _done_or_begun(url: str, plan: dict[str, Any]) -> ShardSet | None:
    """The set if it is complete; else None, once it is noted what is being made there."""
    if storage.exists(storage.join(url, MANIFEST)):
        shard_set = open_shard_set(url)
        _check_same(url, shard_set.info.get("plan"), plan)
        check_shard_sizes(shard_set)
        print(f"{url}: {shard_set.samples} samples are there already")  # noqa: T201
        return shard_set
    if not storage.create_once(storage.join(url, PLAN), storage.canonical_json(plan)):
        _check_same(url, _begun(url), plan)
    return None


def _complete(url: str, source: Source, shards: list[ShardInfo], plan: dict[str, Any]) -> ShardSet:
    """Write the manifest and say what was made."""
    info = {"plan": plan, "licence": source.licence, **source.info, **summed(shards)}
    if not info["totals"]["samples"]:
        counts, first = info["counts"], info["first"]
        reasons = ", ".join(f"{number} {code}: {first[code]}" for code, number in counts.items())
        raise DataError(f"{url}: no usable sample in the source ({reasons or 'it is empty'})")
    filled = [shard for shard in shards if shard.samples]
    shard_set = write_manifest(url, filled, source.categories, info)
    print(closing_table(shard_set))  # noqa: T201 - the answer of the command
    return shard_set


def _shards(
    source: Source, url: str, options: PrepareConfig, samples_per_shard: int, workers: int
) -> list[ShardInfo]:
    """Every shard of the set in order, written where it is not there yet."""
    name = url.rstrip("/").rsplit("/", 1)[-1]
    rules = options.clean
    excluded = Looks(rules.look_distance)
    unwanted = shards_of(rules.exclude)
    for _, hashes in _mapped(lambda: hashes_of_shard, unwanted, workers, "hash excluded images"):
        for value in hashes:
            excluded.add(value)
    cleaner = Cleaner(source.record, rules, excluded)
    todo = chunks(source, samples_per_shard)
    if rules.duplicates:
        make_noter = partial(looks_noter, url, cleaner)
        _exhaust(_mapped(make_noter, todo, workers, f"compare {name}", source.total))
        todo = without_repeated(url, chunks(source, samples_per_shard), rules.look_distance)
    make_writer = partial(chunk_writer, url, cleaner)
    done = _mapped(make_writer, todo, workers, f"prepare {name}", source.total)
    finished = {chunk.number: shard for chunk, shard in done}
    return [finished[number] for number in sorted(finished)]


def _mapped(
    make_worker: Any, items: Iterable[Any], workers: int, shown: str, rows: int | None = None
) -> Iterator[tuple[Any, Any]]:
    """The worker's results with a progress bar, which counts rows where items are chunks."""
    if workers:
        done = map_on_ray(make_worker, items, num_actors=workers)
    else:
        done = map_in_process(make_worker, items)
    progress = None
    try:
        for item, result in done:
            if progress is None:  # after Ray has said what it has to say
                progress = bar(rows, shown, "row" if isinstance(item, Chunk) else "shard")
            progress.update(len(item.rows) if isinstance(item, Chunk) else 1)
            yield item, result
    finally:
        if progress is not None:
            progress.close()


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
    lines = [
        f"{shard_set.url}: {totals['samples']} samples, {totals['boxes']} boxes, "
        f"{totals['phrases']} phrases, {len(shard_set.shards)} shards, {size:.1f} MB"
    ]
    for code, number in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        unit, meaning = REASONS[code]
        what = f"{unit} left out" if unit != "kept" else "kept"
        lines.append(f"  {number:7d}  {what:15s}  {code:22s} {meaning}; first: {first[code]}")
    return "\n".join(lines)


def _begun(url: str) -> Any:
    try:
        return json.loads(storage.read_bytes(storage.join(url, PLAN)))
    except ValueError:
        return None


def _check_same(url: str, found: Any, wanted: dict[str, Any]) -> None:
    """DataError that says which settings differ."""
    found = found if isinstance(found, dict) else {}
    before, after = _flat(found), _flat(wanted)
    changed = [name for name in after if before.get(name) != after[name]]
    if changed:
        differences = "; ".join(f"{n}: {before.get(n, '-')} there, {after[n]} now" for n in changed)
        raise DataError(
            f"{url} was made with other settings ({differences}); "
            "choose another --out, or delete that folder first"
        )


def _flat(plan: dict[str, Any]) -> dict[str, Any]:
    content = plan.get("content")
    return {**plan, "content": "", **(content if isinstance(content, dict) else {})}
