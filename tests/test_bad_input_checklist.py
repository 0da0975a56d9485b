"""Every bad input that data may hold, and the tests that hold its promised outcome.

A row of the table has one outcome; several tests hold it where input comes in several ways: tars,
images and annotations of others (`glipv2 prepare`), and our own shards (loader, `glipv2 check`).
"""

import pytest
from checklist import assert_tests_exist

DATA = "test_bad_input_data.py"
TEXT = "test_bad_input_text.py"
WEB = "test_webdataset.py"
JSON = "test_record_json.py"
DAMAGED_TAR = f"{WEB}::test_a_damaged_tar_is_read_up_to_the_place_that_is_named"
NO_TAR = f"{DATA}::test_a_file_that_is_no_tar_is_refused_with_its_place"
REPLACED = f"{DATA}::test_a_shard_replaced_by_something_else_is_refused"
EVERY_DAMAGE = "test_damage.py::test_every_truncation_and_flipped_bit_is_noticed_and_none_is_used"
SAMPLES = f"{WEB}::test_samples_that_can_not_be_used_are_counted_by_reason"
PAIRED = f"{DATA}::test_a_sample_is_never_paired_across_tars_or_with_what_is_not_beside_it"
PICTURE = f"{DATA}::test_a_picture_is_read_or_refused_in_time"
COLOURS = f"{DATA}::test_photoshops_jpeg_and_the_first_frame_have_the_right_colours"
LARGEST = f"{DATA}::test_the_largest_pictures_are_prepared_within_a_gb"
BOXES = f"{TEXT}::test_every_kind_of_box_is_kept_clipped_or_dropped_by_rule"
BOX_RULE = "test_voc.py::test_the_written_box_rule"
ANY_BOXES = "test_model_bad_input.py::test_any_boxes_train"
CAPTIONS = f"{TEXT}::test_every_kind_of_caption_is_cleaned_cut_or_dropped"
SPANS = f"{TEXT}::test_spans_off_by_one_past_the_end_and_overlapping"
DESCRIPTION = f"{JSON}::test_a_broken_description_is_a_bad_sample_with_its_reason"
ODD_JSON = f"{TEXT}::test_odd_json_beside_an_image_costs_only_its_sample"
REFUSED = f"{WEB}::test_members_that_can_not_be_used_are_counted_and_never_read"
LYING_SIZE = f"{WEB}::test_a_size_that_is_a_lie_ends_the_tar"
FORMATS = "test_images.py::test_other_formats_are_refused_by_their_first_bytes"
FINITE = "test_model_glip.py::test_losses_are_finite_and_every_parameter_has_a_gradient"
FUZZ = "test_fuzz.py::test_five_seconds_find_nothing"

CHECKLIST = {
    "1 tar: object, offset, what was expected and found": {
        "truncated": [DAMAGED_TAR, NO_TAR, REPLACED, EVERY_DAMAGE],
        "bit-flipped": [
            EVERY_DAMAGE,
            "test_damaged_shards.py::test_an_altered_byte_condemns_its_own_sample_only",
            "test_check.py::test_a_flipped_bit_is_found_with_its_sample_and_its_place",
            f"{WEB}::test_no_damage_makes_a_traceback_and_members_stay_inside",
        ],
        "zero length": [NO_TAR, REPLACED, DAMAGED_TAR],
        "HTML error page": [NO_TAR, REPLACED, DAMAGED_TAR],
        "gzip": [NO_TAR, REPLACED, DAMAGED_TAR],
    },
    "2 sample: a reason code, never paired across shards": {
        "without image or text": [
            SAMPLES,
            f"{JSON}::test_a_sample_without_image_or_description_is_a_bad_sample",
        ],
        "keys not adjacent": [PAIRED],
        "duplicate key in a shard": [
            SAMPLES,
            "test_shards.py::test_keys_that_repeat_or_could_leave_the_folder_are_refused",
        ],
        "duplicate key across shards": [
            PAIRED,
            f"{WEB}::test_keys_are_unique_across_tars_and_texts_may_be_json_alone",
            "test_check.py::test_a_key_that_occurs_twice_is_found_in_any_shards",
        ],
    },
    "3 image: decoded, or a reason code; under 1 GB and 2 s": {
        "JPEG bomb": [
            PICTURE,
            LARGEST,
            "test_images.py::test_an_image_of_too_many_pixels_is_refused_from_its_header",
            "test_bad_input.py::test_a_spoilt_sample_is_counted_noted_and_left_out",
        ],
        "PNG zTXt bomb": [PICTURE],
        "16-bit PNG": [
            PICTURE,
            LARGEST,
            "test_images.py::test_grey_cmyk_palette_and_two_byte_images_become_rgb",
        ],
        "CMYK and YCCK JPEG": [PICTURE, COLOURS],
        "progressive with 10k scans": [
            PICTURE,
            LARGEST,
            f"{DATA}::test_scans_are_those_of_the_picture_itself",
        ],
        "animated GIF and WebP": [PICTURE, COLOURS, LARGEST],
        "SVG, FITS": [
            PICTURE,
            "test_images.py::test_other_formats_are_refused_by_their_first_bytes",
        ],
        "EXIF rotation": ["test_images.py::test_exif_orientation_turns_the_image"],
        "1x1, 1x5000": [PICTURE, "test_model_bad_input.py::test_images_thinner_than_any_window"],
        "truncated at 50%": [
            PICTURE,
            "test_images.py::test_an_image_cut_in_half_is_undecodable",
            "test_loader.py::test_an_image_that_does_not_decode_is_skipped_and_reported",
        ],
        "wrong extension": [
            PICTURE,
            f"{JSON}::test_an_image_under_the_wrong_extension_is_a_bad_sample",
        ],
    },
    "4 box: kept, clipped or dropped by the written rule; finite loss": {
        "NaN": [BOXES, BOX_RULE, DESCRIPTION],
        "infinite": [BOXES, DESCRIPTION],
        "negative": [BOXES, BOX_RULE],
        "inverted": [BOXES, BOX_RULE, DESCRIPTION],
        "outside": [BOXES, BOX_RULE, DESCRIPTION],
        "zero area": [BOXES, BOX_RULE, DESCRIPTION],
        "10,000 boxes": [BOXES, DESCRIPTION],
        "normalised": [BOXES],
        "strings": [BOXES, DESCRIPTION],
        "overflow": [BOXES, DESCRIPTION],
        "finite loss": [
            ANY_BOXES,
            "test_model_glip.py::test_losses_are_finite_and_every_parameter_has_a_gradient",
        ],
        "any box": [FUZZ],
    },
    "5 caption: no box points at a cut token; unusable spans are counted": {
        "empty": [CAPTIONS, "test_grounded.py::test_a_caption_without_words_is_a_bad_sample"],
        "1 MB": [CAPTIONS, DESCRIPTION],
        "NULs": [CAPTIONS],
        "lone surrogates": [CAPTIONS, DESCRIPTION],
        "right to left, emoji with joiners": [CAPTIONS],
        "only punctuation": [CAPTIONS],
        "300 phrases": [
            f"{TEXT}::test_of_300_phrases_only_those_in_the_text_keep_their_boxes",
            "test_loader.py::test_a_box_whose_words_were_cut_off_is_dropped",
        ],
        "span off by one": [SPANS],
        "span past the end": [
            SPANS,
            DESCRIPTION,
            "test_mdetr.py::test_broken_boxes_and_spans_are_counted",
        ],
        "overlapping spans": [SPANS],
        "characters to tokens": [FUZZ, "test_model_tokenizer.py::test_offsets_point_at_the_words"],
    },
    "6 JSON: refused, in bounded memory and time": {
        "NaN": [DESCRIPTION, ODD_JSON, BOXES],
        "duplicate fields": [DESCRIPTION],
        "depth of 10k": [
            DESCRIPTION,
            ODD_JSON,
            "test_coco.py::test_a_file_that_is_no_coco_file_is_refused_by_name",
        ],
        "100 MB": [
            f"{TEXT}::test_a_record_of_100_mb_is_refused_unread",
            f"{TEXT}::test_an_annotation_without_end_is_given_up_within_a_gb",
            "test_json_stream.py::test_a_file_of_60_mb_is_read_in_flat_memory",
        ],
        "wrong types": [DESCRIPTION, ODD_JSON],
        "byte order mark": [DESCRIPTION, ODD_JSON],
        "latin-1": [
            DESCRIPTION,
            ODD_JSON,
            "test_json_stream.py::test_bytes_that_are_no_utf8_are_refused_and_a_byte_order_mark_is_not",
        ],
    },
    "7 tar members: refused, nothing written outside, bounded memory": {
        "../x": [REFUSED],
        "absolute path": [REFUSED],
        "symbolic link": [
            REFUSED,
            f"{JSON}::test_links_and_second_members_of_one_name_are_refused",
        ],
        "device": [REFUSED],
        "9 GB": [f"{WEB}::test_a_member_of_9_gb_is_passed_over_without_reading_it", LYING_SIZE],
        "negative size": [LYING_SIZE],
        "PAX size": [f"{WEB}::test_headers_that_move_members_end_the_tar"],
        "a million members": [
            f"{WEB}::test_many_members_take_little_memory",
            f"{DATA}::test_what_is_noted_of_many_members_is_counted_but_not_kept",
            f"{DATA}::test_notes_have_a_bound_and_survive_the_way_to_another_process",
            f"{DATA}::test_a_tar_of_endless_samples_ends",
        ],
    },
    "11 manifest: refused": {
        "edited": [
            "test_damaged_shards.py::test_an_edited_manifest_is_refused",
            "test_check.py::test_a_damaged_manifest_is_a_problem_in_the_list",
            f"{TEXT}::test_a_manifest_that_json_can_not_hold_is_refused",
        ],
        "stale": [
            f"{TEXT}::test_a_manifest_of_another_set_or_an_older_one_is_refused",
            "test_tar_index.py::test_a_changed_tar_is_noticed",
            "test_prepare.py::test_a_changed_source_is_noticed",
        ],
        "of another set": [
            f"{TEXT}::test_a_manifest_of_another_set_or_an_older_one_is_refused",
            "test_stream.py::test_a_position_of_another_sequence_is_refused_and_the_change_is_named",
        ],
    },
}


@pytest.mark.parametrize("row", CHECKLIST)
def test_every_bad_input_has_its_tests(row: str) -> None:
    assert_tests_exist(CHECKLIST[row])
