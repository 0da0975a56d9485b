"""Steps that are left out, and losses that jump: what is kept, when it ends, what replays."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent))
from commands import ROOT, TIMEOUT, saved_state, smoke_recipe  # noqa: E402

from glipv2.jobs.prepare import prepare_set  # noqa: E402
from glipv2.model.batch import Batch  # noqa: E402
from glipv2.model.folders import step_url  # noqa: E402
from glipv2.pipeline import health  # noqa: E402
from glipv2.pipeline.checkpoint import write_folder  # noqa: E402
from glipv2.pipeline.config import PrepareConfig  # noqa: E402
from glipv2.pipeline.errors import ConfigError, NonFiniteLossError, UserError  # noqa: E402
from glipv2.pipeline.health import Health, Skip, read_skips  # noqa: E402
from glipv2.pipeline.runlog import read_losses  # noqa: E402
from glipv2.pipeline.train_config import SuperviseConfig  # noqa: E402

WORKER = ROOT / "tests" / "workers" / "mishap_worker.py"
LIMITS = SuperviseConfig(spike_factor=4.0, spike_back=30, spike_skip=50, max_left_out=2)


def batch() -> Batch:
    return Batch(
        images_B3HW=torch.full((1, 3, 4, 4), 7, dtype=torch.uint8),
        sizes_B2=torch.tensor([[4, 4]]),
        tokens_BT=torch.tensor([[5, 6]]),
        token_mask_BT=torch.ones(1, 2, dtype=torch.bool),
        mlm_labels_BT=torch.full((1, 2), -100),
        boxes_BN4=torch.zeros(1, 0, 4),
        box_mask_BN=torch.zeros(1, 0, dtype=torch.bool),
        positive_BNT=torch.zeros(1, 0, 2, dtype=torch.bool),
        box_category_BN=torch.zeros(1, 0, dtype=torch.int64),
        token_category_BT=torch.zeros(1, 2, dtype=torch.int64),
        keys=["gold/é"],
    )


def test_a_step_left_out_keeps_its_batch_and_too_many_in_a_hundred_end_the_run(
    tmp_path: Path,
) -> None:
    own = Health(str(tmp_path), LIMITS, [])
    whole = dataclasses.replace(
        batch(),
        masks_BNSS=torch.ones(1, 1, 2, 2, dtype=torch.uint8),
        answers_BV=torch.tensor([[0.3, 1.0]]),
    )
    for step in (3, 60, 103):  # the first is a hundred steps back by the third
        own.leave_out(step, [whole], NonFiniteLossError(f"step {step}: loss is nan"))
    [kept, *_] = sorted((tmp_path / "left_out").iterdir())
    with safe_open(kept, "pt") as file:
        assert json.loads(file.metadata()["keys"]) == ["gold/é"]
        assert file.metadata()["reason"] == "step 3: loss is nan"
        tensors = {name: t for name, t in vars(whole).items() if isinstance(t, torch.Tensor)}
        assert set(file.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor), name
    with pytest.raises(NonFiniteLossError, match=r"nan\. That makes 3 of the last 100 steps"):
        own.leave_out(104, [batch()], NonFiniteLossError("step 104: loss is nan"))


def steady(own: Health, last: int) -> None:
    for step in range(last - 100, last):
        assert own.spike(step, 1.0 + step % 2) is None  # median 1.5


def test_a_loss_far_above_the_median_of_a_hundred_sends_the_run_back(tmp_path: Path) -> None:
    write_folder(step_url(str(tmp_path), 150), {}, 150)
    own = Health(str(tmp_path), LIMITS, [])
    assert own.spike(0, 1000.0) is None  # nothing to compare with yet
    steady(own, 200)
    assert own.spike(200, 6.0) is None  # 4 times the median, not above
    skip = own.spike(201, 8.1)  # of now 49 ones, 50 twos and a six the median is 2
    assert skip == Skip(step=171, batches=50, spike_step=201, loss=8.1, usual_loss=2.0)
    own.note(skip)
    assert read_skips(str(tmp_path)) == [skip]
    again = Health(str(tmp_path), LIMITS, read_skips(str(tmp_path)))
    assert [again.batches_to_skip(step) for step in (170, 171, 172)] == [0, 50, 0]


def test_without_a_checkpoint_to_go_back_to_it_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(step_url(str(tmp_path), 180), {}, 180)
    own = Health(str(tmp_path), LIMITS, [])
    steady(own, 200)
    assert own.spike(200, 99.0) is None
    assert "no checkpoint before step 170 to go back to, so it goes on" in caplog.text


def test_a_loss_that_spikes_again_and_again_ends_the_run(tmp_path: Path) -> None:
    write_folder(step_url(str(tmp_path), 0), {}, 0)
    before = [Skip(10 * i, 50, 10 * i + 5, 9.0, 1.0) for i in range(LIMITS.max_rollbacks)]
    own = Health(str(tmp_path), LIMITS, before)
    steady(own, 200)
    with pytest.raises(UserError, match="after 3 times of going back"):
        own.spike(200, 99.0)


def test_off_means_off_and_a_factor_of_one_is_refused(tmp_path: Path) -> None:
    own = Health(str(tmp_path), SuperviseConfig(), [])
    steady(own, 200)
    assert own.spike(200, 1e9) is None
    with pytest.raises(ConfigError, match=r"supervise\.spike_factor"):
        SuperviseConfig(spike_factor=1.0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mishaps")
    options = PrepareConfig(source="toy", set="toy_detection", count=40, size=64, seed=1)
    prepare_set(str(folder / "data" / "toy_detection"), options)
    return smoke_recipe(
        folder,
        data={"root": str(folder / "data"), "mixture": {"toy_detection": 1}},
        train={
            "steps": 12,
            "checkpoint_every": 1,
            "keep_checkpoints": 20,
            "processes": 1,
            "flat_share": 1.0,
        },
        supervise={"spike_factor": 10, "spike_back": 2, "spike_skip": 3},
    )


def train(recipe: Path, run: Path, *settings: str) -> str:
    done = subprocess.run(
        [sys.executable, str(WORKER), str(recipe), f"run_dir={run}", *settings],
        cwd=ROOT,
        env=os.environ | {"WORLD_SIZE": "1", "RANK": "0"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_a_step_without_update_changes_nothing_and_a_spike_is_gone_back_from_and_replays(
    recipe: Path, tmp_path: Path
) -> None:
    said = train(recipe, tmp_path / "run", "nan=3", "spike=9")
    assert "step 3: loss 'loss' is nan" in said
    assert len(saved_state(tmp_path / "run", 3)) == 1
    assert (
        saved_state(tmp_path / "run", 4)
        == saved_state(tmp_path / "run", 3)
        != saved_state(tmp_path / "run", 5)
    )
    [skip] = read_skips(str(tmp_path / "run"))
    assert (skip.step, skip.batches, skip.spike_step) == (7, 3, 9)
    assert "step 9: the loss is" in said
    assert "going back to step 7 or before, without the 3 batches from there" in said
    losses = read_losses(str(tmp_path / "run"))
    assert [entry["step"] for entry in losses] == [s for s in range(12) if s != 3]

    # A run that knows of the skip from the start never meets the spike, and is the same run.
    (tmp_path / "replay").mkdir()
    skips = (tmp_path / "run" / health.SKIPS).read_bytes()
    (tmp_path / "replay" / health.SKIPS).write_bytes(skips)
    train(recipe, tmp_path / "replay", "nan=3")
    assert read_losses(str(tmp_path / "replay")) == losses
    assert saved_state(tmp_path / "replay", 12) == saved_state(tmp_path / "run", 12)


@pytest.mark.slow
def test_a_kill_right_after_going_back_was_decided_does_not_resume_beyond_it(
    recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(recipe, run, "train.steps=10")
    Health(str(run), SuperviseConfig(), []).note(Skip(7, 3, 9, 50.0, 1.0))  # and then it died
    said = train(recipe, run, "train.steps=12")
    assert "step-000010 is of a stretch that was rolled back after a loss spike" in said
    assert [entry["step"] for entry in read_losses(str(run))] == list(range(12))
    (tmp_path / "replay").mkdir()
    (tmp_path / "replay" / health.SKIPS).write_bytes((run / health.SKIPS).read_bytes())
    train(recipe, tmp_path / "replay")
    assert read_losses(str(tmp_path / "replay")) == read_losses(str(run))
