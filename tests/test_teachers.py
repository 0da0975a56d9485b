"""Every kind of teacher against what transformers itself makes of the same image and phrases."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detectors import KINDS, MAX_TEXT, build_detector
from torch import Tensor

from glipv2.data_prep import transformers_teachers
from glipv2.data_prep.box_fusion import fuse
from glipv2.data_prep.teachers import load_teacher, teacher_digest
from glipv2.data_prep.transformers_folders import load_detector
from glipv2.data_prep.transformers_teachers import TransformersTeacher
from glipv2.model.batch import Detection
from glipv2.model.config import preset
from glipv2.model.glip import build_model
from glipv2.model.grounder import Grounder
from glipv2.model.images import resize
from glipv2.model.prompts import locate
from glipv2.model.tokenizer import Tokenizer, tiny_vocab
from glipv2.model.weights import model_files
from glipv2.pipeline import storage
from glipv2.pipeline.errors import ConfigError, DataError

Row = tuple[float, int, tuple[float, ...]]
"""Score, label, box."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: build_detector(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def teachers(folders: dict[str, Path]) -> dict[str, TransformersTeacher]:
    return {kind: load_detector(str(folder)) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = build_model(preset("tiny"), seed=0)
    torch.nn.init.constant_(model.alignment_head.bias0, -1.0)
    folder = tmp_path_factory.mktemp("ours")
    for name, data in model_files(model, Tokenizer.from_vocab(tiny_vocab(), 160)).items():
        (folder / name).write_bytes(data)
    return folder


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """Large patches of random colours, uint8 (3, H, W)."""
    draw = np.random.default_rng(seed)
    patches = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(patches).resize((width, height), Image.Resampling.NEAREST)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def caption(*phrases: str) -> tuple[str, list[tuple[tuple[int, int], ...]]]:
    text = " on ".join(phrases)
    return text, [(span,) for span in locate(text, phrases)]


@torch.no_grad()
def library_rows(kind: str, folder: Path, image_3HW: Tensor, phrases: list[str]) -> list[Row]:
    """Every box with every phrase's score, by transformers' own pre- and post-processing."""
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    model = AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    image = Image.fromarray(image_3HW.permute(1, 2, 0).numpy())
    sizes = [(image.height, image.width)]
    if kind == "omdet-turbo":
        inputs = processor(images=image, text=phrases, return_tensors="pt")
        outputs = model(**inputs)
        everything = outputs.decoder_class_logits.numel()
        settings = {"threshold": 0.0, "nms_threshold": 1.0, "max_num_det": everything}
        [found] = processor.post_process_grounded_object_detection(
            outputs, target_sizes=sizes, **settings
        )
        scores, labels = found["scores"].tolist(), found["labels"].tolist()
        rows = zip(scores, labels, found["boxes"].tolist(), strict=True)
        return [(score, label, tuple(box)) for score, label, box in rows]
    inputs = processor(images=image, text=[phrases], return_tensors="pt")
    outputs = model(**inputs)
    [found] = processor.post_process_grounded_object_detection(
        outputs, threshold=0.0, target_sizes=sizes
    )
    probabilities = outputs.logits[0].sigmoid()
    if kind.startswith("owl"):
        assert found["labels"].tolist() == probabilities.argmax(dim=1).tolist()
        tokens_of = [[label] for label in range(len(phrases))]
    else:
        tokens_of = _sub_sentences(inputs["input_ids"][0].tolist())
    assert torch.equal(found["scores"], probabilities.max(dim=1).values)
    return [
        (max(probabilities[query, token].item() for token in tokens), label, tuple(box))
        for query, box in enumerate(found["boxes"].tolist())
        for label, tokens in enumerate(tokens_of)
    ]


def _sub_sentences(ids: list[int]) -> list[list[int]]:
    """Places of the tokens between [CLS], full stops and [SEP]."""
    parts: list[list[int]] = [[]]
    for place, token in enumerate(ids):
        if token in (101, 102, 1012):
            parts.append([])
        else:
            parts[-1].append(place)
    return [part for part in parts if part]


def kept_rows(rows: list[Row], height: int, width: int) -> list[Row]:
    """What a teacher should say: inside the image, above 0.05, no overlaps above 0.6, best 100."""
    clipped = [
        (score, label, (max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)))
        for score, label, (x0, y0, x1, y1) in rows
        if score > 0.05
    ]
    kept: list[Row] = []
    for row in sorted(clipped, reverse=True):
        own = [box for _, label, box in kept if label == row[1]]
        if overlap(row[2], row[2]) == 1 and all(overlap(row[2], box) <= 0.6 for box in own):
            kept.append(row)
    return kept[:100]


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    areas = [max(x1 - x0, 0) * max(y1 - y0, 0) for x0, y0, x1, y1 in (a, b)]
    return common / (sum(areas) - common) if common else 0


def rows_of(found: Detection) -> list[Row]:
    scores, labels = found.scores_K.tolist(), found.labels_K.tolist()
    boxes = [tuple(box) for box in found.boxes_K4.tolist()]
    return list(zip(scores, labels, boxes, strict=True))


def assert_same(found: list[Row], expected: list[Row], tolerance: float = 1e-4) -> None:
    """Boxes are compared to a hundred times the tolerance, in pixels."""
    assert len(found) == len(expected)
    for a, b in zip(sorted(found), sorted(expected), strict=True):
        assert a[0] == pytest.approx(b[0], abs=tolerance)
        assert a[1] == b[1]
        assert a[2] == pytest.approx(b[2], abs=100 * tolerance)


@pytest.mark.parametrize("size", [(50, 90), (90, 50)])
@pytest.mark.parametrize("kind", KINDS)
def test_boxes_and_scores_are_those_of_the_library(
    kind: str,
    size: tuple[int, int],
    folders: dict[str, Path],
    teachers: dict[str, TransformersTeacher],
) -> None:
    phrases = ["a red square", "the big blue circle", "cats"]
    image = picture(*size)
    rows = library_rows(kind, folders[kind], image, phrases)
    expected = kept_rows(rows, *size)
    assert len({label for _, label, _ in expected}) == 3
    scores = [score for score, _, _ in expected]
    assert max(scores) - min(scores) > 0.05
    [found] = teachers[kind].ground([image], [caption(*phrases)])
    assert found.names == phrases
    assert found.scores_K.tolist() == sorted(found.scores_K.tolist(), reverse=True)
    assert_same(rows_of(found), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_change_nothing(kind: str, teachers: dict[str, TransformersTeacher]) -> None:
    sizes = [(50, 90), (90, 50), (50, 90), (64, 64), (50, 90), (31, 47)]
    images = [picture(*size, seed) for seed, size in enumerate(sizes)]
    captions = [
        caption("a red square", "cat"),
        caption("dogs"),
        caption("a big ring", "the blue circle", "a cat"),
        ("nothing in here", []),
        caption("blue squares", "st bernard"),
        caption("a dog", "a dog"),
    ]
    alone = teachers[kind].ground(images, captions, batch_size=1)
    assert [len(found.names) for found in alone] == [2, 1, 3, 0, 2, 2]
    assert [len(found.scores_K) > 0 for found in alone] == [True, True, True, False, True, True]
    for batch_size in (2, 8):
        together = teachers[kind].ground(images, captions, batch_size=batch_size)
        for one, other in zip(alone, together, strict=True):
            assert_same(rows_of(other), rows_of(one))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_remembered(kind: str, teachers: dict[str, TransformersTeacher]) -> None:
    """A labelled shard is the same, bit for bit, whatever its worker labelled before."""
    images = [picture(50, 90, 1), picture(50, 90, 2)]
    captions = [caption("a red square", "cat"), caption("a dog", "cat")]
    first = teachers[kind].ground(images, captions)
    teachers[kind].ground(images, [caption("ring"), caption("a dog")], batch_size=1)
    again = teachers[kind].ground(images, captions)
    assert [rows_of(found) for found in first] == [rows_of(found) for found in again]


def test_omdet_turbo_uses_no_text_features_of_other_batches(
    teachers: dict[str, TransformersTeacher],
) -> None:
    """Those that the model keeps differ in their last bits from new ones: spoil them."""
    teacher = teachers["omdet-turbo"]
    question = [picture(50, 90)], [caption("a red square", "cat")]
    [first] = teacher.ground(*question)
    kept = teacher.model.language_cache_class.cache
    assert len(kept) == 2
    kept.update({key: torch.zeros_like(value) for key, value in kept.items()})
    [again] = teacher.ground(*question)
    assert rows_of(again) == rows_of(first)


@pytest.mark.parametrize("kind", KINDS)
def test_odd_images_and_phrases(kind: str, teachers: dict[str, TransformersTeacher]) -> None:
    sizes = [(1, 1), (1, 300), (300, 1), (2, 100), (5, 5)]
    images = [picture(*size) for size in sizes]
    long = " ".join(["big"] * 100)
    captions = [caption("a red square"), caption("cat"), caption("dog"), caption(long)]
    captions.append(("cat   dog", [((3, 6),), ((0, 3), (6, 9))]))
    found = teachers[kind].ground(images, captions)
    for detection, (height, width) in zip(found, sizes, strict=True):
        boxes = detection.boxes_K4
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height, width, height])).all()
        assert (boxes[:, :2] < boxes[:, 2:]).all()
    assert found[4].names == ["   ", "cat dog"]
    assert set(found[4].labels_K.tolist()) == {1}


@pytest.mark.parametrize("kind", ["grounding-dino", "omdet-turbo"])
def test_large_images_are_shrunk_first(
    kind: str, folders: dict[str, Path], teachers: dict[str, TransformersTeacher]
) -> None:
    large = picture(1000, 1600)
    question = caption("a red square", "cat")
    [same] = load_teacher([f"hf:{folders[kind]}"]).ground([large], [question])
    [found] = teachers[kind].ground([resize(large, (800, 1280))], [question])
    assert len(found.scores_K) > 3
    shrunk = [
        (score, label, tuple(side * 0.8 for side in box)) for score, label, box in rows_of(same)
    ]
    assert_same(shrunk, rows_of(found))


def test_grounding_dino_splits_long_lists(teachers: dict[str, TransformersTeacher]) -> None:
    """Each phrase is asked for once, in prompts that fit; a prompt's phrases are asked as alone."""
    teacher = teachers["grounding-dino"]
    assert isinstance(teacher, transformers_teachers.GroundingDino)
    phrases = ["a red square", "dog", "the big blue circle", "st bernard", "a green ring"]
    phrases += ["blue cats", "a cat on the ring", "big dogs", "square circle", " ", "red"]
    prompts = teacher.prompts(phrases)
    assert [label for labels in prompts for label in labels] == [*range(9), 10]
    texts = [teacher.text([phrases[label] for label in labels])[0] for labels in prompts]
    assert len(texts) > 1
    assert all(len(text) <= MAX_TEXT for text in texts)
    image = picture(50, 90)
    whole = "; ".join(phrases)
    starts = [len("; ".join(phrases[:n])) + 2 * bool(n) for n in range(len(phrases))]
    spans = [((a, a + len(phrase)),) for a, phrase in zip(starts, phrases, strict=True)]
    [found] = teacher.ground([image], [(whole, spans)])
    assert found.names == phrases
    expected = []
    for labels in prompts:
        [part] = teacher.ground([image], [(whole, [spans[label] for label in labels])])
        expected += [(score, labels[label], box) for score, label, box in rows_of(part)]
    assert_same(rows_of(found), sorted(expected, reverse=True)[:100])


@pytest.mark.parametrize("phrases", [["a red square", "cats"], ["dog"], ["Big St Bernard", "a"]])
def test_grounding_dino_reads_the_tokens_that_its_processor_makes(
    phrases: list[str], teachers: dict[str, TransformersTeacher]
) -> None:
    teacher = teachers["grounding-dino"]
    assert isinstance(teacher, transformers_teachers.GroundingDino)
    ids, places = teacher.text(phrases)
    assert ids == teacher.processor(text=[phrases])["input_ids"][0]
    own = [list(range(len(ids)))[place] for place in places]
    assert own == _sub_sentences(ids)


def test_grounding_dino_keeps_a_phrase_with_stops_whole(
    teachers: dict[str, TransformersTeacher],
) -> None:
    teacher = teachers["mm-grounding-dino"]
    image = picture(50, 90)
    [plain] = teacher.ground([image], [caption("st bernard", "cat")])
    text = "st. bernard? [SEP] on cat"
    [stopped] = teacher.ground([image], [(text, [((0, 18),), ((22, 25),)])])
    assert len(plain.scores_K) > 3
    assert rows_of(stopped) == rows_of(plain)


def test_grounding_dino_separates_phrases(teachers: dict[str, TransformersTeacher]) -> None:
    """The text encoder gives a phrase the same features whatever stands before it."""
    teacher = teachers["grounding-dino"]
    assert isinstance(teacher, transformers_teachers.GroundingDino)
    features = {}
    for phrases in (["a red square"], ["the dog", "a red square"], ["a red square", "cat"]):
        ids, places = teacher.text(phrases)
        seen: list[Tensor] = []
        hook = teacher.model.model.text_projection.register_forward_hook(
            lambda _, __, output, seen=seen: seen.append(output[0])
        )
        teacher.ground([picture(50, 90)], [caption(*phrases)])
        hook.remove()
        features[len(ids), places[-1].start] = seen[0][places[phrases.index("a red square")]]
    first, *others = features.values()
    assert len(others) == 2
    for other in others:
        torch.testing.assert_close(other, first)


@pytest.mark.parametrize("kind", ["owlv2", "omdet-turbo"])
def test_an_ensemble_is_the_fusion_of_its_members(
    kind: str, folders: dict[str, Path], ours: Path
) -> None:
    names = [str(ours), f"hf:{folders[kind]}"]
    images = [picture(50, 90), picture(64, 64, 1)]
    captions = [caption("a red square", "cat"), caption("blue ring")]
    ensemble = load_teacher(names)
    members = [load_teacher([name]).ground(images, captions) for name in names]
    for found, parts in zip(
        ensemble.ground(images, captions), zip(*members, strict=True), strict=True
    ):
        assert len(found.scores_K)
        assert rows_of(found) == rows_of(fuse(parts))


def test_our_own_checkpoints_are_grounders(ours: Path) -> None:
    images, captions = [picture(50, 90)], [caption("red square", "blue ring")]
    [found] = load_teacher([str(ours)]).ground(images, captions)
    [expected] = Grounder.load(ours).ground(images, captions)
    assert len(found.scores_K)
    assert rows_of(found) == rows_of(expected)


def test_the_digest_is_of_what_is_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    original = folders["owlv2"]
    digest = teacher_digest([f"hf:{original}"])
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    (copy / "README.md").write_text("a model card")
    assert teacher_digest([f"hf:{copy}"]) == digest
    names = {path.name for path in original.iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json"} < names
    for name in names:
        other = tmp_path / name
        shutil.copytree(original, other)
        data = bytearray((other / name).read_bytes())
        data[-3] ^= 1
        (other / name).write_bytes(data)
        if name != "config.json":
            assert teacher_digest([f"hf:{other}"]) != digest
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**settings, "more": 1}))
    assert teacher_digest([f"hf:{copy}"]) != digest


def test_the_digest_of_ours_and_of_an_ensemble(folders: dict[str, Path], ours: Path) -> None:
    files = ("model.safetensors", "config.json", "vocab.txt")
    own = storage.digest({name: storage.crc32c((ours / name).read_bytes()) for name in files})
    assert teacher_digest([str(ours)]) == own
    detector = f"hf:{folders['owlvit']}"
    both = teacher_digest([str(ours), detector])
    assert len({own, teacher_digest([detector]), both}) == 3
    assert teacher_digest([detector, str(ours)]) != both
    assert len(both) == 16


def test_a_hub_name_is_found_in_the_cache(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--lab--owl"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folders["owlvit"], repository / "snapshots" / commit)
    assert teacher_digest(["hf:lab/owl"]) == teacher_digest([f"hf:{folders['owlvit']}"])
    question = [picture(50, 90)], [caption("a red square")]
    [same] = load_teacher(["hf:lab/owl"]).ground(*question)
    [found] = load_teacher([f"hf:{folders['owlvit']}"]).ground(*question)
    assert len(found.scores_K)
    assert rows_of(same) == rows_of(found)
    for missing in ("lab/absent", "no/such/folder", "no such folder"):
        with pytest.raises(ConfigError, match="hf download|is no folder"):
            load_teacher([f"hf:{missing}"])


def test_what_is_no_supported_detector_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model_type in config\.json"):
        load_teacher([f"hf:{tmp_path}"])
    (tmp_path / "config.json").write_text('{"model_type": "detr"}')
    with pytest.raises(ConfigError, match="'detr'; supported teachers are grounding-dino, mm-g"):
        teacher_digest([f"hf:{tmp_path}"])
    with pytest.raises(DataError):
        load_teacher([str(tmp_path / "absent")])


def test_weights_must_be_whole_and_safe(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "owl"
    shutil.copytree(folders["owlvit"], folder)
    weights = load_file(folder / "model.safetensors")
    del weights["class_head.dense0.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 1 tensors, class_head\.dense0\.weight"):
        load_teacher([f"hf:{folder}"])
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ConfigError, match="can't be loaded"):
        load_teacher([f"hf:{folder}"])
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="can't be loaded"):
        load_teacher([f"hf:{folder}"])


def test_a_caption_for_every_image(teachers: dict[str, TransformersTeacher]) -> None:
    with pytest.raises(ValueError, match="1 images and 2 captions"):
        teachers["owlvit"].ground([picture(8, 8)], [caption("a"), caption("b")])
