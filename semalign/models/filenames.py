"""Patterns of the files that a model folder holds next to its configuration and weights."""

from __future__ import annotations

# Every file from which transformers 5 makes a tokenizer, remote code included.
TOKENIZER_FILES = (
    "tokenizer*.json",  # tokenizer_config.json, versioned tokenizer.4.0.0.json
    "tokenizer.model*",  # tokenizer.model.v3
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json",
    "*_vocab.json",
    "vocab.txt",
    "merges.txt",
    "dict.txt",
    "bpe.codes",
    "tekken.json",
    "normalizer.json",
    "byte_maps.json",
    "emoji.json",
    "word_*.json",
    "*.model",  # SentencePiece: spiece.model, sentencepiece.bpe.model; tiktoken.model
    "*.spm",
    "*.tiktoken",
    "prophetnet.tokenizer",
    "tokenization_*.py",
)
# Chat templates.
TEMPLATE_FILES = (
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*",
    "chat_templates/*",
)
