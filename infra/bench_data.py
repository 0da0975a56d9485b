"""The data path against webdataset's: bytes, decoded pictures, local disk and object storage."""

import io
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import s3_server
import simplejpeg
import torch
import webdataset
from bench_measure import note, row, seconds
from PIL import Image
from torch.nn.functional import interpolate

from glipv2.model.images import resize, resized_size
from glipv2.pipeline import storage
from glipv2.pipeline.augment import View, picture
from glipv2.pipeline.collate import Sample
from glipv2.pipeline.records import Record, Region
from glipv2.pipeline.shards import ShardSet, open_shard_set, raw_samples, read_raw, write_shard_set
from glipv2.pipeline.stream import Slot, Stream, StreamConfig
from glipv2.pipeline.workers import batches_from_workers

SIZE = (640, 480)
SHORT, LONG = 800, 1333
COUNT = 1024
PER_SHARD = 256
WORKERS = 2


def bench_data() -> None:
    with tempfile.TemporaryDirectory() as folder:
        shard_set = photographs(folder)
        bench_bytes(shard_set)
        bench_memory(shard_set)
        bench_pictures(shard_set)
        bench_store(shard_set)


def bench_memory(shard_set: ShardSet) -> None:
    """Resident memory of a process that reads records: late in 10^5 samples against early."""
    config = StreamConfig(seed=0, global_batch=16, lanes=4)
    stream = Stream({"photos": shard_set}, {"photos": 1.0}, config)
    seen, at = 0, {}
    for batch, _ in stream.batches(stream.start()):
        seen += len(batch)
        if seen in (10_000, 100_000):
            at[seen] = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
        if seen == 100_000:
            break
    early, late = at.values()
    note("resident memory after 10^4 and 10^5 samples", f"{early:9.0f} {late:9.0f} MiB")


def bench_store(shard_set: ShardSet) -> None:
    """Our pictures from a real S3 server on loopback, against the local disk."""
    if reason := s3_server.why_not():
        note("pictures from S3", f"not measured: {reason}")
        return
    with s3_server.running() as endpoint:
        os.environ.update(s3_server.environment(endpoint))
        s3_server.plain_client(endpoint).mkdir("bench")
        copy_files(shard_set.url, "s3://bench/photos")
        remote = open_shard_set("s3://bench/photos")
        rates: dict[str, list[float]] = {"local": [], "s3": []}
        for _ in range(5):
            rates["local"].append(rate(lambda: ours_decoded(shard_set)))
            rates["s3"].append(rate(lambda: ours_decoded(remote)))
    local, store = (statistics.median(found) for found in rates.values())
    note(f"pictures at {SHORT} px from S3, {WORKERS} processes",
         f"{store:9.1f} /s   {store / local:6.2f} x the local disk")  # fmt: skip


def copy_files(folder: str, url: str) -> None:
    for path in Path(folder).rglob("*"):
        if path.is_file():
            storage.upload(path, storage.join(url, str(path.relative_to(folder))))


def photographs(url: str) -> ShardSet:
    """Records of COCO's size: 640 x 480, about 80 KB, five boxes each."""
    rng = np.random.default_rng(0)
    images = [_photograph(rng) for _ in range(64)]
    boxes = [Region(box=(9.0 * n, 8.0, 9.0 * n + 50, 99.0), category=n) for n in range(5)]
    records = (
        Record(key=f"photo-{n:06d}", image=images[n % 64], image_format="jpg", width=SIZE[0],
               height=SIZE[1], task="detection", regions=tuple(boxes))
        for n in range(COUNT)
    )  # fmt: skip
    names = [f"category {n}" for n in range(5)]
    size = sum(map(len, images)) / len(images)
    note("photographs of the data benchmarks", f"{size / 1000:9.0f} KB")
    return write_shard_set(url, records, names, {}, samples_per_shard=PER_SHARD)


def bench_bytes(shard_set: ShardSet) -> None:
    """Every sample's members as bytes; ours checks each against its crc."""
    tars = _tars(shard_set)

    def ours() -> int:
        numbers = range(len(shard_set.shards))
        raws = (raw for n in numbers for raw in raw_samples(shard_set, n, 0, PER_SHARD))
        return sum(len(raw.members["jpg"]) for raw in raws)

    def peer() -> int:
        return sum(len(sample["jpg"]) for sample in webdataset.WebDataset(tars, shardshuffle=False))

    assert ours() == peer()
    row(f"bytes of {COUNT} samples, one thread", *seconds(ours, peer), "webdataset")


def bench_pictures(shard_set: ShardSet) -> None:
    """Pictures with the short side at 800 px, from two processes, after they have started."""
    ways = {
        "ours": lambda: ours_decoded(shard_set),
        "webdataset": lambda: webdataset_decoded(_tars(shard_set)),
        "bare loop": lambda: bare_loop(shard_set, _usual_resize),
        "bare loop with our resize": lambda: bare_loop(shard_set, _at_short),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(5):
        for name, way in ways.items():
            rates[name].append(rate(way))
    best = {name: statistics.median(found) for name, found in rates.items()}
    for name in list(ways)[1:]:
        ratio = best["ours"] / best[name]
        note(f"pictures at {SHORT} px, {WORKERS} processes: {name}",
             f"{best[name]:9.1f} /s   ours {ratio:6.2f} x")  # fmt: skip
    note(f"pictures at {SHORT} px, {WORKERS} processes: ours", f"{best['ours']:9.1f} /s")


def rate(way: Callable[[], Iterator[int]], count: int = COUNT) -> float:
    """Pictures a second of wall time, from the first batch on."""
    batches = way()
    next(batches)
    start, seen = time.perf_counter(), 0
    for number in batches:
        seen += number
        if seen >= count:
            break
    taken = time.perf_counter() - start
    batches.close()  # type: ignore[attr-defined]
    return seen / taken


def ours_decoded(shard_set: ShardSet) -> Iterator[int]:
    config = StreamConfig(seed=0, global_batch=16, lanes=4)
    stream = Stream({"photos": shard_set}, {"photos": 1.0}, config)
    for batch, _ in batches_from_workers(stream, stream.start(), see, WORKERS, 3 * SHORT * LONG):
        yield len(batch)


def see(slot: Slot) -> Sample:
    """The picture of a sample, and no text."""
    record = slot.record
    crop = (0, 0, record.width, record.height)
    view = View(crop=crop, short_side=SHORT, long_side=LONG, mirrored=False)
    nothing = np.empty(0)
    return Sample(
        key=record.key,
        image_3HW=picture(record, view).image_3HW,
        boxes_N4=nothing,
        positive_NT=nothing,
        box_category_N=nothing,
        token_ids_T=nothing,
        mlm_labels_T=nothing,
        token_category_T=nothing,
    )


def webdataset_decoded(tars: list[str]) -> Iterator[int]:
    """Its own decoding (Pillow) and workers; the resize is ours."""
    torch.multiprocessing.set_sharing_strategy("file_descriptor")
    dataset = webdataset.WebDataset(tars, shardshuffle=False, nodesplitter=None, repeat=True)
    dataset = dataset.decode("torchrgb8").map(_resized_sample).batched(16, collation_fn=list)
    loader = webdataset.WebLoader(
        dataset, batch_size=None, num_workers=WORKERS, multiprocessing_context="spawn"
    )
    for batch in loader:
        yield len(batch)


def _resized_sample(sample: dict[str, Any]) -> torch.Tensor:
    return _at_short(sample["jpg"])


def bare_loop(
    shard_set: ShardSet, resized: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[int]:
    """simplejpeg and a resize on bytes in memory: no shards, no records, no hand-over."""
    raws = [raw.members["jpg"] for raw in read_raw(shard_set, 0, 0, PER_SHARD)]
    context = multiprocessing.get_context("spawn")
    counts = [context.Value("q", 0) for _ in range(WORKERS)]
    processes = [
        context.Process(target=_decode_for_ever, args=(raws, count, resized), daemon=True)
        for count in counts
    ]
    for process in processes:
        process.start()
    try:
        while not all(count.value for count in counts):
            time.sleep(0.1)
        seen = sum(count.value for count in counts)
        while True:
            now = sum(count.value for count in counts)
            yield now - seen
            seen = now
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _decode_for_ever(
    raws: list[bytes], count: Any, resized: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    torch.set_num_threads(1)
    while True:
        for data in raws:
            resized(torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1))
            count.value += 1


def _usual_resize(image_3HW: torch.Tensor) -> torch.Tensor:
    """As one writes it; the layout that makes it fast is lost in [None]."""
    size = resized_size(image_3HW.shape[1], image_3HW.shape[2], SHORT, LONG)
    return interpolate(image_3HW[None], size=size, mode="bilinear", antialias=True)[0]


def _at_short(image_3HW: torch.Tensor) -> torch.Tensor:
    return resize(image_3HW, resized_size(image_3HW.shape[1], image_3HW.shape[2], SHORT, LONG))


def _photograph(rng: np.random.Generator) -> bytes:
    coarse = Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = (pixels + rng.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _tars(shard_set: ShardSet) -> list[str]:
    return [str(Path(shard_set.shard_url(n))) for n in range(len(shard_set.shards))]


if __name__ == "__main__":
    torch.set_num_threads(1)
    bench_data()
