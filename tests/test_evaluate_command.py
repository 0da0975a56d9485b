"""glipv2 evaluate: how many actors it asks for, what it keeps meanwhile, and scoring alone."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from scored_runs import counting_map, save_step, write_detection  # noqa: E402

from glipv2.jobs import evaluate_suites  # noqa: E402
from glipv2.jobs.cli import main  # noqa: E402
from glipv2.jobs.evaluate_suites import kept  # noqa: E402
from glipv2.pipeline import ray_map  # noqa: E402
from glipv2.pipeline.checkpoint import committed_steps, prune_checkpoints  # noqa: E402
from glipv2.pipeline.pins import pins  # noqa: E402


def test_a_checkpoint_that_is_read_for_longer_than_a_pin_lasts_is_kept_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_suites, "PIN_SECONDS", 1.0)
    run = str(tmp_path / "run")
    read, newer = save_step(run, 20), save_step(run, 40)
    with kept(read):
        began = time.monotonic()
        while time.monotonic() < began + 2.5:
            prune_checkpoints(run, keep=1)
            assert committed_steps(run) == [20, 40]
            time.sleep(0.1)
    assert not pins(run)
    prune_checkpoints(run, keep=1)
    assert committed_steps(run) == [40] and Path(newer).is_dir()


def test_the_command_asks_for_the_actors_of_its_recipe_and_none_for_scoring_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(ray_map, "map_on_ray", counting_map([], asked))
    step, val = save_step(str(tmp_path / "run"), 20), write_detection(tmp_path / "val")
    recipe = tmp_path / "recipe.yaml"
    own = {"suites": {"toy": {"set": val}}, "num_actors": 3, "gpus_per_actor": 0.25}
    recipe.write_text(json.dumps({"run_dir": str(tmp_path / "run"), "eval": own}))
    alone = ["evaluate", str(recipe), "--checkpoint", step, "--score-only"]
    assert main(alone) == 2
    assert "prediction files of toy are missing" in capsys.readouterr().err and not asked
    assert main(alone[:-1]) == 0
    assert asked == [{"num_actors": 3, "gpus_per_actor": 0.25}]
    file = tmp_path / "run" / "eval" / "step-000020" / "toy.json"
    first = json.loads(file.read_text())
    file.unlink()
    assert main(alone) == 0
    again = json.loads(file.read_text())
    assert len(asked) == 1 and again["metrics"] == first["metrics"]
    assert main([*alone[:-1], "eval.num_actors=64", "--out", str(tmp_path / "other")]) == 0
    assert asked[1] == {"num_actors": 4, "gpus_per_actor": 0.25}  # no more than shards
