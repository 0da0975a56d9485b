"""Labelling ends with the same bytes, whoever is killed and whenever."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from commands import ROOT, TIMEOUT, command_line, descendants, finish, start  # noqa: E402
from dying_label import POINTS  # noqa: E402

from glipv2.jobs.prepare import prepare_set  # noqa: E402
from glipv2.model.config import preset  # noqa: E402
from glipv2.model.glip import build_model  # noqa: E402
from glipv2.model.tokenizer import Tokenizer, tiny_vocab  # noqa: E402
from glipv2.model.weights import model_files  # noqa: E402
from glipv2.pipeline.config import PrepareConfig  # noqa: E402

SHARDS = 8
KILLS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, and a teacher with random weights that is sure of itself."""
    folder = tmp_path_factory.mktemp("label")
    options = PrepareConfig(source="toy", set="toy_pairs", count=4 * SHARDS, size=64, seed=1)
    prepare_set(str(folder / "pairs"), options, samples_per_shard=4)
    model = build_model(preset("tiny"), seed=0)
    torch.nn.init.zeros_(model.alignment_head.bias0)
    tokenizer = Tokenizer.from_vocab(tiny_vocab(), model.config.text_encoder.max_tokens)
    (folder / "teacher").mkdir()
    for name, data in model_files(model, tokenizer).items():
        (folder / "teacher" / name).write_bytes(data)
    return folder


def recipe(folder: Path, name: str, out: str = "") -> Path:
    """Of a labelling with a run folder of its own."""
    path = folder / f"{name}.yaml"
    settings = {
        "teacher": str(folder / "teacher"),
        "inputs": {str(folder / "pairs"): str(folder / (out or name))},
        "score_threshold": 0.3,
        "num_actors": [2, 2],
    }
    path.write_text(yaml.safe_dump({"run_dir": str(folder / f"run-{name}"), "label": settings}))
    return path


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a set, with what names the attempt that won left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        if path.parent.name == "commits":
            data = json.dumps({**json.loads(data), "attempt": ""}).encode()
        if path.is_file():
            found[str(path.relative_to(folder))] = data
    return found


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[str, bytes]:
    finish("label", recipe(folder, "whole"))
    files = content(folder / "whole")
    assert len([name for name in files if name.endswith(".tar")]) == SHARDS
    manifest = json.loads(files["dataset.json"])
    assert manifest["info"]["counts"]["boxes"] > 4 * SHARDS
    return files


def dying(folder: Path, name: str, who: str) -> "subprocess.CompletedProcess[str]":
    (folder / f"points-{name}").mkdir(exist_ok=True)
    script = [sys.executable, str(ROOT / "tests" / "dying_label.py")]
    return subprocess.run(
        [*script, str(recipe(folder, name)), str(folder / f"points-{name}"), who],
        cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip


def test_workers_that_die_at_every_point_of_the_commit(
    folder: Path, undisturbed: dict[str, bytes]
) -> None:
    ended = dying(folder, "workers", "worker")
    assert ended.returncode == 0, ended.stderr
    used = {path.name for path in (folder / "points-workers").iterdir()}
    of_commits = {p for p in POINTS if not p.split()[1].startswith("write")}
    assert used == of_commits | {f"shard-{n:06d}" for n in range(SHARDS)}
    assert content(folder / "workers") == undisturbed


@pytest.mark.slow
def test_a_driver_that_dies_at_every_point_of_its_writing(
    folder: Path, undisturbed: dict[str, bytes]
) -> None:
    deaths = 0
    while (ended := dying(folder, "driver", "driver")).returncode:
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        deaths += 1
    used = {path.name for path in (folder / "points-driver").iterdir()} - {"anyone"}
    assert deaths == len(used) and {"before create_once", "after write_bytes"} <= used
    assert content(folder / "driver") == undisturbed


def cluster_part(process: "subprocess.Popen[str]", part: str) -> int | None:
    found = [p for p in descendants(process.pid) if part in command_line(p)]
    return random.choice(found) if found else None


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_kills_of_anyone_at_any_time(folder: Path, undisturbed: dict[str, bytes]) -> None:
    random.seed(7)
    command = recipe(folder, "anyone")
    victims = {"driver": 0, "ray::Worker": 0, "raylet": 0, "gcs_server": 0}
    committed: dict[str, int] = {}
    process = start("label", command)
    while sum(victims.values()) < KILLS:
        time.sleep(random.uniform(0.5, 9.0))
        part = random.choice(list(victims))
        target = process.pid if part == "driver" else cluster_part(process, part)
        if process.poll() is None and target is not None:
            os.kill(target, signal.SIGKILL)
            victims[part] += 1
        if part != "ray::Worker" or process.poll() is not None:
            process.kill()
            process.communicate()
            assert_kept(committed, folder / "anyone")
            if (folder / "anyone" / "dataset.json").exists():  # it was through: begin again
                assert content(folder / "anyone") == undisturbed
                for name in content(folder / "anyone"):
                    (folder / "anyone" / name).unlink()
                committed.clear()
            process = start("label", command)
    assert min(victims.values()) > 0, victims
    process.communicate(timeout=TIMEOUT)
    finish("label", command)
    assert content(folder / "anyone") == undisturbed


def assert_kept(committed: dict[str, int], folder: Path) -> None:
    """What was committed before has not been made again."""
    now = {p.name: p.stat().st_mtime_ns for p in (folder / "commits").glob("*.json")}
    assert committed.items() <= now.items()
    committed.update(now)


@pytest.mark.slow
def test_two_drivers_on_one_set_end_with_one_of_each_shard(
    folder: Path, undisturbed: dict[str, bytes]
) -> None:
    drivers = [start("label", recipe(folder, name, out="both")) for name in ("first", "second")]
    for driver in drivers:
        out, err = driver.communicate(timeout=TIMEOUT)
        assert driver.returncode == 0, out + err
    finish("label", recipe(folder, "first", out="both"), "--gc")
    assert content(folder / "both") == undisturbed
