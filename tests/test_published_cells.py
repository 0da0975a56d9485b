"""The figures of GLIP's and GLIPv2's tables, cell by cell, against tables of the test's own."""

import pytest

from glipv2.eval.published import published

GLIPV2 = ("GLIPv2-T", "GLIPv2-B", "GLIPv2-H")
GLIP = ("GLIP-T(A)", "GLIP-T(B)", "GLIP-T(C)", "GLIP-T", "GLIP-L")
GLIPV2_TUNED = {
    ("coco", "fine-tuned test-dev", "ap"): (55.5, 58.8, 60.6),
    ("coco", "fine-tuned test-dev, multi-scale", "ap"): (None, None, 62.4),
    ("odinw13", "full tuning", "ap"): (66.5, 69.4, 70.4),
    ("lvis-minival", "fine-tuned", "ap"): (50.6, 57.3, 59.8),
    ("lvis-minival", "fine-tuned", "mask_ap"): (41.4, 46.2, 48.8),
    ("coco-mask", "fine-tuned test-dev", "ap"): (53.5, 59.0, 59.8),
    ("coco-mask", "fine-tuned test-dev", "mask_ap"): (42.0, 45.8, 48.9),
    ("flickr30k", "fine-tuned test", "recall_at_1"): (86.5, 87.5, 87.7),
    ("phrasecut", "fine-tuned test", "mean_iou"): (59.4, 61.3, 61.3),
    ("vqav2", "fine-tuned test-dev", "accuracy"): (71.6, 73.1, 74.6),
    ("vqav2", "fine-tuned test-std", "accuracy"): (71.8, 73.3, 74.8),
    ("coco-captions", "fine-tuned Karpathy test", "cider_d"): (122.1, 128.5, 131.0),
}
GLIPV2_DIRECT = {
    ("coco", "direct val", "ap"): (47.3, None, None),
    ("coco", "direct val, COCO in training", "ap"): (None, 61.9, 64.1),
    ("odinw13", "zero-shot", "ap"): (48.5, 54.2, 55.5),
    ("lvis-minival", "direct", "ap"): (29.0, None, None),
    ("lvis-minival", "direct, COCO images in training", "ap"): (None, 48.5, 50.1),
    ("flickr30k", "direct", "recall_at_1"): (86.0, 87.2, 87.7),
    ("odinw35", "zero-shot", "ap"): (22.3, None, None),
    ("odinw35", "zero-shot", "ap_median"): (8.9, None, None),
}
GLIPV2_PROMPTED = {
    ("coco", "prompt tuning", "ap"): (53.4, 59.0, 60.2),
    ("odinw13", "prompt tuning", "ap"): (64.8, 67.3, 69.1),
    ("lvis-minival", "prompt tuning", "ap"): (49.3, 56.8, 59.2),
    ("lvis-minival", "prompt tuning", "mask_ap"): (34.8, 41.7, 43.2),
    ("coco-mask", "prompt tuning", "ap"): (53.2, 58.8, 59.8),
    ("coco-mask", "prompt tuning", "mask_ap"): (41.2, 44.9, 47.2),
    ("phrasecut", "prompt tuning", "mean_iou"): (49.4, 55.9, 56.1),
    ("odinw13", "full tuning", "ap_1_shot"): (None, None, 61.7),
    ("odinw13", "full tuning", "ap_3_shot"): (None, None, 64.1),
    ("odinw13", "full tuning", "ap_5_shot"): (None, None, 64.4),
    ("odinw13", "full tuning", "ap_10_shot"): (None, None, 65.9),
}
GLIP_PAPER = {
    ("coco", "zero-shot val", "ap"): (42.9, 44.9, 46.7, 46.3, 49.8),
    ("coco", "fine-tuned val", "ap"): (52.9, 53.8, 55.1, 54.9, 60.8),
    ("coco", "fine-tuned test-dev", "ap"): (None, None, None, None, 61.0),
    ("lvis-minival", "zero-shot", "ap_rare"): (14.2, 13.5, 17.7, 20.8, 28.2),
    ("lvis-minival", "zero-shot", "ap_common"): (13.9, 12.8, 19.5, 21.4, 34.3),
    ("lvis-minival", "zero-shot", "ap_frequent"): (23.4, 22.2, 31.0, 31.0, 41.5),
    ("lvis-minival", "zero-shot", "ap"): (18.5, 17.8, 24.9, 26.0, 37.3),
    ("lvis-val", "zero-shot", "ap_rare"): (6.0, 4.2, 7.5, 10.1, 17.1),
    ("lvis-val", "zero-shot", "ap_common"): (8.0, 7.6, 11.6, 12.5, 23.3),
    ("lvis-val", "zero-shot", "ap_frequent"): (19.4, 18.6, 26.1, 25.5, 35.4),
    ("lvis-val", "zero-shot", "ap"): (12.3, 11.3, 16.5, 17.2, 26.9),
    ("flickr30k", "val", "recall_at_1"): (None, None, 84.8, 85.7, 86.7),
    ("flickr30k", "val", "recall_at_5"): (None, None, 94.9, 95.4, 96.4),
    ("flickr30k", "val", "recall_at_10"): (None, None, 96.3, 96.9, 97.9),
    ("flickr30k", "test", "recall_at_1"): (None, None, 85.5, 85.7, 87.1),
    ("flickr30k", "test", "recall_at_5"): (None, None, 95.4, 95.8, 96.9),
    ("flickr30k", "test", "recall_at_10"): (None, None, 96.6, 97.2, 98.1),
    ("odinw13", "zero-shot", "ap"): (28.7, 33.2, 44.4, 46.5, 52.1),
    ("odinw13", "full tuning", "ap_1_shot"): (43.5, 48.0, 49.6, 51.1, 59.9),
    ("odinw13", "full tuning", "ap_3_shot"): (48.8, 52.0, 53.8, 54.9, 62.1),
    ("odinw13", "full tuning", "ap_5_shot"): (50.4, 53.2, 54.8, 56.4, 64.2),
    ("odinw13", "full tuning", "ap_10_shot"): (54.1, 54.9, 57.2, 58.4, 64.9),
    ("odinw13", "full tuning", "ap"): (63.6, 62.7, 63.9, 64.9, 68.9),
    ("odinw13", "linear probe", "ap_1_shot"): (34.6, 40.9, 43.9, 48.9, 54.1),
    ("odinw13", "linear probe", "ap_3_shot"): (35.9, 42.8, 45.4, 50.5, 54.7),
    ("odinw13", "linear probe", "ap_5_shot"): (37.6, 44.0, 45.9, 50.4, 55.0),
    ("odinw13", "linear probe", "ap_10_shot"): (37.9, 44.4, 46.7, 51.2, 55.9),
    ("odinw13", "linear probe", "ap"): (44.1, 51.8, 52.7, 55.1, 59.2),
    ("odinw13", "prompt tuning", "ap_1_shot"): (34.0, 46.4, 50.6, 49.9, 59.5),
    ("odinw13", "prompt tuning", "ap_3_shot"): (37.0, 49.0, 52.9, 53.7, 61.4),
    ("odinw13", "prompt tuning", "ap_5_shot"): (40.0, 50.6, 53.9, 55.5, 62.4),
    ("odinw13", "prompt tuning", "ap_10_shot"): (39.2, 52.7, 55.8, 56.6, 64.1),
    ("odinw13", "prompt tuning", "ap"): (43.3, 58.5, 62.8, 62.4, 67.9),
}
GLIP_RERUN = {
    ("coco", "zero-shot val", "ap"): (43.0, 44.9, 46.7, 46.6, 51.3),
    ("coco", "fine-tuned val", "ap"): (53.3, 54.1, 55.2, 55.4, 59.4),
    ("lvis-minival", "zero-shot", "ap_rare"): (12.1, 8.6, 14.4, 18.1, 27.9),
    ("lvis-minival", "zero-shot", "ap_common"): (15.5, 13.9, 19.8, 21.2, 33.7),
    ("lvis-minival", "zero-shot", "ap_frequent"): (25.8, 26.0, 31.9, 33.1, 39.7),
    ("lvis-minival", "zero-shot", "ap"): (20.2, 19.3, 25.2, 26.7, 36.1),
    ("flickr30k", "val", "recall_at_1"): (None, None, 84.9, 85.3, None),
    ("flickr30k", "test", "recall_at_1"): (None, None, 85.6, 86.0, None),
    ("odinw13", "zero-shot, no prompts", "ap"): (32.4, 31.8, 39.2, None, None),
    ("odinw35", "zero-shot, no prompts", "ap"): (13.4, 13.8, 17.8, None, None),
}
GLIP_RELEASED = {
    ("lvis-minival", "zero-shot", "ap_rare"): (None, None, 14.3, None, 29.2),
    ("lvis-minival", "zero-shot", "ap_common"): (None, None, 19.4, None, 34.9),
    ("lvis-minival", "zero-shot", "ap_frequent"): (None, None, 31.1, None, 42.1),
    ("lvis-minival", "zero-shot", "ap"): (None, None, 24.6, None, 37.9),
    ("odinw13", "zero-shot", "ap"): (28.7, 33.2, 44.4, 42.7, 51.2),
}


@pytest.mark.parametrize(
    ("part", "models", "table"),
    [
        ("H.3", GLIPV2, GLIPV2_TUNED),
        ("H.4", GLIPV2, GLIPV2_DIRECT),
        ("H.5", GLIPV2, GLIPV2_PROMPTED),
        ("H.1", GLIP, GLIP_PAPER),
        ("H.2", [f"{name} (mmdetection)" for name in GLIP], GLIP_RERUN),
        ("H.2", [f"{name} (released)" for name in GLIP], GLIP_RELEASED),
    ],
)
def test_every_cell_of_these_models_is_that_of_the_tables_and_there_is_no_other(
    part: str, models: list[str], table: dict[tuple[str, str, str], tuple[float | None, ...]]
) -> None:
    expected = {
        (*cell, model): value
        for cell, row in table.items()
        for model, value in zip(models, row, strict=True)
        if value is not None
    }
    found = [
        ((own.suite, own.setting, own.metric, own.model), own.value)
        for suite in {suite for suite, _, _ in table}
        for own in published(suite)
        if own.source == f"facts {part}" and own.model in models and not own.set
    ]
    if models[0].endswith("(released)"):  # COCO of the released L is in H.1
        assert [own.value for own in published("coco") if own.model == models[-1]] == [51.4, 61.7]
    assert dict(found) == expected and len(found) == len(expected)


def test_figures_that_both_a_paper_and_other_papers_print_say_so() -> None:
    starred = {
        (own.suite, own.metric, own.model, own.value)
        for suite in {suite for suite, _, _ in GLIPV2_TUNED}
        for own in published(suite)
        if own.source == "facts H.3" and own.tag == "third-party"
    }
    assert starred == {
        ("coco", "ap", "GLIPv2-H", 60.6), ("coco", "ap", "GLIPv2-H", 62.4),
        ("odinw13", "ap", "GLIPv2-T", 66.5), ("odinw13", "ap", "GLIPv2-B", 69.4),
        ("odinw13", "ap", "GLIPv2-H", 70.4), ("lvis-minival", "ap", "GLIPv2-T", 50.6),
        ("lvis-minival", "ap", "GLIPv2-B", 57.3), ("lvis-minival", "ap", "GLIPv2-H", 59.8),
        ("coco-mask", "mask_ap", "GLIPv2-H", 48.9), ("flickr30k", "recall_at_1", "GLIPv2-H", 87.7),
        ("phrasecut", "mean_iou", "GLIPv2-H", 61.3),
    }  # fmt: skip
