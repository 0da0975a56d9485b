"""Real DeepSpeed on one and two gloo ranks, and the settings that are derived for it.

What needs a GPU (transfers that overlap, pinned memory) is tested as configuration alone.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from glipv2.jobs.cli import main
from glipv2.model.batch import Batch
from glipv2.model.config import preset
from glipv2.model.glip import build_model
from glipv2.pipeline.engine import check_engine, check_finite, zero_config
from glipv2.pipeline.errors import ConfigError, NonFiniteLossError
from glipv2.pipeline.optim import build_optimizer, decay_factor, schedule_factor, set_rates
from glipv2.pipeline.train_config import TrainConfig

WORKER = Path(__file__).parent / "workers" / "engine_worker.py"
FP16 = WORKER.with_name("fp16_worker.py")
SAVED = 5


def run_worker(ranks: int, folder: Path, **train: object) -> dict[str, list[float]]:
    settings = [f"{key}={json.dumps(value)}" for key, value in train.items()]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
        "--nproc-per-node", str(ranks), str(WORKER), str(folder), *settings,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def test_a_state_saved_by_two_zero2_ranks_resumes_bit_for_bit_and_fits_any_stage_and_world_size(
    tmp_path: Path,
) -> None:
    saved = run_worker(2, tmp_path, zero_stage=2)
    assert saved["resumed"] == saved["whole"][SAVED:]
    other = run_worker(1, tmp_path, zero_stage=3, accumulation=4)
    assert other["resumed"] == pytest.approx(saved["resumed"], rel=1e-6)
    for run in (saved, other):
        assert_refused(run)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (3, 0)])
def test_a_state_of_one_stage_resumes_at_another(tmp_path: Path, before: int, after: int) -> None:
    saved = run_worker(2, tmp_path, zero_stage=before)
    other = run_worker(2, tmp_path, zero_stage=after)
    assert other["resumed"] == pytest.approx(saved["resumed"], rel=1e-6)
    assert_refused(other)


def assert_refused(run: dict[str, Any]) -> None:
    """The workers poison two steps before they go on: a loss, and a gradient behind a loss. Their
    last step has a gradient of nothing but zeros, which is as good as any other."""
    assert run["zero"] == [0.0, 1]
    loss, gradient = run["refused"]
    assert "step 5: loss 'loss' is nan on at least one rank" in loss
    assert "step 5: the gradient is not finite" in gradient


def test_a_refused_step_leaves_no_gradient_where_it_is_offloaded(tmp_path: Path) -> None:
    """DeepSpeed itself would add the next step's to it, and refuse every step from there on."""
    run = run_worker(
        1, tmp_path, zero_stage=1, offload="optimizer", accumulation=2, precision="bf16"
    )
    assert_refused(run)
    assert run["resumed"] == run["whole"][SAVED:]


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("stage", "offload"),
    [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (1, "optimizer"), (2, "optimizer"),
     (3, "optimizer_and_parameters")],
)  # fmt: skip
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_refused_step_leaves_no_trace_at_any_stage(
    tmp_path: Path, stage: int, offload: str, accumulation: int, precision: str
) -> None:
    run = run_worker(
        2, tmp_path, zero_stage=stage, offload=offload, accumulation=accumulation,
        precision=precision,
    )  # fmt: skip
    assert_refused(run)
    assert run["resumed"] == run["whole"][SAVED:]


def test_a_loss_that_is_not_finite_stops_the_run_by_name() -> None:
    batches = [cast(Batch, SimpleNamespace(keys=[key])) for key in ("gold/a", "gold/b")]
    check_finite({"box": 1.0}, 3, batches)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteLossError, match="step 3: loss 'box'.*gold/a, gold/b"):
            check_finite({"loss": 1.0, "box": bad}, 3, batches)


def derived(cuda: bool = True, world_size: int = 4, **train: Any) -> dict[str, Any]:
    return zero_config(TrainConfig(**train), world_size, cuda)


def test_the_deepspeed_configuration_says_off_where_a_missing_key_would_mean_on() -> None:
    plain = derived(max_grad_norm=0.0, zero_stage=3, precision="fp32", cuda=False)
    assert plain["gradient_clipping"] == 0.0
    assert plain["zero_optimization"]["stage"] == 3
    assert plain["zero_optimization"]["overlap_comm"] is False
    assert not plain["bf16"]["enabled"]
    assert not plain["fp16"]["enabled"]


def test_the_batch_is_shared_by_ranks_and_micro_batches() -> None:
    settings = derived(global_batch=64, accumulation=4)
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["gradient_accumulation_steps"] == 4
    with pytest.raises(ConfigError, match=r"\(64\).*multiple of 12.*ranks \(4\).*\(3\)"):
        derived(global_batch=64, accumulation=3)


def test_offloading_is_only_derived_where_deepspeed_can_do_it() -> None:
    optimizer = derived(zero_stage=1, offload="optimizer")["zero_optimization"]
    assert optimizer["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "offload_param" not in optimizer
    both = derived(zero_stage=3, offload="optimizer_and_parameters")["zero_optimization"]
    assert both["offload_param"] == both["offload_optimizer"]
    assert "offload_optimizer" not in derived(zero_stage=3)["zero_optimization"]
    with pytest.raises(ConfigError, match=r"train\.zero_stage must be 1 or more"):
        TrainConfig(zero_stage=0, offload="optimizer")
    with pytest.raises(ConfigError, match=r"train\.zero_stage must be 3 or more"):
        TrainConfig(zero_stage=2, offload="optimizer_and_parameters")


def test_half_precision_reduces_and_accumulates_gradients_in_fp32() -> None:
    half = derived(precision="bf16", accumulation=2)
    assert half["bf16"] == {"enabled": True}
    assert half["communication_data_type"] == "fp32"
    assert half["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in derived(precision="bf16")


def test_fp16_scales_the_loss_dynamically_and_is_refused_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fp16 = derived(precision="fp16")["fp16"]
    assert fp16["enabled"] is True
    assert (fp16["loss_scale"], fp16["initial_scale_power"]) == (0, 16)
    train = TrainConfig(precision="fp16")
    check_engine(train, world_size=2, cuda=True)
    with pytest.raises(ConfigError, match=r"train\.precision=fp16 needs a GPU"):
        check_engine(train, world_size=2, cuda=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {precision: fp16}\ndata: {mixture: {gold: 1}}\n")
    if not torch.cuda.is_available():
        assert main(["pretrain", str(recipe), f"run_dir={tmp_path / 'run'}"]) == 2
        assert "train.precision=fp16 needs a GPU" in capsys.readouterr().err


ON_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


LATER = [pytest.param(stage, marks=pytest.mark.slow) for stage in (2, 3)]


@pytest.mark.parametrize("stage", [0, 1, *LATER])
def test_an_overflow_of_fp16_is_told_and_changes_nothing_and_at_the_lowest_scale_it_is_an_error(
    stage: int,
) -> None:
    assert_overflows_are_told(stage, {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=ON_GPU) for stage in range(4)])
def test_twenty_steps_of_fp16_on_a_gpu(stage: int) -> None:
    assert_overflows_are_told(stage, {})


def assert_overflows_are_told(stage: int, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, str(FP16), str(stage)],
        env=os.environ | {"WORLD_SIZE": "1", "RANK": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["told"]) == 20
    for step, told in enumerate(found["told"]):
        assert told["loss_scale"] > 1 and math.isfinite(told["loss"])
        assert told["left_out"] == (step == 10), step
        assert told["changed"] == (0 if step == 10 else 2), step  # the weights, and their average
    assert "step 20: the gradient is not finite" in found["refused"]
    assert found["kept"]


def test_ranks_that_can_not_share_the_batch_are_refused_before_they_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {precision: fp32, global_batch: 6, accumulation: 4}\n")
    arguments = [f"run_dir={tmp_path / 'run'}", "data.mixture.gold=1", "train.processes=2"]
    assert main(["pretrain", str(recipe), *arguments]) == 2
    assert "train.global_batch (6) must be a multiple of 8" in capsys.readouterr().err


def test_the_published_schedule_warms_up_and_drops_at_67_and_89_percent() -> None:
    train = TrainConfig(steps=100_000, warmup_steps=2000, warmup_factor=0.001)
    at = [schedule_factor(s, train) for s in (0, 1000, 2000, 66_999, 67_000, 88_999, 89_000)]
    assert at == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01])
    for step in range(2000):
        assert schedule_factor(step, train) == pytest.approx(0.001 + 0.999 * step / 2000)


def test_without_a_factor_the_warm_up_begins_at_one_share_and_ends_at_the_full_rate() -> None:
    train = TrainConfig(steps=1000, warmup_steps=150)
    assert [schedule_factor(s, train) for s in range(150)] == [(s + 1) / 150 for s in range(150)]


def test_milestones_and_those_of_weight_decay_are_shares_of_the_run() -> None:
    train = TrainConfig(
        steps=1000, warmup_steps=0, milestones=(0.5,), weight_decay_milestones=(0.25, 0.75)
    )
    assert [schedule_factor(s, train) for s in (0, 499, 500, 999)] == [1, 1, 0.1, 0.1]
    decays = [decay_factor(s, train) for s in (0, 249, 250, 749, 750, 999)]
    assert decays == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    for wrong in ((0.9, 0.5), (0.0,), (1.0,)):
        with pytest.raises(ConfigError, match=r"train\.milestones must be rising shares"):
            dataclasses.replace(train, milestones=wrong)


def test_the_cosine_schedule_is_flat_and_then_falls_to_zero() -> None:
    train = TrainConfig(steps=1000, warmup_steps=10, schedule="cosine", flat_share=0.4)
    factors = [schedule_factor(s, train) for s in range(10, 1000)]
    assert factors[:390] == [1.0] * 390
    assert factors[390:] == sorted(factors[390:], reverse=True)
    assert factors[-1] < 1e-4


def rates(train: TrainConfig, step: int) -> dict[str, tuple[float, float]]:
    """Parameter -> learning rate and weight decay of the tiny model at a step."""
    model = build_model(preset("tiny"), seed=0)
    optimizer = build_optimizer(model, train)
    set_rates(optimizer, step, train)
    found: dict[nn.Parameter, tuple[float, float]] = {
        parameter: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return {name: found[parameter] for name, parameter in model.named_parameters()}


def test_parameters_follow_glips_rules_when_asked_to() -> None:
    train = TrainConfig(
        steps=100, warmup_steps=0, learning_rate=3e-4, head_learning_rate=2e-4,
        text_learning_rate=1e-5, bias_rate_factor=2.0, decayed="all_but_biases", weight_decay=0.01,
        weight_decay_milestones=(0.45,), eps=1e-6,
    )  # fmt: skip
    first, last = rates(train, 0), rates(train, 95)
    for name, (rate, decay) in first.items():
        base = {"text_encoder": 1e-5, "image_encoder": 3e-4, "pyramid": 3e-4}
        bias = "bias" in name
        assert rate == pytest.approx(base.get(name.split(".")[0], 2e-4) * (2 if bias else 1)), name
        assert decay == (0 if bias else 0.01), name
        assert last[name] == pytest.approx((rate * 0.01, decay * 0.1)), name
    for name in (
        "alignment_head.bias0",
        "alignment_head.bias_text",
        "image_encoder.swin.layers.0.blocks.0.attn.relative_position_bias_table",
    ):
        assert first[name][1] == 0, name
    for name in ("image_encoder.norms.0.weight", "alignment_head.log_scale"):
        assert first[name][1] == 0.01, name
    assert first["blocks.0.words.output.dense.weight"][0] == 2e-4  # BERT in the tower: base rate
    assert build_optimizer(build_model(preset("tiny"), 0), train).defaults["eps"] == 1e-6


def test_rate_factors_multiply_the_rates_of_what_they_name() -> None:
    train = TrainConfig(steps=100, warmup_steps=0)
    factors = {"box_head.": 10.0, "box_head.deltas": 0.5, "text_encoder": 0.1}
    plain, changed = rates(train, 0), rates(dataclasses.replace(train, rate_factors=factors), 0)
    for name, (rate, decay) in plain.items():
        expected = {"box_head": 10.0, "text_encoder": 0.1}.get(name.split(".")[0], 1.0)
        if name.startswith("box_head.deltas"):
            expected = 5.0
        assert changed[name] == pytest.approx((rate * expected, decay)), name
    with pytest.raises(ConfigError, match="train.rate_factors: no .* begins with 'bocks_head'"):
        rates(dataclasses.replace(train, rate_factors={"bocks_head": 2.0}), 0)


def test_by_default_matrices_alone_are_decayed_and_biases_learn_like_the_rest() -> None:
    shapes = {name: p.shape for name, p in build_model(preset("tiny"), 0).named_parameters()}
    for name, (rate, decay) in rates(TrainConfig(warmup_steps=0), 0).items():
        assert decay == (1e-4 if len(shapes[name]) > 1 else 0), name
        assert rate == (1e-5 if name.startswith("text_encoder.") else 1e-4), name
