"""What a recipe says of training is what the ranks of a run do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from commands import ROOT, TIMEOUT, finish, kill_when, small_training  # noqa: E402
from scored_runs import tiny_model  # noqa: E402

from glipv2.model.folders import step_url  # noqa: E402
from glipv2.pipeline import storage  # noqa: E402
from glipv2.pipeline.checkpoint import committed_steps, write_folder  # noqa: E402

WORKER = ROOT / "tests" / "workers" / "trainer_worker.py"


def test_every_setting_reaches_the_model_and_the_logs_say_who_waits_for_what(
    tmp_path: Path,
) -> None:
    recipe = small_training(
        tmp_path,
        train={"steps": 10, "checkpoint_activations": ["fusion", "text_encoder"], "compile": True,
               "ema_decay": 0.9},
        log={"every": 1, "peak_tflops": 0.001},
        supervise={"straggler_every": 10, "straggler_ratio": 1.01},
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
         "--nproc-per-node=2", str(WORKER), str(recipe), str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"rank-{rank}.json").read_text()) == {
            "recomputed": [["fusion", "text_encoder"]],
            "compile": 1,
            "update": 10,
        }
    assert "step 9: the others wait for rank 1 on " in done.stderr
    lines = storage.read_json_lines(str(tmp_path / "undisturbed" / "metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(10))
    for line in lines:
        assert line["flops_utilisation"] > 0
        assert 0.05 <= line["data_wait_share"] * line["step_seconds"] < line["step_seconds"] - 0.25


@pytest.mark.slow
def test_the_mask_head_stage_starts_from_a_model_without_one_and_changes_nothing_else(
    tmp_path: Path,
) -> None:
    write_folder(str(tmp_path / "start"), tiny_model(seed=1), 0)
    recipe = small_training(
        tmp_path,
        model={"masks": True},
        train={"steps": 3, "checkpoint_every": 1, "processes": 1, "tune": "mask_head",
               "init": str(tmp_path / "start")},
    )  # fmt: skip
    assert "new: mask_head" in finish("pretrain", recipe)
    begun = load_file(tmp_path / "start" / "model.safetensors")
    first, last = (
        load_file(Path(step_url(str(tmp_path / "undisturbed"), step)) / "model.safetensors")
        for step in (1, 3)
    )
    heads = {name for name in last if name.startswith("mask_head.")}
    assert heads and heads == last.keys() - begun.keys()
    for name, tensor in last.items():
        assert torch.equal(tensor, (first if name in heads else begun)[name]) != (name in heads)


def exported(run: Path, out: Path, *options: str) -> dict[str, torch.Tensor]:
    finish("export", run, "--out", out, *options)
    return load_file(out / "model.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_average_of_the_weights_survives_a_kill_and_another_number_of_ranks(
    tmp_path: Path,
) -> None:
    """At low rates, where rounding does not grow."""
    rates = {f"{part}learning_rate": 1e-5 for part in ("", "text_", "head_")}
    recipe = small_training(
        tmp_path,
        train={"steps": 12, "checkpoint_every": 3, "ema_decay": 0.9, "eps": 1e-5, **rates},
    )
    finish("pretrain", recipe)
    run = tmp_path / "killed"
    kill_when(lambda: 6 in committed_steps(str(run)), "pretrain", recipe, f"run_dir={run}")
    finish("pretrain", recipe, f"run_dir={run}", "train.processes=1")
    found = {}
    for kind, options in (("average", []), ("raw", ["--raw"])):
        expected = exported(tmp_path / "undisturbed", tmp_path / f"expected_{kind}", *options)
        found[kind] = exported(run, tmp_path / f"found_{kind}", *options)
        assert found[kind].keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.allclose(found[kind][name], tensor, rtol=1e-6, atol=2e-7), (kind, name)
    apart = [(found["raw"][name] - tensor).abs().max() for name, tensor in found["average"].items()]
    assert max(apart) > 1e-5
