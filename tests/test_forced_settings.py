"""--force: a set is labelled on, a run trained on, with other settings than it was begun with."""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commands import finish, small_training
from in_process import without_ray
from label_recipe import SHARDS, write_pairs, write_pairs_and_teacher, write_recipe

from glipv2.data_prep import labelling
from glipv2.jobs.cli import main
from glipv2.jobs.label import open_labeller
from glipv2.jobs.label_plan import make_plan
from glipv2.model.folders import step_url
from glipv2.pipeline.checkpoint import write_folder
from glipv2.pipeline.config_loader import config_from_tree, load_config
from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.optim import schedule_factor
from glipv2.pipeline.run_settings import note_settings
from glipv2.pipeline.runlog import read_losses
from glipv2.pipeline.shard_reader import iterate_records, open_shard_set

NAMES = [f"shard-{number:06d}" for number in range(SHARDS)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Pairs, a teacher and a recipe that labels them into OUT."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_pairs_and_teacher(tmp_path)
    write_recipe(tmp_path, tmp_path)
    with without_ray():
        yield tmp_path


def cut_off(out: Path) -> None:
    """As if the labelling had been killed before its last shard."""
    for name in (f"{NAMES[-1]}.tar", f"commits/{NAMES[-1]}.json", "dataset.json"):
        (out / name).unlink()


def test_labels_of_other_settings_are_added_by_force_and_each_shard_says_whose_it_is(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    recipe, out = folder / "recipe.yaml", folder / "out"
    assert main(["label", str(recipe)]) == 0
    cut_off(out)
    first, claim = [(out / f"{name}.tar").read_bytes() for name in NAMES[:2]], out / "label.json"
    begun = claim.read_bytes()
    other = ["label", str(recipe), "label.max_boxes=2"]
    assert main(other) == 2
    told = capsys.readouterr().err
    assert "max_boxes: 20 there, 2 now" in told and "--force" in told
    assert claim.read_bytes() == begun

    assert main([*other, "--force", "--dry-run"]) == 0
    assert "max_boxes: 20 there, 2 now" in capsys.readouterr().out
    assert claim.read_bytes() == begun
    caplog.clear()
    assert main([*other, "--force"]) == 0
    assert caplog.text.count("max_boxes: 20 there, 2 now") == 1
    assert [(out / f"{name}.tar").read_bytes() for name in NAMES[:2]] == first
    by_settings = [shard.stats["label_settings"] for shard in open_shard_set(str(out)).shards]
    assert by_settings[0] == by_settings[1] != by_settings[2]
    claimed = json.loads(claim.read_bytes())
    assert claimed.pop("before") == {by_settings[0]: json.loads(begun)}
    assert claimed == {**json.loads(begun), "max_boxes": 2}
    whose = [record.provenance["label_settings"] for record in iterate_records(str(out))]
    assert list(dict.fromkeys(whose)) == [by_settings[0], by_settings[2]]

    # from then on these are the set's, without insisting; once it is complete, nothing else is
    capsys.readouterr()
    assert main(other) == 0
    assert "nothing was left to do" in capsys.readouterr().out
    assert main(["label", str(recipe)]) == 2
    assert "max_boxes: 2 there, 20 now" in capsys.readouterr().err
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main(["label", str(recipe), "--force"]) == 0
    assert "nothing was left to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    cut_off(out)
    assert main(other) == 0
    assert [shard.stats["label_settings"] for shard in open_shard_set(str(out)).shards] == (
        by_settings
    )


def test_no_force_mixes_labels_of_other_pairs_into_a_set(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["label", str(folder / "recipe.yaml"), "--force"]
    assert main(command) == 0
    shutil.rmtree(folder / "pairs")
    write_pairs(folder, seed=2)
    capsys.readouterr()
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "input: " in told and "--force" not in told


def test_labels_of_another_version_of_the_code_are_other_labels(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = str(folder / "recipe.yaml")
    assert main(["label", recipe]) == 0
    cut_off(folder / "out")
    plan = make_plan(load_config(recipe, []))
    known = labelling.VERSION
    monkeypatch.setattr(labelling, "VERSION", known + 1)
    assert main(["label", recipe]) == 2
    assert f"version: {known} there, {known + 1} now" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=rf"has a glipv2 \(labels of version {known + 1}\) of"):
        open_labeller(open_shard_set(str(folder / "pairs")), plan.settings, plan.stamp)
    assert main(["label", recipe, "--force"]) == 0


def test_a_run_goes_on_with_other_rates_and_losses_by_force_only_and_keeps_what_it_was_trained_with(
    tmp_path: Path,
) -> None:
    train = {"processes": 1, "zero_stage": 0, "steps": 2, "checkpoint_every": 2}
    recipe = small_training(tmp_path, train=train, losses={"mlm": 0})
    run = tmp_path / "undisturbed"
    finish("pretrain", recipe)
    before = (run / "config.yaml").read_bytes()
    other = ["train.steps=4", "train.learning_rate=1e-4", "losses.mlm=1"]
    told = finish("pretrain", recipe, *other, code=2)
    assert "train.learning_rate: 0.0015 there, 0.0001 now" in told and "--force" in told
    told = finish("pretrain", recipe, *other, "model.width=32", "--force", code=2)
    assert "model.width" in told and "by --force" not in told
    assert (run / "config.yaml").read_bytes() == before

    told = finish("pretrain", recipe, *other, "--force")
    assert "losses.mlm: 0" in told and "it goes on from step 2 with" in told
    assert (run / "config-until-000002.yaml").read_bytes() == before
    assert Path(step_url(str(run), 4)).exists()
    config = load_config(str(run / "config.yaml"), [])
    assert config.train.learning_rate == 1e-4
    logged = {entry["step"]: entry for entry in read_losses(str(run))}
    for step in (2, 3):
        expected = 1e-4 * schedule_factor(step, config.train)
        assert logged[step]["lr"] == pytest.approx(expected, rel=1e-6)
        assert logged[step]["mlm"] > 0
    assert logged[1]["lr"] > 1e-4
    finish("pretrain", recipe, *other)  # from then on these are the run's
    resolved = (run / "config.yaml").read_bytes()
    told = finish("pretrain", recipe, *other, "losses.mlm=2", "--force")  # but nothing is left
    assert "all 4 steps are done already" in told and "it goes on" not in told
    assert (run / "config.yaml").read_bytes() == resolved
    assert not (run / "config-until-000004.yaml").exists()


def test_forced_settings_are_noted_at_the_step_that_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_from_tree({"run_dir": str(tmp_path), "train": {"steps": 9}}, [])
    note_settings(config)
    for step in (3, 6):
        write_folder(step_url(str(tmp_path), step), {"trainer.json": b"{}"}, step)
    (Path(step_url(str(tmp_path), 6)) / "trainer.json").write_bytes(b"damaged")
    changed = replace(config, train=replace(config.train, learning_rate=1e-5))
    note_settings(changed, force=True)
    assert [path.name for path in tmp_path.glob("config-until-*")] == ["config-until-000003.yaml"]
