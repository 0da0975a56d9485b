import io
import shutil

import numpy as np
import pytest
from PIL import Image

from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.sources import open_source
from glipv2.pipeline import storage
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import ConfigError, DataError
from glipv2.pipeline.region_masks import decode_mask


def jpeg(size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (90, 120, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def read(**options):
    dropped = Dropped()
    source = open_source(PrepareConfig(source="yolo", **options))
    return list(source.records(dropped)), dropped


def read_lines(tmp_path, *lines):
    """One image of 40 x 30 pixels with these label lines."""
    content = "\n".join(lines) if all(isinstance(line, str) for line in lines) else lines[0]
    write(tmp_path, {"img/a.jpg": jpeg(), "lab/a.txt": content, "lab/classes.txt": "cat\ndog\n"})
    return read(images=(str(tmp_path / "img"),), annotations=(str(tmp_path / "lab"),))


def inside(points, x, y):
    """Whether a ray to the right crosses the polygon's edges an odd number of times."""
    edges = zip(points, points[1:] + points[:1], strict=True)
    crossed = [(a, b) for a, b in edges if (a[1] > y) != (b[1] > y)]
    return sum(x < a[0] + (y - a[1]) * (b[0] - a[0]) / (b[1] - a[1]) for a, b in crossed) % 2 == 1


def test_centre_and_sides_become_corners_in_pixels(tmp_path):
    (record,), dropped = read_lines(tmp_path, "1 0.5 0.5 0.25 0.2", "", "0.0 0.5 0.5 1 1")
    first, second = record.regions
    assert first.box == (15, 12, 25, 18) and second.box == (0, 0, 40, 30)
    assert [(r.category, r.phrase, r.mask) for r in record.regions] == [
        (1, "dog", None),
        (0, "cat", None),
    ]
    assert record.task == "detection" and not dropped


def test_a_polygon_becomes_its_mask_and_the_box_around_it(tmp_path):
    points = [(8, 6), (32, 6), (32, 24), (20, 12), (8, 24)]
    line = "1 " + " ".join(f"{x / 40} {y / 30}" for x, y in points)
    (record,), dropped = read_lines(tmp_path, line)
    (region,) = record.regions
    assert region.box == pytest.approx((8, 6, 32, 24)) and not dropped
    centres = [[inside(points, x + 0.5, y + 0.5) for x in range(40)] for y in range(30)]
    differs = decode_mask(region.mask, 40, 30) != np.array(centres)
    assert np.sum(centres) == 288 and differs.sum() <= 12  # some pixels of the slanted edges


@pytest.mark.parametrize(
    ("line", "reason", "box"),
    [
        ("2 .5 .5 .2 .2", "category_unknown", None),
        ("-1 .5 .5 .2 .2", "category_unknown", None),
        ("cat .5 .5 .2 .2", "category_unknown", None),
        ("0.5 .5 .5 .2 .2", "category_unknown", None),
        ("nan .5 .5 .2 .2", "category_unknown", None),
        ("1e999 .5 .5 .2 .2", "category_unknown", None),
        ("0", "box_unreadable", None),
        ("0 .5 .5 .2", "box_unreadable", None),
        ("0 .5 .5 .2 .2 .9", "box_unreadable", None),
        ("0 .1 .1 .5 .1 .5 .5 .1", "box_unreadable", None),
        ("0 .5 wide .2 .2", "box_unreadable", None),
        ("0 nan .5 .2 .2", "box_not_finite", None),
        ("0 .5 .5 1e400 .2", "box_not_finite", None),
        ("0 .1 .1 nan .1 .5 .5", "box_not_finite", None),
        ("0 .5 .5 -.2 .2", "box_inverted", None),
        ("0 .5 .5 0 .2", "box_empty", None),
        ("0 .1 .5 .2 .5 .3 .5", "box_empty", None),
        ("0 20 15 10 10", "box_outside", None),
        ("0 -.5 .5 .2 .2", "box_outside", None),
        ("0 1 .5 .5 1", "box_clipped", (30, 0, 40, 30)),
        ("0 .5 .5 1.00001 1.00001", "", (0, 0, 40, 30)),  # six digits, rounded up
    ],
)
def test_the_box_rule_holds_for_every_kind_of_line(tmp_path, line, reason, box):
    (record,), dropped = read_lines(tmp_path, line)
    assert [region.box for region in record.regions] == ([box] if box else [])
    assert dict(dropped) == {
        **({reason: 1} if reason else {}),
        **({} if box else {"no_boxes": 1}),
    }


def test_a_polygon_far_outside_loses_its_mask_and_keeps_the_clipped_box(tmp_path):
    (record,), dropped = read_lines(tmp_path, "0 -9000 .1 .5 .1 .5 .5")
    assert record.regions[0].mask is None
    assert dropped == {"box_clipped": 1, "mask_unreadable": 1}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"0 .5 .5 .2 .2\xff\xfe", "annotation_unreadable"),
        ("0 .5 .5 .2 .2\n" * 1_001, "boxes_too_many"),
    ],
)
def test_a_label_file_that_can_not_be_read_drops_its_image(tmp_path, content, reason):
    records, dropped = read_lines(tmp_path, content)
    assert records == [] and dropped == {reason: 1}


def test_a_label_file_that_links_out_is_not_read(tmp_path):
    write(tmp_path, {"secret.txt": "0 .5 .5 .2 .2", "lab/b.txt": "", "img/b.jpg": jpeg()})
    (tmp_path / "lab" / "a.txt").symlink_to(tmp_path / "secret.txt")
    write(tmp_path, {"img/a.jpg": jpeg(), "lab/classes.txt": "cat"})
    records, dropped = read(images=(str(tmp_path / "img"),), annotations=(str(tmp_path / "lab"),))
    assert [r.provenance["file"] for r in records] == ["b.jpg"]
    assert dropped == {"image_outside_folder": 1, "no_boxes": 1}


def test_images_without_labels_are_negatives_and_labels_without_images_are_counted(tmp_path):
    files = {
        "img/a.jpg": jpeg(),
        "img/b.jpg": jpeg(),
        "img/c.bmp": b"BM",
        "img/d.jpg": jpeg()[:300],
        "img/deep/a.jpg": jpeg((50, 30)),
        "img/notes.md": "",
        "lab/a.txt": "0 .5 .5 .2 .2",
        "lab/deep/a.txt": "0 .5 .5 1 1",
        "lab/d.txt": "",
        "lab/stray.txt": "0 .5 .5 .2 .2",
        "classes.txt": "cat\n\n",
        "LICENSE": "CC0\n",
    }
    write(tmp_path, files)
    records, dropped = read(images=(str(tmp_path / "img"),), annotations=(str(tmp_path / "lab"),))
    assert [(r.provenance["file"], len(r.regions)) for r in records] == [
        ("a.jpg", 1),
        ("b.jpg", 0),
        ("deep/a.jpg", 1),
    ]
    assert len({record.key for record in records}) == 3
    assert dropped == {
        "label_missing": 1,
        "image_missing": 1,
        "image_format": 1,
        "image_undecodable": 1,
    }
    assert dropped.first["image_missing"] == "stray.txt"


ROBOFLOW = {
    "train/images/a.jpg": jpeg(),
    "train/labels/a.txt": "0 .5 .5 .2 .2",
    "valid/images/b.jpg": jpeg(),
    "valid/labels/b.txt": "1 .5 .5 .2 .2",
    "valid/labels/gone.txt": "",
}
ULTRALYTICS = {
    "images/train/a.jpg": jpeg(),
    "labels/train/a.txt": "0 .5 .5 .2 .2",
    "images/val/b.jpg": jpeg(),
    "labels/val/b.txt": "1 .5 .5 .2 .2",
    "labels/val/gone.txt": "",
}
FLAT = {
    "train/a.jpg": jpeg(),
    "train/a.txt": "0 .5 .5 .2 .2",
    "val/b.jpg": jpeg(),
    "val/b.txt": "1 .5 .5 .2 .2",
    "val/gone.txt": "",
}


@pytest.mark.parametrize("split", ["val", "valid"])
@pytest.mark.parametrize(
    ("files", "lines"),
    [
        (ROBOFLOW, "train: ../train/images\nval: ../valid/images"),
        (ROBOFLOW, "train: /Users/me/set/train/images\nval: /Users/me/set/valid/images"),
        (ROBOFLOW, "train: C:\\set\\train\\images\nval: C:\\set\\valid\\images"),
        (ROBOFLOW, "train: train/images\nvalid: valid/images"),
        (ROBOFLOW, "train: elsewhere/one\nval: elsewhere/two"),
        (ULTRALYTICS, "path: ../datasets/mine\ntrain: images/train\nval: images/val"),
        (ULTRALYTICS, "train: images/train\nval: [images/val]"),
        (ULTRALYTICS, ""),
        (FLAT, "train: train\nval: ./val"),
    ],
)
def test_splits_are_found_however_data_yaml_says_it(tmp_path, files, lines, split):
    write(tmp_path, files | {"data.yaml": f"{lines}\nnc: 2\nnames: [no, 7]\n"})
    (record,), dropped = read(root=str(tmp_path), split=split)
    assert record.provenance["file"].endswith("b.jpg")
    assert [region.phrase for region in record.regions] == ["7"]
    assert dropped == {"image_missing": 1}
    (record,), _ = read(root=str(tmp_path), split="train")
    assert [region.phrase for region in record.regions] == ["no"]


def test_without_a_split_the_only_one_there_is_taken(tmp_path):
    lines = "train: ../train/images\nval: ../valid/images\nnames: [cat, dog]"
    write(tmp_path, ROBOFLOW | {"data.yaml": lines})
    with pytest.raises(DataError, match=r"several splits; .*: train \(1\), val \(1\)"):
        read(root=str(tmp_path))
    shutil.rmtree(tmp_path / "valid")
    (record,), _ = read(root=str(tmp_path))
    assert record.provenance["file"] == "train/images/a.jpg"
    with pytest.raises(DataError, match=r"no images below .* for split 'val'; .*: train \(1\)$"):
        read(root=str(tmp_path), split="val")
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(DataError, match=r"any split \(it names train \.\./train/images, val"):
        read(root=str(tmp_path))


def test_splits_of_the_same_images_are_no_choice(tmp_path):
    files = {"images/a.jpg": jpeg(), "labels/a.txt": "0 .5 .5 .2 .2"}
    write(tmp_path, files | {"data.yaml": "train: images\nval: images\nnames: [cat]"})
    assert len(read(root=str(tmp_path))[0]) == 1


def test_a_list_of_images_may_be_of_another_machine(tmp_path):
    lines = [
        "./images/val/b.jpg",
        "/home/me/set/images/train/a.jpg",
        "/home/me/images/val/gone.jpg",
    ]
    files = {"data.yaml": "path: /home/me\ntest: test.txt\nnames: {0: cat, 1: dog}\n"}
    write(tmp_path, ULTRALYTICS | files | {"test.txt": "\n".join(lines) + "\n"})
    records, dropped = read(root=str(tmp_path), split="test")
    assert [r.provenance["file"] for r in records] == ["images/train/a.jpg", "images/val/b.jpg"]
    assert dropped == {"image_missing": 1}


def test_numbers_of_a_mapping_may_have_gaps(tmp_path):
    write(tmp_path, ULTRALYTICS | {"mine.yml": "names:\n  1: dog\n  90: brush\n"})
    source = open_source(PrepareConfig(source="yolo", root=str(tmp_path), split="val"))
    (record,) = source.records(Dropped())
    assert source.categories == ("dog", "brush") and record.regions[0].category == 0


def test_a_store_is_read_like_a_disk_and_every_change_shows(tmp_path):
    url = f"memory://{tmp_path.name}"
    for name, content in (ULTRALYTICS | {"data.yaml": "names: [cat, dog]"}).items():
        data = content if isinstance(content, bytes) else content.encode()
        storage.write_bytes(storage.join(url, name), data)
    options = PrepareConfig(source="yolo", root=url, split="val")
    before = open_source(options).content
    assert [len(r.regions) for r in open_source(options).records(Dropped())] == [1]
    assert open_source(options).content == before
    for name, data in [("labels/val/b.txt", b"1 .5 .5 .2 .3"), ("data.yaml", b"names: [cat, fox]")]:
        storage.write_bytes(storage.join(url, name), data)
        after = open_source(options).content
        assert after != before
        before = after


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a", "data.yaml is not valid YAML"),
        (b"\xff\xfe\x00", "data.yaml is not valid YAML"),
        ("[" * 2_000, "data.yaml is not valid YAML"),
        ("- a", "no YAML mapping"),
        ("train: images/train", "has 0 names"),
        ("names: cat", "names must be a list"),
        ("names: [[cat]]", "names must be a list"),
        ("names: {x: cat}", "names must be a list"),
        ("names: [cat, '']", "some of them empty"),
        ("nc: 3\nnames: [cat, dog]", "has 2 names.*nc 3"),
        ("names: [cat, cat]", "category 'cat' occurs twice"),
        ("val: images/none\nnames: [cat, dog]", None),
    ],
)
def test_a_broken_data_yaml_is_refused_by_name(tmp_path, text, message):
    write(tmp_path, ULTRALYTICS | {"data.yaml": text})
    options = PrepareConfig(source="yolo", root=str(tmp_path), split="val")
    if message is None:
        assert open_source(options).total == 1
    else:
        with pytest.raises(DataError, match=message):
            open_source(options)


def test_yaml_never_makes_objects(tmp_path):
    bomb = f"x: !!python/object/apply:os.mkdir ['{tmp_path}/made']\nnames: [cat, dog]\n"
    write(tmp_path, ULTRALYTICS | {"data.yaml": bomb})
    assert len(read(root=str(tmp_path), split="val")[0]) == 1
    assert not (tmp_path / "made").exists()


def test_what_the_user_named_must_be_there(tmp_path):
    folder = str(tmp_path / "img")
    for options, error, message in [
        ({}, ConfigError, "needs root .*, or images and annotations"),
        ({"images": (folder,)}, ConfigError, "needs root .*or images and annotations"),
        ({"root": folder, "images": (folder,)}, ConfigError, "either root, or images"),
        ({"root": folder}, DataError, "YOLO folder .*img does not exist"),
        ({"root": str(tmp_path)}, DataError, "YOLO folder .* is empty"),
    ]:
        with pytest.raises(error, match=message):
            read(**options)
    write(tmp_path, ULTRALYTICS)
    with pytest.raises(DataError, match="holds no data.yaml; give"):
        read(root=str(tmp_path))
    write(tmp_path, {"data.yaml": "train: images/train\nnames: [cat, dog]"})
    for split in ("test", "../train"):
        with pytest.raises(DataError, match=r"for split '.*with images: train \(1\), val \(1\)"):
            read(root=str(tmp_path), split=split)
    write(tmp_path, {"img/a.jpg": jpeg(), "lab/classes.txt": "cat\n\ndog"})
    options = {"images": (folder,), "annotations": (str(tmp_path / "lab"),)}
    with pytest.raises(DataError, match=r"classes.txt: line 2 is empty"):
        read(**options)
    write(tmp_path, {"lab/classes.txt": "cat"})
    with pytest.raises(DataError, match="none of the 1 images has a label file in .*lab"):
        read(**options)
    (tmp_path / "lab" / "classes.txt").rename(tmp_path / "lab" / "a.names")
    with pytest.raises(DataError, match="no classes.txt in .*lab or beside it"):
        read(**options)
    (tmp_path / "img" / "a.jpg").rename(tmp_path / "img" / "a.md")
    with pytest.raises(DataError, match="no image in .*img"):
        read(**options)
