"""Small tokenizers of every kind, trained on a few sentences."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import transformers
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

TEXTS = [
    "Question: Natalia sold clips to 48 of her friends in April.\nAnswer: 48/2 = 24\n#### 24",
    "def f(x):\n    return x  # naïve café © 你好 😀\n\n\n",
    "How many, then? It isn't 1,000: she'll have 17 left.",
    "if True:\n\tprint('hello there hello there hello')\n",
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
KINDS = ("byte-level", "sentencepiece", "unigram", "wordpiece")


@cache
def tokenizer_of(kind: str, size: int = 320, *, eos: str = "</s>", bos: bool = False) -> Any:
    """A tokenizer of at most so many tokens; with `bos` it puts a BOS before every text."""
    backend, trainer = _parts(kind, size, [*SPECIAL.values(), eos])
    backend.train_from_iterator(TEXTS, trainer)
    if kind == "sentencepiece":
        backend = _with_bytes(backend)
    if bos:
        from tokenizers.processors import TemplateProcessing

        template = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
        backend.post_processor = template
    backend.add_tokens([AddedToken("<table>", normalized=False)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **SPECIAL | {"eos_token": eos}
    )


def _with_bytes(backend: Tokenizer) -> Tokenizer:
    """The same with a token for every byte, after the others."""
    described = json.loads(backend.to_str())
    vocabulary = described["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    return Tokenizer.from_str(json.dumps(described))


def _parts(kind: str, size: int, special: list[str]) -> tuple[Tokenizer, Any]:
    settings: dict[str, Any] = {
        "vocab_size": size,
        "special_tokens": list(dict.fromkeys(special)),
        "show_progress": False,
    }
    if kind == "byte-level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        return backend, trainers.BpeTrainer(initial_alphabet=alphabet, **settings)
    if kind == "sentencepiece":  # as Gemma: a space is written ▁, other characters as bytes
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        return backend, trainers.BpeTrainer(limit_alphabet=60, max_token_length=12, **settings)
    if kind == "unigram":  # as Llama: a space before every text
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        return backend, trainers.UnigramTrainer(unk_token="<unk>", **settings)
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend, trainers.WordPieceTrainer(**settings)
