"""Where a stream stands: a few integers per lane and a fingerprint of what it reads."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from glipv2.pipeline.errors import ConfigError, DataError

LanePosition = tuple[int, int, int]
"""Epoch; raw samples consumed in it, bad ones included; how many of those that came from the
present window were tall (0 unless batches are grouped by aspect)."""


@dataclass(frozen=True)
class Position:
    """The state between two batches; never depends on world size, workers or prefetching."""

    step: int
    """Global batches consumed."""
    digest: str
    """`part=hex` for each thing that decides the sequence: see Stream."""
    lanes: Mapping[str, Sequence[LanePosition | None]]
    """Source -> one entry per lane; None for a lane that another rank reads."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Position":
        """From to_dict's result, also after a trip through JSON."""
        try:
            lanes = {
                str(source): tuple(None if lane is None else _lane(lane) for lane in entries)
                for source, entries in value["lanes"].items()
            }
            return cls(step=int(value["step"]), digest=str(value["digest"]), lanes=lanes)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"this is no stream position: {error!r}") from error


def merge_positions(positions: Sequence[Position]) -> Position:
    """One position that covers every lane that any of these covers: what a checkpoint holds."""
    first = positions[0]
    if any((other.step, other.digest) != (first.step, first.digest) for other in positions):
        moments = [(position.step, position.digest) for position in positions]
        raise DataError(f"positions of different moments: {moments}")
    return Position(
        step=first.step,
        digest=first.digest,
        lanes={
            source: tuple(
                _one_of(source, lane, [position.lanes[source][lane] for position in positions])
                for lane in range(len(entries))
            )
            for source, entries in first.lanes.items()
        },
    )


def check_digest(position: Position, expected: str) -> None:
    """ConfigError that names what changed since the position was taken."""
    if position.digest == expected:
        return
    then, now = _parts(position.digest), _parts(expected)
    changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    raise ConfigError(
        f"this run stopped at step {position.step} with another {', '.join(changed) or 'stream'}: "
        "the samples can't go on where they stopped. Restore what was changed, or start a new run "
        "(new run_dir) from the checkpoint's weights with train.init"
    )


def _parts(digest: str) -> dict[str, str]:
    return {name: value for name, _, value in (part.partition("=") for part in digest.split(";"))}


def _lane(value: Any) -> LanePosition:
    epoch, offset, tall = value
    if any(not isinstance(number, int) or number < 0 for number in value) or tall > offset:
        raise ValueError(f"lane position {value!r}")
    return epoch, offset, tall


def _one_of(source: str, lane: int, found: list[LanePosition | None]) -> LanePosition | None:
    known = {entry for entry in found if entry is not None}
    if len(known) > 1:
        raise DataError(f"positions disagree about lane {lane} of {source}: {sorted(known)}")
    return known.pop() if known else None
