import json
import re
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glipv2.data_prep import json_stream
from glipv2.data_prep.json_stream import Lookup, items, sections
from glipv2.pipeline import storage
from glipv2.pipeline.errors import DataError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
LAYOUTS = st.sampled_from([{}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}])
CHUNKS = st.integers(1, 40)
URL = "memory://json_stream/file.json"


def write(text):
    storage.write_bytes(URL, text.encode("utf-8", "surrogatepass"))


def everything(url=URL):
    return {name: list(values) for name, values in sections(url)}


@pytest.fixture
def chunk(monkeypatch):
    return lambda size: monkeypatch.setattr(json_stream, "CHUNK", size)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(), st.lists(VALUES, max_size=4) | VALUES), LAYOUTS, CHUNKS)
def test_an_object_gives_its_lists_at_any_chunk_size(document, layout, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", size)
        text = json.dumps(document, **layout)
        storage.write_bytes(URL, text.encode("utf-8", "replace"))
        expected = json.loads(text.encode("utf-8", "replace"))
        assert everything() == {k: v for k, v in expected.items() if isinstance(v, list)}


@settings(max_examples=150, deadline=None)
@given(st.lists(VALUES), LAYOUTS, CHUNKS)
def test_a_list_gives_its_items_at_any_chunk_size(document, layout, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", size)
        text = json.dumps(document, **layout).encode("utf-8", "replace")
        storage.write_bytes(URL, text)
        assert list(items(URL)) == json.loads(text)


@settings(max_examples=300, deadline=None)
@given(st.data(), CHUNKS)
def test_a_broken_file_is_a_data_error_exactly_when_json_refuses_it(data, size):
    """A character of a valid document taken out, doubled or replaced."""
    text = json.dumps(data.draw(st.lists(VALUES, max_size=4)))
    place = data.draw(st.integers(0, len(text) - 1))
    text = text[:place] + data.draw(st.sampled_from(list('",:[]{}x10.e-'))) * data.draw(
        st.integers(0, 2)
    ) + text[place + 1 :]  # fmt: skip
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", size)
        write(text)
        if isinstance(expected, list):
            assert list(items(URL)) == expected
        else:
            with pytest.raises(DataError, match=r"file\.json is (not valid JSON|no JSON list)"):
                list(items(URL))


@pytest.mark.parametrize(
    "text",
    ["", " ", "{", "[", "[]", '"a"', '{"a": [1,]}', '{"a": [1],}', '{"a": [1]', '{"a": [1]} x',
     '{"a" [1]}', '{1: [1]}', '{"a": [1 2]}', '{"a": [tru]}', '{"a": 1e}', '{"a": [' + "[" * 9999,
     '{"a": ["', '{"a": [1]}{"a": [2]}', "<html>not found</html>"],
)  # fmt: skip
def test_what_is_no_object_is_refused_with_file_place_and_cure(text, chunk):
    for size in (1, 3, 1 << 20):
        chunk(size)
        write(text)
        with pytest.raises(DataError, match=r"file\.json is not valid JSON near character \d+.*;"):
            everything()


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_the_place_is_said_once_and_is_that_of_the_file(chunk, size):
    chunk(size)
    text = '{"images": [{"id": 1}, {"id": 2}], "annotations": [{"id": 1}, {"id": '
    for broken, place in [(text, len(text)), (text + "x}]}", len(text))]:
        write(broken)
        with pytest.raises(DataError) as caught:
            everything()
        assert f"near character {place}: Expecting value; fetch" in str(caught.value)
    storage.write_bytes(URL, b'{"a": [1, "caf\xe9"]}')
    with pytest.raises(DataError) as caught:
        everything()
    assert len(re.findall(r"\d+", str(caught.value).replace(URL, ""))) == 2  # and UTF-8


def test_bytes_that_are_no_utf8_are_refused_and_a_byte_order_mark_is_not():
    storage.write_bytes(URL, b'{"a": ["caf\xe9"]}')
    with pytest.raises(DataError, match="not valid JSON"):
        everything()
    storage.write_bytes(URL, b'\xef\xbb\xbf{"a": [1]}')
    assert everything() == {"a": [1]}


def test_numbers_cut_by_a_chunk_are_whole_and_nan_is_read(chunk):
    numbers = [0, -1, 12345678901234567890, 1.5, -0.25, 1e10, 1.5e-7, 2e22]
    for size in range(1, 12):
        chunk(size)
        write(json.dumps(numbers))
        assert list(items(URL)) == numbers
    write("[NaN, Infinity, -Infinity]")
    assert str(list(items(URL))) == "[nan, inf, -inf]"


def test_only_the_section_asked_for_is_given_and_a_missing_one_named():
    write('{"info": {"a": [1]}, "images": [1, 2], "annotations": [3], "x": null}')
    assert list(items(URL, "annotations")) == [3]
    with pytest.raises(DataError, match="lacks the list 'boxes'"):
        list(items(URL, "boxes"))
    names = [name for name, _ in sections(URL)]  # items that nobody takes are passed over
    assert names == ["images", "annotations"]


def test_an_endless_item_is_given_up(monkeypatch):
    monkeypatch.setattr(json_stream, "MAX_ITEM", 10_000)
    monkeypatch.setattr(json_stream, "CHUNK", 1_000)
    write('["' + "x" * 200_000)
    with pytest.raises(DataError, match="not valid JSON"):
        list(items(URL))


def test_a_file_of_60_mb_is_read_in_flat_memory(tmp_path):
    path = tmp_path / "large.json"
    item = json.dumps({"image_id": 1, "text": "x" * 6_000})
    with open(path, "w") as file:
        file.write('{"annotations": [' + item)
        for _ in range(9_999):
            file.write(",\n" + item)
        file.write("]}")
    assert path.stat().st_size > 60e6
    tracemalloc.start()
    count = sum(1 for _ in items(str(path), "annotations"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 10_000 and peak < 15e6


FIELDS = st.integers(-3, 3) | st.sampled_from(["a", "1", "é", "\ud800"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["id", "b"]), FIELDS | st.just(1.5) | st.none())))
def test_a_lookup_is_a_dictionary_of_lists(objects):
    expected = {}
    for item in objects:
        if isinstance(item.get("id"), int | str):
            expected.setdefault(item["id"], []).append(item)
    lookup = Lookup([*objects, 7, [1], None], "id")
    assert list(lookup.values()) == list(expected)
    assert {value: lookup.get(value) for value in lookup.values()} == expected
    assert len(lookup) == sum(map(len, expected.values())) and lookup.get("absent") == []
