"""glipv2 adapt RECIPE: tune a model to sets, in every way, with few examples or all, and compare.

Every cell (set x way x shots x seed) is a run of its own, RUN/SET/WAY/3-shot/seed-30, trained and
scored by one Ray worker. Subsets are drawn before, into RUN/subsets; RUN/adapt.json has the result.
"""

import argparse
import dataclasses
import math
from collections.abc import Iterator
from statistics import fmean, stdev
from typing import Any

from glipv2.data_prep.few_shot import LEAST, few_shot_set
from glipv2.jobs.adapt_cell import ZERO_SHOT, Cell, Tuner, shots_name
from glipv2.jobs.evaluate_suites import open_suite
from glipv2.jobs.pretrain import check_mixture
from glipv2.jobs.stages import add_recipe_arguments, recipe_config, use_cluster
from glipv2.pipeline import storage
from glipv2.pipeline.adapt_config import AdaptSetConfig
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.progress import progress, say
from glipv2.pipeline.shard_format import ShardSet
from glipv2.pipeline.shard_reader import open_shard_set

RESULT = "adapt.json"
AVERAGE = "average"
"""Row of the mean over all sets, as ODinW reports it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser, cluster=True)
    parser.add_argument("--set", action="append", help="only this one of adapt.sets; repeatable")


def run(arguments: argparse.Namespace) -> int:
    use_cluster(arguments.address)
    config = recipe_config(arguments)
    ways = config.adapt.ways or tuple(config.phases)
    own = {way: recipe_config(arguments, way) for way in ways} or {config.train.tune: config}
    cells = plan(config, own, arguments.set)
    results = adapt(config, cells)
    print(table(results))  # noqa: T201 - the answer of the command
    failed = [result for result in results if "error" in result]
    for result in failed:
        say(f"failed: {result['run']}: {result['error']}")
    return 1 if failed else 0


def plan(
    config: RunConfig, ways: dict[str, RunConfig], only: list[str] | None = None
) -> list[Cell]:
    """All cells, after drawing their subsets; ConfigError or DataError for what can't be run.

    `ways` has the configuration of each way of tuning.
    """
    names = only or list(config.adapt.sets)
    if not names:
        raise ConfigError("nothing to adapt to: set adapt.sets")
    cells = []
    for name in names:
        if name not in config.adapt.sets:
            known = ", ".join(config.adapt.sets) or "none"
            raise ConfigError(f"adapt.sets has no {name!r}; it has: {known}")
        cells += list(_cells(config, ways, name))
    return cells


def _cells(config: RunConfig, ways: dict[str, RunConfig], name: str) -> Iterator[Cell]:
    own = config.adapt.sets[name]
    for suite in filter(None, (own.suite, own.val)):
        if len(open_suite(config, suite).sets) > 1:
            raise ConfigError(f"adapt.sets.{name}: {suite} scores several sets; give one of one")
    common = {"set": name, "suite": own.suite, "val": own.val}
    if init := config.train.init:
        train = dataclasses.replace(config.train, init=config.run_url(init))
        run_dir = storage.join(config.run_dir, name, ZERO_SHOT)
        start = dataclasses.replace(config, train=train, run_dir=run_dir)
        yield Cell(way=ZERO_SHOT, shots=0, seed=0, images=0, config=start, **common)
    for shots in config.adapt.shots:
        for seed in config.adapt.seeds:
            subset = _subset(config, name, own, shots, seed)
            images = _images(subset)
            for way, tuned in ways.items():
                there = (config.run_dir, name, way, shots_name(shots), f"seed-{seed}")
                cell = _cell_config(config, tuned, storage.join(*there), subset, images, seed)
                check_mixture(cell)
                yield Cell(way=way, shots=shots, seed=seed, images=images, config=cell, **common)


def _subset(config: RunConfig, name: str, own: AdaptSetConfig, shots: int, seed: int) -> ShardSet:
    """What a cell is tuned on: a published split, a drawn one, or the whole set."""
    published = shots and own.splits
    given = open_shard_set(config.set_url(own.split(shots, seed) if published else own.train))
    drawn = 0 if published else shots
    if not drawn and given.samples >= LEAST:
        return given
    part = f"{name}-{shots_name(shots)}-seed-{seed}"
    return few_shot_set(storage.join(config.run_dir, "subsets", part), given, drawn, seed)


def _images(subset: ShardSet) -> int:
    drawn: int = subset.info.get("few_shot", {}).get("images", subset.samples)
    return drawn


def _cell_config(  # noqa: PLR0913 (each decides another part)
    config: RunConfig, tuned: RunConfig, run_dir: str, subset: ShardSet, images: int, seed: int
) -> RunConfig:
    """The way's configuration for one subset, with names of the whole run's phases resolved."""
    passes = math.ceil(config.adapt.epochs * images / tuned.train.global_batch)
    init = tuned.train.init
    return dataclasses.replace(
        tuned,
        run_dir=run_dir,
        seed=seed,
        phases={},
        data=dataclasses.replace(tuned.data, root=config.data_root, mixture={subset.url: 1.0}),
        train=dataclasses.replace(
            tuned.train,
            init=init and config.run_url(init),
            steps=max(tuned.train.steps, passes),
        ),
    )


def adapt(config: RunConfig, cells: list[Cell]) -> list[dict[str, Any]]:
    """The result of every cell, in their order; RUN/adapt.json always has those there are."""
    from glipv2.pipeline.ray_map import map_on_ray

    results: dict[str, dict[str, Any]] = {}
    done = map_on_ray(
        Tuner,
        cells,
        num_actors=config.adapt.num_tasks,
        gpus_per_actor=config.adapt.gpus_per_task,
        cpus_per_actor=config.adapt.cpus_per_task,
    )
    for cell, result in progress(done, len(cells), "adapt"):
        said = result.get("error") or f"{result['first']} {result['metrics'][result['first']]:.4f}"
        say(f"{cell}: {said}")
        results[str(cell)] = result
        ordered = [results[str(each)] for each in cells if str(each) in results]
        summary = {"summary": summarise(ordered), "cells": ordered}
        storage.write_json(storage.join(config.run_dir, RESULT), summary)
    return ordered


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per set, way and shots: mean and standard deviation (of a sample) over the seeds.

    Of several sets there are rows of their average, where every set has the same seeds: each seed's
    mean over the sets, and mean and deviation of those (facts I).
    """
    found: dict[tuple[str, str, int], dict[int, float]] = {}
    for result in results:
        if "error" not in result:
            place = result["set"], result["way"], result["shots"]
            found.setdefault(place, {})[result["seed"]] = result["metrics"][result["first"]]
    sets = list(dict.fromkeys(result["set"] for result in results))
    if len(sets) > 1:
        for way, shots in dict.fromkeys((way, shots) for _, way, shots in found):
            each = [found.get((name, way, shots), {}) for name in sets]
            if each[0] and all(own.keys() == each[0].keys() for own in each):
                mean = {seed: fmean(own[seed] for own in each) for seed in each[0]}
                found[AVERAGE, way, shots] = mean
    return [
        {
            "set": name, "way": way, "shots": shots, "seeds": len(values),
            "mean": fmean(values.values()),
            "std": stdev(values.values()) if len(values) > 1 else None,
        }
        for (name, way, shots), values in found.items()
    ]  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """Ways by shots, a block per set, for a terminal of 80 columns."""
    rows = summarise(results)
    first = next((result["first"] for result in results if "error" not in result), "")
    shots = list(dict.fromkeys(row["shots"] for row in rows if row["way"] != ZERO_SHOT))
    lines = []
    for name in dict.fromkeys(row["set"] for row in rows):
        own = {(r["way"], r["shots"]): cell_text(r) for r in rows if r["set"] == name}
        head = f"{name} ({first})" if first else name
        lines.append(f"{head:20s}" + "".join(f"{shots_name(number):>12s}" for number in shots))
        if zero := own.pop((ZERO_SHOT, 0), ""):
            lines.append(f"  {ZERO_SHOT:18s}{zero:>12s}")
        for way in dict.fromkeys(way for way, _ in own):
            cells = "".join(f"{own.get((way, number), '-'):>12s}" for number in shots)
            lines.append(f"  {way:18s}{cells}")
    return "\n".join(lines)


def cell_text(row: dict[str, Any]) -> str:
    """.512±.013; without a deviation where there was one seed."""
    spread = "" if row["std"] is None else f"±{row['std']:.3f}".replace("0.", ".")
    return f"{row['mean']:.3f}".replace("0.", ".", 1) + spread
