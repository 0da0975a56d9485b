"""Five seconds of infra/fuzz.py, and that it would notice what it looks for."""

import random
import time

import fuzz
import pytest
from fuzz_targets import TARGETS, Target

from glipv2.data_prep import boxes_cleaning, webdataset


def test_five_seconds_find_nothing(tmp_path):
    cases, failures = fuzz.fuzz(list(TARGETS), seed=0, seconds=5, out=str(tmp_path))
    assert not failures, "\n".join(path.read_text() for path in tmp_path.glob("*.txt"))
    assert min(cases[name] for name in TARGETS) > 5


def test_a_case_depends_on_its_seed_and_number_alone():
    for target in TARGETS.values():
        assert target.make(random.Random("0/1")) == target.make(random.Random("0/1"))
        assert len({target.make(random.Random(f"0/{number}")) for number in range(20)}) > 10


def failures_of(name, tmp_path, seconds=10):
    """Until the first is found."""
    for number in range(20_000):
        data = TARGETS[name].make(random.Random(f"0/{name}/{number}"))
        if error := fuzz.failure_of(name, data):
            return error
    return ""


def test_a_reader_without_one_of_its_checks_is_found(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(boxes_cleaning, "max", lambda *sides: sides[0], raising=False)
        assert "AssertionError" in failures_of("box", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(webdataset, "_new_name", lambda file, member: "../a.jpg")
        patch.setattr(str, "split", str.split) if False else None
        patch.setattr(webdataset, "PLAIN", (*webdataset.PLAIN, b"2"))
        assert failures_of("tar", tmp_path) == ""


def test_slow_and_hungry_cases_fail(monkeypatch):
    def endless(data):
        while True:
            pass

    monkeypatch.setattr(fuzz, "CASE_SECONDS", 0.05)
    monkeypatch.setitem(TARGETS, "slow", Target(lambda rng: b"", endless))
    start = time.process_time()
    assert "more than 0.05 s" in fuzz.failure_of("slow", b"")
    assert time.process_time() - start < 1
    monkeypatch.setattr(fuzz, "MAX_RSS", 1)
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
