import pytest
import torch
from bench_parts import losses_of, scene
from original import loss_by_anchor
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from glipv2.model import losses
from glipv2.model.anchors import make_anchors
from glipv2.model.batch import NO_CATEGORY, NO_WORD, Batch, Collectives
from glipv2.model.heads import ContrastHead

ANCHORS = torch.tensor([[0.0, 0, 20, 20], [10, 10, 30, 30], [0, 0, 60, 60]])
ONE = torch.tensor(1.0)


def batch_of(
    positive_BNT: Tensor, box_category_BN: Tensor, token_category_BT: Tensor, mask_BT: Tensor
) -> Batch:
    B, N, T = positive_BNT.shape
    corners = torch.tensor([[2.0, 2, 18, 24], [8, 8, 40, 36]])[:N].expand(B, N, 4)
    return Batch(
        images_B3HW=torch.zeros(B, 3, 32, 32, dtype=torch.uint8),
        sizes_B2=torch.full((B, 2), 32),
        tokens_BT=torch.ones(B, T, dtype=torch.int64),
        token_mask_BT=mask_BT,
        mlm_labels_BT=torch.full((B, T), losses.IGNORED_WORD),
        boxes_BN4=corners,
        box_mask_BN=torch.ones(B, N, dtype=torch.bool),
        positive_BNT=positive_BNT,
        box_category_BN=box_category_BN,
        token_category_BT=token_category_BT,
        keys=[str(i) for i in range(B)],
    )


@pytest.fixture
def batch() -> Batch:
    """Two detection images and a caption: categories 5 and 6, words 1-2 and 3 of five."""
    positive = torch.zeros(3, 2, 5, dtype=torch.bool)
    positive[:, 0, 1:3] = True
    positive[:, 1, 3] = True
    words = torch.full((3, 5), NO_WORD)
    words[:2, 1:3], words[0, 3], words[1, 3] = 5, 6, 7
    boxes = torch.tensor([[5, 6], [5, 7], [NO_CATEGORY, NO_CATEGORY]])
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 4] = False
    return batch_of(positive, boxes, words, mask)


MATCHED = torch.tensor([[0, 1, -1], [-1, 0, -1], [1, -1, 0]])


def test_token_loss_is_the_focal_loss_over_tokens_that_are_no_padding(batch: Batch) -> None:
    targets = losses.make_targets(MATCHED, batch, ANCHORS)
    logits = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(0)) * 3
    wanted = torch.zeros(3, 3, 5)
    for b, a in (MATCHED >= 0).nonzero().tolist():
        wanted[b, a] = batch.positive_BNT[b, MATCHED[b, a]].float()
    focal = sigmoid_focal_loss(logits, wanted, alpha=0.25, gamma=2.0)
    expected = focal[batch.token_mask_BT[:, None].expand(3, 3, 5)].sum() / 4
    actual = losses.token_loss(logits, targets, batch, torch.tensor(4.0))
    torch.testing.assert_close(actual, expected)


def test_all_terms_and_gradients_equal_a_loop_over_anchors() -> None:
    sizes = [(6, 8), (3, 4)]
    anchors = make_anchors(sizes, strides=(8, 16), scale=3.5)
    batch, predictions = scene(2, (48, 64), len(anchors), boxes=5, tokens=12)
    batch.token_mask_BT[1, 9:] = False
    batch.box_mask_BN[0, 4] = False
    arguments = (*predictions, anchors, [h * w for h, w in sizes], batch)
    found, wanted = losses_of(*arguments), loss_by_anchor(*arguments)
    torch.testing.assert_close(found, wanted)
    for actual, expected in zip(
        torch.autograd.grad(found * 3, predictions),
        torch.autograd.grad(wanted * 3, predictions),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_token_loss_takes_logits_of_mixed_precision(batch: Batch) -> None:
    targets = losses.make_targets(MATCHED, batch, ANCHORS)
    logits = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    single = logits.float().requires_grad_()
    expected = losses.token_loss(single, targets, batch, ONE)
    actual = losses.token_loss(logits.requires_grad_(), targets, batch, ONE)
    torch.testing.assert_close(actual, expected)
    (wanted,) = torch.autograd.grad(expected, single)
    torch.testing.assert_close(torch.autograd.grad(actual, logits)[0], wanted.bfloat16())


def test_token_loss_stays_finite_for_extreme_logits(batch: Batch) -> None:
    targets = losses.make_targets(MATCHED, batch, ANCHORS)
    logits = torch.full((3, 3, 5), 5e4, requires_grad=True)
    loss = losses.token_loss(logits, targets, batch, ONE)
    loss.backward()
    assert loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all()


def test_centerness_follows_the_originals_formula(batch: Batch) -> None:
    targets = losses.make_targets(MATCHED, batch, ANCHORS)
    x, y = 9.5, 9.5  # centre of the first anchor, counting pixels
    x0, y0, x1, y1 = 2, 2, 17, 23
    left, right, top, bottom = x - x0, x1 - x, y - y0, y1 - y
    expected = (min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)) ** 0.5
    assert targets.centerness_BA[0, 0].item() == pytest.approx(expected)
    assert (targets.centerness_BA[MATCHED < 0] == 0).all()


def test_box_loss_is_zero_for_perfect_boxes_and_ignores_background(batch: Batch) -> None:
    targets = losses.make_targets(MATCHED, batch, ANCHORS)
    predicted = torch.where((MATCHED >= 0)[..., None], targets.boxes_BA4, 1e3)
    assert losses.box_loss(predicted, targets, ONE) == pytest.approx(0, abs=1e-5)
    assert losses.box_loss(predicted + 3, targets, ONE) > 0.1


def test_images_without_boxes_have_zero_box_losses_and_a_finite_token_loss() -> None:
    empty = batch_of(
        torch.zeros(2, 0, 4, dtype=torch.bool),
        torch.zeros(2, 0, dtype=torch.int64),
        torch.full((2, 4), NO_WORD),
        torch.ones(2, 4, dtype=torch.bool),
    )
    targets = losses.make_targets(torch.full((2, 3), -1), empty, ANCHORS)
    counts = losses.make_normalisers(targets, empty, 2, Collectives())
    assert counts.positives == counts.masked_words == 2  # images stand in
    zeros = torch.zeros(2, 3)
    assert losses.box_loss(ANCHORS.expand(2, 3, 4), targets, counts.centerness) == 0
    assert losses.centerness_loss(zeros, targets, counts.positives) == 0
    assert losses.token_loss(torch.zeros(2, 3, 4), targets, empty, counts.positives) > 0


def test_masked_words_cost_their_mean_cross_entropy_and_none_cost_nothing() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([1, 8, 0, 3])
    loss = losses.masked_word_loss(logits, labels, torch.tensor(4.0))
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    with_others = losses.masked_word_loss(
        torch.cat((logits, logits)),
        torch.cat((labels, torch.full((4,), losses.IGNORED_WORD))),
        torch.tensor(4.0),
    )
    torch.testing.assert_close(with_others, loss)
    nothing = losses.masked_word_loss(logits[:0], labels[:0], ONE)
    nothing.backward()
    assert nothing == 0 and logits.grad is not None


def test_matched_regions_are_picked_first_and_then_background() -> None:
    positive = torch.zeros(2, 50, dtype=torch.bool)
    positive[0, [3, 17, 44]] = True
    positive[1, 20:40] = True
    picked = losses.pick_regions(positive, 8)
    assert set(picked[0, :3].tolist()) == {3, 17, 44}
    assert positive[1, picked[1]].all() and len(set(picked[1].tolist())) == 8
    assert torch.equal(picked, losses.pick_regions(positive, 8))
    assert losses.pick_regions(positive[:, :5], 8).shape == (2, 5)


class TestInterImageContrast:
    """Against a double loop over regions and words."""

    def head(self) -> ContrastHead:
        torch.manual_seed(0)
        return ContrastHead(6, 7, 4)

    def features(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        return (
            torch.randn(3, 3, 6, generator=generator),
            torch.randn(3, 8, 7, generator=generator),  # padded from 5 words to 8
        )

    def by_loops(self, batch: Batch, regions: Tensor, words: Tensor) -> Tensor:
        head = self.head()
        r, w = head(regions, words)
        rows = [(i, k) for i in range(3) for k in range(3)]
        columns = [(j, t) for j in range(3) for t in range(5) if batch.token_mask_BT[j, t]]
        target = torch.zeros(len(rows), len(columns))
        logits = torch.zeros(len(rows), len(columns))
        for x, (i, k) in enumerate(rows):
            box = int(MATCHED[i, k])
            for y, (j, t) in enumerate(columns):
                logits[x, y] = (r[i, k] @ w[j, t]) / 0.07
                if box < 0:
                    continue
                same = batch.box_category_BN[i, box] == batch.token_category_BT[j, t]
                target[x, y] = batch.positive_BNT[i, box, t] if i == j else same
        total = torch.tensor(0.0)
        for scores, wanted in ((logits, target), (logits.T, target.T)):
            share = wanted / wanted.sum(1, keepdim=True).clamp(min=1)
            total = total - (share * scores.log_softmax(1)).sum()
        return total / 2

    def test_it_equals_a_loop_over_all_pairs(self, batch: Batch) -> None:
        regions, words = self.features()
        actual = losses.inter_image_loss(
            regions, words, MATCHED, batch, self.head(), ONE, Collectives()
        )
        torch.testing.assert_close(actual, self.by_loops(batch, regions, words))

    def test_a_shared_category_pulls_across_images_but_captions_keep_to_themselves(
        self, batch: Batch
    ) -> None:
        regions, words = (x.requires_grad_() for x in self.features())
        loss = losses.inter_image_loss(
            regions, words, MATCHED, batch, self.head(), ONE, Collectives()
        )
        separate = batch_of(
            batch.positive_BNT,
            torch.full_like(batch.box_category_BN, NO_CATEGORY),
            torch.full_like(batch.token_category_BT, NO_WORD),
            batch.token_mask_BT,
        )
        without = losses.inter_image_loss(
            regions, words, MATCHED, separate, self.head(), ONE, Collectives()
        )
        assert not torch.isclose(loss, without)
        torch.testing.assert_close(without, self.by_loops(separate, regions, words))
