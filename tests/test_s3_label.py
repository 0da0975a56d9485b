"""Labelling on a real S3 server that fails: the same bytes as on a disk, whoever is killed."""

import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from commands import error_line, finish, kill_when  # noqa: E402
from fault_proxy import Proxy, Rule  # noqa: E402
from in_process import without_ray  # noqa: E402
from s3_server import content, watched, without_attempt  # noqa: E402
from s3fs import S3FileSystem  # noqa: E402
from untrained_teacher import save_teacher  # noqa: E402

from glipv2.data_prep.toy import toy_records  # noqa: E402
from glipv2.jobs.cli import main  # noqa: E402
from glipv2.jobs.label import label  # noqa: E402
from glipv2.pipeline import retries, storage  # noqa: E402
from glipv2.pipeline.config_loader import load_config  # noqa: E402
from glipv2.pipeline.shards import (  # noqa: E402
    RawSample,
    record_members,
    shard_name,
    write_manifest,
    write_raw_shard,
)

SHARDS, PAIRS = 4, 4
"""Shards of the set, pairs of each."""
ALWAYS = 10**6
FAULTS = (
    Rule("503", times=ALWAYS, every=9),
    Rule("reset", times=ALWAYS, every=11, skip=3),
    Rule("lost_answer", "PUT|DELETE", times=ALWAYS, every=5, skip=1),
    Rule("cut_request", "PUT", times=ALWAYS, every=6, skip=2),
    Rule("cut_answer", "GET", times=ALWAYS, every=8, skip=2),
    Rule("slow_answer", "GET", times=ALWAYS, every=10, skip=4),
)


def faults() -> list[Rule]:
    return [replace(rule) for rule in FAULTS]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, one of them damaged; a teacher with random weights that is sure of itself; and `out`
    and `run`, what labelling makes of them in this process, on a disk."""
    folder = tmp_path_factory.mktemp("label")
    samples = [
        RawSample(key=record.key, members=record_members(record))
        for record in toy_records("toy_pairs", SHARDS * PAIRS, 1, 64)
    ]
    picture = next(name for name in samples[5].members if name != "json")
    samples[5].members[picture] = samples[5].members[picture][:200]
    shards = [
        write_raw_shard(str(folder / "pairs"), shard_name(n), samples[n * PAIRS : (n + 1) * PAIRS])
        for n in range(SHARDS)
    ]
    write_manifest(str(folder / "pairs"), shards, (), {})
    save_teacher(folder / "teacher")
    label_here(recipe(str(folder)))
    return folder


def label_here(recipe: str) -> None:
    """`glipv2 label` without Ray."""
    with without_ray():
        label(load_config(recipe, []))


@pytest.fixture(scope="module")
def undisturbed(local: Path) -> dict[str, bytes]:
    out = local / "out"
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert sum(name.endswith(".tar") for name in files) == SHARDS
    assert json.loads(files["dataset.json"])["info"]["counts"]["boxes"] > SHARDS * PAIRS
    return files


@pytest.fixture
def folder(local: Path, s3_folder: str, s3_bare: S3FileSystem) -> str:
    """The pairs and the teacher on the store, and the recipe with all its places there."""
    for name in ("pairs", "teacher"):
        s3_bare.put(f"{local}/{name}", f"{s3_folder}/{name}", recursive=True)
    recipe(s3_folder)
    return s3_folder


def recipe(folder: str) -> str:
    """Of a labelling that lives in one folder, beside which it names nothing."""
    settings = {
        "teacher": f"{folder}/teacher",
        "inputs": {"pairs": "out"},
        "score_threshold": 0.3,
        "num_actors": [2, 2],
    }
    tree = {"run_dir": f"{folder}/run", "data": {"root": folder}, "label": settings}
    storage.write_bytes(f"{folder}/recipe.yaml", yaml.safe_dump(tree).encode())
    return f"{folder}/recipe.yaml"


def assert_same(
    store: S3FileSystem, folder: str, local: Path, undisturbed: dict[str, bytes]
) -> None:
    """The set has the bytes of the local one and nothing else, and the same pair is listed."""
    names = {name: without_attempt(name, data) for name, data in undisturbed.items()}
    assert content(store, f"{folder}/out") == names
    listed = (local / "run" / "labels" / "quarantine.jsonl").read_bytes()
    assert listed.count(b"image_undecodable") == 1
    assert store.cat_file(f"{folder}/run/labels/quarantine.jsonl") == listed


def test_any_fault_while_workers_label_ends_with_the_bytes_of_a_local_run(
    folder: str,
    local: Path,
    undisturbed: dict[str, bytes],
    s3_proxy: Proxy,
    s3_bare: S3FileSystem,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3_proxy, "delay", 0.3)
    s3_proxy.set(*faults())
    with watched(s3_bare, f"{folder}/out", undisturbed, pause=0.3) as torn:
        finish("label", f"{folder}/recipe.yaml")
    assert torn == []
    assert all(rule.hits > 1 for rule in s3_proxy.rules), s3_proxy.rules
    assert_same(s3_bare, folder, local, undisturbed)
    assert json.loads(s3_bare.cat_file(f"{folder}/run/seconds/label.json"))["done"]


@pytest.mark.parametrize(
    "down",
    [
        Rule("503", "GET", "teacher/model", times=ALWAYS),
        pytest.param(
            Rule("503", "GET", "teacher/model", times=ALWAYS, skip=1), marks=pytest.mark.slow
        ),
        pytest.param(
            Rule("503", "PUT", "out/attempts", times=ALWAYS, skip=2), marks=pytest.mark.slow
        ),
    ],
    ids=["what the driver reads", "what workers read", "what workers write"],
)
def test_a_store_that_stays_down_ends_a_labelling_that_then_goes_on(
    down: Rule,
    folder: str,
    local: Path,
    undisturbed: dict[str, bytes],
    s3_proxy: Proxy,
    s3_bare: S3FileSystem,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(retries.PATIENCE, "2")
    s3_proxy.set(replace(down))
    told = error_line(finish("label", f"{folder}/recipe.yaml", code=3), "label")
    assert re.match(rf"glipv2 label: {folder}/{down.path}\S+ can't be (read|written): ", told)
    assert "503" in told and "the same command goes on from here" in told
    assert not s3_bare.exists(f"{folder}/out/dataset.json")
    monkeypatch.delenv(retries.PATIENCE)
    s3_proxy.set()
    label_here(f"{folder}/recipe.yaml")
    assert_same(s3_bare, folder, local, undisturbed)


def test_leftovers_on_a_store_are_counted_and_removed_on_demand(
    folder: str,
    undisturbed: dict[str, bytes],
    s3_proxy: Proxy,
    s3_bare: S3FileSystem,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, data in undisturbed.items():
        s3_bare.pipe_file(f"{folder}/out/{name}", data)
    for leftover in ("shard-000001-12ab.tar", "shard-000001-34cd.tar"):
        s3_bare.pipe_file(f"{folder}/out/attempts/{leftover}", b"half")
    s3_proxy.set(Rule("503", times=ALWAYS, every=3))
    assert main(["label", f"{folder}/recipe.yaml", "--gc"]) == 0
    assert "out: 2 leftover attempts removed" in capsys.readouterr().out
    assert content(s3_bare, f"{folder}/out").keys() == undisturbed.keys()
    assert main(["label", f"{folder}/recipe.yaml", "--dry-run"]) == 0
    assert "nothing is left to do" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_drivers_killed_while_the_store_fails(
    folder: str,
    local: Path,
    undisturbed: dict[str, bytes],
    s3_proxy: Proxy,
    s3_bare: S3FileSystem,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3_proxy, "delay", 0.3)
    out, command = f"{folder}/out", ("label", f"{folder}/recipe.yaml")

    def committed() -> list[str]:
        time.sleep(0.1)  # the server has other work
        return list(s3_bare.glob(f"{out}/commits/*.json"))

    kept: dict[str, bytes] = {}
    with watched(s3_bare, out, undisturbed, pause=0.3) as torn:
        for enough in (1, 2, 3):
            s3_proxy.set(*faults())
            assert kill_when(lambda: len(committed()) >= enough, *command) == -9  # noqa: B023
            now = {path: s3_bare.cat_file(path) for path in committed()}
            assert kept.items() <= now.items()
            kept = now
        s3_proxy.set(*faults())
        finish(*command)
    assert torn == []
    assert all(s3_bare.cat_file(path) == data for path, data in kept.items())
    assert_same(s3_bare, folder, local, undisturbed)
    finish(*command)
    assert_same(s3_bare, folder, local, undisturbed)
    assert "0 leftover" in finish(*command, "--gc")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_reads_that_stall_are_given_up_and_tried_again(
    folder: str,
    local: Path,
    undisturbed: dict[str, bytes],
    s3_proxy: Proxy,
    s3_bare: S3FileSystem,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3_proxy, "delay", retries.READ_TIMEOUT + 5)
    s3_proxy.set(Rule("slow_answer", "GET", "pairs/shard-00000[12]", times=2))
    finish("label", f"{folder}/recipe.yaml", timeout=600)
    assert s3_proxy.hits == 2
    assert_same(s3_bare, folder, local, undisturbed)
