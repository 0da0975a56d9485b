import io
import json
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image

from glipv2.data_prep.pairs import MAX_CAPTION, MAX_LINE
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.sources import open_source
from glipv2.data_prep.text_cleaning import clean_text
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import DataError

SAMPLES = Path(__file__).parents[1] / "infra" / "samples" / "web_pairs"


def image_bytes(image_format="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (90, 120, 30)).save(buffer, image_format)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "one.jpg").write_bytes(image_bytes())
    (tmp_path / "two.png").write_bytes(image_bytes("PNG"))
    return tmp_path


def read(root, **options):
    dropped = Dropped()
    source = open_source(PrepareConfig(source="pairs", root=str(root), **options))
    return list(source.records(dropped)), dropped


def test_json_lines_give_one_record_per_line_and_prefer_the_alt_text(folder):
    rows = [
        {"image": "images/one.jpg", "alt": "A  red\ndog.", "caption": "Rex (credit: me)"},
        {"image": "one.jpg", "alt": "", "caption": "Found in images/", "source": "the web"},
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records, dropped = read(folder)
    assert [record.caption for record in records] == ["A red dog.", "Found in images/"]
    assert {record.task for record in records} == {"pairs"} and not dropped
    assert records[1].provenance["origin"] == "the web"
    assert len({record.key for record in records}) == 2  # one image, two captions
    (chosen, _), _ = read(folder / "pairs.jsonl", caption_field="caption")
    assert chosen.caption == "Rex (credit: me)"


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.tsv", "\t"), ("captions.txt", ",")])
def test_tables_with_a_header_are_read(folder, name, mark):
    lines = [f"Image{mark}Caption", f'one.jpg{mark}"a dog, brown"', f"two.png{mark}a cat"]
    (folder / name).write_text("\n".join(lines), encoding="utf-8-sig")
    records, dropped = read(folder)
    assert [record.caption for record in records] == ["a dog, brown", "a cat"] and not dropped
    assert [record.image_format for record in records] == ["jpg", "png"]


def test_text_files_beside_images_are_read_a_caption_a_line(folder):
    (folder / "two.txt").write_text("a cat\n\na small cat\n")
    (folder / "lonely.txt").write_text("no image")
    (folder / "images" / "one.txt").write_text("not looked at: another folder")
    records, dropped = read(folder)
    assert [record.caption for record in records] == ["a cat", "a small cat"]
    assert dropped == {"image_missing": 1}


def test_rows_that_can_not_be_used_are_counted_and_skipped(folder):
    (folder / "bad.jpg").write_bytes(image_bytes()[:200])
    (folder / "named.webp").write_bytes(image_bytes())
    rows = [
        '{"image": "one.jpg", "alt": "fine"}',
        '{"image": "one.jpg", "alt": ',
        "[" * 100_000,
        "[1]",
        '{"image": 7, "alt": "x"}',
        '{"image": "one.jpg"}',
        '{"image": "one.jpg", "alt": " \\u0000 "}',
        '{"image": "one.jpg", "alt": "...!"}',
        '{"image": "one.jpg", "alt": "one"}',
        '{"image": "gone.jpg", "alt": "x y"}',
        '{"image": "../one.jpg", "alt": "x y"}',
        '{"image": "bad.jpg", "alt": "x y"}',
        '{"image": "named.webp", "alt": "x y"}',
        json.dumps({"image": "n" * 5000 + ".jpg", "alt": "x y"}),
        '{"image": "\\ud800.jpg", "alt": "x y"}',
        json.dumps({"image": "one.jpg", "alt": "word " * 1000}),
    ]
    (folder / "pairs.jsonl").write_bytes(b"\n".join(row.encode() for row in rows) + b"\n\xff\xfe")
    records, dropped = read(folder)
    assert records[0].caption == "fine" and len(records) == 2
    assert len(records[1].caption) <= MAX_CAPTION and records[1].caption.endswith("word")
    assert dropped == {
        "row_unreadable": 6,
        "caption_empty": 2,
        "caption_is_filename": 1,
        "image_missing": 3,
        "image_outside_folder": 1,
        "image_undecodable": 1,
        "image_wrong_extension": 1,
        "caption_cut": 1,
    }
    assert dropped.first["row_unreadable"] == "line 2"


def test_images_without_a_text_file_are_counted(folder):
    (folder / "two.txt").write_text("a cat")
    for name in ("three.jpg", "four.gif"):
        (folder / name).write_bytes(image_bytes())
    records, dropped = read(folder)
    assert [record.caption for record in records] == ["a cat"]
    assert dropped == {"text_missing": 2}
    assert sorted(note.where for note in dropped.notes) == ["four.gif", "three.jpg"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_field_that_no_row_has_is_refused_at_once(folder, name):
    rows = {"a.jsonl": '{"image": "one.jpg", "words": "x"}\n{"url": "y"}\n7\n',
            "a.csv": "Image,Words,URL\none.jpg,x,y\ntwo.png,x,y\n"}  # fmt: skip
    (folder / name).write_text(rows[name])
    message = rf"{name}: none of 2 rows has the field 'caption'; there are image, words, url$"
    with pytest.raises(DataError, match=message):
        read(folder, caption_field="caption")
    assert read(folder, caption_field="words")[0][0].caption == "x"


def test_an_empty_folder_is_said_to_be_empty(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path} is empty; give a folder or a table"):
        read(tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "set" / "a.csv").write_text("image,caption\none.jpg,a dog\n")
    with pytest.raises(DataError, match="image folder .*images is empty"):
        read(tmp_path / "set", images=(str(tmp_path / "images"),))


def test_rows_of_another_width_or_encoding_are_counted(folder):
    (folder / "a.csv").write_bytes(b"image,caption\none.jpg,a dog\none.jpg\none.jpg,caf\xe9\n")
    records, dropped = read(folder)
    assert [record.caption for record in records] == ["a dog"]
    assert dropped == {"row_unreadable": 2}


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_large_tables_are_read_in_flat_memory(folder, name):
    line = '{"image": "one.jpg", "alt": "%s"}\n' if name == "a.jsonl" else "one.jpg,%s\n"
    with open(folder / name, "w") as file:
        file.write("" if name == "a.jsonl" else "image,alt\n")
        for _ in range(2_000):
            file.write(line % ("a dog " * 1_600))
        file.write(line % ("x" * 5 * MAX_LINE))  # one line as long as a file
    source = open_source(PrepareConfig(source="pairs", root=str(folder)))
    dropped = Dropped()
    tracemalloc.start()
    rows = sum(1 for _ in source.rows(dropped))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows == 2_000 and dropped["row_unreadable"] >= 1
    assert (folder / name).stat().st_size > 20e6 and peak < 8e6


def test_the_web_sample_is_read_whole_and_says_who_made_it():
    records, dropped = read(SAMPLES)
    assert len(records) == 36 and not dropped
    assert max(max(record.width, record.height) for record in records) <= 320
    lines = (SAMPLES / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    captions = [json.loads(line)["caption"] for line in lines]
    assert all("redit:" in text for text in captions)
    assert not any(kind in text for text in captions for kind in ("BY-SA", "BY-NC", "BY-ND"))


def test_text_is_made_safe_to_store_and_show():
    assert clean_text(" a\t\x07b\ud800\u202e\u200bc\n d ") == "a bc d"
    assert clean_text("👩\u200d🚀 é") == "👩\u200d🚀 é"


def test_what_the_user_named_must_be_there(folder):
    with pytest.raises(DataError, match="nowhere does not exist"):
        read(folder / "nowhere")
    with pytest.raises(DataError, match="no .jsonl, .csv or .tsv"):
        read(folder)
    with pytest.raises(DataError, match="two.png is none of .jsonl"):
        read(folder / "two.png")
    (folder / "a.csv").write_text("picture,words\n")
    with pytest.raises(DataError, match=r"a.csv: the first row .* found picture, words"):
        read(folder)
    (folder / "b.tsv").write_text("image\tcaption\n")
    with pytest.raises(DataError, match="several tables .a.csv, b.tsv."):
        read(folder)
