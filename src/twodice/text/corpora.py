"""Sources to documents: text files, folders, JSONL, Parquet, the embedded language reference, Markov source.

What is read is checked here: that it is text, that it is UTF-8, that there is some. Nothing is skipped
without a notice. This module knows nothing of splits and tokens.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from twodice.errors import DataError, nearest
from twodice.text.documents import Corpus, Document
from twodice.text.markov import MarkovSource
from twodice.text.records import read_jsonl, read_parquet

NAMED_SOURCES = ("python-docs", "markov")
#: What a folder is searched for. A file that is named itself is read whatever its ending is.
TEXT_SUFFIXES = frozenset(
    ".txt .text .md .markdown .rst .org .adoc .tex .html .htm .xml .srt "
    ".py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .kt .scala "
    ".js .jsx .ts .tsx .rb .php .swift .lua .r .jl .hs .ml "
    ".sh .sql .css .toml .yaml .yml .ini .cfg".split()
)
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
PARQUET_SUFFIXES = frozenset({".parquet"})
_PIECE = 1 << 24


def load_documents(sources: Sequence[str | Path], *, field: str = "text") -> Corpus:
    """Read every source into one corpus.

    Parameters
    ----------
    sources : sequence of str or Path
        Each a text file, a folder (searched recursively, in order of the paths; hidden files and folders,
        links to folders and endings outside `TEXT_SUFFIXES`, ``.jsonl`` and ``.parquet`` are skipped, which a
        notice counts), a ``.jsonl`` or ``.parquet`` file, ``python-docs`` (the language reference inside
        every CPython, one topic a document, by name), ``markov`` or
        ``markov:symbols=..,bytes=..,seed=..,order=..``.
    field : str
        Field (JSONL) or column (Parquet) that holds the text of a record. JSONL records without it that hold
        ``prompt`` and ``completion``, or ``messages``, are read as completion data: the loss is taken on what
        the model would write.

    Returns
    -------
    Corpus
        A byte order mark is dropped and ``\\r\\n`` becomes ``\\n``; the notices say where.

    Raises
    ------
    DataError
        A source that is missing, empty, unreadable, binary, not UTF-8, or records that do not hold what they
        should.
    """
    if isinstance(sources, str | Path):
        sources = [sources]
    if not sources:
        raise DataError(
            "at least one source of text must be given: a file, a folder or one of "
            f"{', '.join(NAMED_SOURCES)}; got none"
        )
    documents: list[Document] = []
    notices: list[str] = []
    entropies: list[float | None] = []
    for source in sources:
        name = str(source)
        before = len(documents)
        entropy = None
        if name == "python-docs":
            documents += python_docs()
        elif name == "markov" or name.startswith("markov:"):
            drawn = MarkovSource.parse(name).corpus(name)
            documents += drawn.documents
            entropy = drawn.entropy_nats_per_byte
        else:
            path = _path_of(name)
            if path.is_dir():
                _read_folder(path, field, documents, notices)
            else:
                _read_file(path, field, documents, notices)
        if len(documents) == before:
            raise DataError(f"{name} must hold text; every file in it is empty")
        entropies.append(entropy)
    known = entropies[0] if len(entropies) == 1 else None
    return Corpus(tuple(documents), tuple(str(s) for s in sources), tuple(notices), known)


def _path_of(name: str) -> Path:
    """The path that a person typed; an empty one is a variable that was not set, never this folder."""
    if not name or "\0" in name:
        raise DataError(
            f"a source must be a file, a folder or one of {', '.join(NAMED_SOURCES)}; got {name!r}"
            + ("" if name else ": write . for this folder")
        )
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise DataError(f"{name} must begin with a user who has a home here, or with ./") from error


def python_docs() -> list[Document]:
    """The topics of the language reference that ships inside CPython, sorted by name."""
    from pydoc_data.topics import topics

    return [Document(f"python-docs {name}", topics[name].encode("utf-8")) for name in sorted(topics)]


def read_text(path: Path) -> tuple[bytes, list[str]]:
    """The text of one file as checked UTF-8, and notices.

    Raises
    ------
    DataError
        Unreadable; binary (a zero byte, or another encoding's byte order mark); invalid UTF-8, with the
        byte's place.
    """
    notices: list[str] = []
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(_missing(path)) from error
    except OSError as error:
        raise DataError(f"{path} must be a readable file; the system says: {error.strerror}") from error
    start = 0
    if data.startswith(codecs.BOM_UTF8):
        start = len(codecs.BOM_UTF8)
        notices.append(f"{path}: a byte order mark was dropped")
    elif data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(
            f"{path} must be UTF-8; it begins like UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`"
        )
    zero = data.find(b"\0")
    if zero >= 0:
        raise DataError(f"{path} must be text; it is binary (a zero byte at byte {zero})")
    check_utf8(data, str(path))
    if start:
        data = data[start:]
    if b"\r\n" in data:
        ends = data.count(b"\r\n")
        notices.append(f"{path}: {ends:,} line ends \\r\\n became \\n")
        data = data.replace(b"\r\n", b"\n")
    return data, notices


def check_utf8(data: bytes, name: str) -> None:
    """Raise `DataError` with the place of the first byte that is not UTF-8; in pieces, to save memory."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(data), _PIECE) or (0,):
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(data[start : start + _PIECE], final=start + _PIECE >= len(data))
        except UnicodeDecodeError as error:
            place = start - pending + error.start
            line = data.count(b"\n", 0, place) + 1
            raise DataError(
                f"{name} must be UTF-8; byte {place} (line {line}) is 0x{data[place]:02x}: {error.reason}; "
                "convert it, for instance with `iconv -f LATIN1 -t UTF-8`, or leave it out"
            ) from error


def _read_file(path: Path, field: str, documents: list[Document], notices: list[str]) -> None:
    """One file of any kind that is read."""
    suffix = path.suffix.lower()
    if suffix in PARQUET_SUFFIXES:
        if not path.is_file():
            raise DataError(_missing(path))
        _keep_full(path, read_parquet(path, field), documents, notices)
        return
    data, said = read_text(path)
    if not data.strip():
        raise DataError(f"{path} must hold text; it is empty" + (" but for white space" if data else ""))
    notices += said
    if suffix in JSONL_SUFFIXES:
        _keep_full(path, read_jsonl(path, data, field), documents, notices)
    else:
        documents.append(Document(str(path), data))


def _keep_full(path: Path, found: Iterable[Document], documents: list[Document], notices: list[str]) -> None:
    """Take the documents that are not empty; data sets hold empty records by habit, so those are counted."""
    empty = 0
    for document in found:
        if document.data:
            documents.append(document)
        else:
            empty += 1
    if empty:
        notices.append(f"{path}: {empty:,} records with empty text skipped")


def _read_folder(folder: Path, field: str, documents: list[Document], notices: list[str]) -> None:
    """Every text under `folder`, in order of the paths."""
    wanted = TEXT_SUFFIXES | JSONL_SUFFIXES | PARQUET_SUFFIXES
    files: list[Path] = []
    hidden = links = broken = others = empty = 0
    endings: set[str] = set()

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{error.filename} must be a readable folder; the system says: {error.strerror}"
        ) from error

    for root, folders, names in os.walk(folder, onerror=refuse):
        hidden += sum(name.startswith(".") for name in folders)
        links += sum((Path(root) / name).is_symlink() for name in folders)
        folders[:] = sorted(n for n in folders if not n.startswith(".") and not (Path(root) / n).is_symlink())
        for name in names:
            path = Path(root) / name
            if name.startswith("."):
                hidden += 1
            elif path.suffix.lower() in wanted:
                files.append(path)
            else:
                others += 1
                endings.add(path.suffix.lower() or "no ending")
    for path in sorted(files, key=lambda p: p.relative_to(folder).parts):
        # An empty file among others is a habit (__init__.py), not a mistake; so is a link to what has gone.
        if path.is_symlink() and not path.exists():
            broken += 1
        elif path.stat().st_size == 0:
            empty += 1
        else:
            _read_file(path, field, documents, notices)
    for count, what in (
        (hidden, "hidden files or folders"),
        (links, "links to folders"),
        (broken, "links that lead nowhere"),
        (empty, "empty files"),
        (
            others,
            f"files with other endings ({', '.join(sorted(endings)[:6])}{', ...' * (len(endings) > 6)})",
        ),
    ):
        if count:
            notices.append(f"{folder}: {count:,} {what} skipped")
    if not files:
        raise DataError(
            f"{folder} must hold text files; it holds none "
            f"({others} files with other endings, {hidden} hidden): "
            "name a file itself to read it whatever its ending is"
        )


def _missing(path: Path) -> str:
    """What to say of a path that is not there."""
    name = str(path)
    source = name.partition(":")[0]
    hint = nearest(source, NAMED_SOURCES)
    if not hint and path.parent.is_dir():
        close = nearest(path.name, [entry.name for entry in path.parent.iterdir()])
        hint = close.replace("'", f"'{path.parent}/", 1) if close and str(path.parent) != "." else close
    return (
        f"a source must be a file, a folder or one of {', '.join(NAMED_SOURCES)}; there is no {name!r}{hint}"
    )
