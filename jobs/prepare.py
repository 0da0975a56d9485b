"""glipv2 prepare SOURCE ... --out URL: turn a source into a shard set; or all sets of a recipe.

Run again with the same settings it reuses what is there; cut off, it goes on.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from glipv2.data_prep.reasons import REASONS, Dropped
from glipv2.data_prep.sources import Source, open_source
from glipv2.data_prep.toy import TOY_SETS
from glipv2.jobs.stages import add_recipe_arguments, recipe_config, stage
from glipv2.pipeline import storage
from glipv2.pipeline.config import PrepareConfig, RunConfig
from glipv2.pipeline.errors import ConfigError, DataError
from glipv2.pipeline.progress import progress
from glipv2.pipeline.records import Record
from glipv2.pipeline.shard_format import MANIFEST
from glipv2.pipeline.shards import ShardSet, check_shard_sizes, open_shard_set, write_shard_set

SAMPLES_PER_SHARD = 256
PLAN = "prepare.json"
"""What is being made in the folder, written first: a second command with other settings sees it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    toy = sources.add_parser("toy", help="rendered scenes of coloured shapes; all truth known")
    toy.add_argument("--set", required=True, choices=tuple(TOY_SETS))
    toy.add_argument("--count", type=int, required=True, help="number of images")
    toy.add_argument("--size", type=int, default=128, help="image side in pixels (default 128)")
    toy.add_argument("--hard", action="store_true", help="more, smaller objects, strong colours")
    toy.add_argument("--seed", type=int, default=0)
    voc = sources.add_parser("voc", help="PASCAL VOC: a folder of XML files, a folder of images")
    voc.add_argument("--annotations", required=True, metavar="FOLDER")
    voc.add_argument("--images", required=True, metavar="FOLDER")
    voc.add_argument("--list", default="", metavar="FILE", help="only these names, one a line")
    coco = sources.add_parser("coco", help="COCO: an instances JSON file, a folder of images")
    coco.add_argument("--annotations", required=True, metavar="FILE")
    coco.add_argument("--images", required=True, metavar="FOLDER")
    pairs = sources.add_parser(
        "pairs", help="images with texts: .jsonl, .csv, .tsv, or a .txt beside each image"
    )
    pairs.add_argument("--root", required=True, metavar="FOLDER_OR_FILE")
    for source in (toy, voc, coco, pairs):
        source.add_argument("--out", required=True, metavar="URL", help="folder of the shard set")
    add_recipe_arguments(sources.add_parser("recipe", help="all sets of a recipe, under data.root"))


def run(arguments: argparse.Namespace) -> int:
    if arguments.source == "recipe":
        config = recipe_config(arguments)
        if not config.prepare:
            raise ConfigError(f"{arguments.recipe} names no set to make: its `prepare` is empty")
        with stage(config.run_dir, "prepare"):
            prepare_recipe(config)
        return 0
    chosen = {k: v for k, v in vars(arguments).items() if k not in ("out", "command")}
    prepare_set(arguments.out, PrepareConfig(**chosen))
    return 0


def prepare_recipe(config: RunConfig) -> None:
    """Make every shard set that the recipe says how to make."""
    for name, options in config.prepare.items():
        prepare_set(config.set_url(name), options)


def prepare_set(
    url: str, options: PrepareConfig, samples_per_shard: int = SAMPLES_PER_SHARD
) -> ShardSet:
    """Make the shard set at `url`, or return it when it is there already.

    A folder that holds, or was begun with, other settings is a DataError: nothing is overwritten.
    """
    source = open_source(options)
    plan = {
        "source": options.source,
        "samples_per_shard": samples_per_shard,
        "content": source.content,
    }
    if storage.exists(storage.join(url, MANIFEST)):
        shard_set = open_shard_set(url)
        _check_same(url, shard_set.info.get("plan"), plan)
        check_shard_sizes(shard_set)
        print(f"{url}: {shard_set.samples} samples are there already")  # noqa: T201
        return shard_set
    if not storage.create_once(storage.join(url, PLAN), storage.canonical_json(plan)):
        _check_same(url, _begun(url), plan)
    info: dict[str, Any] = {"plan": plan, "licence": source.licence}
    records = _counted(source, url, info)
    shard_set = write_shard_set(url, records, source.categories, info, samples_per_shard)
    print(closing_table(shard_set))  # noqa: T201 - the answer of the command
    return shard_set


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


def _counted(source: Source, url: str, info: dict[str, Any]) -> Iterator[Record]:
    """The records; once the last one was taken, `info` holds the counts for the manifest."""
    dropped = Dropped()
    totals = Counter(samples=0, boxes=0, phrases=0)
    name = storage.join(url).rsplit("/", 1)[-1]
    for record in progress(source.records(dropped), source.total, f"prepare {name}"):
        totals["samples"] += 1
        totals["boxes"] += len(record.regions)
        totals["phrases"] += len({region.spans for region in record.regions if region.spans})
        yield record
    if not totals["samples"]:
        reasons = ", ".join(f"{number} {code}" for code, number in dropped.most_common())
        raise DataError(f"{url}: no usable sample in the source ({reasons or 'it is empty'})")
    info |= {"counts": dict(dropped), "first": dropped.first, "totals": dict(totals)}


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
