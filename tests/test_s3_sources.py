"""Sources, pictures and models on a real S3 server that fails: as if they were on a disk."""

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from fault_proxy import FAULTS, Proxy, Rule  # noqa: E402
from s3_server import content, without_attempt  # noqa: E402
from s3fs import S3FileSystem  # noqa: E402
from sample_records import coco_file  # noqa: E402

from glipv2.data_prep.toy import toy_categories, toy_records  # noqa: E402
from glipv2.jobs.cli import main  # noqa: E402
from glipv2.model.config import preset  # noqa: E402
from glipv2.model.glip import build_model  # noqa: E402
from glipv2.model.grounder import Grounder  # noqa: E402
from glipv2.model.tokenizer import Tokenizer, tiny_vocab  # noqa: E402
from glipv2.model.weights import model_files  # noqa: E402
from glipv2.pipeline import storage  # noqa: E402
from glipv2.pipeline.shards import write_shard_set  # noqa: E402

ALWAYS = 10**6
RECORDS = list(toy_records("toy_val", 12, 3, 64))
CATEGORIES = toy_categories("toy_val")
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures as sources of three kinds, and a set that holds one of them."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "pairs").mkdir()
    rows = []
    for record in RECORDS:
        name = f"{record.key}.{record.image_format}"
        (folder / "pairs" / name).write_bytes(record.image)
        rows.append({"image": name, "caption": record.caption})
    rows.append({"image": "gone.jpg", "caption": "a picture that is gone"})
    (folder / "pairs" / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "instances.json").write_text(json.dumps(coco_file(RECORDS, CATEGORIES)))
    (folder / "tars").mkdir()
    for number in range(2):
        write_tar(folder / "tars" / f"{number:05d}.tar", number)
    (folder / "LICENSE").write_text("Apache-2.0\n")
    write_shard_set(str(folder / "held-out"), RECORDS[:1], CATEGORIES, {})
    return folder


def write_tar(path: Path, number: int) -> None:
    with tarfile.open(path, "w") as tar:
        for record in RECORDS[number::2]:
            parts = {record.image_format: record.image, "txt": record.caption.encode()}
            for kind, data in parts.items():
                member = tarfile.TarInfo(f"{record.key}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


COMMANDS = {
    "pairs": "pairs --root {0}/pairs",
    "pairs, cleaned": "pairs --root {0}/pairs --duplicates --exclude {0}/held-out",
    "coco": "coco --annotations {0}/instances.json --images {0}/pairs",
    "webdataset": "webdataset --root {0}/tars",
}


@pytest.mark.parametrize("source", COMMANDS)
def test_a_source_on_a_failing_store_becomes_the_set_that_it_becomes_on_a_disk(
    source: str,
    local: Path,
    s3_folder: str,
    s3_proxy: Proxy,
    s3_bare: S3FileSystem,
    tmp_path: Path,
) -> None:
    s3_bare.put(f"{local}/", f"{s3_folder}/in/", recursive=True)
    command = COMMANDS[source]
    assert main(["prepare", *command.format(local).split(), "--out", str(tmp_path / "set")]) == 0
    faults = [f for f in FAULTS if f != "slow_answer"]
    rules = [Rule(f, times=ALWAYS, every=7, skip=n) for n, f in enumerate(faults)]
    s3_proxy.set(*rules)
    out = storage.join(s3_folder, "set")
    assert main(["prepare", *command.format(f"{s3_folder}/in").split(), "--out", out]) == 0
    assert all(rule.hits for rule in rules)
    paths = (path for path in (tmp_path / "set").rglob("*") if path.is_file())
    root, theirs = str(local).encode(), f"{s3_folder}/in".encode()  # prepare.json says where from
    files = {
        str(path.relative_to(tmp_path / "set")): path.read_bytes().replace(root, theirs)
        for path in paths
    }
    assert content(s3_bare, out) == {n: without_attempt(n, data) for n, data in files.items()}
    made = json.loads(files["dataset.json"])["info"]
    assert made["totals"]["samples"] == len(RECORDS) - (source == "pairs, cleaned")


def test_tars_are_indexed_where_they_are_on_a_failing_store(
    local: Path, s3_folder: str, s3_proxy: Proxy, s3_bare: S3FileSystem
) -> None:
    s3_bare.put(f"{local}/tars/", f"{s3_folder}/tars/", recursive=True)
    url = storage.join(s3_folder, "tars")
    s3_proxy.set(Rule("503", times=ALWAYS, every=5), Rule("cut_answer", "GET", times=9, every=4))
    assert main(["prepare", "webdataset", "--root", url, "--index-only"]) == 0
    assert main(["check", url, "--decode"]) == 0
    assert all(rule.hits > 3 for rule in s3_proxy.rules)
    for tar in sorted((local / "tars").iterdir()):
        assert s3_bare.cat_file(f"{url}/{tar.name}") == tar.read_bytes()


def test_a_set_on_a_failing_store_shows_the_figures_that_it_has_on_a_disk(
    local: Path, s3_folder: str, s3_proxy: Proxy, s3_bare: S3FileSystem, tmp_path: Path
) -> None:
    here, there = str(tmp_path / "set"), storage.join(s3_folder, "set")
    write_shard_set(here, RECORDS, CATEGORIES, {}, samples_per_shard=5)
    s3_bare.put(f"{here}/", f"{there}/", recursive=True)
    s3_proxy.set(Rule("503", times=ALWAYS, every=3), Rule("reset", times=ALWAYS, every=4))
    pages, figures = [], []
    for url, results in ((here, str(tmp_path)), (there, s3_folder)):
        page, stats = storage.join(results, "page.html"), storage.join(results, "stats.json")
        assert main(["view", url, "--out", page]) == 0
        assert main(["stats", url, "--json", stats]) == 0
        assert main(["check", url, "--decode"]) == 0
        pages.append(storage.read_bytes(page).replace(url.encode(), b"URL"))
        figures.append(storage.read_bytes(stats).replace(url.encode(), b"URL"))
    assert pages[0] == pages[1] and pages[0].count(b"<svg") >= len(RECORDS)
    assert figures[0] == figures[1]
    assert all(rule.hits > 3 for rule in s3_proxy.rules)


def test_the_newest_step_of_a_run_is_found_also_by_who_looked_before(
    s3_folder: str, s3_bare: S3FileSystem
) -> None:
    for step in (1, 2):
        files = {**tiny_model(seed=step), "COMMIT.json": b"{}"}
        for name, data in files.items():
            s3_bare.pipe_file(f"{s3_folder}/checkpoints/step-{step:06d}/{name}", data)
        loaded = Grounder.load(s3_folder)
        assert model_files(loaded.model, loaded.tokenizer) == tiny_model(seed=step)


def tiny_model(seed: int) -> dict[str, bytes]:
    model = build_model(preset("tiny"), seed)
    torch.nn.init.zeros_(model.alignment_head.bias0)
    return model_files(model, Tokenizer.from_vocab(tiny_vocab(), 96))


def test_pictures_and_models_on_a_store_survive_one_failure_each(
    s3_folder: str, s3_proxy: Proxy, s3_bare: S3FileSystem, tmp_path: Path
) -> None:
    for name, data in tiny_model(seed=0).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "a.jpg").write_bytes(RECORDS[0].image)
    s3_bare.put(f"{tmp_path}/", f"{s3_folder}/", recursive=True)
    rules = [
        Rule(fault, method, path)
        for path in ("a.jpg", "model.safetensors", "config.json", "vocab.txt", "found.json")
        for method, fault in (("GET|PUT", "503"), ("GET|PUT", "reset"), ("HEAD", "503"))
        if (method, path) != ("HEAD", "found.json")
    ]
    found = []
    for folder in (str(tmp_path), s3_folder):
        s3_proxy.set(*rules)
        words = ["--text", "a red square. a blue circle.", "--threshold", "0.3"]
        picture, out = storage.join(folder, "a.jpg"), storage.join(folder, "found")
        where = ["--checkpoint", folder, "--image", picture, "--out", out]
        assert main(["ground", *where, *words]) == 0
        found.append((storage.read_json(f"{out}.json"), storage.read_bytes(f"{out}.png")))
    assert all(rule.hits == 1 for rule in rules)
    (local, drawn), (remote, drawn_there) = found
    assert drawn == drawn_there and local["regions"]
    assert remote == {**local, "image": f"{s3_folder}/a.jpg"}
