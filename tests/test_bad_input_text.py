"""Boxes, captions, JSON and manifests as strangers may send them: each has its documented outcome.
The list is in test_bad_input_checklist."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from odd_files import prepared, run_measured, tar, write_tars  # noqa: E402
from sample_records import CATEGORIES, jpeg, record  # noqa: E402

from glipv2.data_prep.reasons import Dropped  # noqa: E402
from glipv2.jobs.cli import main  # noqa: E402
from glipv2.model.prompts import token_map  # noqa: E402
from glipv2.model.tokenizer import Tokenizer, tiny_vocab  # noqa: E402
from glipv2.pipeline import shards, storage  # noqa: E402
from glipv2.pipeline.config import DataConfig  # noqa: E402
from glipv2.pipeline.errors import BadSample, DataError  # noqa: E402
from glipv2.pipeline.loader import build_loader  # noqa: E402
from glipv2.pipeline.records import Region  # noqa: E402

GB = 10**9
SECONDS = 2.0


# ---- boxes ----


def test_every_kind_of_box_is_kept_clipped_or_dropped_by_rule(tmp_path):
    boxes = {
        1: [
            [2, 3, 10, 5],
            [float("nan"), 1, 5, 5],
            [1, 1, float("inf"), 5],
            [-5, -5, 10, 10],
            [9, 9, -5, 5],
            [90, 9, 20, 5],
            [9, 9, 0, 5],
            [0.2, 0.3, 0.5, 0.4],
            "1 2 3 4",
            ["9", "x", 3, 4],
            [1, 2, None, 4],
            [1, 2, 3],
            [10**400, 1, 5, 5],
            [-(2**63), 1, 2**64, 5],
        ],
        2: [[1, 1, 5, 5]] * 10_000,
    }
    (tmp_path / "a.jpg").write_bytes(jpeg())
    document = {
        "images": [{"id": n, "file_name": "a.jpg"} for n in boxes],
        "annotations": [
            {"image_id": n, "category_id": 1, "bbox": box} for n in boxes for box in boxes[n]
        ],
        "categories": [{"id": 1, "name": "dog"}],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(document))
    made = prepared(tmp_path, "coco", "--annotations", path, "--images", tmp_path)
    (kept,) = shards.iterate_records(made.url)
    assert [region.box for region in kept.regions] == [
        (2, 3, 12, 8), (0, 0, 5, 5), (0, 1, 32, 6),
    ]  # fmt: skip
    assert made.info["counts"] == {
        "boxes_too_many": 1,
        "box_not_finite": 3,
        "box_clipped": 2,
        "box_inverted": 1,
        "box_outside": 1,
        "box_empty": 1,
        "box_normalised": 1,
        "box_unreadable": 4,
    }


# ---- captions and spans ----


def test_every_kind_of_caption_is_cleaned_cut_or_dropped(tmp_path):
    captions = {
        "": "caption_empty",
        "?!... ---": "caption_empty",
        "a\0dog\x07": "adog",
        "a \ud800 dog": "a dog",
        "\u202ea dog\u202c": "a dog",
        "👩\u200d🚀 in space": "👩\u200d🚀 in space",
        "שלום עולם": "שלום עולם",
        "dog " * 240_000: "dog " * 249 + "dog",
        "x" * 1_000_000: None,  # more than a line may hold: read as two, neither of them JSON
    }
    (tmp_path / "a.jpg").write_bytes(jpeg())
    rows = [json.dumps({"image": "a.jpg", "alt": caption}) for caption in captions]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    start = time.process_time()
    made = prepared(tmp_path, "pairs", "--root", tmp_path)
    assert time.process_time() - start < SECONDS
    found = [item.caption for item in shards.iterate_records(made.url)]
    assert found == [text for text in captions.values() if text not in ("caption_empty", None)]
    assert made.info["counts"] == {"caption_empty": 2, "caption_cut": 1, "row_unreadable": 2}


TOKENIZER = Tokenizer.from_vocab(tiny_vocab(), 256)
SETTINGS = DataConfig(
    mixture={"a": 1.0}, short_sides=(32,), long_side=32, lanes=1, caption_packing=0.0,
    mlm_probability=0.0,
)  # fmt: skip


def loaded(tmp_path, made):
    """The one sample of a set as the loader gives it."""
    written = shards.write_shard_set(str(tmp_path / "set"), [made], (), {})
    loader = build_loader(SETTINGS, 1, {"a": written}, TOKENIZER)
    batch, _ = next(iter(loader.batches(loader.start())))
    return batch


ENDS = [","] * 299 + [""]


def test_of_300_phrases_only_those_in_the_text_keep_their_boxes(tmp_path):
    phrases = [f"red square {n}" for n in range(300)]
    caption = ", ".join(phrases)
    starts = [caption.index(phrase + end) for phrase, end in zip(phrases, ENDS, strict=True)]
    regions = tuple(
        Region(box=(0.0, 0.0, 1.0 + n % 30, 9.0), spans=((start, start + len(phrase)),))
        for n, (start, phrase) in enumerate(zip(starts, phrases, strict=True))
    )
    batch = loaded(tmp_path, record(caption=caption, regions=regions))
    kept = int(batch.box_mask_BN.sum())
    assert batch.tokens_BT.shape[1] == 256 and 30 < kept < 100
    whole = [TOKENIZER.vocabulary[i] for i in TOKENIZER.encode(caption).ids]
    for n in range(kept):
        named = [whole[t] for t in batch.positive_BNT[0, n].nonzero().flatten().tolist()]
        said = [TOKENIZER.vocabulary[i] for i in TOKENIZER.encode(phrases[n]).ids[1:-1]]
        assert named == said[: len(named)] and (named == said or n == kept - 1)
        assert batch.boxes_BN4[0, n, 2] > 0


def test_spans_off_by_one_past_the_end_and_overlapping(tmp_path):
    from glipv2.data_prep.grounded import clean_caption

    dropped, text = Dropped(), "a red square on a box"
    caption = clean_caption(text, dropped, "")
    given = {
        (1, 12): "red square",  # one too early: the blank falls off
        (2, 13): "red square",  # one too late
        (2, 11): "red squar",
        (17, 22): None,  # past the end
        (22, 25): None,
        (-1, 3): None,
        (6, 6): None,
        (0, 12): "a red square",  # overlaps the first
    }
    for span, words in given.items():
        spans = caption.spans([list(span)], dropped, "")
        assert [text[a:b] for a, b in spans] == ([words] if words else [])
    assert dropped == {"span_unusable": 4}
    tokens = TOKENIZER.encode(text)
    whole, short, part = token_map(tokens, [[(2, 12)], [(2, 11)], [(0, 12)]])
    assert (whole == short).all()  # a token is named whole or not at all
    assert part.sum() == 3 and part[1] and (part >= whole).all()


# ---- JSON ----


def test_odd_json_beside_an_image_costs_only_its_sample(tmp_path):
    deep, caption = b'{"caption": ' + b"[" * 10_000, b'"caption": "a dog"'
    documents = {
        "plain": b"{" + caption + b"}",
        "nan": b'{"punsafe": NaN, ' + caption + b"}",
        "mark": b"\xef\xbb\xbf{" + caption + b"}",
        "deep": deep,
        "latin": b'{"caption": "caf\xe9"}',
        "list": b"[]",
        "number": b'{"caption": 7}',
        "large": b'{"caption": "' + b"x" * 1_100_000 + b'"}',
    }
    members = [
        member
        for key, document in documents.items()
        for member in ((f"{key}.jpg", jpeg()), (f"{key}.json", document))
    ]
    made = prepared(tmp_path, "webdataset", "--root", write_tars(tmp_path, a=tar(*members)))
    found = list(shards.iterate_records(made.url))
    assert [item.provenance["key"] for item in found] == ["plain", "nan", "mark"]
    assert made.info["counts"] == {"row_unreadable": 4, "text_missing": 1}


def test_a_record_of_100_mb_is_refused_unread():
    raw = shards.RawSample(
        key="a", members={"jpg": jpeg(), "json": b'"' + bytes(100 * 2**20) + b'"'}
    )
    start = time.process_time()
    with pytest.raises(BadSample, match="json_invalid: 104857602 bytes"):
        shards.parse_record(raw)
    assert time.process_time() - start < SECONDS / 4


READ = """
import sys, time
from glipv2.data_prep.json_stream import items
from glipv2.pipeline.errors import DataError
start = time.process_time()
try:
    list(items(sys.argv[1], "annotations"))
except DataError as error:
    print(error)
print(time.process_time() - start)
"""


def test_an_annotation_without_end_is_given_up_within_a_gb(tmp_path):
    """Lists cost 30 times the memory of their two brackets."""
    path = tmp_path / "instances.json"
    path.write_bytes(b'{"annotations": [[' + b"[]," * 33_000_000)
    code, printed, memory = run_measured("-c", READ, path)
    path.unlink()
    message, seconds = printed.splitlines()
    assert code == 0 and "instances.json is not valid JSON" in message
    assert memory < GB, f"{memory / 1e6:.0f} MB"
    assert float(seconds) < 2 * SECONDS  # a busy machine doubles even CPU time


# ---- manifests ----


def test_a_manifest_of_another_set_or_an_older_one_is_refused(tmp_path, capsys):
    mine, other = str(tmp_path / "mine"), str(tmp_path / "other")
    old = shards.write_shard_set(mine, map(record, range(4)), CATEGORIES, {})
    shards.write_shard_set(other, map(record, range(4, 8)), CATEGORIES, {})
    assert storage.size(f"{mine}/shard-000000.tar") == storage.size(f"{other}/shard-000000.tar")
    kept = storage.read_bytes(f"{mine}/dataset.json")
    shutil.copy(f"{other}/dataset.json", f"{mine}/dataset.json")
    with pytest.raises(DataError, match=r"shard-000000\.json is not the commit record"):
        list(shards.iterate_records(mine))
    assert main(["check", mine, "--workers", "1"]) == 1
    assert "commit_other" in capsys.readouterr().out
    shutil.rmtree(mine)  # made again from other records, under the manifest of before
    shards.write_shard_set(mine, map(record, range(8, 12)), CATEGORIES, {})
    storage.write_bytes(f"{mine}/dataset.json", kept)
    assert shards.open_shard_set(mine) == old
    with pytest.raises(DataError, match=r"shard-000000\.json is not the commit record"):
        list(shards.iterate_records(mine))


@pytest.mark.parametrize("found", [b'{"x":1e999}', b'{"x":NaN}', b"[" * 5_000 + b"]" * 5_000])
def test_a_manifest_that_json_can_not_hold_is_refused(tmp_path, found):
    made = shards.write_shard_set(str(tmp_path), map(record, range(2)), CATEGORIES, {})
    path = tmp_path / "dataset.json"
    path.write_bytes(path.read_bytes().replace(b'"info":{}', b'"info":' + found))
    with pytest.raises(DataError, match="no shard set manifest"):
        shards.open_shard_set(made.url)
