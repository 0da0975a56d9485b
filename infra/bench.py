"""make bench: each figure is a ratio to a peer measured in the same run, median of 5, one thread.

Correctness is tests' business; here only speed is reported.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import webdataset
from torch import nn
from torchvision.ops import deform_conv2d

from glipv2.data_prep.noun_phrases import noun_phrases
from glipv2.data_prep.toy import toy_records
from glipv2.model.deform import DeformConv, Taps
from glipv2.model.fusion import ImageTextAttention
from glipv2.pipeline.record_json import parse_record
from glipv2.pipeline.shards import open_shard_set, read_raw, write_shard_set

REPEATS = 5


def seconds(work: Callable[[], object]) -> float:
    """Median processor time of one call, after a warm-up."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def row(name: str, ours: float, peer: float, peer_name: str, unit: str) -> None:
    print(f"{name:44s} {ours:10.4f} {unit}   {peer / ours:5.2f} x {peer_name}")  # noqa: T201


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bench_deform()
    bench_fusion()
    bench_shards()
    bench_phrases()


def bench_deform() -> None:
    """Forward and backward of one deformable convolution, 4 maps of 64 x 32 x 32."""
    conv = DeformConv(64)
    x = torch.randn(4, 64, 32, 32, requires_grad=True)
    offset, mask = torch.randn(4, 18, 32, 32), torch.rand(4, 9, 32, 32)
    weight = torch.randn(64, 64, 3, 3, requires_grad=True)
    ours = seconds(lambda: conv(x, Taps(offset_B18HW=offset, mask_B9HW=mask)).sum().backward())
    peer = seconds(lambda: deform_conv2d(x, offset, weight, padding=1, mask=mask).sum().backward())
    row("deformable convolution, fwd + bwd", ours, peer, "torchvision", "s")


def bench_fusion() -> None:
    """Forward and backward of one fusion attention at GLIP's widths, 2,000 locations."""
    attention = ImageTextAttention(256, 768, 2048, 8, dropout=0.0, scale=1 / 6)
    for words in (256, 64):
        image = torch.randn(1, 2000, 256, requires_grad=True)
        text = torch.randn(1, words, 768, requires_grad=True)
        mask = torch.ones(1, words, dtype=torch.bool)
        ours = seconds(lambda i=image, t=text, m=mask: sum_of(attention(i, t, m)).backward())
        peer = seconds(
            lambda i=image, t=text, m=mask: sum_of(unfolded(attention, i, t, m)).backward()
        )
        row(f"image-text attention, {words} tokens, fwd + bwd", ours, peer, "unfolded", "s")


def sum_of(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return pair[0].sum() + pair[1].sum()


def unfolded(
    m: nn.Module, image_BND: torch.Tensor, text_BTD: torch.Tensor, mask_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """GLIP's formula as published: every location is projected to the attention width."""
    heads, head_width = 8, 256

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], -1, heads, head_width).transpose(1, 2)

    v, words = m.norm_image(image_BND), m.norm_text(text_BTD)
    scores = split(m.query(v) * head_width**-0.5) @ split(m.key(words)).transpose(2, 3)
    to_text = (scores + torch.where(mask_BT, 1.0, -9e15)[:, None, None]).softmax(-1)
    to_image = scores.transpose(2, 3).softmax(-1)
    seen = m.image_out((to_text @ split(m.text_value(words))).transpose(1, 2).flatten(2))
    read = m.text_out((to_image @ split(m.image_value(v))).transpose(1, 2).flatten(2))
    return v + m.image_scale * seen, words + m.text_scale * read


def bench_shards() -> None:
    """Reading and checking every sample of a shard: ours verifies crc and the whole record."""
    with tempfile.TemporaryDirectory() as folder:
        opened = open_shard_set_of_toys(folder)
        path = str(Path(folder) / "shard-000000.tar")
        count = opened.samples

        def ours() -> list[object]:
            return [parse_record(raw) for raw in read_raw(opened, 0, 0, count)]

        def peer() -> list[object]:
            return list(webdataset.WebDataset([path], shardshuffle=False).decode())

        row("records from a shard, 512 samples", seconds(ours), seconds(peer), "webdataset", "s")


def open_shard_set_of_toys(folder: str) -> object:
    records = toy_records("toy_grounding", 512, seed=1)
    write_shard_set(folder, records, (), {}, samples_per_shard=512)
    return open_shard_set(folder)


def bench_phrases() -> None:
    captions = [record.caption for record in toy_records("toy_pairs", 500, seed=2)]
    taken = seconds(lambda: [noun_phrases(caption) for caption in captions])
    print(f"{'noun phrases':44s} {len(captions) / taken:10.0f} captions/s")  # noqa: T201


if __name__ == "__main__":
    main()
