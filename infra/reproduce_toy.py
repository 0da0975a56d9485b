"""make reproduce-toy: the main job on the harder toy world, longer, with three seeds.

At most two hours on two cores; killed, it goes on where it was. Prints the README's table.
"""

import json
import subprocess
import sys
from pathlib import Path

RECIPE = "infra/recipes/reproduce_toy.yaml"
ROOT = Path("runs/reproduce-toy")
SEEDS = (1, 2, 3)
TOY_SETS = ("toy_detection", "toy_grounding", "toy_calibration", "toy_pairs", "toy_pairs_truth",
            "toy_val")  # fmt: skip
COLUMNS = ("caption_seen_ap50", "caption_unseen_ap50", "chunked_seen_ap50",
           "chunked_unseen_ap50", "bccd_ap50", "recall_at_1")  # fmt: skip


def main() -> int:
    for seed in SEEDS:
        folder = ROOT / f"seed-{seed}"
        command = ["-m", "glipv2.jobs.cli", "run", RECIPE, f"run_dir={folder}", f"seed={seed}"]
        command += [f"prepare.{name}.seed={seed}" for name in TOY_SETS]  # another world as well
        code = subprocess.run([sys.executable, *command]).returncode
        if code:
            return code
    print(table())  # noqa: T201
    return 0


def table() -> str:
    """Markdown: one row per seed and model, from the summaries that exist."""
    lines = ["| seed | model | " + " | ".join(COLUMNS) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for seed in SEEDS:
        path = ROOT / f"seed-{seed}" / "summary.json"
        if not path.exists():
            continue
        summary = json.loads(path.read_text())
        for model in ("teacher", "student", "control", "scratch"):
            cells = " | ".join(f"{summary[model][column]:.3f}" for column in COLUMNS)
            lines.append(f"| {seed} | {model} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
