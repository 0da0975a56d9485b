"""One way to show progress: a live bar in a terminal, a line now and then elsewhere."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

QUIET_SECONDS = 15.0
"""Between two lines when the output is not a terminal."""


def bar(total: int | None, description: str, unit: str = "item", initial: int = 0) -> "tqdm[Any]":
    """A bar with rate and time left that counts `unit`s; call `.update(n)` and `.close()`."""
    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=description,
        unit=f" {unit}s",
        unit_scale=unit == "byte",
        initial=initial,
        file=sys.stderr,
        mininterval=0.2 if live else QUIET_SECONDS,
        maxinterval=QUIET_SECONDS,
        dynamic_ncols=live,
        ascii=not live,
        leave=True,
    )


def say(text: str) -> None:
    """A line for the user, beside the bars."""
    tqdm.write(text, file=sys.stderr)


def progress(items: Iterable[Item], total: int | None, description: str) -> Iterator[Item]:
    """Yield the items while a bar counts them."""
    shown = bar(total, description)
    try:
        for item in items:
            yield item
            shown.update(1)
    finally:
        shown.close()
