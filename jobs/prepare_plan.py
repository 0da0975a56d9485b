"""What is being made in a folder is written there first: who comes with other settings sees it.

prepare.json holds the plan, which decides every byte of the set and is in dataset.json too, and as
`given` the options of whoever began, which only serve to say in words what differs.
"""

import json
from dataclasses import MISSING, fields
from typing import Any

from glipv2.data_prep.writing import DROPPED, LOOKS, forget
from glipv2.pipeline import storage
from glipv2.pipeline.config import CleanConfig, PrepareConfig
from glipv2.pipeline.config_loader import as_tree
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.shard_format import MANIFEST, ShardInfo, ShardSet, commit_url, shard_url
from glipv2.pipeline.shards import check_shard_sizes, open_shard_set

PLAN = "prepare.json"
COMMITS = "commits"
IN_PLACE = "webdataset in place"
FILES = {
    "annotations": "annotations",
    "categories": "categories",
    "exclude": "excluded sets",
    "files": "TSV files",
    "ids": "list of images",
    "images": "images",
    "labels": "labels",
    "names": "class names",
    "table": "table",
    "tars": "tars",
}
"""Content of a plan that stands for files by their digests, and what these are."""

DEFAULTS = {
    option.name: as_tree(option.default)
    for option in (*fields(PrepareConfig), *fields(CleanConfig))
    if option.default is not MISSING
}
"""What an option is where a plan doesn't name it: a plan without rules names none of them, and one
of an earlier version none that came later."""


def is_in_place(plan: Any) -> bool:
    """Whether it is the plan of an index beside tars that aren't ours to delete."""
    return isinstance(plan, dict) and plan.get("source") == IN_PLACE


def done_or_begun(url: str, plan: dict[str, Any], options: PrepareConfig) -> ShardSet | None:
    """The set if it is complete; else None, once it is noted what is being made there.

    DataError when something else is there, or was begun and has a committed shard.
    """
    given = _given(options)
    if storage.exists(storage.join(url, MANIFEST)):
        shard_set = open_shard_set(url)
        begun = _begun(url)
        _check_same(url, shard_set.info.get("plan"), plan, begun.get("given"), given)
        try:
            check_shard_sizes(shard_set)
        except DataError as error:
            raise DataError(f"{error}: `glipv2 check {url}` says how") from error
        return shard_set
    written = storage.canonical_json({**plan, "given": given})
    if storage.create_once(storage.join(url, PLAN), written):
        return None
    begun = _begun(url)
    if storage.list_names(storage.join(url, COMMITS)):
        _check_same(url, begun, plan, begun.get("given"), given)
    elif _differing(begun, plan):
        forget(url, LOOKS, DROPPED)
        storage.write_bytes(storage.join(url, PLAN), written)
    return None


def undo(url: str, shards: list[ShardInfo], plan: dict[str, Any]) -> None:
    """Remove shards without a sample, so that they are in nobody's way; never a tar of others."""
    for shard in shards:
        storage.delete(commit_url(url, shard.name))
        if not is_in_place(plan):
            storage.delete(shard_url(url, shard.name))


def check_all_ours(url: str, shards: list[ShardInfo], plan: dict[str, Any]) -> None:
    """DataError when another `glipv2 prepare` wrote shards of another plan in the meantime."""
    mine = storage.digest(plan)
    others = [shard.name for shard in shards if shard.stats.get("plan", mine) != mine]
    if others:
        raise DataError(
            f"{url}: {others[0]} was made by another command with other settings, which ran at the "
            f"same time; {_way_out(plan)}"
        )


def _given(options: PrepareConfig) -> dict[str, Any]:
    """The options that are not as by default, paths among them."""
    named = [(f, getattr(options, f.name)) for f in fields(options) if f.name != "clean"]
    named += [(f, getattr(options.clean, f.name)) for f in fields(options.clean)]
    return {f.name: as_tree(value) for f, value in named if value != f.default}


def _begun(url: str) -> dict[str, Any]:
    """What prepare.json says; empty when it is absent or damaged."""
    try:
        found = json.loads(storage.read_bytes(storage.join(url, PLAN)))
    except (storage.MissingFileError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_same(url: str, there: Any, wanted: dict[str, Any], given_there: Any, given: Any) -> None:
    """DataError that says which settings and paths differ."""
    there = there if isinstance(there, dict) else {}
    before, now = _flat(there), _flat(wanted)
    names = _differing(there, wanted)
    if not names:
        return
    differences = [_difference(name, before, now) for name in names if name not in FILES]
    differences += [f"not the same {FILES[name]}" for name in names if name in FILES]
    if isinstance(given_there, dict):
        paths = {*given_there, *given} - ({*before, *now} - FILES.keys())
        differences += [
            _difference(name, given_there, given)
            for name in sorted(paths)
            if _value(name, given_there) != _value(name, given)
        ]
    raise DataError(
        f"{url} was made with other settings ({'; '.join(differences)}); {_way_out(there, wanted)}"
    )


def _way_out(*plans: dict[str, Any]) -> str:
    if any(map(is_in_place, plans)):
        files = f"{MANIFEST}, {PLAN} and the folder {COMMITS}"
        return f"to index it anew, delete {files} there, but no tar"
    return "choose another --out, or delete that folder first"


def _difference(name: str, there: dict[str, Any], now: dict[str, Any]) -> str:
    return f"{name}: {_shown(_value(name, there))} there, {_shown(_value(name, now))} now"


def _value(name: str, settings: dict[str, Any]) -> Any:
    return settings.get(name, DEFAULTS.get(name))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "not set" if value in (None, "") else str(value)


def _differing(there: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    before, now = _flat(there), _flat(wanted)
    if before.get("source") != now.get("source"):
        return ["source"]  # nothing else can be compared
    return [name for name in {**now, **before} if _value(name, before) != _value(name, now)]


def _flat(plan: dict[str, Any]) -> dict[str, Any]:
    """Plan and content side by side."""
    content = plan.get("content")
    inner = content if isinstance(content, dict) else {}
    return {k: v for k, v in plan.items() if k not in ("content", "given")} | inner
