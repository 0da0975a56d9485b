import numpy as np

from glipv2.pipeline.masking import IGNORE, Masking, mask_tokens, tokens_within


def test_masking_hides_the_promised_share_and_only_open_tokens():
    rng = np.random.default_rng(0)
    masking = Masking(probability=0.15, mask_id=4, vocab_size=100, special_ids=frozenset(range(5)))
    ids_T = rng.integers(5, 100, 40_000)
    ids_T[::10] = 2  # special
    open_T = np.arange(40_000) % 2 == 0
    corrupted_T, labels_T = mask_tokens(ids_T, open_T, masking, rng)
    chosen_T = labels_T != IGNORE
    assert not chosen_T[~open_T].any()
    assert not chosen_T[ids_T < 5].any()
    assert np.array_equal(corrupted_T[~chosen_T], ids_T[~chosen_T])
    assert np.array_equal(labels_T[chosen_T], ids_T[chosen_T])
    assert abs(chosen_T[open_T & (ids_T >= 5)].mean() - 0.15) < 0.01
    assert abs((corrupted_T[chosen_T] == 4).mean() - 0.8) < 0.03
    assert abs((corrupted_T[chosen_T] == ids_T[chosen_T]).mean() - 0.1) < 0.03
    assert (corrupted_T[chosen_T] >= 4).all()


def test_tokens_within_spans_are_those_that_share_a_character_with_one():
    offsets = [(0, 0), (0, 3), (4, 10), (10, 11), (0, 0)]
    assert tokens_within(offsets, [(5, 10)]).tolist() == [False, False, True, False, False]
    assert tokens_within(offsets, [(0, 1), (10, 11)]).tolist() == [False, True, False, True, False]
    assert tokens_within(offsets, []).tolist() == [False] * 5
