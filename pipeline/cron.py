"""Cron lines: minute, hour, day of the month, month, day of the week, in UTC."""

from datetime import datetime, timedelta, timezone

from glipv2.pipeline.errors import ConfigError

FIELDS = {"minute": (0, 59), "hour": (0, 23), "day": (1, 31), "month": (1, 12), "weekday": (0, 7)}
"""Weekday 0 and 7 are Sunday."""
LONGEST = timedelta(days=366 * 8)
"""The 29th of February is at most so far away."""


class Cron:
    """`*`, numbers, ranges `1-5`, steps `*/15` and lists of these with commas.

    As in cron, where both day and weekday are restricted either will do.
    """

    def __init__(self, line: str) -> None:
        """ConfigError for what is not such a line."""
        parts = line.split()
        if len(parts) != len(FIELDS):
            raise ConfigError(
                f"schedule.cron must be five fields ({', '.join(FIELDS)}), not {line!r}"
            )
        named = dict(zip(FIELDS, parts, strict=True))
        self.values = {name: _values(text, name) for name, text in named.items()}
        self.any_day = named["day"].startswith("*")
        self.any_weekday = named["weekday"].startswith("*")
        if self.before(datetime(2032, 1, 1, tzinfo=timezone.utc)) is None:
            raise ConfigError(f"schedule.cron: the day of {line!r} never comes")

    def before(self, moment: datetime) -> datetime | None:
        """The last time at or before a moment; None if there is none within years."""
        day = moment.replace(hour=0, minute=0, second=0, microsecond=0)
        while moment - day < LONGEST:
            if self._on(day):
                for hour in sorted(self.values["hour"], reverse=True):
                    for minute in sorted(self.values["minute"], reverse=True):
                        time = day.replace(hour=hour, minute=minute)
                        if time <= moment:
                            return time
            day -= timedelta(days=1)
        return None

    def _on(self, day: datetime) -> bool:
        if day.month not in self.values["month"]:
            return False
        by_day = day.day in self.values["day"]
        by_weekday = day.isoweekday() % 7 in {value % 7 for value in self.values["weekday"]}
        if self.any_day or self.any_weekday:
            return by_day and by_weekday
        return by_day or by_weekday


def _values(text: str, name: str) -> set[int]:
    """The numbers that a field stands for."""
    low, high = FIELDS[name]
    found: set[int] = set()
    for part in text.split(","):
        span, slash, step = part.partition("/")
        first, dash, last = (f"{low}-{high}" if span == "*" else span).partition("-")
        numbers = [first, last or (str(high) if slash else first), step or "1"]
        if not all(number.isascii() and number.isdigit() for number in numbers) or (
            (dash and not last) or (slash and not step)
        ):
            raise ConfigError(f"schedule.cron: {text!r} is no {name}")
        start, end, stride = map(int, numbers)
        if not (low <= start <= end <= high and stride):
            raise ConfigError(f"schedule.cron: {name} {part!r} is not between {low} and {high}")
        found |= set(range(start, end + 1, stride))
    return found
