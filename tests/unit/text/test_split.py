"""The split is keyed, about as large as asked, and nothing that is learned from is measured on."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twodice.errors import ConfigError, DataError
from twodice.random.keys import Key
from twodice.text.corpora import load_documents
from twodice.text.documents import Corpus, Document
from twodice.text.split import SPLITS, blocks_of, split_corpus

TEXTS = st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(texts=TEXTS, seed=st.integers(0, 2**64 - 1))
def test_no_text_is_on_two_sides_and_none_is_lost(texts: list[str], seed: int) -> None:
    texts = [text for text in texts if text.encode("utf-8", "ignore").decode() == text]
    if not texts:
        return
    corpus = Corpus.from_texts(texts + texts[:5])
    split = split_corpus(corpus, Key(seed))
    sides = [{document.data for document in split.parts[name]} for name in SPLITS]
    for i in range(3):
        for j in range(i):
            assert not sides[i] & sides[j]
    assert sum(len(d.data) for name in SPLITS for d in split.parts[name]) == corpus.num_bytes


def test_shares_are_about_as_asked_for_documents_of_all_sizes() -> None:
    corpus = load_documents(["python-docs"])
    for seed in range(20):
        split = split_corpus(corpus, Key(seed))
        assert not split.by_block
        for name, share in zip(SPLITS, (0.8, 0.1, 0.1), strict=True):
            part = sum(len(document.data) for document in split.parts[name]) / corpus.num_bytes
            assert share * 0.8 < part < share * 1.2


def test_the_split_is_a_function_of_key_and_text_not_of_names_or_order() -> None:
    texts = [f"document number {i} " * (i % 7 + 1) for i in range(50)]
    one = split_corpus(Corpus.from_texts(texts), Key(3))
    again = split_corpus(
        Corpus(tuple(Document(f"x{i}", t.encode()) for i, t in enumerate(texts[::-1]))), Key(3)
    )
    other = split_corpus(Corpus.from_texts(texts), Key(4))
    sides = [{name: {d.data for d in split.parts[name]} for name in SPLITS} for split in (one, again, other)]
    assert sides[0] == sides[1] != sides[2]


def test_one_document_is_cut_into_blocks_and_nothing_is_lost() -> None:
    text = "".join(f"Line {i} of the only document.\n" for i in range(20_000))
    corpus = Corpus.from_texts([text])
    split = split_corpus(corpus, Key(0))
    assert split.by_block and "1 document is too few" in split.reason
    blocks = [document.data for name in SPLITS for document in split.parts[name]]
    assert sum(map(len, blocks)) == len(text)
    assert all(block.endswith(b"\n") for block in blocks)
    assert all(len(split.parts[name]) >= 3 for name in SPLITS)


def test_one_huge_document_among_many_is_cut_as_well() -> None:
    corpus = Corpus.from_texts(["word " * 100_000, *[f"small {i}" for i in range(100)]])
    split = split_corpus(corpus, Key(0))
    assert split.by_block and "100% of the text" in split.reason


@given(st.text(min_size=1, max_size=300), st.integers(1, 50))
def test_blocks_join_to_the_document_and_never_cut_a_character(text: str, size: int) -> None:
    data = text.encode("utf-8")
    blocks = blocks_of(Document("x", data), size)
    assert b"".join(block.data for block in blocks) == data
    for block in blocks:
        assert block.text


def test_scarce_text_keeps_validation_whole_and_smaller_is_part_of_larger() -> None:
    corpus = load_documents(["python-docs"])
    whole = split_corpus(corpus, Key(1))
    some = split_corpus(corpus, Key(1), train_bytes=100_000)
    less = split_corpus(corpus, Key(1), train_bytes=30_000)
    assert whole.parts["validation_a"] == some.parts["validation_a"] == less.parts["validation_a"]
    sizes = [sum(len(d.data) for d in split.parts["train"]) for split in (some, less)]
    assert 95_000 < sizes[0] <= 100_000 and 25_000 < sizes[1] <= 30_000
    large = [document.data for document in some.parts["train"]]
    assert all(any(big.startswith(document.data) for big in large) for document in less.parts["train"])
    assert "of 3" in less.reason and "training bytes kept, by key" in less.reason


def test_settings_out_of_range_are_refused() -> None:
    corpus = Corpus.from_texts(["a"])
    with pytest.raises(ConfigError, match="train_bytes must be at least 1"):
        split_corpus(corpus, Key(0), train_bytes=0)
    for shares in ((0.5, 0.5), (1.0, 0.0, 0.0), (0.5, 0.2, 0.2)):
        with pytest.raises(ConfigError, match="shares must be three numbers"):
            split_corpus(corpus, Key(0), shares=shares)
    with pytest.raises(DataError, match="at least one document"):
        Corpus(())
