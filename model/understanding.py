"""Visual question answering and captioning: heads, losses, and what the model says about images.

An answer is read off the fused [CLS] of the question. A caption is written word by word: no word
hears a later one, and the image reads no text, or it would pass later words on (facts A.13).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glipv2.model.batch import Batch, Collectives
from glipv2.model.heads import WordHead, flatten_levels
from glipv2.model.text_encoder import LAYER_NORM_EPS, attention_bias
from glipv2.model.tokenizer import Tokenizer

if TYPE_CHECKING:  # glip builds its heads from this file
    from glipv2.model.glip import FusionBlock, GLIPv2

TERMS = {"vqa": "answer", "captioning": "caption"}
"""The one loss term of a task that has no boxes."""


class AnswerHead(nn.Module):
    """FIBER's classifier of answers (facts G.5), on the fused [CLS]."""

    def __init__(self, text_width: int, answers: int) -> None:
        super().__init__()
        self.transform = nn.Linear(text_width, 2 * text_width)
        self.norm = nn.LayerNorm(2 * text_width, eps=LAYER_NORM_EPS)
        self.decoder = nn.Linear(2 * text_width, answers)

    def forward(self, fused_words_BTD: Tensor) -> Tensor:
        """Logits (B, V); several answers may be right, so each is judged by itself."""
        return self.decoder(F.gelu(self.norm(self.transform(fused_words_BTD[:, 0]))))


def _answer_head(model: "GLIPv2") -> AnswerHead:
    if model.answer_head is None:
        raise ValueError("the model has no head for questions: model.answers is empty")
    return model.answer_head


def _caption_head(model: "GLIPv2") -> WordHead:
    if model.caption_head is None:
        raise ValueError("the model has no head for captions: model.captions is false")
    return model.caption_head


def task_loss(model: "GLIPv2", batch: Batch, collectives: Collectives) -> Tensor:
    """The 0-dimensional loss of a batch of questions or of captions.

    ValueError if the model lacks the head, or if the soft targets do not fit its answers.
    """
    if batch.task == "captioning":
        head = _caption_head(model)
        words_BTD = _fused_words(model, batch, causal=True)
        return caption_loss(head, words_BTD, batch.tokens_BT, batch.token_mask_BT, collectives)
    asked = _answer_head(model)
    expected = (len(batch.tokens_BT), asked.decoder.out_features)
    if batch.answers_BV is None or batch.answers_BV.shape != expected:
        found = "none" if batch.answers_BV is None else tuple(batch.answers_BV.shape)
        raise ValueError(f"questions need soft targets of shape {expected}, the batch has {found}")
    return answer_loss(asked(_fused_words(model, batch, causal=False)), batch.answers_BV)


def _fused_words(model: "GLIPv2", batch: Batch, causal: bool) -> Tensor:
    pyramid = model.encode_images(batch.images_B3HW, batch.sizes_B2)
    words_BTD = model.encode_words(batch.tokens_BT, batch.token_mask_BT, causal)
    return model.fuse_words(pyramid, words_BTD, batch.token_mask_BT, causal)


def answer_loss(logits_BV: Tensor, targets_BV: Tensor) -> Tensor:
    """Binary cross entropy with soft targets, summed over answers, mean over images (FIBER's)."""
    losses_BV = F.binary_cross_entropy_with_logits(logits_BV.float(), targets_BV, reduction="none")
    return losses_BV.sum(dim=1).mean()


def caption_loss(
    head: WordHead,
    fused_words_BTD: Tensor,
    tokens_BT: Tensor,
    token_mask_BT: Tensor,
    collectives: Collectives,
) -> Tensor:
    """Cross entropy of every next token, [SEP] included, per predicted token of all ranks.

    The words must come from a causal pass over the same tokens.
    """
    follows_BT = token_mask_BT[:, 1:]
    words = collectives.step_counts
    if words is None:
        words = collectives.mean(count_words(token_mask_BT))
    logits_MV = head(fused_words_BTD[:, :-1][follows_BT])
    total = F.cross_entropy(logits_MV.float(), tokens_BT[:, 1:][follows_BT], reduction="sum")
    # The mean over ranks makes the ranks' average loss that of one rank with all captions.
    return total / words.clamp(min=1e-6)


def count_words(token_mask_BT: Tensor) -> Tensor:
    """The words of captions that are to be predicted, [SEP] included; 0-dimensional."""
    return token_mask_BT[:, 1:].sum().float()


@torch.inference_mode()
def answer(model: "GLIPv2", fused_words_BTD: Tensor, top: int = 1) -> list[list[tuple[str, float]]]:
    """The `top` best answers to each image's question and their probabilities, best first.

    The words are those of `model.fuse_words` for the questions.
    """
    probabilities_BV = _answer_head(model)(fused_words_BTD).float().sigmoid()
    names = model.config.answers
    best_BK = probabilities_BV.topk(min(top, len(names)), dim=1)
    return [
        [(names[number], probability) for number, probability in zip(*row, strict=True)]
        for row in zip(best_BK.indices.tolist(), best_BK.values.tolist(), strict=True)
    ]


@torch.inference_mode()
def generate(
    model: "GLIPv2",
    tokenizer: Tokenizer,
    pyramid: list[Tensor],
    beams: int = 5,
    max_words: int = 20,
    length_penalty: float = 1.0,
) -> list[tuple[str, float]]:
    """A caption for each image of `model.encode_images`, and its mean log probability.

    The mean is over word pieces and the closing [SEP]; only pieces that can stand in a caption
    have a probability. Captions have at most `max_words` pieces. See `beam_search` for the rest.
    ValueError if the model has no captioning head or no room for `max_words`.
    """
    head = _caption_head(model)
    room = model.config.text_encoder.max_tokens - 2
    if not 1 <= max_words <= room:
        raise ValueError(f"max_words must lie between 1 and {room}, not {max_words}")
    views = _visual_path(model, pyramid)
    silent_V = _silent_pieces(tokenizer, head.decoder.out_features).to(pyramid[0].device)

    def next_words(tokens_BKT: Tensor) -> Tensor:
        logits_BKV = head(_newest_words(model, views, tokens_BKT)).float()
        return logits_BKV.masked_fill(silent_V, -torch.inf).log_softmax(dim=2)

    start_B = torch.full(pyramid[0].shape[:1], tokenizer.cls_id, device=pyramid[0].device)
    found = beam_search(next_words, start_B, tokenizer.sep_id, beams, max_words, length_penalty)
    return [(_join([tokenizer.vocabulary[i] for i in ids]), score) for ids, score in found]


def _silent_pieces(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """bool (V,): rows that are never written, such as [MASK], [unused7] and those of no piece."""
    silent_V = torch.ones(vocab_size, dtype=torch.bool)
    for number, piece in enumerate(tokenizer.vocabulary):
        silent_V[number] = len(piece) > 2 and piece[0] == "[" and piece[-1] == "]"
    silent_V[tokenizer.sep_id] = False
    return silent_V


def _join(pieces: list[str]) -> str:
    return " ".join(pieces).replace(" ##", "").removeprefix("##")


def _visual_path(model: "GLIPv2", pyramid: list[Tensor]) -> list[Tensor]:
    """Locations (B, N, D) that the words of each fusion block read.

    The image reads no text, so these hold for every caption and every step of writing it.
    """
    B = len(pyramid[0])
    no_word_B1D = pyramid[0].new_zeros(B, 1, model.config.text_encoder.width)
    mask_B1 = torch.ones(B, 1, dtype=torch.bool, device=pyramid[0].device)
    views = [pyramid]
    for block in list(model.blocks)[:-1]:
        views.append(block(views[-1], no_word_B1D, mask_B1, causal=True)[0])
    return [flatten_levels(maps) for maps in views]


def _newest_words(model: "GLIPv2", views: list[Tensor], tokens_BKT: Tensor) -> Tensor:
    """Fused feature (B, K, D) of the last token of each of the K texts about an image."""
    B, K, T = tokens_BKT.shape
    tokens_RT = tokens_BKT.flatten(0, 1)
    mask_RT = torch.ones_like(tokens_RT, dtype=torch.bool)
    words_RTD = model.encode_words(tokens_RT, mask_RT, causal=True)
    blocks = cast("list[FusionBlock]", model.blocks)
    for block, view_BND in zip(blocks, views, strict=True):
        # Each word reads the image by itself, so all texts about an image can stand in one row.
        row_BMD, row_mask_BM = words_RTD.view(B, K * T, -1), mask_RT.view(B, K * T)
        row_BMD = block.attention(view_BND, row_BMD, row_mask_BM, image_reads_text=False)[1]
        bias = attention_bias(mask_RT, row_BMD.dtype, causal=True)
        words_RTD = block.words(row_BMD.view(B * K, T, -1), bias)
    return words_RTD[:, -1].view(B, K, -1)


def beam_search(
    next_words: Callable[[Tensor], Tensor],
    start_B: Tensor,
    end: int,
    beams: int,
    max_words: int,
    length_penalty: float = 1.0,
) -> list[tuple[list[int], float]]:
    """The best found text for each image, without its start and end, and its mean log probability.

    `next_words` gives log probabilities (B, K, V) of what follows each of (B, K, T) texts. After
    `max_words` words only `end` may follow, at its price. A text that ends keeps its place among
    the `beams` and leaves that many fewer to search on; of all that ended the one with the highest
    sum of log probabilities / length ** length_penalty wins, the length counting `end`. With one
    beam this is the greedy choice.
    """
    if beams < 1:
        raise ValueError(f"beams must be at least 1, not {beams}")
    tokens_BKT = start_B[:, None, None].expand(-1, beams, 1)
    # Of equal beams all but one must be out of the race.
    total_BK = torch.full(tokens_BKT.shape[:2], -torch.inf, device=start_B.device)
    total_BK[:, 0] = 0
    length_BK = torch.zeros_like(tokens_BKT[..., 0])
    ended_BK = torch.zeros_like(length_BK, dtype=torch.bool)
    for number in range(max_words + 1):
        step_BKV = next_words(tokens_BKT)
        V = step_BKV.shape[2]
        is_end_V = torch.arange(V, device=start_B.device) == end
        if number == max_words:
            step_BKV = step_BKV.masked_fill(~is_end_V, -torch.inf)
        # An ended text has one way on, to itself, which costs nothing and always keeps its place.
        stay_BKV = ended_BK[..., None] & is_end_V
        step_BKV = step_BKV.masked_fill(ended_BK[..., None], -torch.inf).masked_fill(stay_BKV, 0)
        total_BW = (total_BK[..., None] + step_BKV).flatten(1)
        picked_BK = total_BW.masked_fill(stay_BKV.flatten(1), torch.inf).topk(beams).indices
        parent_BK, word_BK = picked_BK // V, picked_BK % V
        length_BK = (length_BK + ~ended_BK).gather(1, parent_BK)
        total_BK = total_BW.gather(1, picked_BK)
        before_BKT = tokens_BKT.gather(1, parent_BK[..., None].expand_as(tokens_BKT))
        tokens_BKT = torch.cat((before_BKT, word_BK[..., None]), dim=2)
        ended_BK = (word_BK == end) & total_BK.isfinite()
        if ended_BK.all():
            break
    best_B1 = (total_BK / length_BK**length_penalty).argmax(dim=1, keepdim=True)
    texts_BT = tokens_BKT.gather(1, best_B1[..., None].expand(-1, -1, tokens_BKT.shape[2]))[:, 0]
    lengths = length_BK.gather(1, best_B1)[:, 0].tolist()
    means = (total_BK / length_BK).gather(1, best_B1)[:, 0].tolist()
    return [
        (text[1:length], mean)
        for text, length, mean in zip(texts_BT.tolist(), lengths, means, strict=True)
    ]
