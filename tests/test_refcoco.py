import pickle
from collections import Counter

import pytest
from reader_helpers import average_precision, read, square, write_images, write_json

from glipv2.pipeline.errors import ConfigError, DataError

NAME = "COCO_train2014_000000000007.jpg"


def sentence(number, text):
    words = text.split()
    return {"sent_id": number, "sent": text, "raw": text.title(), "tokens": words}


def ref(number, annotation, split, *sentences, image=7):
    return {
        "ref_id": number,
        "ann_id": annotation,
        "image_id": image,
        "category_id": 1,
        "file_name": NAME.replace(".jpg", f"_{annotation}.jpg"),
        "split": split,
        "sentences": list(sentences),
    }


def annotation(number, bbox, **changes):
    return {"id": number, "image_id": 7, "category_id": 1, "bbox": bbox, "iscrowd": 0, **changes}


REFS = [
    ref(1, 10, "train", sentence(100, "left dog"), sentence(101, "the brown dog")),
    ref(2, 11, "testA", sentence(102, "dog on the right")),
]
ANNOTATIONS = [
    annotation(10, [1, 2, 10, 12], segmentation=[square(1, 2, 10, 12)]),
    annotation(11, [22, 3, 9, 20], segmentation=[square(22, 3, 9, 9), square(25, 15, 4, 8)]),
]


def official(tmp_path, refs=REFS, annotations=ANNOTATIONS):
    entry = {"id": 7, "file_name": NAME, "width": 40, "height": 30}
    instances = {"images": [entry], "annotations": annotations, "categories": []}
    return (
        write_json(tmp_path / "instances.json", instances),
        write_json(tmp_path / "refs.json", refs),
    )


def test_every_official_expression_is_a_record_of_its_object(tmp_path):
    write_images(tmp_path, NAME)
    files = official(tmp_path)
    records, dropped = read("refcoco", *files, images=[tmp_path])
    assert not dropped
    assert [record.caption for record in records] == [
        "left dog",
        "the brown dog",
        "dog on the right",
    ]
    assert {record.task for record in records} == {"referring"}
    for record in records:
        assert record.regions[0].spans == ((0, len(record.caption)),)
        assert record.regions[0].phrase == record.caption
    assert records[1].provenance == {
        "source": "refcoco",
        "file": NAME,
        "image_id": 7,
        "ref_id": 1,
        "ann_id": 10,
        "sent_id": 101,
        "split": "train",
    }
    truth = [[ANNOTATIONS[0]], [ANNOTATIONS[0]], [ANNOTATIONS[1]]]
    for kind in ("bbox", "segm"):
        assert average_precision(truth, records, kind) == pytest.approx(1)
    assert read("refcoco", *reversed(files), images=[tmp_path])[0] == records


def test_a_split_is_taken_with_the_keys_that_it_has_in_the_whole(tmp_path):
    write_images(tmp_path, NAME)
    files = official(tmp_path)
    everything, _ = read("refcoco", *files, images=[tmp_path])
    train, _ = read("refcoco", *files, images=[tmp_path], split="train")
    test, _ = read("refcoco", *files, images=[tmp_path], split="testA")
    assert [*train, *test] == everything
    with pytest.raises(DataError, match="no split 'val', but testA, train"):
        read("refcoco", *files, images=[tmp_path], split="val")


def test_broken_refs_are_counted(tmp_path):
    write_images(tmp_path, NAME)
    refs = [
        "ref",
        {"ref_id": 1},
        ref(3, 10, "train", {"sent_id": 1}, {"sent": " "}),
        ref(4, 99, "train", sentence(2, "no such object")),
        ref(5, 10, "train", sentence(3, "no such image"), image=8),
        ref(6, 12, "train", sentence(4, "box without area")),
        ref(7, 13, "train", sentence(5, "broken mask")),
        {**ref(8, 10, "train"), "sentences": ["text"]},
        {**ref(9, [10], "train", sentence(6, "a list for an id"))},
    ]
    annotations = [
        *ANNOTATIONS,
        annotation(12, [1, 1, 0, 5]),
        annotation(13, [1, 1, 5, 5], segmentation=[[1, 2, 3]]),
    ]
    (record,), dropped = read("refcoco", *official(tmp_path, refs, annotations), images=[tmp_path])
    assert record.caption == "broken mask" and record.regions[0].mask is None
    assert dropped == {
        "row_unreadable": 4,
        "caption_empty": 1,
        "entry_missing": 3,
        "box_empty": 1,
        "boxes_missing": 1,
        "mask_unreadable": 1,
    }


def test_lists_of_phrases_with_boxes_are_read(tmp_path):
    write_images(tmp_path, "000000000007.jpg")
    expressions = [
        {"box": [0.5, 2, 10, 12], "image": "7", "imageName": NAME, "entity": "5",
         "phraseId": "50", "phrase": ["bed", "on", "left"], "categories": ["bed"]},
        {"box": [22, 3, 9, 20], "image": 7, "phrase": "far  bed"},
        {"box": [22, 3, 9, 20], "image": "7" * 5000, "phrase": "no such image"},
        {"box": [22, 3, 9], "image": "7", "phrase": "three numbers"},
        {"box": [22, 3, 9, 9], "phrase": "no image"},
        {"box": [22, 3, 9, 9], "image": "7"},
        None,
    ]  # fmt: skip
    path = write_json(tmp_path / "annotation_test.json", expressions)
    records, dropped = read("refcoco", path, images=[tmp_path])
    assert [(r.caption, r.regions[0].box) for r in records] == [
        ("bed on left", (0.5, 2, 10.5, 14)),
        ("far bed", (22, 3, 31, 23)),
    ]
    assert records[0].provenance["phraseId"] == "50"
    assert dropped == {"box_unreadable": 1, "boxes_missing": 1, "row_unreadable": 4}


def test_the_form_of_mdetr_keeps_its_spans(tmp_path):
    write_images(tmp_path, NAME)
    document = {
        "images": [{"id": 0, "file_name": NAME, "height": 30, "width": 40, "original_id": 7,
                    "caption": "dog on the right", "dataset_name": "refcoco"}],
        "annotations": [{"id": 0, "image_id": 0, "category_id": 18, "bbox": [22, 3, 9, 20],
                         "iscrowd": 0, "original_id": 11, "tokens_positive": [[0, 3]]}],
        "categories": [{"id": 18, "name": "dog"}],
    }  # fmt: skip
    path = write_json(tmp_path / "finetune_refcoco_val.json", document)
    (record,), dropped = read("refcoco", path, images=[tmp_path])
    assert (record.task, record.regions[0].phrase) == ("referring", "dog") and not dropped
    assert (record.provenance["source"], record.provenance["original_id"]) == ("refcoco", 7)
    with pytest.raises(ConfigError, match="leave out split"):
        read("refcoco", path, images=[tmp_path], split="val")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_is_refused_and_never_opened(tmp_path, protocol):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("opened").touch, ())

    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps([Trap(), Counter()], protocol))
    with pytest.raises(DataError, match="refs.unc..p is a Python pickle.*json.dump"):
        read("refcoco", str(path), images=[tmp_path])
    assert not (tmp_path / "opened").exists()


def test_files_that_do_not_go_together_are_refused(tmp_path):
    instances, refs = official(tmp_path)
    with pytest.raises(DataError, match="refs go together with their instances.json"):
        read("refcoco", refs, images=[tmp_path])
    with pytest.raises(DataError, match="are both refs"):
        read("refcoco", refs, refs, images=[tmp_path])
    with pytest.raises(DataError, match="other.json is none of the files that are read"):
        read("refcoco", write_json(tmp_path / "other.json", [{"a": 1}]), images=[tmp_path])
    with pytest.raises(DataError, match="empty.json is none of the files"):
        read("refcoco", write_json(tmp_path / "empty.json", []), images=[tmp_path])
    with pytest.raises(DataError, match="gone.json does not exist"):
        read("refcoco", str(tmp_path / "gone.json"), images=[tmp_path])
    with pytest.raises(DataError, match="nowhere does not exist"):
        read("refcoco", instances, refs, images=[tmp_path / "nowhere"])
