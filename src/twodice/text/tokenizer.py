"""Text to tokens and back: byte-level BPE trained here, plain bytes, or the ``tokenizer.json`` of a folder.

What the tokenizers of this module share: a text is cut into pieces before it is encoded, so that one line of
any length needs little memory; special tokens are never recognised inside a text; and the number of text
bytes that each token stands for is known exactly. This module knows nothing of splits and files of tokens,
and nothing of torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from twodice.errors import ConfigError, DataError

END_OF_DOCUMENT = "<|endoftext|>"
#: Names under which published tokenizers hold their end-of-document token, in order of preference.
END_NAMES = (
    END_OF_DOCUMENT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eot_id|>",
    "<|im_end|>",
    "[EOS]",
    "[SEP]",
)
SMALLEST_VOCABULARY = 512
LARGEST_VOCABULARY = 32768
BYTES_PER_ENTRY = 256

_PIECE = 1 << 18  # characters a piece, and how many are encoded side by side: tens of megabytes for encodings
_PIECES_AT_ONCE = 4
_LONGEST_WORD = 64  # characters; while training only, see _for_training
_LONG_WORDS = re.compile(rf"\S{{{_LONGEST_WORD}}}(?=\S)")

Ids = npt.NDArray[np.int64]


def vocabulary_for(num_bytes: int) -> tuple[int, str]:
    """Size of the vocabulary for a training text of `num_bytes` bytes, and the reason in words.

    The rule: the largest power of two that leaves at least 256 bytes of training text for each entry (on
    average some 60 to 100 occurrences of each token, enough to learn its embedding), between 512 and 32,768.

    Parameters
    ----------
    num_bytes : int
        Bytes of the training part, at least 0.

    Returns
    -------
    tuple of int and str
        The size and a sentence that a command can print.
    """
    if num_bytes < 0:
        raise ConfigError(f"num_bytes must be at least 0; got {num_bytes}")
    entries = num_bytes // BYTES_PER_ENTRY
    fitting = 1 << (entries.bit_length() - 1) if entries else 0
    size = min(max(fitting, SMALLEST_VOCABULARY), LARGEST_VOCABULARY)
    rule = f"the largest power of two that leaves at least {BYTES_PER_ENTRY} bytes of training text an entry"
    if size == fitting:
        why = rule
    elif size > fitting:
        why = f"the smallest that is used; {rule} would be less"
    else:
        why = f"the largest that is used; {rule} would be {fitting:,}"
    return size, f"vocabulary {size:,} for {num_bytes:,} bytes of training text: {why}"


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer that counts bytes.

    Attributes
    ----------
    kind : str
        ``"bpe"``, ``"bytes"`` or ``"folder"``.
    inner : tokenizers.Tokenizer
        The tokenizer itself; ``inner.to_str()`` is a ``tokenizer.json`` that transformers reads.
    vocabulary : int
        Largest token id + 1.
    end_of_document : int
        Id of the token that ends a document.
    byte_table : ndarray or None
        Bytes of text for each id, ``(vocabulary,)`` int64, where that is a property of the token (byte level,
        text not normalised); None where it depends on the place in the text.
    """

    kind: str
    inner: Tokenizer
    vocabulary: int
    end_of_document: int
    byte_table: Ids | None

    def encode(self, text: str) -> Ids:
        """Token ids of `text`: ``(n,)`` int64, without any end-of-document token."""
        return self.encode_counted(text)[0]

    def encode_counted(self, text: str) -> tuple[Ids, Ids]:
        """Token ids of `text` and the bytes of text that each stands for, two ``(n,)`` int64 arrays.

        The counts sum to the bytes of `text` in UTF-8, whatever the tokenizer does to it.
        """
        ids, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for new_ids, new_counts in self.encode_pieces(text):
            ids.append(new_ids)
            counts.append(new_counts)
        return np.concatenate(ids), np.concatenate(counts)

    def encode_pieces(self, text: str) -> Iterator[tuple[Ids, Ids]]:
        """The same as `encode_counted` in stretches, so that memory does not grow with the text."""
        if self.kind == "bytes":
            for start in range(0, len(text), _PIECE):
                raw = np.frombuffer(text[start : start + _PIECE].encode("utf-8"), dtype=np.uint8).astype(
                    np.int64
                )
                yield raw, np.ones_like(raw)
        elif self.byte_table is not None:
            for few in _batched(pieces(text), _PIECES_AT_ONCE):
                for encoding in self.inner.encode_batch_fast(few, add_special_tokens=False):
                    ids = np.asarray(encoding.ids, dtype=np.int64)
                    yield ids, self.byte_table[ids]
        elif text:
            # A tokenizer that normalises or adds a prefix must see the whole document.
            encoding = self.inner.encode(text, add_special_tokens=False)
            yield np.asarray(encoding.ids, dtype=np.int64), _counts_from_offsets(text, encoding.offsets)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens stand for nothing."""
        text: str = self.inner.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def to_json(self) -> str:
        """The ``tokenizer.json`` as text."""
        text: str = self.inner.to_str(pretty=False)
        return text


def train_bpe(texts: Iterable[str], vocabulary: int) -> TextTokenizer:
    """Byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) learned from `texts`.

    Parameters
    ----------
    texts : iterable of str
        The training part, and nothing else.
    vocabulary : int
        Entries wanted, at least 257 (all bytes and the end-of-document token). Fewer come out where the text
        has no more pairs to join.

    Returns
    -------
    TextTokenizer
        Deterministic: the same texts and size give the same file, byte for byte. Any text comes back exactly.
    """
    if vocabulary < 257:
        raise ConfigError(
            f"vocabulary must be at least 257 (256 bytes and the end-of-document token); got {vocabulary}; "
            "for less use tokenizer 'bytes'"
        )
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(_byte_characters()),
        show_progress=False,
    )
    inner.train_from_iterator(_for_training(texts), trainer)
    return _wrap(inner, "bpe", "the trained tokenizer")


def bytes_tokenizer() -> TextTokenizer:
    """A tokenizer whose ids are the bytes of UTF-8 (0 to 255) and 256 for the end of a document."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END_OF_DOCUMENT])
    return _wrap(inner, "bytes", "the byte tokenizer")


def load_tokenizer(folder: str | Path) -> TextTokenizer:
    """The tokenizer of a folder in Hugging Face format (or of a ``tokenizer.json`` itself).

    Only JSON is read, never code. The end-of-document token is ``eos_token`` of ``tokenizer_config.json``
    where that file names one that exists, else the first of the usual names that the vocabulary holds.
    """
    path = Path(folder)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"a tokenizer is 'bpe', 'bytes' or a folder that holds tokenizer.json; there is no {str(file)!r}"
        )
    try:
        inner = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(
            f"{file} must be a tokenizer.json that the tokenizers library reads; it says: {error}"
        ) from error
    wanted = None
    config = file.parent / "tokenizer_config.json"
    if config.is_file():
        try:
            entry = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise DataError(f"{config} must be a JSON object; it says: {error}") from error
        wanted = entry.get("content") if isinstance(entry, dict) else entry
    return _wrap(inner, "folder", str(file), wanted)


def from_json(text: str, kind: str, end_of_document: int) -> TextTokenizer:
    """A tokenizer as a store keeps it."""
    inner = Tokenizer.from_str(text)
    return _wrap(inner, kind, "the stored tokenizer", inner.id_to_token(end_of_document))


def pieces(text: str, longest: int = _PIECE) -> Iterator[str]:
    """`text` in order, in pieces of at most `longest` characters, cut where byte-level tokens end anyway.

    The cut falls before a space that follows something else than white space: there the pre-tokenizers of
    GPT-2 and of its children always begin a new word, so the tokens are those of the whole text. Only where
    there is no such place in the second half of a piece is it cut at its end.
    """
    start, end = 0, len(text)
    while end - start > longest:
        cut = start + longest
        place = cut
        while True:
            place = text.rfind(" ", start + longest // 2, place)
            if place <= start:
                break
            if not text[place - 1].isspace():
                cut = place
                break
        yield text[start:cut]
        start = cut
    if start < end:
        yield text[start:]


def _batched(items: Iterable[str], count: int) -> Iterator[list[str]]:
    """Lists of up to `count` items in order (itertools has it from Python 3.12)."""
    few: list[str] = []
    for item in items:
        few.append(item)
        if len(few) == count:
            yield few
            few = []
    if few:
        yield few


def _for_training(texts: Iterable[str]) -> Iterator[str]:
    """Pieces in which no word is very long.

    Learning pairs costs the length of a word for each pair found in it, so one endless word would never
    finish; joining across the 64th character of a word is the only thing lost.
    """
    for text in texts:
        for piece in pieces(text):
            start = 0
            for match in _LONG_WORDS.finditer(piece):
                yield piece[start : match.end()]
                start = match.end()
            if start < len(piece):
                yield piece[start:]


def _byte_characters() -> list[str]:
    """The character for each byte in GPT-2's byte level (Radford et al. 2019), in order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _wrap(inner: Tokenizer, kind: str, origin: str, end_name: str | None = None) -> TextTokenizer:
    """A `TextTokenizer` around `inner`, its end-of-document token found and its bytes counted."""
    inner.no_padding()
    inner.no_truncation()
    if isinstance(inner.model, models.BPE):
        inner.model.dropout = None  # a hidden generator: the same text would not give the same tokens
    inner.encode_special_tokens = True  # a text that spells a special token is still only text
    ids: dict[str, int] = inner.get_vocab(with_added_tokens=True)
    name = next((n for n in (end_name, *END_NAMES) if n is not None and n in ids), None)
    if name is None:
        raise DataError(
            f"{origin} must hold an end-of-document token; "
            f"none of {', '.join(END_NAMES)} is in its vocabulary; "
            "add one, or name it as eos_token in tokenizer_config.json"
        )
    vocabulary = max(ids.values()) + 1
    return TextTokenizer(kind, inner, vocabulary, ids[name], _byte_table(inner, ids, vocabulary))


def _byte_table(inner: Tokenizer, ids: dict[str, int], vocabulary: int) -> Ids | None:
    """Bytes of each token where the tokenizer works on bytes and leaves the text as it is, else None."""
    state: dict[str, Any] = json.loads(inner.to_str())
    before = state.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    levels = [step for step in steps if step.get("type") == "ByteLevel"]
    harmless = {"ByteLevel", "Split", "Digits"}
    if (
        state["model"]["type"] != "BPE"
        or state.get("normalizer") is not None
        or any(state["model"].get(affix) for affix in ("continuing_subword_prefix", "end_of_word_suffix"))
        or not levels
        or any(step.get("type") not in harmless or step.get("behavior") == "Removed" for step in steps)
        or any(level.get("add_prefix_space") for level in levels)
    ):
        return None
    alphabet = set(_byte_characters())
    if not alphabet <= set(ids):
        return None  # a byte without a token would be lost
    added = {token["id"]: token for token in state.get("added_tokens", [])}
    if any(not token["special"] for token in added.values()):
        return None  # such a token may swallow white space at its sides
    table = np.zeros(vocabulary, dtype=np.int64)
    for token, index in ids.items():
        if index not in added:
            table[index] = len(token)  # one character a byte
    return table


def _counts_from_offsets(text: str, offsets: list[tuple[int, int]]) -> Ids:
    """Bytes of `text` for each token from the characters it covers; what none covers goes to the next one.

    The last token takes the rest, so that the sum is always the bytes of the text.
    """
    widths = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (widths >= 0x80) + (widths >= 0x800) + (widths >= 0x10000)
    before = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    if not offsets:
        return np.empty(0, np.int64)
    ends = np.maximum.accumulate(np.asarray([end for _, end in offsets], dtype=np.int64))
    ends[-1] = len(text)
    return np.diff(before[ends], prepend=0)
