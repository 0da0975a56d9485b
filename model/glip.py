"""GLIPv2 assembled: encoders, pyramid, fusion tower, heads; losses for training, outputs to use."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from glipv2.model import losses, understanding
from glipv2.model.anchors import make_anchors
from glipv2.model.assign import assign
from glipv2.model.batch import Batch, Collectives, Outputs
from glipv2.model.boxes import decode
from glipv2.model.config import LossWeights, ModelConfig, Part
from glipv2.model.dynamic_head import DyConv
from glipv2.model.fusion import ImageTextAttention
from glipv2.model.heads import (
    AlignmentHead,
    BoxHead,
    ContrastHead,
    WordHead,
    flatten_levels,
)
from glipv2.model.image_encoder import ImageEncoder
from glipv2.model.mask_head import MaskHead, mask_loss
from glipv2.model.pyramid import Pyramid, pyramid_sizes
from glipv2.model.text_encoder import TextEncoder, TowerLayer, attention_bias


class FusionBlock(nn.Module):
    """Image-text attention, a BERT layer on the words, a DyConv on the maps (facts A.6)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.fusion:
            self.attention = ImageTextAttention(
                image_width=config.width,
                text_width=config.text_encoder.width,
                attention_width=config.fusion_width,
                heads=config.fusion_heads,
                dropout=config.fusion_dropout,
                scale=1 / config.fusion_blocks
                if config.fusion_scale is None
                else config.fusion_scale,
            )
            self.words = TowerLayer(config.text_encoder, clamped=config.glip_compatible)
        self.maps = DyConv(config.width, config.group_norm_groups, config.glip_compatible)

    def forward(
        self, maps: list[Tensor], words_BTD: Tensor, token_mask_BT: Tensor, causal: bool
    ) -> tuple[list[Tensor], Tensor]:
        """Maps (B, D, H, W) of all levels and words (B, T, D_text) to the same shapes."""
        image_BND, words_BTD = self.exchange(
            flatten_levels(maps), words_BTD, token_mask_BT, causal, image_reads_text=not causal
        )
        return self.maps(_unflatten_levels(image_BND, maps)), words_BTD

    def exchange(
        self,
        image_BND: Tensor,
        words_BTD: Tensor,
        token_mask_BT: Tensor,
        causal: bool,
        image_reads_text: bool,
    ) -> tuple[Tensor, Tensor]:
        """Locations and words after they have read each other, before the DyConv."""
        image_BND, words_BTD = self.attention(
            image_BND, words_BTD, token_mask_BT, image_reads_text=image_reads_text
        )
        bias = attention_bias(token_mask_BT, words_BTD.dtype, causal)
        return image_BND, self.words(words_BTD, bias)


def _unflatten_levels(locations_BAD: Tensor, like: list[Tensor]) -> list[Tensor]:
    sizes = [x.shape[2] * x.shape[3] for x in like]
    parts = locations_BAD.transpose(1, 2).split(sizes, dim=2)
    return [part.reshape(x.shape) for part, x in zip(parts, like, strict=True)]


class GLIPv2(nn.Module):
    """Built by `build_model`. `forward` trains, `predict` answers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        text_width = config.text_encoder.width
        self.image_encoder = ImageEncoder(config.image_encoder)
        self.pyramid = Pyramid(
            self.image_encoder.widths, config.width, config.levels, config.drop_block
        )
        self.text_encoder = TextEncoder(config.text_encoder)
        self.blocks = nn.ModuleList(FusionBlock(config) for _ in range(config.fusion_blocks))
        self.recompute_blocks = False
        self.box_head = BoxHead(config.width, config.levels)
        self.alignment_head = AlignmentHead(config.width, text_width, config.alignment_temperature)
        self.masked_word_head = (
            WordHead(text_width, config.text_encoder.vocab_size) if config.masked_words else None
        )
        self.contrast_head = (
            ContrastHead(config.width, text_width, config.contrast_width)
            if config.contrast
            else None
        )
        self.mask_head = MaskHead(config) if config.masks else None
        self.answer_head = (
            understanding.AnswerHead(text_width, len(config.answers)) if config.answers else None
        )
        self.caption_head = (
            WordHead(text_width, config.text_encoder.vocab_size) if config.captions else None
        )
        table = torch.zeros(config.prompt_rows, text_width)
        self.prompt_table = nn.Parameter(table) if config.prompt_rows else None

    @classmethod
    def from_pretrained(cls, url: "str | Path") -> "GLIPv2":
        """The model of an exchange folder (path or URL); `weights.from_pretrained` without the
        tokenizer."""
        from glipv2.model.weights import from_pretrained  # which builds models itself

        return from_pretrained(url)[0]

    def recompute(self, parts: Collection[Part]) -> None:
        """Compute activations of these parts again in the backward pass, instead of keeping them.

        Block by block of the image encoder and the fusion tower, layer by layer of the text
        encoder. Losses and gradients stay as they are, those of dropout too.
        """
        self.image_encoder.swin.set_grad_checkpointing("image_encoder" in parts)
        self.text_encoder.recompute = "text_encoder" in parts
        self.recompute_blocks = "fusion" in parts

    def forward(
        self,
        batch: Batch,
        collectives: Collectives = Collectives(),  # noqa: B008 (frozen)
        weights: LossWeights = LossWeights(),  # noqa: B008 (frozen)
    ) -> dict[str, Tensor]:
        """The loss terms of a batch: box, centerness, token, and those that the model's heads add.

        Questions have the one term answer, captions the one term caption, and ValueError if the
        model has no head for them. Each is unweighted and 0-dimensional, finite for images without
        boxes and texts without masked words, and connected to the same parameters on every rank.
        Terms of weight 0 are zeros that cost nothing. Every rank must call this equally often, with
        equally many images.
        """
        if batch.task != "grounding":
            return self._understanding(batch, collectives, weights)
        outputs = self.predict(
            batch.images_B3HW, batch.sizes_B2, batch.tokens_BT, batch.token_mask_BT
        )
        targets = _targets(batch, outputs.anchors_A4, outputs.level_sizes)
        counts = losses.make_normalisers(targets, batch, self.config.contrast_regions, collectives)
        boxes_BA4 = decode(outputs.deltas_BA4.float(), outputs.anchors_A4)
        terms = {
            "box": losses.box_loss(boxes_BA4, targets, counts.centerness),
            "centerness": losses.centerness_loss(outputs.centerness_BA, targets, counts.positives),
            "token": losses.token_loss(outputs.token_logits_BAT, targets, batch, counts.positives),
        }
        if self.contrast_head is not None:
            terms["inter_image"] = (
                self._inter_image(
                    self.contrast_head, outputs, targets, batch, counts.contrasted, collectives
                )
                if weights.inter_image
                else _untouched(self.contrast_head)
            )
        if self.masked_word_head is not None:
            terms["mlm"] = (
                self._masked_words(self.masked_word_head, outputs, batch, counts.masked_words)
                if weights.mlm
                else _untouched(self.masked_word_head)
            )
        if self.mask_head is not None:
            terms["mask"] = (
                mask_loss(
                    self.mask_head, outputs, boxes_BA4, self.config.strides, batch, collectives
                )
                if weights.mask and batch.masks_BNSS is not None
                else _untouched(self.mask_head)
            )
        for head in (self.answer_head, self.caption_head):
            if head is not None:
                terms["token"] = terms["token"] + _untouched(head)
        return terms

    @torch.no_grad()
    def counts(self, batch: Batch) -> Tensor:
        """What the losses of a batch are divided by, before any average: `Collectives.step_counts`.

        They follow from the batch and need no pass through the model.
        """
        if batch.task != "grounding":  # questions are averaged over images, without a count
            return understanding.count_words(batch.token_mask_BT)
        H, W = batch.images_B3HW.shape[2:]
        sizes = pyramid_sizes(H, W, self.config.levels)
        anchors_A4 = make_anchors(
            sizes, self.config.strides, self.config.anchor_scale, batch.boxes_BN4.device
        )
        targets = _targets(batch, anchors_A4, sizes)
        return losses.count_targets(targets, batch, self.config.contrast_regions)

    def _understanding(
        self, batch: Batch, collectives: Collectives, weights: LossWeights
    ) -> dict[str, Tensor]:
        """The one term of a batch of questions or of captions, which leaves most heads unused."""
        term = understanding.TERMS[batch.task]
        loss = _untouched(self)
        if getattr(weights, term):
            loss = loss + understanding.task_loss(self, batch, collectives)
        return {term: loss}

    def predict(
        self,
        images_B3HW: Tensor,
        sizes_B2: Tensor,
        tokens_BT: Tensor,
        token_mask_BT: Tensor,
        causal: bool = False,
    ) -> Outputs:
        """One pass over padded uint8 images, their (height, width), and one text for each.

        Causal: no word depends on a later one, neither directly nor through the image.
        """
        pyramid = self.encode_images(images_B3HW, sizes_B2)
        words_BTD = self.encode_words(tokens_BT, token_mask_BT, causal)
        return self.fuse(pyramid, words_BTD, token_mask_BT, causal)

    def encode_words(
        self, tokens_BT: Tensor, token_mask_BT: Tensor, causal: bool = False
    ) -> Tensor:
        """Unfused text features (B, T, D), which serve any number of images."""
        words_BTD: Tensor = self.text_encoder(tokens_BT, token_mask_BT, causal)
        if self.prompt_table is None:
            return words_BTD
        return words_BTD + self.prompt_table[: words_BTD.shape[1]]

    def encode_images(self, images_B3HW: Tensor, sizes_B2: Tensor) -> list[Tensor]:
        """The pyramid before fusion, which serves any number of texts about the same images."""
        return self.pyramid(self.image_encoder(images_B3HW, sizes_B2))

    def tower_without_text(self, pyramid: list[Tensor]) -> list[Tensor]:
        """The tower's maps of a model without fusion (GLIP-T(A)), for any number of texts."""
        maps = pyramid
        for block in cast("list[FusionBlock]", list(self.blocks)):
            maps = self._through(block.maps, maps)
        return maps

    def fuse(
        self,
        pyramid: list[Tensor],
        words_BTD: Tensor,
        token_mask_BT: Tensor,
        causal: bool = False,
        maps: list[Tensor] | None = None,
    ) -> Outputs:
        """Unfused image and text features to outputs; without fusion, `maps` are those of
        `tower_without_text`, if they are known."""
        if self.config.fusion:
            maps, fused_BTD = pyramid, words_BTD
            for block in self.blocks:
                maps, fused_BTD = self._through(block, maps, fused_BTD, token_mask_BT, causal)
        else:
            maps = self.tower_without_text(pyramid) if maps is None else maps
            fused_BTD = words_BTD * token_mask_BT[..., None]  # GLIP-T(A) zeroes the padding
        level_sizes = [(x.shape[2], x.shape[3]) for x in maps]
        locations_BAD = flatten_levels(maps)
        deltas_BA4, centerness_BA = self.box_head(locations_BAD, [h * w for h, w in level_sizes])
        return Outputs(
            pyramid=pyramid,
            words_BTD=words_BTD,
            fused_words_BTD=fused_BTD,
            token_logits_BAT=self.alignment_head(locations_BAD, fused_BTD),
            deltas_BA4=deltas_BA4,
            centerness_BA=centerness_BA,
            anchors_A4=make_anchors(
                level_sizes, self.config.strides, self.config.anchor_scale, locations_BAD.device
            ),
            level_sizes=level_sizes,
        )

    def fuse_words(
        self,
        pyramid: list[Tensor],
        words_BTD: Tensor,
        token_mask_BT: Tensor,
        causal: bool = False,
    ) -> Tensor:
        """The fused words (B, T, D) of `fuse` alone, without what only boxes need."""
        *blocks, last = cast("list[FusionBlock]", list(self.blocks))
        maps = pyramid
        for block in blocks:
            maps, words_BTD = self._through(block, maps, words_BTD, token_mask_BT, causal)
        return last.exchange(
            flatten_levels(maps), words_BTD, token_mask_BT, causal, image_reads_text=False
        )[1]

    def _through(self, block: nn.Module, *inputs: Any) -> Any:
        if not self.recompute_blocks:
            return block(*inputs)
        return checkpoint(block, *inputs, use_reentrant=False)

    def _inter_image(
        self,
        head: ContrastHead,
        outputs: Outputs,
        targets: losses.Targets,
        batch: Batch,
        normaliser: Tensor,
        collectives: Collectives,
    ) -> Tensor:
        picked_BK = losses.pick_regions(targets.positive, self.config.contrast_regions)
        regions_BAD = flatten_levels(outputs.pyramid)
        index = picked_BK[..., None].expand(-1, -1, regions_BAD.shape[2])
        # Text is padded to the longest of a rank's batch; a gather needs one length for all.
        spare = self.config.text_encoder.max_tokens - outputs.words_BTD.shape[1]
        return losses.inter_image_loss(
            regions_BAD.gather(1, index),
            F.pad(outputs.words_BTD, (0, 0, 0, spare)),
            targets.matched_BA.gather(1, picked_BK),
            batch,
            head,
            normaliser,
            collectives,
        )

    def _masked_words(
        self, head: WordHead, outputs: Outputs, batch: Batch, normaliser: Tensor
    ) -> Tensor:
        labels_BT = batch.mlm_labels_BT
        words_BTD = outputs.fused_words_BTD
        # Equally many places of every text: picking just the masked ones would wait for the GPU.
        count = labels_BT.shape[1] if batch.most_masked is None else batch.most_masked
        asked_BT = (labels_BT != losses.IGNORED_WORD).int()
        places_BM = asked_BT.topk(count, dim=1).indices
        index = places_BM[..., None].expand(-1, -1, words_BTD.shape[2])
        logits_MV = head(words_BTD.gather(1, index).flatten(0, 1))
        labels_M = labels_BT.gather(1, places_BM).flatten()
        return losses.masked_word_loss(logits_MV, labels_M, normaliser)


def _targets(batch: Batch, anchors_A4: Tensor, sizes: list[tuple[int, int]]) -> losses.Targets:
    matched_BA = assign(anchors_A4, [h * w for h, w in sizes], batch.boxes_BN4, batch.box_mask_BN)
    return losses.make_targets(matched_BA, batch, anchors_A4)


def _untouched(module: nn.Module) -> Tensor:
    """Zero, but with a (zero) gradient for every parameter, so that ranks agree on their set."""
    # As attributes, unlike from parameters(), ZeRO 3 fetches those that live on other ranks.
    parameters = [
        getattr(owner, name)
        for owner in module.modules()
        for name, _ in owner.named_parameters(recurse=False)
    ]
    return torch.stack([parameter.sum() * 0 for parameter in parameters]).sum()


def build_model(config: ModelConfig, seed: int) -> GLIPv2:
    """A model with random weights that depend on the seed alone; global random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GLIPv2(config)
