"""What a pretraining shows and writes down beside its losses."""

import gzip
import json
import struct
from pathlib import Path

import pytest
import torch

from glipv2.pipeline import profiling, recorder, storage
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.flops import training_operations
from glipv2.pipeline.profiling import Profile
from glipv2.pipeline.recorder import Recorder, StepTimes
from glipv2.pipeline.trackers import check_trackers
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
    assert "box 1.00 token 2.00" in said


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


def test_a_tracker_whose_package_is_missing_is_refused_with_the_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers(config("memory://none"))
    for name in ("wandb", "mlflow"):
        with pytest.raises(ConfigError, match=rf"log\.{name}.*pip install glipv2\[{name}\]"):
            check_trackers(config("memory://none", **{name: "mine"}))


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


def test_operations_are_three_times_those_of_the_forward_pass() -> None:
    layer = torch.nn.Linear(20, 30)
    assert training_operations(lambda: layer(torch.ones(10, 20))) == 3 * 2 * 10 * 20 * 30


def test_memory_is_what_this_process_had_and_not_its_parent() -> None:
    before = recorder.memory_gb()
    held = torch.ones(100_000_000 // 4)
    assert recorder.memory_gb() >= before
    assert held.sum() > 0
