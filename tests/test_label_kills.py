"""Labelling ends with the same bytes, whoever is killed and whenever."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from commands import (  # noqa: E402
    ROOT,
    TIMEOUT,
    command_line,
    descendants,
    finish,
    kill_when,
    start,
    wait_for,
)
from dying_label import POINTS  # noqa: E402
from in_process import without_ray  # noqa: E402
from untrained_teacher import save_teacher  # noqa: E402

from glipv2.data_prep import noun_phrases  # noqa: E402
from glipv2.jobs.cli import main  # noqa: E402
from glipv2.jobs.label import label  # noqa: E402
from glipv2.jobs.prepare import prepare_set  # noqa: E402
from glipv2.pipeline.config import PrepareConfig  # noqa: E402
from glipv2.pipeline.config_loader import load_config  # noqa: E402
from glipv2.pipeline.errors import ConfigError  # noqa: E402
from glipv2.pipeline.shard_reader import iterate_records, open_shard_set  # noqa: E402

SHARDS = 8
KILLS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, and a teacher with random weights that is sure of itself."""
    folder = tmp_path_factory.mktemp("label")
    options = PrepareConfig(source="toy", set="toy_pairs", count=4 * SHARDS, size=64, seed=1)
    prepare_set(str(folder / "pairs"), options, samples_per_shard=4)
    save_teacher(folder / "teacher")
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
    """Of one process, without Ray."""
    with without_ray():
        label(load_config(str(recipe(folder, "whole")), []))
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


@pytest.mark.slow
def test_workers_that_die_at_every_point_of_the_commit(
    folder: Path, undisturbed: dict[str, bytes]
) -> None:
    ended = dying(folder, "workers", "worker")
    assert ended.returncode == 0, ended.stderr
    used = {path.name for path in (folder / "points-workers").iterdir()}
    of_commits = {p for p in POINTS if not p.split()[1].startswith("write")}
    assert used == of_commits | {f"shard-{n:06d}" for n in range(SHARDS)}
    assert content(folder / "workers") == undisturbed


def test_a_killed_driver_goes_on_where_it_was(folder: Path, undisturbed: dict[str, bytes]) -> None:
    out, command = folder / "killed", ("label", recipe(folder, "killed"))
    assert kill_when(lambda: len(list(out.glob("commits/*.json"))) >= 2, *command) == -9
    assert not (out / "dataset.json").exists()
    kept: dict[str, int] = {}
    assert_kept(kept, out)
    assert len(kept) >= 2
    finish(*command)
    assert_kept(kept, out)
    assert content(out) == undisturbed


@pytest.mark.slow
def test_a_pair_that_workers_die_of_is_left_out_after_two(
    folder: Path, undisturbed: dict[str, bytes]
) -> None:
    whole = list(iterate_records(str(folder / "whole")))
    deadly = whole[10]
    ended = dying(folder, "poison", deadly.caption)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("a worker died on shard 2") == 2
    killed = [record.key for record in whole if record.caption == deadly.caption]
    assert list(iterate_records(str(folder / "poison"))) == [
        r for r in whole if r.key not in killed
    ]
    lines = (folder / "run-poison" / "labels" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == killed
    assert json.loads(lines[0])["reason"] == "killed_worker"
    known = json.loads((folder / "run-poison" / "labels" / "killers.json").read_text())
    assert list(known) == [f"{open_shard_set(str(folder / 'pairs')).digest}/2"]
    names = {n for n in undisturbed if n.endswith(".tar") and "shard-000002" not in n}
    again = content(folder / "poison")
    assert all(again[name] == undisturbed[name] for name in names) and len(names) == SHARDS - 1


def test_other_settings_for_the_same_set_are_refused_by_name(
    folder: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    own = ["label", str(recipe(folder, "whole"))]
    assert main([*own, "label.max_boxes=7", "label.phrases.stop=[dog]"]) == 2
    said = capfd.readouterr().err
    assert "max_boxes: 20 there, 7 now" in said and "phrases.stop: [] there, ['dog'] now" in said
    assert said.count(" now\n") == 2
    config = load_config(str(recipe(folder, "whole")), [])
    label(config)  # all is there already
    monkeypatch.setattr(noun_phrases, "RULES", noun_phrases.RULES + 1)
    with pytest.raises(ConfigError, match=rf"parser: .*rules {noun_phrases.RULES - 1}.* there"):
        label(config)
    assert content(folder / "whole") == undisturbed


def test_a_dry_run_says_what_is_left_and_writes_nothing(
    folder: Path, undisturbed: dict[str, bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["label", str(recipe(folder, "dry")), "--dry-run", "--price", "2.5"]) == 0
    said = capfd.readouterr().out
    assert f"{4 * SHARDS} pairs in {SHARDS} shards, of which 0 are done" in said
    found = re.search(r"left: (\d+) pairs, [\w ]+ of work for one worker; about", said)
    assert found is not None and int(found[1]) == 4 * SHARDS
    assert re.search(r"cost: [\d.]+ at 2.5 an hour", said) and "max_boxes: 20" in said
    assert not (folder / "dry").exists()
    assert main(["label", str(recipe(folder, "whole")), "--dry-run"]) == 0
    said = capfd.readouterr().out
    assert f"of which {SHARDS} are done" in said and "nothing is left to do" in said


def test_what_killed_writers_left_is_removed_on_demand(
    folder: Path, undisturbed: dict[str, bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    out = folder / "whole"
    (out / "attempts").mkdir(exist_ok=True)
    for leftover in ("attempts/shard-000001-12ab.tar", "attempts/.attempt-x1", ".attempt-x2"):
        (out / leftover).write_bytes(b"half")
    assert main(["label", str(recipe(folder, "whole")), "--gc"]) == 0
    assert "3 leftover" in capfd.readouterr().out
    assert content(out) == undisturbed


@pytest.mark.slow
def test_a_driver_that_dies_at_every_point_of_its_writing(
    folder: Path, undisturbed: dict[str, bytes]
) -> None:
    deaths = 0
    while (ended := dying(folder, "driver", "driver")).returncode:
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        deaths += 1
    used = {path.name for path in (folder / "points-driver").iterdir()} - {"anyone"}
    own = {p for p in POINTS if p.split()[1] in ("create_once", "write_bytes", "write_json")}
    of_cut_off_commits = {p for p in POINTS if p.split()[1] in ("move", "delete")}
    assert deaths == len(used) and own <= used <= own | of_cut_off_commits
    assert content(folder / "driver") == undisturbed


def is_stopped(process: "subprocess.Popen[str]") -> bool:
    stat = Path(f"/proc/{process.pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] == "T"


@pytest.mark.slow
def test_a_writer_that_wakes_up_when_all_is_done_changes_nothing(
    folder: Path, undisturbed: dict[str, bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    out, points = folder / "haunted", folder / "points-zombie"
    points.mkdir()
    script = [sys.executable, str(ROOT / "tests" / "dying_label.py")]
    zombie = subprocess.Popen(
        [*script, str(recipe(folder, "zombie", out="haunted")), str(points), "zombie"],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        wait_for(zombie, lambda: is_stopped(zombie))
        living = str(recipe(folder, "living", out="haunted"))
        with without_ray():
            label(load_config(living, []))
        assert content(out) == undisturbed
        zombie.send_signal(signal.SIGCONT)
        wait_for(zombie, lambda: (points / "before create_once").exists() and is_stopped(zombie))
        [orphan] = (out / "attempts").iterdir()
        assert content(out) == {**undisturbed, f"attempts/{orphan.name}": orphan.read_bytes()}
        assert main(["label", living, "--gc"]) == 0
        assert "1 leftover" in capfd.readouterr().out
        assert content(out) == undisturbed
        zombie.send_signal(signal.SIGCONT)
        said = zombie.communicate(timeout=TIMEOUT)
        assert zombie.returncode == 0, said
    finally:
        zombie.kill()
        zombie.communicate()
    assert content(out) == undisturbed


def those_to_kill(process: "subprocess.Popen[str]", part: str) -> list[int]:
    below = descendants(process.pid)
    if part in ("driver", "everything"):
        return [process.pid, *(below if part == "everything" else ())]
    found = [p for p in below if part in command_line(p).partition(" ")[0]]
    return random.sample(found, min(1, len(found)))


def kill(process: "subprocess.Popen[str]", part: str) -> bool:
    """False where the command had ended. A part of its cluster is waited for."""
    while not (found := those_to_kill(process, part)) and process.poll() is None:
        time.sleep(0.1)  # on a busy machine it takes longer to start
    if process.poll() is not None:
        return False
    if part == "everything":
        os.killpg(process.pid, signal.SIGKILL)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return True


def commits(folder: Path) -> int:
    return len(list(folder.glob("commits/*.json")))


def wait_some_time(process: "subprocess.Popen[str]", out: Path) -> None:
    """Seconds by lot, or until one more shard is committed and then less than a shard takes."""
    if random.random() < 0.4:
        time.sleep(random.uniform(0.5, 9.0))
        return
    before = commits(out)
    while process.poll() is None and commits(out) <= before:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.05))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_of_anyone_at_any_time(folder: Path, undisturbed: dict[str, bytes]) -> None:
    random.seed(7)
    command, out = recipe(folder, "anyone"), folder / "anyone"
    victims = {"driver": 0, "ray::Worker": 0, "raylet": 0, "gcs_server": 0, "everything": 0}
    at_kills: list[int] = []
    left_alone = 0
    committed: dict[str, int] = {}
    process = start("label", command)
    while len(at_kills) < KILLS:
        wait_some_time(process, out)
        part = random.choice(list(victims))
        so_far = commits(out)
        if kill(process, part):
            victims[part] += 1
            at_kills.append(so_far)
        if part == "ray::Worker" and process.poll() is None:
            assert_kept(committed, out)
            continue
        if part in ("raylet", "gcs_server") and random.random() < 0.5:
            left_alone += 1
            said = process.communicate(timeout=TIMEOUT)
            assert process.returncode or (out / "dataset.json").exists(), said
        process.kill()
        process.communicate()
        assert_kept(committed, out)
        if (out / "dataset.json").exists():  # it was through: begin again
            finish("label", command, "--gc")
            assert content(out) == undisturbed
            for name in content(out):
                (out / name).unlink()
            committed.clear()
        process = start("label", command)
    assert min(victims.values()) > 0 and left_alone > 0, (victims, left_alone)
    assert sum(0 < so_far < SHARDS for so_far in at_kills) >= KILLS / 6, at_kills
    process.communicate(timeout=TIMEOUT)
    finish("label", command)
    assert_kept(committed, out)
    assert content(out) == undisturbed
    assert ": 0 leftover" in finish("label", command, "--gc")
    assert content(out) == undisturbed


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


@pytest.mark.slow
def test_a_driver_that_is_told_to_stop_says_so_and_goes_on(
    folder: Path, undisturbed: dict[str, bytes]
) -> None:
    command, out = recipe(folder, "told"), folder / "told"
    process = start("label", command)
    wait_for(process, lambda: commits(out) > 0)
    process.terminate()
    _, told = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 143, told
    assert "told to stop; the same command goes on from here" in told
    finish("label", command)
    finish("label", command, "--gc")
    assert content(out) == undisturbed
