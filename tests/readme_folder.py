"""The README's commands and recipes, and a folder that holds the files they name, all small."""

import dataclasses
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import yaml
from glip_weights import generated_weights
from safetensors.torch import save_file
from transformers import BertModel

sys.path.insert(0, str(Path(__file__).parent))
from commands import ROOT, TIMEOUT, finish, start  # noqa: E402
from finished_run import write_finished_run  # noqa: E402
from odd_files import tar  # noqa: E402
from sample_records import coco_file  # noqa: E402
from scored_runs import scene, tiny_model  # noqa: E402

from glipv2.data_prep.reasons import Dropped  # noqa: E402
from glipv2.data_prep.sources import open_source  # noqa: E402
from glipv2.data_prep.toy import toy_categories, toy_records  # noqa: E402
from glipv2.eval.odinw import odinw_sets  # noqa: E402
from glipv2.jobs.cli import main  # noqa: E402
from glipv2.model.config import TINY  # noqa: E402
from glipv2.model.convert import glip_config, glip_constants  # noqa: E402
from glipv2.model.folders import step_url  # noqa: E402
from glipv2.model.glip import GLIPv2  # noqa: E402
from glipv2.model.text_encoder import bert_config  # noqa: E402
from glipv2.model.tokenizer import tiny_vocab  # noqa: E402
from glipv2.pipeline.checkpoint import write_folder  # noqa: E402
from glipv2.pipeline.config import PrepareConfig  # noqa: E402
from glipv2.pipeline.records import Question  # noqa: E402
from glipv2.pipeline.shards import write_shard_set  # noqa: E402

README = (ROOT / "README.md").read_text()
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"(?:^    .+\n)+", re.MULTILINE)
IN_PROSE = re.compile(r"`((?:glipv2 \w+|make|python|pip|ray) [^`]+)`")
MARK = re.compile(r"needs? a cluster")
PROCESSES = ("label", "evaluate", "schedule", "adapt", "pretrain")
"""Commands that start Ray or ranks."""
IMAGES, PAIRS = 12, 24
"""Of instances.json and of the tars."""

SIZES = {"short_sides": [64], "long_side": 64, "pad_to": [64, 64]}
SMALLER: dict[str, dict[str, Any]] = {
    "my.yaml": {
        "model": {"preset": "tiny"},
        "data": SIZES,
        "train": {"precision": "fp32", "global_batch": 8, "steps": 8},
    },
    "mine.yaml": {"eval": {"num_actors": 1}},
    "dice.yaml": {
        "model": {"preset": "tiny"},
        "data": SIZES,
        "train": {"precision": "fp32", "steps": 2},
        "adapt": {"seeds": [3], "num_tasks": 1},
    },
}
"""Recipe of the README -> what two CPU cores want otherwise in it."""


def shown_commands() -> dict[str, bool]:
    """Every command line of the README, without its comment -> is it marked as needing a cluster?

    The mark is in its comment, or in the paragraph above its block.
    """
    text = FENCED.sub("", README)
    shown = {" ".join(line.split()): False for line in IN_PROSE.findall(text)}
    for block in BLOCK.finditer(text):
        above = text[: block.start()].rstrip().rpartition("\n\n")[2]
        for line in block[0].replace("\\\n", " ").splitlines():
            command, _, comment = line.partition(" #")
            if command.strip():
                shown[" ".join(command.split())] = bool(MARK.search(comment) or MARK.search(above))
    return shown


def shown_command(beginning: str) -> str:
    """The one command line that begins so, or is this and no more."""
    shown = shown_commands()
    [line] = [beginning] if beginning in shown else [c for c in shown if c.startswith(beginning)]
    return line


def fenced(language: str) -> list[str]:
    return [text for kind, text in FENCED.findall(README) if kind == language]


def shown_recipes() -> dict[str, dict[str, Any]]:
    """Name, which the first line of each block gives -> recipe."""
    return {text.split()[1].rstrip(";"): yaml.safe_load(text) for text in fenced("yaml")}


def merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return tree | {
        key: merged(tree.get(key, {}), value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }


def words_of(beginning: str, names: dict[str, str]) -> list[str]:
    """What follows `glipv2` in a command; `names` are for its placeholders."""
    program, *words = shlex.split(shown_command(beginning))
    assert program == "glipv2"
    return [names.get(word, word) for word in words]


def run(beginning: str, *more: str, **names: str) -> str:
    """Run the command that begins so to its end, which is without error; what it printed."""
    words = words_of(beginning, names)
    if words[0] in PROCESSES:
        return finish(*words, *more, cwd=Path.cwd())
    return run_inside(beginning, *more, **names)


def run_inside(beginning: str, *more: str, **names: str) -> str:
    """The same in this process."""
    with redirect_stdout(io.StringIO()) as said:
        try:
            code = main([*words_of(beginning, names), *more])
        except SystemExit as ended:  # of --help
            code = int(ended.code or 0)
    assert code == 0, said.getvalue()
    return said.getvalue()


def begin(beginning: str) -> "subprocess.Popen[str]":
    """Start the command that begins so, which goes on until it is stopped."""
    return start(*words_of(beginning, {}), cwd=Path.cwd())


def stop(process: "subprocess.Popen[str]") -> int:
    process.terminate()
    process.communicate(timeout=TIMEOUT)
    return process.returncode


def make_folder(folder: Path) -> None:
    """All that the commands name and that none of them makes before."""
    (folder / "infra").symlink_to(ROOT / "infra")
    write_sources(folder)
    write_sets(folder)
    write_models(folder)
    write_weights_of_others(folder)
    for name, tree in shown_recipes().items():
        (folder / name).write_text(yaml.safe_dump(merged(tree, SMALLER.get(name, {}))))


def write_sources(folder: Path) -> None:
    records = list(toy_records("toy_val", IMAGES, seed=1, size=64))
    (folder / "photo.jpg").write_bytes(records[0].image)
    (folder / "images").mkdir()
    for record in records:
        (folder / "images" / f"{record.key}.jpg").write_bytes(record.image)
    annotations = json.dumps(coco_file(records, toy_categories("toy_val")))
    (folder / "instances.json").write_text(annotations)
    shutil.copytree(ROOT / "infra" / "samples" / "web_pairs", folder / "scraped")
    (folder / "img2dataset").mkdir()
    pairs = list(toy_records("toy_pairs", PAIRS, seed=1, size=64))
    for number in range(2):
        own = pairs[number::2]
        members = [(f"{p.key}.jpg", p.image) for p in own]
        members += [(f"{p.key}.txt", p.caption.encode()) for p in own]
        (folder / "img2dataset" / f"{number:05d}.tar").write_bytes(tar(*sorted(members)))


def write_sets(folder: Path) -> None:
    scraped = open_source(PrepareConfig(source="pairs", root=str(folder / "scraped")))
    write_shard_set(str(folder / "data" / "val"), [next(scraped.records(Dropped()))], (), {})
    names: dict[str, tuple[str, ...]] = {
        "coco": ("person", "tv"), "voc": ("person", "tvmonitor"), "warehouse_val": ("CB", "PLT"),
        "coco_val2017": ("cat", "dog"), "lvis_minival": ("cat", "dog"),
        "dice_train": ("one", "two"), "dice_test": ("one", "two"),
    }  # fmt: skip
    for name, categories in names.items():
        write_detection_set(folder / "data" / name, categories)
    for own in odinw_sets(13):
        write_detection_set(folder / "data" / "odinw" / own.name, (*own.prompts, "other"), 2)
    for name in ("vqa_train", "vqa_val"):
        write_shard_set(str(folder / "data" / name), [asked(number) for number in range(6)], (), {})


def write_detection_set(folder: Path, categories: tuple[str, ...], count: int = 4) -> None:
    """A box in each of `count` pictures, of the categories in turn, and what LVIS says beside."""
    info = {"frequency": ["rcf"[number % 3] for number in range(len(categories))]}
    records = []
    for number in range(count):
        whole = scene(number, task="detection", caption="")
        category = number % len(categories)
        region = dataclasses.replace(whole.regions[0], category=category, spans=(), phrase="")
        known = {"neg_categories": [], "not_exhaustive_categories": []}
        records.append(dataclasses.replace(whole, regions=(region,), provenance=known))
    write_shard_set(str(folder), records, categories, info)


def asked(number: int) -> Any:
    """A picture with a question about which people agree."""
    question = Question(id=str(number), text="what colour is it", answers=("red",) * 10)
    whole = scene(number, task="vqa", caption="", questions=(question,))
    return dataclasses.replace(whole, regions=())


def write_models(folder: Path) -> None:
    """Models of GLIP's kind and of ours; the quickstart's run, and a run with two steps."""
    write_folder(str(folder / "models" / "glip-t"), tiny_model(1, heads=True, glip=True), 0)
    write_folder(str(folder / "models" / "start"), tiny_model(2), 0)
    write_finished_run(folder / "runs" / "quickstart")
    student = str(folder / "runs" / "quickstart" / "student")
    write_folder(step_url(student, 450), tiny_model(3), 450)
    for step in (5000, 50000):  # of the same weights: no score falls
        url = step_url(str(folder / "runs" / "mine"), step)
        write_folder(url, tiny_model(4, heads=True), step)


def write_weights_of_others(folder: Path) -> None:
    """GLIP's own file with its list of words, a Swin of timm and a BERT, as they are published."""
    meta = json.loads((ROOT / "tests" / "data" / "glip_reference" / "meta.json").read_text())
    weights = generated_weights(meta["state_dict"])
    weights |= glip_constants(glip_config(weights))
    torch.save({"model": weights}, folder / "glip_tiny_model_o365_goldg.pth")
    words = [*tiny_vocab(), *(f"word{number}" for number in range(30522 - len(tiny_vocab())))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    swin = GLIPv2(TINY).image_encoder.swin.state_dict()
    contiguous = {name: tensor.contiguous() for name, tensor in swin.items()}
    save_file(contiguous, folder / "swin_tiny.safetensors")
    bert = BertModel(bert_config(TINY.text_encoder), add_pooling_layer=False)
    bert.save_pretrained(folder / "bert-base-uncased")
    (folder / "bert-base-uncased" / "vocab.txt").write_text("\n".join(tiny_vocab()) + "\n")
