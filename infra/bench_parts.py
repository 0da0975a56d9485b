"""The model's costly parts against the original's way of computing them (original.py).

Each time is that of forward and backward together.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from bench_measure import note, row, seconds
from original import attention, deform, loss_by_anchor
from torch import Tensor

from glipv2.model import losses
from glipv2.model.anchors import make_anchors
from glipv2.model.assign import assign
from glipv2.model.batch import NO_CATEGORY, NO_WORD, Batch, Collectives
from glipv2.model.boxes import decode
from glipv2.model.deform import DeformConv, Taps
from glipv2.model.fusion import ImageTextAttention

STRIDES = (8, 16, 32, 64, 128)


def bench_deform() -> None:
    """Forward and backward of one deformable convolution, 4 maps of 64 x 32 x 32."""
    conv = DeformConv(64)
    x = torch.randn(4, 64, 32, 32, requires_grad=True)
    taps = Taps(
        offset_B18HW=torch.randn(4, 18, 32, 32, requires_grad=True),
        mask_B9HW=torch.rand(4, 9, 32, 32, requires_grad=True),
    )
    ours, peer = seconds(
        lambda: conv(x, taps).sum().backward(),
        lambda: deform(conv, x, taps).sum().backward(),
    )
    row("deformable convolution", ours, peer, "torchvision")


def bench_attention() -> None:
    """Forward and backward of one image-text attention of GLIP-T for a 320 x 480 image."""
    locations = sum(h * w for h, w in _level_sizes(320, 480))
    image, d_image = torch.randn(2, 1, locations, 256).unbind()
    for words in (256, 64):
        text, d_text = torch.randn(2, 1, words, 768).unbind()
        mask = torch.ones(1, words, dtype=torch.bool)
        for dropout in (0.0, 0.1):
            module = ImageTextAttention(256, 768, 2048, 8, dropout=dropout, scale=1 / 6)
            inputs = [image.requires_grad_(), text.requires_grad_(), *module.parameters()]

            def gradients(
                form: Callable[..., tuple[Tensor, Tensor]],
                inputs: list[Tensor] = inputs,
                mask: Tensor = mask,
                upstream: tuple[Tensor, Tensor] = (d_image, d_text),
            ) -> tuple[Tensor, ...]:
                results = form(*inputs[:2], mask)
                return results + torch.autograd.grad(results, inputs, upstream)

            ours, peer = partial(gradients, module), partial(gradients, partial(attention, module))
            name = f"image-text attention, {words} tokens, dropout {dropout}"
            row(name, *seconds(ours, peer, repeats=7), "unfolded")
            if dropout == 0:
                pairs = zip(ours(), peer(), strict=True)
                errors = [((mine - its).norm() / its.norm()).item() for mine, its in pairs]
                note("  largest relative error, outputs and gradients", f"{max(errors):.1e}")


def bench_losses() -> None:
    """Assignment, and forward and backward of box, centerness and token loss, 8 images with 50
    boxes each, 256 tokens. The loop does one image of the larger size, times 8."""
    for size, loop_images in (((320, 480), 8), ((800, 1333), 1)):
        sizes = _level_sizes(*size)
        per_level = [h * w for h, w in sizes]
        anchors = make_anchors(sizes, STRIDES, 8.0)
        batch, predictions = scene(8, size, len(anchors))
        few, few_predictions = scene(loop_images, size, len(anchors))

        ours = partial(_loss_gradients, losses_of, predictions, anchors, per_level, batch)
        loop = partial(_loss_gradients, loss_by_anchor, few_predictions, anchors, per_level, few)
        start = time.process_time()
        loop()
        peer = (time.process_time() - start) * 8 / loop_images
        name = f"assignment + losses, 8 x {size[0]} x {size[1]}"
        row(name, *seconds(ours, repeats=3), peer, "a loop over anchors")


def _loss_gradients(
    form: Callable[..., Tensor],
    predictions: tuple[Tensor, ...],
    anchors: Tensor,
    per_level: list[int],
    batch: Batch,
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(form(*predictions, anchors, per_level, batch), predictions)


def losses_of(
    deltas_BA4: Tensor,
    centerness_BA: Tensor,
    logits_BAT: Tensor,
    anchors_A4: Tensor,
    per_level: list[int],
    batch: Batch,
) -> Tensor:
    """2 * box + centerness + token loss as `GLIPv2.forward` computes them."""
    matched_BA = assign(anchors_A4, per_level, batch.boxes_BN4, batch.box_mask_BN)
    targets = losses.make_targets(matched_BA, batch, anchors_A4)
    counts = losses.make_normalisers(targets, batch, 100, Collectives())
    boxes_BA4 = decode(deltas_BA4, anchors_A4)
    return (
        2 * losses.box_loss(boxes_BA4, targets, counts.centerness)
        + losses.centerness_loss(centerness_BA, targets, counts.positives)
        + losses.token_loss(logits_BAT, targets, batch, counts.positives)
    )


def scene(
    images: int, size: tuple[int, int], locations: int, boxes: int = 50, tokens: int = 256
) -> tuple[Batch, tuple[Tensor, ...]]:
    """Random boxes, each named by two tokens, and random predictions."""
    generator = torch.Generator().manual_seed(0)
    extent = torch.tensor([size[1], size[0]])
    corner_BN2 = torch.rand(images, boxes, 2, generator=generator) * 0.8 * extent
    side_BN2 = 16 + 0.5 * torch.rand(images, boxes, 2, generator=generator) ** 2 * extent
    first_N = 1 + torch.arange(boxes) * 2 % (tokens - 2)
    positive_NT = torch.arange(tokens) // 2 == first_N[:, None] // 2
    batch = Batch(
        images_B3HW=torch.zeros(images, 3, *size, dtype=torch.uint8),
        sizes_B2=torch.tensor([size] * images),
        tokens_BT=torch.full((images, tokens), 1000),
        token_mask_BT=torch.ones(images, tokens, dtype=torch.bool),
        mlm_labels_BT=torch.full((images, tokens), losses.IGNORED_WORD),
        boxes_BN4=torch.cat((corner_BN2, corner_BN2 + side_BN2), dim=2),
        box_mask_BN=torch.ones(images, boxes, dtype=torch.bool),
        positive_BNT=positive_NT.repeat(images, 1, 1),
        box_category_BN=torch.full((images, boxes), NO_CATEGORY),
        token_category_BT=torch.full((images, tokens), NO_WORD),
        keys=[f"random/{i}" for i in range(images)],
    )
    deltas_BA4 = torch.randn(images, locations, 4, generator=generator)
    centerness_BA = torch.randn(images, locations, generator=generator)
    logits_BAT = torch.randn(images, locations, tokens, generator=generator) - 4
    predictions = (deltas_BA4, centerness_BA, logits_BAT)
    return batch, tuple(x.requires_grad_() for x in predictions)


def _level_sizes(height: int, width: int) -> list[tuple[int, int]]:
    return [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
