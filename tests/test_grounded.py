import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glipv2.data_prep.grounded import clean_caption
from glipv2.data_prep.pairs import MAX_CAPTION
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.text_cleaning import clean_text
from glipv2.pipeline.errors import BadSample

TEXTS = st.text(st.sampled_from("ab é.\n\t \x00\u200b\u2028"), max_size=30)


@settings(max_examples=300, deadline=None)
@given(st.tuples(TEXTS, TEXTS, TEXTS))
def test_a_span_still_holds_its_words_once_the_caption_is_clean(parts):
    before, words, after = parts
    raw, dropped = "x" + before + words + after, Dropped()
    caption = clean_caption(raw, dropped, "here")
    assert caption.text == clean_text(raw)
    start = 1 + len(before)
    spans = caption.spans([[start, start + len(words)]], dropped, "here")
    assert caption.phrase(spans) == clean_text(words)
    assert bool(spans) != bool(dropped)


@pytest.mark.parametrize(
    "span", [[3, 3], [4, 2], [-1, 3], [0, 12], [0], [0, 1, 2], [0.0, 3], [True, 3], None, "ab", 3]
)
def test_what_is_no_span_of_the_caption_is_counted(span):
    dropped = Dropped()
    caption = clean_caption("a red ball.", dropped, "row 7")
    assert caption.spans([[2, 5], span, [0, 11]], dropped, "row 7") == ((0, 11), (2, 5))
    assert dropped == {"span_unusable": 1} and dropped.first == {"span_unusable": "row 7"}


def test_equal_spans_are_one_and_sorted():
    caption = clean_caption("a red ball", Dropped(), "")
    assert caption.spans([[6, 10], [0, 5], [6, 10]], Dropped(), "") == ((0, 5), (6, 10))
    assert caption.spans(None, Dropped(), "") == ()
    assert caption.phrase(caption.whole) == "a red ball"


def test_a_caption_too_long_is_cut_and_loses_the_spans_behind():
    dropped = Dropped()
    caption = clean_caption("word " * 300, dropped, "")
    assert len(caption.text) <= MAX_CAPTION and caption.text.endswith("word")
    assert caption.spans([[1490, 1494]], dropped, "") == ()
    assert dropped == {"caption_cut": 1, "span_unusable": 1}


@pytest.mark.parametrize(
    ("raw", "reason"), [(None, "row_unreadable"), (7, "row_unreadable"), (" 7 \n", "caption_empty")]
)
def test_a_caption_without_words_is_a_bad_sample(raw, reason):
    with pytest.raises(BadSample) as caught:
        clean_caption(raw, Dropped(), "")
    assert caught.value.reason == reason
