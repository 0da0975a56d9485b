"""Work on the next item while the present one is used."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
_END = object()


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, the next one being made in a thread meanwhile; errors come at their turn."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, iterator, _END)
        while (item := following.result()) is not _END:
            following = thread.submit(next, iterator, _END)
            yield item  # type: ignore[misc]
