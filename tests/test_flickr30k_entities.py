import io

import pytest
from PIL import Image

from glipv2.data_prep.flickr30k_entities import parse_sentence
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.sources import open_source
from glipv2.eval.grounding import phrases_of
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import BadSample, DataError


def jpeg(size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (90, 120, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def entity(names, box=None, extra=""):
    tags = ("xmin", "ymin", "xmax", "ymax")
    inner = "".join(f"<{t}>{v}</{t}>" for t, v in zip(tags, box or (), strict=False))
    named = "".join(f"<name>{name}</name>" for name in names.split())
    return f"<object>{named}{f'<bndbox>{inner}</bndbox>' if box else ''}{extra}</object>"


def xml(*objects, size=(40, 30)):
    stated = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>1.jpg</filename>{stated}{''.join(objects)}</annotation>"


def make(tmp_path, sentences, annotations, images=("1",), folder="flickr30k-images"):
    for name in ("Sentences", "Annotations", folder):
        (tmp_path / name).mkdir()
    for stem, text in sentences.items():
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "Sentences" / f"{stem}.txt").write_bytes(data)
    for stem, text in annotations.items():
        (tmp_path / "Annotations" / f"{stem}.xml").write_text(text)
    for stem in images:
        (tmp_path / folder / f"{stem}.jpg").write_bytes(jpeg())
    return tmp_path


def read(root, **options):
    dropped = Dropped()
    source = open_source(PrepareConfig(source="flickr30k-entities", root=str(root), **options))
    return list(source.records(dropped)), dropped


def test_every_box_of_a_chain_becomes_a_region_with_the_span_of_its_phrase(tmp_path):
    sentence = (
        "[/EN#1/people Two  men] wave at [/EN#2/animals/other a dog] in [/EN#3/scene a park] , "
        "[/EN#0/notvisual one] calls [/EN#1/people their] names ."
    )
    objects = [
        entity("1", (1, 1, 10, 30)),
        entity("1", (21, 1, 40, 30)),
        entity("3", extra="<scene>1</scene><nobndbox>1</nobndbox>"),
        entity("2 9", (5, 6, 5, 6)),
    ]
    (record,), dropped = read(make(tmp_path, {"1": sentence}, {"1": xml(*objects)}))
    assert record.caption == "Two men wave at a dog in a park , one calls their names ."
    assert (record.task, record.provenance["sentence"]) == ("grounding", 0)
    told = [
        (r.phrase, record.caption[slice(*r.spans[0])], r.box, chain, group)
        for r, chain, group in zip(
            record.regions, record.provenance["chains"], record.provenance["groups"], strict=True
        )
    ]
    first, second = (0, 0, 10, 30), (20, 0, 40, 30)
    assert told == [
        ("Two men", "Two men", first, "1", "people"),
        ("Two men", "Two men", second, "1", "people"),
        ("a dog", "a dog", (4, 5, 5, 6), "2", "animals"),
        ("their", "their", first, "1", "people"),
        ("their", "their", second, "1", "people"),
    ]
    assert dropped == {"phrase_without_box": 2}
    truth = [(p.text, len(p.boxes), p.group) for p in phrases_of(record)]
    assert truth == [("Two men", 2, "people"), ("a dog", 1, "animals"), ("their", 2, "people")]


def test_each_sentence_is_a_record_and_one_without_boxes_is_left_out(tmp_path):
    sentences = {
        "1": "[/EN#1/people A man] .\r\n\r\nNobody .\n[/EN#1/people He] .",
        "2": "[/EN#5/people A girl]",
    }
    annotations = {"1": xml(entity("1", (1, 1, 9, 9))), "2": xml(entity("5", (1, 1, 9, 9)))}
    records, dropped = read(make(tmp_path, sentences, annotations, ("1", "2"), "flickr30k_images"))
    assert [record.caption for record in records] == ["A man .", "He .", "A girl"]
    assert len({record.key for record in records}) == 3
    assert dropped == {"boxes_missing": 1} and dropped.first["boxes_missing"] == "1.txt line 3"


@pytest.mark.parametrize(
    ("line", "text", "words"),
    [
        ("[/EN#1/people A man]", "A man", ["A man"]),
        ("[/EN#1/people/other A man] and [/EN#22/x b]", "A man and b", ["A man", "b"]),
        ("a [b] c", "a [b] c", []),
        ("[/EN#1/people ] x", " x", [""]),
    ],
)
def test_marks_are_taken_out_and_the_spans_hold_the_words(line, text, words):
    found, phrases = parse_sentence(line)
    assert found == text and [found[p.start : p.end] for p in phrases] == words


@pytest.mark.parametrize(
    "line",
    [
        "[/EN#1/people A man",
        "[/EN#x/people A man]",
        "[/EN#1 A man]",
        "[/EN#1/people A [/EN#2/b c]]",
    ],
)
def test_broken_brackets_are_refused(line):
    with pytest.raises(BadSample) as caught:
        parse_sentence(line)
    assert caught.value.reason == "markup_unreadable"


def test_odd_text_keeps_exact_spans(tmp_path):
    sentence = "\ufeff \u202eA\t[/EN#1/people r\u200bed\x07  \u00a0man ] 👩\u200d🚀 "
    sentence += "[/EN#1/people \u0301 ] ."
    (record,), dropped = read(
        make(tmp_path, {"1": sentence}, {"1": xml(entity("1", (1, 1, 9, 9)))})
    )
    assert record.caption == "A red man 👩\u200d🚀 \u0301 ."
    assert [record.caption[slice(*r.spans[0])] for r in record.regions] == ["red man", "\u0301"]
    assert not dropped


def test_everything_broken_is_counted_by_reason(tmp_path):
    good = "[/EN#1/people A man]"
    long = "word " * 300 + good
    sentences = {
        "bytes": b"caf\xe9 " + good.encode(),
        "brackets": "[/EN#1/people A man",
        "digits": "[/EN#1/people 12 3]",
        "empty": "",
        "noimage": good,
        "noxml": good,
        "badxml": good,
        "bomb": good,
        "resized": good,
        "boxes": good,
        "long": long,
        "many": good * 40,
        "void": f"[/EN#1/people ] {good}",
    }
    boxes = [(9, 9, 2, 2), ("nan", 1, 2, 3), (50, 1, 60, 9), ("", 1, 2, 3), (5, 5, 4, 6)]
    annotations = dict.fromkeys(sentences, xml(entity("1", (1, 1, 9, 9))))
    annotations |= {
        "badxml": "<annotation>",
        "bomb": '<!DOCTYPE x [<!ENTITY a "aa">]><annotation/>',
        "resized": xml(entity("1", (1, 1, 9, 9)), size=(80, 60)),
        "boxes": xml(*(entity("1", box) for box in boxes)),
        "many": xml(*(entity("1", (1, 1, 9, 9)) for _ in range(30))),
    }
    del annotations["noxml"]
    images = [name for name in sentences if name != "noimage"]
    records, dropped = read(make(tmp_path, sentences, annotations, images))
    assert [record.caption for record in records] == ["A man"]
    assert dropped == {
        "annotation_unreadable": 4,
        "markup_unreadable": 1,
        "caption_empty": 1,
        "image_missing": 1,
        "entry_missing": 1,
        "size_mismatch": 1,
        "boxes_missing": 2,
        "box_inverted": 1,
        "box_not_finite": 1,
        "box_outside": 1,
        "box_unreadable": 1,
        "box_empty": 1,
        "caption_cut": 1,
        "boxes_too_many": 1,
        "span_unusable": 2,
    }
    assert dropped.first["annotation_unreadable"] == "badxml.txt line 1"


def test_a_list_takes_some_images_and_several_image_folders_are_searched(tmp_path):
    sentences = dict.fromkeys(("1", "2", "3"), "[/EN#1/people A man]")
    annotations = dict.fromkeys(("1", "2", "3"), xml(entity("1", (1, 1, 9, 9))))
    root = make(tmp_path, sentences, annotations, ("1", "2"), "train")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "3.jpg").write_bytes(jpeg())
    (tmp_path / "test.txt").write_text("3\n1\n")
    images = (str(tmp_path / "train"), str(tmp_path / "test"))
    records, dropped = read(root, images=images, list=str(tmp_path / "test.txt"))
    assert [r.provenance["file"] for r in records] == ["1.jpg", "3.jpg"] and not dropped


def test_what_the_user_named_must_be_there(tmp_path):
    with pytest.raises(DataError, match="Entities folder .*Sentences does not exist"):
        read(tmp_path)
    root = make(tmp_path, {}, {}, (), "pictures")
    with pytest.raises(DataError, match="Sentences is empty; give the folder that holds the files"):
        read(root)
    for folder in ("Sentences", "Annotations", "pictures"):
        (tmp_path / folder / "readme.md").write_text("x")
    with pytest.raises(DataError, match="no flickr30k_images or flickr30k-images; give images"):
        read(root)
    with pytest.raises(DataError, match=r"no \.txt file in .*Sentences"):
        read(root, images=(str(tmp_path / "pictures"),))
    with pytest.raises(DataError, match="image folder .*gone does not exist"):
        read(root, images=(str(tmp_path / "gone"),))
    (tmp_path / "Sentences" / "1.txt").write_text("x")
    (tmp_path / "ids.txt").write_text("1\n7\n8\n")
    with pytest.raises(DataError, match=r"2 of 3 names of .*ids.txt .* the first is 7.txt"):
        read(root, images=(str(tmp_path / "pictures"),), list=str(tmp_path / "ids.txt"))


def test_equal_content_is_equal_and_any_change_shows(tmp_path):
    root = make(tmp_path, {"1": "[/EN#1/people A man]"}, {"1": xml(entity("1", (1, 1, 9, 9)))})
    options = PrepareConfig(source="flickr30k-entities", root=str(root))
    before = open_source(options).content
    assert open_source(options).content == before
    (tmp_path / "Annotations" / "1.xml").write_text(xml(entity("1", (1, 1, 9, 8))))
    assert open_source(options).content != before
