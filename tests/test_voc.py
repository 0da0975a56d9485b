import io
import zlib
from pathlib import Path

import pytest
from PIL import Image

from glipv2.data_prep.boxes_cleaning import clean_box
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.sources import open_source
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import DataError

BCCD = Path(__file__).parents[1] / "infra" / "samples" / "bccd"


def image_bytes(image_format="JPEG", size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (90, 120, 30)).save(buffer, image_format)
    return buffer.getvalue()


def xml(*boxes, filename="", size=(40, 30), head=""):
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
        f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for name, x0, y0, x1, y1 in boxes
    )
    return (
        f"{head}<annotation><filename>{filename}</filename><size><width>{size[0]}</width>"
        f"<height>{size[1]}</height></size>{objects}</annotation>"
    )


def opened(annotations, images, **options):
    return open_source(
        PrepareConfig(
            source="voc", annotations=(str(annotations),), images=(str(images),), **options
        )
    )


def read(tmp_path, files, images, **options):
    (tmp_path / "xml").mkdir()
    (tmp_path / "img").mkdir()
    for name, text in files.items():
        (tmp_path / "xml" / f"{name}.xml").write_text(text, encoding="utf-8")
    for name, data in images.items():
        (tmp_path / "img" / name).write_bytes(data)
    dropped = Dropped()
    source = opened(tmp_path / "xml", tmp_path / "img", **options)
    return list(source.records(dropped)), dropped


def test_boxes_become_zero_based_with_exclusive_ends(tmp_path):
    records, dropped = read(
        tmp_path, {"one": xml(("cat", 1, 1, 40, 30))}, {"one.jpg": image_bytes()}
    )
    assert records[0].regions[0].box == (0, 0, 40, 30)
    assert (records[0].width, records[0].height, records[0].task) == (40, 30, "detection")
    assert records[0].image == image_bytes() and not dropped


def test_all_of_bccd_is_read_with_its_published_counts():
    dropped = Dropped()
    source = opened(BCCD / "Annotations", BCCD / "JPEGImages")
    records = list(source.records(dropped))
    assert source.categories == ("Platelets", "RBC", "WBC") and source.total == 120
    assert (len(records), sum(len(r.regions) for r in records)) == (120, 1870)
    assert not dropped
    assert records[0].regions[0].box == (259.0, 176.0, 491.0, 376.0)
    assert records[0].regions[0].phrase == "WBC"


def test_the_bccd_split_is_complete_and_shares_no_image():
    train = (BCCD / "train.txt").read_text().split()
    held_out = (BCCD / "heldout.txt").read_text().split()
    assert (len(train), len(held_out)) == (100, 20)
    assert sorted(train + held_out) == sorted(p.stem for p in (BCCD / "Annotations").iterdir())
    pixels = [(BCCD / "JPEGImages" / f"{stem}.jpg").read_bytes() for stem in train + held_out]
    assert len(set(pixels)) == 120
    source = opened(BCCD / "Annotations", BCCD / "JPEGImages", list=str(BCCD / "heldout.txt"))
    assert [record.key for record in source.records(Dropped())] == held_out


@pytest.mark.parametrize(
    ("corners", "reason", "kept"),
    [
        ((1, 1, 9, 9), "", (1, 1, 9, 9)),
        ((-5, 1, 9, 99), "box_clipped", (0, 1, 9, 30)),
        (("nan", 1, 9, 9), "box_not_finite", None),
        ((1, 1, float("inf"), 9), "box_not_finite", None),
        ((10**400, 1, 9, 9), "box_not_finite", None),
        ((9, 1, 1, 9), "box_inverted", None),
        ((1, 9, 9, 1), "box_inverted", None),
        ((1, 1, 1, 9), "box_empty", None),
        ((50, 1, 60, 9), "box_outside", None),
        ((40, 1, 60, 9), "box_outside", None),
        ((None, 1, 9, 9), "box_unreadable", None),
        (("wide", 1, 9, 9), "box_unreadable", None),
        ((True, 0, 9, 9), "box_unreadable", None),
        ((1, 2, 3), "box_unreadable", None),
    ],
)
def test_the_written_box_rule(corners, reason, kept):
    dropped = Dropped()
    assert clean_box(corners, (40, 30), dropped, "here") == kept
    assert dict(dropped) == ({reason: 1} if reason else {})
    assert dropped.first == ({reason: "here"} if reason else {})


def test_broken_boxes_are_dropped_and_the_sample_stays(tmp_path):
    boxes = [
        ("cat", "nan", 1, 9, 9),
        ("cat", 9, 1, 2, 9),
        ("cat", 2, 2, 9, 9),
        ("cat", "", 1, 2, 3),
    ]
    records, dropped = read(tmp_path, {"one": xml(*boxes)}, {"one.jpg": image_bytes()})
    assert [region.box for region in records[0].regions] == [(1, 1, 9, 9)]
    assert dropped == {"box_not_finite": 1, "box_inverted": 1, "box_unreadable": 1}


def test_bad_files_are_counted_by_reason_and_skipped(tmp_path):
    good = xml(("cat", 1, 1, 9, 9))
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'
    files = dict.fromkeys(
        ("fine", "absent", "truncated", "renamed", "animated", "huge", "text"), good
    )
    files |= {"bomb": xml(head=bomb), "cut": good[:60], "resized": xml(size=(80, 60))}
    huge = bytearray(image_bytes("PNG"))  # its header alone will claim 900 million pixels
    huge[16:24] = (30000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    images = {f"{name}.jpg": image_bytes() for name in ("fine", "bomb", "cut", "resized")}
    images |= {
        "truncated.jpg": Path(BCCD / "JPEGImages" / "BloodImage_00000.jpg").read_bytes()[:9000],
        "renamed.png": image_bytes(),
        "animated.gif": image_bytes("GIF"),
        "huge.png": bytes(huge),
        "text.jpg": b"<html>not found</html>",
    }
    records, dropped = read(tmp_path, files, images)
    assert [record.key for record in records] == ["fine"]
    assert dropped == {
        "annotation_unreadable": 2,
        "image_missing": 1,
        "image_undecodable": 1,
        "image_wrong_extension": 1,
        "image_format": 2,
        "image_too_large": 1,
        "size_mismatch": 1,
    }
    assert dropped.first["image_missing"] == "absent.xml"


def test_the_image_is_found_by_stem_then_by_the_name_inside_but_never_outside(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(image_bytes())
    files = {
        "a": xml(filename="other.jpg"),
        "b": xml(filename="C:\\photos\\named.png"),
        "c": xml(filename="../secret.jpg"),
    }
    images = {"a.jpg": image_bytes(), "other.jpg": b"", "named.jpg": image_bytes()}
    records, dropped = read(tmp_path, files, images)
    assert [record.provenance["file"] for record in records] == ["a.jpg", "named.jpg"]
    assert dropped == {"image_missing": 1, "no_boxes": 2}


def test_a_list_takes_images_and_the_whole_folder_numbers_the_categories(tmp_path):
    files = {"one": xml(("dog", 1, 1, 9, 9), ("", 1, 1, 9, 9)), "two": xml(("cat", 1, 1, 9, 9))}
    (tmp_path / "list.txt").write_text("one 1\n")
    images = {"one.jpg": image_bytes(), "two.jpg": image_bytes()}
    records, dropped = read(tmp_path, files, images, list=str(tmp_path / "list.txt"))
    assert [(r.key, [g.category for g in r.regions]) for r in records] == [("one", [1])]
    assert dropped == {"category_unknown": 1}


def test_what_the_user_named_must_be_there(tmp_path):
    folder = tmp_path / "xml"
    folder.mkdir()
    with pytest.raises(DataError, match="nowhere does not exist"):
        opened(tmp_path / "nowhere", folder)
    with pytest.raises(DataError, match="annotation folder .*xml is empty"):
        opened(folder, folder)
    (folder / "one.txt").write_text("")
    with pytest.raises(DataError, match="no .xml file to read in .*xml"):
        opened(folder, folder)
    (folder / "one.xml").write_text(xml())
    with pytest.raises(DataError, match="image folder .*img does not exist"):
        opened(folder, tmp_path / "img")
    (tmp_path / "list.txt").write_text("two\n")
    with pytest.raises(DataError, match="first is two.xml"):
        opened(folder, folder, list=str(tmp_path / "list.txt"))
