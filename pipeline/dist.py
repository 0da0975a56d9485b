"""Rank helpers that work with and without a process group; everything else stays rank-free."""

import ctypes
import hashlib
import os
import signal
import time
import uuid
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from glipv2.model.batch import Collectives
from glipv2.pipeline.launch import LAUNCHER
from glipv2.pipeline.train_config import LONGEST_SECTION

COLLECTIVE_TIMEOUT = timedelta(seconds=LONGEST_SECTION + 600)
"""The watch ends what hangs before, and leaves stacks; see `watch`."""
LOOK = 0.05
"""Seconds between two looks of a rank at whether all have come."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def local_device() -> torch.device:
    """The accelerator of this rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def die_with_parent() -> None:
    """Let the kernel kill this process when its launcher dies, so that no rank is left behind.

    SystemExit if the launcher died before: a rank alone would wait for the others for long.
    """
    pr_set_pdeathsig = 1
    if hasattr(signal, "SIGKILL") and os.name == "posix":
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    launcher = os.environ.get(LAUNCHER)
    if launcher and os.getppid() != int(launcher):
        raise SystemExit(f"the launcher, process {launcher}, is gone")


def join_launched_group(backend: str) -> None:
    """Join the process group of torchrun, or of our launcher; does nothing under others.

    torchrun keeps its store when it starts ranks again, with the addresses of the dead ones in it:
    each attempt needs keys of its own.
    """
    if dist.is_initialized() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size(),
        is_master=False,
        timeout=COLLECTIVE_TIMEOUT,
    )
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(agreed_attempt(store, rank(), world_size()), store),
        rank=rank(),
        world_size=world_size(),
        timeout=COLLECTIVE_TIMEOUT,
        device_id=local_device() if backend == "nccl" else None,
    )


def agreed_attempt(store: dist.Store, rank: int, world_size: int) -> str:
    """A name for this start of the ranks, the same for all of them and never used before.

    torchrun's count of restarts is each host's own: a host that begins again because another one
    did has counted nothing. So every rank notes which process it is, the first one reads the notes
    out, and they go on with the first list in which all have found themselves.
    """
    ranks = range(world_size)
    own = uuid.uuid4().hex
    store.set(f"process-{rank}", own)
    while True:
        if rank == 0:
            noted = store.multi_get([f"process-{r}" for r in ranks])
            store.set("processes", " ".join(note.decode() for note in noted))
        processes = store.get("processes").decode()
        attempt = f"attempt-{hashlib.sha256(processes.encode()).hexdigest()[:16]}"
        if processes.split()[rank : rank + 1] == [own]:
            store.set(f"{attempt}/found-{rank}", "")
            if store.check([f"{attempt}/found-{r}" for r in ranks]):
                return attempt
        time.sleep(LOOK)


def mean_over_ranks(value: Tensor, ends_own_part: bool = True) -> Tensor:
    """Average a tensor over ranks, without gradient; every rank must call it."""
    total = value.detach().clone()
    _reach_collective()
    if world_size() > 1:
        dist.all_reduce(total)
        total /= world_size()
    if not ends_own_part:
        _go_on_with_own_part()
    return total


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on at least one rank; every rank must call it."""
    if world_size() == 1:
        return flag
    _reach_collective()
    flags = torch.tensor(float(flag), device=local_device())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


def gather_with_grad(value: Tensor) -> Tensor:
    """Concatenate equal-shaped tensors of all ranks; every rank must call it.

    The gradient of a rank's rows is the sum of what all ranks send back to them.
    """
    if world_size() == 1:
        return value
    _reach_collective()
    return torch.cat(all_gather(value.contiguous()), dim=0)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's small Python object, in rank order; every rank must call it."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def collectives() -> Collectives:
    """The model's view of the other ranks."""
    if world_size() == 1:
        return Collectives()
    return Collectives(gather=gather_with_grad, mean=mean_over_ranks, rank=rank())


_own_part: list[float] = []
"""When the part began and, once it is over, when it ended (seconds)."""


def begin_own_part() -> None:
    """Time from now until this rank's next collective; see `straggler`."""
    _own_part[:] = [time.monotonic()]


def own_part() -> float:
    """Seconds from `begin_own_part` to the first collective that ends it, without the waiting in
    those that don't."""
    _reach_collective()
    began, ended = _own_part
    _own_part.clear()
    return ended - began


def _reach_collective() -> None:
    if len(_own_part) == 1:
        _own_part.append(_all_done())


def _go_on_with_own_part() -> None:
    """As if the collective had taken no time."""
    if len(_own_part) == 2:
        began, ended = _own_part
        _own_part[:] = [began + _all_done() - ended]


def _all_done() -> float:
    """The moment at which the device has done all that it was told to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()
