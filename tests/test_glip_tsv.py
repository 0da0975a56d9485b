import base64
import json

import pytest
from pycocotools import mask as coco_mask
from reader_helpers import average_precision, jpeg, read, square

from glipv2.data_prep.tsv_files import Lines
from glipv2.pipeline.errors import DataError

IMAGE = base64.b64encode(jpeg()).decode()
CLASSES = {"label_to_idx": {"dog": 2, "cat": 1, "__background__": 0}}


def write_tsv(path, rows, index=True):
    """Rows as lines; what is no text is written as JSON."""
    lines = [
        "\t".join(v if isinstance(v, str) else json.dumps(v) for v in row) + "\n" for row in rows
    ]
    path.write_text("".join(lines))
    starts = [sum(len(line.encode()) for line in lines[:n]) for n in range(len(lines))]
    if index:
        path.with_suffix(".lineidx").write_text("".join(f"{start}\n" for start in starts))
    return starts


def tsv_set(folder, labels, images=None, index=True, labelmap=CLASSES, **files):
    """A YAML and its files; row n has the key "kN"."""
    images = images or [(f"k{n}", IMAGE) for n in range(len(labels))]
    write_tsv(folder / "img.tsv", images, index)
    write_tsv(folder / "label.tsv", [(f"k{n}", label) for n, label in enumerate(labels)], index)
    named = {"img": "img.tsv", "label": "label.tsv"}
    if labelmap is not None:
        (folder / "labelmap.json").write_text(json.dumps(labelmap))
        named["labelmap"] = "labelmap.json"
    for part, content in files.items():
        (folder / f"{part}.txt").write_text(content)
        named[part] = f"{part}.txt"
    path = folder / "set.yaml"
    path.write_text("".join(f"{part}: {name}\n" for part, name in named.items()))
    return str(path)


def found(name, rect, **changes):
    return {"class": name, "rect": rect, **changes}


def caption(boxes, spans, scores=None, text="A red ball beside two boxes", **changes):
    scored = {} if scores is None else {"scores": scores}
    label = {"img_h": 30, "img_w": 40, "caption": text, "bboxes": boxes, "tokens_positive": spans}
    return {**label, **scored, **changes}


@pytest.mark.parametrize("index", [True, False])
def test_detection_rows_score_one_against_their_source(tmp_path, index):
    labels = [
        {"objects": [found("cat", [1, 2, 12, 20.5], conf=0.5),
                     found("dog", [20, 3, 36, 30], mask=[square(20, 3, 16, 20)])]},
        [found("dog", [0, 0, 40, 30], IsGroupOf=1)],
        {"objects": []},
    ]  # fmt: skip
    records, dropped = read("glip-tsv", tsv_set(tmp_path, labels, index=index), images=[])
    assert [record.key for record in records] == [f"k{n}-{n:08d}" for n in range(3)]
    first, second, third = records
    assert [(r.phrase, r.category, r.score) for r in first.regions] == [
        ("cat", 0, 0.5),
        ("dog", 1, 1.0),
    ]
    assert coco_mask.area(first.regions[1].mask) == 320
    assert second.regions[0].crowd and third.regions == () and dropped == {"no_boxes": 1}
    truth = [
        [{"bbox": [1, 2, 11, 18.5], "category_id": 1}, {"bbox": [20, 3, 16, 27], "category_id": 2}],
        [{"bbox": [0, 0, 40, 30], "category_id": 2}],
    ]
    assert average_precision(truth, records[:2], "bbox") == pytest.approx(1)


def test_captions_of_both_versions_give_the_same_boxes_and_scores(tmp_path):
    ball, boxes = [[0, 10]], [[18, 27]]
    one, two, three = [1, 2, 10, 12], [20, 2, 30, 12], [21.5, 14, 30, 23]
    v1 = caption([one, two, three], [ball, boxes, boxes], [0.9, 0.75, 0.25])
    v2 = caption([[one], [two, three], []], [ball, boxes, ball], [[0.9], [0.75, 0.25], []])
    path = tsv_set(tmp_path, [v1, v2], labelmap=None)
    (first, second), dropped = read("glip-tsv", path, images=[])
    assert not dropped
    assert first.task == "grounding" and first.caption == "A red ball beside two boxes"
    assert [(r.box, r.score, r.spans, r.phrase) for r in first.regions] == [
        ((1, 2, 10, 12), 0.9, ((0, 10),), "A red ball"),
        ((20, 2, 30, 12), 0.75, ((18, 27),), "two boxes"),
        ((21.5, 14, 30, 23), 0.25, ((18, 27),), "two boxes"),
    ]
    assert second.regions == first.regions
    assert first.provenance == {"source": "glip-tsv", "file": "k0", "row": "line 0"}


def test_broken_captions_are_counted(tmp_path):
    box, span = [1, 2, 10, 12], [[0, 10]]
    labels = [
        caption([box, box, box], [span, None, [[0, 99]]], [0.9, 0.9, 0.9]),
        caption([box, box, box, box], [span] * 4, [0.9, float("nan"), 2]),
        caption([[box], [box]], [span, None], [[0.9], [0.9]]),
        caption([[box, box]], [span], [0.9]),
        caption([box, [1, 2], "x"], [span] * 3),
        caption([], [], []),
        caption(None, [], []),
        caption([box], [span], [0.9], text="..."),
        caption([box], [span], [0.9], img_w=80),
    ]
    records, dropped = read("glip-tsv", tsv_set(tmp_path, labels, labelmap=None), images=[])
    assert [record.provenance["file"] for record in records] == ["k0", "k1", "k2", "k4"]
    assert all(len(record.regions) == 1 for record in records)
    assert records[-1].regions[0].score == 1.0
    assert dropped == {
        "span_missing": 3,
        "span_unusable": 1,
        "score_unreadable": 5,
        "boxes_missing": 2,
        "box_unreadable": 2,
        "row_unreadable": 1,
        "caption_empty": 1,
        "size_mismatch": 1,
    }


def test_broken_detection_rows_are_counted(tmp_path):
    box = [1, 2, 10, 12]
    labels = [
        [found("cow", box), found("cat", [9, 2, 1, 12]), found("cat", None), 7, {"rect": box},
         found("cat", box, conf="high"), found("cat", box, mask=[[1, 2]])],
        "{", "7", {"objects": 7}, [found("cat", box)] * 1001,
        [], [], [], [],
    ]  # fmt: skip
    images = [(f"k{n}", IMAGE) for n in range(len(labels))]
    images[5] = ("k5", "no base64!")
    images[6] = ("k6", base64.b64encode(jpeg()[:400]).decode())
    images[7] = ("other", IMAGE)
    images[8] = ("k8", base64.b64encode(b"GIF89a" + bytes(50)).decode())
    (record,), dropped = read("glip-tsv", tsv_set(tmp_path, labels, images), images=[])
    assert [region.mask for region in record.regions] == [None]
    assert dropped == {
        "category_unknown": 3,
        "box_inverted": 1,
        "box_unreadable": 1,
        "score_unreadable": 1,
        "mask_unreadable": 1,
        "row_unreadable": 4,
        "boxes_too_many": 1,
        "image_undecodable": 1,
        "row_mismatch": 1,
        "image_format": 1,
    }


def test_a_linelist_chooses_and_repeats_lines(tmp_path):
    labels = [[found("cat", [n, 2, 10, 12])] for n in range(3)]
    path = tsv_set(tmp_path, labels, linelist="2\n0\n2\n")
    records, _ = read("glip-tsv", path, images=[])
    assert [record.key for record in records] == ["k2-00000000", "k0-00000001", "k2-00000002"]
    assert [record.regions[0].box[0] for record in records] == [2, 0, 2]


def test_sizes_are_checked_in_each_of_their_forms(tmp_path):
    path = tsv_set(tmp_path, [[found("cat", [1, 2, 10, 12])]] * 6)
    sizes = [[{"height": 30, "width": 40}], {"height": 30, "width": 40}, "30 40",
             [{"height": 40, "width": 30}], "40 30", "tall"]  # fmt: skip
    write_tsv(tmp_path / "hw.tsv", [(f"k{n}", size) for n, size in enumerate(sizes)])
    with open(path, "a") as file:
        file.write("hw: hw.tsv\n")
    records, dropped = read("glip-tsv", path, images=[])
    assert len(records) == 3 and dropped == {"size_mismatch": 2, "row_unreadable": 1}


def test_labels_may_point_to_their_image_lines(tmp_path):
    box, span = [1, 2, 10, 12], [[0, 10]]
    labels = [caption([box], [span], [0.9], img_id=name) for name in ("b", "a", "gone", "far", "c")]
    images = [("a.jpg", IMAGE), ("b.jpg", IMAGE), ("", IMAGE)]
    where = json.dumps({"a": 0, "b": 1, "c": 2, "far": 9})
    path = tsv_set(tmp_path, labels, images, labelmap=None, imageid2idx=where)
    records, dropped = read("glip-tsv", path, images=[])
    assert [record.provenance["file"] for record in records] == ["b.jpg", "a.jpg"]
    assert dropped == {"image_missing": 2, "row_unreadable": 1}


def test_more_labels_than_images_and_blank_lines_are_counted(tmp_path):
    path = tsv_set(tmp_path, [[], []], [("k0", IMAGE)], index=False)
    with open(tmp_path / "label.tsv", "a") as file:
        file.write("\nk9")
    (tmp_path / "img.tsv").write_text(f"k0\t{IMAGE}\n\n\n\n")
    records, dropped = read("glip-tsv", path, images=[])
    assert len(records) == 1 and dropped == {"no_boxes": 1, "row_unreadable": 3}


def test_lines_are_found_with_and_without_an_index(tmp_path, monkeypatch):
    starts = write_tsv(tmp_path / "a.tsv", [("é" * n, "x") for n in range(40)], index=False)
    monkeypatch.setattr("glipv2.data_prep.tsv_files.CHUNK", 7)
    lines = Lines(str(tmp_path / "a.tsv"))
    assert list(lines.starts) == starts
    assert lines.part(39) == (starts[39], (tmp_path / "a.tsv").stat().st_size)


@pytest.mark.parametrize("index", ["5\n9\n", "0\n7\n3\n", "0\nx\n", "0\n99999999\n", "-1\n0\n"])
def test_an_index_that_does_not_fit_is_refused(tmp_path, index):
    path = tsv_set(tmp_path, [[], []])
    (tmp_path / "label.lineidx").write_text(index)
    with pytest.raises(DataError, match="label.lineidx.*delete it"):
        read("glip-tsv", path, images=[])


def test_an_index_between_the_lines_loses_rows_and_invents_none(tmp_path):
    path = tsv_set(tmp_path, [[found("cat", [1, 2, 10, 12])]] * 2)
    (tmp_path / "label.lineidx").write_text("0\n9\n")
    records, dropped = read("glip-tsv", path, images=[])
    assert not records and dropped == {"row_unreadable": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("img: [", "not valid YAML"),
        ("- img.tsv", "must name the files `img` and `label`"),
        ("img: img.tsv", "must name the files `img` and `label`"),
        ("{img: [img.tsv], label: label.tsv}", "img must be the path of one file"),
        ("{img: gone.tsv, label: label.tsv}", "gone.tsv does not exist"),
        ("{img: img.tsv, label: label.tsv}", "names no `labelmap`"),
        ("{img: img.tsv, label: label.tsv, labelmap: set.yaml}", "must map class names"),
        ("{img: img.tsv, label: label.tsv, linelist: lines.txt}", "lines up to 9.*has 1"),
        ("{img: img.tsv, label: label.tsv, linelist: set.yaml}", "one line number per line"),
        ("{img: img.tsv, label: label.tsv, imageid2idx: set.yaml}", "set.yaml is not valid JSON"),
        ("{img: img.tsv, label: label.tsv, imageid2idx: list.json}", "must map image ids"),
    ],
)
def test_a_yaml_that_names_no_tsv_set_is_refused(tmp_path, text, message):
    path = tsv_set(tmp_path, [[found("cat", [1, 2, 10, 12])]])
    (tmp_path / "lines.txt").write_text("0\n9\n")
    (tmp_path / "list.json").write_text("[0]")
    (tmp_path / "set.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        read("glip-tsv", path, images=[])


def test_classes_may_be_a_plain_map_or_the_lines_of_a_table(tmp_path):
    labels = [[found("dog", [1, 2, 10, 12])]]
    plain = tsv_set(tmp_path, labels, labelmap={"dog": "7", "cat": 3})
    assert read("glip-tsv", plain, images=[])[0][0].regions[0].category == 1
    (tmp_path / "labelmap.tsv").write_text("dog\ncat\n")
    text = (tmp_path / "set.yaml").read_text().replace("labelmap.json", "labelmap.tsv")
    (tmp_path / "set.yaml").write_text(text)
    assert read("glip-tsv", plain, images=[])[0][0].regions[0].category == 0
