"""Fragments of any ranks fill fragments of any others; the file is plain safetensors."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from glipv2.pipeline import state_file, storage
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.fragments import Fragment
from glipv2.pipeline.state_file import HostCopy, copy_saved, read_entries

KINDS = ("fp32", "exp_avg", "exp_avg_sq")


def whole(sizes: list[int]) -> list[Fragment]:
    def value(kind: int, number: int, size: int) -> torch.Tensor:
        return torch.arange(size) + 1000.0 * number + 1e5 * kind

    return [
        Fragment(f"block.{n}/weight", 0, {k: value(i, n, size) for i, k in enumerate(KINDS)})
        for n, size in enumerate(sizes)
    ]


def cut(fragments: list[Fragment], ranks: int, flat: bool) -> list[list[Fragment]]:
    """As ZeRO 1 does, through the middle of parameters (`flat`), or every parameter by itself."""
    parts: list[list[Fragment]] = [[] for _ in range(ranks)]
    total = sum(map(len, fragments))
    before = 0
    for fragment in fragments:
        for rank in range(ranks):
            size, offset = (total, before) if flat else (len(fragment), 0)
            first = max(0, size * rank // ranks - offset)
            last = min(len(fragment), size * (rank + 1) // ranks - offset)
            if first < last:
                parts[rank].append(fragment.part(first, last))
        before += len(fragment)
    return parts


def save(folder: Path, parts: list[list[Fragment]]) -> list[str]:
    urls = []
    for rank, fragments in enumerate(parts):
        host = HostCopy(fragments)
        host.fill(fragments)
        url = str(folder / f"state-{rank}.safetensors")
        size, checksum = storage.write_pieces(url, host.pieces())
        assert (size, checksum) == (storage.size(url), storage.file_crc32c(url))
        urls.append(url)
    return urls


class OnSecondGpu(torch.Tensor):
    """What says that it is on cuda:1, so that a computer without one can tell what is asked."""

    is_cuda = True
    device = torch.device("cuda", 1)


def test_a_copy_is_waited_for_on_the_gpu_that_holds_the_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread that saves has not chosen a GPU: it would ask the first one. Shows which stream is
    asked, not that a transfer of a real GPU is done."""
    fragments = whole([3, 5])
    host = HostCopy(fragments)
    monkeypatch.setattr(host.flat, "is_pinned", lambda: True, raising=False)
    waited: list[Any] = []
    monkeypatch.setattr(
        torch.cuda,
        "current_stream",
        lambda device=None: SimpleNamespace(synchronize=lambda: waited.append(device)),
    )
    host.fill(
        [
            Fragment(f.name, 0, {k: v.as_subclass(OnSecondGpu) for k, v in f.values.items()})
            for f in fragments
        ]
    )
    assert waited == [torch.device("cuda", 1)]
    host.fill(fragments)
    assert len(waited) == 1  # of the CPU there is nothing to wait for


def empty(fragments: list[Fragment]) -> list[Fragment]:
    return [
        Fragment(f.name, f.start, {k: torch.full_like(v, -1) for k, v in f.values.items()})
        for f in fragments
    ]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    saving=st.tuples(st.integers(1, 5), st.booleans()),
    loading=st.tuples(st.integers(1, 5), st.booleans()),
    piece=st.sampled_from([1, 64, 4 * 2**20]),
)
def test_what_any_ranks_saved_any_ranks_load(
    tmp_path: Path,
    sizes: list[int],
    saving: tuple[int, bool],
    loading: tuple[int, bool],
    piece: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_file, "PIECE", piece)
        urls = save(tmp_path, cut(whole(sizes), *saving))
        for expected in cut(whole(sizes), *loading):
            found = empty(expected)
            copy_saved(urls, found)
            for want, got in zip(expected, found, strict=True):
                for kind in KINDS:
                    assert torch.equal(got.values[kind], want.values[kind])


def test_the_file_is_safetensors_and_one_range_holds_a_kind(tmp_path: Path) -> None:
    fragments = cut(whole([3, 5]), 2, flat=True)[1]
    [url] = save(tmp_path, [fragments])
    tensors = load_file(url)
    assert {name: t.tolist() for name, t in tensors.items() if name.startswith("exp_avg/")} == {
        "exp_avg/1/block.1/weight": [101001.0, 101002.0, 101003.0, 101004.0]
    }
    kinds = [entry.kind for entry in sorted(read_entries(url), key=lambda e: e.offset)]
    assert kinds == list(KINDS)


def test_elements_that_nobody_saved_are_counted(tmp_path: Path) -> None:
    first, _ = cut(whole([4, 4]), 2, flat=True)
    urls = save(tmp_path, [first])
    with pytest.raises(DataError, match="12 numbers of the model's state are not there"):
        copy_saved(urls, empty(whole([4, 4])))


@pytest.mark.parametrize("head", [b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]", b"\x02" + b"\0" * 7])
def test_a_damaged_header_is_named(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "state-0.safetensors"
    path.write_bytes(head)
    with pytest.raises(DataError, match=r"state-0\.safetensors is damaged"):
        read_entries(str(path))
