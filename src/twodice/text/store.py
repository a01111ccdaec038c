"""The token store: text becomes tokens once, in memory-mapped files with a manifest, and is then only read.

A store is a folder: ``manifest.json`` (written last, with the SHA-256 of every other file),
``tokenizer.json``, and for each split its tokens, its text and where its documents begin. It is written
beside its place and renamed into it, so a store is there whole or not at all, and any number of processes may
read it. This module knows nothing of models; n windows, context positions.
"""

from __future__ import annotations

import fcntl
import glob
import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twodice.errors import ConfigError, DataError, nearest
from twodice.random.keys import Key
from twodice.text.documents import Corpus
from twodice.text.manifest import MANIFEST, check_file, map_file, read_manifest
from twodice.text.split import SHARES, SPLITS
from twodice.text.tokenizer import TextTokenizer, from_json
from twodice.text.writing import settings_of, write_store

TOKENIZER = "tokenizer.json"
_FRESH = 60.0  # seconds

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SplitTokens:
    """The tokens of one split, memory-mapped.

    Plain text is one stream: documents in order, each followed by the end-of-document token; window i is the
    tokens ``i * context`` to ``(i + 1) * context`` inclusive, so that every token but the first is the target
    of exactly one window (a rest shorter than a window is left out). Records with completions are one window
    each: cut at ``context + 1`` tokens, or filled up on the right with the end-of-document token, where
    `loss_mask` is False. In a causal model what stands on the right changes nothing on its left, so no
    attention mask is needed.

    Attributes
    ----------
    name : str
        ``"train"``, ``"validation_a"`` or ``"validation_b"``.
    tokens : ndarray
        ``(num_tokens,)`` uint16 or uint32, read only.
    num_bytes : int
        Bytes of text that the tokens stand for.
    """

    name: str
    tokens: npt.NDArray[Any]
    num_bytes: int
    end_of_document: int
    folder: Path
    byte_table: Ids | None
    token_bytes: npt.NDArray[Any] | None
    counted: npt.NDArray[np.uint8] | None
    starts: Ids | None

    @property
    def num_tokens(self) -> int:
        """Tokens of the split, end-of-document tokens counted."""
        return len(self.tokens)

    @property
    def completion_only(self) -> bool:
        """True where windows are records and the loss is taken on completions."""
        return self.counted is not None

    def num_windows(self, context: int) -> int:
        """Windows of `context` targets, 0 where the text is too short."""
        _check_context(context)
        if self.counted is not None:
            return len(self._usable(context))
        return max(0, len(self.tokens) - 1) // context

    def windows(self, indices: Any, context: int) -> Ids:
        """Tokens of the windows `indices`, ``(n,)`` integers: ``(n, context + 1)`` int64.

        Columns ``:-1`` are what a model reads, columns ``1:`` what it shall say.
        """
        places, inside = self._places(indices, context)
        out = self.tokens[places].astype(np.int64)
        return out if inside is None else np.where(inside, out, self.end_of_document)

    def loss_mask(self, indices: Any, context: int) -> Mask | None:
        """Which targets count, ``(n, context)`` bool, as ``windows(...)[:, 1:]``; None for plain text."""
        if self.counted is None:
            return None
        places, inside = self._places(indices, context)
        mask: Mask = (self.counted[places] != 0) & inside
        return mask[:, 1:]

    def bytes_of_targets(self, indices: Any, context: int) -> Ids:
        """Bytes of text that the counted targets of each window stand for: ``(n,)`` int64.

        End-of-document tokens and targets outside `loss_mask` stand for none. Bits per byte are the sum of
        the targets' losses in nats, over this sum, over ln 2.
        """
        places, inside = self._places(indices, context)
        places = places[:, 1:]
        if self.token_bytes is not None:
            counts = self.token_bytes[places].astype(np.int64)
        else:
            assert self.byte_table is not None
            counts = self.byte_table[self.tokens[places]]
        if self.counted is not None and inside is not None:
            counts = counts * ((self.counted[places] != 0) & inside[:, 1:])
        return np.asarray(counts.sum(axis=1), dtype=np.int64)

    def num_truncated(self, context: int) -> int:
        """Records that are longer than a window and lose their end."""
        _check_context(context)
        return 0 if self.starts is None else int((np.diff(self.starts) > context + 1).sum())

    def num_without_target(self, context: int) -> int:
        """Records left out because their completion begins after the window."""
        return 0 if self.starts is None else len(self.starts) - 1 - self.num_windows(context)

    def starts_of_windows(self, indices: Any, context: int) -> Ids:
        """Place in `tokens` of the first token of each window: ``(n,)`` int64."""
        return self._places(indices, context)[0][:, 0]

    @cached_property
    def _text(self) -> npt.NDArray[np.uint8]:
        return map_file(self.folder / f"{self.name}.text.bin", np.dtype(np.uint8))

    @cached_property
    def document_bytes(self) -> Ids:
        """Where each document begins in the text of the split, and its end: ``(documents + 1,)`` int64."""
        return map_file(self.folder / f"{self.name}.documents.bin", np.dtype(np.int64))

    def texts(self) -> list[str]:
        """The text of each document (or block) of the split."""
        edges = self.document_bytes.tolist()
        return [self._text[a:b].tobytes().decode("utf-8") for a, b in pairwise(edges)]

    def _usable(self, context: int) -> Ids:
        """Records in which at least one counted target lies within a window."""
        cache: dict[int, Ids] = self.__dict__.setdefault("_usable_cache", {})
        if context not in cache:
            assert self.counted is not None and self.starts is not None
            before = np.concatenate([[0], np.cumsum(self.counted, dtype=np.int64)])
            first = self.starts[:-1] + 1
            last = np.minimum(self.starts[1:], self.starts[:-1] + context + 1)
            cache[context] = np.flatnonzero(before[np.maximum(last, first)] - before[first] > 0)
        return cache[context]

    def _places(self, indices: Any, context: int) -> tuple[Ids, Mask | None]:
        """Where the tokens of windows stand, ``(n, context + 1)``; of records also which are there."""
        total = self.num_windows(context)
        chosen = np.asarray(indices, dtype=np.int64).reshape(-1)
        if chosen.size and not (0 <= chosen.min() and chosen.max() < total):
            raise ConfigError(
                f"windows of {self.name} must be in [0, {total}) at context {context}; "
                f"got {chosen.min()} to {chosen.max()}"
            )
        steps = np.arange(context + 1, dtype=np.int64)
        if self.starts is None:
            return chosen[:, None] * context + steps, None
        record = self._usable(context)[chosen]
        lengths = self.starts[record + 1] - self.starts[record]
        inside = steps < lengths[:, None]
        return np.where(inside, self.starts[record][:, None] + steps, 0), inside


@dataclass(frozen=True)
class TokenStore:
    """A finished store.

    Attributes
    ----------
    path : Path
        Its folder.
    manifest : dict
        What ``manifest.json`` holds.
    splits : mapping of str to SplitTokens
        ``train``, ``validation_a``, ``validation_b``.
    """

    path: Path
    manifest: Mapping[str, Any]
    splits: Mapping[str, SplitTokens]

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> TokenStore:
        """Open a store, checking sizes and (unless `verify` is False) the SHA-256 of every file.

        Raises
        ------
        DataError
            No store there, another format, or a file that is missing, of another size or changed.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        for name, entry in manifest["files"].items():
            check_file(folder / name, entry["bytes"], entry["sha256"] if verify else None)
        tokenizer = _tokenizer(folder, manifest)
        kind = np.dtype(manifest["dtype"])
        records = manifest["completion_only"]
        splits = {}
        for name in SPLITS:
            own_bytes = f"{name}.token_bytes.bin" in manifest["files"]
            splits[name] = SplitTokens(
                name=name,
                tokens=map_file(folder / f"{name}.tokens.bin", kind),
                num_bytes=manifest["splits"][name]["bytes"],
                end_of_document=tokenizer.end_of_document,
                folder=folder,
                byte_table=None if own_bytes else tokenizer.byte_table,
                token_bytes=map_file(folder / f"{name}.token_bytes.bin", np.dtype(np.uint32))
                if own_bytes
                else None,
                counted=map_file(folder / f"{name}.counted.bin", np.dtype(np.uint8)) if records else None,
                starts=map_file(folder / f"{name}.starts.bin", np.dtype(np.int64)) if records else None,
            )
        return cls(folder, manifest, splits)

    @property
    def vocabulary(self) -> int:
        """Largest token id + 1: the rows that an embedding needs."""
        return int(self.manifest["vocabulary"])

    @property
    def end_of_document(self) -> int:
        """Id of the token that ends a document."""
        return int(self.manifest["end_of_document"])

    @property
    def tokenizer_file(self) -> Path:
        """The ``tokenizer.json``."""
        return self.path / TOKENIZER

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer that the store was made with."""
        return _tokenizer(self.path, self.manifest)

    @property
    def crosses_documents(self) -> bool:
        """True where a window may hold the end of one document and the beginning of the next."""
        return bool(self.manifest["crosses_documents"])

    @property
    def completion_only(self) -> bool:
        """True where the loss is taken on completions only."""
        return bool(self.manifest["completion_only"])

    @property
    def digest(self) -> str:
        """Digest of the inputs and settings, hexadecimal: equal digests mean equal tokens."""
        return str(self.manifest["digest"])

    @property
    def entropy_nats_per_byte(self) -> float | None:
        """True entropy rate of the text where it is known, in nats a byte."""
        value = self.manifest["entropy_nats_per_byte"]
        return None if value is None else float(value)

    @property
    def entropy_nats_per_token(self) -> float | None:
        """The same a token, where each token is a byte, else None. End-of-document tokens are not in it."""
        return self.entropy_nats_per_byte if self.manifest["tokenizer"] == "bytes" else None

    @property
    def notices(self) -> list[str]:
        """Sentences to show: how the text was read, split and cut into tokens."""
        return list(self.manifest["notices"])

    def notices_at(self, context: int) -> list[str]:
        """`notices`, and what windows of `context` do to long records."""
        said = self.notices
        records = sum(len(part.document_bytes) - 1 for part in self.splits.values())
        cut = sum(part.num_truncated(context) for part in self.splits.values())
        out = sum(part.num_without_target(context) for part in self.splits.values())
        if cut:
            said.append(
                f"{cut:,} of {records:,} records are longer than {context + 1} tokens and were cut there"
            )
        if out:
            said.append(f"{out:,} of {records:,} records have no completion within it and are left out")
        return said

    def texts(self, split: str) -> list[str]:
        """The text of each document (or block) of a split."""
        if split not in self.splits:
            raise ConfigError(f"a split is one of {', '.join(SPLITS)}; got {split!r}{nearest(split, SPLITS)}")
        return self.splits[split].texts()


def prepare(
    corpus: Corpus,
    *,
    tokenizer: str | Path | None = None,
    vocabulary: int | None = None,
    context: int,
    key: Key,
    out: str | Path,
    train_bytes: int | None = None,
    share: float | None = None,
) -> TokenStore:
    """Split `corpus`, learn or load the tokenizer, and store the tokens in `out`; or find them there.

    Parameters
    ----------
    corpus : Corpus
        From `load_documents`.
    tokenizer : str or Path, optional
        ``"bpe"`` (learned from the training part only), ``"bytes"``, or a folder in Hugging Face format. None
        means ``"bytes"`` for the Markov source, whose entropy is known a byte, and ``"bpe"`` otherwise.
    vocabulary : int, optional
        Entries of the BPE, at least 257. None means `vocabulary_for` the training bytes.
    context : int
        Positions of a window, at least 1: each split must hold one window at least.
    key : Key
        Key of the split.
    out : Path
        The folder of the store itself. A finished store of the same texts and settings is opened, not made
        again; one of other texts or settings is an error that names them.
    train_bytes : int, optional
        Keep a keyed choice of this many bytes of the training part: the case of scarce text. Validation stays
        whole.
    share : float, optional
        The same as a share of the training part, in (0, 1]. At most one of the two.

    Returns
    -------
    TokenStore
        Its `notices` say how the text was read, split and cut into tokens.

    Raises
    ------
    DataError
        Too little text for one window in some split; another store in `out`.
    ConfigError
        A setting out of its range.
    """
    _check_context(context)
    folder = Path(out)
    settings = settings_of(corpus, tokenizer, vocabulary, key, train_bytes, share)
    if (folder / MANIFEST).is_file():
        store = TokenStore.open(folder)
        _check_same(folder, store.manifest["settings"], settings)
    else:
        if folder.is_dir() and any(folder.iterdir()):
            raise DataError(
                f"{folder} must be empty or a token store; it holds other files: choose another folder"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        side = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        held = os.open(side, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            write_store(side, corpus, settings, key, tokenizer)
            _check_windows(TokenStore.open(side, verify=False), context)
            side.chmod(0o777 & ~_umask())
            _rename(side, folder)
        finally:
            os.close(held)
            shutil.rmtree(side, ignore_errors=True)
        store = TokenStore.open(folder, verify=False)
        _check_same(folder, store.manifest["settings"], settings)
    _check_windows(store, context)
    return store


def _sweep(folder: Path) -> None:
    """Remove what a killed process left beside `folder`: an unfinished store that nobody holds any more."""
    for side in folder.parent.glob(f".{glob.escape(folder.name)}-*"):
        try:
            if time.time() - side.stat().st_mtime < _FRESH:
                continue  # perhaps made and not yet locked
            held = os.open(side, os.O_RDONLY)
        except OSError:
            continue  # another process was faster
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(side, ignore_errors=True)
        except OSError:
            pass  # in use
        finally:
            os.close(held)


def _rename(side: Path, folder: Path) -> None:
    """Put the finished store in its place; where another process was first, its store is the one."""
    try:
        os.rename(side, folder)
    except OSError:
        if not (folder / MANIFEST).is_file():
            raise


def _umask() -> int:
    """The process's mask of permissions; mkdtemp makes folders that only their owner can read."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _check_same(folder: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    different = [
        f"{name} {there.get(name)!r} there, {wanted[name]!r} wanted"
        for name in wanted
        if there.get(name) != wanted[name]
    ]
    if different:
        raise DataError(
            f"{folder} must hold the same texts and settings to be used again; {'; '.join(different)}: "
            "choose another folder or delete this one"
        )


def _check_windows(store: TokenStore, context: int) -> None:
    """Each split must hold at least one window."""
    for name, split in store.splits.items():
        if split.num_windows(context) > 0:
            continue
        what = name.replace("_a", " A").replace("_b", " B")
        if split.completion_only:
            raise DataError(
                f"every split must hold at least one record whose completion begins within {context} tokens; "
                f"{what} holds none ({len(split.document_bytes) - 1} records): "
                "give more records, or a longer context"
            )
        total = sum(part.num_bytes for part in store.splits.values())
        tokens = sum(part.num_tokens for part in store.splits.values())
        # Half as much again as the share of a validation part says: documents do not divide evenly.
        needed = math.ceil(1.5 * (context + 1) * total / tokens / SHARES[1])
        remedy = f"about {needed:,} bytes of text would do"
        if needed <= total:
            remedy = (
                "its documents or blocks are too uneven or copies of one another: give more text that differs"
            )
        shorter = min(max(0, part.num_tokens - 1) for part in store.splits.values())
        raise DataError(
            f"every split must hold at least one window of {context + 1} tokens "
            f"(context {context} and the one after); "
            f"{what} holds {split.num_tokens} from {split.num_bytes:,} of {total:,} bytes: {remedy}"
            + (f", or a context of at most {shorter}" if shorter else "")
        )


def _tokenizer(folder: Path, manifest: Mapping[str, Any]) -> TextTokenizer:
    text = (folder / TOKENIZER).read_text(encoding="utf-8")
    return from_json(text, manifest["tokenizer"], manifest["end_of_document"])


def _check_context(context: int) -> None:
    if context < 1:
        raise ConfigError(f"context must be at least 1; got {context}")
