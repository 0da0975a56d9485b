"""glipv2 label RECIPE: image-text pairs -> grounded shards, one output shard per input shard."""

import argparse
import logging
import socket
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from glipv2.jobs.stages import add_recipe_arguments, recipe_config, stage, use_cluster
from glipv2.pipeline import storage
from glipv2.pipeline.config import LabelConfig, RunConfig
from glipv2.pipeline.errors import BadSample, ConfigError, MachinesLostError, PoisonItemError
from glipv2.pipeline.lease import exclusive
from glipv2.pipeline.progress import say
from glipv2.pipeline.quarantine import quarantine_line

if TYPE_CHECKING:
    from glipv2.data_prep.labelling import ShardLabeller, ShardTask
    from glipv2.jobs.label_plan import Plan
    from glipv2.pipeline.records import Record
    from glipv2.pipeline.shard_format import ShardInfo, ShardSet
    from glipv2.pipeline.worker_notes import Watch

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser, phase="a phase of the recipe", cluster=True)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be done and, from a timed sample, how long it would take",
    )
    parser.add_argument(
        "--price", type=float, default=0.0, help="with --dry-run: what a worker costs per hour"
    )
    parser.add_argument(
        "--gc",
        action="store_true",
        help="only remove what killed workers left behind in the output sets",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="go on with output sets that were begun with other settings: their shards stay",
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.recipe == "audit":
        from glipv2.jobs.audit import print_audit

        return print_audit(arguments.overrides)
    if arguments.price and not arguments.dry_run:
        raise ConfigError("--price is for --dry-run, which says what the labelling would cost")
    if arguments.gc and arguments.dry_run:
        raise ConfigError("--gc removes files, --dry-run must touch none: give one of them")
    use_cluster(arguments.address)
    config = recipe_config(arguments, arguments.phase)
    if arguments.gc:
        with exclusive(storage.join(config.run_dir, "labels")):
            return collect_garbage(config)
    if arguments.dry_run:
        from glipv2.jobs.label_estimate import print_estimate

        return print_estimate(config, arguments.price, arguments.force)
    with stage(config.run_dir, "label"):
        print(label(config, arguments.force))  # noqa: T201 - the answer of the command
    return 0


def label(config: RunConfig, force: bool = False) -> str:
    """Label every set of `label.inputs` with the teacher; finished shards are never redone, and
    with `force` stay also where they were made with other settings.

    Returns what became of each set, to be shown. A set of which shards were given up is an error,
    once all others are done.
    """
    from glipv2.jobs.label_plan import check_claims, make_plan

    folder, unusable, said = storage.join(config.run_dir, "labels"), list[bytes](), list[str]()
    listed = storage.join(folder, "quarantine.jsonl")
    given_up = list[PoisonItemError | MachinesLostError]()
    with exclusive(folder):
        plan = make_plan(config, force)
        if plan.gold:
            said.append(str(plan.gold))
            if plan.gold.missed:
                log.warning(plan.gold.missed)
        check_claims(plan)
        for source, target in plan.settings.inputs.items():
            try:
                shards, closing_lines = label_set(plan, source, config.set_url(target))
            except (PoisonItemError, MachinesLostError) as error:
                given_up.append(type(error)(f"{source}: {error}"))
                continue
            said.append(closing_lines)
            for shard in shards:
                unusable += _quarantined(source, shard)
            storage.write_bytes(listed, b"".join(unusable))
    if unusable:
        log.warning("%d pairs can't be used; they are listed in %s", len(unusable), listed)
    if given_up:
        for lines in said:
            say(lines)
        # what needs its user comes before what can be run again as it is
        raise min(given_up, key=lambda error: isinstance(error, MachinesLostError))
    return "\n".join(said)


def label_set(plan: "Plan", source: str, out: str) -> "tuple[list[ShardInfo], str]":
    """One set of pairs -> one labelled set with the same shard names; its shards, and what to say.

    Warns where no pair got a box.
    """
    from glipv2.data_prep.labelling import ShardTask
    from glipv2.jobs.label_plan import check_made_so, claim, committed
    from glipv2.jobs.label_report import Shown, why_no_box
    from glipv2.pipeline.shard_reader import open_shard_set
    from glipv2.pipeline.shards import write_manifest

    pairs = open_shard_set(plan.config.set_url(source))
    shards = list(committed(out, (shard.name for shard in pairs.shards)))
    claimed = claim(plan, pairs, out, complete=None not in shards)
    known = storage.join(plan.config.run_dir, "labels", "killers.json")
    killers = Killers(known, pairs.digest)
    todo = [
        ShardTask(number=number, skip=killers.of(number))
        for number, done in enumerate(shards)
        if done is None
    ]
    done = [shard for shard in shards if shard is not None]
    for shard in done:
        check_made_so(claimed, out, shard)
    workers = min(len(todo), plan.settings.num_actors[1])
    with closing(Shown(source, pairs.samples, done, workers)) as shown:
        for task, shard in label_on_ray(
            plan.settings, pairs, todo, out, plan.stamp, killers, shown.watch
        ):
            check_made_so(claimed, out, shard)
            shards[task.number] = shard
            shown.update(task.number, shard)
    finished = [shard for shard in shards if shard is not None]
    counts = dict(shown.totals.counts)
    info = {"source": source, "input": pairs.digest, **claimed.stamp, "counts": counts}
    write_manifest(out, finished, (), info)
    if why := why_no_box(shown.totals, pairs.url, out, plan.settings):
        log.warning(why)
    return finished, shown.closing_lines(out)


def label_on_ray(  # noqa: PLR0913 (each may be left out)
    settings: LabelConfig,
    pairs: "ShardSet",
    tasks: "Iterable[ShardTask]",
    out: str | None = None,
    stamp: dict[str, str] | None = None,
    killers: "Killers | None" = None,
    watch: "Watch | None" = None,
) -> "Iterator[tuple[ShardTask, Any]]":
    """Label shards on the workers that the settings ask for, in the order they finish.

    With `out` each is committed there and its ShardInfo returned; without, its records, of which
    the image bytes are left out. `watch` hears how far the workers are (`labelling.InHand`).
    """
    from glipv2.pipeline.ray_map import map_on_ray

    least, most = settings.num_actors
    return map_on_ray(
        partial(_Worker, pairs.url, settings, out, stamp or {}),
        tasks,
        num_actors=most,
        min_actors=least,
        gpus_per_actor=settings.gpus_per_actor,
        cpus_per_actor=settings.cpus_per_actor,
        after_kill=(killers or Killers()).after_kill,
        watch=watch,
    )


def open_labeller(
    pairs: "ShardSet", settings: LabelConfig, stamp: dict[str, str]
) -> "ShardLabeller":
    """The labeller that the settings ask for, on this process's device.

    ConfigError where teacher or parser are others here than those of the stamp, if there is one.
    """
    import torch

    from glipv2.data_prep.labelling import ShardLabeller
    from glipv2.data_prep.phrases import load_parser
    from glipv2.data_prep.teachers import load_teacher
    from glipv2.pipeline.dist import local_device
    from glipv2.pipeline.worker_notes import note

    torch.set_num_threads(1)
    if stamp:
        check_same_here(settings, stamp)
    names = (settings.teacher, *settings.ensemble)
    teacher = load_teacher(names, local_device(), settings.precision)
    return ShardLabeller(pairs, teacher, load_parser(settings.phrases), settings, stamp, note)


def check_same_here(settings: LabelConfig, stamp: dict[str, str]) -> None:
    """ConfigError where teacher or parser are of another version here than the stamp says."""
    from glipv2.jobs.label_plan import stamp_of, what_decides

    here = what_decides(settings)
    if (found := stamp_of(here)) == stamp:
        return
    wrong = f"a glipv2 (labels of version {here['version']})"
    if found["parser"] != stamp["parser"]:
        wrong = f"a parser ({here['parser']})"
    if found["teacher"] != stamp["teacher"]:
        names = ", ".join((settings.teacher, *settings.ensemble))
        wrong = f"a teacher ({names}: {found['teacher']} instead of {stamp['teacher']})"
    raise ConfigError(
        f"{socket.gethostname()} has {wrong} of another version than the machine that began this "
        "labelling: bring all machines to one, or name a teacher that all of them read"
    )


class _Worker:
    """Loads the teacher once, then labels shard after shard."""

    def __init__(
        self, pairs_url: str, settings: LabelConfig, out: str | None, stamp: dict[str, str]
    ) -> None:
        from glipv2.pipeline.shard_reader import open_shard_set

        self.pairs, self.out, self.stamp = open_shard_set(pairs_url), out, stamp
        self.labeller = open_labeller(self.pairs, settings, stamp)

    def __call__(self, task: "ShardTask") -> "ShardInfo | list[Record]":
        from glipv2.data_prep.labelling import Tally
        from glipv2.pipeline.shards import write_shard

        tally = Tally()
        records = self.labeller.records(task, tally)
        if self.out is None:
            return [replace(record, image=b"") for record in records]
        stats: dict[str, Any] = {
            "counts": tally.counts,
            "bad": tally.bad,
            "input": self.pairs.digest,
            **self.stamp,
        }

        def all_records() -> "Iterator[Record]":
            yield from records
            stats["best_score"] = tally.best_score

        return write_shard(self.out, self.pairs.shards[task.number].name, all_records(), stats)


class Killers:
    """Pairs of one set that workers died on; with a URL, kept there for the next run.

    Kept by the set's digest: made again, a set may have innocent pairs in their places.
    """

    def __init__(self, url: str = "", digest: str = "") -> None:
        self.url, self.digest = url, digest
        self.positions: dict[str, list[int]] = (
            storage.read_json(url) if url and storage.exists(url) else {}
        )

    def of(self, number: int) -> tuple[int, ...]:
        """Positions in the shard."""
        return tuple(self.positions.get(f"{self.digest}/{number}", ()))

    def after_kill(self, task: "ShardTask", kills: int, last_note: Any) -> "ShardTask | None":
        """`labelling.after_kill`, remembering whom it leaves out."""
        from glipv2.data_prep.labelling import after_kill

        again = after_kill(task, kills, last_note)
        if again is not None and again.skip != task.skip:
            self.positions[f"{self.digest}/{task.number}"] = list(again.skip)
            if self.url:
                storage.write_json(self.url, self.positions)
        return again


def _quarantined(source: str, shard: "ShardInfo") -> Iterator[bytes]:
    for key, reason, detail in shard.stats.get("bad", []):
        yield quarantine_line(source, shard.name, key, BadSample(reason, detail))


def collect_garbage(config: RunConfig) -> int:
    """Remove attempts that killed workers left in the output sets; committed shards stay."""
    from glipv2.pipeline.shards import remove_attempts

    for target in config.label.inputs.values():
        out = config.set_url(target)
        removed, spared = remove_attempts(out)
        young = f"; {spared} are younger than an hour and stay until then" if spared else ""
        print(f"{out}: {removed} leftover attempts removed{young}")  # noqa: T201 - the answer
    return 0
