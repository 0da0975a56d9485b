import contextlib
import io
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from glipv2.pipeline.errors import BadSample
from glipv2.pipeline.images import decode_image, encode_jpeg, image_size


def encoded(image, image_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def flat(mode="RGB", size=(8, 6), color=(200, 30, 60)):
    return Image.new(mode, size, color)


def corner_colour(data):
    return decode_image(data)[:, 0, 0].tolist()


@pytest.mark.parametrize(
    ("image_format", "name"), [("PNG", "png"), ("WEBP", "webp"), ("JPEG", "jpg")]
)
def test_the_three_formats_decode_to_rgb(image_format, name):
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encoded(flat(), image_format, **options)
    image_3HW = decode_image(data)
    assert image_3HW.dtype == torch.uint8
    assert image_3HW.shape == (3, 6, 8)
    assert image_size(data) == ((8, 6), {"JPEG": "jpg"}.get(image_format, image_format.lower()))
    assert np.allclose(corner_colour(data), (200, 30, 60), atol=4)


def test_grey_cmyk_palette_and_two_byte_images_become_rgb():
    assert corner_colour(encoded(flat("L", color=77), "PNG")) == [77, 77, 77]
    assert np.allclose(
        corner_colour(encoded(flat().convert("CMYK"), "JPEG")), (200, 30, 60), atol=6
    )
    assert np.allclose(corner_colour(encoded(flat().convert("P"), "PNG")), (200, 30, 60), atol=30)
    deep = Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16))
    assert corner_colour(encoded(deep, "PNG")) == [40_000 >> 8] * 3


def test_transparency_is_laid_over_white():
    assert corner_colour(encoded(flat("RGBA", color=(9, 9, 9, 0)), "PNG")) == [255, 255, 255]
    assert corner_colour(encoded(flat("LA", color=(9, 255)), "PNG")) == [9, 9, 9]


def test_exif_orientation_turns_the_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(flat(size=(8, 6)), "JPEG", exif=exif)
    assert decode_image(data).shape == (3, 8, 6)
    assert image_size(data) == ((6, 8), "jpg")


def jpeg_bomb(side):
    data = bytearray(encoded(flat(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = side.to_bytes(2, "big") * 2
    return bytes(data)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [30_000, 10_000])
def test_an_image_of_too_many_pixels_is_refused_from_its_header(side, monkeypatch):
    bomb = jpeg_bomb(side)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded a bomb"))
    start = time.perf_counter()
    with pytest.raises(BadSample) as caught:
        decode_image(bomb)
    assert caught.value.reason == "image_too_large"
    with pytest.raises(BadSample, match="image_too_large"):
        image_size(bomb)
    assert time.perf_counter() - start < 0.5


def test_too_many_bytes_and_too_many_scans_are_refused():
    with pytest.raises(BadSample, match="image_too_large"):
        decode_image(encoded(flat(), "JPEG"), max_bytes=10)
    scans = encoded(flat(), "JPEG", progressive=True)
    with pytest.raises(BadSample, match="progressive scans"):
        decode_image(scans[:-2] + b"\xff\xda\x00\x02" * 200 + scans[-2:])


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_an_image_cut_in_half_is_undecodable(image_format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), image_format)
    with pytest.raises(BadSample, match="image_undecodable"):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"<svg/>", b"GIF89a" + b"\0" * 50, b"SIMPLE  =  T", b"\xff"])
def test_other_formats_are_refused_by_their_first_bytes(data):
    with pytest.raises(BadSample, match="image_format"):
        decode_image(data)


def test_random_damage_never_raises_anything_but_bad_sample():
    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for original in (encoded(noise, name) for name in ("JPEG", "PNG", "WEBP")):
        for _ in range(150):
            data = bytearray(original)
            for position in rng.integers(0, len(data), 5):
                data[position] = rng.integers(256)
            with contextlib.suppress(BadSample):
                assert decode_image(bytes(data)).shape[0] == 3


def test_jpeg_encoding_keeps_the_picture():
    image_3HW = torch.full((3, 20, 30), 90, dtype=torch.uint8)
    again = decode_image(encode_jpeg(image_3HW))
    assert again.shape == (3, 20, 30)
    assert (again.int() - 90).abs().max() <= 2
