"""Cron lines against a search minute by minute."""

from datetime import datetime, timedelta, timezone

import pytest

from glipv2.pipeline.cron import Cron
from glipv2.pipeline.errors import ConfigError

START = datetime(2026, 2, 26, 13, 7, 30, tzinfo=timezone.utc)  # a Thursday


def searched(matches, moment):
    """The last minute at or before a moment for which `matches` holds."""
    minute = moment.replace(second=0, microsecond=0)
    while not matches(minute):
        minute -= timedelta(minutes=1)
    return minute


@pytest.mark.parametrize(
    ("line", "matches"),
    [
        ("* * * * *", lambda t: True),
        ("0 2 * * *", lambda t: (t.hour, t.minute) == (2, 0)),
        ("*/20 9-17 * * *", lambda t: t.minute % 20 == 0 and 9 <= t.hour <= 17),
        ("5,35 1-23/2 * * 1-5", lambda t: t.minute in (5, 35) and t.hour % 2 and t.weekday() < 5),
        ("30 6 * * 0", lambda t: (t.hour, t.minute, t.weekday()) == (6, 30, 6)),
        ("30 6 * * 7", lambda t: (t.hour, t.minute, t.weekday()) == (6, 30, 6)),
        ("0 0 1 * *", lambda t: (t.day, t.hour, t.minute) == (1, 0, 0)),
        (
            "0 0 20 * 1",
            lambda t: (t.hour, t.minute) == (0, 0) and (t.day == 20 or t.weekday() == 0),
        ),
        ("10/25 4 * 2 *", lambda t: t.minute in (10, 35) and t.hour == 4 and t.month == 2),
    ],
)
def test_the_last_time_is_the_one_that_a_search_finds(line, matches):
    cron = Cron(line)
    for hours in (0, 5, 11.5, 24 * 3, 24 * 17):
        moment = START + timedelta(hours=hours)
        assert cron.before(moment) == searched(matches, moment)
    exact = cron.before(START)
    assert cron.before(exact) == exact


def test_a_day_that_comes_every_four_years_is_found():
    assert Cron("0 0 29 2 *").before(START) == datetime(2024, 2, 29, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    "line",
    ["", "* * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "a * * * *", "5-1 * * * *",
     "*/0 * * * *", "1- * * * *", "* * * 13 *", "* * * * 8", "-1 * * * *", "0 0 31 2 *"],
)  # fmt: skip
def test_what_is_no_cron_line_is_refused(line):
    with pytest.raises(ConfigError, match="schedule.cron"):
        Cron(line)
