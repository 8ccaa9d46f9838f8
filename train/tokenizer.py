"""Tokenizers: a byte-level BPE trained here, any Hugging Face tokenizer, and the compression of its vocabulary.

Whatever its origin, a tokenizer ends as one `tokenizer.json` in the prepared folder, read by `load_tokenizer`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from train.shards import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"  # ends every document; also the id that fills history before a document
MIN_BPE_VOCAB = 257  # 256 bytes and END_OF_TEXT
_SPACE_SENTINEL = "\ue000"  # private-use character that stands for a lone space while the rest is stripped


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich 2016, on bytes as GPT-2) with END_OF_TEXT as id 0 and all 256 bytes.

    The result has fewer than `vocab_size` ids where the text holds too few pairs to merge.

    Raises:
        DataError: `vocab_size` below 257.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_BPE_VOCAB:
        raise DataError(
            f"data.vocab_size={vocab_size} must be at least {MIN_BPE_VOCAB}: 256 bytes and the end of a document"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _as_text_encoder(tokenizer)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a `tokenizer.json` so that it encodes plain text: no truncation, padding or special tokens in the text.

    Text that happens to spell a special token is encoded like any other text; ids of special tokens never come out
    of a document, so an end-of-document id always is one.
    """
    from tokenizers import Tokenizer

    try:
        return _as_text_encoder(Tokenizer.from_file(str(path)))
    except Exception as error:  # `tokenizers` raises the bare class
        raise DataError(f"{path} is not a tokenizer that the `tokenizers` library reads: {error}") from error


def _as_text_encoder(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def fetch_tokenizer(name_or_folder: str) -> Tokenizer:
    """A Hugging Face tokenizer from a folder (or file) with `tokenizer.json`, else through transformers.

    Raises:
        DataError: Not found, no network, transformers missing, or no fast form of the tokenizer.
    """
    path = Path(name_or_folder)
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        return load_tokenizer(file)
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DataError(
            f"data.tokenizer={name_or_folder} has no tokenizer.json in a local folder of that name, and loading it by "
            "name needs transformers, which is not installed: `pip install transformers`, or download "
            "tokenizer.json into a folder and give that folder"
        ) from error
    try:
        loaded = AutoTokenizer.from_pretrained(name_or_folder)
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.tokenizer={name_or_folder} could not be loaded: neither a folder with tokenizer.json, nor a name "
            "that the Hugging Face hub (is there a network?) or its local cache answers; give a folder with "
            f"tokenizer.json, or leave data.tokenizer empty to train one. Cause: {_first_line(error)}"
        ) from error
    if not getattr(loaded, "is_fast", False):
        raise DataError(f"data.tokenizer={name_or_folder} has no fast form (tokenizer.json); choose one that has")
    return _as_text_encoder(loaded.backend_tokenizer)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def end_of_document(tokenizer: Tokenizer, name_or_folder: str | None, eos_token: str | None) -> int:
    """Id of the token that ends documents.

    In this order: `eos_token`, the `eos_token` of tokenizer_config.json beside the tokenizer, then the usual names.
    """
    candidates = [eos_token] if eos_token else [*_declared_eos(name_or_folder), *_USUAL_EOS]
    for token in candidates:
        token_id = tokenizer.token_to_id(token)
        if token_id is not None:
            return int(token_id)
    raise DataError(
        f"data.eos_token={eos_token or 'null'}: the tokenizer has none of {', '.join(candidates)}; name the token "
        "that ends a document with data.eos_token"
    )


_USUAL_EOS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "<|im_end|>", "[SEP]")


def _declared_eos(name_or_folder: str | None) -> list[str]:
    """The `eos_token` of tokenizer_config.json in a local folder, if there is one."""
    file = Path(name_or_folder or "") / "tokenizer_config.json"
    if not name_or_folder or not file.is_file():
        return []
    declared = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
    token = declared.get("content") if isinstance(declared, dict) else declared
    return [token] if isinstance(token, str) else []


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Largest id + 1, added tokens and gaps included: what an embedding needs."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def compression_table(tokenizer: Tokenizer) -> np.ndarray:
    """Map each token id to the id of its normalised text: P: V -> V' (Engram, arXiv 2601.07372, section 2.2).

    Two tokens share a compressed id when their texts are equal after NFKC, removal of accents, lower-casing and
    squeezing white space; a token of white space alone becomes one space. A token whose text is empty after that keeps
    its own text, one that is no complete UTF-8 is known by its raw form. Compressed ids count first appearances.

    Returns:
        (V,) int64, surjective on 0 ... V' - 1.
    """
    from tokenizers import Regex, normalizers

    normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), _SPACE_SENTINEL),
            normalizers.Strip(),
            normalizers.Replace(_SPACE_SENTINEL, " "),
        ]
    )
    compressed: dict[str, int] = {}
    table = np.empty(vocabulary_size(tokenizer), dtype=np.int64)
    for token_id in range(len(table)):
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        # U+FFFD marks bytes that are not a whole character; their decoded text would merge unrelated tokens.
        key = str(tokenizer.id_to_token(token_id)) if "\ufffd" in text else normalizer.normalize_str(text) or text
        table[token_id] = compressed.setdefault(key, len(compressed))
    return table
