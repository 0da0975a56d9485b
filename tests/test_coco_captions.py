import io
import json

import pytest
from PIL import Image

from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.sources import open_source
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import ConfigError, DataError


def jpeg(size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (90, 120, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def opened(tmp_path, document, images=("one.jpg",), **options):
    for name in images:
        path = tmp_path / "img" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg())
    (tmp_path / "captions.json").write_text(
        document if isinstance(document, str) else json.dumps(document)
    )
    return open_source(
        PrepareConfig(
            source="coco-captions",
            annotations=(str(tmp_path / "captions.json"),),
            images=(str(tmp_path / "img"),),
            **options,
        )
    )


def read(*arguments, **options):
    source = opened(*arguments, **options)
    dropped = Dropped()
    return list(source.records(dropped)), dropped


def official(images, captions):
    annotations = [
        {"image_id": image, "id": n, "caption": c} for n, (image, c) in enumerate(captions)
    ]
    return {"info": {}, "images": images, "licenses": [], "annotations": annotations}


def karpathy(name, split, *raws, **changes):
    return {
        "filepath": "val2014",
        "filename": name,
        "imgid": 7,
        "split": split,
        "sentences": [{"tokens": raw.lower().split(), "raw": raw, "imgid": 7} for raw in raws],
        **changes,
    }


def test_the_official_file_gives_one_record_per_image_with_all_its_captions(tmp_path):
    images = [
        {"id": 9, "file_name": "one.jpg", "width": 40, "height": 30},
        {"id": 3, "file_name": "two.jpg"},
    ]
    captions = [(9, "A  dog.\n"), (3, "Two cats."), (9, "A brown dog runs.")]
    source = opened(tmp_path, official(images, captions), ("one.jpg", "two.jpg"))
    dropped = Dropped()
    first, second = source.records(dropped)
    assert (first.key, first.task) == ("9", "captioning")
    assert first.caption == "A dog." and first.captions == ("A dog.", "A brown dog runs.")
    assert second.captions == ("Two cats.",) and source.total == 2 and not dropped


def test_karpathys_splits_are_taken_by_name_and_train_with_restval(tmp_path):
    names = [("a.jpg", "train"), ("b.jpg", "restval"), ("c.jpg", "val"), ("d.jpg", "test")]
    images = [
        karpathy(name, split, f"A {name}.", cocoid=n) for n, (name, split) in enumerate(names)
    ]
    document = {"images": images, "dataset": "coco"}
    files = ["val2014/a.jpg", "b.jpg", "c.jpg", "d.jpg"]  # in the named folder, or without it
    for split, expected in [
        ("train", ["a"]),
        ("restval", ["b"]),
        ("trainrestval", ["a", "b"]),
        ("val", ["c"]),
        ("test", ["d"]),
        ("", ["a", "b", "c", "d"]),
    ]:
        source = opened(tmp_path, document, files, split=split)
        records = list(source.records(Dropped()))
        assert [r.caption for r in records] == [f"A {name}.jpg." for name in expected]
        assert source.total == len(expected) == len({r.key for r in records})
    assert records[1].provenance["split"] == "restval"
    with pytest.raises(DataError, match=r"no split 'tset', but restval, test, train, val"):
        opened(tmp_path, document, files, split="tset")


def test_images_of_the_2017_release_are_found_for_karpathys_names(tmp_path):
    image = karpathy("COCO_val2014_000000000042.jpg", "val", "A dog.", cocoid=42)
    (record,), dropped = read(tmp_path, {"images": [image]}, ("000000000042.jpg",))
    assert record.key == "42" and not dropped


def test_flickr_files_of_karpathy_have_no_coco_id(tmp_path):
    images = [
        karpathy("1.jpg", "test", "A dog.", imgid=5),
        karpathy("2.jpg", "test", "A.", imgid=6),
    ]
    for image in images:
        del image["filepath"]
    records, dropped = read(tmp_path, {"images": images}, ("1.jpg", "2.jpg"))
    assert [record.key for record in records] == ["5", "6"] and not dropped


def test_everything_broken_in_the_official_file_is_counted(tmp_path):
    images = [
        {"id": 1, "file_name": "one.jpg"},
        {"id": 1, "file_name": "one.jpg"},
        {"id": 2, "file_name": "gone.jpg"},
        {"id": 3, "file_name": "../captions.json"},
        {"id": 4, "file_name": "one.jpg", "width": 99, "height": 30},
        {"id": 5, "file_name": "one.jpg"},
        {"id": 6, "file_name": "one.jpg"},
        {"id": 7},
        {"id": None, "file_name": "one.jpg"},
        "one.jpg",
        {"id": 8, "file_name": "one.jpg"},
    ]
    captions = [(1, "A dog."), (1, " \u0000 "), (1, None), (1, ["x"]), (1, "..."), (1, "w " * 900)]
    captions += [(n, "A cat.") for n in (2, 3, 4, 7)] + [(6, "?!"), ([1], "A"), (99, "Nobody's.")]
    captions += [(8, "A dog.")] * 1_001
    records, dropped = read(tmp_path, official(images, captions))
    assert [record.key for record in records] == ["1"]
    assert records[0].captions[0] == "A dog." and len(records[0].captions) == 2
    assert len(records[0].captions[1]) <= 1_000
    assert dropped == {
        "image_repeated": 1,
        "image_missing": 1,
        "image_outside_folder": 1,
        "size_mismatch": 1,
        "text_missing": 2,
        "row_unreadable": 3,
        "caption_unreadable": 5,
        "caption_cut": 1,
        "texts_too_many": 1,
    }


def test_everything_broken_in_karpathys_file_is_counted(tmp_path):
    images = [
        karpathy("one.jpg", "val", "A dog.", cocoid=1),
        karpathy("one.jpg", "val", "A dog.", cocoid="1"),
        karpathy("one.jpg", "val", "A dog.", cocoid=[2]),
        karpathy(7, "val", "A dog.", cocoid=3),
        karpathy("one.jpg", "val", cocoid=4),
        karpathy("one.jpg", "val", cocoid=5, sentences="A dog."),
        karpathy("one.jpg", "val", cocoid=6, sentences=["A dog.", {"tokens": ["a"]}]),
        karpathy("gone.jpg", "val", "A dog.", cocoid=8),
        karpathy("one.jpg", "val", "A dog.", cocoid=9, filepath="../.."),
        "one.jpg",
    ]
    records, dropped = read(tmp_path, {"images": images})
    assert [record.key for record in records] == ["1"]
    assert dropped == {
        "image_repeated": 1,
        "row_unreadable": 3,
        "text_missing": 3,
        "caption_unreadable": 2,
        "image_missing": 1,
        "image_outside_folder": 1,
    }


@pytest.mark.parametrize(
    ("document", "error", "message"),
    [
        ("", DataError, "captions.json is not valid JSON"),
        ("[]", DataError, "captions.json is none of the files"),
        ({"images": []}, DataError, "captions.json is none of the files"),
        ({"images": [{"file_name": "one.jpg"}]}, DataError, "lacks the list 'annotations'"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(tmp_path, document, error, message):
    with pytest.raises(error, match=message):
        read(tmp_path, document)


def test_what_the_user_named_must_be_there(tmp_path):
    document = official([{"id": 1, "file_name": "one.jpg"}], [])
    with pytest.raises(ConfigError, match="has no splits.*leave out split"):
        opened(tmp_path, document, split="val")
    options = {"source": "coco-captions", "annotations": (str(tmp_path / "captions.json"),)}
    with pytest.raises(DataError, match="image folder .*gone does not exist"):
        open_source(PrepareConfig(**options, images=(str(tmp_path / "gone"),)))
    with pytest.raises(ConfigError, match="needs images"):
        open_source(PrepareConfig(**options))
    (tmp_path / "captions.json").unlink()
    with pytest.raises(DataError, match="captions.json does not exist"):
        open_source(PrepareConfig(**options, images=(str(tmp_path),)))
