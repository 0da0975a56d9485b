"""Stages submitted from outside to a cluster of two nodes that has none of our code, on real S3."""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from commands import ROOT, SMOKE  # noqa: E402
from s3_server import SECRET_KEY, environment  # noqa: E402

from glipv2.jobs.cli import main  # noqa: E402
from glipv2.pipeline import storage  # noqa: E402
from glipv2.pipeline.checkpoint import committed_steps  # noqa: E402
from glipv2.pipeline.shard_reader import open_shard_set  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
START_S = 120.0
SETS = {"toy_detection": 40, "toy_pairs": 24, "toy_val": 12}


@dataclass(frozen=True)
class Cluster:
    address: str
    environment: dict[str, str]
    """Of somebody who may use it."""
    nodes: tuple[Path, ...] = ()
    """The folder of each, with the logs of its processes."""

    def glipv2(self, *words: object, code: int = 0) -> str:
        """A command on this machine, from outside; what it printed on both streams."""
        command = [sys.executable, "-m", "glipv2.jobs.cli", *map(str, words)]
        done = subprocess.run(
            [*command, "--address", self.address], cwd=ROOT, env=self.environment,
            capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr


def actors(node: Path) -> set[str]:
    """Names of the classes whose actors a node has run; every process notes that in its log."""
    logs = node.glob("session_*/logs/worker-*.out")
    return {name for log in logs for name in re.findall(r":actor_name:(\w+)", log.read_text())}


def bare_python(folder: Path) -> Path:
    """A Python with the packages that we need, but without ours."""
    venv.create(folder, with_pip=False, symlinks=True)
    [site] = folder.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_paths()["purelib"])
    python = folder / "bin" / "python"
    found = subprocess.run([python, "-c", "import ray, torch; import glipv2.jobs"], check=False,
                           cwd=folder, capture_output=True, text=True)  # fmt: skip
    assert "No module named 'glipv2'" in found.stderr, found.stderr
    return python


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, s3_endpoint: str) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    python, port, dashboard = bare_python(folder / "bare"), "6399", "8299"
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH"))}
    plain |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    token, home = secrets.token_hex(16), folder / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text(token)  # all that a node of ray_up.yaml has
    nodes_know = plain | environment(s3_endpoint) | {
        "PATH": f"{python.parent}:{plain['PATH']}", "HOME": str(home), "RAY_AUTH_MODE": "token",
    }  # fmt: skip
    # of the two workers that stages have, a node has room for one
    start = [python, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1",
             "--object-store-memory=200000000", "--dashboard-agent-listen-port=0"]  # fmt: skip
    head = ["--head", f"--port={port}", f"--dashboard-port={dashboard}",
            "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1"]  # fmt: skip
    # two nodes on one machine, so what belongs to each must not be the other's
    other = [f"--address=127.0.0.1:{port}", "--min-worker-port=20002", "--max-worker-port=29999"]
    nodes: list[subprocess.Popen[bytes]] = []
    folders: list[Path] = []
    with ExitStack() as stack:
        for role in (head, other):
            log = stack.enter_context(open(folder / f"node-{len(nodes)}.log", "wb"))
            own = stack.enter_context(TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
            node = subprocess.Popen([*start, *role, f"--temp-dir={own}"], env=nodes_know, cwd=own,
                                    stdout=log, stderr=log, start_new_session=True)  # fmt: skip
            stack.callback(end, node)
            nodes.append(node)
            folders.append(Path(own))
            wait_for_nodes(nodes, dashboard, token)
        user = plain | environment(s3_endpoint) | {"RAY_AUTH_TOKEN": token}
        yield Cluster(f"http://127.0.0.1:{dashboard}", user, tuple(folders))


def end(node: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    node.wait()


def wait_for_nodes(nodes: "list[subprocess.Popen[bytes]]", port: str, token: str) -> None:
    """Until the cluster knows them all; Ray itself gives a node up that takes half a minute."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"}
    )
    deadline, known = time.monotonic() + START_S, 0
    while known < len(nodes):
        assert all(node.poll() is None for node in nodes), "a node ended: is this machine busy?"
        assert time.monotonic() < deadline, "the cluster did not start"
        time.sleep(0.5)
        with suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            known = json.load(answer)["data"]["result"]["total"]


@pytest.fixture
def bucket(s3_folder: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new folder of the store, which this process reaches as the nodes do, past the proxy."""
    for name, value in environment(s3_endpoint).items():
        monkeypatch.setenv(name, value)
    return s3_folder


def test_every_stage_runs_from_and_to_an_object_store(
    cluster: Cluster, bucket: str, tmp_path: Path
) -> None:
    for name, count in SETS.items():
        command = ["prepare", "toy", "--set", name, "--count", str(count), "--size", "64"]
        assert main([*command, "--out", f"{bucket}/data/{name}"]) == 0
    run = f"{bucket}/run"
    tree = yaml.safe_load(SMOKE.read_text()) | {
        "run_dir": run,
        "eval": {"suites": {"toy": {"set": "toy_val"}}, "num_actors": 2},
        "schedule": {"poll_seconds": 1},
        "phases": {"teacher": {"data": {"mixture": {"toy_detection": 1}},
                               "train": {"steps": 4, "checkpoint_every": 2}}},
    }  # fmt: skip
    tree["data"]["root"] = f"{bucket}/data"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))

    said = cluster.glipv2("submit", "pretrain", recipe, "--phase", "teacher", "--name", "teach")
    assert committed_steps(f"{run}/teacher") == [2, 4]
    assert "job teach ended with exit code 0" in said and "pretrain teacher" in said
    cluster.glipv2("submit", "label", recipe)
    assert open_shard_set(f"{bucket}/data/toy_labelled").samples > 0
    scored = cluster.glipv2("submit", "evaluate", recipe, "--phase", "teacher")
    assert "images: 12 of 1 set" in scored
    result = storage.read_json(f"{run}/teacher/eval/step-000004/toy.json")
    assert result["sets"]["toy"]["images"] == 12
    cluster.glipv2("submit", "schedule", recipe, "--once", "--name", "watch")
    assert storage.exists(f"{run}/teacher/eval/step-000002/toy.json")

    wrong = cluster.glipv2("submit", "label", recipe, "label.inputs={absent: out}", code=2)
    assert "absent" in wrong
    listed = cluster.glipv2("jobs", "list")
    assert "teach" in listed and "FAILED" in listed and listed.count("SUCCEEDED") == 4
    logs = cluster.glipv2("jobs", "logs", "teach")
    for node in cluster.nodes:
        assert {"RayTrainWorker"} <= actors(node), (actors(node), node)
    for told in (said, scored, wrong, listed, logs):
        assert SECRET_KEY not in told


def test_a_job_is_stopped_by_name(cluster: Cluster, bucket: str, tmp_path: Path) -> None:
    out = f"{bucket}/data/toy_val"
    assert main(["prepare", "toy", "--set", "toy_val", "--count", "12", "--size", "64",
                 "--out", out]) == 0  # fmt: skip
    recipe = tmp_path / "watch.yaml"
    recipe.write_text(json.dumps({"run_dir": f"{bucket}/run",
                                  "eval": {"suites": {"toy": {"set": out}}}}))  # fmt: skip
    name = "watched"
    cluster.glipv2("submit", "schedule", recipe, "--no-wait", "--name", name)
    deadline = time.monotonic() + 120
    while "RUNNING" not in line_of(cluster, name):
        assert time.monotonic() < deadline
    cluster.glipv2("jobs", "stop", name)
    cluster.glipv2("jobs", "logs", name, "--follow", code=130)
    assert "STOPPED" in line_of(cluster, name)


def line_of(cluster: Cluster, name: str) -> str:
    lines = cluster.glipv2("jobs", "list").splitlines()
    return next(line for line in lines if line.startswith(name))


def test_nobody_gets_in_without_the_token(cluster: Cluster) -> None:
    stranger = {k: v for k, v in cluster.environment.items() if not k.startswith("RAY_AUTH")}
    outside = Cluster(cluster.address, stranger | {"HOME": "/nonexistent"})
    said = outside.glipv2("jobs", "list", code=2)
    assert "wants its token: set RAY_AUTH_TOKEN" in said
    wrong = Cluster(cluster.address, cluster.environment | {"RAY_AUTH_TOKEN": "0" * 32})
    assert "wants its token" in wrong.glipv2("jobs", "list", code=2)
