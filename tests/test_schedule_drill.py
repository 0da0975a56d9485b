"""The scheduler as it is used: a trainer commits and prunes while schedulers are killed."""

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from commands import TIMEOUT, finish, start  # noqa: E402
from scored_runs import SHARDS, save_step, write_detection  # noqa: E402

from glipv2.model.folders import step_url  # noqa: E402
from glipv2.pipeline.checkpoint import committed_steps, prune_checkpoints  # noqa: E402

STEPS, KILLS, KEEP = 20, 5, 8
DAMAGED = 160
"""The step whose weights are altered after its commit; retention keeps it to the end."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_good_step_is_scored_once_whatever_dies(tmp_path: Path) -> None:
    random.seed(3)
    run, val = tmp_path / "run", write_detection(tmp_path / "val")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({
        "run_dir": str(run),
        "eval": {"suites": {"toy": {"set": val}}, "num_actors": 1},
        "schedule": {"poll_seconds": 0.5, "attempts": 2, "retry_seconds": 0.5,
                     "until_step": 10 * STEPS},
    }))  # fmt: skip

    def train() -> None:
        for step in range(10, 10 * STEPS + 1, 10):
            url = save_step(str(run), step)
            if step == DAMAGED:
                weights = Path(url, "model.safetensors")
                data = bytearray(weights.read_bytes())
                data[-1] ^= 1
                weights.write_bytes(data)
            prune_checkpoints(str(run), KEEP)
            time.sleep(2)

    trainer = threading.Thread(target=train)
    trainer.start()
    made: dict[Path, int] = {}
    for _ in range(KILLS):
        process = start("schedule", recipe)
        before = len(predictions(run))
        deadline = time.monotonic() + TIMEOUT
        wanted = before + random.randint(1, SHARDS + 1)
        while len(predictions(run)) < wanted:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        now = predictions(run)
        assert made.items() <= now.items()  # nothing was made again
        made = now
    trainer.join()
    said = finish("schedule", recipe, code=1, timeout=3 * TIMEOUT)  # 1: a step was given up
    assert made.items() <= predictions(run).items()
    scored = {
        path.parent.name: json.loads(path.read_text()) for path in run.glob("eval/*/toy.json")
    }
    there = set(committed_steps(str(run)))
    assert {f"step-{step:06d}" for step in there - {DAMAGED}} <= set(scored)
    assert f"step-{DAMAGED:06d}" not in scored
    models = {result["checkpoint"]["digest"] for result in scored.values()}
    files = [path for path in predictions(run) if path.parts[-3] in models]
    assert len(files) == SHARDS * len(models)
    assert f"step {DAMAGED} could not be scored on toy" in said
    [told] = [json.loads(line) for line in (run / "eval/alerts.jsonl").read_text().splitlines()]
    assert told["step"] == DAMAGED and "differs from its commit record" in told["text"]
    best = json.loads((run / "eval" / "best-toy.ap.json").read_text())
    assert Path(step_url(str(run), best["step"])).is_dir()


def predictions(run: Path) -> dict[Path, int]:
    """Prediction file -> when it was made."""
    found = {}
    for path in run.glob("eval/predictions/*/*/*.gz"):
        found[path] = path.stat().st_mtime_ns
    return found
