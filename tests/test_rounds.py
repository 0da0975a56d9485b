"""`rounds: N`: what the phases of later rounds are, and when they are not worth it."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from commands import ROOT, SMOKE, smoke_recipe  # noqa: E402

sys.path.insert(0, str(ROOT / "infra"))
import reproduce_toy  # noqa: E402

from glipv2.jobs import label_plan  # noqa: E402
from glipv2.jobs import run as main_job  # noqa: E402
from glipv2.pipeline.config_loader import config_from_tree, dump_config  # noqa: E402
from glipv2.pipeline.errors import ConfigError  # noqa: E402

TREE = {
    "run_dir": "runs/r",
    "data": {"root": "data"},
    "rounds": 3,
    "label": {"teacher": "teacher", "inputs": {"pairs": "grounded"}, "calibration": "gold"},
    "eval": {"label_truth": {"grounded": "truth"}},
    "phases": {
        "teacher": {"data": {"mixture": {"boxes": 1}}},
        "student": {
            "data": {"mixture": {"boxes": 0.5, "grounded": 0.5}},
            "train": {"init": "teacher", "steps": 7},
        },
        "control": {"data": {"mixture": {"boxes": 1}}, "train": {"init": "teacher"}},
    },
}


def test_each_round_has_the_student_before_as_its_teacher() -> None:
    config = config_from_tree(copy.deepcopy(TREE), [])
    assert list(config.phases) == ["teacher", "student", "student_2", "student_3", "control"]
    third = config_from_tree(copy.deepcopy(TREE), [], "student_3")
    assert third.run_dir == "runs/r/student_3" and third.train.steps == 7
    assert third.train.init == third.label.teacher == "runs/r/student_2"
    assert third.label.inputs == {"pairs": "grounded_3"}
    assert third.data.mixture == {"boxes": 0.5, "grounded_3": 0.5}
    assert config.eval.label_truth == {
        "grounded": "truth", "grounded_2": "truth", "grounded_3": "truth"
    }  # fmt: skip
    first = config_from_tree(copy.deepcopy(TREE), [], "student")
    assert first.train.init == "runs/r/teacher" and first.label.inputs == {"pairs": "grounded"}
    again = config_from_tree(yaml.safe_load(dump_config(config)), [])
    assert again == config  # the saved configuration means the same
    third = config_from_tree(copy.deepcopy(TREE), ["rounds=3", "all_rounds=true"], "student_3")
    assert config_from_tree(yaml.safe_load(dump_config(third)), []) == third  # what ranks read


@pytest.mark.parametrize("override", ["label.inputs={pairs: mine}", "label.inputs.pairs=mine"])
def test_sets_and_teacher_of_the_command_line_are_the_first_rounds(override: str) -> None:
    overrides = [override, "label.teacher=elsewhere/model", "phases.student.data.mixture={mine: 1}"]
    second = config_from_tree(copy.deepcopy(TREE), overrides, "student_2")
    assert second.label.inputs == {"pairs": "mine_2"} and second.data.mixture == {"mine_2": 1}
    assert second.label.teacher == "runs/r/student"
    first = config_from_tree(copy.deepcopy(TREE), ["label.teacher=hf:owlv2"], "student")
    assert first.label.teacher == "hf:owlv2"


def test_one_round_adds_nothing() -> None:
    config = config_from_tree(copy.deepcopy(TREE), ["rounds=1"])
    assert list(config.phases) == ["teacher", "student", "control"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rounds=0", "rounds must be positive"),
        ("label.calibration=", "rounds need label.calibration"),
        ("label.inputs.pairs=elsewhere", "rounds need a phase whose data.mixture"),
    ],
)
def test_rounds_that_can_not_be_are_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_from_tree(copy.deepcopy(TREE), [override])


@pytest.mark.parametrize(
    ("qualities", "worth_it"), [((0.7, 0.8), [True]), ((0.7, 0.8, 0.79), [True, False])]
)
def test_a_round_is_worth_it_while_labels_on_gold_get_better(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    qualities: tuple[float, ...],
    worth_it: list[bool],
) -> None:
    tree = {**copy.deepcopy(TREE), "run_dir": str(tmp_path)}
    config = config_from_tree(tree, [])
    phases = {name: config_from_tree(copy.deepcopy(tree), [], name) for name in config.phases}
    teachers = {config.label.teacher: qualities[0]} | {
        phases[f"student_{number}"].label.teacher: quality
        for number, quality in enumerate(qualities[1:], start=2)
    }
    monkeypatch.setattr(label_plan, "gold_quality", lambda own: {"f1": teachers[own.label.teacher]})
    found = [
        main_job._labels_get_better(config, phases, f"student_{number}")
        for number in range(2, len(qualities) + 1)
    ]
    assert found == worth_it
    judged = json.loads((tmp_path / "rounds.json").read_text())
    assert [quality["f1"] for quality in judged.values()] == list(qualities)
    assert list(judged) == ["student", "student_2", "student_3"][: len(qualities)]


@pytest.mark.parametrize("all_rounds", [False, True])
def test_no_student_is_labelled_for_or_trained_after_labels_got_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    all_rounds: bool,
) -> None:  # fmt: skip
    tree = {**copy.deepcopy(TREE), "run_dir": str(tmp_path), "rounds": 4, "all_rounds": all_rounds}
    config = config_from_tree(copy.deepcopy(tree), [])
    phases = {name: config_from_tree(copy.deepcopy(tree), [], name) for name in config.phases}
    teachers = [config.label.teacher, *(phases[f"student_{n}"].label.teacher for n in (2, 3, 4))]
    f1 = dict(zip(teachers, (0.7, 0.8, 0.79, 0.9), strict=True))  # the last is never asked for
    monkeypatch.setattr(label_plan, "gold_quality", lambda own: {"f1": f1[own.label.teacher]})
    trained, labelled = list[str](), list[str]()
    for stage, does in {
        "prepare.prepare_recipe": lambda _: None,
        "pretrain.pretrain": lambda own, _: trained.append(Path(own.run_dir).name),
        "label.label": lambda own: labelled.extend(own.label.inputs.values()),
        "evaluate_main.all_models": lambda _: [],
        "evaluate.evaluate": lambda *_: None,
        "summary.summarise": lambda _: {"models": 1},
        "report.write_report": lambda _: None,
    }.items():
        monkeypatch.setattr(f"glipv2.jobs.{stage}", does)
    assert main_job.main_job(config, phases) == {"models": 1}
    later = ["student_3", "student_4"] if all_rounds else []
    assert trained == ["teacher", "student", "student_2", *later, "control"]
    assert labelled == ["grounded", "grounded_2", "grounded_3", "grounded_4"][: 2 + len(later)]
    timed = {path.stem for path in (tmp_path / "seconds").iterdir()}
    assert timed & {"label_student_2", "label_student_3"} == {
        "label_student_2", *(f"label_{name}" for name in later[:1])
    }  # fmt: skip
    assert ("all the same, round 3" if all_rounds else "no round 3") in caplog.text
    assert list(json.loads((tmp_path / "rounds.json").read_text()))[2:] == (later or ["student_3"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_rounds_of_the_main_job_and_their_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce_toy, "SEEDS", (1,))
    monkeypatch.chdir(ROOT)

    def reproduce(**changes: Any) -> tuple[str, list[dict[str, Any]]]:
        """What it says, and the rounds of its summary."""
        label = {**yaml.safe_load(SMOKE.read_text())["label"], "calibration": "toy_calibration",
                 "target_precision": 0.05}  # fmt: skip
        recipe = smoke_recipe(tmp_path, rounds=2, label=label, **changes)
        monkeypatch.setattr(sys, "argv", ["", "--recipe", str(recipe), "--out", str(tmp_path)])
        assert reproduce_toy.main() == 0
        summary = json.loads((tmp_path / "seed-1" / "summary.json").read_text())
        return "".join(capfd.readouterr()), summary["rounds"]

    said, rounds = reproduce()
    assert [found["student"] for found in rounds] == ["student", "student_2"]
    better = rounds[1]["gold"]["f1"] > rounds[0]["gold"]["f1"]
    second = tmp_path / "seed-1" / "student_2" / "checkpoints"
    assert second.exists() == better and ("no round 2" in said) == (not better)
    assert "round 2: labels on gold" in said
    assert "| 1 | student | 0." in said and "| 1 | 1 | unseen | " in said
    assert reproduce()[1] == rounds
    reproduce(all_rounds=True)
    assert second.exists()
