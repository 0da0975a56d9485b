"""The engine against a plain loop without DeepSpeed, on the same global batches of toy shards."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "workers"))
import equality_worker as worker  # noqa: E402

from glipv2.jobs.prepare import prepare_set  # noqa: E402
from glipv2.model.glip import GLIPv2, build_model  # noqa: E402
from glipv2.pipeline.config import PrepareConfig  # noqa: E402
from glipv2.pipeline.train_config import TrainConfig  # noqa: E402

EVERYTHING = ["image_encoder", "text_encoder", "fusion"]
FEW = [
    {"zero_stage": 1, "accumulation": 4},
    {"zero_stage": 3, "accumulation": 1, "checkpoint_activations": EVERYTHING},
]
ALL = [
    {"zero_stage": stage, "accumulation": accumulation, "checkpoint_activations": parts}
    for stage, accumulation, parts in itertools.product((0, 1, 2, 3), (1, 4), ([], EVERYTHING))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("equality")
    for name in worker.SETS:
        options = PrepareConfig(source="toy", set=name, count=60, size=64, seed=1)
        prepare_set(str(folder / name), options)
    return str(folder)


def plain_loop(folder: str, steps: int, train: TrainConfig) -> list[float]:
    """One process, torch's own AdamW with a group for every parameter, everything spelled out."""
    model = build_model(worker.MODEL, seed=3).train()
    weights = dataclasses.asdict(worker.losses_of(train))
    optimizer = torch.optim.AdamW(
        [{"params": [parameter], "name": name} for name, parameter in model.named_parameters()],
        betas=(0.9, 0.999), eps=1e-5, fused=False, foreach=False,
    )  # fmt: skip
    data = worker.loader(folder, dataclasses.replace(train, accumulation=1))
    found = []
    for step, (batch, _) in enumerate(itertools.islice(data.batches(data.start()), steps)):
        set_rates(optimizer, step)
        losses = model(batch, weights=worker.losses_of(train))
        loss = sum(weights[name] * value for name, value in losses.items())
        optimizer.zero_grad()
        loss.backward()
        clip(model)
        optimizer.step()
        found.append(loss.item())
    return found


def set_rates(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Facts G.1 for 50 steps with 5 to warm up, and GLIP-L's weight decay but large."""
    rate = 0.001 + 0.999 * step / 5 if step < 5 else 1.0
    rate *= 0.1 if step >= 33.5 else 1
    rate *= 0.1 if step >= 44.5 else 1
    decay = 100 * (0.1 if step >= 22.5 else 1) * (0.1 if step >= 29.5 else 1)
    for group in optimizer.param_groups:
        bias = "bias" in group["name"]
        base = 1e-7 if group["name"].startswith("text_encoder.") else 1e-6
        group["lr"] = base * rate * (2 if bias else 1)
        group["weight_decay"] = 0 if bias else decay


def clip(model: GLIPv2) -> None:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
    for gradient in gradients:
        gradient.mul_(min(1.0, 1.0 / norm))


def engine_losses(folder: str, steps: int, settings: list[dict[str, Any]]) -> list[list[float]]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
        "--nproc-per-node", "2", worker.__file__, folder, str(steps), json.dumps(settings),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=3500)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("losses ")]
    return [json.loads(line.removeprefix("losses ")) for line in lines]


def largest_differences(
    folder: str, steps: int, settings: list[dict[str, Any]]
) -> dict[str, float]:
    """Setting -> the largest relative difference of a step's loss to the plain loop's."""
    plain = {
        accumulation: plain_loop(
            folder, steps, dataclasses.replace(worker.TRAIN, accumulation=accumulation)
        )
        for accumulation in {changes["accumulation"] for changes in settings}
    }
    assert all(losses[0] != pytest.approx(losses[-1], rel=1e-2) for losses in plain.values())
    return {
        json.dumps(changes): max(
            abs(ours / peer - 1)
            for ours, peer in zip(losses, plain[changes["accumulation"]], strict=True)
        )
        for changes, losses in zip(settings, engine_losses(folder, steps, settings), strict=True)
    }


def test_six_steps_of_the_engine_are_those_of_a_plain_loop(folder: str) -> None:
    for setting, difference in largest_differences(folder, 6, FEW).items():
        assert difference < 1e-5, setting


def assert_bf16_stays_near_fp32(folder: str, stages: tuple[int, ...]) -> None:
    """At rates so high that six steps change the loss by far more than the precision does, and that
    the first one is above what a weight of 16 bits resolves."""
    rates = dict.fromkeys(("learning_rate", "head_learning_rate", "text_learning_rate"), 3e-4)
    full = {**rates, "weight_decay": 0.0, "warmup_steps": 0, "zero_stage": 0}
    settings = [full, *({**full, "precision": "bf16", "zero_stage": stage} for stage in stages)]
    expected, *found = engine_losses(folder, 6, settings)
    assert expected[-1] < 0.8 * expected[0]  # 0.9 at the rates of the other tests
    for losses in found:
        assert losses == pytest.approx(expected, rel=3e-2)
        assert losses != pytest.approx(expected, rel=1e-6)


def test_six_steps_in_bf16_stay_near_those_in_fp32(folder: str) -> None:
    assert_bf16_stays_near_fp32(folder, (0, 1))


@pytest.mark.slow
def test_six_steps_in_bf16_stay_near_those_in_fp32_where_gradients_are_cut_up(folder: str) -> None:
    assert_bf16_stays_near_fp32(folder, (2, 3))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_rank_without_any_box_trains_beside_one_with_boxes(folder: str) -> None:
    settings = [{"zero_stage": stage, "boxless": True} for stage in range(4)]
    found = engine_losses(folder, 4, settings)
    assert len(found) == len(settings)
    for losses in found:
        assert all(map(math.isfinite, losses))
        assert losses == pytest.approx(found[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_steps_are_those_of_a_plain_loop_for_any_stage_accumulation_and_checkpointing(
    folder: str,
) -> None:
    differences = largest_differences(folder, 50, ALL)
    print(json.dumps(differences, indent=1))  # noqa: T201
    for setting, difference in differences.items():
        assert difference < 1e-5, setting
