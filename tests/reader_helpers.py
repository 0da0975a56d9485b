"""Small images and annotation files for the tests of readers, and what the readers make of them."""

import contextlib
import io
import json
import pickle
from dataclasses import replace

import numpy as np
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.sources import open_source
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.record_json import parse_record, record_members
from glipv2.pipeline.shard_format import RawSample

SIZE = (40, 30)


def jpeg(size=SIZE):
    buffer = io.BytesIO()
    Image.new("RGB", size, (90, 120, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_images(folder, *names, size=SIZE):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(size))


def write_json(path, value):
    path.write_text(json.dumps(value))
    return str(path)


def read(source, *annotations, images, **options):
    """All records and what was dropped; every record is what the stream will read back."""
    config = PrepareConfig(
        source=source, annotations=tuple(annotations), images=tuple(map(str, images)), **options
    )
    opened, dropped = open_source(config), Dropped()
    sent = replace(opened, record=pickle.loads(pickle.dumps(opened.record)))
    records = list(sent.records(dropped))
    assert opened.total is None or opened.total >= len(records)
    assert len({record.key for record in records}) == len(records)
    for record in records:
        raw = RawSample(key=record.key, members=record_members(record))
        assert parse_record(raw, len(opened.categories) or None) == record
    return records, dropped


def square(x, y, width, height):
    """A polygon as COCO writes it."""
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def average_precision(truth, records, kind):
    """pycocotools' AP of the records' regions against `truth`: for each record its annotations.

    The records' own order numbers the images; annotations have `bbox` and `segmentation`.
    """
    images = [
        {"id": n, "width": record.width, "height": record.height}
        for n, record in enumerate(records)
    ]
    annotations = [
        {"iscrowd": 0, "category_id": 1, "area": np.prod(item["bbox"][2:]), **item,
         "image_id": n, "id": len(truth) * place + n + 1}
        for n, listed in enumerate(truth) for place, item in enumerate(listed)
    ]  # fmt: skip
    categories = [{"id": n} for n in sorted({item["category_id"] for item in annotations})]
    found = [
        {"image_id": n, "category_id": categories[region.category or 0]["id"], "score": 1.0,
         **({"segmentation": region.mask} if kind == "segm" else
            {"bbox": [*region.box[:2], region.box[2] - region.box[0],
                      region.box[3] - region.box[1]]})}
        for n, record in enumerate(records) for region in record.regions
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"images": images, "annotations": annotations, "categories": categories}
        coco.createIndex()
        scored = COCOeval(coco, coco.loadRes(found), kind)
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return scored.stats[0]
