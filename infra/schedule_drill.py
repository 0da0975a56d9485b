"""Does scoring checkpoints slow the training that makes them, and is each scored once?

    PYTHONPATH=infra python infra/schedule_drill.py --out runs/schedule_drill

A trainer alone, then one whose checkpoints a scheduler scores, then one alone again, each on a core
of its own. While the second trains, its scheduler is killed (SIGKILL) again and again, retention
prunes, and one checkpoint is altered after its commit. Exit code 1 unless every good step was
scored once and the altered one was reported, at a rate within 3 % of the mean of those alone.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import yaml
from kill_drill import SETS, command, write_recipe

from glipv2.jobs.prepare import prepare_set
from glipv2.model.folders import WEIGHTS, step_url
from glipv2.pipeline.checkpoint import committed_steps
from glipv2.pipeline.config import PrepareConfig

CHECKPOINTS, KEPT, KILLS = 20, 8, 5
DAMAGED = 9
"""Which checkpoint is altered; the scheduler is down when it is committed."""
ALLOWED = 0.03
POLL_SECONDS = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--every", type=int, default=150, help="steps between two checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/schedule_drill"))
    arguments = parser.parse_args()
    recipe = write_drill_recipe(arguments.out, arguments.every)
    alone, beside, again = (arguments.out / name for name in ("alone", "beside", "again"))
    wrong: list[str] = []
    for run in (alone, beside, again):
        trainer = train(recipe, run)
        if run == beside:
            wrong = watch(recipe, run, arguments, trainer)
        if trainer.wait():
            return 1
        print(f"{run.name}: {rate(run):.3f} steps/s", flush=True)  # noqa: T201
    wrong += unlike(beside, arguments.every)
    kept = rate(beside) / statistics.fmean((rate(alone), rate(again)))
    print(  # noqa: T201
        f"{CHECKPOINTS} checkpoints, {KILLS} schedulers killed: {kept:.1%} of the rate alone; "
        f"wrong: {'; '.join(wrong) or 'nothing'}"
    )
    return 0 if not wrong and kept >= 1 - ALLOWED else 1


def write_drill_recipe(out: Path, every: int) -> Path:
    """The kill drill's sets and model, one rank, and a suite."""
    path = write_recipe(out, CHECKPOINTS * every)
    options = PrepareConfig(source="toy", set="toy_val", count=24, size=64, seed=1)
    prepare_set(str(out / "data" / "toy_val"), options)
    tree = yaml.safe_load(path.read_text())
    tree["train"] |= {"processes": 1, "checkpoint_every": every, "keep_checkpoints": KEPT}
    tree["eval"] = {"suites": {"toy": {"set": "toy_val", "task": "phrases"}}, "num_actors": 1}
    tree["schedule"] = {"poll_seconds": POLL_SECONDS, "attempts": 2, "retry_seconds": 1.0}
    tree["data"]["mixture"] = dict.fromkeys(SETS, 1)
    path.write_text(yaml.safe_dump(tree))
    return path


def train(recipe: Path, run: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(["taskset", "-c", "0", *command(recipe, run)])


def watch(
    recipe: Path, run: Path, arguments: argparse.Namespace, trainer: "subprocess.Popen[bytes]"
) -> list[str]:
    """Schedulers, one after the other, each killed at a moment of its own but the last."""
    draw, wrong = random.Random(arguments.seed), []
    for killed in sorted(draw.sample(range(2, CHECKPOINTS - 1), KILLS - 1) + [DAMAGED - 1]):
        scheduler = schedule(recipe, run)
        wait_for(trainer, run, killed * arguments.every)
        time.sleep(draw.uniform(0, 4) if killed != DAMAGED - 1 else 0)
        if scheduler.poll() is not None:
            wrong.append(f"a scheduler ended with {scheduler.returncode}")
        scheduler.kill()
        scheduler.wait()
        if killed == DAMAGED - 1:
            wait_for(trainer, run, DAMAGED * arguments.every)
            alter(Path(step_url(str(run), DAMAGED * arguments.every)) / WEIGHTS)
    last = schedule(recipe, run, f"schedule.until_step={CHECKPOINTS * arguments.every}")
    if last.wait() != 1:  # a step was given up: the altered one
        wrong.append(f"the last scheduler ended with {last.returncode}")
    return wrong


def schedule(recipe: Path, run: Path, *settings: str) -> "subprocess.Popen[bytes]":
    words = ["-m", "glipv2.jobs.cli", "schedule", str(recipe), f"schedule.runs=[{run}]", *settings]
    return subprocess.Popen(["taskset", "-c", "1", sys.executable, *words])


def wait_for(trainer: "subprocess.Popen[bytes]", run: Path, step: int) -> None:
    while max(committed_steps(str(run)), default=0) < step and trainer.poll() is None:
        time.sleep(0.02)


def alter(weights: Path) -> None:
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def rate(run: Path) -> float:
    """Steps a second from the first line of metrics.jsonl to the last, saves included."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]
    return float((last["step"] - first["step"]) / (last["time"] - first["time"]))


def unlike(run: Path, every: int) -> list[str]:
    """What is not as it should be: steps without a result or with two, and the altered one's."""
    wanted = Counter(number * every for number in range(1, CHECKPOINTS + 1) if number != DAMAGED)
    scored: Counter[int] = Counter()
    models = set()
    for path in run.glob("eval/step-*/toy.json"):
        result = json.loads(path.read_text())
        scored[result["checkpoint"]["step"]] += 1
        models.add(result["checkpoint"]["digest"])
    wrong = [f"step {s}: {scored[s]} results" for s in wanted | scored if scored[s] != wanted[s]]
    made = {path.parts[-3] for path in run.glob("eval/predictions/*/*/*.gz")}
    if made != models:
        wrong.append(f"predictions of {len(made)} models, results of {len(models)}")
    alerts = []
    with suppress(OSError):
        text = (run / "eval" / "alerts.jsonl").read_text()
        alerts = [json.loads(line)["step"] for line in text.splitlines()]
    return wrong if alerts == [DAMAGED * every] else [*wrong, f"reported: {alerts}"]


if __name__ == "__main__":
    sys.exit(main())
