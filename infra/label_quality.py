"""How good are the toy labels of a run's models, their threshold chosen on many gold images?

    python infra/label_quality.py runs/two-rounds/seed-1 --models teacher student

The 240 gold images of the recipe leave the precision at a threshold uncertain by .01; here it is
chosen on 1,200. Every model labels the run's pairs anew, into RUN/quality, and is judged by their
truth: precision and recall at IoU 0.5 of what captions mention.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import yaml
from reproduce_toy import quality_cells

from glipv2.eval.labels import score_labels
from glipv2.jobs.label import label
from glipv2.jobs.prepare import prepare_set
from glipv2.pipeline import storage
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.config_loader import config_from_tree, from_tree
from glipv2.pipeline.shard_reader import iterate_records


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("run", type=Path, help="of infra/reproduce_toy.py, or the quickstart's")
    parser.add_argument("--models", nargs="+", default=["teacher"])
    parser.add_argument("--gold", type=int, default=1200, help="how many gold images")
    parser.add_argument("--target", type=float, default=0.945, help="precision wanted on them")
    arguments = parser.parse_args()
    world = yaml.safe_load((arguments.run / "config.yaml").read_text())["prepare"]
    gold = from_tree(PrepareConfig, {**world["toy_calibration"], "count": arguments.gold})
    prepare_set(str(arguments.run / "quality" / "gold"), gold)
    print("| model | labels of | precision | recall | kept |\n|---|---|---|---|---|")  # noqa: T201
    for model in arguments.models:
        print_quality(arguments.run, model, arguments.target)
    return 0


def print_quality(run: Path, model: str, target: float) -> None:
    """Rows of a Markdown table, one a group of phrases."""
    own = run / "quality" / model
    config = config_from_tree(
        {
            "run_dir": str(own),
            "label": {
                "teacher": str(run / model),
                "inputs": {str(run / "data" / "toy_pairs"): str(own / "labelled")},
                "calibration": str(run / "quality" / "gold"),
                "target_precision": target,
            },
        },
        [],
    )
    label(config)
    truth = iterate_records(str(run / "data" / "toy_pairs_truth"))
    found = score_labels(iterate_records(str(own / "labelled")), truth)
    threshold = storage.read_json(str(own / "labels" / "threshold.json"))["threshold"]
    for name, group in {f"all (from {threshold} on)": found, **found.by_group}.items():
        print(f"| {model} | {quality_cells(name, asdict(group))}", flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
