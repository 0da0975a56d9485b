import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from glipv2.model import understanding
from glipv2.model.batch import NO_CATEGORY, NO_WORD, Batch, Collectives
from glipv2.model.config import LossWeights, ModelConfig, Part, preset
from glipv2.model.glip import GLIPv2, build_model
from glipv2.model.pyramid import Pyramid, pyramid_sizes

Terms = dict[str, Tensor]
TERMS = {"box", "centerness", "token", "inter_image", "mlm"}


@pytest.fixture(scope="module")
def model() -> GLIPv2:
    return build_model(preset("tiny"), seed=0).train()


def make_batch(images: int = 4, boxes: int = 3, tokens: int = 12, masked: bool = True) -> Batch:
    """Detection images that share categories, with a caption at every third place."""
    generator = torch.Generator().manual_seed(5)
    corner = torch.rand(images, boxes, 2, generator=generator) * 30
    size = 20 + torch.rand(images, boxes, 2, generator=generator) * 14
    positive = torch.zeros(images, boxes, tokens, dtype=torch.bool)
    words = torch.full((images, tokens), NO_WORD)
    categories = torch.full((images, boxes), NO_CATEGORY)
    box_mask = torch.ones(images, boxes, dtype=torch.bool)
    for i in range(images):
        for n in range(boxes):
            positive[i, n, 1 + 2 * n : 3 + 2 * n] = True
            if i % 3 != 2:
                categories[i, n] = words[i, 1 + 2 * n] = words[i, 2 + 2 * n] = (i + n) % 4
        box_mask[i, boxes - i % 2 :] = False  # every second image has one box less
    labels = torch.full((images, tokens), -100)
    if masked:
        labels[:, 2] = torch.arange(images) + 50
        labels[0, 4] = 60  # ranks have different counts
    mask = torch.ones(images, tokens, dtype=torch.bool)
    mask[images // 2 :, -2:] = False
    return Batch(
        images_B3HW=torch.randint(
            0, 256, (images, 3, 64, 96), dtype=torch.uint8, generator=generator
        ),
        sizes_B2=torch.tensor([[64, 96], [60, 90]]).repeat(images // 2 + 1, 1)[:images],
        tokens_BT=torch.randint(100, 900, (images, tokens), generator=generator),
        token_mask_BT=mask,
        mlm_labels_BT=labels,
        boxes_BN4=torch.cat((corner, corner + size), dim=2),
        box_mask_BN=box_mask,
        positive_BNT=positive,
        box_category_BN=categories,
        token_category_BT=words,
        keys=[f"toy/{i}" for i in range(images)],
    )


def part(batch: Batch, rows: slice, tokens: int) -> Batch:
    """Some of the images, with text cut to the length that they need."""
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    for name in ("masks_BNSS", "task", "answers_BV", "most_masked"):
        del values[name]
    values = {name: value[rows] for name, value in values.items()}
    for name in ("tokens_BT", "token_mask_BT", "mlm_labels_BT", "token_category_BT"):
        values[name] = values[name][:, :tokens]
    values["positive_BNT"] = values["positive_BNT"][..., :tokens]
    return Batch(**values)


def gradients(model: GLIPv2, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


class Ranks:
    """Two ranks as two threads whose autograd graphs are joined where they meet."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)
        self.slots: list[Tensor] = [torch.empty(0)] * 2

    def exchange(self, rank: int, value: Tensor) -> list[Tensor]:
        self.slots[rank] = value
        self.barrier.wait()
        both = list(self.slots)
        self.barrier.wait()
        assert both[0].shape == both[1].shape, "ranks gathered different shapes"
        return both

    def collectives(self, rank: int) -> Collectives:
        return Collectives(
            gather=lambda value: torch.cat(self.exchange(rank, value)),
            mean=lambda value: torch.stack(self.exchange(rank, value.detach())).mean(0),
            rank=rank,
        )

    def run(
        self, forward: Callable[[int, Collectives], dict[str, Tensor]]
    ) -> list[dict[str, Tensor]]:
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(forward, rank, self.collectives(rank)) for rank in (0, 1)]
            return [job.result() for job in jobs]


@pytest.mark.parametrize("boxes", [3, 0])
def test_two_ranks_with_half_a_batch_each_learn_what_one_rank_learns_from_the_whole(
    boxes: int,
) -> None:
    model = build_model(preset("tiny"), seed=0).double()  # fp32 would need loose bounds
    batch = make_batch(boxes=boxes, masked=boxes > 0)
    # Each rank pads its texts to its own longest one.
    halves = [part(batch, slice(0, 2), tokens=12), part(batch, slice(2, 4), tokens=10)]
    whole = model(batch)
    ranks = Ranks().run(lambda rank, collectives: model(halves[rank], collectives))
    for term in TERMS:
        mean = (ranks[0][term] + ranks[1][term]) / 2
        torch.testing.assert_close(mean, whole[term], rtol=1e-5, atol=1e-7, msg=term)
        expected = gradients(model, whole[term])
        for name, gradient in gradients(model, mean).items():
            torch.testing.assert_close(
                gradient, expected[name], rtol=1e-4, atol=1e-6, msg=f"{term}: {name}"
            )


@pytest.mark.parametrize(
    "case", ["ordinary", "no boxes", "no box rows", "no masked words", "terms off"]
)
def test_losses_are_finite_and_every_parameter_has_a_gradient(model: GLIPv2, case: str) -> None:
    batch = make_batch(boxes=0 if case == "no box rows" else 3, masked=case == "ordinary")
    if case == "no boxes":
        batch.box_mask_BN[:] = False
    off = case == "terms off"
    weights = LossWeights(inter_image=0, mlm=0) if off else LossWeights()
    terms = model(batch, weights=weights)
    assert set(terms) == TERMS
    assert all(value.isfinite() and value.dim() == 0 for value in terms.values())
    total = torch.stack(list(terms.values())).sum()
    # Raises if a parameter is not part of the graph.
    found = torch.autograd.grad(total, list(model.parameters()))
    assert all(gradient.isfinite().all() for gradient in found)
    if case != "ordinary":
        assert terms["mlm"] == 0
    if "box" in case:
        assert terms["box"] == terms["centerness"] == 0


def test_an_untrained_model_expects_no_word_anywhere(model: GLIPv2) -> None:
    batch = make_batch()
    outputs = model.predict(batch.images_B3HW, batch.sizes_B2, batch.tokens_BT, batch.token_mask_BT)
    A = outputs.anchors_A4.shape[0]
    assert A == sum(h * w for h, w in outputs.level_sizes) == 12 * 8 + 6 * 4 + 3 * 2
    assert outputs.token_logits_BAT.shape == (4, A, 12)
    assert outputs.deltas_BA4.shape == (4, A, 4)
    assert outputs.centerness_BA.shape == (4, A)
    assert 0.001 < outputs.token_logits_BAT.sigmoid().mean() < 0.1


def test_padding_tokens_change_no_word_and_no_box(model: GLIPv2) -> None:
    batch = make_batch()
    short = model.predict(batch.images_B3HW, batch.sizes_B2, batch.tokens_BT, batch.token_mask_BT)
    tokens = torch.nn.functional.pad(batch.tokens_BT, (0, 9))
    mask = torch.nn.functional.pad(batch.token_mask_BT, (0, 9))
    long = model.predict(batch.images_B3HW, batch.sizes_B2, tokens, mask)
    torch.testing.assert_close(long.deltas_BA4, short.deltas_BA4, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        long.token_logits_BAT[..., :12], short.token_logits_BAT, rtol=1e-4, atol=1e-4
    )


def test_weights_follow_the_seed_and_leave_global_randomness_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, again, other = (build_model(preset("tiny"), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same)
    differs = [
        not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True)
    ]
    assert sum(differs) > len(differs) // 3


@pytest.mark.parametrize(
    "change", [{"levels": 5}, {"fusion": False}, {"fusion_scale": None, "fusion_blocks": 1}]
)
def test_other_layouts_train_too(change: dict[str, object]) -> None:
    config: ModelConfig = dataclasses.replace(preset("tiny"), **change)  # type: ignore[arg-type]
    model = build_model(config, seed=0)
    terms = model(make_batch(images=2))
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_few_steps_on_one_batch_lower_every_term() -> None:
    model = build_model(preset("tiny"), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batch = make_batch(images=2)
    history = []
    for _ in range(12):
        terms = model(batch)
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append({name: value.item() for name, value in terms.items()})
    for name in TERMS:
        assert history[-1][name] < history[0][name], name


def test_every_term_has_a_weight_and_every_weight_a_term(model: GLIPv2) -> None:
    terms = set(model(make_batch())) | {"mask"} | set(understanding.TERMS.values())
    assert terms == {field.name for field in dataclasses.fields(LossWeights)}


@pytest.mark.parametrize("boxes", [3, 0])
def test_micro_batches_divided_by_the_counts_of_the_step_learn_what_the_whole_batch_teaches(
    boxes: int,
) -> None:
    model = build_model(preset("tiny"), seed=0).double()
    batch = make_batch(boxes=boxes, masked=boxes > 0)
    micro = [part(batch, slice(0, 2), tokens=12), part(batch, slice(2, 4), tokens=10)]
    counts = torch.stack([model.counts(one) for one in micro]).mean(dim=0)
    assert not torch.equal(model.counts(micro[0]), model.counts(micro[1])) or boxes == 0
    whole = model(batch)
    taken = [model(one, Collectives(step_counts=counts)) for one in micro]
    for term in TERMS - {"inter_image"}:  # which compares the images of a micro-batch alone
        mean = (taken[0][term] + taken[1][term]) / 2
        torch.testing.assert_close(mean, whole[term], rtol=1e-5, atol=1e-7, msg=term)
        expected = gradients(model, whole[term])
        for name, gradient in gradients(model, mean).items():
            torch.testing.assert_close(
                gradient, expected[name], rtol=1e-4, atol=1e-6, msg=f"{term}: {name}"
            )


@pytest.mark.parametrize("preset_name", ["tiny", "A", "T"])
@pytest.mark.parametrize("size", [(64, 96), (800, 1344), (32, 32)])
def test_the_sizes_of_maps_follow_from_the_padded_image(
    preset_name: str, size: tuple[int, int]
) -> None:
    config = preset(preset_name)
    pyramid = Pyramid([1, 2, 4], 4, config.levels, drop_block=False)
    maps = [
        torch.zeros(1, 2**n, size[0] // stride, size[1] // stride)
        for n, stride in enumerate((8, 16, 32))
    ]
    found = [tuple(x.shape[2:]) for x in pyramid(maps)]
    assert pyramid_sizes(*size, config.levels) == found


DROPPING = dataclasses.replace(
    preset("tiny"),
    image_encoder=dataclasses.replace(preset("tiny").image_encoder, drop_path=0.3),
    text_encoder=dataclasses.replace(preset("tiny").text_encoder, dropout=0.2),
    fusion_dropout=0.2,
)


def trained(parts: tuple[Part, ...]) -> tuple[Tensor, list[Tensor], int]:
    """The loss, its gradients, and the bytes that the graph keeps for the backward pass."""
    model = build_model(DROPPING, seed=0).train()
    model.recompute(parts)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(7)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = torch.stack(list(model(make_batch()).values())).sum()
    found = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), list(found), sum(kept.values())


@pytest.mark.parametrize("parts", [("image_encoder",), ("text_encoder",), ("fusion",)])
def test_recomputing_activations_keeps_fewer_of_them_and_changes_no_bit(
    parts: tuple[Part, ...],
) -> None:
    loss, gradients_kept, bytes_kept = trained(())
    same_loss, same_gradients, bytes_recomputed = trained(parts)
    assert torch.equal(loss, same_loss)
    for one, other in zip(gradients_kept, same_gradients, strict=True):
        assert torch.equal(one, other)
    assert bytes_recomputed < bytes_kept * 0.98
