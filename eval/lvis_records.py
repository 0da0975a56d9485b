"""LVIS AP of what our own stages make: shard sets of LVIS, and detections by key and name."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from glipv2.eval.lvis import FIXED, Cap, LvisAP, LvisDetections, LvisTruth, lvis_ap, lvis_truth
from glipv2.eval.masks import region_area
from glipv2.eval.predictions import Found, columns
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Record

FEDERATED = {
    "neg_categories": "neg_category_ids",
    "not_exhaustive_categories": "not_exhaustive_category_ids",
}
"""Our field of the provenance, which holds indices of categories -> LVIS's."""


def lvis_records_ap(
    records: Sequence[Record],
    detections_by_key: Mapping[str, Found],
    categories: Sequence[str],
    frequency: Sequence[str],
    cap: Cap = FIXED,
    by: Literal["box", "mask"] = "box",
) -> LvisAP:
    """AP of the detections in a shard set of LVIS; ids of categories are their places from 1.

    `frequency` is that of the set's info, "r", "c" or "f" for each category. Equal scores keep the
    order of the records. DataError as in `lvis_ap`, and for an image without entry.
    """
    truth = lvis_records_truth(records, categories, frequency)
    found = columns([r.key for r in records], detections_by_key, categories, masks=by == "mask")
    detections = LvisDetections(
        image_ids_K=found.images_K + 1,
        category_ids_K=found.categories_K + 1,
        scores_K=found.scores_K,
        boxes_K4=found.boxes_K4,
        masks_K=found.masks_K,
        dropped=found.dropped,
    )
    return lvis_ap(truth, detections, cap, by)


def lvis_records_truth(
    records: Sequence[Record], categories: Sequence[str], frequency: Sequence[str]
) -> LvisTruth:
    """Truth of LVIS records; images and categories have their places, from 1, as ids.

    DataError where a record doesn't say what it was checked for: it is not LVIS.
    """
    if len(frequency) != len(categories):
        raise ValueError(f"{len(frequency)} frequencies for {len(categories)} categories")
    images, annotations = [], []
    for number, record in enumerate(records, start=1):
        if absent := FEDERATED.keys() - record.provenance.keys():
            raise DataError(
                f"{record.key}: no {min(absent)} in its provenance, so that unlabelled and absent "
                "look the same; prepare the set with source=lvis"
            )
        images.append(
            {
                "id": number,
                "height": record.height,
                "width": record.width,
                **{
                    theirs: [place + 1 for place in record.provenance[ours]]
                    for ours, theirs in FEDERATED.items()
                },
            }
        )
        for region in record.regions:
            if region.category is None:
                raise DataError(f"{record.key}: the region {region.phrase!r} has no category")
            x0, y0, x1, y1 = region.box
            annotations.append(
                {
                    "image_id": number,
                    "category_id": region.category + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": region_area(region),
                    "segmentation": region.mask,
                }
            )
    numbered = [{"id": n, "frequency": letter} for n, letter in enumerate(frequency, start=1)]
    return lvis_truth({"images": images, "categories": numbered, "annotations": annotations})


def lvis_document_detections(
    document: Mapping[str, Any],
    detections_by_key: Mapping[str, Found],
    keys: Mapping[int, str] | None = None,
    masks: bool = False,
) -> LvisDetections:
    """Detections with the ids of a parsed LVIS file, for `lvis_ap(lvis_truth(document), ...)`.

    `keys` says by which key the detections of an image are found, if not by its id as text.
    """
    image_ids = sorted(image["id"] for image in document["images"])
    ids = {category["name"]: category["id"] for category in document["categories"]}
    names = [str(number) if keys is None else keys[number] for number in image_ids]
    found = columns(names, detections_by_key, list(ids), masks=masks)
    return LvisDetections(
        image_ids_K=np.array(image_ids, dtype=np.int64)[found.images_K],
        category_ids_K=np.array(list(ids.values()), dtype=np.int64)[found.categories_K],
        scores_K=found.scores_K,
        boxes_K4=found.boxes_K4,
        masks_K=found.masks_K,
        dropped=found.dropped,
    )
