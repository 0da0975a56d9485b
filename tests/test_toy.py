import io
import time
from itertools import combinations

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from glipv2.data_prep.toy import GOLD_SETS, TOY_SETS, toy_categories, toy_record, toy_records
from glipv2.data_prep.toy_captions import plural
from glipv2.data_prep.toy_drawing import RGB, draw_scene
from glipv2.data_prep.toy_scene import NOVEL_NAMES, SEEN_NAMES, UNSEEN_NAMES, Thing, group_of
from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.record_json import parse_record, record_members
from glipv2.pipeline.shard_format import RawSample


def names_of(record):
    """Category of each region, from the phrase's last two words."""
    shapes = {plural(name.split()[1]): name.split()[1] for name in (*SEEN_NAMES, *NOVEL_NAMES)}
    words = [region.phrase.split()[-2:] for region in record.regions]
    return [f"{colour} {shapes.get(shape, shape)}" for colour, shape in words]


@pytest.mark.parametrize("set_name", TOY_SETS)
@pytest.mark.parametrize("hard", [False, True])
def test_every_record_can_be_stored_and_read_back(set_name, hard):
    categories = len(toy_categories(set_name)) or None
    for record in toy_records(set_name, 12, seed=5, size=64, hard=hard):
        raw = RawSample(key=record.key, members=record_members(record))
        assert parse_record(raw, categories) == record


def test_a_record_depends_on_set_seed_and_index_alone():
    one = list(toy_records("toy_val", 6, seed=1))
    assert toy_record("toy_val", 4, seed=1) == one[4]
    assert toy_record("toy_val", 4, seed=2).image != one[4].image
    assert toy_record("toy_grounding", 4, seed=1).image != one[4].image
    assert len({record.image for record in one}) == 6


def test_gold_sets_never_show_or_say_what_is_held_out():
    forbidden = {*UNSEEN_NAMES, *NOVEL_NAMES}
    for set_name in GOLD_SETS:
        for record in toy_records(set_name, 300, seed=3, size=48):
            assert not forbidden & set(names_of(record))
            assert "star" not in record.caption and "teal" not in record.caption
    assert not forbidden & set(toy_categories("toy_detection"))


def test_every_word_of_the_unseen_combinations_is_in_the_gold_data():
    seen = {word for name in SEEN_NAMES for word in name.split()}
    assert {word for name in UNSEEN_NAMES for word in name.split()} <= seen
    assert len(SEEN_NAMES) + len(UNSEEN_NAMES) == 36


def test_pairs_and_validation_oversample_unseen_and_hold_some_novel_words():
    groups = [
        set(record.provenance["groups"]) for record in toy_records("toy_val", 500, seed=1, size=48)
    ]
    flat = [
        group
        for record in toy_records("toy_val", 500, seed=1, size=48)
        for group in record.provenance["groups"]
    ]
    assert 0.35 < flat.count("unseen") / len(flat) < 0.5
    assert 0.06 < sum("novel_word" in group for group in groups) / 500 < 0.14


def test_the_truth_of_the_pairs_is_the_same_image_and_caption():
    pairs = list(toy_records("toy_pairs", 60, seed=2, size=64))
    truth = list(toy_records("toy_pairs_truth", 60, seed=2, size=64))
    for pair, true in zip(pairs, truth, strict=True):
        assert (pair.key, pair.image, pair.caption) == (true.key, true.image, true.caption)
        assert pair.task == "pairs" and pair.regions == () and true.regions
        assert "groups" not in pair.provenance  # nothing of the truth leaks
    assert any(true.provenance["omitted"] for true in truth)


def test_spans_are_exact_and_things_named_alike_share_one():
    shared = 0
    for record in toy_records("toy_val", 200, seed=4, size=48):
        for region in record.regions:
            (span,) = region.spans
            assert record.caption[slice(*span)] == region.phrase
        for first, second in combinations(range(len(record.regions)), 2):
            same = names_of(record)[first] == names_of(record)[second]
            a, b = record.regions[first], record.regions[second]
            assert (a.spans == b.spans) == same
            shared += same
        found = [toy_categories("toy_val")[region.category] for region in record.regions]
        assert found == names_of(record)
        assert [group_of(name) for name in found] == record.provenance["groups"]
    assert shared > 5


@pytest.mark.parametrize("hard", [False, True])
def test_boxes_bound_the_visible_masks(hard):
    for record in toy_records("toy_grounding", 40, seed=6, hard=hard):
        masks = [coco_mask.decode(region.mask) for region in record.regions]
        assert np.sum(masks, axis=0).max() == 1  # visible parts never overlap
        for region, mask in zip(record.regions, masks, strict=True):
            rows, columns = np.nonzero(mask)
            x0, y0, x1, y1 = region.box
            assert (columns.min(), rows.min()) == (x0, y0)
            assert (columns.max() + 1, rows.max() + 1) == (x1, y1)


def test_every_object_keeps_four_fifths_of_its_area_however_many_cover_it():
    look = {"colour": "red", "shape": "square", "texture": "plain", "size": "large"}
    things = [Thing(**look, diameter=0.35) for _ in range(12)]
    whole = (0.88 * 0.35 * 128) ** 2
    shares = []
    for seed in range(100):
        _, drawn = draw_scene(things, 128, False, np.random.default_rng(seed))
        shares += [float(coco_mask.area(item.mask)) / whole for item in drawn]
    assert 0.79 < min(shares) < 0.9  # 0.01 for rounding to pixels; some do overlap


def test_the_pixels_of_a_plain_object_have_the_colour_of_its_name():
    checked = 0
    for record in toy_records("toy_val", 80, seed=8):
        if "plain" not in record.caption:
            continue
        pixels = np.asarray(Image.open(io.BytesIO(record.image))).astype(float)
        for region in record.regions:
            if "plain" not in region.phrase:
                continue
            inside = pixels[coco_mask.decode(region.mask).astype(bool)]
            distance = {name: np.abs(np.median(inside, 0) - rgb).sum() for name, rgb in RGB.items()}
            assert min(distance, key=distance.get) == region.phrase.split()[-2]
            checked += 1
    assert checked > 5


def test_the_hard_world_has_smaller_and_more_objects():
    def shape_of(hard):
        records = list(toy_records("toy_detection", 150, seed=1, hard=hard))
        sides = [r.box[2] - r.box[0] for record in records for r in record.regions]
        return min(sides), max(len(record.regions) for record in records)

    (easy_side, easy_most), (hard_side, hard_most) = shape_of(False), shape_of(True)
    assert hard_side < 0.8 * easy_side and (easy_most, hard_most) == (4, 5)


def test_rendering_is_fast_enough_not_to_be_waited_for():
    started = time.process_time()
    count = sum(1 for _ in toy_records("toy_pairs", 150, seed=1))
    assert count / (time.process_time() - started) > 100  # 500 to 600 on an idle core


def test_an_unknown_set_or_size_is_refused_by_name():
    with pytest.raises(ConfigError, match="toy_vall.*toy_val"):
        next(toy_records("toy_vall", 1, seed=0))
    with pytest.raises(ConfigError, match="4 px"):
        next(toy_records("toy_val", 1, seed=0, size=4))
