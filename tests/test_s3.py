"""Object storage: what a store must be able to do, and the commands on one, on a real S3 server."""

import multiprocessing
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import s3_server
from commands import finish, smoke_recipe
from fault_proxy import Proxy, Rule
from s3fs import S3FileSystem

from glipv2.data_prep.toy import toy_categories, toy_records
from glipv2.jobs.cli import main
from glipv2.jobs.prepare import prepare_set
from glipv2.pipeline import storage
from glipv2.pipeline.config import DataConfig, PrepareConfig
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.shards import (
    iterate_records,
    open_shard_set,
    write_manifest,
    write_shard,
)

TOY = ["toy", "--set", "toy_val", "--count", "24", "--size", "64", "--seed", "3"]
RECORDS = list(toy_records("toy_val", 4, 3, 64))


def test_of_threads_and_processes_exactly_one_creates_an_object(s3_folder: str) -> None:
    urls = [storage.join(s3_folder, f"{number}.json") for number in range(20)]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    others = [
        context.Process(target=s3_server.create_each, args=(urls, f"process {n}", results))
        for n in range(2)
    ]
    for process in others:
        process.start()
    said = [results.get(timeout=60) for _ in others]  # one may be through before the other begins
    won: list[tuple[str, str]] = []

    def create(name: str) -> None:
        won.extend((url, name) for url in urls if storage.create_once(url, name.encode()))

    threads = [threading.Thread(target=create, args=(f"thread {n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said += [results.get(timeout=60) for _ in others]
    assert said.count("ready") == len(others)
    won += [entry for own in said if own != "ready" for entry in own]
    for process in others:
        process.join()
    assert sorted(url for url, _ in won) == sorted(urls)
    assert {url: storage.read_bytes(url).decode() for url in urls} == dict(won)


def test_a_bucket_that_is_not_there_is_named_and_not_waited_for(
    s3_folder: str, s3_proxy: Proxy
) -> None:
    del s3_folder
    for act in (storage.read_bytes, storage.size, lambda url: storage.write_bytes(url, b"1")):
        with pytest.raises(DataError, match="s3://no-such-bucket/x: there is no such bucket"):
            act("s3://no-such-bucket/x")
    assert len(s3_proxy.seen) == 5


def test_a_set_is_made_viewed_counted_and_checked_on_the_store(
    s3_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str, code: int = 0) -> str:
        assert main(words) == code
        return "".join(capsys.readouterr())

    url, page = storage.join(s3_folder, "toy"), storage.join(s3_folder, "page.html")
    assert "24 samples" in said("prepare", *TOY, "--out", url)
    assert "there already" in said("prepare", *TOY, "--out", url)
    options = PrepareConfig(source="toy", set="toy_val", count=24, size=64, seed=3)
    assert open_shard_set(url).digest == prepare_set(str(tmp_path / "toy"), options).digest
    assert f"page: {page}" in said("view", url, "--out", page)
    assert storage.read_bytes(page).count(b"<svg") >= 24
    figures = storage.join(s3_folder, "stats.json")
    said("stats", url, "--json", figures)
    assert storage.read_json(figures)["samples"] == 24
    said("check", url, "--decode")
    shard = open_shard_set(url).shard_url(0)
    storage.write_bytes(shard, storage.read_bytes(shard)[:-1024])
    assert "shard_size" in said("check", url, code=1)


def test_of_many_writers_of_a_labelled_shard_one_commits(
    s3_folder: str, s3_bare: S3FileSystem
) -> None:
    results = []

    def label() -> None:
        results.append(write_shard(s3_folder, "pairs-000000", RECORDS, {"images": 4}))

    threads = [threading.Thread(target=label) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len(set(map(repr, results))) == 1
    write_manifest(s3_folder, results[:1], toy_categories("toy_val"), {})
    assert list(iterate_records(s3_folder)) == RECORDS
    assert not [path for path in s3_bare.find(s3_folder) if "/attempts/" in path]


def test_loader_processes_read_the_store_beside_a_parent_that_does(s3_folder: str) -> None:
    from glipv2.model.tokenizer import Tokenizer, tiny_vocab
    from glipv2.pipeline.loader import build_loader

    prepare_set(s3_folder, PrepareConfig(source="toy", set="toy_val", count=24, size=64, seed=3))
    sets = {"toy": open_shard_set(s3_folder)}
    data = DataConfig(mixture={"toy": 1.0}, short_sides=(64,), long_side=64, lanes=2)
    tokenizer = Tokenizer.from_vocab(tiny_vocab(), 96)

    def first_batch(workers: int) -> object:
        loader = build_loader(replace(data, workers=workers), 4, sets, tokenizer)
        batch, _ = next(iter(loader.batches(loader.start())))
        return batch

    alone, served = first_batch(0), first_batch(1)
    assert (alone.images_B3HW == served.images_B3HW).all()
    assert (alone.tokens_BT == served.tokens_BT).all()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_main_job_lives_on_the_store_from_recipe_to_report(
    s3_folder: str, s3_proxy: Proxy, tmp_path: Path
) -> None:
    run = storage.join(s3_folder, "run")
    recipe = smoke_recipe(tmp_path, data={"root": storage.join(s3_folder, "data")})
    s3_proxy.set(Rule("503", times=10**6, every=11), Rule("lost_answer", times=10**6, every=13))
    said = finish("run", recipe, f"run_dir={run}", timeout=600)
    assert f"report: {run}/report.html" in said
    summary = storage.read_json(storage.join(run, "summary.json"))
    assert summary["labels"]["pairs"] == 24
    page = storage.read_bytes(storage.join(run, "report.html")).decode()
    assert page.count("<svg") > 20 and "predictions-teacher.json is missing" not in page
    before = storage.read_bytes(storage.join(run, "teacher", "losses.jsonl"))
    assert before.count(b"\n") == 8
    finish("run", recipe, f"run_dir={run}")
    assert storage.read_bytes(storage.join(run, "teacher", "losses.jsonl")) == before
    finish("report", run)
    picture, out = storage.join(s3_folder, "toy.jpg"), storage.join(s3_folder, "found")
    storage.write_bytes(picture, next(iter(toy_records("toy_val", 1, 3, 64))).image)
    finish(
        "ground", "--checkpoint", storage.join(run, "teacher"), "--image", picture,
        "--text", "a red square.", "--threshold", 0, "--out", out,
    )  # fmt: skip
    assert storage.read_json(f"{out}.json")["image"] == picture
    assert storage.read_bytes(f"{out}.png").startswith(b"\x89PNG")
    step = storage.join(run, "teacher", "checkpoints", "step-000008")
    finish("convert", "--to", "glip", step, "--out", storage.join(s3_folder, "glip.pth"))
    assert not Path("s3:").exists()
