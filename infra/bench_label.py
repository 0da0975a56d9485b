"""Labelling against bare loops around the teacher: rate, overhead per pair, the driver's memory.

The bare loop has the records in memory and their phrases found; it decodes each image and asks the
teacher, in batches and in the shards' order. It keeps nothing. The teachers have random weights and
no bias against boxes: one has the tiny model's size, where what labelling adds shows most, the
other GLIP-T's, on images of 320 x 320.
"""

import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from bench_measure import note, peak_memory, row, seconds
from untrained_teacher import GLIP_T, save_teacher

from glipv2.data_prep.labelling import ShardLabeller, ShardTask
from glipv2.data_prep.phrases import load_parser
from glipv2.data_prep.toy import toy_records
from glipv2.jobs import label
from glipv2.jobs.label_plan import Plan, stamp_of, what_decides
from glipv2.jobs.prepare import prepare_set
from glipv2.model.batch import Detection
from glipv2.model.grounder import Grounder
from glipv2.model.image_input import ImageInput, Images, Picture, read_image
from glipv2.model.prompts import Caption
from glipv2.pipeline import worker_notes
from glipv2.pipeline.config import LabelConfig, PhraseConfig, PrepareConfig, RunConfig
from glipv2.pipeline.images import decode_image
from glipv2.pipeline.record_json import parse_record
from glipv2.pipeline.shards import ShardSet, open_shard_set, raw_samples, write_shard_set

WORKERS = 2
SHARDS, PER_SHARD, SIZE = 8, 256, 128
FEW_PER_SHARD, WARM_UP = 12, 16
OVERHEAD_SHARDS = 1
FEW, MANY, SMALL, SMALL_SIZE = 40, 400, 16, 64
"""Shards of small pairs, to see what grows with their number."""
STAMP = {"teacher": "bench", "parser": "bench", "label_settings": "bench"}


def bench_label() -> None:
    # not 15: other work shall slow both sides equally
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (Ray's spelling)
    with tempfile.TemporaryDirectory() as folder:
        pairs = web_pairs(f"{folder}/pairs", SHARDS, PER_SHARD, SIZE)
        save_teacher(Path(folder, "teacher"))
        settings = settings_with(f"{folder}/teacher")
        bench_rate(pairs, settings, folder)
        bench_real_size(folder)
        bench_overhead(pairs, settings, folder)
        bench_driver(folder)


def settings_with(teacher: str) -> LabelConfig:
    return LabelConfig(teacher=teacher, score_threshold=0.3, num_actors=(WORKERS, WORKERS))


def web_pairs(url: str, shards: int, per_shard: int, size: int) -> ShardSet:
    options = PrepareConfig(
        source="toy", set="toy_pairs", count=shards * per_shard, size=size, seed=1
    )
    return prepare_set(url, options, samples_per_shard=per_shard)


def bench_real_size(folder: str) -> None:
    pairs = web_pairs(f"{folder}/few", SHARDS, FEW_PER_SHARD, SIZE)
    save_teacher(Path(folder, "glip-t"), GLIP_T)
    note("with a teacher of GLIP-T's size:", "")
    bench_rate(pairs, settings_with(f"{folder}/glip-t"), f"{folder}/few-labelled", turns=1)


def bench_rate(pairs: ShardSet, settings: LabelConfig, folder: str, turns: int = 3) -> None:
    """Two workers that write shards, and two processes with a bare loop: pairs a second of wall
    time, and of processor time, which other work on the machine moves less."""
    ours, bare = [], []
    for turn in range(turns):
        ours.append(pool_rates(pairs, settings, f"{folder}/labelled-{turn}"))
        bare.append(bare_rates(pairs, settings))
        shown = " ".join(f"{rate:8.1f}" for rate in (*ours[-1], *bare[-1]))
        note("  ours, of wall and CPU; the bare loops", f"{shown} /s")
    for kind, own, peer in zip(("time", "CPU"), zip(*ours, strict=True), zip(*bare, strict=True),
                               strict=True):  # fmt: skip
        best, peer_best = statistics.median(own), statistics.median(peer)
        note(f"pairs per second of {kind}: {WORKERS} bare loops",
             f"{peer_best:9.1f} /s   ours {best / peer_best:6.2f} x")  # fmt: skip


class TimedWorker(label._Worker):
    def __call__(self, task: ShardTask) -> Any:
        info = super().__call__(task)
        times = {"worker": os.getpid(), "wall_s": time.perf_counter(), "cpu_s": time.process_time()}
        return replace(info, stats=times)  # type: ignore[type-var]


def pool_rates(pairs: ShardSet, settings: LabelConfig, out: str) -> tuple[float, float]:
    """Of all workers together, each from the end of its first shard to that of its last."""
    import ray
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    tasks = [ShardTask(number=number) for number in range(len(pairs.shards))]
    ends: dict[int, list[tuple[float, float]]] = defaultdict(list)
    stamp = stamp_of(what_decides(settings))
    with mock.patch.object(label, "_Worker", TimedWorker):
        for _, info in label.label_on_ray(settings, pairs, tasks, out, stamp):
            ends[info.stats["worker"]].append((info.stats["wall_s"], info.stats["cpu_s"]))
    ray.shutdown()
    first, last = (np.array([own[which] for own in ends.values()]) for which in (0, -1))
    per_shard = pairs.samples // len(pairs.shards)
    labelled_W1 = per_shard * np.array([[len(own) - 1] for own in ends.values()])
    wall, _ = (labelled_W1 / (last - first)).sum(0)
    _, cpu = labelled_W1.sum() / (last - first).sum(0)
    return float(wall), float(cpu)


def bare_rates(pairs: ShardSet, settings: LabelConfig) -> tuple[float, float]:
    """The processes begin together; each has every second shard."""
    context = multiprocessing.get_context("spawn")
    start, taken = context.Barrier(WORKERS), context.Queue()
    processes = [
        context.Process(
            target=_bare_process,
            args=(pairs.url, settings, range(first, len(pairs.shards), WORKERS), start, taken),
        )
        for first in range(WORKERS)
    ]
    for process in processes:
        process.start()
    wall_s, cpu_s = zip(*(taken.get() for _ in processes), strict=True)
    for process in processes:
        process.join()
    return sum(pairs.samples / WORKERS / seconds for seconds in wall_s), pairs.samples / sum(cpu_s)


def _bare_process(
    url: str, settings: LabelConfig, numbers: Sequence[int], start: Any, taken: Any
) -> None:
    torch.set_num_threads(1)
    loop = BareLoop(open_shard_set(url), settings, numbers)
    loop(WARM_UP)
    start.wait()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    loop()
    taken.put((time.perf_counter() - wall_s, time.process_time() - cpu_s))


class BareLoop:
    """The teacher, asked about the records of some shards."""

    def __init__(self, pairs: ShardSet, settings: LabelConfig, numbers: Sequence[int]) -> None:
        self.grounder = Grounder.load(settings.teacher)
        self.batch_size = settings.batch_size
        find = load_parser(settings.phrases)
        self.asked: list[tuple[bytes, Caption]] = []
        for number in numbers:
            for raw in raw_samples(pairs, number, 0, PER_SHARD):
                record = parse_record(raw)
                spans = [((p.start, p.end),) for p in find(record.caption).phrases]
                if spans:
                    self.asked.append((record.image, (record.caption, spans)))

    def __call__(self, last: int | None = None) -> None:
        asked = self.asked[:last]
        for first in range(0, len(asked), self.batch_size):
            batch = asked[first : first + self.batch_size]
            images = [decode_image(image) for image, _ in batch]
            self.grounder.ground(images, [caption for _, caption in batch], self.batch_size)


def bench_overhead(pairs: ShardSet, settings: LabelConfig, folder: str) -> None:
    """Processor time of one worker in this process: reading, phrases, choosing boxes, writing."""
    numbers = range(OVERHEAD_SHARDS)
    worker = label._Worker(pairs.url, settings, None, {})
    bare = BareLoop(pairs, settings, numbers)
    pictures = [bare.grounder.prepare(decode_image(image)) for image, _ in bare.asked]
    captions = [caption for _, caption in bare.asked]
    count = OVERHEAD_SHARDS * PER_SHARD

    def ours() -> None:
        worker.out = tempfile.mkdtemp(dir=folder)
        for number in numbers:
            worker(ShardTask(number=number))

    def teacher() -> None:
        """In the batches that a worker makes: each shard's shortest captions first."""
        order = sorted(range(len(captions)), key=lambda n: (n // PER_SHARD, len(captions[n][0])))
        for first in range(0, len(order), bare.batch_size):
            batch = order[first : first + bare.batch_size]
            bare.grounder.ground([pictures[n] for n in batch], [captions[n] for n in batch])

    ours_s, bare_s, teacher_s = seconds(ours, bare, teacher)
    row(f"{count} pairs labelled by one worker, CPU", ours_s, bare_s, "the bare loop")
    note("  CPU beyond the bare loop", f"{1000 * (ours_s - bare_s) / count:9.3f} ms a pair")
    note("  CPU beyond the teacher alone", f"{1000 * (ours_s - teacher_s) / count:9.3f} ms a pair")
    worker.labeller.teacher = Instant()
    (ours_s,) = seconds(ours)
    note("  CPU with a teacher that takes no time", f"{1000 * ours_s / count:9.3f} ms a pair")


class Instant:
    """A teacher that boxes every phrase without looking."""

    def prepare(self, image: ImageInput) -> Picture:
        pixels_3HW = read_image(image)
        return Picture(pixels_3HW=pixels_3HW, own_size=(pixels_3HW.shape[1], pixels_3HW.shape[2]))

    def ground(
        self, images: Images, captions: Sequence[Caption], batch_size: int = 8
    ) -> list[Detection]:
        return [
            Detection(
                boxes_K4=torch.tensor([[4.0 * k, 3.0, 4.0 * k + 20, 30.0] for k in range(K)]),
                scores_K=torch.full((K,), 0.9),
                labels_K=torch.arange(K),
                names=[""] * K,
            )
            for K in (len(caption[1]) for caption in captions)
        ]


class InstantWorker(label._Worker):
    def __init__(
        self, pairs_url: str, settings: LabelConfig, out: str | None, stamp: dict[str, str]
    ) -> None:
        self.pairs, self.out, self.stamp = open_shard_set(pairs_url), out, stamp
        find = load_parser(PhraseConfig())
        self.labeller = ShardLabeller(
            self.pairs, Instant(), find, settings, stamp, worker_notes.note
        )


def small_pairs(url: str, shards: int) -> None:
    """The same few pictures in every shard."""
    few = list(toy_records("toy_pairs", SMALL, seed=1, size=SMALL_SIZE))
    records = (
        replace(record, key=f"pair-{number:04d}-{record.key}")
        for number in range(shards)
        for record in few
    )
    write_shard_set(url, records, (), {}, samples_per_shard=SMALL)


def bench_driver(folder: str) -> None:
    """Each in a process of its own, with a teacher that takes no time."""
    for shards in (FEW, MANY):
        url = f"{folder}/small-{shards}"
        small_pairs(url, shards)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            memory, store = process.submit(_drive, url, f"{folder}/run-{shards}").result()
        note(f"{shards} shards: the driver's memory, the object store's",
             f"{memory:9.1f} {store:9.1f} MiB at most")  # fmt: skip


def _drive(source: str, run_dir: str) -> tuple[float, float]:
    """Peaks in MiB of the driver's memory and of the object store, of labelling a whole set."""
    import ray
    import ray.cloudpickle

    from glipv2.pipeline.ray_cluster import start_ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    label._Worker = InstantWorker  # type: ignore[misc]
    out = f"{run_dir}/labelled"
    settings = LabelConfig(teacher="none", inputs={source: out}, num_actors=(WORKERS, WORKERS))
    config = RunConfig(run_dir=run_dir, label=settings)
    start_ray(WORKERS)
    whole, free = _store_mib(ray.cluster_resources()), []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            free.append(_store_mib(ray.available_resources()))

    watching = threading.Thread(target=watch)
    watching.start()
    label.label_set(Plan(config=config, settings=settings, deciding=dict(STAMP)), source, out)
    over.set()
    watching.join()
    ray.shutdown()
    return peak_memory(), whole - min(free)


def _store_mib(resources: dict[str, float]) -> float:
    return resources.get("object_store_memory", 0.0) / 2**20


if __name__ == "__main__":
    torch.set_num_threads(1)
    bench_label()
