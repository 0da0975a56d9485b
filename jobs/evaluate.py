"""glipv2 evaluate RECIPE: checkpoints -> predictions on Ray actors -> figures on the driver.

`eval.suites` are benchmarks; `eval.detection` and `eval.real_detection` are what the main job
compares its phases by (`evaluate_main`). A recipe may have both.
"""

import argparse
import json
from typing import Any

from glipv2.jobs.evaluate_main import all_models, evaluate_main
from glipv2.jobs.evaluate_predict import RANDOM
from glipv2.jobs.evaluate_suites import check_head, evaluate_suite, make_job, open_suite
from glipv2.jobs.stages import add_recipe_arguments, recipe_config, stage, use_cluster
from glipv2.pipeline import storage
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.errors import ConfigError

Results = dict[str, list[dict[str, Any]]]
"""Name of a model -> its result on each suite."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = "only this phase of the recipe; without it all phases, and random weights"
    add_recipe_arguments(parser, phase=which, cluster=True)
    parser.add_argument("--checkpoint", help="run folder, step folder or model to score instead")
    parser.add_argument("--suite", action="append", help="only this one of eval.suites; repeatable")
    parser.add_argument(
        "--score-only",
        action="store_true",
        help="compute the figures of eval.suites again from the predictions that are kept",
    )
    parser.add_argument(
        "--out", default="", help="run folder for what is made (default: the checkpoint's own)"
    )
    parser.add_argument("--json", help="write the results there, too; - for the terminal alone")


def run(arguments: argparse.Namespace) -> int:
    use_cluster(arguments.address)
    phase, checkpoint = arguments.phase, arguments.checkpoint
    if phase and checkpoint:
        raise ConfigError("--phase and --checkpoint name two things to score; give one of them")
    config = recipe_config(arguments)
    check(config)
    whole = bool(config.phases) and not phase and not checkpoint
    models = all_models(config) if whole else {phase or "model": _one(arguments)}
    only_suites = arguments.suite or arguments.score_only
    metrics: dict[str, dict[str, float]] = {}
    if has_main(config) and not only_suites:
        metrics = _main(config, models, whole)
    results = evaluate_suites(config, models, arguments.suite, arguments.score_only, arguments.out)
    _show(config, metrics, results, arguments.json, summary=whole or bool(phase))
    return 0


def _one(arguments: argparse.Namespace) -> str:
    """What is scored alone: a checkpoint, a phase's run, or the recipe's."""
    url: str = arguments.checkpoint or recipe_config(arguments, arguments.phase).run_dir
    return url


def _main(config: RunConfig, models: dict[str, str], whole: bool) -> dict[str, dict[str, float]]:
    if not whole:
        return evaluate_main(config, models)
    with stage(config.run_dir, "evaluate"):
        return evaluate_main(config, models)


def has_main(config: RunConfig) -> bool:
    return bool(config.eval.detection or config.eval.real_detection)


def check(config: RunConfig) -> None:
    """ConfigError unless the recipe says what to score."""
    if not config.eval.suites and not has_main(config):
        raise ConfigError(
            "nothing to evaluate: set eval.suites (or, for a main job, eval.detection and "
            "eval.real_detection)"
        )


def evaluate(config: RunConfig, models: dict[str, str]) -> None:
    """All that the recipe scores its models by; what is known is not computed again."""
    check(config)
    if has_main(config):
        evaluate_main(config, models)
    evaluate_suites(config, models)


def evaluate_suites(
    config: RunConfig,
    models: dict[str, str],
    suites: list[str] | None = None,
    score_only: bool = False,
    out: str = "",
) -> Results:
    """The results of every suite (or of those named), model by model; random weights have none.

    They are kept with the run that a model is of, else in the recipe's, or in `out`.
    """
    results: Results = {}
    opened = [open_suite(config, name) for name in suites or config.eval.suites]
    for name, url in models.items():
        if url != RANDOM and opened:
            jobs = [make_job(config, suite, url, out) for suite in opened]
            for job in jobs if not score_only else ():
                check_head(job)
            results[name] = [evaluate_suite(job, score_only) for job in jobs]
    return results


def _show(
    config: RunConfig,
    metrics: dict[str, dict[str, float]],
    results: Results,
    to: str | None,
    summary: bool,
) -> None:
    """The answer of the command: tables, and JSON where it is asked for."""
    from glipv2.jobs.summary import summarise, summary_table

    told = summarise(config) if metrics and summary else None
    if to:
        text = json.dumps({"main": metrics, "suites": results}, indent=1)
        if to == "-":
            print(text)  # noqa: T201
            return
        storage.write_bytes(to, text.encode())
    if told and len(metrics) > 1:
        print(summary_table(told))  # noqa: T201
    elif metrics:
        for key, value in next(iter(metrics.values())).items():
            print(f"{key:32s} {value:.4f}")  # noqa: T201
    if results:
        print(suite_table(results))  # noqa: T201


def suite_table(results: Results) -> str:
    """A line a figure, a column a model, for a terminal of 80 columns."""
    lines = []
    for suite in dict.fromkeys(result["suite"] for own in results.values() for result in own):
        by_model = {
            name: result for name, own in results.items() for result in own
            if result["suite"] == suite
        }  # fmt: skip
        shown = {n: r["metrics"] for n, r in by_model.items()}
        lines.append(f"{suite:30s}" + "".join(f"{_column(n, by_model[n]):>12s}" for n in shown))
        for key in dict.fromkeys(key for own in shown.values() for key in own):
            cells = (own.get(key) for own in shown.values())
            row = "".join(f"{'-':>12s}" if v is None else f"{_number(v):>12s}" for v in cells)
            lines.append(f"  {key:28s}{row}")
        sets = next(iter(by_model.values()))["sets"]
        images = sum(own["images"] for own in sets.values())
        lines.append(f"  images: {images:,} of {len(sets)} {'set' if len(sets) == 1 else 'sets'}")
    return "\n".join(lines)


def _column(name: str, result: dict[str, Any]) -> str:
    step = result["checkpoint"]["step"]
    return name if step is None else f"{name[:11]} {step}"[:12] if name != "model" else f"{step}"


def _number(value: float) -> str:
    """Counts as counts, the rest with four digits."""
    return f"{value:,.0f}" if value == int(value) and abs(value) > 1 else f"{value:.4f}"
