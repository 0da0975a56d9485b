"""The file of one rank's fragments: safetensors, laid out so that one range holds a kind.

Tensor `kind/start/name` is what the rank saved of a parameter from element `start` on, in fp32.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glipv2.pipeline import storage
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.fragments import Fragment

BYTES = 4
PIECE = 4 * 2**20
"""Bytes written at once: checking more than this in one go would hold up the training thread."""
MOST_HEADER = 64 * 2**20


@dataclass(frozen=True)
class Entry:
    """Where a file holds the elements [start, start + numel) of a parameter."""

    kind: str
    name: str
    start: int
    numel: int
    offset: int
    """Byte of the file at which they begin."""


class HostCopy:
    """Memory of the host for a rank's fragments: filled at every save, allocated once."""

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        kinds = list(fragments[0].values) if fragments else []
        self.layout = [(kind, f.name, f.start, len(f)) for kind in kinds for f in fragments]
        on_gpu = any(f.values[kind].is_cuda for kind in kinds[:1] for f in fragments)
        numel = sum(length for *_, length in self.layout)
        self.flat = torch.empty(numel, dtype=torch.float32, pin_memory=on_gpu)

    def fill(self, fragments: Sequence[Fragment]) -> None:
        """Copy fragments of the same layout; done when it returns.

        May run on any thread: one that has chosen no GPU would ask the first one of the host
        whether it is done.
        """
        kinds = list(fragments[0].values) if fragments else []
        sources = [f.values[kind] for kind in kinds for f in fragments]
        targets = self.flat.split([len(source) for source in sources])
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)
        for device in {source.device for source in sources if source.is_cuda}:
            torch.cuda.current_stream(device).synchronize()

    def pieces(self) -> Iterator[bytes]:
        """The file, piece by piece."""
        header, first = {}, 0
        for kind, name, start, length in self.layout:
            last = first + length * BYTES
            header[f"{kind}/{start}/{name}"] = {
                "dtype": "F32", "shape": [length], "data_offsets": [first, last],
            }  # fmt: skip
            first = last
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        yield len(text).to_bytes(8, "little") + text
        body = self.flat.numpy().data.cast("B")
        for at in range(0, len(body), PIECE):
            yield bytes(body[at : at + PIECE])


def read_entries(url: str) -> list[Entry]:
    """What a file holds. Raises DataError when its header is damaged."""
    size = int.from_bytes(storage.read_bytes(url, 0, 8), "little")
    if size > MOST_HEADER:
        raise DataError(f"{url} is damaged: it claims a header of {size} bytes")
    try:
        header = json.loads(storage.read_bytes(url, 8, 8 + size))
        return [_entry(key, value, 8 + size) for key, value in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{url} is damaged: {error!r}") from error


def _entry(key: str, value: Mapping[str, list[int]], body: int) -> Entry:
    kind, start, name = key.split("/", 2)
    first, _ = value["data_offsets"]
    return Entry(kind, name, int(start), int(value["shape"][0]), body + first)


def copy_saved(urls: Sequence[str], wanted: Sequence[Fragment]) -> None:
    """Fill `wanted` from the files of all ranks that saved, whatever fragments they hold.

    Raises DataError when the files lack an element that is wanted.
    """
    targets: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}
    for fragment in wanted:
        for kind, value in fragment.values.items():
            targets.setdefault((kind, fragment.name), []).append((fragment.start, value))
    missing = sum(len(value) for places in targets.values() for _, value in places)
    for url in urls:
        missing -= _copy_from(url, targets)
    if missing:
        raise DataError(
            f"{', '.join(urls)}: {missing} numbers of the model's state are not there; it was "
            "saved for other parameters"
        )


def _copy_from(url: str, targets: Mapping[tuple[str, str], list[tuple[int, Tensor]]]) -> int:
    """Copy what one file has of the targets: the number of elements copied."""
    overlaps = []
    for entry in read_entries(url):
        for start, value in targets.get((entry.kind, entry.name), ()):
            first = max(start, entry.start)
            last = min(start + len(value), entry.start + entry.numel)
            if first < last:
                byte = entry.offset + (first - entry.start) * BYTES
                overlaps.append((byte, value[first - start : last - start]))
    copied = 0
    for run in _runs(sorted(overlaps, key=lambda overlap: overlap[0])):
        begin, (last_byte, last_value) = run[0][0], run[-1]
        data = storage.read_bytes(url, begin, last_byte + len(last_value) * BYTES)
        for byte, value in run:
            numbers = np.frombuffer(data, np.float32, len(value), byte - begin)
            value.copy_(torch.from_numpy(numbers.copy()))
            copied += len(value)
    return copied


def _runs(
    overlaps: Sequence[tuple[int, Tensor]], most: int = 256 * 2**20
) -> Iterator[list[tuple[int, Tensor]]]:
    """Overlaps that are read in one request: near each other, and not too much at once."""
    run: list[tuple[int, Tensor]] = []
    for byte, value in overlaps:
        if run:
            begin, end = run[0][0], run[-1][0] + len(run[-1][1]) * BYTES
            if byte - end > PIECE or byte + len(value) * BYTES - begin > most:
                yield run
                run = []
        run.append((byte, value))
    if run:
        yield run
