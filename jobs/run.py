"""glipv2 run RECIPE: the main job. Prepare, teacher, label, student, control, evaluate, report.

The phase `teacher` is trained first and labels the pairs; every other phase of the recipe follows
in the recipe's order. Every stage finds out for itself what is already done, so the same command
resumes the whole job; each stage is also a command of its own, with the same results.
"""

import argparse
import logging
from typing import Any

from glipv2.jobs.stages import add_recipe_arguments, recipe_config, stage, use_cluster
from glipv2.pipeline import storage
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.rounds import rounds_of

log = logging.getLogger(__name__)

NEEDED_PHASES = ("teacher", "student", "control")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser, cluster=True)


def run(arguments: argparse.Namespace) -> int:
    from glipv2.jobs.summary import summary_table

    use_cluster(arguments.address)
    config = recipe_config(arguments)
    _check(config)
    phases = {phase: recipe_config(arguments, phase) for phase in config.phases}
    summary = main_job(config, phases, arguments.address)
    print(summary_table(summary))  # noqa: T201 - the answer of the command
    print(f"report: {storage.join(config.run_dir, 'report.html')}")  # noqa: T201
    return 0


def main_job(
    config: RunConfig, phases: dict[str, RunConfig], address: str | None = None
) -> dict[str, Any]:
    """All stages in order; returns the summary that is also written to RUN/summary.json.

    With `address` the phases are trained on that cluster, which the other stages have joined.
    """
    from glipv2.jobs.evaluate import evaluate
    from glipv2.jobs.evaluate_main import all_models
    from glipv2.jobs.label import label
    from glipv2.jobs.prepare import prepare_recipe
    from glipv2.jobs.pretrain import pretrain
    from glipv2.jobs.report import write_report
    from glipv2.jobs.summary import summarise
    from glipv2.pipeline.run_settings import check_same_run

    run_dir = config.run_dir
    for phase_config in phases.values():
        check_same_run(phase_config)
    with stage(run_dir, "prepare"):
        prepare_recipe(config)
    with stage(run_dir, "teacher"):
        pretrain(phases["teacher"], address)
    with stage(run_dir, "label"):
        label(config)
    stopped = False
    for phase, own in phases.items():
        if phase in rounds_of(config)[1:]:
            stopped = stopped or not (
                _labels_get_better(config, phases, phase) or config.all_rounds
            )
            if stopped:
                continue
            with stage(run_dir, f"label_{phase}"):
                label(own)
        if phase != "teacher":
            with stage(run_dir, phase):
                pretrain(own, address)
    with stage(run_dir, "evaluate"):
        evaluate(config, all_models(config))
    with stage(run_dir, "report"):
        summarise(config)
        write_report(run_dir)
    return summarise(config)  # now with the seconds of the report itself


def _labels_get_better(config: RunConfig, phases: dict[str, RunConfig], phase: str) -> bool:
    """Whether the labels of this round on the gold set are better than those of the round before.

    Adds both to RUN/rounds.json.
    """
    from glipv2.jobs.label_plan import gold_quality

    rounds = rounds_of(config)[: rounds_of(config).index(phase) + 1]
    judged = {name: gold_quality(config if name == rounds[0] else phases[name]) for name in rounds}
    storage.write_json(storage.join(config.run_dir, "rounds.json"), judged)
    *_, before, now = (quality["f1"] for quality in judged.values())
    if now <= before:
        log.warning(
            "%s round %d: its teacher's labels on the gold set have F1 %.4f, those before had %.4f",
            "all the same," if config.all_rounds else "no", len(rounds), now, before,
        )  # fmt: skip
    return now > before


def _check(config: RunConfig) -> None:
    missing = [phase for phase in NEEDED_PHASES if phase not in config.phases]
    if missing:
        raise ConfigError(f"the main job needs the phases {', '.join(missing)} in its recipe")
