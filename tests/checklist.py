"""What a table of promises and the tests that hold them is checked for."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def assert_tests_exist(row: Mapping[str, Sequence[str]]) -> None:
    """Every item of a row has tests, each `FILE::NAME` of this folder."""
    for item, places in row.items():
        assert places, item
        for place in places:
            file, name = place.split("::")
            assert f"def {name}(" in (Path(__file__).parent / file).read_text(), place
