"""What the README says exists, exists."""

import re
import shlex
from pathlib import Path

import pytest

from glipv2.jobs.cli import COMMANDS, EXAMPLES, parse
from glipv2.pipeline.config_loader import load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMAND = re.compile(r"^    (glipv2 .+)$", re.MULTILINE)


@pytest.mark.parametrize("folder", ["jobs", "eval", "data_prep", "pipeline", "model", "infra"])
def test_the_file_map_names_every_file(folder: str) -> None:
    section = README.split(f"\n{folder}/ ", 1)[1].split("\n```")[0]
    listed = re.findall(r"^  (\w+\.py) ", section.split("\n", 1)[1], re.MULTILINE)
    own = listed[: len(sorted((ROOT / folder).glob("*.py"))) - (folder != "infra")]
    assert own == sorted(
        path.name for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"
    )


@pytest.mark.parametrize("line", COMMAND.findall(README))
def test_every_command_shown_is_understood(line: str) -> None:
    words = shlex.split(line)[1:]
    assert parse(words).command == words[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_of_the_help_is_understood(name: str) -> None:
    lines = EXAMPLES[name].replace("\\\n", " ").splitlines()
    shown = [shlex.split(line)[1:] for line in lines if line.startswith("  glipv2 ")]
    assert shown
    assert {parse(words).command for words in shown} == {name}


def test_overrides_may_stand_after_options() -> None:
    parsed = parse(["pretrain", "r.yaml", "seed=1", "--phase", "teacher", "train.steps=3"])
    assert (parsed.phase, parsed.overrides) == ("teacher", ["seed=1", "train.steps=3"])
    with pytest.raises(SystemExit):
        parse(["pretrain", "r.yaml", "--phases", "teacher"])


def test_every_command_is_shown() -> None:
    assert {name for name in COMMANDS if f"glipv2 {name}" not in README} <= {"run"}


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:infra|tests|pipeline)/[\w./]+)`", README)))
)
def test_every_path_named_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("text", [README, *EXAMPLES.values()], ids=["readme", *EXAMPLES])
def test_runs_and_steps_named_are_what_the_quickstart_leaves(text: str) -> None:
    recipe = str(ROOT / "infra" / "recipes" / "quickstart.yaml")
    run_dir = load_config(recipe, []).run_dir
    for path in re.findall(r"runs/quickstart[\w./-]*", text):
        assert path == run_dir or path.startswith(f"{run_dir}/"), path
        phase, *inside = path.removeprefix(run_dir).lstrip("/").split("/")
        if not phase or phase == "report.html":
            continue
        train = load_config(recipe, [], phase).train
        steps = {*range(0, train.steps, train.checkpoint_every), train.steps} - {0}
        kept = sorted(steps)[-train.keep_checkpoints :]
        assert "/".join(inside) in ("", *(f"checkpoints/step-{step:06d}" for step in kept)), path


def test_the_pictures_shown_exist() -> None:
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / path).is_file() for path in pictures)


@pytest.mark.parametrize(
    "path",
    sorted([ROOT / "README.md", *ROOT.glob("infra/**/*.md")]),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_link_of_a_page_leads_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    inside = [link.partition("#")[0] for link in links if "://" not in link]
    assert [link for link in inside if not (path.parent / link).exists()] == []
    assert inside or path.name != "README.md"


def test_every_make_target_shown_is_in_the_makefile() -> None:
    targets = set(re.findall(r"`?make ([a-z-]+)", README))
    makefile = (ROOT / "Makefile").read_text()
    assert {t for t in targets if f"\n{t}:" not in makefile} == set()


def test_the_wheel_holds_every_folder_of_the_package() -> None:
    declared = set(re.findall(r'"glipv2\.(\w+)"', (ROOT / "pyproject.toml").read_text()))
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert declared == found
