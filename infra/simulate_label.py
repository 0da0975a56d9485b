"""How long it takes to label millions of pairs on machines that fail: the driver is the real one.

    python infra/simulate_label.py                   24 million pairs on 64 GPUs
    python infra/simulate_label.py --rate 50 --shards 9600 --samples 2500

jobs/label.py and pipeline/ray_map.py run as they are, with what they read and write; only Ray below
them is simulated (simulated_ray.py), and workers take the time that `Setting` says. The same seed
gives the same figures.
"""

import argparse
import contextlib
import math
import multiprocessing
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from bench_measure import note, peak_memory
from simulated_ray import Cluster, DriverKilled

from glipv2.data_prep.labelling import KILLED, ShardTask
from glipv2.jobs.label import label_set
from glipv2.jobs.label_plan import Plan
from glipv2.pipeline import storage
from glipv2.pipeline.config import LabelConfig, RunConfig
from glipv2.pipeline.errors import MachinesLostError
from glipv2.pipeline.shard_format import MANIFEST, ShardInfo, shard_name, shard_url
from glipv2.pipeline.shards import commit_in_place, committed_shard, write_manifest

HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    shards: int = 2400
    samples: int = 10_000
    """Pairs of each shard."""
    gpus: int = 64
    """Machines with one GPU and room for one worker."""
    at_once: int = 64
    """Workers that are asked for at once: the first number of label.num_actors."""
    rate: float = 200.0
    """Pairs a second of one teacher."""
    spread: float = 0.1
    """Standard deviation of the logarithm of a shard's time."""
    start_s: float = 60.0
    """A worker's process and teacher."""
    commit_s: float = 5.0
    """Sending a shard and reading it back, while the teacher waits."""
    gpu_hours_per_failure: float = 3 * 16_384.0
    """Llama 3's: one interruption about every 3 hours on 16,384 GPUs; 0 is never."""
    preempted_every_h: float = 4.0
    """Hours that a spot machine is lent, on average; 0 is for ever."""
    replaced_after_s: float = 300.0
    driver_killed_at: float = 0.0
    """As a share of the ideal time; 0 is never."""
    driver_back_s: float = 60.0
    """Until the command runs again."""
    going_on_s: float = 0.1
    """Of the driver then, for each committed shard, before it starts workers."""
    unusable: float = 0.001
    """Share of pairs that are listed in the commit records as bad."""
    seed: int = 0

    @property
    def ideal_s(self) -> float:
        """All teachers at work all the time."""
        return self.shards * self.samples / self.rate / self.gpus

    @property
    def failures_per_s(self) -> float:
        """Of one machine."""
        hours = (self.gpu_hours_per_failure, self.preempted_every_h)
        return sum(1 / (HOUR * mean) for mean in hours if mean)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    setting: Setting
    makespan_s: float
    spent_s: dict[str, float]
    """GPU seconds: teacher and commit (of what was committed), lost, starting."""
    deaths: int
    """Of workers, with their machines."""
    runs: int
    """Of the command: 1, and again when the driver died or shards were given up."""
    commits: Counter[int]
    """Shard -> how often a worker wrote it."""
    manifest: dict[str, Any]
    manifest_bytes: int
    driver_cpu_s: float
    memory_mib: tuple[float, float]
    """Of the driver: before, and at most."""

    @property
    def efficiency(self) -> float:
        return self.setting.ideal_s / self.makespan_s

    @property
    def left_out(self) -> int:
        """Pairs that were taken for the cause of two deaths; here none is."""
        return int(self.manifest["info"]["counts"].get(KILLED, 0))

    def share(self, *kinds: str) -> float:
        """Of all GPU time."""
        spent = sum(self.spent_s[kind] for kind in kinds)
        return spent / (self.setting.gpus * self.makespan_s)


class SimulatedLabelling:
    """What the workers of `glipv2 label` do, in no time but the one that is written down."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.start_s = setting, setting.start_s
        rng = random.Random(setting.seed)
        times = [math.exp(rng.gauss(0, setting.spread)) for _ in range(setting.shards)]
        usual = setting.samples / setting.rate * setting.shards / sum(times)
        self.teacher_s = [usual * time for time in times]
        self.commits: Counter[int] = Counter()
        self.cpu_s = 0.0
        """Of writing the commit records, which a driver doesn't."""

    def seconds(self, task: ShardTask) -> dict[str, float]:
        return {
            "teacher": self.teacher_s[task.number],
            "commit": self.setting.commit_s,
        }

    def result(self, make_worker: Any, task: ShardTask) -> ShardInfo:
        """A real commit record, but for an index that says nothing; the tar is empty."""
        start = time.process_time()
        self.commits[task.number] += 1
        _, _, out, stamp = make_worker.args
        name, samples = shard_name(task.number), self.setting.samples
        Path(shard_url(out, name)).touch()
        stats = shard_stats(task, samples, self.setting.unusable, stamp)
        done = commit_in_place(out, name, [0] * samples, stats)  # type: ignore[list-item]
        self.cpu_s += time.process_time() - start
        return done


def shard_stats(
    task: ShardTask, samples: int, unusable: float, stamp: dict[str, str]
) -> dict[str, Any]:
    """As a worker's, with two phrases a pair and boxes for every other one."""

    def bad(positions: Iterable[int], *why: str) -> list[tuple[str, ...]]:
        return [(f"{task.number:05d}{position:04d}", *why) for position in positions]

    broken = range(round(samples * unusable))
    counts = {
        "pairs": samples,
        "images": samples // 2,
        "phrases": 2 * samples,
        "boxes": samples,
        "no_box": samples // 2,
        "no_phrase": samples // 100,
        "phrase_stop": samples // 100,
        "image_undecodable": len(broken),
        KILLED: len(task.skip),
    }
    listed = bad(broken, "image_undecodable", "broken data stream when reading image file")
    listed += bad(task.skip, KILLED, "two workers died on it")
    return {"counts": counts, "bad": listed, "input": storage.digest(""), **stamp}


def make_pairs(url: str, setting: Setting) -> None:
    """The manifest of the set that is to be labelled."""
    infos = [
        ShardInfo(
            name=shard_name(number),
            samples=setting.samples,
            bytes=50_000 * setting.samples,
            crc32c=f"{number:08x}",
            commit_crc32c=f"{number:08x}",
        )
        for number in range(setting.shards)
    ]
    write_manifest(url, infos, (), {})


def simulate(setting: Setting) -> Outcome:
    """Label all shards; the command is run again until it is through, as its user would."""
    work = SimulatedLabelling(setting)
    cluster = Cluster(
        work,
        setting.gpus,
        failures_per_s=setting.failures_per_s,
        replaced_after_s=setting.replaced_after_s,
        driver_dies_s=setting.driver_killed_at * setting.ideal_s or math.inf,
        seed=setting.seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        source, out = f"{folder}/pairs", f"{folder}/labelled"
        make_pairs(source, setting)
        label = LabelConfig(
            teacher="simulated",
            inputs={source: out},
            num_actors=(setting.at_once, setting.gpus),
            gpus_per_actor=1,
        )
        plan = Plan(
            config=RunConfig(run_dir=f"{folder}/run", label=label),
            settings=label,
            deciding=dict.fromkeys(("teacher", "parser"), storage.digest("simulated")),
        )
        before, start = peak_memory(), time.process_time()
        runs = run_until_through(plan, source, out, cluster, work)
        driver_cpu_s = time.process_time() - start - work.cpu_s
        manifest = Path(out, MANIFEST)
        return Outcome(
            setting=setting,
            makespan_s=cluster.now,
            spent_s=cluster.spent_s,
            deaths=cluster.deaths,
            runs=runs,
            commits=work.commits,
            manifest=storage.read_json(str(manifest)),
            manifest_bytes=manifest.stat().st_size,
            driver_cpu_s=driver_cpu_s,
            memory_mib=(before, peak_memory()),
        )


def run_until_through(
    plan: Plan, source: str, out: str, cluster: Cluster, work: SimulatedLabelling
) -> int:
    """How often the command was run."""
    runs, setting = 0, work.setting
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), cluster.installed():
        while True:
            runs += 1
            try:
                label_set(plan, source, out)
                return runs
            except (DriverKilled, MachinesLostError):
                cluster.pass_time(setting.driver_back_s + setting.going_on_s * len(work.commits))


def scenarios(base: Setting) -> dict[str, Setting]:
    reliable = replace(base, preempted_every_h=0.0)
    often = replace(base, preempted_every_h=base.preempted_every_h / 8)
    return {
        "nobody fails": replace(reliable, gpu_hours_per_failure=0.0),
        "failures as Llama 3's": reliable,
        f"spot machines, lent for {base.preempted_every_h:g} h": base,
        "  and the driver killed half way": replace(base, driver_killed_at=0.5),
        "  and one worker at first": replace(base, at_once=1),
        f"spot machines, lent for {often.preempted_every_h:g} h": often,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for one in fields(Setting):
        name = f"--{one.name.replace('_', '-')}"
        parser.add_argument(name, type=type(one.default), default=one.default)
    base = Setting(**vars(parser.parse_args()))
    note(f"{base.shards * base.samples} pairs, {base.gpus} GPUs", f"{base.ideal_s / 60:9.1f} min")
    for name, setting in scenarios(base).items():
        # a process of its own, whose memory is the driver's
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            show(name, process.submit(simulate, setting).result())
    show_sizes(base)


def show(name: str, outcome: Outcome) -> None:
    kinds = ("teacher", "commit", "lost", "starting")
    shares = "  ".join(f"{kind} {outcome.share(kind):.2%}" for kind in kinds)
    before, peak = outcome.memory_mib
    note(name, f"{outcome.makespan_s / 60:9.1f} min   {outcome.efficiency:6.3f} of the ideal")
    note("  GPU time", f"   {shares}")
    note("  deaths, runs of the command, innocent pairs left out",
         f"{outcome.deaths:9d} {outcome.runs:9d} {outcome.left_out:9d}")  # fmt: skip
    note("  the driver's CPU; its memory before and at most",
         f"{outcome.driver_cpu_s:9.1f} s {before:9.0f} {peak:9.0f} MiB")  # fmt: skip
    note("  the manifest", f"{outcome.manifest_bytes / 1e6:9.2f} MB")


def show_sizes(base: Setting) -> None:
    """Of what grows with the set: its manifest with more bad pairs, and its commit records."""
    stamp = dict.fromkeys(("teacher", "parser", "label_settings"), storage.digest(""))
    for share in (0.0, 0.01, 0.1):
        stats = shard_stats(ShardTask(number=0), base.samples, share, stamp)
        size = len(storage.canonical_json(stats)) * base.shards
        note(f"the manifest's stats with {share:.0%} bad pairs", f"{size / 1e6:9.2f} MB")
    with tempfile.TemporaryDirectory() as folder:
        name = shard_name(0)
        Path(shard_url(folder, name)).touch()
        members = {"jpg": (512, 48_211), "json": (49_664, 1_033)}
        index = [
            [f"{number:09d}", 51_200 * number, 51_200, f"{number:08x}", members]
            for number in range(base.samples)
        ]
        commit_in_place(folder, name, index, {})
        start = time.process_time()
        committed_shard(folder, name)
        taken = (time.process_time() - start) * base.shards
        size = Path(folder, "commits", f"{name}.json").stat().st_size
        note("a commit record; CPU of reading all to go on",
             f"{size / 1e6:9.2f} MB {taken:9.1f} s")  # fmt: skip


if __name__ == "__main__":
    main()
