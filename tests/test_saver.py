"""Checkpoints written beside training: what they hold, and what becomes of a save that fails."""

import errno
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn

from glipv2.jobs.cli import main
from glipv2.pipeline import dist, storage
from glipv2.pipeline.checkpoint import committed_steps, newest_checkpoint, verify
from glipv2.pipeline.ema import Ema
from glipv2.pipeline.errors import UserError
from glipv2.pipeline.fragments import WEIGHT
from glipv2.pipeline.position import Position
from glipv2.pipeline.resume import checkpoint_to_resume, engine_state, restore
from glipv2.pipeline.saver import Saver, model_parts, state_files, whole_tensors

Run = tuple[Any, Ema | None, Saver]


def run(folder: Path, ema_decay: float = 0.0, patience: float = 60.0) -> Run:
    """ZeRO 0 in fp32, where DeepSpeed leaves torch's optimiser as it is; one layer is frozen."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 2))
    network[1].requires_grad_(False)
    trained = [p for p in network.parameters() if p.requires_grad]
    engine = SimpleNamespace(module=network, optimizer=torch.optim.AdamW(trained, lr=0.1))
    ema = Ema(engine, ema_decay) if ema_decay else None
    parts = model_parts(network, {"config.json": b"{}"})
    return engine, ema, Saver(str(folder), engine, ema, parts, keep=2, patience=patience)


def step(own: Run, number: int) -> None:
    engine, ema, saver = own
    x_BD = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
    engine.module(x_BD).square().mean().backward()
    saver.wait_until_copied()
    engine.optimizer.step()
    engine.optimizer.zero_grad()
    if ema:
        ema.update()


def save(own: Run, number: int) -> None:
    own[2].save(number, Position(number, "", {}), {"skips": 0, **engine_state(own[0])})


def weights(own: Run) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in own[0].module.named_parameters()}


def test_a_save_holds_the_state_of_its_step_while_training_goes_on(tmp_path: Path) -> None:
    own = run(tmp_path)
    step(own, 0)
    save(own, 1)
    expected = weights(own)
    step(own, 1)
    own[2].wait()
    found = newest_checkpoint(str(tmp_path))
    assert found is not None
    saved = load(found.read("model.safetensors"))
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(saved[name], tensor), name
    assert found.read("config.json") == b"{}"
    step(own, 2)
    expected = weights(own)

    again = run(tmp_path)
    again[0].module.load_state_dict(saved)
    assert restore(found, again[0], None) == Position(1, "", {})
    for number in (1, 2):
        step(again, number)
    assert all(torch.equal(weights(again)[name], expected[name]) for name in expected)


def test_the_average_is_the_formula_in_float64_and_is_what_the_model_file_holds(
    tmp_path: Path,
) -> None:
    own = run(tmp_path, ema_decay=0.9)
    average = {name: tensor.double() for name, tensor in weights(own).items()}
    for number in range(6):
        step(own, number)
        for name, tensor in weights(own).items():
            average[name] = 0.9 * average[name] + 0.1 * tensor.double()
    save(own, 6)
    own[2].wait()
    found = newest_checkpoint(str(tmp_path))
    assert found is not None
    saved = load(found.read("model.safetensors"))
    for name, tensor in average.items():
        assert torch.allclose(saved[name].double(), tensor, rtol=1e-6, atol=1e-7), name
    assert torch.equal(saved["1.weight"], weights(own)["1.weight"])  # frozen
    urls = [found.file(name) for name in state_files(list(found.files))]
    raw = whole_tensors(urls, {"0.weight": torch.Size([7, 5])}, WEIGHT)
    assert torch.equal(raw["0.weight"], weights(own)["0.weight"])
    assert not torch.equal(raw["0.weight"], saved["0.weight"])
    again = run(tmp_path, ema_decay=0.9)
    restore(found, again[0], again[1])
    for other, mine in zip(again[1].shares, own[1].shares, strict=True):
        assert torch.equal(other.values["ema"], mine.values["ema"])


def test_without_the_file_of_every_rank_there_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = run(tmp_path, patience=0.3)
    step(own, 0)
    save(own, 1)
    own[2].wait()
    step(own, 1)
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "gather_objects", lambda value: [value, value])
    one_of_two = run(tmp_path, patience=0.3)
    step(one_of_two, 0)
    save(one_of_two, 2)  # the other rank was killed before its file
    with pytest.raises(TimeoutError, match=r"step-000002: state-\w+-00001\.safetensors was not "):
        one_of_two[2].wait()
    assert committed_steps(str(tmp_path)) == [1]
    monkeypatch.undo()
    save(own, 2)  # the same step by another attempt
    own[2].wait()
    found = newest_checkpoint(str(tmp_path))
    assert found and found.step == 2
    assert sorted(storage.list_names(found.url)) == sorted(["COMMIT.json", *found.files])


def test_a_full_disk_is_told_at_the_next_step_and_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = run(tmp_path)
    step(own, 0)
    save(own, 1)
    own[2].wait()

    def full(url: str, pieces: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", url)

    monkeypatch.setattr(storage, "write_pieces", full)
    save(own, 2)
    while not own[2].writing.done():
        threading.Event().wait(0.01)
    with pytest.raises(OSError, match="No space left on device"):
        step(own, 2)
    found = newest_checkpoint(str(tmp_path))
    assert found and (found.step, verify(found)) == (1, [])


def test_while_a_writer_is_blocked_the_next_step_ends_and_changes_nothing_of_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = run(tmp_path)
    step(own, 0)
    expected = weights(own)
    write, goes_on = storage.write_pieces, threading.Event()

    def blocked(*arguments: Any) -> Any:
        goes_on.wait(10)
        return write(*arguments)

    monkeypatch.setattr(storage, "write_pieces", blocked)
    save(own, 1)
    step(own, 1)
    assert own[2].writing and not own[2].writing.done()
    assert not torch.equal(weights(own)["0.weight"], expected["0.weight"])
    assert committed_steps(str(tmp_path)) == []
    goes_on.set()
    own[2].wait()
    found = newest_checkpoint(str(tmp_path))
    assert found is not None
    assert torch.equal(load(found.read("model.safetensors"))["0.weight"], expected["0.weight"])


def test_without_the_model_file_there_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = run(tmp_path)
    step(own, 0)
    write = storage.write_bytes

    def fails(url: str, data: bytes) -> None:
        if url.endswith("model.safetensors"):
            raise OSError(errno.EIO, "Input/output error", url)
        write(url, data)

    monkeypatch.setattr(storage, "write_bytes", fails)
    save(own, 1)
    with pytest.raises(OSError, match="Input/output error"):
        own[2].wait()
    [folder] = (tmp_path / "checkpoints").iterdir()
    assert "COMMIT.json" not in {path.name for path in folder.iterdir()}
    assert newest_checkpoint(str(tmp_path)) is None


def test_of_five_saves_the_newest_that_are_to_be_kept_are_left(tmp_path: Path) -> None:
    own = run(tmp_path)
    for number in range(5):
        step(own, number)
        save(own, number + 1)
    own[2].wait()
    assert committed_steps(str(tmp_path)) == [4, 5]
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"step-000004", "step-000005"}


def test_a_second_trainer_that_commits_first_stops_this_one(tmp_path: Path) -> None:
    own, other = run(tmp_path), run(tmp_path)
    for each in (own, other):
        step(each, 0)
    save(other, 1)
    other[2].wait()
    save(own, 1)
    with pytest.raises(UserError, match="two trainers write to"):
        own[2].wait()


def test_a_damaged_step_is_passed_over_and_can_be_saved_again(tmp_path: Path) -> None:
    own = run(tmp_path)
    for number in (1, 2):
        step(own, number)
        save(own, number)
    own[2].wait()
    found = newest_checkpoint(str(tmp_path))
    assert found and found.step == 2
    victim = Path(found.file(state_files(list(found.files))[0]))
    data = bytearray(victim.read_bytes())
    data[-5] ^= 1
    victim.write_bytes(data)
    earlier = checkpoint_to_resume(str(tmp_path), [])
    assert earlier and earlier.step == 1
    assert committed_steps(str(tmp_path)) == [1]
    save(own, 2)
    own[2].wait()
    found = newest_checkpoint(str(tmp_path))
    assert found and found.step == 2


def test_export_copies_a_step_out_as_a_model_averaged_or_raw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = run(tmp_path / "run", ema_decay=0.9)
    own[2].parts = model_parts(own[0].module, {"config.json": b"{}", "vocab.txt": b"a\n"})
    for number in (1, 2):
        step(own, number)
        save(own, number)
        own[2].wait()
    raw, average = weights(own), {s.name: s.values["ema"] for s in own[1].shares}
    command = ["export", str(tmp_path / "run"), "--out"]
    assert main([*command, str(tmp_path / "average")]) == 0
    assert main([*command, str(tmp_path / "raw"), "--raw", "--step", "2"]) == 0
    assert "weights of training of" in capsys.readouterr().out
    for name, expected in (("average", average), ("raw", raw)):
        found = load((tmp_path / name / "model.safetensors").read_bytes())
        assert found.keys() == raw.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key].flatten(), tensor.flatten()), (name, key)
    assert torch.equal(found["1.weight"], raw["1.weight"])
    assert main([*command, str(tmp_path / "none"), "--step", "9"]) == 2
    assert "has no committed step 9; it has 1, 2" in capsys.readouterr().err
