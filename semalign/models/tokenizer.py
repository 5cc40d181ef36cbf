"""Whether a tokenizer is the one that its files describe, and fits its model."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from semalign.errors import UserError
from semalign.models.loading import load_tokenizer, model_folder
from semalign.models.reading import reading

_TEXTS = (
    "Question: How many apples are left?\nAnswer: 5",
    "def f(x):\n    if x > 1 and y != 'a':\n        return [1, 2]\n\n# done",
)
# The BOS tokens that begin every text a family was trained on, by `model_type`. `<s>` is also the
# BOS of tokenizers that never used it; SentencePiece's, which did, have a token for each byte.
_OPENING = {
    "gemma": {"<bos>"},
    "llama": {"<s>", "<|begin_of_text|>"},
    "mistral": {"<s>"},
}
_SENTENCEPIECE = "<0x0A>"


def check_tokenizer(
    path: str | Path, config: Any, fingerprint: str, *, trust_remote_code: bool = False
) -> None:
    """Check the tokenizer of a model on two short texts and against the model's rows.

    Prints a line for one that begins no text with the BOS token that its family wants.

    **Arguments**: `config` is that of the text model; `fingerprint` that of the tokenizer, for
    which the check is made once a process.

    **Raises** `UserError` if transformers gives other ids than tokenizer.json, if a text does not
    survive encoding and decoding, for two BOS tokens, and for a BOS or EOS without a row.
    """
    folder = model_folder(path, weights=False)
    _check(str(path), folder, config.vocab_size, config.model_type, fingerprint, trust_remote_code)


@lru_cache(maxsize=64)
def _check(
    path: str, folder: Path, rows: int, model_type: str, _fingerprint: str, trust_remote_code: bool
) -> None:
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    with reading(f"the tokenizer of '{path}' cannot be used"):
        _check_rows(path, tokenizer, rows)
        _check_ids(path, tokenizer, folder / "tokenizer.json")
        _check_opening(path, tokenizer, model_type)


def _check_rows(path: str, tokenizer: Any, rows: int) -> None:
    """The padding token may be without one: what is padded is never embedded by its id."""
    for name in ("eos_token", "bos_token"):
        id_ = getattr(tokenizer, f"{name}_id")
        if id_ is not None and id_ >= rows:
            raise UserError(
                f"model '{path}': {name} '{getattr(tokenizer, name)}' of its tokenizer has the id "
                f"{id_}, and its embedding has {rows} rows (ids 0..{rows - 1}); expected a token "
                "that the model has"
            )


def _check_ids(path: str, tokenizer: Any, file: Path) -> None:
    chosen = f"tokenizer_class={type(tokenizer).__name__}"
    if file.is_file():
        described = Tokenizer.from_file(str(file))
        described.no_truncation()
        for text in _TEXTS:
            ids = described.encode(text, add_special_tokens=False).ids
            if tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
                raise UserError(
                    f"model '{path}': transformers tokenises otherwise than its tokenizer.json "
                    f"({chosen}); set tokenizer_class in tokenizer_config.json to "
                    "PreTrainedTokenizerFast, which reads that file as it is"
                )
    for text in _TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if found.strip() != text:
            raise UserError(
                f"model '{path}': its tokenizer ({chosen}) does not keep a text: {text!r} comes "
                f"back as {found!r}; expected decode(encode(text)) to be the text"
            )


def _check_opening(path: str, tokenizer: Any, model_type: str) -> None:
    bos, ids = tokenizer.bos_token, tokenizer(_TEXTS[0])["input_ids"]
    opening = [id_ == tokenizer.bos_token_id for id_ in ids[:2]]
    if all(opening):
        raise UserError(
            f"model '{path}': its tokenizer begins a text with two {bos}; expected one (see "
            "post_processor in tokenizer.json)"
        )
    wanted = any(family in model_type and bos in known for family, known in _OPENING.items())
    trained = bos != "<s>" or _SENTENCEPIECE in tokenizer.get_vocab()
    if wanted and trained and not opening[0]:
        print(
            f"[tokenizer] {path}: begins no text with {bos}, which {model_type} models expect (see "
            "post_processor in tokenizer.json, add_bos_token in tokenizer_config.json)",
            flush=True,
        )
