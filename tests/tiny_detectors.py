"""Zero-shot detectors of transformers, tiny and with random weights, as folders like their own."""

import string
from pathlib import Path
from typing import Any

import torch

KINDS = ("grounding-dino", "mm-grounding-dino", "omdet-turbo", "owlv2", "owlvit")
WORDS = [
    "a",
    "red",
    "blue",
    "green",
    "square",
    "circle",
    "dog",
    "cat",
    "st",
    "bernard",
    "the",
    "big",
]
WORDS += ["ring", "on", "##s", "##t", ",", ":"]
MAX_TEXT = 32
"""Tokens that a tiny Grounding DINO takes."""


def build_detector(kind: str, folder: Path, seed: int = 0) -> Path:
    """Save a detector and its processor as `from_pretrained` expects them."""
    torch.manual_seed(seed)
    if kind.startswith("owl"):
        model, processor = _owl(kind)
    elif kind == "omdet-turbo":
        model, processor = _omdet_turbo()
    else:
        model, processor = _grounding_dino(kind)
    _make_opinionated(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _make_opinionated(model: torch.nn.Module) -> None:
    """Fresh weights say about the same everywhere; make scores differ, but not all be 0 or 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
            if "box_head" in name or "decoder.layer_norm" in name or "logit_s" in name:
                parameter.mul_(0.3)
            if "class_embed" in name and parameter.ndim == 0:
                parameter.zero_()


def _grounding_dino(kind: str) -> tuple[Any, Any]:
    import transformers

    if kind == "grounding-dino":
        configure = transformers.GroundingDinoConfig
        build = transformers.GroundingDinoForObjectDetection
    else:
        configure = transformers.MMGroundingDinoConfig
        build = transformers.MMGroundingDinoForObjectDetection
    text = {"vocab_size": 1100, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = configure(
        backbone_config=_swin(),
        text_config={**text, "hidden_size": 16, "intermediate_size": 16},
        d_model=32,
        num_queries=12,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_text_len=MAX_TEXT,
    )
    size = {"shortest_edge": 64, "longest_edge": 96}
    images = transformers.GroundingDinoImageProcessor(size=size)
    return build(config), transformers.GroundingDinoProcessor(images, _bert_tokenizer())


def _owl(kind: str) -> tuple[Any, Any]:
    import transformers

    family = "Owlv2" if kind == "owlv2" else "OwlViT"
    configure = getattr(transformers, f"{family}Config")
    build = getattr(transformers, f"{family}ForObjectDetection")
    images = getattr(transformers, f"{family}ImageProcessor")(size={"height": 48, "width": 48})
    tokenizer = _clip_tokenizer(pad_token="!", length=24)
    tower = {"hidden_size": 16, "intermediate_size": 16}
    tower |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = configure(
        text_config={**tower, **_ends(tokenizer), "max_position_embeddings": 24},
        vision_config={**tower, "image_size": 48, "patch_size": 8},
        projection_dim=16,
    )
    return build(config), getattr(transformers, f"{family}Processor")(images, tokenizer)


def _omdet_turbo() -> tuple[Any, Any]:
    import transformers

    tokenizer = _clip_tokenizer(pad_token="<|endoftext|>", length=77)
    text = {"model_type": "clip_text_model", "hidden_size": 16, "intermediate_size": 16}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 77}
    config = transformers.OmDetTurboConfig(
        backbone_config=_swin(),
        text_config={**text, **_ends(tokenizer)},
        apply_layernorm_after_vision_backbone=False,
        image_size=64,
        text_projection_in_dim=16,
        text_projection_out_dim=16,
        class_embed_dim=16,
        task_encoder_hidden_dim=16,
        num_queries=12,
        encoder_in_channels=[16, 32, 64],
        encoder_hidden_dim=32,
        decoder_hidden_dim=32,
        vision_features_channels=[32, 32, 32],
        encoder_attention_heads=2,
        decoder_num_heads=2,
        encoder_dim_feedforward=16,
        decoder_dim_feedforward=16,
        decoder_num_layers=2,
    )
    images = transformers.DetrImageProcessor(size={"height": 64, "width": 64})
    model = transformers.OmDetTurboForObjectDetection(config)
    return model, transformers.OmDetTurboProcessor(images, tokenizer)


def _swin() -> Any:
    from transformers import SwinConfig

    return SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_indices=[2, 3, 4],
    )


def _bert_tokenizer() -> Any:
    """Few words, but the special tokens where bert-base-uncased has them: the model knows them."""
    from transformers import BertTokenizer

    words = [f"[unused{number}]" for number in range(1100)]
    words[0], words[100:104] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words[1012], words[1029] = ".", "?"
    words[1040 : 1040 + len(WORDS)] = WORDS
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)})


def _clip_tokenizer(pad_token: str, length: int) -> Any:
    """Letter by letter; as in CLIP, the end of the text has the highest id."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + ",.:"
    words = ["!", *letters, *(f"{letter}</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad_token, model_max_length=length)


def _ends(tokenizer: Any) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
