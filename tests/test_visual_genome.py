import pytest
from reader_helpers import average_precision, read, write_images, write_json

from glipv2.data_prep.sources import open_source
from glipv2.data_prep.visual_genome import MAX_CAPTION, pack_phrases
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import ConfigError, DataError

OBJECTS = [
    {"image_id": 1, "image_url": "https://x/VG_100K/1.jpg", "objects": [
        {"object_id": 5, "names": ["Tree."], "x": 0, "y": 3, "w": 20, "h": 12, "synsets": []},
        {"object_id": 6, "names": ["van", "car"], "x": -2, "y": -1, "w": 60, "h": 20},
        {"object_id": 7, "names": ["tree"], "x": 30, "y": 3, "w": 9, "h": 12}]},
    {"image_id": 2, "objects": []},
]  # fmt: skip
REGIONS = [
    {"id": 1, "regions": [
        {"region_id": 1, "image_id": 1, "phrase": "the clock is green ", "x": 1, "y": 2,
         "width": 8, "height": 9},
        {"region_id": 2, "image_id": 1, "phrase": "A man.", "x": 20, "y": 2,
         "width": 8, "height": 9},
        {"region_id": 3, "image_id": 1, "phrase": "a green clock", "x": 1, "y": 2,
         "width": 8, "height": 10},
        {"region_id": 4, "image_id": 1, "phrase": "A man", "x": 30, "y": 12,
         "width": 8, "height": 9}]},
]  # fmt: skip
IMAGES = [
    {"image_id": 1, "width": 40, "height": 30, "url": "https://x/VG_100K/1.jpg", "coco_id": 77},
    {"image_id": 2, "width": 40, "height": 30, "url": "https://x/VG_100K_2/2.jpg", "coco_id": None},
]


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "VG_100K", "1.jpg")
    write_images(tmp_path / "VG_100K_2", "2.jpg")
    return tmp_path


def test_objects_become_detection_records(folder):
    objects = write_json(folder / "objects.json", OBJECTS)
    images = write_json(folder / "image_data.json", IMAGES)
    (first, second), dropped = read("visual-genome", images, objects, images=[folder])
    assert [(r.box, r.phrase, r.category) for r in first.regions] == [
        ((0, 3, 20, 15), "tree", 0),
        ((0, 0, 40, 19), "van", 1),
        ((30, 3, 39, 15), "tree", 0),
    ]
    assert first.task == second.task == "detection"
    assert first.provenance == {
        "source": "visual-genome",
        "file": "1.jpg",
        "image_id": 1,
        "coco_id": 77,
    }
    assert "coco_id" not in second.provenance
    assert dropped == {"box_clipped": 1, "no_boxes": 1}
    truth = [{"bbox": [0, 3, 20, 12]}, {"bbox": [0, 0, 40, 19]}, {"bbox": [30, 3, 9, 12]}]
    numbered = [{**item, "category_id": c} for item, c in zip(truth, (1, 2, 1), strict=True)]
    assert average_precision([numbered], [first], "bbox") == pytest.approx(1)


def test_names_of_too_few_objects_are_no_categories(folder):
    objects = write_json(folder / "objects.json", OBJECTS)
    (first, _), dropped = read("visual-genome", objects, images=[folder], min_count=2)
    assert [region.phrase for region in first.regions] == ["tree", "tree"]
    assert dropped == {"category_rare": 1, "no_boxes": 1}
    with pytest.raises(DataError, match="objects.json: no name has 3 objects; lower min_count"):
        read("visual-genome", objects, images=[folder], min_count=3)
    with pytest.raises(ConfigError, match="min_count"):
        read("visual-genome", objects, images=[folder], min_count=0)


def test_phrases_are_packed_into_captions_that_name_each_place_once(folder):
    regions = write_json(folder / "region_descriptions.json", REGIONS)
    (first, second), dropped = read("visual-genome", regions, images=[folder / "VG_100K"])
    assert not dropped
    assert first.caption == "the clock is green. A man."
    assert [(r.box, r.spans, r.phrase) for r in first.regions] == [
        ((1, 2, 9, 11), ((0, 18),), "the clock is green"),
        ((20, 2, 28, 11), ((20, 25),), "A man"),
        ((30, 12, 38, 21), ((20, 25),), "A man"),
    ]
    assert (second.caption, len(second.regions)) == ("a green clock.", 1)
    for record in (first, second):
        for region in record.regions:
            assert [record.caption[a:b] for a, b in region.spans] == [region.phrase]


def test_captions_are_as_long_as_they_may_be_and_no_longer():
    words = [f"phrase number {number:03d}" for number in range(100)]  # 17 characters and ". "
    phrases = {text: [[2.0 * n, 0, 2.0 * n + 1, 1]] for n, text in enumerate(words)}
    captions = pack_phrases(phrases)
    assert [text for caption in captions for text in caption] == words
    lengths = [len(". ".join(caption) + ".") for caption in captions]
    assert set(lengths[:-1]) == {13 * 19 - 1} and max(lengths) <= MAX_CAPTION
    same_place = {text: [[0, 0, 1, 1]] for text in words}
    assert len(pack_phrases(same_place)) == 100


def test_a_caption_leaves_out_phrases_without_a_usable_box(folder):
    def region(phrase, x=1, **changes):
        return {"phrase": phrase, "x": x, "y": 2, "width": 3, "height": 4, **changes}

    regions = [
        region("off the picture", x=50),
        region("a dog", x=38),
        region("no width", x=10, width=None),
        region("empty", x=20, height=0),
        region(" . ", x=1),
        region(None, x=5),
        "region",
        region("a cat", x=1),
        region("long " * 100, x=12),
    ]
    path = write_json(folder / "r.json", [{"id": 1, "regions": regions}])
    (first, second), dropped = read("visual-genome", path, images=[folder])
    assert first.caption == "a dog. a cat."
    assert len(second.caption) <= MAX_CAPTION and second.caption.endswith("long.")
    assert dropped == {
        "box_outside": 1,
        "box_clipped": 1,
        "box_unreadable": 1,
        "box_empty": 1,
        "phrase_empty": 3,
        "caption_cut": 1,
    }


def test_broken_entries_are_counted(folder):
    objects = [
        {"image_id": 1, "objects": [{"names": []}, {"names": "dog"}, 3, {"x": 1}]},
        {"image_id": 1, "objects": []},
        {"image_id": "2", "objects": []},
        {"image_id": 2, "objects": None},
        {"image_id": 3, "objects": [{"names": ["dog"], "x": 1, "y": 1, "w": 5, "h": 5}]},
        {"image_id": 4, "objects": [{}] * 1001},
        None,
    ]
    regions = [{"id": 2, "regions": [{"phrase": "x", "x": 1, "y": 1, "width": 0, "height": 1}]}]
    images = [{**IMAGES[0], "width": 41}]
    files = [
        write_json(folder / f"{n}.json", value)
        for n, value in enumerate((objects, regions, images))
    ]
    records, dropped = read("visual-genome", *files, images=[folder])
    assert not records
    assert dropped == {
        "size_mismatch": 1,
        "image_repeated": 1,
        "row_unreadable": 3,
        "image_missing": 1,
        "boxes_too_many": 1,
        "box_empty": 1,
        "boxes_missing": 1,
    }


def test_objects_and_regions_may_be_given_together(folder):
    objects = write_json(folder / "objects.json", OBJECTS)
    regions = write_json(folder / "regions.json", REGIONS)
    records, _ = read("visual-genome", regions, objects, images=[folder])
    assert [record.task for record in records] == ["detection"] * 2 + ["grounding"] * 2
    options = PrepareConfig(
        source="visual-genome", annotations=(objects, regions), images=(str(folder),)
    )
    other = PrepareConfig(
        source="visual-genome", annotations=(regions, objects), images=(str(folder),)
    )
    assert open_source(options).content == open_source(other).content


def test_files_without_boxes_are_refused(folder):
    images = write_json(folder / "image_data.json", IMAGES)
    with pytest.raises(DataError, match="image_data.json names no boxes"):
        read("visual-genome", images, images=[folder])
    graphs = write_json(folder / "scene_graphs.json", [{"relationships": []}])
    with pytest.raises(DataError, match="scene_graphs.json is none of the files"):
        read("visual-genome", graphs, images=[folder])
