"""A training step of GLIP-T against the same parameters run the original's way.

The original pads texts to 256 tokens, projects every location in its attention, and convolves with
a deformable operator of its own: torchvision's stands in. Every way has a process to itself, whose
memory is the largest resident size of its life: `python infra/bench_model.py ours|original`.
"""

import json
import resource
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from bench_measure import row, seconds
from bench_parts import scene
from original import original_operators
from torch.nn import functional as F

from glipv2.model.batch import Batch
from glipv2.model.config import preset
from glipv2.model.glip import build_model

SIZE = (320, 480)
CAPTION = 20
"""Tokens of the text."""


def bench_model() -> None:
    """Forward with all losses, and backward, in training mode; no activation checkpointing."""
    (ours, ours_mib), (peer, peer_mib) = (_in_a_process(way) for way in ("ours", "original"))
    row("GLIP-T step, 1 x 320 x 480, 20 tokens", ours, peer, "the original's way")
    row("  its largest resident memory", ours_mib, peer_mib, "the original's way", "MiB")


def _in_a_process(way: str) -> tuple[float, float]:
    command = [sys.executable, str(Path(__file__)), way]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    taken, mib = json.loads(done.stdout.splitlines()[-1])
    return taken, mib


def _run(way: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model(replace(preset("T"), masked_words=False, contrast=False), seed=0).train()
    batch, _ = scene(1, SIZE, locations=0, boxes=5, tokens=CAPTION)
    if way == "original":
        batch = padded(batch, model.config.text_encoder.max_tokens)

    def step() -> None:
        model.zero_grad()
        sum(model(batch).values()).backward()

    with original_operators() if way == "original" else nullcontext():
        taken = seconds(step, repeats=1)[0]
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([taken, mib]))  # noqa: T201


def padded(batch: Batch, tokens: int) -> Batch:
    """The same batch with its text padded to a fixed length."""
    spare = (0, tokens - batch.tokens_BT.shape[1])
    return replace(
        batch,
        tokens_BT=F.pad(batch.tokens_BT, spare),
        token_mask_BT=F.pad(batch.token_mask_BT, spare),
        mlm_labels_BT=F.pad(batch.mlm_labels_BT, spare, value=-100),
        positive_BNT=F.pad(batch.positive_BNT, spare),
        token_category_BT=F.pad(batch.token_category_BT, spare, value=-1),
    )


if __name__ == "__main__":
    _run(sys.argv[1])
