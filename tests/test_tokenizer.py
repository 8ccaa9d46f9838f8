"""Tokenizers: the compression table against the official code's numbers, training, loading, ends of documents."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import AddedToken, Tokenizer, models

from train.shards import DataError
from train.tokenizer import (
    END_OF_TEXT,
    compression_table,
    end_of_document,
    fetch_tokenizer,
    load_tokenizer,
    train_bpe,
    vocabulary_size,
)

GOLDEN = Path(__file__).parent / "golden"
TEXTS = ["def f(x):\n    return x + 1\n", "Ärger über Öl, naïve café.\n", "The THE the\t\tthe", "日本語 🎉"] * 20


@pytest.mark.parametrize("name", ["engram_trigram_hc1", "engram_trigram_hc4"])
def test_compression_table_equals_official_lookup_table(name: str) -> None:
    expected = load_file(GOLDEN / f"{name}.safetensors")["lookup_table"]
    table = compression_table(load_tokenizer(GOLDEN / "tokenizer.json"))
    assert table.dtype == np.int64
    np.testing.assert_array_equal(table, expected)


def test_compression_merges_case_accents_and_white_space() -> None:
    tokens = ["a", "A", "á", " a", "  ", "\n", "", "b", "Ａ"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="b"))
    #                                          a  A  á ' a' '  ' \n  '' b fullwidth-A
    assert compression_table(tokenizer).tolist() == [0, 0, 0, 0, 1, 1, 2, 3, 0]


def test_compression_table_covers_gaps_and_added_tokens() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 5}, unk_token="a"))
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    table = compression_table(tokenizer)
    assert len(table) == vocabulary_size(tokenizer) == max(tokenizer.get_vocab().values()) + 1
    assert set(table.tolist()) == set(range(table.max() + 1))


def test_bpe_is_deterministic_lossless_and_of_the_size_asked() -> None:
    first, second = train_bpe(TEXTS, 300), train_bpe(TEXTS, 300)
    assert first.to_str() == second.to_str()
    assert vocabulary_size(first) == 300
    assert first.token_to_id(END_OF_TEXT) == 0
    for text in [*TEXTS[:4], "\x00 \ufffd unseen ß"]:
        assert first.decode(first.encode(text).ids, skip_special_tokens=False) == text


def test_text_that_spells_a_special_token_stays_text(tmp_path: Path) -> None:
    tokenizer = train_bpe(TEXTS, 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for candidate in (tokenizer, load_tokenizer(tmp_path / "tokenizer.json"), fetch_tokenizer(str(tmp_path))):
        ids = candidate.encode(f"a{END_OF_TEXT}b").ids
        assert 0 not in ids
        assert candidate.decode(ids) == f"a{END_OF_TEXT}b"


def test_too_small_vocabulary_is_named() -> None:
    with pytest.raises(DataError, match=r"data\.vocab_size=256 must be at least 257"):
        train_bpe(TEXTS, 256)


def test_folder_tokenizer_ignores_truncation_and_declares_its_end(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(GOLDEN / "tokenizer.json")
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<bos>"}}))
    fetched = fetch_tokenizer(str(tmp_path))
    assert len(fetched.encode("one two three four five six").ids) > 2
    assert end_of_document(fetched, str(tmp_path), None) == 0
    assert end_of_document(fetched, str(tmp_path), "<eos>") == 1
    with pytest.raises(DataError, match=r"data\.eos_token=<none>"):
        end_of_document(fetched, str(tmp_path), "<none>")


def test_transformers_loads_what_has_no_tokenizer_json(tmp_path: Path) -> None:
    tokenizer = train_bpe(TEXTS, 300)
    tokenizer.model.save(str(tmp_path))  # vocab.json and merges.txt, as GPT-2's
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": END_OF_TEXT})
    )
    fetched = fetch_tokenizer(str(tmp_path))
    assert fetched.encode(TEXTS[0]).ids == tokenizer.encode(TEXTS[0]).ids


def test_tokenizer_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tokenizer"):
        fetch_tokenizer(str(broken))
    with pytest.raises(DataError, match=r"data\.tokenizer=.*could not be loaded.*tokenizer\.json"):
        fetch_tokenizer(str(tmp_path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DataError, match="pip install transformers"):
        fetch_tokenizer("some/name")
    shutil.copy(GOLDEN / "tokenizer.json", tmp_path / "tokenizer.json")
    assert fetch_tokenizer(str(tmp_path)).get_vocab_size() == 3000
