"""glipv2 label --dry-run: what would be done and, from a timed sample, how long it would take."""

import time
from collections.abc import Sequence
from dataclasses import replace

from glipv2.jobs.label import open_labeller
from glipv2.jobs.label_plan import DECIDING, Plan, committed, make_plan
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.shard_format import ShardSet

SAMPLE = 64
"""Pairs that are timed, after as many that warm the teacher up."""
HOUR = 3600.0


def print_estimate(config: RunConfig, price: float) -> int:
    """Print the plan; `price` is what a worker costs per hour. Output sets are not touched.

    A threshold that is to be calibrated is chosen, and kept for the labelling itself.
    """
    from glipv2.pipeline.shard_reader import open_shard_set

    plan = make_plan(config)
    lines = [f"teacher: {', '.join((plan.settings.teacher, *plan.settings.ensemble))}"]
    lines += [f"{key}: {plan.deciding[key]}" for key in (*DECIDING, "parser")]
    sample, left = None, 0
    for source, target in plan.settings.inputs.items():
        pairs, out = open_shard_set(config.set_url(source)), config.set_url(target)
        done = list(committed(out, (shard.name for shard in pairs.shards)))
        waiting = [s for s, there in zip(pairs.shards, done, strict=True) if there is None]
        left += sum(shard.samples for shard in waiting)
        lines.append(
            f"{source} -> {out}: {pairs.samples} pairs in {len(done)} shards, of which "
            f"{len(done) - len(waiting)} are done"
        )
        sample = sample or (pairs if waiting else None)
    lines += _cost(plan, sample, left, price) if sample else ["nothing is left to do"]
    print("\n".join(lines))  # noqa: T201 - the answer of the command
    return 0


def _cost(plan: Plan, sample: ShardSet, left: int, price: float) -> Sequence[str]:
    seconds, boxes, kept = _timed(plan, sample)
    hours = left * seconds / HOUR
    workers = plan.settings.num_actors[1]
    lines = [
        f"sample: {SAMPLE} pairs at {1 / seconds:.1f} a second on this machine, "
        f"{kept:.0%} kept, {boxes:.1f} boxes each",
        f"left: {left} pairs, {hours:.2f} worker hours, {hours / workers:.2f} hours with {workers} "
        "workers like this machine's",
    ]
    return [*lines, f"cost: {hours * price:.2f} at {price:g} an hour"] if price else lines


def _timed(plan: Plan, pairs: ShardSet) -> tuple[float, float, float]:
    """Seconds a pair, boxes a kept image, share of images kept, of the first pairs of a set."""
    from glipv2.data_prep.labelling import ShardTask, Tally

    settings = replace(plan.settings, window=SAMPLE)
    labeller = open_labeller(pairs, settings, plan.stamp)
    seconds = 0.0
    for _ in range(2):  # the first warms up
        tally, start = Tally(), time.perf_counter()
        for _ in labeller.records(ShardTask(number=0, last=SAMPLE), tally):
            pass
        seconds = time.perf_counter() - start
    counts = tally.counts
    images = counts["images"]
    return seconds / counts["pairs"], counts["boxes"] / max(images, 1), images / counts["pairs"]
