"""`glipv2 schedule`: each committed step is scored once per suite, whoever dies and whenever.

Scoring is a stand-in that writes the result of a table; tests/test_schedule_drill.py has the real.
"""

import os
import subprocess
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from schedule_runs import (  # noqa: E402
    STORES,
    Scoring,
    alerts,
    commit_step,
    run_on_store,
    scheduler,
    scored_by_table,
)
from scored_runs import save_step, scored_config, write_detection  # noqa: E402

from glipv2.jobs import schedule, schedule_attempts  # noqa: E402
from glipv2.jobs.schedule import Scheduler  # noqa: E402
from glipv2.jobs.schedule_status import status_table  # noqa: E402
from glipv2.model.folders import step_url  # noqa: E402
from glipv2.pipeline import storage  # noqa: E402
from glipv2.pipeline.checkpoint import committed_steps, prune_checkpoints  # noqa: E402
from glipv2.pipeline.errors import ConfigError, DataError  # noqa: E402
from glipv2.pipeline.eval_config import ScheduleConfig  # noqa: E402
from glipv2.pipeline.lease import identity  # noqa: E402
from glipv2.pipeline.pins import pin, pins  # noqa: E402
from glipv2.pipeline.watch import HUNG  # noqa: E402


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_detection(tmp_path_factory.mktemp("data") / "val")


@pytest.fixture(params=STORES)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return run_on_store(request, tmp_path)


@pytest.fixture
def local(tmp_path: Path) -> str:
    return str(tmp_path / "run")


@pytest.fixture
def scoring(monkeypatch: pytest.MonkeyPatch) -> Scoring:
    return scored_by_table(monkeypatch)


def best_file(run: str, metric: str = "coco.ap") -> dict[str, Any]:
    return storage.read_json(f"{run}/eval/best-{metric}.json")


def test_the_newest_step_of_each_run_comes_first_and_each_is_scored_once(
    run: str, val: str, scoring: Scoring
) -> None:
    for step in (100, 200, 300):
        commit_step(run, step)
    commit_step(f"{run}-2", 50)
    own = scheduler(run, val, runs=[run, f"{run}-2"], suites=["coco", "short"])
    assert own.serve() == 0
    steps = [step for name, step in scoring.scored if name == "coco"]
    assert steps == [300, 50, 200, 100]
    assert scoring.scored == [(name, step) for step in steps for name in ("coco", "short")]
    assert scheduler(run, val, suites=["coco", "short"]).serve() == 0
    commit_step(run, 400)
    assert scheduler(run, val, suites=["coco", "short"]).serve() == 0
    assert scoring.scored[8:] == [("coco", 400), ("short", 400)]
    assert best_file(run)["step"] == 400 and pins(run)["best-coco.ap"] == 400
    assert not storage.tree_sizes(f"{run}/eval/schedule")


def test_a_step_that_is_committed_while_another_is_scored_comes_next(
    local: str, val: str, scoring: Scoring
) -> None:
    for step in (10, 20):
        commit_step(local, step)
    scoring.during = lambda job, step: commit_step(local, 30) if step == 20 else None
    scheduler(local, val).serve()
    assert [step for _, step in scoring.scored] == [20, 30, 10]


def test_steps_written_anew_or_with_other_settings_are_scored_again(
    local: str, val: str, scoring: Scoring
) -> None:
    for step in (15, 20):
        commit_step(local, step)
    scheduler(local, val, every_steps=10).serve()
    commit_step(local, 20, b"other weights")
    scheduler(local, val, every_steps=10).serve()
    assert scoring.scored == [("coco", 20)] * 2
    config = scored_config(local, {"coco": {"set": val, "chunk_size": 4}})
    Scheduler(config, once=True).serve()
    assert scoring.scored[2:] == [("coco", 20), ("coco", 15)]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_told_to_stop_it_gives_its_work_back(
    local: str, val: str, scoring: Scoring, stop: type[BaseException]
) -> None:
    commit_step(local, 10)

    def told(job: Any, step: int) -> None:
        assert pins(local).values()
        raise stop

    scoring.during = told
    with pytest.raises(stop):
        scheduler(local, val).serve()
    assert not pins(local)
    scoring.during = lambda job, step: None
    assert scheduler(local, val).serve() == 0 and len(scoring.scored) == 1


def leave_attempt(run: str, val: str, holder: dict[str, Any], number: int = 1) -> str:
    """What a scheduler that is somewhere else, or dead, has left."""
    [item, *_] = scheduler(run, val).due()
    url = f"{item.folder}/{number:04d}.json"
    storage.write_bytes(url, storage.canonical_json({**holder, "token": "another"}))
    return item.folder


def test_the_work_of_a_dead_scheduler_is_taken_over_and_of_a_living_one_left_alone(
    local: str, val: str, scoring: Scoring
) -> None:
    commit_step(local, 10)
    folder = leave_attempt(local, val, identity())
    assert scheduler(local, val).serve() == 0 and not scoring.scored
    assert scheduler(local, val).attempts.standing(folder).state == "running"
    leave_attempt(local, val, {**identity(), "started": "7"})  # the number is another process's now
    assert scheduler(local, val).serve() == 0 and scoring.scored == [("coco", 10)]


def test_silence_of_a_scheduler_elsewhere_is_death(
    local: str, val: str, scoring: Scoring, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_step(local, 10)
    folder = leave_attempt(local, val, {**identity(), "processes_of": "another machine"})
    own = scheduler(local, val, claim_seconds=0.4)
    started, beats = time.monotonic(), 0
    while own.attempts.standing(folder).state == "running":
        if time.monotonic() - started < 0.8:  # it lives for so long
            beats += 1
            storage.write_bytes(f"{folder}/0001.beat", str(beats).encode())
        time.sleep(0.05)
    assert 1.1 < time.monotonic() - started < 5
    assert own.serve() == 0 and scoring.scored == [("coco", 10)]


def test_who_makes_an_attempt_beats_until_it_ends(local: str, val: str) -> None:
    own = scheduler(local, val, claim_seconds=0.3).attempts
    folder = f"{local}/eval/schedule/step/x"
    with own.attempt(folder, 0) as mine:
        assert mine
        seen = set()
        for _ in range(40):
            seen |= (
                {Path(folder, "0001.beat").read_bytes()}
                if os.path.exists(f"{folder}/0001.beat")
                else set()
            )
            time.sleep(0.01)
        with own.attempt(folder, 0) as second:
            assert not second
    assert len(seen) > 3 and not Path(folder).exists()


def test_an_attempt_that_hangs_is_a_failure_and_its_process_ends_with_its_stacks(
    tmp_path: Path,
) -> None:
    folder = str(tmp_path / "suite-key")
    code = (
        "import time\n"
        "from glipv2.jobs.schedule_attempts import Attempts\n"
        "from glipv2.pipeline.eval_config import ScheduleConfig\n"
        "def hangs(): time.sleep(100)\n"
        "attempts = Attempts(ScheduleConfig(attempt_seconds=0.5))\n"
        f"with attempts.attempt({folder!r}, 0): hangs()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    assert done.returncode == HUNG
    assert "no end after 0.5 s" in done.stderr and "in hangs" in done.stderr
    stands = schedule_attempts.Attempts(ScheduleConfig(retry_seconds=100)).standing(folder)
    assert (stands.state, stands.last) == ("waiting", 1) and "no end after" in stands.told
    stands = schedule_attempts.Attempts(ScheduleConfig(attempts=1)).standing(folder)
    assert stands.state == "failed"


def test_failures_are_tried_again_later_and_given_up_and_reported_once(
    run: str, val: str, scoring: Scoring
) -> None:
    for step in (10, 20):
        commit_step(run, step)
    tried: list[int] = []

    def fails(job: Any, step: int) -> None:
        if step == 20:
            tried.append(step)
            raise DataError("weights differ from their commit record")

    scoring.during = fails
    settings = {"attempts": 2, "retry_seconds": 3600}
    assert scheduler(run, val, **settings).serve() == 3
    assert tried == [20] and scoring.scored == [("coco", 10)]  # the other step did not wait
    assert scheduler(run, val, **settings).serve() == 3 and tried == [20]
    settings["retry_seconds"] = 0
    assert scheduler(run, val, **settings).serve() == 1 and tried == [20, 20]
    assert scheduler(run, val, **settings).serve() == 1 and tried == [20, 20]
    [told] = alerts(run)
    assert told["event"] == "failed" and told["step"] == 20
    assert "DataError: weights differ from their commit record" in told["text"]
    table = status_table(scheduler(run, val, **settings))
    assert table.splitlines()[2].split() == ["20", "failed"]
    assert "step 20, coco: failed: DataError" in table


def test_a_suite_that_a_model_has_no_head_for_is_told_once_and_not_tried(
    local: str, val: str, scoring: Scoring
) -> None:
    for step in (10, 20):
        save_step(local, step)
    suites = {"coco": {"set": val}, "masks": {"set": val, "masks": True}}
    config = scored_config(local, suites)
    assert Scheduler(config, once=True).serve() == 1
    assert scoring.scored == [("coco", 20), ("coco", 10)]
    [told] = alerts(local)
    assert told["suite"] == "masks" and "eval.suites.masks needs a model with" in told["text"]
    assert Scheduler(config, once=True).serve() == 1 and len(alerts(local)) == 1
    assert "step 10, masks: failed: eval.suites.masks" in status_table(Scheduler(config, once=True))


def test_a_job_that_schedulers_die_at_is_given_up(local: str, val: str, scoring: Scoring) -> None:
    commit_step(local, 10)
    dead = {**identity(), "started": "7"}
    for number in range(1, schedule_attempts.MAX_DEATHS):
        folder = leave_attempt(local, val, dead, number)
    assert scheduler(local, val).attempts.standing(folder).state == "ready"
    leave_attempt(local, val, dead, schedule_attempts.MAX_DEATHS)
    assert scheduler(local, val).serve() == 1 and not scoring.scored
    assert "10 schedulers died at it" in alerts(local)[0]["text"]


def test_a_damaged_commit_record_stops_nothing_else(local: str, val: str, scoring: Scoring) -> None:
    for step in (10, 20):
        commit_step(local, step)
    Path(step_url(local, 20), "COMMIT.json").write_text("{")
    assert scheduler(local, val).serve() == 1
    assert scoring.scored == [("coco", 10)]
    assert "COMMIT.json is damaged" in alerts(local)[0]["text"]


def test_a_checkpoint_that_is_removed_while_it_is_scored_is_no_failure(
    local: str, val: str, scoring: Scoring, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20):
        commit_step(local, step)

    def removed(job: Any, step: int) -> None:
        if step == 20:
            for path in Path(step_url(local, 20)).iterdir():
                path.unlink()
            raise DataError("no such file")

    scoring.during = removed
    assert scheduler(local, val).serve() == 0
    assert scoring.scored == [("coco", 10)] and not alerts(local)
    assert "coco.step-000020 came to nothing: the checkpoint was removed" in caplog.text


def test_several_schedulers_share_the_work(run: str, val: str, scoring: Scoring) -> None:
    for step in range(10, 130, 10):
        commit_step(run, step)
    scoring.during = lambda job, step: time.sleep(0.05)
    ends: list[int] = []
    own = [scheduler(run, val, suites=["coco", "short"]) for _ in range(3)]
    threads = [threading.Thread(target=lambda s=s: ends.append(s.serve())) for s in own]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == [0, 0, 0]
    every = [(name, step) for step in range(10, 130, 10) for name in ("coco", "short")]
    assert sorted(scoring.scored) == sorted(every)
    assert scheduler(run, val).serve() == 0
    assert best_file(run)["step"] == 120


def test_what_is_scored_and_what_is_best_is_not_pruned(
    run: str, val: str, scoring: Scoring
) -> None:
    for step in (10, 20, 30, 40):
        commit_step(run, step)
    scoring.values = {10: 0.1, 20: 0.9, 30: 0.2, 40: 0.3, 50: 0.95}
    kept: list[list[int]] = []

    def pruned(job: Any, step: int) -> None:
        prune_checkpoints(run, 1)
        kept.append(committed_steps(run))

    scoring.during = lambda job, step: pruned(job, step) if step == 20 else None
    scheduler(run, val).serve()
    assert [step for _, step in scoring.scored] == [40, 30, 20]
    assert kept == [[20, 40]]  # 20 is read, 40 is the newest (and was best); 10 is gone
    assert best_file(run) == {
        "metric": "coco.ap", "value": 0.9, "step": 20, "checkpoint": step_url(run, 20),
    }  # fmt: skip
    commit_step(run, 50)
    prune_checkpoints(run, 1)
    assert committed_steps(run) == [20, 50]
    scheduler(run, val).serve()
    commit_step(run, 60)
    prune_checkpoints(run, 1)
    assert committed_steps(run) == [50, 60] and pins(run) == {"best-coco.ap": 50}
    assert "   (pruned)" in status_table(scheduler(run, val))


def test_of_equal_steps_the_one_that_is_best_already_stays(
    run: str, val: str, scoring: Scoring
) -> None:
    scoring.values = dict.fromkeys((40, 50, 60, 70), 0.0)
    commit_step(run, 50)
    scheduler(run, val).serve()
    for step in (40, 60, 70):  # one before, which nobody had scored, and later ones
        commit_step(run, step)
        scheduler(run, val).serve()
        assert best_file(run)["step"] == 50 and pins(run) == {"best-coco.ap": 50}
    scoring.values[80] = 0.1
    commit_step(run, 80)
    scheduler(run, val).serve()
    assert best_file(run)["step"] == 80


def test_pins_end_and_damaged_ones_keep_nothing(run: str, caplog: pytest.LogCaptureFixture) -> None:
    for step in (10, 20, 30, 40, 50):
        commit_step(run, step)
    pin(run, "reader", 10, seconds=60)
    pin(run, "late", 20, seconds=-1)
    pin(run, "best", 30)
    storage.write_bytes(f"{run}/pins/odd.json", b'{"until": null}')
    storage.write_bytes(f"{run}/pins/cut.json", b'{"st')
    prune_checkpoints(run, 1)
    assert committed_steps(run) == [10, 30, 50]
    assert "odd.json is no pin" in caplog.text and "cut.json is no pin" in caplog.text


def test_only_the_newest_step_at_the_times_of_the_cron_line(
    local: str, val: str, scoring: Scoring, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        time = datetime(2026, 5, 4, 12, 0, tzinfo=timezone.utc)

        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return cls.time

    monkeypatch.setattr(schedule, "datetime", Clock)
    for step in (10, 20):
        commit_step(local, step)

    def rounds(own: Scheduler) -> None:
        while own._round()[0]:
            pass

    own = scheduler(local, val, once=False, cron="0 2 * * *")
    rounds(own)
    assert not scoring.scored  # the last time came before anybody watched
    Clock.time = datetime(2026, 5, 5, 2, 0, 30, tzinfo=timezone.utc)
    rounds(own)
    commit_step(local, 30)
    rounds(own)
    assert scoring.scored == [("coco", 20)]
    Clock.time = datetime(2026, 5, 9, 7, 0, tzinfo=timezone.utc)  # nobody was there for days
    rounds(scheduler(local, val, once=False, cron="0 2 * * *"))
    assert scoring.scored == [("coco", 20), ("coco", 30)]
    scheduler(local, val, cron="0 2 * * *").serve()  # --once
    assert scoring.scored[2:] == [("coco", 10)]


def test_it_ends_once_the_last_step_is_scored(
    local: str, val: str, scoring: Scoring, capsys: pytest.CaptureFixture[str]
) -> None:
    own = scheduler(local, val, once=False, until_step=30, poll_seconds=0.05)

    def trainer() -> None:
        for step in (10, 20, 30):
            commit_step(local, step)
            time.sleep(0.1)

    thread = threading.Thread(target=trainer)
    thread.start()
    assert own.serve() == 0
    thread.join()
    assert sorted(scoring.scored) == [("coco", 10), ("coco", 20), ("coco", 30)]
    assert f"watching {local} for coco" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"suites": ["cocoa"]}, "eval.suites has no 'cocoa'; it has: coco, short"),
        ({"best": ["ap"]}, "schedule.best: 'ap' is no SUITE.METRIC of coco"),
        ({"webhook": "file:///etc/passwd"}, "schedule.webhook must be a URL of http or https"),
        ({"cron": "every night"}, "schedule.cron must be five fields"),
        ({"attempts": 0}, "schedule.attempts must be positive"),
        ({"every_step": 5}, "did you mean schedule.every_steps"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(
    val: str, local: str, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        scheduler(local, val, **settings)


def test_the_status_says_where_every_step_stands(local: str, val: str, scoring: Scoring) -> None:
    assert "no checkpoint yet" in status_table(scheduler(local, val))
    for step in (10, 20, 30):
        commit_step(local, step)
    scheduler(local, val, every_steps=20).serve()
    leave_attempt(local, val, identity())
    lines = status_table(scheduler(local, val)).splitlines()
    assert lines[1].split() == ["step", "coco"]
    assert [line.split() for line in lines[2:5]] == [["30", "running"], ["20", "0.0200*"],
                                                     ["10", "waits"]]  # fmt: skip
    assert f"step 30, coco: running: {identity()['host']} process {os.getpid()}" in lines[6]
