"""glipv2 convert, through the command line."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from glip_weights import generated_weights
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertModel

from glipv2.data_prep.teachers import load_teacher
from glipv2.jobs.cli import main
from glipv2.model.config import TINY, preset
from glipv2.model.convert import glip_config, glip_constants
from glipv2.model.glip import GLIPv2
from glipv2.model.grounder import Grounder
from glipv2.model.text_encoder import bert_config
from glipv2.model.tokenizer import tiny_vocab
from glipv2.pipeline.checkpoint import load_model

META = Path(__file__).parent / "data" / "glip_reference" / "meta.json"


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    weights = generated_weights(json.loads(META.read_text())["state_dict"])
    return weights | glip_constants(glip_config(weights))


@pytest.fixture
def vocab(tmp_path: Path) -> Path:
    path = tmp_path / "vocab.txt"
    words = [*tiny_vocab(), *(f"word{number}" for number in range(30522 - len(tiny_vocab())))]
    path.write_text("\n".join(words) + "\n")
    return path


def test_a_glip_file_becomes_a_folder_and_the_same_file_again(
    tensors: dict[str, Tensor], vocab: Path, tmp_path: Path
) -> None:
    stored = {"module." + name: tensor for name, tensor in tensors.items()}
    torch.save({"model": stored, "iteration": 7}, tmp_path / "glip.pth")
    folder, again = str(tmp_path / "folder"), str(tmp_path / "again.pth")
    source = ["--from", "glip", str(tmp_path / "glip.pth")]
    assert main(["convert", *source, "--vocab", str(vocab), "--out", folder]) == 0

    model, tokenizer = load_model(folder)  # what a teacher and an evaluation are loaded with
    assert model.config.glip_compatible
    assert tokenizer.vocab_size == 30522
    assert torch.equal(model.alignment_head.bias0, tensors["rpn.head.bias0"])
    loaded = GLIPv2.from_pretrained("file://" + folder)
    assert torch.equal(loaded.alignment_head.bias_text, tensors["rpn.head.bias_lang"])

    assert main(["convert", "--to", "glip", folder, "--out", again]) == 0
    written = torch.load(again, weights_only=True)["model"]
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in stored.items())

    teacher = load_teacher([folder])
    wide_3HW = torch.zeros(3, 12, 400, dtype=torch.uint8)  # is scaled to few pixels
    wide_3HW[0, 2:10, 100:140] = 255
    caption = ("a red square", [[(2, 12)]])
    [found] = teacher.ground([teacher.prepare(wide_3HW)], [caption])
    [direct] = Grounder(model, tokenizer).ground([wide_3HW], [caption])
    assert torch.equal(found.boxes_K4, direct.boxes_K4)
    assert torch.equal(found.scores_K, direct.scores_K)
    assert 0 < len(found.scores_K) <= 100 and torch.isfinite(found.scores_K).all()
    assert found.labels_K.unique().tolist() == [0] and found.names[0] == "red square"
    assert (found.boxes_K4 >= 0).all() and (found.boxes_K4 <= torch.tensor([400, 12] * 2)).all()


def test_a_bare_file_of_halves_comes_back_bit_for_bit_from_a_run_a_step_and_a_plain_folder(
    tensors: dict[str, Tensor], vocab: Path, tmp_path: Path
) -> None:
    stored = {name: tensor.half() for name, tensor in tensors.items()}
    stored["rpn.head.bias0"] = stored["rpn.head.bias0"].bfloat16()  # each has its own type
    torch.save(stored, tmp_path / "glip.pth")  # the tensors alone, with no dictionary around
    run, plain, again = tmp_path / "run", tmp_path / "plain", tmp_path / "again.pth"
    step = run / "checkpoints" / "step-000007"
    source = ["--from", "glip", str(tmp_path / "glip.pth"), "--vocab", str(vocab)]
    assert main(["convert", *source, "--out", str(step)]) == 0
    shutil.copytree(step, plain)
    (plain / "COMMIT.json").unlink()
    for folder in (run, step, plain):
        assert main(["convert", "--to", "glip", str(folder), "--out", str(again)]) == 0
        written = torch.load(again, weights_only=True)["model"]
        assert written.keys() == stored.keys()
        for name, tensor in stored.items():
            assert written[name].dtype == tensor.dtype, name
            assert torch.equal(written[name], tensor), name


def test_numbers_that_would_not_come_back_are_refused(
    tensors: dict[str, Tensor], vocab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fine = tensors["rpn.head.bias0"].double() / 3
    torch.save({"model": tensors | {"rpn.head.bias0": fine}}, tmp_path / "glip.pth")
    source = ["--from", "glip", str(tmp_path / "glip.pth"), "--vocab", str(vocab)]
    assert main(["convert", *source, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "1 tensors hold NaN or numbers that float32" in error
    assert "save them as float32 first: rpn.head.bias0" in error
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_listed_and_nothing_is_written(
    tensors: dict[str, Tensor], vocab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {name: tensor for name, tensor in tensors.items() if "gamma_l" not in name}
    torch.save({"model": broken}, tmp_path / "glip.pth")
    source = ["--from", "glip", str(tmp_path / "glip.pth"), "--vocab", str(vocab)]
    assert main(["convert", *source, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "rpn.head.dyhead_tower.0.b_attn.gamma_l is missing" in error
    assert "rpn.head.dyhead_tower.3.b_attn.gamma_l is missing" in error
    assert not (tmp_path / "out").exists()


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("trapped",)


def test_a_pickle_that_would_run_code_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"x": torch.zeros(1)}, "scheduler": Trap()}, "glip.pth")
    assert main(["convert", "--from", "glip", "glip.pth", "--vocab", "v", "--out", "out"]) == 2
    assert "more than tensors" in capsys.readouterr().err
    assert not Path("trapped").exists()


DAMAGED = {
    "text": b"no weights at all\n",
    "empty": b"",
    "half": None,
    "a flipped byte": None,
    "a list": [torch.zeros(2)],
    "a list of weights": {"model": [torch.zeros(2)]},
    "nothing": {"model": None},
    "names that are none": {"model": {3: torch.zeros(2)}},
    "other values": {"model": {"x": "y"}},
    "another model": {"model": {"x": torch.zeros(2)}},
    "no dimensions": {"model": {"rpn.head.centerness.weight": torch.zeros(())}},
}


@pytest.mark.parametrize("kind", ["glip", "timm-swin"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_files_that_hold_no_weights_are_refused_by_name(
    damage: str, kind: str, vocab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, content = tmp_path / "weights.pth", DAMAGED[damage]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content or {"model": {"x": torch.ones(5000)}}, path)
    if content is None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data[: len(data) // 2] if damage == "half" else data)
    size = ["--preset", "tiny"] if kind == "timm-swin" else []
    words = ["--vocab", str(vocab), *size, "--out", str(tmp_path / "out")]
    assert main(["convert", "--from", kind, str(path), *words]) == 2
    assert str(path) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_encoders_from_elsewhere_start_a_model(tmp_path: Path) -> None:
    torch.manual_seed(3)
    bert = BertModel(bert_config(TINY.text_encoder), add_pooling_layer=False)
    bert.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(tiny_vocab()) + "\n")
    swin = GLIPv2(preset("tiny")).image_encoder.swin.state_dict()
    save_file(
        {name: tensor.contiguous() for name, tensor in swin.items()}, tmp_path / "s.safetensors"
    )
    arguments = ["convert", "--from", "timm-swin", str(tmp_path / "s.safetensors")]
    arguments += ["--from", "bert", str(tmp_path / "bert"), "--preset", "tiny"]
    assert main([*arguments, "--out", str(tmp_path / "start")]) == 0
    model, tokenizer = load_model(str(tmp_path / "start"))
    words = model.text_encoder.bert.embeddings.word_embeddings.weight
    assert torch.equal(words, bert.embeddings.word_embeddings.weight)
    patches = model.image_encoder.swin.patch_embed.proj.weight
    assert torch.equal(patches, swin["patch_embed.proj.weight"].flip(1))  # blue first
    assert tokenizer.vocabulary == tiny_vocab()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "magic", "x"], "unknown kind 'magic'"),
        (["--from", "glip", "a", "--from", "bert", "b"], "give it alone"),
        (["--from", "bert", "nowhere", "--preset", "XL"], "unknown model preset"),
        (["--from", "bert", "nowhere", "--preset", "tiny"], "holds neither model.safetensors"),
        (["--from", "glip", "nowhere.pth"], "nowhere.pth"),
        (["--from", "bert", "a", "--from", "bert", "b"], "names one kind twice"),
        (["--from", "glip", "a", "--preset", "T"], "--preset goes with --from timm-swin or bert"),
        (["--from", "glip", "a", "--seed", "0"], "--seed goes with --from timm-swin or bert"),
        (["--from", "timm-swin", "a", "--ema"], "--ema goes with --from glip; it means nothing"),
        (["--to", "glip", "a", "--vocab", "v"], "it means nothing for --to glip"),
        (["--to", "glip", "nowhere"], "no checkpoint in nowhere: it is no folder, or empty"),
    ],
)
def test_mistakes_are_explained(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
