"""Records to documents: JSONL and Parquet, plain text or prompt and completion or messages.

This module knows nothing of splits and tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from twodice.errors import DataError, nearest
from twodice.text.documents import Document, Part

ROLES = ("system", "developer", "user", "assistant", "tool")


def read_jsonl(path: Path, data: bytes, field: str) -> Iterator[Document]:
    """One document a line; empty lines are passed over.

    Parameters
    ----------
    path : Path
        For messages.
    data : bytes
        The file's content, checked UTF-8.
    field : str
        Field that holds the text. Where no record has it, ``prompt`` with ``completion``, or ``messages``,
        are read.

    Raises
    ------
    DataError
        A broken line, a missing or non-text field, empty messages: the line is named.
    """
    start, number = 0, 0
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        number += 1
        line = data[start:end]
        start = end + 1
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except RecursionError as error:
            raise DataError(f"{where} must be one JSON object; it is broken: nested too deep") from error
        except ValueError as error:
            # Python refuses whole numbers of more than some thousand digits with a plain ValueError.
            what = (
                f"{error.msg} at column {error.colno}"
                if isinstance(error, json.JSONDecodeError)
                else "a number has too many digits"
            )
            raise DataError(f"{where} must be one JSON object; it is broken: {what}") from error
        if not isinstance(record, dict):
            raise DataError(f"{where} must be one JSON object; got {_kind(record)}")
        yield document_of(record, field, where)


def read_parquet(path: Path, field: str) -> Iterator[Document]:
    """One document a row, read row group by row group, only the column that is wanted."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = _columns(names, field)
            if columns is None:
                raise DataError(
                    f"{path} must have a column {field!r}; "
                    f"it has {', '.join(names) if names else 'none'}{nearest(field, names)}; "
                    "choose one with --field"
                )
            number = 0
            for batch in file.iter_batches(columns=columns, batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield document_of(row, field, f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} must be a readable Parquet file; pyarrow says: {error}") from error


def document_of(record: Mapping[str, Any], field: str, where: str) -> Document:
    """The document that `record` holds; `where` names it in errors."""
    if field in record:
        return Document(where, _text(record[field], field, where, empty=True))
    # Another field was asked for by name: then nothing else is taken in its place.
    columns = _columns(list(record), field)
    if columns == ["prompt", "completion"]:
        prompt = _text(record["prompt"], "prompt", where, empty=True)
        completion = _text(record["completion"], "completion", where)
        parts = [Part(prompt, False), Part(completion, True)]
    elif columns == ["messages"]:
        parts = _messages(record["messages"], where)
    else:
        there = ", ".join(record) or "nothing"
        raise DataError(
            f"{where} must have a field {field!r} (or prompt and completion, or messages); "
            f"it has {there}{nearest(field, record)}; choose one with --field"
        )
    return Document(where, b"".join(part.data for part in parts), tuple(part for part in parts if part.data))


def _columns(names: list[str], field: str) -> list[str] | None:
    """What is read of a record with these fields; None where it holds nothing to read."""
    if field in names:
        return [field]
    if field == "text" and {"prompt", "completion"} <= set(names):
        return ["prompt", "completion"]
    if field in ("text", "messages") and "messages" in names:
        return ["messages"]
    return None


def _messages(messages: object, where: str) -> list[Part]:
    """Turns as ``<|role|>``, a line end, the content, a line end; what the assistant says is counted."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages must be a list with at least one message; got {_kind(messages)}")
    parts: list[Part] = []
    for number, message in enumerate(messages, 1):
        here = f"{where}, message {number}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise DataError(f"{here} must be an object with role and content; got {_kind(message)}")
        role = message["role"]
        if role not in ROLES:
            hint = nearest(role, ROLES) if isinstance(role, str) else ""
            raise DataError(f"{here}: role must be one of {', '.join(ROLES)}; got {role!r}{hint}")
        content = _text(message["content"], "content", here, empty=role != "assistant")
        head = f"<|{role}|>\n".encode()
        if role == "assistant":
            parts += [Part(head, False), Part(content, True)]
        else:
            parts.append(Part(head + content + b"\n", False))
    if not any(part.counted for part in parts):
        raise DataError(
            f"{where}: messages must hold at least one of the assistant: the loss is taken on those"
        )
    return parts


def _text(value: object, field: str, where: str, *, empty: bool = False) -> bytes:
    """`value` as UTF-8 with ``\\n`` line ends, or an error that names `where`."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {field} must be text; got {_kind(value)}")
    if not value and not empty:
        raise DataError(f"{where}: {field} must hold text; it is empty")
    try:
        return value.replace("\r\n", "\n").encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {field} must be Unicode text; character {error.start} is half of a surrogate pair"
        ) from error


def _kind(value: object) -> str:
    """What `value` is, in the words of JSON."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, list | dict) and not value:
        return "an empty list" if isinstance(value, list) else "an empty object"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__) + (
        f" ({str(value)[:40]})" if isinstance(value, int | float) else ""
    )
