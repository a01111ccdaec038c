"""From tokens to text while they come: whole characters only, and nothing that may still become a stop
string.

Knows tokenizers; knows no model and no draws. The text of a completion is what these streams emit, so that
text read piece by piece is the text by construction.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from typing import Any

#: Longest run of tokens that may wait for the rest of a character (a character has at most 4 bytes).
_LONGEST_WAIT = 8

#: Prompt tokens that a decoder sees before the first new one, so that it knows whether a word goes on.
_PROMPT_TAIL = 6


def byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in GPT-2's vocabularies (Radford et al. 2019, ``encoder.py``)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TokenBytes:
    """The bytes of each token of a byte-level tokenizer, special tokens as none."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._alphabet = byte_alphabet()
        self._special = frozenset(tokenizer.all_special_ids)
        # Written as they are, not in the alphabet; they may hold characters that are also in it.
        self._added = {id_: str(token) for id_, token in tokenizer.added_tokens_decoder.items()}
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._look_up(token)
        return found

    def _look_up(self, token: int) -> bytes:
        if token in self._special:
            return b""
        if token in self._added:
            return self._added[token].encode("utf-8", "replace")
        word = self._tokenizer.convert_ids_to_tokens(token)
        if word is None:  # a row of the model's embedding that no token uses
            return b""
        return bytes(self._alphabet[character] for character in word)


class Detokenizer:
    """Makes a `TextStream` for each completion; one for each tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._bytes = TokenBytes(tokenizer) if _is_byte_level(tokenizer) else None

    def stream(self, prompt: Sequence[int], stop: Sequence[str] = ()) -> TextStream:
        """A stream of the text behind `prompt` (token ids)."""
        words = _ByteWords(self._bytes) if self._bytes is not None else _WindowWords(self.tokenizer, prompt)
        return TextStream(words, stop)

    def text_of(self, token: int) -> str:
        """One token as text, for people; parts of characters stand as U+FFFD."""
        if self._bytes is not None:
            return self._bytes[token].decode("utf-8", "replace")
        return str(self.tokenizer.decode([token]))


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether the tokens are bytes written in GPT-2's alphabet, and nothing else is done when decoding."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    decoder = json.loads(backend.to_str()).get("decoder")
    return decoder is not None and decoder.get("type") == "ByteLevel"


class _ByteWords:
    """Exact: the bytes of the tokens through an incremental UTF-8 decoder."""

    def __init__(self, table: TokenBytes) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._table[token])

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowWords:
    """For any tokenizer: decodes a short window without and with the new token, and takes the difference."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_PROMPT_TAIL:])
        self._begin, self._read = 0, len(self._ids)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def push(self, token: int) -> str:
        self._ids.append(token)
        is_waiting = len(self._ids) - self._read <= _LONGEST_WAIT
        return self._take(keep_broken=is_waiting)

    def finish(self) -> str:
        return self._take(keep_broken=False)

    def _take(self, keep_broken: bool) -> str:
        before = self._decode(self._ids[self._begin : self._read])
        now = self._decode(self._ids[self._begin :])
        if (keep_broken and now.endswith("�")) or len(now) <= len(before):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return now[len(before) :]


class TextStream:
    """The text of one completion, piece by piece.

    Attributes
    ----------
    stopped
        Whether a stop string has come; nothing is emitted after it, nor the stop string itself.
    """

    def __init__(self, words: _ByteWords | _WindowWords, stop: Sequence[str]) -> None:
        self._words = words
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take the next token; return what is now certain to belong to the text, maybe nothing."""
        return self._release(self._words.push(token), is_last=False)

    def finish(self) -> str:
        """Return what was held back; no token comes any more."""
        return self._release(self._words.finish(), is_last=True)

    def _release(self, piece: str, is_last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        if self._stop:
            # The one that is complete first, as if the text came character by character.
            found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
            if found:
                self.stopped, self._held = True, ""
                return text[: min(found)[1]]
            keep = 0 if is_last else max(_overlap(text, stop) for stop in self._stop)
            self._held = text[len(text) - keep :]
            return text[: len(text) - keep]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - size :]):
            return size
    return 0
