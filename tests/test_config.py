"""Recipes: typed, strict, and explained when wrong."""

from pathlib import Path

import pytest
import yaml

from glipv2.jobs.cli import main
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.config_loader import as_tree, dump_config, from_tree, load_config
from glipv2.pipeline.errors import ConfigError

RECIPES = sorted((Path(__file__).parent.parent / "infra" / "recipes").glob("*.yaml"))


def write(tmp_path: Path, **tree: object) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), **tree}))
    return str(path)


def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    recipe = write(tmp_path, train={"learnin_rate": 3})
    with pytest.raises(ConfigError, match=r"train\.learnin_rate.*train\.learning_rate\?"):
        load_config(recipe, [])


def test_a_mistake_in_any_phase_is_refused_by_its_full_name(tmp_path: Path) -> None:
    recipe = write(tmp_path, phases={"teacher": {"train": {"stepz": 3}}})
    with pytest.raises(ConfigError, match=r"phases\.teacher\.train\.stepz"):
        load_config(recipe, [])


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.steps=0", r"train\.steps must be positive"),
        ("train.steps=many", r"train\.steps must be int, not 'many'"),
        ("train.steps=true", r"train\.steps must be int"),
        ("train.zero_stage=4", r"train\.zero_stage must be one of 0, 1, 2, 3"),
        ("train.betas=[0.9]", r"train\.betas must have 2 entries"),
        ("data.flip=2", r"data\.flip must be between 0 and 1"),
        ("data.mixture.gold=-1", r"data\.mixture\.gold must be positive"),
        ("model.preset=huge", r"model\.preset"),
        ("train", r"must look like section\.key=value"),
    ],
)
def test_a_wrong_value_is_refused_by_its_full_name(
    tmp_path: Path, override: str, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(write(tmp_path), [override])


def test_overrides_win_over_the_phase_and_the_phase_over_the_recipe(tmp_path: Path) -> None:
    recipe = write(
        tmp_path,
        train={"steps": 10, "global_batch": 4, "learning_rate": "1e-4"},
        phases={"teacher": {"train": {"steps": 20, "global_batch": 8}}},
    )
    train = load_config(recipe, ["train.steps=30"], "teacher").train
    assert (train.steps, train.global_batch, train.learning_rate) == (30, 8, 1e-4)


def test_a_phase_has_its_own_folder_and_shares_the_data(tmp_path: Path) -> None:
    recipe = write(tmp_path, phases={"student": {"train": {"init": "teacher"}}})
    config = load_config(recipe, ["run_dir=/elsewhere"], "student")
    assert config.run_dir == "/elsewhere/student"
    assert config.set_url("toy_val") == "/elsewhere/data/toy_val"
    assert config.train.init == "/elsewhere/teacher"
    assert config.set_url("s3://bucket/set") == "s3://bucket/set"


def test_a_preset_gives_the_sizes_that_the_recipe_does_not_name(tmp_path: Path) -> None:
    model = load_config(write(tmp_path, model={"preset": "tiny", "width": 32}), []).model
    assert model.width == 32
    assert model.text_encoder.width == 64


def test_the_resolved_configuration_reads_back_as_the_same(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, model={"preset": "tiny"}), ["data.pad_to=[64, 96]"])
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_config(config))
    assert load_config(str(saved), []) == config
    assert from_tree(RunConfig, as_tree(config)) == config


def test_a_recipe_may_extend_another_and_name_only_what_differs(tmp_path: Path) -> None:
    write(tmp_path, train={"steps": 10, "global_batch": 4})
    (tmp_path / "longer.yaml").write_text("extends: recipe.yaml\ntrain: {steps: 99}\n")
    train = load_config(str(tmp_path / "longer.yaml"), []).train
    assert (train.steps, train.global_batch) == (99, 4)
    (tmp_path / "round.yaml").write_text("extends: round.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        load_config(str(tmp_path / "round.yaml"), [])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_in_every_phase(recipe: Path) -> None:
    config = load_config(str(recipe), [])
    assert {load_config(str(recipe), [], phase).run_dir for phase in config.phases} == {
        f"{config.run_dir}/{phase}" for phase in config.phases
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pretrain", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["run", "RECIPE", "train.stepz=1"], "did you mean train.steps?"),
        (["pretrain", "RECIPE"], "data.mixture is empty"),
        (["evaluate", "RECIPE"], "nothing to evaluate"),
        (["label", "RECIPE"], "label.teacher and label.inputs must be set"),
        (["run", "RECIPE"], "needs the phases teacher, student, control"),
    ],
)
def test_a_mistake_ends_with_exit_code_2_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    recipe = write(tmp_path, model={"preset": "tiny"})
    assert main([recipe if word == "RECIPE" else word for word in arguments]) == 2
    assert said in capsys.readouterr().err
