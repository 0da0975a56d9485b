"""Each bad input has its documented outcome at the command line: a message and exit code 2, or a
sample that is counted, noted and left out. Never a traceback."""

import io
import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from PIL import Image

from glipv2.data_prep.toy import toy_record
from glipv2.jobs.cli import main
from glipv2.jobs.prepare import prepare_set
from glipv2.model.tokenizer import Tokenizer, tiny_vocab
from glipv2.pipeline.config import DataConfig, PrepareConfig
from glipv2.pipeline.loader import build_loader
from glipv2.pipeline.quarantine import Quarantine
from glipv2.pipeline.record_json import record_members
from glipv2.pipeline.shard_format import RawSample
from glipv2.pipeline.shards import open_shard_set, write_manifest, write_raw_shard

GOOD = 12


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A small run on a good toy set, ready to be spoilt."""
    options = PrepareConfig(source="toy", set="toy_grounding", count=GOOD, size=64, seed=1)
    prepare_set(str(tmp_path / "data" / "gold"), options)
    tree = {
        "run_dir": str(tmp_path),
        "model": {"preset": "tiny"},
        "data": {
            "mixture": {"gold": 1}, "short_sides": [64], "long_side": 64, "pad_to": [64, 64],
        },
        "train": {"steps": 2, "global_batch": 4, "precision": "fp32"},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_a_missing_shard_set_is_named_with_exit_code_2(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "pretrain", recipe, "data.mixture.silver=1")
    assert "data/silver" in said


def test_a_truncated_shard_is_refused_with_both_sizes(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = recipe.parent / "data" / "gold" / "shard-000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    said = refused(capsys, "pretrain", recipe)
    assert "shard-000000.tar" in said
    assert str(len(whole)) in said
    assert str(len(whole) - 512) in said


def test_more_ranks_than_lanes_are_refused_with_the_cure(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "pretrain", recipe, "train.processes=8")
    assert "train.global_batch (4) must be a multiple of 8, the number of ranks (8)" in said
    said = refused(capsys, "pretrain", recipe, "train.processes=4", "data.lanes=2")
    assert "2 lanes" in said
    assert "global_batch" in said


def test_an_unknown_config_key_is_refused_with_the_nearest_name(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "did you mean data.flip?" in refused(capsys, "pretrain", recipe, "data.flop=1")


def test_a_missing_image_or_checkpoint_is_named(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recipe.parent
    said = refused(capsys, "ground", "--checkpoint", run, "--image", run / "no.jpg", "--text", "x")
    assert "no.jpg does not exist" in said
    picture = run / "yes.jpg"
    Image.new("RGB", (8, 8)).save(picture)
    said = refused(capsys, "ground", "--checkpoint", run, "--image", picture, "--text", "a dog")
    assert "no checkpoint in" in said


def spoilt(change: str) -> RawSample:
    """A sample of a shard that somebody else wrote, wrong in one way."""
    record = toy_record("toy_grounding", 0, seed=5, size=64)
    members = dict(record_members(record))
    content = json.loads(members["json"])
    region = content["regions"][0]
    if change == "not a number":
        region["score"] = float("nan")
    elif change == "box outside":
        region["box"] = [10, 10, 500, 40]
    elif change == "box inverted":
        region["box"] = [40, 10, 20, 30]
    elif change == "span past the end":
        region["spans"] = [[0, len(content["caption"]) + 7]]
    elif change == "empty caption":
        content["caption"], content["regions"] = "", []
    elif change == "huge image":
        members["jpg"] = huge_jpeg()
        content["width"] = content["height"] = 30000
        content["regions"] = []
    elif change == "wrong extension":
        picture = io.BytesIO()
        Image.new("RGB", (64, 64)).save(picture, "PNG")
        members["jpg"] = picture.getvalue()
    members["json"] = json.dumps(content).encode()
    return RawSample(key="spoilt", members=members)


def huge_jpeg() -> bytes:
    """A few hundred bytes whose header says 30000 x 30000 pixels."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "JPEG")
    data = bytearray(picture.getvalue())
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = (30000).to_bytes(2, "big") * 2
    return bytes(data)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("not a number", "json_invalid"),
        ("box outside", "box_outside"),
        ("box inverted", "box_inverted"),
        ("span past the end", "span_outside"),
        ("empty caption", "caption_empty"),
        ("huge image", "image_too_large"),
        ("wrong extension", "image_format"),
        ("altered byte", "crc_mismatch"),
    ],
)
def test_a_spoilt_sample_is_counted_noted_and_left_out(
    tmp_path: Path, change: str, reason: str
) -> None:
    url = str(tmp_path / "set")
    samples = [
        RawSample(key=record.key, members=record_members(record))
        for record in (toy_record("toy_grounding", n, seed=5, size=64) for n in range(GOOD))
    ]
    shard = write_raw_shard(url, "shard-000000", [*samples, spoilt(change)])
    write_manifest(url, [shard], (), {})
    if change == "altered byte":
        path = tmp_path / "set" / "shard-000000.tar"
        data = bytearray(path.read_bytes())
        data[data.rindex(b"toy_grounding") - 3] ^= 1
        data[data.rindex(b'"caption"') + 20] ^= 1
        path.write_bytes(data)
    quarantine = Quarantine(str(tmp_path / "quarantine.jsonl"))
    settings = DataConfig(
        mixture={"gold": 1}, short_sides=(64,), long_side=64, pad_to=(64, 64), max_bad_share=0.5
    )
    tokenizer = Tokenizer.from_vocab(tiny_vocab(), 96)
    loader = build_loader(settings, 4, {"gold": open_shard_set(url)}, tokenizer, on_bad=quarantine)
    seen: Counter[str] = Counter()
    for _, (batch, _) in zip(range(6), loader.batches(loader.start()), strict=False):
        seen.update(batch.keys)
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {line["reason"] for line in lines} == {reason}
    assert "gold/spoilt" not in seen
    assert {line["key"] for line in lines} <= {"spoilt"} or change == "altered byte"
    bad = {f"gold/{line['key']}" for line in lines}
    assert set(seen) == {f"gold/{sample.key}" for sample in samples} - bad
