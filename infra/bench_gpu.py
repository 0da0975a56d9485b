"""Training steps of GLIP-T on one GPU: time, images per second, share of the peak.

    python infra/bench_gpu.py --out infra/benchmarks

An image of 800 x 1333 (padded to 800 x 1344), bf16 autocast, all GLIP losses, forward and backward
and an AdamW step, with and without torch.compile. Two shares are given, of the published graph's
arithmetic (256 tokens, every location projected) and of what is executed: folding saves arithmetic,
which the second share alone would call a loss. Runs on a CPU too, with --preset tiny, as a check.
"""

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_model import padded
from bench_parts import scene
from original import original_operators
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from glipv2.model.batch import Batch
from glipv2.model.config import preset
from glipv2.model.glip import GLIPv2, build_model

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 operations per second of one device, by what its name contains."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    device: str
    preset: str
    size: tuple[int, int]
    images: int
    tokens: int
    compiled: bool
    seconds_per_step: float
    images_per_second: float
    memory_gib: float
    published_tflop_per_image: float
    executed_tflop_per_image: float
    published_share_of_peak: float | None
    executed_share_of_peak: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="T")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1344))
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="folder for gpu-NAME.json")
    arguments = parser.parse_args()
    config = replace(preset(arguments.preset), masked_words=False, contrast=False)
    size = tuple(arguments.size)
    batch, _ = scene(arguments.images, size, locations=0, boxes=20, tokens=arguments.tokens)
    model = build_model(config, seed=0).train()
    one, _ = scene(1, size, locations=0, boxes=20, tokens=arguments.tokens)
    executed = arithmetic(model, one)
    with original_operators():
        published = arithmetic(model, padded(one, config.text_encoder.max_tokens))
    model.to(arguments.device)
    rows = []
    for compiled in (False, True):
        run = torch.compile(model) if compiled else model
        taken, memory = timed(run, batch.to(arguments.device), arguments.steps)
        rows.append(_figures(arguments, size, compiled, taken, memory, published, executed))
        print(json.dumps(asdict(rows[-1])), flush=True)  # noqa: T201
    if arguments.out:
        name = rows[0].device.lower().replace(" ", "-")
        arguments.out.mkdir(parents=True, exist_ok=True)
        path = arguments.out / f"gpu-{name}.json"
        path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _figures(
    arguments: argparse.Namespace,
    size: tuple[int, int],
    compiled: bool,
    taken: float,
    memory: float,
    published: float,
    executed: float,
) -> Figures:
    cuda = arguments.device.startswith("cuda")
    device = torch.cuda.get_device_name() if cuda else "cpu"
    peak = next((p for name, p in PEAKS.items() if name in device), None)
    rate = arguments.images / taken
    return Figures(
        device=device,
        preset=arguments.preset,
        size=size,
        images=arguments.images,
        tokens=arguments.tokens,
        compiled=compiled,
        seconds_per_step=taken,
        images_per_second=rate,
        memory_gib=memory,
        published_tflop_per_image=published / 1e12,
        executed_tflop_per_image=executed / 1e12,
        published_share_of_peak=published * rate / peak if peak else None,
        executed_share_of_peak=executed * rate / peak if peak else None,
    )


def timed(model: Any, batch: Batch, steps: int) -> tuple[float, float]:
    """Seconds of a step, after five to warm up, and GiB of device memory at the worst moment."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    device = batch.images_B3HW.device
    cuda = device.type == "cuda"

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16) if cuda else nullcontext():
            loss = torch.stack(list(model(batch).values())).sum()
        loss.backward()
        optimizer.step()

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    for _ in range(min(5, steps)):
        step()
    wait()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    taken = (time.perf_counter() - started) / steps
    return taken, torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def arithmetic(model: GLIPv2, batch: Batch) -> float:
    """Floating-point operations of forward and backward, from shapes alone: nothing is computed."""
    counter = FlopCounterMode(display=False, custom_mapping=_deformable_convolution())
    with FakeTensorMode(allow_non_fake_inputs=True), counter:
        torch.stack(list(model(batch).values())).sum().backward()
    return float(counter.get_total_flops())


def _deformable_convolution() -> dict[Any, Callable[..., int]]:
    """What torchvision's operator, the original's way, costs: torch does not count it."""

    def forward(_x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * int(torch.Size(out_shape).numel()) * 9 * weight[1]

    def backward(grad: Any, _x: Any, weight: Any, *_: Any, **__: Any) -> int:
        return 2 * 2 * int(torch.Size(grad).numel()) * 9 * weight[1]

    operators = torch.ops.torchvision
    return {operators.deform_conv2d: forward, operators._deform_conv2d_backward: backward}


if __name__ == "__main__":
    main()
