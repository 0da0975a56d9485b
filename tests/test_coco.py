import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from glipv2.data_prep.coco import run_lengths
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.sources import open_source
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import DataError


def jpeg(size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (90, 120, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def annotation(bbox, category=7, **changes):
    return {"image_id": 1, "category_id": category, "bbox": bbox, "iscrowd": 0, **changes}


def opened(path, folder):
    return open_source(
        PrepareConfig(source="coco", annotations=(str(path),), images=(str(folder),))
    )


def read(tmp_path, annotations, images=None, categories=None):
    (tmp_path / "one.jpg").write_bytes(jpeg())
    document = {
        "images": images or [{"id": 1, "file_name": "one.jpg", "width": 40, "height": 30}],
        "annotations": annotations,
        "categories": categories or [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(document))
    dropped = Dropped()
    return list(opened(path, tmp_path).records(dropped)), dropped


def test_boxes_become_corners_and_category_ids_become_indices(tmp_path):
    (record,), dropped = read(tmp_path, [annotation([2, 3, 10, 5]), annotation([0, 0, 4, 4], 3)])
    assert [region.box for region in record.regions] == [(2, 3, 12, 8), (0, 0, 4, 4)]
    assert [(r.category, r.phrase) for r in record.regions] == [(1, "cat"), (0, "dog")]
    assert (record.key, record.task, dict(dropped)) == ("1", "detection", {})


def test_strangers_and_broken_boxes_are_counted_and_left_out(tmp_path):
    items = [
        annotation([1, 1, 5, 5], category=99),
        annotation([float("nan"), 1, 5, 5]),
        annotation([9, 9, -5, 5]),
        annotation([9, 9, 0, 5]),
        annotation([35, 9, 20, 5]),
        annotation([90, 9, 20, 5]),
        annotation("1 2 3 4"),
        annotation([1, 2, None, 4]),
    ]
    (record,), dropped = read(tmp_path, items)
    assert [region.box for region in record.regions] == [(35, 9, 40, 14)]
    assert dropped == {
        "category_unknown": 1,
        "box_not_finite": 1,
        "box_inverted": 1,
        "box_empty": 1,
        "box_clipped": 1,
        "box_outside": 1,
        "box_unreadable": 2,
    }
    assert dropped.first["category_unknown"] == "one.jpg"


def test_a_crowd_stays_and_says_so(tmp_path):
    mask = {"size": [30, 40], "counts": [100, 50, 1050]}
    crowd = annotation([3, 1, 5, 25], iscrowd=1, segmentation=mask)
    (record,), dropped = read(tmp_path, [crowd, annotation([1, 1, 5, 5])])
    assert [region.crowd for region in record.regions] == [True, False] and not dropped
    assert coco_mask.area(record.regions[0].mask) == 50


def test_polygons_and_both_run_length_forms_give_the_same_mask(tmp_path):
    polygon = [[2, 3, 12, 3, 12, 8, 2, 8]]
    (runs,) = coco_mask.frPyObjects(polygon, 30, 40)
    text = {"size": [30, 40], "counts": runs["counts"].decode()}
    flat = coco_mask.decode(runs).flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    plain = {"size": [30, 40], "counts": np.diff([0, *edges, flat.size]).tolist()}
    items = [annotation([2, 3, 10, 5], segmentation=s) for s in (polygon, text, plain)]
    (record,), dropped = read(tmp_path, items)
    assert [region.mask for region in record.regions] == [text] * 3 and not dropped


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1, 2, 3, 4]],  # pycocotools would take four numbers for a box
        [[1, 2, 3, 4, 5, float("nan")]],
        [[1, 2, 3, 4, 5, 10**400]],
        [["a", 2, 3, 4, 5, 6]],
        {"size": [30, 40], "counts": [5, 5]},
        {"size": [30, 40], "counts": [-5, 1205]},
        {"size": [30, 40], "counts": "ooooooooooooooooooooo"},
        {"size": [9, 9], "counts": [81]},
        {"counts": [1200]},
        "polygon",
    ],
)
def test_a_broken_mask_is_counted_and_the_box_stays(tmp_path, segmentation):
    (record,), dropped = read(tmp_path, [annotation([2, 3, 10, 5], segmentation=segmentation)])
    assert record.regions[0].box == (2, 3, 12, 8) and record.regions[0].mask is None
    assert dropped == {"mask_unreadable": 1}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_run_lengths_agree_with_pycocotools(height, width, seed, share):
    pixels = (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)
    runs = coco_mask.encode(np.asfortranarray(pixels))
    text = runs["counts"].decode()
    assert run_lengths({"size": [height, width], "counts": text}, width, height) == {
        "size": [height, width],
        "counts": text,
    }


def test_image_entries_that_point_nowhere_or_elsewhere_are_counted(tmp_path):
    entries = [
        {"id": 1, "file_name": "one.jpg"},
        {"id": 2, "file_name": "gone.jpg"},
        {"id": 3, "file_name": "../outside.jpg"},
        {"id": 4, "file_name": "/etc/hostname"},
        {"id": 5, "file_name": "one.jpg", "width": 30, "height": 40},
        {"id": 6},
        {"id": [7], "file_name": "one.jpg"},
        {"id": "1", "file_name": "one.jpg"},
        "one.jpg",
    ]
    records, dropped = read(tmp_path, [], entries)
    assert [record.key for record in records] == ["1"]
    assert dropped == {
        "no_boxes": 1,
        "image_missing": 1,
        "image_outside_folder": 2,
        "size_mismatch": 1,
        "row_unreadable": 3,
        "image_repeated": 1,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[" * 100_000, "not valid JSON"), ("[]", "not valid JSON"),
     ('{"images": [], "annotations": []}', "lacks the list categories"),
     ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "lacks its id or name"),
     ('{"images": [], "annotations": [], "categories": [{}]}', "lacks its id")],
)  # fmt: skip
def test_a_file_that_is_no_coco_file_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(DataError, match=f"broken.json.*{message}"):
        opened(path, tmp_path)


def test_what_the_user_named_must_be_there(tmp_path):
    with pytest.raises(DataError, match="gone.json does not exist"):
        opened(tmp_path / "gone.json", tmp_path)
    (tmp_path / "a.json").write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(DataError, match="image folder .*nowhere does not exist"):
        opened(tmp_path / "a.json", tmp_path / "nowhere")


def test_several_folders_are_searched_in_their_order(tmp_path):
    folders = [tmp_path / name for name in ("first", "second")]
    for shade, folder in enumerate(folders):
        folder.mkdir()
        (folder / "both.jpg").write_bytes(jpeg((40 + shade, 30)))
    (folders[1] / "late.jpg").write_bytes(jpeg((50, 30)))
    images = [{"id": 1, "file_name": "both.jpg"}, {"id": 2, "file_name": "late.jpg"}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    options = PrepareConfig(
        source="coco", annotations=(str(path),), images=tuple(map(str, folders))
    )
    assert [record.width for record in open_source(options).records(Dropped())] == [40, 50]
