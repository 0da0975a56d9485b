"""glipv2 submit and jobs: what travels, what is refused, and how a job is followed."""

import os
import re
import subprocess
import sys
import sysconfig
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from glipv2.jobs import jobs, ray_jobs
from glipv2.jobs.cli import main, parse
from glipv2.jobs.jobs import table
from glipv2.jobs.ray_jobs import connect, exit_code, follow, refuse_open
from glipv2.jobs.submit import PACKAGES, copy_package, is_shared, prepared
from glipv2.pipeline.config_loader import load_config
from glipv2.pipeline.errors import ConfigError, DataError, StoreError


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    base = {
        "data": {"mixture": {"s3://bucket/gold": 1.0}},
        "train": {"steps": 7, "init": "teacher"},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    own = {"extends": "base.yaml", "run_dir": "s3://bucket/run", "phases": {"student": {}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own))
    return tmp_path / "mine.yaml"


def asked(*words: object) -> Any:
    return parse(["submit", *map(str, words)])


def test_the_command_on_the_cluster_means_what_it_means_here(recipe: Path, tmp_path: Path) -> None:
    arguments = asked("pretrain", recipe, "--phase", "student", "train.steps=9", "--name", "job-1")
    with prepared(arguments) as job:
        assert job.command == (
            "python -m glipv2.jobs.cli pretrain mine.yaml --phase student train.steps=9 "
            "--address auto"
        )
        assert job.name == "job-1" and job.environment == {"PYTHONUNBUFFERED": "1"}
        there = load_config(str(job.recipe / "mine.yaml"), ["train.steps=9"], "student")
        assert 1e5 < job.bytes < 3e6
        folder = job.recipe.parent
    assert there == load_config(str(recipe), ["train.steps=9"], "student")
    assert not folder.exists()
    with prepared(asked("label", recipe)) as job:
        assert job.name.startswith("label-run-")


def test_the_package_that_travels_needs_no_installation(tmp_path: Path) -> None:
    copy_package(tmp_path / "glipv2")
    # -S: without site there are no .pth files, so the installed package is out of reach
    path = os.pathsep.join([str(tmp_path), sysconfig.get_paths()["purelib"]])
    names = [f"glipv2.{file.parent.name}.{file.stem}" for file in tmp_path.rglob("*.py")
             if file.stem not in ("__init__", "transformers_teachers")]  # fmt: skip
    assert {name.split(".")[1] for name in names} == set(PACKAGES) and len(names) > 150
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "import glipv2.jobs.cli as cli, glipv2.eval.published as p, glipv2.model.tokenizer as t\n"
        "assert p.suites() and t.tiny_vocab()\n"
        "from glipv2.jobs.page import render\n"
        "from glipv2.jobs.report import parts\n"
        "render('scores.html', name='x', **parts(['nowhere']))\n"
        "print(cli.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == str(tmp_path / "glipv2" / "jobs" / "cli.py")


def test_what_would_be_lost_or_missing_on_the_cluster_is_refused(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for url, shared in {"s3://b/run": True, "/mnt/run": True, "file:///mnt/run": True,
                        "runs/run": False, "memory://run": False}.items():  # fmt: skip
        assert is_shared(url) == shared
    with pytest.raises(ConfigError, match="run_dir 'runs/x' would lie on one machine"):
        prepared(asked("label", recipe, "run_dir=runs/x")).__enter__()
    (tmp_path / "gold").mkdir()
    with pytest.raises(ConfigError, match=r"files of this machine: data.mixture=\./gold; copy"):
        prepared(asked("pretrain", recipe, "data.mixture={./gold: 1}")).__enter__()
    (tmp_path / "words.txt").write_text("yes\nno\n")
    at_home = {
        ("pretrain", "data.root=sets"): "data.root=sets",
        ("pretrain", "data.vocabulary=words.json"): r"data.vocabulary=words\.json",
        ("pretrain", "model.answers=words.txt"): r"model.answers=words\.txt",
        ("evaluate", "eval.suites.q={set: q, task: vqa, annotations: v.json}"):
            r"eval.suites.q.annotations=v\.json",
        ("evaluate", "--checkpoint", "models/mine"): "--checkpoint=models/mine",
        ("evaluate", "--json", "scores.json"): r"--json=scores\.json",
        ("schedule", "schedule.runs=[mine]"): r"schedule.runs\[\]=mine",
        ("run", "prepare.web={source: pairs, root: scraped}"): "prepare.web.root=scraped",
    }  # fmt: skip
    for (stage, *words), named in at_home.items():
        with pytest.raises(ConfigError, match=f"would name files of this machine: {named}; copy"):
            prepared(asked(stage, recipe, *words)).__enter__()
    words = ("data.root=/mnt/sets", "--checkpoint", "s3://bucket/model", "--json", "-")
    with prepared(asked("evaluate", recipe, *words)) as job:
        assert "--checkpoint s3://bucket/model" in job.command
    with pytest.raises(ConfigError, match="phase 'techer' is not in the recipe"):
        prepared(asked("pretrain", recipe, "--phase", "techer")).__enter__()
    with pytest.raises(ConfigError, match=r"unknown config key train.step; did you mean"):
        prepared(asked("pretrain", recipe, "train.step=3")).__enter__()
    with pytest.raises(SystemExit):
        prepared(asked("pretrain", recipe, "--score-only")).__enter__()


RELATIVE = {
    "data.mixture={u/pairs: 1}": "data.mixture=u/pairs",
    "label.teacher=models/glip-t": "label.teacher=models/glip-t",
    "label.teacher=hf:../owlv2": "label.teacher=hf:../owlv2",
    "label.ensemble=[hf:owlv2/, s3://b/m]": "label.ensemble[]=hf:owlv2/",
    "label.inputs={data/web: s3://b/web_grounded}": "label.inputs=data/web",
    "label.inputs={web: data/web_grounded}": "label.inputs.web=data/web_grounded",
    "label.calibration=data/gold": "label.calibration=data/gold",
    "label.phrases.parser=spacy:models/en": "label.phrases.parser=spacy:models/en",
    "train.init=models/startt": "train.init=models/startt",
    "phases.student.train.init=~/start": "phases.student.train.init=~/start",
    "eval.suites.w={set: data/warehouse_val}": "eval.suites.w.set=data/warehouse_val",
    "eval.suites.w={sets: {day: data/day}}": "eval.suites.w.sets.day=data/day",
    "schedule.runs=runs/one": "schedule.runs[]=runs/one",
    "adapt.sets.dice={train: data/dice, suite: dice}": "adapt.sets.dice.train=data/dice",
}


@pytest.mark.parametrize(("given", "told"), RELATIVE.items())
def test_a_relative_path_is_refused_by_its_key_whether_it_is_here_or_not(
    recipe: Path, given: str, told: str
) -> None:
    message = f"would name files of this machine: {told}; copy them"
    with pytest.raises(ConfigError, match=re.escape(message)):
        prepared(asked("label", recipe, given)).__enter__()


def test_what_has_a_slash_and_is_no_relative_path_travels(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"  # on a disk that all nodes may have
    shared.mkdir()
    hub = "label.teacher=hf:IDEA-Research/grounding-dino-tiny"
    words = (
        hub, f"train.init={shared}", f"label.ensemble=[hf:{shared}]", "label.calibration=gold",
        f"label.phrases={{parser: 'spacy:{shared}', stop: [and/or]}}", "model.answers=[24/7]",
        "schedule.cron='*/5 * * * *'", "log.mlflow=http://host:5000", "data.cache=cache/shards",
        "eval.suites.w={set: w, prompts: {a/c: {prefix: w/ a}}}", f"data.root=file://{shared}",
    )  # fmt: skip
    with prepared(asked("label", recipe, *words)):
        pass
    monkeypatch.chdir(tmp_path)
    Path("IDEA-Research/grounding-dino-tiny").mkdir(parents=True)  # which would be taken here
    with pytest.raises(ConfigError, match=f"files of this machine: {hub}; copy"):
        prepared(asked("label", recipe, hub)).__enter__()


def test_a_suite_or_phase_that_is_not_in_the_recipe_is_refused(recipe: Path) -> None:
    suite = "eval.suites.coco={set: val}"
    with prepared(asked("evaluate", recipe, suite, "--suite", "coco", "--phase", "student")):
        pass
    with pytest.raises(ConfigError, match="eval.suites has no 'nope'; it has: coco"):
        prepared(asked("evaluate", recipe, suite, "--suite", "coco", "--suite", "nope")).__enter__()
    with pytest.raises(ConfigError, match="phase 'nope' is not in the recipe"):
        prepared(asked("evaluate", recipe, suite, "--phase", "nope")).__enter__()


def test_secrets_do_not_travel_in_a_jobs_record(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "RAY_AUTH_TOKEN", "db_password",
             "SLACK_URL", "TEAM_WEBHOOK", "MORNING_NEWS")  # fmt: skip
    for name in names:
        monkeypatch.setenv(name, "x")
        with pytest.raises(ConfigError, match=f"--env {name}: a job's variables stand in its"):
            words = ("schedule.webhook=$MORNING_NEWS", "--env", name)
            prepared(asked("schedule", recipe, *words)).__enter__()
    with pytest.raises(ConfigError, match="there is no such variable"):
        prepared(asked("label", recipe, "--env", "NOT_SET_HERE")).__enter__()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:8333")
    with prepared(asked("label", recipe, "--env", "AWS_ENDPOINT_URL")) as job:
        assert job.environment["AWS_ENDPOINT_URL"] == "http://store:8333"


def test_a_webhook_does_not_travel_in_a_jobs_command_or_recipe(recipe: Path) -> None:
    secret = "https://hooks.example.org/T0/B0/xyz"
    cure = r"schedule.webhook=\$SLACK_URL"
    with pytest.raises(ConfigError, match=cure) as told:
        prepared(asked("schedule", recipe, f"schedule.webhook={secret}")).__enter__()
    assert "xyz" not in str(told.value)
    with prepared(asked("schedule", recipe, "schedule.webhook=$SLACK_URL")) as job:
        assert "'schedule.webhook=$SLACK_URL'" in job.command  # for no shell to fill in
    tree = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(tree | {"schedule": {"webhook": secret}}))
    for words in ((), ("schedule.webhook=$SLACK_URL",)):  # the recipe travels whole
        with pytest.raises(ConfigError, match=cure):
            prepared(asked("schedule", recipe, *words)).__enter__()


def test_a_list_of_answers_travels_with_the_recipe(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("yes\nno\n")
    tree = yaml.safe_load(recipe.read_text()) | {
        "model": {"answers": "words.txt"},
        "phases": {"student": {"model": {"answers": "words.txt"}}},
    }
    recipe.write_text(yaml.safe_dump(tree))
    there = tmp_path / "there"
    there.mkdir()
    for words, answers in ((), ("yes", "no")), (("model.answers=[left,right]",), ("left", "right")):
        with prepared(asked("pretrain", recipe, *words)) as job:
            monkeypatch.chdir(there)
            shipped = load_config(str(job.recipe / "mine.yaml"), list(words))
            assert shipped.model.answers == answers
        monkeypatch.chdir(tmp_path)


def test_a_folder_here_is_not_taken_for_a_phase_there(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mymodel", "student", "teacher"):
        (tmp_path / name).mkdir()
    for key in ("train.init", "label.teacher"):
        with pytest.raises(ConfigError, match=f"files of this machine: {key}=mymodel; copy"):
            prepared(asked("pretrain", recipe, "train.init=student", f"{key}=mymodel")).__enter__()
    with pytest.raises(ConfigError, match="files of this machine: train.init=mymodel; copy"):
        words = ("--phase", "student", "train.init=mymodel")
        prepared(asked("pretrain", recipe, *words)).__enter__()
    with prepared(asked("pretrain", recipe, "train.init=student", "label.teacher=student")):
        pass
    splits = "adapt.sets.dice={train: s3://b/dice, suite: dice, splits: %s}"
    for template in ("dice_{shots}_{seed}", "s3://b/{shots}_{seed}", "/mnt/{shots}_{seed}"):
        with prepared(asked("adapt", recipe, "train.init=", splits % f"'{template}'")):
            pass
    template = "data/dice_{shots}_{seed}"
    with pytest.raises(ConfigError, match=f"machine: adapt.sets.dice.splits={template}; copy"):
        prepared(asked("adapt", recipe, "train.init=", splits % f"'{template}'")).__enter__()
    tree = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(tree | {"phases": {"old": {"train": {"init": "mymodel"}}}}))
    with pytest.raises(ConfigError, match="machine: phases.old.train.init=mymodel; copy"):
        prepared(asked("pretrain", recipe, "train.init=")).__enter__()
    with prepared(asked("pretrain", recipe, "train.init=", "phases={new: {}}")):
        pass  # what the command line replaces is not looked for


@pytest.fixture
def server() -> Iterator[Any]:
    """A dashboard that answers everybody with `.status`."""
    answer = SimpleNamespace(status=200, port=0, asked=0, sent=0)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer.asked += 1
            self.send_response(answer.status)
            self.end_headers()

        def do_PUT(self) -> None:
            answer.sent += 1
            self.send_error(500)

        do_POST = do_DELETE = do_PUT

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("0.0.0.0", 0), Handler) as running:
        answer.port = running.server_port
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield answer
        running.shutdown()


def test_a_cluster_that_lets_everybody_in_is_refused(
    server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    everywhere, here = (f"http://{host}:{server.port}" for host in ("0.0.0.0", "127.0.0.1"))
    refuse_open(here)
    assert f"{here} asks for no token: everybody on this machine" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="runs jobs of anybody who can reach it"):
        refuse_open(everywhere)
    for server.status in (401, 403):
        refuse_open(everywhere)
    assert capsys.readouterr().err == ""
    with pytest.raises(ConfigError, match="no Ray job server answers at http://127.0.0.1:1:"):
        refuse_open("http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="must be the cluster's dashboard"):
        connect("ray://head:10001")


@pytest.mark.parametrize("words", [
    ["submit", "label", "RECIPE"], ["submit", "evaluate", "RECIPE", "--no-wait"], ["jobs", "list"],
    ["jobs", "logs", "mine"], ["jobs", "stop", "mine"],
])  # fmt: skip
def test_no_command_has_dealings_with_a_cluster_that_lets_everybody_in(
    recipe: Path, server: Any, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(recipe) if word == "RECIPE" else word for word in words]
    assert main([*given, "--address", f"http://0.0.0.0:{server.port}"]) == 2
    assert "runs jobs of anybody who can reach it" in capsys.readouterr().err
    assert (server.asked, server.sent) == (1, 0)


def test_no_answer_of_a_job_server_is_no_wish_for_a_token(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a proxy an open cluster that is not up yet must not pass for a closed one."""
    monkeypatch.setattr(ray_jobs, "PAUSES_S", (0.0, 0.0))
    address = f"http://127.0.0.1:{server.port}"
    server.status = 404
    with pytest.raises(ConfigError, match=f"{address} answers 404 Not Found to /api/jobs/"):
        refuse_open(address)
    assert server.asked == 1
    for server.status, said in ((502, "502 Bad Gateway"), (503, "503 Service Unavailable")):
        server.asked = 0
        with pytest.raises(StoreError, match=f"{address} answers {said}, again and again"):
            refuse_open(address)
        assert server.asked == 3
    monkeypatch.setattr(ray_jobs.time, "sleep", lambda _: setattr(server, "status", 401))
    refuse_open(address)  # it was starting


def test_a_mistake_is_told_before_anything_is_sent(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "label", str(recipe), "run_dir=here", "--address", "http://x:1"]) == 2
    assert "glipv2 submit: run_dir 'here'" in capsys.readouterr().err
    assert main(["submit", "label", str(recipe), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "glipv2.jobs.cli label mine.yaml --address auto" in shown and "init: teacher" in shown
    assert main(["jobs", "stop", "--address", "http://127.0.0.1:1"]) == 2
    assert "give the name of a job" in capsys.readouterr().err


class Cluster:
    """A job server whose connection is lost after each of `parts`, and at the first question."""

    def __init__(self, parts: list[str], ended: str, code: int | None = None) -> None:
        self.parts, self.ended, self.code, self.tails, self.asked = parts, ended, code, 0, 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.tails += 1
        for part in self.parts[: self.tails]:
            yield part
        if self.tails < len(self.parts):
            raise ConnectionError("lost")

    def get_job_info(self, job: str) -> Any:
        self.asked += 1
        if job != "mine" or self.asked == 1:
            raise RuntimeError("404 or 503")
        status = SimpleNamespace(value=self.ended, is_terminal=lambda: self.ended != "RUNNING")
        return SimpleNamespace(status=status, driver_exit_code=self.code)


def test_a_log_goes_on_where_the_connection_was_lost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_jobs, "POLL_S", 0.0)
    cluster = Cluster(["step 1\n", "step 2\nst", "ep 3\n"], "FAILED", code=3)
    assert follow(cluster, "mine") == 3 and (cluster.tails, cluster.asked) == (4, 2)
    assert capsys.readouterr().out == "step 1\nstep 2\nstep 3\n"
    monkeypatch.setattr(ray_jobs, "LOST_S", 0.05)
    with pytest.raises(StoreError, match="the job goes on without us"):
        follow(Cluster(["a"] * 10**6, "RUNNING"), "mine")


@pytest.mark.parametrize(("ended", "own", "code"), [
    ("SUCCEEDED", 0, 0), ("FAILED", 75, 75), ("FAILED", None, 1), ("STOPPED", None, 130),
])  # fmt: skip
def test_a_command_ends_as_its_job_did(ended: str, own: int | None, code: int) -> None:
    found = SimpleNamespace(status=SimpleNamespace(value=ended), driver_exit_code=own)
    assert exit_code(found) == code


def test_a_job_that_nobody_knows_is_said_to_be_unknown() -> None:
    with pytest.raises(DataError, match="no job 'other' on this cluster"):
        ray_jobs.details(Cluster([], "RUNNING"), "other")


def test_jobs_are_stopped_and_their_logs_shown_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    details = SimpleNamespace(status=SimpleNamespace(value="FAILED", is_terminal=lambda: True),
                              driver_exit_code=75)  # fmt: skip
    cluster = SimpleNamespace(get_job_info=lambda job: details, stop_job=told.append,
                              get_job_logs=lambda job: f"log of {job}\n")  # fmt: skip
    monkeypatch.setattr(jobs, "connect", lambda address: {"http://head:8265": cluster}[address])
    there = ["--address", "http://head:8265"]
    assert main(["jobs", "logs", "mine", *there]) == 75
    assert capsys.readouterr().out == "log of mine\n" and not told
    assert main(["jobs", "stop", "mine", *there]) == 0
    said = capsys.readouterr()
    assert told == ["mine"] and "mine is told to stop" in said.err
    details.status = SimpleNamespace(value="RUNNING", is_terminal=lambda: False)
    assert main(["jobs", "logs", "mine", *there]) == 0


def test_jobs_are_listed_the_newest_first() -> None:
    rows = [
        SimpleNamespace(submission_id=name, job_id=None, start_time=start,
                        status=SimpleNamespace(value="RUNNING"),
                        entrypoint=f"python -m glipv2.jobs.cli {name} r.yaml --address auto")
        for name, start in (("label", 1_700_000_000_000), ("pretrain", 1_700_000_100_000))
    ]  # fmt: skip
    lines = table(rows).splitlines()
    assert [line.split()[0] for line in lines] == ["job", "pretrain", "label"]
    assert lines[2].split()[1:5] == ["RUNNING", "2023-11-14", "22:13", "label"]
