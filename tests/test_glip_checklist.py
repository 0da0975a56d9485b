"""The checklist of facts L: where each item is tested, and the tests that have no better place."""

from pathlib import Path

import pytest
import torch

from glipv2.model.fusion import ImageTextAttention
from glipv2.model.heads import PRIOR, AlignmentHead
from glipv2.model.losses import anchor_words

CHECKLIST = {
    "1 sizes": ["test_model_convert.py::test_the_published_models_have_the_published_size"],
    "2 fusion": [
        "test_model_fusion.py::test_folded_projections_equal_the_plain_form",
        "test_model_fusion.py::test_with_a_zero_scale_only_the_layer_norm_is_left",
    ],
    "3 attention masks": [
        "test_model_fusion.py::test_padding_tokens_are_no_keys_for_the_image",
        "test_glip_checklist.py::test_attention_of_a_word_over_the_image_sums_to_one",
    ],
    "4 dynamic ReLU": ["test_model_dynamic_head.py::test_the_dynamic_relu_starts_as_a_relu"],
    "5 prior": ["test_glip_checklist.py::test_a_location_without_features_expects_no_word"],
    "6 assignment": [
        "test_model_assign.py::test_a_batch_is_assigned_like_one_image_after_the_other",
        "test_model_assign.py::test_no_boxes_at_all_is_all_background",
        "test_glip_parity.py::test_every_tensor_of_the_original_is_reproduced",
    ],
    "7 spans to tokens": [
        "test_model_prompts.py::test_spans_on_white_space_fall_inwards",
        "test_model_prompts.py::test_every_token_of_a_phrase_is_positive_and_no_other",
        "test_model_prompts.py::test_repeated_words_are_dealt_to_the_phrases_one_by_one",
        "test_glip_checklist.py::test_background_is_no_word_even_in_a_full_text",
    ],
    "8 prompts": [
        "test_negatives.py::test_half_the_detection_prompts_are_full_and_the_others_hold_any_number",
        "test_negatives.py::test_a_detection_prompt_holds_its_positives_once_at_any_place",
        "test_negatives.py::test_negatives_stop_at_the_token_budget_and_positives_come_first",
    ],
    "9 inter-image contrast": [
        "test_model_losses.py::test_it_equals_a_loop_over_all_pairs",
        "test_model_losses.py::test_a_shared_category_pulls_across_images_but_captions_keep_to_themselves",
        "test_model_glip.py::test_two_ranks_with_half_a_batch_each_learn_what_one_rank_learns_from_the_whole",
    ],
    "10 masked words": [
        "test_masking.py::test_masking_hides_the_promised_share_and_only_open_tokens"
    ],
    "11 chunks and batches": [
        "test_model_grounder.py::test_one_chunk_that_holds_all_categories_is_a_single_prompt",
        "test_model_grounder.py::test_any_batch_size_gives_the_same_boxes",
    ],
    "12 masks": [
        "test_model_mask_network.py::test_a_phrase_gets_the_mean_of_its_tokens_logits",
        "test_model_mask_head.py::test_pasting_equals_a_loop_over_pixels",
    ],
    "13 captions": [
        "test_model_understanding.py::test_no_word_hears_a_later_one_unless_attention_is_open"
    ],
    "14 fixed AP": ["test_lvis_eval.py::test_federated_case_worked_out_on_paper"],
}


@pytest.mark.parametrize("item", CHECKLIST)
def test_every_item_has_its_tests(item: str) -> None:
    for place in CHECKLIST[item]:
        file, name = place.split("::")
        assert f"def {name}(" in (Path(__file__).parent / file).read_text(), place


def test_attention_of_a_word_over_the_image_sums_to_one() -> None:
    torch.manual_seed(0)
    attention = ImageTextAttention(8, 12, 16, heads=2, dropout=0.0, scale=1.0).double()
    # Values that are the same everywhere leave nothing but the sum of the probabilities.
    torch.nn.init.zeros_(attention.image_value.weight)
    torch.nn.init.normal_(attention.image_value.bias)
    image, text = (torch.randn(2, n, d, dtype=torch.float64) for n, d in ((30, 8), (5, 12)))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    _, words = attention(image, text, mask)
    expected = attention.norm_text(text) + attention.text_out(attention.image_value.bias)
    torch.testing.assert_close(words, expected)


def test_a_location_without_features_expects_no_word() -> None:
    head = AlignmentHead(16, 24, start_temperature=1.0)
    logits = head(torch.zeros(1, 3, 16), torch.randn(1, 4, 24))
    torch.testing.assert_close(logits.sigmoid(), torch.full((1, 3, 4), PRIOR))


def test_background_is_no_word_even_in_a_full_text() -> None:
    """GLIP marks the last column for background, which is [SEP] in a text of full length."""
    positive = torch.zeros(1, 2, 256, dtype=torch.bool)
    positive[0, 1, 3:5] = True
    words = anchor_words(torch.tensor([[-1, 1, -1]]), positive)
    assert words[0, 1].nonzero().flatten().tolist() == [3, 4]
    assert not words[0, [0, 2]].any()
