"""Five seconds of infra/fuzz.py, and that it would notice what it looks for."""

import random
import re
import time

import fuzz
import pytest
from fuzz_targets import TARGETS, Target

from glipv2.data_prep import boxes_cleaning, grounded, json_stream, webdataset
from glipv2.pipeline import negatives, record_json, shard_format


@pytest.fixture(autouse=True)
def memory_counts_from_here(monkeypatch):
    """Other tests of this process may have had more memory than fuzzing is allowed."""
    real, before = fuzz.peak_rss, fuzz.peak_rss()
    monkeypatch.setattr(fuzz, "peak_rss", lambda: real() - before)


def test_five_seconds_find_nothing(tmp_path):
    cases, failures = fuzz.fuzz(list(TARGETS), seed=0, seconds=5, out=str(tmp_path))
    assert not failures, "\n".join(path.read_text() for path in tmp_path.glob("*.txt"))
    assert min(cases[name] for name in TARGETS) > 5


def test_a_case_depends_on_its_seed_and_number_alone():
    for target in TARGETS.values():
        assert target.make(random.Random("0/1")) == target.make(random.Random("0/1"))
        assert len({target.make(random.Random(f"0/{number}")) for number in range(20)}) > 10


@pytest.mark.parametrize(
    ("name", "module", "part", "broken"),
    [
        ("tar", webdataset, "clean_text", str),
        ("own_tar", shard_format, "MAX_MEMBER", 1 << 90),
        ("sample", record_json, "_checked_format", lambda members: "png"),
        ("sample", record_json, "_span", lambda span, caption: tuple(span)),
        ("caption", grounded, "clean_with_places", lambda text: (text, list(range(len(text) + 1)))),
        ("names", negatives, "SEPARATOR_COST", 0),
        ("box", boxes_cleaning, "max", lambda *sides: sides[0]),
        ("json", json_stream, "NUMBER", re.compile("")),
    ],
)
def test_a_reader_with_a_mistake_is_found(monkeypatch, name, module, part, broken):
    monkeypatch.setattr(module, part, broken, raising=False)
    cases = (TARGETS[name].make(random.Random(f"0/{name}/{n}")) for n in range(3_000))
    assert any(fuzz.failure_of(name, data) for data in cases)


def test_slow_and_hungry_cases_fail(monkeypatch):
    def endless(data):
        while True:
            pass

    monkeypatch.setattr(fuzz, "CASE_SECONDS", 0.05)
    monkeypatch.setitem(TARGETS, "slow", Target(lambda rng: b"", endless))
    start = time.process_time()
    assert "more than 0.05 s" in fuzz.failure_of("slow", b"")
    assert time.process_time() - start < 1
    monkeypatch.setattr(fuzz, "MAX_RSS", -1)
    assert "MB in memory" in fuzz.failure_of("box", TARGETS["box"].make(random.Random(1)))


def test_a_failure_is_kept_and_can_be_replayed(monkeypatch, tmp_path, capsys):
    def refuse(data):
        raise ValueError("not documented")

    monkeypatch.setitem(TARGETS, "box", Target(TARGETS["box"].make, refuse))
    monkeypatch.setattr("sys.argv", ["fuzz.py", "--minutes", "0.001", "--target", "box",
                                     "--seed", "3", "--out", str(tmp_path)])  # fmt: skip
    assert fuzz.main() == 1
    assert "ValueError: not documented" in capsys.readouterr().out
    kept = tmp_path / "box-3-0.bin"
    assert kept.read_bytes() == TARGETS["box"].make(random.Random("3/box/0"))
    monkeypatch.setattr("sys.argv", ["fuzz.py", "--replay", str(kept)])
    with pytest.raises(ValueError, match="not documented"):
        fuzz.main()
