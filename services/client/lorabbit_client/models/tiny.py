"""Tiny random models and their tokenizers, built from code alone: no file, no network, no download.

For tests and first steps. Weights are drawn with a standard deviation of 0.25 instead of the usual
0.02, because two narrow layers drawn at 0.02 pass almost no signal and would not learn in seconds.
Tokenizers know single characters and pairs of letters, so every ASCII text has short token sequences.
"""

from __future__ import annotations

import string
from itertools import product
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AlbertConfig,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    ViTConfig,
)

WIDTH, LAYERS, HEADS, POSITIONS = 32, 2, 4, 512
SPREAD = 0.25
IMAGE_SIDE = 32
CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
WORD_PIECES = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
BYTE_PAIRS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
NAMES = ("albert", "bert", "deberta-v2", "distilbert", "gpt2", "llama", "roberta", "vit")

LIKE_BERT: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "albert": (AlbertConfig, {"embedding_size": WIDTH // 2}),
    "bert": (BertConfig, {}),
    "deberta-v2": (
        DebertaV2Config,
        {
            "relative_attention": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "pooler_dropout": 0.0,
        },
    ),
    "roberta": (RobertaConfig, {"max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1}),
}  # fmt: skip
"""Configuration classes with BERT's names, and what each has of its own: DeBERTa the switches of its version 3."""


def tiny_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Make the tokenizer of a tiny text model: byte-level BPE for gpt2 and llama, else WordPiece."""
    if name in {"gpt2", "llama"}:
        return _byte_pairs()
    pairs = ["token_type_ids"] if name in {"albert", "bert", "deberta-v2"} else []
    return _word_pieces(["input_ids", *pairs, "attention_mask"])


def tiny_config(name: str, **extra: Any) -> PretrainedConfig:  # noqa: ANN401 - passed on to the config class
    """Make the configuration of a tiny model; `extra` goes to its class (number of labels, names)."""
    if name == "vit":
        return ViTConfig(
            hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=2 * WIDTH,
            image_size=IMAGE_SIDE, patch_size=8, initializer_range=SPREAD,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **extra,
        )  # fmt: skip
    tokenizer = tiny_tokenizer(name)
    ids: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": SPREAD,
    }
    if name == "gpt2":
        return GPT2Config(
            n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=POSITIONS, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ids, **extra,
        )  # fmt: skip
    if name == "llama":
        return LlamaConfig(
            hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=2, max_position_embeddings=POSITIONS, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, **ids, **extra,
        )  # fmt: skip
    if name == "distilbert":
        return DistilBertConfig(
            dim=WIDTH, hidden_dim=2 * WIDTH, n_layers=LAYERS, n_heads=HEADS, max_position_embeddings=POSITIONS,
            dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, qa_dropout=0.0, **ids, **extra,
        )  # fmt: skip
    config_class, own = LIKE_BERT[name]
    common: dict[str, Any] = {
        "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": POSITIONS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    return config_class(**{**common, **own, **ids, **extra})


def _pairs() -> list[str]:
    """Every pair of lower-case letters."""
    return ["".join(pair) for pair in product(string.ascii_lowercase, repeat=2)]


def _word_pieces(inputs: list[str]) -> PreTrainedTokenizerFast:
    """Make a WordPiece tokenizer of characters and pairs of letters."""
    special = list(WORD_PIECES.values())
    visible = [c for c in string.printable if not c.isspace() and not c.isupper()]
    pieces = [*visible, *_pairs()]
    words = [*special, *pieces, *(f"##{piece}" for piece in pieces)]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, model_input_names=inputs, model_max_length=POSITIONS, **WORD_PIECES
    )


def _byte_pairs() -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer whose merges are the pairs of letters; any text survives it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*BYTE_PAIRS.values(), *alphabet, *_pairs()]
    merges = [(pair[0], pair[1]) for pair in _pairs()]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, padding_side="right", chat_template=CHAT, model_max_length=POSITIONS,
        model_input_names=["input_ids", "attention_mask"], **BYTE_PAIRS,
    )  # fmt: skip
