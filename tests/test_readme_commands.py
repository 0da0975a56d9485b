"""Every command that the README shows is run as it stands there, and does what it promises.

Those that start Ray or ranks, and those that serve, are processes, as a user starts them.
"""

import csv
import io
import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from s3fs import S3FileSystem

sys.path.insert(0, str(Path(__file__).parent))
from checklist import assert_tests_exist  # noqa: E402
from commands import ROOT, wait_for  # noqa: E402
from in_process import without_ray  # noqa: E402
from page_parser import assert_self_contained, shown  # noqa: E402
from readme_folder import (  # noqa: E402
    IMAGES,
    PAIRS,
    README,
    begin,
    fenced,
    make_folder,
    run,
    run_inside,
    shown_command,
    shown_commands,
    shown_recipes,
    stop,
    write_detection_set,
)
from s3_server import environment  # noqa: E402
from sample_records import jpeg  # noqa: E402
from scored_runs import write_result  # noqa: E402

from glipv2.data_prep.sources import KINDS  # noqa: E402
from glipv2.eval.odinw import odinw_sets  # noqa: E402
from glipv2.jobs.cli import main  # noqa: E402
from glipv2.jobs.prepare import prepare_set  # noqa: E402
from glipv2.model.config import PRESETS, TINY  # noqa: E402
from glipv2.pipeline import ray_map  # noqa: E402
from glipv2.pipeline.checkpoint import committed_steps, load_model  # noqa: E402
from glipv2.pipeline.config import PrepareConfig  # noqa: E402
from glipv2.pipeline.config_loader import load_config  # noqa: E402
from glipv2.pipeline.shards import ShardSet, open_shard_set  # noqa: E402

HERE, LAUNCHERS, DRILL = "test_readme_commands.py", "test_launchers.py", "test_submit_drill.py"
MAIN_JOB = "test_main_job.py::test_the_steps_one_by_one_leave_the_same_files_and_figures"
ON_A_CLUSTER = f"{DRILL}::test_every_stage_runs_from_and_to_an_object_store"
ROUNDS = "test_rounds.py::test_two_rounds_of_the_main_job_and_their_tables"
ELSEWHERE = {
    "make": f"{HERE}::test_what_make_would_start_is_there",
    "pip install": f"{HERE}::test_every_extra_named_is_one",
    "export AWS_": f"{HERE}::test_pairs_go_to_a_bucket_and_runs_are_read_from_there",
    "glipv2 prepare recipe RECIPE": MAIN_JOB,
    "glipv2 pretrain RECIPE": MAIN_JOB,
    "glipv2 label RECIPE": MAIN_JOB,
    "glipv2 evaluate RECIPE": MAIN_JOB,
    "glipv2 label web.yaml --address": ON_A_CLUSTER,
    "glipv2 submit": ON_A_CLUSTER,
    "glipv2 jobs": f"{DRILL}::test_a_job_is_stopped_by_name",
    "glipv2 pretrain my.yaml --address": f"{LAUNCHERS}::test_ray_train_starts_dead_workers_again",
    "torchrun": f"{LAUNCHERS}::test_torchrun_starts_dead_ranks_again_and_passes_on_that_it_is_told_"
    "to_stop",
    "deepspeed": f"{LAUNCHERS}::test_deepspeeds_launcher_ends_with_a_killed_rank_and_the_same_"
    "command_goes_on",
    "sbatch": "test_slurm.py::test_a_preempted_run_is_queued_again_and_goes_on",
    "ray drain-node": "test_ray_trainer.py::test_a_node_that_is_to_go_costs_no_step",
    "python infra/kill_drill.py": f"{LAUNCHERS}::test_the_kill_drill_finds_nothing",
    "python infra/reproduce_toy.py": ROUNDS,
    "python infra/parity.py": "test_glip_parity.py::"
    "test_every_tensor_of_the_original_is_reproduced",
}
"""Beginning of commands -> the test that runs them, or what they do, elsewhere."""
RUN_HERE = re.compile(r'\b(?:run|run_inside|run_both|begin)\(\s*"([^"]+)"')


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    make_folder(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, to work in."""
    shutil.copytree(whole, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def bucket(s3_folder: str, s3_bare: S3FileSystem) -> S3FileSystem:
    """The store, with the bucket of the README."""
    if not s3_bare.exists("bucket"):
        s3_bare.call_s3("create_bucket", Bucket="bucket")
    return s3_bare


@pytest.fixture(params=["here", pytest.param("on ray", marks=pytest.mark.slow)])
def run_both(request: pytest.FixtureRequest) -> Iterator[Callable[..., str]]:
    """`run`, and the same without the seconds that Ray takes to start its processes."""
    if request.param == "on ray":
        yield run
        return
    before = signal.getsignal(signal.SIGTERM)  # a scheduler sets its own
    with without_ray():
        yield run_inside
    signal.signal(signal.SIGTERM, before)


def made(name: str) -> ShardSet:
    """A set that is there and whole."""
    assert main(["check", name]) == 0
    return open_shard_set(name)


def assert_page(name: str) -> None:
    assert_self_contained(shown(Path(name)))


def test_every_command_is_run_or_marked_as_needing_a_cluster() -> None:
    assert fenced("yaml") and fenced("python") and not fenced("sh") and not fenced("bash")
    commands = shown_commands()
    here = {shown_command(begun) for begun in RUN_HERE.findall(Path(__file__).read_text())}
    elsewhere = {c: [b for b in ELSEWHERE if c.startswith(b)] for c in commands}
    assert [c for c in commands if c not in here and not elsewhere[c]] == []
    assert [c for c, marked in commands.items() if "--address" in c and not marked] == []
    assert [b for b in ELSEWHERE if not any(c.startswith(b) for c in commands)] == []
    assert_tests_exist({beginning: [test] for beginning, test in ELSEWHERE.items()})


@pytest.mark.parametrize("command", [c for c in shown_commands() if c.startswith("make ")])
def test_what_make_would_start_is_there(command: str) -> None:
    words = ["make", "--no-print-directory", "--dry-run", *command.split()[1:]]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    *_, last = said.stdout.splitlines()
    files = [ROOT / word for word in last.split() if re.fullmatch(r"\S+\.(py|yaml)", word)]
    assert all(file.is_file() for file in files) and ".venv/bin/" in last


def test_every_extra_named_is_one() -> None:
    named = set(re.findall(r"glipv2\[(\w+)\]", README))
    assert named and named <= set(metadata("glipv2").get_all("Provides-Extra") or ())


@pytest.mark.parametrize("name", shown_recipes())
def test_every_recipe_shown_is_understood(name: str, folder: Path) -> None:
    (folder / "data" / "answers.txt").write_text("red\n")
    for phase in (None, *load_config(name, []).phases):
        load_config(name, [], phase)


def test_own_data_becomes_a_set_that_is_shown_counted_and_checked(folder: Path) -> None:
    run("glipv2 prepare coco")
    assert open_shard_set("data/mine").samples == IMAGES
    run("glipv2 view data/mine")
    assert_page("mine.html")
    assert f"samples     {IMAGES}\n" in run("glipv2 stats data/mine")
    run("glipv2 check data/mine")


def test_every_source_says_what_it_takes() -> None:
    for name in KINDS:
        assert "--workers" in run("glipv2 prepare SOURCE", SOURCE=name)


def test_pairs_are_cleaned_and_tars_become_sets(folder: Path) -> None:
    pairs = len((folder / "scraped" / "pairs.jsonl").read_text().splitlines())
    run("glipv2 prepare pairs --root scraped/ --out data/scraped")
    cleaned = made("data/scraped")
    assert cleaned.info["counts"]["excluded"] == 1
    assert cleaned.samples == pairs - sum(cleaned.info["counts"].values())
    run("glipv2 prepare webdataset --root img2dataset/ --index-only")
    assert made("img2dataset").samples == PAIRS
    run("glipv2 prepare webdataset --root img2dataset/ --out data/web")
    assert 0 < made("data/web").samples <= PAIRS


def test_sets_have_a_vocabulary_and_answers_in_common(folder: Path) -> None:
    run("glipv2 prepare vocabulary")
    ids = json.loads(Path("data/vocabulary.json").read_text())["ids"]
    assert ids["tv"] == ids["tvmonitor"] != ids["person"]
    run("glipv2 prepare answers")
    assert Path("data/answers.txt").read_text().split() == ["red"]


def test_a_picture_is_grounded(folder: Path) -> None:
    run("glipv2 ground")
    assert json.loads(Path("ground.json").read_text())["image"] == "photo.jpg"
    assert Path("ground.png").stat().st_size > 1000


def test_nothing_is_missing() -> None:
    assert "everything needed is here" in run("glipv2 doctor")


def test_the_page_to_try_things_is_served_until_it_is_stopped(folder: Path) -> None:
    with socket.socket() as port:
        if port.connect_ex(("127.0.0.1", 7860)) == 0:
            pytest.skip("something else serves at gradio's port")
    pages: list[str] = []

    def answers() -> bool:
        with suppress(OSError), urllib.request.urlopen("http://127.0.0.1:7860", timeout=5) as page:
            pages.append(page.read().decode())
        return bool(pages)

    process = begin("glipv2 demo")
    try:
        wait_for(process, answers)
    finally:
        assert stop(process) == 143
    assert "GLIPv2 demo" in pages[0]


def test_pairs_go_to_a_bucket_and_runs_are_read_from_there(
    folder: Path, bucket: S3FileSystem
) -> None:
    assert set(re.findall(r"(AWS_\w+)=", README)) <= set(environment(""))
    pairs = len((folder / "scraped" / "pairs.jsonl").read_text().splitlines())
    run("glipv2 prepare pairs --root scraped/ --out s3:")
    assert made("s3://bucket/pairs").samples == pairs
    write_result(folder / "runs" / "mine", "coco", {"ap": 0.5}, step=5000)
    bucket.put("runs/mine/", "s3://bucket/run-2/", recursive=True)
    run("glipv2 report runs/mine s3://bucket/run-2")
    assert_page("compared.html")


def test_the_lines_of_python_do_what_they_say(folder: Path, bucket: S3FileSystem) -> None:
    bucket.pipe_file("bucket/other.png", jpeg(image_format="PNG"))
    [lines] = fenced("python")
    names: dict[str, Any] = {}
    exec(compile(lines, "README.md", "exec"), names)
    assert set(names["found"].to_dict()) >= {"names", "regions"}


def test_a_step_becomes_a_folder_and_a_run_a_page(folder: Path) -> None:
    run("glipv2 export runs/mine")
    assert load_model("models/mine")[0].config == load_model("runs/mine")[0].config
    assert "report.html" in run("glipv2 report runs/quickstart")
    assert_page("runs/quickstart/report.html")


def test_weights_come_from_elsewhere_and_go_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "T", TINY)  # that of a new model
    shutil.rmtree("models")
    run("glipv2 convert --from glip")
    run("glipv2 convert --from timm-swin")
    run("glipv2 convert --to glip")
    given, back = (torch.load(f, weights_only=True)["model"]
                   for f in ("glip_tiny_model_o365_goldg.pth", "glip.pth"))  # fmt: skip
    assert given.keys() == back.keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in given.items())
    assert not load_model("models/start")[0].config.glip_compatible


def test_web_pairs_are_labelled_looked_at_and_checked_by_hand(
    folder: Path, run_both: Callable[..., str]
) -> None:
    run("glipv2 prepare webdataset --root img2dataset/ --out data/web")
    assert "cost: " in run_both("glipv2 label web.yaml --dry-run")
    assert f"{PAIRS} of {PAIRS} pairs kept" in (said := run_both("glipv2 label web.yaml"))
    assert "raylet" not in said  # which tells of what fails
    assert made("data/web_grounded").samples == PAIRS
    run("glipv2 view data/web_grounded")
    assert_page("web.html")
    [to_check] = re.findall(r"`(--csv [^`]+)`", README)
    run("glipv2 view data/web_grounded", *shlex.split(to_check))
    text = Path("check.csv").read_text("utf-8-sig")
    head, *rows = csv.reader(io.StringIO(text, newline=""))
    with open("check.csv", "w", newline="") as file:
        csv.writer(file).writerows([head, *([*row[:-1], "1"] for row in rows)])
    assert "1.00" in run_inside("glipv2 label audit")


def test_a_run_is_trained_and_its_time_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("runs/mine")
    write_mixture()
    assert "ERROR" not in run("glipv2 pretrain my.yaml profile.steps=5")
    assert committed_steps("runs/mine") == [8]
    assert Path("runs/mine/profile/trace.json.gz").stat().st_size > 1000
    assert "aten::" in Path("runs/mine/profile/table.txt").read_text()
    run_inside("glipv2 pretrain my.yaml profile.steps=5")
    assert "all 8 steps are done already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_trained_by_eight_ranks(folder: Path) -> None:
    shutil.rmtree("runs/mine")
    write_mixture()
    run("glipv2 pretrain my.yaml train.processes=8")
    assert committed_steps("runs/mine") == [8]


def write_mixture() -> None:
    run("glipv2 prepare coco")
    grounded = PrepareConfig(source="toy", set="toy_grounding", count=IMAGES, size=64, seed=1)
    prepare_set("data/web_grounded", grounded)


def test_a_checkpoint_is_scored_by_itself(folder: Path, run_both: Callable[..., str]) -> None:
    run_both("glipv2 evaluate infra/recipes/evaluate.yaml")
    [result] = Path("runs/evaluate/eval").glob("*/coco.json")
    assert json.loads(result.read_text())["sets"]["coco"]["images"] == 4


@pytest.fixture
def suites(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Of the recipe for schedules, whose webhook nobody is to call."""
    monkeypatch.setenv("SLACK_URL", "http://127.0.0.1:9/nobody-listens")
    return set(shown_recipes()["mine.yaml"]["eval"]["suites"])


def test_every_step_is_scored_and_reported(
    folder: Path, suites: set[str], run_both: Callable[..., str]
) -> None:
    assert run_both("glipv2 schedule mine.yaml --status").count("waits") == 2 * len(suites)
    run_both("glipv2 schedule mine.yaml --once")
    for step in (5000, 50000):
        results = Path(f"runs/mine/eval/step-{step:06d}").glob("*.json")
        assert {path.stem for path in results} == suites
    assert "waits" not in run_both("glipv2 schedule mine.yaml --status")
    assert not Path("runs/mine/eval/alerts.jsonl").exists()
    run("glipv2 report runs/mine")
    assert_page("runs/mine/report.html")


@pytest.mark.slow
def test_a_schedule_goes_on_until_it_is_told_to_stop(folder: Path, suites: set[str]) -> None:
    process = begin("glipv2 schedule mine.yaml")
    try:
        wait_for(process, Path("runs/mine/eval/step-050000/coco.json").exists)
    finally:
        assert stop(process) == 75


def not_tuned(_make: Any, cells: list[Any], **_: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """In the place of the workers of `glipv2 adapt`."""
    for cell in cells:
        known = {key: getattr(cell, key) for key in ("set", "way", "shots", "seed")}
        known["mixture"] = list(cell.config.data.mixture)
        yield cell, {**known, "first": "ap", "metrics": {"ap": 0.5}}


def test_the_comparison_on_odinw_is_planned_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """13 sets, 3 ways, 5 numbers of shots, 3 seeds: what is left to a cluster is the tuning."""
    write_detection_set(folder / "data" / "one", ("cat", "dog"), 64)
    names = [own.name for own in odinw_sets(13)]
    splits = [f"{name}_{shots}_{seed}" for name in names
              for shots in (1, 3, 5, 10) for seed in (3, 30, 300)]  # fmt: skip
    for part, sets in (("odinw_train", names), ("odinw_shots", splits)):
        (folder / "data" / part).mkdir()
        for name in sets:
            (folder / "data" / part / name).symlink_to(folder / "data" / "one")
    monkeypatch.setitem(PRESETS, "T", TINY)  # which models/glip-t is of
    monkeypatch.setattr(ray_map, "map_on_ray", not_tuned)
    said = run_inside("glipv2 adapt infra/recipes/adapt.yaml")
    assert all(name in said for name in (*names, "average", "prompt"))
    cells = json.loads(Path("runs/adapt/adapt.json").read_text())["cells"]
    assert len(cells) == 13 * (1 + 3 * 5 * 3)
    for cell in (cell for cell in cells if cell["way"] != "zero-shot"):
        name, shots, seed = (cell[key] for key in ("set", "shots", "seed"))
        own = f"odinw_shots/{name}_{shots}_{seed}" if shots else f"odinw_train/{name}"
        assert [url.endswith(f"data/{own}") for url in cell["mixture"]] == [True], cell


@pytest.mark.parametrize("tuned", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_is_tuned_in_every_way_and_compared(
    tuned: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tuned:
        said = run("glipv2 adapt dice.yaml")
    else:
        monkeypatch.setattr(ray_map, "map_on_ray", not_tuned)
        said = run_inside("glipv2 adapt dice.yaml")
    assert "1-shot" in said and "10-shot" in said and "zero-shot" in said
    assert len(json.loads(Path("runs/dice/adapt.json").read_text())["cells"]) == 1 + 3 * 2
    if tuned:
        run("glipv2 report runs/dice")
        assert_page("runs/dice/report.html")
