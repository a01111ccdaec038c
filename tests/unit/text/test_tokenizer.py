"""Tokens and back: any text returns exactly, bytes are counted exactly, and training is deterministic."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

import twodice.text.tokenizer as module
from twodice.errors import ConfigError, DataError
from twodice.text.corpora import load_documents
from twodice.text.tokenizer import (
    END_OF_DOCUMENT,
    TextTokenizer,
    bytes_tokenizer,
    load_tokenizer,
    pieces,
    train_bpe,
    vocabulary_for,
)

DOCS = [document.text for document in load_documents(["python-docs"]).documents[:30]]
BPE = train_bpe(DOCS, 600)
BYTES = bytes_tokenizer()
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


@settings(max_examples=200, deadline=None)
@given(UNICODE)
def test_any_text_returns_exactly_and_its_bytes_are_counted(text: str) -> None:
    for tokenizer in (BPE, BYTES):
        ids, counts = tokenizer.encode_counted(text)
        assert tokenizer.decode(ids) == text
        assert counts.sum() == len(text.encode("utf-8")) and len(ids) == len(counts)


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
def test_special_tokens_spelled_in_a_text_are_only_text(tokenizer: TextTokenizer) -> None:
    text = f"a{END_OF_DOCUMENT}b"
    assert tokenizer.end_of_document not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_are_their_own_ids_in_the_json_as_well() -> None:
    text = "naïve € 🎲\n\x01"
    assert BYTES.encode(text).tolist() == list(text.encode("utf-8"))
    assert Tokenizer.from_str(BYTES.to_json()).encode(text).ids == list(text.encode("utf-8"))
    assert BYTES.vocabulary == 257 and BYTES.end_of_document == 256


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
def test_the_json_is_one_that_transformers_reads(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    text = "Two dice: été, 骰子, 🎲."
    assert fast(text)["input_ids"] == tokenizer.encode(text).tolist()
    assert fast.decode(fast(text)["input_ids"]) == text


def test_training_twice_gives_the_same_file() -> None:
    assert train_bpe(DOCS, 600).to_json() == BPE.to_json()
    assert BPE.vocabulary == 600


def test_cutting_into_pieces_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(DOCS[:4])
    whole = BPE.inner.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(module, "_PIECE", 500)
    assert max(map(len, pieces(text, 500))) <= 500
    cut = np.concatenate(
        [BPE.inner.encode(piece, add_special_tokens=False).ids for piece in pieces(text, 500)]
    )
    assert cut.tolist() == whole


@given(UNICODE, st.integers(2, 9))
def test_pieces_join_to_the_text(text: str, longest: int) -> None:
    found = list(pieces(text, longest))
    assert "".join(found) == text and all(0 < len(piece) <= longest for piece in found)


def test_an_endless_word_is_learned_from_in_time() -> None:
    text = "".join(chr(97 + (i * i * 7 + i // 3) % 26) for i in range(200_000))
    tokenizer = train_bpe([text], 700)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_fewer_entries_come_out_where_the_text_has_no_more_pairs() -> None:
    assert train_bpe(["abab"], 1000).vocabulary < 270
    with pytest.raises(ConfigError, match="at least 257"):
        train_bpe(["abab"], 256)


@pytest.mark.parametrize(
    ("size", "entries"), [(0, 512), (131_071, 512), (262_144, 1024), (1_048_576, 4096), (10**9, 32768)]
)
def test_the_vocabulary_follows_its_rule(size: int, entries: int) -> None:
    found, reason = vocabulary_for(size)
    assert found == entries and f"{entries:,}" in reason and "256 bytes" in reason


@given(st.integers(0, 10**12))
def test_more_text_never_means_a_smaller_vocabulary(size: int) -> None:
    assert vocabulary_for(size)[0] <= vocabulary_for(size + 1)[0]


def folder_with(tmp_path: Path, inner: Tokenizer, **config: object) -> Path:
    inner.save(str(tmp_path / "tokenizer.json"))
    if config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def words(*special: str) -> Tokenizer:
    """A tokenizer of another kind: whole words, lower case, unknown ones lost."""
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "die": 1, "two": 2}, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(list(special))
    return inner


def test_a_folder_gives_its_tokenizer_and_its_end_of_document(tmp_path: Path) -> None:
    loaded = load_tokenizer(folder_with(tmp_path, words("</s>", "<fin>"), eos_token={"content": "<fin>"}))
    assert loaded.inner.id_to_token(loaded.end_of_document) == "<fin>" and loaded.vocabulary == 5
    (tmp_path / "tokenizer_config.json").unlink()
    loaded = load_tokenizer(tmp_path)
    assert loaded.inner.id_to_token(loaded.end_of_document) == "</s>"


def test_bytes_are_counted_for_a_tokenizer_that_changes_the_text(tmp_path: Path) -> None:
    loaded = load_tokenizer(folder_with(tmp_path, words("</s>")))
    assert loaded.byte_table is None
    ids, counts = loaded.encode_counted(" Two  dice die été\n")
    assert ids.tolist() == [2, 0, 1, 0]
    assert counts.sum() == len(" Two  dice die été\n".encode())
    assert counts.tolist() == [4, 6, 4, 7]


def test_a_byte_level_folder_is_read_as_the_same_tokenizer(tmp_path: Path) -> None:
    loaded = load_tokenizer(folder_with(tmp_path, BPE.inner))
    assert loaded.byte_table is not None and BPE.byte_table is not None
    assert (loaded.byte_table == BPE.byte_table).all()
    assert loaded.encode(DOCS[0]).tolist() == BPE.encode(DOCS[0]).tolist()


def test_a_tokenizer_that_draws_is_made_to_decide(tmp_path: Path) -> None:
    state = json.loads(BPE.to_json())
    state["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(DOCS[0]).tolist() == BPE.encode(DOCS[0]).tolist()


def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'bpe', 'bytes' or a folder that holds tokenizer\.json"):
        load_tokenizer("bpee")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"must be a tokenizer\.json that the tokenizers library reads"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="must hold an end-of-document token"):
        load_tokenizer(folder_with(tmp_path, words()))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match="must be a JSON object"):
        load_tokenizer(folder_with(tmp_path, words("</s>")))
