"""The keyed split into train, validation A and validation B: what is learned from and what is only measured.

Validation A chooses (the best step), validation B reports. Documents with the same text always land on the
same side. This module knows nothing of files and nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twodice.errors import ConfigError
from twodice.random.keys import Key
from twodice.text.documents import Corpus, Document

SPLITS = ("train", "validation_a", "validation_b")
SHARES = (0.8, 0.1, 0.1)
#: Fewer distinct documents than this, or one larger than a quarter of the text, and blocks are split instead.
FEWEST_DOCUMENTS = 20
LARGEST_SHARE = 0.25
_SMALLEST_BLOCK, _LARGEST_BLOCK = 4096, 1 << 20


@dataclass(frozen=True)
class Split:
    """The three parts of a corpus.

    Attributes
    ----------
    parts : dict of str to tuple of Document
        Under the names in `SPLITS`; documents (or blocks) in the order of the corpus.
    by_block : bool
        True where documents were cut into blocks first.
    reason : str
        How the text was split, in words.
    """

    parts: dict[str, tuple[Document, ...]]
    by_block: bool
    reason: str


def split_corpus(
    corpus: Corpus, key: Key, *, shares: Sequence[float] = SHARES, train_bytes: int | None = None
) -> Split:
    """Split `corpus` into train, validation A and validation B.

    Parameters
    ----------
    corpus : Corpus
        What was read.
    key : Key
        Key of the split: the same text and key give the same parts, whatever the files are called.
    shares : sequence of float
        Shares of the three parts by bytes; positive, with sum 1.
    train_bytes : int, optional
        Keep only a keyed choice of this many bytes of the training part (the last document is cut). The
        validation parts stay as they are, so scarce text is still measured on enough text; a smaller choice
        is part of a larger one.

    Returns
    -------
    Split
        No text (document or block) is in two parts.

    Randomness
    ----------
    Documents are ordered by ``key.child("split", digest of the text)`` and dealt in that order to the part
    that is then the least full in proportion to its share.
    """
    if len(shares) != 3 or any(not 0 < share < 1 for share in shares) or abs(sum(shares) - 1) > 1e-9:
        raise ConfigError(f"shares must be three numbers in (0, 1) with sum 1; got {list(shares)}")
    if train_bytes is not None and train_bytes < 1:
        raise ConfigError(f"train_bytes must be at least 1; got {train_bytes}")
    units, by_block, reason = _units(corpus)
    groups: dict[bytes, list[int]] = {}
    for place, unit in enumerate(units):
        groups.setdefault(unit.digest, []).append(place)
    order = sorted(groups, key=lambda digest: (key.child("split", digest.hex()).value, digest))
    filled = [0, 0, 0]
    chosen: list[list[int]] = [[], [], []]
    for digest in order:
        size = sum(len(units[place].data) for place in groups[digest])
        side = min(range(3), key=lambda s: ((filled[s] + size) / shares[s], s))
        filled[side] += size
        chosen[side] += groups[digest]
    copies = len(units) - len(groups)
    if copies:
        many = "1 exact copy stays" if copies == 1 else f"{copies:,} exact copies stay"
        reason += f"; {many} on the side of the original"
    parts = {
        name: tuple(units[place] for place in sorted(places))
        for name, places in zip(SPLITS, chosen, strict=True)
    }
    if train_bytes is not None and train_bytes < filled[0]:
        taken = _take([units[place] for place in chosen[0]], train_bytes)
        kept = dict(zip(chosen[0], taken, strict=False))
        parts["train"] = tuple(kept[place] for place in sorted(kept))
        size = sum(len(document.data) for document in parts["train"])
        reason += f"; {size:,} of {filled[0]:,} training bytes kept, by key"
    return Split(parts, by_block, reason)


def _units(corpus: Corpus) -> tuple[list[Document], bool, str]:
    """What is dealt: the documents, or blocks of them where documents are too few; whether; and why."""
    documents = list(corpus.documents)
    if corpus.completion_only:
        return documents, False, f"split by record: {len(documents):,} records"
    total = corpus.num_bytes
    distinct = len({document.digest for document in documents})
    largest = max(len(document.data) for document in documents)
    few = distinct < FEWEST_DOCUMENTS
    if not few and largest <= LARGEST_SHARE * total:
        return documents, False, f"split by document: {len(documents):,} documents"
    size = max(1, min(max(total // 50, _SMALLEST_BLOCK), _LARGEST_BLOCK, total // 10))
    blocks = [block for document in documents for block in blocks_of(document, size)]
    why = (
        f"{len(documents):,} document{'s are' if len(documents) > 1 else ' is'} too few"
        if few
        else f"one document is {largest / total:.0%} of the text"
    )
    return blocks, True, f"split by block: {why}, so {len(blocks):,} blocks of about {size:,} bytes"


def blocks_of(document: Document, size: int) -> list[Document]:
    """`document` in blocks of about `size` bytes, cut after a paragraph, a line, a word or a character."""
    data = document.data
    if len(data) < 2 * size:
        return [document]
    blocks, start = [], 0
    while start < len(data):
        end = len(data) if len(data) - start < 2 * size else cut_before(data, start, start + size)
        blocks.append(Document(f"{document.name}, bytes {start} to {end}", data[start:end]))
        start = end
    return blocks


def cut_before(data: bytes, start: int, end: int) -> int:
    """A good place to cut `data` at `end` or up to half the way back to `start`; never inside a character."""
    if end >= len(data):
        return len(data)
    half = start + (end - start) // 2
    for mark in (b"\n\n", b"\n", b" "):
        place = data.rfind(mark, half, end)
        if place > start:
            return place + len(mark)
    while end > start and data[end] & 0xC0 == 0x80:
        end -= 1
    if end == start:  # `size` is less than one character
        end = start + 1
        while end < len(data) and data[end] & 0xC0 == 0x80:
            end += 1
    return end


def _take(documents: list[Document], wanted: int) -> list[Document]:
    """The first documents up to `wanted` bytes, the last one cut (a record is kept or left, never cut)."""
    taken: list[Document] = []
    left = wanted
    for document in documents:
        if len(document.data) <= left:
            taken.append(document)
            left -= len(document.data)
            continue
        if document.parts is not None:
            if not taken:
                taken.append(document)
        elif left > 0:
            end = cut_before(document.data, 0, left)
            taken.append(Document(f"{document.name}, its first {end} bytes", document.data[:end]))
        break
    return taken
