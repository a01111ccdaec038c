"""Documents and the corpus that they make: what was read, before any split and any token.

A document is held as UTF-8 (one byte a character for most of the world's scarce texts, where `str` may take
four). This module knows nothing of files and nothing of tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from twodice.errors import DataError


@dataclass(frozen=True)
class Part:
    """A stretch of a completion record: its text, and whether the loss is taken on it.

    A counted part ends with an end-of-document token, which is counted as well: so the model learns to stop.
    """

    data: bytes
    counted: bool


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes
    ----------
    name : str
        Where it came from, for messages.
    data : bytes
        Its text in UTF-8, without byte order mark, lines ended by ``\\n``.
    parts : tuple of Part or None
        For prompt and completion or messages, the stretches that `data` is joined from; None for plain text.
    """

    name: str
    data: bytes
    parts: tuple[Part, ...] | None = None

    @property
    def text(self) -> str:
        """The text."""
        return self.data.decode("utf-8")

    @cached_property
    def digest(self) -> bytes:
        """16 bytes of BLAKE2b over the text: equal for the same text, wherever it came from."""
        return hashlib.blake2b(self.data, digest_size=16).digest()

    @cached_property
    def full_digest(self) -> bytes:
        """The same over text *and* what is counted: what the tokens of a store depend on."""
        hasher = hashlib.blake2b(self.digest, digest_size=16)
        for part in self.parts if self.parts is not None else ():
            hasher.update(bytes([part.counted]) + len(part.data).to_bytes(8, "little"))
        return hasher.digest()


@dataclass(frozen=True)
class Corpus:
    """All documents that were asked for, and what was noticed while they were read.

    Attributes
    ----------
    documents : tuple of Document
        In the order of the sources (folders by path, topics by name, records by line).
    sources : tuple of str
        As they were given.
    notices : tuple of str
        Sentences to show: files that were skipped, line ends that were changed.
    entropy_nats_per_byte : float or None
        True entropy rate of the source, where it is known.
    """

    documents: tuple[Document, ...]
    sources: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    entropy_nats_per_byte: float | None = None

    def __post_init__(self) -> None:
        if not self.documents:
            raise DataError("a corpus must hold at least one document; got none")
        kinds = {document.parts is None for document in self.documents}
        if len(kinds) > 1:
            plain = next(d.name for d in self.documents if d.parts is None)
            record = next(d.name for d in self.documents if d.parts is not None)
            raise DataError(
                "a corpus is either plain text or prompts with completions; "
                f"{plain} is plain and {record} is not: "
                "give one kind, or use --field to take one field of the records as plain text"
            )

    @classmethod
    def from_texts(cls, texts: Sequence[str], name: str = "text") -> Corpus:
        """A corpus of plain texts that are already in memory."""
        return cls(
            tuple(Document(f"{name} {i}", text.encode("utf-8")) for i, text in enumerate(texts)), (name,)
        )

    @property
    def completion_only(self) -> bool:
        """True where the loss is taken on completions only."""
        return self.documents[0].parts is not None

    @property
    def num_bytes(self) -> int:
        """Bytes of all texts in UTF-8."""
        return sum(len(document.data) for document in self.documents)
