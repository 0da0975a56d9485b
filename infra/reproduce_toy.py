"""make reproduce-toy: the main job on the harder toy world, longer, with three seeds.

    python infra/reproduce_toy.py --recipe infra/recipes/two_rounds.yaml --out runs/two-rounds

At most two hours on two cores; killed, it goes on where it was. Prints two tables: what each
model finds, and how good the labels of each round are on what gold never shows.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SEEDS = (1, 2, 3)
TOY_SETS = ("toy_detection", "toy_grounding", "toy_calibration", "toy_pairs", "toy_pairs_truth",
            "toy_val")  # fmt: skip
COLUMNS = ("caption_seen_ap50", "caption_unseen_ap50", "chunked_seen_ap50",
           "chunked_unseen_ap50", "bccd_ap50", "recall_at_1")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--recipe", default="infra/recipes/reproduce_toy.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce-toy"))
    arguments = parser.parse_args()
    for seed in SEEDS:
        folder = arguments.out / f"seed-{seed}"
        command = ["-m", "glipv2.jobs.cli", "run", arguments.recipe]
        command += [f"run_dir={folder}", f"seed={seed}"]
        command += [f"prepare.{name}.seed={seed}" for name in TOY_SETS]  # another world as well
        code = subprocess.run([sys.executable, *command]).returncode
        if code:
            return code
    found = list(summaries(arguments.out))
    print(f"{scores(found)}\n\n{labels(found)}")  # noqa: T201
    return 0


def summaries(out: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(seed, summary) of those that are through."""
    for seed in SEEDS:
        path = out / f"seed-{seed}" / "summary.json"
        if path.exists():
            yield seed, json.loads(path.read_text())


def scores(found: list[tuple[int, dict[str, Any]]]) -> str:
    """Markdown: one row per seed and model."""
    lines = ["| seed | model | " + " | ".join(COLUMNS) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for seed, summary in found:
        for model, own in summary.items():
            if isinstance(own, dict) and COLUMNS[0] in own:
                cells = " | ".join(f"{own[column]:.3f}" for column in COLUMNS)
                lines.append(f"| {seed} | {model} | {cells} |")
    return "\n".join(lines)


def labels(found: list[tuple[int, dict[str, Any]]]) -> str:
    """Markdown: one row per seed, round and kind of object."""
    lines = ["| seed | round | labels of | precision | recall | kept |", "|---" * 6 + "|"]
    for seed, summary in found:
        rounds = [own["labels"] for own in summary["rounds"]] or [summary["labels"]]
        for number, own in enumerate(rounds, start=1):
            for name, group in {"all": own, **own["by_group"]}.items():
                figures = (group["precision_at_50"], group["recall_at_50"])
                cells = " | ".join("–" if value is None else f"{value:.3f}" for value in figures)
                lines.append(f"| {seed} | {number} | {name} | {cells} | {group['kept']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
