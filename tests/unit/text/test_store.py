"""The store: every token once, every byte counted, whole or not there, found again and never mistaken."""

from __future__ import annotations

import fcntl
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import twodice.text.store as module
from twodice.errors import ConfigError, DataError
from twodice.random.keys import Key
from twodice.text.corpora import load_documents
from twodice.text.documents import Corpus, Document, Part
from twodice.text.store import TokenStore, prepare

KEY = Key(11)
PLAIN = Corpus.from_texts([f"Document {i}: two dice, é and 骰子.\n" * (3 + i % 5) for i in range(60)])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """A store of plain text with a learned tokenizer."""
    return prepare(PLAIN, vocabulary=300, context=16, key=KEY, out=tmp_path_factory.mktemp("a") / "store")


def records(*rows: tuple[str, str]) -> Corpus:
    """Prompts and completions; many others around them, so that every split has some."""
    rows += tuple((f"prompt {i}?", f"answer {i}") for i in range(40))
    return Corpus(
        tuple(
            Document(f"row {i}", (p + c).encode(), (Part(p.encode(), False), Part(c.encode(), True)))
            for i, (p, c) in enumerate(rows)
        )
    )


def test_every_token_but_the_first_is_the_target_of_exactly_one_window(plain: TokenStore) -> None:
    for split in plain.splits.values():
        n = split.num_windows(16)
        windows = split.windows(np.arange(n), 16)
        assert windows.shape == (n, 17) and windows.dtype == np.int64
        assert (windows[:, 1:].reshape(-1) == split.tokens[1 : n * 16 + 1]).all()
        assert split.num_tokens - 1 - n * 16 < 16
        assert split.loss_mask([0], 16) is None


def test_tokens_are_the_documents_each_with_its_end_and_texts_return(plain: TokenStore) -> None:
    everything = []
    for name, split in plain.splits.items():
        texts = plain.texts(name)
        end = plain.end_of_document
        expected = [i for text in texts for i in [*plain.tokenizer.encode(text).tolist(), end]]
        assert split.tokens.tolist() == expected
        assert sum(len(text.encode()) for text in texts) == split.num_bytes
        everything += texts
    assert sorted(everything) == sorted(document.text for document in PLAIN.documents)


def test_bytes_of_targets_are_the_bytes_that_the_targets_decode_to(plain: TokenStore) -> None:
    split = plain.splits["train"]
    indices = np.array([3, 0, split.num_windows(16) - 1])
    for row, counted in zip(split.windows(indices, 16), split.bytes_of_targets(indices, 16), strict=True):
        pieces = [plain.tokenizer.inner.id_to_token(int(i)) for i in row[1:] if i != plain.end_of_document]
        assert counted == sum(len(piece) for piece in pieces)


def test_bytes_of_all_targets_are_the_text_but_for_the_first_token(tmp_path: Path) -> None:
    store = prepare(PLAIN, tokenizer="bytes", context=1, key=KEY, out=tmp_path / "s")
    for split in store.splits.values():
        n = split.num_windows(1)
        assert n == split.num_tokens - 1
        assert split.bytes_of_targets(np.arange(n), 1).sum() == split.num_bytes - 1


def test_a_window_outside_is_refused(plain: TokenStore) -> None:
    split = plain.splits["train"]
    for wrong in (-1, split.num_windows(16)):
        with pytest.raises(ConfigError, match=r"windows of train must be in \[0, "):
            split.windows([wrong], 16)
    with pytest.raises(ConfigError, match="context must be at least 1"):
        split.num_windows(0)
    with pytest.raises(ConfigError, match="did you mean 'validation_a'"):
        plain.texts("validation_aa")


def test_the_same_inputs_find_the_store_and_nothing_is_encoded_again(
    plain: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "write_store", lambda *a: pytest.fail("encoded again"))
    again = prepare(PLAIN, vocabulary=300, context=8, key=KEY, out=plain.path)
    assert again.digest == plain.digest and not list(plain.path.parent.glob(".*"))


@pytest.mark.parametrize(
    ("change", "word"),
    [({"vocabulary": 301}, "vocabulary 300 there, 301 wanted"), ({"key": Key(12)}, "key"),
     ({"tokenizer": "bytes", "vocabulary": None}, "tokenizer 'bpe' there, 'bytes' wanted"),
     ({"share": 0.5}, "share"), ({"texts": 1}, "texts")],
)  # fmt: skip
def test_other_inputs_are_an_error_that_names_them(plain: TokenStore, change: dict, word: str) -> None:
    settings = {"vocabulary": 300, "context": 16, "key": KEY, "out": plain.path} | change
    corpus = Corpus.from_texts(["other"] * 40) if settings.pop("texts", None) else PLAIN
    with pytest.raises(DataError, match="must hold the same texts and settings") as caught:
        prepare(corpus, **settings)
    assert word in str(caught.value)


def test_two_stores_of_the_same_inputs_are_the_same_files(plain: TokenStore, tmp_path: Path) -> None:
    other = prepare(PLAIN, vocabulary=300, context=16, key=KEY, out=tmp_path / "s")
    assert other.manifest == plain.manifest


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="it holds other files"):
        prepare(PLAIN, context=16, key=KEY, out=tmp_path)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("when", ["while writing", "before the name"])
def test_a_store_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_store" if when == "while writing" else "_rename", fail)
    with pytest.raises(OSError, match="No space"):
        prepare(PLAIN, vocabulary=300, context=16, key=KEY, out=tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_swept_and_what_is_in_use_is_not(tmp_path: Path) -> None:
    left, used, fresh = (tmp_path / f".s-{name}" for name in ("left", "used", "fresh"))
    for side in (left, used, fresh):
        side.mkdir()
        (side / "train.tokens.bin").write_bytes(b"half")
        if side is not fresh:
            os.utime(side, (0, 0))
    held = os.open(used, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    prepare(PLAIN, tokenizer="bytes", context=16, key=KEY, out=tmp_path / "s")
    os.close(held)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".s-fresh", ".s-used", "s"]


def test_many_who_prepare_at_once_get_one_store(tmp_path: Path) -> None:
    def one(_: int) -> str:
        return prepare(PLAIN, tokenizer="bytes", context=16, key=KEY, out=tmp_path / "s").digest

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(one, range(4)))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_changed_a_shorter_and_a_missing_file_are_named(tmp_path: Path) -> None:
    store = prepare(PLAIN, tokenizer="bytes", context=16, key=KEY, out=tmp_path / "s")
    file = tmp_path / "s" / "train.tokens.bin"
    data = file.read_bytes()
    file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(DataError, match=r"train.tokens.bin does not have the SHA-256"):
        TokenStore.open(store.path)
    file.write_bytes(data[:-1])
    with pytest.raises(
        DataError, match=rf"train.tokens.bin must hold {len(data)} bytes; it holds {len(data) - 1}"
    ):
        TokenStore.open(store.path, verify=False)
    file.unlink()
    with pytest.raises(DataError, match=r"train.tokens.bin must be there"):
        TokenStore.open(store.path)


def test_a_manifest_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no manifest"):
        TokenStore.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="it is damaged"):
        TokenStore.open(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(DataError, match="it is of format 99"):
        TokenStore.open(tmp_path)


def test_too_little_text_says_how_much_is_needed(tmp_path: Path) -> None:
    text = "".join(f"All the text that {i} is. " for i in range(20))
    with pytest.raises(DataError, match=r"at least one window of 129 tokens.*about ([\d,]+) bytes") as caught:
        prepare(Corpus.from_texts([text]), tokenizer="bytes", context=128, key=KEY, out=tmp_path / "s")
    assert "or a context of at most" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    copies = Corpus.from_texts(["the same " * 500] * 30)
    with pytest.raises(DataError, match="copies of one another"):
        prepare(copies, tokenizer="bytes", context=8, key=KEY, out=tmp_path / "s")
    with pytest.raises(DataError, match=r"holds 0 from 0 of 2 bytes: about \d+ bytes of text would do"):
        prepare(Corpus.from_texts(["hi"]), tokenizer="bytes", context=1, key=KEY, out=tmp_path / "s")


def test_as_much_text_as_was_said_to_be_needed_is_enough(tmp_path: Path) -> None:
    import re

    text = "".join(f"Line {i * i % 977} of a text.\n" for i in range(10_000))
    for context in (64, 128, 300):
        with pytest.raises(DataError) as caught:
            prepare(
                Corpus.from_texts([text[:400]]),
                tokenizer="bytes",
                context=context,
                key=KEY,
                out=tmp_path / "x",
            )
        match = re.search(r"about ([\d,]+) bytes", str(caught.value))
        assert match is not None
        enough = Corpus.from_texts([text[: int(match[1].replace(",", ""))]])
        prepare(enough, tokenizer="bytes", context=context, key=KEY, out=tmp_path / f"s{context}")


def test_scarce_text_keeps_validation_and_says_so(plain: TokenStore, tmp_path: Path) -> None:
    half = prepare(PLAIN, tokenizer="bytes", share=0.5, context=16, key=KEY, out=tmp_path / "half")
    full = plain.splits["train"].num_bytes
    assert 0.45 * full < half.splits["train"].num_bytes <= 0.5 * full + 1
    assert half.texts("validation_b") == plain.texts("validation_b")
    assert any("training bytes kept, by key" in notice for notice in half.notices)
    for wrong in ({"share": 0.0}, {"share": 1.5}, {"share": 0.5, "train_bytes": 9}, {"train_bytes": 0}):
        with pytest.raises(ConfigError):
            prepare(PLAIN, tokenizer="bytes", context=16, key=KEY, out=tmp_path / "x", **wrong)


def test_what_was_decided_is_stored_and_said(plain: TokenStore) -> None:
    assert plain.crosses_documents and plain.manifest["crosses_documents"] is True
    said = "\n".join(plain.notices)
    assert "split by document: 60 documents" in said and "a window may hold the end of one document" in said
    assert plain.entropy_nats_per_token is None and plain.vocabulary <= 300


def test_the_markov_source_is_read_as_bytes_and_knows_its_entropy(tmp_path: Path) -> None:
    corpus = load_documents(["markov:bytes=60000"])
    store = prepare(corpus, context=32, key=KEY, out=tmp_path / "s")
    assert store.vocabulary == 257 and store.entropy_nats_per_token == corpus.entropy_nats_per_byte
    learned = prepare(corpus, tokenizer="bpe", context=32, key=KEY, out=tmp_path / "t")
    assert learned.entropy_nats_per_token is None
    assert learned.entropy_nats_per_byte == corpus.entropy_nats_per_byte


def test_a_vocabulary_for_a_tokenizer_that_has_its_own_is_refused_unless_it_is_that(tmp_path: Path) -> None:
    store = prepare(PLAIN, tokenizer="bytes", vocabulary=257, context=16, key=KEY, out=tmp_path / "s")
    assert store.digest == prepare(PLAIN, tokenizer="bytes", context=16, key=KEY, out=tmp_path / "s").digest
    with pytest.raises(ConfigError, match="which has 257: leave it away"):
        prepare(PLAIN, tokenizer="bytes", vocabulary=300, context=16, key=KEY, out=tmp_path / "t")


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    many = {f"w{i}": i for i in range(70_000)} | {"</s>": 70_000}
    inner = Tokenizer(models.WordLevel(many, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    texts = [f"w{69_999 - i} and w{i}" for i in range(60)]
    store = prepare(Corpus.from_texts(texts), tokenizer=tmp_path, context=4, key=KEY, out=tmp_path / "s")
    split = store.splits["train"]
    assert split.tokens.dtype == np.uint32 and split.tokens.max() == 70_000
    n = split.num_windows(1)
    assert split.bytes_of_targets(np.arange(n), 1).sum() == split.num_bytes - split.token_bytes[0]
    assert TokenStore.open(store.path).texts("train") == store.texts("train")


def test_a_record_is_a_window_and_only_its_completion_counts(tmp_path: Path) -> None:
    corpus = records(("Name a die.", "It is red."))
    store = prepare(corpus, tokenizer="bytes", context=32, key=KEY, out=tmp_path / "s")
    assert store.completion_only and not store.crosses_documents
    seen = 0
    for name, split in store.splits.items():
        assert split.num_windows(32) == len(store.texts(name))
        n = np.arange(split.num_windows(32))
        mask = split.loss_mask(n, 32)
        assert mask is not None and mask.shape == (len(n), 32)
        for row, counts, size, text in zip(
            split.windows(n, 32), mask, split.bytes_of_targets(n, 32), store.texts(name), strict=True
        ):
            assert bytes(row[row < 256].tolist()).decode() == text
            cut = max(text.find("answer"), text.find("It is"))
            targets = row[1:][counts].tolist()
            assert targets == [*text[cut:].encode(), store.end_of_document]
            assert size == len(text) - cut
            seen += 1
    assert seen == len(corpus.documents)


def test_long_records_are_cut_and_counted_and_those_without_completion_left_out(tmp_path: Path) -> None:
    corpus = records(
        *[("p" * 50 + str(i), "c" * 50) for i in range(10)], *[("q" * 99 + str(i), "c") for i in range(5)]
    )
    store = prepare(corpus, tokenizer="bytes", context=64, key=KEY, out=tmp_path / "s")
    said = "\n".join(store.notices_at(64))
    assert "15 of 55 records are longer than 65 tokens and were cut there" in said
    assert "5 of 55 records have no completion within it and are left out" in said
    assert sum(split.num_windows(64) for split in store.splits.values()) == 50
    for split in store.splits.values():
        mask = split.loss_mask(np.arange(split.num_windows(64)), 64)
        assert mask is not None and mask.any(axis=1).all()
    assert len(store.notices_at(200)) == len(store.notices)
    with pytest.raises(DataError, match="at least one record whose completion begins within 2 tokens"):
        prepare(corpus, tokenizer="bytes", context=2, key=KEY, out=tmp_path / "s")


def test_turns_of_the_assistant_end_with_a_counted_end_of_document(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    turns = [("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "dd")]
    rows = [{"messages": [{"role": r, "content": c + str(i)} for r, c in turns]} for i in range(30)]
    file.write_text("\n".join(map(json.dumps, rows)))
    store = prepare(load_documents([file]), tokenizer="bytes", context=128, key=KEY, out=tmp_path / "s")
    split = store.splits["train"]
    row, mask = split.windows([0], 128)[0], split.loss_mask([0], 128)
    assert mask is not None
    number = store.texts("train")[0].split("bb")[1].split("<")[0]
    end = store.end_of_document
    assert row[1:][mask[0]].tolist() == [*f"bb{number}".encode(), end, *f"dd{number}".encode(), end]


def one_line(megabytes: int, folder: Path) -> Path:
    """A file that is one line without a single blank."""
    piece = load_documents(["markov:symbols=60,bytes=1048576,order=1"]).documents[0].data
    file = folder / "line.txt"
    with file.open("wb") as out:
        for i in range(megabytes):
            out.write(piece[i * 37 :] + piece[: i * 37])
    return file


def test_one_line_of_four_megabytes_is_stored_exactly(tmp_path: Path) -> None:
    corpus = load_documents([one_line(4, tmp_path)])
    store = prepare(corpus, tokenizer="bytes", context=128, key=KEY, out=tmp_path / "s")
    assert sum(split.num_bytes for split in store.splits.values()) == 4 << 20
    for name, split in store.splits.items():
        text = b"".join(t.encode() for t in store.texts(name))
        assert split.tokens[split.tokens < 256].astype(np.uint8).tobytes() == text


def test_tokens_are_learned_from_one_line_of_a_megabyte(tmp_path: Path) -> None:
    corpus = load_documents([one_line(1, tmp_path)])
    store = prepare(corpus, vocabulary=400, context=128, key=KEY, out=tmp_path / "s")
    text = store.texts("validation_a")
    split = store.splits["validation_a"]
    assert store.tokenizer.decode(split.tokens[: 1 + len(split.tokens) // 50].tolist()) in text[0] + text[1]
    assert sum(split.num_bytes for split in store.splits.values()) == 1 << 20


@pytest.mark.slow
def test_one_line_of_a_hundred_megabytes_needs_little_memory(tmp_path: Path) -> None:
    import subprocess
    import sys

    file = one_line(100, tmp_path)
    code = (
        "import resource, sys; from twodice.text.corpora import load_documents; "
        "from twodice.text.store import prepare; "
        "from twodice.random.keys import Key; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "s = prepare(load_documents([sys.argv[1]]), context=128, key=Key(0), out=sys.argv[2]); "
        "assert sum(p.num_bytes for p in s.splits.values()) == 100 << 20; "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(file), str(tmp_path / "s")],
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(done.stdout) * 1024 < 1.5e9, "resident memory beyond 15 times the text"
    assert time.monotonic() - begun < 1200
