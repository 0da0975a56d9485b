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
