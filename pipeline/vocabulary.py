"""Which categories of different shard sets are the same: one file, made once, edited by hand.

    {"schema": 1, "ids": {"person": 0, "human": 0, "tv": 1, "television": 1, ...}}

Names with one id are one category: a label of one set then counts for the others' words too (label
propagation, facts B.4), and none is drawn as a negative of the other (facts C.4).
"""

from collections.abc import Collection, Iterable
from difflib import get_close_matches

from glipv2.model.prompts import clean_category
from glipv2.pipeline import storage
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.shard_format import ShardSet

SCHEMA = 1


def equal_names(names: Iterable[str]) -> dict[str, int]:
    """Cleaned name -> id, a category for each."""
    return {name: number for number, name in enumerate(sorted(set(names)))}


def vocabulary_of(sets: Iterable[ShardSet], same: Iterable[Collection[str]] = ()) -> dict[str, int]:
    """Cleaned name -> id over all sets; each group of `same` gets one id.

    DataError for a name of `same` that no set has, and for one that is in two groups.
    """
    names = {clean_category(name) for shard_set in sets for name in shard_set.categories}
    leader = {name: name for name in names}
    grouped: set[str] = set()
    for group in same:
        members = [clean_category(name) for name in group]
        for name in members:
            if name not in names:
                near = ", ".join(get_close_matches(name, sorted(names), cutoff=0.5))
                hint = f"the nearest there are {near}" if near else "check its spelling"
                raise DataError(f"no set has the category {name!r}; {hint}")
            if name in grouped:
                raise DataError(f"the category {name!r} is in two groups; join them into one")
        grouped.update(members)
        leader.update(dict.fromkeys(members, min(members)))
    numbers = equal_names(leader.values())
    return {name: numbers[leader[name]] for name in sorted(names)}


def write_vocabulary(url: str, ids: dict[str, int]) -> None:
    storage.write_json(url, {"schema": SCHEMA, "ids": ids})


def read_vocabulary(url: str, names: Collection[str]) -> dict[str, int]:
    """The ids of these cleaned names; DataError when the file is damaged or lacks one of them."""
    document = storage.read_json(url)
    ids = document.get("ids") if isinstance(document, dict) else None
    if not isinstance(ids, dict) or document.get("schema") != SCHEMA:
        raise DataError(f"{url} is no vocabulary; make it with `glipv2 prepare vocabulary`")
    if any(type(number) is not int or number < 0 for number in ids.values()):
        raise DataError(f"{url}: every id must be a whole number of 0 or more")
    lacking = sorted(set(names) - set(ids))
    if lacking:
        raise DataError(
            f"{url} lacks {len(lacking)} categories of the mixture, the first is {lacking[0]!r}: "
            "make it again with `glipv2 prepare vocabulary` from all sets, or add them by hand"
        )
    return {name: ids[name] for name in names}
