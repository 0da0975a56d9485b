"""What a pretraining shows and writes down beside its losses."""

import gzip
import json
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glipv2.pipeline import profiling, recorder, storage
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.flops import training_operations
from glipv2.pipeline.profiling import Profile
from glipv2.pipeline.recorder import Recorder, StepTimes
from glipv2.pipeline.runlog import read_losses
from glipv2.pipeline.train_config import LogConfig, ProfileConfig, TrainConfig

LOSSES = {"lr": 0.1, "loss": 3.0, "box": 1.0, "token": 2.0}


def config(run_dir: str, **log: object) -> RunConfig:
    return RunConfig(
        run_dir=run_dir,
        train=TrainConfig(steps=20, global_batch=8),
        log=LogConfig(every=2, peak_tflops=1e-9, **log),  # type: ignore[arg-type]
    )


def train(own: Recorder, first: int, last: int) -> None:
    for step in range(first, last):
        times = StepTimes(seconds=2.0, waited=0.5, pixels=100)
        own.step(step, LOSSES | {"loss": 3.0 - step}, times)


def points(folder: Path) -> dict[tuple[str, int], float]:
    """(name, step) -> value of TensorBoard's event files, by the format of their records."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            at += 12 + size + 4
    return found


def test_metrics_tensorboard_bar_and_summary_say_what_the_steps_took(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Recorder(config(str(tmp_path)), 0)
    own.operations_per_pixel = 5.0
    train(own, 0, 5)
    own.bar.refresh()
    own.close(6)  # one more step had no update
    lines = storage.read_json_lines(str(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 3]
    figures = {"images_per_second": 4.0, "data_wait_share": 0.25, "loss": 0.0, "box": 1.0}
    assert lines[1] == pytest.approx(lines[1] | figures)
    # 5 operations a pixel, 50 pixels a second, of 1000 that could be done
    assert lines[1]["flops_utilisation"] == pytest.approx(0.25)
    shown = points(tmp_path / "tensorboard")
    assert shown["images_per_second", 3] == 4.0
    assert [shown["loss", step] for step in (1, 3)] == [2.0, 0.0]
    summary = json.loads((tmp_path / "pretrain.json").read_text())
    expected = {"steps": 6, "from_step": 0, "to_step": 6, "left_out": 1, "loss": 1.0}
    assert summary == summary | expected
    said = capsys.readouterr().err
    assert "steps 0 to 6 in" in said
    assert "25.0% of the time waiting for data, 25.0% of the device's arithmetic" in said
    assert "loss of the last 5 steps 1.000, 1 left out" in said
    shown_live = r" 5/20 \[\d\d:\d\d<\d\d:\d\d, [^,]+, loss -1\.00 box 1\.00 token 2\.00, 4 img/s, "
    assert re.search(shown_live + r"data 25%, \d+\.\d GB, flops 25%\]", said)


def test_steps_that_overflow_in_fp16_are_counted_and_the_scale_is_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Recorder(config(str(tmp_path)), 0)
    for step in (0, 1, 2, 4, 5):  # step 3 was not finite at all
        told = {"loss_scale": 2.0 ** (10 - step), "left_out": float(step in (1, 2))}
        own.step(step, LOSSES | told, StepTimes(seconds=2.0, waited=0.5, pixels=100))
    own.close(6)
    lines = storage.read_json_lines(str(tmp_path / "metrics.jsonl"))
    assert [(line["loss_scale"], line["left_out"]) for line in lines] == [(512, 1), (32, 3)]
    assert [entry["left_out"] for entry in read_losses(str(tmp_path))] == [0, 1, 1, 0, 0]
    assert points(tmp_path / "tensorboard")["left_out", 5] == 3
    assert json.loads((tmp_path / "pretrain.json").read_text())["left_out"] == 3
    assert "3 left out" in capsys.readouterr().err


def test_after_a_kill_logs_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    train(Recorder(config(str(tmp_path)), 0), 0, 9)  # never closed
    own = Recorder(config(str(tmp_path)), 4)
    train(own, 4, 8)
    own.close(8)
    lines = storage.read_json_lines(str(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 3, 5, 7]


def test_on_an_object_store_logs_arrive_with_each_flush() -> None:
    url = "memory://recorder/run"
    own = Recorder(config(url), 0)
    train(own, 0, 4)
    assert storage.list_names(f"{url}/tensorboard") == []
    own.flush()
    assert len(storage.read_json_lines(f"{url}/metrics.jsonl")) == 2
    [name] = storage.list_names(f"{url}/tensorboard")
    assert storage.size(f"{url}/tensorboard/{name}") > 0
    own.close(4)


def test_a_profile_holds_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    own = Profile(str(tmp_path), ProfileConfig(steps=2, skip=1))
    x = torch.ones(8, 8)
    for _ in range(5):
        x = torch.linalg.inv(x + 8 * torch.eye(8))
        own.step()
    folder = tmp_path / profiling.FOLDER
    trace = json.loads(gzip.decompress((folder / profiling.TRACE).read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("aten::linalg_inv") == 2
    assert "aten::linalg_inv" in (folder / profiling.TABLE).read_text()


@pytest.mark.parametrize(("asked", "held"), [({"steps": 50}, 3), ({"steps": 2, "skip": 0}, 2)])
def test_a_profile_that_the_end_of_the_run_cuts_short_holds_what_there_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: dict[str, int], held: int
) -> None:
    own = Recorder(replace(config(str(tmp_path)), profile=ProfileConfig(**asked)), 0)
    train(own, 0, 6)
    own.close(6)
    assert (tmp_path / profiling.FOLDER / profiling.TRACE).stat().st_size > 0
    assert f"{held} steps recorded" in capsys.readouterr().err


def test_a_profile_of_steps_that_never_came_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps in (2, 3):  # before it began, and before its first step
        own = Recorder(replace(config(str(tmp_path)), profile=ProfileConfig(steps=5)), 0)
        train(own, 0, steps)
        own.close(steps)
        said = capsys.readouterr().err
        assert f"no step recorded: this start of the run made {steps}" in said
    assert not (tmp_path / profiling.FOLDER).exists()


def test_operations_are_three_times_those_of_the_forward_pass() -> None:
    layer = torch.nn.Linear(20, 30)
    assert training_operations(lambda: layer(torch.ones(10, 20))) == 3 * 2 * 10 * 20 * 30


def test_memory_is_what_this_process_had_and_not_its_parent() -> None:
    before = recorder.memory_gb()
    held = torch.ones(100_000_000 // 4)
    assert recorder.memory_gb() >= before
    assert held.sum() > 0
