import pytest
from pycocotools import mask as coco_mask
from reader_helpers import average_precision, read, square, write_images, write_json

from glipv2.pipeline.errors import DataError


def points(*flat):
    return [[flat[n], flat[n + 1]] for n in range(0, len(flat), 2)]


def task(phrase, boxes, polygons, image=5, **changes):
    return {
        "task_id": f"{image}__{len(boxes)}",
        "image_id": image,
        "ann_ids": list(range(len(boxes))),
        "instance_boxes": boxes,
        "Polygons": polygons,
        "phrase": phrase,
        "phrase_structure": {"name": phrase},
        **changes,
    }


def test_a_phrase_has_all_instances_and_each_mask_all_its_polygons(tmp_path):
    write_images(tmp_path / "VG_100K_2", "5.jpg")
    tasks = [
        task("white dogs", [[1, 2, 10, 12], [20, 3, 15, 20]],
             [[points(*square(1, 2, 10, 12))],
              [points(*square(20, 3, 5, 20)), points(*square(30, 8, 5, 6)), points(1, 1, 2, 2)]]),
        task("wall", [[0, 0, 40, 30]], [[points(0, 0, 40, 0, 20, 30)]]),
    ]  # fmt: skip
    size = [{"image_id": 5, "width": 40, "height": 30, "coco_id": 99, "split": "val"}]
    refer = write_json(tmp_path / "refer_val.json", tasks)
    sizes = write_json(tmp_path / "image_data_split.json", size)
    records, dropped = read("phrasecut", sizes, refer, images=[tmp_path])
    assert not dropped
    assert [record.caption for record in records] == ["white dogs", "wall"]
    assert records[0].provenance == {
        "source": "phrasecut",
        "file": "5.jpg",
        "image_id": 5,
        "task_id": "5__2",
        "coco_id": 99,
    }
    assert {region.spans for region in records[0].regions} == {((0, 10),)}
    assert coco_mask.area(records[0].regions[1].mask) == 5 * 20 + 5 * 6
    truth = [
        [{"bbox": [1, 2, 10, 12], "segmentation": [square(1, 2, 10, 12)]},
         {"bbox": [20, 3, 15, 20], "segmentation": [square(20, 3, 5, 20), square(30, 8, 5, 6)]}],
        [{"bbox": [0, 0, 40, 30], "segmentation": [[0, 0, 40, 0, 20, 30]]}],
    ]  # fmt: skip
    for kind in ("bbox", "segm"):
        assert average_precision(truth, records, kind) == pytest.approx(1)


def test_broken_phrases_are_counted(tmp_path):
    write_images(tmp_path / "images", "5.jpg")
    box, polygon = [1, 2, 10, 12], [points(*square(1, 2, 10, 12))]
    tasks = [
        task("no letters is fine not", [box], [polygon], image="5"),
        task("12", [box], [polygon]),
        task("no boxes", [], []),
        task("boxes missing", [box], [polygon], instance_boxes=None),
        task("fewer polygons than boxes", [box, [20, 2, 5, 5]], [polygon]),
        task("points only", [box], [[points(1, 2, 3, 4)]]),
        task("no polygons", [box], None),
        task("text for a point", [box], [[["1", "2"], ["3", "4"], ["5", "6"]]]),
        task("outside", [[50, 2, 5, 5]], [polygon]),
        task("no image", [box], [polygon], image=6),
        "task",
    ]
    refer = write_json(tmp_path / "refer_train.json", tasks)
    records, dropped = read("phrasecut", refer, images=[tmp_path])
    assert [(r.caption, [g.mask for g in r.regions]) for r in records] == [
        ("fewer polygons than boxes", [None, None]),
        ("points only", [None]),
        ("no polygons", [None]),
        ("text for a point", [None]),
    ]
    assert dropped == {
        "row_unreadable": 3,
        "caption_empty": 1,
        "boxes_missing": 2,
        "mask_unreadable": 3,
        "box_outside": 1,
        "image_missing": 1,
    }


def test_an_image_of_another_size_is_left_out(tmp_path):
    write_images(tmp_path, "5.jpg")
    refer = write_json(tmp_path / "refer.json", [task("dog", [[1, 1, 5, 5]], [])])
    sizes = write_json(tmp_path / "data.json", [{"image_id": 5, "width": 80, "height": 60}])
    records, dropped = read("phrasecut", refer, sizes, images=[tmp_path])
    assert not records and dropped == {"size_mismatch": 1}


def test_the_form_of_mdetr_is_read_as_referring(tmp_path):
    write_images(tmp_path, "5.jpg")
    document = {
        "images": [{"id": 0, "file_name": "5.jpg", "height": 30, "width": 40, "original_id": 5,
                    "caption": "white dog", "dataset_name": "phrasecut", "task_id": "5__1"}],
        "annotations": [{"id": 0, "image_id": 0, "category_id": 1, "bbox": [1, 2, 10, 12],
                         "segmentation": [square(1, 2, 10, 12)], "tokens_positive": [[0, 9]]}],
        "categories": [{"id": 1, "name": "object"}],
    }  # fmt: skip
    path = write_json(tmp_path / "finetune_phrasecut_val.json", document)
    (record,), dropped = read("phrasecut", path, images=[tmp_path])
    assert (record.task, record.provenance["task_id"]) == ("referring", "5__1") and not dropped
    assert coco_mask.area(record.regions[0].mask) == 120


def test_sizes_alone_are_refused(tmp_path):
    sizes = write_json(tmp_path / "data.json", [{"image_id": 5, "width": 40, "height": 30}])
    with pytest.raises(DataError, match="data.json: give refer_SPLIT.json"):
        read("phrasecut", sizes, images=[tmp_path])
