"""The zoo's one tokenizer: byte-level BPE, so that any text has tokens and no text is unknown.

The text is first cut into digits, newlines, words, runs of punctuation and runs of spaces, and no
merge crosses a cut. Every digit and every newline is thus a token of its own, and a prompt that
ends in a newline, or is followed by a space, has the same tokens alone as with its answer. No BOS
and no EOS is added by itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PIECES = r"\n|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=[ ]\S)|\s"
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
VOCABULARY_SIZE = 640
LONGEST = 2048


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train the tokenizer on `texts`; the result is determined by them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=LONGEST,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )
