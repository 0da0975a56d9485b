"""What a checkpoint costs: how long training stands still, and until it is durable.

Two processes, ZeRO 1, fp32, 33 million parameters (0.4 GB of weights and moments). Ours saves
beside training; the peer is DeepSpeed's own save, during which training waits. Both take turns in
the same processes. On a real S3 server on loopback, with a quarter of the parameters, the peer is a
plain upload of the same bytes by as many processes.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import s3_server
import torch
from bench_measure import note, row
from torch import Tensor, nn

from glipv2.model.config import LossWeights
from glipv2.model.folders import step_url
from glipv2.pipeline import dist, storage
from glipv2.pipeline.engine import build_engine, init_distributed, train_step
from glipv2.pipeline.position import Position
from glipv2.pipeline.saver import Saver, model_parts
from glipv2.pipeline.train_config import TrainConfig

WIDTH, IMAGES, REPEATS = 2048, 32, 5
LAYERS, LAYERS_ON_S3 = 8, 2


def bench_checkpoint() -> None:
    """Start the two processes, on a disk and on S3, and print what they found."""
    with tempfile.TemporaryDirectory() as folder:
        found = _measured(folder, os.environ.copy())
    row("checkpoint: training stands still", found["stall"], found["deepspeed"], "DeepSpeed's save")
    note("  until it is committed, on this disk", f"{found['durable']:9.4f} s")
    note("  step beside a save; without one", f"{found['beside']:.3f} s; {found['step']:.3f} s")
    reason = s3_server.why_not()
    if reason:
        note("checkpoint on S3", reason)
        return
    with s3_server.running() as endpoint:
        s3_server.plain_client(endpoint).mkdir("bench")
        found = _measured("s3://bench/run", os.environ | s3_server.environment(endpoint))
    row("checkpoint: durable on S3 on loopback", found["durable"], found["upload"], "plain upload")


def _measured(url: str, environment: dict[str, str]) -> dict[str, float]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
        "--nproc-per-node", "2", __file__, url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-9000:])
    found: dict[str, float] = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("{"))
    )
    return found


class Layers(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))

    def forward(self, x_BD: Tensor, *_: object) -> dict[str, Tensor]:
        for layer in self.layers:
            x_BD = torch.tanh(layer(x_BD))
        return {"box": x_BD.square().mean()}


class Bench:
    def __init__(self, url: str) -> None:
        self.url = url
        self.train = TrainConfig(global_batch=2 * IMAGES, precision="fp32", warmup_steps=0)
        model = Layers(LAYERS if storage.is_local(url) else LAYERS_ON_S3)
        parts = model_parts(model, {})
        self.engine = build_engine(model, self.train)
        self.saver = Saver(url, self.engine, None, parts, keep=1, patience=600)
        self.x_BD = torch.randn(IMAGES, WIDTH)
        self.waited = 0.0
        self.saves = 0

    def step(self) -> float:
        """Seconds of a training step."""
        dist.barrier()
        began = time.perf_counter()
        train_step(
            self.engine, [self.x_BD], 0, self.train, LossWeights(), dist.collectives(),  # type: ignore[list-item]
            before_update=self._ready,
        )  # fmt: skip
        return time.perf_counter() - began

    def _ready(self) -> None:
        began = time.perf_counter()
        self.saver.wait_until_copied()
        self.waited += time.perf_counter() - began

    def ours(self) -> dict[str, float]:
        """A save with training beside it."""
        self.saves += 1
        dist.barrier()
        began = time.perf_counter()
        self.saver.save(self.saves, Position(self.saves, "", {}), {})
        self.waited = time.perf_counter() - began
        beside = [self.step()]
        stall = self.waited
        while not self._committed():
            beside.append(self.step())
        durable = time.perf_counter() - began
        self.saver.wait()
        return {"stall": stall, "durable": durable, "beside": statistics.mean(beside)}

    def ours_alone(self) -> float:
        """Seconds until a save is committed while nothing else is done."""
        self.saves += 1
        dist.barrier()
        began = time.perf_counter()
        self.saver.save(self.saves, Position(self.saves, "", {}), {})
        self.saver.wait()
        dist.barrier()
        return time.perf_counter() - began

    def _committed(self) -> bool:
        writing = self.saver.writing
        return bool(dist.gather_objects(writing is None or writing.done())[0])

    def deepspeed(self, folder: str) -> float:
        dist.barrier()
        began = time.perf_counter()
        self.engine.save_checkpoint(folder, tag="peer")
        dist.barrier()
        taken = time.perf_counter() - began
        if dist.is_main():
            shutil.rmtree(Path(folder) / "peer")
        return taken

    def upload(self, files: Sequence[str]) -> float:
        """Seconds to upload local copies of what a checkpoint holds, shared by the processes."""
        with tempfile.TemporaryDirectory() as folder:
            paths = []
            for name in files[dist.rank() :: dist.world_size()]:
                path = Path(folder) / name.rpartition("/")[2]
                path.write_bytes(storage.read_bytes(name))
                paths.append(path)
            dist.barrier()
            began = time.perf_counter()
            for path in paths:
                storage.upload(path, storage.join(self.url, "plain", path.name))
            dist.barrier()
            return time.perf_counter() - began


def main(url: str) -> None:
    dist.die_with_parent()
    torch.set_num_threads(1)
    init_distributed()
    bench = Bench(url)
    bench.step()
    found: dict[str, Any] = {}
    if storage.is_local(url):
        bench.ours()
        bench.deepspeed(url)
        turns = [{**bench.ours(), "deepspeed": bench.deepspeed(url)} for _ in range(REPEATS)]
        found = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        found["step"] = statistics.median(bench.step() for _ in range(REPEATS))
    else:
        bench.ours_alone()
        durable, upload = [], []
        for _ in range(3):
            durable.append(bench.ours_alone())
            folder = step_url(url, bench.saves)
            big = [n for n in storage.list_names(folder) if n.endswith(".safetensors")]
            upload.append(bench.upload([storage.join(folder, name) for name in big]))
        found = {"durable": statistics.median(durable), "upload": statistics.median(upload)}
    if dist.is_main():
        print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
