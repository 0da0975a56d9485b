"""The simulated labelling obeys what every labelling must; the driver in it is the real one."""

from dataclasses import replace

import pytest
from simulate_label import Outcome, Setting, simulate

from glipv2.data_prep.labelling import KILLED

SMALL = Setting(
    shards=24,
    samples=500,
    gpus=4,
    at_once=4,
    rate=50.0,
    start_s=5.0,
    commit_s=0.5,
    gpu_hours_per_failure=0.0,
    preempted_every_h=0.0,
    replaced_after_s=20.0,
    driver_back_s=5.0,
    going_on_s=0.1,
    unusable=0.01,
)
"""Shards of ten seconds, 60 seconds in all."""
SLOWEST_S = 1.4 * 10 + 0.5
"""Of a shard and its commit."""
OFTEN = replace(SMALL, preempted_every_h=100 / 3600)


def check(outcome: Outcome) -> None:
    """Every shard once, all time accounted for, nothing faster than its teachers."""
    setting, counts = outcome.setting, outcome.manifest["info"]["counts"]
    assert outcome.commits == dict.fromkeys(range(setting.shards), 1)
    names = [shard["name"] for shard in outcome.manifest["shards"]]
    assert names == [f"shard-{number:06d}" for number in range(setting.shards)]
    assert counts["pairs"] == setting.shards * setting.samples
    listed = [reason for s in outcome.manifest["shards"] for _, reason, _ in s["stats"]["bad"]]
    assert listed.count(KILLED) == outcome.left_out == 0  # whoever dies goes with its machine
    assert outcome.spent_s["teacher"] == pytest.approx(setting.shards * 500 / 50)
    assert outcome.spent_s["commit"] == pytest.approx(setting.shards * 0.5)
    assert outcome.makespan_s >= setting.ideal_s == 60
    assert sum(outcome.spent_s.values()) <= setting.gpus * outcome.makespan_s


def test_without_failures_nothing_is_lost_but_the_start_the_commits_and_the_end() -> None:
    outcome = simulate(SMALL)
    check(outcome)
    assert outcome.deaths == outcome.spent_s["lost"] == outcome.left_out == 0 and outcome.runs == 1
    assert outcome.spent_s["starting"] == 4 * 5
    assert 5 + 60 + 3 <= outcome.makespan_s <= 5 + 60 + 3 + SLOWEST_S


def test_more_failures_never_lose_less_work() -> None:
    lost, deaths = [], []
    for mean_s in (0, 400, 100, 25):
        outcomes = [
            simulate(replace(SMALL, preempted_every_h=mean_s / 3600, seed=seed)) for seed in (1, 2)
        ]
        for outcome in outcomes:
            check(outcome)
        lost.append(sum(o.spent_s["lost"] for o in outcomes))
        deaths.append(sum(o.deaths for o in outcomes))
    assert lost == sorted(lost) and lost[0] == 0 < lost[1]
    assert deaths == sorted(deaths) and deaths[-1] > 3 * 2


def test_a_driver_that_dies_goes_on_with_what_is_committed() -> None:
    whole, killed = simulate(OFTEN), simulate(replace(OFTEN, driver_killed_at=0.5))
    check(killed)
    assert killed.runs == whole.runs + 1 == 2
    slack = 2 * SLOWEST_S  # the failures hit other shards
    # what four workers had in hand, and until they are there again
    assert killed.spent_s["lost"] <= whole.spent_s["lost"] + 4 * SLOWEST_S + slack
    assert killed.makespan_s <= whole.makespan_s + 5 + 24 * 0.1 + 5 + SLOWEST_S + slack


def test_the_same_seed_gives_the_same_course() -> None:
    first, again, other = simulate(OFTEN), simulate(OFTEN), simulate(replace(OFTEN, seed=1))
    assert first.deaths > 0
    assert (first.makespan_s, first.spent_s) == (again.makespan_s, again.spent_s)
    first_content, again_content = ({**o.manifest, "digest": ""} for o in (first, again))
    for content in (first_content, again_content):
        content["info"] = {**content["info"], "source": ""}
    assert first_content == again_content
    assert other.makespan_s != first.makespan_s


def test_a_pool_that_begins_with_one_worker_doubles() -> None:
    outcome = simulate(replace(SMALL, at_once=1))
    check(outcome)
    # ready at 5, 10, 15: 1, 2 and then 4 of them
    assert outcome.spent_s["starting"] == 4 * 5
    late_s = (5 + 10 + 15 + 15) / 4
    assert late_s + 63 <= outcome.makespan_s <= late_s + 63 + SLOWEST_S
