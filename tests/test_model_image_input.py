import io
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from glipv2.model.image_input import image_count, read_image, read_images

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(PIXELS).permute(2, 0, 1)


def encoded(image: Image.Image, name: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=name, **options)
    return buffer.getvalue()


def test_every_kind_of_input_gives_the_same_pixels(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(PIXELS))
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    with fsspec.open("memory://pictures/a.png", "wb") as file:
        file.write(data)
    floats = EXPECTED.float() / 255
    inputs = [
        Image.fromarray(PIXELS),
        PIXELS,
        PIXELS[:, :, ::-1][:, :, ::-1],
        floats.permute(1, 2, 0).numpy(),
        EXPECTED,
        floats,
        floats.double(),
        data,
        str(path),
        path,
        f"file://{path}",
        "memory://pictures/a.png",
    ]
    for image_3HW in read_images(inputs):
        assert image_3HW.dtype == torch.uint8
        assert torch.equal(image_3HW, EXPECTED)


def test_grey_sixteen_bit_palette_alpha_cmyk_and_turned_images_are_read() -> None:
    grey = PIXELS[:, :, 0]
    expected = torch.from_numpy(grey).expand(3, -1, -1)
    assert torch.equal(read_image(grey), expected)
    assert torch.equal(read_image(Image.fromarray(grey)), expected)
    assert torch.equal(read_image(Image.fromarray(grey.astype(np.uint16) * 256 + 99)), expected)
    clear = Image.new("RGBA", (2, 2), (9, 9, 9, 0))
    assert read_image(clear).unique().tolist() == [255]
    cmyk = read_image(Image.new("CMYK", (2, 2), (0, 255, 255, 0)))
    assert cmyk[:, 0, 0].tolist() == [255, 0, 0]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    turned = read_image(encoded(Image.fromarray(PIXELS), exif=exif))
    assert torch.equal(turned, torch.from_numpy(np.rot90(PIXELS, -1).copy()).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((3, 4, 4), torch.nan), "NaN"),
        (torch.full((3, 4, 4), torch.inf), "infinite"),
        (torch.full((3, 4, 4), 2.0), r"floats from 2 to 2, expected \[0, 1\]"),
        (torch.full((3, 4, 4), -0.5), "from -0.5"),
        (torch.zeros(4, 4, 3), r"shape \(4, 4, 3\), expected \(3, H, W\)"),
        (torch.zeros(3, 0, 4), "shape"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "int64"),
        (np.zeros((4, 4, 4), dtype=np.uint8), "shape"),
        (np.zeros((4, 4, 3), dtype=np.int32), "int32"),
        (np.full((4, 4), np.nan), "NaN"),
        (Image.new("RGB", (0, 3)), "0x3 pixels"),
        (Image.new("F", (2, 2)), "floats of unknown range"),
        (b"GIF89a" + b"\0" * 20, "neither JPEG, PNG nor WebP"),
        (encoded(Image.fromarray(PIXELS))[:60], "can't be decoded"),
        ("no/such/file.png", "no/such/file.png: no such file"),
        ("memory://no/such.png", "memory://no/such.png: no such file"),
        ("/", "/: Is a directory"),
        ("pipe://whoami", "is not a place"),
        ("file:///x::http://y", "is not a place"),
        (7, "int is no image"),
    ],
)
def test_what_can_not_be_read_is_named_with_its_place(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"image 1: .*{message}") as caught:
        list(read_images([EXPECTED, image]))
    assert "image_" not in str(caught.value)  # the pipeline's codes of reasons
    assert "Errno" not in str(caught.value)


def test_one_image_is_no_list() -> None:
    for image in (EXPECTED, PIXELS, b"", "a.png", Path("a.png"), Image.new("L", (1, 1))):
        with pytest.raises(ValueError, match="must be a list"):
            image_count(image)
    for images in ((image for image in [EXPECTED]), None, 7):
        with pytest.raises(TypeError, match=r"images must be a list, not of type \w+; list\(...\)"):
            image_count(images)
    assert image_count([EXPECTED]) == 1
    assert image_count(EXPECTED[None]) == 1
