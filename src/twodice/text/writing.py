"""Writing a token store: split, tokenizer, then every split's tokens in stretches that need little memory.

This module knows nothing of reading the store again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from twodice.errors import ConfigError
from twodice.random.keys import Key
from twodice.text.documents import Corpus, Document
from twodice.text.manifest import FORMAT, sha256_of, write_manifest
from twodice.text.split import SHARES, Split, split_corpus
from twodice.text.tokenizer import TextTokenizer, bytes_tokenizer, load_tokenizer, train_bpe, vocabulary_for

#: BPE is learned from at most this much of the training part: more changes almost no pair and costs minutes.
BPE_BYTES = 1 << 24


def settings_of(
    corpus: Corpus,
    tokenizer: str | Path | None,
    vocabulary: int | None,
    key: Key,
    train_bytes: int | None,
    share: float | None,
) -> dict[str, Any]:
    """Everything that the tokens depend on, as plain JSON values: equal settings mean equal stores."""
    if tokenizer is None:
        tokenizer = "bytes" if corpus.entropy_nats_per_byte is not None else "bpe"
    tokenizer = str(tokenizer)
    if train_bytes is not None and share is not None:
        raise ConfigError(f"give train_bytes or share, not both; got {train_bytes} and {share}")
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"share must be in (0, 1]; got {share}")
    texts = hashlib.blake2b(digest_size=16)
    for document in corpus.documents:
        texts.update(document.full_digest)
    inside, there = tokenizer, None
    if tokenizer == "bytes":
        there = bytes_tokenizer().vocabulary
    elif tokenizer != "bpe":
        # The tokenizer's content counts, not where it lies.
        loaded = load_tokenizer(tokenizer)
        inside, there = (
            "folder " + hashlib.sha256(loaded.to_json().encode("utf-8")).hexdigest(),
            loaded.vocabulary,
        )
    if there is not None and vocabulary is not None:
        # A resolved configuration names the vocabulary that it found: that is no wish.
        if vocabulary != there:
            raise ConfigError(
                f"vocabulary is a setting of tokenizer 'bpe'; got {vocabulary} with tokenizer {tokenizer!r}, "
                f"which has {there}: leave it away"
            )
        vocabulary = None
    return {
        "format": FORMAT,
        "texts": texts.hexdigest(),
        "text_bytes": corpus.num_bytes,
        "tokenizer": inside,
        "tokenizer_source": "folder" if inside != tokenizer else tokenizer,
        "vocabulary": vocabulary,
        "key": f"{key.value:#018x}",
        "train_bytes": train_bytes,
        "share": share,
    }


def write_store(
    folder: Path, corpus: Corpus, settings: dict[str, Any], key: Key, source: str | Path | None
) -> None:
    """Write a whole store into the empty `folder`; `source` is the tokenizer's folder where it is one."""
    train_bytes = settings["train_bytes"]
    if settings["share"] is not None and settings["share"] < 1:
        whole = split_corpus(corpus, key).parts["train"]
        train_bytes = max(1, round(settings["share"] * sum(len(document.data) for document in whole)))
    split = split_corpus(corpus, key, train_bytes=train_bytes)
    tokenizer, reason = _tokenizer(settings, split, source)
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    kind = np.dtype("<u2" if tokenizer.vocabulary <= 1 << 16 else "<u4")
    counts = {
        name: _write_split(folder, name, documents, tokenizer, kind, corpus.completion_only)
        for name, documents in split.parts.items()
    }
    crosses = not corpus.completion_only
    total = corpus.num_bytes
    parts = ", ".join(
        f"{name.replace('_a', ' A').replace('_b', ' B')} {counts[name]['bytes']:,} bytes "
        f"({counts[name]['bytes'] / total:.0%}) = {counts[name]['tokens']:,} tokens"
        for name in counts
    )
    passed = (
        "a window may hold the end of one document and the beginning of the next, "
        "with the end-of-document token between"
        if crosses
        else "one record a window; the loss is taken on completions only"
    )
    digest = hashlib.sha256(repr(sorted(settings.items())).encode("utf-8")).hexdigest()
    manifest = {
        "format": FORMAT,
        "digest": digest,
        "settings": settings,
        "sources": list(corpus.sources),
        "tokenizer": tokenizer.kind,
        "tokenizer_sha256": sha256_of(folder / "tokenizer.json"),
        "vocabulary": tokenizer.vocabulary,
        "end_of_document": tokenizer.end_of_document,
        "dtype": kind.str,
        "completion_only": corpus.completion_only,
        "crosses_documents": crosses,
        "by_block": split.by_block,
        "shares": list(SHARES),
        "entropy_nats_per_byte": corpus.entropy_nats_per_byte,
        "splits": counts,
        "notices": [*corpus.notices, f"{split.reason}: {parts}", reason, passed],
    }
    write_manifest(folder, manifest)


def _tokenizer(
    settings: dict[str, Any], split: Split, source: str | Path | None
) -> tuple[TextTokenizer, str]:
    """The tokenizer that the settings ask for, and a sentence on it."""
    wanted = settings["tokenizer_source"]
    if wanted == "bytes":
        return bytes_tokenizer(), "tokenizer bytes: 256 bytes and the end-of-document token"
    if wanted == "folder":
        assert source is not None
        loaded = load_tokenizer(source)
        return loaded, f"tokenizer of the folder {source}: {loaded.vocabulary:,} entries"
    train = split.parts["train"]
    size, reason = settings["vocabulary"], "vocabulary as asked"
    if size is None:
        size, reason = vocabulary_for(sum(len(document.data) for document in train))
    learned = train_bpe(_sample(train), size)
    found = len(learned.inner.get_vocab())
    if found < size:
        reason += f"; the text has pairs for {found:,} only"
    return learned, f"tokenizer bpe, learned from the training part only: {reason}"


def _sample(documents: tuple[Document, ...]) -> Iterator[str]:
    """The training part, or where it is very large an even choice of it: every n-th stretch of 64 kB."""
    total = sum(len(document.data) for document in documents)
    if total <= BPE_BYTES:
        yield from (document.text for document in documents)
        return
    every, stretch, number = -(-total // BPE_BYTES), 1 << 16, 0
    for document in documents:
        for start in range(0, len(document.data), stretch):
            if number % every == 0:
                yield document.data[start : start + stretch].decode("utf-8", errors="ignore")
            number += 1


def _write_split(
    folder: Path,
    name: str,
    documents: tuple[Document, ...],
    tokenizer: TextTokenizer,
    kind: np.dtype[Any],
    records: bool,
) -> dict[str, int]:
    """Tokens, text and edges of one split; returns its numbers for the manifest."""
    edges, starts = [0], [0]
    own_bytes = tokenizer.byte_table is None
    files: dict[str, BinaryIO] = {}

    def put(what: str, array: np.ndarray, as_kind: Any) -> None:
        if what not in files:
            files[what] = (folder / f"{name}.{what}.bin").open("wb")
        files[what].write(np.ascontiguousarray(array, dtype=as_kind).data)

    for what, wanted in (("tokens", True), ("text", True), ("token_bytes", own_bytes), ("counted", records)):
        if wanted:  # also an empty split has its files
            put(what, np.empty(0), np.uint8)
    total = 0
    try:
        for document in documents:
            files["text"].write(document.data)
            edges.append(edges[-1] + len(document.data))
            parts = [(document.data, True)]
            if document.parts is not None:
                parts = [(part.data, part.counted) for part in document.parts]
            for place, (data, counted) in enumerate(parts):
                for ids, counts in tokenizer.encode_pieces(data.decode("utf-8")):
                    put("tokens", ids, kind)
                    if own_bytes:
                        put("token_bytes", counts, "<u4")
                    if records:
                        put("counted", np.full(len(ids), counted), np.uint8)
                    total += len(ids)
                if place == len(parts) - 1 or (records and counted):
                    put("tokens", np.array([tokenizer.end_of_document]), kind)
                    if own_bytes:
                        put("token_bytes", np.zeros(1), "<u4")
                    if records:
                        put("counted", np.full(1, counted), np.uint8)
                    total += 1
            starts.append(total)
        put("documents", np.array(edges), "<i8")
        if records:
            put("starts", np.array(starts), "<i8")
    finally:
        for file in files.values():
            file.close()
    return {"documents": len(documents), "bytes": edges[-1], "tokens": total}
