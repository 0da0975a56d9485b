import pytest
from reader_helpers import average_precision, read, square, write_images, write_json

from glipv2.data_prep.sources import open_source
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import DataError

CATEGORIES = [
    {"id": 30, "name": "bow_(weapon)", "frequency": "r", "synonyms": ["bow_(weapon)"]},
    {"id": 10, "name": "aerosol_can", "frequency": "c", "synonyms": ["aerosol_can", "spray_can"]},
    {"id": 20, "name": "bow_(knot)", "frequency": "f"},
]
URL = "http://images.cocodataset.org/{}2017/{:012d}.jpg"


def image(number, **changes):
    return {
        "id": number,
        "coco_url": URL.format("train", number),
        "width": 40,
        "height": 30,
        "neg_category_ids": [30],
        "not_exhaustive_category_ids": [],
        **changes,
    }


def annotation(image_id, category, bbox, *polygons):
    return {
        "image_id": image_id,
        "category_id": category,
        "bbox": bbox,
        "area": bbox[2] * bbox[3],
        "segmentation": list(polygons) or [square(*bbox)],
    }


def lvis(tmp_path, images, annotations, categories=CATEGORIES):
    document = {"images": images, "annotations": annotations, "categories": categories}
    return write_json(tmp_path / "lvis.json", document)


def test_boxes_and_masks_score_one_against_their_source(tmp_path):
    write_images(tmp_path / "train2017", f"{1:012d}.jpg", f"{2:012d}.jpg")
    annotations = [
        annotation(1, 10, [2, 3, 12, 9]),
        annotation(1, 10, [20, 3, 15, 20], square(20, 3, 5, 20), square(30, 8, 5, 6)),
        annotation(1, 20, [5.5, 15.25, 10, 10]),
        annotation(2, 30, [0, 0, 40, 30], [0, 0, 40, 0, 20, 30]),
    ]
    path = lvis(tmp_path, [image(1), image(2)], annotations)
    records, dropped = read("lvis", path, images=[tmp_path / "train2017"])
    truth = [[item for item in annotations if item["image_id"] == number] for number in (1, 2)]
    for kind in ("bbox", "segm"):
        assert average_precision(truth, records, kind) == pytest.approx(1)
    assert not dropped and [record.key for record in records] == ["1", "2"]


def test_federated_ids_become_indices_and_categories_keep_frequency_and_synonyms(tmp_path):
    write_images(tmp_path / "val2017", f"{1:012d}.jpg")
    entry = image(1, neg_category_ids=[30, 10, 99], not_exhaustive_category_ids=[20])
    path = lvis(tmp_path, [entry], [annotation(1, 20, [1, 1, 9, 9])])
    (record,), _ = read("lvis", path, images=[tmp_path / "val2017"])
    assert record.provenance == {
        "source": "lvis",
        "file": URL.format("train", 1),
        "image_id": 1,
        "neg_categories": [0, 2],
        "not_exhaustive_categories": [1],
    }
    assert [(region.category, region.phrase) for region in record.regions] == [(1, "bow_(knot)")]
    options = PrepareConfig(source="lvis", annotations=(path,), images=(str(tmp_path),))
    source = open_source(options)
    assert source.categories == ("aerosol_can", "bow_(knot)", "bow_(weapon)")
    assert source.info == {
        "frequency": ["c", "f", "r"],
        "synonyms": [["aerosol_can", "spray_can"], [], ["bow_(weapon)"]],
    }


def test_images_are_found_by_file_name_or_url_in_any_folder(tmp_path):
    write_images(tmp_path / "coco", f"train2017/{1:012d}.jpg")
    write_images(tmp_path / "val2017", f"{2:012d}.jpg", f"{3:012d}.jpg")
    entries = [
        image(1),
        image(2, coco_url=URL.format("val", 2)),
        image(3, file_name=f"COCO_val2014_{3:012d}.jpg"),
        image(4),
        image(5, coco_url=None),
    ]
    records, dropped = read(
        "lvis", lvis(tmp_path, entries, []), images=[tmp_path / "coco", tmp_path / "val2017"]
    )
    assert [record.key for record in records] == ["1", "2", "3"]
    assert dropped == {"no_boxes": 3, "image_missing": 1, "row_unreadable": 1}


def test_broken_entries_are_counted(tmp_path):
    write_images(tmp_path, f"{1:012d}.jpg")
    name = f"{1:012d}.jpg"
    entries = [
        image(1, file_name=name),
        image(1, id="1", file_name=name),
        image(2, file_name=name, width=30),
        image(3, file_name="../" + name),
        image(4, file_name=name, neg_category_ids=None),
        image(5, file_name=name, not_exhaustive_category_ids=["10"]),
        {"id": None},
        image(1, id=""),
        "entry",
    ]
    annotations = [
        annotation(1, 77, [1, 1, 5, 5]),
        annotation(1, 10, [1, 1, 5, 5], [1, 2]),
        annotation(1, 10, [50, 1, 5, 5]),
    ]
    (record,), dropped = read("lvis", lvis(tmp_path, entries, annotations), images=[tmp_path])
    assert len(record.regions) == 1 and record.regions[0].mask is None
    assert dropped == {
        "image_repeated": 1,
        "size_mismatch": 1,
        "image_outside_folder": 1,
        "row_unreadable": 5,
        "category_unknown": 1,
        "mask_unreadable": 1,
        "box_outside": 1,
    }


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([{"id": 1, "name": "cat"}], "'cat' has no frequency.*read it as coco"),
        ([{"id": 1, "name": "cat", "frequency": "x"}], "no frequency r, c or f"),
        ([{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "two categories have the same id"),
        ([{"id": float("inf"), "name": "a"}], "lacks its id or name"),
        (["cat"], "lacks its id or name"),
    ],
)
def test_a_file_that_is_not_lvis_is_refused_by_name(tmp_path, categories, message):
    with pytest.raises(DataError, match=f"lvis.json.*{message}"):
        read("lvis", lvis(tmp_path, [], [], categories), images=[tmp_path])
