import io

import pytest
from PIL import Image

from glipv2.data_prep.image_files import ImageFolders, licence_of, parent, read_inside, record_key
from glipv2.pipeline import storage
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.shard_format import KEY


def image_bytes(image_format="JPEG", size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (90, 120, 30)).save(buffer, image_format)
    return buffer.getvalue()


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    """A folder with files inside and outside it, as a URL."""
    url = str(tmp_path / "set") if request.param == "disk" else f"memory://{tmp_path.name}/set"
    files = {
        "set/one.jpg": image_bytes(),
        "set/deep/two.png": image_bytes("PNG"),
        "set/wrong.png": image_bytes(),
        "set/cut.jpg": image_bytes()[:300],
        "set/moving.gif": image_bytes("GIF"),
        "set/named.gif": image_bytes(),
        "secret.jpg": image_bytes(),
    }
    for name, data in files.items():
        storage.write_bytes(storage.join(parent(url), name), data)
    return url


def reason(images, name):
    with pytest.raises(BadSample) as caught:
        images.load(name)
    return caught.value.reason


def test_images_are_found_on_disk_and_in_a_store(folder):
    images = ImageFolders((folder,))
    images.check()
    found = images.load("one.jpg")
    assert (found.data, found.format, found.size) == (image_bytes(), "jpg", (40, 30))
    assert images.load("deep/two.png").format == "png"
    names = {n: n for n in ("one.jpg", "wrong.png", "cut.jpg", "moving.gif", "named.gif")}
    assert images.by_stem() == {name.split(".")[0]: name for name in names}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gone.jpg", "image_missing"),
        ("wrong.png", "image_wrong_extension"),
        ("named.gif", "image_wrong_extension"),
        ("moving.gif", "image_format"),
        ("cut.jpg", "image_undecodable"),
        ("../secret.jpg", "image_outside_folder"),
        ("deep/../../secret.jpg", "image_outside_folder"),
        ("/etc/hostname", "image_outside_folder"),
        ("n" * 5_000 + ".jpg", "image_missing"),
        ("a\0b.jpg", "image_missing"),
    ],
)
def test_names_that_can_not_be_used_have_a_reason(folder, name, expected):
    assert reason(ImageFolders((folder,)), name) == expected


@pytest.mark.parametrize("name", ["s3://bucket/one.jpg", "file:///etc/hostname", ""])
def test_a_name_is_never_a_url_of_its_own(name):
    storage.write_bytes("memory://image_names/one.jpg", image_bytes())
    assert reason(ImageFolders(("memory://image_names",)), name) == "image_outside_folder"


def test_links_that_lead_out_are_never_followed(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "secret.jpg").write_bytes(image_bytes())
    (tmp_path / "set" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "set" / "folder").symlink_to(tmp_path)
    images = ImageFolders((str(tmp_path / "set"),))
    assert reason(images, "link.jpg") == "image_outside_folder"
    assert reason(images, "folder/secret.jpg") == "image_outside_folder"
    assert read_inside(str(tmp_path / "set"), ".") is None


def test_the_first_folder_that_holds_a_name_wins(folder):
    other = storage.join(parent(folder), "other")
    storage.write_bytes(storage.join(other, "one.jpg"), image_bytes(size=(50, 30)))
    storage.write_bytes(storage.join(other, "more.jpg"), image_bytes(size=(60, 30)))
    images = ImageFolders((folder, other))
    assert [images.load(name).width for name in ("one.jpg", "more.jpg")] == [40, 60]
    assert images.by_stem()["more"] == "more.jpg"


def test_the_digest_changes_when_an_image_does(folder):
    before = ImageFolders((folder,)).digest()
    assert before == ImageFolders((folder,)).digest()
    storage.write_bytes(storage.join(folder, "deep/two.png"), image_bytes("PNG") + b"0")
    assert ImageFolders((folder,)).digest() != before


def test_folders_that_are_not_there_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    for url, message in [
        (str(tmp_path / "gone"), "gone does not exist"),
        (str(tmp_path / "file"), "file is a file, not a folder"),
        ("memory://image_nowhere", "image_nowhere is empty or does not exist"),
    ]:
        with pytest.raises(DataError, match=f"image folder .*{message}"):
            ImageFolders((url,)).check()


def test_keys_are_safe_and_differ_when_names_do():
    names = ["a", "a b", "a-b", "a/b", "ä", "ö", "x" * 200, "x" * 201, "", "../a"]
    keys = [record_key(name) for name in names] + [record_key("a", 7), record_key("a", 8)]
    assert len(set(keys)) == len(keys)
    assert all(KEY.fullmatch(key) for key in keys if key)


def test_the_licence_is_the_first_line_of_its_file(folder):
    assert licence_of(folder) == "not stated"
    storage.write_bytes(storage.join(folder, "LICENSE.md"), b"\n# MIT License\n\nMore\n")
    assert licence_of(folder) == "MIT License"
