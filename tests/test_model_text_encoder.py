import torch

from glipv2.model.config import preset
from glipv2.model.text_encoder import TextEncoder

TOKENS = torch.tensor([[2, 300, 301, 302, 3, 0, 0], [2, 303, 304, 305, 306, 307, 3]])
MASK = TOKENS != 0


def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(preset("tiny").text_encoder).eval()


def test_words_equal_those_of_transformers_own_forward_pass() -> None:
    model = encoder()
    expected = model.bert(input_ids=TOKENS, attention_mask=MASK.long()).last_hidden_state
    torch.testing.assert_close(model(TOKENS, MASK)[MASK], expected[MASK])


def test_padding_does_not_change_words() -> None:
    model = encoder()
    longer = torch.nn.functional.pad(TOKENS, (0, 25))
    words = model(longer, longer != 0)[:, : TOKENS.shape[1]]
    torch.testing.assert_close(words[MASK], model(TOKENS, MASK)[MASK], rtol=1e-4, atol=1e-5)


def test_a_word_is_heard_by_its_neighbours() -> None:
    model = encoder()
    changed = TOKENS.clone()
    changed[0, 1] = 500
    difference = (model(changed, MASK) - model(TOKENS, MASK)).abs().amax(dim=2)
    assert (difference[0, :5] > 1e-4).all()
    assert (difference[1] == 0).all()


def test_the_word_embeddings_have_the_spread_asked_for() -> None:
    weight = encoder().bert.embeddings.word_embeddings.weight
    assert abs(weight.std().item() - 0.3) < 0.01
