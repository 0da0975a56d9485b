"""One tiny model learns from nothing to answer questions about toy scenes and to describe them."""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from glipv2.data_prep.toy_drawing import draw_scene
from glipv2.data_prep.toy_scene import COLOURS, SIZES, Thing
from glipv2.model.batch import Batch
from glipv2.model.config import preset
from glipv2.model.glip import GLIPv2, build_model
from glipv2.model.images import pad_images
from glipv2.model.tokenizer import Tokenizer, tiny_vocab
from glipv2.model.understanding import answer, generate

SIDE = 64
DIAMETERS = {"small": 0.35, "large": 0.8}
QUESTIONS = ("which color is the circle?", "is the circle small or large?")
ANSWERS = COLOURS + SIZES
STEPS, IMAGES = 120, 16
TOKENIZER = Tokenizer.from_vocab(tiny_vocab(), preset("tiny").text_encoder.max_tokens)


@dataclass(frozen=True)
class Scene:
    """A single circle of some colour and size somewhere in clutter."""

    image_3HW: Tensor
    thing: Thing

    @property
    def caption(self) -> str:
        return f"a {self.thing.size} {self.thing.name}"

    @property
    def answers(self) -> tuple[str, str]:
        """To QUESTIONS."""
        return self.thing.colour, self.thing.size


def draw(rng: np.random.Generator) -> Scene:
    size = SIZES[rng.integers(len(SIZES))]
    thing = Thing(
        colour=COLOURS[rng.integers(len(COLOURS))],
        shape="circle",
        texture="plain",
        size=size,
        diameter=DIAMETERS[size],
    )
    jpeg, _ = draw_scene([thing], SIDE, False, rng)
    pixels_HW3 = np.array(Image.open(io.BytesIO(jpeg)))
    return Scene(torch.from_numpy(pixels_HW3).permute(2, 0, 1), thing)


def batch_of(scenes: Sequence[Scene], texts: Sequence[str]) -> Batch:
    """A captioning batch; questions make another of it."""
    images, sizes = pad_images([scene.image_3HW for scene in scenes], (SIDE, SIDE))
    ids = [TOKENIZER.encode(text).ids for text in texts]
    B, T = len(ids), max(len(row) for row in ids)
    tokens = torch.tensor([row + [TOKENIZER.pad_id] * (T - len(row)) for row in ids])
    return Batch(
        images_B3HW=images,
        sizes_B2=sizes,
        tokens_BT=tokens,
        token_mask_BT=tokens != TOKENIZER.pad_id,
        mlm_labels_BT=torch.full((B, T), -100),
        boxes_BN4=torch.zeros(B, 0, 4),
        box_mask_BN=torch.zeros(B, 0, dtype=torch.bool),
        positive_BNT=torch.zeros(B, 0, T, dtype=torch.bool),
        box_category_BN=torch.zeros(B, 0, dtype=torch.int64),
        token_category_BT=torch.full((B, T), -1),
        keys=["toy"] * B,
        task="captioning",
    )


def captions_of(scenes: Sequence[Scene]) -> Batch:
    return batch_of(scenes, [scene.caption for scene in scenes])


def questions_about(scenes: Sequence[Scene]) -> Batch:
    """The two questions in turn."""
    batch = batch_of(scenes, [QUESTIONS[i % 2] for i in range(len(scenes))])
    right = torch.tensor([ANSWERS.index(scene.answers[i % 2]) for i, scene in enumerate(scenes)])
    targets = torch.nn.functional.one_hot(right, len(ANSWERS)).float()
    return replace(batch, task="vqa", answers_BV=targets)


def batches(scenes: Sequence[Scene], rng: np.random.Generator) -> Iterator[Batch]:
    for step in range(STEPS):
        own = [scenes[i] for i in rng.choice(len(scenes), IMAGES, replace=False)]
        yield captions_of(own) if step % 2 else questions_about(own)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def held_out() -> list[Scene]:
    rng = np.random.default_rng(1)
    return [draw(rng) for _ in range(60)]


@pytest.fixture(scope="module")
def model(one_thread: None) -> GLIPv2:
    """About 20 seconds of training on both tasks in turn."""
    rng = np.random.default_rng(0)
    scenes = [draw(rng) for _ in range(600)]
    # From nothing, words learn faster to look at the image when it weighs more from the start.
    config = replace(
        preset("tiny"),
        answers=ANSWERS,
        captions=True,
        masked_words=False,
        contrast=False,
        fusion_scale=0.5,
    )
    model = build_model(config, seed=0).train()
    rates = {True: 3e-4, False: 2e-3}  # of the image's own part and of all others
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[name.startswith(("image_encoder", "pyramid"))].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[part], "lr": rate} for part, rate in rates.items()],
        betas=(0.9, 0.98),
        weight_decay=1e-4,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20, 2 * (1 - step / STEPS))
    )
    for batch in batches(scenes, rng):
        torch.stack(list(model(batch).values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def share_of_most_common(values: Sequence[str]) -> float:
    return Counter(values).most_common(1)[0][1] / len(values)


def test_questions_about_new_scenes_are_answered(model: GLIPv2, held_out: list[Scene]) -> None:
    batch = questions_about(held_out)
    with torch.no_grad():
        outputs = model.predict(
            batch.images_B3HW, batch.sizes_B2, batch.tokens_BT, batch.token_mask_BT
        )
    given = [best[0][0] for best in answer(model, outputs.fused_words_BTD)]
    for kind in (0, 1):
        truth = [scene.answers[kind] for scene in held_out[kind::2]]
        right = np.mean([a == b for a, b in zip(given[kind::2], truth, strict=True)])
        # Even against one who knows the likeliest answer to each question.
        assert share_of_most_common(truth) < 0.65
        assert right > 0.8, (QUESTIONS[kind], right)


def test_new_scenes_are_described(model: GLIPv2, held_out: list[Scene]) -> None:
    batch = captions_of(held_out)
    pyramid = model.encode_images(batch.images_B3HW, batch.sizes_B2)
    truth = [scene.caption for scene in held_out]
    said = [text for text, _ in generate(model, TOKENIZER, pyramid, beams=3, max_words=8)]
    assert share_of_most_common(truth) < 0.25
    right = np.mean([a == b for a, b in zip(said, truth, strict=True)])
    assert right > 0.7, right
