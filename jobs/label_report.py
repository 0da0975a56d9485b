"""What `glipv2 label` says of a set: at work, when it is through, and when all was in vain."""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from glipv2.jobs.report_numbers import duration
from glipv2.pipeline.config import LabelConfig
from glipv2.pipeline.progress import bar
from glipv2.pipeline.shard_format import ShardInfo

if TYPE_CHECKING:
    from glipv2.data_prep.labelling import InHand


@dataclass
class Totals:
    """What became of pairs, over the shards that were added."""

    counts: Counter[str] = field(default_factory=Counter)
    best_score: float = 0.0
    """Highest that the teacher gave any box, kept or not; 0 without any."""

    def add(self, shard: ShardInfo) -> None:
        self.counts.update(shard.stats["counts"])
        self.best_score = max(self.best_score, shard.stats.get("best_score", 0.0))


def kept_share(counts: Counter[str]) -> float:
    return counts["images"] / max(counts["pairs"], 1)


def boxes_per_image(counts: Counter[str]) -> float:
    return counts["boxes"] / max(counts["images"], 1)


class Shown:
    """One live line of a set: pairs, rate, time left, and what is kept of all that is done."""

    def __init__(self, source: str, pairs: int, done: Iterable[ShardInfo], workers: int) -> None:
        """`done` before this run, in which at most `workers` share what is left."""
        self.totals, self.pairs_now = Totals(), 0
        for shard in done:
            self.totals.add(shard)
        self.finished: set[int] = set()
        """Shards of this run of which old notes may still come."""
        self.under_way = Counter[str]()
        """Of shards that are not finished."""
        self.started = time.monotonic()
        self.bar = bar(pairs, f"label {source}", unit="pair", initial=self.totals.counts["pairs"])
        if workers:
            number = "a worker" if workers == 1 else f"up to {workers} workers"
            self.bar.set_postfix_str(f"starting {number}")

    def watch(self, notes: "Iterable[InHand]") -> None:
        """What workers have made of shards that they are still at counts as well."""
        self.under_way = Counter()
        for note in notes:
            if note.shard not in self.finished:
                self.under_way.update(pairs=note.pairs, images=note.images, boxes=note.boxes)
        if self.under_way["pairs"]:
            self._show()

    def update(self, number: int, shard: ShardInfo) -> None:
        """A shard is finished."""
        self.finished.add(number)
        self.totals.add(shard)
        self.pairs_now += shard.stats["counts"]["pairs"]
        self.under_way = Counter()  # the next notes tell what is left of it
        self._show()

    def _show(self) -> None:
        counts = self.totals.counts + self.under_way
        kept, each = kept_share(counts), boxes_per_image(counts)
        self.bar.set_postfix_str(f"{each:.1f} boxes per image, {kept:.1%} kept", refresh=False)
        self.bar.update(max(0, counts["pairs"] - self.bar.n))

    def close(self) -> None:
        self.bar.close()

    def closing_lines(self, out: str) -> str:
        """Of the whole set, of this run, and what to do next."""
        counts, seconds = self.totals.counts, time.monotonic() - self.started
        name = out.rstrip("/").rsplit("/", 1)[-1]
        now = "nothing was left to do"
        if self.pairs_now:
            rate = self.pairs_now / seconds
            now = f"this run: {self.pairs_now:,} pairs in {duration(seconds)}, {rate:.1f} a second"
        kept, each = kept_share(counts), boxes_per_image(counts)
        return (
            f"{out}: {counts['images']:,} of {counts['pairs']:,} pairs kept ({kept:.1%}), "
            f"{counts['boxes']:,} boxes, {each:.1f} per image; {now}\n"
            f"look at them: glipv2 view {out} --out {name}.html"
        )


def why_no_box(totals: Totals, source: str, out: str, settings: LabelConfig) -> str:
    """Why a set ended without any box, and the cure; empty where it has some."""
    counts = totals.counts
    if counts["boxes"]:
        return ""
    start = f"{out}: no box for any of {counts['pairs']:,} pairs"
    if not counts["phrases"] and not counts["no_phrase"]:
        return f"{start}: none of them can be used"
    if not counts["phrases"]:
        return (
            f"{start}: no caption has a phrase to look for. Look at them with `glipv2 view {source}"
            "`, and at the rules in label.phrases"
        )
    other = f"choose another output set or delete {out} to label again"
    if not totals.best_score:
        return f"{start}: the teacher found none at all. Train it longer, or take another; {other}"
    cure = "lower that"
    if settings.calibration:
        cure = "it was chosen on label.calibration: lower label.target_precision"
    return (
        f"{start}: the best score was {totals.best_score:.4f}, label.score_threshold is "
        f"{settings.score_threshold:g}. To keep some {cure}, and {other}"
    )
