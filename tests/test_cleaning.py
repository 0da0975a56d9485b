import io
import json

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from glipv2.data_prep.looks import BITS, Looks, perceptual_hash
from glipv2.jobs.cli import main
from glipv2.jobs.prepare import prepare_set
from glipv2.pipeline import storage
from glipv2.pipeline.config import CleanConfig, PrepareConfig
from glipv2.pipeline.errors import ConfigError, DataError
from glipv2.pipeline.shards import iterate_records, open_shard_set


def photo(seed, size=(120, 90)):
    """Smooth blobs: as unlike each other as photographs are."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def encoded(image, quality=90, kind="JPEG"):
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=quality)
    return buffer.getvalue()


def distance(one, two):
    return (perceptual_hash(one) ^ perceptual_hash(two)).bit_count()


@pytest.mark.parametrize("seed", range(6))
def test_copies_look_the_same_and_other_pictures_do_not(seed):
    original = encoded(photo(seed))
    copies = [
        encoded(photo(seed), quality=40),
        encoded(photo(seed), kind="PNG"),
        encoded(photo(seed).resize((240, 180))),
        encoded(photo(seed).resize((60, 45)), quality=70),
        encoded(ImageEnhance.Brightness(photo(seed)).enhance(1.1)),
    ]
    assert max(distance(original, copy) for copy in copies) <= 4
    assert min(distance(original, encoded(photo(100 + other))) for other in range(20)) >= 14


def test_orientation_counts_as_it_is_shown():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    buffer = io.BytesIO()
    photo(1).transpose(Image.Transpose.ROTATE_90).save(buffer, "JPEG", exif=exif, quality=95)
    assert distance(buffer.getvalue(), encoded(photo(1))) <= 2


@pytest.mark.parametrize("most", [0, 3, 7])
def test_a_look_is_found_at_any_distance_up_to_the_limit_and_no_further(most):
    rng = np.random.default_rng(most)
    for _ in range(200):
        known = int.from_bytes(rng.bytes(8), "big")
        looks = Looks(most, [known])
        for flips in range(9):
            bits = rng.choice(BITS, flips, replace=False)
            other = known ^ sum(1 << int(bit) for bit in bits)
            assert looks.has(other) == (flips <= most)
            assert looks.nearest(other) == (known if flips <= most else None)


def test_the_nearest_of_several_looks_is_given():
    rng = np.random.default_rng(7)
    middle = int.from_bytes(rng.bytes(8), "big")
    known = [middle ^ sum(1 << int(b) for b in rng.choice(BITS, n, replace=False))
             for n in rng.integers(1, 8, 40)]  # fmt: skip
    looks = Looks(7, known)
    for _ in range(100):
        asked = middle ^ sum(1 << int(bit) for bit in rng.choice(BITS, 4, replace=False))
        distances = sorted(((asked ^ k).bit_count(), k) for k in known)
        expected = distances[0][1] if distances[0][0] <= 7 else None
        assert looks.nearest(asked) == expected


@pytest.fixture
def web(tmp_path):
    """Ten good pairs and what the rules are there for."""
    folder = tmp_path / "web"
    folder.mkdir()
    rows = []

    def pair(name, data, text):
        (folder / name).write_bytes(data)
        rows.append({"image": name, "alt": text})

    for seed in range(10):
        pair(f"good{seed}.jpg", encoded(photo(seed)), f"a picture of thing number {seed}")
    rows.append({"image": "good3.jpg", "alt": "a picture of thing number 3"})  # the same sample
    rows.append({"image": "good3.jpg", "alt": "another thing to say of it"})  # a second caption
    pair("copy.jpg", encoded(photo(4).resize((100, 75)), 60), "a thing of another site")
    pair("tiny.jpg", encoded(photo(20, (40, 30))), "a small picture of something")
    pair("banner.jpg", encoded(photo(21, (400, 80))), "a wide picture of something")
    pair("terse.jpg", encoded(photo(22)), "thing")
    pair("prose.jpg", encoded(photo(23)), " ".join(["word"] * 60))
    pair("french.jpg", encoded(photo(24)), "une photographie du chien dans la rue avec les enfants")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


ALL = CleanConfig(
    duplicates=True, min_side=64, max_aspect=3.0, min_words=2, max_words=40, languages=("en",)
)


def dropped_of(url):
    lines = [
        line
        for name in storage.list_names(f"{url}/dropped")
        for line in storage.read_bytes(f"{url}/dropped/{name}").decode().splitlines()
    ]
    return [(entry["where"], entry["reason"]) for entry in map(json.loads, lines)]


def test_each_rule_drops_what_it_says_and_lists_it(web, tmp_path, capsys):
    url = str(tmp_path / "set")
    made = prepare_set(url, PrepareConfig(source="pairs", root=str(web), clean=ALL), 4)
    assert sorted(dropped_of(url)) == [
        ("banner.jpg", "image_narrow"),
        ("copy.jpg", "duplicate_look"),
        ("french.jpg", "caption_language"),
        ("good3.jpg", "duplicate"),
        ("prose.jpg", "caption_long"),
        ("terse.jpg", "caption_short"),
        ("tiny.jpg", "image_small"),
    ]
    assert made.samples == 11 and sum(made.info["counts"].values()) == 7
    assert "looks like an earlier image" in capsys.readouterr().out
    captions = [r.caption for r in iterate_records(url) if r.provenance["file"] == "good3.jpg"]
    assert len(captions) == 2
    assert storage.list_names(f"{url}/looks") == []


def test_without_the_rules_everything_is_back(web, tmp_path):
    made = prepare_set(str(tmp_path / "set"), PrepareConfig(source="pairs", root=str(web)))
    assert made.samples == 18 and made.info["counts"] == {}


def test_processes_and_one_process_make_equal_sets(web, tmp_path):
    options = PrepareConfig(source="pairs", root=str(web), clean=ALL)
    one = prepare_set(str(tmp_path / "one"), options, 4, workers=0)
    two = prepare_set(str(tmp_path / "two"), options, 4, workers=2)
    assert one.digest == two.digest and one.samples == two.samples
    assert [s.crc32c for s in one.shards] == [s.crc32c for s in two.shards]


def test_images_of_an_evaluation_set_are_dropped_whatever_their_name(web, tmp_path):
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    for number, seed in enumerate((2, 7)):
        copy = photo(seed).resize((180, 135))
        (held_out / f"val_{number}.png").write_bytes(encoded(copy, kind="PNG"))
        (held_out / f"val_{number}.txt").write_text("something else entirely")
    val, url = str(tmp_path / "val"), str(tmp_path / "set")
    assert main(["prepare", "pairs", "--root", str(held_out), "--out", val]) == 0
    words = ["prepare", "pairs", "--root", str(web), "--out", url, "--exclude", val]
    assert main(words) == 0
    assert dropped_of(url) == [("good2.jpg", "excluded"), ("good7.jpg", "excluded")]
    assert open_shard_set(url).info["counts"] == {"excluded": 2}
    lines = storage.read_bytes(f"{url}/dropped/shard-000000.jsonl").decode().splitlines()
    key_of = {r.provenance["file"]: r.key for r in iterate_records(val)}
    assert [json.loads(line)["like"] for line in lines] == [
        f"{key_of['val_0.png']} of {val}",
        f"{key_of['val_1.png']} of {val}",
    ]
    rule = CleanConfig(exclude=(str(tmp_path / "web"),))
    with pytest.raises(DataError, match="no complete shard set"):
        prepare_set(url, PrepareConfig(source="pairs", root=str(web), clean=rule))


def test_other_rules_are_another_set(web, tmp_path):
    url = str(tmp_path / "set")
    prepare_set(url, PrepareConfig(source="pairs", root=str(web)))
    with pytest.raises(DataError, match="min_side"):
        prepare_set(
            url, PrepareConfig(source="pairs", root=str(web), clean=CleanConfig(min_side=64))
        )


@pytest.mark.parametrize(
    ("rule", "said"),
    [({"look_distance": 8}, "between 0 and 7"), ({"max_aspect": 0.5}, "at least 1"),
     ({"min_words": -1}, "0 or more")],
)  # fmt: skip
def test_impossible_rules_are_refused(rule, said):
    with pytest.raises(ConfigError, match=said):
        CleanConfig(**rule)
