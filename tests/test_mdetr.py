import pytest
from reader_helpers import average_precision, read, square, write_images, write_json

from glipv2.pipeline.errors import DataError

CAPTION = "A red ball beside two boxes ."
BALL, BOXES = [0, 10], [18, 27]


def annotation(image_id, bbox, *spans, **changes):
    return {
        "image_id": image_id,
        "category_id": 1,
        "iscrowd": 0,
        "bbox": bbox,
        "tokens_positive": list(spans),
        **changes,
    }


def mdetr(tmp_path, images, annotations):
    document = {
        "info": [],
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"supercategory": "object", "id": 1, "name": "object"}],
    }
    return write_json(tmp_path / "final_flickr.json", document)


def test_each_caption_is_a_record_with_its_spans_and_origin(tmp_path):
    write_images(tmp_path / "flickr", "77.jpg")
    write_images(tmp_path / "coco", f"{9:012d}.jpg")
    images = [
        # sizes as text, as MDETR's Flickr30k files have them
        {"id": 0, "file_name": "77.jpg", "width": "40", "height": "30", "caption": CAPTION,
         "dataset_name": "flickr", "sentence_id": 3, "original_img_id": 77,
         "tokens_negative": [[0, 29]], "tokens_positive_eval": [[BALL], [BOXES]]},
        {"id": 1, "file_name": f"COCO_train2014_{9:012d}.jpg", "width": 40, "height": 30,
         "caption": "red balls.", "dataset_name": "mixed", "data_source": "coco"},
    ]  # fmt: skip
    annotations = [
        annotation(0, [1, 2, 10, 10], BALL),
        annotation(0, [20, 2, 10, 10], BOXES),
        annotation(0, [21, 14, 9, 9], BOXES, BALL),
        annotation(1, [3, 3, 4, 4], [0, 9], segmentation=[square(3, 3, 4, 4)]),
    ]
    path = mdetr(tmp_path, images, annotations)
    records, dropped = read("mdetr", path, images=[tmp_path / "flickr", tmp_path / "coco"])
    assert not dropped
    first, second = records
    assert (first.task, first.caption) == ("grounding", CAPTION)
    assert [(region.box, region.spans, region.phrase) for region in first.regions] == [
        ((1, 2, 11, 12), ((0, 10),), "A red ball"),
        ((20, 2, 30, 12), ((18, 27),), "two boxes"),
        ((21, 14, 30, 23), ((0, 10), (18, 27)), "A red ball two boxes"),
    ]
    assert first.provenance == {
        "source": "mdetr",
        "file": "77.jpg",
        "image_id": 0,
        "dataset_name": "flickr",
        "original_img_id": 77,
        "sentence_id": 3,
        "tokens_positive_eval": [[[0, 10]], [[18, 27]]],
    }
    assert second.provenance["data_source"] == "coco"
    truth = [[item] for item in annotations[3:]]
    for kind in ("bbox", "segm"):
        assert average_precision(truth, [second], kind) == pytest.approx(1)


def test_a_caption_is_cleaned_and_its_spans_follow(tmp_path):
    write_images(tmp_path, "a.jpg")
    caption = "  A\x00 red\n\n ball  rolls. "
    span = [caption.index("red"), caption.index("rolls")]
    entry = {"id": 1, "file_name": "a.jpg", "caption": caption,
             "tokens_positive_eval": [[span], [[90, 95]], "x"]}  # fmt: skip
    path = mdetr(tmp_path, [entry], [annotation(1, [1, 2, 10, 10], span)])
    (record,), dropped = read("mdetr", path, images=[tmp_path])
    assert record.caption == "A red ball rolls."
    assert record.regions[0].phrase == "red ball"
    assert record.provenance["tokens_positive_eval"] == [[[2, 10]]]
    assert dropped == {"span_unusable": 1}


def test_broken_boxes_and_spans_are_counted(tmp_path):
    write_images(tmp_path, "a.jpg")
    annotations = [
        annotation(1, [1, 2, 10, 10], BALL, [20, 99], [5, 5]),
        annotation(1, [1, 2, 10, 10], [29, 35]),
        annotation(1, [1, 2, 10, 10]),
        annotation(1, [1, 2, 10, 10], tokens_positive=None),
        annotation(1, None, BALL),
        annotation(1, [float("nan"), 2, 10, 10], BALL),
        annotation(1, [35, 2, 10, 10], BOXES, segmentation=[[1, 2]]),
    ]
    entry = {"id": 1, "file_name": "a.jpg", "caption": CAPTION}
    (record,), dropped = read("mdetr", mdetr(tmp_path, [entry], annotations), images=[tmp_path])
    assert [region.box for region in record.regions] == [(1, 2, 11, 12), (35, 2, 40, 12)]
    assert record.regions[0].spans == ((0, 10),)
    assert dropped == {
        "span_unusable": 3,
        "span_missing": 3,
        "box_unreadable": 1,
        "box_not_finite": 1,
        "box_clipped": 1,
        "mask_unreadable": 1,
    }


def test_entries_that_can_not_be_used_are_counted(tmp_path):
    write_images(tmp_path, "a.jpg")
    entries = [
        {"id": 1, "file_name": "a.jpg", "caption": "..."},
        {"id": 2, "file_name": "a.jpg"},
        {"id": 3, "file_name": "gone.jpg", "caption": CAPTION},
        {"id": 4, "file_name": "a.jpg", "caption": CAPTION, "width": 41, "height": 30},
        {"id": 5, "file_name": "a.jpg", "caption": CAPTION},
        {"id": 5, "file_name": "a.jpg", "caption": CAPTION},
        {"id": 6, "caption": CAPTION},
    ]
    records, dropped = read("mdetr", mdetr(tmp_path, entries, []), images=[tmp_path])
    assert not records
    assert dropped == {
        "caption_empty": 1,
        "row_unreadable": 2,
        "image_missing": 1,
        "size_mismatch": 1,
        "boxes_missing": 1,
        "image_repeated": 1,
    }


@pytest.mark.parametrize("text", ["{", '{"images": []}', "[]", "7", '{"images": [,]}'])
def test_a_file_of_another_kind_is_refused_by_name(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(DataError, match="broken.json"):
        read("mdetr", str(path), images=[tmp_path])
