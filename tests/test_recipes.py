"""The published recipes say what the facts say, and how to make what they need."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import yaml

from glipv2.jobs.cli import parse
from glipv2.model.adaptation import set_trainable
from glipv2.model.config import preset
from glipv2.model.glip import build_model
from glipv2.pipeline.config import LabelConfig, RunConfig
from glipv2.pipeline.config_loader import load_config
from glipv2.pipeline.optim import build_optimizer
from glipv2.pipeline.train_config import TrainConfig

FOLDER = Path(__file__).parent.parent / "infra" / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PUBLISHED = [name for name in RECIPES if name.startswith(("glip_", "glipv2_", "finetune_"))]
GOLDG = ("flickr30k", "mixed", "objects365")
FIVE_SETS = (
    "flickr30k", "imagenet_boxes", "mixed", "objects365", "openimages", "visual_genome",
)  # fmt: skip
Phase = tuple[int, set[str], str | None]
PHASES: dict[str, list[Phase]] = {
    "glip_base": [(1000, set(), None)],
    "glip_t_a": [(309_375, {"objects365"}, "models/start_A")],
    "glip_t_b": [(309_375, {"objects365"}, "models/start_T")],
    "glip_t_c": [(670_312, {*GOLDG}, "models/start_T")],
    "glip_t": [(2_545_312, {*GOLDG, "s3://BUCKET/cap4m-grounded"}, "models/start_T")],
    "glip_l": [(1_000_000, {*FIVE_SETS, "s3://BUCKET/cap24m-grounded"}, "models/start_L")],
    "glipv2_t": [
        (2_545_312, {*GOLDG, "s3://BUCKET/cap4m-grounded"}, "models/start_T"),
        (223_437, {*GOLDG}, "runs/glipv2_t/all_losses"),
    ],
    "glipv2_b": [
        (1_000_000, {*FIVE_SETS, "coco_train2017", "s3://BUCKET/cc15m-grounded"}, "models/start_B"),
    ],
    "glipv2_h": [(1_000_000, {*FIVE_SETS, "coco_train2017", "s3://BUCKET/cc15m-grounded"}, None)],
    "glipv2_mask_head": [
        (90_000, {"coco_train2017", "lvis_train", "phrasecut_train"}, "runs/glipv2_t/without_mlm"),
    ],
    "finetune_base": [(1000, set(), "runs/glip_t")],
    "finetune_coco": [(88_715, {"coco_train2017"}, "runs/glip_t")],
    "finetune_lvis": [(75_127, {"lvis_train"}, "runs/glipv2_t/without_mlm")],
    "finetune_odinw": [(2000, set(), "runs/glip_t")],
    "finetune_linear_probe": [(2000, set(), "runs/glip_t")],
    "finetune_prompt": [(2000, set(), "runs/glip_t")],
    "finetune_flickr30k": [(23_281, {"flickr30k_train"}, "runs/glipv2_t/all_losses")],
    "finetune_vqa": [(12_853, {"vqa_train", "vqa_val"}, "runs/glipv2_t/all_losses")],
    "finetune_captioning": [(11_063, {"captions_train"}, "runs/glipv2_t/all_losses")],
}
"""Steps, sets and start of each phase; of those without sets the user gives them."""
GLIP_SIZES = ((480, 560, 640, 720, 800), 1333)


def load(name: str, phase: str | None = None) -> RunConfig:
    return load_config(str(FOLDER / f"{name}.yaml"), [], phase)


def phases(name: str) -> list[RunConfig]:
    return [load(name, phase) for phase in load(name).phases] or [load(name)]


def text_of(name: str) -> str:
    """The recipe and those that it extends."""
    text = (FOLDER / f"{name}.yaml").read_text()
    base = yaml.safe_load(text).get("extends")
    return text + (text_of(base.removesuffix(".yaml")) if base else "")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads_in_every_phase(name: str) -> None:
    assert phases(name)


def test_these_are_the_published_recipes_with_their_lengths_sets_and_starts() -> None:
    assert set(PUBLISHED) == PHASES.keys()
    for name, expected in PHASES.items():
        found = [(own.train.steps, {*own.data.mixture}, own.train.init) for own in phases(name)]
        assert found == expected, name


# Facts G.1: batch, rate, text rate, weight decay, its milestones, EMA, short and long sides.
PRETRAINING = {
    "glip_t_a": (64, 1e-4, 1e-5, 1e-4, (), 0.999, GLIP_SIZES),
    "glip_t_b": (64, 1e-4, 1e-5, 1e-4, (), 0.999, GLIP_SIZES),
    "glip_t_c": (64, 1e-4, 1e-5, 1e-4, (), 0.999, GLIP_SIZES),
    "glip_t": (64, 1e-4, 1e-5, 1e-4, (), 0.999, GLIP_SIZES),
    "glip_l": (64, 1e-4, 1e-5, 1e-2, (0.667 * 0.67, 0.667 * 0.89), 0.0, GLIP_SIZES),
    "glipv2_t": (64, 1e-4, 1e-5, 1e-4, (), 0.999, GLIP_SIZES),  # decay and EMA are ours
    # Of these rates and sizes are published; batch, decay and EMA are ours.
    "glipv2_b": (64, 1e-4, 1e-5, 1e-2, (0.667 * 0.67, 0.667 * 0.89), 0.0, GLIP_SIZES),
    "glipv2_h": (64, 1e-4, 1e-5, 1e-2, (0.667 * 0.67, 0.667 * 0.89), 0.0, GLIP_SIZES),
    "glipv2_mask_head": (64, 1e-4, 1e-5, 1e-4, (), 0.0, GLIP_SIZES),
}


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_has_the_published_numbers(name: str) -> None:
    batch, rate, text_rate, decay, decay_milestones, ema, sizes = PRETRAINING[name]
    for config in phases(name):
        train = config.train
        assert train.global_batch == batch
        assert (train.learning_rate, train.head_learning_rate) == (rate, rate)
        assert train.text_learning_rate == text_rate
        assert train.weight_decay == decay
        assert train.weight_decay_milestones == pytest.approx(decay_milestones, abs=1e-4)
        assert train.ema_decay == ema
        assert train.warmup_steps == 2000
        # GLIP-T's AMP was fp16, and bf16 needs no loss scale; GLIP-L had none
        assert train.precision == ("fp32" if name == "glip_l" else "bf16")
        assert (config.data.short_sides, config.data.long_side) == sizes
        assert config.data.flip == 0.5


@pytest.mark.parametrize("name", PUBLISHED)
def test_all_share_glips_optimiser(name: str) -> None:
    for config in phases(name):
        train = config.train
        assert (train.betas, train.eps) == ((0.9, 0.999), 1e-8)
        assert (train.bias_rate_factor, train.decayed) == (2.0, "all_but_biases")
        assert train.max_grad_norm == 1.0
        assert (train.schedule, train.milestones) == ("steps", (0.67, 0.89))
        assert train.warmup_factor == 0.001


def test_lengths_are_those_of_the_facts_or_their_arithmetic() -> None:
    objects, flickr, mixed, pairs = 0.66e6, 0.149e6, 0.621e6, 4e6
    lengths = {
        "glip_t_a": 30 * objects / 64,
        "glip_t_b": 30 * objects / 64,
        "glip_t_c": 30 * (objects + flickr + mixed) / 64,
        "glip_t": 30 * (objects + flickr + mixed + pairs) / 64,
        "glip_l": 1e6,
        "finetune_coco": 24 * 118_287 / 32,
        "finetune_vqa": 10 * (443_757 + 214_354) / 512,
        "finetune_captioning": 10 * 5 * 113_287 / 512,
    }
    for name, steps in lengths.items():
        assert abs(load(name).train.steps - steps) < 1, name


def test_models_are_the_published_ones() -> None:
    sizes = {
        "glip_t_a": "A", "glip_t_b": "T", "glip_t_c": "T", "glip_t": "T", "glip_l": "L",
        "glipv2_t": "T", "glipv2_b": "B", "glipv2_h": "H",
    }  # fmt: skip
    for name, size in sizes.items():
        config = load(name)
        v2 = name.startswith("glipv2")
        assert config.model.preset == size
        assert config.model.image_encoder == preset(size).image_encoder
        assert (config.model.contrast, config.model.masked_words) == (v2, v2), name
        assert (config.losses.inter_image, config.losses.mlm) == ((1, 1) if v2 else (0, 0)), name
    assert not load("glip_t_a").model.fusion
    first, second = phases("glipv2_t")
    assert (first.losses.mlm, second.losses.mlm) == (1, 0)
    assert second.train.init == first.run_dir
    assert set(second.data.mixture) == {"objects365", "flickr30k", "mixed"}
    mask_head = load("glipv2_mask_head")
    assert mask_head.train.tune == "mask_head"
    assert set(mask_head.data.mixture) == {"coco_train2017", "lvis_train", "phrasecut_train"}


def test_fine_tuning_has_the_published_numbers() -> None:
    coco = load("finetune_coco")
    assert coco.train.global_batch == 32
    assert {coco.train.learning_rate, coco.train.head_learning_rate} == {1e-5}
    assert coco.train.text_learning_rate == 1e-5
    assert coco.data.fixed_prompts
    odinw = load("finetune_odinw").train
    assert (odinw.global_batch, odinw.weight_decay, odinw.ema_decay) == (4, 0.05, 0)
    assert (odinw.learning_rate, odinw.head_learning_rate) == (1e-4, 1e-4)
    assert odinw.text_learning_rate == 1e-5
    probe, prompt = load("finetune_linear_probe").train, load("finetune_prompt")
    assert (probe.tune, probe.head_learning_rate, probe.weight_decay) == (
        "linear_probe",
        1e-4,
        0.05,
    )
    assert (prompt.train.tune, prompt.model.prompt_rows) == ("prompt", 1000)
    assert (prompt.train.head_learning_rate, prompt.train.weight_decay) == (0.05, 0.25)
    for name, rate in (("finetune_vqa", 2e-5), ("finetune_captioning", 5e-5)):
        config = load(name)
        assert (config.train.global_batch, config.train.learning_rate) == (512, rate)
        assert config.data.short_sides == (576,)


def test_the_bottom_of_the_image_encoder_stays_frozen_on_odinw() -> None:
    train = load("finetune_odinw").train
    model = build_model(preset("tiny"), seed=0)
    set_trainable(model, train.tune, train.frozen)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    swin = "image_encoder.swin."
    assert frozen == {
        name for name, _ in model.named_parameters()
        if name.startswith((f"{swin}patch_embed", f"{swin}layers.0."))
    }  # fmt: skip
    optimised = sum(len(group["params"]) for group in build_optimizer(model, train).param_groups)
    assert optimised == len(list(model.parameters())) - len(frozen)


def test_rates_of_vqa_are_fibers_multiples() -> None:
    train: TrainConfig = load("finetune_vqa").train
    tiny = build_model(dataclasses.replace(preset("tiny"), answers=("yes", "no")), seed=0)
    rates = {
        id(parameter): group["base_lr"]
        for group in build_optimizer(tiny, train).param_groups
        for parameter in group["params"]
    }
    for name, parameter in tiny.named_parameters():
        if "bias" in name:
            continue
        part = name.split(".")[0]
        factor = {"answer_head": 50, "image_encoder": 1, "pyramid": 1, "text_encoder": 1}.get(
            part, 5
        )
        assert rates[id(parameter)] == pytest.approx(2e-5 * factor), name


# Facts F: who labels, and which pairs.
LABELLING = {
    "label_glip_cap4m": ("glip_t_c", "cap4m"),
    "label_glip_cap24m": ("glip_l", "cap24m"),
    "label_glipv2_cc15m": ("glip_l", "cc15m"),
}


@pytest.mark.parametrize("name", LABELLING)
def test_labelling_has_the_published_rules(name: str) -> None:
    teacher, pairs = LABELLING[name]
    rules = load(name).label
    assert rules.teacher == f"s3://BUCKET/models/{teacher}" and rules.ensemble == ()
    assert rules.inputs == {f"s3://BUCKET/{pairs}": f"s3://BUCKET/{pairs}-grounded"}
    assert (rules.score_threshold, rules.calibration) == (0.5, "")  # confidence above 0.5
    assert rules.cross_phrase_nms == 1  # NMS off
    assert rules.max_boxes == 100  # all that a model gives
    assert not rules.keep_empty  # one box at least
    assert not rules.phrases.stop  # no phrase black list is described
    assert load(name).rounds == 1


def test_every_recipe_of_a_labelling_is_checked_and_the_threshold_is_glips_without_one() -> None:
    assert set(LABELLING) == {name for name in RECIPES if name.startswith("label_")}
    assert LabelConfig().score_threshold == 0.5


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_set_of_a_mixture_has_the_command_that_makes_it(name: str) -> None:
    commands = [line for line in text_of(name).splitlines() if line.startswith("#   glipv2 ")]
    made = {}
    for line in commands:
        words = shlex.split(line.removeprefix("#   glipv2 "))
        parsed = parse(words)
        made[getattr(parsed, "out", None)] = parsed
    labelled = {
        output: path
        for path in RECIPES if path.startswith("label_")
        for output in load(path).label.inputs.values()
    }  # fmt: skip
    for config in phases(name):
        for source in config.data.mixture:
            assert f"data/{source}" in made or labelled[source] in text_of(name), source


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_head_says_what_it_reproduces_from_where_and_on_what(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    head = " ".join(line.strip("# ") for line in text.splitlines() if line.startswith("#"))
    assert re.search(r"facts [A-M](\.\d)?\b", head)
    if not name.endswith("_base"):
        assert "assumed" in head or "as in finetune_odinw.yaml" in head
