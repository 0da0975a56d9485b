"""Real DeepSpeed on one and two gloo ranks."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from glipv2.model.batch import Batch
from glipv2.pipeline.engine import check_finite, zero_config
from glipv2.pipeline.errors import NonFiniteLossError
from glipv2.pipeline.optim import schedule_factor
from glipv2.pipeline.train_config import TrainConfig

WORKER = Path(__file__).parent / "workers" / "engine_worker.py"
SAVED = 5


def run_worker(ranks: int, stage: int, folder: Path) -> dict[str, list[float]]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
        "--nproc-per-node", str(ranks), str(WORKER), str(stage), str(folder),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def test_a_state_saved_by_two_zero2_ranks_resumes_bit_for_bit_and_fits_any_stage_and_world_size(
    tmp_path: Path,
) -> None:
    saved = run_worker(2, 2, tmp_path)
    assert saved["resumed"] == saved["whole"][SAVED:]
    other_stage = run_worker(2, 3, tmp_path)
    assert other_stage["resumed"] == pytest.approx(saved["resumed"], rel=1e-6)
    one_rank = run_worker(1, 1, tmp_path)
    assert one_rank["resumed"] == pytest.approx(saved["resumed"], rel=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run_by_name() -> None:
    batch = cast(Batch, SimpleNamespace(keys=["gold/a", "gold/b"]))
    check_finite({"box": 1.0}, 3, batch)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteLossError, match="step 3: loss 'box'.*gold/b"):
            check_finite({"loss": 1.0, "box": bad}, 3, batch)


def test_the_deepspeed_configuration_says_off_where_a_missing_key_would_mean_on() -> None:
    derived = zero_config(TrainConfig(max_grad_norm=0.0, zero_stage=3, precision="fp32"), 4)
    assert derived["gradient_clipping"] == 0.0
    assert derived["zero_optimization"] == {"stage": 3}
    assert not derived["bf16"]["enabled"]


def test_the_published_schedule_warms_up_and_drops_at_67_and_89_percent() -> None:
    train = TrainConfig(steps=100_000, warmup_steps=2000)
    at = [schedule_factor(s, train) for s in (0, 999, 2000, 66_999, 67_000, 88_999, 89_000)]
    assert at == pytest.approx([0.001, 0.5, 1, 1, 0.1, 0.1, 0.01])


def test_the_cosine_schedule_is_flat_and_then_falls_to_zero() -> None:
    train = TrainConfig(steps=1000, warmup_steps=10, schedule="cosine", flat_share=0.4)
    factors = [schedule_factor(s, train) for s in range(10, 1000)]
    assert factors[:390] == [1.0] * 390
    assert factors[390:] == sorted(factors[390:], reverse=True)
    assert factors[-1] < 1e-4
