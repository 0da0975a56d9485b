"""Text to BERT word pieces and back to characters."""

from dataclasses import dataclass
from importlib import resources

from tokenizers import BertWordPieceTokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """One text as the model sees it."""

    ids: list[int]
    """Vocabulary ids, [CLS] first and [SEP] last."""
    offsets: list[tuple[int, int]]
    """[start, end) characters of the text that each token stands for; (0, 0) for special tokens."""
    truncated: bool = False
    """Whether the text was longer than the model allows and lost its end."""


class Tokenizer:
    """Lower-casing WordPiece over a given vocabulary.

    The vocabulary is a list of pieces whose positions are the ids, as in BERT's vocab.txt; the
    tokenizer and the model's embedding table must come from the same list.
    """

    def __init__(self, vocabulary: list[str], max_tokens: int) -> None:
        missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
        if missing:
            raise ValueError(f"vocabulary lacks the special tokens {', '.join(missing)}")
        if max_tokens < 3:
            raise ValueError("max_tokens must leave room for [CLS], [SEP] and one word")
        self.vocabulary = vocabulary
        self.max_tokens = max_tokens
        ids = {piece: number for number, piece in enumerate(vocabulary)}
        if len(ids) != len(vocabulary):
            raise ValueError("vocabulary lists a piece twice")
        # vocab= takes the mapping itself. A path given as vocab_file= to transformers' class is
        # silently ignored and turns every word into [UNK].
        self._word_pieces = BertWordPieceTokenizer(vocab=ids, lowercase=True)
        self.pad_id = ids["[PAD]"]
        self.unknown_id = ids["[UNK]"]
        self.cls_id = ids["[CLS]"]
        self.sep_id = ids["[SEP]"]
        self.mask_id = ids["[MASK]"]

    @classmethod
    def from_vocab(cls, lines: list[str], max_tokens: int) -> "Tokenizer":
        """From the lines of a vocab.txt, with or without their line ends."""
        return cls([line.rstrip("\r\n") for line in lines if line.strip()], max_tokens)

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no word of a text."""
        return frozenset((self.pad_id, self.cls_id, self.sep_id, self.mask_id))

    def encode(self, text: str) -> Tokens:
        """Split a text into at most `max_tokens` tokens, the two special ones included."""
        encoding = self._word_pieces.encode(text, add_special_tokens=False)
        room = self.max_tokens - 2
        return Tokens(
            ids=[self.cls_id, *encoding.ids[:room], self.sep_id],
            offsets=[(0, 0), *encoding.offsets[:room], (0, 0)],
            truncated=len(encoding.ids) > room,
        )

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[list[str], int]]:
        return Tokenizer, (self.vocabulary, self.max_tokens)


def tiny_vocab() -> list[str]:
    """The packaged vocabulary of the tiny preset.

    1024 entries: special tokens, single characters, the words of the toy world and of the blood
    cell data, then WordPiece entries trained on the alternative texts and captions of the CC BY
    figures of OpenStax *Introduction to Anthropology*.
    """
    text = resources.files("glipv2.model").joinpath("tiny_vocab.txt").read_text("utf-8")
    return text.splitlines()
