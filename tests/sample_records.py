"""Small records for the tests of the shard format."""

import io
from dataclasses import replace

from PIL import Image

from glipv2.pipeline.records import Record, Region

CATEGORIES = ("red square", "blue circle")


def jpeg(shade=0, size=(32, 24), image_format="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade % 256, 90, 30)).save(buffer, format=image_format)
    return buffer.getvalue()


def record(number=0, **changes):
    caption = f"picture {number} of a red square"
    region = Region(box=(1.0, 2.0, 20.5, 20.0), spans=((len(caption) - 10, len(caption)),))
    return replace(
        Record(
            key=f"key{number:04d}",
            image=jpeg(number),
            image_format="jpg",
            width=32,
            height=24,
            task="grounding",
            caption=caption,
            regions=(region,),
            provenance={"source": "test"},
        ),
        **changes,
    )


def coco_file(records, categories):
    """What COCO's annotation file says of detection records, whose images are KEY.FORMAT."""
    images = [
        {"id": n, "file_name": f"{r.key}.{r.image_format}", "width": r.width, "height": r.height}
        for n, r in enumerate(records)
    ]
    annotations = [
        {"image_id": n, "category_id": region.category, "segmentation": region.mask,
         "bbox": [*region.box[:2], region.box[2] - region.box[0], region.box[3] - region.box[1]]}
        for n, record in enumerate(records) for region in record.regions
    ]  # fmt: skip
    named = [{"id": number, "name": name} for number, name in enumerate(categories)]
    return {"images": images, "annotations": annotations, "categories": named}
