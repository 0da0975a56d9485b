"""What a labelling says of itself, and estimates beforehand; its workers run in this process."""

import logging
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import label_recipe
from label_recipe import PAIRS, SHARDS
from page_parser import shown

from glipv2.data_prep.labelling import InHand
from glipv2.data_prep.noun_phrases import noun_phrases
from glipv2.jobs import label_estimate, view
from glipv2.jobs.label import label
from glipv2.jobs.label_estimate import Sample, print_estimate
from glipv2.jobs.label_report import Shown
from glipv2.model.grounder import Grounder
from glipv2.pipeline.images import decode_image
from glipv2.pipeline.shard_format import ShardInfo
from glipv2.pipeline.shard_reader import iterate_records, open_shard_set

in_this_process, folder, config = (
    label_recipe.in_this_process,
    label_recipe.folder,
    label_recipe.config,
)


def best_score(folder):
    """The highest score of any phrase of the pairs, asked one by one."""
    grounder = Grounder.load(folder / "teacher")
    best = 0.0
    for record in iterate_records(str(folder / "pairs")):
        spans = [[(p.start, p.end)] for p in noun_phrases(record.caption)]
        if spans:
            [found] = grounder.ground([decode_image(record.image)], [(record.caption, spans)])
            best = max(best, *found.scores_K.tolist())
    return best


@pytest.mark.parametrize("keep_empty", [False, True])
def test_a_set_without_boxes_is_told_with_the_best_score_and_still_opens(
    config, folder, tmp_path, caplog, keep_empty
):
    best = best_score(folder)
    assert 0.3 < best < 0.999
    with caplog.at_level(logging.WARNING):
        said = label(config("label.score_threshold=0.999", f"label.keep_empty={keep_empty}"))
    out = str(tmp_path / "out")
    [warning] = [r.getMessage() for r in caplog.records if r.name == "glipv2.jobs.label"]
    assert f"{out}: no box for any of {PAIRS} pairs: the best score was " in warning
    told = re.search(r"best score was ([\d.]+), label.score_threshold is 0.999", warning)
    assert float(told[1]) == pytest.approx(best, abs=1e-4)
    assert "choose another output set or delete" in warning
    kept = PAIRS if keep_empty else 0
    assert f"{out}: {kept} of {PAIRS} pairs kept" in said and " 0 boxes" in said
    assert open_shard_set(out).samples == kept == len(list(iterate_records(out)))
    view.view(out, str(tmp_path / "page.html"), 5, 0)
    page = shown(tmp_path / "page.html")
    assert ("The set has no samples." in page.text) != keep_empty


def test_captions_without_phrases_are_told_apart(config, folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        label(config("label.phrases.min_length=60"))
    assert "no caption has a phrase to look for" in caplog.text
    assert f"glipv2 view {folder / 'pairs'}" in caplog.text


def test_the_last_line_has_the_totals_of_the_whole_set_after_a_restart(config, tmp_path, capsys):
    out = tmp_path / "out"
    first = label(config())
    records = list(iterate_records(str(out)))
    boxes = sum(len(record.regions) for record in records)
    assert 0 < len(records) <= PAIRS < boxes
    kept = f"{out}: {len(records)} of {PAIRS} pairs kept ({len(records) / PAIRS:.1%}), "
    totals = f"{kept}{boxes} boxes, {boxes / len(records):.1f} per image; "
    assert first.startswith(f"{totals}this run: {PAIRS} pairs in ")
    assert first.endswith(f"\nlook at them: glipv2 view {out} --out out.html")
    assert label(config()).startswith(f"{totals}nothing was left to do")
    for name in ("dataset.json", "commits/shard-000001.json"):
        (out / name).unlink()
    capsys.readouterr()
    again = label(config())
    assert again.startswith(f"{totals}this run: {PAIRS // SHARDS} pairs in ")
    assert re.search(r", [\d.]+ a second", again)
    bar = capsys.readouterr().err
    done = PAIRS - PAIRS // SHARDS
    assert f"{done}/{PAIRS}" in bar and "starting a worker" in bar
    assert re.search(rf"{PAIRS}/{PAIRS} \[[\d:]+<[\d:]+, +[\d.]+( pairs/s|s/ pairs), ", bar)
    assert f"{boxes / len(records):.1f} boxes per image" in bar.rpartition("\r")[2]


def test_the_bar_says_what_it_waits_for_and_then_what_is_kept_of_everything(capsys):
    def shard(pairs, images, boxes):
        counts = {"pairs": pairs, "images": images, "boxes": boxes}
        return ShardInfo(
            name="s", samples=images, bytes=0, crc32c="", commit_crc32c="", stats={"counts": counts}
        )

    live = Shown("web", 40, [shard(10, 10, 100)], workers=3)
    assert "starting up to 3 workers" in capsys.readouterr().err
    live.watch([InHand(shard=7, pairs=10, images=10, boxes=0)])
    assert live.bar.n == 20 and live.bar.postfix == "5.0 boxes per image, 100.0% kept"
    live.watch([InHand(shard=7, pairs=4), InHand(shard=8, pairs=1)])  # begun again after a death
    assert live.bar.n == 20
    live.update(7, shard(30, 0, 0))
    live.watch([InHand(shard=7, pairs=10)])  # an old note
    live.close()
    last = capsys.readouterr().err.rpartition("\r")[2]
    assert "40/40" in last and "10.0 boxes per image, 25.0% kept" in last
    assert "out: 10 of 40 pairs kept (25.0%), 100 boxes, 10.0 per image" in live.closing_lines(
        "out"
    )


def test_a_dry_run_tells_the_sample_it_took(config, tmp_path, capsys):
    assert print_estimate(config(), price=0.0) == 0
    said = capsys.readouterr().out
    found = re.search(r"sample: (\d+) pairs at ([\d.]+) a second on one worker, ", said)
    assert int(found[1]) == PAIRS // SHARDS  # of the first shard, which has no more
    assert re.search(r"start: \d+ s until a worker is ready", said)
    assert f"left: {PAIRS} pairs" in said and "0.00" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pair_s", "start_s", "actors", "expected"),
    [
        # 12 pairs in 3 shards: all by one worker; start + a share each; 3 starts cost as well
        (2.0, 10.0, 2, ("24 s of work", "about 22 s with 2 like", "cost: 0.12 at 10")),
        (2.0, 10.0, 9, ("24 s of work", "about 18 s with 3 like", "cost: 0.15 at 10")),
        (100.0, 60.0, 1, ("20 min 00 s of work", "about 21 min 00 s with 1", "cost: 3.50 at 10")),
        (3600.0, 0.0, 1, ("12 h 00 min of work", "about 12 h 00 min with 1", "cost: 120.00 at")),
    ],
)
def test_the_estimate_adds_starts_and_shares_of_the_work(
    config, monkeypatch, capsys, pair_s, start_s, actors, expected
):
    sample = Sample(pairs=4, images=3, boxes=6, start_s=start_s, pair_s=pair_s)
    monkeypatch.setattr(label_estimate, "timed", lambda *_: sample)
    print_estimate(config(f"label.num_actors=[1,{actors}]"), price=10)
    said = capsys.readouterr().out
    assert "75% kept, 2.0 boxes each" in said
    assert all(part in said for part in expected), said


def test_the_bar_moves_with_the_windows_of_a_shard(config, monkeypatch):
    shown, show = [], Shown._show
    monkeypatch.setattr(Shown, "_show", lambda self: (show(self), shown.append(self.bar.n)))
    label(config("label.window=1"))
    assert shown == sorted(shown) and shown[-1] == PAIRS
    assert set(shown) == set(range(1, PAIRS + 1))
