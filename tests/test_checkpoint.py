"""Checkpoints exist when they are committed and whole, and not before."""

import re
import sys
from pathlib import Path

import pytest

from glipv2.model.folders import step_url
from glipv2.pipeline import storage
from glipv2.pipeline.checkpoint import (
    COMMIT,
    commit,
    committed_steps,
    drop_unlisted,
    newest_checkpoint,
    open_checkpoint,
    prune_checkpoints,
    resolve_checkpoint,
    verify,
    write_folder,
    write_model,
)
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.errors import ConfigError, DataError
from glipv2.pipeline.launch import launch_ranks
from glipv2.pipeline.train_config import SuperviseConfig, TrainConfig

FILES = {"model.safetensors": b"weights", "trainer.json": b"{}"}


def save_checkpoint(run_dir: str, step: int, files: dict[str, bytes]) -> str:
    url = step_url(run_dir, step)
    write_folder(url, files, step)
    return url


def newest(run_dir: str) -> tuple[str, dict[str, bytes]] | None:
    found = newest_checkpoint(run_dir)
    return found and (found.url, {name: found.read(name) for name in found.files})


@pytest.fixture(params=["local", "memory"])
def run_dir(request: pytest.FixtureRequest, tmp_path: object) -> str:
    name = request.node.name.replace("[", "-").replace("]", "")
    return str(tmp_path) if request.param == "local" else f"memory://{name}/run"


def test_a_saved_checkpoint_reads_back_and_is_the_newest(run_dir: str) -> None:
    assert newest(run_dir) is None
    save_checkpoint(run_dir, 100, FILES)
    url = save_checkpoint(run_dir, 200, {**FILES, "trainer.json": b"{2}"})
    assert newest(run_dir) == (url, {**FILES, "trainer.json": b"{2}"})
    assert resolve_checkpoint(run_dir) == url
    assert resolve_checkpoint(url) == url


def test_a_model_is_not_written_over_the_step_of_a_run_but_over_an_earlier_model(
    run_dir: str,
) -> None:
    url = save_checkpoint(run_dir, 100, FILES)
    model = {"model.safetensors": b"others"}
    copied = storage.join(run_dir, "copied")
    write_folder(copied, FILES, 100)
    with pytest.raises(ConfigError, match=r"copied holds trainer\.json as well"):
        write_model(copied, model, 0)
    for inside in ("", "checkpoints", "checkpoints/step-000100", "checkpoints/step-000101"):
        with pytest.raises(ConfigError, match=f"to the run {re.escape(run_dir)}; write to"):
            write_model(storage.join(run_dir, inside), model, 0)
    assert newest(run_dir) == (url, FILES) and committed_steps(run_dir) == [100]
    out = storage.join(run_dir, "out")
    write_model(out, {"model.safetensors": b"earlier"}, 0)
    write_model(out, model, 3)
    assert open_checkpoint(out).read("model.safetensors") == b"others"
    assert open_checkpoint(out).step == 3


def test_a_save_that_was_cut_off_before_its_commit_does_not_exist(
    run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = save_checkpoint(run_dir, 100, FILES)

    def killed_at_commit(url: str, data: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "create_once", killed_at_commit)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(run_dir, 200, FILES)
    monkeypatch.undo()
    assert committed_steps(run_dir) == [100]
    assert newest(run_dir) == (good, FILES)
    again = save_checkpoint(run_dir, 200, FILES)
    assert newest(run_dir) == (again, FILES)


@pytest.mark.parametrize("damage", [b"weightz", b"weig", None])
def test_an_altered_truncated_or_missing_file_makes_the_step_before_the_newest(
    run_dir: str, damage: bytes | None
) -> None:
    good = save_checkpoint(run_dir, 100, FILES)
    url = save_checkpoint(run_dir, 200, FILES)
    victim = storage.join(url, "model.safetensors")
    storage.delete(victim) if damage is None else storage.write_bytes(victim, damage)
    with pytest.raises(DataError, match=r"model\.safetensors"):
        open_checkpoint(url).read("model.safetensors")
    [problem] = verify(open_checkpoint(url))
    assert "step-000200/model.safetensors" in problem
    assert newest(run_dir) == (good, FILES)


TWO_RANKS = """
import pathlib, sys
import torch
from glipv2.pipeline import dist
from glipv2.pipeline.resume import checkpoint_to_resume
torch.distributed.init_process_group("gloo")
for run in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    step = checkpoint_to_resume(str(run), []).step
    (run / f"rank-{dist.rank()}").write_text(str(step))
torch.distributed.destroy_process_group()
"""


def test_what_one_rank_finds_damaged_both_pass_over(tmp_path: Path) -> None:
    """Each verifies a part of the files."""
    files = {f"state-0badcafe-{rank:05d}.safetensors": b"moments" for rank in (0, 1)}
    files |= {"model.safetensors": b"weights", "trainer.json": b'{"skips": 0}'}
    for victim in files:
        for step in (100, 200):
            url = save_checkpoint(str(tmp_path / victim), step, files)
        flipped = bytearray(files[victim])
        flipped[3] ^= 1
        Path(url, victim).write_bytes(flipped)
    config = RunConfig(
        run_dir=str(tmp_path),
        train=TrainConfig(processes=2, global_batch=2),
        supervise=SuperviseConfig(max_restarts=0),
    )
    launch_ranks([sys.executable, "-c", TWO_RANKS, str(tmp_path)], config)
    for victim in files:
        resumed = [(tmp_path / victim / f"rank-{rank}").read_text() for rank in (0, 1)]
        assert resumed == ["100", "100"], victim
        assert committed_steps(str(tmp_path / victim)) == [100]


@pytest.mark.parametrize("record", [b"", b'{"step": 200, "fi'])
def test_an_empty_or_cut_commit_record_is_no_commit(
    run_dir: str, record: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    good = save_checkpoint(run_dir, 100, FILES)
    url = save_checkpoint(run_dir, 200, FILES)
    storage.write_bytes(storage.join(url, "COMMIT.json"), record)
    assert newest(run_dir) == (good, FILES)
    [warning] = [entry.getMessage() for entry in caplog.records]
    assert "step-000200/COMMIT.json is damaged" in warning
    again = save_checkpoint(run_dir, 200, FILES)
    assert newest(run_dir) == (again, FILES)


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_over_silently(run_dir: str) -> None:
    url = save_checkpoint(run_dir, 100, FILES)
    storage.write_bytes(storage.join(url, "trainer.json"), b"other")
    with pytest.raises(DataError, match=r"none can be read(?s:.)*trainer\.json"):
        newest_checkpoint(run_dir)


def test_pruning_keeps_the_newest_and_counts_only_committed_ones(run_dir: str) -> None:
    for step in (100, 200, 300):
        save_checkpoint(run_dir, step, FILES)
    for begun in (50, 250, 400, 500, 600):  # saves that were cut off
        storage.write_bytes(storage.join(step_url(run_dir, begun), "model.safetensors"), b"w")
    prune_checkpoints(run_dir, keep=2)
    assert committed_steps(run_dir) == [200, 300]
    for gone in (50, 100, 250):
        assert storage.list_names(step_url(run_dir, gone)) == []
    assert storage.list_names(step_url(run_dir, 400)) == ["model.safetensors"]


def test_what_another_attempt_left_in_a_committed_step_is_removed(run_dir: str) -> None:
    url = save_checkpoint(run_dir, 100, FILES)
    storage.write_bytes(storage.join(url, "state-0badcafe-00001.safetensors"), b"half")
    drop_unlisted(open_checkpoint(url))
    assert storage.list_names(url) == sorted([COMMIT, *FILES])
    assert newest(run_dir) == (url, FILES)


def test_of_two_processes_that_commit_one_step_the_second_is_told(run_dir: str) -> None:
    url = save_checkpoint(run_dir, 100, FILES)
    listed = open_checkpoint(url).files
    assert not commit(url, 100, listed)
    assert open_checkpoint(url).files == listed


def test_a_folder_without_checkpoint_is_named_in_the_error(run_dir: str) -> None:
    with pytest.raises(DataError, match="no checkpoint in"):
        resolve_checkpoint(run_dir)
