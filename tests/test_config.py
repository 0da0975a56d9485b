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
        ("train.learning_rate=.inf", r"train\.learning_rate must be positive, and finite"),
        ("train.weight_decay=.inf", r"train\.weight_decay must be 0 or more, and finite"),
        ("losses.mlm=-1", r"losses\.mlm must be 0 or more, and finite, not -1"),
        ("losses.mlm=.nan", r"losses\.mlm must be 0 or more, and finite, not nan"),
        ("label.num_actors=[2,1]", r"label\.num_actors must be \[least, most\], 0 < least <= most"),
        ("train.steps=many", r"train\.steps must be int, not 'many'"),
        ("train.steps=true", r"train\.steps must be int, not true"),
        ("train.zero_stage=4", r"train\.zero_stage must be one of 0, 1, 2, 3"),
        ("train.betas=[0.9]", r"train\.betas must have 2 entries"),
        ("data.flip=2", r"data\.flip must be between 0 and 1"),
        ("data.mixture.gold=-1", r"data\.mixture\.gold must be positive"),
        ("model.preset=huge", r"model\.preset"),
        ("model.levels=9", r"model\.levels must be 3, 4 or 5, not 9"),
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


def test_a_mapping_of_the_command_line_replaces_names_and_merges_settings(tmp_path: Path) -> None:
    recipe = write(
        tmp_path,
        label={"inputs": {"a": "b", "c": "d"}, "max_boxes": 7},
        eval={"suites": {"x": {"set": "x_val", "limit": 3}, "y": {"set": "y_val"}}},
        phases={"p": {"data": {"mixture": {"a": 1}}, "train": {"steps": 3}}},
    )

    def given(*overrides: str) -> RunConfig:
        return load_config(recipe, list(overrides))

    assert given("label.inputs={e: f}").label.inputs == {"e": "f"}
    assert given("label.inputs={}").label.inputs == {}
    assert given("label.inputs.c=z").label.inputs == {"a": "b", "c": "z"}
    assert given("label={inputs: {e: f}}").label == given("label.inputs={e: f}").label
    assert given("label={teacher: t}").label.inputs == {"a": "b", "c": "d"}
    assert given("label={teacher: t}").label.max_boxes == 7
    assert list(given("eval.suites={z: {set: z_val}}").eval.suites) == ["z"]
    suites = given("eval.suites.x={set: other}").eval.suites
    assert (suites["x"].set, suites["x"].limit, suites["y"].set) == ("other", 3, "y_val")
    assert given("prepare={}").prepare == {}
    assert list(given("phases={q: {}}").phases) == ["q"]
    assert given("phases.p={train: {steps: 5}}").phases["p"] == {
        "data": {"mixture": {"a": 1}}, "train": {"steps": 5},
    }  # fmt: skip
    mixture = {"data": {"mixture": {"b": 2}}, "train": {"steps": 3}}
    assert given("phases.p.data.mixture={b: 2}").phases["p"] == mixture


def test_the_mapping_of_a_phase_merges_wherever_it_stands(tmp_path: Path) -> None:
    recipe = write(tmp_path, data={"mixture": {"a": 1.0}})
    phase = "phases={p: {data: {mixture: {b: 2}}}}"
    assert load_config(recipe, [phase], "p").data.mixture == {"a": 1.0, "b": 2.0}
    assert load_config(recipe, [phase], "p").phases == {}
    own = "data.mixture={c: 3}"  # wins over the phase, too
    assert load_config(recipe, [phase, own], "p").data.mixture == {"c": 3.0}


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("train: {steps: 5}\nseed: 1\ntrain: {steps: 7}\n", 3, "train"),
        ("train:\n  steps: 5\n  steps: 7\n", 3, "steps"),
        ("data:\n  mixture: {1: 1.0,\n    '1': 2.0}\n", 3, "1"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str, line: int, key: str) -> None:
    recipe = tmp_path / "twice.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=rf"twice\.yaml, line {line}, .*key {key} .*twice"):
        load_config(str(recipe), [])
    (tmp_path / "on_top.yaml").write_text("extends: twice.yaml\n")
    with pytest.raises(ConfigError, match=rf"twice\.yaml, line {line}, "):
        load_config(str(tmp_path / "on_top.yaml"), [])
    with pytest.raises(ConfigError, match=r"^label\.inputs=\{a: b, a: c\}: .*key a .*twice"):
        load_config(write(tmp_path), ["label.inputs={a: b, a: c}"])


def test_a_key_may_change_what_an_alias_brings(tmp_path: Path) -> None:
    recipe = tmp_path / "alias.yaml"
    recipe.write_text(
        "prepare:\n  a: &a {source: toy, set: toy_val, count: 3}\n"
        "  b: &b {<<: *a, count: 4}\n  c: {<<: *b, count: 5}\n"
    )
    found = load_config(str(recipe), []).prepare
    assert [(one.set, one.count) for one in found.values()] == [
        ("toy_val", 3), ("toy_val", 4), ("toy_val", 5),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=abc", "train.steps must be int, not 'abc'"),
        ("train.stepz=3", "unknown config key train.stepz"),
        ("train.steps=0", "train.steps must be positive"),
        ("phases.p.train.stepz=3", "unknown config key phases.p.train.stepz"),
        ("phases.p={train: {steps: abc}}", "phases.p.train.steps must be int"),
        ("rounds=2", "rounds need"),
        ("label.inputs=[", "line 1, column 2: not valid YAML"),
    ],
)
def test_a_mistake_of_the_command_line_is_not_laid_to_the_file(
    tmp_path: Path, override: str, said: str
) -> None:
    recipe = write(tmp_path, phases={"p": {}})
    with pytest.raises(ConfigError) as told:
        load_config(recipe, ["seed=2", override])
    assert str(told.value).startswith(f"{override}: ") and said in str(told.value)
    assert recipe not in str(told.value)
    wrong = write(tmp_path, phases={"p": {"train": {"steps": "abc"}}})
    with pytest.raises(ConfigError, match=r"recipe\.yaml: phases\.p\.train\.steps must be int"):
        load_config(wrong, ["seed=2", "phases.p.train.threads=2"])


def test_null_is_called_what_it_is_in_yaml(tmp_path: Path) -> None:
    for key, kind in (("label.score_threshold", "float"), ("label.inputs", "a mapping"),
                      ("train", "a mapping"), ("label.num_actors", "a list"),
                      ("train.zero_stage", "one of 0, 1, 2, 3")):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"{key} must be {kind}, not null"):
            load_config(write(tmp_path), [f"{key}=null"])
    with pytest.raises(ConfigError, match="not null; left out, it keeps its default"):
        load_config(write(tmp_path), ["label.score_threshold=null"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {steps: 5\nseed: 1\n", "line 2, column 5: not valid YAML: "),
        ("train:\n\tsteps: 5\n", "line 2, column 1: not valid YAML: "),
        ("a: \x00", "position 3: not valid YAML: "),
        (b"a: \xff\xfe", "not valid YAML: it is no UTF-8"),
    ],
)
def test_invalid_yaml_is_told_in_one_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as told:
        load_config(str(recipe), [])
    message = str(told.value)
    assert message.startswith(f"recipe {recipe}, {said}") and "\n" not in message


def test_a_folder_is_no_recipe_but_may_hold_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; a recipe is a YAML file, and none is in"):
        load_config(str(tmp_path), [])
    recipe = write(tmp_path)
    with pytest.raises(ConfigError, match=f"a recipe is a YAML file, perhaps {recipe}$"):
        load_config(str(tmp_path), [])
