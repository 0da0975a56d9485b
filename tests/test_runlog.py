"""The loss log is cut back to where training resumes."""

from pathlib import Path

from glipv2.pipeline.runlog import StepLog, read_losses


def test_resuming_drops_the_lines_after_the_checkpoint_and_a_half_written_one(
    tmp_path: Path,
) -> None:
    log = StepLog(str(tmp_path), 0)
    for step in range(5):
        log.append(step, {"loss": 1.0 / 3 + step})
    with open(tmp_path / "losses.jsonl", "ab") as file:
        file.write(b'{"step": 5, "lo')
    assert [entry["step"] for entry in read_losses(str(tmp_path))] == [0, 1, 2, 3, 4]
    resumed = StepLog(str(tmp_path), 3)
    resumed.append(3, {"loss": 7.0})
    assert [(e["step"], e["loss"]) for e in read_losses(str(tmp_path))] == [
        (0, 1.0 / 3), (1, 1.0 / 3 + 1), (2, 1.0 / 3 + 2), (3, 7.0),
    ]  # fmt: skip


def test_an_object_store_gets_the_whole_log_at_each_flush() -> None:
    log = StepLog("memory://runlog/run", 0)
    log.append(0, {"loss": 1.0})
    assert read_losses("memory://runlog/run") == []
    log.flush()
    assert read_losses("memory://runlog/run") == [{"step": 0, "loss": 1.0}]
