"""How ranks come together: which GPU is theirs, and which start of all ranks they belong to."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch

from glipv2.pipeline import dist
from glipv2.pipeline.engine import init_distributed


def test_a_rank_chooses_its_gpu_before_it_joins_and_nccl_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shows the order of the calls and their arguments; that NCCL then uses that GPU, it can't."""
    import deepspeed

    calls: list[tuple[str, Any]] = []
    environment = {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("gpu", device)))
    monkeypatch.setattr(
        torch.distributed, "TCPStore", lambda *_, **__: torch.distributed.HashStore()
    )
    monkeypatch.setattr(dist, "agreed_attempt", lambda *_: "attempt")
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda backend, **options: calls.append((backend, options["device_id"])),
    )
    monkeypatch.setattr(
        deepspeed,
        "init_distributed",
        lambda dist_backend, **_: calls.append(("engine", dist_backend)),
    )
    init_distributed()
    own = torch.device("cuda", 1)
    assert calls == [("gpu", own), ("nccl", own), ("engine", "nccl")]


class Ranks:
    """Ranks that agree on an attempt, each with a connection of its own to one store."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.server = self.connect(is_master=True)

    def connect(self, is_master: bool = False) -> Any:
        return torch.distributed.TCPStore(
            "127.0.0.1", 0 if is_master else self.server.port, is_master=is_master,
            wait_for_workers=False, timeout=timedelta(seconds=20),
        )  # fmt: skip

    def agree(self, rank: int) -> str:
        return dist.agreed_attempt(self.connect(), rank, self.world_size)


def test_every_start_of_all_ranks_has_a_name_of_its_own_that_all_know() -> None:
    ranks = Ranks(3)
    with ThreadPoolExecutor(3) as pool:
        first, second = (set(pool.map(ranks.agree, range(3))) for _ in range(2))
    assert len(first) == len(second) == 1
    assert first != second


@pytest.mark.parametrize("dead", [0, 1])
def test_ranks_do_not_go_on_with_one_that_died_before_all_had_come(dead: int) -> None:
    """A rank that noted itself and was killed then: what it left is not taken for its successor."""
    ranks = Ranks(3)
    ranks.server.set(f"process-{dead}", "killed")
    ranks.server.set("processes", f"{'x ' * dead}killed{' x' * (2 - dead)}")
    with ThreadPoolExecutor(3) as pool:
        early = [pool.submit(ranks.agree, rank) for rank in range(3) if rank != dead]
        threading.Event().wait(0.3)
        assert not any(agreed.done() for agreed in early)
        late = pool.submit(ranks.agree, dead)
        assert len({agreed.result(timeout=20) for agreed in (*early, late)}) == 1
