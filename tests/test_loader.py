import io
import itertools
import json
import uuid
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from glipv2.model.batch import NO_CATEGORY, NO_WORD, UNKNOWN_MASK
from glipv2.model.tokenizer import Tokenizer, tiny_vocab
from glipv2.pipeline import shards
from glipv2.pipeline.collate import text_length
from glipv2.pipeline.config import DataConfig
from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.loader import build_loader, lane_count
from glipv2.pipeline.masking import IGNORE
from glipv2.pipeline.position import Position
from glipv2.pipeline.records import Record, Region

COLOURS, SHAPES = ("red", "blue", "green", "yellow"), ("square", "circle", "triangle")
CATEGORIES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
DATA = DataConfig(
    mixture={"detection": 1.0, "grounding": 1.0},
    short_sides=(64, 96),
    long_side=128,
    max_negatives=4,
    caption_packing=0.6,
    max_packed_captions=3,
    pack_gold_captions=True,
    lanes=4,
    unit_samples=4,
)


def picture(number, size=(80, 60), box=(10, 20, 40, 50)):
    """A JPEG whose box is white on a dark ground."""
    image = Image.new("RGB", size, (number % 60, 20, 40))
    ImageDraw.Draw(image).rectangle(box, fill="white")
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def detection(number):
    return Record(
        key=f"d{number:04d}",
        image=picture(number),
        image_format="jpg",
        width=80,
        height=60,
        task="detection",
        regions=(Region(box=(10.0, 20.0, 41.0, 51.0), category=number % len(CATEGORIES)),),
    )


def grounding(number, caption=None, phrase=None, task="grounding"):
    phrase = phrase or CATEGORIES[number % len(CATEGORIES)]
    caption = caption or f"a picture of a {phrase} and number {number}"
    start = caption.index(phrase)
    span = (start, start + len(phrase))
    return Record(
        key=f"g{number:04d}",
        image=picture(number),
        image_format="jpg",
        width=80,
        height=60,
        task=task,
        caption=caption,
        regions=(Region(box=(10.0, 20.0, 41.0, 51.0), spans=(span,), phrase=phrase),),
    )


def make_sets(folder):
    return {
        "detection": shards.write_shard_set(
            f"{folder}/detection", map(detection, range(40)), CATEGORIES, {}, 16
        ),
        "grounding": shards.write_shard_set(
            f"{folder}/grounding", map(grounding, range(40)), [], {}, 16
        ),
    }


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return make_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_vocab(tiny_vocab(), 64)


def take(loader, count, position=None):
    return list(itertools.islice(loader.batches(position or loader.start()), count))


def assert_equal(one, two):
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype, field.name
            assert torch.equal(a, b), field.name
        else:
            assert a == b, field.name


def words(tokenizer, ids):
    return [tokenizer.vocabulary[i] for i in ids]


def test_a_batch_has_the_agreed_shapes_and_types(sets, tokenizer):
    for batch, _ in take(build_loader(DATA, 8, sets, tokenizer), 5):
        B, N, T = batch.positive_BNT.shape
        assert (B, T % 16) == (8, 0)
        assert batch.images_B3HW.dtype == torch.uint8
        assert batch.images_B3HW.shape[:2] == (8, 3)
        assert [side % 32 for side in batch.images_B3HW.shape[2:]] == [0, 0]
        assert batch.sizes_B2.shape == (8, 2)
        assert batch.boxes_BN4.shape == (B, N, 4)
        for name in ("tokens", "mlm_labels", "token_category"):
            assert getattr(batch, f"{name}_BT").shape == (B, T)
            assert getattr(batch, f"{name}_BT").dtype == torch.int64
        assert batch.box_category_BN.dtype == torch.int64
        assert batch.boxes_BN4.dtype == torch.float32
        assert (
            batch.token_mask_BT.sum(1).tolist()
            == (batch.tokens_BT != tokenizer.pad_id).sum(1).tolist()
        )
        assert len(batch.keys) == 8


def test_boxes_stay_on_their_object_through_resize_and_flip(sets, tokenizer):
    flipped = Counter()
    for batch, _ in take(build_loader(DATA, 8, sets, tokenizer), 10):
        for row in range(8):
            height, width = batch.sizes_B2[row].tolist()
            white_HW = batch.images_B3HW[row, :, :height, :width].min(0).values > 128
            rows, columns = white_HW.any(1).nonzero(), white_HW.any(0).nonzero()
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.allclose(batch.boxes_BN4[row, 0].tolist(), found, atol=1.6)
            flipped[bool(found[0] > width * 0.3)] += 1
            assert min(height, width) in (64, 96)
    assert min(flipped.values()) > 15


def test_the_named_tokens_are_the_words_of_the_box(sets, tokenizer):
    plain = replace(DATA, mlm_probability=0.0)
    for batch, _ in take(build_loader(plain, 8, sets, tokenizer), 10):
        for row, key in enumerate(batch.keys):
            named = batch.tokens_BT[row, batch.positive_BNT[row, 0]].tolist()
            number = int(key[-4:]) % len(CATEGORIES)
            assert " ".join(words(tokenizer, named)) == CATEGORIES[number]


def test_categories_carry_shared_ids_and_captions_none(sets, tokenizer):
    plain = replace(DATA, mlm_probability=0.0)
    vocabulary = sorted(CATEGORIES)
    for batch, _ in take(build_loader(plain, 8, sets, tokenizer), 10):
        for row, key in enumerate(batch.keys):
            if key.startswith("grounding/"):
                assert batch.box_category_BN[row].unique().tolist() == [NO_CATEGORY]
                assert batch.token_category_BT[row].unique().tolist() == [NO_WORD]
                continue
            own = CATEGORIES[int(key[-4:]) % len(CATEGORIES)]
            assert batch.box_category_BN[row, 0] == vocabulary.index(own)
            for category in batch.token_category_BT[row].unique().tolist():
                if category != NO_WORD:
                    ids = batch.tokens_BT[row, batch.token_category_BT[row] == category].tolist()
                    assert " ".join(words(tokenizer, ids)) == vocabulary[category]


def test_equal_names_in_two_sets_share_an_id(tmp_path, tokenizer):
    def one_set(name, categories):
        record = replace(detection(0), regions=(Region(box=(1.0, 1.0, 9.0, 9.0), category=1),))
        records = [replace(record, key=f"k{n}") for n in range(8)]
        return shards.write_shard_set(str(tmp_path / name), records, categories, {})

    sets = {"a": one_set("a", ["red_square", "cat"]), "b": one_set("b", ["dog", "red square"])}
    data = replace(DATA, mixture={"a": 1.0, "b": 1.0})
    loader = build_loader(data, 4, sets, tokenizer)
    ids = {source: own.ids for source, own in loader.prepare.categories.items()}
    assert ids == {"a": (2, 0), "b": (1, 2)}


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches_and_positions(sets, tokenizer, workers):
    alone = take(build_loader(DATA, 8, sets, tokenizer), 4)
    served = build_loader(replace(DATA, workers=workers), 8, sets, tokenizer)
    start = alone[0][1]
    for (one, here), (two, there) in zip(alone[1:], take(served, 3, start), strict=True):
        assert_equal(one, two)
        assert here == there


def test_a_users_error_in_a_worker_keeps_its_message(sets, tokenizer):
    served = build_loader(replace(DATA, workers=1), 8, sets, tokenizer)
    other = build_loader(DATA, 8, sets, tokenizer, seed=1).start()
    with pytest.raises(ConfigError, match=r"^this run stopped at step 0 with another seed"):
        take(served, 1, other)


def test_resuming_gives_the_same_batches(sets, tokenizer):
    loader = build_loader(DATA, 8, sets, tokenizer, seed=3)
    whole = take(loader, 6)
    again = take(build_loader(DATA, 8, sets, tokenizer, seed=3), 3, whole[2][1])
    for (one, here), (two, there) in zip(whole[3:], again, strict=True):
        assert_equal(one, two)
        assert here == there


@pytest.mark.parametrize("workers", [0, 2])
def test_two_resumes_with_no_step_in_between_change_nothing(sets, tokenizer, workers):
    """What was made ahead of training, and never used, is forgotten."""
    served = replace(DATA, workers=workers)
    whole = take(build_loader(DATA, 8, sets, tokenizer, seed=3), 5)
    position = whole[1][1]
    for _ in range(2):
        begun = build_loader(served, 8, sets, tokenizer, seed=3).batches(position)
        next(begun)
        begun.close()
        position = Position.from_dict(json.loads(json.dumps(position.to_dict())))
    again = take(build_loader(served, 8, sets, tokenizer, seed=3), 3, position)
    for (one, here), (two, there) in zip(whole[2:], again, strict=True):
        assert_equal(one, two)
        assert here == there


def test_ranks_split_the_same_global_batch(sets, tokenizer):
    pinned = replace(DATA, pad_to=(128, 128))
    (alone, _), *_ = take(build_loader(pinned, 8, sets, tokenizer), 1)
    for rank in range(2):
        (share, _), *_ = take(build_loader(pinned, 8, sets, tokenizer, rank, 2), 1)
        rows = [0, 1, 4, 5] if rank == 0 else [2, 3, 6, 7]
        assert share.keys == [alone.keys[row] for row in rows]
        assert torch.equal(share.images_B3HW, alone.images_B3HW[rows])
        assert torch.equal(share.sizes_B2, alone.sizes_B2[rows])


def test_the_whole_path_works_on_memory_urls(tokenizer):
    sets = make_sets(f"memory://{uuid.uuid4().hex}")
    (batch, _), *_ = take(build_loader(DATA, 8, sets, tokenizer), 1)
    assert len(batch.keys) == 8
    with pytest.raises(ConfigError, match=r"memory.*set data\.workers to 0"):
        build_loader(replace(DATA, workers=1), 8, sets, tokenizer)


def test_an_image_that_does_not_decode_is_skipped_and_reported(tmp_path, tokenizer):
    records = list(map(detection, range(24)))
    raws = [shards.RawSample(key=r.key, members=shards.record_members(r)) for r in records]
    whole = raws[5].members["jpg"]
    raws[5] = replace(raws[5], members={**raws[5].members, "jpg": whole[: len(whole) // 2]})
    shard = shards.write_raw_shard(str(tmp_path), "shard-000000", raws)
    sets = {"detection": shards.write_manifest(str(tmp_path), [shard], CATEGORIES, {})}
    bad = []
    data = replace(DATA, mixture={"detection": 1.0}, max_bad_share=0.5)
    loader = build_loader(data, 8, sets, tokenizer, on_bad=lambda *args: bad.append(args))
    keys = [key for batch, _ in take(loader, 3) for key in batch.keys]
    assert len(keys) == 24
    assert "detection/d0005" not in keys
    assert [(s, k, why.reason) for s, _, k, why in bad][0] == (
        "detection",
        "d0005",
        "image_undecodable",
    )


def test_unlabelled_pairs_are_refused_with_the_cure(tmp_path, tokenizer):
    records = [replace(grounding(n), task="pairs", regions=()) for n in range(8)]
    sets = {"web": shards.write_shard_set(str(tmp_path), records, [], {})}
    with pytest.raises(ConfigError, match="web holds records of task pairs .*glipv2 label"):
        build_loader(replace(DATA, mixture={"web": 1.0}), 4, sets, tokenizer)


def test_a_padding_that_pictures_may_not_fit_is_refused(sets, tokenizer):
    with pytest.raises(ConfigError, match=r"data\.pad_to \(64, 128\) must be at least"):
        build_loader(replace(DATA, pad_to=(64, 128)), 8, sets, tokenizer)


def test_lanes_default_to_the_largest_divisor_of_the_batch_up_to_64():
    free = replace(DATA, lanes=None)
    assert [lane_count(free, batch, 1) for batch in (8, 64, 96, 30, 256)] == [8, 64, 48, 30, 64]
    with pytest.raises(ConfigError, match="3 ranks can't share 8 lanes equally: start 2 ranks"):
        lane_count(free, 8, 3)


def test_a_box_whose_words_were_cut_off_is_dropped(tmp_path, tokenizer):
    caption = "a red square " + "and a blue circle " * 40 + "and a dog"
    records = [replace(grounding(n, caption, "dog"), key=f"far{n}") for n in range(8)] + [
        replace(grounding(n, caption, "red square"), key=f"near{n}") for n in range(8)
    ]
    sets = {"long": shards.write_shard_set(str(tmp_path), records, [], {})}
    loader = build_loader(replace(DATA, mixture={"long": 1.0}), 4, sets, tokenizer)
    for batch, _ in take(loader, 4):
        assert batch.tokens_BT.shape[1] == tokenizer.max_tokens
        boxes = batch.box_mask_BN.sum(1).tolist()
        assert boxes == [int(key.startswith("long/near")) for key in batch.keys]
        assert bool(batch.positive_BNT.any(2).eq(batch.box_mask_BN).all())


def test_only_positive_names_and_own_captions_are_ever_masked(sets, tokenizer):
    hiding = replace(DATA, mlm_probability=1.0)
    for batch, _ in take(build_loader(hiding, 8, sets, tokenizer), 6):
        predicted_BT = batch.mlm_labels_BT != IGNORE
        for row, key in enumerate(batch.keys):
            ids = batch.mlm_labels_BT[row, predicted_BT[row]].tolist()
            number = int(key[-4:])
            if key.startswith("detection/"):
                assert torch.equal(predicted_BT[row], batch.positive_BNT[row, 0])
                assert " ".join(words(tokenizer, ids)) == CATEGORIES[number % len(CATEGORIES)]
            else:
                caption = tokenizer.encode(grounding(number).caption)
                assert ids == caption.ids[1:-1]


def test_texts_are_padded_to_few_lengths():
    assert [text_length(n, 256) for n in (2, 16, 17, 32, 33, 65, 256)] == [
        16, 16, 32, 32, 64, 96, 256,
    ]  # fmt: skip
    assert text_length(150, 160) == 160
    assert text_length(10, 12) == 12


def white_pixels(size=(80, 60), box=(10, 20, 40, 50)):
    """The mask of the left half of the white box of `picture`, as run lengths."""
    mask_HW = np.zeros((size[1], size[0]), dtype=np.uint8, order="F")
    mask_HW[box[1] : box[3] + 1, box[0] : (box[0] + box[2] + 1) // 2] = 1
    runs = coco_mask.encode(mask_HW)
    return {"size": [int(side) for side in runs["size"]], "counts": runs["counts"].decode()}


@pytest.fixture(scope="module")
def masked_sets(tmp_path_factory):
    """Every third box has no mask."""

    def with_mask(record, number):
        mask = white_pixels() if number % 3 else None
        return replace(record, regions=(replace(record.regions[0], mask=mask),))

    url = str(tmp_path_factory.mktemp("masked"))
    records = [with_mask(detection(number), number) for number in range(24)]
    return {"detection": shards.write_shard_set(url, records, CATEGORIES, {}, 16)}


def test_masks_come_in_the_frame_of_their_box_flipped_with_the_picture(masked_sets, tokenizer):
    data = replace(DATA, mixture={"detection": 1.0})
    sides = Counter()
    for batch, _ in take(build_loader(data, 8, masked_sets, tokenizer, masks=True), 6):
        assert batch.masks_BNSS.dtype == torch.uint8
        assert batch.masks_BNSS.shape[:2] == batch.box_mask_BN.shape
        for row, key in enumerate(batch.keys):
            mask_SS = batch.masks_BNSS[row, 0]
            if int(key[-4:]) % 3 == 0:
                assert bool((mask_SS == UNKNOWN_MASK).all())
                continue
            side = len(mask_SS) // 2
            flipped = batch.boxes_BN4[row, 0, 0] > batch.sizes_B2[row, 1] * 0.3
            near, far = (mask_SS[:, side:], mask_SS[:, :side])[:: 1 if flipped else -1]
            assert near[:, 1:-1].float().mean() == 1
            assert far[:, 1:-1].float().mean() == 0
            sides[bool(flipped)] += 1
    assert min(sides.values()) > 8


def test_masks_are_left_out_unless_asked_for(masked_sets, tokenizer):
    data = replace(DATA, mixture={"detection": 1.0})
    (batch, _), *_ = take(build_loader(data, 8, masked_sets, tokenizer), 1)
    assert batch.masks_BNSS is None


def test_masks_from_workers_are_the_same(masked_sets, tokenizer):
    data = replace(DATA, mixture={"detection": 1.0})
    (alone, _), *_ = take(build_loader(data, 8, masked_sets, tokenizer, masks=True), 1)
    served = build_loader(replace(data, workers=1), 8, masked_sets, tokenizer, masks=True)
    assert_equal(alone, take(served, 1)[0][0])


def test_a_sample_with_a_broken_mask_is_skipped_and_reported(tmp_path, tokenizer):
    records = [replace(detection(number), key=f"d{number:04d}") for number in range(16)]
    broken = replace(records[5].regions[0], mask={"size": [60, 80], "counts": "12"})
    records[5] = replace(records[5], regions=(broken,))
    sets = {"detection": shards.write_shard_set(str(tmp_path), records, CATEGORIES, {}, 16)}
    data = replace(DATA, mixture={"detection": 1.0}, max_bad_share=0.5)
    bad = []
    loader = build_loader(
        data, 8, sets, tokenizer, on_bad=lambda *args: bad.append(args), masks=True
    )
    keys = [key for batch, _ in take(loader, 2) for key in batch.keys]
    assert "detection/d0005" not in keys
    assert [(key, why.reason) for _, _, key, why in bad][:1] == [("d0005", "mask_invalid")]


def test_a_dropped_region_takes_its_mask_along(tmp_path, tokenizer):
    caption = "a red square " + "and a blue circle " * 40 + "and a dog"
    far, near = (grounding(0, caption, phrase).regions[0] for phrase in ("dog", "red square"))
    record = replace(
        grounding(0, caption, "dog"), regions=(far, replace(near, mask=white_pixels()))
    )
    records = [replace(record, key=f"k{number}") for number in range(4)]
    sets = {"long": shards.write_shard_set(str(tmp_path), records, [], {})}
    data = replace(DATA, mixture={"long": 1.0})
    (batch, _), *_ = take(build_loader(data, 4, sets, tokenizer, masks=True), 1)
    assert batch.masks_BNSS.shape[1] == 1
    assert batch.masks_BNSS.unique().tolist() == [0, 1]


@pytest.mark.parametrize("accumulation", [2, 4])
def test_micro_batches_are_the_share_of_a_step_in_order_and_padded_by_themselves(
    sets, tokenizer, accumulation
):
    for rank in (0, 1):
        whole = build_loader(DATA, 8, sets, tokenizer, rank=rank, world_size=2)
        parted = build_loader(
            DATA, 8, sets, tokenizer, rank=rank, world_size=2, accumulation=accumulation
        )
        steps = list(itertools.islice(parted.steps(parted.start()), 5))
        sizes = set()
        for (batch, here), (micro_batches, there) in zip(take(whole, 5), steps, strict=True):
            assert sum((micro.keys for micro in micro_batches), []) == batch.keys
            assert {len(micro.keys) for micro in micro_batches} == {4 // accumulation}
            assert len(micro_batches) == accumulation
            assert here == there
            rows = zip(
                [(micro, row) for micro in micro_batches for row in range(len(micro.keys))],
                range(4),
                strict=True,
            )
            for (micro, row), place in rows:
                height, width = micro.sizes_B2[row].tolist()
                assert torch.equal(
                    micro.images_B3HW[row, :, :height, :width],
                    batch.images_B3HW[place, :, :height, :width],
                )
            for micro in micro_batches:
                padded = tuple(micro.images_B3HW.shape[2:])
                longest = micro.sizes_B2.max(dim=0).values.tolist()
                assert padded == tuple(-(-side // 32) * 32 for side in longest)
                sizes.add(padded)
        assert len(sizes) > 1
