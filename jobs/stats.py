"""glipv2 stats: what a whole shard set holds, in figures."""

import argparse
from collections.abc import Iterator

from glipv2.jobs.card_text import plain_text
from glipv2.jobs.every_shard import add_workers_argument, every_shard
from glipv2.jobs.labelled import Making, making_of
from glipv2.jobs.survey import TALLIES, Survey, Tally, survey_shard
from glipv2.pipeline import storage
from glipv2.pipeline.shard_format import ShardSet
from glipv2.pipeline.shard_reader import check_shard_sizes, open_shard_set

TOP = 15
BAR = 30
"""Characters of the longest bar."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `glipv2 stats`."""
    parser.add_argument("shards", help="folder URL of a shard set (holds dataset.json)")
    parser.add_argument("--json", metavar="FILE", help="write all figures and histograms there too")
    add_workers_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print the figures."""
    shard_set = open_shard_set(args.shards)
    survey = survey_set(shard_set, args.workers)
    if args.json:
        storage.write_json(
            args.json, {"url": args.shards, **set_size(shard_set), **survey.figures()}
        )
    print("\n".join(_lines(shard_set, survey, making_of(shard_set))))  # noqa: T201 - the answer of the command
    return 0


def survey_set(shard_set: ShardSet, workers: int | None = None) -> Survey:
    """The figures of every sample of a set."""
    check_shard_sizes(shard_set)
    survey = Survey()
    for _, part in every_shard(shard_set, survey_shard, "read", workers):
        survey.merge(part)
    return survey


def set_size(shard_set: ShardSet) -> dict[str, int]:
    """Shards and bytes."""
    shards = shard_set.shards
    return {"shards": len(shards), "bytes": sum(shard.bytes for shard in shards)}


def byte_text(size: float) -> str:
    """`12.3 MB`."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


def counted(number: int, one: str, many: str = "") -> str:
    """`1 shard`, `2,000 shards`; `many` where it isn't `one` with an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _lines(shard_set: ShardSet, survey: Survey, making: Making) -> Iterator[str]:
    size = set_size(shard_set)
    yield f"samples     {shard_set.samples:,}"
    yield f"shards      {size['shards']:,}, {byte_text(size['bytes'])}"
    yield f"tasks       {_listed(survey.tasks.most_common())}"
    yield f"sources     {_listed(survey.sources.top(5))}"
    if survey.boxes.total:
        areas = _listed(survey.areas.most_common())
        yield f"boxes       {survey.boxes.total:,.0f}: {areas} (by area, as COCO)"
        yield f"masks       {survey.masks:,}"
    else:
        yield "boxes       none"
    for name, number in survey.texts.items():
        yield f"{name:12}{number:,}"
    if making.find and (total := survey.phrases.total).times:
        yield f"phrases     {total.times:,} in the captions, {total.share:.1%} with a box"
    if making.why_not:
        yield f"phrases     only those with a box are counted: {plain_text(making.why_not)}"
    if survey.unreadable:
        listed = _listed(survey.unreadable.most_common())
        yield f"unreadable  {listed}; `glipv2 check {shard_set.url}` lists them"
    yield ""
    heads = ("number", "mean", "min", "p10", "median", "p90", "max")
    yield " " * 24 + "".join(f"{head:>9}" for head in heads)
    for name, text in TALLIES.items():
        tally = getattr(survey, name)
        if tally.count:
            yield f"{text:24}" + "".join(f"{value:>9}" for value in _row(tally))
    yield from _top_names(survey)
    yield from _top_phrases(survey, making)


def _row(tally: Tally) -> list[str]:
    spread = [tally.low, *(tally.quantile(share) for share in (0.1, 0.5, 0.9)), tally.high]
    return [f"{tally.count:,}", f"{tally.mean:.4g}", *(f"{value:.4g}" for value in spread)]


def _top_names(survey: Survey) -> Iterator[str]:
    top = survey.names.top(TOP)
    if not top:
        return
    error = f", each count at most {survey.names.error:,} too low" if survey.names.error else ""
    yield f"\nmost frequent of {len(survey.names.counts):,} names of boxes{error}"
    for name, count in top:
        shown = plain_text(name)[:24].replace("\n", " ")
        yield f"  {shown:24}{count:>11,}  {'█' * max(1, round(BAR * count / top[0][1]))}"


def _top_phrases(survey: Survey, making: Making) -> Iterator[str]:
    top = survey.phrases.top(TOP)
    if not top:
        return
    kept = f"{'with a box':>12}" if making.find else ""
    yield f"\n{'most frequent phrases':26}{'times':>11}{kept}{'mean score':>12}"
    for name, outcome in top:
        shown = plain_text(name)[:24].replace("\n", " ")
        share = f"{outcome.share:>12.0%}" if making.find else ""
        score = f"{outcome.score:>12.3f}" if outcome.boxes else f"{'-':>12}"
        yield f"  {shown:24}{outcome.times:>11,}{share}{score}"


def _listed(counted: list[tuple[str, int]]) -> str:
    return ", ".join(f"{plain_text(name)} {count:,}" for name, count in counted) or "none"
