"""make bench: each figure is a ratio to a peer measured in the same run, on one thread.

Correctness is tests' business; here speed is reported, and how well phrases are found.
`--flickr30k FOLDER` adds the phrases of Flickr30k Entities.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import webdataset
from bench_checkpoint import bench_checkpoint
from bench_chunks import bench_chunks
from bench_damage import bench_damage
from bench_data import bench_data
from bench_engine import bench_engine
from bench_eval import bench_eval
from bench_label import bench_label
from bench_measure import row, seconds
from bench_model import bench_model
from bench_parts import bench_attention, bench_deform, bench_losses
from bench_phrases import bench_phrases

from glipv2.data_prep.toy import toy_records
from glipv2.pipeline.record_json import parse_record
from glipv2.pipeline.shards import open_shard_set, read_raw, write_shard_set


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--flickr30k", help="folder of Flickr30k Entities")
    flickr30k = options.parse_args().flickr30k
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bench_deform()
    bench_attention()
    bench_losses()
    bench_model()
    bench_chunks()
    bench_engine()
    bench_checkpoint()
    bench_shards()
    bench_data()
    bench_damage()
    bench_phrases(flickr30k)
    bench_label()
    bench_eval()


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

        row("records from a shard, 512 samples", *seconds(ours, peer), "webdataset")


def open_shard_set_of_toys(folder: str) -> object:
    records = toy_records("toy_grounding", 512, seed=1)
    write_shard_set(folder, records, (), {}, samples_per_shard=512)
    return open_shard_set(folder)


if __name__ == "__main__":
    main()
