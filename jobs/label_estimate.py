"""glipv2 label --dry-run: what would be done and, from a timed sample, how long it would take."""

import time
from dataclasses import dataclass, replace

from glipv2.jobs.label import label_on_ray
from glipv2.jobs.label_plan import DECIDING, Plan, check_claim, make_plan
from glipv2.jobs.report_numbers import duration
from glipv2.jobs.stats import counted
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.shard_format import ShardSet

SAMPLE = 64
"""Pairs that are timed, after as many that warm the teacher up; fewer where a shard has fewer."""
HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a worker made of the first pairs of a set."""

    pairs: int
    images: int
    """Pairs that are kept."""
    boxes: int
    start_s: float
    """Until the worker was ready: Ray, the process, the teacher."""
    pair_s: float
    """Of each pair, once the worker is warm."""


def print_estimate(config: RunConfig, price: float, force: bool = False) -> int:
    """Print the plan; `price` is what a worker costs per hour. Output sets are not touched, and
    without `force` refused like by the labelling itself when they were begun with other settings.

    A threshold that is to be calibrated is chosen, and kept for the labelling itself.
    """
    from glipv2.pipeline.shards import committed_names, open_shard_set

    plan = make_plan(config, force)
    lines = [f"teacher: {', '.join((plan.settings.teacher, *plan.settings.ensemble))}"]
    lines += [f"{key}: {plan.deciding[key]}" for key in (*DECIDING, "parser")]
    if plan.gold:
        lines += [str(plan.gold), *filter(None, [plan.gold.missed])]
    unfinished = list[tuple[ShardSet, list[int]]]()
    for source, target in plan.settings.inputs.items():
        pairs, out = open_shard_set(config.set_url(source)), config.set_url(target)
        lines += filter(None, [check_claim(plan, pairs, out)])
        done = committed_names(out)
        left = [shard.samples for shard in pairs.shards if shard.name not in done]
        lines.append(
            f"{source} -> {out}: {counted(pairs.samples, 'pair')} in "
            f"{counted(len(pairs.shards), 'shard')}, of which "
            f"{len(pairs.shards) - len(left)} are done"
        )
        if sum(left):
            unfinished.append((pairs, left))
    if unfinished:
        sample = timed(plan, unfinished[0][0])
        lines += _cost(plan, sample, [left for _, left in unfinished], price)
    else:
        lines.append("nothing is left to do")
    print("\n".join(lines))  # noqa: T201 - the answer of the command
    return 0


def timed(plan: Plan, pairs: ShardSet) -> Sample:
    """On one worker, as the labelling itself has them."""
    from glipv2.data_prep.labelling import ShardTask

    number = next(n for n, shard in enumerate(pairs.shards) if shard.samples)
    task = ShardTask(number=number, last=min(SAMPLE, pairs.shards[number].samples))
    settings = replace(plan.settings, window=SAMPLE, num_actors=(1, 1))
    began, ends = time.monotonic(), list[float]()
    for _, found in label_on_ray(settings, pairs, [task, task]):  # the first warms up
        ends.append(time.monotonic())
        records = found
    warm, end = ends
    return Sample(
        pairs=task.last or 0,
        images=len(records),
        boxes=sum(len(record.regions) for record in records),
        start_s=max(0.0, (warm - began) - (end - warm)),
        pair_s=(end - warm) / (task.last or 1),
    )


def _cost(plan: Plan, sample: Sample, left: list[list[int]], price: float) -> list[str]:
    """`left` has the pairs of each set's shards that are to be done."""
    most, pairs = plan.settings.num_actors[1], sum(map(sum, left))
    workers = [min(most, len(shards)) for shards in left]
    work_s = pairs * sample.pair_s
    worker_s = work_s + sum(workers) * sample.start_s  # each set starts its own
    wall_s = sum(
        sample.start_s + sum(shards) * sample.pair_s / number
        for shards, number in zip(left, workers, strict=True)
    )
    lines = [
        f"sample: {sample.pairs} pairs at {1 / sample.pair_s:.1f} a second on one worker, "
        f"{sample.images / sample.pairs:.0%} kept, {sample.boxes / max(sample.images, 1):.1f} "
        "boxes each",
        f"start: {duration(sample.start_s)} until a worker is ready",
        f"left: {pairs} pairs, {duration(work_s)} of work for one worker; about "
        f"{duration(wall_s)} with {max(workers)} like this one, start included",
    ]
    if price:
        lines.append(f"cost: {worker_s / HOUR * price:.2f} at {price:g} an hour")
    return lines
